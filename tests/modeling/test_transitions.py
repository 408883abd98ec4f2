"""Test transitions: counts, scores, candidates, updates without training, and items that training did not know."""

import math
from collections import Counter

import pytest
import torch
from helpers import build_model, exact_scores, random_histories
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_unigrf import UniGRFForCausalLM
from modeling_unigrf.transitions_unigrf import TransitionSettings, last_items

SETTINGS = TransitionSettings(history_decay=0.6, transition_smoothing=5.0, popularity_weight=0.7, content_weight=3.0)
OPTIONS = {**vars(SETTINGS), "transition_weight": 0.5}


def users(seed=0, count=12, num_items=30):
    """Draw histories of 0 to 24 items."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 25, (count,), generator=generator).tolist()
    return [torch.randint(num_items, (length,), generator=generator).tolist() for length in lengths]


def expected_counts(histories):
    """Count as the module's docstring says, pair by pair."""
    counts = Counter()
    for history in histories:
        for later, target in enumerate(history):
            for distance in range(1, min(20, later) + 1):
                counts[history[later - distance], target] += 0.7 ** (distance - 1)
    return counts


def table_of(transitions):
    """Return the counts of a table by pair of items."""
    return {
        (item, int(neighbor)): float(count)
        for item, row in enumerate(transitions.neighbors)
        for neighbor, count in zip(row, transitions.counts[item], strict=True)
        if neighbor >= 0
    }


def expected_score(model, histories, history, item):
    """Compute the score of an item that occurs in `histories`, by the formula of the module's docstring."""
    counts = expected_counts(histories)
    taken = Counter(item for history in histories for item in history)
    share = taken[item] / sum(taken.values())
    content = torch.nn.functional.normalize(model.catalog.content_embeddings, dim=1)
    score = 0.7 * math.log(taken[item])
    mean = torch.zeros(content.shape[1])
    for place, source in enumerate(reversed(history)):
        score += 0.6**place * math.log1p(counts[source, item] / (5.0 * share))
        mean += 0.6**place * content[source]
    return score + 3.0 * float(torch.nn.functional.normalize(mean, dim=0) @ content[item])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 24))
def test_counting_in_parts_equals_counting_at_once(seed, cut):
    histories = users(seed)
    model = build_model()
    model.set_transitions(histories)
    at_once = table_of(model.transitions)
    assert at_once == pytest.approx(dict(expected_counts(histories)), rel=2e-3)
    assert model.transitions.item_counts.tolist() == [sum(h.count(item) for h in histories) for item in range(30)]
    model.set_transitions([history[:cut] for history in histories])
    model.update_transitions(histories, [max(0, len(history) - cut) for history in histories])
    assert table_of(model.transitions) == pytest.approx(at_once, rel=2e-3)


def test_a_small_table_keeps_the_greatest_counts():
    model = build_model()
    histories = users()
    model.set_transitions(histories, num_transitions=2)
    assert model.config.num_transitions == 2 and model.transitions.neighbors.shape == (30, 2)
    counts = expected_counts(histories)
    for item in range(30):
        greatest = sorted((count for (source, _), count in counts.items() if source == item), reverse=True)[:2]
        kept = [float(count) for count in model.transitions.counts[item] if count > 0]
        assert kept == pytest.approx(greatest, rel=2e-3)


def test_transition_scores_equal_their_formula():
    model = build_model()
    histories = [*users(), list(range(30))]
    model.set_transitions(histories)
    for history in ([3, 7, 7, 11], [5], list(range(25))):
        last = last_items(torch.zeros(len(history), dtype=torch.long), torch.tensor(history), 1)
        scores = model.scorer.transition_scores(last, SETTINGS)[0]
        expected = [expected_score(model, histories, history[-20:], item) for item in range(30)]
        torch.testing.assert_close(scores, torch.tensor(expected), atol=2e-3, rtol=2e-3)


def test_transition_candidates_equal_a_full_search():
    """Few beams with all items as transition candidates equal exact scoring of all items."""
    model = build_model()
    model.set_transitions([*users(), list(range(30))])
    input_ids, mask, items = random_histories(model, [4, 2])
    log_probs = exact_scores(model, input_ids, mask)
    rows = torch.tensor([0] * 4 + [1] * 2)
    last = last_items(rows, torch.tensor(items[0] + items[1]), 2)
    expected = (0.3 * log_probs + 0.5 * model.scorer.transition_scores(last, SETTINGS)).sort(dim=1, descending=True)
    for num_beams, num_candidates in ((1, 30), (30, 0), (5, 40)):
        best = model.recommend(
            input_ids,
            mask,
            num_beams=num_beams,
            num_transition_candidates=num_candidates,
            num_dense_candidates=4,
            num_return_sequences=30,
            generation_weight=0.3,
            ranking_weight=0.0,
            **OPTIONS,
        )
        assert torch.equal(best.item_indices, expected.indices)
        torch.testing.assert_close(best.scores, expected.values, atol=5e-5, rtol=1e-4)


def test_transition_candidates_respect_the_item_lists():
    model = build_model()
    model.set_transitions(users())
    input_ids, mask, items = random_histories(model, [4, 2])
    best = model.recommend(
        input_ids,
        mask,
        num_beams=2,
        num_transition_candidates=20,
        num_return_sequences=22,
        exclude_history=True,
        allowed_items=[list(range(20)), [7, 8, 9]],
        blocked_items=[[4], []],
        catalog=model.catalog.subset(list(range(2, 30))),
        **OPTIONS,
    )
    for row, allowed in enumerate((set(range(2, 20)) - {4}, {7, 8, 9})):
        listed = [item for item in best.item_indices[row].tolist() if item >= 0]
        assert set(listed) == allowed - set(items[row]) and len(set(listed)) == len(listed)


def test_newer_interactions_change_lists_without_training(tmp_path):
    model = build_model()
    model.set_transitions(users())
    input_ids, mask, items = random_histories(model, [4])
    model.generation_config.update(
        **{**OPTIONS, "num_transition_candidates": 10, "transition_weight": 50.0, "popularity_weight": 3.0},
        allow_custom_entries=True,
    )
    before = {name: value.clone() for name, value in model.named_parameters()}
    wanted = next(item for item in range(30) if item not in model.recommend(input_ids, mask).item_indices[0, :3])
    model.update_transitions([[items[0][-1], wanted]] * 200, [1] * 200)
    best = model.recommend(input_ids, mask)
    assert best.item_indices[0, 0] == wanted
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    model.save_pretrained(tmp_path)
    loaded = UniGRFForCausalLM.from_pretrained(tmp_path).recommend(input_ids, mask)
    assert torch.equal(loaded.item_indices, best.item_indices) and torch.equal(loaded.scores, best.scores)


def test_a_twin_added_after_training_scores_as_its_original():
    model = build_model(history_item_representations=True)
    model.set_transitions([*users(), list(range(30))])
    original = 11
    used = {tuple(codes) for codes in model.catalog.item_codes.tolist()}
    prefix = model.catalog.item_codes[original, :3].tolist()
    free = next(code for code in range(5) if (*prefix, code) not in used)
    model.add_items(torch.tensor([[*prefix, free]]), model.catalog.content_embeddings[original][None])
    assert model.transitions.stand_ins.tolist() == [*range(30), original]
    input_ids, mask, _ = random_histories(model, [4, 2])
    best = model.recommend(
        input_ids, mask, num_beams=1, num_transition_candidates=31, num_return_sequences=31, **OPTIONS
    )
    for row in range(2):
        of_twin = (best.item_indices[row] == 30).nonzero()[0, 0]
        of_original = (best.item_indices[row] == original).nonzero()[0, 0]
        for name in ("dense_scores", "transition_scores"):
            torch.testing.assert_close(best[name][row, of_twin], best[name][row, of_original])
        # The even share among the items with the same first codes.
        siblings = sum(codes[:3] == prefix for codes in model.catalog.item_codes.tolist())
        last_code = -math.log(siblings)
        prefix_score = best.generation_scores[row, of_twin] - last_code
        assert prefix_score >= best.generation_scores[row, of_original] - 1e-4


def test_items_that_nobody_took_borrow_from_the_nearest():
    model = build_model()
    histories = [[item for item in history if item != 5] for history in [*users(), list(range(30))]]
    model.set_transitions(histories)
    content = torch.nn.functional.normalize(model.catalog.content_embeddings, dim=1)
    cosines = (content @ content[5]).masked_fill(torch.arange(30) == 5, -2.0)
    nearest = int(cosines.argmax())
    assert int(model.transitions.stand_ins[5]) == nearest
    scores = model.scorer.transition_scores(torch.tensor([[3, 8]]), TransitionSettings())[0]
    torch.testing.assert_close(scores[5], scores[nearest] * max(0.0, float(cosines[nearest])), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("histories", "num_new", "message"),
    [
        ([[0, 30]], None, "indices into a catalog of 30 items, got 0 to 30 in row 0"),
        ([[1], [-1, 2]], None, "got -1 to 2 in row 1"),
        ([1, 2], None, "must be a list of lists"),
        ([["1", "2"]], None, "must be a list of lists"),
        ([[1, 2]], [3], "from 0 to the 2 items of the history, got 3 in row 0"),
        ([[1, 2]], [1, 1], "one number for each of 1 histories, got 2"),
    ],
)
def test_wrong_interactions_leave_the_table_unchanged(histories, num_new, message):
    model = build_model()
    model.set_transitions(users())
    before = table_of(model.transitions)
    with pytest.raises(ValueError, match=message):
        model.update_transitions(histories, num_new)
    assert table_of(model.transitions) == before


def test_models_without_transitions_reject_their_options():
    model = build_model()
    input_ids, mask, _ = random_histories(model, [3])
    for options in ({"transition_weight": 1.0}, {"num_transition_candidates": 5}):
        with pytest.raises(ValueError, match="must be 0 for a model without transitions"):
            model.recommend(input_ids, mask, **options)
    with pytest.raises(ValueError, match="needs a model with a table of transitions"):
        model.update_transitions([[1, 2]])
    with pytest.raises(ValueError, match="`num_transitions` must be 1 or more"):
        model.set_transitions([[1, 2]], num_transitions=0)
    without = build_model(embeddings=False, ranking_targets=["like"])
    without.set_transitions(users())
    input_ids, mask, _ = random_histories(without, [3])
    with pytest.raises(ValueError, match="`content_weight` must be 0"):
        without.recommend(input_ids, mask, transition_weight=1.0, content_weight=1.0)
    assert without.recommend(input_ids, mask, transition_weight=1.0).transition_scores.isfinite().all()


def test_explanations_add_up_to_the_counts_of_the_score():
    model = build_model()
    model.set_transitions([*users(), list(range(30))])
    input_ids, mask, items = random_histories(model, [4, 2])
    everything = torch.arange(30).expand(2, -1)
    history, shares = model.explain(input_ids, mask, everything)
    assert [[item for item in row if item >= 0] for row in history.tolist()] == [row[::-1] for row in items]
    options = TransitionSettings(popularity_weight=0.0)
    torch.testing.assert_close(shares.sum(dim=2), model.scorer.transition_scores(history, options))


def test_a_bonus_lifts_what_training_did_not_know():
    model = build_model()
    model.set_transitions([[item for item in history if item < 25] for history in users()])
    is_new = model.scorer.is_untrained(torch.arange(30))
    assert is_new[25:].all() and model.scorer.known_items().tolist() == (~is_new).nonzero()[:, 0].tolist()
    input_ids, mask, _ = random_histories(model, [4, 2])
    options = {"num_beams": 30, "num_return_sequences": 30, "exclude_history": False, **OPTIONS}
    plain = model.recommend(input_ids, mask, **options)
    lifted = model.recommend(input_ids, mask, new_item_bonus=1e3, **options)
    assert is_new[lifted.item_indices[:, : is_new.sum()]].all()
    score = dict(zip(plain.item_indices[0].tolist(), plain.scores[0].tolist(), strict=True))
    for item, value in zip(lifted.item_indices[0].tolist(), lifted.scores[0].tolist(), strict=True):
        assert value == pytest.approx(score[item] + 1e3 * bool(is_new[item]), abs=1e-3)
    without = build_model()
    with pytest.raises(ValueError, match="must be 0 for a model without"):
        without.recommend(input_ids, mask, new_item_bonus=1.0)
