# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Beam search over the items that exist.

Each step runs one token a beam behind the shared history and descends the trie by one level.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .scoring_unigrf import ItemScorer
from .shared_prefix_unigrf import read_branches
from .trie_unigrf import CatalogTrie, ItemFilter


@dataclass
class Beams:
    """
    The beams of each request, best first: K unfinished or finished items.

    Args:
        nodes (`torch.LongTensor` of shape `(batch_size, K)`): Trie nodes of the beams.
        codes (`torch.LongTensor` of shape `(batch_size, K, steps)`): The codes generated so far.
        scores (`torch.FloatTensor` of shape `(batch_size, K)`): Sums of the codes' log-probabilities; -inf: no item.
        keys (`torch.LongTensor` of shape `(batch_size, K, steps - 1)`): Cache positions of the codes that the
            backbone has read.
    """

    nodes: torch.LongTensor
    codes: torch.LongTensor
    scores: torch.FloatTensor
    keys: torch.LongTensor


@dataclass
class SearchSpace:
    """
    The items that a search may return.

    Args:
        trie (`CatalogTrie`): The items that exist.
        item_filter (`ItemFilter`, *optional*): The items that each request allows or blocks. None: allow all items.
        prefix (`torch.LongTensor` of shape `(batch_size, >= num_prefix_codes)`, *optional*): First codes of the next
            item. None: search from the first code.
        num_prefix_codes (`int`, defaults to 0): Codes of the next item that every row has already.
        max_steps (`int`, *optional*): Most codes to generate. None: all codes that complete an item.
        process (`Callable`, *optional*): A user's logits processors, called as `process(beams, level, log_probs)`
            with and for log-probabilities `[B, K, num_codes]`. None: no processors.
    """

    trie: CatalogTrie
    item_filter: ItemFilter | None = None
    prefix: torch.LongTensor | None = None
    num_prefix_codes: int = 0
    max_steps: int | None = None
    process: Callable[[Beams, int, torch.Tensor], torch.Tensor] | None = None


def beam_search(
    backbone: PreTrainedModel,
    scorer: ItemScorer,
    space: SearchSpace,
    history_states: torch.FloatTensor,
    history_mask: torch.BoolTensor,
    cache: DynamicCache,
    num_beams: int,
    query_time: torch.LongTensor | None = None,
) -> Beams:
    """
    Find the best items of each request.

    The search neither copies nor reorders the cache. Codes that the backbone has read stay there, at `Beams.keys`.

    Args:
        backbone (`UniGRFModel`): The model's backbone.
        scorer (`ItemScorer`): The model's heads and catalog.
        space (`SearchSpace`): The items that the search may return.
        history_states (`torch.FloatTensor` of shape `(batch_size, hidden_size)`): Output at the histories' last
            tokens.
        history_mask (`torch.BoolTensor` of shape `(batch_size, T)`): True at the tokens that exist, among the
            cache's first T.
        cache (`DynamicCache`): Keys and values of the histories.
        num_beams (`int`): Beams of each request.
        query_time (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Query time in seconds. None: no times.

    Returns:
        `Beams` of `num_beams` items. They are fewer if no request has as many items.

    Raises:
        ValueError: if no item begins with a prefix.
    """
    layout = scorer.layout
    trie = space.trie
    times = None if query_time is None else query_time[:, None].expand(-1, 2)
    first_level = space.num_prefix_codes
    last_level = layout.num_levels
    if space.max_steps is not None:
        last_level = min(last_level, first_level + space.max_steps)
    no_prefix = torch.zeros(len(history_states), dtype=torch.long, device=history_states.device)[:, None]
    nodes = trie.descend(space.prefix, first_level)[:, None] if first_level else no_prefix
    no_codes = nodes.new_empty(len(nodes), 1, 0)
    beams = Beams(nodes, no_codes, history_states.new_zeros(nodes.shape, dtype=torch.float32), no_codes)
    states = history_states[:, None]
    for level in range(first_level, last_level):
        if level > first_level:
            tokens = beams.codes[..., -1:] + layout.code_offsets[level - 1]
            states, beams.keys = read_branches(backbone, tokens, history_mask, beams.keys, cache, times)
            states = states[:, :, 0]
        log_probs = scorer.code_log_probs(states, level)
        if space.process is not None:
            log_probs = space.process(beams, level, log_probs)
        scores, parent, nodes, code = trie.best_children(
            level, beams.nodes, beams.scores, log_probs, num_beams, space.item_filter
        )
        codes, keys = (
            column.gather(1, parent[..., None].expand(-1, -1, column.shape[2])) for column in (beams.codes, beams.keys)
        )
        beams = Beams(nodes, torch.cat([codes, code[..., None]], dim=2), scores, keys)
    return beams
