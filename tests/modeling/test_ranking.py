"""Ranking: candidates see the history and themselves, on any cache, which is rolled back."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from helpers import build_model, exact_scores, prefilled_cache, random_histories, rank_alone
from transformers.cache_utils import DynamicCache


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rank_equals_each_candidate_alone(backbone, attention):
    model = build_model(backbone)
    if backbone == "hstu" and attention == "sdpa":
        pytest.skip("HSTU has an attention of its own")
    model.set_attn_implementation(attention)
    input_ids, mask, _ = random_histories(model, [4, 2, 1])
    candidates = torch.stack([torch.randperm(30)[:11] for _ in range(3)])
    expected = rank_alone(model, input_ids, mask, candidates)
    for pack in (1, 4, 32):
        actual = model.rank(input_ids, mask, candidates, candidates_per_pack=pack)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_rank_on_a_cache_equals_rank_without_and_keeps_the_cache(backbone):
    model = build_model(backbone)
    input_ids, mask, _ = random_histories(model, [4, 2])
    candidates = torch.tensor([[0, 5, 9], [29, 1, 2]])
    cache = prefilled_cache(model, input_ids, mask)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    on_cache = model.rank(input_ids, mask, candidates, cache=cache)
    torch.testing.assert_close(on_cache, model.rank(input_ids, mask, candidates), atol=2e-5, rtol=1e-4)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    arguments = {"attention_mask": mask, "num_beams": 6, "num_return_sequences": 6}
    after = model.generate(input_ids, cache=cache, **arguments)
    assert torch.equal(after, model.generate(input_ids, **arguments))
    again = model.rank(input_ids, mask, candidates, cache=cache)
    torch.testing.assert_close(again, on_cache, atol=2e-5, rtol=1e-4)


CALLS = {
    "recommend": lambda model, cache, **inputs: model.recommend(**inputs, cache=cache),
    "rank": lambda model, cache, **inputs: model.rank(**inputs, candidates=torch.tensor([[1], [2]]), cache=cache),
    "prefill": lambda model, cache, **inputs: model.prefill(**inputs, cache=cache),
    "beams": lambda model, cache, **inputs: model.generate(**inputs, cache=cache, num_beams=3),
    "greedy": lambda model, cache, **inputs: model.generate(**inputs, cache=cache, num_beams=1),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
@pytest.mark.parametrize("backbone_", ["llama", "hstu"])
def test_a_cache_of_other_tokens_is_rejected(backbone_, call):
    model = build_model(backbone_)
    input_ids, mask, _ = random_histories(model, [4, 2])
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if backbone_ == "hstu":
        inputs |= {"timestamps": torch.arange(100, 100 + input_ids.shape[1]).expand_as(input_ids)}
    others = [{**inputs, "input_ids": input_ids.flip(0), "attention_mask": mask.flip(0)}]
    # The window has moved by an item, which the same user took once more.
    moved = torch.cat([input_ids[:, :1], input_ids[:, 6:], input_ids[:, -5:]], dim=1)
    others.append({**inputs, "input_ids": moved, "attention_mask": torch.ones_like(moved)})
    if backbone_ == "hstu":
        others.append({**inputs, "timestamps": inputs["timestamps"] - 50})
    for other in others:
        cache = DynamicCache()
        model.prefill(**inputs, cache=cache)
        with pytest.raises(ValueError, match=r"`cache` must hold the first tokens of .* or a new `DynamicCache"):
            call(model, cache, **other)
        call(model, deepcopy(cache), **inputs)
    cache.token_columns = None
    with pytest.raises(ValueError, match="got tokens without a record"):
        call(model, cache, **inputs)


def test_the_cache_is_rolled_back_when_a_call_fails(monkeypatch):
    model = build_model()
    input_ids, mask, _ = random_histories(model, [4, 2])
    cache = prefilled_cache(model, input_ids, mask)
    part = prefilled_cache(model, input_ids[:, :6], mask[:, :6])
    # The first layer has already written to the cache.
    monkeypatch.setattr(model.model.language_model.layers[1], "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.rank(input_ids, mask, torch.tensor([[0], [1]]), cache=cache)
    for prefix_cache in (part, DynamicCache()):
        before = prefix_cache.get_seq_length()
        with pytest.raises(ZeroDivisionError):
            model.recommend(input_ids, mask, cache=prefix_cache)
        assert {layer.get_seq_length() for layer in prefix_cache.layers} == {before}
    assert [layer.get_seq_length() for layer in cache.layers] == [input_ids.shape[1]] * 2


def test_recommend_fuses_generation_and_ranking_of_every_item(backbone):
    model = build_model(backbone)
    input_ids, mask, _ = random_histories(model, [4, 2, 1])
    log_probs = exact_scores(model, input_ids, mask)
    everything = torch.arange(30).expand(3, -1)
    for target, weight in (("next", 1.0), ("like", 0.3)):
        index = model.config.ranking_targets.index(target)
        ranks = torch.nn.functional.logsigmoid(model.rank(input_ids, mask, everything)[..., index])
        expected = (log_probs + weight * ranks).sort(dim=1, descending=True)
        best = model.recommend(
            input_ids, mask, num_beams=30, num_return_sequences=30, ranking_weight=weight, ranking_target=target
        )
        torch.testing.assert_close(best.scores, expected.values, atol=3e-5, rtol=1e-4)
        assert torch.equal(best.item_indices, expected.indices)
        torch.testing.assert_close(
            best.generation_scores, log_probs.gather(1, best.item_indices), atol=2e-5, rtol=1e-4
        )
        torch.testing.assert_close(best.ranking_scores, ranks.gather(1, best.item_indices), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8),
    ],
    ids=["bfloat16", "int8"],
)
def test_recommend_in_fewer_bits_agrees_with_float32(convert):
    model = build_model(num_items=60, embeddings=True)
    input_ids, mask, _ = random_histories(model, [6, 3, 2, 1])
    exact = model.recommend(input_ids, mask, num_beams=60, num_return_sequences=60)
    rough = convert(model).recommend(input_ids, mask, num_beams=60, num_return_sequences=60)
    by_item = [
        scores[items.argsort()]
        for items, scores in ((exact.item_indices, exact.scores), (rough.item_indices, rough.scores))
        for items, scores in zip(items, scores, strict=True)
    ]
    for first, second in zip(by_item[:4], by_item[4:], strict=True):
        assert torch.corrcoef(torch.stack([first, second.float()]))[0, 1] > 0.99


def test_the_dense_score_is_part_of_the_ranking_or_separate():
    together, apart = (build_model(rank_by_dense_score=part, dense_loss_weight=1.0) for part in (True, False))
    input_ids, mask, _ = random_histories(together, [4, 2])
    everything = {"num_beams": 30, "num_return_sequences": 30, "ranking_weight": 0.0, "ranking_target": "next"}
    items = torch.arange(30).expand(2, -1)
    difference = together.rank(input_ids, mask, items) - apart.rank(input_ids, mask, items)
    best = apart.recommend(input_ids, mask, **everything)
    expected = torch.zeros(2, 30).scatter(1, best.item_indices, best.dense_scores)
    torch.testing.assert_close(difference[..., 0], expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(difference[..., 1:], torch.zeros(2, 30, 2), atol=2e-5, rtol=0)


@pytest.mark.parametrize("detach", [False, True])
def test_ranking_trains_the_dense_score_unless_it_is_detached(detach):
    fields = {"stop_gradient_dense_score": detach, "dense_loss_weight": 1.0, "negatives_per_item": 1.0}
    gradients = []
    losses = []
    for weight in (1.0, 2.0):
        model = build_model(ranking_loss_weight=weight, **fields).train()
        input_ids, mask, _ = random_histories(model, [4, 2])
        torch.manual_seed(0)  # the same negatives
        out = model(input_ids, mask, labels=input_ids)
        out.loss.backward()
        gradients.append(model.ranking_head.history_query.weight.grad)
        losses.append(out.ranking_loss)
    torch.testing.assert_close(*losses)
    assert torch.equal(*gradients) == detach and gradients[0].any(), "the dense loss trains it in any case"


def test_candidates_and_caches_that_do_not_fit_are_rejected():
    model = build_model()
    input_ids, mask, _ = random_histories(model, [3, 2])
    with pytest.raises(ValueError, match="one row a history"):
        model.rank(input_ids, mask, torch.tensor([[1]]))
    with pytest.raises(ValueError, match="one row a history"):
        model.rank(input_ids, mask)
    with pytest.raises(ValueError, match="`candidates` must be integers of shape"):
        model.rank(input_ids, mask, torch.tensor([[1.0], [2.0]]))
    with pytest.raises(ValueError, match="`candidates` must be integers of shape"):
        model.rank(input_ids, mask, torch.tensor([[True], [True]]))
    for outside in (30, -1):
        with pytest.raises(ValueError, match=f"a catalog of 30 items, got {min(1, outside)} to {max(1, outside)}"):
            model.rank(input_ids, mask, torch.tensor([[1], [outside]]))
    with pytest.raises(ValueError, match="`cache` must hold the 16 tokens of input_ids, got 11"):
        model.rank(
            input_ids, mask, torch.tensor([[1], [3]]), cache=prefilled_cache(model, input_ids[:, :-5], mask[:, :-5])
        )
    with pytest.raises(ValueError, match=r"`ranking_target` must be among .* got 'share'"):
        model.recommend(input_ids, mask, ranking_target="share")
    with pytest.raises(
        ValueError, match=r"`num_return_sequences` must be from 1 to num_beams .* num_return_sequences=4, num_beams=3"
    ):
        model.recommend(input_ids, mask, num_beams=3, num_return_sequences=4)
    with pytest.raises(ValueError, match=r"`num_return_sequences` must be from 1 to num_beams .* num_beams=0"):
        model.recommend(input_ids, mask, num_beams=0, num_dense_candidates=5, num_return_sequences=4)
    with pytest.raises(ValueError, match="neither of them 0"):
        model.recommend(input_ids[:0], mask[:0])
    assert model.rank(input_ids, mask, torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 3)


# A row of the weights, and the calls that read it.
ROWS = {
    "lm_head.weight": (7, "recommend generate"),
    "model.language_model.layers.1.mlp.down_proj.weight": (7, "recommend generate rank"),
    "item_encoder.table.weight": (7, "recommend rank"),
    "ranking_head.out_proj.bias": (0, "recommend rank"),
    "ranking_head.history_query.bias": (7, "recommend rank"),
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sizes", [(4, 3, 3, 2), (4096,)], ids=["levels", "atomic"])
@pytest.mark.parametrize("name", ROWS)
def test_scores_that_are_not_finite_end_a_call(name, sizes, value):
    model = build_model(codebook_sizes=sizes, num_items=50)
    input_ids, mask, _ = random_histories(model, [3, 2])
    row, calls = ROWS[name]
    model.get_parameter(name).data[row] = value
    message = "must be finite, got NaN or infinity"
    with pytest.raises(ValueError, match=message):
        model.recommend(input_ids, mask, num_dense_candidates=50)
    if "generate" in calls:
        for options in (
            {"num_beams": 1},
            {"num_beams": 1, "do_sample": True},
            {"num_beams": 4},
            {"output_logits": True},
        ):
            with pytest.raises(ValueError, match=message):
                model.generate(input_ids, attention_mask=mask, **{"num_beams": 3, **options})
    if "rank" in calls:
        with pytest.raises(ValueError, match=message):
            model.rank(input_ids, mask, torch.tensor([[7], [7]]))


def test_a_diverse_list_equals_the_greedy_choice():
    model = build_model(num_items=60)
    embeddings = model.catalog.content_embeddings.clone()
    embeddings[:20] = embeddings[0]  # twins
    model.set_catalog(model.catalog.item_codes, embeddings)
    model.item_encoder.table = None
    input_ids, mask, _ = random_histories(model, [4, 0, 2])
    allowed = [list(range(60)), list(range(60)), [1, 2]]
    options = {"num_beams": 60, "num_return_sequences": 12, "allowed_items": allowed, "exclude_history": False}
    every = model.recommend(input_ids, mask, **options | {"num_return_sequences": 60})
    best = model.recommend(input_ids, mask, diversity=1.5, **options)
    directions = torch.nn.functional.normalize(model.item_representations().float(), dim=1)
    for row in range(3):
        scores = dict(zip(every.item_indices[row].tolist(), every.scores[row].tolist(), strict=True))
        scores.pop(-1, None)
        price = 1.5 * np.std([*scores.values()])
        listed: list[int] = []
        while scores and len(listed) < 12:
            likeness = {item: max([0.0, *(directions[item] @ directions[listed].T).tolist()]) for item in scores}
            listed.append(max(scores, key=lambda item: scores[item] - price * likeness[item]))
            assert best.scores[row, len(listed) - 1].item() == pytest.approx(scores.pop(listed[-1]), abs=1e-5)
        assert best.item_indices[row].tolist() == listed + [-1] * (12 - len(listed))
    assert torch.isinf(best.scores[2, 2:]).all() and torch.isinf(best.generation_scores[2, 2:]).all()
    assert torch.equal(model.recommend(input_ids, mask, diversity=0.0, **options).scores, every.scores[:, :12])
    model.config.content_embedding_dim = model.config.embedding_table_size = 0
    with pytest.raises(ValueError, match="`diversity` must be 0 for a model without item representations"):
        model.serving_options(diversity=1.0)


def test_a_popularity_correction_subtracts_log_interactions():
    model = build_model()
    input_ids, mask, _ = random_histories(model, [4, 2])
    model.set_transitions([[1, 2, 3], [1, 2], [1]])
    options = {"num_beams": 30, "num_return_sequences": 30, "exclude_history": False}
    plain, corrected = (
        model.recommend(input_ids, mask, popularity_correction=weight, **options) for weight in (0.0, 2.0)
    )
    counts = torch.full((30,), 0.5).index_put((torch.tensor([1, 2, 3]),), torch.tensor([3.0, 2.0, 1.0]))
    expected = torch.empty(2, 30).scatter_(1, plain.item_indices, plain.scores) - 2 * counts.log()
    torch.testing.assert_close(torch.empty(2, 30).scatter_(1, corrected.item_indices, corrected.scores), expected)
    with pytest.raises(ValueError, match="`popularity_correction` must be 0 for a model without transitions"):
        build_model().recommend(input_ids, mask, popularity_correction=1.0)


def test_an_overflow_of_float16_ends_a_call():
    model = build_model().half()
    input_ids, mask, _ = random_histories(model, [3, 2])
    model.recommend(input_ids, mask)
    model.ranking_head.history_query.weight.data *= 6e4
    with pytest.raises(ValueError, match="load the model in bfloat16 or float32"):
        model.recommend(input_ids, mask)


@pytest.mark.parametrize(
    "name",
    [
        "generation_weight",
        "ranking_weight",
        "dense_weight",
        "transition_weight",
        "content_weight",
        "new_item_bonus",
        "popularity_correction",
        "diversity",
    ],
)
@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), "1", True])
def test_weights_of_scores_are_finite_and_not_negative(name, value):
    model = build_model()
    model.set_transitions([[1, 2, 3]])
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number from 0, got {value!r}"):
        model.serving_options(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("popularity_weight", float("nan")),
        ("history_decay", float("nan")),
        ("history_decay", 1.5),
        ("transition_smoothing", 0.0),
        ("transition_smoothing", float("inf")),
        ("num_beams", 2.5),
        ("rerank_top_k", "3"),
        ("max_items", 1.5),
    ],
)
def test_serving_numbers_out_of_range_are_rejected(name, value):
    with pytest.raises(ValueError, match=f"`{name}` .*must be|must be .*`{name}`|`{name}` positive"):
        build_model().serving_options(**{name: value})


def test_added_items_are_generated_and_old_scores_stay():
    model = build_model(codebook_sizes=(4, 3, 3, 3), num_items=20)
    input_ids, mask, _ = random_histories(model, [4, 2])
    old = exact_scores(model, input_ids, mask)
    known = {tuple(code) for code in model.catalog.item_codes.tolist()}
    free = [c for c in torch.cartesian_prod(*map(torch.arange, (4, 3, 3, 3))).tolist() if tuple(c) not in known][:3]
    with pytest.raises(ValueError, match="`item_codes` must be unique"):
        model.add_items(torch.tensor([free[0], free[0]]), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="NaN"):
        model.add_items(torch.tensor(free), torch.full((3, 6), torch.nan))
    assert model.catalog.num_items == model.config.num_items == 20, "a rejected addition changes nothing"
    model.add_items(np.array(free), np.random.default_rng(0).normal(size=(3, 6)).astype("float32"))
    assert model.config.num_items == 23
    torch.testing.assert_close(exact_scores(model, input_ids, mask)[:, :20], old)
    best = model.recommend(input_ids, mask, num_beams=23, num_return_sequences=23)
    assert all({20, 21, 22} <= set(row) for row in best.item_indices.tolist())


def test_the_sampling_bias_follows_the_number_of_items():
    model = build_model(num_items=20, next_logit_bias=np.log(19 / 2.0))
    input_ids, mask, _ = random_histories(model, [4, 2])
    old = model.rank(input_ids, mask, torch.tensor([[0], [5]]))
    known = {tuple(code) for code in model.catalog.item_codes.tolist()}
    free = [c for c in torch.cartesian_prod(*map(torch.arange, (4, 3, 3, 2))).tolist() if tuple(c) not in known][:3]
    model.add_items(torch.tensor(free), torch.randn(3, 6))
    assert model.config.next_logit_bias == pytest.approx(np.log(22 / 2.0))
    shift = torch.tensor([np.log(22 / 19), 0.0, 0.0], dtype=torch.float32)
    torch.testing.assert_close(model.rank(input_ids, mask, torch.tensor([[0], [5]])), old - shift)


@pytest.mark.parametrize("tied", [False, True])
def test_the_last_codebook_grows_when_a_group_outgrows_it(tied, tmp_path):
    model = build_model(codebook_sizes=(4, 3, 2), num_items=12, tie_word_embeddings=tied)
    input_ids, mask, _ = random_histories(model, [4, 2])
    code = model.catalog.item_codes[0].tolist()
    level = model.layout.level_slices[2]

    def learned_rows():
        return model.get_input_embeddings().weight, model.lm_head.weight, model.item_encoder.table.weight

    means = [rows[part].mean(dim=0) for rows, part in zip(learned_rows(), (level, level, slice(None)), strict=True)]
    model.add_items(torch.tensor([[*code[:2], 3], [*code[:2], 2]]), torch.randn(2, 6))
    for rows, mean in zip(learned_rows(), means, strict=True):
        torch.testing.assert_close(rows[-2:], mean.expand(2, -1))
    assert model.config.codebook_sizes == [4, 3, 4]
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == model.lm_head.out_features
    best = model.recommend(input_ids, mask, num_beams=14, num_return_sequences=14)
    assert all(sorted(row) == list(range(14)) for row in best.item_indices.tolist())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.recommend(input_ids, mask, num_beams=14).scores, best.scores[:, :10])


def test_duplicate_and_impossible_codes_are_rejected():
    model = build_model()
    codes = model.catalog.item_codes.clone()
    before = codes.clone()
    codes[3] = codes[7]
    with pytest.raises(ValueError, match=r"`item_codes` must be unique, got .* for both items 3 and 7"):
        model.set_catalog(codes, torch.zeros(30, 6))
    with pytest.raises(ValueError, match="`item_codes` must lie in codebooks"):
        model.set_catalog(before + 3, torch.zeros(30, 6))
    with pytest.raises(ValueError, match="`item_codes` must be integers of shape"):
        model.set_catalog(before[:, :3], torch.zeros(30, 6))
    with pytest.raises(ValueError, match=r"content_embedding_dim=6 columns .* got none"):
        model.set_catalog(before)
    assert torch.equal(model.catalog.item_codes, before)


def test_a_catalog_loaded_from_a_state_dict_takes_effect():
    model = build_model()
    before = model.catalog.item_codes.clone()
    items = torch.arange(30)
    assert torch.equal(model.catalog.trie.lookup(before), items)
    model.load_state_dict({**model.state_dict(), "catalog.item_codes": before.flip(0)})
    assert torch.equal(model.catalog.trie.lookup(before), items.flip(0))
