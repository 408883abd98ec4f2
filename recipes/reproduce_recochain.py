"""RecoChain on prepared data: what ranking adds to the beams, one command a row of the table.

    python -m recipes.reproduce_recochain --data_dir data --row default --seed 0     # trains both stages, or goes on
    python -m recipes.reproduce_recochain --data_dir data --collect                  # runs/recochain/recochain.json, a table

Our reading (arXiv 2604.25787): stage I on generation and the item-level score, stage II on the model's own beams with
sub-histories. Leave-one-out, items are scored over the whole catalogue; the fusion weight of every beam is chosen on
validation by NDCG@10, test reports. `oracle` is what a perfect ranking of the beam would reach. Where users come back to
items (Taobao), their own may be listed (the default), recency is a baseline, and the results are also told for targets that
are in the history (repeat) and that are not (explore). A stage I is trained once for all rows that share it.
"""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
import torch
from datasets import load_from_disk
from transformers import HfArgumentParser

from modeling_unigrf import UniGRFForCausalLM
from recipes import train
from recipes.baselines import baseline_results
from recipes.evaluate import METRICS, EvaluateArguments, candidates, lists_and_ranks
from recipes.results import made_by
from tokenization import SemanticIdTokenizer

BASE = {"window": 7, "retrieved": 10, "exclude": False, "detach": False, "learned": True, "embedding": True}
# What a row changes.
ROWS: dict[str, dict] = {
    "default": {},
    **{f"k{count}": {"retrieved": count} for count in (0, 5, 20)},
    **{f"window{items}": {"window": items} for items in (31, 127)},
    "candidate-excluded": {"exclude": True},
    "history-detached": {"detach": True},
    "no-learned-part": {"learned": False},
    "no-embedding-part": {"embedding": False},
}
COLUMNS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")


@dataclass
class ReproduceArguments:
    """One row of the table, or the table."""

    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare."})
    row: str = field(default="default", metadata={"help": "What differs.", "choices": list(ROWS)})
    seed: int = field(default=0, metadata={"help": "Of weights, batches and dropout."})
    num_beams: list[int] = field(default_factory=lambda: [10, 20, 40, 256], metadata={"help": "Beams measured."})
    num_train_beams: int = field(default=20, metadata={"help": "Beams of stage II."})
    union_items: int = field(default=0, metadata={"help": "Best items of the item-level score beside the beams."})
    ranking_weights: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0], metadata={"help": "To choose from."}
    )
    max_long_items: int = field(default=1000, metadata={"help": "Items of a long history."})
    exclude_history: bool = field(default=False, metadata={"help": "Never list a user's own items."})
    text_config: str = field(default=json.dumps(train.LLAMA), metadata={"help": "The backbone, as JSON."})
    epochs: float = field(default=10.0, metadata={"help": "Of stage I."})
    second_epochs: float = field(default=2.0, metadata={"help": "Of stage II."})
    passes: int = field(default=4, metadata={"help": "Passes an epoch, as in recipes.train."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Of stage I; stage II takes a quarter."})
    batch_size: int = field(default=64, metadata={"help": "Rows of a step."})
    users_at_once: int = field(default=16, metadata={"help": "Users that are measured together."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16, where the hardware has it."})
    output_dir: str = field(default="runs/recochain", metadata={"help": "One folder a run."})
    collect: bool = field(default=False, metadata={"help": "Only put finished runs together."})


def train_stages(args: ReproduceArguments, row: dict) -> Path:
    """Both stages, each done once; the folder of the finished model."""
    root = Path(args.output_dir)
    shared = [f"--data_dir={args.data_dir}", f"--text_config={args.text_config}", f"--max_items={row['window']}"]
    shared += [f"--passes={min(args.passes, row['window'])}", f"--per_device_train_batch_size={args.batch_size}"]
    shared += [f"--seed={args.seed}", f"--bf16={args.bf16}", f"--rank_by_item_embeddings={row['embedding']}"]
    shared += ["--save_total_limit=1", *([] if row["learned"] else ["--item_table_size=0"])]
    parts = "".join(name[0] for name in ("learned", "embedding") if row[name])
    one = root / f"stage-one-window{row['window']}-{parts}-{args.seed}"
    first = [*shared, f"--output_dir={one}", f"--num_train_epochs={args.epochs}"]
    checkpoint = train.train(*train.parse([*first, f"--learning_rate={args.learning_rate}"]))
    second = [
        *shared,
        f"--output_dir={root / f'{args.row}-{args.seed}'}",
        f"--init_from={checkpoint}",
        f"--num_train_epochs={args.second_epochs}",
        f"--learning_rate={args.learning_rate / 4}",
        f"--num_retrieved_items={row['retrieved']}",
        f"--exclude_candidate={row['exclude']}",
        f"--detach_history={row['detach']}",
        f"--num_train_beams={args.num_train_beams}",
        f"--max_long_items={args.max_long_items}",
    ]
    return train.train(*train.parse(second))


def measure(args: ReproduceArguments, row: dict, checkpoint: Path) -> dict[str, dict]:
    """For every number of beams: generation, ranked, oracle, and what validation chose."""
    tokenizer = SemanticIdTokenizer.from_pretrained(checkpoint)
    model = UniGRFForCausalLM.from_pretrained(checkpoint).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    dataset = load_from_disk(str(Path(args.data_dir) / "dataset"))
    metric = evaluate.load(str(METRICS / "next_item"), keep_in_memory=True)
    targets = {name: torch.tensor(dataset[name]["target"][:]).long() for name in ("validation", "test")}
    repeats = np.array([user["target"] in user["items"] for user in dataset["test"]])
    asked = EvaluateArguments(
        checkpoint=str(checkpoint),
        data_dir=args.data_dir,
        output_dir=args.output_dir,
        max_items=row["window"],
        max_long_items=args.max_long_items,
        union_items=args.union_items,
        exclude_history=args.exclude_history,
        batch_size=args.users_at_once,
    )

    def compute(lists: list, references: torch.Tensor) -> dict[str, float]:
        found = metric.compute(predictions=lists, references=references.tolist())
        return {name: found[name] for name in COLUMNS}

    results = {}
    for num_beams in args.num_beams:
        found = {name: candidates(model, tokenizer, dataset[name], num_beams, asked) for name in targets}
        tried = {
            weight: compute(
                lists_and_ranks(found["validation"], weight, targets["validation"], 10)[0], targets["validation"]
            )
            for weight in args.ranking_weights
        }
        weight = max(tried, key=lambda one: tried[one]["ndcg@10"])
        lists = {
            name: lists_and_ranks(found["test"], used, targets["test"], 10)[0]
            for name, used in (("generation", 0.0), ("ranked", weight), ("ranked at weight 1", 1.0))
        }
        cells = {name: compute(one, targets["test"]) for name, one in lists.items()}
        for kind, chosen in (("repeat", repeats), ("explore", ~repeats)):
            for name in ("generation", "ranked") if chosen.any() else ():
                some = [one for one, is_chosen in zip(lists[name], chosen, strict=True) if is_chosen]
                cells[f"{name}, {kind}"] = compute(some, targets["test"][torch.from_numpy(chosen)])
        held = (found["test"]["item_indices"] == targets["test"][:, None]).any(dim=1).float().mean()
        cells["oracle"] = dict.fromkeys(COLUMNS, float(held))
        results[str(num_beams)] = {"cells": cells, "ranking_weight": weight, "share of repeats": float(repeats.mean())}
    return results


def run(args: ReproduceArguments) -> None:
    """Trains and measures one row, and writes `result.json` into its folder."""
    work = {name: value for name, value in vars(args).items() if name not in ("data_dir", "output_dir", "collect")}
    file = Path(args.output_dir) / f"{args.row}-{args.seed}" / "result.json"
    if file.exists() and json.loads(file.read_text())["arguments"] == work:
        print(f"{file.parent} is finished")
        return
    row = {**BASE, **ROWS[args.row]}
    beams = measure(args, row, train_stages(args, row))
    made = made_by(f"python -m recipes.reproduce_recochain --row {args.row} --seed {args.seed}")
    file.write_text(json.dumps({"arguments": work, "beams": beams, "made by": made}, indent=1))


def collect(args: ReproduceArguments) -> str:
    """Writes `recochain.json`, means and standard deviations over seeds with the baselines, and returns a table of it."""
    root, runs = Path(args.output_dir), {}
    for file in sorted(root.glob("*/result.json")):
        result = json.loads(file.read_text())
        for num_beams, found in result["beams"].items():
            for name, cell in found["cells"].items():
                runs.setdefault((result["arguments"]["row"], num_beams, name), []).append(cell)
    rows = []
    for (row, num_beams, name), cells in runs.items():
        spread = {column: [cell[column] for cell in cells] for column in COLUMNS}
        means = {column: statistics.mean(values) for column, values in spread.items()}
        deviations = {column: statistics.stdev(values) if len(cells) > 1 else 0.0 for column, values in spread.items()}
        rows.append(
            {"row": row, "beams": num_beams, "list": name, "runs": len(cells), "mean": means, "std": deviations}
        )
    dataset = load_from_disk(str(Path(args.data_dir) / "dataset"))
    num_items = SemanticIdTokenizer.from_pretrained(Path(args.data_dir) / "tokenizer").num_items
    baselines = baseline_results(dataset, num_items, 10, exclude_history=args.exclude_history)
    for name, found in baselines.items():
        means = {column: found["test"][column] for column in COLUMNS}
        rows.append({"row": name, "beams": "", "list": "baseline", "runs": 1, "mean": means, "std": {}})
    (root / "recochain.json").write_text(json.dumps(rows, indent=1))
    lines = ["| row | beams | list | runs | " + " | ".join(COLUMNS) + " |", "| --- " * (4 + len(COLUMNS)) + "|"]
    for one in rows:
        cells = [f"{one['mean'][name]:.4f} ± {one['std'].get(name, 0.0):.4f}" for name in COLUMNS]
        lines.append("| " + " | ".join([one["row"], one["beams"], one["list"], str(one["runs"]), *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    arguments = HfArgumentParser(ReproduceArguments).parse_args_into_dataclasses()[0]
    print(collect(arguments)) if arguments.collect else run(arguments)
