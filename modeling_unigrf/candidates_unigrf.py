# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Candidates: their sub-histories, and reading them on their user's cache (RecoChain, section 1).

A candidate's block stands behind its codes:

    s_1 .. s_L  ITEM(c)  R_1 .. R_k  CAND(c)

ITEM and CAND are the candidate's item representation. The R_i are those of the retrieved items with the behaviors on
them, oldest first. A learned segment tells the three kinds apart. Ranking reads the output at CAND, or at s_L for a
model without sub-histories.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .inputs_unigrf import LongHistory
from .scoring_unigrf import ItemScorer, UniGRFCandidateBlock
from .shared_prefix_unigrf import embed, read_branches

# Most cosines in memory: 64 MiB, and 128 MiB as integers.
MAX_SIMILARITIES = 2**24
# Cosines within 1 / 2^16 are ties: devices add in other orders.
COSINE_STEPS = 2**16
NO_KEY = torch.iinfo(torch.int64).min


@dataclass
class CandidateContext:
    """
    The histories behind which candidates of B requests are read.

    Args:
        history_mask (`torch.BoolTensor` of shape `(batch_size, T)`): True at the tokens that candidates see, among
            the cache's first T.
        cache (`DynamicCache`): Keys and values of the histories.
        long_history (`LongHistory`, *optional*): The items among which sub-histories are retrieved. None: no
            sub-histories.
        query_time (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Query time in seconds. None: no times.
    """

    history_mask: torch.BoolTensor
    cache: DynamicCache
    long_history: LongHistory | None = None
    query_time: torch.LongTensor | None = None


def read_candidates(
    backbone: PreTrainedModel,
    scorer: ItemScorer,
    candidate_block: UniGRFCandidateBlock | None,
    context: CandidateContext,
    items: torch.LongTensor,
    earlier_keys: torch.LongTensor | None = None,
) -> torch.FloatTensor:
    """
    Run the tokens of candidates that the cache lacks.

    These tokens are a candidate's last codes and, with a long history, its block. Their keys and values stay on the
    cache. The last state ranks a candidate.

    Args:
        backbone (`UniGRFModel`): The model's backbone.
        scorer (`ItemScorer`): The model's heads and catalog.
        candidate_block (`UniGRFCandidateBlock`, *optional*): Makes the blocks' embeddings. None: without a long
            history.
        context (`CandidateContext`): The histories behind which the candidates are read.
        items (`torch.LongTensor` of shape `(batch_size, N)`): Item indices of the candidates.
        earlier_keys (`torch.LongTensor` of shape `(batch_size, N, m)`, *optional*): Cache positions of each
            candidate's first m codes. None: the cache has none of its codes, m = 0.

    Returns:
        The states at these tokens, `torch.FloatTensor` of shape `(batch_size, N, L - m, hidden_size)`. With blocks,
        the shape is `(batch_size, N, L - m + k + 2, hidden_size)`.
    """
    if earlier_keys is None:
        earlier_keys = items.new_empty(*items.shape, 0)
    codes = scorer.catalog.item_codes[items].long()
    tokens = scorer.layout.item_tokens(codes)[..., earlier_keys.shape[2] :]
    query_time = context.query_time
    times = None if query_time is None else query_time[:, None].expand(-1, 2)
    block = token_mask = token_times = None
    if context.long_history is not None:
        places = retrieve(
            scorer.catalog.content_embeddings, context.long_history.items, items, scorer.config.num_retrieved_items
        )
        flat = places.clamp(min=0).flatten(1)
        retrieved, behaviors, item_times = (
            column.gather(1, flat).view_as(places)
            for column in (context.long_history.items, context.long_history.behaviors, context.long_history.timestamps)
        )
        # An empty place may name any item, or -1.
        representations = [
            scorer.item_encoder.widen(scorer.representations(read)) for read in (items, retrieved.clamp(min=0))
        ]
        behavior_ids = behaviors.new_tensor(scorer.layout.behavior_token_ids)[behaviors]
        block = candidate_block(*representations, embed(backbone, behavior_ids))
        token_mask = nn.functional.pad(places >= 0, (tokens.shape[2] + 1, 1), value=True)
        if query_time is not None:
            item_time = query_time[:, None, None].expand(*items.shape, tokens.shape[2] + 2)
            token_times = torch.cat([item_time[..., :-1], item_times, item_time[..., -1:]], dim=2)
    states, _ = read_branches(
        backbone, tokens, context.history_mask, earlier_keys, context.cache, times, block, token_mask, token_times
    )
    return states


def first_places(items: torch.LongTensor) -> torch.LongTensor:
    """Return the first place of each of the items `[B, H]` in its row, `[B, H]`."""
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
) -> torch.LongTensor:
    """
    Retrieve the sub-history of every candidate.

    A sub-history holds the items of the long history with the greatest cosine to the candidate, in order of time.
    Among equal cosines (above all exact repeats) the later item wins. Embeddings of zeros have cosines of 0.

    Args:
        content_embeddings (`torch.FloatTensor` or `torch.CharTensor` of shape `(num_items, D)`): Content embeddings
            of all items, floats or int8.
        long_items (`torch.LongTensor` of shape `(batch_size, H)`): Item indices, oldest first; -1: no item.
        candidates (`torch.LongTensor` of shape `(batch_size, N)`): Item indices of the candidates.
        num_retrieved (`int`): Most items of a sub-history.

    Returns:
        `torch.LongTensor` of shape `(batch_size, N, min(num_retrieved, H))`: places in the long history, ascending.
        Rows with fewer items begin with -1.
    """

    def directions(items: torch.LongTensor) -> torch.Tensor:
        return nn.functional.normalize(content_embeddings[items.clamp(min=0)].float(), dim=-1)

    batch_size, length = long_items.shape
    count = candidates.shape[1]
    width = content_embeddings.shape[1]
    places = candidates.new_empty(batch_size, count, min(num_retrieved, length))
    if places.numel() == 0:
        return places
    time = torch.arange(length, device=long_items.device)
    rows_per_chunk = max(1, MAX_SIMILARITIES // (length * max(count, width)))
    candidates_per_chunk = max(1, MAX_SIMILARITIES // length)
    for start in range(0, batch_size, rows_per_chunk):
        rows = slice(start, start + rows_per_chunk)
        items = long_items[rows]
        first = first_places(items)
        history = directions(items).transpose(1, 2)
        for first_candidate in range(0, count, candidates_per_chunk):
            part = slice(first_candidate, first_candidate + candidates_per_chunk)
            chunk = candidates[rows, part]
            # float32 also under autocast: training and inference must choose the same items.
            with torch.autocast(items.device.type, enabled=False):
                cosines = directions(chunk) @ history
            # Repeated items share one cosine: products may differ in the last bit.
            cosines = cosines.gather(2, first[:, None].expand(-1, chunk.shape[1], -1))
            # Make the keys distinct: the cosine decides, then the time.
            keys = cosines.mul_(COSINE_STEPS).round_().long().mul_(length).add_(time)
            keys = keys.masked_fill_((items < 0)[:, None], NO_KEY)
            best, retrieved = keys.topk(places.shape[2], dim=2)
            places[rows, part] = retrieved.masked_fill(best == NO_KEY, -1).sort(dim=2).values
    return places
