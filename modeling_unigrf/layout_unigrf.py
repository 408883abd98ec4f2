# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The layout: how an item becomes positions of the sequence, and what is read off each position.

`<bos> s_1 .. s_L b  s_1 .. s_L b ...` (UniGRF's two positions an item, with RecoChain's semantic ids):

| input token              | what its output is read for                                  |
|--------------------------|--------------------------------------------------------------|
| `<bos>` or a behavior b | code s_1 of the next item                                    |
| code s_l, l < L          | code s_{l+1}                                                 |
| code s_L                 | the ranking of the item: it sees the item, not its behavior |

In training a row may hold several histories, each beginning with its `<bos>`: they do not see each other.

Heads, search and losses ask this file for levels, positions and masks. That the codes of an item are neighbors and its
behavior stands right behind them is also known to `UniGRFForCausalLM.history_item_representations`, to `contrastive_loss`, to the
pipeline's long histories, to the tokenizer, which spells it, and to the recipes that cut rows: another order of the same tokens
changes these, too.
"""

import torch
from torch import nn

PAD, HISTORY_END = -2, -1  # levels of tokens that are no codes


class ItemLayout:
    """Reads and writes the token sequence of a `UniGRFConfig`. Stateless: it holds the config's numbers only."""

    def __init__(self, config):
        self.codebook_sizes = list(config.codebook_sizes)
        self.code_offsets = list(config.code_offsets)
        self.num_levels = len(self.codebook_sizes)
        self.bos_token_id = config.bos_token_id
        self.history_end_ids = [config.bos_token_id, *config.behavior_token_ids]
        self.behavior_token_ids = list(config.behavior_token_ids)

    def token_levels(self, token_ids: torch.LongTensor) -> torch.LongTensor:
        """Level of each token (any shape): 0 .. L-1 for a code, -1 for bos and behaviors, -2 for all others."""
        levels = torch.full_like(token_ids, PAD)
        for token_id in self.history_end_ids:
            levels = levels.masked_fill(token_ids == token_id, HISTORY_END)
        for level, (offset, size) in enumerate(zip(self.code_offsets, self.codebook_sizes, strict=True)):
            levels = levels.masked_fill((token_ids >= offset) & (token_ids < offset + size), level)
        return levels

    def level_slice(self, level: int) -> slice:
        """The token ids of one level: the alternatives among which its codes are predicted."""
        return slice(self.code_offsets[level], self.code_offsets[level] + self.codebook_sizes[level])

    def item_tokens(self, codes: torch.LongTensor) -> torch.LongTensor:
        """Codes `[..., L]` -> token ids `[..., L]`."""
        return codes + codes.new_tensor(self.code_offsets)

    def codes_before(self, input_ids: torch.LongTensor, last: torch.LongTensor) -> torch.LongTensor:
        """
        Codes of the items whose last code is at the given positions.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`)
            last (`torch.LongTensor` of shape `(n, 2)`): row and position of each last code.

        Returns:
            `torch.LongTensor` of shape `(n, L)`; -1 in a row whose L tokens do not spell levels 0 .. L-1 in order.
        """
        positions = last[:, 1:] + torch.arange(1 - self.num_levels, 1, device=input_ids.device)
        tokens = input_ids[last[:, :1], positions.clamp(min=0)]
        in_order = self.token_levels(tokens) == torch.arange(self.num_levels, device=input_ids.device)
        complete = (in_order & (positions >= 0)).all(dim=1, keepdim=True)
        return (tokens - tokens.new_tensor(self.code_offsets)).masked_fill(~complete, -1)

    def history_codes(self, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
        """All items of the histories `[B, T]`: `(rows [n], codes [n, L])`, in order (-1 where they are misspelt)."""
        last = (self.token_levels(input_ids) == self.num_levels - 1).nonzero()
        return last[:, 0], self.codes_before(input_ids, last)

    def prefix(self, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        The unfinished item at the end of each row.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`)

        Returns:
            `(length [B], codes [B, L - 1])`: how many codes of the next item are there already, and these codes, -1
            after them. Length L: the row ends in a whole item. Length -1: the row ends in padding or in a
            token that is no part of a history.

        Raises:
            ValueError: if the last codes of a row do not follow a bos or behavior as levels 0, 1, ...
        """
        length, codes, broken = self.unfinished(input_ids)
        if broken.any():
            row = int(broken.nonzero()[0])
            window = input_ids[row, -(self.num_levels + 1) :]
            raise ValueError(
                f"Row {row} ends in the tokens {window.tolist()}, which are no beginning of an item: expected a bos or behavior "
                f"token, then codes of levels 0, 1, ... in order; found levels {self.token_levels(window).tolist()}."
            )
        return length, codes

    def unfinished(self, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor, torch.BoolTensor]:
        """As `prefix`, and in place of its error which rows are so, `[B]`."""
        window = input_ids[:, -(self.num_levels + 1) :]
        levels = self.token_levels(window)
        length = levels[:, -1] + 1
        width = window.shape[1]
        # Token i from the end must have the level that counts down to the bos or behavior before the item.
        expected = length[:, None] - torch.arange(width, 0, -1, device=window.device)
        inside = expected >= HISTORY_END
        broken = (inside & (levels != expected)).any(dim=1) | (length > width - 1)
        broken &= (length >= 0) & (length < self.num_levels)
        codes = torch.full((window.shape[0], self.num_levels - 1), -1, dtype=torch.long, device=window.device)
        for level in range(min(self.num_levels - 1, width)):
            source = width - length + level
            here = (level < length) & (length < self.num_levels)
            tokens = window.gather(1, source.clamp(0, width - 1)[:, None])[:, 0]
            codes[:, level] = torch.where(here, tokens - self.code_offsets[level], codes[:, level])
        return length, codes, broken

    def history_ends(self, last: torch.LongTensor) -> torch.LongTensor:
        """Positions of items' last codes -> positions of the bos or behavior before them (negative: there is none)."""
        return last - self.num_levels

    def code_positions(self, history_ends: torch.LongTensor) -> torch.LongTensor:
        """Positions of bos or behaviors `[n]` -> where the codes of the items behind them are predicted, `[n, L]`."""
        return history_ends[:, None] + torch.arange(self.num_levels, device=history_ends.device)

    def ranking_states(self, states: torch.Tensor) -> torch.Tensor:
        """Of candidates packed in one row, `[B, N * L, hidden_size]`, the states that rank them, `[B, N, hidden_size]`."""
        return states[:, self.num_levels - 1 :: self.num_levels]

    def histories(
        self, tokens: torch.LongTensor, attention_mask: torch.LongTensor
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        The histories packed in each row, a new one at every bos and after padding.

        Args:
            tokens, attention_mask (`torch.LongTensor` of shape `(batch_size, T)`)

        Returns:
            `(number [B, T], position_ids [B, T])`: which history of its row a token belongs to, counted from 1, and its
            position in it.
        """
        seen = attention_mask.bool()
        place = torch.arange(tokens.shape[1], device=tokens.device)
        start = (tokens == self.bos_token_id) | (seen & ~nn.functional.pad(seen, (1, 0))[:, :-1])
        return start.cumsum(dim=1), place - torch.where(start, place, 0).cummax(dim=1).values

    def target_timestamps(self, timestamps: torch.LongTensor, number: torch.LongTensor) -> torch.LongTensor:
        """
        When the event is that each token's output is asked for: that of the token after it in its history; the last one's
        own. `timestamps [B, T]`, `number [B, T]` from `histories` -> `[B, T]`.
        """
        after = torch.cat([timestamps[:, 1:], timestamps[:, -1:]], dim=1)
        same = torch.cat([number[:, 1:] == number[:, :-1], torch.ones_like(number[:, :1], dtype=torch.bool)], dim=1)
        return torch.where(same, after, timestamps)

    def history_mask(self, number: torch.LongTensor, attention_mask: torch.LongTensor) -> torch.BoolTensor:
        """
        Which tokens each token of packed histories sees: those before it in its own history, and itself, also if it is
        padding (attention to nothing would be NaN). `number [B, T]` from `histories` -> `[B, T, T]`.
        """
        place = torch.arange(number.shape[1], device=number.device)
        same = number[:, :, None] == number[:, None]
        return (same & (place[:, None] >= place) & attention_mask.bool()[:, None]) | (place[:, None] == place)

    def history_up_to(
        self, ends: torch.LongTensor, number: torch.LongTensor, attention_mask: torch.LongTensor
    ) -> torch.BoolTensor:
        """
        The tokens of packed histories that are seen at one position of each row.

        Args:
            ends (`torch.LongTensor` of shape `(batch_size,)`): The positions.
            number, attention_mask (`torch.LongTensor` of shape `(batch_size, T)`): From `histories`, and of the tokens.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, T)`
        """
        before = torch.arange(number.shape[1], device=number.device) <= ends[:, None]
        return before & (number == number.gather(1, ends[:, None])) & attention_mask.bool()

    def candidate_positions(self, history_length: torch.LongTensor) -> torch.LongTensor:
        """
        Position ids of candidates packed in one row: each follows the history as if it were alone.

        Args:
            history_length (`torch.LongTensor` of shape `(batch_size, num_candidates)`):
                Tokens (without padding) that each candidate sees before itself.

        Returns:
            `torch.LongTensor` of shape `(batch_size, num_candidates * L)`.
        """
        steps = torch.arange(self.num_levels, device=history_length.device)
        return (history_length[:, :, None] + steps).flatten(1)

    def candidate_mask(self, visible: torch.BoolTensor) -> torch.BoolTensor:
        """
        Who sees whom, for candidates packed in one row behind a history: the history and themselves, never each other.

        Args:
            visible (`torch.BoolTensor` of shape `(batch_size, num_candidates, history_length)`):
                The part of the history that each candidate sees.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, num_candidates * L, history_length + num_candidates * L)`.
        """
        size = visible.shape[1] * self.num_levels
        history = visible.repeat_interleave(self.num_levels, dim=1)
        position = torch.arange(size, device=visible.device)
        same_item = position[:, None] // self.num_levels == position // self.num_levels
        own = (same_item & (position[:, None] >= position)).expand(visible.shape[0], -1, -1)
        return torch.cat([history, own], dim=2)
