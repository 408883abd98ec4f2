# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Vectors of items and users for an index of one's own, and the items that are similar to an item."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from .item_lists_unigrf import catalog_items
from .scoring_unigrf import MAX_LEAVES
from .trie_unigrf import CatalogTrie, check_scores

# Scores in memory at a time: 64 MiB.
MAX_SCORES = 2**24
# What `similar_items` compares -> the fields of the config that a model needs for it.
SIMILARITIES = {
    "content": "content_embedding_dim",
    "representation": "content_embedding_dim or embedding_table_size",
    "transitions": "num_transitions, from model.set_transitions(histories)",
}


class UniGRFSimilarityMixin:
    """Vectors and similar items, for a model with `config`, `catalog`, `scorer` and `prefill`."""

    @torch.no_grad()
    def item_representations(self, items: torch.LongTensor | Sequence[int] | None = None) -> torch.FloatTensor:
        """
        Return the representations of items, as an index of one's own needs them.

        The dot product of a row and a row of `user_vectors` is the dense-retrieval score.

        Args:
            items (`torch.LongTensor` of shape `(n,)`, or a list, *optional*): Item indices. None: all items, in order.

        Returns:
            `torch.FloatTensor` of shape `(n, config.representation_size)`, in the model's dtype.

        Raises:
            ValueError: for items outside the catalog, a model without item representations, and numbers that are not
                finite.
        """
        self._check_similarity("representation")
        if items is None:
            items = range(self.catalog.num_items)
        items = catalog_items("items", items, self.catalog.num_items, self.catalog.item_codes.device)
        vectors = torch.cat([self.scorer.representations(part) for part in items.split(MAX_LEAVES)])
        check_scores("item_representations", ~vectors.isfinite().all())
        return vectors

    @torch.no_grad()
    def user_vectors(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        timestamps: torch.LongTensor | None = None,
        query_time: torch.LongTensor | None = None,
    ) -> torch.FloatTensor:
        """
        Return the vectors of histories whose dot products with `item_representations` are dense-retrieval scores.

        The arguments are those of `recommend`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, config.representation_size)`, in the model's dtype.

        Raises:
            ValueError: for a model without dense-retrieval scores, numbers that are not finite, and the reasons of
                `recommend`.
        """
        if not self.scorer.has_dense_scores:
            raise ValueError(
                "`user_vectors` needs a model with dense-retrieval scores, got ranking_targets="
                f"{self.config.ranking_targets}. Train a model with the ranking target 'next' and "
                f"{SIMILARITIES['representation']}."
            )
        states = self.prefill(input_ids, attention_mask, timestamps=timestamps, query_time=query_time)
        vectors = self.scorer.ranking_head.history_query(states)
        check_scores("user_vectors", ~vectors.isfinite().all())
        return vectors

    @torch.no_grad()
    def similar_items(
        self,
        items: torch.LongTensor | Sequence[int],
        count: int = 10,
        by: str = "content",
        catalog: CatalogTrie | None = None,
    ) -> tuple[torch.LongTensor, torch.FloatTensor]:
        """
        Find the items that are most similar to each of some items. An item is not similar to itself.

        Args:
            items (`torch.LongTensor` of shape `(n,)`, or a list): Item indices.
            count (`int`, defaults to 10): Most similar items of each.
            by (`str`, defaults to `"content"`): `"content"`: the cosine of content embeddings. `"representation"`: the
                cosine of item representations. `"transitions"`: the transition score without popularity and content;
                items that never followed are left out.
            catalog (`CatalogTrie`, *optional*): Find only items of this part of the catalog, made by
                `model.catalog.subset(items)`. None: the whole catalog.

        Returns:
            Item indices and their scores, `torch.LongTensor` and `torch.FloatTensor` (float32) of shape `(n, count)`,
            best first. A row with fewer items ends in -1 and -inf.

        Raises:
            ValueError: for items outside the catalog, a `count` below 1, another `by`, one that the model lacks, a
                part of another catalog, and scores that are not finite.
        """
        self._check_similarity(by)
        if count < 1:
            raise ValueError(f"`count` must be 1 or more, got {count}. Leave it out for ten items.")
        items = catalog_items("items", items, self.catalog.num_items, self.catalog.item_codes.device)
        if catalog is not None:
            self.catalog.check_part(catalog)
        trie = self.catalog.trie if catalog is None else catalog
        columns = [items.new_empty(0, count)], [torch.empty(0, count, device=items.device)]
        for part in items.split(max(1, MAX_SCORES // self.catalog.num_items)):
            best, scores = self.scorer.top_items_and_scores(self._similarities(part, by), count, trie, None)
            padding = (0, count - best.shape[1])
            columns[0].append(nn.functional.pad(best, padding, value=-1))
            columns[1].append(nn.functional.pad(scores, padding, value=-torch.inf))
        similar, scores = (torch.cat(column) for column in columns)
        check_scores("scores", ~(scores < torch.inf).all())
        return similar, scores

    def _similarities(self, items: torch.LongTensor, by: str) -> Callable[[torch.LongTensor], torch.FloatTensor]:
        """Return a function of items `[m]`: their scores `[n, m]` for `items [n]`, -inf for the item itself."""
        if by == "transitions":
            settings = self.serving_options().transition_settings
            settings = replace(settings, popularity_weight=0.0, content_weight=0.0)
            all_scores = self.transitions.scores(items[:, None], None, settings)
            is_none = (all_scores <= 0).scatter(1, items[:, None], True)
            all_scores = all_scores.masked_fill(is_none, -torch.inf)
            return lambda others: all_scores[:, others]

        def directions(of_items: torch.LongTensor) -> torch.FloatTensor:
            vectors = self.scorer.content_embeddings if by == "content" else self.scorer.representations
            return nn.functional.normalize(vectors(of_items).float(), dim=-1)

        queries = directions(items)
        return lambda others: (queries @ directions(others).T).masked_fill(others == items[:, None], -torch.inf)

    def _check_similarity(self, by: str) -> None:
        has = {
            "content": self.config.content_embedding_dim > 0,
            "representation": self.config.has_item_representations,
            "transitions": self.transitions is not None,
        }
        if by not in has:
            raise ValueError(f"`by` must be among {list(has)}, got {by!r}. Leave it out for the content.")
        if not has[by]:
            raise ValueError(
                f"Similar items by {by!r} need a model that has it, got one without. Make a model with "
                f"{SIMILARITIES[by]}."
            )
