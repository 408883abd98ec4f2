# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Checks of tensors of integers and of item indices."""

import warnings
from collections.abc import Sequence

import torch

# Types of the numbers that codes and embeddings may have.
NUMBERS = {
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}


class RequestError(ValueError):
    """An error of one request of a batch: `message` names it as `{request}`, and `request` is its row."""

    def __init__(self, message: str, request: int):
        super().__init__(message.replace("{request}", f"request {request}"))
        self.message = message
        self.request = request


class NoItemLeft(RequestError):
    """The lists of a request leave it no item."""


def is_integer(items) -> bool:
    """Return whether a value is a tensor that can hold indices; a cast would also accept masks and fractions."""
    if not isinstance(items, torch.Tensor):
        return False
    return not (items.is_floating_point() or items.is_complex() or items.dtype == torch.bool)


def describe(value) -> str:
    """Describe a value for messages: dtype and shape of a tensor, the type of others."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return "none" if value is None else f"a {type(value).__name__}"


def as_numbers(name: str, values: torch.Tensor | Sequence, advice: str) -> torch.Tensor:
    """
    Return a tensor, an array or nested lists of numbers as a tensor in memory.

    Raises:
        ValueError: for other values, such as strings, masks, complex numbers and lists of unequal lengths.
    """
    try:
        with warnings.catch_warnings():
            # Arrays may be read-only, for example mapped files: the model never writes to them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        tensor = None
        got = f"{describe(values)} ({error})"
    else:
        got = describe(tensor)
    if tensor is None or tensor.is_meta or tensor.dtype not in NUMBERS:
        raise ValueError(f"`{name}` must be a tensor of numbers in memory, got {got}. {advice}")
    return tensor


def check_integers(name: str, tensor: torch.LongTensor | None, shape: tuple[int, ...], advice: str) -> None:
    """Raise `ValueError` unless `tensor` holds integers of the shape."""
    if not is_integer(tensor) or tensor.shape != shape:
        raise ValueError(f"`{name}` must be integers of shape {shape}, got {describe(tensor)}. {advice}")


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
    if not is_integer(items) or items.ndim != 2 or len(items) != batch_size:
        raise ValueError(
            f"`{name}` must be integers of shape ({batch_size}, N), one row a history, got {describe(items)}. Pass "
            f"item indices{padding}, as a tensor."
        )
    if items.numel() and not lowest <= int(items.min()) <= int(items.max()) < num_items:
        raise ValueError(
            f"`{name}` must be indices into a catalog of {num_items} items, got {int(items.min())} to "
            f"{int(items.max())}. Pass item indices, e.g. `tokenizer.item_indices(ids)`{padding}."
        )
    return items.long()


def catalog_items(
    name: str, items: torch.Tensor | Sequence[int], num_items: int, device: torch.device
) -> torch.LongTensor:
    """
    Return indices `[n]` into a catalog as a tensor.

    Raises:
        ValueError: for the reasons of `item_list`, and items outside the catalog.
    """
    items = item_list(name, items, device)
    if items.numel() and (items.min() < 0 or items.max() >= num_items):
        raise ValueError(
            f"`{name}` must be indices into a catalog of {num_items} items, got {int(items.min())} to "
            f"{int(items.max())}. Pass item indices, e.g. `tokenizer.item_indices(ids)`."
        )
    return items


def item_list(name: str, items: torch.Tensor | Sequence[int], device: torch.device) -> torch.LongTensor:
    """
    Return a list of item indices as a tensor `[n]`.

    Raises:
        ValueError: for item ids, a single index, nested lists, a mask or fractions.
    """
    try:
        indices = torch.as_tensor(items if hasattr(items, "__array__") else list(items), device=device)
    except (TypeError, ValueError, RuntimeError):
        indices = None
    # A dict is no list of its keys.
    indices = None if isinstance(items, dict) else indices
    if indices is None or indices.ndim != 1 or (len(indices) and not is_integer(indices)):
        got = repr(items)[:80] if indices is None else describe(indices)
        raise ValueError(
            f"`{name}` must be a list of item indices, integers, got {got}. Pass `tokenizer.item_indices(ids)`, or "
            "`mask.nonzero()[:, 0]` for a mask."
        )
    return indices.long()


def item_lists(name: str, lists: Sequence, batch_size: int, device: torch.device) -> list[torch.LongTensor]:
    """
    Return the lists of item indices of B requests as tensors.

    Raises:
        ValueError: for another number of lists than requests, and the reasons of `item_list`.
    """
    if isinstance(lists, str | dict) or not hasattr(lists, "__len__") or len(lists) != batch_size:
        is_sized = hasattr(lists, "__len__") and not isinstance(lists, str)
        raise ValueError(
            f"`{name}` must hold one list for each of {batch_size} requests, got "
            f"{len(lists) if is_sized else describe(lists)}. Pass an empty list for none."
        )
    return [item_list(f"{name}[{row}]", items, device) for row, items in enumerate(lists)]
