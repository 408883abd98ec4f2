"""Residual k-means: the quantizer that turns an item's embedding into its first codes.

Level l clusters what the levels before it left over (RecoChain, arXiv 2604.25787, section 3: residual k-means over
frozen item embeddings). Fitting needs faiss; encoding, decoding, saving and loading need numpy alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from .kmeans_codebook import BLOCK, first_equal, fit_codebook, nearest
from .semantic_id_files import SEMANTIC_IDS_FILE, read_tensors


class ResidualKMeans:
    """Residual k-means with one codebook a level.

    Example, for float32 embeddings [N, D]:
        quantizer = ResidualKMeans((256, 256, 256)).fit(embeddings)
        codes = quantizer.encode(embeddings)     # int32 [N, 3]
        approximation = quantizer.decode(codes)  # float32 [N, D]
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
        """
        Args:
            codebook_sizes: number of codes of each level, each at least 1.
            normalize: divide every embedding by its L2 norm first (a zero row stays zero); `decode` then returns
                approximations of the normalized embeddings.
            pca_dim: cluster the embeddings' first principal components, this many. With few items in many dimensions
                residuals are nearly orthogonal, and a level past the first is one large cluster and many single
                points; in 32 dimensions or so all levels are used evenly.
            num_iterations: k-means iterations a level.
            max_points_per_centroid: `fit` uses a sample of this many points for each code of the widest level.
            seed: of the sample and of the initial centroids; equal seeds and data give equal codebooks.

        Raises:
            ValueError: a number that is out of range.
        """
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(f"expected one codebook size >= 1 a level, found {codebook_sizes}")
        for name, value in (
            ("pca_dim", pca_dim),
            ("num_iterations", num_iterations),
            ("max_points_per_centroid", max_points_per_centroid),
        ):
            if value is not None and value < 1:
                raise ValueError(f"expected {name} >= 1, found {value}")
        if not 0 <= seed < 2**31 - len(self.codebook_sizes):  # faiss takes a C int, and each level adds its index
            raise ValueError(f"expected a seed >= 0 that fits in 31 bits, found {seed}")
        self.normalize = bool(normalize)
        self.pca_dim = None if pca_dim is None else int(pca_dim)
        self.num_iterations = int(num_iterations)
        self.max_points_per_centroid = int(max_points_per_centroid)
        self.seed = int(seed)
        self.codebooks: tuple[np.ndarray, ...] = ()  # float32 [K_l, pca_dim or D] a level, empty before `fit`
        self.mean: np.ndarray | None = None  # with pca_dim: float32 [D]
        self.components: np.ndarray | None = None  # with pca_dim: float32 [D, pca_dim], orthonormal columns

    @property
    def num_levels(self) -> int:
        return len(self.codebook_sizes)

    @property
    def embedding_dim(self) -> int:
        """Width D of the embeddings. `ValueError` before `fit`."""
        if not self.codebooks:
            raise ValueError("expected a fitted ResidualKMeans, found one without codebooks: call `fit` first")
        return self.codebooks[0].shape[1] if self.components is None else len(self.components)

    def fit(self, embeddings: np.ndarray | torch.Tensor) -> "ResidualKMeans":
        """Learns the codebooks and returns self.

        Every code is used on the sample that it is learned from, except where a level's residuals have fewer
        distinct rows than the level has codes: each distinct row is then an entry of its own, the surplus entries
        repeat the first one and are never chosen (of equal entries the lowest code is).

        Args:
            embeddings: float [N, D], N >= the largest codebook.

        Raises:
            ValueError: not a 2-D float array, narrower than `pca_dim`, NaN or infinity, or fewer points than codes.
            ImportError: faiss is not installed.
        """
        matrix = _as_matrix(embeddings)
        widest = max(self.codebook_sizes)
        if len(matrix) < widest:
            raise ValueError(
                f"expected at least as many embeddings as codes ({widest} in the largest codebook), found "
                f"{len(matrix)}: use smaller `codebook_sizes`"
            )
        if self.pca_dim is not None and matrix.shape[1] < self.pca_dim:
            raise ValueError(f"expected embeddings of width >= pca_dim ({self.pca_dim}), found {matrix.shape[1]}")
        _check_finite(matrix)
        size = self.max_points_per_centroid * widest
        if len(matrix) > size:
            rows = np.random.default_rng(self.seed).choice(len(matrix), size, replace=False)
            matrix = matrix[np.sort(rows)]
        # One sample carried through all levels: as fast as a new sample a level, and the error is lower.
        rows = self._normalized(matrix)
        self.mean, self.components = _principal_components(rows, self.pca_dim) if self.pca_dim else (None, None)
        residual = self._project(rows)
        codebooks = []
        for level, num_codes in enumerate(self.codebook_sizes):
            codebook = fit_codebook(residual, num_codes, self.num_iterations, self.seed + level)
            residual = residual - codebook[nearest(residual, codebook)]  # of equal entries any
            codebooks.append(codebook)
        self.codebooks = tuple(codebooks)
        return self

    def encode(self, embeddings: np.ndarray | torch.Tensor) -> np.ndarray:
        """Codes of embeddings: float [N, D] -> int32 [N, num_levels].

        Memory beyond input and output is bounded (some tens of MB), whatever N is.

        Raises:
            ValueError: before `fit`, wrong shape or width, NaN or infinity.
        """
        matrix = self._check_width(embeddings)
        codes = np.empty((len(matrix), self.num_levels), dtype=np.int32)
        firsts = [first_equal(codebook) for codebook in self.codebooks]
        for start in range(0, len(matrix), self._chunk):
            rows = slice(start, start + self._chunk)
            residual = self._project(self._normalized(matrix[rows]))
            for level, codebook in enumerate(self.codebooks):
                codes[rows, level] = firsts[level][nearest(residual, codebook)]
                residual -= codebook[codes[rows, level]]
        return codes

    def decode(self, codes: np.ndarray | torch.Tensor) -> np.ndarray:
        """Sum of the codebook entries: integer [N, num_levels] -> float32 [N, D].

        Raises:
            ValueError: before `fit`, wrong shape, or a code outside its codebook.
        """
        dim = self.embedding_dim
        codes = codes.detach().cpu().numpy() if isinstance(codes, torch.Tensor) else np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.num_levels or codes.dtype.kind not in "iu":
            raise ValueError(f"expected integer codes [N, {self.num_levels}], found {codes.dtype} {codes.shape}")
        if len(codes) and ((codes < 0) | (codes >= np.array(self.codebook_sizes))).any():
            raise ValueError(f"expected codes in [0, K) for K = {self.codebook_sizes}, found some outside")
        out = np.zeros((len(codes), self.pca_dim or dim), dtype=np.float32)
        for level, codebook in enumerate(self.codebooks):
            out += codebook[codes[:, level]]
        return out if self.components is None else out @ self.components.T + self.mean

    def reconstruction_input(self, embeddings: np.ndarray | torch.Tensor) -> np.ndarray:
        """What `decode` approximates: the embeddings as float32 [N, D], normalized if the quantizer normalizes."""
        return self._normalized(self._check_width(embeddings))

    def tensors(self) -> dict[str, np.ndarray]:
        """What was fitted, by its name in the file: `codebook_0` float32 [K_0, D], ... `ValueError` before `fit`."""
        self.embedding_dim  # noqa: B018 - raises before `fit`
        tensors = {f"codebook_{level}": codebook for level, codebook in enumerate(self.codebooks)}
        if self.mean is not None and self.components is not None:
            tensors |= {"pca_mean": self.mean, "pca_components": self.components}
        return tensors

    def metadata(self) -> dict[str, str]:
        """The settings as safetensors metadata."""
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
        """Inverse of `tensors` and `metadata`; other tensors are ignored. `ValueError` where they do not match."""
        if "residual_kmeans" not in metadata:
            raise ValueError("expected the settings of a ResidualKMeans in the metadata, found none: not its file")
        try:
            settings = json.loads(metadata["residual_kmeans"])
            quantizer = cls(settings.pop("codebook_sizes"), **settings)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"expected valid ResidualKMeans settings, found damaged ones ({error})") from error
        first = tensors.get("codebook_0", np.empty((0, 0)))
        dim = first.shape[-1] if quantizer.pca_dim is None else tensors.get("pca_mean", first).shape[-1]
        width = quantizer.pca_dim or dim
        shapes: dict[str, tuple[int, ...]] = {
            f"codebook_{level}": (size, width) for level, size in enumerate(quantizer.codebook_sizes)
        }
        if quantizer.pca_dim is not None:
            shapes |= {"pca_mean": (dim,), "pca_components": (dim, width)}
        missing = [name for name in shapes if name not in tensors]
        if missing:
            raise ValueError(f"expected the tensors {[*shapes]}, found {missing} missing: save the folder again")
        for name, shape in shapes.items():
            found = tensors[name]
            if found.shape != shape or found.dtype != np.float32 or not np.isfinite(found).all():
                raise ValueError(
                    f"expected {name} to be finite float32 of shape {shape}, found {found.dtype} {found.shape}: save "
                    "the folder again"
                )
        quantizer.codebooks = tuple(tensors[f"codebook_{level}"] for level in range(quantizer.num_levels))
        if quantizer.pca_dim is not None:
            quantizer.mean, quantizer.components = tensors["pca_mean"], tensors["pca_components"]
        return quantizer

    def save(self, folder: str | Path) -> Path:
        """Writes `semantic_ids.safetensors` into the folder and returns its path. `ValueError` before `fit`."""
        path = Path(folder) / SEMANTIC_IDS_FILE
        tensors = self.tensors()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata=self.metadata())
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "ResidualKMeans":
        """Reads what `save` wrote, or the quantizer in a saved tokenizer's folder. `ValueError` if damaged."""
        return cls.from_tensors(*read_tensors(Path(folder) / SEMANTIC_IDS_FILE))

    @property
    def _chunk(self) -> int:
        return max(1, BLOCK // max(*self.codebook_sizes, self.embedding_dim))

    def _check_width(self, embeddings: np.ndarray | torch.Tensor) -> np.ndarray:
        dim = self.embedding_dim
        matrix = _as_matrix(embeddings)
        if matrix.shape[1] != dim:
            raise ValueError(
                f"expected embeddings of width {dim}, as in `fit`, found width {matrix.shape[1]}: use the same encoder"
            )
        _check_finite(matrix)
        return matrix

    def _project(self, rows: np.ndarray) -> np.ndarray:
        """float32 [N, D] -> the space of the codebooks, float32 [N, pca_dim or D]."""
        return rows if self.components is None else (rows - self.mean) @ self.components

    def _normalized(self, matrix: np.ndarray) -> np.ndarray:
        rows = matrix.astype(np.float32)  # a copy: the residual is updated in place
        if self.normalize:
            norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)  # squares of tiny numbers, too
            rows = (rows / np.where(norms > 0, norms, 1)).astype(np.float32)
        return rows


def _principal_components(rows: np.ndarray, pca_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean float32 [D] and the `pca_dim` directions of most variance, float32 [D, pca_dim], of rows [N, D]."""
    mean = rows.mean(axis=0)
    _, vectors = np.linalg.eigh(
        np.cov(rows, rowvar=False, ddof=min(1, len(rows) - 1), dtype=np.float64).reshape(rows.shape[1], -1)
    )
    components = vectors[:, ::-1][:, :pca_dim]  # eigh sorts ascending
    # An eigenvector's sign is arbitrary: the largest entry decides, so that equal data give equal codebooks.
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=0)[None], axis=0)
    return mean, np.ascontiguousarray(components * np.sign(largest), dtype=np.float32)


def _as_matrix(embeddings: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(embeddings, torch.Tensor):
        embeddings = embeddings.detach().to("cpu")
        # numpy has no bfloat16
        embeddings = embeddings.float().numpy() if embeddings.is_floating_point() else embeddings.numpy()
    matrix = np.asarray(embeddings)
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise ValueError(f"expected float embeddings of shape [N, D], found {matrix.dtype} {matrix.shape}")
    return matrix


def _check_finite(matrix: np.ndarray) -> None:
    count, first = 0, -1
    step = max(1, BLOCK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        # As float32, where a large float64 becomes infinite, and so that the square of a distance is finite, too.
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.square(matrix[start : start + step].astype(np.float32)).sum(axis=1)
            bad = np.flatnonzero(~np.isfinite(8 * squares))
        if len(bad) and first < 0:
            first = start + int(bad[0])
        count += len(bad)
    if count:
        raise ValueError(
            f"expected finite embeddings, found NaN or infinity in {count} of {len(matrix)} rows, the first of them row {first}, "
            "or numbers whose squares are infinite in float32: repair, scale or drop these rows"
        )
