"""Similar items and vectors: equal to brute force over the catalog."""

import pytest
import torch
from helpers import build_model, long_histories, random_histories

WALKS = [[(3 * start + step) % 30 for step in range(12)] for start in range(20)] + [[4, 9, 4, 17, 9]]


def build(**options):
    model = build_model(representation_size=5, history_item_representations=True, **options)
    model.set_transitions(WALKS, num_transitions=8)
    return model


@torch.no_grad()
def score(model, by, item, other):
    """Compute the similarity of two items."""
    if by == "transitions":
        history = torch.tensor([[item]])
        settings = model.serving_options(popularity_weight=0.0, content_weight=0.0).transition_settings
        return float(model.transitions.scores(history, None, settings)[0, other]) or -torch.inf
    pair = torch.tensor([item, other])
    vectors = model.scorer.representations(pair) if by == "representation" else model.scorer.content_embeddings(pair)
    return float(torch.cosine_similarity(vectors[0], vectors[1], dim=0))


@pytest.mark.parametrize("by", ["content", "representation", "transitions"])
@pytest.mark.parametrize("in_part", [False, True])
def test_similar_items_equal_brute_force(by, in_part):
    model = build()
    model.generation_config.update(popularity_weight=2.0, content_weight=1.0, allow_custom_entries=True)
    allowed = [4, 5, 6, 9, 17, 20] if in_part else range(30)
    catalog = model.catalog.subset(allowed) if in_part else None
    items, scores = model.similar_items([4, 29, 4], count=7, by=by, catalog=catalog)
    assert items.shape == scores.shape == (3, 7) and items.dtype == torch.long and scores.dtype == torch.float32
    for row, item in enumerate([4, 29, 4]):
        expected = {other: score(model, by, item, other) for other in allowed if other != item}
        best = sorted((value for value in expected.values() if value > -torch.inf), reverse=True)[:7]
        best += [-torch.inf] * (7 - len(best))
        torch.testing.assert_close(scores[row], torch.tensor(best), atol=1e-5, rtol=1e-5)
        for other, value in zip(items[row].tolist(), best, strict=True):
            assert (other == -1) == (value == -torch.inf)
            assert other == -1 or expected[other] == pytest.approx(value, abs=1e-5)
        assert len(set(items[row][items[row] >= 0].tolist())) == int((items[row] >= 0).sum())


@pytest.mark.parametrize("backbone", ["llama", "hstu"])
@pytest.mark.parametrize("retrieved", [0, 3])
def test_dot_products_of_the_vectors_are_dense_scores(backbone, retrieved):
    model = build(backbone=backbone, num_retrieved_items=retrieved)
    input_ids, mask, _ = random_histories(model, [4, 2])
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if backbone == "hstu":
        inputs["timestamps"] = 1000 * torch.arange(input_ids.shape[1]).expand(2, -1)
    longer = long_histories(model, [6, 3]) if retrieved else {}
    if retrieved and backbone == "hstu":
        longer["long_history"]["timestamps"] = torch.zeros(2, 6, dtype=torch.long)
    listed = model.recommend(**inputs, **longer, num_beams=30, num_return_sequences=30, dense_weight=1.0)
    users = model.user_vectors(**inputs)
    items = model.item_representations()
    assert users.shape == (2, 5) and items.shape == (30, 5)
    expected = (users @ items.T).gather(1, listed.item_indices)
    torch.testing.assert_close(listed.dense_scores, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.item_representations([7, 3]), items[[7, 3]])


def test_what_the_model_lacks_is_reported():
    model = build_model(embeddings=False)
    calls = {
        "need a model that has it": lambda: model.similar_items([1], by="representation"),
        "Make a model with num_transitions": lambda: model.similar_items([1], by="transitions"),
        "Make a model with content_embedding_dim": lambda: model.item_representations(),
        "dense-retrieval scores": lambda: model.user_vectors(*random_histories(model, [2])[:2]),
        "`by` must be among": lambda: model.similar_items([1], by="text"),
        "`items` must be indices into a catalog of 30": lambda: build().similar_items([30]),
        "must be a list of item indices": lambda: build().similar_items([1.5]),
        "integers, got torch.int64 of shape": lambda: build().similar_items([[1, 2]]),
        "`count` must be 1 or more": lambda: build().similar_items([1], count=0),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_vectors_that_are_not_finite_are_an_error():
    model = build()
    history = random_histories(model, [2])[:2]
    model.model.language_model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="`user_vectors` must be finite"):
        model.user_vectors(*history)
    model.item_encoder.table.weight.data[7] = torch.inf
    with pytest.raises(ValueError, match="`item_representations` must be finite"):
        model.item_representations()


def test_similarities_that_are_not_finite_are_an_error():
    model = build_model()
    # The representation reads the content, too.
    tensors = {"representation": model.item_encoder.table.weight, "content": model.catalog.content_embeddings}
    for by, rows in tensors.items():
        model.similar_items([1, 2], by=by)
        rows.data[7] = torch.nan
        with pytest.raises(ValueError, match="`scores` must be finite, got NaN or infinity"):
            model.similar_items([1, 2], by=by)
