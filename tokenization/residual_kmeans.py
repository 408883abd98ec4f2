"""Residual k-means: the quantizer that turns an item's embedding into codes.

Each level clusters the residuals of the levels before it (RecoChain, arXiv 2604.25787, section 3: residual k-means
over frozen item embeddings). Fitting needs faiss; encoding, decoding, saving and loading need numpy alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .kmeans_codebook import BLOCK, first_equal, fit_codebook, nearest
from .semantic_id_files import SEMANTIC_IDS_FILE, read_tensors, write_tensors


class ResidualKMeans:
    """Quantize embeddings by residual k-means with one codebook per level.

    Example, for float32 embeddings [N, D]:
        quantizer = ResidualKMeans((256, 256, 256)).fit(embeddings)
        codes = quantizer.encode(embeddings)     # int32 [N, 3]
        approximation = quantizer.decode(codes)  # float32 [N, D]

    Attributes:
        codebooks: float32 [K_l, pca_dim or D] per level, empty before `fit`.
        mean: float32 [D]. None before `fit` or without `pca_dim`.
        components: float32 [D, pca_dim] with orthonormal columns. None before `fit` or without `pca_dim`.
    """

    def __init__(
        self,
        codebook_sizes: Sequence[int] = (256, 256, 256),
        *,
        normalize: bool = False,
        pca_dim: int | None = None,
        num_iterations: int = 20,
        max_points_per_centroid: int = 512,
        seed: int = 0,
    ):
        """Set the hyperparameters; `fit` learns the codebooks.

        Args:
            codebook_sizes: Number of codes of each level, each at least 1.
            normalize: Divide every embedding by its L2 norm first; a zero row stays zero. `decode` then approximates
                the normalized embeddings.
            pca_dim: Number of principal components to cluster. None: cluster the embeddings. With few items in many
                dimensions, residuals are nearly orthogonal. A later level then has one large cluster and many single
                points. About 32 components use all levels evenly.
            num_iterations: Number of k-means iterations per level.
            max_points_per_centroid: Sample size of `fit`, per code of the widest level.
            seed: Seed of the sample and of the initial centroids. Equal seeds and data give equal codebooks.

        Raises:
            ValueError: A number out of range.
        """
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(
                f"`codebook_sizes` must have at least one codebook size, each at least 1, got {codebook_sizes}. Pass "
                "one size per level."
            )
        positive = {
            "pca_dim": pca_dim,
            "num_iterations": num_iterations,
            "max_points_per_centroid": max_points_per_centroid,
        }
        for name, value in positive.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}. Pass a positive number.")
        # faiss takes a C int, and each level adds its index.
        if not 0 <= seed < 2**31 - len(self.codebook_sizes):
            raise ValueError(f"`seed` must be at least 0 and fit in 31 bits, got {seed}. Pass a smaller seed.")
        self.normalize = bool(normalize)
        self.pca_dim = None if pca_dim is None else int(pca_dim)
        self.num_iterations = int(num_iterations)
        self.max_points_per_centroid = int(max_points_per_centroid)
        self.seed = int(seed)
        self.codebooks: tuple[np.ndarray, ...] = ()
        self.mean: np.ndarray | None = None
        self.components: np.ndarray | None = None

    @property
    def num_levels(self) -> int:
        """Number of codebooks."""
        return len(self.codebook_sizes)

    @property
    def embedding_dim(self) -> int:
        """Width D of the embeddings. Raises `ValueError` before `fit`."""
        if not self.codebooks:
            raise ValueError("`ResidualKMeans` must be fitted, got a quantizer without codebooks. Call `fit` first.")
        return self.codebooks[0].shape[1] if self.components is None else len(self.components)

    def fit(self, embeddings: np.ndarray | torch.Tensor) -> "ResidualKMeans":
        """Learn the codebooks and return self.

        Every code is used on the sample, unless a level has fewer distinct residuals than codes. Each distinct
        residual is then an entry. The surplus entries repeat the first entry and are never chosen, because the lowest
        of equal entries is.

        Args:
            embeddings: Float [N, D]; N is at least the size of the largest codebook.

        Raises:
            ValueError: Not a 2-D float array, narrower than `pca_dim`, NaN or infinity, or fewer rows than codes.
            ImportError: faiss is not installed.
        """
        # Check the embeddings and draw a sample.
        matrix = _as_matrix(embeddings)
        widest = max(self.codebook_sizes)
        if len(matrix) < widest:
            raise ValueError(
                f"`embeddings` must have at least as many rows as codes ({widest} in the largest codebook), got "
                f"{len(matrix)}. Use smaller `codebook_sizes`."
            )
        if self.pca_dim is not None and matrix.shape[1] < self.pca_dim:
            raise ValueError(
                f"`embeddings` must be at least as wide as `pca_dim` ({self.pca_dim}), got width {matrix.shape[1]}. "
                "Use a smaller `pca_dim`."
            )
        _check_finite(matrix)
        sample_size = self.max_points_per_centroid * widest
        if len(matrix) > sample_size:
            sample = np.random.default_rng(self.seed).choice(len(matrix), sample_size, replace=False)
            matrix = matrix[np.sort(sample)]

        # One sample for all levels: as fast, with a lower error.
        points = self._normalized(matrix)
        pca = _principal_components(points, self.pca_dim) if self.pca_dim else (None, None)
        self.mean, self.components = pca
        residual = self._project(points)
        codebooks = []
        for level, num_codes in enumerate(self.codebook_sizes):
            codebook = fit_codebook(residual, num_codes, self.num_iterations, self.seed + level)
            residual = residual - codebook[nearest(residual, codebook)]
            codebooks.append(codebook)
        self.codebooks = tuple(codebooks)
        return self

    def encode(self, embeddings: np.ndarray | torch.Tensor) -> np.ndarray:
        """Encode embeddings as codes: float [N, D] -> int32 [N, num_levels].

        Memory beyond input and output is bounded (some tens of MB) for any N.

        Raises:
            ValueError: Not fitted, wrong shape or width, NaN or infinity.
        """
        matrix = self._check_width(embeddings)
        codes = np.empty((len(matrix), self.num_levels), dtype=np.int32)
        lowest_equal = [first_equal(codebook) for codebook in self.codebooks]
        for start in range(0, len(matrix), self._chunk):
            rows = slice(start, start + self._chunk)
            residual = self._project(self._normalized(matrix[rows]))
            for level, codebook in enumerate(self.codebooks):
                codes[rows, level] = lowest_equal[level][nearest(residual, codebook)]
                residual -= codebook[codes[rows, level]]
        return codes

    def decode(self, codes: np.ndarray | torch.Tensor) -> np.ndarray:
        """Sum the codebook entries: integers [N, num_levels] -> float32 [N, D].

        Raises:
            ValueError: Not fitted, wrong shape, or a code outside its codebook.
        """
        dim = self.embedding_dim
        codes = codes.detach().cpu().numpy() if isinstance(codes, torch.Tensor) else np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.num_levels or codes.dtype.kind not in "iu":
            raise ValueError(
                f"`codes` must be integers [N, {self.num_levels}], got {codes.dtype} {codes.shape}. Pass the codes "
                "of `encode`."
            )
        if len(codes) and ((codes < 0) | (codes >= np.array(self.codebook_sizes))).any():
            raise ValueError(
                f"`codes` must be in [0, K) for K = {self.codebook_sizes}, got {codes.min(axis=0).tolist()} to "
                f"{codes.max(axis=0).tolist()}. Pass the codes of `encode`."
            )
        approximation = np.zeros((len(codes), self.pca_dim or dim), dtype=np.float32)
        for level, codebook in enumerate(self.codebooks):
            approximation += codebook[codes[:, level]]
        return approximation if self.components is None else approximation @ self.components.T + self.mean

    def reconstruction_input(self, embeddings: np.ndarray | torch.Tensor) -> np.ndarray:
        """Return the array that `decode` approximates: float32 [N, D], normalized if `normalize` is set."""
        return self._normalized(self._check_width(embeddings))

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the fitted arrays by their names in the file, such as `codebook_0` (float32 [K_0, D]).

        Raises:
            ValueError: Not fitted.
        """
        self.embedding_dim  # noqa: B018 - raises before `fit`
        tensors = {f"codebook_{level}": codebook for level, codebook in enumerate(self.codebooks)}
        if self.mean is not None and self.components is not None:
            tensors |= {"pca_mean": self.mean, "pca_components": self.components}
        return tensors

    def metadata(self) -> dict[str, str]:
        """Return the hyperparameters as safetensors metadata."""
        settings = {
            "codebook_sizes": self.codebook_sizes,
            "normalize": self.normalize,
            "pca_dim": self.pca_dim,
            "num_iterations": self.num_iterations,
            "max_points_per_centroid": self.max_points_per_centroid,
            "seed": self.seed,
        }
        return {"residual_kmeans": json.dumps(settings)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> "ResidualKMeans":
        """Build a quantizer from the results of `tensors` and `metadata`; other tensors are ignored.

        Raises:
            ValueError: Missing or damaged hyperparameters, or tensors that do not match them.
        """
        if "residual_kmeans" not in metadata:
            raise ValueError(
                f"`metadata` must have the key residual_kmeans, got {sorted(metadata)}. Pass a file that "
                "`ResidualKMeans.save` wrote."
            )
        try:
            settings = json.loads(metadata["residual_kmeans"])
            quantizer = cls(settings.pop("codebook_sizes"), **settings)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"`metadata` must hold valid ResidualKMeans settings, got damaged settings ({error}). Save the folder "
                "again."
            ) from error
        quantizer._check_tensors(tensors)
        quantizer.codebooks = tuple(tensors[f"codebook_{level}"] for level in range(quantizer.num_levels))
        if quantizer.pca_dim is not None:
            quantizer.mean = tensors["pca_mean"]
            quantizer.components = tensors["pca_components"]
        return quantizer

    def save(self, folder: str | Path) -> Path:
        """Write `semantic_ids.safetensors` into the folder and return its path.

        Raises:
            ValueError: Not fitted.
        """
        path = Path(folder) / SEMANTIC_IDS_FILE
        tensors = self.tensors()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, path, self.metadata())
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "ResidualKMeans":
        """Read the file that `save` wrote, or the quantizer in the folder of a saved tokenizer.

        Raises:
            ValueError: The file is missing or damaged.
        """
        return cls.from_tensors(*read_tensors(Path(folder) / SEMANTIC_IDS_FILE))

    @property
    def _chunk(self) -> int:
        return max(1, BLOCK // max(*self.codebook_sizes, self.embedding_dim))

    def _check_tensors(self, tensors: dict[str, np.ndarray]) -> None:
        """Check names, shapes and dtypes of saved tensors against the hyperparameters."""
        first = tensors.get("codebook_0", np.empty((0, 0)))
        dim = first.shape[-1] if self.pca_dim is None else tensors.get("pca_mean", first).shape[-1]
        width = self.pca_dim or dim
        shapes: dict[str, tuple[int, ...]] = {
            f"codebook_{level}": (size, width) for level, size in enumerate(self.codebook_sizes)
        }
        if self.pca_dim is not None:
            shapes |= {"pca_mean": (dim,), "pca_components": (dim, width)}
        missing = [name for name in shapes if name not in tensors]
        if missing:
            raise ValueError(f"`tensors` must have {[*shapes]}, got {missing} missing. Save the folder again.")
        for name, shape in shapes.items():
            tensor = tensors[name]
            if tensor.shape != shape or tensor.dtype != np.float32 or not np.isfinite(tensor).all():
                raise ValueError(
                    f"`{name}` must be finite float32 of shape {shape}, got {tensor.dtype} {tensor.shape}. Save the "
                    "folder again."
                )

    def _check_width(self, embeddings: np.ndarray | torch.Tensor) -> np.ndarray:
        dim = self.embedding_dim
        matrix = _as_matrix(embeddings)
        if matrix.shape[1] != dim:
            raise ValueError(
                f"`embeddings` must have width {dim}, as in `fit`, got width {matrix.shape[1]}. Use the same encoder."
            )
        _check_finite(matrix)
        return matrix

    def _project(self, rows: np.ndarray) -> np.ndarray:
        """Project rows into the space of the codebooks: float32 [N, D] -> float32 [N, pca_dim or D]."""
        return rows if self.components is None else (rows - self.mean) @ self.components

    def _normalized(self, matrix: np.ndarray) -> np.ndarray:
        # Copy, because `encode` updates the residual in place.
        rows = matrix.astype(np.float32)
        if self.normalize:
            # float64 keeps the squares of tiny numbers.
            norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
            rows = (rows / np.where(norms > 0, norms, 1)).astype(np.float32)
        return rows


def _principal_components(rows: np.ndarray, pca_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean, float32 [D], and the first principal components, float32 [D, pca_dim], of rows [N, D]."""
    mean = rows.mean(axis=0)
    _, vectors = np.linalg.eigh(
        np.cov(rows, rowvar=False, ddof=min(1, len(rows) - 1), dtype=np.float64).reshape(rows.shape[1], -1)
    )
    # eigh sorts by ascending variance.
    components = vectors[:, ::-1][:, :pca_dim]
    # Make the largest entry positive: an eigenvector's sign is arbitrary.
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=0)[None], axis=0)
    return mean, np.ascontiguousarray(components * np.sign(largest), dtype=np.float32)


def _as_matrix(embeddings: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(embeddings, torch.Tensor):
        embeddings = embeddings.detach().to("cpu")
        # numpy has no bfloat16.
        embeddings = embeddings.float().numpy() if embeddings.is_floating_point() else embeddings.numpy()
    matrix = np.asarray(embeddings)
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise ValueError(
            f"`embeddings` must be floats of shape [N, D], got {matrix.dtype} {matrix.shape}. Convert them to a 2-D "
            "float array."
        )
    return matrix


def _check_finite(matrix: np.ndarray) -> None:
    num_bad = 0
    first_bad = -1
    step = max(1, BLOCK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        # float32 squares must be finite, so that squared distances are.
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.square(matrix[start : start + step].astype(np.float32)).sum(axis=1)
            bad = np.flatnonzero(~np.isfinite(8 * squares))
        if len(bad) and first_bad < 0:
            first_bad = start + int(bad[0])
        num_bad += len(bad)
    if num_bad:
        raise ValueError(
            f"`embeddings` must be finite, got NaN or infinity in {num_bad} of {len(matrix)} rows, the first in row "
            f"{first_bad}, or squares that are infinite in float32. Repair, scale or drop these rows."
        )
