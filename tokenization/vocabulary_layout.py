"""The vocabulary layout: special tokens, then behaviors, then the codes level by level."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
PAD = 0
BOS = 1
UNKNOWN_TIME = -1


@dataclass(frozen=True)
class VocabularyLayout:
    """Compute token IDs by arithmetic.

    Attributes:
        behaviors: Behavior names, as `check_behaviors` returns them.
        codebook_sizes: L sizes, at most 26 because a letter names each level. The last level ends the vocabulary, so
            it can grow.

    Raises:
        ValueError: More levels than letters.
    """

    behaviors: tuple[str, ...]
    codebook_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.codebook_sizes) > len(string.ascii_lowercase):
            raise ValueError(
                f"`codebook_sizes` must have at most 26 levels, got {len(self.codebook_sizes)}. Use fewer levels."
            )

    @cached_property
    def behavior_token_ids(self) -> tuple[int, ...]:
        """Token ID of each behavior."""
        return tuple(range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + len(self.behaviors)))

    @cached_property
    def code_offsets(self) -> tuple[int, ...]:
        """Token ID of the first code of each level."""
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
        """Return a dict from token to token ID, in the order of the token IDs."""
        tokens = [*SPECIAL_TOKENS.values(), *(f"<{name}>" for name in self.behaviors)]
        for letter, size in zip(string.ascii_lowercase, self.codebook_sizes, strict=False):
            tokens += [f"<{letter}_{code}>" for code in range(size)]
        return {token: i for i, token in enumerate(tokens)}

    def encode(self, codes: np.ndarray, behavior_index: np.ndarray) -> np.ndarray:
        """Encode one history without checking the inputs.

        Args:
            codes: int32 [n, L], the oldest item first.
            behavior_index: Integers [n], indices into `behaviors`.

        Returns:
            int64 [1 + n * (L + 1)]: `<bos>`, then the codes and the behavior of each item.
        """
        num_levels = len(self.codebook_sizes)
        tokens = np.empty(1 + len(codes) * (num_levels + 1), dtype=np.int64)
        tokens[0] = BOS
        blocks = tokens[1:].reshape(len(codes), num_levels + 1)
        np.add(codes, self._offsets, out=blocks[:, :num_levels])
        np.add(behavior_index, np.int64(self.behavior_token_ids[0]), out=blocks[:, num_levels])
        return tokens

    def encode_times(self, times: np.ndarray) -> np.ndarray:
        """Repeat the time of each item for its tokens; `<bos>` takes the time of the first item.

        Args:
            times: int64 [n], in seconds, -1 for an unknown time.

        Returns:
            int64 [1 + n * (L + 1)].
        """
        first = times[:1] if len(times) else [UNKNOWN_TIME]
        return np.concatenate([first, np.repeat(times, len(self.codebook_sizes) + 1)])


def check_behaviors(behaviors: Sequence[str]) -> tuple[str, ...]:
    """Return the behavior names as a tuple.

    Raises:
        ValueError: No name, repeated names, or names that cannot be tokens of their own.
    """
    if isinstance(behaviors, str) or not behaviors or not all(isinstance(name, str) for name in behaviors):
        raise ValueError(
            f'`behaviors` must be a list of at least one name, got {behaviors!r}. Pass names such as ["view", "like"].'
        )
    reserved = {token.strip("<>") for token in SPECIAL_TOKENS.values()}
    for name in behaviors:
        level, _, code = name.partition("_")
        is_code = len(level) == 1 and level in string.ascii_lowercase and code.isdecimal()
        if not name or name in reserved or is_code or any(c.isspace() or c in "<>" for c in name):
            raise ValueError(
                "`behaviors` must be names without spaces, '<' or '>' that are no special token and no code, got "
                f"{name!r}. Rename the behavior, for instance to add_to_cart."
            )
    if len(set(behaviors)) < len(behaviors):
        raise ValueError(f"`behaviors` must be distinct, got {list(behaviors)}. Remove the repeated names.")
    return tuple(behaviors)
