"""Puts a trained model into one Hub repository: weights, tokenizer, codebooks, item map, code, card and metrics.

    python -m recipes.push_to_hub --checkpoint runs/demo/checkpoint --metrics runs/demo/metrics.json \
        --dataset_name MovieLens-100K --repo_id user/name --private
    python -m recipes.push_to_hub --checkpoint runs/demo/checkpoint --metrics runs/demo/metrics.json \
        --dataset_name MovieLens-100K --repo_id user/name --dry_run --output_dir runs/demo/hub

A dry run uploads nothing. The folder is written first and loaded again in a new process, from its own code alone; only
if that recommends as the checkpoint does, it is uploaded. The card is `model_card.md`, filled with what the run
measured. Log in by `hf auth login`.
"""

import json
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
from recipes.common.arguments import parse_arguments
from recipes.common.hashing import weights_hash
from recipes.evaluation.report import COLUMNS
from tokenization import SemanticIdTokenizer

TEMPLATE = Path(__file__).parents[1] / "model_card.md"
PICTURES = ("recall_at_k.png", "learning_curves.png", "codebooks.png")
SUFFIXES = {".json", ".safetensors", ".py", ".md", ".png"}  # of files that run or unpickle nothing unless asked to
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
    """What goes where."""

    checkpoint: str = field(metadata={"help": "Folder that recipes.train wrote and recipes.evaluate measured."})
    metrics: str = field(metadata={"help": "metrics.json of recipes.evaluate; the report's pictures lie beside it."})
    repo_id: str = field(metadata={"help": "Hub repository, user/name; created if it does not exist."})
    dataset_name: str = field(
        default="unnamed", metadata={"help": "What it was trained on, as a name or a Hub data set id, for the card."}
    )
    private: bool = field(default=False, metadata={"help": "Create the repository as a private one."})
    dry_run: bool = field(default=False, metadata={"help": "Write and check the folder, upload nothing."})
    output_dir: str | None = field(
        default=None, metadata={"help": "New folder to write; default: a temporary one, gone after the upload."}
    )


def read_metrics(path: Path) -> dict:
    """The content of metrics.json; `ValueError` if a part is missing that the card shows."""
    if not path.is_file():
        raise ValueError(f"Expected a metrics.json, found no file at {path}. Run recipes.evaluate first.")
    metrics = json.loads(path.read_text(encoding="utf-8"))
    missing = sorted(PARTS - metrics.keys())
    if not missing:
        results = {**metrics["baselines"], "generation": metrics["generation"], "ranked": metrics["ranked"]}
        missing = [f"{name}.{column}" for name, row in results.items() for column in COLUMNS if column not in row]
    if missing:
        raise ValueError(
            f"Expected metrics with all that the card shows, found {path} without {missing}. Run recipes.evaluate."
        )
    return metrics


def load_checkpoint(folder: Path, metrics: dict) -> RecommendationPipeline:
    """The checkpoint; `ValueError` if it is none, or not the one that was measured, with its settings."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"Expected a checkpoint of recipes.train, found no config.json in {folder}. Check the path.")
    recommender = RecommendationPipeline(
        model=UniGRFForCausalLM.from_pretrained(folder), tokenizer=SemanticIdTokenizer.from_pretrained(folder)
    )
    model, selection = recommender.model, metrics["selection"]
    served = asdict(model.serving_options())
    if changed := [name for name in selection if name in served and served[name] != selection[name]]:
        raise ValueError(
            f"Expected the metrics of this checkpoint, found { ({name: served[name] for name in changed}) } in the "
            f"checkpoint and { ({name: selection[name] for name in changed}) } in metrics.json. Run recipes.evaluate."
        )
    if weights_hash(model) != metrics["weights"]:
        raise ValueError(
            f"Expected the metrics of this checkpoint, found those of other weights than in {folder}. Run "
            "recipes.evaluate."
        )
    return recommender


def card_data(repo_id: str, dataset_name: str, metrics: dict) -> ModelCardData:
    """The card's YAML block. The Hub has no task `recommendation`; without `other` it would guess text-generation."""
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
        for part, label in (("ranked", "generation and ranking"), ("generation", "generation alone"))
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
        pipeline_tag="other",
        license="apache-2.0",
        tags=["recommendation", "recommender-system", "generative-retrieval", "semantic-ids", "ranking", "unigrf"],
        datasets=[kind],
        metrics=["recall", "ndcg", "mrr", "roc_auc"],
    )


def write_folder(args: PushArguments, folder: Path) -> None:
    """Writes everything that the repository holds into `folder`, which is new or empty."""
    metrics_file, checkpoint = Path(args.metrics), Path(args.checkpoint)
    if not TEMPLATE.is_file():
        raise ValueError(
            f"Expected the card's template at {TEMPLATE}, found none. Run this from a clone, `pip install -e .`."
        )
    metrics = read_metrics(metrics_file)
    recommender = load_checkpoint(checkpoint, metrics)
    model, tokenizer = recommender.model, recommender.tokenizer
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"Expected a new or empty output_dir, found files in {folder}. Name another, or remove them.")
    recommender.save_pretrained(folder)
    shutil.copy(metrics_file, folder / "metrics.json")
    pictures = [name for name in PICTURES if (metrics_file.parent / name).is_file()]
    for name in pictures:
        shutil.copy(metrics_file.parent / name, folder / name)
    log = checkpoint / "training_log.json"
    if log.is_file():
        shutil.copy(log, folder / log.name)
    history = {"items": tokenizer.item_ids[:2], "behaviors": [tokenizer.behaviors[-1]] * 2}
    card = ModelCard.from_template(
        card_data(args.repo_id, args.dataset_name, metrics),
        template_path=str(TEMPLATE),
        repo_id=args.repo_id,
        dataset_name=args.dataset_name,
        model_name=args.repo_id.split("/")[-1],
        results=metrics,
        columns=COLUMNS,
        config=model.config,
        generation_config=model.generation_config,
        num_parameters=model.num_parameters(),
        tokenizer=tokenizer,
        training=json.loads(log.read_text(encoding="utf-8"))["metrics"] if log.is_file() else {},
        pictures=pictures,
        history=history,
        list_length=min(10, model.serving_options().max_return_sequences),
    )
    card.save(folder / "README.md")
    check_files(folder)
    check_loading(folder, recommender, history)


def check_files(folder: Path) -> None:
    """`ValueError` if a file is of a kind that has no place in the repository, such as a pickle."""
    strange = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix not in SUFFIXES)
    if strange:
        raise ValueError(
            f"Expected files of the kinds {sorted(SUFFIXES)} alone, found {strange}. Nothing was uploaded."
        )


def check_loading(folder: Path, recommender: RecommendationPipeline, history: dict) -> None:
    """`ValueError` unless a new process, with the folder's code alone, recommends as `recommender` does."""
    with tempfile.TemporaryDirectory() as modules:
        done = subprocess.run(
            [sys.executable, "-P", "-c", LOAD, str(folder.resolve()), json.dumps(history)],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise ValueError(
            f"Expected a folder that loads in a new process, found {done.stderr[-2000:]} Nothing was uploaded."
        )
    # Scores and not items: equal scores may change places.
    expected = [row["score"] for row in recommender(history, num_beams=10)]
    found = [row["score"] for row in json.loads(done.stdout.splitlines()[-1])]
    if len(found) != len(expected) or any(abs(a - b) > 1e-2 for a, b in zip(found, expected, strict=True)):
        raise ValueError(f"Expected scores {expected} of the folder {folder}, found {found}. Nothing was uploaded.")


def push(args: PushArguments) -> None:
    """Writes and checks the folder and, unless it is a dry run, uploads it."""
    validate_repo_id(args.repo_id)
    if args.dry_run and args.output_dir is None:
        raise ValueError("Expected an output_dir for a dry run, found none. Name the folder that it shall write.")
    with nullcontext(args.output_dir) if args.output_dir else tempfile.TemporaryDirectory() as folder:
        write_folder(args, Path(folder))
        if args.dry_run:
            print(f"{folder} holds {len(list(Path(folder).iterdir()))} files for {args.repo_id}; nothing was uploaded")
            return
        api = HfApi()
        # None: the owner's default visibility, and no change of a repository that exists.
        url = api.create_repo(args.repo_id, private=args.private or None, exist_ok=True)
        api.upload_folder(repo_id=args.repo_id, folder_path=folder, commit_message="Model, tokenizer, code and card")
        print(f"uploaded to {url}")


if __name__ == "__main__":
    push(*parse_arguments(PushArguments))
