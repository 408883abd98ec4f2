"""Run the whole job on MovieLens-100K: from a table of ratings to ranked titles, in minutes on two CPU cores.

    python -m recipes.demo --output_dir runs/demo            # `make demo`
    python -m recipes.demo --movielens path/to/ml-100k       # GroupLens's files

The stages are tables, prepare (content embeddings, semantic IDs), baselines, train, evaluate, show (in a new process)
and report. A second run reuses each stage with equal arguments, and resumes an interrupted training. The output
folder holds:

    checkpoint/     the model, with its tokenizer and code
    report.md       metrics, pictures and the lists of example users
    metrics.json    the metrics, their protocol and how they were made
"""

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from recipes import train
from recipes.common.arguments import SEED, check_ranges, parse_arguments
from recipes.common.files import check_writable, write_json
from recipes.common.profiling import bf16_speed_up
from recipes.common.run_tracking import Stages, made_by
from recipes.data import movielens
from recipes.data.prepared import load_prepared
from recipes.evaluate import EvaluateArguments, evaluate_checkpoint
from recipes.evaluation.baselines import baseline_results
from recipes.evaluation.report import COLUMNS, LISTS, report_of_checkpoint
from recipes.prepare import PrepareArguments, prepare
from recipes.training.arguments import ModelArguments

# For 1,682 items, this uses all codes and leaves few collisions.
TOKENIZATION = {"codebook_sizes": [64, 64, 64], "pca_dim": 32}
# Room for data, checkpoints and pictures of a run.
RUN_BYTES = 64 * 2**20
TRAINING = [
    "--crops_per_epoch=8",
    "--item_dropout=0.1",
    "--per_device_train_batch_size=32",
    "--logging_steps=20",
    "--eval_strategy=steps",
    "--eval_steps=0.125",
    "--save_strategy=steps",
    "--save_steps=0.125",
    "--save_total_limit=1",
]


@dataclass
class DemoArguments:
    """Data, and the folder of the run."""

    output_dir: str = field(
        default="runs/demo", metadata={"help": "Folder that receives report.md, metrics.json and checkpoint/."}
    )
    movielens: str | None = field(
        default=None, metadata={"help": "Folder with GroupLens's ml-100k. None: the copy in the RecBole wheel."}
    )
    seed: int = field(default=0, metadata={"help": "Random seed of codebooks, windows, weights and batches."})


def main(args: DemoArguments) -> None:
    """Run all stages, and print recommendations and metrics."""
    check_ranges(args, {"seed": SEED})
    root = Path(args.output_dir)
    check_writable(root, "output_dir", RUN_BYTES)
    stages = Stages(root)

    # Data
    tables = [root / "tables" / f"{name}.csv" for name in ("interactions", "items")]
    stages("tables", {"movielens": args.movielens}, lambda: write_tables(args, *tables), tables)
    preparing = PrepareArguments(
        interactions=str(tables[0]),
        items=str(tables[1]),
        output_dir=str(root / "data"),
        seed=args.seed,
        **TOKENIZATION,
    )
    stages("prepare", {**TOKENIZATION, "seed": args.seed}, lambda: prepare(preparing), [root / "data"])
    baseline_file = root / "baselines.json"
    # Results of another version lack some statistics.
    stages(
        "baselines", {"statistics": [*COLUMNS]}, lambda: write_baselines(root / "data", baseline_file), [baseline_file]
    )

    # Training
    flags = [*TRAINING, f"--bf16={bf16_speed_up() > 1}"]
    work = {"prepared": asdict(preparing), "model": asdict(ModelArguments()), "training": flags}
    training = train.parse([*folder_flags(root, work), f"--seed={args.seed}", *flags])
    stages("train", work, lambda: train.train(*training), [root / "checkpoint"])

    # Evaluation
    measuring = EvaluateArguments(
        checkpoint=str(root / "checkpoint"), data_dir=str(root / "data"), output_dir=str(root), store=True
    )
    settings = {name: value for name, value in asdict(measuring).items() if not name.endswith(("checkpoint", "_dir"))}
    provenance = made_by(f"python -m recipes.demo --seed {args.seed}") | {"training": " ".join(flags)}
    outputs = [root / "metrics.json", root / "ranks.json"]
    stages("evaluate", settings, lambda: write_metrics(measuring, baseline_file, provenance), outputs)
    metrics = json.loads((root / "metrics.json").read_text())
    metrics["seconds"] = {name: stage["seconds"] for name, stage in stages.done.items()}
    write_json(root / "metrics.json", metrics)

    # Examples and report
    examples = show_examples(root)
    print(examples, flush=True)
    report_of_checkpoint(root, root / "checkpoint", metrics, examples)
    print_metrics(metrics, root / "report.md")


def write_tables(args: DemoArguments, interactions_file: Path, items_file: Path) -> None:
    """Write the tables of interactions and items."""
    interactions_file.parent.mkdir(exist_ok=True)
    interactions, items = movielens.movielens_100k(args.movielens)
    interactions.to_csv(interactions_file, index=False)
    items.to_csv(items_file, index=False)


def write_baselines(data_dir: Path, file: Path) -> None:
    """Measure the baselines, and write their results."""
    data = load_prepared(data_dir)
    results = baseline_results(data.dataset, data.tokenizer.num_items, embeddings=data.embeddings)
    write_json(file, results)


def folder_flags(root: Path, work: dict) -> list[str]:
    """Make the flags of a training's folders; the folder of the Trainer's checkpoints depends on the arguments."""
    key = hashlib.sha256(json.dumps(work).encode()).hexdigest()[:8]
    folders = {"data_dir": "data", "output_dir": f"training-{key}", "checkpoint_dir": "checkpoint"}
    return [f"--{name}={root / folder}" for name, folder in folders.items()]


def write_metrics(args: EvaluateArguments, baseline_file: Path, provenance: dict) -> None:
    """Measure the checkpoint, and write the metrics with their provenance."""
    metrics = evaluate_checkpoint(args, json.loads(baseline_file.read_text()))
    write_json(Path(args.output_dir) / "metrics.json", metrics | {"made_by": provenance})


def show_examples(root: Path) -> str:
    """Run recipes.show in a new process, which reads the checkpoint alone, and return the lists that it prints."""
    folders = [f"--checkpoint={root / 'checkpoint'}", f"--data_dir={root / 'data'}"]
    command = [sys.executable, "-m", "recipes.show", *folders]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def print_metrics(metrics: dict, page: Path) -> None:
    """Print the test metrics as a table, and the path of the report."""
    print(f"\n{'test':<20}" + "".join(f"{column:>11}" for column in COLUMNS))
    results = metrics["baselines"] | {label: metrics[key] for key, label in LISTS.items()}
    for name, values in results.items():
        print(f"{name:<20}" + "".join(f"{values[column]:11.4f}" for column in COLUMNS))
    print(f"like AUC {metrics['ranking']['auc']:.4f}, invalid items {metrics['invalid_items']}, report: {page}")


if __name__ == "__main__":
    main(*parse_arguments(DemoArguments))
