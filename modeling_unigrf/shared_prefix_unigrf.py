# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Branches: many short sequences after one history, none of which sees another, in one forward on its cache.

Beams and candidates are both that. Their tokens are packed behind the history, one row a request, so that the history is
read and kept once. `read_branches` lets them attend in one of two ways, with the same result:

- *shared prefix*: all queries of a request attend its history in one product, each continuation its own few tokens in
  another, and the two are merged by their log-sum-exp. Needs a backbone that hands its keyword arguments down to the
  attention, which is found out by trying.
- *packed mask*: plain attention under a 4-D mask, whose cost grows with the square of the branches. For eager
  attention, for training, for histories longer than a sliding window, and for backbones that do not hand anything down.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from threading import Lock

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

MAX_SCORES = 2**24  # attention scores held at a time: 64 MiB
# A name of this module's own: code loaded from a repository must not replace that of an installed package, or the reverse.
SHARED_PREFIX = f"shared_prefix@{__name__}"
TRIAL = Lock()


@dataclass
class Branches:
    """
    What the attention must know of them.

    Args:
        history_mask (`torch.BoolTensor` of shape `(batch_size, T)`): What of the cache's first T tokens is seen.
        own_keys (`torch.LongTensor` of shape `(batch_size, N, m)`): Where on the cache the tokens of each continuation are,
            in order. The last ones are the queries of this forward.
        own_mask (`torch.BoolTensor` of shape `(batch_size, N, m)`, *optional*): Which of them are seen; all by default.
        handed_down (`bool`): Set by the attention: the backbone passes its keyword arguments on.
    """

    history_mask: torch.BoolTensor
    own_keys: torch.LongTensor
    own_mask: torch.BoolTensor | None = None
    handed_down: bool = False

    def __post_init__(self):
        self.padding = None if self.history_mask.all() else ~self.history_mask[:, None, None]


def shared_prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    branches: Branches | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention of branches on a history that they share, exact; without `branches` it is sdpa.

    Args:
        query (`torch.FloatTensor` of shape `(batch_size, num_heads, N * s, head_dim)`)
        key, value (`torch.FloatTensor` of shape `(batch_size, num_key_value_heads, T + own tokens, head_dim)`)

    Returns:
        `(output [batch_size, N * s, num_heads, head_dim], None)`, as transformers' attention functions do.
    """
    if branches is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    branches.handed_down = True
    batch_size, num_heads, _, dim = query.shape
    kv_heads, length = key.shape[1], branches.history_mask.shape[1]
    _, count, own = branches.own_keys.shape
    steps, groups = query.shape[2] // count, num_heads // kv_heads
    queries = query * (dim**-0.5 if scaling is None else scaling)
    queries = queries.reshape(batch_size, kv_heads, groups, count, steps, dim)
    history_keys, history_values = key[:, :, :length].transpose(2, 3), value[:, :, :length]
    own_keys, own_values = (own_states(states, branches.own_keys) for states in (key, value))
    hidden = None
    if steps > 1:
        hidden = ~torch.ones(steps, own, dtype=torch.bool, device=query.device).tril(own - steps)
        if branches.own_mask is not None:
            hidden = hidden | ~branches.own_mask[:, None, None, :, None]
        hidden = hidden.expand(batch_size, 1, 1, count, steps, own)

    outputs = []
    at_once = max(1, MAX_SCORES // (batch_size * num_heads * steps * length))
    for start in range(0, count, at_once):
        part = slice(start, start + at_once)
        block = queries[:, :, :, part]
        scores = (block.flatten(2, 4) @ history_keys).float()
        if branches.padding is not None:
            # Not -inf, also where nothing of the history is seen.
            scores.masked_fill_(branches.padding, torch.finfo(scores.dtype).min)
        top = scores.amax(dim=-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        norm = weights.sum(dim=-1, keepdim=True)
        # Of a sum that is not divided yet, a float16 could hold too little.
        from_history = (weights.div_(norm).to(value.dtype) @ history_values).view(*block.shape[:-1], -1)
        top, norm = (one.view(*block.shape[:-1], 1) for one in (top, norm))

        own_scores = (block @ own_keys[:, :, :, part].transpose(-1, -2)).float()
        if hidden is not None:
            own_scores = own_scores.masked_fill(hidden[:, :, :, part], -torch.inf)
        both = torch.maximum(top, own_scores.amax(dim=-1, keepdim=True))
        own_weights, norm = (own_scores - both).exp(), norm * (top - both).exp()
        total = norm + own_weights.sum(dim=-1, keepdim=True)
        from_own = (own_weights / total).to(value.dtype) @ own_values[:, :, :, part]
        outputs.append(torch.addcmul(from_own, from_history, norm / total).to(value.dtype))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=3)
    return output.reshape(batch_size, num_heads, count * steps, -1).transpose(1, 2).contiguous(), None


def own_states(states: torch.Tensor, own_keys: torch.LongTensor) -> torch.Tensor:
    """Of keys or values `[B, H, S, D]`, those at `own_keys [B, N, m]`: `[B, H, 1, N, m, D]`."""
    batch_size, heads, size, dim = states.shape
    rows = torch.arange(batch_size * heads, device=states.device).view(batch_size, heads, 1) * size
    flat = (rows + own_keys.flatten(1)[:, None]).flatten()
    return states.reshape(-1, dim).index_select(0, flat).view(batch_size, heads, 1, *own_keys.shape[1:], dim)


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The window beyond which some layer of a backbone does not see, if there is one."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        return None
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def attention_mask_4d(
    config: PreTrainedConfig,
    visible: torch.BoolTensor,
    query_positions: torch.LongTensor,
    key_positions: torch.LongTensor,
    dtype: torch.dtype,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """
    A mask as the backbone takes it: boolean for sdpa, additive for eager; with the sliding window, if it has one, which a
    4-D mask would replace; one mask for each type of layer, if they differ in it.

    Args:
        config (`PreTrainedConfig`): The backbone's own.
        visible (`torch.BoolTensor` of shape `(batch_size, Q, K)`)
        query_positions, key_positions (`torch.LongTensor` of shape `(batch_size, Q)` and `(batch_size, K)`)
    """

    def prepared(mask: torch.BoolTensor) -> torch.Tensor:
        mask = mask[:, None]
        if config._attn_implementation != "eager":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    window = sliding_window(config)
    if window is None:
        return prepared(visible)
    near = visible & (query_positions[:, :, None] - key_positions[:, None] < window)
    if len(set(getattr(config, "layer_types", None) or [])) > 1:
        return {"full_attention": prepared(visible), "sliding_attention": prepared(near)}
    return prepared(near)


@contextmanager
def cache_rollback(cache: Cache, unless_it_works: bool = False) -> Iterator[Cache]:
    """Whatever is appended to the cache inside is taken off again, also (or only) if something fails."""
    lengths, stays = [layer.get_seq_length() for layer in cache.layers], False
    try:
        yield cache
        stays = unless_it_works
    finally:
        # Layer by layer: if one failed, those behind it have nothing to be taken off.
        for layer, length in () if stays else zip_longest(cache.layers, lengths, fillvalue=0):
            if more := layer.get_seq_length() - length:
                layer.crop(-more)


def check_cache(cache: Cache) -> None:
    """Raises `ValueError` unless tokens can be appended to a cache and taken off again."""
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise ValueError(
            f"Expected a `DynamicCache()`, on which beams and candidates are packed and taken off again, found "
            f"{type(cache).__name__} with layers {kinds}."
        )


def read_branches(
    backbone: nn.Module,
    token_ids: torch.LongTensor | None,
    history_mask: torch.BoolTensor,
    earlier_keys: torch.LongTensor,
    cache: DynamicCache,
    timestamps: torch.LongTensor | None = None,
    inputs_embeds: torch.FloatTensor | None = None,
    token_mask: torch.BoolTensor | None = None,
    token_times: torch.LongTensor | None = None,
) -> tuple[torch.FloatTensor, torch.LongTensor]:
    """
    Runs the next tokens of N branches of each history, and leaves their keys and values on the cache.

    Args:
        backbone (`UniGRFModel`)
        token_ids (`torch.LongTensor` of shape `(batch_size, N, s)`): None with `inputs_embeds`.
        history_mask (`torch.BoolTensor` of shape `(batch_size, T)`): What the branches see of the cache's first T
            tokens.
        earlier_keys (`torch.LongTensor` of shape `(batch_size, N, m)`): Where on the cache the tokens are that come before
            them in each continuation, after the history.
        timestamps (`torch.LongTensor` of shape `(batch_size, 2)`, *optional*): When the event of these tokens is, and the one
            that their outputs are asked for.
        inputs_embeds (`torch.FloatTensor` of shape `(batch_size, N, s, hidden_size)`, *optional*): What is read in place of
            `token_ids`.
        token_mask (`torch.BoolTensor` of shape `(batch_size, N, s)`, *optional*): Which of the tokens are there; all by
            default. The others are seen by none and take no position: a continuation is read as if it had been given
            without them. Their own output means nothing.
        token_times (`torch.LongTensor` of shape `(batch_size, N, s)`, *optional*): With `timestamps`: when the event of each
            token is, in place of the first of them.

    Returns:
        The output `[batch_size, N, s, hidden_size]`, and where on the cache each continuation's tokens are now,
        `[batch_size, N, m + s]`.
    """
    config = backbone.language_model.config
    inputs = token_ids if inputs_embeds is None else inputs_embeds
    batch_size, count, steps = inputs.shape[:3]
    earlier, length, device = earlier_keys.shape[2], history_mask.shape[1], inputs.device
    start, own = cache.get_seq_length(), torch.arange(count * steps, device=device)
    own_keys = torch.cat([earlier_keys, (start + own).view(1, count, steps).expand(batch_size, -1, -1)], dim=2)
    positions, own_mask = torch.arange(earlier + steps, device=device).expand(batch_size, count, -1), None
    if token_mask is not None:
        own_mask = nn.functional.pad(token_mask, (earlier, 0), value=True)
        positions = (own_mask.long().cumsum(dim=2) - 1).clamp(min=0)
    positions = history_mask.sum(dim=1)[:, None, None] + positions
    arguments = {
        "input_ids" if inputs_embeds is None else "inputs_embeds": inputs.flatten(1, 2),
        "position_ids": positions[:, :, earlier:].flatten(1),
        "cache": cache,
        "use_cache": True,
    }
    if timestamps is not None:
        own_times, query_time = timestamps[:, :, None].expand(-1, -1, count * steps).unbind(dim=1)
        own_times = own_times if token_times is None else token_times.flatten(1)
        arguments |= {"timestamps": own_times, "target_timestamps": query_time}
    window = sliding_window(config)
    whole_history_seen = window is None or length + earlier + steps <= window
    if whole_history_seen and not torch.is_grad_enabled() and shares_prefix(backbone):
        # A mask that says nothing new keeps the backbone from making one of its own.
        branches, mask = Branches(history_mask, own_keys, own_mask), history_mask[:, None, None]
        states = backbone(attention_mask=mask, branches=branches, **arguments)
    else:
        visible = torch.zeros(batch_size, count, steps, start + count * steps, dtype=torch.bool, device=device)
        visible[..., :length] = history_mask[:, None, None]
        causal = torch.ones(steps, earlier + steps, dtype=torch.bool, device=device).tril(earlier)
        seen = causal.expand(batch_size, count, -1, -1)
        if own_mask is not None:
            seen = seen & own_mask[:, :, None]
        visible.scatter_(3, own_keys[:, :, None].expand(-1, -1, steps, -1), seen)
        key_positions = nn.functional.pad(history_mask.long().cumsum(1) - 1, (0, start + count * steps - length))
        key_positions.scatter_(1, own_keys.flatten(1), positions.flatten(1))
        mask = attention_mask_4d(
            config, visible.flatten(1, 2), arguments["position_ids"], key_positions, backbone.dtype
        )
        states = backbone(attention_mask=mask, **arguments)
    return states.last_hidden_state.unflatten(1, (count, steps)), own_keys


@torch.no_grad()
def shares_prefix(backbone: nn.Module) -> bool:
    """
    Whether the backbone attends by `shared_prefix_attention`. One that uses sdpa is switched over at first use, for good
    (without branches it is sdpa, and switching to and fro would not be safe in threads), if a trial shows that its
    keyword arguments reach the attention.
    """
    config = backbone.language_model.config
    with TRIAL:  # of which no other thread may see half
        if config._attn_implementation == "sdpa" and backbone.hands_down_arguments:
            token = torch.zeros(1, 1, dtype=torch.long, device=backbone.device)
            cache, seen = DynamicCache(), torch.ones(1, 1, 1, 2, dtype=torch.bool, device=backbone.device)
            trial = Branches(seen[:, 0, 0, :1], torch.ones_like(token)[None])
            succeeded = False
            # In training it draws dropout, of which a run that is resumed must not see more than one that is not.
            with torch.random.fork_rng([backbone.device] if backbone.device.type == "cuda" else []):
                backbone(token, cache=cache, use_cache=True)
                config._attn_implementation = SHARED_PREFIX
                try:
                    backbone(token, seen, cache=cache, use_cache=True, branches=trial)
                    backbone.hands_down_arguments = succeeded = trial.handed_down
                finally:
                    if not succeeded:
                        config._attn_implementation = "sdpa"
        return config._attn_implementation == SHARED_PREFIX
