"""RecoChain on prepared data: what ranking adds to the beams, one command a row of the table.

    python -m recipes.papers.recochain.reproduce --data_dir data --row default --seed 0     # trains both stages, or goes on
    python -m recipes.papers.recochain.reproduce --data_dir data --collect recochain    # recipes/papers/recochain/results/recochain.json and .png

Our reading (arXiv 2604.25787): stage I on generation and the item-level score, stage II on the model's own beams with
sub-histories. Leave-one-out, items are scored over the whole catalog; the weights of the fusion are chosen for every
number of beams on validation by NDCG@10, test reports. `oracle` is what a perfect ranking of the candidates would reach.
Where users come back to items (Taobao), their own may be listed (the default), recency is a baseline, and the results are
also told for targets that are in the history (repeat) and that are not (explore); elsewhere `--exclude_history` keeps them
out, of the beams of stage II as well. A stage I is trained once for all rows that share it.
"""

import json
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_from_disk

from modeling_unigrf.configuration_unigrf import NEXT_TARGET
from recipes import train
from recipes.common.arguments import parse_arguments
from recipes.common.files import write_json
from recipes.common.run_tracking import command, made_by, one_process
from recipes.evaluation.inference import Measurement, candidates, fused_lists, keep_choice, load_checkpoint
from recipes.evaluation.metrics.next_item.next_item import recall_and_ndcg, target_ranks
from recipes.papers.recochain.report import COLUMNS, RETIRED_ROWS, collect
from recipes.training.arguments import LLAMA
from tokenization import SemanticIdTokenizer

SMALL = {**LLAMA, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 2}
BASE = {
    "window": 7,
    "batch_share": 1.0,  # of stage I's rows a step
    "retrieved": 10,
    "detach": False,
    "learned": True,
    "embedding": True,
    "first_times": 1,  # as long as the arguments say, of each stage
    "second_times": 1,
    "inject": True,
    "dense_score": True,  # the item-level score is a part of the ranking
    "stop_gradient_dense_score": False,
    "freeze": False,  # stage II trains what ranks alone
    "paper": False,  # the ranking's loss is the paper's: of what comes next alone, beside the sum of an item's codes
}
# What a row changes.
ROWS: dict[str, dict] = {
    "default": {},
    **{f"k{count}": {"retrieved": count} for count in (0, 1, 5, 20)},
    # As many items a step, and so as many steps, as with a window of 7 (the default's, unless `--window` gives it another).
    **{f"window{items}": {"window": items, "batch_share": 8 / (items + 1)} for items in (7, 31, 127)},
    "history-detached": {"detach": True},
    "long": {"second_times": 3},
    "long-k0": {"second_times": 3, "retrieved": 0},
    "long-first-stage": {"first_times": 4},
    "long-first-stage-k0": {"first_times": 4, "retrieved": 0},
    "not-injected": {"inject": False},
    "not-injected-k0": {"inject": False, "retrieved": 0},
    "item-score-detached": {"stop_gradient_dense_score": True},
    "item-score-detached-not-injected-k0": {"stop_gradient_dense_score": True, "inject": False, "retrieved": 0},
    "frozen": {"freeze": True},
    "frozen-k0": {"freeze": True, "retrieved": 0},
    "frozen-not-injected-k0": {"freeze": True, "inject": False, "retrieved": 0},
    "no-item-score": {"dense_score": False},
    "no-item-score-k0": {"dense_score": False, "retrieved": 0},
    "no-learned-part": {"learned": False},
    "no-embedding-part": {"embedding": False},
    "paper": {"paper": True, "dense_score": False},
    "paper-k0": {"paper": True, "dense_score": False, "retrieved": 0},
}
APART = (
    "data_dir",
    "output_dir",
    "collect",
    "num_beams",
    "num_dense_candidates",
    "rerank_top_k",
)  # of the arguments: no part of what a run is


@dataclass
class ReproduceArguments:
    """One row of the table, or the table."""

    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare."})
    row: str = field(default="default", metadata={"help": "What differs.", "choices": [*ROWS, *RETIRED_ROWS]})
    seed: int = field(default=0, metadata={"help": "Of weights, batches and dropout."})
    num_beams: list[int] = field(default_factory=lambda: [10, 20, 40, 256], metadata={"help": "Beams measured."})
    num_train_beams: int = field(default=20, metadata={"help": "Beams of stage II."})
    num_dense_candidates: int = field(
        default=0, metadata={"help": "Measure also with so many best items of the item-level score beside the beams."}
    )
    rerank_top_k: int = field(
        default=0,
        metadata={"help": "Measure also with only so many of the beams ranked, the best by the other scores."},
    )
    ranking_weights: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0],
        metadata={"help": "To choose from."},
    )
    dense_weights: list[float] = field(
        default_factory=lambda: [0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0],
        metadata={"help": "Of the item-level score as a third one, to choose from."},
    )
    max_long_items: int = field(default=1000, metadata={"help": "Items of a long history."})
    exclude_history: bool = field(default=False, metadata={"help": "Never list a user's own items."})
    text_config: str = field(default=json.dumps(SMALL), metadata={"help": "The backbone, as JSON."})
    embedding_dropout: float = field(default=0.1, metadata={"help": "On token embeddings; more for small data."})
    epochs: float = field(default=1.0, metadata={"help": "Of stage I."})
    crops_per_epoch: int = field(
        default=2, metadata={"help": "Crops of the histories in one epoch of stage I, as in recipes.train."}
    )
    batch_size: int = field(default=128, metadata={"help": "Rows of a step of stage I."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Of stage I."})
    dense_loss_weight: float | None = field(
        default=None, metadata={"help": "Of the softmax over items, in both stages; default: that of recipes.train."}
    )
    weight_decay: float | None = field(
        default=None, metadata={"help": "In both stages; default: that of recipes.train."}
    )
    second_epochs: float = field(default=1.0, metadata={"help": "Of stage II."})
    second_stride: int = field(
        default=50, metadata={"help": "Every so many items of a history are ranked in stage II."}
    )
    second_batch_size: int = field(default=32, metadata={"help": "Rows of a step of stage II."})
    second_learning_rate: float = field(default=1e-3, metadata={"help": "Of stage II."})
    bf16: bool = field(default=False, metadata={"help": "Stage II in bfloat16; a stage I this small gains nothing."})
    history_item_representations: bool = field(
        default=True, metadata={"help": "Histories are read by the items' vectors, too, as in recipes.train."}
    )
    window: int | None = field(default=None, metadata={"help": "Items of the generator, if not the row's."})
    candidates_at_once: int = field(default=1280, metadata={"help": "Candidates that are measured together."})
    validation_users: int = field(default=0, metadata={"help": "Users that choose the weights; 0: all."})
    test_users: int = field(default=0, metadata={"help": "Users that are measured; 0: all."})
    output_dir: str = field(default="runs/recochain", metadata={"help": "One folder a run."})
    collect: str | None = field(default=None, metadata={"help": "Only put finished runs together, under this name."})


def row_of(args: ReproduceArguments) -> dict:
    """Return all settings of a row; raise `ValueError` for one that can no longer be trained."""
    if args.row in RETIRED_ROWS:
        raise ValueError(
            f"Expected a row among {list(ROWS)}, found {args.row!r}, which was measured with an option of version 0.1 "
            "that is gone. Take another row, or version 0.1."
        )
    return {**BASE, **ROWS[args.row], **({} if args.window is None else {"window": args.window})}


def shared_arguments(args: ReproduceArguments) -> list[str]:
    """What both stages are trained with."""
    row = row_of(args)
    shared = [f"--data_dir={args.data_dir}", f"--text_config={args.text_config}", f"--max_items={row['window']}"]
    shared += [f"--embedding_dropout={args.embedding_dropout}", f"--seed={args.seed}", "--save_total_limit=1"]
    shared += [
        f"--project_content_embeddings={row['embedding']}",
        f"--history_item_representations={args.history_item_representations}",
    ]
    for name in ("dense_loss_weight", "weight_decay"):
        shared += [] if getattr(args, name) is None else [f"--{name}={getattr(args, name)}"]
    return [*shared, *([] if row["learned"] else ["--embedding_table_size=0"])]


def config_fields(row: dict, stage: int) -> str:
    """`--config_fields` of a stage: what of the model's config has no argument of its own."""
    fields = {"ranking_targets": [NEXT_TARGET]} if row["paper"] else {}
    if stage == 2:
        fields |= {} if row["inject"] else {"inject_target": False}
        fields |= {} if row["dense_score"] else {"rank_by_dense_score": False}
        fields |= {"stop_gradient_dense_score": True} if row["stop_gradient_dense_score"] else {}
    return f"--config_fields={json.dumps(fields)}"


def train_stage_one(args: ReproduceArguments) -> Path:
    """Generation and the item-level score, once for all rows that share them; the folder of the model."""
    row = row_of(args)
    parts = "".join(name[0] for name in ("learned", "embedding") if row[name])
    parts += ("h" if args.history_item_representations else "") + ("p" if row["paper"] else "")
    times = f"-times{row['first_times']}" if row["first_times"] != 1 else ""
    name = f"stage-one-window{row['window']}-{parts}{times}-{args.seed}"
    one = [
        *shared_arguments(args),
        f"--output_dir={Path(args.output_dir) / name}",
        config_fields(row, stage=1),
        "--ranking_loss_weight=0",
        "--negatives_per_item=0",
        f"--num_train_epochs={args.epochs * row['first_times']}",
        f"--crops_per_epoch={min(args.crops_per_epoch, row['window'])}",
        f"--per_device_train_batch_size={max(1, int(args.batch_size * row['batch_share']))}",
        f"--learning_rate={args.learning_rate}",
    ]
    return train.train(*train.parse(one))


def train_stages(args: ReproduceArguments) -> Path:
    """Both stages, each done once; the folder of the finished model."""
    row, tokenizer = row_of(args), SemanticIdTokenizer.from_pretrained(Path(args.data_dir) / "tokenizer")
    second = [
        f"--init_from={train_stage_one(args)}",
        *shared_arguments(args),
        f"--output_dir={folder_of(args)}",
        f"--bf16={args.bf16}",
        f"--num_train_epochs={args.second_epochs * row['second_times']}",
        f"--stride={args.second_stride}",
        f"--per_device_train_batch_size={args.second_batch_size}",
        f"--learning_rate={args.second_learning_rate}",
        f"--num_retrieved_items={row['retrieved']}",
        f"--stop_gradient_history={row['detach']}",
        f"--freeze_base_model={row['freeze']}",
        f"--num_train_beams={args.num_train_beams}",
        config_fields(row, stage=2),
        # The paper sums its loss of codes over an item's levels; ours is their mean.
        *([f"--ranking_loss_weight={1 / tokenizer.num_levels}"] if row["paper"] else []),
        f"--max_long_items={args.max_long_items}",
        f"--exclude_history={args.exclude_history}",
    ]
    return train.train(*train.parse(second))


def given(arguments: dict) -> dict:
    """Without those that were not given; an older run does not know of all."""
    return {name: value for name, value in arguments.items() if value is not None}


def folder_of(args: ReproduceArguments) -> Path:
    codes_alone = "" if args.history_item_representations else "-codes-alone"
    return Path(args.output_dir) / f"{args.row}{codes_alone}-{args.seed}"


def some_users(split: Dataset, count: int) -> Dataset:
    """So many users, always the same ones; all of them for 0."""
    if not 0 < count < len(split):
        return split
    return split.select(np.sort(np.random.default_rng(0).permutation(len(split))[:count]))


def means(of_users: dict[str, np.ndarray], chosen: np.ndarray | slice = slice(None)) -> dict[str, float]:
    """Over all users, or those chosen."""
    return {name: float(column[chosen].mean()) for name, column in of_users.items()}


def gain(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """How much more the second list reaches for the same users, and the standard error of that difference over users."""
    found = {}
    for name in COLUMNS:
        difference = second[name] - first[name]
        found[name] = {
            "difference": float(difference.mean()),
            "standard error": float(difference.std() / len(difference) ** 0.5),
            "relative": float(difference.mean() / max(first[name].mean(), 1e-12)),
        }
    return found


def calibration(found: dict[str, torch.Tensor], targets: torch.Tensor, num_bins: int = 10) -> dict:
    """
    What the ranking says is the probability of a candidate to come next, and how often it did: means in bins of equally many
    candidates, and their mean distance (expected calibration error). `held`: only of users whose target is a candidate, as in
    training.
    """
    there = found["item_indices"] >= 0
    hits = (found["item_indices"] == targets[:, None]) & there
    results = {}
    for name, users in (("all", there), ("held", there & hits.any(dim=1, keepdim=True))):
        predicted, order = found["ranking_scores"][users].double().exp().sort()
        observed = hits[users].double()[order]
        bins = [
            {"predicted": float(one.mean()), "observed": float(two.mean()), "candidates": len(one)}
            for one, two in zip(predicted.tensor_split(num_bins), observed.tensor_split(num_bins), strict=True)
            if len(one)
        ]
        error = sum(one["candidates"] * abs(one["predicted"] - one["observed"]) for one in bins)
        results[name] = {"expected calibration error": error / max(1, len(predicted)), "bins": bins}
    return results


def search(
    args: ReproduceArguments, checkpoint: Path, num_beams: int, num_dense_candidates: int
) -> tuple[dict[str, Dataset], dict[str, dict[str, torch.Tensor]]]:
    """The users who choose and those who are measured, by split, and all their candidates."""
    model, tokenizer = load_checkpoint(checkpoint)
    dataset = load_from_disk(str(Path(args.data_dir) / "dataset"))
    splits = {
        "validation": some_users(dataset["validation"], args.validation_users),
        "test": some_users(dataset["test"], args.test_users),
    }
    how = Measurement(
        max_items=row_of(args)["window"],
        max_long_items=args.max_long_items,
        num_dense_candidates=num_dense_candidates,
        exclude_history=args.exclude_history,
        batch_size=max(1, args.candidates_at_once // (num_beams + num_dense_candidates)),
    )
    return splits, {name: candidates(model, tokenizer, split, num_beams, how) for name, split in splits.items()}


def measure(
    args: ReproduceArguments,
    splits: dict[str, Dataset],
    found: dict[str, dict[str, torch.Tensor]],
    num_ranked: int = 0,
) -> dict:
    """Generation, ranked and oracle of what `search` returned, and what validation chose; `num_ranked` as `fused_lists`."""
    targets = {name: torch.tensor(split["target"][:]).long() for name, split in splits.items()}
    repeats = np.array([user["target"] in user["items"] for user in splits["test"]])

    def ranked(split: str, weight: float, dense_weight: float = 0.0) -> dict[str, np.ndarray]:
        lists = fused_lists(found[split], weight, 10, dense_weight, num_ranked)
        return recall_and_ndcg(target_ranks(lists, targets[split]))

    def best(pairs: list[tuple[float, float]]) -> tuple[float, float]:
        return max(pairs, key=lambda pair: ranked("validation", *pair)["ndcg@10"].mean())

    # The paper's fusion has no third score: by default, what the item-level score says is in the ranking, too.
    chosen = {"ranked": best([(weight, 0.0) for weight in args.ranking_weights])}
    chosen["ranked, three scores"] = best(list(product([0.0, *args.ranking_weights], args.dense_weights)))
    lists = {"generation": (0.0, 0.0), "ranked at weight 1": (1.0, 0.0), **chosen}
    of_users = {name: ranked("test", *weights) for name, weights in lists.items()}
    alone = {**found["test"], "generation_scores": found["test"]["dense_scores"]}
    of_users["item score alone"] = recall_and_ndcg(target_ranks(fused_lists(alone, 0.0, 10), targets["test"]))
    cells = {name: means(one) for name, one in of_users.items()}
    for kind, of_kind in (("repeat", repeats), ("explore", ~repeats)):
        for name in ("generation", "ranked") if 0 < of_kind.mean() < 1 else ():
            cells[f"{name}, {kind}"] = means(of_users[name], of_kind)
    held = (found["test"]["item_indices"] == targets["test"][:, None]).any(dim=1)
    cells["oracle"] = dict.fromkeys(COLUMNS, float(held.double().mean()))
    return {
        "cells": cells,
        "weights": {name: dict(zip(("ranking", "item score"), pair, strict=True)) for name, pair in chosen.items()},
        "validation ndcg@10": float(ranked("validation", *chosen["ranked, three scores"])["ndcg@10"].mean()),
        "gain": {name: gain(of_users["generation"], of_users[name]) for name in ("ranked at weight 1", *chosen)},
        "calibration": calibration(found["test"], targets["test"]),
        "share of repeats": float(repeats.mean()),
        "users": {name: len(split) for name, split in splits.items()},
    }


def run(args: ReproduceArguments) -> None:
    """
    Trains one row and measures it: a `beams-*.json` in its folder for each number of beams, unless it is there already. What
    validation chose of what was measured now becomes the checkpoint's own default.
    """
    one_process()
    work, checkpoint = {name: value for name, value in vars(args).items() if name not in APART}, None
    measured = []
    for num_beams, num_dense_candidates in product(args.num_beams, sorted({0, args.num_dense_candidates})):
        is_cut = args.rerank_top_k < num_beams and not num_dense_candidates
        missing = {}
        for num_ranked in sorted({0, args.rerank_top_k if is_cut else 0}):
            asked = {**work, "beams": num_beams, "union": num_dense_candidates, "ranked": num_ranked}
            suffix = f"-ranked-{num_ranked}" if num_ranked else ""
            file = folder_of(args) / f"beams-{num_beams}-union-{num_dense_candidates}{suffix}.json"
            if file.exists() and given(json.loads(file.read_text())["arguments"]) == given(asked):
                print(f"{file} is finished")
            else:
                missing[file] = asked
        if not missing:
            continue
        checkpoint = checkpoint or train_stages(args)
        start = time.perf_counter()
        splits, found = search(args, checkpoint, num_beams, num_dense_candidates)
        seconds = time.perf_counter() - start
        made = made_by(command("recipes.papers.recochain.reproduce", args, data_dir="path/to/data"))
        for file, asked in missing.items():
            result = {**measure(args, splits, found, asked["ranked"]), "seconds": seconds}
            write_json(file, {"arguments": asked, **result, "made by": made})
            print(file, {name: round(cell["recall@5"], 4) for name, cell in result["cells"].items()}, flush=True)
            measured.append((result["validation ndcg@10"], asked, result["weights"]["ranked, three scores"]))
    if checkpoint is not None:
        _, asked, weights = max(measured, key=lambda one: one[0])
        keep_choice(
            checkpoint,
            asked["beams"],
            ranking_weight=weights["ranking"],
            dense_weight=weights["item score"],
            num_dense_candidates=asked["union"],
            rerank_top_k=asked["ranked"],
            exclude_history=args.exclude_history,
        )


if __name__ == "__main__":
    (arguments,) = parse_arguments(ReproduceArguments)
    if arguments.collect:
        collect(Path(arguments.output_dir), Path(arguments.data_dir), arguments.collect)
    else:
        run(arguments)
