"""Search and score candidates for the users of a split, for every recipe that measures a model.

The candidates come from the whole catalog. `candidates` searches once and returns all scores; `fused_lists` then fuses
the scores with any weights. `save_serving_options` writes the chosen weights into the checkpoint.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import evaluate
import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from modeling_unigrf import ServingOptions, UniGRFForCausalLM
from modeling_unigrf.adapters_unigrf import base_of, find_adapter
from modeling_unigrf.pipeline_unigrf import check_tokenizer
from modeling_unigrf.recommendation_unigrf import diverse_order, fused_scores
from modeling_unigrf.transitions_unigrf import TransitionSettings
from recipes.common.files import whole_file
from recipes.data.encoding import HistoryEncoder
from recipes.data.leave_one_out import columns_read
from tokenization import SemanticIdTokenizer

METRICS = Path(__file__).parent / "metrics"
# Users whose plain `generate` is checked.
MAX_CHECKED_USERS = 1000


@dataclass
class Measurement:
    """
    Settings of a measurement: the items that the model reads, and the items that are candidates.

    Args:
        max_items (`int`, *optional*): Most recent items of a history that the model reads. None: all.
        max_long_items (`int`, *optional*): Most recent items that sub-histories are retrieved from. None: all.
        ranking_target (`str`, *optional*): Ranking target whose logit is the ranking score. None: the checkpoint's.
        num_dense_candidates (`int`, defaults to 0): Items of the best dense-retrieval score, added to the beams. 0:
            beams alone.
        num_transition_candidates (`int`, defaults to 0): Items of the best transition score, added to the beams.
        transition_settings (`TransitionSettings`, *optional*): Settings of the transition score. None: no such score.
        exclude_history (`bool`, defaults to `True`): Exclude the items of a user's history.
        batch_size (`int`, defaults to 64): Users of a batch.
    """

    max_items: int | None = None
    max_long_items: int | None = None
    ranking_target: str | None = None
    num_dense_candidates: int = 0
    num_transition_candidates: int = 0
    transition_settings: TransitionSettings | None = None
    exclude_history: bool = True
    batch_size: int = 64

    @property
    def beams_alone(self) -> "Measurement":
        """The measurement without further candidates."""
        return replace(self, num_dense_candidates=0, num_transition_candidates=0)


def load_metric(name: str) -> evaluate.EvaluationModule:
    """Load a metric of this package, in memory, so that two runs do not wait for each other's lock."""
    return evaluate.load(str(METRICS / name), keep_in_memory=True)


def load_checkpoint(checkpoint: str | Path) -> tuple[UniGRFForCausalLM, SemanticIdTokenizer]:
    """
    Load a model in evaluation mode, on the GPU if there is one, and its tokenizer, by the installed code.

    Raises:
        ValueError: for a tokenizer of other items.
    """
    model = UniGRFForCausalLM.from_pretrained(checkpoint).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(checkpoint)
    check_tokenizer(model, tokenizer)
    return model.to(device), tokenizer


def load_tokenizer(checkpoint: str | Path) -> SemanticIdTokenizer:
    """Load the tokenizer of a checkpoint, or of an adapter's base if PEFT alone saved the adapter."""
    adapter = find_adapter(checkpoint, {})
    has_none = adapter is not None and not (adapter / "tokenizer_config.json").is_file()
    return SemanticIdTokenizer.from_pretrained(base_of(adapter) if has_none else checkpoint)


def batches(
    model: UniGRFForCausalLM,
    tokenizer: SemanticIdTokenizer,
    split: Dataset,
    measurement: Measurement,
    desc: str,
    long_histories: bool = True,
) -> Iterator[tuple[np.ndarray, list[dict], dict[str, torch.Tensor]]]:
    """
    Yield batches of users with histories of similar length, under a progress bar.

    The query time of a model that reads times is the time of the target.

    Args:
        model: The model; its device receives the inputs.
        tokenizer: The tokenizer of its items.
        split: Users of a prepared split.
        measurement: Settings of the measurement.
        desc: Description of the progress bar.
        long_histories: Encode long histories, too, for a model that retrieves sub-histories. False: inputs of
            `generate`.

    Yields:
        The users' rows in the split `[b]`, the users, and the inputs of `recommend` and `rank`.
    """
    with_long = long_histories and model.config.num_retrieved_items > 0
    encoder = HistoryEncoder(tokenizer, measurement.max_items, measurement.max_long_items if with_long else 0)
    names = list(columns_read(split, model.config.reads_times))
    recent = slice(-measurement.max_items if measurement.max_items else None, None)
    order = np.argsort([len(items[recent]) for items in split["items"]], kind="stable")
    for start in tqdm(range(0, len(order), measurement.batch_size), desc=desc, unit="batch"):
        rows = order[start : start + measurement.batch_size]
        users = [split[int(row)] for row in rows]
        columns = {name: [user[name] for user in users] for name in names}
        if "timestamps" in columns:
            columns["query_time"] = [user["target_timestamp"] for user in users]
        yield rows, users, encoder(**columns, device=model.device)


def candidates(
    model: UniGRFForCausalLM, tokenizer: SemanticIdTokenizer, split: Dataset, num_beams: int, measurement: Measurement
) -> dict[str, torch.Tensor]:
    """
    Search the candidates of every user of a split.

    A user whose history leaves no item has no candidates: items of -1, and scores of -inf.

    Returns:
        `item_indices`, `generation_scores`, `ranking_scores` and, for a model with these scores, `dense_scores` and
        `transition_scores`, `is_new` and `log_popularity`: each `[U, K]`.
    """
    names = ["item_indices", "generation_scores", "ranking_scores"]
    if model.config.has_dense_scores:
        names.append("dense_scores")
    transition_options = {}
    if measurement.transition_settings is not None:
        names.append("transition_scores")
        # A weight of 0 would leave the scores out; fusion comes later.
        transition_options = {**asdict(measurement.transition_settings), "transition_weight": 1.0}
    length = num_beams + measurement.num_dense_candidates + measurement.num_transition_candidates
    columns = {name: torch.full((len(split), length), -torch.inf) for name in names}
    columns["item_indices"] = torch.full((len(split), length), -1)
    answered = answered_users(split, model.config.num_items, measurement.exclude_history)
    answered_split = split if len(answered) == len(split) else split.select(answered)
    for rows, users, inputs in batches(model, tokenizer, answered_split, measurement, f"beams of {num_beams}"):
        best = model.recommend(
            **inputs,
            num_beams=num_beams,
            num_return_sequences=length,
            generation_weight=1.0,
            ranking_weight=0.0,
            ranking_target=measurement.ranking_target,
            exclude_history=False,
            blocked_items=[user["items"] for user in users] if measurement.exclude_history else None,
            dense_weight=0.0,
            num_dense_candidates=measurement.num_dense_candidates,
            num_transition_candidates=measurement.num_transition_candidates,
            new_item_bonus=0.0,
            popularity_correction=0.0,
            diversity=0.0,
            rerank_top_k=0,
            **transition_options,
        )
        for name, column in columns.items():
            column[answered[rows]] = best[name].cpu().to(column.dtype)
    if model.transitions is not None:
        items = columns["item_indices"].clamp(min=0).to(model.device)
        columns["is_new"] = model.scorer.is_untrained(items).cpu()
        columns["log_popularity"] = model.scorer.log_popularity(items).cpu()
    return columns


def answered_users(split: Dataset, num_items: int, exclude_history: bool) -> np.ndarray:
    """Return the rows of the users whose list can have an item: all, unless a history has the whole catalog."""
    if not exclude_history:
        return np.arange(len(split))
    histories = split["items"]
    return np.array(
        [row for row, items in enumerate(histories) if len(items) < num_items or len({*items}) < num_items]
    )


def fused_lists(
    scored: dict[str, torch.Tensor],
    weights: dict[str, float],
    length: int,
    num_ranked: int = 0,
    representations: Callable[[torch.LongTensor], torch.Tensor] | None = None,
) -> list[list[int]]:
    """
    List the items of every user by the fused score, best first, padded with -1.

    `recommend` gives the same lists, with a new search for each choice of weights. A test compares the two.

    Args:
        scored: Result of `candidates`.
        weights: The weights of `fused_scores` and, with `representations`, `diversity`.
        length: Items of a list.
        num_ranked: Candidates that are ranked and listed, the best by log P and the dense-retrieval score
            (`rerank_top_k`). 0, or generation alone: all.
        representations: Function of items: their representations, for `diversity`. None: no diversity.
    """
    # The fused scores.
    scores = fused_scores(scored, weights)
    absent = scored["generation_scores"] == -torch.inf

    # The candidates that are ranked: the best by the other scores.
    if num_ranked and (weights.get("ranking_weight") or weights.get("dense_weight")):
        first_weights = {"generation_weight": 1.0, "dense_weight": weights.get("dense_weight", 0.0)}
        unranked_scores = fused_scores(scored, first_weights).masked_fill(absent, -torch.inf)
        best = unranked_scores.topk(min(num_ranked, scores.shape[1]), dim=1).indices
        absent = absent | torch.ones_like(absent).scatter_(1, best, False)

    # The lists. A negative weight makes NaN of absent candidates.
    scores = scores.masked_fill(absent, -torch.inf)
    diversity = weights.get("diversity", 0.0)
    if representations is None or not diversity:
        scores, order = (column[:, :length] for column in torch.sort(scores, dim=1, descending=True, stable=True))
    else:
        length = min(length, scores.shape[1])
        parts = [
            diverse_order(part, representations(items.clamp(min=0)), diversity, length)
            for part, items in zip(scores.split(512), scored["item_indices"].split(512), strict=True)
        ]
        scores, order = (torch.cat(column) for column in zip(*parts, strict=True))
    return scored["item_indices"].gather(1, order).masked_fill(scores == -torch.inf, -1).tolist()


def ranks_as_json(ranks: np.ndarray) -> list[int | None]:
    """Convert ranks to JSON values; None stands for infinity, a target outside the list."""
    return [int(rank) if rank < np.inf else None for rank in ranks]


def like_auc(
    model: UniGRFForCausalLM, tokenizer: SemanticIdTokenizer, split: Dataset, like: str, measurement: Measurement
) -> dict[str, float]:
    """Measure the AUC over users of the ranking target `like`, for the held-out interactions."""
    index = model.config.ranking_targets.index(like)
    behavior = tokenizer.behaviors.index(like)
    scores = np.zeros(len(split))
    targets = torch.tensor(split["target"][:]).long()
    for rows, _, inputs in batches(model, tokenizer, split, measurement, "AUC"):
        logits = model.rank(**inputs, candidates=targets[rows][:, None].to(model.device))
        scores[rows] = logits[:, 0, index].cpu()
    labels = [int(target == behavior) for target in split["target_behavior"][:]]
    auc = load_metric("like_auc").compute(prediction_scores=scores.tolist(), references=labels)["auc"]
    return {"auc": auc, "share_of_likes": float(np.mean(labels)), "interactions": len(labels)}


def invalid_items(
    model: UniGRFForCausalLM, tokenizer: SemanticIdTokenizer, split: Dataset, num_beams: int, measurement: Measurement
) -> dict[str, int]:
    """Run plain `generate` for the first users, and count the generated items that the tokenizer's item map lacks."""
    split = split.select(range(min(len(split), MAX_CHECKED_USERS)))
    checked = invalid = 0
    for _, _, inputs in batches(model, tokenizer, split, measurement, "generated items", long_histories=False):
        sequences = model.generate(**inputs, num_beams=num_beams, num_return_sequences=min(10, num_beams))
        for tokens in sequences[:, inputs["input_ids"].shape[1] :].cpu():
            checked += 1
            try:
                invalid += len(tokenizer.decode_indices(tokens)) != 1
            except ValueError:
                invalid += 1
    return {"checked": checked, "invalid": invalid}


def save_serving_options(model: UniGRFForCausalLM, checkpoint: str | Path, **chosen: float | str | None) -> None:
    """
    Write serving options into the generation_config.json of a model's folder.

    `recommend` and the pipeline read them there.

    Raises:
        ValueError: for options that the model cannot serve.
    """
    generation_config = deepcopy(model.generation_config)
    generation_config.update(**chosen, allow_custom_entries=True)
    ServingOptions.from_generation_config(generation_config, model.config, {})
    with whole_file(Path(checkpoint) / "generation_config.json") as unfinished:
        unfinished.write_text(generation_config.to_json_string())
