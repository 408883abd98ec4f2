# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Which spellings exist: a trie over the catalogue's codes in compressed sparse rows, and per-request item lists."""

from collections.abc import Sequence

import torch


class CatalogueTrie:
    """
    All spellings of a catalogue, sorted. A node of level l is a prefix of l + 1 codes; its id is its rank within its
    level, so no next-state table is needed, and the leaves under it are one contiguous range.

    Args:
        item_codes (`torch.LongTensor` of shape `(num_items, num_levels)`):
            Codes of each item; row = item index.
        codebook_sizes (`Sequence[int]`): Number of codes of each level.

    Raises:
        ValueError: when two items share a spelling, or a code is out of its codebook.
    """

    def __init__(self, item_codes: torch.LongTensor, codebook_sizes: Sequence[int]):
        self.num_items, self.num_levels = item_codes.shape
        self.codebook_sizes = list(codebook_sizes)
        item_codes = item_codes.long()
        sizes = item_codes.new_tensor(self.codebook_sizes)
        bad = ((item_codes < 0) | (item_codes >= sizes)).any(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"Item {row} is spelt {item_codes[row].tolist()}, outside codebooks of {self.codebook_sizes} codes. The "
                "catalogue and the config come from different tokenizers."
            )
        keys = self._keys(item_codes)
        self.sorted_keys, self.leaf_items = keys.sort()  # leaf rank -> item index
        repeated = (self.sorted_keys[1:] == self.sorted_keys[:-1]).nonzero()
        if len(repeated):
            first, second = sorted(self.leaf_items[repeated[0, 0] : repeated[0, 0] + 2].tolist())
            raise ValueError(
                f"Items {first} and {second} have the same spelling {item_codes[first].tolist()}: a semantic id must be "
                "unique. Add a last code that tells them apart."
            )
        self.item_leaves = torch.empty_like(self.leaf_items)  # item index -> leaf rank
        self.item_leaves[self.leaf_items] = torch.arange(self.num_items, device=item_codes.device)
        # Per level: the code of each node, where its children start among the next level's nodes, and its leaves.
        self.node_codes, self.child_start, self.leaf_start = [], [], []
        sorted_codes = item_codes[self.leaf_items]
        is_new = torch.zeros(self.num_items, dtype=torch.bool, device=item_codes.device)
        is_new[0] = True
        node_of_leaf = None
        for level in range(self.num_levels):
            is_new[1:] |= sorted_codes[1:, level] != sorted_codes[:-1, level]
            starts = is_new.nonzero()[:, 0]
            self.node_codes.append(sorted_codes[starts, level])
            self.leaf_start.append(torch.cat([starts, starts.new_tensor([self.num_items])]))
            node_of_leaf = is_new.cumsum(0) - 1
            if level:
                last = starts.new_tensor([len(starts)])
                self.child_start.append(torch.cat([node_of_leaf[self.leaf_start[level - 1][:-1]], last]))

    def _keys(self, codes: torch.LongTensor) -> torch.LongTensor:
        keys = codes[..., 0].clone()
        for level in range(1, self.num_levels):
            keys = keys * self.codebook_sizes[level] + codes[..., level]
        return keys

    def lookup(self, codes: torch.LongTensor) -> torch.LongTensor:
        """Codes `[..., L]` -> item indices `[...]`, -1 where no item is spelt so."""
        sizes = codes.new_tensor(self.codebook_sizes)
        inside = ((codes >= 0) & (codes < sizes)).all(dim=-1)
        keys = self._keys(codes).masked_fill(~inside, -1)
        leaf = torch.searchsorted(self.sorted_keys, keys).clamp(max=self.num_items - 1)
        return torch.where(self.sorted_keys[leaf] == keys, self.leaf_items[leaf], -1)

    def children(
        self, level: int, nodes: torch.LongTensor | None
    ) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
        """
        The children that exist, and no others.

        Args:
            level (`int`): Level of the children.
            nodes (`torch.LongTensor` of shape `(n,)`): Nodes of level `level - 1`; ignored at level 0 but for its length
                (every entry is then the root).

        Returns:
            `(parent, child, code)`, each `[m]`: index into `nodes`, node id at `level`, and its code; ordered by parent.
        """
        if level == 0:
            count = len(self.node_codes[0])
            child = torch.arange(count, device=nodes.device).repeat(len(nodes))
            parent = torch.arange(len(nodes), device=nodes.device).repeat_interleave(count)
            return parent, child, self.node_codes[0][child]
        starts = self.child_start[level - 1][nodes]
        counts = self.child_start[level - 1][nodes + 1] - starts
        parent = torch.arange(len(nodes), device=nodes.device).repeat_interleave(counts)
        within = torch.arange(len(parent), device=nodes.device) - (counts.cumsum(0) - counts)[parent]
        child = starts[parent] + within
        return parent, child, self.node_codes[level][child]

    def descend(self, prefix: torch.LongTensor, length: int) -> torch.LongTensor:
        """
        Nodes of given prefixes: codes `[B, >= length]` -> node ids `[B]` at level `length - 1` (zeros for length 0).

        Raises:
            ValueError: if no item begins so.
        """
        nodes = torch.zeros(len(prefix), dtype=torch.long, device=prefix.device)
        for level in range(length):
            parent, child, code = self.children(level, nodes)
            hit = code == prefix[parent, level]
            found = torch.full_like(nodes, -1)
            found[parent[hit]] = child[hit]
            if (found < 0).any():
                row = int((found < 0).nonzero()[0])
                raise ValueError(
                    f"Row {row} ends in the codes {prefix[row, :length].tolist()}, with which no item of the catalogue "
                    "begins. Was it spelt by another tokenizer?"
                )
            nodes = found
        return nodes


class ItemFilter:
    """
    Items allowed or blocked for each request, held inside the trie: a node is alive if it has an allowed leaf.

    Lists stay sorted leaf ranks, so a check is two binary searches and nothing has the catalogue's size.

    Args:
        trie (`CatalogueTrie`)
        allowed (`list` of B item-index tensors or lists, *optional*): Only these items, for each request.
        blocked (the same, *optional*): None of these items. Blocking wins over allowing.

    Raises:
        ValueError: if a list names an index outside the catalogue, or leaves a request no item at all.
    """

    def __init__(self, trie: CatalogueTrie, allowed=None, blocked=None):
        self.is_allow_list = allowed is not None
        lists = [trie.item_leaves[i].unique() for i in self._checked(trie, allowed if self.is_allow_list else blocked)]
        if allowed is not None and blocked is not None:
            pairs = zip(lists, self._checked(trie, blocked), strict=True)
            lists = [leaves[~torch.isin(leaves, trie.item_leaves[block])] for leaves, block in pairs]
        for row, leaves in enumerate(lists):
            if len(leaves) == (0 if self.is_allow_list else trie.num_items):
                raise ValueError(
                    f"Request {row} leaves no item to recommend: its allow-list is empty or everything in it is blocked."
                )
        width = max(1, max(len(leaves) for leaves in lists))
        # Padded with a rank beyond the last leaf, which no range contains.
        self.leaves = torch.full((len(lists), width), trie.num_items, device=trie.leaf_items.device)
        for row, leaves in enumerate(lists):
            self.leaves[row, : len(leaves)] = leaves

    @staticmethod
    def _checked(trie: CatalogueTrie, lists) -> list[torch.LongTensor]:
        lists = [torch.as_tensor(items, dtype=torch.long, device=trie.leaf_items.device) for items in lists]
        for row, items in enumerate(lists):
            if len(items) and (items.min() < 0 or items.max() >= trie.num_items):
                raise ValueError(
                    f"The item list of request {row} has indices from {int(items.min())} to {int(items.max())}, outside a "
                    f"catalogue of {trie.num_items} items."
                )
        return lists

    def alive(self, start: torch.LongTensor, end: torch.LongTensor) -> torch.BoolTensor:
        """Whether each request (row) may still reach a leaf in `[start, end)`; `[B, m]` each."""
        inside = torch.searchsorted(self.leaves, end) - torch.searchsorted(self.leaves, start)
        return (inside > 0) if self.is_allow_list else (inside < end - start)
