# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The model: a decoder-only backbone with one head that generates items and one that ranks them."""

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .candidates_unigrf import read_candidates
from .catalog_unigrf import UniGRFCatalog, first_spellings
from .configuration_hstu import HSTUConfig
from .configuration_unigrf import NEXT_TARGET, UniGRFConfig
from .generation_unigrf import UniGRFGenerationMixin
from .layout_unigrf import ItemLayout
from .modeling_hstu import HSTUModel
from .ranking_unigrf import UniGRFItemEncoder, UniGRFRankingHead
from .recommendation_unigrf import UniGRFRecommendationMixin
from .shared_prefix_unigrf import cache_rollback, check_cache
from .subhistory_unigrf import LongHistory, UniGRFCandidateBlock, check_long_history
from .supervision_unigrf import UniGRFSupervisionMixin
from .training_unigrf import softmax_over_items
from .trie_unigrf import CatalogTrie, check_items


@dataclass
class UniGRFCausalLMOutput(CausalLMOutputWithPast):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`): `generation_loss_weight * generation_loss + ranking_loss_weight *`
            `ranking_loss + dense_loss_weight * dense_loss + contrastive_loss_weight * contrastive_loss`, in training times
            `model.task_weights` (ranking: the second).
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`): Of the next token; a code's
            probability is the softmax over its own level's slice. None in training with labels: they would cost more than the
            loss, which needs a level's logits only where the level is.
        cache, hidden_states, attentions: As in every causal model of transformers; in training they cover the
            negatives behind the sequence as well.
        generation_loss (`torch.FloatTensor` of shape `()`): Mean cross-entropy of a code among its level's codes, with
            `config.generation_loss_weight`.
        ranking_loss (`torch.FloatTensor` of shape `()`): Mean over ranking targets of the binary cross-entropy, with
            `config.ranking_loss_weight`.
        dense_loss (`torch.FloatTensor` of shape `()`): Mean cross-entropy of the next item among all items (or a sample of 8,192), with
            `config.dense_loss_weight`.
        contrastive_loss (`torch.FloatTensor` of shape `()`): Cross-entropy of each row's last supervised item among
            itself and the row's `hard_negatives`, by their log-probabilities as sequences.
        gradient_norms (`torch.FloatTensor` of shape `(2,)`): Of generation and ranking loss, toward the backbone's output; in
            training with `model.measures_gradients`.
    """

    generation_loss: torch.FloatTensor | None = None
    ranking_loss: torch.FloatTensor | None = None
    dense_loss: torch.FloatTensor | None = None
    contrastive_loss: torch.FloatTensor | None = None
    gradient_norms: torch.FloatTensor | None = None


class UniGRFPreTrainedModel(PreTrainedModel):
    config_class = UniGRFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = False  # packed candidates need 4-D masks, which FlashAttention does not take
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def _init_weights(self, module):
        if isinstance(module, UniGRFRankingHead | UniGRFItemEncoder | UniGRFCandidateBlock):
            for child in module.children():
                if isinstance(child, nn.Linear | nn.Embedding):
                    init.normal_(child.weight, mean=0.0, std=self.config.initializer_range)
                if isinstance(child, nn.Linear):
                    init.zeros_(child.bias)
        elif isinstance(module, UniGRFCatalog):
            init.copy_(module.item_codes, first_spellings(module.num_items, module.codebook_sizes))
            if module.content_embeddings is not None:
                init.zeros_(module.content_embeddings)
        else:
            super()._init_weights(module)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """
        As every model of transformers.

        Raises:
            ValueError: if tokens that spell items would be left out.
        """
        needed = self.config.num_spelling_tokens
        if new_num_tokens is not None and new_num_tokens < needed:
            raise ValueError(
                f"Expected at least the {needed} tokens that spell the items, found new_num_tokens={new_num_tokens}. Take "
                "`len(tokenizer)`."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


# Backbones that take position_ids and go by a token's place in its row all the same.
PLACED_BY_ROW = ("gpt_neo", "opt")
# Fields of a backbone's config, and what they say of one that goes by places in a row or sees later tokens.
REFUSED = {"alibi": (True,), "is_decoder": (False,), "use_bidirectional_attention": (True, "all")}


class UniGRFModel(UniGRFPreTrainedModel):
    """The backbone alone: hidden states and cache of a token sequence."""

    # Whether keyword arguments reach the backbone's attention: `shares_prefix` tries.
    hands_down_arguments: bool = True

    def __init__(self, config: UniGRFConfig):
        super().__init__(config)
        # Our own backbone by its type: a copy of this code that was loaded from a folder has classes of its own.
        is_hstu = config.text_config.model_type == HSTUConfig.model_type
        self.language_model = (HSTUModel if is_hstu else AutoModel.from_config)(config.text_config)
        parameters = inspect.signature(self.language_model.forward).parameters
        text_config = config.text_config
        strange = set(getattr(text_config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        for name, values in REFUSED.items():
            value = getattr(text_config, name, None)
            strange |= {f"{name}={value}"} if value in values else set()
        if not {"position_ids", "cache"} <= parameters.keys() or text_config.model_type in PLACED_BY_ROW or strange:
            raise ValueError(
                "Expected a decoder-only backbone that places its tokens by `position_ids`, keeps a `cache` and takes 4-D masks, "
                f"since beams and candidates are packed into one row; found {text_config.model_type!r}"
                f"{f' with {sorted(strange)}' if strange else ''}. Take one of llama, qwen3, gpt2, mistral, hstu and their like."
            )
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        timestamps: torch.LongTensor | None = None,
        item_representations: torch.FloatTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        As every decoder of transformers. `position_ids` not given are counted on the 2-D `attention_mask`, so that a
        left-padded row is read exactly as it would be alone. With `config.history_item_representations`, `input_ids` that hold
        behaviors come with `item_representations [batch_size, sequence_length, hidden_size]`, from
        `UniGRFForCausalLM.history_item_representations`, which are added to their embeddings.

        Raises:
            ValueError: on timestamps for a backbone that does not read them, or without the item vectors.
        """
        if timestamps is not None:
            if not self.config.reads_times:
                raise ValueError(
                    f"Expected no timestamps for the backbone {self.config.text_config.model_type!r}, which does not read "
                    "them. Leave them out, or train `hstu` with num_time_buckets."
                )
            kwargs["timestamps"] = timestamps
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            length = (input_ids if input_ids is not None else inputs_embeds).shape[1]
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        if self.config.history_item_representations and input_ids is not None and item_representations is None:
            behaviors = input_ids.new_tensor(self.config.behavior_token_ids)
            if torch.isin(input_ids, behaviors).any():
                raise ValueError(
                    "Expected the vectors of the histories' items (config.history_item_representations), found none. Call "
                    "`UniGRFForCausalLM`, or pass item_representations=model.history_item_representations(input_ids)."
                )
        if item_representations is not None or (self.training and self.config.embedding_dropout):
            inputs_embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            inputs_embeds = inputs_embeds if item_representations is None else inputs_embeds + item_representations
            inputs_embeds = nn.functional.dropout(inputs_embeds, self.config.embedding_dropout, self.training)
            input_ids = None
        return self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class UniGRFForCausalLM(
    UniGRFPreTrainedModel, UniGRFSupervisionMixin, UniGRFRecommendationMixin, UniGRFGenerationMixin
):
    """Generation and ranking of items by one backbone. The catalog is part of the model and saved with it."""

    def __init__(self, config: UniGRFConfig):
        config.check_spelling()  # again: `from_pretrained(..., num_retrieved_items=10)` changes a config that was checked
        config.check_training()
        super().__init__(config)
        self.model = UniGRFModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.item_encoder = UniGRFItemEncoder(config)
        self.ranking_head = UniGRFRankingHead(config)
        self.candidate_block = UniGRFCandidateBlock(config) if config.num_retrieved_items else None
        self.catalog = UniGRFCatalog(config)
        # The same everywhere: DDP would send it round before each forward, and does so under PEFT, whose names have a prefix.
        self._ddp_params_and_buffers_to_ignore = ["catalog.item_codes", "catalog.content_embeddings"]
        if config.tie_word_embeddings:
            self._tied_weights_keys = {"lm_head.weight": f"{self._embeddings_name}.weight"}
        # Explicit, so that nothing is inherited from a backbone's own file; without `_from_model_config = False`
        # transformers would drop it on save.
        self.generation_config = GenerationConfig(**self._generation_defaults)
        self.generation_config._from_model_config = False
        self.post_init()

    @property
    def layout(self) -> ItemLayout:
        return ItemLayout(self.config)

    @property
    def _embeddings_name(self) -> str:
        """Where the token embeddings are: each backbone calls them in its own way."""
        embeddings = self.get_input_embeddings()
        return next(name for name, module in self.named_modules() if module is embeddings)

    @property
    def modules_to_save(self) -> list[str]:
        """
        For `peft.LoraConfig(modules_to_save=...)`: heads, code embeddings and what item vectors are made of, all that is
        task-specific. For an adapter of a model that is trained already, a large item table may be left out of it.
        """
        items = ["item_encoder"] if self.config.has_item_representations else []
        block = [] if self.candidate_block is None else ["candidate_block"]
        return ["ranking_head", "lm_head", self._embeddings_name.rpartition(".")[2], *items, *block]

    def freeze_base_model(self) -> None:
        """
        Leaves to training what ranks alone: `ranking_head`, but for its item-level score, and `candidate_block`. Generation and
        the item-level score stay exactly what they are, so that a stage II costs them nothing.
        """
        for name, parameter in self.named_parameters():
            of_ranking = name.startswith(("ranking_head.", "candidate_block."))
            parameter.requires_grad_(of_ranking and not name.startswith("ranking_head.history_query."))

    def item_representations(self, items: torch.LongTensor) -> torch.Tensor | None:
        """Item indices `[...]` -> what the model reads of them beyond their codes, `[..., hidden_size]`; None: nothing."""
        return self.item_encoder(items, self.catalog.embeddings_of(items))

    def history_item_representations(self, input_ids: torch.LongTensor) -> torch.FloatTensor | None:
        """
        With `config.history_item_representations`: what `UniGRFModel` adds to the embeddings of tokens `[B, T]`,
        `[B, T, hidden_size]`: at every behavior the vector of the item before it (zeros if the catalog lacks it).

        Raises:
            ValueError: if a row begins behind an item's codes.
        """
        if not self.config.history_item_representations:
            return None
        where = torch.isin(input_ids, input_ids.new_tensor(self.config.behavior_token_ids)).nonzero()
        if len(where) and int(where[:, 1].min()) < self.layout.num_levels:
            row, position = where[where[:, 1].argmin()].tolist()
            raise ValueError(
                f"Row {row} has a behavior at position {position}, without the {self.layout.num_levels} codes of its item. "
                "Begin with a <bos> or a whole item, also behind a cache."
            )
        items = self.catalog.trie.lookup(self.layout.codes_before(input_ids, where - where.new_tensor([0, 1])))
        vectors = self.item_representations(items.clamp(min=0)) * (items >= 0)[:, None]
        added = vectors.new_zeros(*input_ids.shape, self.config.hidden_size)
        return added.index_put(tuple(where.unbind(dim=1)), vectors)

    def set_catalog(self, item_codes: torch.Tensor, content_embeddings: torch.Tensor | None = None) -> None:
        """
        Sets the items that exist. Call it once, before training, with the tokenizer's `item_codes`.

        Args:
            item_codes (`torch.IntTensor` of shape `(num_items, num_levels)`): Row = item index.
            content_embeddings (`torch.FloatTensor` of shape `(num_items, config.content_embedding_dim)`, *optional*): As int8 with
                `config.int8_content_embeddings`; may then be a mapped file, which is read where items are looked up.

        Raises:
            ValueError: on shared or impossible spellings, wrong shapes, NaN. Nothing is changed then.
        """
        content_embeddings = None if content_embeddings is None else torch.as_tensor(content_embeddings)
        self.catalog.replace(torch.as_tensor(item_codes), content_embeddings)
        self.config.num_items = self.catalog.num_items

    def add_items(self, item_codes: torch.Tensor, content_embeddings: torch.Tensor | None = None) -> None:
        """
        Adds items behind the existing ones; the model generates and ranks them at once, without training.

        The last codebook grows if a code asks for it (new rows of the vocabulary, started at the mean of the level's
        rows); generation scores of the old items change only then, since the level's softmax has more alternatives. The
        `"next"` logit of all falls with `config.next_logit_bias`: one of more items comes next.

        Args:
            item_codes (`torch.IntTensor` of shape `(n, num_levels)`): As `tokenizer.add_items` returns them.
            content_embeddings (`torch.FloatTensor` of shape `(n, config.content_embedding_dim)`, *optional*): As of `set_catalog`.

        Raises:
            ValueError: as `set_catalog`, or if rows have to be added that an adapter holds. Nothing is changed then.
        """
        item_codes = torch.as_tensor(item_codes)
        content_embeddings = None if content_embeddings is None else torch.as_tensor(content_embeddings)
        self.catalog.check(item_codes, content_embeddings)
        old = self.catalog
        all_codes = torch.cat([old.item_codes, item_codes.to(old.item_codes)])
        all_embeddings = None
        if content_embeddings is not None:
            all_embeddings = torch.cat([old.content_embeddings, content_embeddings.to(old.content_embeddings)])
        sizes = list(self.config.codebook_sizes)
        grown = [*sizes[:-1], max(sizes[-1], int(item_codes[:, -1].max()) + 1)]
        a_row_an_item = (
            self.config.embedding_table_size == self.config.num_items
        )  # a smaller table is shared by hashing
        parts = [self.item_encoder, self.item_encoder.table] if a_row_an_item else []
        parts += [self.get_input_embeddings(), self.lm_head] if grown != sizes else []
        if not all(isinstance(part, nn.Embedding | nn.Linear | UniGRFItemEncoder) for part in parts):
            raise ValueError(
                f"These items need new rows in {[type(part).__name__ for part in parts]}, which an adapter holds. Merge the "
                "adapter first (`merge_and_unload()`), then add the items."
            )
        trie = CatalogTrie(all_codes, grown)  # raises on shared or impossible spellings, before anything is changed
        if grown != sizes:
            self._grow_last_level(grown)
        if a_row_an_item:
            self.item_encoder.add_rows(len(item_codes))
            self.config.embedding_table_size = len(all_codes)
        old.put(all_codes, all_embeddings, trie)
        self.config.num_items = len(all_codes)

    def _grow_last_level(self, codebook_sizes: list[int]) -> None:
        level = self.layout.level_slice(self.config.num_levels - 1)
        self.config.codebook_sizes = codebook_sizes
        needed = self.config.num_spelling_tokens
        if needed > self.config.vocab_size:
            self.resize_token_embeddings(needed, mean_resizing=False)
        with torch.no_grad():
            for weight in (self.get_input_embeddings().weight, self.lm_head.weight):
                weight[level.stop : needed] = weight[level].mean(dim=0)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        hard_negatives: torch.LongTensor | None = None,
        excluded_positives: torch.LongTensor | None = None,
        timestamps: torch.LongTensor | None = None,
        target_timestamps: torch.LongTensor | None = None,
        long_items: torch.LongTensor | None = None,
        long_behaviors: torch.LongTensor | None = None,
        long_timestamps: torch.LongTensor | None = None,
        candidates: torch.LongTensor | None = None,
        blocked_items: torch.LongTensor | None = None,
        **kwargs,
    ) -> UniGRFCausalLMOutput:
        """
        Next-token prediction, where the next token chooses the head: a code is predicted by `lm_head` among its level's
        codes, a behavior by the ranking head as binary targets (UniGRF, section 3.1: the output at an item predicts the
        behavior, the output at a behavior the next item).

        With `config.num_retrieved_items`, `config.num_train_beams` or `candidates` the ranking loss is that of RecoChain's
        stage II instead: of the candidates for the LAST supervised item of each row, and of that one item's behavior.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): With labels, a row may hold several
                histories, each with its `<bos>`: they are read as if each were alone.
            attention_mask (of shape `(batch_size, sequence_length)` or a 4-D mask)
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): `input_ids` with -100 where
                nothing is to be learned; shifted inside. Not with `label_smoothing_factor`: `Trainer` would then keep the
                labels to itself, and smooth a loss over all tokens in place of these.
            logits_to_keep (`int` or `torch.LongTensor`, defaults to 0): Positions of `logits`, the last ones or these; 0: all.
                With atomic ids of a large catalog, an evaluation that reads only the losses should ask for 1.
            num_items_in_batch (`int`, *optional*): Supervised tokens of the whole accumulated batch, as `Trainer` passes
                it. The loss is then this micro-batch's share, so that accumulation does not change it. Candidates of a
                second stage are weighted by that share, too, for want of a count of their own: exactly as without
                accumulation if all micro-batches have as many supervised tokens a row, else rows beside longer ones count
                more.
            hard_negatives (`torch.LongTensor` of shape `(batch_size, m)`, *optional*): With labels: items that the user of
                each row should be told from the next one (UniGRF's hard-to-detect disliked items), -1 for none. Atomic ids, in
                training: at every position they take the places of as many random `code_negatives`, or count
                `config.given_negative_weight` times among all items. Several codes an item: `contrastive_loss` sets the
                row's last supervised item against them.
            excluded_positives (`torch.LongTensor` of shape `(batch_size, f)`, *optional*): Items that are no negatives of the
                row among atomic ids (UniGRF's potential favorites), -1 for none.
            timestamps (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): When each token's event was,
                for a backbone that reads times (`hstu` with `num_time_buckets`), in seconds; -1 where not known.
            target_timestamps (the same, *optional*): When the event is that each token's output is asked for; by default that
                of the token after it in its history, and the last one's own.
            long_items, long_behaviors (`torch.LongTensor` of shape `(batch_size, H)`): With labels and
                `config.num_retrieved_items`: what the user did BEFORE the last supervised item of the row, and nothing from
                there on, or the answer leaks. Item indices, oldest first, -1 where there is none; indices into
                `config.behaviors`, not needed if there is one.
            long_timestamps (the same, *optional*): With timestamps: when each of them was; -1, the default, where not known.
            candidates (`torch.LongTensor` of shape `(batch_size, N)`, *optional*): With labels: item indices (-1: none) for
                the last supervised item of each row, in place of the model's own beams.
            blocked_items (`torch.LongTensor` of shape `(batch_size, M)`, *optional*): With labels and `config.num_train_beams`:
                items (-1: none) that no beam is spent on, as `recommend` will block them: where nothing is listed twice, what
                the user had before the last supervised item. That item is ranked even if it is among them.

        Raises:
            ValueError: if a supervised item is not in the catalog, negatives or candidates are asked for together with a 4-D
                mask, position_ids or a cache, hard_negatives for rows of several histories, or long histories, candidates
                or blocked items do not fit.
        """
        targets = kwargs.pop("shift_labels", None)  # given where the sequence is spread over devices
        if labels is not None and targets is None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        inputs = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        length = next(iter(inputs.values())).shape[1]
        inputs |= {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            "use_cache": use_cache,
        }
        if timestamps is not None:
            inputs |= {"timestamps": timestamps, "target_timestamps": target_timestamps}
        supervision = None
        if targets is not None:
            tokens = labels if input_ids is None else input_ids
            longer = (long_items, long_behaviors, long_timestamps)
            given = (hard_negatives, excluded_positives, candidates, *longer, blocked_items)
            inputs, supervision = self._supervise(inputs, tokens, targets, *given)
        if "input_ids" in inputs:
            inputs["item_representations"] = self.history_item_representations(inputs["input_ids"])

        outputs = self.model(**inputs, **kwargs)
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state[:, :length], logits_to_keep)
        losses = {}
        if supervision is not None:
            losses = self._losses(outputs.last_hidden_state, supervision, num_items_in_batch)
            if supervision.cache is not None:
                outputs.cache = None  # a cache of training, which nobody asked for
        return UniGRFCausalLMOutput(
            # Training needs a level's logits where the level is, no others: a fifth of them with four codes an item.
            logits=None if losses and self.training else self.code_logits(hidden_states),
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **losses,
        )

    @property
    def code_vectors(self) -> torch.Tensor:
        """Rows of `lm_head`; raises `ValueError` if an adapter changes its output and not these."""
        if hasattr(self.lm_head, "base_layer"):
            raise ValueError(
                f"An adapter on lm_head has no effect with code_similarity={self.config.code_similarity!r} and code_negatives="
                f"{self.config.code_negatives}, which read its weight. Train lm_head whole: "
                "`LoraConfig(modules_to_save=model.modules_to_save)`."
            )
        return self.lm_head.weight

    def code_logits(self, states: torch.Tensor, codes: slice = slice(None)) -> torch.Tensor:
        """Output of the backbone `[..., hidden_size]` -> logits of a slice of the tokens `[..., n]`, and of no others."""
        if type(self.lm_head) is not nn.Linear and self.config.code_similarity == "dot":  # an adapter's wrapper
            return self.lm_head(states)[..., codes] / self.config.code_temperature
        return self.code_similarity(states, self.code_vectors[codes].T)

    def code_similarity(self, states: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """States `[..., n, hidden_size]`, rows of `lm_head` as columns `[..., hidden_size, m]` -> logits `[..., n, m]`."""
        states, vectors = self._comparable(states, vectors, dim=-2)
        return states @ vectors

    def code_cross_entropy(
        self, states: torch.Tensor, targets: torch.LongTensor, codes: slice, reduction: str
    ) -> torch.Tensor:
        """Output of the backbone `[n, hidden_size]`, places `[n]` in a slice of the tokens -> their cross-entropy."""
        if self.config.num_levels > 1 or type(self.lm_head) is not nn.Linear:
            logits = self.code_logits(states, codes).float()
            return nn.functional.cross_entropy(logits, targets, reduction=reduction)
        states, vectors = self._comparable(states.float(), self.code_vectors[codes].float(), dim=-1)
        return softmax_over_items(states, vectors, targets, reduction, retain_graph=self.measures_gradients)

    def _comparable(self, states: torch.Tensor, vectors: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """States `[..., hidden_size]` and rows of `lm_head`, along `dim`, whose dot products are logits."""
        if self.config.code_similarity == "cosine":
            states = nn.functional.normalize(states, dim=-1, eps=1e-6)
            vectors = nn.functional.normalize(vectors, dim=dim, eps=1e-6)
        return (states if self.config.code_temperature == 1.0 else states / self.config.code_temperature), vectors

    def _long_history(self, batch_size: int, *given) -> LongHistory | None:
        return check_long_history(self.config, self.catalog.num_items, batch_size, *given)

    @torch.no_grad()
    def rank(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        candidates: torch.LongTensor | None = None,
        cache: Cache | None = None,
        history_states: torch.FloatTensor | None = None,
        candidates_per_pack: int | None = None,
        timestamps: torch.LongTensor | None = None,
        query_time: torch.LongTensor | None = None,
        long_items: torch.LongTensor | None = None,
        long_behaviors: torch.LongTensor | None = None,
        long_timestamps: torch.LongTensor | None = None,
    ) -> torch.FloatTensor:
        """
        Scores candidates that see the history and themselves, never each other; with `config.num_retrieved_items` also what
        of the long history is most like them.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Histories, left-padded.
            attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*)
            candidates (`torch.LongTensor` of shape `(batch_size, N)`): Item indices.
            cache (`DynamicCache`, *optional*): Of exactly these histories, e.g. one that `model.model(...,
                cache=DynamicCache())` has filled. Only the candidates' tokens are run then, and the cache is left
                as it was found.
            history_states (`torch.FloatTensor` of shape `(batch_size, hidden_size)`, *optional*): The backbone's output at
                the last token of the histories. Without it, that token is run again on the cache, if the head needs it.
            candidates_per_pack (`int`, *optional*): Candidates of a history that are run at a time: memory grows with it. By
                default 64 on a CPU, where they stay in its caches, and 1,024 elsewhere, where a pack costs its launches.
            timestamps, query_time: As `recommend` takes them.
            long_items (`torch.LongTensor` of shape `(batch_size, H)`): With `config.num_retrieved_items`: all that the user did,
                as item indices, oldest first; -1 where there is none (padding, unknown items). Any H, also 0.
            long_behaviors (`torch.LongTensor` of shape `(batch_size, H)`): Indices into `config.behaviors`; not needed if
                there is one.
            long_timestamps (`torch.LongTensor` of shape `(batch_size, H)`, *optional*): With `timestamps`: when each was, in
                seconds from the same origin; -1, the default, where not known.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, N, num_ranking_targets)`: logits, in the order of
            `config.ranking_targets`. `sigmoid` gives the probability that the item, of all items (of the beams, after a stage II
            on these), comes next (`"next"`), or that the behavior follows if it is shown.

        Raises:
            ValueError: if a candidate is not in the catalog, a history does not end in a bos or behavior, the cache is not
                of these histories, or the long histories do not fit.
        """
        candidates = check_items("candidates", candidates, len(input_ids), self.catalog.num_items, lowest=0)
        attention_mask, _, _ = self._check_histories(input_ids, attention_mask, whole_items=True)
        long_history = self._long_history(
            len(input_ids), long_items, long_behaviors, long_timestamps, timestamps is not None
        )
        length = input_ids.shape[1]
        query_time = self._check_timestamps(input_ids, timestamps, query_time)
        if cache is None:
            cache = DynamicCache()
            history_states = self.prefill(input_ids, attention_mask, cache, timestamps, query_time)
        check_cache(cache)
        if cache.get_seq_length() != length:
            raise ValueError(
                f"Expected a cache of the {length} tokens of input_ids, found one of {cache.get_seq_length()}."
            )
        if history_states is None and self.ranking_head.has_dense_scores:
            history_states = self.prefill(input_ids, attention_mask, cache, timestamps, query_time)
        if candidates_per_pack is None:
            candidates_per_pack = 64 if candidates.device.type == "cpu" else 1024
        nothing, history_mask = candidates.new_empty(len(candidates), 1, 0), attention_mask.bool()
        logits = [torch.empty(len(candidates), 0, len(self.config.ranking_targets), device=self.device)]
        for pack in candidates.split(candidates_per_pack, dim=1) if candidates.shape[1] else ():
            with cache_rollback(cache):
                states = read_candidates(
                    self,
                    pack,
                    history_mask,
                    nothing.expand(-1, pack.shape[1], -1),
                    cache,
                    long_history,
                    query_time,
                )
            logits.append(self.ranking_logits(states[:, :, -1], history_states, pack))
        return torch.cat(logits, dim=1)

    def ranking_logits(
        self, states: torch.FloatTensor, history_states: torch.FloatTensor | None, items: torch.LongTensor
    ) -> torch.FloatTensor:
        """
        What `rank` returns, from the backbone's output.

        Args:
            states (`torch.FloatTensor` of shape `(batch_size, N, hidden_size)`): At the last codes of the items, or at the
                ends of their blocks.
            history_states (`torch.FloatTensor` of shape `(batch_size, hidden_size)`): At the end of the histories.
            items (`torch.LongTensor` of shape `(batch_size, N)`): Item indices.
        """
        ends = None if history_states is None else history_states[:, None]
        logits = self.ranking_head(states, ends, self.item_representations(items)).float()
        targets = self.config.ranking_targets
        prior = [self.config.next_logit_bias if target == NEXT_TARGET else 0.0 for target in targets]
        return logits - torch.tensor(prior, device=logits.device)
