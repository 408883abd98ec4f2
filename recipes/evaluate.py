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

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    """Measures everything, writes `metrics.json` and `ranks.json` into `args.output_dir` and returns the metrics."""
    data_dir, output_dir = Path(args.data_dir), Path(args.output_dir)
    if args.rerank_top_k and args.num_dense_candidates:
        raise ValueError(
            f"Expected rerank_top_k or num_dense_candidates, found {args.rerank_top_k} and {args.num_dense_candidates}: which of the "
            "candidates are beams is not told. Measure one at a time."
        )
    if not (Path(args.checkpoint) / "config.json").is_file():
        raise ValueError(
            f"Expected a local checkpoint, into which what validation chooses is written, found {args.checkpoint!r}. Download it "
            "first: `hf download`."
        )
    record = prepared(data_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, trust_remote_code=True)
    check_same_items(tokenizer, data_dir)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, trust_remote_code=True).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    config, is_ranker = model.config, model.config.ranking_loss_weight > 0
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
    how = Measurement(**{one.name: getattr(args, one.name) for one in fields(Measurement)})
    trained_on = interactions_of(args.checkpoint, record)
    if trained_on == OTHER_INTERACTIONS:
        print(
            f"{args.checkpoint} was trained on other interactions than those of {data_dir}, with what is held out perhaps"
        )
    dataset = load_from_disk(str(data_dir / "dataset"))
    like = auc_behavior(model, tokenizer, dataset["test"], args.like) if is_ranker else None

    def measure(found, weight, targets, dense_weight=0.0):
        lists = fused_lists(found, weight, args.list_length, dense_weight, args.rerank_top_k)
        ranks = target_ranks(lists, targets)
        return mean_values(ranks), ranks

    targets = {name: torch.tensor(dataset[name]["target"][:]).long() for name in ("validation", "test")}
    dense_weights = args.dense_weights if model.ranking_head.history_query is not None else [0.0]
    tried = []
    for num_beams in args.num_beams:
        found = candidates(model, tokenizer, dataset["validation"], num_beams, how)
        for weight, dense_weight in product([0.0, *args.ranking_weights], dense_weights):
            values, _ = measure(found, weight, targets["validation"], dense_weight)
            tried.append({"num_beams": num_beams, "ranking_weight": weight, "dense_weight": dense_weight, **values})
    best = max((one for one in tried if one["ranking_weight"] or not is_ranker), key=lambda one: one["ndcg@10"])
    num_beams, weight, dense_weight = best["num_beams"], best["ranking_weight"], best["dense_weight"]
    tried_values = {"num_beams": args.num_beams, "ranking_weight": args.ranking_weights, "dense_weight": dense_weights}
    for name, values in tried_values.items():
        if len(values) > 1 and best[name] == max(values):
            print(f"validation chose {name}={best[name]}, the largest that was tried: a larger one may be better")

    found = candidates(model, tokenizer, dataset["test"], num_beams, how)
    beams = found
    if args.num_dense_candidates:  # these are no beams
        beams = candidates(model, tokenizer, dataset["test"], num_beams, replace(how, num_dense_candidates=0))
    generation, generation_ranks = measure(beams, 0.0, targets["test"])
    ranked, ranked_ranks = measure(found, weight, targets["test"], dense_weight)
    if baselines is None and args.baselines:
        baselines = baseline_results(
            dataset, tokenizer.num_items, args.list_length, exclude_history=args.exclude_history
        )
    baselines = baselines or {}
    repeats = np.array([user["target"] in user["items"] for user in dataset["test"]])
    ordered_by = record.get("ordered_by", "timestamp")  # folders of before it was told
    checked = invalid_items(model, tokenizer, dataset["test"], num_beams, how)
    metrics = {
        "protocol": {
            "split": "leave-one-out: last interaction = test, the one before = validation, the rest = training",
            "filtering": f"users with at least {record['arguments']['min_interactions']} interactions; a user's "
            f"history {'is left out of' if args.exclude_history else 'may be in'} every list",
            "users": len(dataset["test"]),
            "catalog size": tokenizer.num_items,
            "scored": f"items, over the whole catalog, lists of {args.list_length}",
            "history": f"the last {args.max_items} items" if args.max_items else "all items",
            "targets that are in the user's history": f"{repeats.mean():.1%}"
            + (", and so in no list" if args.exclude_history and repeats.any() else ""),
            "test targets that never occur in training": unseen_targets(dataset["train"], dataset["test"]),
            "trained on": trained_on,
            "order": f"by {ordered_by}, ties as in the file ({record['counts']['interactions_of_tied_time']:,} of "
            f"{record['counts']['interactions']:,} interactions share their user's {ordered_by} with another)",
            "seed of the codebooks": record["arguments"]["seed"],
        },
        "selection": {
            "chosen on": "validation, ranked ndcg@10",
            "num_beams": num_beams,
            "ranking_weight": weight,
            "dense_weight": dense_weight,
            **{name: getattr(args, name) for name in SERVED},
            **{
                f"settings of {name}": str(result["settings"])
                for name, result in baselines.items()
                if result["settings"]
            },
        },
        "validation": tried,
        "baselines": {name: result["test"] for name, result in baselines.items()},
        "generation": generation,
        "ranked": ranked,
        "beam holds the target": float((beams["item_indices"] == targets["test"][:, None]).any(dim=1).float().mean()),
        "ranking": {} if like is None else like_auc(model, tokenizer, dataset["test"], like, how),
        "invalid_items": checked["invalid"],
        "generated_items_checked": checked["checked"],
        "weights": weights_hash(model),  # which model this is about
    }
    ranks = {name: result["ranks"] for name, result in baselines.items()}
    ranks |= {"generation": ranks_as_json(generation_ranks), "ranked": ranks_as_json(ranked_ranks)}
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "metrics.json", metrics)
    (output_dir / "ranks.json").write_text(json.dumps(ranks))

    keep_choice(
        args.checkpoint,
        num_beams,
        ranking_weight=weight,
        dense_weight=dense_weight,
        **{name: getattr(args, name) for name in SERVED},
    )
    return metrics


if __name__ == "__main__":
    (arguments,) = parse_arguments(EvaluateArguments)
    result = evaluate_checkpoint(arguments)
    for name in ("generation", "ranked"):
        print(name, ", ".join(f"{key} {value:.4f}" for key, value in result[name].items()))
