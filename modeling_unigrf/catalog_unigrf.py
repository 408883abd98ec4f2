# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The catalog as part of the model: spellings and embeddings of all items, saved with the weights."""

import torch
from torch import nn

from .trie_unigrf import CatalogTrie, item_list

INT8_ONE = 127  # what stands for 1.0 in an embedding of int8


def first_spellings(num_items: int, codebook_sizes: list[int]) -> torch.IntTensor:
    """The first `num_items` spellings in lexicographic order, `[num_items, L]`: what an untrained model starts from."""
    rest, columns = torch.arange(num_items), []
    for size in reversed(codebook_sizes):
        columns.append(rest % size)
        rest = rest // size
    return torch.stack(columns[::-1], dim=1).int()


def _version(tensor: torch.Tensor) -> int:
    """Counts the changes in place, of which a tensor made in `torch.inference_mode()` keeps no count."""
    return 0 if tensor.is_inference() else tensor._version


class UniGRFCatalog(nn.Module):
    """
    Buffers `item_codes` (`torch.int32` `[num_items, L]`) and, if `config.content_embedding_dim`, `content_embeddings`
    (`[num_items, content_embedding_dim]`, the model's dtype, or int8 with `config.int8_content_embeddings`). Row = item index =
    row of the tokenizer's item map.
    """

    def __init__(self, config):
        super().__init__()
        self.codebook_sizes = list(config.codebook_sizes)
        self.register_buffer("item_codes", first_spellings(config.num_items, self.codebook_sizes))
        embeddings = None
        if config.content_embedding_dim:
            dtype = torch.int8 if config.int8_content_embeddings else None
            embeddings = torch.zeros(config.num_items, config.content_embedding_dim, dtype=dtype)
        self.register_buffer("content_embeddings", embeddings)
        self._trie, self._trie_source = None, (None, 0)

    @property
    def num_items(self) -> int:
        return len(self.item_codes)

    @property
    def trie(self) -> CatalogTrie:
        """The trie of `item_codes`, built at first use and again whenever they were changed or moved."""
        source, version = self._trie_source
        if source is not self.item_codes or version != _version(self.item_codes):
            self._keep(CatalogTrie(self.item_codes, self.codebook_sizes))
        return self._trie

    def _keep(self, trie: CatalogTrie) -> None:
        self._trie, self._trie_source = trie, (self.item_codes, _version(self.item_codes))

    def subset(self, items: torch.LongTensor) -> CatalogTrie:
        """
        A part of the catalog (a market, a surface), for the `catalog` argument of `generate` and `recommend`. Items keep
        their indices. Make it once and keep it; it is of the catalog as it is now.

        Args:
            items (`torch.LongTensor` of shape `(n,)`, or a list): Item indices, e.g. `tokenizer.item_indices(ids)`.

        Raises:
            ValueError: if there are none, one is outside the catalog, or they are no integers.
        """
        items = item_list(items, self.item_codes.device)
        if items.numel() and (items.min() < 0 or items.max() >= self.num_items):
            raise ValueError(
                f"Expected item indices below {self.num_items}, found {int(items.min())} to {int(items.max())}."
            )
        return CatalogTrie(self.item_codes, self.codebook_sizes, items)

    def embeddings_of(self, items: torch.LongTensor) -> torch.Tensor | None:
        """Item indices of any shape -> their embeddings, floats `[..., content_embedding_dim]`; None if there are none."""
        if self.content_embeddings is None:
            return None
        rows = self.content_embeddings[items]
        return rows / INT8_ONE if rows.dtype == torch.int8 else rows

    def check(self, item_codes: torch.Tensor, content_embeddings: torch.Tensor | None) -> None:
        """Refuses codes and embeddings that this catalog cannot hold; raises `ValueError`."""
        levels, shape = len(self.codebook_sizes), tuple(item_codes.shape)
        if len(shape) != 2 or shape[0] == 0 or shape[1] != levels or item_codes.is_floating_point():
            raise ValueError(
                f"Expected integer item codes of shape (num_items, {levels}) with num_items >= 1, found "
                f"{item_codes.dtype} of shape {shape}."
            )
        least, most = int(item_codes.min()), int(item_codes.max())
        if least < 0 or most >= 2**31:  # before they are made 32 bits wide
            raise ValueError(f"Expected item codes from 0 to 2^31 - 1, found {least} to {most}.")
        if (content_embeddings is None) != (self.content_embeddings is None):
            wanted = "no" if self.content_embeddings is None else f"{self.content_embeddings.shape[1]}-wide"
            given = "none" if content_embeddings is None else tuple(content_embeddings.shape)
            raise ValueError(f"Expected {wanted} item embeddings (config.content_embedding_dim), found {given}.")
        if content_embeddings is None:
            return
        expected = (len(item_codes), self.content_embeddings.shape[1])
        if tuple(content_embeddings.shape) != expected:
            raise ValueError(f"Expected item embeddings of shape {expected}, found {tuple(content_embeddings.shape)}.")
        if (content_embeddings.dtype == torch.int8) != (self.content_embeddings.dtype == torch.int8):
            raise ValueError(
                f"Expected item embeddings as {self.content_embeddings.dtype} (config.int8_content_embeddings), found "
                f"{content_embeddings.dtype}. An int8 of 127 stands for 1.0: divide by it, or multiply and round."
            )
        if content_embeddings.dtype == torch.int8:
            return
        bad = (~content_embeddings.to(self.content_embeddings.dtype).isfinite()).any(dim=1).nonzero()
        if len(bad):
            raise ValueError(
                f"{len(bad)} item embeddings have NaN or infinite values as {self.content_embeddings.dtype}, the first in row "
                f"{int(bad[0])}."
            )

    def replace(self, item_codes: torch.Tensor, content_embeddings: torch.Tensor | None) -> None:
        """Sets all items at once; nothing changes if they are refused (see `check` and `CatalogTrie`)."""
        self.check(item_codes, content_embeddings)
        item_codes = item_codes.to(self.item_codes.device, torch.int32)
        # The trie raises on shared or impossible spellings.
        self.put(item_codes, content_embeddings, CatalogTrie(item_codes, self.codebook_sizes))

    def put(self, item_codes: torch.IntTensor, content_embeddings: torch.Tensor | None, trie: CatalogTrie) -> None:
        """Sets all items, checked, and their trie."""
        self.codebook_sizes, self.item_codes = trie.codebook_sizes, item_codes
        self._keep(trie)
        if content_embeddings is not None:
            self.content_embeddings = content_embeddings.to(self.content_embeddings)
