# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Sub-histories: of a user's long history, the items most like a candidate, and how ranking reads them (RecoChain, section 1).

A long history goes beyond what the backbone reads: thousands of items, `long_items [B, H]`, `long_behaviors [B, H]` and, for
a backbone that reads times, `long_timestamps [B, H]`, oldest first. An index of -1 is no item (padding on either side, an
item that the catalog lacks) and is passed over wherever it stands. Behind a candidate's codes stands its block:

    s_1 .. s_L  ITEM(c)  R_1 .. R_k  CAND(c)

ITEM and CAND are the candidate's item vector, R the vectors of the retrieved items with the behaviors on them, oldest
first; a learned segment tells the three apart. Ranking reads the output at CAND.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .configuration_unigrf import UniGRFConfig
from .trie_unigrf import check_items, is_integer

MAX_SIMILARITIES = 2**24  # cosines held at a time: 64 MiB, and twice as much again as whole numbers
TIE = 2**16  # cosines that agree to so fine a part of 1 are ties; a device's order of additions changes far finer ones
NO_KEY = torch.iinfo(torch.int64).min
ITEM, RETRIEVED, CANDIDATE = range(3)  # segments


@dataclass
class LongHistory:
    """
    Args:
        items (`torch.LongTensor` of shape `(batch_size, H)`): Item indices, oldest first; -1 where there is no item.
        behaviors (`torch.LongTensor` of shape `(batch_size, H)`): Indices into `config.behaviors`; any of them where there is
            no item.
        timestamps (`torch.LongTensor` of shape `(batch_size, H)`): When each was; -1 where not known.
    """

    items: torch.LongTensor
    behaviors: torch.LongTensor
    timestamps: torch.LongTensor


def check_long_history(
    config: UniGRFConfig,
    num_items: int,
    batch_size: int,
    long_items: torch.LongTensor | None,
    long_behaviors: torch.LongTensor | None,
    long_timestamps: torch.LongTensor | None,
    is_timed: bool,
) -> LongHistory | None:
    """
    The long histories of a batch; None for a model that reads none. `is_timed`: the histories before them have timestamps.

    Raises:
        ValueError: if they are missing or superfluous, of another shape, or hold items or behaviors that there are not.
    """
    if not config.num_retrieved_items:
        if any(one is not None for one in (long_items, long_behaviors, long_timestamps)):
            raise ValueError(
                "Expected no long_items, long_behaviors and long_timestamps, which a model with num_retrieved_items=0 does not "
                "read, found some. Leave them out, or load the model with num_retrieved_items=10."
            )
        return None
    if long_items is None:
        raise ValueError(
            f"Expected integer long_items of shape ({batch_size}, H), the whole history of each row (num_retrieved_items="
            f"{config.num_retrieved_items}), found none. Pass item indices, oldest first and padded with -1; without any "
            "history, a tensor of no columns."
        )
    long_items = check_items("long_items", long_items, batch_size, num_items)
    shape, count = tuple(long_items.shape), len(config.behaviors)
    if long_behaviors is None and count == 1:
        long_behaviors = torch.zeros_like(long_items)
    if long_behaviors is None or long_behaviors.shape != long_items.shape or not is_integer(long_behaviors):
        found = None if long_behaviors is None else (long_behaviors.dtype, tuple(long_behaviors.shape))
        raise ValueError(
            f"Expected integer long_behaviors of shape {shape} as long_items, found {found}. Pass an index into "
            f"{config.behaviors} for each item."
        )
    long_behaviors = long_behaviors.long()
    strange = ((long_behaviors < 0) | (long_behaviors >= count)) & (long_items >= 0)
    if strange.any():
        raise ValueError(
            f"Expected long_behaviors below {count}, indices into {config.behaviors}, found "
            f"{int(long_behaviors[strange][0])} in row {int(strange.nonzero()[0, 0])}."
        )
    if long_timestamps is None:
        long_timestamps = torch.full_like(long_items, -1)
    elif not is_timed or long_timestamps.shape != long_items.shape or not is_integer(long_timestamps):
        raise ValueError(
            f"Expected integer long_timestamps of shape {shape} as long_items, beside timestamps of the history, found "
            f"{long_timestamps.dtype} of shape {tuple(long_timestamps.shape)}{'' if is_timed else ' and no timestamps'}. "
            "Pass seconds from the same origin, -1 where not known; leave them out where there are none."
        )
    return LongHistory(long_items, long_behaviors.clamp(0, count - 1), long_timestamps.long())


def first_places(items: torch.LongTensor) -> torch.LongTensor:
    """Items `[B, H]` -> where in its row each item stands first, `[B, H]`."""
    ordered, order = items.sort(dim=1, stable=True)
    place = torch.arange(items.shape[1], device=items.device)
    is_new = nn.functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    first = order.gather(1, torch.where(is_new, place, 0).cummax(dim=1).values)
    return torch.empty_like(order).scatter_(1, order, first)


@torch.no_grad()
def retrieve(
    content_embeddings: torch.Tensor,
    long_items: torch.LongTensor,
    candidates: torch.LongTensor,
    num_retrieved: int,
    exclude_candidate: bool = False,
) -> torch.LongTensor:
    """
    The sub-history of every candidate: the places of the items of the long history with the greatest cosine to it, in order
    of time. Of equal cosines (exact repeats above all) the later one is taken. Embeddings of zeros have cosines of 0.

    Args:
        content_embeddings (`torch.FloatTensor` or `torch.CharTensor` of shape `(num_items, D)`)
        long_items (`torch.LongTensor` of shape `(batch_size, H)`): -1 where there is no item.
        candidates (`torch.LongTensor` of shape `(batch_size, N)`)
        exclude_candidate (`bool`): Leave the candidate itself out.

    Returns:
        `torch.LongTensor` of shape `(batch_size, N, min(num_retrieved, H))`: places in the long history, ascending. Where it
        has fewer items, -1 before them.
    """

    def directions(items: torch.LongTensor) -> torch.Tensor:
        return nn.functional.normalize(content_embeddings[items.clamp(min=0)].float(), dim=-1)

    (batch_size, length), count, width = long_items.shape, candidates.shape[1], content_embeddings.shape[1]
    places = candidates.new_empty(batch_size, count, min(num_retrieved, length))
    if places.numel() == 0:
        return places
    time = torch.arange(length, device=long_items.device)
    rows_at_once = max(1, MAX_SIMILARITIES // (length * max(count, width)))
    at_once = max(1, MAX_SIMILARITIES // length)
    for start in range(0, batch_size, rows_at_once):
        rows = slice(start, start + rows_at_once)
        items, first = long_items[rows], first_places(long_items[rows])
        history = directions(items).transpose(1, 2)
        for part in range(0, count, at_once):
            some = candidates[rows, part : part + at_once]
            # In float32 under bfloat16 autocast, too, so that training and inference choose the same items.
            with torch.autocast(items.device.type, enabled=False):
                cosines = directions(some) @ history
            # A repeated item has one cosine: which column of a product it stands in may change the last bit.
            cosines = cosines.gather(2, first[:, None].expand(-1, some.shape[1], -1))
            hidden = (items < 0)[:, None]
            if exclude_candidate:
                hidden = hidden | (some[:, :, None] == items[:, None])
            # Whole numbers, all different.
            keys = cosines.mul_(TIE).round_().long().mul_(length).add_(time).masked_fill_(hidden, NO_KEY)
            best, found = keys.topk(places.shape[2], dim=2)
            places[rows, part : part + at_once] = found.masked_fill(best == NO_KEY, -1).sort(dim=2).values
    return places


class UniGRFCandidateBlock(nn.Module):
    """What is read behind a candidate's codes: `ITEM(c) R_1 .. R_k CAND(c)`, as embeddings."""

    def __init__(self, config: UniGRFConfig):
        super().__init__()
        self.segments = nn.Embedding(3, config.hidden_size)

    def forward(self, candidates: torch.Tensor, retrieved: torch.Tensor, behaviors: torch.Tensor) -> torch.Tensor:
        """
        Args:
            candidates (`torch.FloatTensor` of shape `(batch_size, N, hidden_size)`): Item vectors.
            retrieved (`torch.FloatTensor` of shape `(batch_size, N, k, hidden_size)`): Item vectors.
            behaviors (the same): Embeddings of the behaviors on the retrieved items.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, N, k + 2, hidden_size)`
        """
        segments = self.segments.weight
        return torch.cat(
            [
                (candidates + segments[ITEM])[:, :, None],
                retrieved + behaviors + segments[RETRIEVED],
                (candidates + segments[CANDIDATE])[:, :, None],
            ],
            dim=2,
        )
