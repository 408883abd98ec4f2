# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The layout: the order of an item's tokens in a sequence, and the prediction at each of them.

`<bos> s_1 .. s_L b  s_1 .. s_L b ...` (UniGRF's two positions an item, with RecoChain's semantic IDs):

| input token              | prediction of the output at this token                       |
|--------------------------|--------------------------------------------------------------|
| `<bos>` or a behavior b  | code s_1 of the next item                                    |
| code s_l, l < L          | code s_{l+1}                                                 |
| code s_L                 | the ranking of the item: it sees the item, not its behavior  |

A training row may hold several histories. Each history begins with its `<bos>` and sees no other history.

A new order of the tokens changes this file, the pipeline's long histories, the tokenizer that encodes histories, and
`recipes/data/`, which cuts rows.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .configuration_unigrf import NEXT_TARGET

# Level of a token that belongs to no history.
PAD = -2
# Level of <bos> and of behaviors.
HISTORY_END = -1


@dataclass
class UnfinishedItems:
    """
    The unfinished item at the end of each row.

    Args:
        lengths (`torch.LongTensor` of shape `(batch_size,)`): Codes of the next item that the row has. L: the row
            ends in a whole item. -1: the row ends in padding or in a token that belongs to no history.
        codes (`torch.LongTensor` of shape `(batch_size, L - 1)`): The codes of the next item, then -1.
        is_broken (`torch.BoolTensor` of shape `(batch_size,)`): True where the codes do not follow a <bos> or
            behavior as levels 0, 1, ... in order.
    """

    lengths: torch.LongTensor
    codes: torch.LongTensor
    is_broken: torch.BoolTensor


class ItemLayout:
    """The order of a `UniGRFConfig`'s tokens: the class reads and writes token sequences, and holds no state."""

    def __init__(self, config):
        self.codebook_sizes = list(config.codebook_sizes)
        self.code_offsets = config.code_offsets
        self.num_levels = len(self.codebook_sizes)
        self.bos_token_id = config.bos_token_id
        self.behavior_token_ids = config.behavior_token_ids
        self.history_end_ids = [config.bos_token_id, *self.behavior_token_ids]
        # Ranking target -> token id of its behavior; None for "next".
        ids = {NEXT_TARGET: None, **dict(zip(config.behaviors, self.behavior_token_ids, strict=True))}
        self.ranking_targets = {name: ids[name] for name in config.ranking_targets}
        # The token ids of each level: the alternatives of its softmax.
        self.level_slices = [
            slice(offset, offset + size) for offset, size in zip(self.code_offsets, self.codebook_sizes, strict=True)
        ]

    def token_levels(self, token_ids: torch.LongTensor) -> torch.LongTensor:
        """Return the level of each token: 0 .. L-1 for a code, -1 for <bos> and behaviors, -2 for others."""
        levels = torch.full_like(token_ids, PAD)
        for token_id in self.history_end_ids:
            levels = levels.masked_fill(token_ids == token_id, HISTORY_END)
        for level, codes in enumerate(self.level_slices):
            levels = levels.masked_fill((token_ids >= codes.start) & (token_ids < codes.stop), level)
        return levels

    def item_tokens(self, codes: torch.LongTensor) -> torch.LongTensor:
        """Convert codes `[..., L]` to token ids `[..., L]`."""
        return codes + codes.new_tensor(self.code_offsets)

    def codes_before(self, input_ids: torch.LongTensor, places: torch.LongTensor) -> torch.LongTensor:
        """
        Read the codes of the items whose last code stands at the places.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Token ids.
            places (`torch.LongTensor` of shape `(n, 2)`): Row and position of each last code.

        Returns:
            `torch.LongTensor` of shape `(n, L)`: codes; -1 if the L tokens do not have levels 0 .. L-1 in order.
        """
        positions = places[:, 1:] + torch.arange(1 - self.num_levels, 1, device=input_ids.device)
        tokens = input_ids[places[:, :1], positions.clamp(min=0)]
        in_order = self.token_levels(tokens) == torch.arange(self.num_levels, device=input_ids.device)
        complete = (in_order & (positions >= 0)).all(dim=1, keepdim=True)
        return (tokens - tokens.new_tensor(self.code_offsets)).masked_fill(~complete, -1)

    def read_histories(
        self, input_ids: torch.LongTensor
    ) -> tuple[UnfinishedItems, torch.LongTensor, torch.LongTensor]:
        """
        Read all items of the histories `[B, T]`.

        Returns:
            The unfinished items; the places `[n, 2]` of the last codes and the codes `[n, L]` of all whole items, in
            order. Codes of -1 stand for tokens out of order.
        """
        places = (self.token_levels(input_ids) == self.num_levels - 1).nonzero()
        return self.unfinished_items(input_ids), places, self.codes_before(input_ids, places)

    def behavior_items(self, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        Read the items before all behaviors of `input_ids [B, T]`.

        Returns:
            Places of the behaviors `[n, 2]` (row and position) and the codes of the items before them `[n, L]`.

        Raises:
            ValueError: if a row begins behind an item's codes.
        """
        places = torch.isin(input_ids, input_ids.new_tensor(self.behavior_token_ids)).nonzero()
        is_traced = torch.compiler.is_compiling()
        if not is_traced and len(places) and int(places[:, 1].min()) < self.num_levels:
            row, position = places[places[:, 1].argmin()].tolist()
            raise ValueError(
                f"`input_ids` must begin with a <bos> or a whole item, also behind a cache, got row {row} with a "
                f"behavior at position {position}, without the {self.num_levels} codes of its item. Cut histories "
                "between items."
            )
        return places, self.codes_before(input_ids, places - places.new_tensor([0, 1]))

    def unfinished_items(self, input_ids: torch.LongTensor) -> UnfinishedItems:
        """Read the unfinished item at the end of each row of `input_ids [B, T]`."""
        window = input_ids[:, -(self.num_levels + 1) :]
        levels = self.token_levels(window)
        lengths = levels[:, -1] + 1
        width = window.shape[1]
        # Levels must count down, from the end to the bos or behavior.
        expected = lengths[:, None] - torch.arange(width, 0, -1, device=window.device)
        inside = expected >= HISTORY_END
        is_broken = (inside & (levels != expected)).any(dim=1) | (lengths > width - 1)
        is_broken &= (lengths >= 0) & (lengths < self.num_levels)
        codes = torch.full((window.shape[0], self.num_levels - 1), -1, dtype=torch.long, device=window.device)
        for level in range(min(self.num_levels - 1, width)):
            source = width - lengths + level
            here = (level < lengths) & (lengths < self.num_levels)
            tokens = window.gather(1, source.clamp(0, width - 1)[:, None])[:, 0]
            codes[:, level] = torch.where(here, tokens - self.code_offsets[level], codes[:, level])
        return UnfinishedItems(lengths, codes, is_broken)

    def code_positions(self, history_ends: torch.LongTensor) -> torch.LongTensor:
        """Return the positions `[n, L]` that predict the items behind <bos> or behaviors at positions `[n]`."""
        return history_ends[:, None] + torch.arange(self.num_levels, device=history_ends.device)

    def ranking_states(self, states: torch.Tensor) -> torch.Tensor:
        """Select from states `[B, N * L, hidden_size]` of packed candidates those that rank, `[B, N, hidden_size]`."""
        return states[:, self.num_levels - 1 :: self.num_levels]

    def packed_histories(
        self, tokens: torch.LongTensor, attention_mask: torch.LongTensor
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        Assign each token to a history packed in its row, and to a position in that history.

        A history begins at every <bos> and after padding.

        Args:
            tokens (`torch.LongTensor` of shape `(batch_size, T)`): Token ids.
            attention_mask (`torch.LongTensor` of shape `(batch_size, T)`): 1 at the tokens that exist.

        Returns:
            `(sequence_ids [B, T], position_ids [B, T])`: the number of each token's history in its row, from 1, and
            the token's position in that history.
        """
        is_real = attention_mask.bool()
        place = torch.arange(tokens.shape[1], device=tokens.device)
        is_start = (tokens == self.bos_token_id) | (is_real & ~nn.functional.pad(is_real, (1, 0))[:, :-1])
        return is_start.cumsum(dim=1), place - torch.where(is_start, place, 0).cummax(dim=1).values

    def target_timestamps(self, timestamps: torch.LongTensor, sequence_ids: torch.LongTensor) -> torch.LongTensor:
        """
        Return the time of the event that each output predicts, `[B, T]`.

        The time is that of the next token of the history, or of the token itself at the history's end. `timestamps`
        and `sequence_ids` have the shape `[B, T]`.
        """
        after = torch.cat([timestamps[:, 1:], timestamps[:, -1:]], dim=1)
        is_last = torch.ones_like(sequence_ids[:, :1], dtype=torch.bool)
        has_same_history = torch.cat([sequence_ids[:, 1:] == sequence_ids[:, :-1], is_last], dim=1)
        return torch.where(has_same_history, after, timestamps)

    def history_mask(self, sequence_ids: torch.LongTensor, attention_mask: torch.LongTensor) -> torch.BoolTensor:
        """
        Make the mask of packed histories, `[B, T, T]`.

        A token sees itself and the tokens before it in the same history. A padding token also sees itself, since
        attention to no token is NaN. `sequence_ids` and `attention_mask` have the shape `[B, T]`.
        """
        place = torch.arange(sequence_ids.shape[1], device=sequence_ids.device)
        is_same = sequence_ids[:, :, None] == sequence_ids[:, None]
        is_before = is_same & (place[:, None] >= place) & attention_mask.bool()[:, None]
        return is_before | (place[:, None] == place)

    def history_up_to(
        self, ends: torch.LongTensor, sequence_ids: torch.LongTensor, attention_mask: torch.LongTensor
    ) -> torch.BoolTensor:
        """Make the mask `[B, T]` of the tokens that positions `ends [B]` of packed histories see."""
        is_before = torch.arange(sequence_ids.shape[1], device=sequence_ids.device) <= ends[:, None]
        return is_before & (sequence_ids == sequence_ids.gather(1, ends[:, None])) & attention_mask.bool()

    def pack_candidates(
        self, codes: torch.LongTensor, history_lengths: torch.LongTensor, visible_history: torch.BoolTensor
    ) -> tuple[torch.LongTensor, torch.LongTensor, torch.BoolTensor]:
        """
        Pack candidates into one row behind a history.

        Each candidate follows the history as if it were alone: it sees the history and itself, never another
        candidate.

        Args:
            codes (`torch.LongTensor` of shape `(batch_size, N, L)`): Codes of the candidates.
            history_lengths (`torch.LongTensor` of shape `(batch_size, N)`): Tokens that each candidate sees before
                itself.
            visible_history (`torch.BoolTensor` of shape `(batch_size, N, T)`): The tokens that each candidate sees.

        Returns:
            Token ids and position ids `[batch_size, N * L]`, and their mask `[batch_size, N * L, T + N * L]`.
        """
        batch_size, count = codes.shape[:2]
        steps = torch.arange(self.num_levels, device=codes.device)
        position_ids = (history_lengths[:, :, None] + steps).flatten(1)
        history = visible_history.repeat_interleave(self.num_levels, dim=1)
        place = torch.arange(count * self.num_levels, device=codes.device)
        is_same_item = place[:, None] // self.num_levels == place // self.num_levels
        itself = (is_same_item & (place[:, None] >= place)).expand(batch_size, -1, -1)
        return self.item_tokens(codes).flatten(1), position_ids, torch.cat([history, itself], dim=2)
