# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The model: a decoder-only backbone, a head that generates items and a head that ranks them.

Heads and scores are in `scoring_unigrf.py`, training in `objective_unigrf.py`, `rank` and `recommend` in
`recommendation_unigrf.py`, `generate` in `generation_unigrf.py`. Beams and candidates share a history's cache by
`shared_prefix_unigrf.py`.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .adapters_unigrf import Adapter, base_of, find_adapter
from .catalog_unigrf import UniGRFCatalog, first_codes
from .configuration_hstu import HSTUConfig
from .configuration_unigrf import UniGRFConfig
from .generation_unigrf import UniGRFGenerationMixin, generation_defaults
from .inputs_unigrf import check_history
from .item_lists_unigrf import check_items, describe, is_integer
from .layout_unigrf import ItemLayout
from .loading_unigrf import check_json_files, check_weights, hub_arguments, register_calls, stored_dtypes
from .metrics_unigrf import TrainerMetrics  # noqa: F401  # so that its file goes with every saved model
from .modeling_hstu import HSTUModel
from .objective_unigrf import Objective
from .old_names_unigrf import OLD_WEIGHTS, convert_old_inputs, take_old_serving_fields
from .pipeline_unigrf import RecommendationPipeline  # noqa: F401  # so that its file goes with every saved model
from .recommendation_unigrf import (
    ServingOptions,
    UniGRFRecommendation,
    check_rank_options,
    make_search_space,
    rank_candidates,
    recommend_items,
)
from .scoring_unigrf import ItemScorer, UniGRFCandidateBlock, UniGRFCodeHead, UniGRFItemEncoder, UniGRFRankingHead
from .shared_prefix_unigrf import prefill, record_tokens
from .similar_items_unigrf import UniGRFSimilarityMixin
from .transitions_unigrf import UniGRFTransitions, check_histories, last_items
from .trie_unigrf import CatalogTrie


@dataclass
class UniGRFCausalLMOutput(CausalLMOutputWithPast):
    """
    The output of `UniGRFForCausalLM`. Losses that are not computed are None.

    Args:
        loss (`torch.FloatTensor` of shape `()`): The weighted sum of the losses below (`config.training_config`). In
            training, `model.task_weights` multiply the losses of retrieval and of ranking.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`): Logits of the next token. A
            code's probability is the softmax over the slice of its level. None in training with labels, where logits
            would cost more than the loss.
        cache, hidden_states, attentions: The same as in every causal model of transformers. In training they also
            cover the negatives behind the sequence.
        generation_loss (`torch.FloatTensor` of shape `()`): Mean cross-entropy of a code among its level's codes.
        ranking_loss (`torch.FloatTensor` of shape `()`): Mean over ranking targets of the binary cross-entropy.
        dense_loss (`torch.FloatTensor` of shape `()`): Sampled-softmax loss of the next item among all items (or
            20,000 of them).
        contrastive_loss (`torch.FloatTensor` of shape `()`): Contrastive sequence loss of each row's last item among
            itself and the row's hard negatives.
        gradient_norms (`torch.FloatTensor` of shape `(2,)`): Gradient norms of generation and ranking loss at the
            backbone's output; in training with `model.measures_gradients`.
    """

    generation_loss: torch.FloatTensor | None = None
    ranking_loss: torch.FloatTensor | None = None
    dense_loss: torch.FloatTensor | None = None
    contrastive_loss: torch.FloatTensor | None = None
    gradient_norms: torch.FloatTensor | None = None


class UniGRFPreTrainedModel(PreTrainedModel):
    """The initial weights of all UniGRF models, and their properties for transformers."""

    config_class = UniGRFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Packed candidates need 4-D masks.
    _supports_flash_attn = False
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
            init.copy_(module.item_codes, first_codes(module.num_items, module.codebook_sizes))
            if module.content_embeddings is not None:
                init.zeros_(module.content_embeddings)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """
        Load a model as every model of transformers; also accept 0.1's names of weights (until 0.3).

        An adapter's folder gives its base with the adapter merged: a plain model, which saves as a whole checkpoint.

        Raises:
            ValueError: for a folder that is not whole: unreadable or damaged files, no generation_config.json, or no
                weight for a part that its config.json describes. For an adapter: without PEFT, and for a base that is
                another model than the adapter was trained on.
        """
        # The Auto classes and `pipeline` have followed the adapter to its base already.
        of_adapter = kwargs.get("adapter_kwargs") or {}
        source = of_adapter.get("_adapter_model_path", pretrained_model_name_or_path)
        folder = None if source is None else find_adapter(source, hub_arguments({**kwargs, **of_adapter}))
        if folder is not None:
            kwargs.pop("adapter_kwargs", None)
            base = pretrained_model_name_or_path
            if base == source:
                # The revision is the adapter's.
                base = base_of(folder)
                kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
            model, loading_info = cls._from_adapter(Adapter(folder), base, *args, **kwargs)
            model.name_or_path = model.config.name_or_path = str(source)
            return (model, loading_info) if output_loading_info else model
        kwargs["key_mapping"] = OLD_WEIGHTS | (kwargs.get("key_mapping") or {})
        serving, kwargs = take_old_serving_fields(kwargs)
        place = hub_arguments(kwargs)
        source = pretrained_model_name_or_path
        folder = None if source is None else Path(source, kwargs.get("subfolder") or "")
        if folder is not None and folder.is_dir():
            stored_dtypes(folder)
            check_json_files(folder)
            # Without a config, transformers would take that of a new model.
            if kwargs.get("config") is None and not args and not (folder / "config.json").is_file():
                raise ValueError(
                    f"{folder} must have a config.json, got none. Check the path, or copy the whole folder."
                )
        try:
            model, loading_info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(
                f"{source} must have weights of the shapes that its config describes, got others, which the report "
                "above lists. Save the model again, or copy the whole folder."
            ) from error
        if source is not None:
            check_weights(model, loading_info["missing_keys"], place)
        # Otherwise `save_pretrained` would write the old names again.
        model._weight_conversions = []
        # A traced forward cannot build the trie.
        catalog = getattr(model, "catalog", None)
        if catalog is not None:
            catalog.has_items = True
            if not catalog.item_codes.is_meta:
                catalog.update_trie()
        if serving:
            model.generation_config.update(**serving, allow_custom_entries=True)
        register_calls(model)
        return (model, loading_info) if output_loading_info else model

    @classmethod
    def _from_adapter(cls, adapter: Adapter, base: str, *args, config=None, generation_config=None, **kwargs):
        """Load the base with the config of an adapter, and merge the adapter."""
        place = hub_arguments(kwargs)
        base_config = cls.config_class.from_pretrained(base, **place)
        stored = base_config.to_dict()
        # Fields that the caller changes, here or in `config`.
        changes = {name: kwargs.pop(name) for name in list(kwargs) if name in stored and name != "dtype"}
        if config is not None:
            changes |= {name: value for name, value in config.to_dict().items() if value != stored.get(name)}
        model, loading_info = cls.from_pretrained(
            base,
            *args,
            config=adapter.config(base_config, changes),
            generation_config=generation_config or adapter.generation_config(),
            output_loading_info=True,
            **kwargs,
        )
        adapter.check_base(base, place)
        return adapter.put_on(model), loading_info

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save a model as every model of transformers; whoever may read its config.json may read its weights."""
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        config = folder / "config.json"
        # safetensors writes files that only their owner may read.
        if config.is_file():
            for path in folder.glob("*.safetensors"):
                path.chmod(config.stat().st_mode)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """
        Resize the token embeddings as every model of transformers.

        Raises:
            ValueError: if the new embeddings would lack tokens of items.
        """
        needed = self.config.num_item_tokens
        if new_num_tokens is not None and new_num_tokens < needed:
            raise ValueError(
                f"`new_num_tokens` must be at least the {needed} tokens that encode the items, got {new_num_tokens}. "
                "Take `len(tokenizer)`."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


def build_transitions(config: UniGRFConfig) -> UniGRFTransitions | None:
    """Build the empty table of transitions, if the model has one."""
    return UniGRFTransitions(config.num_items, config.num_transitions) if config.num_transitions else None


# These accept position_ids, but compute positions from the row index.
IGNORES_POSITION_IDS = ("gpt_neo", "opt")
# Backbones with these fields go by places, or see later tokens.
REJECTED_FIELDS = {"alibi": (True,), "is_decoder": (False,), "use_bidirectional_attention": (True, "all")}


class UniGRFModel(UniGRFPreTrainedModel):
    """
    The backbone alone: token sequence -> hidden states and cache. The last state of a history is a user's vector.

    Args:
        config (`UniGRFConfig`): Configuration of the model.
        reads_items (`bool`, defaults to `True`): Hold the parts that make item representations. False: the caller of
            `forward` passes them, as `UniGRFForCausalLM` does.
    """

    def __init__(self, config: UniGRFConfig, reads_items: bool = True):
        super().__init__(config)
        # Compare types: code loaded from a folder has its own HSTU class.
        is_hstu = config.text_config.model_type == HSTUConfig.model_type
        self.language_model = (HSTUModel if is_hstu else AutoModel.from_config)(config.text_config)
        self._check_backbone()
        self.reads_items = reads_items and config.history_item_representations
        if self.reads_items:
            self.item_encoder = UniGRFItemEncoder(config)
            self.catalog = UniGRFCatalog(config)
            self.transitions = build_transitions(config)
        self.post_init()

    def _check_backbone(self) -> None:
        config = self.config.text_config
        parameters = inspect.signature(self.language_model.forward).parameters
        strange = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        for name, values in REJECTED_FIELDS.items():
            value = getattr(config, name, None)
            strange |= {f"{name}={value}"} if value in values else set()
        if not {"position_ids", "cache"} <= parameters.keys() or config.model_type in IGNORES_POSITION_IDS or strange:
            raise ValueError(
                "`text_config` must be a decoder-only backbone that places tokens by `position_ids`, keeps a `cache` "
                f"and takes 4-D masks, got {config.model_type!r}{f' with {sorted(strange)}' if strange else ''}. "
                "Take one of llama, qwen3, gpt2, mistral, hstu and their like."
            )

    def get_input_embeddings(self):
        """Return the backbone's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Replace the backbone's token embeddings."""
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
        Run the backbone as every decoder of transformers.

        Without `position_ids`, positions count the tokens of a 2-D `attention_mask`: padding takes no position.

        Args:
            timestamps (`torch.LongTensor` of shape `(batch_size, T)`, *optional*): Times in seconds; -1: unknown.
            item_representations (`torch.FloatTensor` of shape `(batch_size, T, hidden_size)`, *optional*): Added to
                the embeddings. None: the model makes them, with `config.history_item_representations`. The backbone
                inside `UniGRFForCausalLM` needs them for `input_ids` with behaviors.

        Raises:
            ValueError: for timestamps that the backbone does not read, and without needed item representations.
        """
        # Times and positions.
        if timestamps is not None:
            if not self.config.reads_times:
                raise ValueError(
                    f"`timestamps` must be None for the backbone {self.config.text_config.model_type!r}, got some. "
                    "Leave them out, or train `hstu` with num_time_buckets."
                )
            kwargs["timestamps"] = timestamps
        tokens = (input_ids, attention_mask, timestamps, kwargs.get("target_timestamps"))
        num_cached = 0 if cache is None else cache.get_seq_length()
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            length = (input_ids if input_ids is not None else inputs_embeds).shape[1]
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        # Embeddings, with the item representations.
        if self.reads_items and input_ids is not None and item_representations is None:
            parts = (self.config, ItemLayout(self.config), self.catalog, None, self.item_encoder, None)
            item_representations = ItemScorer(*parts, self.transitions).history_representations(input_ids)
        elif self.config.history_item_representations and input_ids is not None and item_representations is None:
            behaviors = input_ids.new_tensor(self.config.behavior_token_ids)
            if torch.isin(input_ids, behaviors).any():
                raise ValueError(
                    "`item_representations` must be given for histories with behaviors "
                    "(config.history_item_representations), got none. Call `UniGRFForCausalLM`, or pass "
                    "model.scorer.history_representations(input_ids)."
                )
        if item_representations is not None or (self.training and self.config.embedding_dropout):
            inputs_embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            inputs_embeds = inputs_embeds if item_representations is None else inputs_embeds + item_representations
            inputs_embeds = nn.functional.dropout(inputs_embeds, self.config.embedding_dropout, self.training)
            input_ids = None
        outputs = self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        record_tokens(getattr(outputs, "cache", None), num_cached, *tokens)
        return outputs


def check_in_memory(layers: Sequence[nn.Module]) -> None:
    """Raise `ValueError` if a layer that may grow is offloaded: offloading would bring its old rows back."""
    offloaded = [type(layer).__name__ for layer in layers if any(weight.is_meta for weight in layer.parameters())]
    if offloaded:
        raise ValueError(
            f"The catalog must change while all weights are in memory, got offloaded weights of {offloaded}. Change "
            "and save the model first, then offload it."
        )


class UniGRFItemModel(UniGRFPreTrainedModel):
    """The parts of the model: backbone, heads, and the catalog of items, which is saved with the weights."""

    def __init__(self, config: UniGRFConfig):
        # `from_pretrained(..., num_retrieved_items=10)` changes a checked config.
        config.check()
        super().__init__(config)
        self.model = UniGRFModel(config, reads_items=False)
        self.lm_head = UniGRFCodeHead(config.hidden_size, config.vocab_size)
        self.item_encoder = UniGRFItemEncoder(config)
        self.ranking_head = UniGRFRankingHead(config)
        self.candidate_block = UniGRFCandidateBlock(config) if config.num_retrieved_items else None
        self.catalog = UniGRFCatalog(config)
        self.transitions = build_transitions(config)
        self.layout = ItemLayout(config)
        # Equal in all processes: DDP would send them round before each forward.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if name.startswith(("catalog.", "transitions."))
        ]
        if config.tie_word_embeddings:
            self._tied_weights_keys = {"lm_head.weight": f"{self._embeddings_name}.weight"}

    @property
    def scorer(self) -> ItemScorer:
        """The functions that turn states into scores of codes and items."""
        heads = (self.lm_head, self.item_encoder, self.ranking_head)
        return ItemScorer(self.config, self.layout, self.catalog, *heads, self.transitions)

    def set_output_embeddings(self, new_embeddings):
        """Replace the code head; a plain linear layer gives it its weight."""
        if type(new_embeddings) is nn.Linear:
            head = UniGRFCodeHead(new_embeddings.in_features, new_embeddings.out_features)
            head.weight = new_embeddings.weight
            # transformers resized it: `post_init` must not draw it anew.
            head._is_hf_initialized = getattr(new_embeddings, "_is_hf_initialized", False)
            new_embeddings = head
        self.lm_head = new_embeddings

    @property
    def _embeddings_name(self) -> str:
        """Name of the token embeddings, which differs between backbones."""
        embeddings = self.get_input_embeddings()
        return next(name for name, module in self.named_modules() if module is embeddings)

    # Quantization leaves these parts alone: `BitsAndBytesConfig(llm_int8_skip_modules=...)`.
    modules_to_not_convert = ["lm_head", "item_encoder", "ranking_head", "candidate_block"]

    @property
    def modules_to_save(self) -> list[str]:
        """
        The task-specific modules, for `peft.LoraConfig(modules_to_save=...)`.

        These are the heads, the token embeddings and the item encoder. An adapter of a trained model may leave a large
        item encoder out.
        """
        encoder = ["item_encoder"] if self.config.has_item_representations else []
        block = [] if self.candidate_block is None else ["candidate_block"]
        return ["ranking_head", "lm_head", self._embeddings_name.rpartition(".")[2], *encoder, *block]

    def freeze_base_model(self) -> None:
        """
        Freeze all weights but those of the candidate block and of the ranking head.

        The head's dense-retrieval score is frozen, too: a stage II then leaves generation and dense retrieval as they
        are.
        """
        for name, parameter in self.named_parameters():
            ranks = name.startswith(("ranking_head.", "candidate_block."))
            parameter.requires_grad_(ranks and not name.startswith("ranking_head.history_query."))

    def set_catalog(self, item_codes: torch.Tensor, content_embeddings: torch.Tensor | None = None) -> None:
        """
        Set the items that exist. Call it once, before training, with the tokenizer's `item_codes`.

        A later call, and one with another number of items than the config's, sets `config.item_ids_fingerprint` to
        None, since the ids may be others. `tokenizer.item_ids_fingerprint()` makes the one of the new items.

        Args:
            item_codes (`torch.IntTensor` of shape `(num_items, num_levels)`): Codes of each item; row i is item i.
            content_embeddings (`torch.FloatTensor` of shape `(num_items, config.content_embedding_dim)`, *optional*):
                Content embeddings of the items, int8 with `config.int8_content_embeddings`. An int8 tensor may be a
                mapped file, which the model reads item by item. None: for `content_embedding_dim=0`.

        Raises:
            ValueError: for shared or impossible codes, wrong shapes and NaN. The catalog stays unchanged then.
        """
        check_in_memory([self.item_encoder])
        is_first = not self.catalog.has_items
        self.catalog.replace(item_codes, content_embeddings)
        num_items = self.catalog.num_items
        config = self.config
        if not is_first or num_items != config.num_items:
            config.item_ids_fingerprint = None
        # A table of one row an item follows the catalog.
        if config.embedding_table_size == config.num_items != num_items:
            self.item_encoder.reset_rows(num_items, config.initializer_range)
            config.embedding_table_size = num_items
        config.num_items = num_items
        # Transitions of another catalog say nothing about this one.
        if self.transitions is not None:
            self.transitions.register_buffers(num_items, config.num_transitions)
            self.transitions.to(self.catalog.item_codes.device)

    def set_transitions(self, histories: Sequence[Sequence[int]], num_transitions: int = 200) -> None:
        """
        Make the table of transitions from the histories that training reads. Call it before training.

        An item that no history holds gets a stand-in: the item of the nearest content embedding among the others.

        Args:
            histories: Item indices of each user, oldest first.
            num_transitions: Most successors of an item in the table, 6 bytes each.

        Raises:
            ValueError: for `num_transitions` below 1 and items outside the catalog. The model stays unchanged then.
        """
        if num_transitions < 1:
            raise ValueError(
                f"`num_transitions` must be 1 or more, got {num_transitions}. Do not call `set_transitions` for a "
                "model without transitions."
            )
        check_histories(histories, self.config.num_items, None)
        self.config.num_transitions = min(num_transitions, self.config.num_items)
        self.transitions = UniGRFTransitions(self.config.num_items, self.config.num_transitions)
        self.transitions.to(self.catalog.item_codes.device)
        self.transitions.add(histories)
        is_known = self.transitions.item_counts > 0
        self._choose_stand_ins((~is_known).nonzero()[:, 0])

    def update_transitions(self, histories: Sequence[Sequence[int]], num_new: Sequence[int] | None = None) -> None:
        """
        Add newer interactions to the table of transitions, without training.

        Args:
            histories: Item indices of each user, oldest first: the new items, behind some of the earlier ones.
            num_new: Number of last items of each history that are new. None: all of them.

        Raises:
            ValueError: for a model without transitions, items outside the catalog, and numbers that do not fit. The
                table stays unchanged then.
        """
        if self.transitions is None:
            raise ValueError(
                "`update_transitions` needs a model with a table of transitions, got num_transitions=0. Make the "
                "table from all histories with `model.set_transitions(histories)`."
            )
        check_histories(histories, self.config.num_items, num_new)
        self.transitions.add(histories, num_new)

    def _choose_stand_ins(self, items: torch.LongTensor) -> None:
        """Choose stand-ins for items that training does not know, by their content embeddings."""
        transitions = self.transitions
        places = torch.arange(transitions.num_items, device=transitions.stand_ins.device)
        is_known = (transitions.stand_ins == places) & (transitions.item_counts > 0)
        is_known[items] = False
        if self.catalog.content_embeddings is not None:
            transitions.choose_stand_ins(items, is_known.nonzero()[:, 0], self.catalog.content_embeddings)

    def add_items(self, item_codes: torch.Tensor, content_embeddings: torch.Tensor | None = None) -> None:
        """
        Add items behind the existing ones. The model generates and ranks them without training.

        The last codebook grows if a new code exceeds it. Its new tokens start at the mean of the level's rows.
        Generation scores of old items change in this case alone, since the level's softmax has further alternatives.
        With a sampling bias, the `"next"` logits of all items fall, since the catalog is larger.

        Args:
            item_codes (`torch.IntTensor` of shape `(n, num_levels)`): Codes of the new items, from
                `tokenizer.add_items`.
            content_embeddings (`torch.FloatTensor` of shape `(n, config.content_embedding_dim)`, *optional*): Content
                embeddings of the new items. None: for `content_embedding_dim=0`.

        Raises:
            ValueError: for the reasons of `set_catalog`, and for new rows in a layer that an adapter holds. The model
                stays unchanged then.
        """
        # The catalog with the new items.
        catalog = self.catalog
        config = self.config
        item_codes, content_embeddings = catalog.check(item_codes, content_embeddings)
        all_codes = torch.cat([catalog.item_codes, item_codes.to(catalog.item_codes)])
        all_embeddings = None
        if content_embeddings is not None:
            new_embeddings = content_embeddings.to(catalog.content_embeddings)
            all_embeddings = torch.cat([catalog.content_embeddings, new_embeddings])

        # The layers that grow.
        sizes = [*config.codebook_sizes[:-1], max(config.codebook_sizes[-1], int(item_codes[:, -1].max()) + 1)]
        # Hashing shares the rows of a smaller table.
        has_row_per_item = config.embedding_table_size == config.num_items
        grown = [self.item_encoder, self.item_encoder.table] if has_row_per_item else []
        grown += [self.get_input_embeddings(), self.lm_head] if sizes != config.codebook_sizes else []
        if not all(isinstance(layer, nn.Embedding | nn.Linear | UniGRFItemEncoder) for layer in grown):
            raise ValueError(
                "New items must get rows in plain layers, got adapters on some of "
                f"{[type(layer).__name__ for layer in grown]}. Merge the adapter first (`merge_and_unload()`), then "
                "add the items."
            )
        check_in_memory(grown)

        # The trie raises errors before the model changes.
        new_items = torch.arange(catalog.num_items, len(all_codes), device=all_codes.device)
        trie = CatalogTrie(all_codes, sizes, new_items, earlier=catalog.trie)
        if sizes != config.codebook_sizes:
            self._grow_last_level(sizes)
        if has_row_per_item:
            self.item_encoder.add_rows(len(item_codes))
            config.embedding_table_size = len(all_codes)
        if config.next_logit_bias:
            config.next_logit_bias += math.log(max(1, len(all_codes) - 1) / max(1, config.num_items - 1))
        catalog.put(all_codes, all_embeddings, trie)
        if self.transitions is not None:
            self.transitions.append(len(item_codes))
            self._choose_stand_ins(new_items)
        config.num_items = len(all_codes)

    def _grow_last_level(self, codebook_sizes: list[int]) -> None:
        codes = self.layout.level_slices[-1]
        self.config.codebook_sizes = codebook_sizes
        self.layout = ItemLayout(self.config)
        needed = self.config.num_item_tokens
        if needed > self.config.vocab_size:
            self.resize_token_embeddings(needed, mean_resizing=False)
        with torch.no_grad():
            for weight in (self.get_input_embeddings().weight, self.lm_head.weight):
                weight[codes.stop : needed] = weight[codes].mean(dim=0)


class UniGRFForCausalLM(UniGRFGenerationMixin, UniGRFSimilarityMixin, UniGRFItemModel):
    """The whole model, which generates and ranks items with a single backbone."""

    # Factors of the retrieval and ranking losses; a callback may change them.
    task_weights: tuple[float, float] = (1.0, 1.0)
    # Whether training returns `gradient_norms`, by a second backward through the heads.
    measures_gradients: bool = False

    def __init__(self, config: UniGRFConfig):
        super().__init__(config)
        # transformers would derive a config from the backbone, and not save it.
        self.generation_config = GenerationConfig()
        defaults = generation_defaults(config) | getattr(config, "old_serving_fields", {})
        self.generation_config.update(**defaults, allow_custom_entries=True)
        self.generation_config._from_model_config = False
        self.post_init()

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
        timestamps: torch.LongTensor | None = None,
        long_history: dict[str, torch.LongTensor] | None = None,
        item_sets: dict[str, torch.LongTensor] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> UniGRFCausalLMOutput:
        """
        Predict the next token; with `labels`, compute the losses of `config.training_config`.

        With labels, a row may hold several histories, each with its `<bos>` and read as if it were alone. With
        `num_retrieved_items` or `num_train_beams`, the loss ranks candidates of each row's last item (RecoChain, stage
        II).

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, T)`, *optional*): `input_ids`, with -100 at tokens that
                are no targets; shifted inside.
            timestamps (`torch.LongTensor` of shape `(batch_size, T)`, *optional*): Times in seconds; -1: unknown.
                `target_timestamps`, of the same shape, are the times of the events that the outputs predict. Without
                them: the times of the next tokens.
            long_history (`dict`, *optional*): With labels and `num_retrieved_items`: `items`, `behaviors` and
                `timestamps` of `recommend`, from BEFORE the last supervised item. Later items would leak the answer.
            item_sets (`dict`, *optional*): With labels: the fields of `ItemSets`, each `[batch_size, n]` item indices,
                -1 for none.
            logits_to_keep (`int` or `torch.LongTensor`, defaults to 0): Number of last positions with `logits`, or the
                positions themselves. 0: all positions.
            num_items_in_batch (`int`, *optional*): Supervised tokens of an accumulated batch, from `Trainer`; the loss
                is this micro-batch's share of them. Candidates have that share, too. None: no accumulation.

        Raises:
            ValueError: for a supervised item outside the catalog, inputs that do not fit labels or config, and a
                `Trainer` with `label_smoothing_factor` or `compute_loss_func`, which would replace the loss.
        """
        kwargs = convert_old_inputs(kwargs) if kwargs else kwargs
        for name, tokens in (("input_ids", input_ids), ("labels", labels)):
            if tokens is not None and not (is_integer(tokens) and tokens.ndim == 2):
                raise ValueError(
                    f"`{name}` must be a tensor of integers of shape (batch_size, T), got {describe(tokens)}. Encode "
                    "histories with `tokenizer.encode_history(..., return_tensors='pt')`."
                )
        long_history = kwargs.pop("long_history", long_history)
        item_sets = kwargs.pop("item_sets", item_sets)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        # A sequence that is spread over devices comes with `shift_labels`.
        targets = kwargs.pop("shift_labels", None)
        if self.training and labels is None and targets is None and num_items_in_batch is not None:
            raise ValueError(
                "`labels` must reach the model, which computes the loss, got none from a Trainer that takes them for "
                "a loss of its own. Set label_smoothing_factor=0 and no compute_loss_func."
            )
        if labels is not None and targets is None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        inputs = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        length = next(iter(inputs.values())).shape[1]
        inputs |= {"attention_mask": attention_mask, "position_ids": position_ids, "cache": cache}
        # An exported graph can return no cache object.
        inputs["use_cache"] = kwargs.pop("use_cache", False if torch.compiler.is_exporting() else None)
        target_timestamps = kwargs.pop("target_timestamps", None)
        if timestamps is not None:
            inputs |= {"timestamps": timestamps, "target_timestamps": target_timestamps}
        loss_inputs = None
        if targets is not None:
            tokens = labels if input_ids is None else input_ids
            inputs, loss_inputs = self._objective.prepare(inputs, tokens, targets, long_history, item_sets)
        if "input_ids" in inputs:
            inputs["item_representations"] = self.scorer.history_representations(inputs["input_ids"])
        outputs = self.model(**inputs, **kwargs)
        losses = {}
        if loss_inputs is not None:
            losses = self._objective.losses(outputs.last_hidden_state, loss_inputs, num_items_in_batch)
        logits = None
        if not (losses and self.training):
            states = slice_logits_to_keep(outputs.last_hidden_state[:, :length], logits_to_keep)
            logits = self.scorer.code_logits(states)
        return UniGRFCausalLMOutput(
            logits=logits,
            # Do not return the internal training cache.
            cache=None if loss_inputs is not None and loss_inputs.cache is not None else outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **losses,
        )

    @property
    def _objective(self) -> Objective:
        """The joint loss of `config.training_config`."""
        parts = (self.config, self.model, self.scorer, self.candidate_block)
        return Objective(*parts, self.task_weights, self.measures_gradients)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        cache: DynamicCache | None = None,
        timestamps: torch.LongTensor | None = None,
        query_time: torch.LongTensor | None = None,
    ) -> torch.FloatTensor:
        """
        Run the tokens of the histories that the cache lacks; `rank` or `recommend` continue on this cache.

        The arguments are those of `recommend`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, hidden_size)`: the output at the last tokens.
        """
        trie = self.catalog.trie
        times = {"timestamps": timestamps, "query_time": query_time, "reads_long_history": False}
        history = check_history(self.config, self.layout, trie, input_ids, attention_mask, **times)
        cache = DynamicCache() if cache is None else cache
        return prefill(self.model, history, self.scorer.history_representations(input_ids), cache)

    @torch.no_grad()
    def rank(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        candidates: torch.LongTensor | None = None,
        timestamps: torch.LongTensor | None = None,
        query_time: torch.LongTensor | None = None,
        long_history: dict[str, torch.LongTensor] | None = None,
        cache: DynamicCache | None = None,
        history_states: torch.FloatTensor | None = None,
        candidates_per_pack: int | None = None,
        **kwargs,
    ) -> torch.FloatTensor:
        """
        Rank candidates; each sees the history, its sub-history (`config.num_retrieved_items`) and itself.

        Arguments without an entry here are those of `recommend`.

        Args:
            candidates (`torch.LongTensor` of shape `(batch_size, N)`): Item indices of the candidates.
            cache (`DynamicCache`, *optional*): A cache of exactly these histories, e.g. from `prefill`. Only the
                candidates' tokens run then, and the cache is cropped back. None: the histories run, too.
            history_states (`torch.FloatTensor` of shape `(batch_size, hidden_size)`, *optional*): With `cache`: the
                result of `prefill`. None: the last token runs again, if the ranking head needs it.
            candidates_per_pack (`int`, *optional*): Candidates of a history that run at a time; memory grows with
                this number. None: 64 on a CPU, 1,024 elsewhere.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, N, num_ranking_targets)`: logits, in the order of
            `config.ranking_targets`. For `"next"`, `sigmoid` gives the probability that the item comes next, among all
            items (among the beams, after a stage II on beams). For a behavior: that it follows if the item is shown.

        Raises:
            ValueError: for candidates outside the catalog, another cache, other states, a pack below 1, and the
                reasons of `recommend`.
        """
        inputs = {"query_time": query_time, "long_history": long_history, **convert_old_inputs(kwargs)}
        if strange := sorted(set(inputs) - {"query_time", "long_history"}):
            raise TypeError(f"`rank` must get arguments of its signature, got {strange}. Correct or remove them.")
        trie = self.catalog.trie
        history = check_history(self.config, self.layout, trie, input_ids, attention_mask, timestamps, **inputs)
        candidates = check_items("candidates", candidates, len(input_ids), trie.num_items, lowest=0)
        check_rank_options(cache, history_states, candidates_per_pack, (len(input_ids), self.config.hidden_size))
        parts = (self.model, self.scorer, self.candidate_block)
        return rank_candidates(*parts, history, candidates, cache, history_states, candidates_per_pack)

    def serving_options(self, generation_config: GenerationConfig | None = None, **overrides) -> ServingOptions:
        """Return the options of `recommend`: those of `generation_config` (None: the model's), with `overrides`."""
        generation_config = self.generation_config if generation_config is None else generation_config
        return ServingOptions.from_generation_config(generation_config, self.config, overrides)

    @torch.no_grad()
    def explain(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None, items: torch.LongTensor
    ) -> tuple[torch.LongTensor, torch.FloatTensor]:
        """
        Say which items of each history speak for some items, by the counts of the transition score.

        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, T)`): The arguments of `recommend`.
            items (`torch.LongTensor` of shape `(batch_size, R)`): Item indices, e.g. of a list; -1: none.

        Returns:
            The last items of the histories `[batch_size, H]`, last item first (-1: none), and what each adds to the
            transition scores, `[batch_size, R, H]`.

        Raises:
            ValueError: for a model without transitions, and the reasons of `recommend`.
        """
        if self.transitions is None:
            raise ValueError(
                "`explain` needs a model with a table of transitions, got num_transitions=0. Make the table with "
                "`model.set_transitions(histories)`."
            )
        trie = self.catalog.trie
        # A list explains the history alone.
        history = check_history(self.config, self.layout, trie, input_ids, attention_mask, reads_long_history=False)
        items = check_items("items", items, len(input_ids), trie.num_items)
        last = last_items(history.rows, history.items, len(input_ids))
        settings = self.serving_options().transition_settings
        return last, self.transitions.shares_of_history(last, items.clamp(min=0), settings)

    @torch.no_grad()
    def recommend(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        timestamps: torch.LongTensor | None = None,
        query_time: torch.LongTensor | None = None,
        long_history: dict[str, torch.LongTensor] | None = None,
        allowed_items: list | None = None,
        blocked_items: list | None = None,
        catalog: CatalogTrie | None = None,
        cache: DynamicCache | None = None,
        generation_config: GenerationConfig | None = None,
        **overrides,
    ) -> UniGRFRecommendation:
        """
        Recommend the next items of each history (RecoChain, inference).

        Beams and their ranking run on the cache of one prefill. The list is sorted by the fused score, the sum of the
        scores of `UniGRFRecommendation`, each times its weight. PEFT's prompt learning has no effect here and in
        `rank`: only its `forward` and `generate` add virtual tokens.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, T)`): Histories, left-padded.
            attention_mask (`torch.LongTensor` of shape `(batch_size, T)`, *optional*): 1 at the tokens that exist.
                None: all tokens but padding exist.
            timestamps (`torch.LongTensor` of shape `(batch_size, T)`, *optional*): Event times in seconds from any
                origin; -1: unknown. Only for a backbone that reads times (`hstu` with `num_time_buckets`).
            query_time (`torch.LongTensor` of shape `(batch_size,)`, *optional*): In seconds. None: the last event's.
            long_history (`dict`, *optional*): With `config.num_retrieved_items`: the whole history of each user,
                oldest first, as tensors `[batch_size, H]`. `items`: item indices, -1 for none. `behaviors`: indices
                into `config.behaviors`, not needed for a single behavior. `timestamps`: seconds, -1 (the default):
                unknown.
            allowed_items, blocked_items (`list` of `batch_size` lists or tensors of item indices, *optional*): The
                items to choose from, and items to skip. The search spends no beam on excluded items. None: no lists.
            catalog (`CatalogTrie`, *optional*): Recommend only items of this part of the catalog, made by
                `model.catalog.subset(items)`. Histories may hold any item. None: the whole catalog.
            cache (`DynamicCache`, *optional*): A cache of the first tokens of these histories, or an empty cache. It
                holds all tokens afterwards. None: a new cache.
            generation_config (`GenerationConfig`, *optional*): Serving options. None: the model's `generation_config`.
            overrides: Fields of `ServingOptions` (`num_beams`, `ranking_weight`, ...) for this call.

        Raises:
            ValueError: for histories that no item can follow, unknown items, options out of range, and lists that
                leave no item.
        """
        inputs = {"query_time": query_time, "long_history": long_history}
        if overrides:
            overrides = convert_old_inputs(overrides)
            inputs |= {name: overrides.pop(name) for name in list(inputs) if name in overrides}
            catalog = overrides.pop("catalog", catalog)
            if strange := sorted({"max_items", "max_long_items"} & set(overrides)):
                raise ValueError(
                    f"`recommend` must get histories that are cut already, got {strange}. Cut them with "
                    "`tokenizer.encode_history(..., max_items=...)`, or use the pipeline."
                )
        generation_config = self.generation_config if generation_config is None else generation_config
        options = ServingOptions.from_generation_config(generation_config, self.config, overrides)
        trie = self.catalog.trie
        scorer = self.scorer
        history = check_history(self.config, self.layout, trie, input_ids, attention_mask, timestamps, **inputs)
        space = make_search_space(
            scorer,
            trie if catalog is None else catalog,
            history,
            options.exclude_history,
            allowed_items,
            blocked_items,
        )
        cache = DynamicCache() if cache is None else cache
        return recommend_items(self.model, scorer, self.candidate_block, history, space, cache, options)
