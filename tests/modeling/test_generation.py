"""Generation: generated items exist, and the search equals exact scoring and stock `generate`."""

import numpy as np
import pytest
import torch
from helpers import (
    STOCK_BEAM_SEARCH,
    build_model,
    exact_scores,
    long_histories,
    prefilled_cache,
    random_histories,
    short_id,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM
from modeling_unigrf.generation_unigrf import TrieLogitsProcessor


def generated_items(model, sequences, prompt_length):
    """Look up the items that follow the prompts; -1 for none."""
    return model.catalog.trie.lookup(sequences[:, prompt_length:] - torch.tensor(model.config.code_offsets))


def test_cached_equals_uncached_on_left_padded_ragged_batches(backbone):
    model = build_model(backbone)
    input_ids, mask, _ = random_histories(model, [5, 2, 1])
    cache = None
    chunks = []
    for start, end in ((0, 3), (3, 17), (17, input_ids.shape[1])):
        with torch.no_grad():
            out = model(input_ids[:, start:end], mask[:, :end], cache=cache, use_cache=True)
        cache = out.cache
        chunks.append(out.logits)
    cached = torch.cat(chunks, dim=1)
    for row in range(len(input_ids)):
        real = mask[row].bool()
        with torch.no_grad():
            alone = model(input_ids[row : row + 1, real]).logits[0]
        torch.testing.assert_close(cached[row, real], alone, atol=2e-5, rtol=1e-4)


def test_a_beam_of_the_whole_catalog_equals_exact_scoring(backbone):
    model = build_model(backbone)
    input_ids, mask, _ = random_histories(model, [4, 1])
    out = model.generate(
        input_ids,
        attention_mask=mask,
        num_beams=model.config.num_items + 5,
        num_return_sequences=model.config.num_items + 5,
        output_scores=True,
        return_dict_in_generate=True,
    )
    items = generated_items(model, out.sequences, input_ids.shape[1]).view(2, -1)
    assert items.shape[1] == model.config.num_items, "as many results as there are items"
    assert all(sorted(row) == list(range(model.config.num_items)) for row in items.tolist()), "no duplicates"
    expected = exact_scores(model, input_ids, mask).gather(1, items)
    torch.testing.assert_close(out.sequences_scores.view(2, -1), expected, atol=2e-5, rtol=1e-4)
    assert (expected.diff(dim=1) <= 1e-5).all(), "best first"


@pytest.mark.parametrize("num_beams", [2, 7, 12])
def test_the_fast_path_equals_stock_generate(backbone, num_beams):
    model = build_model(backbone, num_items=60)
    input_ids, mask, _ = random_histories(model, [4, 2, 1])
    arguments = {"attention_mask": mask, "num_beams": num_beams, "num_return_sequences": num_beams}
    arguments |= {"output_scores": True, "return_dict_in_generate": True}
    fast = model.generate(input_ids, **arguments)
    stock = model.generate(input_ids, **arguments, **STOCK_BEAM_SEARCH)
    assert torch.equal(fast.sequences, stock.sequences)
    torch.testing.assert_close(fast.sequences_scores, stock.sequences_scores, atol=1e-5, rtol=1e-5)


class FavorOddTokens(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + (torch.arange(scores.shape[1]) % 2) * 3.0 + (input_ids[:, -1:] % 3) * 0.1


def test_custom_logits_processors_act_as_in_stock_generate():
    model = build_model(num_items=60)
    input_ids, mask, _ = random_histories(model, [4, 2])
    arguments = {"attention_mask": mask, "num_beams": 8, "num_return_sequences": 8, "output_scores": True}
    arguments |= {"return_dict_in_generate": True}
    plain = model.generate(input_ids, **arguments)
    fast = model.generate(input_ids, logits_processor=LogitsProcessorList([FavorOddTokens()]), **arguments)
    arguments |= STOCK_BEAM_SEARCH
    stock = model.generate(input_ids, logits_processor=LogitsProcessorList([FavorOddTokens()]), **arguments)
    assert torch.equal(fast.sequences, stock.sequences) and not torch.equal(fast.sequences, plain.sequences)
    torch.testing.assert_close(fast.sequences_scores, stock.sequences_scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_allowed_tokens_per_row_act_as_in_stock_generate(batch_size):
    model = build_model(num_items=60)
    input_ids, mask, _ = random_histories(model, [4, 2, 1, 3][:batch_size])
    first, second = model.config.code_offsets[:2]
    others = list(range(second, model.config.vocab_size))
    arguments = {"attention_mask": mask, "num_beams": 5, "num_return_sequences": 5, "output_scores": True}
    arguments |= {"return_dict_in_generate": True}
    arguments["prefix_allowed_tokens_fn"] = lambda row, tokens: [first + row, *others]
    fast = model.generate(input_ids, **arguments)
    assert (first + torch.arange(batch_size) == fast.sequences[:, input_ids.shape[1]].view(batch_size, 5).T).all()
    stock = model.generate(input_ids, **arguments, **STOCK_BEAM_SEARCH)
    assert torch.equal(fast.sequences, stock.sequences)
    torch.testing.assert_close(fast.sequences_scores, stock.sequences_scores, atol=1e-5, rtol=1e-5)


class OpenAll(LogitsProcessor):
    """Give the best scores to tokens that continue no item, in place."""

    def __call__(self, input_ids, scores):
        return scores.masked_fill_(scores == -torch.inf, 100.0)


MODES = {
    "greedy": {"num_beams": 1},
    "sample": {"num_beams": 1, "do_sample": True, "top_k": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 4},
    "stock beams": {"num_beams": 4, "num_return_sequences": 4, "output_logits": True},
    "sampled beams": {"num_beams": 4, "num_return_sequences": 4, "do_sample": True},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
@pytest.mark.parametrize(
    "option",
    [
        {"logits_processor": LogitsProcessorList([OpenAll()])},
        {"remove_invalid_values": True},
        {"sequence_bias": {(7,): 90.0, (11,): 90.0, (1,): 90.0}},
        {"bad_words_ids": [[5], [9], [10]]},
        {"suppress_tokens": [4, 6, 8]},
        {"begin_suppress_tokens": [4, 6]},
        {"min_new_tokens": 4, "repetition_penalty": 5.0, "no_repeat_ngram_size": 2},
        {"prefix_allowed_tokens_fn": lambda row, tokens: [4, 5, 8, 9, 11, 12, 14, 15]},
    ],
    ids=short_id,
)
def test_no_processor_opens_what_the_trie_closes(mode, option):
    model = build_model(codebook_sizes=(4, 3, 3, 2), num_items=20)
    input_ids, mask, _ = random_histories(model, [3, 1])
    for catalog in (None, model.catalog.subset(range(8))):
        try:
            sequences = model.generate(input_ids, attention_mask=mask, catalog=catalog, **mode, **option)
        except ValueError as error:
            assert "must leave each request an item of the catalog" in str(error)
            continue
        items = generated_items(model, sequences, input_ids.shape[1]).view(2, -1)
        is_padding = (sequences[:, input_ids.shape[1] :] == model.config.pad_token_id).all(dim=1).view(2, -1)
        assert ((items >= 0) | is_padding).all() and (items[:, 0] >= 0).all()


@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
@pytest.mark.parametrize(
    "option",
    [
        {"prefix_allowed_tokens_fn": lambda row, tokens: list(range(18)) if row == 0 else [1, 2]},
        {"suppress_tokens": list(range(4, 18))},
        {"forced_eos_token_id": 2},
    ],
    ids=short_id,
)
def test_processors_that_leave_no_item_are_an_error(mode, option):
    model = build_model()
    input_ids, mask, _ = random_histories(model, [3, 1])
    with pytest.raises(ValueError, match=r"leave each request an item of the catalog, got none for request [01]"):
        model.generate(input_ids, attention_mask=mask, **mode, **option)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    share=st.floats(0.05, 1.0),
    seed=st.integers(0, 10_000),
    num_beams=st.integers(1, 12),
)
def test_every_generated_item_exists_in_random_catalogs(sizes, share, seed, num_beams):
    total = int(torch.tensor(sizes).prod())
    num_items = max(1, round(share * total))
    model = build_model(codebook_sizes=sizes, num_items=num_items, seed=seed, embeddings=False)
    input_ids, mask, _ = random_histories(model, [3, 1], seed=seed)
    sequences = model.generate(input_ids, attention_mask=mask, num_beams=num_beams, num_return_sequences=num_beams)
    items = generated_items(model, sequences, input_ids.shape[1]).view(2, -1)
    assert (items >= 0).all()
    assert all(len(set(row)) == len(row) for row in items.tolist())
    sampled = model.generate(input_ids, attention_mask=mask, num_beams=1, do_sample=True)
    assert (generated_items(model, sampled, input_ids.shape[1]) >= 0).all()


def test_top_k_and_temperature_do_not_change_the_beams(tmp_path):
    model = build_model(num_items=60)
    input_ids, mask, _ = random_histories(model, [4, 2])
    arguments = {"attention_mask": mask, "num_beams": 8, "num_return_sequences": 8}
    expected = model.generate(input_ids, **arguments)
    base = GenerationConfig(top_k=2, temperature=0.1, top_p=0.3)
    assert torch.equal(model.generate(input_ids, base, **arguments), expected), "a positional generation config"
    model.save_pretrained(tmp_path)
    loaded = UniGRFForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.length_penalty == 0.0 and loaded.generation_config.top_k is None
    assert torch.equal(loaded.generate(input_ids, **arguments), expected)


class StopAtOnce(StoppingCriteria):
    """Stop all rows."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.ones(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
@pytest.mark.parametrize(
    "option",
    [
        {"stop_strings": ["<b_1>"], "tokenizer": object()},
        {"stopping_criteria": StoppingCriteriaList([StopAtOnce()])},
        {"max_time": 60.0},
        {"eos_token_id": [2, 7]},
        {"eos_token_id": 8},
    ],
    ids=short_id,
)
def test_nothing_stops_a_row_inside_an_item(option, mode):
    model = build_model()
    input_ids, mask, _ = random_histories(model, [4, 2])
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` must not stop a row inside an item, .* got "):
        model.generate(input_ids, attention_mask=mask, **mode, **option)


def test_missing_generation_fields_fall_back_to_the_defaults(tmp_path):
    model = build_model(num_items=60, exclude_history=True)
    input_ids, mask, _ = random_histories(model, [4, 2])
    expected = model.generate(input_ids, attention_mask=mask)
    best = model.recommend(input_ids, mask)
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = UniGRFForCausalLM.from_pretrained(tmp_path, generation_config=GenerationConfig())
    loaded.save_pretrained(tmp_path)
    for restored in (loaded, UniGRFForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(restored.generate(input_ids, attention_mask=mask), expected)
        assert restored.generation_config.to_diff_dict().items() >= model.generation_config.to_diff_dict().items()
    model.generation_config = GenerationConfig(max_new_tokens=4)
    assert torch.equal(model.recommend(input_ids, mask).item_indices, best.item_indices)
    assert model.serving_options().max_return_sequences == 10


def test_generation_keeps_no_state_between_calls_or_rows():
    model = build_model(num_items=60)
    input_ids, mask, _ = random_histories(model, [4, 2, 3, 1, 5])  # no codebook has this size
    together = model.recommend(input_ids, mask, num_beams=6, num_return_sequences=6)
    for row in (3, 0, 3):
        alone = model.recommend(input_ids[row : row + 1], mask[row : row + 1], num_beams=6, num_return_sequences=6)
        assert alone.item_indices[0].tolist() == together.item_indices[row].tolist()
        torch.testing.assert_close(alone.scores[0], together.scores[row], atol=1e-5, rtol=1e-5)


def test_a_partial_item_is_completed_and_a_dead_prefix_raises():
    model = build_model(codebook_sizes=(6, 3, 2), num_items=5)
    input_ids, _, _ = random_histories(model, [2])
    codes = model.catalog.item_codes.long()
    partial = torch.cat([input_ids, model.layout.item_tokens(codes[:1])[:, :1]], dim=1)
    sequences = model.generate(partial, num_beams=4, num_return_sequences=4)
    items = generated_items(model, sequences, input_ids.shape[1])
    assert set(items.tolist()) == set((codes[:, 0] == codes[0, 0]).nonzero()[:, 0].tolist())
    dead = next(code for code in range(6) if code not in codes[:, 0].tolist())
    prefix = torch.cat([input_ids, torch.tensor([[model.config.code_offsets[0] + dead]])], dim=1)
    for num_beams in (1, 4):
        with pytest.raises(ValueError, match="must end in the first codes of an item of the catalog"):
            model.generate(prefix, num_beams=num_beams)
    wrong_level = torch.cat([input_ids, torch.tensor([[model.config.code_offsets[1]]])], dim=1)
    with pytest.raises(ValueError, match=r"codes of levels 0, 1, \.\.\. in order"):
        model.generate(wrong_level, num_beams=4)


def test_histories_that_no_item_can_follow_are_rejected():
    model = build_model()
    input_ids, mask, _ = random_histories(model, [2, 1])
    with pytest.raises(ValueError, match="after which no item begins"):
        model.generate(input_ids[:, :-1], attention_mask=mask[:, :-1], num_beams=3)  # ends in a whole item
    with pytest.raises(ValueError, match="after which no item begins"):
        model.recommend(torch.zeros(1, 4, dtype=torch.long))  # only padding
    with pytest.raises(ValueError, match="must hold items of the catalog, got 1 others"):
        unknown = input_ids.clone()
        known = {tuple(code) for code in model.catalog.item_codes.tolist()}
        missing = next(
            c for c in torch.cartesian_prod(*map(torch.arange, (4, 3, 3, 2))).tolist() if tuple(c) not in known
        )
        unknown[0, 1:5] = model.layout.item_tokens(torch.tensor(missing))
        model.recommend(unknown, mask)
    with pytest.raises(ValueError, match=r"must have the shape \(2, 11\) of input_ids, got .* \(2, 10\)"):
        model.recommend(input_ids, mask[:, 1:])
    cache = model(input_ids, mask, use_cache=True).cache
    with pytest.raises(ValueError, match="at most the 6 tokens of input_ids, got 11"):
        model.recommend(input_ids[:, :6], mask[:, :6], cache=cache)
    codes = model.layout.item_tokens(model.catalog.item_codes[0].long())
    ragged = torch.stack([torch.cat([input_ids[0], codes[:1]]), torch.cat([input_ids[1, 1:], codes[:2]])])
    with pytest.raises(ValueError, match=r"equally many codes of an unfinished item, got \[1, 2\]"):
        model.generate(ragged, num_beams=3)
    gpt2 = build_model("gpt2")
    for items in (51, 60):  # too long with the next item, or already without it
        long_ids, long_mask, _ = random_histories(gpt2, [items])
        for call in (gpt2.recommend, gpt2.generate, lambda *args: gpt2.rank(*args, torch.tensor([[1]]))):
            with pytest.raises(ValueError, match=f"the 256 positions of the backbone, got {5 * items + 5} tokens"):
                call(long_ids, long_mask) if call != gpt2.generate else call(long_ids, attention_mask=long_mask)


def test_lists_of_items_hold_inside_the_search(backbone):
    model = build_model(backbone)
    input_ids, mask, items = random_histories(model, [4, 2])
    scores = exact_scores(model, input_ids, mask)
    allowed = [[1, 2, 3, 5, 8, 13, 21], [0, 29]]
    blocked = [[2, 8], []]
    everything = model.config.num_items
    best = model.recommend(
        input_ids, mask, num_beams=everything, num_return_sequences=7, allowed_items=allowed, blocked_items=blocked
    )
    assert sorted(best.item_indices[0].tolist()) == [-1, -1, 1, 3, 5, 13, 21]
    assert sorted(best.item_indices[1].tolist()) == [-1] * 5 + [0, 29]
    assert (best.scores[best.item_indices < 0] == -torch.inf).all()
    lists = {"allowed_items": allowed, "blocked_items": blocked}
    unweighted = model.recommend(input_ids, mask, num_beams=everything, ranking_weight=0.0, **lists)
    assert (unweighted.scores[unweighted.item_indices < 0] == -torch.inf).all()
    row = best.item_indices[0][:5]
    torch.testing.assert_close(best.generation_scores[0][:5], scores[0][row], atol=2e-5, rtol=1e-4)
    fresh = model.recommend(
        input_ids, mask, num_beams=everything, num_return_sequences=everything, exclude_history=True
    )
    for listed, history in zip(fresh.item_indices.tolist(), items, strict=True):
        assert sorted(item for item in listed if item >= 0) == sorted(set(range(everything)) - set(history))
    # Blocked items take no places in a narrow beam.
    narrow = model.recommend(
        input_ids, mask, num_beams=3, num_return_sequences=3, blocked_items=[list(range(27)), list(range(20))]
    )
    assert sorted(narrow.item_indices[0].tolist()) == [27, 28, 29] and (narrow.item_indices[1] >= 20).all()


def test_item_lists_that_leave_no_item_are_rejected():
    model = build_model()
    input_ids, mask, _ = random_histories(model, [2, 1])
    with pytest.raises(ValueError, match="got none for request 1"):
        model.recommend(input_ids, mask, allowed_items=[[3], []])
    with pytest.raises(ValueError, match="got none for request 0"):
        model.recommend(input_ids, mask, allowed_items=[[3], [4]], blocked_items=[[3], []])
    with pytest.raises(ValueError, match="got all of them for request 1"):
        model.recommend(input_ids, mask, blocked_items=[[], range(30)])
    with pytest.raises(ValueError, match="a catalog of 30 items, got 30 to 30 for request 0"):
        model.recommend(input_ids, mask, blocked_items=[[30], []])
    for wrong in (torch.ones(30, dtype=torch.bool), [1.9]):  # a cast would turn both into indices
        with pytest.raises(ValueError, match="must be a list of item indices, integers"):
            model.recommend(input_ids, mask, allowed_items=[[3], wrong])
        with pytest.raises(ValueError, match="must be a list of item indices, integers"):
            model.catalog.subset(wrong)
    with pytest.raises(ValueError, match="one list for each of 2 requests, got 1"):
        model.recommend(input_ids, mask, allowed_items=[[3]])


WRONG_LISTS = [
    ["a", "b", "c"],
    [1, 2, 3],
    [["sku-1"], [], []],
    [[1], [[2]], []],
    [[1], [None], []],
    [[1], None, []],
    np.array([1, 2, 3]),
    torch.tensor([1, 2, 3]),
    np.array([[1.0], [2.0], [3.0]]),
    [np.array(["sku-1"]), [], []],
    "abc",
    {0: [1], 1: [2], 2: [3]},
    7,
]


@pytest.mark.parametrize("lists", WRONG_LISTS, ids=lambda lists: str(lists)[:20])
def test_lists_of_another_type_are_rejected(lists):
    model = build_model()
    input_ids, mask, _ = random_histories(model, [2, 1, 1])
    for name in ("allowed_items", "blocked_items"):
        for exclude_history in (False, True):
            with pytest.raises(ValueError, match=f"`{name}.* must (be a list of item indices|hold one list for each)"):
                model.recommend(input_ids, mask, exclude_history=exclude_history, **{name: lists})


def test_arrays_of_item_indices_are_lists():
    model = build_model()
    input_ids, mask, _ = random_histories(model, [2, 1, 1])
    expected = model.recommend(input_ids, mask, allowed_items=[[1, 4], [2, 5], [3, 6]])
    for lists in (
        np.array([[1, 4], [2, 5], [3, 6]]),
        torch.tensor([[1, 4], [2, 5], [3, 6]]).int(),
        [{1, 4}, (2, 5), range(3, 7, 3)],
    ):
        best = model.recommend(input_ids, mask, allowed_items=lists)
        assert torch.equal(best.item_indices, expected.item_indices)


@pytest.mark.parametrize("items", [["sku-1"], "sku-1", 3, [[1, 2]], [1.5], [True], None, np.array([0.0])], ids=str)
def test_a_part_of_other_things_than_indices_is_rejected(items):
    model = build_model()
    with pytest.raises(ValueError, match="`items` must be a list of item indices"):
        model.catalog.subset(items)
    input_ids, mask, _ = random_histories(model, [2])
    if items is not None:
        for call in (model.recommend, model.generate):
            with pytest.raises(ValueError, match=r"`catalog` must be a part of the model's catalog, got a .*subset"):
                call(input_ids, attention_mask=mask, catalog=items)


@pytest.mark.parametrize("grows", [False, True])
def test_a_part_of_another_catalog_is_rejected(grows):
    model = build_model(codebook_sizes=(4, 3, 3), num_items=20)
    input_ids, mask, _ = random_histories(model, [2])
    part = model.catalog.subset([1, 2, 3])
    codes = model.catalog.item_codes
    known = set(map(tuple, codes.tolist()))
    free = next(
        code for code in torch.cartesian_prod(*map(torch.arange, (4, 3, 3))).tolist() if tuple(code) not in known
    )
    new = codes[:1].clone().index_fill_(1, torch.tensor([2]), 3) if grows else torch.tensor([free])
    model.add_items(new, torch.zeros(1, 6))
    calls = (model.recommend, model.generate)
    for call in calls:
        if grows:
            with pytest.raises(
                ValueError, match=r"`catalog` must hold items of the model's catalog .*after items were"
            ):
                call(input_ids, attention_mask=mask, catalog=part)
        else:
            call(input_ids, attention_mask=mask, catalog=part)
    model.set_catalog(model.catalog.item_codes.flip(0), model.catalog.content_embeddings)
    for call in calls:
        with pytest.raises(ValueError, match="`catalog` must hold items of the model's catalog"):
            call(input_ids, attention_mask=mask, catalog=part)


def test_inputs_of_another_type_are_rejected():
    model = build_model("hstu", num_retrieved_items=2)
    input_ids, mask, _ = random_histories(model, [2, 1])
    times = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    longer = long_histories(model, [3, 2])["long_history"]
    good = {"input_ids": input_ids, "attention_mask": mask, "timestamps": times, "query_time": times[:, -1] + 1}
    calls = [model.recommend, lambda **inputs: model.rank(**inputs, candidates=torch.tensor([[1], [2]]))]
    for name, value in good.items():
        for wrong in (value.tolist(), value.numpy(), "abc", value.double() if name != "attention_mask" else 3):
            for call in (*calls, model.generate, model.prefill):
                inputs = good | ({} if call in (model.generate, model.prefill) else {"long_history": longer})
                with pytest.raises(ValueError, match=f"`{name}` must"):
                    call(**(inputs | {name: wrong}))
    for wrong in (0.5, float("nan"), float("inf"), 2, -1):
        other = mask.clone() if isinstance(wrong, int) else mask.double()
        other[1, -1] = wrong
        for call in (*calls, model.generate, model.prefill):
            with pytest.raises(ValueError, match=r"`attention_mask` must be 1 .* of row 1"):
                call(**(good | {"attention_mask": other}))
    for wrong in ([[1], [2]], {"items": [[1], [2]]}, {**longer, "behaviors": longer["behaviors"].tolist()}):
        for call in calls:
            with pytest.raises(ValueError, match=r"`long_history.* must be"):
                call(**good, long_history=wrong)
    for wrong in ([[1], [2]], np.array([[1], [2]]), torch.tensor([[1.0], [2.0]])):
        with pytest.raises(ValueError, match="`candidates` must be integers of shape"):
            model.rank(**good, candidates=wrong, long_history=longer)
    for wrong in ((), "cache", [input_ids]):
        with pytest.raises(ValueError, match="`cache` must be a `DynamicCache"):
            model.recommend(**good, cache=wrong, long_history=longer)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_atomic_ids_are_the_one_level_case(backbone, similarity):
    model = build_model(
        backbone,
        codebook_sizes=(40,),
        num_items=33,
        code_similarity=similarity,
        code_temperature=0.3,
        tie_word_embeddings=similarity == "cosine",
    )
    input_ids, mask, _ = random_histories(model, [3, 1])
    best = model.recommend(input_ids, mask, num_beams=33, num_return_sequences=33, ranking_weight=0.0)
    expected = exact_scores(model, input_ids, mask).sort(dim=1, descending=True)
    assert torch.equal(best.item_indices, expected.indices)
    torch.testing.assert_close(best.scores, expected.values, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        states = model.model(input_ids, mask).last_hidden_state
        vectors = model.lm_head.weight
        if similarity == "cosine":
            assert vectors is model.get_input_embeddings().weight
            states, vectors = (torch.nn.functional.normalize(tensor, dim=-1) for tensor in (states, vectors))
        torch.testing.assert_close(model(input_ids, mask).logits, states @ vectors.T / 0.3, atol=2e-5, rtol=1e-4)


def test_the_processor_finds_its_node_from_the_tokens_alone():
    model = build_model()
    processor = TrieLogitsProcessor(model.layout, model.catalog.trie, model.config.pad_token_id)
    input_ids, _, _ = random_histories(model, [3, 3])
    item = model.layout.item_tokens(model.catalog.item_codes[:1].long())[0]
    ragged = torch.stack([input_ids[0], torch.cat([input_ids[1, 2:], item[:2]])])
    scores = processor(ragged, torch.randn(2, model.config.vocab_size))
    level_0 = scores[0, model.layout.level_slices[0]].exp().sum()
    assert level_0 <= 1.0001 and scores[0].isfinite().sum() == model.catalog.trie.levels[0].num_nodes
    assert scores[1].isfinite().nonzero()[:, 0].tolist() == sorted(
        {
            model.config.code_offsets[2] + c[2]
            for c in model.catalog.item_codes.tolist()
            if c[:2] == (item[:2] - torch.tensor(model.config.code_offsets[:2])).tolist()
        }
    )


def test_stock_beam_search_generates_existing_items():
    model = build_model(num_items=60)
    input_ids, mask, _ = random_histories(model, [4, 2])
    arguments = {"attention_mask": mask, "num_beams": 4, "num_return_sequences": 4}
    expected = model.generate(input_ids, **arguments)
    static = model.generate(input_ids, cache_implementation="static", **arguments)
    assert torch.equal(static, expected)
    attentions = model.generate(
        input_ids, output_scores=True, output_logits=True, return_dict_in_generate=True, **arguments
    )
    assert len(attentions.logits) == 4 and torch.equal(attentions.sequences, expected)
    sampled = model.generate(input_ids, do_sample=True, **arguments)
    assert (generated_items(model, sampled, input_ids.shape[1]) >= 0).all()
    with pytest.raises(ValueError, match="`cache` must be a `DynamicCache"):
        model.rank(input_ids, mask, torch.tensor([[1], [2]]), cache=StaticCache(model.config, max_cache_len=40))


@pytest.mark.parametrize("stock", [{"output_logits": True}, {"do_sample": True}], ids=["logits", "do_sample"])
def test_stock_beam_search_has_no_more_beams_than_items(stock):
    model = build_model(num_items=60)
    input_ids, mask, _ = random_histories(model, [4, 2])
    market = [1, 2, 3]
    arguments = {"attention_mask": mask, "num_beams": 7, "num_return_sequences": 7}
    arguments |= {"catalog": model.catalog.subset(market), **stock}
    for seed in range(3):
        torch.manual_seed(seed)
        output = model.generate(input_ids, output_scores=True, return_dict_in_generate=True, **arguments)
        items = generated_items(model, output.sequences, input_ids.shape[1]).view(2, 7)
        assert items[:, :3].sort().values.tolist() == [market] * 2 and (items[:, 3:] == -1).all()
        assert (output.sequences_scores.view(2, 7) == -torch.inf).equal(items == -1)
        assert (output.sequences.view(2, 7, -1)[:, 3:, -4:] == model.config.pad_token_id).all()
    plain = model.generate(input_ids, return_dict_in_generate=True, **arguments)
    assert plain.scores is plain.sequences_scores is None


def test_padding_takes_no_positions():
    model = build_model("gpt2")  # has 256 positions
    input_ids, mask, _ = random_histories(model, [3])
    wide, wide_mask = (torch.nn.functional.pad(inputs, (300, 0)) for inputs in (input_ids, mask))
    expected, actual = (model.recommend(*inputs, num_beams=10) for inputs in ((input_ids, mask), (wide, wide_mask)))
    torch.testing.assert_close(actual.scores, expected.scores)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        *((name, "") for name in ("mpt", "bloom", "gpt_neo", "opt", "openai-gpt")),
        ("falcon", r" with \['alibi=True'\]"),
        ("llama4_text", r" with \['chunked_attention'\]"),
        ("recurrent_gemma", r" with \['linear_attention'\]"),
        ("bert", r" with \['is_decoder=False'\]"),
        ("gemma3_text", r" with \['use_bidirectional_attention=True'\]"),
    ],
    ids=short_id,
)
def test_unsupported_backbones_are_rejected(model_type, reason):
    text_config = {"model_type": model_type, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text_config |= {"falcon": {"alibi": True}, "gemma3_text": {"use_bidirectional_attention": True}}.get(
        model_type, {}
    )
    with pytest.raises(ValueError, match=f"places tokens by `position_ids`.*'{model_type}'{reason}"):
        UniGRFForCausalLM(UniGRFConfig(text_config=text_config, codebook_sizes=[4, 4]))


def test_a_catalog_set_in_inference_mode_can_be_searched():
    model = build_model()
    other = build_model(seed=1).catalog
    input_ids = random_histories(model, [2])[0]  # its <bos> is in both catalogs
    model.set_catalog(other.item_codes, other.content_embeddings)
    expected = model.generate(input_ids[:, :1], num_beams=9)
    model = build_model()
    with torch.inference_mode():
        model.set_catalog(other.item_codes.clone(), other.content_embeddings.clone())
    assert torch.equal(model.generate(input_ids[:, :1], num_beams=9), expected)


def test_another_catalog_is_swapped_in_at_call_time(backbone):
    model = build_model(backbone)
    input_ids, mask, items = random_histories(model, [4, 2])
    scores = exact_scores(model, input_ids, mask)
    market = torch.tensor([1, 4, 9, 16, 25, items[0][0]]).unique()
    expected = scores[:, market].sort(dim=1, descending=True)
    catalog = model.catalog.subset(market)
    arguments = {"num_beams": 10, "num_return_sequences": 10}
    everything = model.recommend(input_ids, mask, ranking_weight=0.0, **arguments)
    best = model.recommend(input_ids, mask, ranking_weight=0.0, catalog=catalog, **arguments)
    assert torch.equal(best.item_indices[:, : len(market)], market[expected.indices])
    torch.testing.assert_close(best.scores[:, : len(market)], expected.values, atol=2e-5, rtol=1e-4)
    assert (best.item_indices[:, len(market) :] == -1).all()
    sequences = model.generate(input_ids, attention_mask=mask, catalog=catalog, **arguments)
    assert torch.equal(generated_items(model, sequences, input_ids.shape[1]).view(2, -1), market[expected.indices])
    sampled = model.generate(input_ids, attention_mask=mask, catalog=catalog, do_sample=True, num_beams=1)
    assert torch.isin(generated_items(model, sampled, input_ids.shape[1]), market).all()
    fresh = model.recommend(input_ids, mask, exclude_history=True, catalog=catalog, **arguments)
    left = set(market.tolist()) - set(items[0])
    assert {item for item in fresh.item_indices[0].tolist() if item >= 0} == left and items[0][0] in market
    again = model.recommend(input_ids, mask, ranking_weight=0.0, **arguments)
    assert torch.equal(again.item_indices, everything.item_indices), "the subset holds for one call"
    for name, value in (("item_sets", {"blocked_items": market[None]}), ("labels", input_ids)):
        with pytest.raises(ValueError, match=f"`generate` must be called without .'{name}'"):
            model.generate(input_ids, attention_mask=mask, num_beams=3, **{name: value})
    catalog.leaf_items = catalog.leaf_items.to("meta")  # as after the model was moved
    for call in (model.generate, model.recommend):
        with pytest.raises(ValueError, match="got meta"):
            call(input_ids, attention_mask=mask, num_beams=3, catalog=catalog)
    catalog = model.catalog.subset(market)
    with pytest.raises(ValueError, match="a catalog of 30 items, got 30 to 30"):
        model.catalog.subset([30])
    with pytest.raises(ValueError, match="got none for request 1"):
        model.recommend(input_ids, mask, catalog=catalog, allowed_items=[[1, 2], [2, 3]])


def test_continuous_batching_is_rejected():
    model = build_model()
    input_ids, mask, _ = random_histories(model, [2])
    calls = (
        lambda: model.generate_batch(input_ids.tolist()),
        lambda: model.continuous_batching_context_manager().__enter__(),
        lambda: model.init_continuous_batching(),
        lambda: model.generate(input_ids, attention_mask=mask, cache_implementation="paged"),
    )
    for call in calls:
        with pytest.raises(ValueError, match="drop the trie of the items that exist"):
            call()


CODES = build_model(num_items=30).catalog.item_codes
WRONG_CODES = {
    "text": "abc",
    "ids": [["sku-1"]],
    "floats": CODES.float(),
    "mask": CODES > 0,
    "unequal": [[1, 2], [1]],
    "negative": -CODES - 1,
    "objects": CODES.numpy().astype(object),
    "texts": CODES.numpy().astype(str),
    "unsigned": CODES.numpy().astype(np.uint64),
    "complex": CODES.to(torch.complex64),
    "one item": CODES[0],
    "dict": {0: [0, 0, 0, 0]},
    "none": None,
}


@pytest.mark.parametrize("values", WRONG_CODES.values(), ids=list(WRONG_CODES))
def test_codes_and_embeddings_of_other_types_are_rejected(values):
    model = build_model()
    embeddings = model.catalog.content_embeddings
    for call in (model.set_catalog, model.add_items):
        with pytest.raises(ValueError, match="`item_codes` must "):
            call(values, embeddings)
        with pytest.raises(ValueError, match="`content_embeddings` must "):
            call(CODES, values)
    assert torch.equal(model.catalog.item_codes, CODES) and torch.equal(model.catalog.content_embeddings, embeddings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("candidates_per_pack", value) for value in (0, -1, 1.5, "2", True)),
        *(("history_states", value) for value in ("x", torch.zeros(3), torch.zeros(2, 7), torch.zeros(2, 32).long())),
    ],
    ids=short_id,
)
def test_options_of_rank_out_of_range_are_rejected(name, value):
    model = build_model()
    input_ids, mask, _ = random_histories(model, [3, 2])
    inputs = {"input_ids": input_ids, "attention_mask": mask, "candidates": torch.tensor([[1], [2]])}
    with pytest.raises(ValueError, match=f"`{name}` must be "):
        model.rank(**inputs, cache=prefilled_cache(model, input_ids, mask), **{name: value})
    with pytest.raises(ValueError, match="and no cache"):
        model.rank(**inputs, history_states=torch.zeros(2, 32))


@pytest.mark.parametrize(
    ("call", "options"),
    [
        ("recommend", {"exclude_history": "no"}),
        ("recommend", {"exclude_history": torch.tensor([True, False])}),
        ("recommend", {"generation_config": {"num_beams": 3}}),
        ("forward", {"input_ids": [[2, 5]]}),
        ("forward", {"input_ids": torch.tensor([2, 5])}),
        ("forward", {"labels": [[2, 5]]}),
        ("forward", {"item_sets": [1], "labels": torch.ones(2, 16).long()}),
    ],
    ids=short_id,
)
def test_other_types_of_inputs_are_rejected(call, options):
    model = build_model()
    input_ids, mask, _ = random_histories(model, [3, 2])
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be "):
        getattr(model, call)(**{"input_ids": input_ids, "attention_mask": mask, **options})


@pytest.mark.parametrize(
    ("num_items", "processors", "length_penalty"), [(60, False, 0.0), (60, True, 1.5), (3, True, 0.0)]
)
def test_scores_of_steps_equal_those_of_stock_beam_search(backbone, num_items, processors, length_penalty):
    model = build_model(backbone, num_items=60)
    input_ids, mask, _ = random_histories(model, [4, 2])
    catalog = model.catalog.subset(list(range(num_items)))
    arguments = {"attention_mask": mask, "num_beams": 5, "num_return_sequences": 4, "catalog": catalog}
    arguments |= {"output_scores": True, "return_dict_in_generate": True, "length_penalty": length_penalty}
    if processors:
        arguments["logits_processor"] = LogitsProcessorList([TemperatureLogitsWarper(3.0)])
    for first in (0, 2):
        prefix = torch.cat([input_ids, model.layout.item_tokens(catalog_codes(model, catalog))[:2, :first]], dim=1)
        arguments["attention_mask"] = torch.cat([mask, mask.new_ones(2, first)], dim=1)
        actual = model.generate(prefix, **arguments)
        stock = model.generate(prefix, **arguments, **STOCK_BEAM_SEARCH)
        shown = actual.sequences_scores > -1e8
        assert shown.any() and len(actual.scores) == len(stock.scores) == 4 - first
        assert actual.scores[0].shape == stock.scores[0].shape
        shape = stock.sequences.view(2, 4, -1)[:, : len(shown) // 2].flatten(0, 1).shape
        of_stock = {
            name: stock[name].unflatten(0, (2, 4))[:, : len(shown) // 2].flatten(0, 1)[shown]
            for name in ("sequences", "sequences_scores", "beam_indices")
        }
        assert shape == actual.sequences.shape and torch.equal(actual.sequences[shown], of_stock["sequences"])
        assert torch.equal(actual.beam_indices[shown], of_stock["beam_indices"].long())
        steps, expected = (
            model.compute_transition_scores(output["sequences"], scores, output["beam_indices"])
            for output, scores in ((actual, actual.scores), (of_stock, stock.scores))
        )
        torch.testing.assert_close(steps[shown], expected, atol=2e-5, rtol=1e-4)
        total = steps.sum(dim=1) / steps.shape[1] ** length_penalty
        torch.testing.assert_close(total[shown], actual.sequences_scores[shown], atol=2e-5, rtol=1e-4)
        assert (steps[~shown] == 0).all()


def catalog_codes(model, catalog):
    """Return the codes of two items of a part of the catalog."""
    return model.catalog.item_codes[[0, min(1, catalog.num_items - 1)]].long()


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("kind", ["prompt lookup", "long lookup", "assistant", "itself"])
def test_assisted_decoding_equals_plain_decoding(backbone, kind, first):
    model = build_model(backbone)
    other = build_model("llama", seed=1)
    other.set_catalog(model.catalog.item_codes, model.catalog.content_embeddings)
    options = {
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
        "long lookup": {"prompt_lookup_num_tokens": 9, "max_matching_ngram_size": 1},
        "assistant": {"assistant_model": other},
        "itself": {"assistant_model": model},
    }[kind]
    for seed in range(3):
        input_ids, _, _ = random_histories(model, [4], seed=seed)
        # The items once more: a lookup finds their tokens behind the item, too.
        input_ids = torch.cat([input_ids, input_ids[:, 1:], input_ids[:, 1 : 1 + first]], dim=1)
        plain = {"num_beams": 1, "max_new_tokens": 12}
        expected = model.generate(input_ids, **plain)
        assert expected.shape[1] == input_ids.shape[1] + 4 - first
        assert torch.equal(model.generate(input_ids, **plain, **options), expected)
        sampled = model.generate(input_ids, **plain, **options, do_sample=True)
        assert sampled.shape == expected.shape
        assert generated_items(model, sampled[:, : sampled.shape[1]], input_ids.shape[1] - first).min() >= 0
    with pytest.raises(ValueError, match="`assistant_early_exit` must be None, got 1"):
        model.generate(input_ids, num_beams=1, assistant_early_exit=1)
