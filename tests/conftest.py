"""Fixtures of several test files, and the environment variables of all."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # set before transformers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import BACKBONES

from modeling_unigrf import RecommendationPipeline, UniGRFConfig, UniGRFForCausalLM
from recipes.prepare import PrepareArguments, prepare
from tokenization import ResidualKMeans, SemanticIdTokenizer


@pytest.fixture(params=list(BACKBONES))
def backbone(request):
    """The name of each backbone in turn."""
    return request.param


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Prepared data of 40 users who walk along a ring of 30 items, so that the next item can be learned."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    rows = []
    for user in range(40):
        start = rng.integers(30)
        length = rng.integers(6, 20)
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


@pytest.fixture(scope="module")
def recommender():
    """A pipeline with a random model over 60 items, `007` and `film 1` to `film 59`."""
    embeddings = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    tokenizer = SemanticIdTokenizer.from_embeddings(
        ["007", *(f"film {i}" for i in range(1, 60))],
        embeddings,
        ResidualKMeans((4, 4)).fit(embeddings),
        ["dislike", "like"],
        titles=["Amélie “007”", *(f"Title {i}" for i in range(1, 60))],
        provenance={"encoder": "some/encoder", "text_template": "{title}. {genres}", "inputs": {"items": "c0ffee"}},
    )
    torch.manual_seed(0)
    text_config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    model = UniGRFForCausalLM(
        UniGRFConfig(**tokenizer.config_fields(), text_config=text_config, content_embedding_dim=6)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))  # large: no two scores are nearly equal
    model.set_catalog(torch.from_numpy(tokenizer.item_codes.copy()), torch.from_numpy(embeddings))
    return RecommendationPipeline(model=model.eval(), tokenizer=tokenizer)
