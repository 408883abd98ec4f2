# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Transitions: counts of what users took next, a sparse table beside the catalog.

Interactions update the table in seconds, without training. The *transition score* of item j after a history with the
items `h_0, h_1, ..`, last item first, is

    sum_k history_decay^k * log(1 + C[h_k, j] / (transition_smoothing * p_j))
        + popularity_weight * log max(n_j, 1/2) + content_weight * cosine(content of j, content of the history)

`C[i, j]` counts how often j followed i within `WINDOW` items of a user, by `COUNT_DECAY^(distance - 1)`. `n_j` is the
number of interactions with j, `p_j` their share of all, and the content of the history the mean of its items' unit
vectors, weighted by `history_decay^k`.

A *stand-in* is the item of the nearest content embedding among the items that training knew. It gives its counts to an
item that nobody took, times the cosine of the two, and its learned row to an item that training did not know.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn

from .item_lists_unigrf import is_integer

# One choice for all data: goods prefer a faster decay, films a slower one, both by little.
COUNT_DECAY = 0.7
WINDOW = 20
# Last items of a history that the score reads.
MAX_SCORED_ITEMS = 20
# Rows of a matrix product between items that are in memory at a time.
ROWS_AT_A_TIME = 1024


@dataclass
class TransitionSettings:
    """
    The settings of the transition score, which validation chooses.

    Args:
        history_decay (`float`, defaults to 0.6): Weight of an item of the history over that of the item behind it.
        transition_smoothing (`float`, defaults to 100.0): Factor of an item's share of all
            interactions; counts are compared with the product.
        popularity_weight (`float`, defaults to 1.0): Weight of the log number of interactions.
        content_weight (`float`, defaults to 0.0): Weight of the cosine of content embeddings.
    """

    history_decay: float = 0.6
    transition_smoothing: float = 100.0
    popularity_weight: float = 1.0
    content_weight: float = 0.0


def count_transitions(
    histories: Sequence[Sequence[int]], num_new: Sequence[int] | None = None
) -> tuple[torch.LongTensor, torch.LongTensor, torch.FloatTensor]:
    """
    Count the transitions to the new items of histories.

    Args:
        histories: Item indices of each user, oldest first.
        num_new: Number of last items of each history that are new. None: all of them.

    Returns:
        Sources `[n]`, targets `[n]` and counts `[n]`; pairs may repeat.
    """
    lengths = torch.tensor([len(history) for history in histories], dtype=torch.long)
    items = torch.tensor([item for history in histories for item in history], dtype=torch.long)
    ends = lengths.cumsum(0)
    users = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    first_new = ends - (lengths if num_new is None else torch.as_tensor(num_new, dtype=torch.long))
    places = torch.arange(len(items))
    sources = []
    targets = []
    counts = []
    for distance in range(1, WINDOW + 1):
        later = places[distance:]
        is_pair = (users[later] == users[later - distance]) & (later >= first_new[users[later]])
        later = later[is_pair]
        sources.append(items[later - distance])
        targets.append(items[later])
        counts.append(torch.full((len(later),), COUNT_DECAY ** (distance - 1)))
    return torch.cat(sources), torch.cat(targets), torch.cat(counts)


class UniGRFTransitions(nn.Module):
    """
    The table of transitions, saved with the weights: 6 bytes a neighbor, and 10 bytes an item.

    Row i of the buffers belongs to item i. `neighbors` (int32) and `counts` (float16), `[num_items, M]`, hold the M
    items that most often followed item i (-1: none). `item_counts` (int32) are numbers of interactions. `stand_ins`
    (int32) and `stand_in_cosines` (float16) describe the stand-in; an item that training knew stands for itself.
    """

    def __init__(self, num_items: int, num_neighbors: int):
        super().__init__()
        self.register_buffers(num_items, num_neighbors)

    def register_buffers(self, num_items: int, num_neighbors: int) -> None:
        """Make an empty table."""
        self.register_buffer("neighbors", torch.full((num_items, num_neighbors), -1, dtype=torch.int32))
        self.register_buffer("counts", torch.zeros(num_items, num_neighbors, dtype=torch.float16))
        self.register_buffer("item_counts", torch.zeros(num_items, dtype=torch.int32))
        self.register_buffer("stand_ins", torch.arange(num_items, dtype=torch.int32))
        self.register_buffer("stand_in_cosines", torch.ones(num_items, dtype=torch.float16))

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.item_counts)

    def clear(self) -> None:
        """Forget all interactions, to count them anew; stand-ins stay."""
        self.neighbors.fill_(-1)
        self.counts.zero_()
        self.item_counts.zero_()

    def add(self, histories: Sequence[Sequence[int]], num_new: Sequence[int] | None = None) -> None:
        """
        Add the interactions with the new items of histories, which `check_histories` accepted.

        A row of the table keeps its M greatest counts: only the rows of items with a new successor change.
        """
        device = self.counts.device
        new_items = [
            item
            for row, history in enumerate(histories)
            for item in history[len(history) - (len(history) if num_new is None else num_new[row]) :]
        ]
        new_items = torch.tensor(new_items, dtype=torch.long, device=device)
        self.item_counts += new_items.bincount(minlength=self.num_items).int()

        # The table's entries of the changed rows, and the new ones, summed by pair.
        sources, targets, counts = (column.to(device) for column in count_transitions(histories, num_new))
        changed, sources = sources.unique(return_inverse=True)
        old = self.neighbors[changed].long()
        is_old = old >= 0
        pairs = torch.cat([sources * self.num_items + targets, (self._row_offsets(changed) + old)[is_old]])
        counts = torch.cat([counts, self.counts[changed][is_old].float()])
        pairs, places = pairs.unique(return_inverse=True)
        counts = counts.new_zeros(len(pairs)).index_add_(0, places, counts)

        # The greatest counts of each row.
        rows = pairs // self.num_items
        order = counts.argsort(descending=True, stable=True)
        order = order[rows[order].argsort(stable=True)]
        rows = rows[order]
        first = torch.searchsorted(rows, torch.arange(len(changed), device=device))
        columns = torch.arange(len(rows), device=device) - first[rows]
        is_kept = columns < self.neighbors.shape[1]
        kept_rows = changed[rows[is_kept]]
        self.neighbors[changed] = -1
        self.counts[changed] = 0
        self.neighbors[kept_rows, columns[is_kept]] = (pairs[order] % self.num_items)[is_kept].int()
        self.counts[kept_rows, columns[is_kept]] = counts[order][is_kept].to(self.counts.dtype)

    def _row_offsets(self, changed: torch.LongTensor) -> torch.LongTensor:
        return (torch.arange(len(changed), device=changed.device) * self.num_items)[:, None]

    def append(self, count: int) -> None:
        """Append items without interactions, each its own stand-in."""
        device = self.item_counts.device
        first = self.num_items
        none = torch.full((count, self.neighbors.shape[1]), -1, dtype=torch.int32, device=device)
        self.neighbors = torch.cat([self.neighbors, none])
        self.counts = torch.cat([self.counts, self.counts.new_zeros(none.shape)])
        self.item_counts = torch.cat([self.item_counts, self.item_counts.new_zeros(count)])
        places = torch.arange(first, first + count, dtype=torch.int32, device=device)
        self.stand_ins = torch.cat([self.stand_ins, places])
        self.stand_in_cosines = torch.cat([self.stand_in_cosines, self.stand_in_cosines.new_ones(count)])

    def choose_stand_ins(self, items: torch.Tensor, among: torch.Tensor, embeddings: torch.Tensor) -> None:
        """
        Give each of `items` the nearest of the items `among` as its stand-in.

        Args:
            items, among (`torch.LongTensor` of shape `(n,)` and `(m,)`): Item indices. Without any item in `among`
                nothing changes.
            embeddings (`torch.Tensor` of shape `(num_items, D)`): Content embeddings.
        """
        if not len(among):
            return
        known = nn.functional.normalize(embeddings[among].float(), dim=1)
        for part in items.split(ROWS_AT_A_TIME):
            cosines, nearest = (nn.functional.normalize(embeddings[part].float(), dim=1) @ known.T).max(dim=1)
            self.stand_ins[part] = among[nearest].int()
            self.stand_in_cosines[part] = cosines.clamp(min=0).to(self.stand_in_cosines.dtype)

    def _sources(self) -> tuple[torch.LongTensor, torch.FloatTensor]:
        """Return the item whose counts each item has, and their factor, both `[num_items]`."""
        is_taken = self.item_counts > 0
        sources = torch.where(is_taken, torch.arange(self.num_items, device=is_taken.device), self.stand_ins.long())
        return sources, torch.where(is_taken, 1.0, self.stand_in_cosines.float())

    def contributions(self, histories: torch.LongTensor, settings: TransitionSettings) -> torch.FloatTensor:
        """
        Compute what each item of the histories adds to the scores of its successors.

        Args:
            histories (`torch.LongTensor` of shape `(batch_size, H)`): Last items, last first; -1: none.
            settings (`TransitionSettings`): Settings of the score.

        Returns:
            Successors (int64, `num_items`: none) and their summands, both `[batch_size, H, M]`.
        """
        sources, _ = self._sources()
        items = sources[histories.clamp(min=0)]
        successors = self.neighbors[items].long()
        is_none = (successors < 0) | (histories < 0)[..., None]
        total = self.item_counts.sum().clamp(min=1)
        # Half an interaction for an item without one.
        shares = self.item_counts.clamp(min=0.5) / total
        ratios = self.counts[items].float() / (settings.transition_smoothing * shares[successors.clamp(min=0)])
        decay = settings.history_decay ** torch.arange(histories.shape[1], device=histories.device)
        summands = ratios.log1p() * decay[:, None]
        return successors.masked_fill(is_none, self.num_items), summands.masked_fill(is_none, 0.0)

    def shares_of_history(
        self, histories: torch.LongTensor, items: torch.LongTensor, settings: TransitionSettings
    ) -> torch.FloatTensor:
        """
        Compute what each item of the histories adds to the transition scores of some items, by its counts.

        Args:
            histories (`torch.LongTensor` of shape `(batch_size, H)`): Last items, last first; -1: none.
            items (`torch.LongTensor` of shape `(batch_size, R)`): Item indices.
            settings (`TransitionSettings`): Settings of the score.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, R, H)`.
        """
        successors, summands = self.contributions(histories, settings)
        sources, factors = self._sources()
        shares = [
            summands.masked_fill(successors != sources[column][:, None, None], 0.0).sum(dim=2)
            * factors[column][:, None]
            for column in items.unbind(dim=1)
        ]
        return torch.stack(shares, dim=1)

    def scores(
        self, histories: torch.LongTensor, embeddings: torch.Tensor | None, settings: TransitionSettings
    ) -> torch.FloatTensor:
        """
        Compute the transition scores of all items.

        Args:
            histories (`torch.LongTensor` of shape `(batch_size, H)`): Last items, last first; -1: none.
            embeddings (`torch.Tensor` of shape `(num_items, D)`, *optional*): Content embeddings. None: for a
                `content_weight` of 0.
            settings (`TransitionSettings`): Settings of the score.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_items)`.
        """
        successors, summands = self.contributions(histories, settings)
        scores = summands.new_zeros(len(histories), self.num_items + 1)
        scores.scatter_add_(1, successors.flatten(1), summands.flatten(1))
        popularity = self.item_counts.clamp(min=0.5).float().log()
        scores = scores[:, :-1] + settings.popularity_weight * popularity
        # Items that nobody took.
        sources, factors = self._sources()
        borrowing = (self.item_counts == 0).nonzero()[:, 0]
        scores[:, borrowing] = scores[:, sources[borrowing]] * factors[borrowing]
        if settings.content_weight:
            decay = settings.history_decay ** torch.arange(histories.shape[1], device=histories.device)
            vectors = nn.functional.normalize(embeddings[histories.clamp(min=0)].float(), dim=-1)
            means = (vectors * (decay * (histories >= 0))[..., None]).sum(dim=1)
            means = nn.functional.normalize(means, dim=1)
            scores += settings.content_weight * (means @ nn.functional.normalize(embeddings.float(), dim=1).T)
        return scores


def is_index_list(history) -> bool:
    """Return whether a value is a list, an array or a tensor `[n]` of integers."""
    if hasattr(history, "__array__"):
        indices = torch.as_tensor(history)
        return indices.ndim == 1 and (is_integer(indices) or not len(indices))
    is_list = isinstance(history, Sequence) and not isinstance(history, str)
    return is_list and all(isinstance(item, Integral) and not isinstance(item, bool) for item in history)


def check_histories(histories: Sequence[Sequence[int]], num_items: int, num_new: Sequence[int] | None) -> None:
    """
    Check item indices of users, before they are counted.

    Raises:
        ValueError: for no list of lists, items outside the catalog, and numbers of new items that do not fit.
    """
    if not hasattr(histories, "__len__") or not all(map(is_index_list, histories)):
        raise ValueError(
            "`histories` must be a list of lists of item indices, one for each user, got another form. Pass "
            "`[tokenizer.item_indices(ids).tolist() for ids in ...]`."
        )
    for row, history in enumerate(histories):
        if len(history) and not 0 <= min(history) <= max(history) < num_items:
            raise ValueError(
                f"`histories` must hold indices into a catalog of {num_items} items, got {min(history)} to "
                f"{max(history)} in row {row}. Add new items first (`model.add_items`), and pass item indices."
            )
    if num_new is not None:
        if len(num_new) != len(histories):
            raise ValueError(
                f"`num_new` must hold one number for each of {len(histories)} histories, got {len(num_new)}."
                " Pass None if all items are new."
            )
        for row, (history, count) in enumerate(zip(histories, num_new, strict=True)):
            if not isinstance(count, Integral) or not 0 <= count <= len(history):
                raise ValueError(
                    f"`num_new` must be from 0 to the {len(history)} items of the history, got {count!r} in row {row}."
                    " Count the last items that the table has not counted yet."
                )


def last_items(rows: torch.LongTensor, items: torch.LongTensor, batch_size: int) -> torch.LongTensor:
    """
    Arrange the last items of each history.

    Args:
        rows, items (`torch.LongTensor` of shape `(n,)`): Rows and indices of the items of the histories, in order.
        batch_size (`int`): Number of histories.

    Returns:
        `torch.LongTensor` of shape `(batch_size, MAX_SCORED_ITEMS)`: last item first; -1: none.
    """
    ends = rows.bincount(minlength=batch_size).cumsum(0)
    places = ends[rows] - 1 - torch.arange(len(rows), device=rows.device)
    is_read = places < MAX_SCORED_ITEMS
    last = rows.new_full((batch_size, MAX_SCORED_ITEMS), -1)
    last[rows[is_read], places[is_read]] = items[is_read]
    return last
