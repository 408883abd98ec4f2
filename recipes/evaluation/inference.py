"""What a model finds for the users of a split, and how its scores order it: for every recipe that measures a model.

Leave-one-out, the whole catalog. Candidates are searched for once, with all their scores, and any weights of the fusion then
tried on them; `keep_choice` writes the chosen ones into the checkpoint.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import evaluate
import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM
from recipes.common.files import whole_file
from recipes.data.encoding import HistoryEncoder
from recipes.data.leave_one_out import columns_read
from tokenization import SemanticIdTokenizer

METRICS = Path(__file__).parent / "metrics"


@dataclass
class Measurement:
    """
    What of a user is read, and which items are candidates.

    Args:
        max_items (`int`, *optional*): Items of a history that the model reads; None: all.
        max_long_items (`int`, *optional*): Items of a history that sub-histories come from; None: all.
        ranking_target (`str`, *optional*): The ranking target that orders the items; None: the checkpoint's.
        num_dense_candidates (`int`): Best items by the item-level score, added to the beams.
        exclude_history (`bool`): Whether a user's own items are no candidates.
        batch_size (`int`): Users run together.
    """

    max_items: int | None = None
    max_long_items: int | None = None
    ranking_target: str | None = None
    num_dense_candidates: int = 0
    exclude_history: bool = True
    batch_size: int = 64


def load_metric(name: str) -> evaluate.EvaluationModule:
    """A metric of ours, which keeps no file, so that two runs at a time do not wait for each other's lock."""
    return evaluate.load(str(METRICS / name), keep_in_memory=True)


def load_checkpoint(checkpoint: str | Path) -> tuple[UniGRFForCausalLM, SemanticIdTokenizer]:
    """Load a model in evaluation mode, on the GPU if there is one, and its tokenizer."""
    model = UniGRFForCausalLM.from_pretrained(checkpoint).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), SemanticIdTokenizer.from_pretrained(checkpoint)


def batches(
    model, tokenizer, split: Dataset, how: Measurement, desc: str, long_histories: bool = True
) -> Iterator[tuple[np.ndarray, list[dict], dict[str, torch.Tensor]]]:
    """
    Yield users with histories of similar length, under a progress bar: their rows `[b]`, the users themselves, and the inputs of
    `recommend` and `rank` on the model's device.

    A model that reads times is asked at the time of the target. `generate` takes no `long_histories`.
    """
    with_long = long_histories and model.config.num_retrieved_items > 0
    encoder = HistoryEncoder(tokenizer, how.max_items, how.max_long_items if with_long else 0)
    names = list(columns_read(split, model.config.reads_times))
    recent = slice(-how.max_items if how.max_items else None, None)
    order = np.argsort([len(items[recent]) for items in split["items"]], kind="stable")
    for start in tqdm(range(0, len(order), how.batch_size), desc=desc, unit="batch"):
        rows = order[start : start + how.batch_size]
        users = [split[int(row)] for row in rows]
        columns = {name: [user[name] for user in users] for name in names}
        if "timestamps" in columns:
            columns["query_time"] = [user["target_timestamp"] for user in users]
        yield rows, users, encoder(**columns, device=model.device)


def candidates(model, tokenizer, split: Dataset, num_beams: int, how: Measurement) -> dict[str, torch.Tensor]:
    """All candidates of every user: `item_indices [U, K]` and their scores, each `[U, K]`; `dense_scores` if there are some."""
    names = ["item_indices", "generation_scores", "ranking_scores"]
    if model.ranking_head.history_query is not None:
        names.append("dense_scores")
    columns = {name: [None] * len(split) for name in names}
    for rows, users, inputs in batches(model, tokenizer, split, how, f"beams of {num_beams}"):
        found = model.recommend(
            **inputs,
            num_beams=num_beams,
            num_return_sequences=num_beams + how.num_dense_candidates,
            ranking_weight=0.0,
            ranking_target=how.ranking_target,
            exclude_history=False,
            blocked_items=[user["items"] for user in users] if how.exclude_history else None,
            dense_weight=0.0,
            num_dense_candidates=how.num_dense_candidates,
            rerank_top_k=0,
        )
        for name, column in columns.items():
            for row, values in zip(rows, found[name].cpu(), strict=True):
                column[row] = values
    return {name: torch.stack(column) for name, column in columns.items()}


def fused_lists(
    found: dict[str, torch.Tensor], weight: float, length: int, dense_weight: float = 0.0, num_ranked: int = 0
) -> list[list[int]]:
    """
    Items of every user by the fused score, best first, cut to `length` and padded by -1. `num_ranked`: as if `recommend` had
    ranked only so many, the best by the other scores; generation alone, without weights, lists all that it found.

    The fusion of `recommend` a second time, which a test holds equal to it: a hundred pairs of weights are tried on candidates
    that were searched for once.
    """
    num_ranked = num_ranked if weight or dense_weight else 0
    scores = found["generation_scores"]
    absent = scores == -torch.inf
    scores = scores + dense_weight * found["dense_scores"] if dense_weight else scores
    if num_ranked:
        unranked = torch.ones_like(scores, dtype=torch.bool).scatter_(
            1, scores.topk(min(num_ranked, scores.shape[1]), dim=1).indices, False
        )
        absent = absent | unranked
        scores = scores.masked_fill(unranked, -torch.inf)
    scores = scores + weight * found["ranking_scores"] if weight else scores
    scores = scores.masked_fill(absent, -torch.inf)  # of any weights
    scores, order = (column[:, :length] for column in torch.sort(scores, dim=1, descending=True, stable=True))
    return found["item_indices"].gather(1, order).masked_fill(scores == -torch.inf, -1).tolist()


def ranks_as_json(ranks: np.ndarray) -> list[int | None]:
    """Ranks in lists of items, None for infinity: the target is not there."""
    return [int(rank) if rank < np.inf else None for rank in ranks]


def like_auc(model, tokenizer, split: Dataset, like: str, how: Measurement) -> dict[str, float]:
    """AUC over users of the score of target `like`, for the held-out interaction."""
    index, behavior = model.config.ranking_targets.index(like), tokenizer.behaviors.index(like)
    scores = np.zeros(len(split))
    targets = torch.tensor(split["target"][:]).long()
    for rows, _, inputs in batches(model, tokenizer, split, how, "AUC"):
        logits = model.rank(**inputs, candidates=targets[rows][:, None].to(model.device))
        scores[rows] = logits[:, 0, index].cpu()
    labels = [int(one == behavior) for one in split["target_behavior"][:]]
    auc = load_metric("like_auc").compute(prediction_scores=scores.tolist(), references=labels)["auc"]
    return {"auc": auc, "share_of_likes": float(np.mean(labels)), "interactions": len(labels)}


def invalid_items(model, tokenizer, split: Dataset, num_beams: int, how: Measurement) -> dict[str, int]:
    """Runs plain `generate` and counts, by the tokenizer's own table, the generated items that do not exist."""
    checked = invalid = 0
    for _, _, inputs in batches(model, tokenizer, split, how, "generated items", long_histories=False):
        sequences = model.generate(**inputs, num_beams=num_beams, num_return_sequences=min(10, num_beams))
        for tokens in sequences[:, inputs["input_ids"].shape[1] :].cpu():
            checked += 1
            try:
                invalid += len(tokenizer.decode_indices(tokens)) != 1
            except ValueError:
                invalid += 1
    return {"checked": checked, "invalid": invalid}


def keep_choice(checkpoint: str | Path, num_beams: int, **chosen: float | str | None) -> None:
    """
    Writes what was chosen into the checkpoint's own config, of which `chosen` are fields: the defaults of `recommend` and of
    the pipeline.
    """
    UniGRFConfig.from_pretrained(checkpoint, **chosen).check_training()
    # The JSON alone: `save_pretrained` would put this code's configuration beside the folder's own model.
    file = Path(checkpoint) / "config.json"
    text = json.dumps(json.loads(file.read_text()) | chosen, indent=2, sort_keys=True) + "\n"
    with whole_file(file) as unfinished:
        unfinished.write_text(text)
    GenerationConfig.from_pretrained(checkpoint, num_beams=num_beams).save_pretrained(checkpoint)
