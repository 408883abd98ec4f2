"""Train one ablation of RecoChain on prepared data, and measure what ranking adds to the beams.

    python -m recipes.papers.recochain.reproduce --data_dir data --row default --seed 0
    python -m recipes.papers.recochain.reproduce --data_dir data --collect recochain
    python -m recipes.results.tables

The first command trains both stages and writes a `beams-*.json` for each number of beams. The same command resumes an
interrupted training and skips finished parts; ablations share a stage I. `--collect` adds the finished runs to
`recipes/papers/recochain/results/recochain.json` and draws the picture beside it. The last command writes the tables.

The recipe is our reading of arXiv 2604.25787. Stage I trains generation and the dense-retrieval score. Stage II ranks
the model's own beams with sub-histories. The split is leave-one-out, and a list ranks the whole catalog. Validation
chooses the weights of the fusion by NDCG@10 for every number of beams, and the test split reports. `oracle` is the
ceiling: a perfect ranking of the candidates.

Users of some data come back to items, as on Taobao. By default, lists may hold a user's own items. The results also
split the targets into items of the history (repeat) and other items (explore). For other data,
`--exclude_history` keeps a user's own items out of all lists and out of the beams of stage II.
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
from recipes.common.arguments import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE_BELOW_ONE,
    check_needs,
    check_ranges,
    parse_arguments,
)
from recipes.common.files import check_writable, write_json
from recipes.common.run_tracking import command, made_by, require_single_process
from recipes.data.prepared import prepared
from recipes.evaluation.inference import Measurement, candidates, fused_lists, load_checkpoint, save_serving_options
from recipes.evaluation.metrics.next_item.next_item import recall_and_ndcg, target_ranks
from recipes.papers.recochain.report import COLUMNS, RETIRED_ABLATIONS, collect
from recipes.training.arguments import from_json
from recipes.training.run import parse, train
from tokenization import SemanticIdTokenizer

SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
}
BASE = {
    "window": 7,
    # Factor of the rows per step of stage I.
    "batch_share": 1.0,
    "retrieved": 10,
    "detach": False,
    "learned": True,
    "embedding": True,
    # Factors of the epochs of both stages.
    "first_times": 1,
    "second_times": 1,
    "inject": True,
    # Whether the dense-retrieval score is part of the ranking.
    "dense_score": True,
    "stop_gradient_dense_score": False,
    # Whether stage II trains the ranking parameters alone.
    "freeze": False,
    # The paper's ranking loss: next item alone, codes summed per item.
    "paper": False,
}
# Changes of each ablation to `BASE`.
ABLATIONS: dict[str, dict] = {
    "default": {},
    **{f"k{count}": {"retrieved": count} for count in (0, 1, 5, 20)},
    # Equal items per step, and so equal steps, for all windows.
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
COUNTS = ("num_beams", "num_train_beams", "max_long_items", "crops_per_epoch", "batch_size", "window")
COUNTS += ("second_stride", "second_batch_size", "candidates_at_once")
AMOUNTS = ("num_dense_candidates", "rerank_top_k", "ranking_weights", "dense_weights", "dense_loss_weight")
AMOUNTS += ("weight_decay", "validation_users", "test_users")
RANGES = {
    "seed": SEED,
    "embedding_dropout": SHARE_BELOW_ONE,
    **dict.fromkeys(COUNTS, COUNT),
    **dict.fromkeys(AMOUNTS, NOT_NEGATIVE),
    **dict.fromkeys(("epochs", "learning_rate", "second_epochs", "second_learning_rate"), POSITIVE),
}
# Arguments that are no setting of a run.
PATHS_AND_SEARCHES = ("data_dir", "output_dir", "collect", "num_beams", "num_dense_candidates", "rerank_top_k")


@dataclass
class ReproduceArguments:
    """Options of an ablation."""

    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare."})
    row: str = field(
        default="default",
        metadata={"help": "Ablation: change to the default.", "choices": [*ABLATIONS, *RETIRED_ABLATIONS]},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the weights, the batches and the dropout."})
    num_beams: list[int] = field(
        default_factory=lambda: [10, 20, 40, 256], metadata={"help": "Numbers of beams that are measured."}
    )
    num_train_beams: int = field(default=20, metadata={"help": "Beams that stage II ranks in training."})
    num_dense_candidates: int = field(
        default=0,
        metadata={
            "help": "Also measure with this many best items of the dense-retrieval score beside the beams. 0: none."
        },
    )
    rerank_top_k: int = field(
        default=0,
        metadata={
            "help": "Also measure with this many ranked beams, the best by the other scores. 0: all beams are ranked."
        },
    )
    ranking_weights: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0],
        metadata={"help": "Weights of the ranking score that validation chooses from."},
    )
    dense_weights: list[float] = field(
        default_factory=lambda: [0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0],
        metadata={"help": "Weights of the dense-retrieval score, a third one, that validation chooses from."},
    )
    max_long_items: int = field(
        default=1000, metadata={"help": "Most recent items that sub-histories are retrieved from."}
    )
    exclude_history: bool = field(default=False, metadata={"help": "Keep a user's own items out of all lists."})
    text_config: str = field(default=json.dumps(SMALL), metadata={"help": "Config of the backbone as JSON."})
    embedding_dropout: float = field(
        default=0.1, metadata={"help": "Dropout of the token embeddings. Small data needs a higher one."}
    )
    epochs: float = field(default=1.0, metadata={"help": "Epochs of stage I."})
    crops_per_epoch: int = field(
        default=2, metadata={"help": "Crops of the histories in one epoch of stage I, as in recipes.train."}
    )
    batch_size: int = field(default=128, metadata={"help": "Rows per optimizer step of stage I."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Highest learning rate of stage I."})
    dense_loss_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the sampled-softmax loss in both stages. None: the default of recipes.train."},
    )
    weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of both stages. None: the default of recipes.train."}
    )
    second_epochs: float = field(default=1.0, metadata={"help": "Epochs of stage II."})
    second_stride: int = field(
        default=50, metadata={"help": "Items between two places of a history where stage II ranks candidates."}
    )
    second_batch_size: int = field(default=32, metadata={"help": "Rows per optimizer step of stage II."})
    second_learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate of stage II."})
    bf16: bool = field(
        default=False, metadata={"help": "Train stage II in bfloat16. Stage I is too small to gain by it."}
    )
    history_item_representations: bool = field(
        default=True,
        metadata={"help": "Add the item representations to the tokens of histories, as in recipes.train."},
    )
    window: int | None = field(
        default=None, metadata={"help": "Most recent items that the generator reads. None: as the ablation says."}
    )
    candidates_at_once: int = field(
        default=1280, metadata={"help": "Candidates that the evaluation scores together, of several users."}
    )
    validation_users: int = field(default=0, metadata={"help": "Users that choose the weights. 0: all users."})
    test_users: int = field(default=0, metadata={"help": "Users of the test results. 0: all users."})
    output_dir: str = field(default="runs/recochain", metadata={"help": "Folder that receives a folder for each run."})
    collect: str | None = field(
        default=None,
        metadata={"help": "Train nothing; add the finished runs to the results of this name. None: train."},
    )


def settings_of(args: ReproduceArguments) -> dict:
    """
    Return all settings of an ablation.

    Raises:
        ValueError: if the ablation needs an option of version 0.1 that is gone.
    """
    if args.row in RETIRED_ABLATIONS:
        raise ValueError(
            f"`row` must be among {list(ABLATIONS)}, got {args.row!r}, measured with an option of version 0.1 that is "
            "gone. Take another ablation, or version 0.1."
        )
    return {**BASE, **ABLATIONS[args.row], **({} if args.window is None else {"window": args.window})}


def shared_arguments(args: ReproduceArguments) -> list[str]:
    """Return the arguments of recipes.train that both stages share."""
    settings = settings_of(args)
    shared = [f"--data_dir={args.data_dir}", f"--text_config={args.text_config}", f"--max_items={settings['window']}"]
    shared += [f"--embedding_dropout={args.embedding_dropout}", f"--seed={args.seed}", "--save_total_limit=1"]
    shared += [
        f"--project_content_embeddings={settings['embedding']}",
        f"--history_item_representations={args.history_item_representations}",
    ]
    for name in ("dense_loss_weight", "weight_decay"):
        shared += [] if getattr(args, name) is None else [f"--{name}={getattr(args, name)}"]
    shared += ["--ranking_targets", NEXT_TARGET] if settings["paper"] else []
    # RecoChain counts no transitions. Its figures here are those of a mean over an item's codes.
    shared += ["--num_transitions=0", "--generation_loss_weight=1", "--warmup_steps=0"]
    return [*shared, *([] if settings["learned"] else ["--embedding_table_size=0"])]


def stage_two_flags(settings: dict) -> list[str]:
    """Return the flags of recipes.train by which the ablations of stage II differ."""
    flags = [] if settings["inject"] else ["--inject_target=False"]
    flags += [] if settings["dense_score"] else ["--rank_by_dense_score=False"]
    return flags + (["--stop_gradient_dense_score=True"] if settings["stop_gradient_dense_score"] else [])


def train_stage_one(args: ReproduceArguments) -> Path:
    """Train generation and the dense-retrieval score, once for all ablations that share them; return the folder."""
    settings = settings_of(args)
    parts = "".join(name[0] for name in ("learned", "embedding") if settings[name])
    parts += ("h" if args.history_item_representations else "") + ("p" if settings["paper"] else "")
    times = f"-times{settings['first_times']}" if settings["first_times"] != 1 else ""
    name = f"stage-one-window{settings['window']}-{parts}{times}-{args.seed}"
    arguments = [
        *shared_arguments(args),
        f"--output_dir={Path(args.output_dir) / name}",
        "--ranking_loss_weight=0",
        "--negatives_per_item=0",
        f"--num_train_epochs={args.epochs * settings['first_times']}",
        f"--crops_per_epoch={min(args.crops_per_epoch, settings['window'])}",
        "--item_dropout=0",
        f"--per_device_train_batch_size={max(1, int(args.batch_size * settings['batch_share']))}",
        f"--learning_rate={args.learning_rate}",
    ]
    return train(*parse(arguments))


def train_stages(args: ReproduceArguments) -> Path:
    """Train both stages, unless they are finished, and return the folder of the model."""
    settings = settings_of(args)
    tokenizer = SemanticIdTokenizer.from_pretrained(Path(args.data_dir) / "tokenizer")
    arguments = [
        f"--init_from={train_stage_one(args)}",
        *shared_arguments(args),
        f"--output_dir={folder_of(args)}",
        f"--bf16={args.bf16}",
        f"--num_train_epochs={args.second_epochs * settings['second_times']}",
        f"--stride={args.second_stride}",
        f"--per_device_train_batch_size={args.second_batch_size}",
        f"--learning_rate={args.second_learning_rate}",
        f"--num_retrieved_items={settings['retrieved']}",
        f"--stop_gradient_history={settings['detach']}",
        f"--freeze_base_model={settings['freeze']}",
        f"--num_train_beams={args.num_train_beams}",
        *stage_two_flags(settings),
        # The paper sums its loss over an item's codes; ours averages.
        *([f"--ranking_loss_weight={1 / tokenizer.num_levels}"] if settings["paper"] else []),
        f"--max_long_items={args.max_long_items}",
        f"--exclude_history={args.exclude_history}",
    ]
    return train(*parse(arguments))


def without_none(arguments: dict) -> dict:
    """Drop the arguments that are None; an older run may lack them."""
    return {name: value for name, value in arguments.items() if value is not None}


def folder_of(args: ReproduceArguments) -> Path:
    """Return the folder of an ablation's run."""
    codes_alone = "" if args.history_item_representations else "-codes-alone"
    return Path(args.output_dir) / f"{args.row}{codes_alone}-{args.seed}"


def sample_users(split: Dataset, count: int) -> Dataset:
    """Sample `count` users, the same ones in every call; 0: all users."""
    if not 0 < count < len(split):
        return split
    return split.select(np.sort(np.random.default_rng(0).permutation(len(split))[:count]))


def means(metrics: dict[str, np.ndarray], chosen: np.ndarray | slice = slice(None)) -> dict[str, float]:
    """Average metrics of users over all of them, or over the chosen ones."""
    return {name: float(column[chosen].mean()) for name, column in metrics.items()}


def gain(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """
    Compare the metrics of two lists for the same users.

    Returns:
        For each of `COLUMNS`: the mean difference, its standard error over users, and the relative gain.
    """
    gains = {}
    for name in COLUMNS:
        difference = second[name] - first[name]
        gains[name] = {
            "difference": float(difference.mean()),
            "standard error": float(difference.std() / len(difference) ** 0.5),
            "relative": float(difference.mean() / max(first[name].mean(), 1e-12)),
        }
    return gains


def calibration(candidate_scores: dict[str, torch.Tensor], targets: torch.Tensor, num_bins: int = 10) -> dict:
    """
    Compare the ranking's probability that a candidate comes next with the share of candidates that did.

    Args:
        candidate_scores: `item_indices` and `ranking_scores`, each `[U, K]`, as `search` returns them.
        targets: Next items `[U]`.
        num_bins: Number of bins, each with the same number of candidates.

    Returns:
        Expected calibration error and bins, for all users and, as in training, for the users whose target is a
        candidate (`held`). A bin has the means of both and its number of candidates.
    """
    is_candidate = candidate_scores["item_indices"] >= 0
    hits = (candidate_scores["item_indices"] == targets[:, None]) & is_candidate
    results = {}
    for name, mask in (("all", is_candidate), ("held", is_candidate & hits.any(dim=1, keepdim=True))):
        predicted, order = candidate_scores["ranking_scores"][mask].double().exp().sort()
        observed = hits[mask].double()[order]
        bins = [
            {"predicted": float(scores.mean()), "observed": float(outcomes.mean()), "candidates": len(scores)}
            for scores, outcomes in zip(predicted.tensor_split(num_bins), observed.tensor_split(num_bins), strict=True)
            if len(scores)
        ]
        error = sum(bin_["candidates"] * abs(bin_["predicted"] - bin_["observed"]) for bin_ in bins)
        results[name] = {"expected calibration error": error / max(1, len(predicted)), "bins": bins}
    return results


def search(
    args: ReproduceArguments, checkpoint: Path, num_beams: int, num_dense_candidates: int
) -> tuple[dict[str, Dataset], dict[str, dict[str, torch.Tensor]]]:
    """Search for the candidates of the validation and test users; return the users and the candidates by split."""
    model, tokenizer = load_checkpoint(checkpoint)
    dataset = load_from_disk(str(Path(args.data_dir) / "dataset"))
    splits = {
        "validation": sample_users(dataset["validation"], args.validation_users),
        "test": sample_users(dataset["test"], args.test_users),
    }
    measurement = Measurement(
        max_items=settings_of(args)["window"],
        max_long_items=args.max_long_items,
        num_dense_candidates=num_dense_candidates,
        exclude_history=args.exclude_history,
        batch_size=max(1, args.candidates_at_once // (num_beams + num_dense_candidates)),
    )
    return splits, {
        name: candidates(model, tokenizer, split, num_beams, measurement) for name, split in splits.items()
    }


def measure(
    args: ReproduceArguments,
    splits: dict[str, Dataset],
    candidate_scores: dict[str, dict[str, torch.Tensor]],
    num_ranked: int = 0,
) -> dict:
    """
    Measure generation, ranking and oracle, with fusion weights that validation chooses.

    Args:
        args: Options of the ablation.
        splits: Users of `validation` and `test`, as `search` returns them.
        candidate_scores: Candidates and their scores of both splits, as `search` returns them.
        num_ranked: Best candidates by the other scores that are ranked. 0: all candidates.
    """
    targets = {name: torch.tensor(split["target"][:]).long() for name, split in splits.items()}
    repeats = np.array([user["target"] in user["items"] for user in splits["test"]])

    def metrics_at(split: str, weight: float, dense_weight: float = 0.0) -> dict[str, np.ndarray]:
        weights = {"generation_weight": 1.0, "ranking_weight": weight, "dense_weight": dense_weight}
        lists = fused_lists(candidate_scores[split], weights, 10, num_ranked)
        return recall_and_ndcg(target_ranks(lists, targets[split]))

    def best(pairs: list[tuple[float, float]]) -> tuple[float, float]:
        return max(pairs, key=lambda pair: metrics_at("validation", *pair)["ndcg@10"].mean())

    # Weights: the paper fuses two scores; the ranking holds the third
    chosen = {"ranked": best([(weight, 0.0) for weight in args.ranking_weights])}
    chosen["ranked, three scores"] = best(list(product([0.0, *args.ranking_weights], args.dense_weights)))

    # Metrics of the test users by list
    lists = {"generation": (0.0, 0.0), "ranked at weight 1": (1.0, 0.0), **chosen}
    metrics = {name: metrics_at("test", *weights) for name, weights in lists.items()}
    dense_lists = fused_lists(candidate_scores["test"], {"dense_weight": 1.0}, 10)
    metrics["item score alone"] = recall_and_ndcg(target_ranks(dense_lists, targets["test"]))

    # Means over users, and the ceiling
    cells = {name: means(columns) for name, columns in metrics.items()}
    for kind, chosen_users in (("repeat", repeats), ("explore", ~repeats)):
        for name in ("generation", "ranked") if 0 < chosen_users.mean() < 1 else ():
            cells[f"{name}, {kind}"] = means(metrics[name], chosen_users)
    held = (candidate_scores["test"]["item_indices"] == targets["test"][:, None]).any(dim=1)
    cells["oracle"] = dict.fromkeys(COLUMNS, float(held.double().mean()))
    return {
        "cells": cells,
        "weights": {name: dict(zip(("ranking", "item score"), pair, strict=True)) for name, pair in chosen.items()},
        "validation ndcg@10": float(metrics_at("validation", *chosen["ranked, three scores"])["ndcg@10"].mean()),
        "gain": {name: gain(metrics["generation"], metrics[name]) for name in ("ranked at weight 1", *chosen)},
        "calibration": calibration(candidate_scores["test"], targets["test"]),
        "share of repeats": float(repeats.mean()),
        "users": {name: len(split) for name, split in splits.items()},
    }


def unfinished_files(args: ReproduceArguments, num_beams: int, num_dense_candidates: int) -> dict[Path, dict]:
    """Return the result files of a search that no finished run has written, each with the settings of its run."""
    settings = {name: value for name, value in vars(args).items() if name not in PATHS_AND_SEARCHES}
    is_cut = args.rerank_top_k < num_beams and not num_dense_candidates
    unfinished = {}
    for num_ranked in sorted({0, args.rerank_top_k if is_cut else 0}):
        run_settings = {**settings, "beams": num_beams, "union": num_dense_candidates, "ranked": num_ranked}
        suffix = f"-ranked-{num_ranked}" if num_ranked else ""
        file = folder_of(args) / f"beams-{num_beams}-union-{num_dense_candidates}{suffix}.json"
        if file.exists() and without_none(json.loads(file.read_text())["arguments"]) == without_none(run_settings):
            print(f"{file} is finished")
        else:
            unfinished[file] = run_settings
    return unfinished


def check_arguments(args: ReproduceArguments) -> None:
    """Raise `ValueError` for numbers out of range, arguments without effect, and folders that are missing."""
    require_single_process()
    check_ranges(args, RANGES)
    retrieved = settings_of(args)["retrieved"]
    is_cut = not args.rerank_top_k or args.rerank_top_k < max(args.num_beams)
    needs = {
        "max_long_items": [("a --row with sub-histories", retrieved > 0)],
        "rerank_top_k": [(f"a number of beams above {args.rerank_top_k}", is_cut)],
    }
    check_needs(args, needs)
    from_json(args.text_config, "text_config")
    prepared(args.data_dir)
    check_writable(args.output_dir, "output_dir")


def run(args: ReproduceArguments) -> None:
    """
    Train an ablation and write a `beams-*.json` into its folder for each search that is not finished.

    The best weights on validation, among the searches of this call, become the checkpoint's serving defaults.
    """
    check_arguments(args)
    checkpoint = None
    measured = []
    for num_beams, num_dense_candidates in product(args.num_beams, sorted({0, args.num_dense_candidates})):
        unfinished = unfinished_files(args, num_beams, num_dense_candidates)
        if not unfinished:
            continue

        # Training and search
        checkpoint = checkpoint or train_stages(args)
        start = time.perf_counter()
        splits, candidate_scores = search(args, checkpoint, num_beams, num_dense_candidates)
        seconds = time.perf_counter() - start

        # Results
        made = made_by(command("recipes.papers.recochain.reproduce", args, data_dir="path/to/data"))
        for file, settings in unfinished.items():
            result = {**measure(args, splits, candidate_scores, settings["ranked"]), "seconds": seconds}
            write_json(file, {"arguments": settings, **result, "made by": made})
            print(file, {name: round(cell["recall@5"], 4) for name, cell in result["cells"].items()}, flush=True)
            measured.append((result["validation ndcg@10"], settings, result["weights"]["ranked, three scores"]))

    # Serving defaults
    if checkpoint is not None:
        _, settings, weights = max(measured, key=lambda entry: entry[0])
        save_serving_options(
            load_checkpoint(checkpoint)[0],
            checkpoint,
            num_beams=settings["beams"],
            ranking_weight=weights["ranking"],
            dense_weight=weights["item score"],
            num_dense_candidates=settings["union"],
            rerank_top_k=settings["ranked"],
            exclude_history=args.exclude_history,
        )


if __name__ == "__main__":
    (arguments,) = parse_arguments(ReproduceArguments)
    if arguments.collect:
        collect(Path(arguments.output_dir), Path(arguments.data_dir), arguments.collect)
    else:
        run(arguments)
