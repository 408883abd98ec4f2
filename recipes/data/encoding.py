"""Encode histories of catalog rows as model inputs."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import BatchEncoding

from tokenization import SemanticIdTokenizer


def padded(rows: list, value: int = -1, side: str = "right") -> torch.LongTensor:
    """Rows of integers, of any lengths -> `[B, longest]`, filled up by a value: -1 is no item, no behavior and no time."""
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def encode(
    tokenizer: SemanticIdTokenizer,
    items: Sequence[np.ndarray],
    behaviors: Sequence[np.ndarray],
    timestamps: Sequence[np.ndarray] | None = None,
    query_time: Sequence[int] | None = None,
) -> BatchEncoding:
    """
    What `recommend`, `rank` and `generate` read of B histories of catalog rows: `input_ids` and `attention_mask`, padded on
    the left, and, as far as they are given, `timestamps`, each int64 `[B, T]`, and `query_time [B]`.
    """
    columns = {"input_ids": [tokenizer.encode_indices(*one) for one in zip(items, behaviors, strict=True)]}
    if timestamps is not None:
        columns["timestamps"] = [tokenizer.encode_times(times) for times in timestamps]
    batch = tokenizer.pad(columns, return_tensors="pt", padding_side="left")
    if query_time is not None:
        batch["query_time"] = torch.as_tensor(query_time, dtype=torch.long)
    return batch
