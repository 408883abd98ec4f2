"""One level of k-means: faiss learns a codebook, and numpy alone finds the nearest entries."""

from types import ModuleType

import numpy as np

# Largest number of distances in memory at once: 16 MB of float32.
BLOCK = 1 << 22


def nearest(points: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Find the nearest codebook entry of each point by squared distance.

    A matrix product need not give equal columns the same last bits. Among equal entries the result may therefore be
    any; `first_equal` maps it to the lowest.

    Args:
        points: float32 [N, D].
        codebook: float32 [K, D].

    Returns:
        int64 [N], indices into `codebook`.
    """
    # Center first: |c|^2 - 2 x.c loses all digits far from 0.
    mean = codebook.mean(axis=0)
    centered = codebook - mean
    half_norms = 0.5 * np.einsum("kd,kd->k", centered, centered)
    indices = np.empty(len(points), dtype=np.int64)
    step = max(1, BLOCK // max(codebook.shape))
    for start in range(0, len(points), step):
        scores = (points[start : start + step] - mean) @ centered.T
        scores -= half_norms
        indices[start : start + step] = scores.argmax(axis=1)
    return indices


def first_equal(codebook: np.ndarray) -> np.ndarray:
    """Find the lowest index of an entry that equals each entry: float32 [K, D] -> int64 [K]."""
    _, first, inverse = np.unique(codebook, axis=0, return_index=True, return_inverse=True)
    return first[inverse.ravel()]


def fit_codebook(points: np.ndarray, num_codes: int, iterations: int, seed: int) -> np.ndarray:
    """Learn one codebook: float32 [N, D] -> float32 [num_codes, D].

    Args:
        points: float32 [N, D].
        num_codes: Number of entries. With fewer distinct points, surplus entries repeat the first point.
        iterations: Number of k-means iterations.
        seed: Seed of the initial centroids.

    Raises:
        ImportError: faiss is not installed.
    """
    faiss = _import_faiss()
    distinct = _distinct_rows(points)
    if len(distinct) <= num_codes:
        surplus = np.repeat(distinct[:1], num_codes - len(distinct), axis=0)
        return np.concatenate([distinct, surplus])
    kmeans = faiss.Kmeans(
        points.shape[1],
        num_codes,
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,
        # `points` is a sample already, so faiss draws none.
        max_points_per_centroid=len(points),
    )
    kmeans.train(points)
    return _reseed_unused(points, kmeans.centroids.copy())


def _reseed_unused(points: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Move unused entries onto the points with the largest error.

    faiss splits an empty cluster by a perturbation of 1/1024 of a full cluster. It does so after the last assignment
    as well, so an entry may stay unused. A moved entry can empty another cluster, so the search repeats.
    """
    for _ in range(10):
        codes = nearest(points, codebook)
        unused = np.flatnonzero(np.bincount(codes, minlength=len(codebook)) == 0)
        if len(unused) == 0:
            break
        errors = np.square(points - codebook[codes]).sum(axis=1)
        worst = points[np.argsort(-errors, kind="stable")[: 16 * len(unused)]]
        seeds = _distinct_rows(worst)[: len(unused)]
        codebook[unused[: len(seeds)]] = seeds
    return codebook


def _distinct_rows(points: np.ndarray) -> np.ndarray:
    """Return the distinct rows in order of first appearance: float32 [N, D] -> float32 [M, D]."""
    # Adding 0 gives -0.0 and 0.0 the same bytes.
    rows = np.ascontiguousarray(points + np.float32(0))
    as_bytes = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first = np.unique(as_bytes, return_index=True)
    return rows[np.sort(first)]


def _import_faiss() -> ModuleType:
    # In a `try`, so transformers treats faiss as optional in Hub code.
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "`ResidualKMeans.fit` needs the package faiss, got no installation. Run `pip install faiss-cpu`."
        ) from error
    return faiss
