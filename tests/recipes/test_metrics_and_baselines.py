"""Metrics and baselines against their written-out formulas, and the report."""

import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import ROOT

from recipes.evaluation import baselines
from recipes.evaluation.baselines import ItemKNN, Popularity
from recipes.evaluation.beyond_accuracy import RECALLS, ListStatistics
from recipes.evaluation.report import write_report

METRICS = ROOT / "recipes" / "evaluation" / "metrics"


@pytest.fixture(scope="module")
def next_item():
    return evaluate.load(str(METRICS / "next_item"), keep_in_memory=True)


@pytest.fixture(scope="module")
def like_auc():
    return evaluate.load(str(METRICS / "like_auc"), keep_in_memory=True)


def random_item_lists(num_users: int, num_items: int, seed: int) -> list[list[int]]:
    """Draw lists of items, some of which are much more popular than others."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 12, num_users)
    return [(rng.permutation(num_items)[:length] ** 2 // num_items).tolist() for length in lengths]


def test_next_item_equals_its_definition_for_ragged_lists(next_item):
    rng = np.random.default_rng(0)
    lists = [rng.permutation(30)[: rng.integers(0, 25)].tolist() for _ in range(200)]
    lists = [row + [-1] * int(rng.integers(0, 3)) for row in lists]
    targets = rng.integers(0, 30, 200).tolist()
    naive = {name: [] for name in ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr")}
    for row, target in zip(lists, targets, strict=True):
        rank = row.index(target) + 1 if target in row else None
        for k in (5, 10):
            is_hit = rank is not None and rank <= k
            naive[f"recall@{k}"].append(1.0 if is_hit else 0.0)
            naive[f"ndcg@{k}"].append(1 / np.log2(rank + 1) if is_hit else 0.0)
        naive["mrr"].append(1 / rank if rank else 0.0)
    expected = {name: np.mean(values) for name, values in naive.items()}
    assert next_item.compute(predictions=lists, references=targets) == pytest.approx(expected, abs=1e-12)


def test_next_item_counts_repeated_items_and_padding(next_item):
    assert next_item.compute(predictions=[[4, 7, 7]], references=[7])["mrr"] == 0.5
    assert next_item.compute(predictions=[[-1, -1, 7]], references=[7])["mrr"] == pytest.approx(1 / 3)
    assert next_item.compute(predictions=[[]], references=[7])["mrr"] == 0.0


def test_next_item_rejects_a_negative_target(next_item):
    with pytest.raises(ValueError, match="got -1 at row 1"):
        next_item.compute(predictions=[[1], [-1]], references=[1, -1])


def test_like_auc_is_the_share_of_correctly_ordered_pairs(like_auc):
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 6, 80) / 5
    labels = rng.integers(0, 2, 80)
    above = scores[labels == 1][:, None] - scores[labels == 0]
    expected = np.mean((above > 0) + 0.5 * (above == 0))
    actual = like_auc.compute(prediction_scores=scores.tolist(), references=labels.tolist())
    assert actual == pytest.approx({"auc": expected}, abs=1e-12)


@pytest.mark.parametrize("labels", [[1, 1], [0, 0], [0, 2]])
def test_like_auc_rejects_labels_without_both_classes(like_auc, labels):
    with pytest.raises(ValueError, match="must hold both 0"):
        like_auc.compute(prediction_scores=[0.1, 0.2], references=labels)


@pytest.mark.parametrize("window", [None, 3])
def test_item_knn_scores_equal_the_written_out_formula(window):
    num_items = 25
    neighbors = 4
    shrink = 2.0
    train = random_item_lists(60, num_items, seed=2)
    histories = random_item_lists(9, num_items, seed=3)
    takers = [{user for user, row in enumerate(train) if item in row} for item in range(num_items)]
    similarity = np.zeros((num_items, num_items))
    for i in range(num_items):
        for j in range(num_items):
            if i != j:
                norm = np.sqrt(len(takers[i]) * len(takers[j])) + shrink
                similarity[i, j] = len(takers[i] & takers[j]) / norm
        similarity[i, np.argsort(-similarity[i], kind="stable")[neighbors:]] = 0
    expected = np.zeros((len(histories), num_items))
    for row, history in enumerate(histories):
        for distance, item in enumerate(reversed(history)):
            weight = 1.0 if window is None else max(0.0, 1 - distance / window)
            expected[row] += weight * similarity[:, item]
    knn = ItemKNN(num_items, neighbors=neighbors, shrink=shrink, window=window).fit(train)
    # Compare only candidates without a tie at the last neighbor.
    full = ItemKNN(num_items, neighbors=num_items, shrink=shrink).fit(train).similarity.toarray()
    ordered = -np.sort(-full, axis=1)
    clear = ordered[:, neighbors - 1] > ordered[:, neighbors] + 1e-6
    assert clear.sum() > 5
    np.testing.assert_allclose(knn.scores(histories)[:, clear], expected[:, clear], atol=1e-5)


def test_top_items_leave_the_history_out_and_are_padded():
    ranker = Popularity(5).fit([[0, 1, 2], [2, 1], [2, 3]])
    assert ranker.top_items([[2], [0, 1, 2]], k=4).tolist() == [[1, 0, 3, 4], [3, 4, -1, -1]]
    assert ranker.top_items([[2]], k=2, exclude_history=False).tolist() == [[2, 1]]


def test_baseline_settings_are_chosen_without_the_test_targets(monkeypatch):
    monkeypatch.setattr(baselines, "GRID", {"neighbors": (2, 8), "shrink": (0.0, 5.0), "window": (2, None)})
    num_items = 30
    histories = [row for row in random_item_lists(80, num_items, seed=4) if len(set(row)) > 3]

    def results(test_targets: list[int]) -> dict:
        history = {"items": [row[:-2] for row in histories]}
        splits = DatasetDict(
            train=Dataset.from_dict(history),
            validation=Dataset.from_dict({**history, "target": [row[-2] for row in histories]}),
            test=Dataset.from_dict({"items": [row[:-1] for row in histories], "target": test_targets}),
        )
        return baselines.baseline_results(splits, num_items, k=20)

    real = results([row[-1] for row in histories])
    other = results([29] * len(histories))
    for name in ("popularity", "item_knn"):
        assert real[name]["settings"] == other[name]["settings"]
        assert real[name]["validation"] == other[name]["validation"]
        assert real[name]["test"] != other[name]["test"]
        ranks = np.array([np.inf if rank is None else rank for rank in real[name]["ranks"]])
        assert real[name]["test"]["recall@10"] == pytest.approx(np.mean(ranks <= 10))


def test_statistics_of_lists_equal_their_formulas():
    # Items 0 to 3 have 6, 3, 3 and 0 interactions: thirds of the 12 are head {0}, middle {1}, tail {2, 3}.
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [-1.0, 0.0]])
    statistics = ListStatistics(np.array([6, 3, 3, 0]), np.array([0, 1, 3, 2]), np.array([1, 1, 5, 9]), embeddings)
    values = statistics.of([[0, 1], [1, 0], [0, -1], [3, 0]], np.array([1, 1, np.inf, np.inf]))
    assert values["coverage"] == 0.75
    shown = np.array([4, 2, 0, 1])
    assert values["gini"] == pytest.approx(np.abs(shown[:, None] - shown).sum() / (2 * 4 * shown.sum()))
    assert values["popularity"] == pytest.approx((4 * 6 + 2 * 3) / 7)
    assert values["novelty"] == pytest.approx(-(4 * np.log2(0.5) + 2 * np.log2(0.25) + np.log2(0.5 / 12)) / 7)
    assert values["diversity"] == pytest.approx((1 + 1 + 2) / 3), "cosines 0, 0 and -1; one list has one item"
    recalls = [values[name] for name in RECALLS if name in values]
    assert recalls == [1, 1, 0, 1, 0, 0], "head, middle and tail; short, middle and long"
    popular = statistics.of([[0, 1]] * 4, np.full(4, np.inf))
    assert popular["coverage"] < values["coverage"] and popular["gini"] > values["gini"]
    assert np.isfinite([*statistics.of([[-1, -1]] * 4, np.full(4, np.inf)).values()]).all(), "no list at all"


def test_a_report_shows_every_method_and_picture(tmp_path):
    values = {"recall@5": 0.1, "recall@10": 0.2, "ndcg@5": 0.05, "ndcg@10": 0.08125, "mrr": 0.07}
    metrics = {
        "protocol": {"split": "leave-one-out"},
        "baselines": {"popularity": values, "item_knn": values},
        "generation": values,
        "ranked": values,
        "ranking": {"auc": 0.71},
        "invalid_items": 0,
        "seconds": {"train": 12.5},
        "selection": {"epoch": 3},
        "beyond accuracy": {"ranked": {"coverage": 0.4321, "recall@10 of tail items": 0.0987}},
    }
    log_history = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.9, "eval_runtime": 2.0}]
    ranks = {"generation": [1, None, 7]}
    path = write_report(tmp_path, metrics, log_history, [[3, 0, 1], [2, 2, 0]], ranks, "\nuser 1\n")
    text = path.read_text()
    for name in ("popularity", "item_knn", "by generation_score", "by score"):
        figures = " | ".join(f"**{value}**" for value in ("0.1000", "0.2000", "0.0500", "0.0813", "0.0700"))
        assert f"| {name} | {figures} |" in text, "all are the best"
    assert "\n## Examples, test\n\n```text\nuser 1\n```\n\n## Protocol\n" in text
    for picture in ("learning_curves.png", "recall_at_k.png", "codebooks.png"):
        assert f"({picture})" in text
        assert (tmp_path / picture).stat().st_size > 5000
    del metrics["selection"]
    with pytest.raises(ValueError, match=r"without \['selection'\]"):
        write_report(tmp_path, metrics, log_history, [[1]], {})
