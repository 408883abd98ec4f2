# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The layout: where an item's tokens stand in a sequence, and what the output at each of them predicts.

`<bos> s_1 .. s_L b  s_1 .. s_L b ...` (UniGRF's two positions an item, with RecoChain's semantic IDs):

| input token              | what the output there predicts                               |
|--------------------------|--------------------------------------------------------------|
| `<bos>` or a behavior b  | code s_1 of the next item                                    |
| code s_l, l < L          | code s_{l+1}                                                 |
| code s_L                 | the ranking of the item: it sees the item, not its behavior  |

A training row may hold several histories. Each begins with its `<bos>`, and none sees another.

To change the order of the tokens, change this file, the pipeline's long histories, the tokenizer that encodes them,
and `recipes/data/`, which cuts rows.
"""

from dataclasses import dataclass

import torch
from torch import nn

PAD = -2  # level of a token that belongs to no history
HISTORY_END = -1  # level of <bos> and of behaviors


@dataclass
class UnfinishedItems:
    """
    The unfinished item at the end of each row.

    Args:
        lengths (`torch.LongTensor` of shape `(batch_size,)`): How many codes of the next item the row has. L: the row
            ends in a whole item. -1: it ends in padding or in a token that is no part of a history.
        codes (`torch.LongTensor` of shape `(batch_size, L - 1)`): These codes, then -1.
        is_broken (`torch.BoolTensor` of shape `(batch_size,)`): Whether the codes do not follow a <bos> or behavior
            as levels 0, 1, ... in order.
    """

    lengths: torch.LongTensor
    codes: torch.LongTensor
    is_broken: torch.BoolTensor


class ItemLayout:
    """Reads and writes the token sequence of a `UniGRFConfig`. It holds the config's numbers and no state."""

    def __init__(self, config):
        self.codebook_sizes = list(config.codebook_sizes)
        self.code_offsets = config.code_offsets
        self.num_levels = len(self.codebook_sizes)
        self.bos_token_id = config.bos_token_id
        self.behavior_token_ids = config.behavior_token_ids
        self.history_end_ids = [config.bos_token_id, *self.behavior_token_ids]
        # Ranking target -> token id of its behavior; None for "next".
        ids = dict(zip(config.behaviors, self.behavior_token_ids, strict=True))
        self.ranking_targets = {name: ids.get(name) for name in config.ranking_targets}
        # The token ids of each level: the alternatives among which its codes are predicted.
        self.level_slices = [
            slice(offset, offset + size) for offset, size in zip(self.code_offsets, self.codebook_sizes, strict=True)
        ]

    def token_levels(self, token_ids: torch.LongTensor) -> torch.LongTensor:
        """Level of each token, of any shape: 0 .. L-1 for a code, -1 for <bos> and behaviors, -2 for all others."""
        levels = torch.full_like(token_ids, PAD)
        for token_id in self.history_end_ids:
            levels = levels.masked_fill(token_ids == token_id, HISTORY_END)
        for level, codes in enumerate(self.level_slices):
            levels = levels.masked_fill((token_ids >= codes.start) & (token_ids < codes.stop), level)
        return levels

    def item_tokens(self, codes: torch.LongTensor) -> torch.LongTensor:
        """Codes `[..., L]` -> token ids `[..., L]`."""
        return codes + codes.new_tensor(self.code_offsets)

    def codes_before(self, input_ids: torch.LongTensor, places: torch.LongTensor) -> torch.LongTensor:
        """
        Read the codes of the items whose last code stands at the given places.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`)
            places (`torch.LongTensor` of shape `(n, 2)`): Row and position of each last code.

        Returns:
            `torch.LongTensor` of shape `(n, L)`; -1 where the L tokens are not of levels 0 .. L-1 in order.
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
        Read all items of the histories `[B, T]`: the unfinished ones; in order, the places of the others' last codes
        `[n, 2]` and their codes `[n, L]` (-1: out of order).
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
        if len(places) and int(places[:, 1].min()) < self.num_levels:
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
        # Token i from the end must have the level that counts down to the bos or behavior before the item.
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
        """Positions of <bos> or behaviors `[n]` -> where the codes of the items behind them are predicted `[n, L]`."""
        return history_ends[:, None] + torch.arange(self.num_levels, device=history_ends.device)

    def ranking_states(self, states: torch.Tensor) -> torch.Tensor:
        """
        Select the states that rank candidates packed in one row: `[B, N * L, hidden_size]` -> `[B, N, hidden_size]`.
        """
        return states[:, self.num_levels - 1 :: self.num_levels]

    def packed_histories(
        self, tokens: torch.LongTensor, attention_mask: torch.LongTensor
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        Tell apart the histories packed in each row. A history begins at every <bos> and after padding.

        Args:
            tokens, attention_mask (`torch.LongTensor` of shape `(batch_size, T)`)

        Returns:
            `(sequence_ids [B, T], position_ids [B, T])`: which history of its row a token belongs to, counted from 1,
            and its position in that history.
        """
        is_real = attention_mask.bool()
        place = torch.arange(tokens.shape[1], device=tokens.device)
        is_start = (tokens == self.bos_token_id) | (is_real & ~nn.functional.pad(is_real, (1, 0))[:, :-1])
        return is_start.cumsum(dim=1), place - torch.where(is_start, place, 0).cummax(dim=1).values

    def target_timestamps(self, timestamps: torch.LongTensor, sequence_ids: torch.LongTensor) -> torch.LongTensor:
        """
        When the event is that each output predicts: the time of the next token of its history, or the last token's
        own. `timestamps [B, T]`, `sequence_ids [B, T]` -> `[B, T]`.
        """
        after = torch.cat([timestamps[:, 1:], timestamps[:, -1:]], dim=1)
        is_last = torch.ones_like(sequence_ids[:, :1], dtype=torch.bool)
        has_same_history = torch.cat([sequence_ids[:, 1:] == sequence_ids[:, :-1], is_last], dim=1)
        return torch.where(has_same_history, after, timestamps)

    def history_mask(self, sequence_ids: torch.LongTensor, attention_mask: torch.LongTensor) -> torch.BoolTensor:
        """
        Mask of packed histories `[B, T, T]`: a token sees the tokens before it in its own history, and itself. A
        padding token sees itself, too, since attention to nothing is NaN. `sequence_ids [B, T]`, `attention_mask [B,
        T]`.
        """
        place = torch.arange(sequence_ids.shape[1], device=sequence_ids.device)
        is_same = sequence_ids[:, :, None] == sequence_ids[:, None]
        is_before = is_same & (place[:, None] >= place) & attention_mask.bool()[:, None]
        return is_before | (place[:, None] == place)

    def history_up_to(
        self, ends: torch.LongTensor, sequence_ids: torch.LongTensor, attention_mask: torch.LongTensor
    ) -> torch.BoolTensor:
        """
        Mask `[B, T]` of the tokens that position `ends [B]` of each row of packed histories sees, itself included.
        """
        is_before = torch.arange(sequence_ids.shape[1], device=sequence_ids.device) <= ends[:, None]
        return is_before & (sequence_ids == sequence_ids.gather(1, ends[:, None])) & attention_mask.bool()

    def pack_candidates(
        self, codes: torch.LongTensor, history_lengths: torch.LongTensor, visible_history: torch.BoolTensor
    ) -> tuple[torch.LongTensor, torch.LongTensor, torch.BoolTensor]:
        """
        Pack candidates into one row behind a history. Each follows the history as if it were alone: it sees the
        history and itself, never another candidate.

        Args:
            codes (`torch.LongTensor` of shape `(batch_size, N, L)`)
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
