"""Train and tune SASRec's task as a baseline of `recipes.papers.recochain.reproduce`.

    python -m recipes.prepare --atomic True ... --output_dir runs/beauty/atomic
    python -m recipes.papers.recochain.sasrec --data_dir runs/beauty/atomic --output_dir runs/beauty/sasrec
    python -m recipes.papers.recochain.reproduce --data_dir runs/beauty/data --output_dir runs/beauty --collect ...

The first command prepares the tables of another folder again, with one code per item. The second one writes
`sasrec.json`. The third one adds `sasrec/sasrec.json` of its output folder to the results.

The model is SASRec (Kang and McAuley 2018, arXiv 1808.09781) with the full cross-entropy of later work. It has a
softmax over all items at every position, no ranking and no content embeddings. The first seed trains every setting,
and validation chooses one by NDCG@10. The other seeds train the chosen setting, and the test split reports. A second
run skips finished trainings.
"""

import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from datasets import load_from_disk

from recipes.common.arguments import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE_BELOW_ONE,
    check_ranges,
    parse_arguments,
)
from recipes.common.files import check_writable
from recipes.common.result_files import rounded
from recipes.common.run_tracking import command, made_by, require_single_process
from recipes.data.prepared import prepared
from recipes.evaluation.inference import Measurement, candidates, load_checkpoint, load_metric
from recipes.papers.recochain.reproduce import SMALL
from recipes.training.arguments import from_json
from recipes.training.run import parse, train
from tokenization import SemanticIdTokenizer

RANGES = {
    **dict.fromkeys(("max_items", "batch_size"), COUNT),
    **dict.fromkeys(("epochs", "learning_rates"), POSITIVE),
    "weight_decay": NOT_NEGATIVE,
    "embedding_dropouts": SHARE_BELOW_ONE,
    "seeds": SEED,
}


@dataclass
class SasrecArguments:
    """Settings that are tried."""

    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare --atomic True."})
    output_dir: str = field(metadata={"help": "Folder that receives a folder for each training, and sasrec.json."})
    text_config: str = field(default=json.dumps(SMALL), metadata={"help": "Config of the backbone as JSON."})
    max_items: int = field(default=20, metadata={"help": "Most recent items of a history that the model reads."})
    epochs: float = field(
        default=15.0, metadata={"help": "Epochs of a training. The learning rate falls to zero by a cosine."}
    )
    batch_size: int = field(default=32, metadata={"help": "Rows per optimizer step."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of every training."})
    learning_rates: list[float] = field(
        default_factory=lambda: [2e-3], metadata={"help": "Highest learning rates that validation chooses from."}
    )
    embedding_dropouts: list[float] = field(
        default_factory=lambda: [0.3, 0.5], metadata={"help": "Embedding dropouts that validation chooses from."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Seeds. The first one trains all settings, to choose one."}
    )
    exclude_history: bool = field(default=True, metadata={"help": "Keep a user's own items out of all lists."})


def train_setting(args: SasrecArguments, learning_rate: float, dropout: float, seed: int) -> Path:
    """Train a setting, unless it is finished, and return the folder of the model."""
    name = f"rate-{learning_rate:g}-dropout-{dropout:g}-{seed}"
    options = [
        f"--data_dir={args.data_dir}",
        f"--output_dir={Path(args.output_dir) / name}",
        f"--text_config={args.text_config}",
        "--tie_word_embeddings=True",
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
        "--num_transitions=0",
        "--crops_per_epoch=1",
        "--item_dropout=0",
        "--warmup_steps=0",
        "--history_item_representations=False",
        "--save_total_limit=1",
    ]
    return train(*parse(options))


def measure(args: SasrecArguments, checkpoint: Path) -> dict[str, dict[str, float]]:
    """Measure recall and NDCG of the ten best items, for validation and test."""
    model, tokenizer = load_checkpoint(checkpoint)
    dataset = load_from_disk(str(Path(args.data_dir) / "dataset"))
    measurement = Measurement(max_items=args.max_items, exclude_history=args.exclude_history)
    metric = load_metric("next_item")
    results = {}
    for name in ("validation", "test"):
        # With one code per item, the beams are the ten best items.
        lists = candidates(model, tokenizer, dataset[name], 10, measurement)["item_indices"]
        results[name] = metric.compute(predictions=lists.tolist(), references=dataset[name]["target"][:])
    return results


def run(args: SasrecArguments) -> dict:
    """
    Train, choose and test; return the unrounded content of `sasrec.json`.

    Raises:
        ValueError: for numbers out of range, missing folders, and data with several codes per item.
    """
    require_single_process()
    check_ranges(args, RANGES)
    from_json(args.text_config, "text_config")
    prepared(args.data_dir)
    check_writable(args.output_dir, "output_dir")
    tokenizer = SemanticIdTokenizer.from_pretrained(Path(args.data_dir) / "tokenizer")
    if tokenizer.num_levels != 1:
        raise ValueError(
            f"`data_dir` must have one code per item, got {tokenizer.num_levels} codes in {args.data_dir}. Prepare "
            "the tables again with --atomic True, into another folder."
        )

    # Choice on validation
    tried = []
    for learning_rate, dropout in product(args.learning_rates, args.embedding_dropouts):
        setting = {"learning_rate": learning_rate, "dropout": dropout}
        tried.append({**setting, **measure(args, train_setting(args, **setting, seed=args.seeds[0]))})
        print({**setting, **{name: round(value, 4) for name, value in tried[-1]["validation"].items()}}, flush=True)
    best = max(tried, key=lambda entry: entry["validation"]["ndcg@10"])
    chosen = {name: best[name] for name in ("learning_rate", "dropout")}

    # Test
    tests = [best["test"]]
    tests += [measure(args, train_setting(args, **chosen, seed=seed))["test"] for seed in args.seeds[1:]]
    result = {
        "chosen": chosen,
        "tried": [
            {**entry, "validation": entry["validation"]["ndcg@10"], "test": entry["test"]["ndcg@10"]}
            for entry in tried
        ],
        "seeds": args.seeds,
        "tests": tests,
        "made by": made_by(command("recipes.papers.recochain.sasrec", args, data_dir="path/to/atomic")),
    }
    (Path(args.output_dir) / "sasrec.json").write_text(json.dumps(rounded(result), indent=1))
    return result


if __name__ == "__main__":
    run(*parse_arguments(SasrecArguments))
