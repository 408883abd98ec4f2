# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Metrics of evaluation for the stock `Trainer`, which may choose the best checkpoint by each of them."""

from typing import Any

import torch
from torch import nn
from transformers import EvalPrediction

from .negatives_unigrf import last_items, supervised_items

LOSSES = ("generation_loss", "ranking_loss", "dense_loss", "contrastive_loss")


class TrainerMetrics:
    """
    The parts of the loss, and the recall of each row's last item in the list that the model recommends.

        metrics = TrainerMetrics(model, top_k=10)
        Trainer(model, args, ..., compute_metrics=metrics.compute, preprocess_logits_for_metrics=metrics.preprocess)

    The log has `eval_generation_loss`, `eval_ranking_loss`, `eval_dense_loss` and `eval_recall@10`. Each is a mean
    over rows, as `eval_loss` is, and a name for `metric_for_best_model`. The logits do not stay in memory.

    Args:
        model (`nn.Module`): The model that is trained, also wrapped by PEFT.
        top_k (`int`, *optional*): Items of a list. A list costs a search for each row. None: no recall.

    Raises:
        ValueError: for `top_k` below 1.
    """

    def __init__(self, model: nn.Module, top_k: int | None = None):
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` must be 1 or more, got {top_k}. Leave it out for no recall.")
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.top_k = top_k
        self.names: list[str] = []
        self._last: tuple[dict[str, Any], Any] | None = None
        model.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, model, args, kwargs, output):
        if not model.training and output.get("loss") is not None:
            self._last = (kwargs, output)

    def preprocess(self, logits: Any, labels: torch.LongTensor) -> torch.FloatTensor:
        """Return the values of each row of the batch that the model has just read, `[batch_size, num_metrics]`."""
        if self._last is None:
            raise ValueError(
                "`preprocess` must follow a forward with labels in evaluation mode, got none. Pass the Trainer's own "
                "model to TrainerMetrics."
            )
        inputs, output = self._last
        self._last = None
        values = {name: output[name].float().expand(len(labels)) for name in LOSSES if output.get(name) is not None}
        if self.top_k is not None:
            values[f"recall@{self.top_k}"] = self._hits(inputs)
        self.names = list(values)
        return torch.stack(list(values.values()), dim=1)

    def compute(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the mean of each metric over the rows that have it."""
        values = torch.as_tensor(prediction.predictions).double().nanmean(dim=0)
        return dict(zip(self.names, values.tolist(), strict=True))

    def _hits(self, inputs: dict[str, Any]) -> torch.FloatTensor:
        """Return whether the list after each history holds its last item, `[batch_size]`; NaN: no supervised item."""
        tokens = inputs["input_ids"]
        targets = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        model = self.model
        last = last_items(supervised_items(model.layout, model.catalog.trie, tokens, targets), len(tokens))
        hits = torch.full((len(tokens),), torch.nan, device=tokens.device)
        rows = (last.items >= 0).nonzero()[:, 0]
        if not len(rows):
            return hits
        histories, masks, times, query_times = [], [], [], []
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(tokens) if mask is None else mask
        timestamps = inputs.get("timestamps")
        for row, end in zip(rows.tolist(), last.history_ends[rows].tolist(), strict=True):
            # A packed row has further histories before.
            starts = (tokens[row, : end + 1] == model.config.bos_token_id).nonzero()
            part = slice(int(starts[-1]) if len(starts) else 0, end + 1)
            histories.append(tokens[row, part])
            masks.append(mask[row, part])
            if timestamps is not None:
                times.append(timestamps[row, part])
                query_times.append(timestamps[row, end + 1])
        batch = {
            "input_ids": left_padded(histories, model.config.pad_token_id),
            "attention_mask": left_padded(masks, 0),
        }
        if times:
            batch |= {"timestamps": left_padded(times, -1), "query_time": torch.stack(query_times)}
        if (long_history := inputs.get("long_history")) is not None:
            batch["long_history"] = {name: column[rows] for name, column in long_history.items()}
        num_beams = max(self.top_k, model.serving_options().num_beams)
        best = model.recommend(**batch, num_beams=num_beams, num_return_sequences=self.top_k)
        hits[rows] = (best.item_indices == last.items[rows, None]).any(dim=1).float()
        return hits


def left_padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    """Return the rows as a batch, padded on the left."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")
