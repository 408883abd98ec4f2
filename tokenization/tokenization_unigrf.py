"""The tokenizer of UniGRF: a user's items and behaviors as tokens, and tokens back as items.

A history is `<bos> s1 ... sL b  s1 ... sL b ...`: the L codes of an item, then what the user did with it. The
vocabulary is `<pad> <bos> <eos> <unk>`, the behaviors, and the codes level by level (`<a_0> <a_1> ... <b_0> ...`).
The level that makes ids unique is the last, so that it can grow at the end.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedTokenizerFast

from .history_encoding import decode_rows, history_batch, known_rows
from .item_catalog import ItemCatalog, as_new_ids, as_strings, as_titles
from .residual_kmeans import ResidualKMeans
from .semantic_id_files import ITEMS_FILE, SEMANTIC_IDS_FILE
from .semantic_ids import assign_suffixes, codebook_health
from .vocabulary_layout import SPECIAL_TOKENS, UNKNOWN_TIME, VocabularyLayout, check_behaviors
from .wordlevel_backend import build_backend, load_backend

# The reconstruction error of a large catalog is measured on a sample, to bound memory.
HEALTH_SAMPLE = 65_536


class SemanticIdTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer over semantic ids that knows its catalog.

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
        """Use `from_codes`, `from_embeddings` or `from_pretrained`; the files are what the last one passes."""
        self._catalog = ItemCatalog.load(items_file, semantic_ids_file) if catalog is None else catalog
        self._layout = VocabularyLayout(check_behaviors(behaviors), self._catalog.codebook_sizes)
        vocabulary = self._layout.vocabulary()
        backend = load_backend(tokenizer_file, vocabulary) if catalog is None else build_backend(vocabulary)
        # Not as a class attribute: it is to be saved, so that a plain PreTrainedTokenizerFast pads on the left too.
        kwargs = {**SPECIAL_TOKENS, "padding_side": "left", **kwargs}
        super().__init__(tokenizer_object=backend, behaviors=list(self._layout.behaviors), **kwargs)
        for key in ("is_local", "local_files_only"):  # how it was loaded is no part of what is saved
            self.init_kwargs.pop(key, None)

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
        """A tokenizer over codes that are unique already; one level of N codes is plain item ids.

        Args:
            item_ids: N distinct ids, kept as their strings.
            codes: integers [N, L], no two rows equal.
            codebook_sizes: L numbers; the last level is the one that `add_items` widens.
            behaviors: at least one name, such as "like".
            titles: N strings.
            quantizer: fitted, for the first L - 1 levels; `add_items` needs it.
            provenance: JSON dict of where the codes come from (encoder, text template, ...).

        Raises:
            ValueError: repeated ids or spellings, codes out of range, numbers or shapes that do not match, behavior
                names that are repeated or cannot be a token.
        """
        catalog = ItemCatalog(
            as_new_ids(item_ids),
            np.asarray(codes),
            tuple(int(size) for size in codebook_sizes),
            None if titles is None else as_titles(titles),
            quantizer,
            provenance or {},
        )
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
        """Spells items by a fitted quantizer's codes and a last code that makes them unique.

        The last level is as wide as the largest group of items with equal codes. `provenance` gains the
        embedding dimension, the seed, the item count, a hash of ids and codes, and the codebooks' health.

        Args:
            item_ids: N distinct ids, kept as their strings.
            embeddings: float [N, D].
            quantizer: fitted on embeddings of the same encoder.
            behaviors, titles, provenance: as in `from_codes`.
            popularity: N numbers; the most popular item of a group gets its code 0. None is row order.

        Raises:
            ValueError: what `ResidualKMeans.encode` and `from_codes` refuse.
        Warns:
            of a collapsed codebook.
        """
        codes = quantizer.encode(embeddings)
        sample = slice(None, None, -(-len(codes) // HEALTH_SAMPLE) or 1)
        health = codebook_health(
            codes,
            quantizer.codebook_sizes,
            quantizer.reconstruction_input(embeddings[sample]),
            quantizer.decode(codes[sample]),
        )
        suffixes = assign_suffixes(codes, popularity)
        provenance = {
            **(provenance or {}),
            "embedding_dim": quantizer.embedding_dim,
            "seed": quantizer.seed,
            "health": health.to_dict(),
        }
        sizes = (*quantizer.codebook_sizes, health.largest_group)
        codes = np.column_stack([codes, suffixes])
        return cls.from_codes(item_ids, codes, sizes, behaviors, titles, quantizer, provenance)

    @property
    def item_ids(self) -> list[str]:
        return self._catalog.item_ids

    @property
    def titles(self) -> list[str] | None:
        return self._catalog.titles

    @property
    def item_codes(self) -> np.ndarray:
        """int32 [num_items, num_levels], read-only."""
        return self._catalog.codes

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return self._catalog.codebook_sizes

    @property
    def quantizer(self) -> ResidualKMeans | None:
        return self._catalog.quantizer

    @property
    def provenance(self) -> dict[str, Any]:
        return self._catalog.provenance

    @property
    def num_items(self) -> int:
        return len(self.item_codes)

    @property
    def num_levels(self) -> int:
        return len(self.codebook_sizes)

    @property
    def behaviors(self) -> tuple[str, ...]:
        return self._layout.behaviors

    @property
    def behavior_token_ids(self) -> tuple[int, ...]:
        return self._layout.behavior_token_ids

    @property
    def code_offsets(self) -> tuple[int, ...]:
        """Token id of the first code of each level."""
        return self._layout.code_offsets

    def config_fields(self) -> dict[str, Any]:
        """What a model's config has to know of its tokenizer, as JSON types."""
        return {
            "vocab_size": len(self),
            "codebook_sizes": list(self.codebook_sizes),
            "code_offsets": list(self.code_offsets),
            "behaviors": list(self.behaviors),
            "behavior_token_ids": list(self.behavior_token_ids),
            "num_items": self.num_items,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
        }

    def item_indices(self, item_ids: Iterable[Hashable], *, unknown: Literal["error", "skip"] = "error") -> np.ndarray:
        """Catalog row of each id: n ids, looked up as strings -> int64 [n], shorter where unknown ids are skipped.

        Raises:
            ValueError: an unknown id, unless `unknown="skip"`.
        """
        rows, known = known_rows(self._catalog, as_strings(item_ids), unknown)
        return rows[known]

    def item_tokens(self, item_indices: np.ndarray | torch.Tensor) -> np.ndarray:
        """Token ids of catalog rows: integers [n] -> int64 [n, num_levels]. `ValueError` if out of range."""
        rows = self._check_rows(item_indices)
        return self.item_codes[rows] + np.array(self.code_offsets, dtype=np.int64)  # int64 from here on

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
        """Tokens of one history, or of a batch of them (a sequence whose first element is a list, tuple or array).

        Args:
            items: item ids, oldest first; a batch is a list of such lists.
            behaviors: a behavior name for each item, in the same shape; None if there is only one behavior.
            max_items: keep this many of the most recent items (that are known).
            unknown: "skip" drops ids that are not in the catalog, and their behaviors.
            timestamps: seconds of each item, in the same shape, None where not known; for a model that reads them.
            return_tensors: None, "pt" or "np".

        Returns:
            `input_ids`, `attention_mask` and, if given, `timestamps`: lists for one history, lists of lists for a batch;
            int64 [B, T] tensors (B = 1 for one history) with `return_tensors`. A batch is padded on the left.

        Raises:
            ValueError: an unknown id or behavior, an empty history (also after skipping), items, behaviors and
                timestamps of different lengths, no behaviors where there are several.
        """
        columns, batched = history_batch(self._layout, self._catalog, items, behaviors, max_items, unknown, timestamps)
        if return_tensors is not None:
            return BatchEncoding(columns, tensor_type=return_tensors)
        return BatchEncoding({name: (one if batched else one[0]).tolist() for name, one in columns.items()})

    def encode_indices(self, item_index: np.ndarray, behavior_index: np.ndarray) -> np.ndarray:
        """Tokens of one history by table lookup, for data pipelines.

        Args:
            item_index: integers [n], catalog rows, oldest first.
            behavior_index: integers [n], indices into `behaviors`.

        Returns:
            int64 [1 + n * (num_levels + 1)]: `<bos>`, then codes and behavior of each item.

        Raises:
            ValueError: different lengths or an index out of range.
        """
        rows = self._check_rows(item_index)
        behavior_index = _integers(behavior_index)
        if behavior_index.shape != rows.shape or behavior_index.dtype.kind not in "iu":
            raise ValueError(
                f"expected one integer behavior index an item, {rows.shape}, found {behavior_index.dtype} "
                f"{behavior_index.shape}"
            )
        if _any_outside(behavior_index, len(self.behaviors)):
            raise ValueError(f"expected behavior indices in [0, {len(self.behaviors)}), found some outside")
        return self._layout.encode(self.item_codes[rows], behavior_index)

    def encode_times(self, timestamps: np.ndarray) -> np.ndarray:
        """`timestamps` of the tokens of `encode_indices`; `pad` fills a column of that name up with -1.

        Args:
            timestamps: integers [n], seconds of each item, -1 where not known.

        Returns:
            int64 [1 + n * (num_levels + 1)]: an item's for each of its tokens, the first item's for `<bos>`.
        """
        return self._layout.encode_times(np.asarray(timestamps, dtype=np.int64))

    def decode_indices(self, token_ids: np.ndarray | torch.Tensor | Sequence) -> np.ndarray | list[np.ndarray]:
        """Catalog rows of the items in token ids: [T] -> int64 [n], or [B, T] -> B of them.

        The tokenizer's own special tokens and behaviors are skipped between items.

        Raises:
            ValueError: codes that are not whole items in level order, or that spell no item of the catalog; tokens that
                were added.
        """
        return decode_rows(self._layout, self._catalog, token_ids)

    def decode_items(self, token_ids: np.ndarray | torch.Tensor | Sequence) -> list[str] | list[list[str]]:
        """Item ids in token ids: [T] -> a list, or [B, T] -> a list of lists. Errors as in `decode_indices`."""
        rows = self.decode_indices(token_ids)
        if isinstance(rows, list):
            return [[self.item_ids[row] for row in one] for one in rows]
        return [self.item_ids[row] for row in rows]

    def add_items(
        self,
        item_ids: Iterable[Hashable],
        embeddings: np.ndarray | torch.Tensor,
        titles: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Appends new items to the catalog with frozen codebooks; what exists keeps its rows, codes and token ids.

        A new item takes the next free last code of its group. The vocabulary grows at its end if a group outgrows
        the last level: give the model as many rows (`len(tokenizer)`). Nothing changes if an error is raised.

        Args:
            item_ids: n new ids.
            embeddings: float [n, D], of the encoder that the quantizer was fitted on; only counted where ids are atomic.
            titles: n strings; an item without a title has an empty one if others have titles.

        Returns:
            int32 [n, num_levels], the codes of the new items.

        Raises:
            ValueError: known or repeated ids, several levels without a quantizer, embeddings of the wrong number or width or
                not finite, or the last level has to grow past tokens that were added by hand.
        """
        catalog = self._catalog.extended(item_ids, embeddings, titles)
        if catalog.codebook_sizes != self.codebook_sizes:
            if len(self) != self.vocab_size:
                raise ValueError(
                    f"expected a vocabulary that ends with the last level, found {len(self) - self.vocab_size} tokens "
                    "added after it: add items first and tokens afterwards"
                )
            layout = VocabularyLayout(self.behaviors, catalog.codebook_sizes)
            backend = build_backend(layout.vocabulary())
            backend.post_processor = self.backend_tokenizer.post_processor
            self._tokenizer = backend  # type: ignore[assignment]  # transformers declares it as None
            self._layout = layout
        first_new = self.num_items
        self._catalog = catalog
        return self.item_codes[first_new:]

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs) -> dict[str, Any]:
        # Part of transformers' loading. The constructor reads tokenizer.json itself; the default would hand over
        # its vocabulary alone.
        return kwargs

    def _pad(self, encoded_inputs, *args, padding_side=None, **kwargs):
        # Here, where collators and `pad` meet: transformers pads the columns that it knows.
        padded = super()._pad(encoded_inputs, *args, padding_side=padding_side, **kwargs)
        if "timestamps" in padded:
            times = list(padded["timestamps"])
            unknown = [UNKNOWN_TIME] * (len(padded["input_ids"]) - len(times))
            on_the_left = (padding_side or self.padding_side) == "left"
            padded["timestamps"] = [*unknown, *times] if on_the_left else [*times, *unknown]
        return padded

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        # Here and not in `save_pretrained`, which uploads what this method has written.
        # A call with padding or truncation leaves its setting in the backend: it is no part of the tokenizer.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return files + self._catalog.save(save_directory, f"{filename_prefix}-" if filename_prefix else "")

    def _check_rows(self, rows: np.ndarray | torch.Tensor) -> np.ndarray:
        rows = _integers(rows)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise ValueError(f"expected integer catalog rows of shape [n], found {rows.dtype} {rows.shape}")
        if _any_outside(rows, self.num_items):
            raise ValueError(f"expected catalog rows in [0, {self.num_items}), found {rows.min()} to {rows.max()}")
        return rows


def _integers(values: np.ndarray | torch.Tensor | Sequence) -> np.ndarray:
    """As an array; numpy takes a list of nothing for floats."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    return array if array.size else array.astype(np.int64)


def _any_outside(values: np.ndarray, end: int) -> bool:
    """Whether an integer is outside [0, end), in one pass: as unsigned, a negative number is larger than any end."""
    return len(values) > 0 and int(values.astype(np.int64, copy=False).view(np.uint64).max()) >= end


SemanticIdTokenizer.register_for_auto_class()
