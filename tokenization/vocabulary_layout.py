"""Which token has which id: the special tokens, the behaviors, then the codes level by level."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
PAD, BOS = 0, 1
UNKNOWN_TIME = -1


@dataclass(frozen=True)
class VocabularyLayout:
    """Token ids by arithmetic.

    behaviors: what `check_behaviors` returns.
    codebook_sizes: L numbers, L <= 26 (levels are named by letters). The last level ends the vocabulary, where it
        can grow.

    Raises `ValueError` for more levels than letters.
    """

    behaviors: tuple[str, ...]
    codebook_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.codebook_sizes) > len(string.ascii_lowercase):
            raise ValueError(f"expected at most 26 levels, found {len(self.codebook_sizes)}: use fewer levels")

    @cached_property
    def behavior_token_ids(self) -> tuple[int, ...]:
        return tuple(range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + len(self.behaviors)))

    @cached_property
    def code_offsets(self) -> tuple[int, ...]:
        """Token id of the first code of each level."""
        first = len(SPECIAL_TOKENS) + len(self.behaviors)
        return tuple(first + sum(self.codebook_sizes[:level]) for level in range(len(self.codebook_sizes)))

    @cached_property
    def _offsets(self) -> np.ndarray:
        return np.array(self.code_offsets, dtype=np.int32)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(SPECIAL_TOKENS) + len(self.behaviors) + sum(self.codebook_sizes)

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, in the order of the ids."""
        tokens = [*SPECIAL_TOKENS.values(), *(f"<{name}>" for name in self.behaviors)]
        for letter, size in zip(string.ascii_lowercase, self.codebook_sizes, strict=False):
            tokens += [f"<{letter}_{code}>" for code in range(size)]
        return {token: i for i, token in enumerate(tokens)}

    def encode(self, codes: np.ndarray, behavior_index: np.ndarray) -> np.ndarray:
        """One history, unchecked: int32 codes [n, L], behavior indices [n] -> int64 [1 + n * (L + 1)]."""
        num_levels = len(self.codebook_sizes)
        tokens = np.empty(1 + len(codes) * (num_levels + 1), dtype=np.int64)
        tokens[0] = BOS
        blocks = tokens[1:].reshape(len(codes), num_levels + 1)
        np.add(codes, self._offsets, out=blocks[:, :num_levels])
        np.add(behavior_index, np.int64(self.behavior_token_ids[0]), out=blocks[:, num_levels])
        return tokens

    def encode_times(self, times: np.ndarray) -> np.ndarray:
        """The time of each item for each of its tokens, the first item's for <bos>: int64 [n] -> [1 + n * (L + 1)]."""
        first = times[:1] if len(times) else [UNKNOWN_TIME]
        return np.concatenate([first, np.repeat(times, len(self.codebook_sizes) + 1)])


def check_behaviors(behaviors: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple. `ValueError` unless they are distinct, at least one, and can be tokens of their own."""
    if isinstance(behaviors, str) or not behaviors or not all(isinstance(name, str) for name in behaviors):
        raise ValueError(f"expected a list of at least one behavior name, found {behaviors!r}")
    reserved = {token.strip("<>") for token in SPECIAL_TOKENS.values()}
    for name in behaviors:
        level, _, code = name.partition("_")
        is_code = len(level) == 1 and level in string.ascii_lowercase and code.isdecimal()
        if not name or name in reserved or is_code or any(c.isspace() or c in "<>" for c in name):
            raise ValueError(
                f"expected behavior names without spaces, '<' or '>' that are no special token or code, found "
                f"{name!r}: rename it, e.g. add_to_cart"
            )
    if len(set(behaviors)) < len(behaviors):
        raise ValueError(f"expected distinct behaviors, found {list(behaviors)}")
    return tuple(behaviors)
