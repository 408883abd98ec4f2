"""Collision tokens and codebook statistics."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenization import assign_collision_tokens, codebook_statistics


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), num_items=st.integers(0, 60), levels=st.integers(1, 4), size=st.integers(1, 5))
def test_suffixes_make_codes_unique_in_the_given_order(seed, num_items, levels, size):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, size, (num_items, levels))
    popularity = rng.integers(0, 4, num_items)
    for order in (None, popularity):
        suffixes = assign_collision_tokens(codes, order)
        groups: dict = {}
        for row in range(num_items):
            groups.setdefault(tuple(codes[row]), []).append(row)
        for rows in groups.values():
            expected = rows if order is None else sorted(rows, key=lambda row: -popularity[row])
            assert [suffixes[row] for row in expected] == list(range(len(rows)))


def test_codes_wider_than_64_bits_get_unique_suffixes():
    codes = np.random.default_rng(0).integers(0, 2, (50, 12)) * (2**20)
    suffixed = np.column_stack([codes, assign_collision_tokens(codes)])
    assert len(np.unique(suffixed, axis=0)) == 50


def test_suffixes_of_invalid_input_are_rejected():
    with pytest.raises(ValueError, match=r"shape \[N, L\]"):
        assign_collision_tokens(np.zeros(3, int))
    with pytest.raises(ValueError, match="0 or larger, got -1"):
        assign_collision_tokens(np.array([[-1]]))
    with pytest.raises(ValueError, match="2 numbers without NaN"):
        assign_collision_tokens(np.zeros((2, 1), int), np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match="2 numbers without NaN"):
        assign_collision_tokens(np.zeros((2, 1), int), np.zeros(3))


def test_codebook_statistics_equal_their_definitions():
    codes = np.array([[0, 0], [0, 0], [1, 2], [1, 3]])
    embeddings = np.array([[0.0], [2.0], [4.0], [6.0]])
    statistics = codebook_statistics(codes, (2, 8), embeddings, embeddings + 1)
    assert (statistics.num_items, statistics.collision_rate, statistics.largest_group) == (4, 0.5, 2)
    assert statistics.utilization == (1.0, 3 / 8)
    assert statistics.entropy == pytest.approx((1.0, 1.5))
    assert statistics.perplexity == pytest.approx((2 / 2, 2**1.5 / 4))
    assert statistics.reconstruction_error == pytest.approx(4 / 20)
    assert statistics.to_dict()["utilization"] == [1.0, 3 / 8]
    assert "50.0%" in str(statistics) and "0.2000" in str(statistics)


@pytest.mark.parametrize(
    "column",
    [np.zeros(1000, int), np.arange(1000) % 20, np.where(np.arange(1000) < 990, 0, np.arange(1000) % 200)],
    ids=["single", "20-of-256", "99-percent"],
)
def test_a_collapsed_codebook_warns_with_its_level(column):
    healthy = np.arange(1000) % 256
    with pytest.warns(UserWarning, match="COLLAPSED CODEBOOK: level 1 uses"):
        codebook_statistics(np.column_stack([healthy, column]), (256, 256))


@pytest.mark.parametrize("num_items", [1, 3, 20, 300, 5000])
def test_random_codes_of_any_number_of_items_do_not_warn(num_items):
    codes = np.random.default_rng(0).integers(0, 256, (num_items, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codebook_statistics(codes, (256, 256, 256))


def test_codebook_statistics_reject_mismatched_input():
    with pytest.raises(ValueError, match="below the codebook sizes"):
        codebook_statistics(np.array([[4]]), (4,))
    with pytest.raises(ValueError, match="must both be set or both be None"):
        codebook_statistics(np.array([[0]]), (4,), np.zeros((1, 2)))
    with pytest.raises(ValueError, match="one shape"):
        codebook_statistics(np.array([[0]]), (4,), np.zeros((1, 2)), np.zeros((2, 2)))
