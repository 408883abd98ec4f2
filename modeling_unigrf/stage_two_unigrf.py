# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""RecoChain's stage II: the ranking loss of candidates of each row's last item, read on the cache of the histories."""

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .beam_search_unigrf import SearchSpace, beam_search
from .candidates_unigrf import CandidateContext, read_candidates
from .configuration_unigrf import NEXT_TARGET
from .inputs_unigrf import check_positions
from .loss_unigrf import ranking_loss
from .negatives_unigrf import LossInputs, inject_targets, last_items
from .scoring_unigrf import ItemScorer, UniGRFCandidateBlock
from .shared_prefix_unigrf import cache_rollback, without_gradient
from .trie_unigrf import CatalogTrie, ItemFilter

# In training, the attention of a pack grows with its square.
CANDIDATES_PER_PACK = 64


def last_item_ranking_loss(
    backbone: PreTrainedModel,
    scorer: ItemScorer,
    candidate_block: UniGRFCandidateBlock | None,
    loss_inputs: LossInputs,
    hidden_states: torch.FloatTensor,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """
    Compute the ranking loss of candidates of each row's last supervised item.

    The candidates are those of `item_sets`, or the model's beams. With `inject_target`, the true item is among them.
    All of their tokens run here. The search has the dropout of training, except for attention weights of shared
    prefixes.

    Args:
        backbone (`UniGRFModel`), scorer (`ItemScorer`): The model's backbone, heads and catalog.
        candidate_block (`UniGRFCandidateBlock`, *optional*): Makes candidate blocks. None: no sub-histories.
        loss_inputs (`LossInputs`): The inputs of the losses, with the histories' cache.
        hidden_states (`torch.FloatTensor` of shape `(batch_size, T, hidden_size)`): Output at the histories.
        generator (`torch.Generator`, *optional*): Draws positions of true items. None: the global generator.

    Raises:
        ValueError: for too few positions, an empty cache, and a target `"next"` without negatives.
    """
    config = scorer.config
    training = scorer.config.training_config
    sequence_ids = loss_inputs.sequence_ids
    cache = loss_inputs.cache
    if cache.get_seq_length() < sequence_ids.shape[1]:
        raise ValueError(
            f"The cache must hold the {sequence_ids.shape[1]} tokens of the histories, got {cache.get_seq_length()}. "
            "Train candidates without activation checkpointing, which keeps no cache."
        )
    # The histories before the last items.
    last = last_items(loss_inputs.items, len(sequence_ids))
    history_mask = scorer.layout.history_up_to(last.history_ends, sequence_ids, loss_inputs.attention_mask)
    longest = int(history_mask.sum(dim=1).max())
    check_positions(config, longest + scorer.layout.num_levels + config.num_block_tokens)
    query_time = None
    if loss_inputs.target_timestamps is not None:
        query_time = loss_inputs.target_timestamps.gather(1, last.history_ends[:, None])[:, 0]
    context = CandidateContext(history_mask, cache, loss_inputs.long_history, query_time)
    rows = torch.arange(len(sequence_ids), device=sequence_ids.device)
    history_states = hidden_states[rows, last.history_ends]

    # Candidates, the true item among them.
    candidates = find_candidates(backbone, scorer, loss_inputs, history_states, context)
    if candidates is None or candidates.shape[1] == 0:
        candidates = last.items[:, None]
    if training.inject_target:
        candidates = inject_targets(candidates, last.items, generator)

    # Their states, pack by pack.
    if training.stop_gradient_history:
        context.cache = without_gradient(cache)
        history_states = history_states.detach()
    items = candidates.clamp(min=0)
    states = []
    for pack in items.split(CANDIDATES_PER_PACK, dim=1):
        with cache_rollback(context.cache):
            states.append(read_candidates(backbone, scorer, candidate_block, context, pack)[:, :, -1])
    logits = scorer.ranking_head(torch.cat(states, dim=1), history_states[:, None], scorer.representations(items))

    is_target = candidates == last.items[:, None]
    exists = (candidates >= 0) & (last.items >= 0)[:, None]
    behaviors = last.behaviors[:, None].expand_as(candidates)[exists & is_target]
    return ranking_loss(
        scorer.layout.ranking_targets, logits[exists & is_target], behaviors, logits[exists & ~is_target]
    )


@torch.no_grad()
def find_candidates(
    backbone: PreTrainedModel,
    scorer: ItemScorer,
    loss_inputs: LossInputs,
    history_states: torch.FloatTensor,
    context: CandidateContext,
) -> torch.LongTensor | None:
    """
    Find candidates of the last items: the caller's, or the model's beams.

    Returns:
        `torch.LongTensor` of shape `(batch_size, N)`: item indices, -1 for none. None: the true items alone.

    Raises:
        ValueError: if the target `"next"` would see no item that did not come next.
    """
    item_sets = loss_inputs.item_sets
    trie = loss_inputs.trie
    if item_sets is not None and item_sets.candidates is not None:
        return item_sets.candidates
    num_beams = scorer.config.training_config.num_train_beams
    if not num_beams:
        if NEXT_TARGET in scorer.config.ranking_targets:
            raise ValueError(
                f"The ranking target {NEXT_TARGET!r} must have candidates beside the true items, got none. Set "
                "num_train_beams, e.g. to 20, for the model's own beams, or pass item_sets={'candidates': ...}."
            )
        return None
    blocked_items = None if item_sets is None else item_sets.blocked_items
    cache = without_gradient(context.cache)
    return propose_items(
        backbone,
        scorer,
        trie,
        blocked_items,
        history_states,
        context.history_mask,
        cache,
        num_beams,
        context.query_time,
    )


def propose_items(
    backbone: PreTrainedModel,
    scorer: ItemScorer,
    trie: CatalogTrie,
    blocked_items: torch.LongTensor | None,
    history_states: torch.FloatTensor,
    history_mask: torch.BoolTensor,
    cache: DynamicCache,
    num_beams: int,
    query_time: torch.LongTensor | None = None,
) -> torch.LongTensor:
    """
    Search for candidates of RecoChain's stage II.

    Arguments without an entry here are those of `beam_search`.

    Args:
        trie (`CatalogTrie`): The items that exist.
        blocked_items (`torch.LongTensor` of shape `(batch_size, M)`, *optional*): Items that the search must skip; -1
            stands for no item. None: skip no item.

    Returns:
        `torch.LongTensor` of shape `(batch_size, num_beams)`: item indices, -1 for none. There are fewer columns if
        no request has as many items.
    """
    item_filter = None
    if blocked_items is not None:
        blocked = [row[row >= 0] for row in blocked_items]
        item_filter = ItemFilter(trie, scorer.catalog.item_codes, blocked=blocked)
    space = SearchSpace(trie, item_filter)
    beams = beam_search(backbone, scorer, space, history_states, history_mask, cache, num_beams, query_time)
    return trie.leaf_items[beams.nodes].long().masked_fill(beams.scores == -torch.inf, -1)
