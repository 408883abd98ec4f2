# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The catalog as part of the model: codes and content embeddings of all items, saved with the weights."""

import torch
from torch import nn

from .item_lists_unigrf import as_numbers, catalog_items, describe
from .trie_unigrf import CatalogTrie

# This int8 value stands for 1.0.
INT8_ONE = 127


def first_codes(num_items: int, codebook_sizes: list[int]) -> torch.IntTensor:
    """
    Return the first `num_items` code sequences in lexicographic order, `[num_items, L]`.

    They are the catalog of an untrained model.
    """
    rest = torch.arange(num_items)
    columns = []
    for size in reversed(codebook_sizes):
        columns.append(rest % size)
        rest = rest // size
    return torch.stack(columns[::-1], dim=1).int()


def codes_version(tensor: torch.Tensor) -> int:
    """Count the in-place changes of a tensor. A tensor of `torch.inference_mode()` has no count: 0."""
    return 0 if tensor.is_inference() else tensor._version


class UniGRFCatalog(nn.Module):
    """
    The items that exist. Row i of both buffers belongs to item i, as in the tokenizer's item map.

    The buffer `item_codes` holds `torch.int32` of shape `(num_items, L)`. With `config.content_embedding_dim`, the
    buffer `content_embeddings` has shape `(num_items, content_embedding_dim)`. Its dtype is the model's, or int8 with
    `config.int8_content_embeddings`. `has_items` says whether items were set or loaded; a new model has stand-ins.
    """

    has_items = False

    def __init__(self, config):
        super().__init__()
        self.codebook_sizes = list(config.codebook_sizes)
        self.register_buffer("item_codes", first_codes(config.num_items, self.codebook_sizes))
        embeddings = None
        if config.content_embedding_dim:
            dtype = torch.int8 if config.int8_content_embeddings else None
            embeddings = torch.zeros(config.num_items, config.content_embedding_dim, dtype=dtype)
        self.register_buffer("content_embeddings", embeddings)
        self._trie = None
        self._trie_source = (None, 0)

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.item_codes)

    @property
    def trie(self) -> CatalogTrie:
        """
        The trie of `item_codes`, built at first use and again after the codes change.

        Code that is compiled or exported takes the trie that exists.

        Raises:
            ValueError: for offloaded codes, and for compiled code without a trie.
        """
        if not torch.compiler.is_compiling():
            self.update_trie()
        elif self._trie is None:
            raise ValueError(
                "The trie must exist before the model is compiled or exported, got none. Read `model.catalog.trie` "
                "once, or call the model."
            )
        return self._trie

    def update_trie(self) -> None:
        """Build the trie if the codes have changed."""
        if self.item_codes.is_meta:
            raise ValueError(
                "The catalog's buffers must be in memory, got them on the meta device. Offload without "
                "`offload_buffers=True`."
            )
        source, version = self._trie_source
        if source is not self.item_codes or version != codes_version(self.item_codes):
            self._store(CatalogTrie(self.item_codes, self.codebook_sizes))

    def _apply(self, *args, **kwargs):
        """Move the buffers, and the trie with them."""
        super()._apply(*args, **kwargs)
        if self._trie is not None and not self.item_codes.is_meta:
            self.update_trie()
        return self

    def _store(self, trie: CatalogTrie) -> None:
        self._trie = trie
        self._trie_source = (self.item_codes, codes_version(self.item_codes))

    def subset(self, items: torch.LongTensor) -> CatalogTrie:
        """
        Make a part of the catalog, for the argument `catalog` of `generate` and `recommend`.

        A part is, for example, a market or a surface. Items keep their indices. Make a part once and reuse it: it
        does not follow later changes of the catalog.

        Args:
            items (`torch.LongTensor` of shape `(n,)`, or a list): Item indices, e.g. `tokenizer.item_indices(ids)`.

        Raises:
            ValueError: if there is no item, an item is outside the catalog, or the indices are no integers.
        """
        items = catalog_items("items", items, self.num_items, self.item_codes.device)
        return CatalogTrie(self.item_codes, self.codebook_sizes, items)

    def check_part(self, part: CatalogTrie) -> None:
        """
        Check a part of the catalog, as a call gets it. A part that fits is not compared again.

        Raises:
            ValueError: for anything but a `CatalogTrie`, and for a part on another device or of other codes.
        """
        advice = "Make it with `model.catalog.subset(items)`, after the model moved and after items were added."
        if not isinstance(part, CatalogTrie):
            raise ValueError(f"`catalog` must be a part of the model's catalog, got {describe(part)}. {advice}")
        device = self.item_codes.device
        if part.leaf_items.device != device:
            raise ValueError(
                f"`catalog` must be on the model's device {device}, got {part.leaf_items.device}. {advice}"
            )
        source = (self.item_codes, codes_version(self.item_codes))
        checked, version = getattr(part, "checked_with", (None, 0))
        if part is self._trie or (checked is source[0] and version == source[1]):
            return
        items = part.leaf_items.long()
        fits = part.codebook_sizes == self.codebook_sizes and int(items.max()) < self.num_items
        if not (fits and torch.equal(part.lookup(self.item_codes[items]), items)):
            raise ValueError(
                f"`catalog` must hold items of the model's catalog of {self.num_items} items in codebooks of "
                f"{self.codebook_sizes} codes, got items of other codes, or codebooks of {part.codebook_sizes} codes. "
                f"{advice}"
            )
        part.checked_with = source

    def check(
        self, item_codes: torch.Tensor, content_embeddings: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Check that this catalog can hold codes and content embeddings, and return both as tensors.

        Args:
            item_codes (`torch.Tensor`): Codes of all items.
            content_embeddings (`torch.Tensor`, *optional*): Content embeddings of all items. None: no embeddings.

        Raises:
            ValueError: for other shapes or dtypes, codes below 0 or beyond int32, and numbers that are not finite.
        """
        item_codes = as_numbers("item_codes", item_codes, "Pass `tokenizer.item_codes`.")
        if content_embeddings is not None:
            content_embeddings = as_numbers("content_embeddings", content_embeddings, "Pass one row an item.")
        num_levels = len(self.codebook_sizes)
        shape = tuple(item_codes.shape)
        if len(shape) != 2 or shape[0] == 0 or shape[1] != num_levels or item_codes.is_floating_point():
            raise ValueError(
                f"`item_codes` must be integers of shape (num_items, {num_levels}) with num_items >= 1, got "
                f"{item_codes.dtype} of shape {shape}. Pass `tokenizer.item_codes`."
            )
        least = int(item_codes.min())
        most = int(item_codes.max())
        # The buffer is int32.
        if least < 0 or most >= 2**31:
            raise ValueError(
                f"`item_codes` must lie from 0 to 2^31 - 1, got {least} to {most}. Pass `tokenizer.item_codes`."
            )
        if content_embeddings is not None or self.content_embeddings is not None:
            self._check_embeddings(len(item_codes), content_embeddings)
        return item_codes, content_embeddings

    def _check_embeddings(self, num_items: int, content_embeddings: torch.Tensor | None) -> None:
        if content_embeddings is None or self.content_embeddings is None:
            width = 0 if self.content_embeddings is None else self.content_embeddings.shape[1]
            got = "none" if content_embeddings is None else f"some of shape {tuple(content_embeddings.shape)}"
            raise ValueError(
                f"`content_embeddings` must have config.content_embedding_dim={width} columns (0: none), got {got}. "
                "Pass them, or make a config with another content_embedding_dim."
            )
        expected = (num_items, self.content_embeddings.shape[1])
        if tuple(content_embeddings.shape) != expected:
            raise ValueError(
                f"`content_embeddings` must have shape {expected}, got {tuple(content_embeddings.shape)}. Pass one "
                "row an item."
            )
        if (content_embeddings.dtype == torch.int8) != (self.content_embeddings.dtype == torch.int8):
            raise ValueError(
                f"`content_embeddings` must be {self.content_embeddings.dtype} (config.int8_content_embeddings), got "
                f"{content_embeddings.dtype}. An int8 of 127 stands for 1.0: divide by it, or multiply and round."
            )
        if content_embeddings.dtype == torch.int8:
            return
        bad_rows = (~content_embeddings.to(self.content_embeddings.dtype).isfinite()).any(dim=1).nonzero()
        if len(bad_rows):
            raise ValueError(
                f"`content_embeddings` must be finite as {self.content_embeddings.dtype}, got NaN or infinity in "
                f"{len(bad_rows)} rows, the first of them row {int(bad_rows[0])}. Encode these items again."
            )

    def replace(self, item_codes: torch.Tensor, content_embeddings: torch.Tensor | None) -> None:
        """
        Set all items at once.

        Raises:
            ValueError: for the reasons of `check` and `CatalogTrie`. The catalog stays unchanged then.
        """
        item_codes, content_embeddings = self.check(item_codes, content_embeddings)
        item_codes = item_codes.to(self.item_codes.device, torch.int32)
        self.put(item_codes, content_embeddings, CatalogTrie(item_codes, self.codebook_sizes))

    def put(self, item_codes: torch.IntTensor, content_embeddings: torch.Tensor | None, trie: CatalogTrie) -> None:
        """Set all items, which `check` accepted, and their trie."""
        self.codebook_sizes = trie.codebook_sizes
        self.item_codes = item_codes
        self.has_items = True
        self._store(trie)
        if content_embeddings is not None:
            self.content_embeddings = content_embeddings.to(self.content_embeddings)
