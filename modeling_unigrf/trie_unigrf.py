# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The trie: which code sequences encode an item of the catalog, in compressed sparse rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

DENSE_ENTRIES = 2**17  # a level's table of ranks may have this many entries, however few its nodes


@dataclass
class TrieLevel:
    """
    The nodes of one level. A node's id is its rank among the level's prefixes in lexicographic order: the children of
    a node are neighbors, so that no table of next states is needed.

    Args:
        num_codes (`int`): Size of the level's codebook.
        num_nodes (`int`)
        max_children (`int`): Most children that a parent has.
        child_start (`torch.IntTensor` of shape `(num_parents + 1,)`): Where the children of each parent begin.
        codes (`torch.Tensor` of shape `(num_nodes,)`, *optional*): Code of each node, in the smallest integer type.
        ranks (`torch.FloatTensor` of shape `(num_parents, num_codes)`, *optional*): In place of `codes` on small or
            well-filled levels (in practice the first two): which child of its parent has each code, -inf for none.
            The minimum of a rank and zero is what a score adds, hence floats.
    """

    num_codes: int
    num_nodes: int
    max_children: int
    child_start: torch.IntTensor
    codes: torch.Tensor | None = None
    ranks: torch.Tensor | None = None

    @classmethod
    def build(cls, num_codes: int, parents: torch.LongTensor, codes: torch.Tensor, num_parents: int) -> "TrieLevel":
        """Build a level from the parent `[num_nodes]` and the code `[num_nodes]` of every node, in order."""
        counts = parents.bincount(minlength=num_parents)
        child_start = nn.functional.pad(counts.cumsum(0), (1, 0))
        level = cls(num_codes, len(codes), int(counts.max()), child_start.int())
        # float32 counts exactly up to 2^24.
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
        """Memory of the level in bytes."""
        return sum(tensor.nbytes for tensor in (self.child_start, self.codes, self.ranks) if tensor is not None)

    def child(self, parents: torch.LongTensor, codes: torch.LongTensor) -> torch.LongTensor:
        """Find the children of `parents` with `codes`, both of one shape; -1 where there is none."""
        start = self.child_start[parents].long()
        if self.ranks is not None:
            rank = self.ranks[parents, codes]
            return torch.where(rank >= 0, start + rank.clamp(min=0).long(), -1)
        # Binary search in all lists of children at once: each is sorted by code.
        end = self.child_start[parents + 1].long()
        last = self.num_nodes - 1
        low = start
        high = end
        for _ in range(self.max_children.bit_length()):
            middle = (low + high) // 2
            smaller = (middle < high) & (self.codes[middle.clamp(max=last)] < codes)
            low = torch.where(smaller, middle + 1, low)
            high = torch.where(smaller, high, middle)
        exists = (low < end) & (self.codes[low.clamp(max=last)] == codes)
        return torch.where(exists, low, -1)

    def children(self, parents: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
        """
        List the children that exist.

        Args:
            parents (`torch.LongTensor` of shape `(n,)`)

        Returns:
            `(parent, child, code)`, each `[m]`: index into `parents`, node, and its code; ordered by parent and code.
        """
        # `index_select` costs less than half of indexing.
        start = self.child_start.index_select(0, parents)
        end = self.child_start.index_select(0, parents + 1)
        counts = (end - start).long()
        ends = counts.cumsum(0)
        parent = torch.repeat_interleave(counts, output_size=int(ends[-1]) if len(ends) else 0)
        child = torch.arange(len(parent), device=parents.device).add_((end - ends).index_select(0, parent))
        if self.ranks is None:
            return parent, child, self.codes.index_select(0, child).long()
        return parent, child, (self.ranks[parents] >= 0).nonzero()[:, 1]


def top(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Take `scores.topk(count)` of `[B, n]`. One long row takes half of topk's time: the `count`-th best maximum of its
    blocks of 32 is a bound that few scores reach.
    """
    if len(scores) > 1 or scores.shape[1] % 32 or scores.shape[1] < 128 * count:
        return scores.topk(count, dim=1)
    bound = scores.view(-1, 32).amax(dim=1).topk(count, sorted=False).values.amin()
    places = (scores[0] >= bound).nonzero()[:, 0]
    best, order = scores[0].index_select(0, places).topk(count)
    return best[None], places.index_select(0, order)[None]


def lexicographic_order(item_codes: torch.Tensor, codebook_sizes: Sequence[int]) -> torch.LongTensor:
    """Return the permutation `[num_items]` that sorts the rows of codes `[num_items, L]`."""
    keys = torch.zeros(len(item_codes), dtype=torch.long, device=item_codes.device)
    bound = 1
    for level, size in enumerate(codebook_sizes):
        if bound * size >= 2**63:  # too many sequences for one integer: number those that occur
            keys = keys.unique(return_inverse=True)[1]
            bound = len(item_codes)
        keys = keys * size + item_codes[:, level]
        bound *= size
    return keys.argsort()


class CatalogTrie:
    """
    The semantic IDs of a catalog, sorted: levels of nodes, and under each node one contiguous range of leaves.

    Args:
        item_codes (`torch.IntTensor` of shape `(num_items, num_levels)`):
            Codes of each item; row = item index.
        codebook_sizes (`Sequence[int]`): Number of codes of each level.
        items (`torch.LongTensor` of shape `(n,)`, *optional*): Only these items, known by the same indices.

    Raises:
        ValueError: if two items share a semantic ID, a code is outside its codebook, or there is no item.
    """

    def __init__(self, item_codes: torch.Tensor, codebook_sizes: Sequence[int], items: torch.LongTensor | None = None):
        self.codebook_sizes = list(codebook_sizes)
        if items is not None:
            items = items.unique()
            item_codes = item_codes[items]
        if len(item_codes) == 0:
            raise ValueError("`item_codes` must hold one item or more, got none. Pass the items of the catalog.")
        self.num_items = len(item_codes)
        sizes = item_codes.new_tensor(self.codebook_sizes)
        bad = ((item_codes < 0) | (item_codes >= sizes)).any(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"`item_codes` must lie in codebooks of {self.codebook_sizes} codes, got {item_codes[row].tolist()} "
                f"for item {row}. Take codes and config from the same tokenizer."
            )
        order = lexicographic_order(item_codes, self.codebook_sizes)
        item_codes = item_codes[order]
        self.levels: list[TrieLevel] = []
        is_new = torch.zeros(self.num_items, dtype=torch.bool, device=item_codes.device)
        is_new[0] = True
        parent_of_leaf = torch.zeros_like(order)
        num_parents = 1
        for level, num_codes in enumerate(self.codebook_sizes):
            codes = item_codes[:, level].contiguous()
            is_new[1:] |= codes[1:] != codes[:-1]
            first = is_new.nonzero()[:, 0]
            self.levels.append(TrieLevel.build(num_codes, parent_of_leaf[first], codes[first], num_parents))
            parent_of_leaf = is_new.cumsum(0) - 1
            num_parents = len(first)
        if num_parents < self.num_items:
            leaf = int((~is_new).nonzero()[0])
            pair = order[leaf - 1 : leaf + 1] if items is None else items[order[leaf - 1 : leaf + 1]]
            first_item, second_item = sorted(pair.tolist())
            raise ValueError(
                f"`item_codes` must be unique, got {item_codes[leaf].tolist()} for both items {first_item} and "
                f"{second_item}. Add a collision token that tells them apart."
            )
        # Leaf (its rank in lexicographic order) -> item index.
        self.leaf_items = (order if items is None else items[order]).int()

    @property
    def nbytes(self) -> dict[str, int]:
        """Memory in bytes of the nodes and of the map from leaves to items."""
        return {"nodes": sum(level.nbytes for level in self.levels), "items": self.leaf_items.nbytes}

    def nodes_of(self, codes: torch.Tensor) -> torch.LongTensor:
        """
        Codes `[..., L]` -> the nodes on their path `[..., L]`, the last one the leaf; -1 where no item begins so.
        """
        codes = codes.long()
        inside = (codes >= 0) & (codes < codes.new_tensor(self.codebook_sizes))
        path = []
        exists = torch.ones_like(inside[..., 0])
        nodes = torch.zeros_like(codes[..., 0])
        for level, code, known in zip(self.levels, codes.unbind(-1), inside.unbind(-1), strict=True):
            nodes = level.child(nodes, code.masked_fill(~known, 0))
            exists = exists & known & (nodes >= 0)
            nodes = nodes.clamp(min=0)
            path.append(nodes.masked_fill(~exists, -1))
        return torch.stack(path, dim=-1)

    def lookup(self, codes: torch.Tensor) -> torch.LongTensor:
        """Codes `[..., L]` -> item indices `[...]`, -1 where no item has these codes."""
        leaves = self.nodes_of(codes)[..., -1]
        return torch.where(leaves >= 0, self.leaf_items[leaves.clamp(min=0)].long(), -1)

    def num_leaves(self, level: int, nodes: torch.LongTensor) -> torch.LongTensor:
        """Nodes of a level, of any shape -> the number of items below each."""
        start = nodes
        end = nodes + 1
        for below in self.levels[level + 1 :]:
            start = below.child_start[start].long()
            end = below.child_start[end].long()
        return end - start

    def descend(self, prefix: torch.LongTensor, length: int) -> torch.LongTensor:
        """
        Find the nodes of prefixes: codes `[B, >= length]` -> node ids `[B]` at level `length - 1` (zeros for length
        0).

        Raises:
            ValueError: if no item begins with one of them.
        """
        nodes = torch.zeros(len(prefix), dtype=torch.long, device=prefix.device)
        for level in range(length):
            nodes = self.levels[level].child(nodes, prefix[:, level])
            if (nodes < 0).any():
                row = int((nodes < 0).nonzero()[0])
                raise ValueError(
                    "`input_ids` must end in the first codes of an item of the catalog, got "
                    f"{prefix[row, :length].tolist()} in row {row}. Encode histories with the model's own tokenizer."
                )
        return nodes

    def best_children(
        self,
        level: int,
        nodes: torch.LongTensor,
        scores: torch.FloatTensor,
        log_probs: torch.FloatTensor,
        count: int,
        item_filter=None,
    ) -> tuple[torch.FloatTensor, torch.LongTensor, torch.LongTensor, torch.LongTensor]:
        """
        Take the best children of all beams of a request, among those that exist and that the filter allows.

        Args:
            level (`int`): Level of the children.
            nodes (`torch.LongTensor` of shape `(batch_size, K)`): The beams' nodes.
            scores (`torch.FloatTensor` of shape `(batch_size, K)`): Their scores.
            log_probs (`torch.FloatTensor` of shape `(batch_size, K, num_codes)`): Of the codes of `level`.
            count (`int`): Children of a request to take at most.
            item_filter (`ItemFilter`, *optional*): The items that each request allows or blocks.

        Returns:
            `(scores, parent, child, code)`, each `[batch_size, K']`, best first, K' <= `count`: as many as the
            request with most children has; the others are filled up with -inf. `parent` is the beam of each child.
        """
        trie_level = self.levels[level]
        batch_size, width = nodes.shape
        num_codes = trie_level.num_codes
        if trie_level.ranks is not None:  # a dense level: all codes of all beams
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
        else:  # a sparse level: the children that exist, request by request
            parents, children, codes = trie_level.children(nodes.flatten())
            places = torch.add(codes, parents, alpha=num_codes)
            table = log_probs.flatten().index_select(0, places).add_(scores.flatten().index_select(0, parents))[None]
            first = 0
            last = len(children) - 1
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
                parents = parents % width
                best = (best + first).clamp_(max=last)
            parent, child, code = parents.take(best), children.take(best), codes.take(best)
        if float(best_scores[:, -1].max()) == -torch.inf:  # no request fills the last places
            count = max(1, int((best_scores > -torch.inf).sum(dim=1).max()))
            return best_scores[:, :count], parent[:, :count], child[:, :count], code[:, :count]
        return best_scores, parent, child, code
