"""The catalog of a tokenizer: lookups from items to codes and back, and its two files."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .cell_values import as_id, as_text, as_values
from .residual_kmeans import ResidualKMeans
from .semantic_id_files import ITEMS_FILE, SEMANTIC_IDS_FILE, read_json_object, read_tensors, write_tensors
from .semantic_ids import unique_codes

# Most IDs that a fingerprint reads: enough for any other order, cheap for millions.
HASHED_IDS = 10_000


@dataclass(frozen=True, eq=False)
class ItemCatalog:
    """Store items, their unique codes and the origin of the codes. Immutable: `extended` returns a new catalog.

    Attributes:
        item_ids: N distinct strings. A catalog row is an index into this list.
        codes: int32 [N, L]; no two rows are equal, and `codes[:, l] < codebook_sizes[l]`.
        codebook_sizes: L sizes with a product below 2^63.
        titles: N strings. None: no titles.
        quantizer: Fitted quantizer of the first L - 1 levels. None: the codes come from elsewhere.
        provenance: JSON dict.
        earlier: Catalog of the first items, whose checks and lookup tables are reused. None: check all items.

    Raises:
        ValueError: A field that is not as described.
    """

    item_ids: list[str]
    codes: np.ndarray
    codebook_sizes: tuple[int, ...]
    titles: list[str] | None = None
    quantizer: ResidualKMeans | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    # Lookup tables: item ID -> row; sorted packed codes and their rows.
    _row_of_id: dict[str, int] = field(init=False, repr=False)
    _sorted_keys: np.ndarray = field(init=False, repr=False)
    _sorted_rows: np.ndarray = field(init=False, repr=False)
    earlier: InitVar["ItemCatalog | None"] = None

    def __post_init__(self, earlier: "ItemCatalog | None") -> None:
        # Only this method writes to the frozen dataclass, through its base class.
        set_field = super().__setattr__
        num_earlier = 0 if earlier is None else len(earlier.codes)
        _check_codes(self.codes, self.codebook_sizes, num_earlier)
        codes = np.array(self.codes, dtype=np.int32, order="C")
        # Read-only, because the lookup tables are derived from the codes.
        codes.flags.writeable = False
        set_field("codes", codes)

        # Check the columns beside the codes.
        num_items = len(codes)
        if num_items == 0 or num_items != len(self.item_ids):
            raise ValueError(
                "`item_ids` and `codes` must have at least one item and equal lengths, got "
                f"{len(self.item_ids)} item IDs and {num_items} rows of codes. Pass one row of codes per item ID."
            )
        row_of_id = {} if earlier is None else earlier._row_of_id.copy()
        row_of_id.update(zip(self.item_ids[num_earlier:], range(num_earlier, num_items), strict=True))
        set_field("_row_of_id", row_of_id)
        if len(self._row_of_id) < num_items:
            raise ValueError(_repeated_message(self.item_ids))
        if self.titles is not None and len(self.titles) != num_items:
            raise ValueError(_titles_message(num_items, len(self.titles)))
        if self.quantizer is not None and self.quantizer.codebook_sizes != self.codebook_sizes[:-1]:
            raise ValueError(
                f"`quantizer` must have all levels but the last, {self.codebook_sizes[:-1]}, got "
                f"{self.quantizer.codebook_sizes}. Append collision tokens to its codes (`assign_collision_tokens`)."
            )

        # Build the lookup table from codes to rows.
        keys = self._pack(codes[num_earlier:])
        rows = np.argsort(keys)
        keys = keys[rows]
        rows += num_earlier
        if earlier is not None:
            # The order of the rows outlives a larger last level, their keys do not.
            is_larger = earlier.codebook_sizes != self.codebook_sizes
            earlier_keys = self._pack(codes[earlier._sorted_rows]) if is_larger else earlier._sorted_keys
            places = np.searchsorted(earlier_keys, keys)
            keys = np.insert(earlier_keys, places, keys)
            rows = np.insert(earlier._sorted_rows, places, rows)
        set_field("_sorted_keys", keys)
        set_field("_sorted_rows", rows)
        repeated = np.flatnonzero(self._sorted_keys[1:] == self._sorted_keys[:-1])
        if len(repeated):
            pair = [self.item_ids[row] for row in rows[repeated[0] :][:2]]
            raise ValueError(
                f"`codes` must be unique, got {len(repeated)} repeated rows, for instance of items {pair[0]!r} and "
                f"{pair[1]!r}. Append collision tokens (`assign_collision_tokens`)."
            )

        try:
            provenance = json.loads(json.dumps(self.provenance))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`provenance` must hold JSON types, got a value that JSON cannot store ({error}). Convert the value "
                "to a string, number, list or dict."
            ) from error
        set_field("provenance", provenance)

    @cached_property
    def stored_provenance(self) -> dict[str, Any]:
        """The provenance, with `num_items` and with `sha256` of item IDs and codes, which is computed at first use."""
        digest = hashlib.sha256(json.dumps(self.item_ids).encode())
        digest.update(self.codes.astype("<i4").tobytes())
        return {**self.provenance, "num_items": len(self.codes), "sha256": digest.hexdigest()}

    @classmethod
    def from_codes(
        cls,
        item_ids: Iterable,
        codes: np.ndarray | torch.Tensor,
        codebook_sizes: Sequence[int],
        titles: Sequence[str] | None = None,
        quantizer: ResidualKMeans | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> "ItemCatalog":
        """Build a catalog from columns of any type; see `SemanticIdTokenizer.from_codes`."""
        return cls(
            as_new_ids(item_ids),
            np.asarray(codes),
            tuple(int(size) for size in codebook_sizes),
            None if titles is None else as_titles(titles),
            quantizer,
            provenance or {},
        )

    @classmethod
    def from_embeddings(
        cls,
        item_ids: Iterable,
        embeddings: np.ndarray | torch.Tensor,
        quantizer: ResidualKMeans,
        titles: Sequence[str] | None = None,
        popularity: np.ndarray | Sequence[float] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> "ItemCatalog":
        """Build a catalog of the quantizer's codes; see `SemanticIdTokenizer.from_embeddings`."""
        codes, statistics = unique_codes(embeddings, quantizer, popularity)
        provenance = {
            **(provenance or {}),
            "embedding_dim": quantizer.embedding_dim,
            "seed": quantizer.seed,
            "codebook_statistics": statistics.to_dict(),
        }
        sizes = (*quantizer.codebook_sizes, statistics.largest_group)
        return cls.from_codes(item_ids, codes, sizes, titles, quantizer, provenance)

    def rows(self, item_ids: Iterable) -> np.ndarray:
        """Look up the row of each item ID: n IDs -> int64 [n], -1 for an unknown ID."""
        get: Callable = self._row_of_id.get
        return np.array([get(as_id(item_id), -1) for item_id in as_values("item_ids", item_ids)], dtype=np.int64)

    @cached_property
    def ids_sha256(self) -> str:
        """Hash of the item IDs, as `first_ids_sha256` computes it."""
        return self.first_ids_sha256(len(self.item_ids))

    def first_ids_sha256(self, num_items: int) -> str:
        """Hash at most 10,000 evenly spaced IDs of the first `num_items` rows."""
        num_hashed = min(num_items, HASHED_IDS)
        rows = np.arange(num_hashed) * (num_items - 1) // max(num_hashed - 1, 1)
        return hashlib.sha256(json.dumps([self.item_ids[row] for row in rows]).encode()).hexdigest()

    def lookup(self, codes: np.ndarray) -> np.ndarray:
        """Look up the row of each semantic ID: in-range integers [n, L] -> int64 [n], -1 for an unused ID."""
        keys = self._pack(codes)
        positions = np.minimum(np.searchsorted(self._sorted_keys, keys), len(self._sorted_keys) - 1)
        return np.where(self._sorted_keys[positions] == keys, self._sorted_rows[positions], -1)

    def extended(
        self, item_ids: Iterable, embeddings: np.ndarray | torch.Tensor, titles: Sequence[str] | None
    ) -> "ItemCatalog":
        """Return this catalog with new items at its end; the codebooks stay frozen.

        Each new item gets the next free collision token of its group, and the last level grows as needed. Atomic IDs
        (one level) need no quantizer: new items take the next codes.

        Args:
            item_ids: n new IDs.
            embeddings: Float [n, D]. Atomic IDs ignore the values.
            titles: n strings. None: new items have empty titles if others have titles.

        Raises:
            ValueError: Several levels without a quantizer, known or repeated IDs, embeddings that the quantizer
                rejects, or a wrong number of embeddings or titles.
        """
        if self.quantizer is None and len(self.codebook_sizes) > 1:
            raise ValueError(
                "`quantizer` must be set to add items of several levels, got a catalog built from codes alone. Pass "
                "`quantizer` to `from_codes`, or use `from_embeddings`."
            )
        item_ids = as_new_ids(item_ids)
        self._check_new_items(item_ids, titles)
        if self.quantizer is None:
            prefixes = np.empty((len(embeddings), 0), np.int32)
        else:
            prefixes = self.quantizer.encode(embeddings)
        if len(prefixes) != len(item_ids):
            raise ValueError(
                f"`embeddings` must have one row per item ({len(item_ids)}), got {len(prefixes)}. Pass the embeddings "
                "in the order of `item_ids`."
            )
        collision_tokens = self._next_collision_tokens(prefixes)
        new_codes = np.column_stack([prefixes, collision_tokens])
        all_titles = None
        if titles is not None or self.titles is not None:
            # An item without a title has an empty title.
            old_titles = self.titles or [""] * len(self.item_ids)
            all_titles = old_titles + (as_titles(titles) if titles is not None else [""] * len(item_ids))
        last_size = max(self.codebook_sizes[-1], int(collision_tokens.max(initial=-1)) + 1)
        return replace(
            self,
            item_ids=self.item_ids + item_ids,
            codes=np.concatenate([self.codes, new_codes.astype(np.int32)]),
            codebook_sizes=(*self.codebook_sizes[:-1], last_size),
            titles=all_titles,
            earlier=self,
        )

    def with_titles(self, titles: Sequence[str]) -> "ItemCatalog":
        """Return this catalog with other titles; see `SemanticIdTokenizer.set_titles`."""
        return replace(self, titles=as_titles(titles), earlier=self)

    def _check_new_items(self, item_ids: list[str], titles: Sequence[str] | None) -> None:
        known = [item_id for item_id in item_ids if item_id in self._row_of_id]
        if known:
            raise ValueError(
                f"`item_ids` must be new, got {len(known)} that exist already: {known[:5]}. Pass only new items."
            )
        if len(set(item_ids)) < len(item_ids):
            raise ValueError(_repeated_message(item_ids))
        if titles is not None and len(titles) != len(item_ids):
            raise ValueError(_titles_message(len(item_ids), len(titles)))

    def _next_collision_tokens(self, prefixes: np.ndarray) -> np.ndarray:
        """Return the next free collision tokens of each group, in row order: int32 [n, L - 1] -> int64 [n]."""
        next_free: dict[bytes, int] = {}
        # Keys sort by prefix first: a group's last item precedes its end.
        ends = np.column_stack([prefixes, np.full(len(prefixes), self.codebook_sizes[-1] - 1)])
        last = np.searchsorted(self._sorted_keys, self._pack(ends), side="right") - 1
        collision_tokens = np.empty(len(prefixes), dtype=np.int64)
        for i, prefix in enumerate(prefixes):
            key = prefix.tobytes()
            if key not in next_free:
                codes = self.codes[self._sorted_rows[last[i]]]
                next_free[key] = int(codes[-1]) + 1 if last[i] >= 0 and (codes[:-1] == prefix).all() else 0
            collision_tokens[i] = next_free[key]
            next_free[key] += 1
        return collision_tokens

    def save(self, folder: str | Path, prefix: str = "") -> tuple[str, str]:
        """Write `items.json` and `semantic_ids.safetensors`, their names after `prefix`, and return their paths."""
        items_path = Path(folder) / f"{prefix}{ITEMS_FILE}"
        ids_path = Path(folder) / f"{prefix}{SEMANTIC_IDS_FILE}"
        content = {
            "provenance": self.stored_provenance,
            "codebook_sizes": self.codebook_sizes,
            "titles": self.titles,
            "item_ids": self.item_ids,
        }
        # Encode before writing: an encoding error leaves the old file intact.
        encoded = (json.dumps(content, ensure_ascii=False, indent=0) + "\n").encode()
        items_path.write_bytes(encoded)
        tensors = {"item_codes": self.codes}
        metadata = {}
        if self.quantizer is not None:
            tensors |= self.quantizer.tensors()
            metadata = self.quantizer.metadata()
        write_tensors(tensors, ids_path, metadata)
        return str(items_path), str(ids_path)

    @classmethod
    def load(cls, items_file: str | Path | None, semantic_ids_file: str | Path | None) -> "ItemCatalog":
        """Read the files that `save` wrote.

        Raises:
            ValueError: A file is missing or damaged, or belongs to another catalog.
        """
        content = read_json_object(items_file, ITEMS_FILE)
        tensors, metadata = read_tensors(semantic_ids_file)
        missing = {"provenance", "codebook_sizes", "titles", "item_ids"} - content.keys()
        if missing or "item_codes" not in tensors:
            raise ValueError(
                f"{items_file} and {semantic_ids_file} must hold a saved catalog, got {ITEMS_FILE} without "
                f"{sorted(missing)} and {SEMANTIC_IDS_FILE} with {sorted(tensors)} (item_codes is required). Save "
                "the folder again."
            )
        if len(content["item_ids"]) != len(tensors["item_codes"]):
            raise ValueError(
                f"{items_file} and {semantic_ids_file} must belong to one catalog, got {len(content['item_ids'])} "
                f"item IDs and {len(tensors['item_codes'])} rows of codes. Copy both files from the same folder."
            )
        catalog = cls(
            item_ids=content["item_ids"],
            codes=tensors["item_codes"],
            codebook_sizes=tuple(content["codebook_sizes"]),
            titles=content["titles"],
            quantizer=ResidualKMeans.from_tensors(tensors, metadata) if "codebook_0" in tensors else None,
            provenance=_with_current_keys(content["provenance"]),
        )
        saved_hash = content["provenance"].get("sha256")
        actual_hash = catalog.stored_provenance["sha256"]
        if actual_hash != saved_hash:
            raise ValueError(
                f"{items_file} and {semantic_ids_file} must hold item IDs and codes of hash {saved_hash}, got "
                f"{actual_hash}. The files belong to different catalogs or were edited: copy both "
                "files from the same folder."
            )
        return catalog

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        """Pack the codes of each row into one integer: [n, L] -> int64 [n]."""
        keys = np.zeros(len(codes), dtype=np.int64)
        for level, size in enumerate(self.codebook_sizes):
            keys *= size
            keys += codes[:, level]
        return keys


def as_new_ids(values: Iterable) -> list[str]:
    """Convert the IDs of new items to the strings that the catalog stores.

    Raises:
        ValueError: A value that is no ID, or a string in place of a list.
    """
    values = as_values("item_ids", values)
    ids = [as_id(value) for value in values]
    if None in ids:
        index = ids.index(None)
        raise ValueError(
            f"`item_ids` must have an ID for each item, got {values[index]!r} at index {index} of {len(values)}. Give "
            f"the item an ID, a string or an integer."
        )
    return [item_id for item_id in ids if item_id is not None]


def as_titles(values: Iterable) -> list[str]:
    """Convert titles to strings; a missing title becomes empty."""
    return [as_text(value) or "" for value in as_values("titles", values)]


def _with_current_keys(provenance: dict[str, Any]) -> dict[str, Any]:
    # Version 0.1 saved the statistics as "health"; read it until 0.3.
    if "health" in provenance and "codebook_statistics" not in provenance:
        return {"codebook_statistics" if key == "health" else key: value for key, value in provenance.items()}
    return provenance


def _check_codes(codes: np.ndarray, sizes: tuple[int, ...], first: int) -> None:
    """Check codes `[N, L]`, from the row `first` on."""
    if codes.ndim != 2 or codes.shape[1] != len(sizes) or not sizes or codes.dtype.kind not in "iu":
        raise ValueError(
            f"`codes` must be integers [N, L] with one codebook size per level, got {codes.dtype} {codes.shape} and "
            f"the sizes {sizes}. Pass one size for each column of `codes`."
        )
    product = 1
    for size in sizes:
        product *= size
    if min(sizes) < 1 or max(sizes) > 2**31 or product >= 2**63:
        raise ValueError(
            f"`codebook_sizes` must be from 1 to 2^31 with a product below 2^63, got {sizes}. Use smaller codebooks "
            "or fewer levels."
        )
    wrong = np.argwhere((codes[first:] < 0) | (codes[first:] >= np.array(sizes)))
    if len(wrong):
        row, level = wrong[0] + (first, 0)
        raise ValueError(
            f"`codes` must be in [0, K) for the codebook sizes {sizes}, got {codes[row, level]} in row {row}, level "
            f"{level} ({len(wrong)} codes are out of range). Correct these codes or raise `codebook_sizes`."
        )


def _repeated_message(item_ids: list[str]) -> str:
    repeated = [item_id for item_id, count in Counter(item_ids).items() if count > 1][:5]
    return f"`item_ids` must be distinct as strings, got {repeated} more than once. Remove the duplicates."


def _titles_message(num_items: int, num_titles: int) -> str:
    return f'`titles` must have one title per item ({num_items}), got {num_titles}. Pass "" for an item without title.'
