"""From quantizer codes to ids that no two items share, and a report on how healthy the codes are."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


def group_keys(codes: np.ndarray) -> np.ndarray:
    """One key for each distinct row: non-negative integers [N, L] -> int64 [N], equal where the rows are equal."""
    keys = np.zeros(len(codes), dtype=np.int64)
    bound = 1  # every key is below it
    for column in codes.T:
        size = int(column.max(initial=0)) + 1
        if bound * size >= 2**63:
            distinct, keys = np.unique(keys, return_inverse=True)  # renumber to make room
            bound = len(distinct)
        keys = keys * size + column.astype(np.int64)  # with uint64 numpy would go on in floats
        bound *= size
    return keys


def assign_suffixes(codes: np.ndarray, order: np.ndarray | Sequence[float] | None = None) -> np.ndarray:
    """Running index of every item inside its group of equal codes, so that codes + suffix are unique.

    The width that the last level needs is the largest suffix + 1, which is the size of the largest group.

    Args:
        codes: non-negative integers [N, L].
        order: numbers [N], for instance popularity; in each group the largest comes first, ties in row order.
            None is row order.

    Returns:
        int32 [N], 0 for the first item of each group.

    Raises:
        ValueError: wrong shapes or types, a negative code, a NaN in `order`.
    """
    codes = _check_codes(codes)
    keys = group_keys(codes)
    if order is None:
        rows = np.argsort(keys, kind="stable")
    else:
        order = np.asarray(order)
        if order.shape != (len(codes),) or order.dtype.kind not in "iuf" or np.isnan(order).any():
            raise ValueError(
                f"expected `order` to be {len(codes)} numbers without NaN, one an item, found {order.dtype} "
                f"{order.shape}"
            )
        rows = np.lexsort((-order.astype(np.float64), keys))  # lexsort is stable: ties stay in row order
    ordered = keys[rows]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(rows) else np.empty(0, np.int64)
    sizes = np.diff(np.r_[starts, len(rows)])
    suffixes = np.empty(len(rows), dtype=np.int32)
    suffixes[rows] = np.arange(len(rows)) - np.repeat(starts, sizes)
    return suffixes


@dataclass(frozen=True)
class CodebookHealth:
    """How well codes tell items apart.

    num_items: number of items.
    collision_rate: share of the items that share all their codes with another item.
    largest_group: number of items in the largest such group (1: no collision).
    utilization: a level, share of its codes that some item uses.
    entropy: a level, entropy of the codes in bits (at most log2 of the codebook size).
    perplexity: a level, 2^entropy over the codes that N items could use, min(K, N): 1 is uniform use.
    reconstruction_error: mean squared error of the quantizer relative to the variance of the embeddings; None if it
        was not measured.
    """

    num_items: int
    collision_rate: float
    largest_group: int
    utilization: tuple[float, ...]
    entropy: tuple[float, ...]
    perplexity: tuple[float, ...]
    reconstruction_error: float | None

    def to_dict(self) -> dict:
        """The fields as JSON types."""
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


def codebook_health(
    codes: np.ndarray,
    codebook_sizes: Sequence[int],
    embeddings: np.ndarray | None = None,
    reconstruction: np.ndarray | None = None,
) -> CodebookHealth:
    """Measures the quantizer's codes (without the suffix level) and warns loudly of a collapsed level.

    A level has collapsed when the items use fewer than 25 % of the codes that they could (of K codes N items can
    use min(K, N)), or when the perplexity is below 10 % of that number. Fewer than 5 items are never warned of.

    Args:
        codes: integers [N, L], N >= 1.
        codebook_sizes: L numbers.
        embeddings: float [M, D], all of the embeddings or a sample; with `reconstruction` gives the error.
        reconstruction: float [M, D], the quantizer's approximation of `embeddings`.

    Raises:
        ValueError: shapes that do not match, or a code outside its codebook.
    """
    codes = _check_codes(codes)
    if len(codes) == 0 or codes.shape[1] != len(codebook_sizes) or (codes.max(axis=0) >= codebook_sizes).any():
        raise ValueError(
            f"expected at least one row of codes below the codebook sizes {tuple(codebook_sizes)}, found shape "
            f"{codes.shape} and largest codes {codes.max(axis=0, initial=-1).tolist()}"
        )
    if (embeddings is None) != (reconstruction is None):
        raise ValueError("expected both or neither of `embeddings` and `reconstruction`, found one of them")
    error = None
    if embeddings is not None and reconstruction is not None:
        error = _relative_error(embeddings, reconstruction)
    group_sizes = np.unique(group_keys(codes), return_counts=True)[1]
    utilization, entropy, perplexity, collapsed = [], [], [], []
    for level, size in enumerate(codebook_sizes):
        counts = np.bincount(codes[:, level], minlength=size)
        used = counts[counts > 0] / len(codes)
        possible = min(size, len(codes))
        utilization.append(len(used) / size)
        entropy.append(float(-(used * np.log2(used)).sum()) + 0.0)  # + 0.0: one used code gives 0, not -0
        perplexity.append(2 ** entropy[-1] / possible)
        if len(codes) >= 5 and (len(used) < 0.25 * possible or perplexity[-1] < 0.10):
            collapsed.append(f"level {level} uses {len(used)} of {possible} codes (perplexity {perplexity[-1]:.1%})")
    health = CodebookHealth(
        num_items=len(codes),
        collision_rate=float(group_sizes[group_sizes > 1].sum() / len(codes)),
        largest_group=int(group_sizes.max()),
        utilization=tuple(utilization),
        entropy=tuple(entropy),
        perplexity=tuple(perplexity),
        reconstruction_error=error,
    )
    if collapsed:
        warnings.warn(
            f"COLLAPSED CODEBOOK: {'; '.join(collapsed)}. The ids hardly tell items apart there: check the "
            "embeddings (many duplicates, a dominating direction; try normalize=True) or use smaller codebooks.",
            stacklevel=2,
        )
    return health


def _relative_error(embeddings: np.ndarray, reconstruction: np.ndarray) -> float:
    embeddings = np.asarray(embeddings, dtype=np.float64)
    if embeddings.shape != np.shape(reconstruction):
        raise ValueError(
            f"expected embeddings and reconstruction of one shape, found {embeddings.shape} and "
            f"{np.shape(reconstruction)}"
        )
    error = np.square(embeddings - reconstruction).sum()
    spread = np.square(embeddings - embeddings.mean(axis=0)).sum()
    # Equal embeddings have no variance to explain.
    return float(error / spread) if spread > 0 else 0.0


def _check_codes(codes: np.ndarray) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[1] == 0 or codes.dtype.kind not in "iu":
        raise ValueError(f"expected integer codes of shape [N, L] with L >= 1, found {codes.dtype} {codes.shape}")
    if len(codes) and codes.min() < 0:
        raise ValueError(f"expected codes >= 0, found {codes.min()}")
    return codes
