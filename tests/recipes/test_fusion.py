"""The search for the weights of the fused score."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.evaluation.fusion import BONUS_COST, LEAST_GAIN, WEIGHTS, choose_bonus, choose_weights, single_scores

FREE = dict.fromkeys(WEIGHTS)


def hill(best):
    """Make a measure whose NDCG@10 falls with the distance of the logs of the weights' ratios from `best`."""

    def measure(weights):
        if not any(weights.values()):
            return {"ndcg@10": 0.0}
        total = sum(weights.values())
        shares = [weight / total for weight in weights.values()]
        return {"ndcg@10": math.exp(-sum((share - wanted) ** 2 for share, wanted in zip(shares, best, strict=True)))}

    return measure


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda shares: sum(shares) > 0.5))
def test_the_chosen_list_is_never_behind_a_score_alone(parts):
    measure = hill([part / sum(parts) for part in parts])
    trials = choose_weights(measure, FREE)
    assert trials[-1]["ndcg@10"] >= max(trial["ndcg@10"] for trial in trials) * (1 - LEAST_GAIN)
    alone = [measure(weights)["ndcg@10"] for weights in single_scores(FREE)]
    assert trials[-1]["ndcg@10"] >= max(alone) and trials[-1]["ndcg@10"] > 0.9


def test_the_search_goes_beyond_its_first_values():
    trials = choose_weights(hill([0.97, 0.01, 0.01, 0.01]), FREE)
    assert trials[-1]["ndcg@10"] > 0.99


def test_values_to_choose_from_are_kept():
    choices = dict(zip(WEIGHTS, ([1.0], [0.5, 2.0], [0.0], [0.0, 3.0]), strict=True))
    trials = choose_weights(hill([0.2, 0.4, 0.0, 0.4]), choices)
    tried = {tuple(trial[name] for name in WEIGHTS) for trial in trials}
    assert tried <= set(itertools.product(*choices.values()))
    assert tuple(trials[-1][name] for name in WEIGHTS) == (1.0, 2.0, 0.0, 3.0)
    with pytest.raises(ValueError, match="must be above 0, got 0 for all"):
        choose_weights(hill([1, 0, 0, 0]), {name: [0.0] for name in WEIGHTS})


def test_the_bonus_finds_new_items_at_little_cost():
    def measure(weights):
        bonus = weights["new_item_bonus"]
        return {"ndcg@10": 0.1 - 0.0004 * bonus**2, "new items": min(bonus, 1.4)}

    best = {"generation_weight": 0.5, "ranking_weight": 0.0, "dense_weight": 0.0, "transition_weight": 1.0}
    best |= measure({"new_item_bonus": 0.0})
    rows = choose_bonus(measure, best)
    assert rows[-1]["new_item_bonus"] == 1.5, "the smallest of those that find most"
    assert rows[-1]["ndcg@10"] >= best["ndcg@10"] * (1 - BONUS_COST)
    none = choose_bonus(lambda weights: {"ndcg@10": 0.1, "new items": 0.0}, best | {"new items": 0.0})
    assert none[-1]["new_item_bonus"] == 0, "without effect, no bonus"
