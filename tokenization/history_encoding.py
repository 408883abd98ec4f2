"""Item histories to token IDs, vectorized: the encoding methods of `SemanticIdTokenizer`."""

from collections.abc import MutableMapping, Sequence
from itertools import chain

import numpy as np
import torch

from .cell_values import as_text, as_values, whole_seconds
from .item_catalog import ItemCatalog
from .vocabulary_layout import PAD, UNKNOWN_TIME, VocabularyLayout


def known_rows(catalog: ItemCatalog, item_ids: Sequence, unknown: str) -> tuple[np.ndarray, np.ndarray]:
    """Look up the catalog rows of item IDs.

    Args:
        catalog: Catalog with N items.
        item_ids: n IDs.
        unknown: "error" rejects unknown IDs, "skip" marks them.

    Returns:
        The rows, int64 [n], -1 for an unknown ID, and a mask of the known IDs, bool [n].

    Raises:
        ValueError: An unknown ID with `unknown="error"`, or another value of `unknown`.
    """
    if unknown not in ("error", "skip"):
        raise ValueError(f"`unknown` must be 'error' or 'skip', got {unknown!r}. Pass 'skip' to drop unknown items.")
    rows = catalog.rows(item_ids)
    missing = np.flatnonzero(rows < 0)
    if len(missing) and unknown == "error":
        names = list(dict.fromkeys(str(item_ids[i]) for i in missing.tolist()))
        raise ValueError(
            f"Item IDs must be in the catalog ({len(catalog.item_ids)} items), got {len(names)} unknown, for instance "
            f"{names[:5]}. Add them with `add_items`, or pass `unknown='skip'` to drop them."
        )
    return rows, rows >= 0


def check_rows(catalog: ItemCatalog, rows: np.ndarray | torch.Tensor | Sequence) -> np.ndarray:
    """Return catalog rows as an integer array [n].

    Raises:
        ValueError: A wrong shape or dtype, or a row out of range.
    """
    rows = _as_array(rows)
    num_items = len(catalog.codes)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ValueError(
            f"Catalog rows must be integers of shape [n], got {rows.dtype} {rows.shape}. Pass the result of "
            "`item_indices`."
        )
    if _any_outside(rows, num_items):
        raise ValueError(
            f"Catalog rows must be in [0, {num_items}), got {rows.min()} to {rows.max()}. Pass rows of this catalog."
        )
    return rows


def encode_indices(
    layout: VocabularyLayout, catalog: ItemCatalog, item_index: np.ndarray, behavior_index: np.ndarray
) -> np.ndarray:
    """Encode one history; see `SemanticIdTokenizer.encode_indices`."""
    rows = check_rows(catalog, item_index)
    behavior_index = _as_array(behavior_index)
    if behavior_index.shape != rows.shape or behavior_index.dtype.kind not in "iu":
        raise ValueError(
            f"`behavior_index` must be one integer per item, {rows.shape}, got {behavior_index.dtype} "
            f"{behavior_index.shape}. Pass an index into `behaviors` for each item."
        )
    num_behaviors = len(layout.behaviors)
    if _any_outside(behavior_index, num_behaviors):
        raise ValueError(
            f"`behavior_index` must be in [0, {num_behaviors}), got {behavior_index.min()} to {behavior_index.max()}. "
            "Pass indices into `behaviors`."
        )
    return layout.encode(catalog.codes[rows], behavior_index)


def encode_batch(
    layout: VocabularyLayout,
    catalog: ItemCatalog,
    items: Sequence,
    behaviors: Sequence | None,
    max_items: int | None,
    unknown: str,
    timestamps: Sequence | None = None,
) -> tuple[dict[str, np.ndarray], bool]:
    """Encode a history or a batch of histories; see `SemanticIdTokenizer.encode_history`.

    Returns:
        int64 columns [B, T], padded on the left, and whether `items` was a batch.
    """
    # Flatten the histories and look up items, behaviors and times.
    if max_items is not None and max_items < 1:
        raise ValueError(f"`max_items` must be at least 1 or None, got {max_items}. Pass None to keep all items.")
    histories, batched = _as_histories(items)
    lengths = np.array([len(history) for history in histories])
    rows, is_known = known_rows(catalog, list(chain.from_iterable(histories)), unknown)
    behavior_index = _behavior_index(layout, behaviors, lengths, batched)
    times = None if timestamps is None else _times(timestamps, lengths, batched)

    # Drop the unknown items.
    history_index = np.repeat(np.arange(len(lengths)), lengths)[is_known]
    lengths = np.bincount(history_index, minlength=len(lengths))
    if not lengths.all():
        raise ValueError(
            f"Each history must have at least one known item, got none in row {np.argmin(lengths)}: all of its item "
            "IDs are unknown. Add the items with `add_items`, or drop the history."
        )
    codes = catalog.codes[rows[is_known]]
    behavior_index = behavior_index[is_known]

    # Encode the most recent items and pad on the left.
    num_kept = lengths if max_items is None else np.minimum(lengths, max_items)
    parts = [slice(end - count, end) for end, count in zip(np.cumsum(lengths), num_kept, strict=True)]
    tokens = [layout.encode(codes[part], behavior_index[part]) for part in parts]
    columns = {
        "input_ids": _pad_left(tokens, PAD),
        "attention_mask": _pad_left([np.ones_like(row) for row in tokens], 0),
    }
    if times is not None:
        times = times[is_known]
        columns["timestamps"] = _pad_left([layout.encode_times(times[part]) for part in parts], UNKNOWN_TIME)
    return columns, batched


def pad_timestamps(columns: MutableMapping, padding_side: str) -> MutableMapping:
    """Pad the column `timestamps` of one history, if it exists, to the length of `input_ids` with -1.

    Args:
        columns: Lists by name; `input_ids` is padded already. Changed in place.
        padding_side: "left" or "right".

    Returns:
        `columns`.
    """
    if "timestamps" in columns:
        times = list(columns["timestamps"])
        padding = [UNKNOWN_TIME] * (len(columns["input_ids"]) - len(times))
        columns["timestamps"] = [*padding, *times] if padding_side == "left" else [*times, *padding]
    return columns


def _as_array(values: np.ndarray | torch.Tensor | Sequence) -> np.ndarray:
    """Convert values to an array; an empty array becomes int64, because numpy reads an empty list as floats."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    return array if array.size else array.astype(np.int64)


def _any_outside(values: np.ndarray, end: int) -> bool:
    """Return whether any integer is outside [0, end), in one pass: an unsigned negative number exceeds any end."""
    return len(values) > 0 and int(values.astype(np.int64, copy=False).view(np.uint64).max()) >= end


def _as_histories(items: Sequence) -> tuple[list[list], bool]:
    """Return the histories as lists of item IDs, and whether `items` was a batch.

    Raises:
        ValueError: An empty batch or history, or a string in place of a list.
    """
    items = as_values("items", items)
    if len(items) == 0:
        raise ValueError(
            "`items` must have at least one item in a history, got an empty history. For a new user, call "
            "`model.recommend` with <bos> alone (`encode_indices` of no items)."
        )
    # Arrays and tensors are histories; a 0-d array is an ID.
    batched = isinstance(items[0], list | tuple) or getattr(items[0], "ndim", 0) > 0
    histories = [as_values("items", history) for history in items] if batched else [items]
    if not all(histories):
        empty = [len(history) for history in histories].index(0)
        raise ValueError(
            f"`items` must have at least one item in a history, got none in row {empty}. Drop the empty history."
        )
    return histories, batched


def _flatten_per_item(name: str, values: Sequence, lengths: np.ndarray, batched: bool) -> list:
    """Concatenate the values of all histories.

    Raises:
        ValueError: A history with different numbers of values and items.
    """
    rows = [as_values(name, row) for row in values] if batched else [as_values(name, values)]
    num_values = [len(row) for row in rows]
    if num_values != lengths.tolist():
        raise ValueError(
            f"`{name}` must have as many values as items, {lengths.tolist()[:5]} in the first histories, got "
            f"{num_values[:5]} ({len(lengths)} histories of items, {len(num_values)} of {name}). Pass one value per "
            "item."
        )
    return list(chain.from_iterable(rows))


def _behavior_index(
    layout: VocabularyLayout, behaviors: Sequence | None, lengths: np.ndarray, batched: bool
) -> np.ndarray:
    """Look up the behaviors of all histories, concatenated: int64 [sum of lengths]."""
    if behaviors is None:
        if len(layout.behaviors) > 1:
            raise ValueError(
                f"`behaviors` must have a behavior for each item, one of {layout.behaviors}, got None. Pass one name "
                "per item."
            )
        return np.zeros(lengths.sum(), dtype=np.int64)
    index_of: dict[str | None, int] = {name: i for i, name in enumerate(layout.behaviors)}
    names = [as_text(name) for name in _flatten_per_item("behaviors", behaviors, lengths, batched)]
    unknown = list(dict.fromkeys(str(name) for name in names if name not in index_of))
    if unknown:
        raise ValueError(
            f"`behaviors` must be among {layout.behaviors}, got {unknown[:5]}. Rename or drop these behaviors."
        )
    return np.array([index_of[name] for name in names], dtype=np.int64)


def _times(timestamps: Sequence, lengths: np.ndarray, batched: bool) -> np.ndarray:
    """Convert the times of all histories to seconds, concatenated, -1 for an unknown time: int64 [sum of lengths]."""
    # Before lists are made: numpy would turn dates into integers.
    rows = [whole_seconds("timestamps", row) for row in (timestamps if batched else [timestamps])]
    return np.array(_flatten_per_item("timestamps", rows, lengths, True), dtype=np.int64)


def _pad_left(rows: list[np.ndarray], value: int) -> np.ndarray:
    """Stack rows of different lengths, padded on the left with `value`: B arrays -> int64 [B, T]."""
    width = max(len(row) for row in rows)
    padded = np.full((len(rows), width), value, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, width - len(row) :] = row
    return padded
