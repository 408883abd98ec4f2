"""Residual k-means: codes are nearest entries, fitting is deterministic, and files are checked."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenization import ResidualKMeans


def clustered(num_points, dim=8, seed=0):
    """Draw points around ten centers."""
    centers = 3 * np.random.default_rng(0).normal(size=(10, dim))
    rng = np.random.default_rng(seed)
    return (centers[rng.integers(0, 10, num_points)] + rng.normal(size=(num_points, dim))).astype(np.float32)


@pytest.fixture(scope="module")
def quantizer():
    return ResidualKMeans((16, 16), seed=3).fit(clustered(600))


def test_more_levels_approximate_better_by_the_nearest_entry(quantizer):
    points = clustered(200, seed=1)
    codes = quantizer.encode(points)
    assert codes.dtype == np.int32 and codes.shape == (200, 2)
    residual = points.astype(np.float64)
    errors = [np.square(residual).sum()]
    for level, codebook in enumerate(quantizer.codebooks):
        distances = np.square(residual[:, None] - codebook[None]).sum(-1)
        np.testing.assert_array_equal(codes[:, level], distances.argmin(1))
        residual -= codebook[codes[:, level]]
        errors.append(np.square(residual).sum())
    assert errors[0] > 2 * errors[1] and errors[1] > errors[2]
    np.testing.assert_allclose(quantizer.decode(codes), points - residual, atol=1e-5)


def test_embeddings_far_from_the_origin_are_encoded_without_loss(quantizer):
    points = clustered(600)
    shifted = ResidualKMeans((16,), seed=3).fit(points + 1000)
    distances = np.square((points + 1000.0)[:, None] - shifted.codebooks[0][None].astype(np.float64)).sum(-1)
    assert (shifted.encode(points + 1000)[:, 0] == distances.argmin(1)).mean() > 0.99


def test_equal_seeds_give_equal_codebooks_from_numpy_and_torch():
    points = clustered(2000)
    from_numpy = ResidualKMeans((8, 8), max_points_per_centroid=64, seed=5).fit(points)
    from_torch = ResidualKMeans((8, 8), max_points_per_centroid=64, seed=5).fit(torch.from_numpy(points).double())
    other = ResidualKMeans((8, 8), max_points_per_centroid=64, seed=6).fit(points)
    assert all((a == b).all() for a, b in zip(from_numpy.codebooks, from_torch.codebooks, strict=True))
    assert not (from_numpy.codebooks[0] == other.codebooks[0]).all()
    assert from_numpy.encode(torch.from_numpy(points).bfloat16()).shape == (2000, 2)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), num_codes=st.sampled_from([4, 32, 60]))
def test_every_code_is_used_on_the_training_sample(seed, num_codes):
    rng = np.random.default_rng(seed)
    points = np.concatenate([0.01 * rng.normal(size=(300, 4)), 10 * rng.normal(size=(20, 4))]).astype(np.float32)
    quantizer = ResidualKMeans((num_codes, num_codes), seed=seed).fit(points)
    assert [len(np.unique(column)) for column in quantizer.encode(points).T] == [num_codes, num_codes]


@pytest.mark.parametrize("num_distinct", [1, 3])
def test_fewer_distinct_points_than_codes_get_one_entry_each(num_distinct):
    distinct = clustered(num_distinct)
    points = np.tile(distinct, (20, 1))
    quantizer = ResidualKMeans((8, 4)).fit(points)
    codes = quantizer.encode(points)
    assert len(np.unique(codes, axis=0)) == num_distinct
    np.testing.assert_allclose(quantizer.decode(codes), points, atol=1e-5)


def test_equal_embeddings_have_equal_codes_in_any_batch():
    distinct = np.random.default_rng(3700).normal(size=(37, 100)).astype(np.float32)
    quantizer = ResidualKMeans((100, 64)).fit(np.tile(distinct, (3, 1)))  # most entries are unused
    together = quantizer.encode(np.tile(distinct, (3, 1)))
    np.testing.assert_array_equal(together, np.tile(together[:37], (3, 1)))
    for row in range(37):
        np.testing.assert_array_equal(quantizer.encode(distinct[row : row + 1])[0], together[row])


def test_numbers_of_any_size_are_quantized_or_rejected():
    points = clustered(60)
    with pytest.raises(ValueError, match="squares that are infinite"):
        ResidualKMeans((8, 8)).fit(1e19 * points)  # faiss would abort the process
    tiny = ResidualKMeans((8, 8), normalize=True).fit(points)
    np.testing.assert_array_equal(tiny.encode(np.float32(1e-25) * points), tiny.encode(points))
    assert ResidualKMeans((1,), pca_dim=2).fit(points[:1]).encode(points[:1]).tolist() == [[0]]


def test_a_normalizing_quantizer_ignores_the_norm():
    points = clustered(300)
    quantizer = ResidualKMeans((8, 8), normalize=True).fit(points)
    np.testing.assert_array_equal(quantizer.encode(points), quantizer.encode(4 * points))
    assert np.linalg.norm(quantizer.reconstruction_input(points), axis=1) == pytest.approx(1, abs=1e-5)
    assert np.isfinite(quantizer.decode(quantizer.encode(np.zeros((1, 8), np.float32)))).all()


def test_chunks_do_not_change_the_codes(quantizer, monkeypatch):
    points = clustered(300, seed=2)
    whole = quantizer.encode(points)
    monkeypatch.setattr("tokenization.residual_kmeans.BLOCK", 16 * 7)
    np.testing.assert_array_equal(quantizer.encode(points), whole)


def test_nan_is_rejected_with_the_first_row(quantizer):
    points = clustered(100)
    points[[17, 40], 2] = np.nan
    points[99, 0] = np.inf
    for method in (quantizer.encode, ResidualKMeans((4,)).fit):
        with pytest.raises(ValueError, match="NaN or infinity in 3 of 100 rows, the first in row 17"):
            method(points)


def test_invalid_quantizer_input_is_rejected(quantizer):
    with pytest.raises(ValueError, match=r"width 8.*got width 5"):
        quantizer.encode(np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match=r"shape \[N, D\], got float32 \(8,\)"):
        quantizer.encode(np.zeros(8, np.float32))
    with pytest.raises(ValueError, match=r"`embeddings` must be floats.*int64"):
        quantizer.encode(np.zeros((2, 8), np.int64))
    with pytest.raises(ValueError, match=r"as many rows as codes \(16.*got 10"):
        ResidualKMeans((4, 16)).fit(clustered(10))
    with pytest.raises(ValueError, match=r"`codes` must be in \[0, K\)"):
        quantizer.decode(np.array([[0, 16]]))
    for call in (ResidualKMeans().encode, ResidualKMeans().decode):
        with pytest.raises(ValueError, match="Call `fit` first"):
            call(np.zeros((2, 8), np.float32))
    with pytest.raises(ValueError, match="codebook size"):
        ResidualKMeans(())


def test_a_saved_quantizer_encodes_as_before(quantizer, tmp_path):
    quantizer.save(tmp_path)
    loaded = ResidualKMeans.load(tmp_path)
    np.testing.assert_array_equal(loaded.encode(clustered(50)), quantizer.encode(clustered(50)))
    assert loaded.metadata() == quantizer.metadata()


def test_a_truncated_or_missing_file_is_rejected_by_name(quantizer, tmp_path):
    with pytest.raises(ValueError, match=r"semantic_ids\.safetensors must stand beside"):
        ResidualKMeans.load(tmp_path)
    path = quantizer.save(tmp_path)
    for size in (4, path.stat().st_size // 2, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match="truncated or damaged"):
            ResidualKMeans.load(tmp_path)
        quantizer.save(tmp_path)


def test_principal_components_are_part_of_the_quantizer(tmp_path):
    rng = np.random.default_rng(3)
    embeddings = (rng.normal(size=(300, 8)) @ rng.normal(size=(8, 40)) + 5).astype(np.float32)
    quantizer = ResidualKMeans((32, 32, 32), pca_dim=np.int64(8)).fit(embeddings)
    codes = quantizer.encode(embeddings)
    assert quantizer.embedding_dim == 40 and quantizer.codebooks[0].shape == (32, 8)
    error = np.square(quantizer.decode(codes) - embeddings).sum() / np.square(embeddings - embeddings.mean(0)).sum()
    assert error < 0.2, "`decode` returns to the space of the embeddings"
    quantizer.save(tmp_path)
    loaded = ResidualKMeans.load(tmp_path)
    assert (loaded.encode(embeddings) == codes).all() and (loaded.decode(codes) == quantizer.decode(codes)).all()
    with pytest.raises(ValueError, match="pca_dim"):
        ResidualKMeans((4,), pca_dim=41).fit(embeddings)
