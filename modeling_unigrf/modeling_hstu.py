# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""HSTU as a backbone: gated pointwise attention by SiLU in place of softmax, without a feed-forward."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_hstu import HSTUConfig
from .shared_prefix_unigrf import check_cache

UNKNOWN_TIME = -1


class HSTUTable(nn.Embedding):
    """A table of numbers, `[n, 1]`."""

    def forward(self, index: torch.LongTensor) -> torch.Tensor:
        """
        Look up the values `[B, 1, Q, K]` at the indices `[B, Q, K]`.

        The backward of `gather` is faster than that of an embedding.
        """
        return self.weight[:, 0].expand(*index.shape[:-1], -1).gather(-1, index)[:, None]


class HSTUBias(nn.Module):
    """The bias of attention scores: a number for the distance of key and query, another for their time difference."""

    def __init__(self, config: HSTUConfig):
        super().__init__()
        self.num_positions = config.max_position_embeddings
        self.num_buckets = config.num_time_buckets
        self.positions = HSTUTable(2 * self.num_positions - 1, 1)
        self.times = HSTUTable(self.num_buckets + 1, 1) if self.num_buckets else None

    def forward(self, distance: torch.LongTensor, seconds: torch.LongTensor | None) -> torch.Tensor:
        """
        Compute the bias of every query and key.

        Args:
            distance (`torch.LongTensor` of shape `(batch_size or 1, Q, K)`): Position of the key minus that of the
                query.
            seconds (`torch.LongTensor` of shape `(batch_size, Q, K)`, *optional*): Seconds between the two; -1:
                unknown. None: all are unknown.

        Returns:
            `torch.FloatTensor` of shape `(batch_size or 1, 1, Q, K)`.
        """
        index = (distance + self.num_positions - 1).clamp(0, 2 * self.num_positions - 2)
        bias = self.positions(index)
        if self.times is not None and seconds is not None:
            # Each bucket is 1.35 times wider, as in the public code.
            bucket = (seconds.clamp(min=1).float().log() / 0.301).floor().long().clamp(max=self.num_buckets)
            bias = bias + self.times(bucket) * (seconds >= 0)[:, None]
        return bias


class HSTULayer(GradientCheckpointingLayer):
    """A block of HSTU (section 3.2), with the order and the norms of the public code."""

    def __init__(self, config: HSTUConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.num_positions = config.max_position_embeddings
        self.eps = config.layer_norm_eps
        inner = self.heads * self.head_dim
        self.uvqk_proj = nn.Linear(config.hidden_size, 4 * inner, bias=False)
        self.bias = HSTUBias(config)
        self.dropout = nn.Dropout(config.dropout)
        self.out_proj = nn.Linear(inner, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.BoolTensor,
        distance: torch.LongTensor,
        seconds: torch.LongTensor | None,
        cache: Cache | None,
        output_attentions: bool | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Run the block on `hidden_states [B, Q, hidden_size]`, under `attention_mask [B, 1, Q, K]`.

        Returns:
            The new states `[B, Q, hidden_size]`; the attention weights `[B, num_heads, Q, K]`, or None.
        """
        normed = nn.functional.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)
        u, *vqk = nn.functional.silu(self.uvqk_proj(normed)).chunk(4, dim=-1)
        value, query, key = (part.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for part in vqk)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        # Mask after the SiLU: hidden keys add zero and change no norm.
        products = query @ key.transpose(2, 3) + self.bias(distance, seconds)
        weights = nn.functional.silu(products).masked_fill(~attention_mask, 0.0)
        # Divide the smaller factor, unless the caller wants the weights.
        if output_attentions:
            weights = weights / self.num_positions
        else:
            value = value / self.num_positions
        attended = (weights @ value).transpose(1, 2).flatten(2)
        gated = u * nn.functional.layer_norm(attended, attended.shape[-1:], eps=self.eps)
        hidden_states = hidden_states + self.out_proj(self.dropout(gated))
        return hidden_states, weights if output_attentions else None


class HSTUPreTrainedModel(PreTrainedModel):
    """The initial weights of the backbone, and its properties for transformers."""

    config_class = HSTUConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # HSTU has no softmax.
    _supports_sdpa = False
    _supports_flash_attn = False
    _supports_flex_attn = False
    _no_split_modules = ["HSTULayer"]

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)


class HSTUModel(HSTUPreTrainedModel):
    """
    The HSTU backbone: token sequence -> hidden states and cache.

    A further layer of the cache, behind the last, holds the position and the time of every token. Later queries need
    them for their biases.
    """

    # transformers sets it to True.
    gradient_checkpointing = False

    def __init__(self, config: HSTUConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(HSTULayer(config, index) for index in range(config.num_hidden_layers))
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
        use_cache: bool | None = None,
        timestamps: torch.LongTensor | None = None,
        target_timestamps: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Run the backbone as every decoder of transformers.

        Args:
            timestamps (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): The time of each
                token's event in seconds from any origin; negative: unknown. None: no time bias.
            target_timestamps (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): The time of
                the event that each output predicts, in seconds. None: the time of the next token; at the end, of the
                last token.

        Raises:
            ValueError: for more positions than the config has, a cache that is no `DynamicCache`, and without exactly
                one of `input_ids` and `inputs_embeds`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "Exactly one of `input_ids` and `inputs_embeds` must be given, got both or none. Pass one."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, length = inputs_embeds.shape[:2]

        # Defaults of the options, and the cache.
        config = self.config
        # Checkpointed layers run twice, and would update a cache twice.
        is_checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        use_cache = (config.use_cache if use_cache is None else use_cache) and not is_checkpointed
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        cache = DynamicCache() if use_cache and cache is None else cache
        if cache is not None:
            check_cache(cache)
            # A cache made from a config lacks the layer of positions.
            if len(cache.layers) == config.num_hidden_layers:
                cache.layers.append(DynamicLayer())

        # Positions, mask and times.
        if position_ids is None:
            start = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(start, start + length, device=inputs_embeds.device)[None]
        is_traced = torch.compiler.is_compiling()
        if not is_traced and position_ids.max() >= self.config.max_position_embeddings:
            raise ValueError(
                f"Positions must be below max_position_embeddings={self.config.max_position_embeddings}, got "
                f"{int(position_ids.max())}. Keep fewer items of the history, or train with more positions."
            )
        if attention_mask is None or attention_mask.dim() == 2:
            attention_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                cache=cache,
                position_ids=position_ids,
            )
        visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        position_ids = position_ids.expand(batch_size, -1)
        distance, seconds = self._distances(position_ids, timestamps, target_timestamps, visible, cache)

        hidden_states = inputs_embeds * self.config.hidden_size**0.5 + self.embed_positions(position_ids)
        all_states, all_weights = self._run_layers(
            self.dropout(hidden_states), visible, distance, seconds, cache, output_attentions
        )
        return BaseModelOutputWithPast(
            last_hidden_state=all_states[-1],
            cache=cache if use_cache else None,
            hidden_states=tuple(all_states) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
        )

    def _run_layers(
        self,
        hidden_states: torch.Tensor,
        visible: torch.BoolTensor,
        distance: torch.LongTensor,
        seconds: torch.LongTensor | None,
        cache: Cache | None,
        output_attentions: bool | None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Run the layers: the states before and after each of them, and the attention weights."""
        all_states = [hidden_states]
        all_weights = []
        for layer in self.layers:
            hidden_states, weights = layer(
                hidden_states, visible, distance, seconds, cache=cache, output_attentions=output_attentions
            )
            all_states.append(hidden_states)
            all_weights.append(weights)
        return all_states, all_weights

    def _distances(
        self,
        position_ids: torch.LongTensor,
        timestamps: torch.LongTensor | None,
        target_timestamps: torch.LongTensor | None,
        visible: torch.BoolTensor,
        cache: Cache | None,
    ) -> tuple[torch.LongTensor, torch.LongTensor | None]:
        """
        Compute the distances of keys and queries in positions and in seconds.

        `position_ids` has the shape `[B, Q]`, `visible` `[B, 1, Q, K]`. The cache has the positions and times of
        earlier keys.

        Returns:
            Positions of the keys minus those of the queries, `[B or 1, Q, K]`; the seconds between them, `[B, Q, K]`
            (-1: unknown), or None if all are unknown.
        """
        has_times = timestamps is not None or cache is not None
        if timestamps is None:
            timestamps = torch.full_like(position_ids, UNKNOWN_TIME)
        if target_timestamps is None:
            length = timestamps.shape[1]
            following = torch.arange(1, length + 1, device=timestamps.device).clamp(max=length - 1)
            target_timestamps = timestamps.index_select(1, following)
        keys = torch.stack([position_ids, timestamps], dim=-1)[:, None]
        if cache is not None:
            keys, _ = cache.update(keys, keys[..., :0], self.config.num_hidden_layers)
        key_positions, key_times = keys[:, 0].unbind(dim=-1)
        distance = key_positions[:, None] - position_ids[:, :, None]
        # Rows without gaps share their distances, and so a bias; a traced graph must not depend on it.
        place = torch.arange(distance.shape[2], device=distance.device)
        place_distance = (place - place[-position_ids.shape[1] :, None])[None]
        is_traced = torch.compiler.is_compiling()
        if not is_traced and ((distance == place_distance) | ~visible[:, 0]).all():
            distance = place_distance
        seconds = None
        reads_times = has_times and bool(self.config.num_time_buckets)
        if reads_times and (is_traced or ((target_timestamps >= 0).any() and (key_times >= 0).any())):
            seconds = (target_timestamps[:, :, None] - key_times[:, None]).abs()
            is_unknown = (target_timestamps < 0)[:, :, None] | (key_times < 0)[:, None]
            seconds = seconds.masked_fill(is_unknown, UNKNOWN_TIME)
        return distance, seconds
