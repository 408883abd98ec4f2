"""Histories of items to token arrays and back, vectorised: the work behind `SemanticIdTokenizer`'s methods."""

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch

from .item_catalog import ItemCatalog
from .vocabulary_layout import PAD, UNKNOWN_TIME, VocabularyLayout


def known_rows(catalog: ItemCatalog, item_ids: Sequence, unknown: str) -> tuple[np.ndarray, np.ndarray]:
    """Catalog rows int64 [n], -1 where unknown, and which are known bool [n].

    `ValueError` if one is not and `unknown` is not "skip".
    """
    if unknown not in ("error", "skip"):
        raise ValueError(f"expected unknown='error' or 'skip', found {unknown!r}")
    rows = catalog.rows(item_ids)
    missing = np.flatnonzero(rows < 0)
    if len(missing) and unknown == "error":
        names = list(dict.fromkeys(str(item_ids[i]) for i in missing.tolist()))
        raise ValueError(
            f"expected item ids of the catalog ({len(catalog.item_ids)} items), found {len(names)} unknown, for "
            f"instance {names[:5]}: add them with `add_items`, or pass unknown='skip' to drop them"
        )
    return rows, rows >= 0


def history_batch(
    layout: VocabularyLayout,
    catalog: ItemCatalog,
    items: Sequence,
    behaviors: Sequence | None,
    max_items: int | None,
    unknown: str,
    timestamps: Sequence | None = None,
) -> tuple[dict[str, np.ndarray], bool]:
    """`encode_history` up to its output format: int64 columns [B, T], and whether it was a batch."""
    if max_items is not None and max_items < 1:
        raise ValueError(f"expected max_items >= 1 or None, found {max_items}")
    items = _as_list(items)
    if len(items) == 0:
        raise ValueError(
            "expected at least one item in a history, found an empty one: for a new user ask `model.recommend` with <bos> alone "
            "(`encode_indices` of no items)"
        )
    batched = (
        isinstance(items[0], list | tuple) or getattr(items[0], "ndim", 0) > 0
    )  # an array or tensor, but no number
    histories = [_as_list(one) for one in items] if batched else [items]
    lengths = np.array([len(one) for one in histories])
    if not lengths.all():
        raise ValueError(f"expected at least one item in a history, found none in row {np.argmin(lengths)}")
    ids = list(chain.from_iterable(histories))
    rows, known = known_rows(catalog, ids, unknown)
    actions = _behavior_indices(layout, behaviors, lengths, batched)
    times = None if timestamps is None else _times(timestamps, lengths, batched)[known]
    owner = np.repeat(np.arange(len(lengths)), lengths)[known]
    lengths = np.bincount(owner, minlength=len(lengths))  # from here on without the skipped items
    if not lengths.all():
        raise ValueError(
            f"expected at least one known item in a history, found none in row {np.argmin(lengths)}: all of its item "
            "ids are unknown to the catalog"
        )
    rows, actions = rows[known], actions[known]
    ends = np.cumsum(lengths)
    kept = lengths if max_items is None else np.minimum(lengths, max_items)
    width = 1 + int(kept.max()) * (len(layout.codebook_sizes) + 1)
    input_ids = np.full((len(kept), width), PAD, dtype=np.int64)
    columns = {"input_ids": input_ids, "attention_mask": np.zeros_like(input_ids)}
    if times is not None:
        columns["timestamps"] = np.full_like(input_ids, UNKNOWN_TIME)
    for i, (end, count) in enumerate(zip(ends, kept, strict=True)):
        part = slice(end - count, end)
        one = layout.encode(catalog.codes[rows[part]], actions[part])
        columns["input_ids"][i, width - len(one) :] = one
        columns["attention_mask"][i, width - len(one) :] = 1
        if times is not None:
            columns["timestamps"][i, width - len(one) :] = layout.encode_times(times[part])
    return columns, batched


def decode_rows(
    layout: VocabularyLayout, catalog: ItemCatalog, token_ids: np.ndarray | torch.Tensor | Sequence
) -> np.ndarray | list[np.ndarray]:
    """`decode_indices`: [T] -> int64 [n], [B, T] or B lists -> B arrays."""
    flat, lengths, batched = _flatten(token_ids)
    offsets = np.array(layout.code_offsets)
    num_levels = len(offsets)
    end = layout.size
    if len(flat) and (flat.min() < 0 or flat.max() >= end):
        wrong = int(np.flatnonzero((flat < 0) | (flat >= end))[0])
        raise ValueError(f"expected token ids in [0, {end}), found {flat[wrong]} at {_place(wrong, lengths, batched)}")
    position = np.flatnonzero(flat >= offsets[0])
    codes = flat[position]
    level = np.searchsorted(offsets, codes, side="right") - 1
    owner = np.repeat(np.arange(len(lengths)), lengths)[position]
    counter = np.arange(len(codes)) % num_levels
    broken = level != counter
    # The codes of an item are neighbors, and in one row.
    inner = counter > 0
    broken[1:] |= inner[1:] & ((np.diff(position) != 1) | (np.diff(owner) != 0))
    whole = len(codes) // num_levels
    if broken.any() or len(codes) % num_levels:
        item = int(np.flatnonzero(broken)[0]) // num_levels if broken.any() else whole
        first = item * num_levels
        raise ValueError(
            f"expected whole items of {num_levels} codes in level order, found "
            f"{_spelling(layout, flat, position[first], lengths)} at {_place(position[first], lengths, batched)}"
        )
    spelled = (codes - offsets[level]).reshape(whole, num_levels)
    rows = catalog.lookup(spelled)
    if (rows < 0).any():
        first = int(np.flatnonzero(rows < 0)[0]) * num_levels
        raise ValueError(
            f"expected spellings of items in the catalog, found "
            f"{_spelling(layout, flat, position[first], lengths)} at {_place(position[first], lengths, batched)}, "
            f"which spells none ({(rows < 0).sum()} such): "
            "constrain generation to the catalog"
        )
    if not batched:
        return rows
    counts = np.bincount(owner, minlength=len(lengths)) // num_levels
    return np.split(rows, np.cumsum(counts)[:-1]) if len(counts) else []


def _as_list(values: Iterable) -> list:
    """Also of arrays, tensors and columns of a table; `ValueError` for a string, a list of letters to Python."""
    if isinstance(values, str):
        raise ValueError(f"expected a list with one value an item, found the one string {values!r}")
    return values.tolist() if isinstance(values, np.ndarray | torch.Tensor) else list(values)


def _one_an_item(name: str, values: Sequence, lengths: np.ndarray, batched: bool) -> list:
    """Values of all histories, one after another. `ValueError` unless each history has as many as items."""
    rows = [_as_list(one) for one in values] if batched else [_as_list(values)]
    found = [len(one) for one in rows]
    if found != lengths.tolist():
        raise ValueError(
            f"expected as many {name} as items, {lengths.tolist()[:5]} in the first histories, found {found[:5]} "
            f"(histories: {len(lengths)} of items, {len(found)} of {name})"
        )
    return list(chain.from_iterable(rows))


def _behavior_indices(
    layout: VocabularyLayout, behaviors: Sequence | None, lengths: np.ndarray, batched: bool
) -> np.ndarray:
    """Behavior index of every item of every history, one after another: int64 [sum of lengths]."""
    if behaviors is None:
        if len(layout.behaviors) > 1:
            raise ValueError(f"expected a behavior for each item, one of {layout.behaviors}, found None")
        return np.zeros(lengths.sum(), dtype=np.int64)
    index_of = {name: i for i, name in enumerate(layout.behaviors)}
    names = _one_an_item("behaviors", behaviors, lengths, batched)
    unknown = list(dict.fromkeys(str(name) for name in names if name not in index_of))
    if unknown:
        raise ValueError(f"expected behaviors out of {layout.behaviors}, found {unknown[:5]}")
    return np.array([index_of[name] for name in names], dtype=np.int64)


def _times(timestamps: Sequence, lengths: np.ndarray, batched: bool) -> np.ndarray:
    """Seconds of every item of every history, one after another, -1 where they are None: int64 [sum of lengths]."""
    values = _one_an_item("timestamps", timestamps, lengths, batched)
    flat = [UNKNOWN_TIME if value is None else value for value in values]
    times = np.asarray(flat, dtype=np.float64)
    if not np.isfinite(times).all():
        raise ValueError("expected timestamps in seconds, or None where they are not known, found NaN or infinity")
    return times.astype(np.int64)


def _flatten(token_ids: np.ndarray | torch.Tensor | Sequence) -> tuple[np.ndarray, np.ndarray, bool]:
    """int64 [sum of lengths], the length of each row, and whether there were rows."""
    if isinstance(token_ids, torch.Tensor):
        token_ids = token_ids.detach().cpu().numpy()
    is_list = isinstance(token_ids, list | tuple)
    if is_list and token_ids and isinstance(token_ids[0], list | tuple | np.ndarray | torch.Tensor):
        rows = [np.asarray(row) for row in token_ids]
        strange = [row for row in rows if row.ndim != 1 or (row.size and row.dtype.kind not in "iu")]
        if strange:
            raise ValueError(f"expected rows of integer token ids [T], found {strange[0].dtype} {strange[0].shape}")
        return np.concatenate(rows).astype(np.int64), np.array([len(row) for row in rows]), True
    array = np.asarray(token_ids)
    if array.ndim not in (1, 2) or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"expected integer token ids [T] or [B, T], found {array.dtype} {array.shape}")
    flat = array.reshape(-1).astype(np.int64)
    if array.ndim == 1:
        return flat, np.array([len(flat)]), False
    return flat, np.full(len(array), array.shape[1]), True


def _spelling(layout: VocabularyLayout, flat: np.ndarray, start: int, lengths: np.ndarray) -> str:
    tokens = list(layout.vocabulary())
    ends = np.cumsum(lengths)
    row_end = ends[np.searchsorted(ends, start, side="right")]
    return repr(" ".join(tokens[i] for i in flat[start : min(row_end, start + len(layout.codebook_sizes))]))


def _place(position: int, lengths: np.ndarray, batched: bool) -> str:
    if not batched:
        return f"position {position}"
    row = int(np.searchsorted(np.cumsum(lengths), position, side="right"))
    return f"position {position - int(lengths[:row].sum())} of row {row}"
