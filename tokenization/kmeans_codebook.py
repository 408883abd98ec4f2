"""One level of k-means: learning a codebook with faiss, and finding the nearest entry with numpy alone."""

from types import ModuleType

import numpy as np

# Entries of the largest block of distances held at a time: 16 MB of float32.
BLOCK = 1 << 22


def nearest(points: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """
    Index of the nearest entry by squared distance: float32 [N, D], [K, D] -> int64 [N]. Of equal entries it may be any, since
    a matrix product need not give equal columns the same last bits: `first_equal` has the lowest.
    """
    # Shifted to the codebook's mean, or |c|^2 - 2 x.c would lose all digits for embeddings far from the origin.
    mean = codebook.mean(axis=0)
    centered = codebook - mean
    half_norms = 0.5 * np.einsum("kd,kd->k", centered, centered)
    nearest = np.empty(len(points), dtype=np.int64)
    step = max(1, BLOCK // max(codebook.shape))
    for start in range(0, len(points), step):
        scores = (points[start : start + step] - mean) @ centered.T
        scores -= half_norms
        nearest[start : start + step] = scores.argmax(axis=1)
    return nearest


def first_equal(codebook: np.ndarray) -> np.ndarray:
    """The lowest index of an entry equal to each: float32 [K, D] -> int64 [K]."""
    _, first, same = np.unique(codebook, axis=0, return_index=True, return_inverse=True)
    return first[same.ravel()]


def fit_codebook(points: np.ndarray, num_codes: int, iterations: int, seed: int) -> np.ndarray:
    """One k-means codebook: float32 [N, D] -> float32 [num_codes, D]."""
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
        max_points_per_centroid=len(points),  # the sample is already drawn
    )
    kmeans.train(points)
    return _reseed_unused(points, kmeans.centroids.copy())


def _reseed_unused(points: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Moves unused entries onto the points that are worst approximated.

    faiss splits an empty cluster by a perturbation of 1/1024 of a full one, and does so after the last assignment
    as well: entries may come out unused. A moved point can leave its old cluster empty, hence the rounds.
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
    """Distinct rows in order of first appearance: float32 [N, D] -> [M, D]."""
    rows = np.ascontiguousarray(points + np.float32(0))  # + 0 makes -0.0 and 0.0 the same bytes
    as_bytes = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first = np.unique(as_bytes, return_index=True)
    return rows[np.sort(first)]


def _import_faiss() -> ModuleType:
    # Inside a try also because transformers demands every other import of a Hub file to be installed: a tokenizer
    # must load where faiss is not.
    try:
        import faiss
    except ImportError as error:
        raise ImportError("ResidualKMeans.fit needs faiss: pip install faiss-cpu") from error
    return faiss
