"""Test recipes.refresh: newer interactions and new items, without training."""

import pandas as pd
import pytest
import torch
from helpers import train_flags
from transformers import pipeline

from modeling_unigrf import UniGRFForCausalLM
from recipes import train
from recipes.prepare import PrepareArguments, prepare
from recipes.refresh import RefreshArguments, refresh
from tokenization import SemanticIdTokenizer

GENERATOR = torch.Generator().manual_seed(0)
EMBEDDINGS = torch.randn(12, 6, generator=GENERATOR)


def tables(folder, histories, num_items):
    """Write tables of interactions and items, and return their paths."""
    folder.mkdir()
    rows = [
        {"user_id": user, "item_id": f"i{item}", "timestamp": time}
        for user, history in histories.items()
        for time, item in enumerate(history)
    ]
    pd.DataFrame(rows).to_csv(folder / "interactions.csv", index=False)
    items = pd.DataFrame({"item_id": [f"i{item}" for item in range(num_items)]})
    items["embedding"] = EMBEDDINGS[:num_items].tolist()
    items.to_parquet(folder / "items.parquet")
    return {"interactions": str(folder / "interactions.csv"), "items": str(folder / "items.parquet")}


def test_refresh_takes_newer_interactions_and_new_items(tmp_path):
    histories = {f"u{user}": [(user + step) % 10 for step in range(5)] for user in range(12)}
    codes = {"codebook_sizes": [3, 3]}
    prepare(PrepareArguments(**tables(tmp_path / "old", histories, 10), output_dir=str(tmp_path / "data"), **codes))
    flags = train_flags(tmp_path / "data", tmp_path / "run", "--max_items=4", "--max_steps=2")
    checkpoint = train.train(*train.parse(flags))

    newer = {user: [*history, 11] for user, history in histories.items()}
    arguments = PrepareArguments(
        **tables(tmp_path / "new", newer, 12), output_dir=str(tmp_path / "newer"), tokenizer=str(checkpoint)
    )
    prepare(arguments)
    result = refresh(RefreshArguments(str(checkpoint), str(tmp_path / "newer"), str(tmp_path / "fresh")))
    before, after = (UniGRFForCausalLM.from_pretrained(folder) for folder in (checkpoint, result))
    tokenizer = SemanticIdTokenizer.from_pretrained(result)
    assert tokenizer.num_items == after.config.num_items == 12
    counts = after.transitions.item_counts
    assert counts[tokenizer.item_indices(["i11"])[0]] == 12 and counts.sum() == 12 * 6
    assert before.transitions.item_counts.sum() == 12 * 3, "the training interactions"
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(before.state_dict()[name], after.state_dict()[name])
    recommender = pipeline("recommendation", model=str(result), trust_remote_code=True)
    options = {"transition_weight": 100.0, "num_transition_candidates": 12, "num_reasons": 2}
    best = recommender({"items": ["i3", "i4"]}, **options)
    assert best[0]["item_id"] == "i11" and set(best[0]["because"]) <= {"i3", "i4"} and best[0]["because"]
    both = recommender([{"items": ["i3", "i4"]}, {"items": ["i9"]}], batch_size=2, **options)
    assert [item["item_id"] for item in both[0]] == [item["item_id"] for item in best]

    with pytest.raises(ValueError, match="`checkpoint` must be a local folder with"):
        refresh(RefreshArguments(str(tmp_path / "mistyped"), str(tmp_path / "newer"), str(tmp_path / "other")))
    with pytest.raises(ValueError, match="must be new or empty"):
        refresh(RefreshArguments(str(checkpoint), str(tmp_path / "newer"), str(tmp_path / "fresh")))
    flags = train_flags(
        tmp_path / "data", tmp_path / "without", "--max_items=4", "--max_steps=1", "--num_transitions=0"
    )
    without = train.train(*train.parse(flags))
    with pytest.raises(ValueError, match="must have a table of transitions"):
        refresh(RefreshArguments(str(without), str(tmp_path / "newer"), str(tmp_path / "other")))
