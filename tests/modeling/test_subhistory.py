"""Sub-histories: their retrieval from a long history, and candidates that are ranked with them."""

import json

import numpy as np
import pytest
import torch
from helpers import (
    build_model,
    exact_scores,
    long_histories,
    prefilled_cache,
    random_histories,
    rank_alone,
    retrieve_by_sorting,
    run_elsewhere,
    short_id,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM, candidates_unigrf, scoring_unigrf
from modeling_unigrf.candidates_unigrf import retrieve


@settings(max_examples=60, deadline=None)
@given(items=st.lists(st.integers(-1, 8), max_size=30), count=st.integers(1, 40), seed=st.integers(0, 1000))
def test_the_sub_history_equals_a_full_sort(items, count, seed):
    embeddings = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed))
    candidates = torch.tensor([[0, 3, 8], [5, 5, 1]])
    both = torch.tensor([items, items[::-1]], dtype=torch.long)
    actual = retrieve(embeddings, both, candidates, count)
    assert actual.shape == (2, 3, min(count, len(items)))
    for row in range(2):
        for column, candidate in enumerate(candidates[row].tolist()):
            expected = retrieve_by_sorting(embeddings, both[row].tolist(), candidate, count)
            places = actual[row, column].tolist()
            assert places == [-1] * (len(places) - len(expected)) + expected


@pytest.mark.parametrize("at_once", [1, 64, 3000])
def test_the_sub_history_is_the_same_in_chunks(at_once, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(50, 6, generator=generator)
    items = torch.randint(-1, 50, (4, 700), generator=generator)
    candidates = torch.randint(50, (4, 9), generator=generator)
    expected = retrieve(embeddings, items, candidates, 12)
    monkeypatch.setattr(candidates_unigrf, "MAX_SIMILARITIES", at_once)
    assert torch.equal(retrieve(embeddings, items, candidates, 12), expected)


def test_ties_in_cosine_are_won_by_the_latest_items():
    items = torch.tensor([[3, 1, 2, 3, -1, 0, 3]])
    assert retrieve(torch.zeros(4, 5), items, torch.tensor([[2]]), 3).tolist() == [[[3, 5, 6]]]
    distinct = torch.eye(4)
    assert retrieve(distinct, items, torch.tensor([[3]]), 2).tolist() == [[[3, 6]]]


@pytest.mark.parametrize("length", [1001, 1197, 1200])
def test_of_equal_embeddings_the_latest_item_is_retrieved(length):
    generator = torch.Generator().manual_seed(length)
    embeddings = torch.randn(600, 128, generator=generator).repeat(2, 1)  # items i and 600 + i
    items = torch.randperm(1200, generator=generator)[None, :length]
    candidates = torch.arange(600)[None]
    same = items % 600 == candidates[0, :, None]
    latest = torch.where(same, torch.arange(length), -1).amax(dim=1)
    actual = retrieve(embeddings, items, candidates, 1)[0, :, 0]
    assert torch.equal(actual[latest >= 0], latest[latest >= 0])


def test_retrieval_does_not_depend_on_autocast():
    embeddings = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    items = torch.arange(200)[None]
    candidates = torch.arange(50)[None]
    with torch.autocast("cpu", torch.bfloat16):
        actual = retrieve(embeddings, items, candidates, 10)
    assert torch.equal(actual, retrieve(embeddings, items, candidates, 10))


def test_int8_content_embeddings_rank_as_the_floats_they_encode(tmp_path):
    model = build_model(num_retrieved_items=3)
    whole = torch.randint(-127, 128, (30, 6), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    model.set_catalog(model.catalog.item_codes, whole / 127)
    small = UniGRFForCausalLM(UniGRFConfig(**{**model.config.to_dict(), "int8_content_embeddings": True})).eval()
    small.load_state_dict({**model.state_dict(), "catalog.content_embeddings": whole})
    file = tmp_path / "embeddings.npy"
    np.save(file, whole.numpy())
    small.set_catalog(model.catalog.item_codes, torch.from_numpy(np.load(file, mmap_mode="c")))
    small.save_pretrained(tmp_path)
    loaded = UniGRFForCausalLM.from_pretrained(tmp_path)
    assert loaded.catalog.content_embeddings.dtype == torch.int8
    input_ids, mask, _ = random_histories(model, [4, 2, 0])
    longer = long_histories(model, [12, 2, 0])
    candidates = torch.arange(15).view(3, 5)
    expected = model.rank(input_ids, mask, candidates, **longer)
    for variant in (small, loaded):
        torch.testing.assert_close(variant.rank(input_ids, mask, candidates, **longer), expected, atol=1e-5, rtol=1e-4)
    loaded.add_items(torch.tensor([[0, 0, 0, 2]]), whole[:1])
    assert loaded.catalog.content_embeddings.dtype == torch.int8 and loaded.catalog.num_items == 31
    for variant, wrong in ((small, whole / 127), (model, whole)):
        with pytest.raises(ValueError, match=r"int8_content_embeddings.*An int8 of 127 stands for 1\.0"):
            variant.set_catalog(model.catalog.item_codes, wrong)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rank_with_sub_histories_equals_each_candidate_alone(backbone, attention):
    model = build_model(backbone, num_retrieved_items=3)
    if backbone == "hstu" and attention == "sdpa":
        pytest.skip("HSTU has an attention of its own")
    model.set_attn_implementation(attention)
    input_ids, mask, _ = random_histories(model, [4, 2, 0])
    longer = long_histories(model, [12, 2, 0])
    candidates = torch.stack([torch.randperm(30)[:5] for _ in range(3)])
    expected = rank_alone(model, input_ids, mask, candidates, **longer)
    for pack in (2, 32):
        actual = model.rank(input_ids, mask, candidates.int(), candidates_per_pack=pack, **longer)
        torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)
    cache = prefilled_cache(model, input_ids, mask)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    actual = model.rank(input_ids, mask, candidates, cache=cache, **longer)
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


@pytest.mark.parametrize("retrieved", [0, 3])
def test_rank_and_recommend_go_on_after_a_prefill(backbone, retrieved):
    model = build_model(backbone, num_retrieved_items=retrieved)
    input_ids, mask, _ = random_histories(model, [4, 2])
    longer = long_histories(model, [12, 2]) if retrieved else {}
    candidates = torch.tensor([[1, 2, 3], [4, 5, 6]])
    cache = DynamicCache()
    history_states = model.prefill(input_ids, mask, cache=cache)
    for states in (history_states, None):
        actual = model.rank(input_ids, mask, candidates, cache=cache, history_states=states, **longer)
        torch.testing.assert_close(actual, model.rank(input_ids, mask, candidates, **longer), atol=3e-5, rtol=1e-4)
    again = model.prefill(input_ids, mask, cache=cache)
    torch.testing.assert_close(again, history_states, atol=3e-5, rtol=1e-4)
    assert cache.get_seq_length() == input_ids.shape[1]
    actual = model.recommend(input_ids, mask, cache=cache, **longer)
    torch.testing.assert_close(actual.scores, model.recommend(input_ids, mask, **longer).scores, atol=3e-5, rtol=1e-4)


def test_retrieved_items_have_their_own_times():
    model = build_model("hstu", num_retrieved_items=3)
    input_ids, mask, _ = random_histories(model, [4, 2, 0])
    longer = long_histories(model, [12, 2, 0])
    generator = torch.Generator().manual_seed(7)
    before = torch.randint(1, 10**6, longer["long_history"]["items"].shape, generator=generator).sort(dim=1).values
    before[0, 3] = -1
    times = 10**6 + torch.randint(1, 10**5, input_ids.shape, generator=generator).sort(dim=1).values
    query_time = times[:, -1] + torch.tensor([5, 5000, 50_000])
    candidates = torch.stack([torch.randperm(30, generator=generator)[:5] for _ in range(3)])

    def at(long_times):
        return {"long_history": {**longer["long_history"], "timestamps": long_times}}

    expected = rank_alone(model, input_ids, mask, candidates, **at(before), times=(times, query_time))
    inputs = {"timestamps": times, "query_time": query_time}
    for pack in (2, 32):
        actual = model.rank(input_ids, mask, candidates, candidates_per_pack=pack, **at(before), **inputs)
        torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)
    unknown = model.rank(input_ids, mask, candidates, **longer, **inputs)
    assert not torch.allclose(unknown[0], expected[0]), "times of long histories are read"
    all_unknown = model.rank(input_ids, mask, candidates, **at(torch.full_like(before, -1)), **inputs)
    assert torch.equal(all_unknown, unknown)
    options = {"num_beams": 30, "num_return_sequences": 30, "ranking_weight": 0.0}
    best = model.recommend(input_ids, mask, **at(before), **inputs, **options)
    ranked = model.rank(input_ids, mask, best.item_indices, **at(before), **inputs)[..., 0]
    torch.testing.assert_close(best.ranking_scores, torch.nn.functional.logsigmoid(ranked), atol=3e-5, rtol=1e-4)
    for wrong, rest in ((before[:, 1:], inputs), (before.float(), inputs), (before, {})):
        with pytest.raises(ValueError, match=r"`long_history\['timestamps'\]` must be integers of shape"):
            model.rank(input_ids, mask, candidates, **at(wrong), **rest)


def test_recommend_ranks_its_beams_as_rank_does(backbone):
    model = build_model(backbone, num_retrieved_items=3)
    input_ids, mask, _ = random_histories(model, [4, 2])
    longer = long_histories(model, [12, 2])
    best = model.recommend(input_ids, mask, num_beams=9, num_return_sequences=9, ranking_weight=0.7, **longer)
    ranks = torch.nn.functional.logsigmoid(model.rank(input_ids, mask, best.item_indices, **longer)[..., 0])
    torch.testing.assert_close(best.ranking_scores, ranks, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(best.scores, best.generation_scores + 0.7 * ranks, atol=3e-5, rtol=1e-4)
    plain = model.generate(input_ids, attention_mask=mask, num_beams=9, num_return_sequences=9)
    items = model.catalog.trie.lookup(model.layout.read_histories(plain[:, -4:])[2])
    beams = [set(row) for row in items.view(2, 9).tolist()]
    assert [set(row) for row in best.item_indices.tolist()] == beams, "sub-histories do not change the generation"


def test_padding_and_unknown_items_do_not_change_the_ranking():
    model = build_model(num_retrieved_items=20)
    input_ids, mask, _ = random_histories(model, [3])
    candidates = torch.tensor([[4, 7, 21]])
    items = torch.tensor([[2, 4, 2, 9]])
    behaviors = torch.tensor([[0, 1, 1, 0]])

    def rank(items, behaviors):
        return model.rank(input_ids, mask, candidates, long_history={"items": items, "behaviors": behaviors})

    expected = rank(items, behaviors)
    for spread in ([-1, -1, 2, 4, 2, 9], [2, -1, 4, 2, -1, 9, -1], [2, 4, 2, 9, *[-1] * 40]):
        with_gaps = torch.tensor([spread])
        matching = torch.full_like(with_gaps, -1)  # the behavior of a missing item is ignored
        matching[with_gaps >= 0] = behaviors[0]
        torch.testing.assert_close(rank(with_gaps, matching), expected, atol=2e-5, rtol=1e-4)
    without = rank(items[:, :0], behaviors[:, :0])
    only_unknown = rank(torch.tensor([[-1]]), torch.tensor([[0]]))
    torch.testing.assert_close(without, only_unknown, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(without, expected)


def test_histories_of_ten_thousand_items_train_and_serve():
    model = build_model(num_retrieved_items=8, num_train_beams=4)
    input_ids, mask, _ = random_histories(model, [4, 2])
    longer = long_histories(model, [10_000, 9_000])
    best = model.recommend(input_ids, mask, num_beams=30, **longer)
    assert best.scores.isfinite().all()
    out = model.train()(input_ids, mask, labels=input_ids.masked_fill(mask == 0, -100), **longer)
    out.loss.backward()
    assert out.loss.isfinite() and model.candidate_block.segments.weight.grad.abs().sum() > 0


BAD_LONG_HISTORIES = [
    (None, None, r"`long_history\['items'\]` must be integers of shape"),
    ([[1, 2]], [[0, 0]], r"`long_history\['items'\]` must be integers of shape"),
    ([[1.0], [2.0]], [[0], [0]], r"`long_history\['items'\]` must be integers of shape"),
    ([[True], [False]], [[0], [0]], r"`long_history\['items'\]` must be integers of shape"),
    ([1, 2], [0, 0], r"`long_history\['items'\]` must be integers of shape"),
    ([[30], [2]], [[0], [0]], "indices into a catalog of 30 items"),
    ([[-2], [2]], [[0], [0]], "indices into a catalog of 30 items"),
    ([[1], [2]], None, r"`long_history\['behaviors'\]` must be integers of shape"),
    ([[1], [2]], [[0, 1], [0, 1]], r"`long_history\['behaviors'\]` must be integers of shape"),
    ([[1], [2]], [[0], [2]], "indices into .* got 2 in row 1"),
    ([[1], [2]], [[-1], [0]], "indices into .* got -1 in row 0"),
]


@pytest.mark.parametrize(("items", "behaviors", "message"), BAD_LONG_HISTORIES, ids=short_id)
def test_long_histories_that_do_not_fit_are_rejected(items, behaviors, message):
    model = build_model(num_retrieved_items=2)
    input_ids, mask, _ = random_histories(model, [3, 2])
    long_history = {
        name: None if value is None else torch.tensor(value)
        for name, value in (("items", items), ("behaviors", behaviors))
    }
    for call in (
        lambda: model.rank(input_ids, mask, torch.tensor([[1], [2]]), long_history=long_history),
        lambda: model.recommend(input_ids, mask, long_history=long_history),
        lambda: model(input_ids, mask, labels=input_ids.masked_fill(mask == 0, -100), long_history=long_history),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_misspelled_part_of_a_long_history_is_rejected():
    model = build_model(num_retrieved_items=2)
    input_ids, mask, _ = random_histories(model, [3, 2])
    longer = long_histories(model, [3, 2])
    longer["long_history"]["behavior"] = longer["long_history"].pop("behaviors")
    with pytest.raises(ValueError, match=r"`long_history` must have keys among .* got \['behavior'\]"):
        model.recommend(input_ids, mask, **longer)


def test_a_model_without_sub_histories_rejects_long_histories():
    model = build_model()
    assert not any("candidate_block" in name for name in model.state_dict())
    input_ids, mask, _ = random_histories(model, [3, 2])
    with pytest.raises(ValueError, match="must be None for a model with num_retrieved_items=0"):
        model.recommend(input_ids, mask, **long_histories(model, [3, 2]))
    with pytest.raises(ValueError, match="must be None for a model with num_retrieved_items=0"):
        model(input_ids, mask, labels=input_ids, long_history={"behaviors": torch.tensor([[0], [1]])})


def test_one_behavior_needs_no_long_behaviors():
    model = build_model(behaviors=["click"], num_retrieved_items=3)
    input_ids, mask, _ = random_histories(model, [3, 2])
    longer = long_histories(model, [5, 2])
    expected = model.rank(input_ids, mask, torch.tensor([[1], [2]]), **longer)
    assert (longer["long_history"].pop("behaviors") == 0).all()
    actual = model.rank(input_ids, mask, torch.tensor([[1], [2]]), **longer)
    assert torch.equal(actual, expected)


def test_content_embeddings_that_do_not_fit_are_rejected():
    model = build_model(num_retrieved_items=5)
    for embeddings in (torch.zeros(30, 5), torch.full((30, 6), torch.nan)):
        with pytest.raises(ValueError, match=r"shape \(30, 6\)|NaN"):
            model.set_catalog(model.catalog.item_codes, embeddings)


def test_a_history_leaves_room_for_the_candidate_and_its_block():
    model = build_model("gpt2", num_retrieved_items=5, num_train_beams=3)
    fits = model.config.max_history_items
    longer = long_histories(model, [9])
    candidates = torch.tensor([[1]])
    assert fits == (256 - 1 - 4 - 7) // 5
    input_ids, mask, _ = random_histories(model, [fits])
    assert model.rank(input_ids, mask, candidates, **longer).isfinite().all()
    input_ids, mask, _ = random_histories(model, [fits + 1])
    assert model(input_ids, mask, labels=input_ids, **longer).loss.isfinite(), (
        "the candidate takes the place of the last item"
    )
    with pytest.raises(ValueError, match="must fit into the 256 positions of the backbone"):
        model.rank(input_ids, mask, candidates, **longer)
    with pytest.raises(ValueError, match="must fit into the 256 positions of the backbone"):
        model.recommend(input_ids, mask, **longer)
    input_ids, mask, _ = random_histories(model, [fits + 2])
    with pytest.raises(ValueError, match=f"at most {fits} items of a history"):
        model(input_ids, mask, labels=input_ids, **longer)


@pytest.mark.parametrize("retrieved", [0, 3])
def test_dense_candidates_are_ranked_beside_the_beams(backbone, retrieved):
    """Any number of beams with enough dense candidates equals exact scoring of all items."""
    model = build_model(backbone, num_retrieved_items=retrieved)
    input_ids, mask, _ = random_histories(model, [4, 2])
    longer = long_histories(model, [12, 2]) if retrieved else {}
    everything = torch.arange(30).expand(2, -1)
    log_probs = exact_scores(model, input_ids, mask)
    ranks = torch.nn.functional.logsigmoid(model.rank(input_ids, mask, everything, **longer)[..., 0])
    ends = torch.stack(
        [model.model(ids[m.bool()][None]).last_hidden_state[0, -1] for ids, m in zip(input_ids, mask, strict=True)]
    )
    dense_scores = model.ranking_head.dense_scores(ends[:, None], model.scorer.representations(everything)).detach()
    expected = (log_probs + 0.5 * ranks + 0.25 * dense_scores).sort(dim=1, descending=True)
    for num_beams, num_dense_candidates in ((1, 30), (30, 0), (7, 40)):
        best = model.recommend(
            input_ids,
            mask,
            num_beams=num_beams,
            num_dense_candidates=num_dense_candidates,
            num_return_sequences=30,
            ranking_weight=0.5,
            dense_weight=0.25,
            **longer,
        )
        assert torch.equal(best.item_indices, expected.indices)
        torch.testing.assert_close(best.scores, expected.values, atol=5e-5, rtol=1e-4)
        for actual, exact in ((best.generation_scores, log_probs), (best.dense_scores, dense_scores)):
            torch.testing.assert_close(actual, exact.gather(1, expected.indices), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("at_once", [4, 2**16])
def test_beams_and_dense_candidates_respect_the_item_lists(at_once, monkeypatch, tmp_path):
    monkeypatch.setattr(scoring_unigrf, "MAX_LEAVES", at_once)
    model = build_model()
    input_ids, mask, items = random_histories(model, [4, 2])
    narrow = {"num_beams": 3, "exclude_history": True, "allowed_items": [list(range(20)), [7, 8, 9]]}
    narrow["catalog"] = model.catalog.subset(list(range(2, 30)))
    beams = model.recommend(input_ids, mask, num_return_sequences=3, **narrow).item_indices
    united = model.recommend(input_ids, mask, num_return_sequences=8, num_dense_candidates=5, **narrow)
    scores = model.recommend(input_ids, mask, num_return_sequences=30, num_dense_candidates=30, **narrow).dense_scores
    for row, allowed in enumerate((set(range(2, 20)), {7, 8, 9})):
        allowed -= set(items[row])
        listed = [item for item in united.item_indices[row].tolist() if item >= 0]
        assert len(set(listed)) == len(listed) and set(beams[row].tolist()) - {-1} <= set(listed) <= allowed
        best = scores[row].sort(descending=True).values[: min(5, len(allowed))]
        assert torch.isin(best, united.dense_scores[row]).all()
    assert (united.item_indices[1] == -1).sum() >= 5 and (united.scores[united.item_indices < 0] == -torch.inf).all()
    model.generation_config.num_dense_candidates = 5
    model.save_pretrained(tmp_path)
    saved = UniGRFForCausalLM.from_pretrained(tmp_path).recommend(input_ids, mask, num_return_sequences=8, **narrow)
    assert torch.equal(saved.item_indices, united.item_indices), "saved settings are the defaults"
    none = model.recommend(input_ids, mask, num_return_sequences=3, num_dense_candidates=0, **narrow)
    assert torch.equal(none.item_indices, beams)


@pytest.mark.parametrize("retrieved", [0, 3])
@pytest.mark.parametrize("dense_weight", [0.0, 0.7])
def test_rerank_top_k_ranks_the_best_unranked_candidates(retrieved, dense_weight, tmp_path):
    model = build_model(num_retrieved_items=retrieved)
    input_ids, mask, _ = random_histories(model, [4, 2])
    options = {"num_beams": 20, "ranking_weight": 1.5, "dense_weight": dense_weight}
    options |= long_histories(model, [12, 2]) if retrieved else {}
    options["blocked_items"] = [[], list(range(4, 30))]  # the second request has only four items
    everything = model.recommend(input_ids, mask, num_return_sequences=20, **options)
    unranked = everything.generation_scores + dense_weight * everything.dense_scores.nan_to_num(neginf=0.0)
    expected = unranked >= unranked.topk(6, dim=1).values[:, -1:]
    reranked = model.recommend(input_ids, mask, num_return_sequences=6, rerank_top_k=6, **options)
    for row, kept in enumerate(expected):
        count = int((kept & (everything.item_indices[row] >= 0)).sum())
        assert count == (6, 4)[row]
        for name in ("item_indices", "scores", "generation_scores", "ranking_scores", "dense_scores"):
            torch.testing.assert_close(reranked[name][row, :count], everything[name][row][kept][:count])
        assert (reranked.item_indices[row, count:] == -1).all()
    model.generation_config.rerank_top_k = 6
    model.save_pretrained(tmp_path)
    saved = UniGRFForCausalLM.from_pretrained(tmp_path)
    again = saved.recommend(input_ids, mask, num_return_sequences=6, **options)
    assert torch.equal(again.item_indices, reranked.item_indices), "saved settings are the defaults"
    again = saved.recommend(input_ids, mask, num_return_sequences=20, rerank_top_k=0, **options)
    assert torch.equal(again.item_indices, everything.item_indices)
    united = model.recommend(input_ids, mask, num_return_sequences=36, num_dense_candidates=30, **options)
    listed = united.item_indices[0].tolist()
    assert sorted(item for item in listed if item >= 0) == list(range(30)), "dense candidates bring back all items"
    for arguments in ({"rerank_top_k": 5}, {"rerank_top_k": -1}):
        with pytest.raises(ValueError, match="rerank_top_k"):
            model.recommend(input_ids, mask, num_return_sequences=6, **arguments, **options)


def test_a_dense_score_that_does_not_exist_is_rejected():
    model = build_model(embeddings=False)
    input_ids, mask, _ = random_histories(model, [4, 2])
    assert model.recommend(input_ids, mask).dense_scores is None
    for arguments in ({"dense_weight": 0.5}, {"num_dense_candidates": 3}):
        with pytest.raises(ValueError, match="must be 0 for a model"):
            model.recommend(input_ids, mask, **arguments)
    with pytest.raises(ValueError, match=r"\+ num_dense_candidates"):
        build_model().recommend(input_ids, mask, num_dense_candidates=-1)


LOAD_AND_RECOMMEND = """
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("folder", trust_remote_code=True)
inputs = json.loads(sys.argv[1])
long_history = {name: torch.tensor(value) for name, value in inputs.pop("long_history").items()}
inputs = {name: torch.tensor(value) for name, value in inputs.items()}
module = type(model.model.language_model).__module__.split(".")[0]
print(json.dumps([module, model.recommend(**inputs, long_history=long_history).scores.tolist()]))
"""


def test_a_saved_folder_loads_elsewhere_by_its_own_code(tmp_path):
    model = build_model("hstu", num_retrieved_items=3, num_train_beams=4)
    model.save_pretrained(tmp_path / "folder")
    input_ids, mask, _ = random_histories(model, [4, 2])
    inputs = {"input_ids": input_ids, "attention_mask": mask, **long_histories(model, [12, 2])}
    arguments = json.dumps(inputs, default=torch.Tensor.tolist)
    module, scores = json.loads(run_elsewhere(LOAD_AND_RECOMMEND, arguments, folder=tmp_path)[-1])
    assert module == "transformers_modules"
    torch.testing.assert_close(torch.tensor(scores), model.recommend(**inputs).scores)
