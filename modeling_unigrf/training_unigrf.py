# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""What is learnt from a batch of histories: which items are supervised, random candidates, and the losses."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .configuration_unigrf import NEXT_TARGET
from .layout_unigrf import ItemLayout
from .trie_unigrf import CatalogueTrie


@dataclass
class SupervisedItems:
    """
    The n items of a batch whose behaviour is a label.

    Args:
        rows, positions (`torch.LongTensor` of shape `(n,)`): Row, and position of the item's last code.
        items (`torch.LongTensor` of shape `(n,)`): Item indices.
        history_ends (`torch.LongTensor` of shape `(n,)`): Position of the bos or behaviour before the item.
        behaviors (`torch.LongTensor` of shape `(n,)`): Token ids of the behaviours that follow.
    """

    rows: torch.LongTensor
    positions: torch.LongTensor
    items: torch.LongTensor
    history_ends: torch.LongTensor
    behaviors: torch.LongTensor


def supervised_items(
    layout: ItemLayout, trie: CatalogueTrie, tokens: torch.LongTensor, targets: torch.LongTensor
) -> SupervisedItems:
    """
    Finds the supervised items of `tokens [B, T]`, whose next tokens are `targets [B, T]` (-100: not supervised): the last
    codes whose target is a behaviour.

    Raises:
        ValueError: if one of them is not in the catalogue.
    """
    is_behavior = torch.isin(targets, targets.new_tensor(layout.behavior_token_ids))
    is_behavior &= layout.token_levels(tokens) == layout.num_levels - 1
    where = is_behavior.nonzero()
    items = trie.lookup(layout.codes_before(tokens, where))
    if (items < 0).any():
        row, position = where[(items < 0).nonzero()[0, 0]].tolist()
        raise ValueError(
            f"{int((items < 0).sum())} supervised items are not in the model's catalogue; the first ends at row {row}, "
            f"position {position}: {tokens[row, max(0, position - layout.num_levels + 1) : position + 1].tolist()}. Call "
            "`model.set_catalogue(tokenizer.item_codes, ...)` with the tokenizer that spelt the histories."
        )
    rows, positions = where.unbind(dim=1)
    ends = layout.history_ends(positions)
    if (ends < 0).any():
        raise ValueError(
            f"Row {int(rows[(ends < 0).nonzero()[0, 0]])} begins with an item: expected a <bos> or behaviour before every "
            "supervised item. Keep the <bos> of a cut history, or leave its first item out of the labels."
        )
    return SupervisedItems(rows, positions, items, ends, targets[is_behavior])


@dataclass
class Negatives:
    """
    Random items packed behind the histories of each row, each placed after some supervised position.

    Args:
        tokens (`torch.LongTensor` of shape `(batch_size, M * L)`)
        items (`torch.LongTensor` of shape `(batch_size, M)`): Item indices.
        history_ends (`torch.LongTensor` of shape `(batch_size, M)`): Position after which each is placed.
        usable (`torch.BoolTensor` of shape `(batch_size, M)`): False where the draw hit the true next item, and in
            rows with fewer items than the fullest one.
        position_ids (`torch.LongTensor` of shape `(batch_size, M * L)`)
        attention_mask (`torch.BoolTensor` of shape `(batch_size, M * L, T + M * L)`)
    """

    tokens: torch.LongTensor
    items: torch.LongTensor
    history_ends: torch.LongTensor
    usable: torch.BoolTensor
    position_ids: torch.LongTensor
    attention_mask: torch.BoolTensor


def draw_negatives(
    layout: ItemLayout,
    item_codes: torch.Tensor,
    supervised: SupervisedItems,
    position_ids: torch.LongTensor,
    visible: torch.BoolTensor,
    negatives_per_item: float,
    generator: torch.Generator | None = None,
) -> Negatives:
    """
    Draws uniform items for the `"next"` target, as many as the row has supervised items times `negatives_per_item`.

    Args:
        item_codes (`torch.IntTensor` of shape `(num_items, L)`)
        position_ids (`torch.LongTensor` of shape `(batch_size, T)`), visible (`torch.BoolTensor` of shape
            `(batch_size, T, T)`): Of the histories, from the layout.
    """
    batch_size, length = position_ids.shape
    device = position_ids.device
    next_item = torch.full((batch_size, length), -1, device=device)
    next_item[supervised.rows, supervised.history_ends] = supervised.items
    has_next = next_item >= 0
    wanted = (has_next.sum(dim=1) * negatives_per_item).ceil().long()
    count = max(1, int(wanted.max()))
    # A row without a supervised item draws anything; `usable` drops it.
    weights = torch.where(has_next.any(dim=1, keepdim=True), has_next, True).float()
    after = torch.multinomial(weights, count, replacement=True, generator=generator)
    items = torch.randint(len(item_codes), (batch_size, count), device=device, generator=generator)
    target = next_item.gather(1, after)
    seen = visible.gather(1, after[:, :, None].expand(-1, -1, length))
    return Negatives(
        tokens=layout.item_tokens(item_codes[items].long()).flatten(1),
        items=items,
        history_ends=after,
        usable=(target >= 0) & (target != items) & (torch.arange(count, device=device) < wanted[:, None]),
        position_ids=layout.candidate_positions(position_ids.gather(1, after) + 1, count),
        attention_mask=layout.candidate_mask(seen, count),
    )


def generation_loss(layout: ItemLayout, logits: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
    """
    Mean cross-entropy of the codes, each among the codes of its own level (level-wise softmax).

    Args:
        logits (`torch.FloatTensor` of shape `(batch_size, T, vocab_size)`)
        targets (`torch.LongTensor` of shape `(batch_size, T)`): The next token; all but codes are left out.
    """
    levels = layout.token_levels(targets)
    total = logits.new_zeros((), dtype=torch.float32)
    for level in range(layout.num_levels):
        codes = layout.level_slice(level)
        here = levels == level
        level_logits = logits[..., codes][here].float()
        total = total + nn.functional.cross_entropy(level_logits, targets[here] - codes.start, reduction="sum")
    return total / (levels >= 0).sum().clamp(min=1)


def sampled_generation_loss(model, states: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
    """
    `generation_loss` with each code among itself and `config.code_negatives` uniform codes of its level, without correction
    (as the public code of HSTU samples items); draws that hit the code itself do not count. Levels with no more codes than
    that are taken whole.

    Args:
        states (`torch.FloatTensor` of shape `(batch_size, T, hidden_size)`): Output of the backbone.
        targets (`torch.LongTensor` of shape `(batch_size, T)`): The next token; all but codes are left out.
    """
    layout, count, shared = model.layout, model.config.code_negatives, model.config.share_code_negatives
    levels = layout.token_levels(targets)
    total = states.new_zeros((), dtype=torch.float32)
    for level in range(layout.num_levels):
        codes, here = layout.level_slice(level), levels == level
        size, queries, true = codes.stop - codes.start, states[here], targets[here] - codes.start
        if size <= count:
            logits = model.code_logits(queries, codes).float()
            total = total + nn.functional.cross_entropy(logits, true, reduction="sum")
            continue
        vectors = model.lm_head.weight[codes]
        own = model.code_similarity(queries[:, None], vectors[true][:, :, None])[:, 0].float()
        drawn = torch.randint(size, (count,) if shared else (len(true), count), device=states.device)
        if shared:
            logits = model.code_similarity(queries, vectors[drawn].T)
        else:
            logits = model.code_similarity(queries[:, None], vectors[drawn].transpose(1, 2))[:, 0]
        logits = logits.float().masked_fill(drawn == true[:, None], -torch.inf)
        total = total - torch.cat([own, logits], dim=1).log_softmax(dim=1)[:, 0].sum()
    return total / (levels >= 0).sum().clamp(min=1)


MAX_SOFTMAX_ITEMS = 8192  # a larger catalogue is sampled: the softmax costs memory in proportion


def sampled_softmax_loss(
    states: torch.Tensor,
    items: torch.LongTensor,
    item_vectors: Callable,
    num_items: int,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Mean cross-entropy of the true items by dot product, among all items or a uniform sample shared by all positions, whose
    logits are raised by the log of how many items each stands for (Jean et al. 2015, section 3) and which leaves out the
    position's own item.

    Args:
        states (`torch.FloatTensor` of shape `(n, d)`), items (`torch.LongTensor` of shape `(n,)`)
        item_vectors: item indices `[m]` -> vectors `[m, d]`.
    """
    if num_items <= MAX_SOFTMAX_ITEMS:
        logits = states @ item_vectors(torch.arange(num_items, device=states.device)).T
        total = nn.functional.cross_entropy(logits.float(), items, reduction="sum")
    else:
        sample = torch.randint(num_items, (MAX_SOFTMAX_ITEMS,), device=states.device, generator=generator)
        logits = (states @ item_vectors(sample).T).float() + math.log(num_items / MAX_SOFTMAX_ITEMS)
        logits = logits.masked_fill(sample == items[:, None], -torch.inf)
        own = (states * item_vectors(items)).sum(dim=1, keepdim=True).float()
        total = -torch.cat([own, logits], dim=1).log_softmax(dim=1)[:, 0].sum()
    return total / max(1, len(items))


def ranking_loss(
    ranking_targets: list[str],
    behavior_ids: dict[str, int],
    logits: torch.Tensor,
    behaviors: torch.LongTensor,
    negative_logits: torch.Tensor | None,
) -> torch.Tensor:
    """
    Mean over the ranking targets of the binary cross-entropy (UniGRF section 3; RecoChain stage II for `"next"`).

    Args:
        logits (`torch.FloatTensor` of shape `(n, num_targets)`): Of the items that did come next.
        behaviors (`torch.LongTensor` of shape `(n,)`): Token ids of the behaviours on them.
        negative_logits (`torch.FloatTensor` of shape `(m, num_targets)`, *optional*): Of items that did not; they count
            for `"next"` only, since nobody knows how the user would have behaved.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for index, target in enumerate(ranking_targets):
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
    return total / len(ranking_targets)
