# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Lists of item indices: their checks, and the filter that holds allowed and blocked items inside the trie."""

from collections.abc import Sequence

import torch

from .trie_unigrf import CatalogTrie


def is_integer(items: torch.Tensor) -> bool:
    """Return whether a tensor can hold indices; a cast would also accept masks and fractions."""
    return not (items.is_floating_point() or items.is_complex() or items.dtype == torch.bool)


def check_items(
    name: str, items: torch.LongTensor | None, batch_size: int, num_items: int, lowest: int = -1
) -> torch.LongTensor:
    """
    Return item indices `[batch_size, N]` as int64.

    Args:
        name (`str`): Name of the argument, for messages.
        items (`torch.LongTensor` of shape `(batch_size, N)`, *optional*): Item indices. None is rejected.
        batch_size (`int`): Number of histories.
        num_items (`int`): Items of the catalog.
        lowest (`int`, defaults to -1): Lowest index: -1 allows "no item", 0 does not.

    Raises:
        ValueError: unless the indices are integers from `lowest` to `num_items - 1`, one row a history.
    """
    padding = ", -1 where there is none" if lowest < 0 else ""
    shape = None if items is None else tuple(items.shape)
    if shape is None or len(shape) != 2 or shape[0] != batch_size or not is_integer(items):
        got = "none" if shape is None else f"{items.dtype} of shape {shape}"
        raise ValueError(
            f"`{name}` must be integers of shape ({batch_size}, N), one row a history, got {got}. Pass item "
            f"indices{padding}."
        )
    if items.numel() and not lowest <= int(items.min()) <= int(items.max()) < num_items:
        raise ValueError(
            f"`{name}` must be indices into a catalog of {num_items} items, got {int(items.min())} to "
            f"{int(items.max())}. Pass item indices, e.g. `tokenizer.item_indices(ids)`{padding}."
        )
    return items.long()


def item_list(items: torch.Tensor | Sequence[int], device: torch.device) -> torch.LongTensor:
    """
    Return item indices as a tensor.

    Raises:
        ValueError: for a mask or fractions.
    """
    items = torch.as_tensor(items, device=device)
    if items.numel() and not is_integer(items):
        raise ValueError(f"Item indices must be integers, got {items.dtype}. Turn a mask into `mask.nonzero()[:, 0]`.")
    return items.long()


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
            raise ValueError(
                f"`{name}` must leave each request an item of the catalog that is not blocked, got {content} for "
                f"request {int(is_empty.nonzero()[0])}. Leave the request out, or change its lists."
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
        lists = [item_list(items, device).flatten() for items in lists]
        items = torch.cat(lists)
        if len(items) and (items.min() < 0 or items.max() >= len(item_codes)):
            is_outside = [bool(((row < 0) | (row >= len(item_codes))).any()) for row in lists]
            request = is_outside.index(True)
            raise ValueError(
                f"Item lists must hold indices into a catalog of {len(item_codes)} items, got "
                f"{int(lists[request].min())} to {int(lists[request].max())} for request {request}. Pass item "
                "indices, e.g. `tokenizer.item_indices(ids)`."
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
