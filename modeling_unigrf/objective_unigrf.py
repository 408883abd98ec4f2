# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The objective: from a batch with labels to the joint loss that `config.training_config` names.

`Objective.prepare` packs negatives behind the histories. The caller runs the backbone. `Objective.losses` computes all
losses from its output. With `num_retrieved_items` or `num_train_beams`, the ranking loss is that of RecoChain's stage
II. It ranks candidates of each row's last item on the cache of the histories.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from .configuration_unigrf import NEXT_TARGET, UniGRFConfig
from .inputs_unigrf import ITEM_SETS, ItemSets, check_item_sets, check_long_history, check_names
from .loss_unigrf import contrastive_loss, generation_loss, ranking_loss, sampled_softmax_loss
from .negatives_unigrf import (
    LossInputs,
    SupervisedItems,
    last_items,
    pack_negatives,
    retrieval_positives,
    supervised_items,
)
from .scoring_unigrf import ItemScorer, UniGRFCandidateBlock
from .shared_prefix_unigrf import attention_mask_4d
from .stage_two_unigrf import last_item_ranking_loss

logger = logging.get_logger(__name__)

# The last item counts as this many codes.
CONTRASTIVE_LOSS_WEIGHT = 10.0


def sampling_bias(num_items: int, negatives_per_item: float) -> float:
    """
    Compute the sampling bias: the log-odds that random negatives add to the `"next"` logit.

    The bias says how much rarer the next item is among the `num_items` items that training knows than among its
    negatives. It is 0 without negatives. (Prior correction for case-control sampling: King and Zeng 2001, section
    4.1.)
    """
    return math.log(max(1, num_items - 1) / negatives_per_item) if negatives_per_item else 0.0


@dataclass
class Objective:
    """
    The joint loss of a model.

    Args:
        config (`UniGRFConfig`), backbone (`UniGRFModel`), scorer (`ItemScorer`): Parts of the model.
        candidate_block (`UniGRFCandidateBlock`, *optional*): Makes candidate blocks. None: without sub-histories.
        task_weights (`tuple[float, float]`): Factors of the retrieval and ranking losses in training, beside the
            config's weights.
        measures_gradients (`bool`): Whether training also returns `gradient_norms`, by a second backward.
    """

    config: UniGRFConfig
    backbone: PreTrainedModel
    scorer: ItemScorer
    candidate_block: UniGRFCandidateBlock | None
    task_weights: tuple[float, float] = (1.0, 1.0)
    measures_gradients: bool = False

    @property
    def is_training(self) -> bool:
        """Whether the model is in training mode."""
        return self.backbone.training

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Return None (the global generator) in training, a fixed generator in evaluation: its loss must not vary."""
        return None if self.is_training else torch.Generator(device).manual_seed(0)

    def prepare(
        self,
        inputs: dict,
        tokens: torch.LongTensor,
        targets: torch.LongTensor,
        long_history: dict | None,
        item_sets: dict | None,
    ) -> tuple[dict, LossInputs]:
        """
        Pack negatives behind the histories of a batch.

        Args:
            inputs (`dict`): The backbone's inputs.
            tokens, targets (`torch.LongTensor` of shape `(batch_size, T)`): Tokens and next tokens (-100: no target).
            long_history, item_sets (`dict`, *optional*): The arguments of `UniGRFForCausalLM.forward`.

        Returns:
            The backbone's new inputs, and the inputs of `losses`.

        Raises:
            ValueError: for the reasons of `UniGRFForCausalLM.forward`.
        """
        layout = self.scorer.layout
        trie = self.scorer.catalog.trie
        training = self.config.training_config
        items = supervised_items(layout, trie, tokens, targets)
        has_candidates = "candidates" in check_names("item_sets", item_sets or {}, ITEM_SETS)
        ranks_last = training.ranking_loss_weight > 0 and (has_candidates or self.config.ranks_last_items)
        per_item = 0.0 if ranks_last else self.config.random_negatives_per_item
        # The check rejects a long history that the model does not read.
        if ranks_last or (long_history and not self.config.num_retrieved_items):
            long_history = check_long_history(
                self.config, trie.num_items, len(tokens), long_history, "timestamps" in inputs
            )
        attention_mask = inputs["attention_mask"]
        has_own_places = inputs["cache"] is not None or inputs["position_ids"] is not None
        if has_own_places or (attention_mask is not None and attention_mask.dim() != 2):
            self._reject_packing(item_sets, ranks_last or per_item)
            return inputs, LossInputs(targets, items)

        learns_next = self.is_training and training.ranking_loss_weight and NEXT_TARGET in self.config.ranking_targets
        if learns_next and not (ranks_last or per_item):
            logger.warning_once(
                f"The ranking target {NEXT_TARGET!r} sees no item that did not come next. Set negatives_per_item "
                "to 0.1, or ranking_loss_weight to 0."
            )
        attention_mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
        sequence_ids, position_ids = layout.packed_histories(tokens, attention_mask)
        loss_inputs = LossInputs(targets, items, sequence_ids, attention_mask, trie=trie, negatives_per_item=per_item)
        if item_sets:
            loss_inputs.item_sets = check_item_sets(item_sets, sequence_ids, trie.num_items)
        inputs = self._pack(inputs, loss_inputs, position_ids)
        if ranks_last:
            loss_inputs.long_history = long_history
            loss_inputs.cache = DynamicCache()
            inputs |= {"cache": loss_inputs.cache, "use_cache": True}
        return inputs, loss_inputs

    @staticmethod
    def _reject_packing(item_sets: dict | None, packs: bool) -> None:
        """Raise `ValueError` if tokens must be packed behind histories with the caller's mask, positions or cache."""
        names = [name for name in ("hard_negatives", "excluded_positives") if (item_sets or {}).get(name) is not None]
        if packs or names:
            raise ValueError(
                "`attention_mask` must be 2-D, and `position_ids` and `cache` None, where negatives or candidates "
                "are packed behind the histories, got places of your own. Leave these out, or set "
                "negatives_per_item=0 in training_config and pass no item_sets."
            )

    def _pack(self, inputs: dict, loss_inputs: LossInputs, position_ids: torch.LongTensor) -> dict:
        """
        Make the 4-D mask, the positions and the times of packed histories and negatives.

        Rows of a single history without negatives need no mask.
        """
        layout = self.scorer.layout
        sequence_ids = loss_inputs.sequence_ids
        sets = loss_inputs.item_sets
        per_item = loss_inputs.negatives_per_item
        if sets is None:
            empty = sequence_ids.new_empty(len(sequence_ids), 0)
            sets = ItemSets(empty, empty)
        # Mask and positions.
        packs_negatives = per_item or (sets.hard_negatives.shape[1] and layout.num_levels > 1)
        if packs_negatives or sequence_ids.max() > 1:
            mask = layout.history_mask(sequence_ids, loss_inputs.attention_mask)
            if packs_negatives:
                generator = self.generator(sequence_ids.device)
                parts = (layout, self.scorer.catalog.item_codes, self.scorer.known_items(), loss_inputs.items)
                negatives = pack_negatives(*parts, position_ids, mask, per_item, sets, generator)
                loss_inputs.negatives = negatives
                position_ids = torch.cat([position_ids, negatives.position_ids], dim=1)
                mask = nn.functional.pad(mask, (0, negatives.tokens.shape[1]))
                mask = torch.cat([mask, negatives.attention_mask], dim=1)
                inputs = inputs | self._append(inputs, negatives.tokens)
            config = self.backbone.language_model.config
            mask = attention_mask_4d(config, mask, position_ids, position_ids, self.backbone.dtype)
            inputs = inputs | {"attention_mask": mask, "position_ids": position_ids, "use_cache": False}
        # Times.
        if "timestamps" in inputs:
            times = inputs["timestamps"]
            target_times = inputs.get("target_timestamps")
            if target_times is None:
                target_times = layout.target_timestamps(times, sequence_ids)
            if loss_inputs.negatives is not None:
                # A negative stands where the true next item does: at its time.
                query_time = target_times.gather(1, loss_inputs.negatives.history_ends)
                query_time = query_time.repeat_interleave(layout.num_levels, dim=1)
                times, target_times = (torch.cat([column, query_time], dim=1) for column in (times, target_times))
            inputs = inputs | {"timestamps": times, "target_timestamps": target_times}
            loss_inputs.target_timestamps = target_times
        return inputs

    def _append(self, inputs: dict, tokens: torch.LongTensor) -> dict:
        """Append `tokens [B, M * L]` to the token ids or embeddings of `inputs`."""
        if "input_ids" in inputs:
            return {"input_ids": torch.cat([inputs["input_ids"], tokens], dim=1)}
        embeddings = self.backbone.get_input_embeddings()(tokens)
        return {"inputs_embeds": torch.cat([inputs["inputs_embeds"], embeddings], dim=1)}

    def losses(
        self,
        hidden_states: torch.Tensor,
        loss_inputs: LossInputs,
        num_items_in_batch: int | torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """
        Compute all losses from the backbone's output `[batch_size, T (+ M * L), hidden_size]`.

        Training stores the sampling bias in `config.next_logit_bias`, which `rank` subtracts.

        Returns:
            `loss`, the weighted sum; the other losses by their names in `UniGRFCausalLMOutput`, without gradient.
        """
        config = self.config
        training = self.config.training_config
        targets = loss_inputs.targets
        sets = loss_inputs.item_sets
        of_histories = hidden_states[:, : targets.shape[1]]
        code_targets = targets
        positives = loss_inputs.items
        share = 1.0
        if training.retrieval_behaviors is not None:
            code_targets, positives, share = retrieval_positives(config, self.scorer.layout, targets, positives)
        losses = {}
        # Generation.
        if training.generation_loss_weight:
            code_negatives, sets_of_codes = (training.code_negatives, sets) if self.is_training else (0, None)
            losses["generation_loss"] = share * generation_loss(
                self.scorer, of_histories, code_targets, code_negatives, sets_of_codes, self.measures_gradients
            )
        # Ranking.
        if loss_inputs.cache is not None:
            losses["ranking_loss"] = last_item_ranking_loss(
                self.backbone,
                self.scorer,
                self.candidate_block,
                loss_inputs,
                of_histories,
                self.generator(hidden_states.device),
            )
        elif training.ranking_loss_weight:
            losses["ranking_loss"] = self._ranking_loss(hidden_states, loss_inputs)
        # Dense retrieval.
        if training.dense_loss_weight:
            losses["dense_loss"] = share * self._dense_loss(hidden_states, positives)
        if sets is not None and sets.hard_negatives.shape[1] and self.scorer.layout.num_levels > 1:
            last = last_items(loss_inputs.items, len(targets))
            num_hard = sets.hard_negatives.shape[1]
            losses["contrastive_loss"] = share * contrastive_loss(
                self.scorer, hidden_states, code_targets, last, loss_inputs.negatives, num_hard
            )
        if not losses:
            raise ValueError(
                "A loss weight of `training_config` must be positive, got 0 for all of them: labels teach nothing. "
                "Set one."
            )
        loss = self._weighted_sum(losses)
        if num_items_in_batch is not None:
            loss = loss * (targets != -100).sum() / num_items_in_batch
        if self.is_training and "ranking_loss" in losses:
            num_known = len(self.scorer.known_items())
            config.next_logit_bias = sampling_bias(num_known, loss_inputs.negatives_per_item)
        norms = {}
        if self.is_training and self.measures_gradients:
            norms["gradient_norms"] = self._gradient_norms(losses, hidden_states)
        return {"loss": loss, **{name: value.detach() for name, value in losses.items()}, **norms}

    def _weighted_sum(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """Compute the joint loss; task weights count in training only, so that evaluation losses stay comparable."""
        training = self.config.training_config
        weights = {
            "generation_loss": training.generation_loss_weight,
            "ranking_loss": training.ranking_loss_weight,
            "dense_loss": training.dense_loss_weight,
            "contrastive_loss": CONTRASTIVE_LOSS_WEIGHT,
        }
        retrieval_weight, ranking_weight = self.task_weights if self.is_training else (1.0, 1.0)
        loss = 0.0
        for name, value in losses.items():
            task_weight = ranking_weight if name == "ranking_loss" else retrieval_weight
            loss = loss + task_weight * weights[name] * value
        return loss

    def _gradient_norms(self, losses: dict[str, torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute the norms `[2]` of the generation and ranking losses' gradients at the backbone's output."""
        norms = []
        for name in ("generation_loss", "ranking_loss"):
            gradient = None
            if name in losses:
                gradient = torch.autograd.grad(losses[name], hidden_states, retain_graph=True, allow_unused=True)[0]
            norms.append(hidden_states.new_zeros(()).float() if gradient is None else gradient.norm().float())
        return torch.stack(norms)

    def _dense_loss(self, hidden_states: torch.Tensor, positives: SupervisedItems) -> torch.Tensor:
        """Compute the sampled-softmax loss of the items that retrieval learns."""
        states = hidden_states[positives.rows, positives.history_ends]
        queries = self.scorer.ranking_head.history_query(states)
        generator = self.generator(states.device)
        representations = self.scorer.representations
        return sampled_softmax_loss(queries, positives.items, representations, self.scorer.known_items(), generator)

    def _ranking_loss(self, hidden_states: torch.Tensor, loss_inputs: LossInputs) -> torch.Tensor:
        """Compute the ranking loss of all supervised items and of the random negatives behind them."""
        supervised = loss_inputs.items
        negatives = loss_inputs.negatives
        head = self.scorer.ranking_head
        representations = self.scorer.representations
        logits = head(
            hidden_states[supervised.rows, supervised.positions],
            hidden_states[supervised.rows, supervised.history_ends],
            representations(supervised.items),
        )
        negative_logits = None
        if negatives is not None:
            is_random = negatives.is_random
            states = self.scorer.layout.ranking_states(hidden_states[:, -negatives.tokens.shape[1] :])
            ends = hidden_states[is_random.nonzero()[:, 0], negatives.history_ends[is_random]]
            negative_logits = head(states[is_random], ends, representations(negatives.items[is_random]))
        return ranking_loss(self.scorer.layout.ranking_targets, logits, supervised.behaviors, negative_logits)
