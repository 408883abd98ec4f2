"""The UniGRF tokenizer: a user's items and behaviors to tokens, and tokens back to items.

A history is `<bos> s1 ... sL b  s1 ... sL b ...`: the L codes of an item, then the user's behavior. The
vocabulary is `<pad> <bos> <eos> <unk>`, the behaviors, and the codes level by level (`<a_0> <a_1> ... <b_0> ...`).
The collision token, which makes semantic IDs unique, is the last level, so it can grow at the vocabulary's end.
"""

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedTokenizerFast

from .cell_values import as_values, whole_seconds
from .history_decoding import decode_rows
from .history_encoding import check_rows, encode_batch, encode_indices, known_rows, pad_timestamps
from .item_catalog import ItemCatalog
from .residual_kmeans import ResidualKMeans
from .semantic_id_files import ITEMS_FILE, SEMANTIC_IDS_FILE, read_json_object
from .vocabulary_layout import SPECIAL_TOKENS, VocabularyLayout, check_behaviors
from .wordlevel_backend import build_backend, grow_backend, load_backend


class SemanticIdTokenizer(PreTrainedTokenizerFast):
    """Encode histories of items as semantic-ID tokens; the tokenizer stores the item catalog.

    Example:
        tokenizer = SemanticIdTokenizer.from_embeddings(item_ids, embeddings, quantizer, behaviors=("like",))
        batch = tokenizer.encode_history([["i7", "i3"], ["i5"]], return_tensors="pt")
        tokenizer.decode_items(batch["input_ids"])  # [["i7", "i3"], ["i5"]]
    """

    vocab_files_names = {
        "tokenizer_file": "tokenizer.json",
        "items_file": ITEMS_FILE,
        "semantic_ids_file": SEMANTIC_IDS_FILE,
    }
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        catalog: ItemCatalog | None = None,
        *,
        behaviors: Sequence[str] = (),
        tokenizer_file: str | None = None,
        items_file: str | None = None,
        semantic_ids_file: str | None = None,
        **kwargs,
    ):
        """Build the tokenizer; call `from_codes`, `from_embeddings` or `from_pretrained`, which pass the arguments."""
        self._catalog = ItemCatalog.load(items_file, semantic_ids_file) if catalog is None else catalog
        self._layout = VocabularyLayout(check_behaviors(behaviors), self._catalog.codebook_sizes)
        vocabulary = self._layout.vocabulary()
        backend = load_backend(tokenizer_file, vocabulary) if catalog is None else build_backend(vocabulary)
        # Saved with the tokenizer, so that a plain PreTrainedTokenizerFast pads and keeps the last tokens alike.
        kwargs = {**SPECIAL_TOKENS, "padding_side": "left", "truncation_side": "left", **kwargs}
        super().__init__(tokenizer_object=backend, behaviors=list(self._layout.behaviors), **kwargs)
        # Do not save how the tokenizer was loaded.
        for key in ("is_local", "local_files_only"):
            self.init_kwargs.pop(key, None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a tokenizer as every tokenizer of transformers; `ValueError` for a file that is missing or damaged."""
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            # transformers would not name them.
            for name in ("tokenizer_config.json", "tokenizer.json"):
                read_json_object(folder / name, name)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_codes(
        cls,
        item_ids: Iterable[Hashable],
        codes: np.ndarray | torch.Tensor,
        codebook_sizes: Sequence[int],
        behaviors: Sequence[str],
        titles: Sequence[str] | None = None,
        quantizer: ResidualKMeans | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> "SemanticIdTokenizer":
        """Build a tokenizer from codes that are unique already; one level of N codes gives atomic item IDs.

        Args:
            item_ids: N distinct IDs, stored as strings.
            codes: Integers [N, L]; no two rows are equal.
            codebook_sizes: L sizes; `add_items` may raise the last size.
            behaviors: At least one behavior name, such as "like".
            titles: N strings. None: no titles.
            quantizer: Fitted quantizer of the first L - 1 levels. None: `add_items` works for atomic IDs alone.
            provenance: JSON dict about the origin of the codes (encoder, text template, ...). None: empty.

        Raises:
            ValueError: Repeated IDs or codes, codes out of range, mismatched numbers or shapes, or behavior names that
                are repeated or cannot be tokens.
        """
        catalog = ItemCatalog.from_codes(item_ids, codes, codebook_sizes, titles, quantizer, provenance)
        return cls(catalog, behaviors=behaviors)

    @classmethod
    def from_embeddings(
        cls,
        item_ids: Iterable[Hashable],
        embeddings: np.ndarray | torch.Tensor,
        quantizer: ResidualKMeans,
        behaviors: Sequence[str],
        titles: Sequence[str] | None = None,
        popularity: np.ndarray | Sequence[float] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> "SemanticIdTokenizer":
        """Build a tokenizer whose semantic IDs are the quantizer's codes and a collision token.

        The last level is as wide as the largest group of items with equal codes. A collapsed codebook gives a warning.

        Args:
            item_ids: N distinct IDs, stored as strings.
            embeddings: Float [N, D].
            quantizer: Quantizer that was fitted on embeddings of the same encoder.
            behaviors: At least one behavior name, such as "like".
            titles: N strings. None: no titles.
            popularity: Numbers [N]; the most popular item of a group gets the collision token 0. None: row order.
            provenance: JSON dict about the origin of the codes. None: empty. The tokenizer adds the embedding
                dimension, the seed, the item count, a hash of IDs and codes, and the codebook statistics.

        Raises:
            ValueError: Inputs that `ResidualKMeans.encode` or `from_codes` rejects.
        """
        catalog = ItemCatalog.from_embeddings(item_ids, embeddings, quantizer, titles, popularity, provenance)
        return cls(catalog, behaviors=behaviors)

    @property
    def item_ids(self) -> list[str]:
        """Item ID of each catalog row."""
        return self._catalog.item_ids

    @property
    def titles(self) -> list[str] | None:
        """Title of each catalog row, or None."""
        return self._catalog.titles

    @property
    def item_codes(self) -> np.ndarray:
        """Codes of each catalog row: int32 [num_items, num_levels], read-only."""
        return self._catalog.codes

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level."""
        return self._catalog.codebook_sizes

    @property
    def quantizer(self) -> ResidualKMeans | None:
        """Quantizer of all levels but the last, or None."""
        return self._catalog.quantizer

    @property
    def provenance(self) -> dict[str, Any]:
        """Origin of the codes, as JSON types."""
        return self._catalog.stored_provenance

    @property
    def num_items(self) -> int:
        """Number of items in the catalog."""
        return len(self.item_codes)

    @property
    def num_levels(self) -> int:
        """Number of codes per item."""
        return len(self.codebook_sizes)

    @property
    def behaviors(self) -> tuple[str, ...]:
        """Behavior names, in the order of their token IDs."""
        return self._layout.behaviors

    @property
    def behavior_token_ids(self) -> tuple[int, ...]:
        """Token ID of each behavior."""
        return self._layout.behavior_token_ids

    @property
    def code_offsets(self) -> tuple[int, ...]:
        """Token ID of the first code of each level."""
        return self._layout.code_offsets

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of a model config that describe this tokenizer, as JSON types."""
        return {
            "vocab_size": len(self),
            "codebook_sizes": list(self.codebook_sizes),
            "behaviors": list(self.behaviors),
            "num_items": self.num_items,
            "item_ids_fingerprint": self.item_ids_fingerprint(),
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
        }

    def item_ids_fingerprint(self, num_items: int | None = None) -> dict[str, Any]:
        """Return the number of the first items and a hash of their IDs, in their order. None: all items."""
        if num_items in (None, self.num_items):
            return {"num_items": self.num_items, "sha256": self._catalog.ids_sha256}
        return {"num_items": num_items, "sha256": self._catalog.first_ids_sha256(num_items)}

    def item_indices(self, item_ids: Iterable[Hashable], *, unknown: Literal["error", "skip"] = "error") -> np.ndarray:
        """Look up catalog rows: n item IDs -> int64 [n]. Unknown IDs raise `ValueError`, or "skip" drops them."""
        rows, is_known = known_rows(self._catalog, as_values("item_ids", item_ids), unknown)
        return rows[is_known]

    def item_tokens(self, item_indices: np.ndarray | torch.Tensor) -> np.ndarray:
        """Return the token IDs of catalog rows: integers [n] -> int64 [n, num_levels]. `ValueError` out of range."""
        # int64 offsets widen the int32 codes.
        return self.item_codes[check_rows(self._catalog, item_indices)] + np.array(self.code_offsets, dtype=np.int64)

    def encode_history(
        self,
        items: Sequence,
        behaviors: Sequence | None = None,
        *,
        max_items: int | None = None,
        unknown: Literal["error", "skip"] = "error",
        timestamps: Sequence | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Encode one history, or a batch of histories, as token IDs.

        Args:
            items: Item IDs, the oldest first. A batch is a sequence of such lists, tuples or arrays.
            behaviors: A behavior name for each item, in the same shape. None: the tokenizer has a single behavior.
            max_items: Number of most recent known items to keep. None: all.
            unknown: "error" rejects unknown item IDs, "skip" drops them and their behaviors.
            timestamps: Time of each item in the same shape, as `encode_times` takes it. Only models that read times
                need them. None: the result has no `timestamps`.
            return_tensors: "pt" or "np" for int64 tensors [B, T], B = 1 for one history. None: lists.

        Returns:
            `input_ids`, `attention_mask` and optionally `timestamps`. Without `return_tensors`: lists for one history,
            lists of lists for a batch. A batch is padded on the left.

        Raises:
            ValueError: An unknown ID or behavior, a history without known items, columns of different lengths, times
                that are no seconds, or no behaviors for a tokenizer with several.
        """
        columns, batched = encode_batch(self._layout, self._catalog, items, behaviors, max_items, unknown, timestamps)
        if return_tensors is not None:
            return BatchEncoding(columns, tensor_type=return_tensors)
        return BatchEncoding({name: (column if batched else column[0]).tolist() for name, column in columns.items()})

    def encode_indices(self, item_index: np.ndarray, behavior_index: np.ndarray) -> np.ndarray:
        """Encode one history by table lookup, for data pipelines.

        Args:
            item_index: Integers [n], catalog rows, the oldest first.
            behavior_index: Integers [n], indices into `behaviors`.

        Returns:
            int64 [1 + n * (num_levels + 1)]: `<bos>`, then the codes and the behavior of each item.

        Raises:
            ValueError: Different lengths or an index out of range.
        """
        return encode_indices(self._layout, self._catalog, item_index, behavior_index)

    def encode_times(self, timestamps: Iterable) -> np.ndarray:
        """Repeat each item's time for its tokens; `<bos>` takes the time of the first item.

        Args:
            timestamps: n numbers of seconds, datetimes or dates (without a zone: in UTC), or missing values.

        Returns:
            Seconds since 1970, int64 [1 + n * (num_levels + 1)], -1 for an unknown time; `pad` fills the column
            `timestamps` with -1.

        Raises:
            ValueError: A value that is no time from 1970 to the year 9999, such as milliseconds.
        """
        return self._layout.encode_times(whole_seconds("timestamps", timestamps))

    def decode_indices(self, token_ids: np.ndarray | torch.Tensor | Sequence) -> np.ndarray | list[np.ndarray]:
        """Decode token IDs to catalog rows: [T] -> int64 [n]; [B, T], or B lists of any lengths, -> B arrays.

        Special tokens and behaviors between items are skipped.

        Raises:
            ValueError: Codes that are not whole items in level order or encode no item, or added tokens.
        """
        return decode_rows(self._layout, self._catalog, token_ids)

    def decode_items(self, token_ids: np.ndarray | torch.Tensor | Sequence) -> list[str] | list[list[str]]:
        """Decode token IDs to item IDs: [T] -> a list, [B, T] -> a list of lists. Raises as `decode_indices` does."""
        rows = self.decode_indices(token_ids)
        if isinstance(rows, list):
            return [[self.item_ids[row] for row in history] for history in rows]
        return [self.item_ids[row] for row in rows]

    def add_items(
        self,
        item_ids: Iterable[Hashable],
        embeddings: np.ndarray | torch.Tensor,
        titles: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Append new items to the catalog; the codebooks and all rows, codes and token IDs so far stay the same.

        A new item takes the next free collision token of its group. If a group outgrows the last level, the vocabulary
        grows at its end: resize the model's embeddings to `len(tokenizer)`. An error leaves the tokenizer as it was.

        Args:
            item_ids: n new IDs.
            embeddings: Float [n, D], from the encoder of the quantizer's embeddings. Atomic IDs ignore the values.
            titles: n strings. None: new items have empty titles if others have titles.

        Returns:
            int32 [n, num_levels], the codes of the new items.

        Raises:
            ValueError: Known or repeated IDs, no quantizer for several levels, embeddings of a wrong shape or not
                finite, or tokens added after the last level.
        """
        catalog = self._catalog.extended(item_ids, embeddings, titles)
        if catalog.codebook_sizes != self.codebook_sizes:
            layout = VocabularyLayout(self.behaviors, catalog.codebook_sizes)
            # transformers declares `_tokenizer` as None.
            self._tokenizer = grow_backend(self.backend_tokenizer, layout.vocabulary())  # type: ignore[assignment]
            self._layout = layout
        first_new = self.num_items
        self._catalog = catalog
        return self.item_codes[first_new:]

    def set_titles(self, titles: Sequence[str]) -> None:
        """Replace the titles of all items: num_items strings; a missing title is empty. `ValueError` for others."""
        self._catalog = self._catalog.with_titles(titles)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs) -> dict[str, Any]:
        """Return `kwargs` unchanged, because `__init__` reads tokenizer.json; transformers calls this when loading."""
        return kwargs

    def _pad(self, encoded_inputs, *args, padding_side=None, **kwargs):
        # Collators and `pad` both call this; transformers pads only its own columns.
        padded = super()._pad(encoded_inputs, *args, padding_side=padding_side, **kwargs)
        return pad_timestamps(padded, padding_side or self.padding_side)

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        # Override this method: `save_pretrained` uploads the files that it wrote.
        # Drop the padding and truncation that earlier calls left behind.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return files + self._catalog.save(save_directory, f"{filename_prefix}-" if filename_prefix else "")


SemanticIdTokenizer.register_for_auto_class()
