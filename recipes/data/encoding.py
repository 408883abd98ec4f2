"""Encode histories of catalog rows as model inputs.

Every recipe builds its batches here: no other module knows the names, the padding and the nesting of the inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from tokenization.vocabulary_layout import PAD, UNKNOWN_TIME

# Columns of one value per token, with their padding on the left.
TOKEN_PADDING = {"input_ids": PAD, "attention_mask": 0, "labels": -100, "timestamps": UNKNOWN_TIME}
# Columns of a training row: long history, and item sets.
LONG_HISTORY = {name: f"long_{name}" for name in ("items", "behaviors", "timestamps")}
ITEM_SETS = ("hard_negatives", "excluded_positives", "candidates", "blocked_items")


@dataclass
class HistoryEncoder:
    """
    Encode histories of catalog rows as the inputs of `recommend`, `rank` and `generate`.

    Args:
        tokenizer (`SemanticIdTokenizer`): Encodes items and behaviors and, for histories with times, the times.
        max_items (`int`, *optional*): Last items of a history that become tokens. None, the default: all items.
        max_long_items (`int`, *optional*): Last items of a history that become its long history. 0, the default: no
            long history. None: all items.
    """

    tokenizer: Any
    max_items: int | None = None
    max_long_items: int | None = 0

    def __call__(
        self,
        items: Sequence[np.ndarray],
        behaviors: Sequence[np.ndarray],
        timestamps: Sequence[np.ndarray] | None = None,
        query_time: Sequence[int] | None = None,
        device: str | torch.device = "cpu",
    ) -> dict[str, Any]:
        """
        Encode B histories, oldest item first.

        Args:
            items (`Sequence` of B integer arrays): Catalog rows of each history.
            behaviors (`Sequence` of B integer arrays): Indices into `tokenizer.behaviors`, one per item.
            timestamps (`Sequence` of B integer arrays, *optional*): Seconds, one per item; -1: unknown. None: the
                model reads no times.
            query_time (`Sequence` of B integers, *optional*): Seconds at which each list is requested; -1: unknown.
                None: the time of the last item.
            device (`str` or `torch.device`): Device of the inputs. Defaults to the CPU.

        Returns:
            `dict` of int64 tensors: `input_ids` and `attention_mask` `[B, T]`, padded on the left. The dict also has
            `timestamps [B, T]`, `query_time [B]` and the nested `long_history`, as the arguments ask.
        """
        columns = {"items": items, "behaviors": behaviors}
        if timestamps is not None:
            columns["timestamps"] = timestamps
        recent = slice(-self.max_items if self.max_items else None, None)
        users = zip(*columns.values(), strict=True)
        rows = [encode_history(self.tokenizer, *(values[recent] for values in user)) for user in users]
        inputs: dict[str, Any] = pad_tokens({name: [row[name] for row in rows] for name in rows[0]})
        if query_time is not None:
            inputs["query_time"] = torch.as_tensor(query_time, dtype=torch.long)
        if self.max_long_items != 0:
            recent = slice(-self.max_long_items if self.max_long_items else None, None)
            inputs |= long_history_inputs(
                {name: [values[recent] for values in column] for name, column in columns.items()}
            )
        return send_to_device(inputs, device)


def encode_history(
    tokenizer: Any, items: Sequence | np.ndarray, behaviors: Sequence | np.ndarray, timestamps: Any = None
) -> dict[str, np.ndarray]:
    """Encode a history as int64 `[T]` columns: `input_ids`, `attention_mask` and, with times, `timestamps`."""
    tokens = tokenizer.encode_indices(np.asarray(items, dtype=np.int64), np.asarray(behaviors, dtype=np.int64))
    row = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    if timestamps is not None:
        row["timestamps"] = tokenizer.encode_times(timestamps)
    return row


def pad_rows(rows: Sequence, value: int = -1, side: str = "right") -> torch.Tensor:
    """Pad B rows of integers with `value` to int64 `[B, longest]`; -1 is no item, no behavior and no time."""
    tensors = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def pad_tokens(columns: Mapping[str, Sequence]) -> dict[str, torch.Tensor]:
    """Pad columns of `TOKEN_PADDING`, each of B rows, on the left: int64 `[B, T]` each."""
    return {name: pad_rows(rows, TOKEN_PADDING[name], "left") for name, rows in columns.items()}


def long_history_inputs(columns: Mapping[str, Sequence]) -> dict[str, dict[str, torch.Tensor]]:
    """Build the model inputs of B long histories from columns of B rows: `items`, `behaviors` and `timestamps`."""
    if not columns:
        return {}
    return {"long_history": {name: pad_rows(rows) for name, rows in columns.items()}}


def with_item_set(inputs: Mapping[str, Any], name: str, items: torch.Tensor) -> dict[str, Any]:
    """Add a set of items `[B, N]` (-1: none) to a batch, under one of the names in `ITEM_SETS`."""
    return {**inputs, "item_sets": {**inputs.get("item_sets", {}), name: items}}
