# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The shared prefix: the backbone reads a history once, and many short branches behind it on the same cache.

Beams and candidates are branches: short sequences that continue a history and do not see each other. They are packed
behind their history in a single row, so the backbone reads and stores the history once. `read_branches` attends in one
of two ways, with equal results:

- *Shared prefix (cascade)*: all queries of a request attend the history in a single product. A second product attends
  the few tokens of each branch. Their log-sum-exp merges the two. The backbone must hand its keyword arguments down to
  the attention, which a trial shows.
- *Packed mask*: plain attention under a 4-D mask, whose cost grows with the square of the branches. It serves eager
  attention, training, histories longer than a sliding window, and backbones that hand no arguments down.
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

# Attention scores in memory at a time: 64 MiB.
MAX_SCORES = 2**24
# Named after the module: a repository's code must not replace installed functions.
SHARED_PREFIX = f"shared_prefix@{__name__}"
# The trial of `shares_prefix` switches the attention implementation temporarily.
TRIAL = Lock()


@dataclass
class Branches:
    """
    The description of the branches that the attention reads.

    Args:
        history_mask (`torch.BoolTensor` of shape `(batch_size, T)`): True at the tokens that branches see, among the
            cache's first T.
        keys (`torch.LongTensor` of shape `(batch_size, N, m)`): Cache positions of each branch's tokens, in order. The
            last tokens are the queries of this forward.
        mask (`torch.BoolTensor` of shape `(batch_size, N, m)`, *optional*): True at the branch tokens that queries
            see. None: they see all.
        reached_attention (`bool`, defaults to `False`): The attention sets it to True. It stays False if the backbone
            hands no keyword arguments down.
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
    Attend from branches to the history that they share, exactly. Without `branches` this is sdpa.

    Args:
        query (`torch.FloatTensor` of shape `(batch_size, num_heads, N * s, head_dim)`): Queries of the branches.
        key, value (`torch.FloatTensor` of shape `(batch_size, num_key_value_heads, S, head_dim)`): The cache, whose
            first T tokens are the history and whose others are branch tokens.
        branches (`Branches`, *optional*): The branches. None: plain attention.

    Returns:
        `(output [batch_size, N * s, num_heads, head_dim], None)`, like transformers' attention functions.
    """
    if branches is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    branches.reached_attention = True
    # Queries, keys and values, by branch.
    batch_size, num_heads, _, dim = query.shape
    kv_heads = key.shape[1]
    length = branches.history_mask.shape[1]
    _, count, size = branches.keys.shape
    steps = query.shape[2] // count
    groups = num_heads // kv_heads
    queries = query * (dim**-0.5 if scaling is None else scaling)
    queries = queries.reshape(batch_size, kv_heads, groups, count, steps, dim)
    history_keys = key[:, :, :length].transpose(2, 3)
    history_values = value[:, :, :length]
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
        from_history, top, norm = _attend_to_history(block, history_keys, history_values, branches.padding)
        # Merge with the branches' own tokens by log-sum-exp.
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


def _attend_to_history(
    block: torch.Tensor, history_keys: torch.Tensor, history_values: torch.Tensor, padding: torch.BoolTensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend from all branches at once: the output `[..., D]`, and the largest score and the norm `[..., 1]`."""
    scores = (block.flatten(2, 4) @ history_keys).float()
    if padding is not None:
        # Not -inf: a row may see no token of the history.
        scores.masked_fill_(padding, torch.finfo(scores.dtype).min)
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    norm = weights.sum(dim=-1, keepdim=True)
    # Divide first: float16 could not hold the sum.
    output = weights.div_(norm).to(history_values.dtype) @ history_values
    shape = block.shape[:-1]
    return output.view(*shape, -1), top.view(*shape, 1), norm.view(*shape, 1)


def branch_states(states: torch.Tensor, keys: torch.LongTensor) -> torch.Tensor:
    """Select the states `[B, H, 1, N, m, D]` at `keys [B, N, m]`, among keys or values `[B, H, S, D]`."""
    batch_size, heads, size, dim = states.shape
    rows = torch.arange(batch_size * heads, device=states.device).view(batch_size, heads, 1) * size
    flat = (rows + keys.flatten(1)[:, None]).flatten()
    return states.reshape(-1, dim).index_select(0, flat).view(batch_size, heads, 1, *keys.shape[1:], dim)


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Return the window beyond which some layer of a backbone does not see; None: no layer has a window."""
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
    Make the 4-D mask that a backbone takes: boolean for sdpa, additive for eager attention.

    A 4-D mask replaces the backbone's sliding window, so it includes the window. If layers differ in their window, the
    result is a dict with a mask for each type of layer.

    Args:
        config (`PreTrainedConfig`): The backbone's config.
        visible (`torch.BoolTensor` of shape `(batch_size, Q, K)`): True at the keys that a query sees, without the
            window.
        query_positions (`torch.LongTensor` of shape `(batch_size, Q)`): Positions of the queries.
        key_positions (`torch.LongTensor` of shape `(batch_size, K)`): Positions of the keys.
        dtype (`torch.dtype`): Dtype of an additive mask.
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
    """Raise `ValueError` unless tokens can be appended to the cache and cropped off again."""
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", [])})
        raise ValueError(
            f"`cache` must be a `DynamicCache()` with plain layers, got {type(cache).__name__} with layers {kinds}. "
            "Pass `DynamicCache()`, or leave the cache out: beams and candidates are appended and cropped off again."
        )


@contextmanager
def cache_rollback(cache: Cache, only_on_error: bool = False) -> Iterator[Cache]:
    """Crop the cache back to its length on exit; with `only_on_error`, only after an exception."""
    lengths = [layer.get_seq_length() for layer in cache.layers]
    completed = False
    try:
        yield cache
        completed = True
    finally:
        if not (completed and only_on_error):
            # Layer by layer: a failed forward has not reached the last layers.
            for layer, length in zip_longest(cache.layers, lengths, fillvalue=0):
                if excess := layer.get_seq_length() - length:
                    layer.crop(-excess)


def token_columns(
    input_ids: torch.LongTensor,
    attention_mask: torch.LongTensor | None,
    timestamps: torch.LongTensor | None,
    target_timestamps: torch.LongTensor | None,
) -> torch.LongTensor:
    """Stack all that a token's keys and values depend on: id, mask, time and target time, `[B, T, 4]`; padding: 0."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :].long()
    times = torch.full_like(input_ids, -1) if timestamps is None else timestamps
    if target_timestamps is None:
        target_timestamps = torch.cat([times[:, 1:], times[:, -1:]], dim=1)
    return torch.stack([input_ids, mask, times, target_timestamps], dim=-1) * mask[..., None]


def record_tokens(
    cache: Cache | None,
    num_cached: int,
    input_ids: torch.LongTensor | None,
    attention_mask: torch.Tensor | dict | None = None,
    timestamps: torch.LongTensor | None = None,
    target_timestamps: torch.LongTensor | None = None,
) -> None:
    """
    Store on a cache what its tokens are, `cache.token_columns [B, n, 4]`, for `check_cached_tokens`.

    Args:
        cache (`Cache`, *optional*): A cache that holds these tokens behind its first `num_cached`. None: no cache.
        num_cached (`int`): Number of earlier tokens.
        input_ids, attention_mask, timestamps, target_timestamps: The inputs of the backbone. Without `input_ids` and
            with a mask that is not 2-D, the tokens are unknown.
    """
    if not isinstance(cache, DynamicCache):
        return
    earlier = getattr(cache, "token_columns", None)
    cache.token_columns = None
    if input_ids is None or not (attention_mask is None or getattr(attention_mask, "ndim", 0) == 2):
        return
    columns = token_columns(input_ids, attention_mask, timestamps, target_timestamps)
    if num_cached == 0:
        cache.token_columns = columns
    elif earlier is not None and len(earlier) == len(columns) and earlier.shape[1] >= num_cached:
        cache.token_columns = torch.cat([earlier[:, :num_cached], columns], dim=1)


def check_cached_tokens(cache: DynamicCache, history: History) -> None:
    """
    Check that the cache holds the first tokens of the histories.

    The last token's keys and values depend on the time of the next event. If that time is another one by now, the
    token is cropped off the cache, to run again.

    Raises:
        ValueError: if the cache holds more tokens, other tokens, or tokens that the model did not run.
    """
    num_cached = cache.get_seq_length()
    length = history.input_ids.shape[1]
    advice = "Pass the cache of these histories, or a new `DynamicCache()`, also after a window of items moved."
    if num_cached > length:
        raise ValueError(f"`cache` must hold at most the {length} tokens of input_ids, got {num_cached}. {advice}")
    if num_cached == 0:
        return
    targets = None
    if history.timestamps is not None:
        targets = torch.cat([history.timestamps[:, 1:], history.query_time[:, None]], dim=1)
    columns = token_columns(history.input_ids, history.attention_mask, history.timestamps, targets)[:, :num_cached]
    cached = getattr(cache, "token_columns", None)
    if cached is None or cached[:, :num_cached].shape != columns.shape:
        got = "tokens without a record" if cached is None else f"tokens of shape {tuple(cached.shape[:2])}"
        raise ValueError(
            f"`cache` must hold the first tokens of the {len(columns)} histories of input_ids, got {got}. {advice}"
        )
    differs = cached[:, :num_cached].to(columns.device) != columns
    is_late = differs[:, -1, 3].any()
    differs[:, -1, 3] = False
    rows = differs.flatten(1).any(dim=1)
    is_other, is_late = torch.stack([rows.any(), is_late]).tolist()
    if is_other:
        raise ValueError(
            f"`cache` must hold the first tokens of input_ids, got other tokens (or times) in row "
            f"{int(rows.nonzero()[0])}. {advice}"
        )
    if is_late:
        cache.crop(-1)


def without_gradient(cache: DynamicCache) -> DynamicCache:
    """Copy the cache: the same keys and values, which stop the gradient."""
    copy = DynamicCache()
    for index, layer in enumerate(cache.layers):
        copy.update(layer.keys.detach(), layer.values.detach(), index)
    return copy


def embed(backbone: PreTrainedModel, token_ids: torch.LongTensor) -> torch.FloatTensor:
    """Look up the embeddings `[..., hidden_size]` of token ids `[...]` in a backbone, a `UniGRFModel`."""
    return backbone.language_model.get_input_embeddings()(token_ids)


def prefill(
    backbone: PreTrainedModel, history: History, representations: torch.FloatTensor | None, cache: DynamicCache
) -> torch.FloatTensor:
    """
    Run the tokens of the histories that the cache lacks. If it lacks none, the last token runs again, on a branch.

    Args:
        backbone (`UniGRFModel`): The model's backbone.
        history (`History`): The checked histories, of T tokens.
        representations (`torch.FloatTensor` of shape `(batch_size, T, hidden_size)`, *optional*): Item representations
            that are added to the embeddings. None: no addition.
        cache (`DynamicCache`): A cache of the first tokens, or an empty cache. It holds all tokens afterwards, except
            after an exception.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, hidden_size)`: the output at the last token.

    Raises:
        ValueError: if the cache holds other tokens, or cannot be cropped.
    """
    check_cache(cache)
    check_cached_tokens(cache, history)
    input_ids = history.input_ids
    attention_mask = history.attention_mask
    num_cached = cache.get_seq_length()
    length = input_ids.shape[1]
    times = None
    if history.timestamps is not None:
        times = torch.cat([history.timestamps, history.query_time[:, None]], dim=1)
    # Tokens that the cache lacks.
    if num_cached < length:
        inputs = {} if representations is None else {"item_representations": representations[:, num_cached:]}
        if times is not None:
            inputs |= {"timestamps": times[:, num_cached:-1], "target_timestamps": times[:, num_cached + 1 :]}
        with cache_rollback(cache, only_on_error=True):
            outputs = backbone(input_ids[:, num_cached:], attention_mask, cache=cache, use_cache=True, **inputs)
        return outputs.last_hidden_state[:, -1]
    # The last token again.
    mask = attention_mask.bool().clone()
    mask[:, -1] = False
    last = embed(backbone, input_ids[:, -1:])
    last = last if representations is None else last + representations[:, -1:]
    no_tokens = input_ids.new_empty(len(input_ids), 1, 0)
    times = None if times is None else times[:, -2:]
    with cache_rollback(cache):
        states, _ = read_branches(backbone, no_tokens, mask, no_tokens, cache, times, last[:, :, None])
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
        backbone (`UniGRFModel`): The model's backbone.
        token_ids (`torch.LongTensor` of shape `(batch_size, N, s - t)`): The next tokens.
        history_mask (`torch.BoolTensor` of shape `(batch_size, T)`): True at the tokens that branches see, among the
            cache's first T.
        earlier_keys (`torch.LongTensor` of shape `(batch_size, N, m)`): Cache positions of each branch's first tokens.
        cache (`DynamicCache`): Keys and values of the histories and of the branches' tokens.
        times (`torch.LongTensor` of shape `(batch_size, 2)`, *optional*): The time of these tokens' event, and of the
            event that their outputs predict, in seconds. None: no times.
        block (`torch.FloatTensor` of shape `(batch_size, N, t, hidden_size)`, *optional*): Embeddings of t tokens
            behind `token_ids`. None: t = 0.
        token_mask (`torch.BoolTensor` of shape `(batch_size, N, s)`, *optional*): True at the tokens that exist. Other
            tokens take no position, no token sees them, and their outputs are void. None: all exist.
        token_times (`torch.LongTensor` of shape `(batch_size, N, s)`, *optional*): The time of each token in seconds.
            None: the first of `times`.

    Returns:
        The output `[batch_size, N, s, hidden_size]`; the cache positions of each branch's tokens, `[batch_size, N, m +
        s]`.
    """
    # The backbone's inputs.
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
    # The attention: shared prefix or packed mask.
    window = sliding_window(config)
    sees_whole_history = window is None or history_mask.shape[1] + earlier + steps <= window
    if sees_whole_history and not torch.is_grad_enabled() and shares_prefix(language_model, flat.device):
        # Pass a trivial mask so the backbone does not build its own.
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
    """Compute, for all branch tokens, cache positions, positions and a mask of those that exist, `[B, N, m + s]`."""
    batch_size, count, steps = inputs_embeds.shape[:3]
    earlier = earlier_keys.shape[2]
    device = inputs_embeds.device
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
    Make the mask of the branches' last `steps` tokens.

    Returns:
        `(visible [B, N * s, K], key_positions [B, K])`: True at the keys that a token sees, and the keys' positions.
        Keys are the cache and these tokens.
    """
    batch_size, count, size = keys.shape
    length = history_mask.shape[1]
    device = keys.device
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
def shares_prefix(language_model: PreTrainedModel, device: torch.device | None = None) -> bool:
    """
    Return whether the language model attends by `shared_prefix_attention`.

    `device` is that of the inputs. None: the model's, which must not be offloaded then.

    The first use switches a model with sdpa over for good, if a trial shows that its keyword arguments reach the
    attention. (Without branches the attention is sdpa. To switch to and fro would not be safe in threads.)
    """
    config = language_model.config
    device = language_model.device if device is None else device
    with TRIAL:
        if config._attn_implementation == "sdpa" and getattr(language_model, "hands_down_arguments", True):
            token = torch.zeros(1, 1, dtype=torch.long, device=device)
            mask = torch.ones(1, 1, 1, 2, dtype=torch.bool, device=device)
            cache = DynamicCache()
            trial = Branches(mask[:, 0, 0, :1], torch.ones_like(token)[None])
            succeeded = False
            # Restore the random state: in training, dropout draws from it.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                language_model(input_ids=token, cache=cache, use_cache=True)
                config._attn_implementation = SHARED_PREFIX
                try:
                    language_model(input_ids=token, attention_mask=mask, cache=cache, use_cache=True, branches=trial)
                    language_model.hands_down_arguments = succeeded = trial.reached_attention
                finally:
                    if not succeeded:
                        config._attn_implementation = "sdpa"
        return config._attn_implementation == SHARED_PREFIX
