"""Measure a checkpoint on prepared data, beside the baselines, and choose its serving options on validation.

    python -m recipes.evaluate --checkpoint runs/demo/checkpoint --data_dir runs/demo/data --output_dir runs/demo

The protocol is leave-one-out over the whole catalog. The lists leave out the items of the user's history, unless
`--exclude_history False` says otherwise, for data with repeated items. The query time of a model that reads times is
the time of the target, which a service knows as the time of the request.

Validation chooses the number of beams and the fusion weights, by the NDCG@10 of the ranked list: a search from the
strongest score alone (`recipes.evaluation.fusion`). Test measures the choice. A model without a ranking loss is
measured without ranking.

The output folder receives `report.md` with pictures, `metrics.json`, and `ranks.json` with every test target's rank.
With `--store True`, the checkpoint's generation_config.json receives the chosen options and the arguments in
`STORED_OPTIONS`. Then `recommend`, the pipeline and recipes.recommend serve what was measured. Without it, the
checkpoint stays as it was.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict

from modeling_unigrf import UniGRFForCausalLM
from modeling_unigrf.recommendation_unigrf import FUSED_SCORES
from modeling_unigrf.transitions_unigrf import TransitionSettings
from recipes.common.arguments import COUNT, NOT_NEGATIVE, check_checkpoint, check_ranges, parse_arguments
from recipes.common.files import check_writable, read_json, whole_folder, write_json
from recipes.common.hashing import weights_hash
from recipes.data.leave_one_out import unseen_targets
from recipes.data.prepared import check_same_items, load_prepared, load_splits, prepared
from recipes.evaluation.baselines import Transitions, baseline_results
from recipes.evaluation.beyond_accuracy import ListStatistics
from recipes.evaluation.fusion import WEIGHTS, choose_bonus, choose_weights, single_scores
from recipes.evaluation.inference import (
    Measurement,
    candidates,
    fused_lists,
    invalid_items,
    like_auc,
    load_checkpoint,
    ranks_as_json,
    save_serving_options,
)
from recipes.evaluation.metrics.next_item.next_item import mean_values, target_ranks
from recipes.evaluation.report import LISTS, report_of_checkpoint
from recipes.evaluation.transitions import warn_of_edges
from tokenization import SemanticIdTokenizer

OTHER_INTERACTIONS = "other interactions, among which may be what is held out here"
# What validation chooses, beside the settings of the transition score.
CHOSEN = ("num_beams", *WEIGHTS, "new_item_bonus")
STORED_OPTIONS = (
    "max_items",
    "max_long_items",
    "exclude_history",
    "ranking_target",
    "num_dense_candidates",
    "num_transition_candidates",
    "popularity_correction",
    "diversity",
    "rerank_top_k",
)
RANGES = {
    "list_length": ("10 or more, since the metrics count the first 10 items", lambda length: length >= 10),
    **dict.fromkeys(("num_beams", "max_items", "max_long_items", "validation_users", "batch_size"), COUNT),
    **dict.fromkeys(("num_dense_candidates", "num_transition_candidates", "rerank_top_k"), NOT_NEGATIVE),
    **dict.fromkeys((f"{name}s" for name in WEIGHTS), NOT_NEGATIVE),
    **dict.fromkeys(("popularity_correction", "diversity"), NOT_NEGATIVE),
}


@dataclass
class EvaluateArguments:
    """Checkpoint, data, and the choices of validation."""

    checkpoint: str = field(metadata={"help": "Local checkpoint or adapter of recipes.train."})
    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare."})
    output_dir: str = field(metadata={"help": "Folder that receives metrics.json and ranks.json."})
    num_beams: list[int] = field(
        default_factory=lambda: [50], metadata={"help": "Numbers of beams that validation chooses from."}
    )
    generation_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weights of the generation score that validation chooses from. None: any weight."},
    )
    ranking_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the ranking score that validation chooses from. None: any weight."}
    )
    ranking_target: str | None = field(
        default=None, metadata={"help": "Ranking target that orders the lists. None: the checkpoint's."}
    )
    like: str | None = field(
        default=None, metadata={"help": "Behavior whose AUC is measured. None: the behavior like, if there is one."}
    )
    list_length: int = field(default=50, metadata={"help": "Items of a list. MRR counts within the list."})
    max_items: int | None = field(
        default=None,
        metadata={
            "help": "Most recent items of a history that the model reads. None: the checkpoint's number, or all that "
            "fit."
        },
    )
    max_long_items: int | None = field(
        default=None,
        metadata={
            "help": "Most recent items that sub-histories are retrieved from. None: the checkpoint's number, or all."
        },
    )
    dense_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weights of the dense-retrieval score that validation chooses from. None: any weight."},
    )
    num_dense_candidates: int = field(
        default=0,
        metadata={"help": "Items of the best dense-retrieval score that are added to the beams. 0: beams alone."},
    )
    transition_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weights of the transition score that validation chooses from. None: any weight."},
    )
    num_transition_candidates: int | None = field(
        default=None,
        metadata={
            "help": "Items of the best transition score that are added to the beams. None: 50 for a model with "
            "transitions, else 0."
        },
    )
    popularity_correction: float = field(
        default=0.0,
        metadata={
            "help": "Subtracted from the fused score, times the log number of interactions. Validation chooses "
            "without it; test measures with it."
        },
    )
    diversity: float = field(
        default=0.0,
        metadata={
            "help": "What an item pays for a cosine of 1 to an item before it in the list, in standard deviations of "
            "the user's scores. Validation chooses without it; test measures with it."
        },
    )
    rerank_top_k: int = field(
        default=0,
        metadata={"help": "Beams that are ranked: the best by generation and dense-retrieval scores. 0: all beams."},
    )
    validation_users: int = field(
        default=4000, metadata={"help": "Users of validation that choose, drawn at random: more take longer."}
    )
    batch_size: int = field(default=64, metadata={"help": "Users of a batch."})
    exclude_history: bool = field(
        default=True, metadata={"help": "Leave the items of a user's history out of the user's list."}
    )
    store: bool = field(
        default=False,
        metadata={"help": "Write the choice into the checkpoint's generation_config.json: every call then serves it."},
    )
    baselines: bool = field(
        default=True,
        metadata={
            "help": "Measure popularity, item-kNN, text and transitions alone, too, each tuned. Item-kNN takes hours "
            "for 300,000 items."
        },
    )


def auc_behavior(
    model: UniGRFForCausalLM, tokenizer: SemanticIdTokenizer, split: Dataset, like: str | None
) -> str | None:
    """
    Return the behavior whose AUC can be measured, or None after a message with the reason.

    Args:
        model: The model.
        tokenizer: The tokenizer of its items.
        split: Users with their held-out interactions.
        like: Name of the behavior. None: `like`, if there is such a behavior.

    Raises:
        ValueError: if `like` is no behavior, or none that the model ranks by.
    """
    known = [name for name in tokenizer.behaviors if name in model.config.ranking_targets]
    if like is not None and like not in known:
        raise ValueError(
            f"`like` must be a behavior that the model ranks by, among {known}, got {like!r}. Choose one of these."
        )
    like = "like" if like is None else like
    if like not in known:
        print(f"no AUC: the model ranks by the behaviors {known}; choose one of them with --like")
        return None
    if len(set(np.asarray(split["target_behavior"][:]) == tokenizer.behaviors.index(like))) < 2:
        print(f"no AUC: all or none of the held-out interactions are of the behavior {like!r}")
        return None
    return like


def training_log(checkpoint: str | Path) -> dict:
    """Read a checkpoint's training log; empty without one."""
    log = Path(checkpoint) / "training_log.json"
    return read_json(log) if log.is_file() else {}


def interactions_of(log: dict, record: dict) -> str:
    """Describe the interactions of a training's `log`: those of a prepared folder's `record`, or others."""
    if (known := log.get("interactions")) is None:
        return "not known"
    if known != record["inputs"]["interactions"]:
        return OTHER_INTERACTIONS
    return "these interactions" if log.get("refit") is None else "these interactions, and those of validation"


def evaluate_checkpoint(args: EvaluateArguments, baselines: dict | None = None) -> dict:
    """
    Measure a checkpoint on test, with the choice of validation.

    Write `metrics.json` and `ranks.json` and, with `store`, the choice into the checkpoint.

    Args:
        args (`EvaluateArguments`): The options of the recipe.
        baselines (`dict`, *optional*): Earlier results of `baseline_results`. None: measure the baselines now.

    Returns:
        The content of `metrics.json`.
    """
    # Inputs
    record, tokenizer, model = load_inputs(args)
    log = training_log(args.checkpoint)
    is_refit = check_refit(log, record, args.checkpoint)
    args = as_before_refit(args, model) if is_refit else with_defaults(args, model)
    dataset = load_splits(args.data_dir)
    settings = transition_settings(args, model, dataset["validation"], is_refit)
    names = {option.name for option in fields(Measurement)} - {"transition_settings"}
    measurement = Measurement(**{name: getattr(args, name) for name in names}, transition_settings=settings)
    protocol = protocol_of(args, record, dataset, interactions_of(log, record))
    if protocol["trained on"] == OTHER_INTERACTIONS:
        print(
            f"{args.checkpoint} was trained on other interactions than those of {args.data_dir}, perhaps on the "
            "held-out interactions"
        )
    is_ranker = model.config.training_config.ranking_loss_weight > 0
    like = auc_behavior(model, tokenizer, dataset["test"], args.like) if is_ranker else None

    # Validation chooses
    if is_refit:
        trials = []
        chosen = {name: getattr(model.serving_options(), name) for name in CHOSEN}
    else:
        trials = try_settings(args, model, tokenizer, dataset["validation"], measurement)
        chosen = {name: trials[-1][name] for name in CHOSEN}

    # Test measures the choice
    embeddings = load_prepared(args.data_dir).embeddings
    statistics = ListStatistics.of_splits(dataset, tokenizer.num_items, embeddings)
    results = measure_test(args, model, tokenizer, dataset["test"], measurement, chosen, statistics)
    # The baselines know no item of validation: they are no peers of a refit.
    if baselines is None and args.baselines and not is_refit:
        baselines = baseline_results(
            dataset,
            tokenizer.num_items,
            args.list_length,
            exclude_history=args.exclude_history,
            embeddings=embeddings,
        )
    baselines = baselines or {}
    checked = invalid_items(model, tokenizer, dataset["test"], chosen["num_beams"], measurement)
    metrics = {
        "protocol": protocol,
        "selection": selection_of(args, chosen, baselines, is_refit),
        "validation": trials,
        "baselines": {name: result["test"] for name, result in baselines.items()},
        "new items": new_item_recall(dataset, baselines, results["ranks"]),
        "beyond accuracy": {name: result["beyond accuracy"] for name, result in baselines.items()}
        | results["beyond accuracy"],
        "generation": results["generation"],
        "ranked": results["ranked"],
        "parts": results["parts"],
        "beam holds the target": results["beam holds the target"],
        "ranking": {} if like is None else like_auc(model, tokenizer, dataset["test"], like, measurement),
        "invalid_items": checked["invalid"],
        "generated_items_checked": checked["checked"],
        "weights": weights_hash(model),  # identifies the measured model
    }

    # Files
    ranks = {name: result["ranks"] for name, result in baselines.items()} | results["ranks"]
    write_results(Path(args.output_dir), metrics, ranks)
    if args.store:
        stored = {name: getattr(args, name) for name in STORED_OPTIONS}
        stored |= {} if settings is None else asdict(settings)
        save_serving_options(model, args.checkpoint, **chosen, **stored)
    name_stronger_lists(metrics)
    return metrics


def check_refit(log: dict, record: dict, checkpoint: str) -> bool:
    """Return whether a model knows the validation items of a folder; raise `ValueError` if it knows those of test."""
    if log.get("refit") is None or log.get("interactions") != record["inputs"]["interactions"]:
        return False
    if log["refit"] == "test":
        raise ValueError(
            f"`checkpoint` must not know the test items, got {checkpoint}, which learned or counted them. Measure the "
            "checkpoint before the refit or the refresh, or later interactions."
        )
    return True


def as_before_refit(args: EvaluateArguments, model: UniGRFForCausalLM) -> EvaluateArguments:
    """
    Replace all options that validation chose, or that serving stores, by those that the refit took over.

    Raises:
        ValueError: for other values of these options.
    """
    options = model.serving_options()
    defaults = EvaluateArguments("", "", "")
    for name in ("num_beams", *(f"{weight}s" for weight in WEIGHTS), *STORED_OPTIONS, "validation_users"):
        value = getattr(args, name)
        served = getattr(options, name.removesuffix("s") if name.endswith("_weights") else name, None)
        is_served = served in value if isinstance(value, list) else value == served
        if value != getattr(defaults, name) and not is_served:
            raise ValueError(
                f"`{name}` must be left out for a refit, which serves what validation chose before, got {value}. "
                "Measure the checkpoint before the refit with it."
            )
    return with_defaults(replace(args, **{name: getattr(options, name) for name in STORED_OPTIONS}), model)


def transition_settings(
    args: EvaluateArguments, model: UniGRFForCausalLM, validation: Dataset, is_refit: bool = False
) -> TransitionSettings | None:
    """
    Choose the settings of the model's transition score on validation, or take those that a refit took over.

    The result is None for a model without transitions.
    """
    if model.transitions is None:
        return None
    if is_refit:
        return model.serving_options().transition_settings
    everything = torch.arange(model.config.num_items, device=model.device)
    ranker = Transitions(model.config.num_items, model.scorer.content_embeddings(everything))
    ranker.transitions = model.transitions
    ranker.choose(validation["items"][:], validation["target"][:], args.exclude_history)
    warn_of_edges(ranker.settings)
    return ranker.settings


def new_item_recall(dataset: DatasetDict, baselines: dict, ranks: dict) -> dict:
    """Compute the recall@10 of test targets that never occur in training, for each list; empty without targets."""
    trained = np.concatenate([np.array(items) for items in dataset["train"]["items"][:]])
    is_new = ~np.isin(dataset["test"]["target"][:], trained)
    if not is_new.any():
        return {}
    lists = {name: result["ranks"] for name, result in baselines.items()} | ranks
    hits = {
        name: float(np.mean([rank is not None and rank <= 10 for rank in np.array(values, object)[is_new]]))
        for name, values in lists.items()
    }
    return {"targets": int(is_new.sum()), **{f"recall@10 of {name}": value for name, value in hits.items()}}


def name_stronger_lists(metrics: dict) -> None:
    """Say which baselines, and which of the model's scores alone, are ahead of the ranked list on test."""
    ours = metrics["ranked"]["ndcg@10"]
    others = {f"baseline {name}": values for name, values in metrics["baselines"].items()}
    others |= {f"{name} score alone": values for name, values in metrics["parts"].items()}
    for name, values in others.items():
        if values["ndcg@10"] > ours:
            print(f"the {name} is ahead: ndcg@10 {values['ndcg@10']:.4f} against {ours:.4f} of the fused list")


def selection_of(args: EvaluateArguments, chosen: dict, baselines: dict, is_refit: bool) -> dict:
    """Describe the choice of validation, and the arguments that change the lists, for `metrics.json`."""
    return {
        "chosen on": "validation, before the refit" if is_refit else "validation, ranked ndcg@10",
        **chosen,
        **{name: getattr(args, name) for name in STORED_OPTIONS},
        **{f"settings of {name}": str(result["settings"]) for name, result in baselines.items() if result["settings"]},
    }


def write_results(output_dir: Path, metrics: dict, ranks: dict) -> None:
    """Write `metrics.json` and `ranks.json`, or leave both as they are."""
    with whole_folder(output_dir, "metrics.json") as folder:
        write_json(folder / "metrics.json", metrics)
        (folder / "ranks.json").write_text(json.dumps(ranks))


def load_inputs(args: EvaluateArguments) -> tuple[dict, SemanticIdTokenizer, UniGRFForCausalLM]:
    """
    Load the record of the prepared folder, the tokenizer and the model, by the installed code.

    Raises:
        ValueError: for options out of range or that exclude each other, missing or other inputs, and folders that
            cannot receive the results.
    """
    check_ranges(args, RANGES)
    if args.rerank_top_k and (args.num_dense_candidates or args.num_transition_candidates):
        raise ValueError(
            "`rerank_top_k` or `num_dense_candidates` must be 0, and `num_transition_candidates` with it, got "
            f"{args.rerank_top_k}, {args.num_dense_candidates} and {args.num_transition_candidates}. Measure one at a "
            "time: results do not record which candidates are beams."
        )
    check_checkpoint(args.checkpoint, "checkpoint")
    record = prepared(args.data_dir)
    check_writable(args.output_dir, "output_dir")
    if args.store:
        check_writable(args.checkpoint, "checkpoint")
    model, tokenizer = load_checkpoint(args.checkpoint)
    check_same_items(tokenizer, args.data_dir)
    check_effect(args, model)
    return record, tokenizer, model


def check_effect(args: EvaluateArguments, model: UniGRFForCausalLM) -> None:
    """Raise `ValueError` for options that the model has no use for, and for weights that are all 0."""
    config = model.config
    ranks = config.training_config.ranking_loss_weight > 0
    unused = {
        "ranking_weights": args.ranking_weights and any(args.ranking_weights) and not ranks,
        "like": args.like is not None and not ranks,
        "dense_weights": args.dense_weights and any(args.dense_weights) and not config.has_dense_scores,
        "transition_weights": args.transition_weights and any(args.transition_weights) and model.transitions is None,
        "max_long_items": args.max_long_items is not None and not config.num_retrieved_items,
    }
    for name in (name for name, is_unused in unused.items() if is_unused):
        raise ValueError(
            f"`{name}` must be left out for a model without what it counts for, got {getattr(args, name)} for "
            f"{args.checkpoint}. Leave it out, or train the model for it."
        )
    single_scores(weight_choices(args, model))


def with_defaults(args: EvaluateArguments, model: UniGRFForCausalLM) -> EvaluateArguments:
    """
    Replace None by the checkpoint's values.

    Raises:
        ValueError: for an option that does not fit the model.
    """
    config = model.config
    options = model.serving_options()
    args = replace(
        args,
        max_items=args.max_items or options.max_items or config.max_history_items,
        max_long_items=args.max_long_items or options.max_long_items,
        ranking_target=args.ranking_target or options.ranking_target,
    )
    if args.num_transition_candidates is None:
        count = 0 if args.rerank_top_k or not config.num_transitions else min(50, config.num_items)
        args = replace(args, num_transition_candidates=count)
    measured = {name: getattr(args, name) for name in STORED_OPTIONS}
    model.serving_options(**measured, num_beams=args.num_beams[0], num_return_sequences=1)
    return args


def try_settings(
    args: EvaluateArguments,
    model: UniGRFForCausalLM,
    tokenizer: SemanticIdTokenizer,
    validation: Dataset,
    measurement: Measurement,
) -> list[dict]:
    """Search for the best fusion weights of every number of beams on validation; the best setting is last."""
    users = np.sort(np.random.default_rng(0).permutation(len(validation))[: args.validation_users])
    split = validation.select(users)
    targets = torch.tensor(split["target"][:]).long()
    is_new = np.zeros(len(targets), bool)
    if model.transitions is not None:
        is_new = model.scorer.is_untrained(targets.to(model.device)).cpu().numpy()
    choices = weight_choices(args, model)
    trials: list[list[dict]] = []
    for num_beams in args.num_beams:
        scored = candidates(model, tokenizer, split, num_beams, measurement)

        def measure(weights: dict[str, float], scored: dict = scored) -> dict[str, float]:
            ranks = target_ranks(fused_lists(scored, weights, args.list_length, args.rerank_top_k), targets)
            return {**mean_values(ranks), "new items": float((ranks <= 10)[is_new].mean()) if is_new.any() else 0.0}

        rows = choose_weights(measure, choices)
        if is_new.any():
            rows += choose_bonus(measure, rows.pop())
        trials.append([{"num_beams": num_beams, "new_item_bonus": 0.0, **row} for row in rows])
    trials.sort(key=lambda rows: rows[-1]["ndcg@10"])
    return [row for rows in trials for row in rows]


def weight_choices(args: EvaluateArguments, model: UniGRFForCausalLM) -> dict[str, list[float] | None]:
    """Return the values that each weight of the fused score may have; None: any value."""
    return {
        "generation_weight": args.generation_weights,
        "ranking_weight": args.ranking_weights if model.config.training_config.ranking_loss_weight else [0.0],
        "dense_weight": args.dense_weights if model.config.has_dense_scores else [0.0],
        "transition_weight": args.transition_weights if model.transitions is not None else [0.0],
    }


def measure_test(
    args: EvaluateArguments,
    model: UniGRFForCausalLM,
    tokenizer: SemanticIdTokenizer,
    split: Dataset,
    measurement: Measurement,
    chosen: dict,
    statistics: ListStatistics,
) -> dict:
    """Measure the lists by generation_score, by score and by each score alone on test, as validation chose."""
    targets = torch.tensor(split["target"][:]).long()
    scored = candidates(model, tokenizer, split, chosen["num_beams"], measurement)
    beams = scored
    # The list by generation_score has no further candidates.
    if measurement != measurement.beams_alone:
        beams = candidates(model, tokenizer, split, chosen["num_beams"], measurement.beams_alone)
    served = chosen | {name: getattr(args, name) for name in ("popularity_correction", "diversity")}

    @torch.no_grad()
    def representations(items: torch.LongTensor) -> torch.Tensor:
        return model.scorer.representations(items.to(model.device)).cpu()

    lists = {
        "generation": fused_lists(beams, {"generation_weight": 1.0}, args.list_length),
        "ranked": fused_lists(scored, served, args.list_length, args.rerank_top_k, representations),
    }
    ranks = {name: target_ranks(values, targets) for name, values in lists.items()}
    parts = {
        name: target_ranks(fused_lists(scored, {f"{name}_weight": 1.0}, args.list_length), targets)
        for name in FUSED_SCORES
        if f"{name}_scores" in scored
    }
    return {
        **{name: mean_values(values) for name, values in ranks.items()},
        "parts": {name: mean_values(values) for name, values in parts.items()},
        "beyond accuracy": {name: statistics.of(lists[name], ranks[name]) for name in lists},
        "ranks": {name: ranks_as_json(values) for name, values in ranks.items()},
        "beam holds the target": float((beams["item_indices"] == targets[:, None]).any(dim=1).float().mean()),
    }


def protocol_of(args: EvaluateArguments, record: dict, dataset: DatasetDict, trained_on: str) -> dict:
    """Describe the protocol of the measurement, for `metrics.json` and the model card."""
    test = dataset["test"]
    counts = record["counts"]
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
    for name, label in LISTS.items():
        print(f"{label}:", ", ".join(f"{key} {value:.4f}" for key, value in result[name].items()))
    print(f"report: {report_of_checkpoint(arguments.output_dir, arguments.checkpoint, result)}")
    if not arguments.store:
        print(f"{arguments.checkpoint} serves as before; with --store True it serves what was measured")
