"""Recall, NDCG and reciprocal rank of the one next item, over ranked lists of items.

The recipes take its functions, so that no formula is written twice; it imports none of them, since `evaluate` loads the file alone.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
How well ranked lists of items contain the item that the user really chose next (one relevant item a list, as in
leave-one-out evaluation). With the target's rank r (1 = first) in the list that is given, infinite where it is absent:
recall@k = [r <= k], ndcg@k = [r <= k] / log2(r + 1) (the ideal DCG of one relevant item is 1), mrr = 1 / r.
All are means over the lists. mrr is over the list as given, so say the lists' length beside it (mrr over 50 items is
not mrr over the catalog); lists of fewer than k items can only miss more at k.
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions: list of lists of int, best first; an item's catalog index (0 or more). Lists may differ in length
        and hold -1 as padding, which keeps its rank but matches nothing. Of an item that is listed twice, the first
        place counts.
    references: list of int, the target of every list.
Returns:
    dict of float: recall@5, recall@10, ndcg@5, ndcg@10, mrr.
Raises:
    ValueError: without any list, or for a negative reference.
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
    """`evaluate` module; loads offline from this folder."""

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
    """What the metric returns, of the targets' ranks."""
    return {name: float(np.mean(values)) for name, values in {**recall_and_ndcg(ranks), "mrr": 1 / ranks}.items()}


def recall_and_ndcg(ranks: np.ndarray, at: Sequence[int] = (5, 10)) -> dict[str, np.ndarray]:
    """recall@k and ndcg@k of every list, each float64 `[N]`, of the targets' ranks."""
    values = {f"recall@{k}": (ranks <= k).astype(float) for k in at}
    return values | {f"ndcg@{k}": (ranks <= k) / np.log2(ranks + 1) for k in at}


def target_ranks(predictions: list[list[int]], references: list[int]) -> np.ndarray:
    """1-based rank of every target in its list, float64 `[N]`; `inf` where it is absent."""
    targets = np.asarray(references, dtype=np.int64)
    if len(targets) == 0:
        raise ValueError("expected at least one ranked list, found none: a mean over nothing is no result")
    if targets.min() < 0:
        raise ValueError(
            f"expected references of 0 or more, found {targets.min()} at row {targets.argmin()}: -1 pads predictions, "
            "it is never a target"
        )
    lengths = np.fromiter(map(len, predictions), dtype=np.int64, count=len(predictions))
    flat = np.fromiter((item for row in predictions for item in row), dtype=np.int64, count=lengths.sum())
    rows = np.repeat(np.arange(len(targets)), lengths)
    places = np.arange(len(flat)) - (np.cumsum(lengths) - lengths)[rows] + 1.0
    hits = flat == targets[rows]
    ranks = np.full(len(targets), np.inf)
    np.minimum.at(ranks, rows[hits], places[hits])
    return ranks
