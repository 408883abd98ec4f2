"""Token IDs to items, vectorized: the decoding methods of `SemanticIdTokenizer`."""

from collections.abc import Sequence

import numpy as np
import torch

from .item_catalog import ItemCatalog
from .vocabulary_layout import VocabularyLayout


def decode_rows(
    layout: VocabularyLayout, catalog: ItemCatalog, token_ids: np.ndarray | torch.Tensor | Sequence
) -> np.ndarray | list[np.ndarray]:
    """Decode token IDs to catalog rows; see `SemanticIdTokenizer.decode_indices`.

    Returns:
        int64 [n] for token IDs [T]; B such arrays for [B, T] or B lists.
    """
    flat, lengths, batched = _flatten(token_ids)
    if len(flat) and (flat.min() < 0 or flat.max() >= layout.size):
        wrong = int(np.flatnonzero((flat < 0) | (flat >= layout.size))[0])
        raise ValueError(
            f"`token_ids` must be in [0, {layout.size}), got {flat[wrong]} at {_place(wrong, lengths, batched)}. Drop "
            "label padding (-100) and tokens that were added to the vocabulary."
        )

    # Locate the codes and check that they form whole items.
    offsets = np.array(layout.code_offsets)
    num_levels = len(offsets)
    position = np.flatnonzero(flat >= offsets[0])
    codes = flat[position]
    level = np.searchsorted(offsets, codes, side="right") - 1
    history_index = np.repeat(np.arange(len(lengths)), lengths)[position]
    expected_level = np.arange(len(codes)) % num_levels
    broken = level != expected_level
    # The codes of an item are neighbors in one row.
    inner = expected_level > 0
    broken[1:] |= inner[1:] & ((np.diff(position) != 1) | (np.diff(history_index) != 0))
    num_whole = len(codes) // num_levels
    if broken.any() or len(codes) % num_levels:
        item = int(np.flatnonzero(broken)[0]) // num_levels if broken.any() else num_whole
        first = position[item * num_levels]
        raise ValueError(
            f"`token_ids` must hold whole items of {num_levels} codes in level order, got "
            f"{_item_text(layout, flat, first, lengths)} at {_place(first, lengths, batched)}. Pass all codes of each "
            "item."
        )

    # Look up the items.
    rows = catalog.lookup((codes - offsets[level]).reshape(num_whole, num_levels))
    unknown = np.flatnonzero(rows < 0)
    if len(unknown):
        first = position[int(unknown[0]) * num_levels]
        raise ValueError(
            f"`token_ids` must be semantic IDs of items in the catalog, got "
            f"{_item_text(layout, flat, first, lengths)} at {_place(first, lengths, batched)}, which encodes no item "
            f"({len(unknown)} such). Constrain generation to the catalog."
        )
    if not batched:
        return rows
    counts = np.bincount(history_index, minlength=len(lengths)) // num_levels
    return np.split(rows, np.cumsum(counts)[:-1]) if len(counts) else []


def _flatten(token_ids: np.ndarray | torch.Tensor | Sequence) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return all token IDs, int64 [sum of lengths], the length of each row, and whether there were rows."""
    if isinstance(token_ids, torch.Tensor):
        token_ids = token_ids.detach().cpu().numpy()
    is_list = isinstance(token_ids, list | tuple)
    if is_list and token_ids and isinstance(token_ids[0], list | tuple | np.ndarray | torch.Tensor):
        rows = [np.asarray(row) for row in token_ids]
        wrong = [row for row in rows if row.ndim != 1 or (row.size and row.dtype.kind not in "iu")]
        if wrong:
            raise ValueError(
                f"`token_ids` must be rows of integers [T], got {wrong[0].dtype} {wrong[0].shape}. Pass integer token "
                "IDs."
            )
        return np.concatenate(rows).astype(np.int64), np.array([len(row) for row in rows]), True
    array = np.asarray(token_ids)
    if array.ndim not in (1, 2) or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"`token_ids` must be integers [T] or [B, T], got {array.dtype} {array.shape}. Pass integer token IDs."
        )
    flat = array.reshape(-1).astype(np.int64)
    if array.ndim == 1:
        return flat, np.array([len(flat)]), False
    return flat, np.full(len(array), array.shape[1]), True


def _item_text(layout: VocabularyLayout, flat: np.ndarray, start: int, lengths: np.ndarray) -> str:
    """Return the tokens of one item for an error message, without tokens of the next row."""
    tokens = list(layout.vocabulary())
    ends = np.cumsum(lengths)
    row_end = ends[np.searchsorted(ends, start, side="right")]
    return repr(" ".join(tokens[i] for i in flat[start : min(row_end, start + len(layout.codebook_sizes))]))


def _place(position: int, lengths: np.ndarray, batched: bool) -> str:
    """Return a position in the flat token IDs as words for an error message."""
    if not batched:
        return f"position {position}"
    row = int(np.searchsorted(np.cumsum(lengths), position, side="right"))
    return f"position {position - int(lengths[:row].sum())} of row {row}"
