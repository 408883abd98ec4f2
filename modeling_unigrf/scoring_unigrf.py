# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Scoring: from the backbone's output states to scores of codes and of items.

An item has three scores of these states. The *generation score* is log P(item | history), the sum of its codes'
log-probabilities. The *ranking score* comes from the state at the item's last code (or at the end of its candidate
block). The *dense-retrieval score* is a dot product of the state at the history's end and the item's representation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .catalog_unigrf import INT8_ONE, UniGRFCatalog
from .configuration_unigrf import NEXT_TARGET, UniGRFConfig
from .layout_unigrf import ItemLayout
from .transitions_unigrf import TransitionSettings, UniGRFTransitions
from .trie_unigrf import CatalogTrie, ItemFilter

# Segments of a candidate block.
ITEM, RETRIEVED, CANDIDATE = range(3)
# Items whose representations are in memory at a time.
MAX_LEAVES = 2**16


class UniGRFCodeHead(nn.Linear):
    """
    The code head `lm_head`: a linear layer without bias, with a row for each token.

    Offloading and sharding have a weight in place inside `forward` alone. So the rows, too, come from there.
    """

    # A wrapper that passes arguments on has this attribute, too.
    selects_codes = True

    def __init__(self, width: int, num_tokens: int):
        super().__init__(width, num_tokens, bias=False)

    def forward(self, states: torch.Tensor | None, codes: slice = slice(None)) -> torch.Tensor:
        """Compute logits `[..., n]` of a slice of the tokens at states `[..., hidden_size]`; None: return its rows."""
        rows = self.weight[codes]
        return rows if states is None else nn.functional.linear(states, rows)


class UniGRFItemEncoder(nn.Module):
    """
    The representation of an item: its projected content embedding plus a learned row of the embedding table.

    RecoChain's item token (section 1) also has a multimodal and a learned part. Items share codes, but no
    representations. They have `config.representation_size` numbers; `widen` maps them to the backbone's width.
    """

    def __init__(self, config: UniGRFConfig):
        super().__init__()
        width = config.representation_size
        dim = config.content_embedding_dim
        num_rows = config.embedding_table_size
        is_narrow = width != config.hidden_size and config.has_item_representations
        self.proj = nn.Linear(dim, width) if dim and config.project_content_embeddings else None
        self.table = nn.Embedding(num_rows, width) if num_rows else None
        self.to_hidden = nn.Linear(width, config.hidden_size, bias=False) if is_narrow else None
        # An adapter's wrapper of the table has no such number.
        self.num_rows = num_rows

    def forward(self, items: torch.LongTensor, embeddings: torch.Tensor | None) -> torch.Tensor | None:
        """
        Make the representations of items from their indices and content embeddings.

        The projection may be quantized. Its bias then is a float tensor (bitsandbytes) or a method (torch), which
        leaves the input as it is.

        Args:
            items (`torch.LongTensor` of shape `(...)`): Item indices.
            embeddings (`torch.Tensor` of shape `(..., D)`, *optional*): Content embeddings, floats. None: the items
                have none.

        Returns:
            `torch.FloatTensor` of shape `(..., representation_size)`; None if there is neither part.
        """
        representations = None
        if self.proj is not None:
            # Cast to the bias's dtype: a quantized weight's dtype is an integer.
            representations = self.proj(embeddings.to(getattr(self.proj.bias, "dtype", embeddings.dtype)))
        if self.table is None:
            return representations
        learned = self.table(items % self.num_rows)
        return learned if representations is None else representations + learned

    def widen(self, representations: torch.Tensor) -> torch.Tensor:
        """Map representations `[..., representation_size]` to the backbone's width, `[..., hidden_size]`."""
        return representations if self.to_hidden is None else self.to_hidden(representations)

    def add_rows(self, count: int) -> None:
        """Append rows for new items to the embedding table, each the mean of the other rows."""
        rows = self.table.weight.data
        self._set_rows(torch.cat([rows, rows.mean(dim=0, keepdim=True).expand(count, -1)]))

    def reset_rows(self, count: int, std: float) -> None:
        """Replace the embedding table by `count` random rows of standard deviation `std`."""
        rows = self.table.weight.data
        self._set_rows(rows.new_empty(count, rows.shape[1]).normal_(std=std))

    def _set_rows(self, rows: torch.Tensor) -> None:
        self.table.weight = nn.Parameter(rows, requires_grad=self.table.weight.requires_grad)
        self.table.num_embeddings = self.num_rows = len(rows)


class UniGRFCandidateBlock(nn.Module):
    """The embeddings behind a candidate's codes, `ITEM(c) R_1 .. R_k CAND(c)`; the R_i are its sub-history."""

    def __init__(self, config: UniGRFConfig):
        super().__init__()
        self.segments = nn.Embedding(3, config.hidden_size)

    def forward(self, candidates: torch.Tensor, retrieved: torch.Tensor, behaviors: torch.Tensor) -> torch.Tensor:
        """
        Make the blocks' embeddings.

        Args:
            candidates (`torch.FloatTensor` of shape `(batch_size, N, hidden_size)`): Representations of the
                candidates.
            retrieved (`torch.FloatTensor` of shape `(batch_size, N, k, hidden_size)`): Representations of the
                retrieved items.
            behaviors (`torch.FloatTensor` of shape `(batch_size, N, k, hidden_size)`): Embeddings of the behaviors on
                the retrieved items.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, N, k + 2, hidden_size)`.
        """
        segments = self.segments(torch.arange(3, device=candidates.device))
        return torch.cat(
            [
                (candidates + segments[ITEM])[:, :, None],
                retrieved + behaviors + segments[RETRIEVED],
                (candidates + segments[CANDIDATE])[:, :, None],
            ],
            dim=2,
        )


class UniGRFRankingHead(nn.Module):
    """
    The logits of the ranking targets, from the state that has read an item and from the item's representation.

    With `config.rank_by_dense_score`, the `"next"` logit adds the dense-retrieval score, which a softmax over items
    can train.
    """

    def __init__(self, config: UniGRFConfig):
        super().__init__()
        width = config.hidden_size
        size = config.representation_size
        num_targets = len(config.ranking_targets)
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.ranking_dropout)
        self.out_proj = nn.Linear(width, num_targets)
        has_representations = config.has_item_representations
        self.query = nn.Linear(width, num_targets * size) if has_representations else None
        self.to_hidden = nn.Linear(size, width, bias=False) if has_representations and size != width else None
        self.next_index = config.ranking_targets.index(NEXT_TARGET) if NEXT_TARGET in config.ranking_targets else None
        self.history_query = nn.Linear(width, size) if config.has_dense_scores else None
        self.stops_dense_gradient = config.training_config.stop_gradient_dense_score
        self.adds_dense_score = config.rank_by_dense_score and config.has_dense_scores

    def dense_scores(self, history_states: torch.Tensor, representations: torch.Tensor) -> torch.Tensor:
        """Compute scores `[...]` of states `[..., hidden_size]` at the history's end and of representations."""
        return (self.history_query(history_states) * representations).sum(dim=-1)

    def forward(
        self, hidden_states: torch.Tensor, history_states: torch.Tensor, representations: torch.Tensor | None
    ) -> torch.Tensor:
        """
        Compute the logits of the ranking targets.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(..., hidden_size)`): States at the last codes of the items.
            history_states (`torch.FloatTensor` that broadcasts to this shape): States at the end of the history before
                each item.
            representations (`torch.FloatTensor` of shape `(..., representation_size)`, *optional*): Representations of
                the items. None: the items have none.

        Returns:
            `torch.FloatTensor` of shape `(..., num_ranking_targets)`: logits.
        """
        if self.query is None:
            return self.out_proj(self.dropout(nn.functional.silu(self.dense(hidden_states))))
        # Add a dot product, which a perceptron is slow to learn.
        size = representations.shape[-1]
        queries = self.query(hidden_states).unflatten(-1, (-1, size))
        match = (queries * representations[..., None, :]).sum(dim=-1) * size**-0.5
        added = representations if self.to_hidden is None else self.to_hidden(representations)
        mixed = nn.functional.silu(self.dense(hidden_states + added))
        logits = self.out_proj(self.dropout(mixed)) + match
        if not self.adds_dense_score:
            return logits
        next_scores = self.dense_scores(history_states, representations)[..., None]
        next_scores = next_scores.detach() if self.stops_dense_gradient else next_scores
        return logits + nn.functional.pad(next_scores, (self.next_index, logits.shape[-1] - self.next_index - 1))


@dataclass
class ItemScorer:
    """
    The functions that turn states into scores of codes and items, by the catalog and the heads of a model.

    Args:
        config (`UniGRFConfig`): Configuration of the model.
        layout (`ItemLayout`): The order of the tokens.
        catalog (`UniGRFCatalog`): Codes and content embeddings of all items.
        code_head (`UniGRFCodeHead`, or what an adapter or a quantization puts there): `lm_head`.
        item_encoder (`UniGRFItemEncoder`): Makes item representations.
        ranking_head (`UniGRFRankingHead`): Makes logits of the ranking targets.
        transitions (`UniGRFTransitions`, *optional*): Counts of what users took next. None: the model has none.
    """

    config: UniGRFConfig
    layout: ItemLayout
    catalog: UniGRFCatalog
    code_head: nn.Module
    item_encoder: UniGRFItemEncoder
    ranking_head: UniGRFRankingHead
    transitions: UniGRFTransitions | None = None

    @property
    def has_dense_scores(self) -> bool:
        """Whether items have a dense-retrieval score."""
        return self.ranking_head.history_query is not None

    @property
    def has_code_vectors(self) -> bool:
        """Whether `code_head` has rows: an adapter or a quantized layer has none, but computes logits."""
        return getattr(self.code_head, "selects_codes", False)

    def code_vectors(self, codes: slice) -> torch.Tensor:
        """
        Return the rows `[n, hidden_size]` of `code_head` for a slice of the tokens.

        Raises:
            ValueError: for an adapter on the head and for a quantized head.
        """
        if not self.has_code_vectors:
            got = "an adapter on it" if hasattr(self.code_head, "base_layer") else type(self.code_head).__name__
            raise ValueError(
                f"`lm_head` must be a plain layer where its weight is read, got {got} (code_similarity="
                f"{self.config.code_similarity!r}, code_negatives={self.config.training_config.code_negatives}). "
                "Train lm_head whole, `LoraConfig(modules_to_save=model.modules_to_save)`, and do not quantize it."
            )
        return self.code_head(None, codes)

    def code_logits(self, states: torch.Tensor, codes: slice = slice(None)) -> torch.Tensor:
        """Compute logits `[..., n]` of a slice of the tokens, and of no others, from states `[..., hidden_size]`."""
        if self.config.code_similarity == "cosine":
            return self.code_similarity(states, self.code_vectors(codes).T)
        # Run another layer whole.
        logits = self.code_head(states, codes) if self.has_code_vectors else self.code_head(states)[..., codes]
        return logits if self.config.code_temperature == 1.0 else logits / self.config.code_temperature

    def code_similarity(self, states: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """
        Compute logits `[..., n, m]` of states and rows of `code_head`.

        Args:
            states (`torch.Tensor` of shape `(..., n, hidden_size)`): States.
            vectors (`torch.Tensor` of shape `(..., hidden_size, m)`): Rows of `code_head`, as columns.
        """
        states, vectors = self.comparable(states, vectors, dim=-2)
        return states @ vectors

    def comparable(self, states: torch.Tensor, vectors: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale states `[..., hidden_size]` and rows of `code_head`, along `dim`, so that dot products are logits."""
        if self.config.code_similarity == "cosine":
            states = nn.functional.normalize(states, dim=-1, eps=1e-6)
            vectors = nn.functional.normalize(vectors, dim=dim, eps=1e-6)
        return (states if self.config.code_temperature == 1.0 else states / self.config.code_temperature), vectors

    def code_log_probs(self, states: torch.Tensor, level: int) -> torch.FloatTensor:
        """Compute log-probabilities `[..., num_codes]` of a level's codes at states `[..., hidden_size]`, float32."""
        return self.code_logits(states, self.layout.level_slices[level]).float().log_softmax(dim=-1)

    def item_log_probs(
        self, items: torch.LongTensor, history_states: torch.FloatTensor, states: torch.FloatTensor
    ) -> torch.FloatTensor:
        """
        Compute `log P(item | history)`, the generation score.

        The last code of an item that training did not know was never trained. Such an item has an even share of the
        items with its other codes.

        Args:
            items (`torch.LongTensor` of shape `(batch_size, N)`): Item indices.
            history_states (`torch.FloatTensor` of shape `(batch_size, hidden_size)`): States at the ends of the
                histories.
            states (`torch.FloatTensor` of shape `(batch_size, N, >= L - 1, hidden_size)`): States at the items' codes.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, N)`: sums of log-probabilities.
        """
        codes = self.catalog.item_codes[items].long()
        total = history_states.new_zeros(items.shape, dtype=torch.float32)
        for level in range(self.layout.num_levels):
            before = history_states[:, None] if level == 0 else states[:, :, level - 1]
            log_probs = self.code_log_probs(before, level).expand(-1, items.shape[1], -1)
            log_probs = log_probs.gather(2, codes[..., level : level + 1])[..., 0]
            if self.transitions is not None and 0 < level == self.layout.num_levels - 1:
                trie = self.catalog.trie
                group = trie.nodes_of(codes)[..., -2]
                log_probs = torch.where(
                    self.is_untrained(items), -trie.num_leaves(level - 1, group).float().log(), log_probs
                )
            total += log_probs
        return total

    def content_embeddings(self, items: torch.LongTensor) -> torch.Tensor | None:
        """Look up the content embeddings `[..., D]` of items `[...]`, as floats; None if the items have none."""
        if self.catalog.content_embeddings is None:
            return None
        rows = self.catalog.content_embeddings[items]
        return rows / INT8_ONE if rows.dtype == torch.int8 else rows

    def representations(self, items: torch.LongTensor) -> torch.Tensor | None:
        """
        Make the representations `[..., representation_size]` of items `[...]`; None if the model has none.

        An item that training did not know has the learned row of its stand-in.
        """
        rows = items if self.transitions is None else self.transitions.stand_ins[items].long()
        return self.item_encoder(rows, self.content_embeddings(items))

    def is_untrained(self, items: torch.LongTensor) -> torch.BoolTensor:
        """Return whether each item has a stand-in, since training did not know it; for a model with transitions."""
        return self.transitions.stand_ins[items] != items

    def log_popularity(self, items: torch.LongTensor) -> torch.FloatTensor:
        """Return the log number of interactions of each item, half a one for none; for a model with transitions."""
        return self.transitions.item_counts[items].clamp(min=0.5).log()

    def known_items(self) -> torch.LongTensor:
        """Return the items that training knows, in order: those without a stand-in, or all of them."""
        items = torch.arange(self.catalog.num_items, device=self.catalog.item_codes.device)
        return items if self.transitions is None else items[self.transitions.stand_ins == items]

    def transition_scores(self, histories: torch.LongTensor, settings: TransitionSettings) -> torch.FloatTensor:
        """Compute the transition scores `[B, num_items]` after last items `[B, H]`, last first (-1: none)."""
        embeddings = None
        if settings.content_weight and self.catalog.content_embeddings is not None:
            embeddings = self.content_embeddings(torch.arange(self.catalog.num_items, device=histories.device))
        return self.transitions.scores(histories, embeddings, settings)

    def history_representations(self, input_ids: torch.LongTensor) -> torch.FloatTensor | None:
        """
        Make the item representations that `UniGRFModel` adds to the embeddings of `input_ids [B, T]`.

        Returns:
            `torch.FloatTensor` of shape `(B, T, hidden_size)`: at every behavior the representation of the item before
            it, zeros if the catalog lacks the item. None without `config.history_item_representations`.

        Raises:
            ValueError: if a row begins behind an item's codes.
        """
        if not self.config.history_item_representations:
            return None
        places, codes = self.layout.behavior_items(input_ids)
        items = self.catalog.trie.lookup(codes)
        representations = self.item_encoder.widen(self.representations(items.clamp(min=0))) * (items >= 0)[:, None]
        added = representations.new_zeros(*input_ids.shape, self.config.hidden_size)
        return added.index_put(tuple(places.unbind(dim=1)), representations)

    def dense_scores(self, history_states: torch.FloatTensor, items: torch.LongTensor) -> torch.FloatTensor | None:
        """
        Compute the dense-retrieval scores `[B, N]` of `items [B, N]` at history ends `[B, hidden_size]`, float32.

        The result is None for a model without this score.
        """
        if not self.has_dense_scores:
            return None
        return self.ranking_head.dense_scores(history_states[:, None], self.representations(items)).float()

    def all_dense_scores(self, history_states: torch.FloatTensor) -> Callable[[torch.LongTensor], torch.FloatTensor]:
        """Return a function of items `[n]`: their dense-retrieval scores `[B, n]` at `[B, hidden_size]`, float32."""
        queries = self.ranking_head.history_query(history_states)
        return lambda items: (queries @ self.representations(items).T).float()

    @staticmethod
    def top_items(
        scores_of: Callable[[torch.LongTensor], torch.FloatTensor],
        count: int,
        trie: CatalogTrie,
        item_filter: ItemFilter | None,
    ) -> torch.LongTensor:
        """Return the items of `top_items_and_scores`."""
        return ItemScorer.top_items_and_scores(scores_of, count, trie, item_filter)[0]

    @staticmethod
    def top_items_and_scores(
        scores_of: Callable[[torch.LongTensor], torch.FloatTensor],
        count: int,
        trie: CatalogTrie,
        item_filter: ItemFilter | None,
    ) -> tuple[torch.LongTensor, torch.FloatTensor]:
        """
        Find the items of a catalog with the best scores, among those that the filter allows.

        Args:
            scores_of (`Callable`): Function of item indices `[n]`: their scores `[batch_size, n]`, float32.
            count (`int`): Most items of each request.
            trie (`CatalogTrie`): The catalog, or a part of it.
            item_filter (`ItemFilter`, *optional*): The items that each request allows or blocks. None: allow all
                items.

        Returns:
            Item indices (-1: none) and their scores, both of shape `(batch_size, min(count, trie.num_items))`.
        """
        last_level = len(trie.levels) - 1
        best = None
        for leaves in torch.arange(trie.num_items, device=trie.leaf_items.device).split(MAX_LEAVES):
            items = trie.leaf_items[leaves].long()
            scores = scores_of(items)
            if best is None:
                best = scores[:, :0]
                best_items = best.long()
            if item_filter is not None and item_filter.concerns(last_level):
                is_alive = item_filter.alive(last_level, leaves.expand(len(scores), -1))
                scores = scores.masked_fill(~is_alive, -torch.inf)
            items = torch.cat([best_items, items.expand(len(scores), -1)], dim=1)
            scores = torch.cat([best, scores], dim=1)
            best, order = scores.topk(min(count, scores.shape[1]), dim=1)
            best_items = items.gather(1, order)
        return best_items.masked_fill(best == -torch.inf, -1), best

    def ranking_logits(
        self, states: torch.FloatTensor, history_states: torch.FloatTensor | None, items: torch.LongTensor
    ) -> torch.FloatTensor:
        """
        Compute the logits of the ranking targets, less the sampling bias of `"next"`.

        Args:
            states (`torch.FloatTensor` of shape `(batch_size, N, hidden_size)`): States at the items' last codes, or
                at the ends of their candidate blocks.
            history_states (`torch.FloatTensor` of shape `(batch_size, hidden_size)`, *optional*): States at the ends
                of the histories. None: for a model without dense-retrieval scores.
            items (`torch.LongTensor` of shape `(batch_size, N)`): Item indices.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, N, num_ranking_targets)`, float32.
        """
        ends = None if history_states is None else history_states[:, None]
        logits = self.ranking_head(states, ends, self.representations(items)).float()
        biases = [self.config.next_logit_bias if name == NEXT_TARGET else 0.0 for name in self.config.ranking_targets]
        return logits - torch.tensor(biases, device=logits.device)
