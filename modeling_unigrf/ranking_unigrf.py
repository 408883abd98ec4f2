# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The ranking head, and what it knows of an item beyond its codes."""

import torch
from torch import nn

from .configuration_unigrf import NEXT_TARGET, UniGRFConfig


class UniGRFItemEncoder(nn.Module):
    """
    What the ranking and, with `config.history_item_representations`, a history know of an item beyond its codes: its projected
    embedding plus a learned row (RecoChain's item token, section 1: a multimodal and a learned part). Codes are shared
    between items; this is the item's own.
    """

    def __init__(self, config: UniGRFConfig):
        super().__init__()
        width, dim, rows = config.hidden_size, config.content_embedding_dim, config.embedding_table_size
        self.proj = nn.Linear(dim, width) if dim and config.project_content_embeddings else None
        self.table = nn.Embedding(rows, width) if rows else None
        self.num_rows = rows  # here, since an adapter's wrapper of the table has no such number

    def forward(self, items: torch.LongTensor, embeddings: torch.Tensor | None) -> torch.Tensor | None:
        """Item indices `[...]` and their embeddings `[..., D]` -> `[..., hidden_size]`; None if there is neither part."""
        vectors = None
        if self.proj is not None:
            # The dtype of the bias: quantized weights (bitsandbytes) have one that holds no embedding. torch's own quantized
            # layers, whose bias is a method, take floats as they are.
            vectors = self.proj(embeddings.to(getattr(self.proj.bias, "dtype", embeddings.dtype)))
        if self.table is None:
            return vectors
        learned = self.table(items % self.num_rows)
        return learned if vectors is None else vectors + learned

    def add_rows(self, count: int) -> None:
        """Appends rows for new items, each the mean of the others: an item of which nothing was learned yet."""
        rows = self.table.weight.data
        rows = torch.cat([rows, rows.mean(dim=0, keepdim=True).expand(count, -1)])
        self.table.weight = nn.Parameter(rows, requires_grad=self.table.weight.requires_grad)
        self.table.num_embeddings = self.num_rows = len(rows)


class UniGRFRankingHead(nn.Module):
    """
    Scores an item from the hidden state at its last code (history and item seen) and from the item's own vector; for
    `"next"` also (with `config.rank_by_dense_score`) from the state at the history's end and the item's vector, a score that a
    softmax over items can train.
    """

    def __init__(self, config: UniGRFConfig):
        super().__init__()
        width, num_targets = config.hidden_size, len(config.ranking_targets)
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.ranking_dropout)
        self.out_proj = nn.Linear(width, num_targets)
        has_vectors = config.has_item_representations
        self.query = nn.Linear(width, num_targets * width) if has_vectors else None
        self.next_target = config.ranking_targets.index(NEXT_TARGET) if NEXT_TARGET in config.ranking_targets else None
        self.history_query = nn.Linear(width, width) if has_vectors and self.next_target is not None else None
        self.detaches_item_score = config.stop_gradient_dense_score
        self.adds_item_score = config.rank_by_dense_score and self.has_dense_scores

    @property
    def has_dense_scores(self) -> bool:
        """Whether items have a score of their own, by the history's end alone (`dense_scores`)."""
        return self.history_query is not None

    def dense_scores(self, history_states: torch.Tensor, item_representations: torch.Tensor) -> torch.Tensor:
        """States at the history's end and vectors of the items, both `[..., hidden_size]` -> scores `[...]`."""
        return (self.history_query(history_states) * item_representations).sum(dim=-1)

    def forward(
        self, hidden_states: torch.Tensor, history_states: torch.Tensor, item_representations: torch.Tensor | None
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.FloatTensor` of shape `(..., hidden_size)`): At the last codes of the items.
            history_states (the same, or broadcast to it): At the end of the history before each item.
            item_representations (the same, *optional*): Of the items.

        Returns:
            `torch.FloatTensor` of shape `(..., num_ranking_targets)`: logits.
        """
        if self.query is None:
            return self.out_proj(self.dropout(nn.functional.silu(self.dense(hidden_states))))
        # A perceptron on the sum, and for each target a dot product, which a perceptron is slow to learn.
        queries = self.query(hidden_states).unflatten(-1, (-1, hidden_states.shape[-1]))
        match = (queries * item_representations[..., None, :]).sum(dim=-1) * hidden_states.shape[-1] ** -0.5
        logits = (
            self.out_proj(self.dropout(nn.functional.silu(self.dense(hidden_states + item_representations)))) + match
        )
        if not self.adds_item_score:
            return logits
        next_scores = self.dense_scores(history_states, item_representations)[..., None]
        next_scores = next_scores.detach() if self.detaches_item_score else next_scores
        return logits + nn.functional.pad(next_scores, (self.next_target, logits.shape[-1] - self.next_target - 1))
