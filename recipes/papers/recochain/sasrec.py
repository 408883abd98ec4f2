"""SASRec's task as a baseline: one code an item, a softmax of all items at every position, no ranking and no embeddings.

    python -m recipes.prepare --atomic True ... --output_dir runs/beauty/atomic        # of the tables of another folder
    python -m recipes.papers.recochain.sasrec --data_dir runs/beauty/atomic --output_dir runs/beauty/sasrec

SASRec (Kang and McAuley 2018, arXiv 1808.09781) with the full cross-entropy that later work gives it, as this model without
its other parts. Every setting is trained with the first seed and validation chooses by NDCG@10, the chosen one then with the
others; test reports. A finished training is not run again. Writes `sasrec.json`, which `recipes.papers.recochain.reproduce --collect`
puts beside its rows where it finds it in `OUTPUT_DIR/sasrec`.
"""

import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from datasets import load_from_disk

from recipes import train
from recipes.common.arguments import parse_arguments
from recipes.common.result_files import rounded
from recipes.common.run_tracking import command, made_by, one_process
from recipes.evaluation.inference import Measurement, candidates, load_checkpoint, load_metric
from recipes.papers.recochain.reproduce import SMALL
from tokenization import SemanticIdTokenizer

FIELDS = {"tie_word_embeddings": True}


@dataclass
class SasrecArguments:
    """What is tried, and on what."""

    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare --atomic True."})
    output_dir: str = field(metadata={"help": "One folder a training, and sasrec.json."})
    text_config: str = field(default=json.dumps(SMALL), metadata={"help": "The backbone's config as JSON."})
    max_items: int = field(default=20, metadata={"help": "Items of a history that are read."})
    epochs: float = field(default=15.0, metadata={"help": "Of every training; the rate falls to zero by a cosine."})
    batch_size: int = field(default=32, metadata={"help": "Rows of a step."})
    weight_decay: float = field(default=0.1, metadata={"help": "Of every training."})
    learning_rates: list[float] = field(default_factory=lambda: [2e-3], metadata={"help": "To choose from."})
    embedding_dropouts: list[float] = field(default_factory=lambda: [0.3, 0.5], metadata={"help": "To choose from."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "The first one chooses."})
    exclude_history: bool = field(default=True, metadata={"help": "Leave a user's own items out of every list."})


def trained(args: SasrecArguments, learning_rate: float, dropout: float, seed: int) -> Path:
    """The folder of a finished model."""
    name = f"rate-{learning_rate:g}-dropout-{dropout:g}-{seed}"
    options = [
        f"--data_dir={args.data_dir}",
        f"--output_dir={Path(args.output_dir) / name}",
        f"--text_config={args.text_config}",
        f"--config_fields={json.dumps(FIELDS)}",
        f"--max_items={args.max_items}",
        f"--num_train_epochs={args.epochs}",
        f"--per_device_train_batch_size={args.batch_size}",
        f"--learning_rate={learning_rate}",
        f"--weight_decay={args.weight_decay}",
        f"--embedding_dropout={dropout}",
        f"--seed={seed}",
        "--ranking_loss_weight=0",
        "--dense_loss_weight=0",
        "--negatives_per_item=0",
        "--project_content_embeddings=False",
        "--embedding_table_size=0",
        "--history_item_representations=False",
        "--save_total_limit=1",
    ]
    return train.train(*train.parse(options))


def measure(args: SasrecArguments, checkpoint: Path) -> dict[str, dict[str, float]]:
    """Recall and NDCG of the ten best items, of validation and test."""
    model, tokenizer = load_checkpoint(checkpoint)
    dataset = load_from_disk(str(Path(args.data_dir) / "dataset"))
    how = Measurement(max_items=args.max_items, exclude_history=args.exclude_history)
    metric = load_metric("next_item")
    found = {}
    for name in ("validation", "test"):
        lists = candidates(model, tokenizer, dataset[name], 10, how)["item_indices"]  # with one code: the best ten
        found[name] = metric.compute(predictions=lists.tolist(), references=dataset[name]["target"][:])
    return found


def run(args: SasrecArguments) -> dict:
    """Trains, chooses and reports; returns what `sasrec.json` says, unrounded."""
    one_process()
    tokenizer = SemanticIdTokenizer.from_pretrained(Path(args.data_dir) / "tokenizer")
    if tokenizer.num_levels != 1:
        raise ValueError(
            f"Expected one code an item, found {tokenizer.num_levels} in {args.data_dir}. Prepare the tables again with --atomic "
            "True, into another folder."
        )
    tried = []
    for learning_rate, dropout in product(args.learning_rates, args.embedding_dropouts):
        setting = {"learning_rate": learning_rate, "dropout": dropout}
        tried.append({**setting, **measure(args, trained(args, **setting, seed=args.seeds[0]))})
        print({**setting, **{name: round(value, 4) for name, value in tried[-1]["validation"].items()}}, flush=True)
    best = max(tried, key=lambda one: one["validation"]["ndcg@10"])
    chosen = {name: best[name] for name in ("learning_rate", "dropout")}
    tests = [best["test"], *(measure(args, trained(args, **chosen, seed=seed))["test"] for seed in args.seeds[1:])]
    result = {
        "chosen": chosen,
        "tried": [
            {**one, "validation": one["validation"]["ndcg@10"], "test": one["test"]["ndcg@10"]} for one in tried
        ],
        "seeds": args.seeds,
        "tests": tests,
        "made by": made_by(command("recipes.papers.recochain.sasrec", args, data_dir="path/to/atomic")),
    }
    (Path(args.output_dir) / "sasrec.json").write_text(json.dumps(rounded(result), indent=1))
    return result


if __name__ == "__main__":
    run(*parse_arguments(SasrecArguments))
