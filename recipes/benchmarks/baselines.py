"""Provide baselines for the benchmark of search and trie, and a random catalog."""

import math
from collections.abc import Callable

import torch


def random_catalog(num_items: int) -> torch.IntTensor:
    """
    Draw semantic IDs that look like those of a residual k-means.

    Codes have unequal popularity and depend on the codes before them. About 14 % of 100 thousand items, and 40 % of a
    million, share their first three codes with another item. The fourth code is a collision token.

    Args:
        num_items: Number of items to draw.

    Returns:
        Codes `[n, 4]` below 256. n is a little below `num_items` where more than 256 items share three codes.
    """
    num_codes = 256
    generator = torch.Generator().manual_seed(0)
    popularity = torch.softmax(1.05 * torch.randn(num_codes, generator=generator), dim=0).cumsum(0)
    columns: list[torch.Tensor] = []
    shift = torch.zeros(num_items, dtype=torch.long)
    for level in range(3):
        drawn = torch.searchsorted(popularity, torch.rand(num_items, generator=generator)).clamp(max=num_codes - 1)
        columns.append((drawn + shift) % num_codes)
        shift = (shift * 1_000_003 + columns[-1] * 7_919 + level + 1) % 1_000_000_007
    keys = (columns[0] * num_codes + columns[1]) * num_codes + columns[2]
    ordered, order = keys.sort(stable=True)
    collision_codes = torch.empty_like(keys)
    collision_codes[order] = torch.arange(num_items) - torch.searchsorted(ordered, ordered)
    codes = torch.stack([*columns, collision_codes], dim=1)
    return codes[collision_codes < num_codes].int()


class DictTrie:
    """
    Trie of nested dicts, as users of transformers commonly pass it to `prefix_allowed_tokens_fn`.

    Args:
        item_tokens (`torch.Tensor` of shape `(num_items, L)`): Tokens, or codes, of every item.
    """

    def __init__(self, item_tokens: torch.Tensor):
        self.root: dict = {}
        for tokens in item_tokens.tolist():
            node = self.root
            for token in tokens:
                node = node.setdefault(token, {})

    def allowed_after(self, prompt_length: int) -> Callable[[int, torch.LongTensor], list[int]]:
        """Make the function that `generate` takes, for prompts of this length."""

        def prefix_allowed_tokens_fn(batch_id: int, input_ids: torch.LongTensor) -> list[int]:
            node = self.root
            for token in input_ids[prompt_length:].tolist():
                node = node[token]
            return list(node)

        return prefix_allowed_tokens_fn

    def step(
        self, prefixes: list[list[list[int]]], scores: torch.Tensor, log_probs: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Take a step of a beam search with B requests and K beams each.

        Args:
            prefixes: Codes of the beams, `[B, K, level]`.
            scores: Scores of the beams, `[B, K]`.
            log_probs: Log-probabilities of the next codes, `[B, K, num_codes]`.
            count: Most beams of a request after the step.

        Returns:
            The best scores and their places among the children of all beams, each `[B, K']`.
        """
        mask = torch.full_like(log_probs, -torch.inf)
        for request, beams in enumerate(prefixes):
            for beam, prefix in enumerate(beams):
                node = self.root
                for code in prefix:
                    node = node[code]
                mask[request, beam, list(node)] = 0
        flat = (scores[..., None] + log_probs + mask).flatten(1)
        return flat.topk(min(count, flat.shape[1]), dim=1)


class StaticTrie:
    """
    STATIC (Su et al. 2026, arXiv 2602.22647) in PyTorch, from the paper's description.

    The first two levels are a dense mask and a dense table of states. Each level below is a matrix of transitions in
    compressed sparse rows. A beam gathers as many entries as the level's largest state has, and masks those of others.

    Args:
        item_codes (`torch.IntTensor` of shape `(num_items, L)`): Codes of every item.
        num_codes (`int`): Codes of every level.
    """

    def __init__(self, item_codes: torch.Tensor, num_codes: int):
        self.num_codes = num_codes
        self.levels: list[dict] = []
        keys = torch.zeros(len(item_codes), dtype=torch.long)
        num_parents = 1
        for level in range(item_codes.shape[1]):
            keys = keys * num_codes + item_codes[:, level]
            states, keys = keys.unique(return_inverse=True)
            parent = states // num_codes
            code = states % num_codes
            if level < 2:
                table = torch.full((num_parents, num_codes), -1, dtype=torch.int32)
                table[parent, code] = torch.arange(len(states), dtype=torch.int32)
                self.levels.append({"mask": table >= 0, "states": table.clamp(min=0)})
            else:
                counts = parent.bincount(minlength=num_parents)
                self.levels.append(
                    {
                        "indptr": torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
                        "transitions": torch.stack([code, torch.arange(len(states))], dim=1).int(),
                        "branches": int(counts.max()),
                    }
                )
            num_parents = len(states)

    @property
    def nbytes(self) -> int:
        """Memory of all levels in bytes."""
        return sum(
            value.nbytes for level in self.levels for value in level.values() if isinstance(value, torch.Tensor)
        )

    def step(
        self, level: int, states: torch.Tensor, scores: torch.Tensor, log_probs: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Take a step of a beam search with B requests and K beams each.

        Args:
            level: Level of the next codes, from 0.
            states: States of the beams, `[B, K]`.
            scores: Scores of the beams, `[B, K]`.
            log_probs: Log-probabilities of the next codes, `[B, K, num_codes]`.
            count: Most beams of a request after the step.

        Returns:
            The best scores, their beams before the step, and their states after it, each `[B, K']`.
        """
        table = self.levels[level]
        if "mask" in table:
            width = self.num_codes
            candidates = torch.where(table["mask"][states], log_probs, -math.inf)
            next_states = table["states"][states]
        else:
            width = table["branches"]
            start = table["indptr"][states]
            num_children = table["indptr"][states + 1] - start
            offsets = torch.arange(width, dtype=torch.int32)
            places = (start[..., None] + offsets).clamp(max=len(table["transitions"]) - 1)
            entries = table["transitions"][places]
            candidates = log_probs.gather(2, entries[..., 0].long())
            candidates = torch.where(offsets < num_children[..., None], candidates, -math.inf)
            next_states = entries[..., 1]
        flat = (scores[..., None] + candidates).flatten(1)
        best_scores, best = flat.topk(min(count, flat.shape[1]), dim=1)
        return best_scores, best // width, next_states.flatten(1).gather(1, best).long()
