"""Measure recall, NDCG and reciprocal rank of the next item in ranked lists: a metric of `evaluate`.

The recipes call the functions of this file, so that each formula exists once. The file imports no recipe: `evaluate`
loads it alone.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Quality of ranked lists of items, each with one relevant item: the user's next item, as in leave-one-out evaluation.
The target's rank r in its list counts from 1, and is infinite for an absent target. For each list,
recall@k = [r <= k], ndcg@k = [r <= k] / log2(r + 1) (the ideal DCG of one relevant item is 1) and mrr = 1 / r.
The metric returns the means over the lists. State the length of the lists beside mrr: mrr over 50 items is not mrr
over the catalog.
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions (list of lists of int): Catalog indices of each list, best first. Lists may differ in length. Padding
        with -1 takes a rank but matches no target. The first position of a repeated item counts.
    references (list of int): The target of every list.
Returns:
    A dict of float with the keys recall@5, recall@10, ndcg@5, ndcg@10 and mrr.
Raises:
    ValueError: if there is no list, and for a negative reference.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("recipes/evaluation/metrics/next_item")
    >>> metric.compute(predictions=[[3, 1, 2], [5, 4]], references=[1, 7])["recall@5"]
    0.5
"""
_CITATION = """
@article{jarvelin2002cumulated, title={Cumulated gain-based evaluation of IR techniques},
  author={J{\\"a}rvelin, Kalervo and Kek{\\"a}l{\\"a}inen, Jaana}, journal={ACM TOIS},
  volume={20}, number={4}, year={2002}}
"""


class NextItem(evaluate.Metric):
    """The metric, for `evaluate.load(folder)`, which needs no network."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        return mean_values(target_ranks(predictions, references))


def mean_values(ranks: np.ndarray) -> dict[str, float]:
    """Compute the means that the metric returns from the targets' ranks."""
    return {name: float(np.mean(values)) for name, values in {**recall_and_ndcg(ranks), "mrr": 1 / ranks}.items()}


def recall_and_ndcg(ranks: np.ndarray, at: Sequence[int] = (5, 10)) -> dict[str, np.ndarray]:
    """Compute recall@k and ndcg@k of every list, each float64 `[N]`, from the targets' ranks."""
    values = {f"recall@{k}": (ranks <= k).astype(float) for k in at}
    return values | {f"ndcg@{k}": (ranks <= k) / np.log2(ranks + 1) for k in at}


def target_ranks(predictions: list[list[int]], references: list[int]) -> np.ndarray:
    """Return the rank of every target in its list, float64 `[N]`, from 1; `inf` for an absent target."""
    targets = np.asarray(references, dtype=np.int64)
    if len(targets) == 0:
        raise ValueError("`references` must hold at least one target, got none. Pass the ranked lists of some users.")
    if targets.min() < 0:
        raise ValueError(
            f"`references` must be 0 or more, got {targets.min()} at row {targets.argmin()}. Pass catalog indices; -1 "
            "only pads predictions."
        )
    lengths = np.fromiter(map(len, predictions), dtype=np.int64, count=len(predictions))
    flat = np.fromiter((item for row in predictions for item in row), dtype=np.int64, count=lengths.sum())
    rows = np.repeat(np.arange(len(targets)), lengths)
    places = np.arange(len(flat)) - (np.cumsum(lengths) - lengths)[rows] + 1.0
    hits = flat == targets[rows]
    ranks = np.full(len(targets), np.inf)
    np.minimum.at(ranks, rows[hits], places[hits])
    return ranks
