# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""What is learned from a batch of histories: which items are supervised, candidates beside them, and the losses."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache

from .configuration_unigrf import NEXT_TARGET
from .layout_unigrf import ItemLayout
from .subhistory_unigrf import LongHistory
from .trie_unigrf import CatalogTrie, check_items


@dataclass
class SupervisedItems:
    """
    The n items of a batch whose behavior is a label.

    Args:
        rows, positions (`torch.LongTensor` of shape `(n,)`): Row, and position of the item's last code.
        items (`torch.LongTensor` of shape `(n,)`): Item indices.
        history_ends (`torch.LongTensor` of shape `(n,)`): Position of the bos or behavior before the item.
        behaviors (`torch.LongTensor` of shape `(n,)`): Token ids of the behaviors that follow.
    """

    rows: torch.LongTensor
    positions: torch.LongTensor
    items: torch.LongTensor
    history_ends: torch.LongTensor
    behaviors: torch.LongTensor


def supervised_items(
    layout: ItemLayout, trie: CatalogTrie, tokens: torch.LongTensor, targets: torch.LongTensor
) -> SupervisedItems:
    """
    Finds the supervised items of `tokens [B, T]`, whose next tokens are `targets [B, T]` (-100: not supervised): the last
    codes whose target is a behavior.

    Raises:
        ValueError: if one of them is not in the catalog.
    """
    is_behavior = torch.isin(targets, targets.new_tensor(layout.behavior_token_ids))
    is_behavior &= layout.token_levels(tokens) == layout.num_levels - 1
    where = is_behavior.nonzero()
    rows, positions = where.unbind(dim=1)
    ends = layout.history_ends(positions)
    if (ends < 0).any():
        raise ValueError(
            f"Row {int(rows[(ends < 0).nonzero()[0, 0]])} begins with an item: expected a <bos> or behavior before every "
            "supervised item. Keep the <bos> of a cut history, or leave its first item out of the labels."
        )
    items = trie.lookup(layout.codes_before(tokens, where))
    if (items < 0).any():
        row, position = where[(items < 0).nonzero()[0, 0]].tolist()
        raise ValueError(
            f"{int((items < 0).sum())} supervised items are not in the model's catalog; the first ends at row {row}, "
            f"position {position}: {tokens[row, max(0, position - layout.num_levels + 1) : position + 1].tolist()}. Call "
            "`model.set_catalog(tokenizer.item_codes, ...)` with the tokenizer that spelt the histories."
        )
    return SupervisedItems(rows, positions, items, ends, targets[is_behavior])


def retrieval_positives(
    layout: ItemLayout, config, targets: torch.LongTensor, supervised: SupervisedItems
) -> tuple[torch.LongTensor, SupervisedItems, torch.Tensor | float]:
    """
    What retrieval learns of the next tokens `targets [B, T]` and the items among them: all, or those on which the user did one of
    `config.retrieval_behaviors`; the codes of the others are -100. Also the share of the codes that are kept: a mean over these times
    the share is a mean over all, so that accumulation does not change the loss.
    """
    if config.retrieval_behaviors is None:
        return targets, supervised, 1.0
    ids = dict(zip(config.behaviors, config.behavior_token_ids, strict=True))
    positive = torch.isin(supervised.behaviors, targets.new_tensor([ids[name] for name in config.retrieval_behaviors]))
    rows, ends = supervised.rows[~positive], supervised.history_ends[~positive]
    codes = targets.index_put((rows[:, None], layout.code_positions(ends)), targets.new_tensor(-100))
    kept, count = ((layout.token_levels(one) >= 0).sum() for one in (codes, targets))
    return codes, SupervisedItems(*(one[positive] for one in vars(supervised).values())), kept / count.clamp(min=1)


@dataclass
class GivenItems:
    """
    What the caller knows of each row's items beyond its history (UniGRF's enhancer): a row is one history.

    Args:
        negatives (`torch.LongTensor` of shape `(batch_size, m)`): Items to learn to tell from the next one; -1: none.
        favorites (`torch.LongTensor` of shape `(batch_size, f)`): Items that are no negatives, neither random candidates nor among
            atomic ids (in the item-level softmax they are as all others); -1: none.
        last_ends (`torch.LongTensor` of shape `(batch_size,)`): Where the history before the last supervised item ends; -1
            in a row without one.
        targets (`torch.LongTensor` of shape `(batch_size,)`): That item; -1 in a row without one.
    """

    negatives: torch.LongTensor
    favorites: torch.LongTensor
    last_ends: torch.LongTensor
    targets: torch.LongTensor


def last_items(
    supervised: SupervisedItems, batch_size: int
) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
    """
    The last supervised item of each row, -1 in a row without one, the end of the history before it, and the behavior that
    follows, each `[batch_size]`.
    """
    is_last = torch.ones_like(supervised.rows, dtype=torch.bool)
    is_last[:-1] = supervised.rows[1:] != supervised.rows[:-1]
    rows = supervised.rows[is_last]
    items = supervised.rows.new_full((batch_size,), -1)
    ends, behaviors = torch.zeros_like(items), torch.zeros_like(items)
    items[rows], ends[rows] = supervised.items[is_last], supervised.history_ends[is_last]
    behaviors[rows] = supervised.behaviors[is_last]
    return items, ends, behaviors


def given_items(
    hard_negatives: torch.LongTensor | None,
    excluded_positives: torch.LongTensor | None,
    number: torch.LongTensor,
    supervised: SupervisedItems,
    num_items: int,
) -> GivenItems | None:
    """
    Checks what the caller gave, `[B, m]` and `[B, f]` item indices or None; `number [B, T]` counts the histories of a row.

    Raises:
        ValueError: on other shapes, items outside the catalog, or rows of several histories.
    """
    if hard_negatives is None and excluded_positives is None:
        return None
    none = number.new_empty(len(number), 0)
    hard_negatives, excluded_positives = (
        none if items is None else check_items(name, items, len(number), num_items)
        for name, items in (("hard_negatives", hard_negatives), ("excluded_positives", excluded_positives))
    )
    if number.max() > 1:
        raise ValueError(
            f"hard_negatives and excluded_positives belong to one user, but a row holds {int(number.max())} histories. Put "
            "each history into a row of its own."
        )
    targets, ends, _ = last_items(supervised, len(number))
    return GivenItems(hard_negatives, excluded_positives, ends.masked_fill(targets < 0, -1), targets)


@dataclass
class Negatives:
    """
    Items packed behind the histories of each row, each placed after some supervised position: first random ones, then those
    that the caller gave, which stand before the row's last supervised item.

    Args:
        tokens (`torch.LongTensor` of shape `(batch_size, M * L)`)
        items (`torch.LongTensor` of shape `(batch_size, M)`): Item indices.
        history_ends (`torch.LongTensor` of shape `(batch_size, M)`): Position after which each is placed.
        usable (`torch.BoolTensor` of shape `(batch_size, M)`): Of the random ones: False where the draw hit the true next
            item or a favorite, and in rows with fewer items than the fullest one. False for all others.
        given (`torch.BoolTensor` of shape `(batch_size, M)`): Of those that the caller gave: False where there is none.
        position_ids (`torch.LongTensor` of shape `(batch_size, M * L)`)
        attention_mask (`torch.BoolTensor` of shape `(batch_size, M * L, T + M * L)`)
    """

    tokens: torch.LongTensor
    items: torch.LongTensor
    history_ends: torch.LongTensor
    usable: torch.BoolTensor
    given: torch.BoolTensor
    position_ids: torch.LongTensor
    attention_mask: torch.BoolTensor


def draw_negatives(
    layout: ItemLayout,
    item_codes: torch.Tensor,
    supervised: SupervisedItems,
    position_ids: torch.LongTensor,
    visible: torch.BoolTensor,
    negatives_per_item: float,
    favorites: torch.LongTensor | None = None,
    given: GivenItems | None = None,
    generator: torch.Generator | None = None,
) -> Negatives:
    """
    Draws uniform items for the `"next"` target, as many as the row has supervised items times `negatives_per_item`, and
    places them together with those that are given.

    Args:
        item_codes (`torch.IntTensor` of shape `(num_items, L)`)
        position_ids (`torch.LongTensor` of shape `(batch_size, T)`), visible (`torch.BoolTensor` of shape
            `(batch_size, T, T)`): Of the histories, from the layout.
        favorites (`torch.LongTensor` of shape `(batch_size, f)`, *optional*): Items that are no negatives of a row; -1: none.
    """
    batch_size, length = position_ids.shape
    device = position_ids.device
    next_item = torch.full((batch_size, length), -1, device=device)
    next_item[supervised.rows, supervised.history_ends] = supervised.items
    has_next = next_item >= 0
    wanted = (has_next.sum(dim=1) * negatives_per_item).ceil().long()
    count = max(1, int(wanted.max())) if negatives_per_item else 0  # also of a batch without a supervised item
    # A row without a supervised item draws anything; `usable` drops it.
    weights = torch.where(has_next.any(dim=1, keepdim=True), has_next, True).float()
    after = torch.multinomial(weights, max(1, count), replacement=True, generator=generator)[:, :count]
    items = torch.randint(len(item_codes), (batch_size, count), device=device, generator=generator)
    target = next_item.gather(1, after)
    usable = (target >= 0) & (target != items) & (torch.arange(count, device=device) < wanted[:, None])
    if favorites is not None:
        usable &= ~(items[:, :, None] == favorites[:, None]).any(dim=2)
    is_given = torch.zeros_like(usable)
    if given is not None:
        wanted = given.negatives
        is_given = (wanted >= 0) & (wanted != given.targets[:, None]) & (given.last_ends >= 0)[:, None]
        is_given = torch.cat([torch.zeros_like(usable), is_given], dim=1)
        usable = nn.functional.pad(usable, (0, wanted.shape[1]))
        items = torch.cat([items, wanted.clamp(min=0)], dim=1)
        after = torch.cat([after, given.last_ends.clamp(min=0)[:, None].expand(-1, wanted.shape[1])], dim=1)
    seen = visible.gather(1, after[:, :, None].expand(-1, -1, length))
    return Negatives(
        tokens=layout.item_tokens(item_codes[items].long()).flatten(1),
        items=items,
        history_ends=after,
        usable=usable,
        given=is_given,
        position_ids=layout.candidate_positions(position_ids.gather(1, after) + 1),
        attention_mask=layout.candidate_mask(seen),
    )


@dataclass
class Supervision:
    """
    What the losses need beside the backbone's output.

    Args:
        targets (`torch.LongTensor` of shape `(batch_size, T)`): The next tokens; -100: not supervised.
        items (`SupervisedItems`)
        number, seen (`torch.LongTensor` of shape `(batch_size, T)`, *optional*): Which history of its row a token belongs to, and
            the attention mask; None with a mask, positions or cache of the caller's own.
        given, negatives (*optional*): What the caller knows of the users, and what is packed behind the histories.
        cache (`Cache`, *optional*): Of the histories, for a second stage.
        candidates (`torch.LongTensor` of shape `(batch_size, N)`, *optional*), long_history (*optional*), blocked_items
            (`torch.LongTensor` of shape `(batch_size, M)`, *optional*): Of a second stage.
        target_timestamps (`torch.LongTensor` of shape `(batch_size, >= T)`, *optional*)
    """

    targets: torch.LongTensor
    items: SupervisedItems
    number: torch.LongTensor | None = None
    seen: torch.LongTensor | None = None
    given: GivenItems | None = None
    negatives: Negatives | None = None
    cache: Cache | None = None
    candidates: torch.LongTensor | None = None
    long_history: LongHistory | None = None
    blocked_items: torch.LongTensor | None = None
    target_timestamps: torch.LongTensor | None = None


def generation_loss(
    model, states: torch.Tensor, targets: torch.LongTensor, given: GivenItems | None = None
) -> torch.Tensor:
    """
    Mean cross-entropy of the codes, each among the codes of its own level (level-wise softmax). (RecoChain sums over an item's
    levels: its loss is `num_levels` times this one, so that its ranking of weight 1 has one of `1 / num_levels` here.) In training with
    `config.code_negatives`, among itself and so many uniform codes of its level, without correction (as the public code of
    HSTU samples items); draws that hit the code itself do not count, and levels with no more codes are taken whole.

    Args:
        states (`torch.FloatTensor` of shape `(batch_size, T, hidden_size)`): Output of the backbone.
        targets (`torch.LongTensor` of shape `(batch_size, T)`): The next token; all but codes are left out.
        given (`GivenItems`, *optional*): Of atomic ids in training: the row's negatives take the places of as many random
            ones, or count `config.given_negative_weight` times among all; its favorites are no negatives.
    """
    layout = model.layout
    count = model.config.code_negatives if model.training else 0
    levels = layout.token_levels(targets)
    total = states.new_zeros((), dtype=torch.float32)
    for level in range(layout.num_levels):
        codes, here = layout.level_slice(level), levels == level
        of_given = None
        if given is not None and model.training and layout.num_levels == 1:
            of_given = [
                model.catalog.item_codes[items.clamp(min=0), 0].long().masked_fill(items < 0, -1)
                for items in (given.negatives, given.favorites)
            ]
        is_whole = count == 0 or codes.stop - codes.start <= count
        loss = _whole_softmax if is_whole else _sampled_softmax
        total = total + loss(model, states, here, targets[here] - codes.start, codes, of_given)
    return total / (levels >= 0).sum().clamp(min=1)


def _similarity(model, states: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """`code_similarity` in float32, as `softmax_over_items` has its logits, also where a training runs in bfloat16."""
    with torch.autocast(states.device.type, enabled=False):
        return model.code_similarity(states.float(), vectors.float())


def _given_logits(
    model, states: torch.Tensor, here: torch.BoolTensor, true: torch.LongTensor, codes: slice, given: torch.LongTensor
) -> torch.Tensor:
    """Codes `[batch_size, m]` that are given for the rows, -1 for none -> their logits `[n, m]` at the n positions `here`."""
    vectors = model.code_vectors[codes][given.clamp(min=0)]
    logits = _similarity(model, states, vectors.transpose(1, 2))[here]
    of_rows = given[here.nonzero()[:, 0]]
    return logits.masked_fill((of_rows < 0) | (of_rows == true[:, None]), -torch.inf)


def _whole_softmax(
    model,
    states: torch.Tensor,
    here: torch.BoolTensor,
    true: torch.LongTensor,
    codes: slice,
    of_given: list[torch.LongTensor] | None,
) -> torch.Tensor:
    """Summed cross-entropy of `true [n]` at the positions `here` among all codes of a level."""
    queries = states[here]
    if of_given is None:
        return model.code_cross_entropy(queries, true, codes, reduction="sum")
    losses = model.code_cross_entropy(queries, true, codes, reduction="none")
    # The softmax's denominator with the given negatives counted `weight` times and without the favorites.
    own = _similarity(model, queries[:, None], model.code_vectors[codes][true][:, :, None])[:, 0, 0]
    changes = 0.0
    for given, weight in zip(of_given, (model.config.given_negative_weight, 0.0), strict=True):
        logits = _given_logits(model, states, here, true, codes, given)
        changes = changes + (weight - 1) * (logits - (losses + own)[:, None]).exp().sum(dim=1)
    # Never -1, since the true code stays; rounding may say so where favorites have all but the whole probability.
    return (losses + torch.log1p(changes.clamp(min=-1 + 1e-6))).sum()


def _sampled_softmax(
    model,
    states: torch.Tensor,
    here: torch.BoolTensor,
    true: torch.LongTensor,
    codes: slice,
    of_given: list[torch.LongTensor] | None,
) -> torch.Tensor:
    """Summed cross-entropy of `true [n]` at the positions `here`, each among itself and random codes of a level."""
    count, shared = model.config.code_negatives, model.config.share_code_negatives
    queries, vectors = states[here], model.code_vectors[codes]
    logits = [_similarity(model, queries[:, None], vectors[true][:, :, None])[:, 0]]
    drawn = torch.randint(len(vectors), (count,) if shared else (len(true), count), device=states.device)
    if shared:
        random = _similarity(model, queries, vectors[drawn].T)
    else:
        random = _similarity(model, queries[:, None], vectors[drawn].transpose(1, 2))[:, 0]
    no_negative = (drawn == true[:, None]).expand(len(true), -1)
    if of_given is not None:
        hard, favorites = of_given
        logits.append(_given_logits(model, states, here, true, codes, hard))
        row = here.nonzero()[:, 0]
        # As many random ones fewer as the row has given ones: the first of them.
        replaced = torch.arange(count, device=states.device) < (hard >= 0).sum(dim=1)[row][:, None]
        favorite = (drawn.expand(len(true), -1)[:, :, None] == favorites[row][:, None]).any(dim=2)
        no_negative = no_negative | replaced | favorite
    logits.append(random.masked_fill(no_negative, -torch.inf))
    return -torch.cat(logits, dim=1).log_softmax(dim=1)[:, 0].sum()


def item_log_probs(
    model, items: torch.LongTensor, history_states: torch.FloatTensor, states: torch.FloatTensor
) -> torch.FloatTensor:
    """
    `log P(item | history)` `[B, N]`, from states at the ends of the histories `[B, hidden_size]` and at the items' codes
    `[B, N, >= L - 1, hidden_size]`.
    """
    codes = model.catalog.item_codes[items].long()
    total = history_states.new_zeros(items.shape, dtype=torch.float32)
    for level in range(model.layout.num_levels):
        before = history_states[:, None] if level == 0 else states[:, :, level - 1]
        log_probs = model.code_logits(before, model.layout.level_slice(level)).float().log_softmax(dim=-1)
        total += log_probs.expand(-1, items.shape[1], -1).gather(2, codes[..., level : level + 1])[..., 0]
    return total


def contrastive_loss(
    model, hidden_states: torch.Tensor, targets: torch.LongTensor, given: GivenItems, negatives: Negatives
) -> torch.Tensor:
    """
    Cross-entropy of the last supervised item of each row among itself and the row's given negatives, by their log-probabilities
    as sequences: a sampled softmax over items for codes, whose own cross-entropy sees no other item whole. Summed over the rows
    and divided, as the cross-entropy of the codes, by their number: with a weight of 1 it counts as one more code. (As a mean over
    rows it would outweigh all codes of the one item that it is about a hundred times, and undo what they learn.)

    Args:
        hidden_states (`torch.FloatTensor` of shape `(batch_size, T + M * L, hidden_size)`): Of histories and packed items.
        targets (`torch.LongTensor` of shape `(batch_size, T)`): The next tokens of the histories.
    """
    layout = model.layout
    count, ends = given.negatives.shape[1], given.last_ends.clamp(min=0)
    has_last = (given.last_ends >= 0) & (targets.gather(1, ends[:, None])[:, 0] != -100)
    rows = torch.arange(len(ends), device=ends.device)
    of_target = hidden_states[rows[:, None], layout.code_positions(ends)]
    packed = hidden_states[:, -negatives.tokens.shape[1] :].unflatten(1, (-1, layout.num_levels))[:, -count:]
    states = torch.cat([of_target[:, None, 1:], packed[:, :, :-1]], dim=1)
    items = torch.cat([given.targets.clamp(min=0)[:, None], negatives.items[:, -count:]], dim=1)
    is_none = nn.functional.pad(~negatives.given[:, -count:], (1, 0))
    scores = item_log_probs(model, items, of_target[:, 0], states).masked_fill(is_none, -torch.inf)
    losses = -scores.log_softmax(dim=1)[:, 0]
    return losses.masked_fill(~has_last, 0.0).sum() / (layout.token_levels(targets) >= 0).sum().clamp(min=1)


def softmax_over_items(
    states: torch.Tensor,
    vectors: torch.Tensor,
    items: torch.LongTensor,
    reduction: str = "sum",
    retain_graph: bool = False,
) -> torch.Tensor:
    """
    Cross-entropy of `items [n]` by the dot products of `states [n, d]` and all `vectors [num_items, d]`, in float32
    and in chunks of positions, whose logits are never all there at once: a third of the time of doing it at once, too.

    Args:
        reduction (`str`): `"sum"`, or `"none"` for `[n]`, which takes a third longer.
        retain_graph (`bool`): Whether more than one backward goes through it.
    """
    options = nn.LinearCrossEntropyOptions(allow_retain_graph=retain_graph)
    return nn.functional.linear_cross_entropy(
        states.float(), vectors.float(), items, reduction=reduction, options=options
    )


MAX_SOFTMAX_ITEMS = 8192  # a larger catalog is sampled: the softmax costs time in proportion


def sampled_softmax_loss(
    states: torch.Tensor,
    items: torch.LongTensor,
    item_representations: Callable,
    num_items: int,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Mean cross-entropy of the true items by dot product, among all items or a uniform sample shared by all positions, whose
    logits are raised by the log of how many items each stands for (Jean et al. 2015, section 3) and which leaves out the
    position's own item.

    Args:
        states (`torch.FloatTensor` of shape `(n, d)`), items (`torch.LongTensor` of shape `(n,)`)
        item_representations: item indices `[m]` -> vectors `[m, d]`.
    """
    if num_items <= MAX_SOFTMAX_ITEMS:
        vectors = item_representations(torch.arange(num_items, device=states.device))
        total = softmax_over_items(states, vectors, items)
    else:
        sample = torch.randint(num_items, (MAX_SOFTMAX_ITEMS,), device=states.device, generator=generator)
        logits = (states @ item_representations(sample).T).float() + math.log(num_items / MAX_SOFTMAX_ITEMS)
        logits = logits.masked_fill(sample == items[:, None], -torch.inf)
        own = (states * item_representations(items)).sum(dim=1, keepdim=True).float()
        total = -torch.cat([own, logits], dim=1).log_softmax(dim=1)[:, 0].sum()
    return total / max(1, len(items))


def ranking_loss(
    config,
    logits: torch.Tensor,
    behaviors: torch.LongTensor,
    negative_logits: torch.Tensor | None,
) -> torch.Tensor:
    """
    Mean over the ranking targets of the binary cross-entropy (UniGRF section 3; RecoChain stage II for `"next"`, which is its
    only target: beside others it counts as one of them).

    Args:
        config (`UniGRFConfig`): Its ranking targets and behaviors.
        logits (`torch.FloatTensor` of shape `(n, num_targets)`): Of the items that did come next.
        behaviors (`torch.LongTensor` of shape `(n,)`): Token ids of the behaviors on them.
        negative_logits (`torch.FloatTensor` of shape `(m, num_targets)`, *optional*): Of items that did not; they count
            for `"next"` only, since nobody knows how the user would have behaved.
    """
    behavior_ids = dict(zip(config.behaviors, config.behavior_token_ids, strict=True))
    total = logits.new_zeros((), dtype=torch.float32)
    for index, target in enumerate(config.ranking_targets):
        scores = logits[:, index].float()
        if target == NEXT_TARGET:
            labels = torch.ones_like(scores)
            if negative_logits is not None:
                scores = torch.cat([scores, negative_logits[:, index].float()])
                labels = nn.functional.pad(labels, (0, len(negative_logits)))
        else:
            labels = (behaviors == behavior_ids[target]).float()
        loss = nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
        total = total + loss / max(1, len(scores))
    return total / len(config.ranking_targets)
