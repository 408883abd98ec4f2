# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Checks of item indices."""

from collections.abc import Sequence

import torch


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
