"""The catalog behind a tokenizer: which item is spelled by which codes, both ways, and its two files."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from .residual_kmeans import ResidualKMeans
from .semantic_id_files import ITEMS_FILE, SEMANTIC_IDS_FILE, read_json_object, read_tensors


@dataclass(frozen=True, eq=False)
class ItemCatalog:
    """Items, their unique codes and where these come from. Immutable: adding items gives a new catalog.

    item_ids: N distinct strings; a row of the catalog is an index into them.
    codes: int32 [N, L], no two rows equal, `codes[:, l] < codebook_sizes[l]`.
    codebook_sizes: L numbers whose product is below 2^63.
    titles: N strings, or None.
    quantizer: fitted, for the first L - 1 levels; None where the codes come from elsewhere.
    provenance: JSON dict; `num_items` and `sha256` (of item ids and codes) are set here.

    Raises `ValueError` where one of these does not hold.
    """

    item_ids: list[str]
    codes: np.ndarray
    codebook_sizes: tuple[int, ...]
    titles: list[str] | None = None
    quantizer: ResidualKMeans | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    # Lookup tables, made here: id -> row, and the packed codes in order with their rows.
    _row_of_id: dict[str, int] = field(init=False, repr=False)
    _sorted_keys: np.ndarray = field(init=False, repr=False)
    _sorted_rows: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # A frozen dataclass is written to through its base class, and only here.
        set_field = super().__setattr__
        set_field("codes", _check_codes(self.codes, self.codebook_sizes))
        num_items = len(self.codes)
        if num_items == 0 or num_items != len(self.item_ids):
            raise ValueError(
                f"expected at least one item and one row of codes an item, found {len(self.item_ids)} item ids and "
                f"{num_items} rows of codes"
            )
        set_field("_row_of_id", dict(zip(self.item_ids, range(num_items), strict=True)))
        if len(self._row_of_id) < num_items:
            raise ValueError(f"expected distinct item ids, found {_repeated(self.item_ids)} more than once")
        if self.titles is not None and len(self.titles) != num_items:
            raise ValueError(f"expected one title an item ({num_items}), found {len(self.titles)}")
        if self.quantizer is not None and self.quantizer.codebook_sizes != self.codebook_sizes[:-1]:
            raise ValueError(
                f"expected a quantizer for all levels but the last, {self.codebook_sizes[:-1]}, found one for "
                f"{self.quantizer.codebook_sizes}: append a suffix level to its codes (`assign_suffixes`)"
            )
        keys = self._pack(self.codes)
        order = np.argsort(keys)
        set_field("_sorted_keys", keys[order])
        set_field("_sorted_rows", order)
        repeated = np.flatnonzero(self._sorted_keys[1:] == self._sorted_keys[:-1])
        if len(repeated):
            first, second = (self.item_ids[order[repeated[0] + i]] for i in (0, 1))
            raise ValueError(
                f"expected codes that no two items share, found {len(repeated)} repeated rows, for instance items "
                f"{first!r} and {second!r}: append a suffix level (`assign_suffixes`)"
            )
        try:
            provenance = json.loads(json.dumps(self.provenance))
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected a provenance of JSON types, found one that is not ({error})") from error
        set_field("provenance", {**provenance, "num_items": num_items, "sha256": _fingerprint(self)})

    def rows(self, item_ids: Iterable) -> np.ndarray:
        """Row of each item id: n ids -> int64 [n], -1 where unknown."""
        get = self._row_of_id.get
        return np.array([get(item_id, -1) for item_id in as_strings(item_ids)], dtype=np.int64)

    def lookup(self, codes: np.ndarray) -> np.ndarray:
        """Row of each spelling: in-range integers [n, L] -> int64 [n], -1 where no item is spelled so."""
        keys = self._pack(codes)
        found = np.minimum(np.searchsorted(self._sorted_keys, keys), len(self._sorted_keys) - 1)
        return np.where(self._sorted_keys[found] == keys, self._sorted_rows[found], -1)

    def extended(
        self, item_ids: Iterable, embeddings: np.ndarray | torch.Tensor, titles: Sequence[str] | None
    ) -> "ItemCatalog":
        """This catalog followed by new items, with frozen codebooks; the last level grows where it has to. Atomic ids
        (one level) need no codebooks: new items take the next ones.

        Raises:
            ValueError: several levels and no quantizer, known or repeated ids, embeddings that the quantizer refuses, or
                another number of them or of titles than of ids.
        """
        if self.quantizer is None and len(self.codebook_sizes) > 1:
            raise ValueError(
                "expected a catalog with a quantizer, found one built from given codes: pass `quantizer` to "
                "`from_codes`, or use `from_embeddings`"
            )
        item_ids = as_new_ids(item_ids)
        known = [item_id for item_id in item_ids if item_id in self._row_of_id]
        if known:
            raise ValueError(f"expected new item ids, found {len(known)} that exist already: {known[:5]}")
        if len(set(item_ids)) < len(item_ids):
            raise ValueError(f"expected distinct item ids, found {_repeated(item_ids)} more than once")
        if titles is not None and len(titles) != len(item_ids):
            raise ValueError(f"expected one title an item ({len(item_ids)}), found {len(titles)}")
        prefixes = (
            np.empty((len(embeddings), 0), np.int32) if self.quantizer is None else self.quantizer.encode(embeddings)
        )
        if len(prefixes) != len(item_ids):
            raise ValueError(f"expected one embedding an item ({len(item_ids)}), found {len(prefixes)}")
        suffixes = self._next_suffixes(prefixes)
        new = np.column_stack([prefixes, suffixes])
        all_titles = None
        if titles is not None or self.titles is not None:
            # An item without a title has an empty one.
            old_titles = self.titles or [""] * len(self.item_ids)
            all_titles = old_titles + (as_titles(titles) if titles is not None else [""] * len(item_ids))
        width = max(self.codebook_sizes[-1], int(suffixes.max(initial=-1)) + 1)
        return replace(
            self,
            item_ids=self.item_ids + item_ids,
            codes=np.concatenate([self.codes, new.astype(np.int32)]),
            codebook_sizes=(*self.codebook_sizes[:-1], width),
            titles=all_titles,
        )

    def _next_suffixes(self, prefixes: np.ndarray) -> np.ndarray:
        """The next free suffixes of each group, in row order: int32 [n, L - 1] -> int64 [n]."""
        next_free: dict[bytes, int] = {}
        # Packed keys sort by prefix first, so the last item of a group is just below the group's end.
        ends = np.column_stack([prefixes, np.full(len(prefixes), self.codebook_sizes[-1] - 1)])
        last = np.searchsorted(self._sorted_keys, self._pack(ends), side="right") - 1
        suffixes = np.empty(len(prefixes), dtype=np.int64)
        for i, prefix in enumerate(prefixes):
            key = prefix.tobytes()
            if key not in next_free:
                codes = self.codes[self._sorted_rows[last[i]]]
                next_free[key] = int(codes[-1]) + 1 if last[i] >= 0 and (codes[:-1] == prefix).all() else 0
            suffixes[i] = next_free[key]
            next_free[key] += 1
        return suffixes

    def save(self, folder: str | Path, prefix: str = "") -> tuple[str, str]:
        """Writes `items.json` and `semantic_ids.safetensors`, their names after `prefix`, and returns their paths."""
        items_path = Path(folder) / f"{prefix}{ITEMS_FILE}"
        ids_path = Path(folder) / f"{prefix}{SEMANTIC_IDS_FILE}"
        content = {
            "provenance": self.provenance,
            "codebook_sizes": self.codebook_sizes,
            "titles": self.titles,
            "item_ids": self.item_ids,
        }
        items_path.write_bytes(
            (json.dumps(content, ensure_ascii=False, indent=0) + "\n").encode()
        )  # or nothing, if it cannot
        tensors, metadata = {"item_codes": self.codes}, {}
        if self.quantizer is not None:
            tensors |= self.quantizer.tensors()
            metadata = self.quantizer.metadata()
        save_file(tensors, ids_path, metadata=metadata)
        return str(items_path), str(ids_path)

    @classmethod
    def load(cls, items_file: str | Path | None, semantic_ids_file: str | Path | None) -> "ItemCatalog":
        """Reads what `save` wrote. `ValueError` if a file is missing, damaged, or belongs to another catalog."""
        content = read_json_object(items_file, ITEMS_FILE)
        tensors, metadata = read_tensors(semantic_ids_file)
        missing = {"provenance", "codebook_sizes", "titles", "item_ids"} - content.keys()
        if missing or "item_codes" not in tensors:
            raise ValueError(
                f"expected a saved catalog, found {ITEMS_FILE} without {sorted(missing)} and {SEMANTIC_IDS_FILE} "
                f"with {sorted(tensors)} (it needs item_codes): save the folder again"
            )
        if len(content["item_ids"]) != len(tensors["item_codes"]):
            raise ValueError(
                f"expected {ITEMS_FILE} and {SEMANTIC_IDS_FILE} of one catalog, found {len(content['item_ids'])} "
                f"item ids and {len(tensors['item_codes'])} rows of codes: copy both files from the same folder"
            )
        catalog = cls(
            item_ids=content["item_ids"],
            codes=tensors["item_codes"],
            codebook_sizes=tuple(content["codebook_sizes"]),
            titles=content["titles"],
            quantizer=ResidualKMeans.from_tensors(tensors, metadata) if "codebook_0" in tensors else None,
            provenance=content["provenance"],
        )
        if catalog.provenance["sha256"] != content["provenance"].get("sha256"):
            raise ValueError(
                f"expected item ids and codes of hash {content['provenance'].get('sha256')}, found "
                f"{catalog.provenance['sha256']}: {ITEMS_FILE} and {SEMANTIC_IDS_FILE} are not of one catalog, or "
                "were edited; copy both files from the same folder"
            )
        return catalog

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        keys = np.zeros(len(codes), dtype=np.int64)
        for level, size in enumerate(self.codebook_sizes):
            keys *= size
            keys += codes[:, level]
        return keys


def as_strings(values: Iterable) -> list[str]:
    """Ids of any type as the strings they are looked up by; arrays and tensors by their Python values."""
    if isinstance(values, str):
        raise ValueError(f"expected a list of ids or titles, found the one string {values!r}: put it into a list")
    if isinstance(values, np.ndarray | torch.Tensor):
        values = values.tolist()
    return [str(value.item() if isinstance(value, torch.Tensor) else value) for value in values]


def as_new_ids(values: Iterable) -> list[str]:
    """Ids that items shall have; `ValueError` if one is None."""
    if not isinstance(values, str):
        values = values.tolist() if isinstance(values, np.ndarray | torch.Tensor) else list(values)
        if None in values:
            raise ValueError(
                f"expected an id for each item, found None in place {values.index(None)} of {len(values)}: give it one"
            )
    return as_strings(values)


def as_titles(values: Iterable) -> list[str]:
    """Titles as strings; one that is missing (None, or a table's NaN) is empty."""
    return as_strings("" if value is None or value != value else value for value in values)


def _check_codes(codes: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    if codes.ndim != 2 or codes.shape[1] != len(sizes) or not sizes or codes.dtype.kind not in "iu":
        raise ValueError(
            f"expected integer codes [N, L] with one codebook size a level, found {codes.dtype} {codes.shape} and "
            f"the sizes {sizes}"
        )
    product = 1
    for size in sizes:
        product *= size
    if min(sizes) < 1 or max(sizes) > 2**31 or product >= 2**63:
        raise ValueError(f"expected codebook sizes from 1 to 2^31 whose product is below 2^63, found {sizes}")
    wrong = np.argwhere((codes < 0) | (codes >= np.array(sizes)))
    if len(wrong):
        row, level = wrong[0]
        raise ValueError(
            f"expected codes in [0, K) for the codebook sizes {sizes}, found {codes[row, level]} in row {row}, level "
            f"{level} ({len(wrong)} codes are out of range)"
        )
    codes = np.array(codes, dtype=np.int32, order="C")
    codes.flags.writeable = False  # the lookup tables are derived from it
    return codes


def _repeated(item_ids: list[str]) -> list[str]:
    return [item_id for item_id, count in Counter(item_ids).items() if count > 1][:5]


def _fingerprint(catalog: ItemCatalog) -> str:
    digest = hashlib.sha256(json.dumps(catalog.item_ids).encode())
    digest.update(catalog.codes.astype("<i4").tobytes())
    return digest.hexdigest()
