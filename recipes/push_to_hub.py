"""Upload a trained model to a Hub repository: weights, tokenizer, codebooks, item map, code, card and metrics.

    python -m recipes.push_to_hub --checkpoint runs/demo/checkpoint --metrics runs/demo/metrics.json \
        --dataset_name MovieLens-100K --repo_id user/name --private
    python -m recipes.push_to_hub --checkpoint runs/demo/checkpoint --metrics runs/demo/metrics.json \
        --dataset_name MovieLens-100K --repo_id user/name --dry_run --output_dir runs/demo/hub

The recipe writes a folder, and loads it in a new process with the folder's own code. If that process recommends as the
checkpoint does, the recipe uploads the folder. A dry run uploads nothing. `hf auth login` logs in.

The card is `model_card.md`, filled with the metrics of the run.
"""

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from modeling_unigrf import RecommendationPipeline, UniGRFForCausalLM
from modeling_unigrf.adapters_unigrf import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    RECORD_FILE,
    TRANSITIONS_FILE,
    base_of,
    find_adapter,
)
from recipes.common.arguments import REPOSITORY, check_checkpoint, parse_arguments
from recipes.common.files import check_writable, read_json, whole_folder, write_json
from recipes.common.hashing import weights_hash
from recipes.evaluation.beyond_accuracy import RECALLS, STATISTICS
from recipes.evaluation.inference import load_checkpoint
from recipes.evaluation.report import COLUMNS, LISTS
from tokenization import SemanticIdTokenizer

TEMPLATE = Path(__file__).parents[1] / "model_card.md"
PICTURES = ("recall_at_k.png", "learning_curves.png", "codebooks.png")
# Loading such files runs no code without consent.
SUFFIXES = {".json", ".safetensors", ".py", ".md", ".png"}
# Parts of metrics.json that the card shows.
PARTS = {
    "protocol",
    "selection",
    "baselines",
    "generation",
    "ranked",
    "ranking",
    "invalid_items",
    "generated_items_checked",
    "weights",
}
# `pipeline` loads through AutoConfig, AutoModelForCausalLM and AutoTokenizer.
LOAD = """
import json, sys
from transformers import pipeline
recommender = pipeline("recommendation", model=sys.argv[1], trust_remote_code=True)
for part in (recommender, recommender.model, recommender.model.config, recommender.tokenizer):
    assert type(part).__module__.startswith("transformers_modules."), type(part)
print(json.dumps(recommender(json.loads(sys.argv[2]), num_beams=10)))
"""


@dataclass
class PushArguments:
    """Checkpoint, metrics and Hub repository."""

    checkpoint: str = field(
        metadata={"help": "Checkpoint or adapter, a folder that recipes.train wrote and recipes.evaluate measured."}
    )
    metrics: str = field(
        metadata={"help": "File metrics.json of recipes.evaluate. Pictures of the report beside it go with it."}
    )
    repo_id: str = field(metadata={"help": "Hub repository, user/name. A missing repository is created."})
    dataset_name: str = field(
        default="unnamed", metadata={"help": "Training data, as a name or a Hub data set ID, for the card."}
    )
    base_repo_id: str | None = field(
        default=None,
        metadata={
            "help": "Hub repository of an adapter's base. None: the base that the adapter names, which must be there."
        },
    )
    private: bool = field(default=False, metadata={"help": "Create a private repository."})
    dry_run: bool = field(default=False, metadata={"help": "Write and check the folder without an upload."})
    output_dir: str | None = field(
        default=None, metadata={"help": "New folder to write. None: a temporary folder, removed after the upload."}
    )


def read_metrics(path: Path) -> dict:
    """Read metrics.json; raise `ValueError` if a part that the card shows is missing, or a figure is not finite."""
    if not path.is_file():
        raise ValueError(f"`metrics` must be a metrics.json file, got no file at {path}. Run recipes.evaluate first.")
    metrics = read_json(path)
    missing = sorted(PARTS - metrics.keys())
    if not missing:
        results = {**metrics["baselines"], "generation": metrics["generation"], "ranked": metrics["ranked"]}
        missing = [
            f"{name}.{column}" for name, values in results.items() for column in COLUMNS if column not in values
        ]
    if missing:
        raise ValueError(
            f"`metrics` must have all parts that the card shows, got {path} without {missing}. Run recipes.evaluate."
        )
    figures = {f"{name}.{column}": values[column] for name, values in results.items() for column in COLUMNS}
    figures |= {f"ranking.{name}": value for name, value in metrics["ranking"].items() if name == "auc"}
    if wrong := {name: value for name, value in figures.items() if not is_figure(value)}:
        raise ValueError(f"`metrics` must have finite figures, got {wrong} in {path}. Run recipes.evaluate again.")
    return metrics


def is_figure(value: object) -> bool:
    """Return whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def measured_recommender(folder: Path, metrics: dict) -> RecommendationPipeline:
    """
    Load the checkpoint that the metrics measure.

    Raises:
        ValueError: if the metrics are those of other weights or serving options.
    """
    model, tokenizer = load_checkpoint(folder)
    recommender = RecommendationPipeline(model=model, tokenizer=tokenizer)
    selection = metrics["selection"]
    served = asdict(recommender.model.serving_options())
    if changed := [name for name in selection if name in served and served[name] != selection[name]]:
        raise ValueError(
            f"`metrics` must be the metrics of this checkpoint, got { ({name: selection[name] for name in changed}) } "
            f"in metrics.json and { ({name: served[name] for name in changed}) } in the checkpoint. Run "
            "recipes.evaluate with --store True."
        )
    if weights_hash(recommender.model) != metrics["weights"]:
        raise ValueError(
            f"`metrics` must be the metrics of this checkpoint, got those of other weights than in {folder}. Run "
            "recipes.evaluate, also for metrics of version 0.1."
        )
    return recommender


def card_data(repo_id: str, dataset_name: str, metrics: dict, base: str | None) -> ModelCardData:
    """Make the metadata of the card."""
    kind = re.sub(r"[^\w./-]+", "-", dataset_name)
    dataset = {"dataset_name": dataset_name, "dataset_type": kind, "dataset_split": "test"}
    results = [
        EvalResult(
            task_type="recommendation",
            task_name="Next item",
            metric_type=column.replace("@", "_at_"),
            metric_name=f"{column}, {label}",
            metric_value=metrics[part][column],
            **dataset,
        )
        for part, label in LISTS.items()
        for column in COLUMNS
    ]
    if "auc" in metrics["ranking"]:
        results.append(
            EvalResult(
                task_type="ranking",
                task_name="Behavior of the held-out interaction",
                metric_type="roc_auc",
                metric_name="AUC",
                metric_value=metrics["ranking"]["auc"],
                **dataset,
            )
        )
    return ModelCardData(
        model_name=repo_id.split("/")[-1],
        eval_results=results,
        library_name="transformers",
        base_model=base,
        # The Hub has no task `recommendation`, and would guess text-generation.
        pipeline_tag="other",
        license="apache-2.0",
        tags=["recommendation", "recommender-system", "generative-retrieval", "semantic-ids", "ranking", "unigrf"],
        datasets=[kind],
        metrics=["recall", "ndcg", "mrr", "roc_auc"],
    )


def write_folder(args: PushArguments, folder: Path) -> None:
    """
    Write all files of the repository into a new or empty folder, and check them.

    Raises:
        ValueError: if an input is missing or does not fit, or the folder does not recommend as the checkpoint does.
    """
    # Check the inputs.
    if not TEMPLATE.is_file():
        raise ValueError(
            f"The card's template must be at {TEMPLATE}, got no file. Run this recipe from a clone: `pip install -e "
            ".`."
        )
    check_checkpoint(args.checkpoint, "checkpoint")
    metrics = read_metrics(Path(args.metrics))
    check_no_links([path for path in published_files(args) if path.is_symlink()])
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(
            f"`output_dir` must be a new or empty folder, got {folder} with files. Choose another folder, or remove "
            "the files."
        )
    adapter = find_adapter(args.checkpoint, {})
    base = base_repository(args, adapter)
    recommender = measured_recommender(Path(args.checkpoint), metrics)
    num_bytes = sum(file.stat().st_size for file in Path(args.checkpoint).iterdir())
    check_writable(folder, "output_dir", num_bytes)

    # Write the files.
    tokenizer = recommender.tokenizer
    history = {"items": tokenizer.item_ids[:2], "behaviors": [tokenizer.behaviors[-1]] * 2}
    with whole_folder(folder, "README.md") as unfinished:
        if adapter is None:
            recommender.save_pretrained(unfinished)
        else:
            write_adapter(adapter, str(base), tokenizer, unfinished)
        pictures, training = copy_reports(args, unfinished)
        card = ModelCard.from_template(
            card_data(args.repo_id, args.dataset_name, metrics, base),
            template_path=str(TEMPLATE),
            repo_id=args.repo_id,
            dataset_name=args.dataset_name,
            model_name=args.repo_id.split("/")[-1],
            base_model=base,
            results=metrics,
            columns=COLUMNS,
            best=best_values(metrics),
            statistics=STATISTICS,
            recalls=RECALLS,
            config=recommender.model.config,
            generation_config=recommender.model.generation_config,
            num_parameters=recommender.model.num_parameters(),
            tokenizer=tokenizer,
            training=training,
            text=markdown_text,
            pictures=pictures,
            history=history,
            list_length=min(10, recommender.model.serving_options().max_return_sequences),
        )
        card.save(unfinished / "README.md")

    # Check them.
    check_files(folder)
    check_loading(folder, recommender, history)


def base_repository(args: PushArguments, adapter: Path | None) -> str | None:
    """
    Return the Hub repository of an adapter's base; None for a whole checkpoint.

    Raises:
        ValueError: for a base that is a folder of this machine, and for a base of a whole checkpoint.
    """
    if adapter is None:
        if args.base_repo_id is not None:
            raise ValueError(
                f"`base_repo_id` must be left out for a whole checkpoint, got {args.base_repo_id!r}. Leave it out."
            )
        return None
    base = args.base_repo_id or base_of(adapter)
    if Path(base).exists() or not REPOSITORY.fullmatch(base):
        raise ValueError(
            f"`base_repo_id` must be the Hub repository of the adapter's base, got {base!r}. Push the base first, and "
            "name its repository."
        )
    return base


def write_adapter(adapter: Path, base: str, tokenizer: SemanticIdTokenizer, folder: Path) -> None:
    """
    Copy an adapter, with another name of its base, and write the tokenizer beside it.

    Raises:
        ValueError: if `base` is another model than the adapter was trained on.
    """
    tokenizer.save_pretrained(folder)
    for name in (ADAPTER_WEIGHTS_FILE, RECORD_FILE, TRANSITIONS_FILE, "generation_config.json"):
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, folder / name)
    write_json(
        folder / ADAPTER_CONFIG_FILE, read_json(adapter / ADAPTER_CONFIG_FILE) | {"base_model_name_or_path": base}
    )
    # Downloads the base, which `check_loading` reads offline.
    UniGRFForCausalLM.from_pretrained(folder)


def published_files(args: PushArguments) -> list[Path]:
    """List the files beside the model that are published, if they exist: metrics, pictures and training log."""
    metrics_file = Path(args.metrics)
    pictures = [metrics_file.parent / name for name in PICTURES]
    return [metrics_file, *pictures, Path(args.checkpoint) / "training_log.json"]


def check_no_links(links: list[Path]) -> None:
    """Raise `ValueError` for links: they would publish files from elsewhere on this machine."""
    if links:
        raise ValueError(
            f"Published files must be files, got the links {[str(link) for link in links]}. Replace each by a copy of "
            "the file that it names; nothing was uploaded."
        )


def best_values(metrics: dict) -> dict[str, float]:
    """Return the best figure of each column among the baselines' and the model's lists."""
    rows = [*metrics["baselines"].values(), metrics["generation"], metrics["ranked"]]
    return {column: max(row[column] for row in rows) for column in COLUMNS}


def copy_reports(args: PushArguments, folder: Path) -> tuple[list[str], dict[str, float]]:
    """Copy metrics, pictures and the figures of training; return the names of the pictures and the final figures."""
    metrics_file, *pictures, log_file = published_files(args)
    pictures = [picture for picture in pictures if picture.is_file()]
    for file in (metrics_file, *pictures):
        shutil.copyfile(file, folder / (file.name if file in pictures else "metrics.json"))
    log = figures_of(read_json(log_file)) if log_file.is_file() else {}
    if log:
        write_json(folder / log_file.name, log)
    return [picture.name for picture in pictures], log.get("metrics", {})


def figures_of(log: dict) -> dict:
    """Return the figures of a training log, and nothing that could name a folder or a person."""

    def numbers(entry: dict) -> dict[str, float]:
        return {name: value for name, value in entry.items() if is_figure(value)}

    return {
        "metrics": numbers(log.get("metrics", {})),
        "log_history": [numbers(e) for e in log.get("log_history", [])],
    }


def markdown_text(value: object) -> str:
    """Write a value as text of one line that Markdown and HTML show as it is."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~$!#])", r"\\\1", text)


def check_files(folder: Path) -> None:
    """Raise `ValueError` for a file of a kind that the repository must not have, such as a pickle."""
    strange = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix not in SUFFIXES)
    if strange:
        raise ValueError(
            f"The repository must hold only files of the kinds {sorted(SUFFIXES)}, got {strange}. Remove them; "
            "nothing was uploaded."
        )


def check_loading(folder: Path, recommender: RecommendationPipeline, history: dict) -> None:
    """Raise `ValueError` unless a new process, with the folder's own code, recommends as `recommender` does."""
    # A new process.
    with tempfile.TemporaryDirectory() as modules:
        done = subprocess.run(
            [sys.executable, "-P", "-c", LOAD, str(folder.resolve()), json.dumps(history)],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise ValueError(
            f"The folder must load in a new process, got {done.stderr[-2000:]} Correct the error above; nothing was "
            "uploaded."
        )

    # Compare scores: items of equal scores may change places, and NaN equals nothing.
    expected = [item["score"] for item in recommender(history, num_beams=10)]
    actual = [item["score"] for item in json.loads(done.stdout.splitlines()[-1])]
    if len(actual) != len(expected) or not all(abs(a - b) <= 1e-2 for a, b in zip(actual, expected, strict=True)):
        raise ValueError(
            f"The folder {folder} must recommend with the checkpoint's scores {expected}, got {actual}. Report this "
            "error; nothing was uploaded."
        )


def push(args: PushArguments) -> None:
    """Write and check the folder, and upload it unless the run is a dry run."""
    validate_repo_id(args.repo_id)
    if args.dry_run and args.output_dir is None:
        raise ValueError("`output_dir` must be set for a dry run, got None. Choose the folder to write.")
    with nullcontext(args.output_dir) if args.output_dir else tempfile.TemporaryDirectory() as folder:
        write_folder(args, Path(folder))
        if args.dry_run:
            print(f"{folder} holds {len(list(Path(folder).iterdir()))} files for {args.repo_id}; nothing was uploaded")
            return
        api = HfApi()
        # None: the owner's default visibility; an existing repository keeps its own.
        url = api.create_repo(args.repo_id, private=args.private or None, exist_ok=True)
        api.upload_folder(repo_id=args.repo_id, folder_path=folder, commit_message="Model, tokenizer, code and card")
        print(f"uploaded to {url}")


if __name__ == "__main__":
    push(*parse_arguments(PushArguments))
