"""From quantizer codes to unique semantic IDs, and statistics of how well the codebooks are used."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch

from .residual_kmeans import ResidualKMeans

# Largest number of items on which `unique_codes` measures the reconstruction error.
STATISTICS_SAMPLE_SIZE = 65_536


def group_keys(codes: np.ndarray) -> np.ndarray:
    """Give each distinct row a key: non-negative integers [N, L] -> int64 [N], equal for equal rows."""
    keys = np.zeros(len(codes), dtype=np.int64)
    # Every key is below this bound.
    bound = 1
    for column in codes.T:
        size = int(column.max(initial=0)) + 1
        if bound * size >= 2**63:
            # Renumber the keys to make room.
            distinct, keys = np.unique(keys, return_inverse=True)
            bound = len(distinct)
        # numpy turns int64 plus uint64 into floats.
        keys = keys * size + column.astype(np.int64)
        bound *= size
    return keys


def assign_collision_tokens(codes: np.ndarray, order: np.ndarray | Sequence[float] | None = None) -> np.ndarray:
    """Assign a running number to the items that share all codes, so that codes plus this number are unique.

    The level of the collision token needs the largest result + 1 codes, which is the size of the largest group.

    Args:
        codes: Non-negative integers [N, L].
        order: Numbers [N], for instance popularity. The item with the largest number of a group comes first; ties
            stay in row order. None: row order.

    Returns:
        int32 [N], 0 for the first item of each group.

    Raises:
        ValueError: Wrong shapes or types, a negative code, or NaN in `order`.
    """
    codes = _check_codes(codes)
    keys = group_keys(codes)
    if order is None:
        rows = np.argsort(keys, kind="stable")
    else:
        order = np.asarray(order)
        if order.shape != (len(codes),) or order.dtype.kind not in "iuf" or np.isnan(order).any():
            raise ValueError(
                f"`order` must be {len(codes)} numbers without NaN, one per item, got {order.dtype} {order.shape}. "
                "Pass one number for each row of `codes`."
            )
        # lexsort is stable, so ties stay in row order.
        rows = np.lexsort((-order.astype(np.float64), keys))
    sorted_keys = keys[rows]
    starts = np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]]) if len(rows) else np.empty(0, np.int64)
    sizes = np.diff(np.r_[starts, len(rows)])
    collision_tokens = np.empty(len(rows), dtype=np.int32)
    collision_tokens[rows] = np.arange(len(rows)) - np.repeat(starts, sizes)
    return collision_tokens


@dataclass(frozen=True)
class CodebookStatistics:
    """Store how well codes distinguish items.

    Attributes:
        num_items: Number of items.
        collision_rate: Share of the items that share all their codes with another item.
        largest_group: Number of items in the largest group with equal codes. 1: no collision.
        utilization: Share of the codes that items use, one number per level.
        entropy: Entropy of the codes in bits, at most log2 of the codebook size, one number per level.
        perplexity: 2^entropy divided by the number of codes that N items could use, min(K, N), one number per level.
            1: uniform use.
        reconstruction_error: Mean squared error of the quantizer, relative to the variance of the embeddings. None:
            not measured.
    """

    num_items: int
    collision_rate: float
    largest_group: int
    utilization: tuple[float, ...]
    entropy: tuple[float, ...]
    perplexity: tuple[float, ...]
    reconstruction_error: float | None

    def to_dict(self) -> dict:
        """Return the fields as JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        error = "not measured" if self.reconstruction_error is None else f"{self.reconstruction_error:.4f}"
        lines = [
            f"{self.num_items} items, {self.collision_rate:.1%} of them share their codes with another item "
            f"(largest group {self.largest_group}), relative reconstruction error {error}",
            "level  codes used  entropy (bits)  perplexity / possible",
        ]
        rows = zip(self.utilization, self.entropy, self.perplexity, strict=True)
        lines += [f"{level:>5}  {u:>10.1%}  {e:>14.2f}  {p:>21.1%}" for level, (u, e, p) in enumerate(rows)]
        return "\n".join(lines)


def codebook_statistics(
    codes: np.ndarray,
    codebook_sizes: Sequence[int],
    embeddings: np.ndarray | None = None,
    reconstruction: np.ndarray | None = None,
) -> CodebookStatistics:
    """Measure the quantizer's codes, without the collision token, and warn if a level has collapsed.

    N items can use min(K, N) of K codes. A level has collapsed if the items use fewer than 25 % of these codes, or if
    its perplexity is below 10 %. Fewer than 5 items cause no warning.

    Args:
        codes: Integers [N, L], N >= 1.
        codebook_sizes: L sizes.
        embeddings: Float [M, D], all embeddings or a sample. None: the reconstruction error is not measured.
        reconstruction: Float [M, D], the quantizer's approximation of `embeddings`. None if `embeddings` is None.

    Raises:
        ValueError: Mismatched shapes, or a code outside its codebook.
    """
    codes = _check_codes(codes)
    if len(codes) == 0 or codes.shape[1] != len(codebook_sizes) or (codes.max(axis=0) >= codebook_sizes).any():
        raise ValueError(
            f"`codes` must have at least one row and be below the codebook sizes {tuple(codebook_sizes)}, got shape "
            f"{codes.shape} and largest codes {codes.max(axis=0, initial=-1).tolist()}. Pass the sizes that the "
            "quantizer was fitted with."
        )
    if (embeddings is None) != (reconstruction is None):
        name = "embeddings" if reconstruction is None else "reconstruction"
        raise ValueError(
            f"`embeddings` and `reconstruction` must both be set or both be None, got `{name}` alone. Pass both or "
            "neither."
        )
    error = None
    if embeddings is not None and reconstruction is not None:
        error = _relative_error(embeddings, reconstruction)
    group_sizes = np.unique(group_keys(codes), return_counts=True)[1]
    levels = [_measure_level(column, size) for column, size in zip(codes.T, codebook_sizes, strict=True)]
    statistics = CodebookStatistics(
        num_items=len(codes),
        collision_rate=float(group_sizes[group_sizes > 1].sum() / len(codes)),
        largest_group=int(group_sizes.max()),
        utilization=tuple(level.utilization for level in levels),
        entropy=tuple(level.entropy for level in levels),
        perplexity=tuple(level.perplexity for level in levels),
        reconstruction_error=error,
    )
    if len(codes) >= 5:
        _warn_if_collapsed(levels)
    return statistics


def unique_codes(
    embeddings: np.ndarray | torch.Tensor,
    quantizer: ResidualKMeans,
    popularity: np.ndarray | Sequence[float] | None = None,
) -> tuple[np.ndarray, CodebookStatistics]:
    """Encode embeddings and append a collision token, so that no two items share their codes.

    Args:
        embeddings: Float [N, D], N >= 1.
        quantizer: Fitted quantizer.
        popularity: Numbers [N]; the most popular item of a group gets the collision token 0. None: row order.

    Returns:
        The codes, int32 [N, L + 1], and the statistics of the first L levels. The size of the last level is
        `statistics.largest_group`.

    Raises:
        ValueError: Inputs that `ResidualKMeans.encode` or `assign_collision_tokens` rejects.
    """
    codes = quantizer.encode(embeddings)
    # Measure the error on a sample to bound memory.
    sample = slice(None, None, -(-len(codes) // STATISTICS_SAMPLE_SIZE) or 1)
    statistics = codebook_statistics(
        codes,
        quantizer.codebook_sizes,
        quantizer.reconstruction_input(embeddings[sample]),
        quantizer.decode(codes[sample]),
    )
    return np.column_stack([codes, assign_collision_tokens(codes, popularity)]), statistics


class _LevelStatistics(NamedTuple):
    num_used: int
    num_possible: int
    utilization: float
    entropy: float
    perplexity: float


def _measure_level(codes: np.ndarray, codebook_size: int) -> _LevelStatistics:
    """Measure the codes of one level, integers [N]."""
    counts = np.bincount(codes, minlength=codebook_size)
    shares = counts[counts > 0] / len(codes)
    num_possible = min(codebook_size, len(codes))
    # Adding 0.0 turns the -0.0 of a single used code into 0.0.
    entropy = float(-(shares * np.log2(shares)).sum()) + 0.0
    return _LevelStatistics(
        num_used=len(shares),
        num_possible=num_possible,
        utilization=len(shares) / codebook_size,
        entropy=entropy,
        perplexity=2**entropy / num_possible,
    )


def _warn_if_collapsed(levels: list[_LevelStatistics]) -> None:
    collapsed = [
        f"level {index} uses {level.num_used} of {level.num_possible} codes (perplexity {level.perplexity:.1%})"
        for index, level in enumerate(levels)
        if level.num_used < 0.25 * level.num_possible or level.perplexity < 0.10
    ]
    if collapsed:
        warnings.warn(
            f"COLLAPSED CODEBOOK: {'; '.join(collapsed)}. These levels hardly distinguish items. Check the embeddings "
            "for many duplicates or a dominating direction (try `normalize=True`), or use smaller codebooks.",
            stacklevel=3,
        )


def _relative_error(embeddings: np.ndarray, reconstruction: np.ndarray) -> float:
    embeddings = np.asarray(embeddings, dtype=np.float64)
    if embeddings.shape != np.shape(reconstruction):
        raise ValueError(
            f"`embeddings` and `reconstruction` must have one shape, got {embeddings.shape} and "
            f"{np.shape(reconstruction)}. Reconstruct the same rows."
        )
    error = np.square(embeddings - reconstruction).sum()
    spread = np.square(embeddings - embeddings.mean(axis=0)).sum()
    # Equal embeddings have no variance to explain.
    return float(error / spread) if spread > 0 else 0.0


def _check_codes(codes: np.ndarray) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[1] == 0 or codes.dtype.kind not in "iu":
        raise ValueError(
            f"`codes` must be integers of shape [N, L] with L >= 1, got {codes.dtype} {codes.shape}. Pass one row per "
            "item."
        )
    if len(codes) and codes.min() < 0:
        raise ValueError(f"`codes` must be 0 or larger, got {codes.min()}. Pass the codes of a quantizer.")
    return codes
