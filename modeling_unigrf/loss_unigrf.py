# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The losses: functions of states and targets, which a test can compute by hand."""

import math
from collections.abc import Callable

import torch
from torch import nn

from .inputs_unigrf import ItemSets
from .negatives_unigrf import LastItems, PackedNegatives
from .scoring_unigrf import ItemScorer

# Items of a full softmax; a larger catalog is sampled.
MAX_SOFTMAX_ITEMS = 20_000
# Positions whose logits are in memory at a time: torch's own choice is up to four times as slow for narrow vectors.
SOFTMAX_CHUNK = 128
# A hard negative counts this often in a softmax of all codes.
HARD_NEGATIVE_WEIGHT = 30.0


def generation_loss(
    scorer: ItemScorer,
    states: torch.Tensor,
    targets: torch.LongTensor,
    code_negatives: int = 0,
    item_sets: ItemSets | None = None,
    retain_graph: bool = False,
) -> torch.Tensor:
    """
    Compute the mean cross-entropy of the codes, each among the codes of its level.

    RecoChain sums over an item's levels: its loss is L times this loss. Its ranking loss of weight 1 has the weight
    1 / L here.

    Args:
        scorer (`ItemScorer`): The model's heads and catalog.
        states (`torch.FloatTensor` of shape `(batch_size, T, hidden_size)`): Output of the backbone.
        targets (`torch.LongTensor` of shape `(batch_size, T)`): The next tokens. The loss skips all but codes.
        code_negatives (`int`, defaults to 0): Compare each code with this many uniform codes of its level, shared by
            all positions, without a correction (as HSTU's public code samples items). Draws of the code itself do not
            count. 0, or at least the size of the level: compare with the whole level.
        item_sets (`ItemSets`, *optional*): Read for atomic ids only. A row's hard negatives replace as many random
            codes, or count 30 times in the whole level. (UniGRF has 8 of them among 120 of 3,706 items.) Its excluded
            positives are no negatives. None: no sets.
        retain_graph (`bool`, defaults to `False`): Whether several backward passes go through the loss.
    """
    layout = scorer.layout
    levels = layout.token_levels(targets)
    total = states.new_zeros((), dtype=torch.float32)
    code_sets = None
    if item_sets is not None and layout.num_levels == 1:
        code_sets = [
            scorer.catalog.item_codes[items.clamp(min=0), 0].long().masked_fill(items < 0, -1)
            for items in (item_sets.hard_negatives, item_sets.excluded_positives)
        ]
    for level, codes in enumerate(layout.level_slices):
        here = levels == level
        true = targets[here] - codes.start
        if code_negatives == 0 or codes.stop - codes.start <= code_negatives:
            total = total + _full_softmax(scorer, states, here, true, codes, code_sets, retain_graph)
        else:
            total = total + _sampled_softmax(scorer, states, here, true, codes, code_sets, code_negatives)
    return total / (levels >= 0).sum().clamp(min=1)


def code_cross_entropy(
    scorer: ItemScorer,
    states: torch.Tensor,
    true: torch.LongTensor,
    codes: slice,
    reduction: str,
    retain_graph: bool = False,
) -> torch.Tensor:
    """Compute the cross-entropy of places `true [n]` in a slice of the tokens, from states `[n, hidden_size]`."""
    if scorer.layout.num_levels > 1 or not scorer.has_code_vectors:
        return nn.functional.cross_entropy(scorer.code_logits(states, codes).float(), true, reduction=reduction)
    states, vectors = scorer.comparable(states.float(), scorer.code_vectors(codes).float(), dim=-1)
    return softmax_over_items(states, vectors, true, reduction, retain_graph)


def _similarity(scorer: ItemScorer, states: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Compute `code_similarity` in float32, as `softmax_over_items` does, also under autocast."""
    with torch.autocast(states.device.type, enabled=False):
        return scorer.code_similarity(states.float(), vectors.float())


def _row_logits(
    scorer: ItemScorer,
    states: torch.Tensor,
    here: torch.BoolTensor,
    true: torch.LongTensor,
    codes: slice,
    code_set: torch.LongTensor,
) -> torch.Tensor:
    """Compute logits `[n, m]` of each row's codes `[B, m]` (-1: none) at positions `here`, -inf at the true code."""
    vectors = scorer.code_vectors(codes)[code_set.clamp(min=0)]
    logits = _similarity(scorer, states, vectors.transpose(1, 2))[here]
    row_codes = code_set[here.nonzero()[:, 0]]
    return logits.masked_fill((row_codes < 0) | (row_codes == true[:, None]), -torch.inf)


def _full_softmax(
    scorer: ItemScorer,
    states: torch.Tensor,
    here: torch.BoolTensor,
    true: torch.LongTensor,
    codes: slice,
    code_sets: list[torch.LongTensor] | None,
    retain_graph: bool,
) -> torch.Tensor:
    """Sum the cross-entropy of `true [n]` at the positions `here`, among all codes of a level."""
    queries = states[here]
    if code_sets is None:
        return code_cross_entropy(scorer, queries, true, codes, "sum", retain_graph)
    losses = code_cross_entropy(scorer, queries, true, codes, "none", retain_graph)
    # The denominator counts hard negatives 30 times, excluded positives 0 times.
    true_logits = _similarity(scorer, queries[:, None], scorer.code_vectors(codes)[true][:, :, None])[:, 0, 0]
    changes = 0.0
    for code_set, weight in zip(code_sets, (HARD_NEGATIVE_WEIGHT, 0.0), strict=True):
        logits = _row_logits(scorer, states, here, true, codes, code_set)
        changes = changes + (weight - 1) * (logits - (losses + true_logits)[:, None]).exp().sum(dim=1)
    # Above -1 but for rounding, since the true code stays.
    return (losses + torch.log1p(changes.clamp(min=-1 + 1e-6))).sum()


def _sampled_softmax(
    scorer: ItemScorer,
    states: torch.Tensor,
    here: torch.BoolTensor,
    true: torch.LongTensor,
    codes: slice,
    code_sets: list[torch.LongTensor] | None,
    count: int,
) -> torch.Tensor:
    """Sum the cross-entropy of `true [n]` at the positions `here`, each among `count` random codes and itself."""
    queries = states[here]
    vectors = scorer.code_vectors(codes)
    logits = [_similarity(scorer, queries[:, None], vectors[true][:, :, None])[:, 0]]
    drawn = torch.randint(len(vectors), (count,), device=states.device)
    random_logits = _similarity(scorer, queries, vectors[drawn].T)
    is_excluded = (drawn == true[:, None]).expand(len(true), -1)
    if code_sets is not None:
        hard, excluded = code_sets
        logits.append(_row_logits(scorer, states, here, true, codes, hard))
        row = here.nonzero()[:, 0]
        # A row's hard negatives replace its first random codes.
        is_replaced = torch.arange(count, device=states.device) < (hard >= 0).sum(dim=1)[row][:, None]
        is_positive = (drawn.expand(len(true), -1)[:, :, None] == excluded[row][:, None]).any(dim=2)
        is_excluded = is_excluded | is_replaced | is_positive
    logits.append(random_logits.masked_fill(is_excluded, -torch.inf))
    return -torch.cat(logits, dim=1).log_softmax(dim=1)[:, 0].sum()


def contrastive_loss(
    scorer: ItemScorer,
    hidden_states: torch.Tensor,
    targets: torch.LongTensor,
    last: LastItems,
    negatives: PackedNegatives,
    num_hard: int,
) -> torch.Tensor:
    """
    Compute the contrastive sequence loss of each row's last supervised item.

    This loss is the cross-entropy of the item among itself and the row's hard negatives, by their log-probabilities as
    sequences. The cross-entropy of single codes compares no item as a whole. The sum over rows is divided by the
    number of codes, like the cross-entropy of the codes. (A mean over rows would outweigh all codes of an item about
    a hundred times, and undo their training.)

    Args:
        scorer (`ItemScorer`): The model's heads and catalog.
        hidden_states (`torch.FloatTensor` of shape `(batch_size, T + M * L, hidden_size)`): States of histories and
            packed negatives.
        targets (`torch.LongTensor` of shape `(batch_size, T)`): The next tokens of the histories.
        last (`LastItems`): The last supervised item of each row.
        negatives (`PackedNegatives`): The packed negatives.
        num_hard (`int`): Number of hard negatives, the last of the packed negatives.
    """
    layout = scorer.layout
    ends = last.history_ends
    has_last = (last.items >= 0) & (targets.gather(1, ends[:, None])[:, 0] != -100)
    rows = torch.arange(len(ends), device=ends.device)
    target_states = hidden_states[rows[:, None], layout.code_positions(ends)]
    packed = hidden_states[:, -negatives.tokens.shape[1] :].unflatten(1, (-1, layout.num_levels))[:, -num_hard:]
    states = torch.cat([target_states[:, None, 1:], packed[:, :, :-1]], dim=1)
    items = torch.cat([last.items.clamp(min=0)[:, None], negatives.items[:, -num_hard:]], dim=1)
    is_none = nn.functional.pad(~negatives.is_hard[:, -num_hard:], (1, 0))
    scores = scorer.item_log_probs(items, target_states[:, 0], states).masked_fill(is_none, -torch.inf)
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
    Compute the cross-entropy of items by dot products with all vectors, in float32.

    The function computes logits in chunks of positions and never stores all of them, in a third of the time.

    Args:
        states (`torch.FloatTensor` of shape `(n, d)`): States at n positions.
        vectors (`torch.FloatTensor` of shape `(num_items, d)`): Vectors of all items.
        items (`torch.LongTensor` of shape `(n,)`): The true items.
        reduction (`str`, defaults to `"sum"`): `"sum"`, or `"none"` for losses `[n]`, which takes a third longer.
        retain_graph (`bool`, defaults to `False`): Whether several backward passes go through the loss.
    """
    options = nn.LinearCrossEntropyOptions(allow_retain_graph=retain_graph, batch_chunk_size=SOFTMAX_CHUNK)
    return nn.functional.linear_cross_entropy(
        states.float(), vectors.float(), items, reduction=reduction, options=options
    )


def sampled_softmax_loss(
    states: torch.Tensor,
    items: torch.LongTensor,
    representations: Callable[[torch.LongTensor], torch.Tensor],
    known_items: torch.LongTensor,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Compute the sampled-softmax loss: the mean cross-entropy of the true items by dot product.

    The alternatives are the items that training knows or, where these are more than 20,000, a uniform sample that all
    positions share. Each item of a sample stands for several items, whose log number is added to its logit (Jean et
    al. 2015, section 3). The true item does not count as a draw. An item that nobody took is no alternative: training
    would only learn that nobody takes what is new.

    Args:
        states (`torch.FloatTensor` of shape `(n, d)`): Queries at n positions.
        items (`torch.LongTensor` of shape `(n,)`): The true items.
        representations (`Callable`): Function of item indices `[m]`: their item representations `[m, d]`.
        known_items (`torch.LongTensor` of shape `(k,)`): The items that training knows, in order.
        generator (`torch.Generator`, *optional*): Draws the sample. None: the global generator.
    """
    if len(known_items) <= MAX_SOFTMAX_ITEMS:
        # An evaluation may have other targets.
        alternatives = torch.cat([known_items, items]).unique()
        total = softmax_over_items(states, representations(alternatives), torch.searchsorted(alternatives, items))
    else:
        draws = torch.randint(len(known_items), (MAX_SOFTMAX_ITEMS,), device=states.device, generator=generator)
        sample = known_items[draws]
        logits = (states @ representations(sample).T).float() + math.log(len(known_items) / MAX_SOFTMAX_ITEMS)
        logits = logits.masked_fill(sample == items[:, None], -torch.inf)
        true_logits = (states * representations(items)).sum(dim=1, keepdim=True).float()
        total = -torch.cat([true_logits, logits], dim=1).log_softmax(dim=1)[:, 0].sum()
    return total / max(1, len(items))


def ranking_loss(
    targets: dict[str, int | None],
    logits: torch.Tensor,
    behaviors: torch.LongTensor,
    negative_logits: torch.Tensor | None,
) -> torch.Tensor:
    """
    Compute the mean binary cross-entropy over the ranking targets (UniGRF, section 3).

    For `"next"` this is the loss of RecoChain's stage II, which has no other target. Beside other targets, `"next"`
    has the weight of a single target.

    Args:
        targets (`dict[str, int | None]`): Ranking targets in order, and the token ids of their behaviors; None stands
            for `"next"`.
        logits (`torch.FloatTensor` of shape `(n, num_targets)`): Logits of the items that came next.
        behaviors (`torch.LongTensor` of shape `(n,)`): Token ids of the behaviors on these items.
        negative_logits (`torch.FloatTensor` of shape `(m, num_targets)`, *optional*): Logits of items that did not
            come next. They count for `"next"` only, since no behavior on them is known. None: no such items.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for index, behavior_id in enumerate(targets.values()):
        scores = logits[:, index].float()
        if behavior_id is None:
            labels = torch.ones_like(scores)
            if negative_logits is not None:
                scores = torch.cat([scores, negative_logits[:, index].float()])
                labels = nn.functional.pad(labels, (0, len(negative_logits)))
        else:
            labels = (behaviors == behavior_id).float()
        loss = nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
        total = total + loss / max(1, len(scores))
    return total / len(targets)
