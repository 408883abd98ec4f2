# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The shared prefix: reading histories once, and many short branches behind each of them on the same cache.

Beams and candidates are branches: short sequences after one history, none of which sees another. The branches of a
history are packed behind it in one row, so that it is read and stored once. `read_branches` attends in one of two
ways, with equal results:

- *Shared prefix (cascade)*: all queries of a request attend its history in one product and each branch its own few
  tokens in another; their log-sum-exp merges the two. The backbone must hand its keyword arguments down to the
  attention, which a trial shows.
- *Packed mask*: plain attention under a 4-D mask, whose cost grows with the square of the branches. For eager
  attention, training, histories longer than a sliding window, and backbones that hand nothing down.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from threading import Lock

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .inputs_unigrf import History

MAX_SCORES = 2**24  # attention scores in memory at a time: 64 MiB
# Named after this module: code loaded from a repository must not replace an installed package's, or the reverse.
SHARED_PREFIX = f"shared_prefix@{__name__}"
TRIAL = Lock()


@dataclass
class Branches:
    """
    What the attention must know of the branches.

    Args:
        history_mask (`torch.BoolTensor` of shape `(batch_size, T)`): Which of the cache's first T tokens the branches
            see.
        keys (`torch.LongTensor` of shape `(batch_size, N, m)`): Where on the cache the tokens of each branch are, in
            order. The last ones are the queries of this forward.
        mask (`torch.BoolTensor` of shape `(batch_size, N, m)`, *optional*): Which of these tokens the queries see;
            None: all.
        reached_attention (`bool`): Set by the attention, where the backbone hands its keyword arguments down.
    """

    history_mask: torch.BoolTensor
    keys: torch.LongTensor
    mask: torch.BoolTensor | None = None
    reached_attention: bool = False

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
    Attend from branches to a history that they share, exactly. Without `branches` this is sdpa.

    Args:
        query (`torch.FloatTensor` of shape `(batch_size, num_heads, N * s, head_dim)`)
        key, value (`torch.FloatTensor` of shape `(batch_size, num_key_value_heads, T + branch tokens, head_dim)`)

    Returns:
        `(output [batch_size, N * s, num_heads, head_dim], None)`, as transformers' attention functions do.
    """
    if branches is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    branches.reached_attention = True
    batch_size, num_heads, _, dim = query.shape
    kv_heads, length = key.shape[1], branches.history_mask.shape[1]
    _, count, size = branches.keys.shape
    steps, groups = query.shape[2] // count, num_heads // kv_heads
    queries = query * (dim**-0.5 if scaling is None else scaling)
    queries = queries.reshape(batch_size, kv_heads, groups, count, steps, dim)
    history_keys, history_values = key[:, :, :length].transpose(2, 3), value[:, :, :length]
    branch_keys, branch_values = (branch_states(states, branches.keys) for states in (key, value))
    hidden = None
    if steps > 1:
        hidden = ~torch.ones(steps, size, dtype=torch.bool, device=query.device).tril(size - steps)
        if branches.mask is not None:
            hidden = hidden | ~branches.mask[:, None, None, :, None]
        hidden = hidden.expand(batch_size, 1, 1, count, steps, size)

    outputs = []
    chunk = max(1, MAX_SCORES // (batch_size * num_heads * steps * length))
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        block = queries[:, :, :, part]
        # The history, for all branches at once.
        scores = (block.flatten(2, 4) @ history_keys).float()
        if branches.padding is not None:
            # Not -inf: a row may see nothing of the history.
            scores.masked_fill_(branches.padding, torch.finfo(scores.dtype).min)
        top = scores.amax(dim=-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        norm = weights.sum(dim=-1, keepdim=True)
        # Divide first: float16 could not hold the sum.
        from_history = (weights.div_(norm).to(value.dtype) @ history_values).view(*block.shape[:-1], -1)
        top, norm = (column.view(*block.shape[:-1], 1) for column in (top, norm))

        # Each branch's own tokens, and the merge of the two.
        branch_scores = (block @ branch_keys[:, :, :, part].transpose(-1, -2)).float()
        if hidden is not None:
            branch_scores = branch_scores.masked_fill(hidden[:, :, :, part], -torch.inf)
        highest = torch.maximum(top, branch_scores.amax(dim=-1, keepdim=True))
        branch_weights = (branch_scores - highest).exp()
        norm = norm * (top - highest).exp()
        total = norm + branch_weights.sum(dim=-1, keepdim=True)
        from_branch = (branch_weights / total).to(value.dtype) @ branch_values[:, :, :, part]
        outputs.append(torch.addcmul(from_branch, from_history, norm / total).to(value.dtype))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=3)
    return output.reshape(batch_size, num_heads, count * steps, -1).transpose(1, 2).contiguous(), None


def branch_states(states: torch.Tensor, keys: torch.LongTensor) -> torch.Tensor:
    """Select, of keys or values `[B, H, S, D]`, those at `keys [B, N, m]`: `[B, H, 1, N, m, D]`."""
    batch_size, heads, size, dim = states.shape
    rows = torch.arange(batch_size * heads, device=states.device).view(batch_size, heads, 1) * size
    flat = (rows + keys.flatten(1)[:, None]).flatten()
    return states.reshape(-1, dim).index_select(0, flat).view(batch_size, heads, 1, *keys.shape[1:], dim)


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The window beyond which some layer of a backbone does not see; None: every layer sees everything."""
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
    Make the 4-D mask that a backbone takes: boolean for sdpa, additive for eager attention. A 4-D mask replaces the
    backbone's sliding window, so it includes the window; if layers differ in it, the result has one mask for each
    type of layer.

    Args:
        config (`PreTrainedConfig`): The backbone's.
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


def check_cache(cache: Cache) -> None:
    """Raises `ValueError` unless tokens can be appended to the cache and taken off again."""
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise ValueError(
            f"`cache` must be a `DynamicCache()` with plain layers, got {type(cache).__name__} with layers {kinds}. "
            "Beams and candidates are appended to it and taken off again: pass `DynamicCache()`, or leave the cache "
            "out."
        )


@contextmanager
def cache_rollback(cache: Cache, only_on_error: bool = False) -> Iterator[Cache]:
    """Crops the cache back to its length on exit; with `only_on_error`, only where an exception is raised."""
    lengths = [layer.get_seq_length() for layer in cache.layers]
    completed = False
    try:
        yield cache
        completed = True
    finally:
        if not (completed and only_on_error):
            # Layer by layer: a forward that failed has not reached the last ones.
            for layer, length in zip_longest(cache.layers, lengths, fillvalue=0):
                if excess := layer.get_seq_length() - length:
                    layer.crop(-excess)


def without_gradient(cache: DynamicCache) -> DynamicCache:
    """Copies the cache: the same keys and values, into which no gradient flows."""
    copy = DynamicCache()
    for index, layer in enumerate(cache.layers):
        copy.update(layer.keys.detach(), layer.values.detach(), index)
    return copy


def embed(backbone: PreTrainedModel, token_ids: torch.LongTensor) -> torch.FloatTensor:
    """Token ids `[...]` -> the backbone's embeddings `[..., hidden_size]`. `backbone`: a `UniGRFModel`."""
    return backbone.language_model.get_input_embeddings()(token_ids)


def prefill(
    backbone: PreTrainedModel, history: History, representations: torch.FloatTensor | None, cache: DynamicCache
) -> torch.FloatTensor:
    """
    Run the tokens of the histories that the cache lacks. If it lacks none, the last token runs again, on a branch.

    Args:
        backbone (`UniGRFModel`)
        history (`History`): Of T tokens.
        representations (`torch.FloatTensor` of shape `(batch_size, T, hidden_size)`, *optional*): Added to the
            embeddings.
        cache (`DynamicCache`): Holds the first tokens, or none; holds all of them afterwards, unless an exception is
            raised.

    Returns:
        The output at the last token, `[batch_size, hidden_size]`.

    Raises:
        ValueError: if the cache holds more tokens, or cannot be cropped.
    """
    check_cache(cache)
    input_ids, attention_mask = history.input_ids, history.attention_mask
    num_cached, length = cache.get_seq_length(), input_ids.shape[1]
    if num_cached > length:
        raise ValueError(
            f"`cache` must hold at most the {length} tokens of input_ids, got {num_cached}. Pass the cache of these "
            "histories, or a new `DynamicCache()`."
        )
    times = None
    if history.timestamps is not None:
        times = torch.cat([history.timestamps, history.query_time[:, None]], dim=1)
    if num_cached < length:
        inputs = {} if representations is None else {"item_representations": representations[:, num_cached:]}
        if times is not None:
            inputs |= {"timestamps": times[:, num_cached:-1], "target_timestamps": times[:, num_cached + 1 :]}
        with cache_rollback(cache, only_on_error=True):
            outputs = backbone(input_ids[:, num_cached:], attention_mask, cache=cache, use_cache=True, **inputs)
        return outputs.last_hidden_state[:, -1]
    mask = attention_mask.bool().clone()
    mask[:, -1] = False
    last = embed(backbone, input_ids[:, -1:])
    last = last if representations is None else last + representations[:, -1:]
    nothing = input_ids.new_empty(len(input_ids), 1, 0)
    times = None if times is None else times[:, -2:]
    with cache_rollback(cache):
        states, _ = read_branches(backbone, nothing, mask, nothing, cache, times, last[:, :, None])
    return states[:, 0, 0]


def read_branches(
    backbone: PreTrainedModel,
    token_ids: torch.LongTensor,
    history_mask: torch.BoolTensor,
    earlier_keys: torch.LongTensor,
    cache: DynamicCache,
    times: torch.LongTensor | None = None,
    block: torch.FloatTensor | None = None,
    token_mask: torch.BoolTensor | None = None,
    token_times: torch.LongTensor | None = None,
) -> tuple[torch.FloatTensor, torch.LongTensor]:
    """
    Run the next tokens of N branches of each history, and leave their keys and values on the cache.

    Args:
        backbone (`UniGRFModel`)
        inputs_embeds (`torch.FloatTensor` of shape `(batch_size, N, s, hidden_size)`)
        history_mask (`torch.BoolTensor` of shape `(batch_size, T)`): Which of the cache's first T tokens the branches
            see.
        earlier_keys (`torch.LongTensor` of shape `(batch_size, N, m)`): Where on the cache each branch's earlier
            tokens are.
        times (`torch.LongTensor` of shape `(batch_size, 2)`, *optional*): The time of these tokens' event, and of the
            event that their outputs predict, in seconds.
        block (`torch.FloatTensor` of shape `(batch_size, N, t, hidden_size)`, *optional*): Embeddings of t more
            tokens, behind `token_ids`; s counts them, too, from here on.
        token_mask (`torch.BoolTensor` of shape `(batch_size, N, s)`, *optional*): Which of the tokens exist; None:
            all. No other token sees those that do not, and they take no position; their own outputs mean nothing.
        token_times (`torch.LongTensor` of shape `(batch_size, N, s)`, *optional*): Each token's time, in place of the
            first of `times`.

    Returns:
        The output `[batch_size, N, s, hidden_size]`, and where on the cache each branch's tokens are now,
        `[batch_size, N, m + s]`.
    """
    language_model = backbone.language_model
    config = language_model.config
    inputs_embeds = embed(backbone, token_ids)
    if block is not None:
        inputs_embeds = torch.cat([inputs_embeds, block], dim=2)
    _, count, steps = inputs_embeds.shape[:3]
    keys, positions, branch_mask = _place_branches(inputs_embeds, history_mask, earlier_keys, cache, token_mask)
    earlier = earlier_keys.shape[2]
    flat = inputs_embeds.flatten(1, 2)
    if backbone.training and backbone.config.embedding_dropout:
        flat = nn.functional.dropout(flat, backbone.config.embedding_dropout)
    arguments = {
        "inputs_embeds": flat,
        "position_ids": positions[:, :, earlier:].flatten(1),
        "cache": cache,
        "use_cache": True,
    }
    if times is not None:
        event_times, target_times = times[:, :, None].expand(-1, -1, count * steps).unbind(dim=1)
        event_times = event_times if token_times is None else token_times.flatten(1)
        arguments |= {"timestamps": event_times, "target_timestamps": target_times}
    window = sliding_window(config)
    sees_whole_history = window is None or history_mask.shape[1] + earlier + steps <= window
    if sees_whole_history and not torch.is_grad_enabled() and shares_prefix(language_model):
        # Pass a trivial mask so that the backbone does not build its own.
        branches = Branches(history_mask, keys, branch_mask)
        outputs = language_model(attention_mask=history_mask[:, None, None], branches=branches, **arguments)
    else:
        visible, key_positions = _packed_mask(history_mask, keys, positions, branch_mask, steps, cache)
        mask = attention_mask_4d(config, visible, arguments["position_ids"], key_positions, backbone.dtype)
        outputs = language_model(attention_mask=mask, **arguments)
    return outputs.last_hidden_state.unflatten(1, (count, steps)), keys


def _place_branches(
    inputs_embeds: torch.FloatTensor,
    history_mask: torch.BoolTensor,
    earlier_keys: torch.LongTensor,
    cache: DynamicCache,
    token_mask: torch.BoolTensor | None,
) -> tuple[torch.LongTensor, torch.LongTensor, torch.BoolTensor | None]:
    """
    Of all tokens of the branches: where on the cache they are, their positions, and which exist, `[B, N, m + s]` each.
    """
    batch_size, count, steps = inputs_embeds.shape[:3]
    earlier, device = earlier_keys.shape[2], inputs_embeds.device
    new_keys = cache.get_seq_length() + torch.arange(count * steps, device=device)
    keys = torch.cat([earlier_keys, new_keys.view(1, count, steps).expand(batch_size, -1, -1)], dim=2)
    positions = torch.arange(earlier + steps, device=device).expand(batch_size, count, -1)
    branch_mask = None
    if token_mask is not None:
        branch_mask = nn.functional.pad(token_mask, (earlier, 0), value=True)
        positions = (branch_mask.long().cumsum(dim=2) - 1).clamp(min=0)
    return keys, history_mask.sum(dim=1)[:, None, None] + positions, branch_mask


def _packed_mask(
    history_mask: torch.BoolTensor,
    keys: torch.LongTensor,
    positions: torch.LongTensor,
    branch_mask: torch.BoolTensor | None,
    steps: int,
    cache: DynamicCache,
) -> tuple[torch.BoolTensor, torch.LongTensor]:
    """
    What the branches' last `steps` tokens see of the cache and of themselves, `[B, N * s, K]`; positions of it, `[B,
    K]`.
    """
    batch_size, count, size = keys.shape
    length, device = history_mask.shape[1], keys.device
    num_keys = cache.get_seq_length() + count * steps
    visible = torch.zeros(batch_size, count, steps, num_keys, dtype=torch.bool, device=device)
    visible[..., :length] = history_mask[:, None, None]
    causal = torch.ones(steps, size, dtype=torch.bool, device=device).tril(size - steps)
    visible_branch = causal.expand(batch_size, count, -1, -1)
    if branch_mask is not None:
        visible_branch = visible_branch & branch_mask[:, :, None]
    visible.scatter_(3, keys[:, :, None].expand(-1, -1, steps, -1), visible_branch)
    key_positions = nn.functional.pad(history_mask.long().cumsum(1) - 1, (0, num_keys - length))
    key_positions.scatter_(1, keys.flatten(1), positions.flatten(1))
    return visible.flatten(1, 2), key_positions


@torch.no_grad()
def shares_prefix(language_model: PreTrainedModel) -> bool:
    """
    Whether the language model attends by `shared_prefix_attention`. A model that uses sdpa is switched over at first
    use, for good, if a trial shows that its keyword arguments reach the attention. (Without branches the attention is
    sdpa, and to switch to and fro would not be safe in threads.)
    """
    config = language_model.config
    with TRIAL:  # Hold the lock: the attention implementation is switched temporarily.
        if config._attn_implementation == "sdpa" and getattr(language_model, "hands_down_arguments", True):
            token = torch.zeros(1, 1, dtype=torch.long, device=language_model.device)
            mask = torch.ones(1, 1, 1, 2, dtype=torch.bool, device=language_model.device)
            cache = DynamicCache()
            trial = Branches(mask[:, 0, 0, :1], torch.ones_like(token)[None])
            succeeded = False
            # Dropout draws random numbers in training: a resumed run must not see other ones.
            with torch.random.fork_rng([language_model.device] if language_model.device.type == "cuda" else []):
                language_model(input_ids=token, cache=cache, use_cache=True)
                config._attn_implementation = SHARED_PREFIX
                try:
                    language_model(input_ids=token, attention_mask=mask, cache=cache, use_cache=True, branches=trial)
                    language_model.hands_down_arguments = succeeded = trial.reached_attention
                finally:
                    if not succeeded:
                        config._attn_implementation = "sdpa"
        return config._attn_implementation == SHARED_PREFIX
