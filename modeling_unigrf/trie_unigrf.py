# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Which spellings exist: a trie over the catalog's codes in compressed sparse rows, and per-request item lists."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

DENSE_ENTRIES = 2**17  # a level's table of ranks may have this many entries, however few its nodes


@dataclass
class TrieLevel:
    """
    The nodes of one level. A node's id is its rank among the level's prefixes in lexicographic order, so that the children
    of a node are neighbors and no table of next states is needed.

    Args:
        num_codes (`int`): Size of the level's codebook.
        num_nodes (`int`)
        max_children (`int`): Most children that a parent has.
        child_start (`torch.IntTensor` of shape `(num_parents + 1,)`): Where the children of each parent begin.
        codes (`torch.Tensor` of shape `(num_nodes,)`, *optional*): Code of each node, in the smallest integer type.
        ranks (`torch.FloatTensor` of shape `(num_parents, num_codes)`, *optional*): Instead of `codes` on small or
            well-filled levels (in practice the first two): which child of its parent has each code, -inf for none. As
            floats, since its minimum with zero is what to add to a score.
    """

    num_codes: int
    num_nodes: int
    max_children: int
    child_start: torch.IntTensor
    codes: torch.Tensor | None = None
    ranks: torch.Tensor | None = None

    @classmethod
    def build(cls, num_codes: int, parents: torch.LongTensor, codes: torch.Tensor, num_parents: int) -> "TrieLevel":
        """From the parent `[num_nodes]` and the code `[num_nodes]` of every node, in order."""
        counts = parents.bincount(minlength=num_parents)
        child_start = nn.functional.pad(counts.cumsum(0), (1, 0))
        level = cls(num_codes, len(codes), int(counts.max()), child_start.int())
        # A float32 counts to 2^24.
        if num_codes > 2**24 or num_parents * num_codes > max(DENSE_ENTRIES, len(codes)):
            level.codes = codes.to(
                torch.uint8 if num_codes <= 2**8 else torch.int16 if num_codes <= 2**15 else torch.int32
            )
            return level
        level.ranks = torch.full((num_parents, num_codes), -torch.inf, dtype=torch.float32, device=codes.device)
        rank = torch.arange(len(codes), device=codes.device) - child_start[parents]
        level.ranks[parents, codes.long()] = rank.float()
        return level

    @property
    def nbytes(self) -> int:
        """Memory of the level."""
        return sum(tensor.nbytes for tensor in (self.child_start, self.codes, self.ranks) if tensor is not None)

    def child(self, parents: torch.LongTensor, codes: torch.LongTensor) -> torch.LongTensor:
        """Parents and codes of one shape -> the children, -1 where there is none."""
        start = self.child_start[parents].long()
        if self.ranks is not None:
            rank = self.ranks[parents, codes]
            return torch.where(rank >= 0, start + rank.clamp(min=0).long(), -1)
        # A binary search in all lists of children at once; each is sorted by code.
        low, high = start, self.child_start[parents + 1].long()
        end, last = high, self.num_nodes - 1
        for _ in range(self.max_children.bit_length()):
            middle = (low + high) // 2
            smaller = (middle < high) & (self.codes[middle.clamp(max=last)] < codes)
            low, high = torch.where(smaller, middle + 1, low), torch.where(smaller, high, middle)
        found = (low < end) & (self.codes[low.clamp(max=last)] == codes)
        return torch.where(found, low, -1)

    def children(self, parents: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
        """
        The children that exist, and no others.

        Args:
            parents (`torch.LongTensor` of shape `(n,)`)

        Returns:
            `(parent, child, code)`, each `[m]`: index into `parents`, node, and its code; ordered by parent and code.
        """
        # `index_select` costs less than half of what indexing does, and most lists here are short.
        start, end = self.child_start.index_select(0, parents), self.child_start.index_select(0, parents + 1)
        counts = (end - start).long()
        ends = counts.cumsum(0)
        parent = torch.repeat_interleave(counts, output_size=int(ends[-1]) if len(ends) else 0)
        child = torch.arange(len(parent), device=parents.device).add_((end - ends).index_select(0, parent))
        if self.ranks is None:
            return parent, child, self.codes.index_select(0, child).long()
        return parent, child, (self.ranks[parents] >= 0).nonzero()[:, 1]


def top(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    `scores.topk(count)` of `[B, n]`. For one row of very many it takes half the time: among the best of its blocks of 32, the
    `count`-th is a bound that few scores reach.
    """
    if len(scores) > 1 or scores.shape[1] % 32 or scores.shape[1] < 128 * count:
        return scores.topk(count, dim=1)
    bound = scores.view(-1, 32).amax(dim=1).topk(count, sorted=False).values.amin()
    places = (scores[0] >= bound).nonzero()[:, 0]
    best, order = scores[0].index_select(0, places).topk(count)
    return best[None], places.index_select(0, order)[None]


def lexicographic_order(item_codes: torch.Tensor, codebook_sizes: Sequence[int]) -> torch.LongTensor:
    """The permutation `[num_items]` that sorts rows of codes `[num_items, L]`."""
    keys = torch.zeros(len(item_codes), dtype=torch.long, device=item_codes.device)
    bound = 1
    for level, size in enumerate(codebook_sizes):
        if bound * size >= 2**63:  # too many spellings for one integer: count those that there are
            keys = keys.unique(return_inverse=True)[1]
            bound = len(item_codes)
        keys = keys * size + item_codes[:, level]
        bound *= size
    return keys.argsort()


class CatalogTrie:
    """
    All spellings of a catalog, sorted: levels of nodes, and under each node one contiguous range of leaves.

    Args:
        item_codes (`torch.IntTensor` of shape `(num_items, num_levels)`):
            Codes of each item; row = item index.
        codebook_sizes (`Sequence[int]`): Number of codes of each level.
        items (`torch.LongTensor` of shape `(n,)`, *optional*): Only these items, known by the same indices.

    Raises:
        ValueError: when two items share a spelling, a code is out of its codebook, or no item is left.
    """

    def __init__(self, item_codes: torch.Tensor, codebook_sizes: Sequence[int], items: torch.LongTensor | None = None):
        self.codebook_sizes = list(codebook_sizes)
        if items is not None:
            items = items.unique()
            item_codes = item_codes[items]
        if len(item_codes) == 0:
            raise ValueError("Expected a catalog of at least one item, found none.")
        self.num_items = len(item_codes)
        sizes = item_codes.new_tensor(self.codebook_sizes)
        bad = ((item_codes < 0) | (item_codes >= sizes)).any(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"Item {row} is spelt {item_codes[row].tolist()}, outside codebooks of {self.codebook_sizes} codes. The "
                "catalog and the config come from different tokenizers."
            )
        order = lexicographic_order(item_codes, self.codebook_sizes)
        item_codes = item_codes[order]
        self.levels: list[TrieLevel] = []
        is_new = torch.zeros(self.num_items, dtype=torch.bool, device=item_codes.device)
        is_new[0] = True
        parent_of_leaf, num_parents = torch.zeros_like(order), 1
        for level, num_codes in enumerate(self.codebook_sizes):
            codes = item_codes[:, level].contiguous()
            is_new[1:] |= codes[1:] != codes[:-1]
            first = is_new.nonzero()[:, 0]
            self.levels.append(TrieLevel.build(num_codes, parent_of_leaf[first], codes[first], num_parents))
            parent_of_leaf, num_parents = is_new.cumsum(0) - 1, len(first)
        if num_parents < self.num_items:
            leaf = int((~is_new).nonzero()[0])
            pair = order[leaf - 1 : leaf + 1] if items is None else items[order[leaf - 1 : leaf + 1]]
            first_item, second_item = sorted(pair.tolist())
            raise ValueError(
                f"Items {first_item} and {second_item} have the same spelling {item_codes[leaf].tolist()}: a semantic id "
                "must be unique. Add a last code that tells them apart."
            )
        # Leaf (its rank in lexicographic order) -> item index.
        self.leaf_items = (order if items is None else items[order]).int()

    @property
    def nbytes(self) -> dict[str, int]:
        """Memory of the nodes, and of the map from leaves to items."""
        return {"nodes": sum(level.nbytes for level in self.levels), "items": self.leaf_items.nbytes}

    def nodes_of(self, codes: torch.Tensor) -> torch.LongTensor:
        """Codes `[..., L]` -> the nodes they lead through `[..., L]`, the last one the leaf; -1 where no item begins so."""
        codes = codes.long()
        inside = (codes >= 0) & (codes < codes.new_tensor(self.codebook_sizes))
        path, exists = [], torch.ones_like(inside[..., 0])
        nodes = torch.zeros_like(codes[..., 0])
        for level, code, known in zip(self.levels, codes.unbind(-1), inside.unbind(-1), strict=True):
            nodes = level.child(nodes, code.masked_fill(~known, 0))
            exists = exists & known & (nodes >= 0)
            nodes = nodes.clamp(min=0)
            path.append(nodes.masked_fill(~exists, -1))
        return torch.stack(path, dim=-1)

    def lookup(self, codes: torch.Tensor) -> torch.LongTensor:
        """Codes `[..., L]` -> item indices `[...]`, -1 where no item is spelt so."""
        leaves = self.nodes_of(codes)[..., -1]
        return torch.where(leaves >= 0, self.leaf_items[leaves.clamp(min=0)].long(), -1)

    def num_leaves(self, level: int, nodes: torch.LongTensor) -> torch.LongTensor:
        """Nodes of a level, of any shape -> how many items each leads to."""
        start, end = nodes, nodes + 1
        for below in self.levels[level + 1 :]:
            start, end = below.child_start[start].long(), below.child_start[end].long()
        return end - start

    def descend(self, prefix: torch.LongTensor, length: int) -> torch.LongTensor:
        """
        Nodes of given prefixes: codes `[B, >= length]` -> node ids `[B]` at level `length - 1` (zeros for length 0).

        Raises:
            ValueError: if no item begins so.
        """
        nodes = torch.zeros(len(prefix), dtype=torch.long, device=prefix.device)
        for level in range(length):
            nodes = self.levels[level].child(nodes, prefix[:, level])
            if (nodes < 0).any():
                row = int((nodes < 0).nonzero()[0])
                raise ValueError(
                    f"Row {row} ends in the codes {prefix[row, :length].tolist()}, with which no item of the catalog "
                    "begins. Was it spelt by another tokenizer?"
                )
        return nodes

    def best_children(
        self,
        level: int,
        nodes: torch.LongTensor,
        scores: torch.FloatTensor,
        log_probs: torch.FloatTensor,
        count: int,
        item_filter: "ItemFilter | None" = None,
    ) -> tuple[torch.FloatTensor, torch.LongTensor, torch.LongTensor, torch.LongTensor]:
        """
        The best children of all beams of a request, among those that exist and that the filter leaves.

        Args:
            level (`int`): Level of the children.
            nodes (`torch.LongTensor` of shape `(batch_size, K)`): The beams' nodes.
            scores (`torch.FloatTensor` of shape `(batch_size, K)`): Their scores.
            log_probs (`torch.FloatTensor` of shape `(batch_size, K, num_codes)`): Of the codes of `level`.

        Returns:
            `(scores, parent, child, code)`, each `[batch_size, K']`, best first, K' <= `count`: as many as the request with
            the most has; -inf fills up the others. `parent` is the beam a child comes from.
        """
        trie_level, (batch_size, width) = self.levels[level], nodes.shape
        num_codes = trie_level.num_codes
        if trie_level.ranks is not None:  # all codes of all beams, in place
            ranks = trie_level.ranks.index_select(0, nodes.flatten()).view(batch_size, width, num_codes)
            table = torch.clamp(ranks, max=0).add_(log_probs).add_(scores[..., None]).flatten(1)
            if item_filter is not None and item_filter.concerns(level):
                child = trie_level.child_start[nodes][..., None] + ranks.clamp(min=0).long()
                table.masked_fill_(~item_filter.alive(level, child.flatten(1)), -torch.inf)
            best_scores, best = top(table, min(count, table.shape[1]))
            parent, code = best // num_codes, best % num_codes
            child = (
                trie_level.child_start[nodes.gather(1, parent)] + ranks.flatten(1).gather(1, best).clamp(min=0).long()
            )
        else:  # only the children that exist, one request after another
            parents, children, codes = trie_level.children(nodes.flatten())
            places = torch.add(codes, parents, alpha=num_codes)
            table = log_probs.flatten().index_select(0, places).add_(scores.flatten().index_select(0, parents))[None]
            first, last = 0, len(children) - 1
            if batch_size > 1:
                counts = (parents // width).bincount(minlength=batch_size)
                is_child = torch.arange(int(counts.max()), device=nodes.device) < counts[:, None]
                table = table.new_full(is_child.shape, -torch.inf).masked_scatter_(is_child, table)
                first = (counts.cumsum(0) - counts)[:, None]
            if item_filter is not None and item_filter.concerns(level):
                place = torch.arange(table.shape[1], device=nodes.device).expand(batch_size, -1) + first
                table.masked_fill_(~item_filter.alive(level, children.take(place.clamp_(max=last))), -torch.inf)
            best_scores, best = table.topk(min(count, table.shape[1]), dim=1)
            if batch_size > 1:
                parents, best = parents % width, (best + first).clamp_(max=last)
            parent, child, code = parents.take(best), children.take(best), codes.take(best)
        if float(best_scores[:, -1].max()) == -torch.inf:  # places that no request fills
            found = max(1, int((best_scores > -torch.inf).sum(dim=1).max()))
            best_scores, parent, child, code = (one[:, :found] for one in (best_scores, parent, child, code))
        return best_scores, parent, child, code


def is_integer(items: torch.Tensor) -> bool:
    """Whether they can be indices: a cast would take a mask or fractions for some."""
    return not items.is_floating_point() and items.dtype != torch.bool


def check_items(
    name: str, items: torch.Tensor | None, batch_size: int, num_items: int, lowest: int = -1
) -> torch.LongTensor:
    """Item indices `[batch_size, N]` as integers; `ValueError` unless they are from `lowest` (-1: none) to the catalog's last."""
    none = " and -1 where there is none" if lowest < 0 else ""
    shape = None if items is None else tuple(items.shape)
    if shape is None or len(shape) != 2 or shape[0] != batch_size or not is_integer(items):
        found = "none" if shape is None else f"{items.dtype} of shape {shape}"
        raise ValueError(
            f"Expected integer {name} of shape ({batch_size}, N), one row a history, found {found}. Pass item indices{none}."
        )
    if items.numel() and not lowest <= int(items.min()) <= int(items.max()) < num_items:
        raise ValueError(
            f"{name} range from {int(items.min())} to {int(items.max())}, outside a catalog of {num_items} items. Pass "
            f"item indices, e.g. `tokenizer.item_indices(ids)`{none}."
        )
    return items.long()


def item_list(items, device: torch.device) -> torch.LongTensor:
    """Item indices as a tensor; raises `ValueError` for a mask or for fractions."""
    items = torch.as_tensor(items, device=device)
    if items.numel() and not is_integer(items):
        raise ValueError(
            f"Expected item indices as integers, found {items.dtype}. Of a mask take `mask.nonzero()[:, 0]`."
        )
    return items.long()


class ItemFilter:
    """
    Items allowed or blocked for each request, held inside the trie: no beam goes where no item may be shown.

    It keeps, for each level, the nodes that still lead to an allowed item, or those that lead to blocked items only: a
    check is one binary search among them, and nothing has the catalog's size.

    Args:
        trie (`CatalogTrie`)
        item_codes (`torch.IntTensor` of shape `(num_items, L)`): How the items of the lists are spelt.
        allowed (`list` of B item-index tensors or lists, *optional*): Only these items, for each request; those that the
            trie lacks cannot be shown.
        blocked (the same, *optional*): None of these items. Blocking wins over allowing.

    Raises:
        ValueError: if a list names an index outside the catalog, or leaves a request no item at all.
    """

    def __init__(self, trie: CatalogTrie, item_codes: torch.Tensor, allowed=None, blocked=None):
        self.is_allow_list = allowed is not None
        batch_size = len(allowed if self.is_allow_list else blocked)
        request, path = self._paths(trie, item_codes, allowed if self.is_allow_list else blocked)
        if self.is_allow_list and blocked is not None:
            out, out_path = self._paths(trie, item_codes, blocked)
            leaf, out_leaf = request * trie.num_items + path[:, -1], out * trie.num_items + out_path[:, -1]
            left = ~torch.isin(leaf, out_leaf)
            request, path = request[left], path[left]
        nothing_left = request.bincount(minlength=batch_size) == (0 if self.is_allow_list else trie.num_items)
        if nothing_left.any():
            why = "its allow-list is empty, or all in it is blocked or outside the catalog"
            raise ValueError(
                f"Request {int(nothing_left.nonzero()[0])} leaves no item to recommend: "
                f"{why if self.is_allow_list else 'everything is blocked'}. Leave it out."
            )
        # For each level: request * num_nodes + node, sorted.
        self.num_nodes = [level.num_nodes for level in trie.levels]
        self.keys = []
        for level, num_nodes in enumerate(self.num_nodes):
            keys, leaves = (request * num_nodes + path[:, level]).unique(return_counts=True)
            if not self.is_allow_list:
                keys = keys[leaves == trie.num_leaves(level, keys % num_nodes)]
            self.keys.append(keys)

    @staticmethod
    def _paths(trie: CatalogTrie, item_codes: torch.Tensor, lists) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Lists of items -> requests `[n]` and nodes `[n, L]` of the n different items that the trie has."""
        device = item_codes.device
        lists = [item_list(items, device).flatten() for items in lists]
        items = torch.cat(lists)
        if len(items) and (items.min() < 0 or items.max() >= len(item_codes)):
            row = next(
                row for row, one in enumerate(lists) if len(one) and (one.min() < 0 or one.max() >= len(item_codes))
            )
            raise ValueError(
                f"The item list of request {row} has indices from {int(lists[row].min())} to {int(lists[row].max())}, outside "
                f"a catalog of {len(item_codes)} items."
            )
        lengths = torch.tensor([len(one) for one in lists], device=device)
        request = torch.arange(len(lists), device=device).repeat_interleave(lengths)
        pairs = (request * len(item_codes) + items).unique()
        request, path = pairs // len(item_codes), trie.nodes_of(item_codes[pairs % len(item_codes)])
        known = path[:, -1] >= 0
        return request[known], path[known]

    def concerns(self, level: int) -> bool:
        """Whether any node of a level is dead for any request."""
        return self.is_allow_list or len(self.keys[level]) > 0

    def alive(self, level: int, nodes: torch.LongTensor) -> torch.BoolTensor:
        """Nodes `[B, m]` of a level that concerns the filter -> whether each request may still go there."""
        keys = self.keys[level]
        wanted = nodes + self.num_nodes[level] * torch.arange(len(nodes), device=nodes.device)[:, None]
        listed = keys[torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)] == wanted
        return listed if self.is_allow_list else ~listed
