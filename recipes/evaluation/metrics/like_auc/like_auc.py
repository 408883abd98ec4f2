"""Area under the ROC curve of like / dislike scores."""

import datasets
import evaluate
from sklearn.metrics import roc_auc_score

_DESCRIPTION = """
The probability that a random liked item is scored above a random disliked one, over all pairs of the test set (ties
count one half): the area under the ROC curve, global over users, not a mean of per-user areas.
"""
_KWARGS_DESCRIPTION = """
Args:
    prediction_scores: list of float; any monotone score (logits or probabilities give the same value).
    references: list of int, 1 = liked, 0 = not.
Returns:
    dict of float: auc.
Raises:
    ValueError: for labels other than 0 and 1, or labels that are all equal (the area does not exist).
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
    """`evaluate` module; loads offline from this folder."""

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
                f"expected references with both 0 (not liked) and 1 (liked), found {labels[:5]} in {len(references)} "
                "rows: the area under the ROC curve compares the two classes; evaluate on rows that have both"
            )
        return {"auc": float(roc_auc_score(references, prediction_scores))}
