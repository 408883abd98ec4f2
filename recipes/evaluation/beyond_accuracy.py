"""What lists are beside accurate: how much of the catalog they show, how popular, new and varied it is, and for whom.

`ListStatistics.of_splits` reads the splits once, `of` measures the lists of a method.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import DatasetDict
from torch import nn

# The first items of a list are measured, as many as recall@10 counts.
LENGTH = 10
# Users whose embeddings are in memory at a time.
USERS_AT_A_TIME = 2048
STATISTICS = {
    "coverage": "catalog shown",
    "gini": "Gini",
    "popularity": "mean popularity",
    "novelty": "novelty, bits",
    "diversity": "diversity",
}
RECALLS = {
    "recall@10 of head items": "head items",
    "recall@10 of middle items": "middle items",
    "recall@10 of tail items": "tail items",
    "recall@10 of short histories": "short histories",
    "recall@10 of middle histories": "middle histories",
    "recall@10 of long histories": "long histories",
}


def gini(counts: np.ndarray) -> float:
    """Compute the Gini coefficient of counts `[n]`: 0 if all are equal, near 1 if one has all."""
    ordered = np.sort(counts)
    shares = ordered.cumsum() / max(1, ordered.sum())
    return float(1 + 1 / len(counts) - 2 * shares.sum() / len(counts))


def thirds_of_items(popularity: np.ndarray) -> np.ndarray:
    """
    Assign items to head (0), middle (1) and tail (2): each has about a third of all interactions.

    The tail also has the items without an interaction.
    """
    order = np.argsort(-popularity, kind="stable")
    before = popularity[order].cumsum() - popularity[order]
    third = np.empty(len(popularity), np.int64)
    third[order] = np.minimum(2, 3 * before // max(1, popularity.sum()))
    third[popularity == 0] = 2
    return third


@dataclass
class ListStatistics:
    """
    Statistics of the lists of a split's users.

    Args:
        popularity (`np.ndarray` of shape `(num_items,)`): Interactions of each item in training.
        targets (`np.ndarray` of shape `(U,)`): The held-out item of each user.
        lengths (`np.ndarray` of shape `(U,)`): Items of each user's history.
        embeddings (`torch.Tensor` of shape `(num_items, D)`, *optional*): Content embeddings. None: no diversity.
    """

    popularity: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    embeddings: torch.Tensor | None = None

    @classmethod
    def of_splits(
        cls, dataset: DatasetDict, num_items: int, embeddings: torch.Tensor | None, split: str = "test"
    ) -> "ListStatistics":
        """Read what the statistics need from prepared splits."""
        trained = np.concatenate([np.asarray(items, np.int64) for items in dataset["train"]["items"][:]])
        return cls(
            np.bincount(trained, minlength=num_items),
            np.asarray(dataset[split]["target"][:]),
            np.array([len(items) for items in dataset[split]["items"][:]]),
            embeddings,
        )

    def of(self, lists: Sequence[Sequence[int]] | np.ndarray, ranks: np.ndarray) -> dict[str, float]:
        """
        Measure lists.

        Args:
            lists: Item indices of each user's list, best first, padded with -1; the first 10 are measured.
            ranks: Rank of each user's target from 1, infinite for a target outside the list.

        Returns:
            `coverage`, the share of the catalog in some list; `gini` of how often each item is shown; the mean
            `popularity` (interactions in training) of the shown items; their `novelty`, mean -log2 of the share of
            interactions (half an interaction for none); `diversity`, 1 less the mean cosine of the items of a list;
            recall@10 by thirds of the items (by interactions) and of the histories (by length).
        """
        items = np.asarray(lists, np.int64)[:, :LENGTH]
        shown = items[items >= 0]
        counts = np.bincount(shown, minlength=len(self.popularity))
        shares = np.maximum(self.popularity, 0.5) / max(1, self.popularity.sum())
        values = {
            "coverage": float((counts > 0).mean()),
            "gini": gini(counts),
            "popularity": float(self.popularity[shown].mean()) if len(shown) else 0.0,
            "novelty": float(-np.log2(shares[shown]).mean()) if len(shown) else 0.0,
        }
        if self.embeddings is not None:
            values["diversity"] = self._diversity(items)
        hits = np.asarray(ranks, np.float64) <= LENGTH
        of_item = thirds_of_items(self.popularity)[self.targets]
        bounds = np.quantile(self.lengths, [1 / 3, 2 / 3])
        of_history = np.searchsorted(bounds, self.lengths, side="left")
        groups = [of_item == third for third in range(3)] + [of_history == third for third in range(3)]
        for name, group in zip(RECALLS, groups, strict=True):
            if group.any():
                values[name] = float(hits[group].mean())
        return values

    def _diversity(self, items: np.ndarray) -> float:
        """Compute 1 less the mean cosine between two items of a list, over the lists of two items or more."""
        assert self.embeddings is not None
        total = num_lists = 0.0
        for start in range(0, len(items), USERS_AT_A_TIME):
            part = torch.from_numpy(items[start : start + USERS_AT_A_TIME])
            exists = part >= 0
            directions = nn.functional.normalize(self.embeddings[part.clamp(min=0)].float(), dim=-1)
            directions = directions * exists[..., None]
            count = exists.sum(dim=1).float()
            # The squared sum has each pair twice, and each item with itself once.
            norms = (directions * directions).sum(dim=(1, 2))
            pairs = directions.sum(dim=1).square().sum(dim=1) - norms
            is_list = count > 1
            means = pairs[is_list] / (count * (count - 1))[is_list]
            total += float((1 - means).sum())
            num_lists += float(is_list.sum())
        return total / max(1.0, num_lists)
