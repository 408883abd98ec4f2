"""Sub-histories: what is retrieved of a long history, how it is read, and how candidates are ranked with it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import NO_PROJECT, build_model, exact_scores, long_histories, random_histories
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM, candidates_unigrf, subhistory_unigrf
from modeling_unigrf.subhistory_unigrf import retrieve


def retrieve_one(embeddings, items, candidate, count, exclude):
    """Places of a sub-history, by sorting all there is."""
    direction = torch.nn.functional.normalize(embeddings.double(), dim=1)
    known = [place for place, item in enumerate(items) if item >= 0 and not (exclude and item == candidate)]
    cosine = {item: round(float(direction[item] @ direction[candidate]), 6) for item in items if item >= 0}
    return sorted(sorted(known, key=lambda place: (-cosine[items[place]], -place))[:count])


def rank_alone(model, input_ids, mask, candidates, long_items, long_behaviors, long_timestamps=None, times=None):
    """
    Every candidate and its sub-history by a forward of its own, without cache, mask or packing. `times`: of the tokens
    `[B, T]`, and of the request `[B]`.
    """
    config = model.config
    embed, segments = model.get_input_embeddings(), model.candidate_block.segments.weight
    scores = torch.empty(*candidates.shape, len(config.ranking_targets))
    for row in range(len(input_ids)):
        history = input_ids[row][mask[row].bool()]
        for column, item in enumerate(candidates[row]):
            places = retrieve_one(
                model.catalog.content_embeddings,
                long_items[row].tolist(),
                int(item),
                config.num_retrieved_items,
                config.exclude_candidate,
            )
            behavior_ids = torch.tensor(config.behavior_token_ids)[long_behaviors[row, places]]
            vector = model.item_representations(item)[None]
            retrieved = model.item_representations(long_items[row, places]) + embed(behavior_ids) + segments[1]
            tokens = embed(torch.cat([history, model.layout.item_tokens(model.catalog.item_codes[item].long())]))
            whole = torch.cat([tokens, vector + segments[0], retrieved, vector + segments[2]])
            timed = {}
            if times is not None:
                of_tokens, query_time = times[0][row][mask[row].bool()], times[1][row : row + 1]
                codes = query_time.expand(model.layout.num_levels + 1)
                own = torch.cat([of_tokens, codes, long_timestamps[row, places], query_time])
                later = torch.cat([of_tokens[1:], query_time.expand(len(own) - len(of_tokens) + 1)])
                timed = {"timestamps": own[None], "target_timestamps": later[None]}
            states = model.model(inputs_embeds=whole[None], **timed).last_hidden_state[0]
            scores[row, column] = model.ranking_head(states[-1], states[len(history) - 1], vector[0])
    return scores


@settings(max_examples=60, deadline=None)
@given(
    items=st.lists(st.integers(-1, 8), max_size=30),
    count=st.integers(1, 40),
    exclude=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_sub_history_is_what_sorting_everything_finds(items, count, exclude, seed):
    embeddings = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed))
    candidates = torch.tensor([[0, 3, 8], [5, 5, 1]])
    both = torch.tensor([items, items[::-1]], dtype=torch.long)
    found = retrieve(embeddings, both, candidates, count, exclude)
    assert found.shape == (2, 3, min(count, len(items)))
    for row in range(2):
        for column, candidate in enumerate(candidates[row].tolist()):
            expected = retrieve_one(embeddings, both[row].tolist(), candidate, count, exclude)
            places = found[row, column].tolist()
            assert places == [-1] * (len(places) - len(expected)) + expected


@pytest.mark.parametrize("at_once", [1, 64, 3000])
def test_the_sub_history_is_the_same_in_chunks(at_once, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(50, 6, generator=generator)
    items = torch.randint(-1, 50, (4, 700), generator=generator)
    candidates = torch.randint(50, (4, 9), generator=generator)
    expected = retrieve(embeddings, items, candidates, 12)
    monkeypatch.setattr(subhistory_unigrf, "MAX_SIMILARITIES", at_once)
    assert torch.equal(retrieve(embeddings, items, candidates, 12), expected)


def test_of_equal_cosines_the_latest_are_taken_also_of_embeddings_of_zeros():
    items = torch.tensor([[3, 1, 2, 3, -1, 0, 3]])
    assert retrieve(torch.zeros(4, 5), items, torch.tensor([[2]]), 3).tolist() == [[[3, 5, 6]]]
    distinct = torch.eye(4)
    assert retrieve(distinct, items, torch.tensor([[3]]), 2).tolist() == [[[3, 6]]]
    assert retrieve(distinct, items, torch.tensor([[3]]), 3, exclude_candidate=True).tolist() == [[[1, 2, 5]]]


@pytest.mark.parametrize("length", [1001, 1197, 1200])
def test_of_items_with_the_same_embedding_the_latest_is_taken_wherever_they_stand(length):
    generator = torch.Generator().manual_seed(length)
    embeddings = torch.randn(600, 128, generator=generator).repeat(2, 1)  # items i and 600 + i
    items, candidates = torch.randperm(1200, generator=generator)[None, :length], torch.arange(600)[None]
    same = items % 600 == candidates[0, :, None]
    latest = torch.where(same, torch.arange(length), -1).amax(dim=1)
    found = retrieve(embeddings, items, candidates, 1)[0, :, 0]
    assert torch.equal(found[latest >= 0], latest[latest >= 0])


def test_what_is_chosen_does_not_depend_on_the_precision_of_the_training():
    embeddings = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    items, candidates = torch.arange(200)[None], torch.arange(50)[None]
    with torch.autocast("cpu", torch.bfloat16):
        found = retrieve(embeddings, items, candidates, 10)
    assert torch.equal(found, retrieve(embeddings, items, candidates, 10))


def test_embeddings_of_int8_choose_and_rank_as_the_floats_that_they_stand_for(tmp_path):
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
    longer, candidates = long_histories(model, [12, 2, 0]), torch.arange(15).view(3, 5)
    expected = model.rank(input_ids, mask, candidates, **longer)
    for one in (small, loaded):
        torch.testing.assert_close(one.rank(input_ids, mask, candidates, **longer), expected, atol=1e-5, rtol=1e-4)
    loaded.add_items(torch.tensor([[0, 0, 0, 2]]), whole[:1])
    assert loaded.catalog.content_embeddings.dtype == torch.int8 and loaded.catalog.num_items == 31
    for one, wrong in ((small, whole / 127), (model, whole)):
        with pytest.raises(ValueError, match=r"int8_content_embeddings.*An int8 of 127 stands for 1\.0"):
            one.set_catalog(model.catalog.item_codes, wrong)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("exclude", [False, True])
def test_rank_with_sub_histories_equals_every_candidate_on_its_own(backbone, attention, exclude):
    model = build_model(backbone, num_retrieved_items=3, exclude_candidate=exclude)
    if backbone == "hstu" and attention == "sdpa":
        pytest.skip("HSTU attends in a way of its own")
    model.set_attn_implementation(attention)
    input_ids, mask, _ = random_histories(model, [4, 2, 0])
    longer = long_histories(model, [12, 2, 0])
    candidates = torch.stack([torch.randperm(30)[:5] for _ in range(3)])
    with torch.no_grad():
        expected = rank_alone(model, input_ids, mask, candidates, **longer)
    for pack in (2, 32):
        found = model.rank(input_ids, mask, candidates.int(), candidates_per_pack=pack, **longer)
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)
    cache = DynamicCache()
    with torch.no_grad():
        model.model(input_ids, mask, cache=cache, use_cache=True)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    found = model.rank(input_ids, mask, candidates, cache=cache, **longer)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_retrieved_items_have_their_own_times():
    model = build_model("hstu", num_retrieved_items=3)
    input_ids, mask, _ = random_histories(model, [4, 2, 0])
    longer, generator = long_histories(model, [12, 2, 0]), torch.Generator().manual_seed(7)
    before = torch.randint(1, 10**6, longer["long_items"].shape, generator=generator).sort(dim=1).values
    before[0, 3] = -1
    times = 10**6 + torch.randint(1, 10**5, input_ids.shape, generator=generator).sort(dim=1).values
    query_time = times[:, -1] + torch.tensor([5, 5000, 50_000])
    candidates = torch.stack([torch.randperm(30, generator=generator)[:5] for _ in range(3)])
    with torch.no_grad():
        expected = rank_alone(
            model, input_ids, mask, candidates, **longer, long_timestamps=before, times=(times, query_time)
        )
    given = {"timestamps": times, "query_time": query_time, **longer}
    for pack in (2, 32):
        found = model.rank(input_ids, mask, candidates, candidates_per_pack=pack, long_timestamps=before, **given)
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)
    unknown = model.rank(input_ids, mask, candidates, **given)
    assert not torch.allclose(unknown[0], expected[0]), "they are read"
    nothing = model.rank(input_ids, mask, candidates, long_timestamps=torch.full_like(before, -1), **given)
    assert torch.equal(nothing, unknown)
    best = model.recommend(
        input_ids, mask, num_beams=30, num_return_sequences=30, long_timestamps=before, ranking_weight=0.0, **given
    )
    ranked = model.rank(input_ids, mask, best.item_indices, long_timestamps=before, **given)[..., 0]
    torch.testing.assert_close(best.ranking_scores, torch.nn.functional.logsigmoid(ranked), atol=3e-5, rtol=1e-4)
    untimed = {name: value for name, value in given.items() if "timestamps" not in name}
    for wrong, rest in ((before[:, 1:], given), (before.float(), given), (before, untimed)):
        with pytest.raises(ValueError, match="Expected integer long_timestamps of shape"):
            model.rank(input_ids, mask, candidates, long_timestamps=wrong, **rest)


def test_recommend_ranks_its_beams_as_rank_does(backbone):
    model = build_model(backbone, num_retrieved_items=3)
    input_ids, mask, _ = random_histories(model, [4, 2])
    longer = long_histories(model, [12, 2])
    best = model.recommend(input_ids, mask, num_beams=9, num_return_sequences=9, ranking_weight=0.7, **longer)
    ranks = torch.nn.functional.logsigmoid(model.rank(input_ids, mask, best.item_indices, **longer)[..., 0])
    torch.testing.assert_close(best.ranking_scores, ranks, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(best.scores, best.generation_scores + 0.7 * ranks, atol=3e-5, rtol=1e-4)
    plain = model.generate(input_ids, attention_mask=mask, num_beams=9, num_return_sequences=9)
    codes = [model.layout.history_codes(rows)[1] for rows in plain.view(2, 9, -1)[:, :, -4:]]
    beams = [set(model.catalog.trie.lookup(one).tolist()) for one in codes]
    assert [set(row) for row in best.item_indices.tolist()] == beams, "the sub-history has no say in generation"


def test_padding_unknown_items_and_a_k_beyond_the_long_history_change_nothing():
    model = build_model(num_retrieved_items=20)
    input_ids, mask, _ = random_histories(model, [3])
    candidates = torch.tensor([[4, 7, 21]])
    items, behaviors = torch.tensor([[2, 4, 2, 9]]), torch.tensor([[0, 1, 1, 0]])
    expected = model.rank(input_ids, mask, candidates, long_items=items, long_behaviors=behaviors)
    for spread in ([-1, -1, 2, 4, 2, 9], [2, -1, 4, 2, -1, 9, -1], [2, 4, 2, 9, *[-1] * 40]):
        with_gaps = torch.tensor([spread])
        matching = torch.full_like(with_gaps, -1)  # where there is no item, the behavior means nothing
        matching[with_gaps >= 0] = behaviors[0]
        found = model.rank(input_ids, mask, candidates, long_items=with_gaps, long_behaviors=matching)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    empty = {"long_items": torch.empty(1, 0, dtype=torch.long), "long_behaviors": torch.empty(1, 0, dtype=torch.long)}
    nothing = {"long_items": torch.tensor([[-1]]), "long_behaviors": torch.tensor([[0]])}
    without = model.rank(input_ids, mask, candidates, **empty)
    torch.testing.assert_close(without, model.rank(input_ids, mask, candidates, **nothing), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(without, expected)


def test_histories_of_ten_thousand_items_are_trained_on_and_served():
    model = build_model(num_retrieved_items=8, num_train_beams=4)
    input_ids, mask, _ = random_histories(model, [4, 2])
    longer = long_histories(model, [10_000, 9_000])
    best = model.recommend(input_ids, mask, num_beams=30, **longer)
    assert best.scores.isfinite().all()
    out = model.train()(input_ids, mask, labels=input_ids.masked_fill(mask == 0, -100), **longer)
    out.loss.backward()
    assert out.loss.isfinite() and model.candidate_block.segments.weight.grad.abs().sum() > 0


BAD_LONG_HISTORIES = [
    (None, None, "integer long_items of shape"),
    ([[1, 2]], [[0, 0]], "integer long_items of shape"),
    ([[1.0], [2.0]], [[0], [0]], "integer long_items of shape"),
    ([[True], [False]], [[0], [0]], "integer long_items of shape"),
    ([1, 2], [0, 0], "integer long_items of shape"),
    ([[30], [2]], [[0], [0]], "outside a catalog of 30 items"),
    ([[-2], [2]], [[0], [0]], "outside a catalog of 30 items"),
    ([[1], [2]], None, "integer long_behaviors of shape"),
    ([[1], [2]], [[0, 1], [0, 1]], "integer long_behaviors of shape"),
    ([[1], [2]], [[0], [2]], "indices into .* found 2 in row 1"),
    ([[1], [2]], [[-1], [0]], "indices into .* found -1 in row 0"),
]


@pytest.mark.parametrize(("items", "behaviors", "message"), BAD_LONG_HISTORIES)
def test_long_histories_that_do_not_fit_are_refused_everywhere(items, behaviors, message):
    model = build_model(num_retrieved_items=2)
    input_ids, mask, _ = random_histories(model, [3, 2])
    longer = {
        name: None if value is None else torch.tensor(value)
        for name, value in (("long_items", items), ("long_behaviors", behaviors))
    }
    for call in (
        lambda: model.rank(input_ids, mask, torch.tensor([[1], [2]]), **longer),
        lambda: model.recommend(input_ids, mask, **longer),
        lambda: model(input_ids, mask, labels=input_ids.masked_fill(mask == 0, -100), **longer),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_model_without_sub_histories_is_the_old_one_and_says_so():
    model = build_model()
    assert not any("candidate_block" in name for name in model.state_dict())
    input_ids, mask, _ = random_histories(model, [3, 2])
    with pytest.raises(ValueError, match="num_retrieved_items=0 does not read"):
        model.recommend(input_ids, mask, **long_histories(model, [3, 2]))
    with pytest.raises(ValueError, match="num_retrieved_items=0 does not read"):
        model(input_ids, mask, labels=input_ids, long_behaviors=torch.tensor([[0], [1]]))


def test_one_behavior_needs_no_long_behaviors():
    model = build_model(behaviors=["click"], num_retrieved_items=3)
    input_ids, mask, _ = random_histories(model, [3, 2])
    items = long_histories(model, [5, 2])["long_items"]
    found = model.rank(input_ids, mask, torch.tensor([[1], [2]]), long_items=items)
    zeros = torch.zeros_like(items)
    expected = model.rank(input_ids, mask, torch.tensor([[1], [2]]), long_items=items, long_behaviors=zeros)
    assert torch.equal(found, expected)


def test_embeddings_that_do_not_fit_are_refused():
    model = build_model(num_retrieved_items=5)
    for embeddings in (torch.zeros(30, 5), torch.full((30, 6), torch.nan)):
        with pytest.raises(ValueError, match=r"shape \(30, 6\)|NaN"):
            model.set_catalog(model.catalog.item_codes, embeddings)


def test_a_history_leaves_room_for_the_candidate_and_its_block():
    model = build_model("gpt2", num_retrieved_items=5, num_train_beams=3)
    fits, longer, candidates = model.config.max_history_items, long_histories(model, [9]), torch.tensor([[1]])
    assert fits == (256 - 1 - 4 - 7) // 5
    input_ids, mask, _ = random_histories(model, [fits])
    assert model.rank(input_ids, mask, candidates, **longer).isfinite().all()
    input_ids, mask, _ = random_histories(model, [fits + 1])
    assert model(input_ids, mask, labels=input_ids, **longer).loss.isfinite(), "the last item is the candidate's place"
    with pytest.raises(ValueError, match="the backbone has 256"):
        model.rank(input_ids, mask, candidates, **longer)
    with pytest.raises(ValueError, match="the backbone has 256"):
        model.recommend(input_ids, mask, **longer)
    input_ids, mask, _ = random_histories(model, [fits + 2])
    with pytest.raises(ValueError, match=f"max_history_items is {fits}"):
        model(input_ids, mask, labels=input_ids, **longer)


@pytest.mark.parametrize("retrieved", [0, 3])
def test_items_of_the_best_item_level_score_are_ranked_beside_the_beams(backbone, retrieved):
    """A beam of one and a union of everything is exact scoring of everything, in all three scores."""
    model = build_model(backbone, num_retrieved_items=retrieved)
    input_ids, mask, _ = random_histories(model, [4, 2])
    longer = long_histories(model, [12, 2]) if retrieved else {}
    everything = torch.arange(30).expand(2, -1)
    log_probs = exact_scores(model, input_ids, mask)
    ranks = torch.nn.functional.logsigmoid(model.rank(input_ids, mask, everything, **longer)[..., 0])
    ends = torch.stack(
        [model.model(ids[m.bool()][None]).last_hidden_state[0, -1] for ids, m in zip(input_ids, mask, strict=True)]
    )
    dense_scores = model.ranking_head.dense_scores(ends[:, None], model.item_representations(everything)).detach()
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
        for found, exact in ((best.generation_scores, log_probs), (best.dense_scores, dense_scores)):
            torch.testing.assert_close(found, exact.gather(1, expected.indices), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("at_once", [4, 2**16])
def test_a_union_holds_the_beams_the_best_items_and_the_lists_of_the_request(at_once, monkeypatch, tmp_path):
    monkeypatch.setattr(candidates_unigrf, "LEAVES_AT_ONCE", at_once)
    model = build_model()
    input_ids, mask, items = random_histories(model, [4, 2])
    narrow = {"num_beams": 3, "exclude_history": True, "allowed_items": [list(range(20)), [7, 8, 9]]}
    narrow["catalog"] = model.catalog.subset(list(range(2, 30)))
    beams = model.recommend(input_ids, mask, num_return_sequences=3, **narrow).item_indices
    found = model.recommend(input_ids, mask, num_return_sequences=8, num_dense_candidates=5, **narrow)
    scores = model.recommend(input_ids, mask, num_return_sequences=30, num_dense_candidates=30, **narrow).dense_scores
    for row, allowed in enumerate((set(range(2, 20)), {7, 8, 9})):
        allowed -= set(items[row])
        listed = [item for item in found.item_indices[row].tolist() if item >= 0]
        assert len(set(listed)) == len(listed) and set(beams[row].tolist()) - {-1} <= set(listed) <= allowed
        best = scores[row].sort(descending=True).values[: min(5, len(allowed))]
        assert torch.isin(best, found.dense_scores[row]).all()
    assert (found.item_indices[1] == -1).sum() >= 5 and (found.scores[found.item_indices < 0] == -torch.inf).all()
    model.config.num_dense_candidates = 5
    model.save_pretrained(tmp_path)
    saved = UniGRFForCausalLM.from_pretrained(tmp_path).recommend(input_ids, mask, num_return_sequences=8, **narrow)
    assert torch.equal(saved.item_indices, found.item_indices), "what the checkpoint says is the default"
    none = model.recommend(input_ids, mask, num_return_sequences=3, num_dense_candidates=0, **narrow)
    assert torch.equal(none.item_indices, beams)


@pytest.mark.parametrize("retrieved", [0, 3])
@pytest.mark.parametrize("dense_weight", [0.0, 0.7])
def test_of_many_beams_the_best_without_their_ranking_are_ranked(retrieved, dense_weight, tmp_path):
    model = build_model(num_retrieved_items=retrieved)
    input_ids, mask, _ = random_histories(model, [4, 2])
    asked = {"num_beams": 20, "ranking_weight": 1.5, "dense_weight": dense_weight}
    asked |= long_histories(model, [12, 2]) if retrieved else {}
    asked["blocked_items"] = [[], list(range(4, 30))]  # the second request has fewer items than are ranked
    everything = model.recommend(input_ids, mask, num_return_sequences=20, **asked)
    unranked = everything.generation_scores + dense_weight * everything.dense_scores.nan_to_num(neginf=0.0)
    expected = unranked >= unranked.topk(6, dim=1).values[:, -1:]
    found = model.recommend(input_ids, mask, num_return_sequences=6, rerank_top_k=6, **asked)
    for row, kept in enumerate(expected):
        count = int((kept & (everything.item_indices[row] >= 0)).sum())
        assert count == (6, 4)[row]
        for name in ("item_indices", "scores", "generation_scores", "ranking_scores", "dense_scores"):
            torch.testing.assert_close(found[name][row, :count], everything[name][row][kept][:count])
        assert (found.item_indices[row, count:] == -1).all()
    model.config.rerank_top_k = 6
    model.save_pretrained(tmp_path)
    saved = UniGRFForCausalLM.from_pretrained(tmp_path)
    again = saved.recommend(input_ids, mask, num_return_sequences=6, **asked)
    assert torch.equal(again.item_indices, found.item_indices), "what the checkpoint says is the default"
    again = saved.recommend(input_ids, mask, num_return_sequences=20, rerank_top_k=0, **asked)
    assert torch.equal(again.item_indices, everything.item_indices)
    united = model.recommend(input_ids, mask, num_return_sequences=36, num_dense_candidates=30, **asked)
    listed = united.item_indices[0].tolist()
    assert sorted(item for item in listed if item >= 0) == list(range(30)), (
        "beams that were left out come back with the union"
    )
    for arguments in ({"rerank_top_k": 5}, {"rerank_top_k": -1}):
        with pytest.raises(ValueError, match="rerank_top_k"):
            model.recommend(input_ids, mask, num_return_sequences=6, **arguments, **asked)


def test_an_item_level_score_that_does_not_exist_is_refused():
    model = build_model(embeddings=False)
    input_ids, mask, _ = random_histories(model, [4, 2])
    assert model.recommend(input_ids, mask).dense_scores is None
    for arguments in ({"dense_weight": 0.5}, {"num_dense_candidates": 3}):
        with pytest.raises(ValueError, match="need an item-level score"):
            model.recommend(input_ids, mask, **arguments)
    with pytest.raises(ValueError, match=r"\+ num_dense_candidates"):
        build_model().recommend(input_ids, mask, num_dense_candidates=-1)


ELSEWHERE = (
    NO_PROJECT
    + """
import json, sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("folder", trust_remote_code=True)
inputs = {name: torch.tensor(value) for name, value in json.loads(sys.argv[1]).items()}
module = type(model.model.language_model).__module__.split(".")[0]
print(json.dumps([module, model.recommend(**inputs).scores.tolist()]))
"""
)


def test_a_folder_of_all_parts_loads_elsewhere_by_its_own_code(tmp_path):
    model = build_model("hstu", num_retrieved_items=3, num_train_beams=4, exclude_candidate=True)
    model.save_pretrained(tmp_path / "folder")
    input_ids, mask, _ = random_histories(model, [4, 2])
    longer = long_histories(model, [12, 2])
    inputs = {"input_ids": input_ids, "attention_mask": mask, **longer}
    expected = model.recommend(**inputs).scores
    command = [sys.executable, "-c", ELSEWHERE, json.dumps({name: value.tolist() for name, value in inputs.items()})]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    module, scores = json.loads(found.stdout.splitlines()[-1])
    assert module == "transformers_modules"
    torch.testing.assert_close(torch.tensor(scores), expected)
