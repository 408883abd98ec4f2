# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""A batch with labels: histories packed in rows, negatives and candidates behind them, and all losses together.

What is drawn and what each loss is stands in `training_unigrf.py` and `candidates_unigrf.py`; here they meet.
"""

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from .candidates_unigrf import second_stage_loss
from .configuration_unigrf import NEXT_TARGET
from .shared_prefix_unigrf import attention_mask_4d
from .training_unigrf import (
    GivenItems,
    Negatives,
    SupervisedItems,
    Supervision,
    contrastive_loss,
    draw_negatives,
    generation_loss,
    given_items,
    ranking_loss,
    retrieval_positives,
    sampled_softmax_loss,
    supervised_items,
)

logger = logging.get_logger(__name__)


class UniGRFSupervisionMixin:
    """What `UniGRFForCausalLM` does with labels. Needs `layout`, `catalog`, `model` and heads."""

    # Of the losses of retrieval and of ranking, on top of the config's: what a callback may change during training.
    task_weights: tuple[float, float] = (1.0, 1.0)
    # Whether a forward in training returns `gradient_norms`, which costs a second backward through the heads.
    measures_gradients: bool = False

    @property
    def _negatives_per_item(self) -> float:
        is_ranked = self.config.ranking_loss_weight and NEXT_TARGET in self.config.ranking_targets
        return self.config.negatives_per_item if is_ranked else 0.0

    @property
    def _second_stage(self) -> bool:
        """Whether the ranking is trained on candidates for the last item of a row."""
        return self.config.num_retrieved_items > 0 or self.config.num_train_beams > 0

    def _appends(self, given: GivenItems | None) -> bool:
        """Whether given negatives have tokens of their own; those of atomic ids are in the generation loss."""
        return given is not None and given.negatives.shape[1] > 0 and self.config.num_levels > 1

    def _supervise(
        self,
        inputs: dict,
        tokens: torch.LongTensor,
        targets: torch.LongTensor,
        hard_negatives: torch.LongTensor | None,
        excluded_positives: torch.LongTensor | None,
        candidates: torch.LongTensor | None,
        long_items: torch.LongTensor | None,
        long_behaviors: torch.LongTensor | None,
        long_timestamps: torch.LongTensor | None,
        blocked_items: torch.LongTensor | None,
    ) -> tuple[dict, Supervision]:
        """The backbone's inputs as they are to be run, and what the losses need; arguments and errors as of `forward`."""
        items = supervised_items(self.layout, self.catalog.trie, tokens, targets)
        second_stage = self.config.ranking_loss_weight > 0 and (candidates is not None or self._second_stage)
        seen = inputs["attention_mask"]
        if not self.config.num_retrieved_items:  # which reads none, and says so
            self._long_history(len(tokens), long_items, long_behaviors, long_timestamps, "timestamps" in inputs)
        own = inputs["cache"] is not None or inputs["position_ids"] is not None
        if own or (seen is not None and seen.dim() != 2):
            beside = any(one is not None for one in (hard_negatives, excluded_positives))
            if second_stage or self._negatives_per_item or beside:
                raise ValueError(
                    "Negatives and candidates are run behind the histories, which needs a 2-D attention_mask, and neither "
                    "position_ids nor a cache. Leave them out; or set config.negatives_per_item = 0 and leave "
                    "hard_negatives, excluded_positives and candidates out."
                )
            return inputs, Supervision(targets, items)

        learns_next = self.training and self.config.ranking_loss_weight and NEXT_TARGET in self.config.ranking_targets
        if learns_next and not (second_stage or self._negatives_per_item):
            logger.warning_once(
                f"The ranking target {NEXT_TARGET!r} is trained on items that came next alone. Set config.negatives_per_item, e.g. to "
                "1.0, for some that did not; or ranking_loss_weight to 0."
            )
        seen = torch.ones_like(tokens) if seen is None else seen
        number, positions = self.layout.histories(tokens, seen)
        given = given_items(hard_negatives, excluded_positives, number, items, self.catalog.num_items)
        rows = {name: inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs}
        rows, mask, positions, negatives = self._pack(rows, number, positions, seen, items, given)
        inputs = inputs | rows
        if mask is not None:
            inputs |= {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        supervision = Supervision(targets, items, number, seen, given, negatives)
        if "timestamps" in inputs:
            if inputs["target_timestamps"] is None:
                inputs["target_timestamps"] = self.layout.target_timestamps(inputs["timestamps"], number)
            if negatives is not None:  # each is asked for when the true next item came
                query_time = inputs["target_timestamps"].gather(1, negatives.history_ends)
                query_time = query_time.repeat_interleave(self.config.num_levels, dim=1)
                for name in ("timestamps", "target_timestamps"):
                    inputs[name] = torch.cat([inputs[name], query_time], dim=1)
            supervision.target_timestamps = inputs["target_timestamps"]
        if second_stage:
            supervision.candidates, supervision.blocked_items = candidates, blocked_items
            supervision.long_history = self._long_history(
                len(tokens), long_items, long_behaviors, long_timestamps, "timestamps" in inputs
            )
            supervision.cache = DynamicCache()
            inputs |= {"cache": supervision.cache, "use_cache": True}
        return inputs, supervision

    def _pack(
        self,
        inputs: dict[str, torch.Tensor],
        number: torch.LongTensor,
        position_ids: torch.LongTensor,
        seen: torch.LongTensor,
        supervised: SupervisedItems,
        given: GivenItems | None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | dict | None, torch.LongTensor | None, Negatives | None]:
        """
        Several histories in a row, and negatives behind them, as one forward: the inputs with the negatives appended, the
        4-D mask, position ids and negatives. Rows of one history without negatives need none of it.
        """
        favorites = None if given is None else given.favorites
        given = given if self._appends(given) else None
        appends = self._negatives_per_item or given is not None
        if not appends and number.max() <= 1:
            return inputs, None, None, None
        mask = self.layout.history_mask(number, seen)
        negatives = None
        if appends:
            codes, per_item = self.catalog.item_codes, self._negatives_per_item
            generator = self._generator(number.device)
            negatives = draw_negatives(
                self.layout, codes, supervised, position_ids, mask, per_item, favorites, given, generator
            )
            more = negatives.tokens if "input_ids" in inputs else self.get_input_embeddings()(negatives.tokens)
            inputs = {name: torch.cat([value, more], dim=1) for name, value in inputs.items()}
            position_ids = torch.cat([position_ids, negatives.position_ids], dim=1)
            mask = nn.functional.pad(mask, (0, negatives.tokens.shape[1]))
            mask = torch.cat([mask, negatives.attention_mask], dim=1)
        config = self.model.language_model.config
        return inputs, attention_mask_4d(config, mask, position_ids, position_ids, self.dtype), position_ids, negatives

    def _ranking_loss(
        self, hidden_states: torch.Tensor, supervised: SupervisedItems, negatives: Negatives | None
    ) -> torch.Tensor:
        """Hidden states `[B, T (+ M * L), hidden_size]` of histories and negatives -> the ranking loss."""
        rows, last = supervised.rows, supervised.positions
        logits = self.ranking_head(
            hidden_states[rows, last],
            hidden_states[rows, supervised.history_ends],
            self.item_representations(supervised.items),
        )
        negative_logits = None
        if negatives is not None:
            usable, appended = negatives.usable, negatives.tokens.shape[1]
            states = self.layout.ranking_states(hidden_states[:, -appended:])
            ends = hidden_states[usable.nonzero()[:, 0], negatives.history_ends[usable]]
            negative_logits = self.ranking_head(
                states[usable], ends, self.item_representations(negatives.items[usable])
            )
        return ranking_loss(self.config, logits, supervised.behaviors, negative_logits)

    def _dense_loss(self, hidden_states: torch.Tensor, supervised: SupervisedItems) -> torch.Tensor:
        """Hidden states `[B, T, hidden_size]` -> cross-entropy of each supervised item among the items."""
        states = self.ranking_head.history_query(hidden_states[supervised.rows, supervised.history_ends])
        num_items, generator = self.catalog.num_items, self._generator(states.device)
        return sampled_softmax_loss(states, supervised.items, self.item_representations, num_items, generator)

    def _generator(self, device: torch.device) -> torch.Generator | None:
        """The global generator in training; a fixed one in evaluation, whose loss must not depend on what ran before."""
        return None if self.training else torch.Generator(device).manual_seed(0)

    def _losses(
        self,
        hidden_states: torch.Tensor,
        supervision: Supervision,
        num_items_in_batch: int | torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """
        All losses by their names in `UniGRFCausalLMOutput`, and `loss`, from the backbone's output `[B, T (+ M * L),
        hidden_size]`. All but `loss` are detached.
        """
        config, targets = self.config, supervision.targets
        of_histories = hidden_states[:, : targets.shape[1]]
        code_targets, retrieved, share = retrieval_positives(self.layout, config, targets, supervision.items)
        losses = {}
        if config.generation_loss_weight:
            losses["generation_loss"] = share * generation_loss(self, of_histories, code_targets, supervision.given)
        if supervision.cache is not None:
            losses["ranking_loss"] = second_stage_loss(self, supervision, of_histories)
        elif config.ranking_loss_weight:
            losses["ranking_loss"] = self._ranking_loss(hidden_states, supervision.items, supervision.negatives)
        if config.dense_loss_weight:
            losses["dense_loss"] = share * self._dense_loss(hidden_states, retrieved)
        if self._appends(supervision.given):
            losses["contrastive_loss"] = share * contrastive_loss(
                self, hidden_states, code_targets, supervision.given, supervision.negatives
            )
        if not losses:
            raise ValueError(
                "Expected a positive weight of some loss, found 0 for all: there is nothing to learn from labels."
            )
        # Losses of evaluation are compared with each other, whatever the weights were when each was taken.
        retrieval_weight, ranking_weight = self.task_weights if self.training else (1.0, 1.0)
        loss = 0.0
        for name, value in losses.items():
            weight = ranking_weight if name == "ranking_loss" else retrieval_weight
            loss = loss + weight * getattr(config, f"{name}_weight") * value
        if num_items_in_batch is not None:
            loss = loss * (targets != -100).sum() / num_items_in_batch
        norms = {}
        if self.training and self.measures_gradients:
            gradients = [
                torch.autograd.grad(losses[name], hidden_states, retain_graph=True, allow_unused=True)[0]
                if name in losses
                else None
                for name in ("generation_loss", "ranking_loss")
            ]
            norms["gradient_norms"] = torch.stack(
                [loss.new_zeros(()) if one is None else one.norm().float() for one in gradients]
            )
        return {"loss": loss, **{name: value.detach() for name, value in losses.items()}, **norms}
