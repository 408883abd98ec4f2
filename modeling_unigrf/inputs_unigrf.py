# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Inputs: histories, long histories and item sets, checked once a call.

The backbone reads a *history*: token ids, left-padded. A *long history* goes beyond it, with thousands of items. Each
candidate's sub-history is retrieved from the long history. *Item sets* are further items of a training row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from .configuration_unigrf import UniGRFConfig
from .item_lists_unigrf import check_integers, check_items, describe, is_integer
from .layout_unigrf import ItemLayout
from .trie_unigrf import CatalogTrie


@dataclass
class History:
    """
    The histories of B requests.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, T)`): Token ids, left-padded.
        attention_mask (`torch.LongTensor` of shape `(batch_size, T)`): 1 at the tokens that exist, else 0.
        timestamps (`torch.LongTensor` of shape `(batch_size, T)`, *optional*): The time of each token's event in
            seconds; -1: unknown. None: no times.
        query_time (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Query time in seconds. None: no times.
        rows, items (`torch.LongTensor` of shape `(n,)`, *optional*): Rows and indices of all whole items of the
            histories, in order. `check_history` sets them.
        long_history (`LongHistory`, *optional*): The long histories. None: the model reads none.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    timestamps: torch.LongTensor | None = None
    query_time: torch.LongTensor | None = None
    rows: torch.LongTensor | None = None
    items: torch.LongTensor | None = None
    long_history: "LongHistory | None" = None


@dataclass
class LongHistory:
    """
    The checked long histories of B requests.

    Args:
        items (`torch.LongTensor` of shape `(batch_size, H)`): Item indices, oldest first; -1: no item.
        behaviors (`torch.LongTensor` of shape `(batch_size, H)`): Indices into `config.behaviors`.
        timestamps (`torch.LongTensor` of shape `(batch_size, H)`): Times of the events in seconds; -1: unknown.
    """

    items: torch.LongTensor
    behaviors: torch.LongTensor
    timestamps: torch.LongTensor


@dataclass
class ItemSets:
    """
    Further items of each training row, as item indices. -1 stands for no item.

    Args:
        hard_negatives (`torch.LongTensor` of shape `(batch_size, m)`): Items that a loss must use as negatives
            (UniGRF's hard-to-detect disliked items).
        excluded_positives (`torch.LongTensor` of shape `(batch_size, f)`): Items that a loss must not use as
            negatives (UniGRF's potential favorites).
        candidates (`torch.LongTensor` of shape `(batch_size, N)`, *optional*): Candidates of each row's last item.
            None: the model's beams.
        blocked_items (`torch.LongTensor` of shape `(batch_size, M)`, *optional*): Items that the model's beams skip.
            None: the beams skip no item.
    """

    hard_negatives: torch.LongTensor
    excluded_positives: torch.LongTensor
    candidates: torch.LongTensor | None = None
    blocked_items: torch.LongTensor | None = None


ITEM_SETS = tuple(field.name for field in fields(ItemSets))


def check_history(
    config: UniGRFConfig,
    layout: ItemLayout,
    trie: CatalogTrie,
    input_ids: torch.LongTensor,
    attention_mask: torch.LongTensor | None,
    timestamps: torch.LongTensor | None = None,
    query_time: torch.LongTensor | None = None,
    long_history: dict | None = None,
    may_be_unfinished: bool = False,
    reads_long_history: bool = True,
) -> History:
    """
    Check the histories of a call that generates or ranks items.

    Args:
        config (`UniGRFConfig`), layout (`ItemLayout`): The model's configuration and the order of its tokens.
        trie (`CatalogTrie`): Trie of the whole catalog.
        input_ids (`torch.LongTensor` of shape `(batch_size, T)`): Token ids, left-padded.
        attention_mask (`torch.LongTensor` of shape `(batch_size, T)`, *optional*): 1 at the tokens that exist. None:
            all tokens but padding exist.
        timestamps (`torch.LongTensor` of shape `(batch_size, T)`, *optional*): The time of each token's event in
            seconds; -1: unknown. None: no times.
        query_time (`torch.LongTensor` of shape `(batch_size,)`, *optional*): In seconds. None: the last token's time.
        long_history (`dict`, *optional*): `items`, `behaviors` and `timestamps` of `recommend`. None: no history.
        may_be_unfinished (`bool`, defaults to `False`): Whether a row may end in the first codes of an item. True is
            for `generate`, which reads no long history.
        reads_long_history (`bool`): Whether the call reads `long_history`: `generate` and `prefill` read none.

    Raises:
        ValueError: for rows that no item can follow, unknown items, too few positions, other shapes, and a mask of
            other values than 0 and 1.
    """
    if not is_integer(input_ids) or input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(
            "`input_ids` must be a tensor of integers of shape (batch_size, sequence_length), neither of them 0, got "
            f"{describe(input_ids)}. Encode histories with `tokenizer.encode_history(..., return_tensors='pt')`."
        )
    if attention_mask is None:
        attention_mask = (input_ids != config.pad_token_id).long()
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape {tuple(input_ids.shape)} of input_ids, got "
            f"{describe(attention_mask)}. Pass the tokenizer's own, or leave it out."
        )
    is_wrong = (attention_mask != 0) & (attention_mask != 1)
    if is_wrong.any():
        row, token = is_wrong.nonzero()[0].tolist()
        raise ValueError(
            "`attention_mask` must be 1 at the tokens that exist and 0 at padding, got "
            f"{attention_mask[row, token].item()} at token {token} of row {row}. Pass the tokenizer's own, or leave "
            "it out."
        )
    lengths, places, codes = check_tokens(layout, input_ids, attention_mask, may_be_unfinished)
    num_block_tokens = 0 if may_be_unfinished else config.num_block_tokens
    longest = int(attention_mask.sum(dim=1).max()) - int(lengths.min())
    check_positions(config, longest + layout.num_levels + num_block_tokens)
    items = trie.lookup(codes)
    unknown = (items < 0).nonzero()
    if len(unknown):
        first = int(unknown[0])
        raise ValueError(
            f"`input_ids` must hold items of the catalog, got {len(unknown)} others, the first of codes "
            f"{codes[first].tolist()} in row {int(places[first, 0])}. Use the model's own tokenizer, and cut "
            "histories between items."
        )
    query_time = check_times(input_ids, timestamps, query_time)
    if reads_long_history:
        has_times = timestamps is not None
        long_history = check_long_history(config, trie.num_items, len(input_ids), long_history, has_times)
    return History(input_ids, attention_mask, timestamps, query_time, places[:, 0], items, long_history)


def check_tokens(
    layout: ItemLayout, input_ids: torch.LongTensor, attention_mask: torch.LongTensor, may_be_unfinished: bool
) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
    """
    Read the items of histories, and check that an item can follow each row.

    Returns:
        The lengths of the unfinished items `[B]`; of all whole items the places `[n, 2]` and the codes `[n, L]`.

    Raises:
        ValueError: if no item can follow a row.
    """
    unfinished, places, codes = layout.read_histories(input_ids)
    if unfinished.is_broken.any():
        row = int(unfinished.is_broken.nonzero()[0])
        window = input_ids[row, -(layout.num_levels + 1) :]
        raise ValueError(
            "`input_ids` must end in a bos or behavior token, then codes of levels 0, 1, ... in order, got row "
            f"{row} with the tokens {window.tolist()} of levels {layout.token_levels(window).tolist()}. Cut histories "
            "between items."
        )
    lengths = unfinished.lengths
    can_follow = (lengths >= 0) & (lengths < layout.num_levels) if may_be_unfinished else lengths == 0
    can_follow &= attention_mask[:, -1].bool()
    if not can_follow.all():
        row = int((~can_follow).nonzero()[0])
        raise ValueError(
            f"`input_ids` must end in <bos> or a behavior, tokens {layout.history_end_ids}, got row {row} with the "
            f"last token {int(input_ids[row, -1])}, after which no item begins. Pad on the left, and give every item "
            "its behavior."
        )
    return lengths, places, codes


def check_positions(config: UniGRFConfig, num_tokens: int) -> None:
    """
    Check that `num_tokens` of a history and a candidate fit into the backbone.

    Raises:
        ValueError: if the backbone has fewer positions.
    """
    num_positions = getattr(config.text_config, "max_position_embeddings", None)
    if num_positions is not None and num_tokens > num_positions:
        raise ValueError(
            f"A history and a candidate must fit into the {num_positions} positions of the backbone, got "
            f"{num_tokens} tokens. Keep at most {config.max_history_items} items of a history "
            "(`tokenizer.encode_history(..., max_items=...)`)."
        )


def check_times(
    input_ids: torch.LongTensor, timestamps: torch.LongTensor | None, query_time: torch.LongTensor | None
) -> torch.LongTensor | None:
    """
    Return the query time `[B]`: by default the time of the last token, None without timestamps.

    Raises:
        ValueError: for other shapes, and for a query time without timestamps.
    """
    if timestamps is None and query_time is None:
        return None
    advice = "Make them with `tokenizer.encode_history(..., timestamps=...)`."
    check_integers("timestamps", timestamps, tuple(input_ids.shape), advice)
    if query_time is None:
        return timestamps[:, -1]
    advice = "Pass one time a row, in seconds, or leave it out for the time of the last event."
    check_integers("query_time", query_time, (len(input_ids),), advice)
    return query_time


def check_names(name: str, tensors: dict, known: tuple[str, ...]) -> dict:
    """
    Return the tensors of the nested input `name` that are not None.

    Raises:
        ValueError: for another type, and for a key that is not among the `known`.
    """
    if not isinstance(tensors, Mapping):
        raise ValueError(
            f"`{name}` must be a dict of tensors, got {describe(tensors)}. Pass keys among {list(known)}."
        )
    if strange := sorted(set(tensors) - set(known)):
        raise ValueError(f"`{name}` must have keys among {list(known)}, got {strange}. Correct or remove them.")
    return {key: value for key, value in tensors.items() if value is not None}


def check_long_history(
    config: UniGRFConfig, num_items: int, batch_size: int, long_history: dict | None, has_times: bool
) -> LongHistory | None:
    """
    Check the long histories of a batch. Return None for a model that reads none.

    Args:
        config (`UniGRFConfig`): Configuration of the model.
        num_items, batch_size (`int`): Number of items of the catalog and of rows of the batch.
        long_history (`dict`, *optional*): `items`, `behaviors` and `timestamps`, each of shape `(batch_size, H)`.
        has_times (`bool`): Whether the histories have timestamps.

    Raises:
        ValueError: for missing or superfluous long histories, other shapes, and unknown items or behaviors.
    """
    tensors = check_names(
        "long_history", {} if long_history is None else long_history, ("items", "behaviors", "timestamps")
    )
    if not config.num_retrieved_items:
        if tensors:
            raise ValueError(
                f"`long_history` must be None for a model with num_retrieved_items=0, got {sorted(tensors)}. Leave "
                "it out, or load the model with num_retrieved_items=10."
            )
        return None
    if "items" not in tensors:
        raise ValueError(
            f"`long_history['items']` must be integers of shape ({batch_size}, H), the whole history of each row, "
            "got none. Pass item indices, oldest first and padded with -1, or a tensor without columns for no history."
        )
    items = check_items("long_history['items']", tensors["items"], batch_size, num_items)

    # Behaviors: not needed if there is a single behavior.
    behaviors = tensors.get("behaviors")
    if behaviors is None and len(config.behaviors) == 1:
        behaviors = torch.zeros_like(items)
    advice = f"Pass an index into {config.behaviors} for each item."
    check_integers("long_history['behaviors']", behaviors, tuple(items.shape), advice)
    behaviors = behaviors.long()
    is_strange = ((behaviors < 0) | (behaviors >= len(config.behaviors))) & (items >= 0)
    if is_strange.any():
        raise ValueError(
            f"`long_history['behaviors']` must be indices into {config.behaviors}, got "
            f"{int(behaviors[is_strange][0])} in row {int(is_strange.nonzero()[0, 0])}. Count behaviors from 0."
        )

    # Times: unknown by default.
    timestamps = tensors.get("timestamps")
    if timestamps is None:
        timestamps = torch.full_like(items, -1)
    elif not has_times or not is_integer(timestamps) or timestamps.shape != items.shape:
        raise ValueError(
            f"`long_history['timestamps']` must be integers of shape {tuple(items.shape)} beside timestamps of the "
            f"history, got {describe(timestamps)}{'' if has_times else ' and no timestamps'}. Pass both, or neither."
        )
    # A place without an item may hold any number.
    return LongHistory(items, behaviors.clamp(0, len(config.behaviors) - 1), timestamps.long())


def check_item_sets(item_sets: dict | None, sequence_ids: torch.LongTensor, num_items: int) -> ItemSets:
    """
    Check the item sets of a batch whose rows hold the histories `sequence_ids [B, T]`.

    Raises:
        ValueError: for other shapes, items outside the catalog, and negatives for rows of several histories.
    """
    tensors = check_names("item_sets", {} if item_sets is None else item_sets, ITEM_SETS)
    batch_size = len(sequence_ids)
    sets = {name: check_items(f"item_sets['{name}']", items, batch_size, num_items) for name, items in tensors.items()}
    of_users = [name for name in ("hard_negatives", "excluded_positives") if name in sets]
    if of_users and sequence_ids.max() > 1:
        raise ValueError(
            f"`item_sets` with {of_users} must come with one history a row, got a row of {int(sequence_ids.max())} "
            "histories. Put each history into a row of its own."
        )
    empty = sequence_ids.new_empty(batch_size, 0)
    return ItemSets(**{"hard_negatives": empty, "excluded_positives": empty, **sets})
