"""Measures a checkpoint on a prepared folder: generation, ranking, and how they compare with the baselines.

    python -m recipes.evaluate --checkpoint runs/demo/checkpoint --data_dir runs/demo/data --output_dir runs/demo

Leave-one-out, the whole catalog, items are scored (never ids), a user's own history is left out inside the search (not so
where users come back to items: `--exclude_history False`).
A model that reads times is asked at the time of the target, which a service knows: it is the time of the request.
Validation chooses the beam and the fusion weights, by the ranked list's NDCG@10; test reports. They are written, with the other
arguments that change the lists (`SERVED`), into the checkpoint's own config, so that `recommend`, the pipeline and
recipes.recommend serve what was measured. A model without a ranking loss is measured without ranking. Writes `metrics.json`.
"""

import json
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

import tokenization  # noqa: F401  # registers the tokenizer with the Auto classes
from recipes.common.arguments import parse_arguments
from recipes.common.files import write_json
from recipes.common.hashing import weights_hash
from recipes.data.leave_one_out import unseen_targets
from recipes.data.prepared import check_same_items, prepared
from recipes.evaluation.baselines import baseline_results
from recipes.evaluation.inference import (
    Measurement,
    candidates,
    fused_lists,
    invalid_items,
    keep_choice,
    like_auc,
    ranks_as_json,
)
from recipes.evaluation.metrics.next_item.next_item import mean_values, target_ranks

OTHER_INTERACTIONS = "other interactions, among which may be what is held out here"
SERVED = ("max_items", "max_long_items", "exclude_history", "ranking_target", "num_dense_candidates", "rerank_top_k")


@dataclass
class EvaluateArguments:
    """What is measured, and what validation may choose from."""

    checkpoint: str = field(metadata={"help": "Folder that recipes.train wrote."})
    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare."})
    output_dir: str = field(metadata={"help": "Receives metrics.json and ranks.json."})
    num_beams: list[int] = field(default_factory=lambda: [20, 50, 100], metadata={"help": "Beams to choose from."})
    ranking_weights: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0],
        metadata={"help": "Fusion weights to choose from."},
    )
    ranking_target: str | None = field(
        default=None, metadata={"help": "The ranking target that orders the items; default: the checkpoint's."}
    )
    like: str | None = field(
        default=None, metadata={"help": "The behavior whose AUC is measured; by default `like`, if there is one."}
    )
    list_length: int = field(default=50, metadata={"help": "Items of a list; MRR counts within it."})
    max_items: int | None = field(
        default=None,
        metadata={"help": "Items of a history that the model reads; default: as trained, or all that fit."},
    )
    max_long_items: int | None = field(
        default=None,
        metadata={"help": "Items of a history that sub-histories come from; default: as trained, or all."},
    )
    dense_weights: list[float] = field(
        default_factory=lambda: [0.0, 0.5, 1.0, 2.0],
        metadata={"help": "Weights of the item-level score to choose from, if the model has that score."},
    )
    num_dense_candidates: int = field(default=0, metadata={"help": "Best items of that score, added to the beams."})
    rerank_top_k: int = field(default=0, metadata={"help": "Beams that are ranked, as in `recommend`; 0: all."})
    batch_size: int = field(default=64, metadata={"help": "Users run together."})
    exclude_history: bool = field(default=True, metadata={"help": "Leave a user's own items out of every list."})
    baselines: bool = field(
        default=True,
        metadata={"help": "Measure popularity and a tuned item-kNN, too; that takes hours for 300,000 items."},
    )


def auc_behavior(model, tokenizer, split: Dataset, like: str | None) -> str | None:
    """
    The behavior whose AUC can be measured, by default `like`. None, and why is printed, if there is no such behavior or
    users all behaved alike; `ValueError` if one is named that is none, or that the model was not trained to rank by.
    """
    known = [name for name in tokenizer.behaviors if name in model.config.ranking_targets]
    if like is not None and like not in known:
        raise ValueError(
            f"Expected --like to be a behavior that the model ranks by, among {known}, found {like!r}. Name one of these."
        )
    like = "like" if like is None else like
    if like not in known:
        print(f"no AUC: the model ranks by the behaviors {known}, name one of them by --like")
        return None
    if len(set(np.asarray(split["target_behavior"][:]) == tokenizer.behaviors.index(like))) < 2:
        print(f"no AUC: of all held-out interactions, all or none are of the behavior {like!r}")
        return None
    return like


def interactions_of(checkpoint: str | Path, record: dict) -> str:
    """What a checkpoint was trained on, in words: the interactions of a prepared folder's `record`, or others."""
    log = Path(checkpoint) / "training_log.json"
    known = json.loads(log.read_text()).get("interactions") if log.is_file() else None
    if known is None:
        return "not known"
    return "these interactions" if known == record["inputs"]["interactions"] else OTHER_INTERACTIONS


def evaluate_checkpoint(args: EvaluateArguments, baselines: dict | None = None) -> dict:
    """
    Measure a checkpoint, write `metrics.json` and `ranks.json`, and write what validation chose into the checkpoint.

    Args:
        args (`EvaluateArguments`): The options of the recipe.
        baselines (`dict`, *optional*): Results of `baseline_results` that were measured before; None: measure them now.

    Returns:
        The content of `metrics.json`.
    """
    record, tokenizer, model = load_checkpoint(args)
    args = with_defaults(args, model.config)
    how = Measurement(**{option.name: getattr(args, option.name) for option in fields(Measurement)})
    trained_on = interactions_of(args.checkpoint, record)
    if trained_on == OTHER_INTERACTIONS:
        print(
            f"{args.checkpoint} was trained on other interactions than those of {args.data_dir}, with what is held out "
            "perhaps"
        )
    dataset = load_from_disk(str(Path(args.data_dir) / "dataset"))
    test = dataset["test"]
    is_ranker = model.config.ranking_loss_weight > 0
    like = auc_behavior(model, tokenizer, test, args.like) if is_ranker else None

    # Validation chooses
    has_dense_score = model.ranking_head.history_query is not None
    dense_weights = args.dense_weights if has_dense_score else [0.0]
    tried = try_settings(args, model, tokenizer, dataset["validation"], how, dense_weights)
    chosen = choose(args, tried, dense_weights, is_ranker)

    # Test reports
    results = measure_test(args, model, tokenizer, test, how, chosen)
    if baselines is None and args.baselines:
        baselines = baseline_results(
            dataset, tokenizer.num_items, args.list_length, exclude_history=args.exclude_history
        )
    baselines = baselines or {}
    checked = invalid_items(model, tokenizer, test, chosen["num_beams"], how)
    metrics = {
        "protocol": protocol_of(args, record, dataset, trained_on),
        "selection": {
            "chosen on": "validation, ranked ndcg@10",
            **chosen,
            **{name: getattr(args, name) for name in SERVED},
            **{f"settings of {name}": str(of["settings"]) for name, of in baselines.items() if of["settings"]},
        },
        "validation": tried,
        "baselines": {name: result["test"] for name, result in baselines.items()},
        "generation": results["generation"],
        "ranked": results["ranked"],
        "beam holds the target": results["beam holds the target"],
        "ranking": {} if like is None else like_auc(model, tokenizer, test, like, how),
        "invalid_items": checked["invalid"],
        "generated_items_checked": checked["checked"],
        "weights": weights_hash(model),  # identifies the model that was measured
    }

    # Files
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "metrics.json", metrics)
    ranks = {name: result["ranks"] for name, result in baselines.items()} | results["ranks"]
    (output_dir / "ranks.json").write_text(json.dumps(ranks))
    keep_choice(args.checkpoint, **chosen, **{name: getattr(args, name) for name in SERVED})
    return metrics


def load_checkpoint(args: EvaluateArguments) -> tuple[dict, Any, Any]:
    """Load the record of the prepared folder, the tokenizer and the model; raise `ValueError` if they do not fit."""
    if args.rerank_top_k and args.num_dense_candidates:
        raise ValueError(
            f"Expected rerank_top_k or num_dense_candidates, found {args.rerank_top_k} and {args.num_dense_candidates}: "
            "results do not record which candidates are beams. Measure one at a time."
        )
    if not (Path(args.checkpoint) / "config.json").is_file():
        raise ValueError(
            "Expected a local checkpoint, into which what validation chooses is written, found "
            f"{args.checkpoint!r}. Download it first: `hf download`."
        )
    record = prepared(args.data_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, trust_remote_code=True)
    check_same_items(tokenizer, args.data_dir)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, trust_remote_code=True).eval()
    return record, tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu")


def with_defaults(args: EvaluateArguments, config: PretrainedConfig) -> EvaluateArguments:
    """Fill in the checkpoint's own values; raise `ValueError` if an option does not fit the model."""
    is_ranker = config.ranking_loss_weight > 0
    args = replace(
        args,
        max_items=args.max_items or config.max_items or config.max_history_items,
        max_long_items=args.max_long_items or config.max_long_items,
        ranking_target=args.ranking_target or config.ranking_target or config.ranking_targets[0],
        ranking_weights=[weight for weight in args.ranking_weights if weight] if is_ranker else [],
    )
    if args.max_items and config.max_history_items and args.max_items > config.max_history_items:
        raise ValueError(
            f"Expected max_items of at most the {config.max_history_items} that the backbone has positions for, found "
            f"{args.max_items}. Take fewer."
        )
    if is_ranker and not args.ranking_weights:
        raise ValueError("Expected ranking_weights above 0 to choose from, found none. Name some, such as 0.5 1 2.")
    return args


def try_settings(
    args: EvaluateArguments, model: Any, tokenizer: Any, split: Dataset, how: Measurement, dense_weights: list[float]
) -> list[dict]:
    """Measure every number of beams with every pair of fusion weights on validation."""
    targets = torch.tensor(split["target"][:]).long()
    tried = []
    for num_beams in args.num_beams:
        scored = candidates(model, tokenizer, split, num_beams, how)
        for weight, dense_weight in product([0.0, *args.ranking_weights], dense_weights):
            setting = {"num_beams": num_beams, "ranking_weight": weight, "dense_weight": dense_weight}
            lists = fused_lists(scored, weight, args.list_length, dense_weight, args.rerank_top_k)
            tried.append({**setting, **mean_values(target_ranks(lists, targets))})
    return tried


def choose(args: EvaluateArguments, tried: list[dict], dense_weights: list[float], is_ranker: bool) -> dict:
    """Choose the setting with the best NDCG@10; of a ranker, one that ranks. Print which values are the largest tried."""
    best = max((row for row in tried if row["ranking_weight"] or not is_ranker), key=lambda row: row["ndcg@10"])
    values = {"num_beams": args.num_beams, "ranking_weight": args.ranking_weights, "dense_weight": dense_weights}
    for name, choices in values.items():
        if len(choices) > 1 and best[name] == max(choices):
            print(f"validation chose {name}={best[name]}, the largest that was tried: a larger one may be better")
    return {name: best[name] for name in values}


def measure_test(
    args: EvaluateArguments, model: Any, tokenizer: Any, split: Dataset, how: Measurement, chosen: dict
) -> dict:
    """Measure generation alone and the ranked lists on test, with the setting that validation chose."""
    targets = torch.tensor(split["target"][:]).long()
    scored = candidates(model, tokenizer, split, chosen["num_beams"], how)
    beams = scored
    if args.num_dense_candidates:  # generation alone lists no dense candidates
        beams = candidates(model, tokenizer, split, chosen["num_beams"], replace(how, num_dense_candidates=0))
    weights = (chosen["ranking_weight"], args.list_length, chosen["dense_weight"], args.rerank_top_k)
    ranks = {
        "generation": target_ranks(fused_lists(beams, 0.0, args.list_length), targets),
        "ranked": target_ranks(fused_lists(scored, *weights), targets),
    }
    return {
        **{name: mean_values(values) for name, values in ranks.items()},
        "ranks": {name: ranks_as_json(values) for name, values in ranks.items()},
        "beam holds the target": float((beams["item_indices"] == targets[:, None]).any(dim=1).float().mean()),
    }


def protocol_of(args: EvaluateArguments, record: dict, dataset: DatasetDict, trained_on: str) -> dict:
    """Describe what is measured and how, in words, for `metrics.json` and the card."""
    test, counts = dataset["test"], record["counts"]
    repeats = np.array([user["target"] in user["items"] for user in test])
    ordered_by = record.get("ordered_by", "timestamp")  # older folders do not record it
    return {
        "split": "leave-one-out: last interaction = test, the one before = validation, the rest = training",
        "filtering": f"users with at least {record['arguments']['min_interactions']} interactions; a user's "
        f"history {'is left out of' if args.exclude_history else 'may be in'} every list",
        "users": len(test),
        "catalog size": counts["catalog"],
        "scored": f"items, over the whole catalog, lists of {args.list_length}",
        "history": f"the last {args.max_items} items" if args.max_items else "all items",
        "targets that are in the user's history": f"{repeats.mean():.1%}"
        + (", and so in no list" if args.exclude_history and repeats.any() else ""),
        "test targets that never occur in training": unseen_targets(dataset["train"], test),
        "trained on": trained_on,
        "order": f"by {ordered_by}, ties as in the file ({counts['interactions_of_tied_time']:,} of "
        f"{counts['interactions']:,} interactions share their user's {ordered_by} with another)",
        "seed of the codebooks": record["arguments"]["seed"],
    }


if __name__ == "__main__":
    (arguments,) = parse_arguments(EvaluateArguments)
    result = evaluate_checkpoint(arguments)
    for name in ("generation", "ranked"):
        print(name, ", ".join(f"{key} {value:.4f}" for key, value in result[name].items()))
