"""Fixtures of several test files, and the environment of all."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: the tests are offline
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import pytest
from helpers import BACKBONES

from recipes.prepare import PrepareArguments, prepare


@pytest.fixture(params=list(BACKBONES))
def backbone(request):
    return request.param


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """40 users who walk along a ring of 30 items: what comes next can be learned."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    rows = []
    for user in range(40):
        start, length = rng.integers(30), rng.integers(6, 20)
        for step in range(length):
            item = (start + step) % 30
            rows.append((f"u{user}", f"i{item}", step, "like" if item % 2 else "dislike"))
    angles = np.arange(30) / 30 * 2 * np.pi
    embeddings = np.stack([np.cos(angles), np.sin(angles), np.cos(2 * angles), np.sin(3 * angles)], axis=1)
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "behavior"]).to_parquet(
        folder / "interactions.parquet"
    )
    items = {"item_id": [f"i{item}" for item in range(30)], "title": [f"Film {item}" for item in range(30)]}
    pd.DataFrame({**items, "embedding": embeddings.tolist()}).to_parquet(folder / "items.parquet")
    return prepare(
        PrepareArguments(
            interactions=str(folder / "interactions.parquet"),
            items=str(folder / "items.parquet"),
            output_dir=str(folder / "data"),
            codebook_sizes=[8, 8],
        )
    )
