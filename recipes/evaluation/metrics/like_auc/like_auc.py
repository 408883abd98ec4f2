"""Measure the area under the ROC curve of like / dislike scores: a metric of `evaluate`."""

import datasets
import evaluate
from sklearn.metrics import roc_auc_score

_DESCRIPTION = """
The area under the ROC curve: the probability that a random liked item has a higher score than a random disliked item.
A tie counts one half. The pairs are those of the whole test set: the area is no mean of per-user areas.
"""
_KWARGS_DESCRIPTION = """
Args:
    prediction_scores (list of float): A score of each item. Logits and probabilities give the same area.
    references (list of int): A label of each item. 1: liked. 0: not liked.
Returns:
    A dict of float with the key `auc`.
Raises:
    ValueError: for labels other than 0 and 1, and for labels that are all equal.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("recipes/evaluation/metrics/like_auc")
    >>> metric.compute(prediction_scores=[0.9, 0.2, 0.4], references=[1, 0, 0])
    {'auc': 1.0}
"""
_CITATION = """
@article{hanley1982meaning,
  title={The meaning and use of the area under a receiver operating characteristic (ROC) curve},
  author={Hanley, James A and McNeil, Barbara J}, journal={Radiology}, volume={143}, number={1}, year={1982}}
"""


class LikeAuc(evaluate.Metric):
    """The metric, for `evaluate.load(folder)`, which needs no network."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"prediction_scores": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, prediction_scores: list[float], references: list[int]) -> dict[str, float]:
        labels = sorted(set(references))
        if labels != [0, 1]:
            raise ValueError(
                f"`references` must hold both 0 (not liked) and 1 (liked), got {labels[:5]} in {len(references)} "
                "rows. Evaluate on rows of both classes: the area under the ROC curve compares them."
            )
        return {"auc": float(roc_auc_score(references, prediction_scores))}
