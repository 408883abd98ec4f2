# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Candidates: reading them on their history's cache, adding the best by the item-level score, and learning from the model's
own beams (RecoChain, stage II).

`model` is a `UniGRFForCausalLM` throughout.
"""

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .configuration_unigrf import NEXT_TARGET
from .shared_prefix_unigrf import cache_rollback, read_branches
from .subhistory_unigrf import LongHistory, retrieve
from .training_unigrf import Supervision, last_items, ranking_loss
from .trie_unigrf import CatalogTrie, ItemFilter, check_items

LEAVES_AT_ONCE = 2**16  # items whose vectors are held at a time
CANDIDATES_AT_ONCE = 64  # of a row, in training, where the attention of a pack grows with its square


def block_inputs(
    model, items: torch.LongTensor, long_history: LongHistory
) -> tuple[torch.FloatTensor, torch.BoolTensor, torch.LongTensor]:
    """
    Candidates `[B, N]` -> what is read behind their codes, `[B, N, k + 2, hidden_size]`, which of it is there, and when the
    retrieved items were, `[B, N, k]`.
    """
    config = model.config
    places = retrieve(
        model.catalog.content_embeddings,
        long_history.items,
        items,
        config.num_retrieved_items,
        config.exclude_candidate,
    )
    flat = places.clamp(min=0).flatten(1)
    retrieved, behaviors, times = (
        one.gather(1, flat).view_as(places)
        for one in (long_history.items, long_history.behaviors, long_history.timestamps)
    )
    # A slot that stands empty may name an item of -1, or none at all.
    vectors = model.item_representations(retrieved.clamp(min=0))
    behavior_ids = behaviors.new_tensor(config.behavior_token_ids)[behaviors]
    block = model.candidate_block(
        model.item_representations(items), vectors, model.get_input_embeddings()(behavior_ids)
    )
    return block, nn.functional.pad(places >= 0, (1, 1), value=True), times


def read_candidates(
    model,
    items: torch.LongTensor,
    history_mask: torch.BoolTensor,
    earlier_keys: torch.LongTensor,
    cache: DynamicCache,
    long_history: LongHistory | None,
    query_time: torch.LongTensor | None = None,
) -> torch.FloatTensor:
    """
    Runs what the cache lacks of candidates: their last codes and, with `config.num_retrieved_items`, their blocks, whose
    keys and values are left on it. At the last state a candidate is ranked.

    Args:
        items (`torch.LongTensor` of shape `(batch_size, N)`): Item indices.
        history_mask (`torch.BoolTensor` of shape `(batch_size, T)`): What they see of the cache's first T tokens.
        earlier_keys (`torch.LongTensor` of shape `(batch_size, N, m)`): Where on the cache their first m codes are.
        query_time (`torch.LongTensor` of shape `(batch_size,)`, *optional*): When the next item is, and with it all
            of a candidate but the retrieved items, which have times of their own.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, N, L - m, hidden_size)`, or `(batch_size, N, L - m + k + 2, hidden_size)`.
    """
    codes = model.catalog.item_codes[items].long()
    tokens = model.layout.item_tokens(codes)[..., earlier_keys.shape[2] :]
    timestamps = None if query_time is None else query_time[:, None].expand(-1, 2)
    if long_history is None:
        return read_branches(model.model, tokens, history_mask, earlier_keys, cache, timestamps)[0]
    block, there, times = block_inputs(model, items, long_history)
    token_times = None
    if query_time is not None:
        own = query_time[:, None, None].expand(*items.shape, tokens.shape[2] + 2)
        token_times = torch.cat([own[..., :-1], times, own[..., -1:]], dim=2)
    inputs = torch.cat([model.get_input_embeddings()(tokens), block], dim=2)
    mask = nn.functional.pad(there, (tokens.shape[2], 0), value=True)
    return read_branches(model.model, None, history_mask, earlier_keys, cache, timestamps, inputs, mask, token_times)[
        0
    ]


def top_dense_items(
    model, history_states: torch.FloatTensor, count: int, trie: CatalogTrie, item_filter: ItemFilter | None
) -> torch.LongTensor:
    """
    The items of a catalog with the best item-level score (`ranking_head.dense_scores`), among those that the filter leaves:
    `[batch_size, count]` or as many as there are; -1: none.

    Args:
        history_states (`torch.FloatTensor` of shape `(batch_size, hidden_size)`): At the ends of the histories.
    """
    level, queries = len(trie.levels) - 1, model.ranking_head.history_query(history_states)
    best = queries.new_empty(len(queries), 0, dtype=torch.float32)
    best_items = best.long()
    for leaves in torch.arange(trie.num_items, device=queries.device).split(LEAVES_AT_ONCE):
        items = trie.leaf_items[leaves].long()
        scores = (queries @ model.item_representations(items).T).float()
        if item_filter is not None and item_filter.concerns(level):
            scores.masked_fill_(~item_filter.alive(level, leaves.expand(len(scores), -1)), -torch.inf)
        scores, items = torch.cat([best, scores], dim=1), torch.cat([best_items, items.expand_as(scores)], dim=1)
        best, order = scores.topk(min(count, scores.shape[1]), dim=1)
        best_items = items.gather(1, order)
    return best_items.masked_fill(best == -torch.inf, -1)


def detached(cache: DynamicCache) -> DynamicCache:
    """The same keys and values, into which no gradient flows."""
    copy = DynamicCache()
    for index, layer in enumerate(cache.layers):
        copy.update(layer.keys.detach(), layer.values.detach(), index)
    return copy


@torch.no_grad()
def beam_candidates(
    model,
    num_beams: int,
    history_states: torch.FloatTensor,
    history_mask: torch.BoolTensor,
    cache: DynamicCache,
    blocked_items: torch.LongTensor | None = None,
    query_time: torch.LongTensor | None = None,
) -> torch.LongTensor:
    """
    The items of the model's own beam search, `[batch_size, num_beams]` or as many as there are; -1: none.

    Args:
        history_states (`torch.FloatTensor` of shape `(batch_size, hidden_size)`): At the ends of the histories.
        history_mask (`torch.BoolTensor` of shape `(batch_size, T)`): The histories on the cache, which is left as it is.
        blocked_items (`torch.LongTensor` of shape `(batch_size, M)`, *optional*): Items that are not proposed; -1: none.
        query_time (`torch.LongTensor` of shape `(batch_size,)`, *optional*): When the next item is.
    """
    trie, item_filter = model.catalog.trie, None
    if blocked_items is not None:
        rows = check_items("blocked_items", blocked_items, len(history_mask), model.catalog.num_items)
        item_filter = ItemFilter(trie, model.catalog.item_codes, blocked=[row[row >= 0] for row in rows])
    # The search reads of the tokens only whether they end in an unfinished item: a bare <bos> says that they do not.
    ends = torch.full_like(history_mask[:, :1], model.config.bos_token_id, dtype=torch.long)
    beams = model._search_items(
        ends,
        history_mask,
        history_states,
        detached(cache),
        num_beams,
        trie,
        item_filter,
        query_time=query_time,
    )
    return trie.leaf_items[beams.nodes].long().masked_fill(beams.scores == -torch.inf, -1)


def with_targets(
    candidates: torch.LongTensor, targets: torch.LongTensor, generator: torch.Generator | None = None
) -> torch.LongTensor:
    """Candidates `[B, N]` in which a random one is replaced by the row's target `[B]`, where it is missed (-1: no target)."""
    place = torch.randint(candidates.shape[1], (len(targets), 1), device=targets.device, generator=generator)
    missed = (targets >= 0) & (candidates != targets[:, None]).all(dim=1)
    kept = candidates.gather(1, place)
    return candidates.scatter(1, place, torch.where(missed[:, None], targets[:, None], kept))


def second_stage_loss(model, supervision: Supervision, hidden_states: torch.FloatTensor) -> torch.Tensor:
    """
    RecoChain's stage II: the ranking loss over candidates for the last supervised item of each row, those given or the
    model's own beams, the true item among them (unless `config.inject_target` leaves it to the search). Each is asked for when
    the true item came. All their tokens are run here, the true item's as the others': nothing of them is left from the search.
    In training that search has the dropout of training, but for that of attention weights where beams share the history
    (`shared_prefix_attention`).

    Args:
        hidden_states (`torch.FloatTensor` of shape `(batch_size, T, hidden_size)`): The backbone's output.

    Raises:
        ValueError: if candidates or blocked items are outside the catalog, candidates do not fit into the backbone's positions,
            or nothing is on the cache.
    """
    config, layout, number, cache = model.config, model.layout, supervision.number, supervision.cache
    candidates, target_timestamps, batch_size = supervision.candidates, supervision.target_timestamps, len(number)
    if candidates is not None:
        candidates = check_items("candidates", candidates, batch_size, model.catalog.num_items)
    if cache.get_seq_length() < number.shape[1]:
        raise ValueError(
            f"Expected the cache of {number.shape[1]} tokens, on which candidates are ranked, found one of "
            f"{cache.get_seq_length()}. Train with candidates without activation checkpointing, which keeps no cache."
        )
    targets, ends, behaviors = last_items(supervision.items, batch_size)
    history_mask = layout.history_up_to(ends, number, supervision.seen)
    needed = int(history_mask.sum(dim=1).max()) + config.num_levels + config.num_block_tokens
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and needed > longest:
        raise ValueError(
            f"History and candidate take {needed} positions, the backbone has {longest}. Keep fewer items of the history: "
            f"config.max_history_items is {config.max_history_items}."
        )

    query_time = None if target_timestamps is None else target_timestamps.gather(1, ends[:, None])[:, 0]
    history_states = hidden_states[torch.arange(batch_size, device=number.device), ends]
    if candidates is None and not config.num_train_beams and NEXT_TARGET in config.ranking_targets:
        raise ValueError(
            f"Expected candidates beside the true items, to learn the ranking target {NEXT_TARGET!r} from, found neither "
            "`candidates` nor config.num_train_beams. Set num_train_beams, e.g. to 20, for the model's own beams."
        )
    if candidates is None and config.num_train_beams:
        candidates = beam_candidates(
            model, config.num_train_beams, history_states, history_mask, cache, supervision.blocked_items, query_time
        )
    if candidates is None or candidates.shape[1] == 0:
        candidates = targets[:, None]
    if config.inject_target:
        candidates = with_targets(candidates, targets, model._generator(number.device))
    if config.stop_gradient_history:
        cache, history_states = detached(cache), history_states.detach()
    items = candidates.clamp(min=0)
    states = []
    for pack in items.split(CANDIDATES_AT_ONCE, dim=1):
        with cache_rollback(cache):
            nothing = pack.new_empty(*pack.shape, 0)
            read = read_candidates(model, pack, history_mask, nothing, cache, supervision.long_history, query_time)
            states.append(read[:, :, -1])
    logits = model.ranking_head(torch.cat(states, dim=1), history_states[:, None], model.item_representations(items))
    is_target = candidates == targets[:, None]
    usable = (candidates >= 0) & (targets >= 0)[:, None]
    positive, negative = usable & is_target, usable & ~is_target
    behaviors = behaviors[:, None].expand_as(candidates)[positive]
    return ranking_loss(config, logits[positive], behaviors, logits[negative])
