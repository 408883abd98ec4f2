# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The supervised items of a batch with labels, and their negatives."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .configuration_unigrf import UniGRFConfig
from .inputs_unigrf import ItemSets, LongHistory
from .layout_unigrf import ItemLayout
from .trie_unigrf import CatalogTrie


@dataclass
class SupervisedItems:
    """
    The n items of a batch whose behavior is a label, row by row.

    Args:
        rows, positions (`torch.LongTensor` of shape `(n,)`): Row and position of each item's last code.
        items (`torch.LongTensor` of shape `(n,)`): Item indices.
        history_ends (`torch.LongTensor` of shape `(n,)`): Position of the bos or behavior before the item.
        behaviors (`torch.LongTensor` of shape `(n,)`): Token ids of the behaviors on the items.
    """

    rows: torch.LongTensor
    positions: torch.LongTensor
    items: torch.LongTensor
    history_ends: torch.LongTensor
    behaviors: torch.LongTensor

    def select(self, mask: torch.BoolTensor) -> "SupervisedItems":
        """Select the items where `mask [n]` is True."""
        return SupervisedItems(*(column[mask] for column in vars(self).values()))


@dataclass
class LastItems:
    """
    The last supervised item of each of B rows.

    Args:
        items (`torch.LongTensor` of shape `(batch_size,)`): Item indices; -1 in a row without a supervised item.
        history_ends (`torch.LongTensor` of shape `(batch_size,)`): Positions at which the histories before the items
            end; 0 in a row without an item.
        behaviors (`torch.LongTensor` of shape `(batch_size,)`): Token ids of the behaviors on the items; 0 in a row
            without an item.
    """

    items: torch.LongTensor
    history_ends: torch.LongTensor
    behaviors: torch.LongTensor


@dataclass
class PackedNegatives:
    """
    M items packed behind the histories of each row: random negatives, then hard negatives.

    Each negative continues the history up to some position. Hard negatives continue the history before the row's last
    supervised item.

    Args:
        tokens, position_ids (`torch.LongTensor` of shape `(batch_size, M * L)`): Token ids and positions of the
            negatives.
        attention_mask (`torch.BoolTensor` of shape `(batch_size, M * L, T + M * L)`): True at the tokens that each
            token of a negative sees.
        items (`torch.LongTensor` of shape `(batch_size, M)`): Item indices.
        history_ends (`torch.LongTensor` of shape `(batch_size, M)`): Position after which each negative stands.
        is_random (`torch.BoolTensor` of shape `(batch_size, M)`): True at the random negatives that count. Draws of
            the true next item or an excluded positive do not count. Excess draws in rows with fewer items than the
            fullest row do not count, either.
        is_hard (`torch.BoolTensor` of shape `(batch_size, M)`): True at the hard negatives that exist.
    """

    tokens: torch.LongTensor
    position_ids: torch.LongTensor
    attention_mask: torch.BoolTensor
    items: torch.LongTensor
    history_ends: torch.LongTensor
    is_random: torch.BoolTensor
    is_hard: torch.BoolTensor


@dataclass
class LossInputs:
    """
    The inputs of the losses beside the backbone's output.

    Args:
        targets (`torch.LongTensor` of shape `(batch_size, T)`): The next tokens; -100: not supervised.
        items (`SupervisedItems`): The supervised items.
        sequence_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, T)`, *optional*): The number of each
            token's history in its row, and 1 at tokens that exist. None with the caller's mask, positions or cache.
        item_sets (`ItemSets`, *optional*): Further items of the rows. None: the caller has none.
        negatives (`PackedNegatives`, *optional*): The packed negatives. None: no negatives are packed.
        cache (`DynamicCache`, *optional*): The histories' cache, for candidates of the last items. None: no
            candidates are ranked.
        long_history (`LongHistory`, *optional*): Source of the candidates' sub-histories. None: no sub-histories.
        target_timestamps (`torch.LongTensor` of shape `(batch_size, >= T)`, *optional*): The times of the events that
            the outputs predict, in seconds. None: no times.
        trie (`CatalogTrie`, *optional*): The items that exist.
        negatives_per_item (`float`, defaults to 0.0): Random negatives of each supervised item.
    """

    targets: torch.LongTensor
    items: SupervisedItems
    sequence_ids: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None
    item_sets: ItemSets | None = None
    negatives: PackedNegatives | None = None
    cache: DynamicCache | None = None
    long_history: LongHistory | None = None
    target_timestamps: torch.LongTensor | None = None
    trie: CatalogTrie | None = None
    negatives_per_item: float = 0.0


def supervised_items(
    layout: ItemLayout, trie: CatalogTrie, tokens: torch.LongTensor, targets: torch.LongTensor
) -> SupervisedItems:
    """
    Find the supervised items of `tokens [B, T]`: their last codes have a behavior as target.

    Args:
        layout (`ItemLayout`): The order of the tokens.
        trie (`CatalogTrie`): The items that exist.
        tokens (`torch.LongTensor` of shape `(batch_size, T)`): Token ids.
        targets (`torch.LongTensor` of shape `(batch_size, T)`): The next tokens; -100: not supervised.

    Raises:
        ValueError: if a supervised item is not in the catalog, or a row begins with it.
    """
    is_behavior = torch.isin(targets, targets.new_tensor(layout.behavior_token_ids))
    is_behavior &= layout.token_levels(tokens) == layout.num_levels - 1
    places = is_behavior.nonzero()
    rows, positions = places.unbind(dim=1)
    # A negative end: the row has no token before the item.
    ends = positions - layout.num_levels
    if (ends < 0).any():
        raise ValueError(
            "`labels` must supervise items that follow a <bos> or a behavior, got row "
            f"{int(rows[(ends < 0).nonzero()[0, 0]])}, which begins with an item. Keep the <bos> of a cut history, "
            "or leave its first item out of the labels."
        )
    items = trie.lookup(layout.codes_before(tokens, places))
    unknown = (items < 0).nonzero()
    if len(unknown):
        row, position = places[unknown[0, 0]].tolist()
        codes = tokens[row, max(0, position - layout.num_levels + 1) : position + 1].tolist()
        raise ValueError(
            f"`labels` must supervise items of the catalog, got {len(unknown)} others; the first ends at row {row}, "
            f"position {position}, tokens {codes}. Call `model.set_catalog(tokenizer.item_codes, ...)` with the "
            "tokenizer of the histories."
        )
    return SupervisedItems(rows, positions, items, ends, targets[is_behavior])


def retrieval_positives(
    config: UniGRFConfig, layout: ItemLayout, targets: torch.LongTensor, supervised: SupervisedItems
) -> tuple[torch.LongTensor, SupervisedItems, torch.Tensor | float]:
    """
    Select the next tokens `targets [B, T]` and the items that retrieval learns: those of `retrieval_behaviors`.

    Returns:
        The targets, -100 at the codes of other items; the selected items; the share of their codes among all. (The
        mean over the selected codes times the share is a mean over all codes: gradient accumulation does not change
        the loss.)
    """
    names = config.training_config.retrieval_behaviors
    ids = dict(zip(config.behaviors, layout.behavior_token_ids, strict=True))
    is_positive = torch.isin(supervised.behaviors, targets.new_tensor([ids[name] for name in names]))
    rows = supervised.rows[~is_positive]
    ends = supervised.history_ends[~is_positive]
    positives = targets.index_put((rows[:, None], layout.code_positions(ends)), targets.new_tensor(-100))
    num_positive, num_all = ((layout.token_levels(tokens) >= 0).sum() for tokens in (positives, targets))
    return positives, supervised.select(is_positive), num_positive / num_all.clamp(min=1)


def last_items(supervised: SupervisedItems, batch_size: int) -> LastItems:
    """Find the last supervised item of each row."""
    is_last = torch.ones_like(supervised.rows, dtype=torch.bool)
    is_last[:-1] = supervised.rows[1:] != supervised.rows[:-1]
    rows = supervised.rows[is_last]
    items = supervised.rows.new_full((batch_size,), -1)
    ends = torch.zeros_like(items)
    behaviors = torch.zeros_like(items)
    items[rows] = supervised.items[is_last]
    ends[rows] = supervised.history_ends[is_last]
    behaviors[rows] = supervised.behaviors[is_last]
    return LastItems(items, ends, behaviors)


def pack_negatives(
    layout: ItemLayout,
    item_codes: torch.Tensor,
    known_items: torch.LongTensor,
    supervised: SupervisedItems,
    position_ids: torch.LongTensor,
    visible: torch.BoolTensor,
    negatives_per_item: float,
    item_sets: ItemSets,
    generator: torch.Generator | None = None,
) -> PackedNegatives:
    """
    Draw random negatives and pack them, with the hard negatives, behind the histories.

    A row has `negatives_per_item` of the known items, drawn uniformly, for each of its supervised items. Hard
    negatives of semantic IDs are packed; those of atomic ids are in the generation loss.

    Args:
        layout (`ItemLayout`): The order of the tokens.
        item_codes (`torch.IntTensor` of shape `(num_items, L)`): Codes of all items.
        known_items (`torch.LongTensor` of shape `(k,)`): The items that training knows.
        supervised (`SupervisedItems`): The supervised items.
        position_ids (`torch.LongTensor` of shape `(batch_size, T)`): Positions of the histories' tokens.
        visible (`torch.BoolTensor` of shape `(batch_size, T, T)`): Mask of the histories, from `history_mask`.
        negatives_per_item (`float`): Random negatives of each supervised item. 0: none.
        item_sets (`ItemSets`): Hard negatives and excluded positives.
        generator (`torch.Generator`, *optional*): Draws the negatives. None: the global generator.
    """
    batch_size, length = position_ids.shape
    device = position_ids.device
    # Random negatives, each after a random supervised position.
    next_item = torch.full((batch_size, length), -1, device=device)
    next_item[supervised.rows, supervised.history_ends] = supervised.items
    has_next = next_item >= 0
    wanted = (has_next.sum(dim=1) * negatives_per_item).ceil().long()
    # A batch without a supervised item has a negative, too.
    count = max(1, int(wanted.max())) if negatives_per_item else 0
    # Rows without a supervised item draw, too: `is_random` leaves them out.
    weights = torch.where(has_next.any(dim=1, keepdim=True), has_next, True).float()
    ends = torch.multinomial(weights, max(1, count), replacement=True, generator=generator)[:, :count]
    items = known_items[torch.randint(len(known_items), (batch_size, count), device=device, generator=generator)]
    target = next_item.gather(1, ends)
    is_random = (target >= 0) & (target != items) & (torch.arange(count, device=device) < wanted[:, None])
    is_random &= ~(items[:, :, None] == item_sets.excluded_positives[:, None]).any(dim=2)
    is_hard = torch.zeros_like(is_random)
    # Hard negatives, before the last supervised item.
    hard = item_sets.hard_negatives if layout.num_levels > 1 else item_sets.hard_negatives[:, :0]
    if hard.shape[1]:
        last = last_items(supervised, batch_size)
        exists = (hard >= 0) & (hard != last.items[:, None]) & (last.items >= 0)[:, None]
        is_hard = torch.cat([is_hard, exists], dim=1)
        is_random = nn.functional.pad(is_random, (0, hard.shape[1]))
        items = torch.cat([items, hard.clamp(min=0)], dim=1)
        ends = torch.cat([ends, last.history_ends[:, None].expand(-1, hard.shape[1])], dim=1)
    visible_history = visible.gather(1, ends[:, :, None].expand(-1, -1, length))
    history_lengths = position_ids.gather(1, ends) + 1
    packed = layout.pack_candidates(item_codes[items].long(), history_lengths, visible_history)
    return PackedNegatives(*packed, items, ends, is_random, is_hard)


def inject_targets(
    candidates: torch.LongTensor, targets: torch.LongTensor, generator: torch.Generator | None = None
) -> torch.LongTensor:
    """Replace a random candidate `[B, N]` by the row's target `[B]` (-1: none), if it is not among them."""
    place = torch.randint(candidates.shape[1], (len(targets), 1), device=targets.device, generator=generator)
    is_missing = (targets >= 0) & (candidates != targets[:, None]).all(dim=1)
    current = candidates.gather(1, place)
    return candidates.scatter(1, place, torch.where(is_missing[:, None], targets[:, None], current))
