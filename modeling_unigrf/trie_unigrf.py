# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The trie of the code sequences that encode the items of a catalog, and the filter of allowed and blocked items."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .item_lists_unigrf import NoItemLeft, RequestError, item_list

# A level's table of ranks may always have this many entries.
DENSE_ENTRIES = 2**17


@dataclass
class TrieLevel:
    """
    The nodes of a level.

    A node's id is its rank among the level's prefixes in lexicographic order. The children of a node are neighbors, so
    the trie needs no table of next states.

    Args:
        num_codes (`int`): Size of the level's codebook.
        num_nodes (`int`): Number of nodes.
        max_children (`int`): Most children that a parent has.
        child_start (`torch.IntTensor` of shape `(num_parents + 1,)`): First child of each parent, then `num_nodes`.
        codes (`torch.Tensor` of shape `(num_nodes,)`, *optional*): Code of each node, in the smallest integer type.
            None: the level has `ranks`.
        ranks (`torch.FloatTensor` of shape `(num_parents, num_codes)`, *optional*): Number of the child with each
            code, among its parent's children; -inf: no child. Only small or well-filled levels have `ranks`, in
            practice the first two. A score adds the minimum of rank and zero, hence floats. None: the level has
            `codes`.
    """

    num_codes: int
    num_nodes: int
    max_children: int
    child_start: torch.IntTensor
    codes: torch.Tensor | None = None
    ranks: torch.Tensor | None = None

    @classmethod
    def build(cls, num_codes: int, child_start: torch.Tensor, codes: torch.Tensor) -> "TrieLevel":
        """Build a level from `child_start` and the code `[num_nodes]` of every node, in order."""
        counts = child_start.diff()
        num_nodes = len(codes)
        level = cls(num_codes, num_nodes, int(counts.max()) if num_nodes else 0, child_start.int())
        # float32 counts exactly up to 2^24.
        if num_codes > 2**24 or len(counts) * num_codes > max(DENSE_ENTRIES, num_nodes):
            level.codes = codes.to(
                torch.uint8 if num_codes <= 2**8 else torch.int16 if num_codes <= 2**15 else torch.int32
            )
            return level
        level.ranks = torch.full((len(counts), num_codes), -torch.inf, dtype=torch.float32, device=codes.device)
        parents = torch.repeat_interleave(counts, output_size=num_nodes)
        rank = torch.arange(num_nodes, device=codes.device) - child_start[parents]
        level.ranks[parents, codes.long()] = rank.float()
        return level

    @classmethod
    def empty(cls, num_codes: int, num_parents: int, device: torch.device) -> "TrieLevel":
        """Build a level without nodes."""
        child_start = torch.zeros(num_parents + 1, dtype=torch.long, device=device)
        return cls.build(num_codes, child_start, child_start[:0])

    def inserted(
        self,
        num_codes: int,
        new_parents: torch.LongTensor,
        parents: torch.LongTensor,
        places: torch.LongTensor,
        codes: torch.Tensor,
    ) -> "TrieLevel":
        """
        Return this level with n new nodes.

        Args:
            num_codes (`int`): Size of the level's codebook, which may have grown.
            new_parents (`torch.LongTensor` of shape `(p,)`): Place of each new parent among the old ones, ascending.
            parents (`torch.LongTensor` of shape `(n,)`): Parent of each new node, among old and new ones.
            places (`torch.LongTensor` of shape `(n,)`): Place of each new node among the old ones, ascending.
            codes (`torch.Tensor` of shape `(n,)`): Code of each new node.
        """
        child_start = insert(self.child_start, new_parents, self.child_start[new_parents]).long()
        child_start[1:] += parents.bincount(minlength=len(child_start) - 1).cumsum(0)
        return TrieLevel.build(num_codes, child_start, insert(self.node_codes.int(), places, codes.int()))

    @property
    def node_codes(self) -> torch.Tensor:
        """Code of each node, integers `[num_nodes]`."""
        return (self.ranks >= 0).nonzero()[:, 1] if self.codes is None else self.codes

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
        place, exists = self.find(start, self.child_start[parents + 1].long(), codes)
        return torch.where(exists, place, -1)

    def find(
        self, start: torch.LongTensor, end: torch.LongTensor, codes: torch.Tensor
    ) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """Find the first nodes of `[start, end)` with at least `codes`, else `end`; and whether they equal `codes`."""
        if not self.num_nodes:
            return start, torch.zeros_like(start, dtype=torch.bool)
        # Search all lists of children at once: each is sorted by code.
        node_codes = self.node_codes
        last = self.num_nodes - 1
        low = start
        high = end
        for _ in range(self.max_children.bit_length()):
            middle = (low + high) // 2
            smaller = (middle < high) & (node_codes[middle.clamp(max=last)] < codes)
            low = torch.where(smaller, middle + 1, low)
            high = torch.where(smaller, high, middle)
        return low, (low < end) & (node_codes[low.clamp(max=last)] == codes)

    def children(self, parents: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
        """
        List the children that exist.

        Args:
            parents (`torch.LongTensor` of shape `(n,)`): Nodes of the level above.

        Returns:
            `(parent, child, code)`, each `[m]`: index into `parents`, node, and its code; sorted by parent and code.
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


def check_scores(name: str, is_bad: torch.Tensor | bool) -> None:
    """Raise `ValueError` if `is_bad`, a single boolean: NaN or infinity would take the place of the best item."""
    if is_bad:
        raise ValueError(
            f"`{name}` must be finite, got NaN or infinity. Check the model's weights and the logits processors, or "
            "load the model in bfloat16 or float32 if float16 overflows."
        )


def top(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Compute `scores.topk(count)` of `[B, n]`.

    A single long row takes half of topk's time. The `count`-th best maximum of its blocks of 32 is a bound that few
    scores reach.
    """
    if len(scores) > 1 or scores.shape[1] % 32 or scores.shape[1] < 128 * count:
        return scores.topk(count, dim=1)
    bound = scores.view(-1, 32).amax(dim=1).topk(count, sorted=False).values.amin()
    # NaN counts as greatest, as in topk.
    places = (~(scores[0] < bound)).nonzero()[:, 0]
    best, order = scores[0].index_select(0, places).topk(count)
    return best[None], places.index_select(0, order)[None]


def insert(tensor: torch.Tensor, places: torch.LongTensor, values: torch.Tensor) -> torch.Tensor:
    """Insert values `[k]` before the ascending places `[k]` of a tensor `[n]`."""
    if not len(tensor):
        return values
    result = tensor.new_empty(len(tensor) + len(values))
    places = places + torch.arange(len(places), device=places.device)
    is_old = torch.ones_like(result, dtype=torch.bool)
    is_old[places] = False
    result.masked_scatter_(is_old, tensor)
    result[places] = values
    return result


def lexicographic_order(item_codes: torch.Tensor, codebook_sizes: Sequence[int]) -> torch.LongTensor:
    """Return the permutation `[num_items]` that sorts the rows of codes `[num_items, L]`."""
    keys = torch.zeros(len(item_codes), dtype=torch.long, device=item_codes.device)
    bound = 1
    for level, size in enumerate(codebook_sizes):
        # Too many sequences for an integer: number those that occur.
        if bound * size >= 2**63:
            keys = keys.unique(return_inverse=True)[1]
            bound = len(item_codes)
        keys = keys * size + item_codes[:, level]
        bound *= size
    return keys.argsort()


class CatalogTrie:
    """
    The semantic IDs of a catalog, sorted: levels of nodes, and under each node a contiguous range of leaves.

    Args:
        item_codes (`torch.IntTensor` of shape `(num_items, num_levels)`): Codes of each item; row i is item i.
        codebook_sizes (`Sequence[int]`): Number of codes of each level.
        items (`torch.LongTensor` of shape `(n,)`, *optional*): Hold these items only, with unchanged indices. None:
            all items.
        earlier (`CatalogTrie`, *optional*): Hold the items of this trie, too; only the others are sorted. It has the
            same codebooks, but for the size of the last one, and none of `items`. None: no others.

    Raises:
        ValueError: if two items share a semantic ID, a code is outside its codebook, or there is no item.
    """

    def __init__(
        self,
        item_codes: torch.Tensor,
        codebook_sizes: Sequence[int],
        items: torch.LongTensor | None = None,
        earlier: "CatalogTrie | None" = None,
    ):
        # Checks.
        self.codebook_sizes = list(codebook_sizes)
        if items is not None:
            items = items.unique()
            item_codes = item_codes[items]
        if len(item_codes) == 0:
            raise ValueError("`item_codes` must hold one item or more, got none. Pass the items of the catalog.")
        sizes = item_codes.new_tensor(self.codebook_sizes)
        bad = ((item_codes < 0) | (item_codes >= sizes)).any(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"`item_codes` must lie in codebooks of {self.codebook_sizes} codes, got {item_codes[row].tolist()} "
                f"for item {row if items is None else int(items[row])}. Take codes and config from the same tokenizer."
            )

        # Insert the items into the earlier levels, or into empty ones.
        order = lexicographic_order(item_codes, self.codebook_sizes)
        item_codes = item_codes.index_select(0, order)
        items = (order if items is None else items[order]).int()
        if earlier is None:
            levels = [
                TrieLevel.empty(size, level == 0, order.device) for level, size in enumerate(self.codebook_sizes)
            ]
            earlier_items = items[:0]
        else:
            levels = earlier.levels
            earlier_items = earlier.leaf_items
        # Each item's node: its number here, its place among the earlier nodes, and whether it is one of them.
        number = torch.zeros_like(order)
        place = torch.zeros_like(order)
        is_known = torch.ones_like(order, dtype=torch.bool)
        # Whether an item is the first with its prefix.
        is_first = torch.zeros_like(is_known)
        is_first[0] = True
        new_parents = place[:0]
        self.levels: list[TrieLevel] = []
        for num_codes, level, codes in zip(self.codebook_sizes, levels, item_codes.T.contiguous(), strict=True):
            start = level.child_start.index_select(0, place).long()
            end = level.child_start.index_select(0, place + is_known).long()
            place, is_known = level.find(start, end, codes)
            is_first[1:] |= codes[1:] != codes[:-1]
            is_new = is_first & ~is_known
            new = is_new.nonzero()[:, 0]
            parents = number.index_select(0, new)
            new_places = place.index_select(0, new)
            self.levels.append(level.inserted(num_codes, new_parents, parents, new_places, codes.index_select(0, new)))
            number = place + is_new.cumsum(0) - (~is_known).long()
            new_parents = new_places
        if len(new) < len(items):
            leaf = int((~is_new).nonzero()[0])
            other = earlier_items[place[leaf]] if is_known[leaf] else items[leaf - 1]
            first_item, second_item = sorted([int(other), int(items[leaf])])
            raise ValueError(
                f"`item_codes` must be unique, got {item_codes[leaf].tolist()} for both items {first_item} and "
                f"{second_item}. Add a collision token that tells them apart."
            )
        # Leaf (its rank in lexicographic order) -> item index.
        self.leaf_items = insert(earlier_items, place, items)
        self.num_items = len(self.leaf_items)

    @property
    def nbytes(self) -> dict[str, int]:
        """Memory in bytes of the nodes and of the map from leaves to items."""
        return {"nodes": sum(level.nbytes for level in self.levels), "items": self.leaf_items.nbytes}

    def nodes_of(self, codes: torch.Tensor) -> torch.LongTensor:
        """Find the nodes `[..., L]` on the paths of codes `[..., L]`, down to the leaf; -1 if no item begins so."""
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
        """Find the item indices `[...]` of codes `[..., L]`; -1 if no item has these codes."""
        leaves = self.nodes_of(codes)[..., -1]
        return torch.where(leaves >= 0, self.leaf_items[leaves.clamp(min=0)].long(), -1)

    def num_leaves(self, level: int, nodes: torch.LongTensor) -> torch.LongTensor:
        """Count the items below each node of a level, of any shape."""
        start = nodes
        end = nodes + 1
        for below in self.levels[level + 1 :]:
            start = below.child_start[start].long()
            end = below.child_start[end].long()
        return end - start

    def descend(self, prefix: torch.LongTensor, length: int) -> torch.LongTensor:
        """
        Find the nodes `[B]` at level `length - 1` of prefixes `[B, >= length]`; zeros for length 0.

        Raises:
            ValueError: if no item begins with a prefix.
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
        item_filter: "ItemFilter | None" = None,
    ) -> tuple[torch.FloatTensor, torch.LongTensor, torch.LongTensor, torch.LongTensor]:
        """
        Take the best children of all beams of a request, among those that exist and that the filter allows.

        Args:
            level (`int`): Level of the children.
            nodes (`torch.LongTensor` of shape `(batch_size, K)`): The beams' nodes.
            scores (`torch.FloatTensor` of shape `(batch_size, K)`): The beams' scores.
            log_probs (`torch.FloatTensor` of shape `(batch_size, K, num_codes)`): Those of the level's codes.
            count (`int`): Most children of a request to take.
            item_filter (`ItemFilter`, *optional*): The items that each request allows or blocks. None: allow all.

        Returns:
            `(scores, parent, child, code)`, each `[batch_size, K']`, best first. `parent` is the beam of each child.
            K' is `count`, or fewer if no request has as many children. Rows with fewer children end in -inf.

        Raises:
            ValueError: for the log-probability NaN or +inf of a child.
        """
        trie_level = self.levels[level]
        batch_size, width = nodes.shape
        num_codes = trie_level.num_codes
        # A dense level: all codes of all beams.
        if trie_level.ranks is not None:
            ranks = trie_level.ranks.index_select(0, nodes.flatten()).view(batch_size, width, num_codes)
            table = torch.clamp(ranks, max=0).add_(log_probs).add_(scores[..., None]).flatten(1)
            if item_filter is not None and item_filter.concerns(level):
                child = trie_level.child_start[nodes][..., None] + ranks.clamp(min=0).long()
                table.masked_fill_(~item_filter.alive(level, child.flatten(1)), -torch.inf)
            best_scores, best = top(table, min(count, table.shape[1]))
            parent = best // num_codes
            code = best % num_codes
            child = (
                trie_level.child_start[nodes.gather(1, parent)] + ranks.flatten(1).gather(1, best).clamp(min=0).long()
            )
        # A sparse level: the children that exist, request by request.
        else:
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
            parent = parents.take(best)
            child = children.take(best)
            code = codes.take(best)
        # Scores of NaN or +inf come first. Drop the last places, which no request fills.
        highest, last = torch.stack([best_scores[:, 0].max(), best_scores[:, -1].max()]).tolist()
        check_scores("log_probs", not highest < torch.inf)
        if last == -torch.inf:
            count = max(1, int((best_scores > -torch.inf).sum(dim=1).max()))
            return best_scores[:, :count], parent[:, :count], child[:, :count], code[:, :count]
        return best_scores, parent, child, code


class ItemFilter:
    """
    Items allowed or blocked for each request, held inside the trie: no beam enters a node without an allowed item.

    For each level, the filter stores the nodes that lead to an allowed item, or those that lead to blocked items
    only. A check is a binary search among these nodes. No tensor has the catalog's size.

    Args:
        trie (`CatalogTrie`): The items that exist. A request cannot show items that the trie lacks.
        item_codes (`torch.IntTensor` of shape `(num_items, L)`): Codes of all items.
        allowed (`list` of B item-index tensors or lists, *optional*): The only items that each request may show.
            None: all items.
        blocked (`list` of B item-index tensors or lists, *optional*): Items that each request may not show. None: no
            item. Blocking wins over allowing.

    Raises:
        ValueError: if an index is outside the catalog, or a request has no item left.
    """

    def __init__(self, trie: CatalogTrie, item_codes: torch.Tensor, allowed=None, blocked=None):
        self.is_allow_list = allowed is not None
        batch_size = len(allowed if self.is_allow_list else blocked)
        request, path = self._paths(trie, item_codes, allowed if self.is_allow_list else blocked)
        if self.is_allow_list and blocked is not None:
            blocked_request, blocked_path = self._paths(trie, item_codes, blocked)
            leaf = request * trie.num_items + path[:, -1]
            is_left = ~torch.isin(leaf, blocked_request * trie.num_items + blocked_path[:, -1])
            request = request[is_left]
            path = path[is_left]
        is_empty = request.bincount(minlength=batch_size) == (0 if self.is_allow_list else trie.num_items)
        if is_empty.any():
            name, content = ("allowed_items", "none") if self.is_allow_list else ("blocked_items", "all of them")
            raise NoItemLeft(
                f"`{name}` must leave each request an item of the catalog that is not blocked, got {content} for "
                "{request}. Leave the request out, or change its lists.",
                int(is_empty.nonzero()[0]),
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
        """Return requests `[n]` and nodes `[n, L]` of the n distinct listed items that the trie has."""
        device = item_codes.device
        lists = [item_list(f"items[{row}]", items, device) for row, items in enumerate(lists)]
        items = torch.cat(lists)
        if len(items) and (items.min() < 0 or items.max() >= len(item_codes)):
            is_outside = [bool(((row < 0) | (row >= len(item_codes))).any()) for row in lists]
            request = is_outside.index(True)
            raise RequestError(
                f"Item lists must hold indices into a catalog of {len(item_codes)} items, got "
                f"{int(lists[request].min())} to {int(lists[request].max())} for {{request}}. Pass item "
                "indices, e.g. `tokenizer.item_indices(ids)`.",
                request,
            )
        lengths = torch.tensor([len(row) for row in lists], device=device)
        request = torch.arange(len(lists), device=device).repeat_interleave(lengths)
        pairs = (request * len(item_codes) + items).unique()
        request = pairs // len(item_codes)
        path = trie.nodes_of(item_codes[pairs % len(item_codes)])
        exists = path[:, -1] >= 0
        return request[exists], path[exists]

    def concerns(self, level: int) -> bool:
        """Return whether the filter closes any node of a level to any request."""
        return self.is_allow_list or len(self.keys[level]) > 0

    def alive(self, level: int, nodes: torch.LongTensor) -> torch.BoolTensor:
        """Return whether each request may enter nodes `[B, m]` of a level that the filter concerns, `[B, m]`."""
        keys = self.keys[level]
        wanted = nodes + self.num_nodes[level] * torch.arange(len(nodes), device=nodes.device)[:, None]
        is_stored = keys[torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)] == wanted
        return is_stored if self.is_allow_list else ~is_stored
