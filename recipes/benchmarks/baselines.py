"""What our search and trie are measured against: contenders of `recipes.benchmarks.decoding`, and a made-up catalog."""

import math

import torch


def random_catalog(num_items: int) -> torch.IntTensor:
    """
    Spellings as a residual k-means makes them, `[n, 4]`: codes of unequal popularity that depend on the codes before them,
    so that about 14 % of 100 thousand items and 40 % of a million share their first three codes with another; the last code
    tells these apart. n is a little below `num_items` where more than 256 items share them.
    """
    num_codes, generator = 256, torch.Generator().manual_seed(0)
    popularity = torch.softmax(1.05 * torch.randn(num_codes, generator=generator), dim=0).cumsum(0)
    columns, shift = [], torch.zeros(num_items, dtype=torch.long)
    for level in range(3):
        drawn = torch.searchsorted(popularity, torch.rand(num_items, generator=generator)).clamp(max=num_codes - 1)
        columns.append((drawn + shift) % num_codes)
        shift = (shift * 1_000_003 + columns[-1] * 7_919 + level + 1) % 1_000_000_007
    keys = (columns[0] * num_codes + columns[1]) * num_codes + columns[2]
    ordered, order = keys.sort(stable=True)
    last = torch.empty_like(keys)
    last[order] = torch.arange(num_items) - torch.searchsorted(ordered, ordered)
    codes = torch.stack([*columns, last], dim=1)
    return codes[last < num_codes].int()


class DictTrie:
    """Nested dicts of token ids, as `prefix_allowed_tokens_fn` is commonly given: what users of transformers write today."""

    def __init__(self, item_tokens: torch.Tensor):
        self.root: dict = {}
        for tokens in item_tokens.tolist():
            node = self.root
            for token in tokens:
                node = node.setdefault(token, {})

    def allowed_after(self, prompt_length: int):
        """The function that `generate` takes, for prompts of this length."""

        def prefix_allowed_tokens_fn(batch_id: int, input_ids: torch.LongTensor) -> list[int]:
            node = self.root
            for token in input_ids[prompt_length:].tolist():
                node = node[token]
            return list(node)

        return prefix_allowed_tokens_fn

    def step(self, prefixes: list[list[list[int]]], scores: torch.Tensor, log_probs: torch.Tensor, count: int):
        """One beam step of beams with these codes `[B, K, level]`, as `StaticTrie.step`; the best scores and places."""
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
    STATIC (Su et al. 2026, arXiv 2602.22647) in PyTorch, written down from the paper's description: a dense mask and a dense
    table of states for the first two levels, below them one matrix of transitions in compressed sparse rows, of which each
    beam gathers as many entries as any state of the level has, with the superfluous ones masked.

    Args:
        item_codes (`torch.IntTensor` of shape `(num_items, L)`), num_codes (`int`): Codes of every level.
    """

    def __init__(self, item_codes: torch.Tensor, num_codes: int):
        self.num_codes = num_codes
        keys = torch.zeros(len(item_codes), dtype=torch.long)
        parents, self.levels = torch.zeros(1, dtype=torch.long), []
        for level in range(item_codes.shape[1]):
            keys = keys * num_codes + item_codes[:, level]
            states, keys = keys.unique(return_inverse=True)
            parent, code = states // num_codes, states % num_codes
            if level < 2:
                table = torch.full((len(parents), num_codes), -1, dtype=torch.int32)
                table[parent, code] = torch.arange(len(states), dtype=torch.int32)
                self.levels.append({"mask": table >= 0, "states": table.clamp(min=0)})
            else:
                counts = parent.bincount(minlength=len(parents))
                self.levels.append(
                    {
                        "indptr": torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
                        "transitions": torch.stack([code, torch.arange(len(states))], dim=1).int(),
                        "branches": int(counts.max()),
                    }
                )
            parents = states

    @property
    def nbytes(self) -> int:
        """Memory of all levels."""
        return sum(
            value.nbytes for level in self.levels for value in level.values() if isinstance(value, torch.Tensor)
        )

    def step(self, level: int, states: torch.Tensor, scores: torch.Tensor, log_probs: torch.Tensor, count: int):
        """One beam step of states `[B, K]`, their scores and log-probabilities `[B, K, num_codes]`: scores, parents, states."""
        table = self.levels[level]
        if "mask" in table:
            width = self.num_codes
            candidates = torch.where(table["mask"][states], log_probs, -math.inf)
            following = table["states"][states]
        else:
            width = table["branches"]
            start = table["indptr"][states]
            found = table["indptr"][states + 1] - start
            offsets = torch.arange(width, dtype=torch.int32)
            place = (start[..., None] + offsets).clamp(max=len(table["transitions"]) - 1)
            entries = table["transitions"][place]
            candidates = log_probs.gather(2, entries[..., 0].long())
            candidates = torch.where(offsets < found[..., None], candidates, -math.inf)
            following = entries[..., 1]
        flat = (scores[..., None] + candidates).flatten(1)
        best_scores, best = flat.topk(min(count, flat.shape[1]), dim=1)
        return best_scores, best // width, following.flatten(1).gather(1, best).long()
