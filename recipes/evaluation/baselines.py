"""Measure counting and text on prepared data: the baselines that a generative recommender has to beat.

    python -m recipes.evaluation.baselines --data_dir runs/demo/data --output_file runs/demo/baselines.json

The baselines are popularity, item-kNN, the transition score of the model, and the cosine of contents. They are fitted
on the training histories alone. Validation NDCG@10 chooses the settings of item-kNN and of the transition score. The
test history is the training history and the validation item. The lists rank the whole catalog, without the items of
the history.

The command prints the test metrics. The output file also has the settings, the validation metrics and the ranks of the
test targets.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from scipy import sparse
from tqdm.auto import tqdm

from modeling_unigrf.transitions_unigrf import TransitionSettings, UniGRFTransitions
from recipes.common.arguments import check_ranges, parse_arguments
from recipes.common.files import check_writable, write_json
from recipes.data.prepared import load_prepared
from recipes.evaluation.beyond_accuracy import ListStatistics
from recipes.evaluation.inference import ranks_as_json
from recipes.evaluation.metrics.next_item.next_item import mean_values, target_ranks
from recipes.evaluation.transitions import MAX_USERS, choose_transition_settings, score_by_transitions

Histories = Sequence[Sequence[int]]

GRID: dict[str, tuple[Any, ...]] = {
    "neighbors": (50, 100, 200, 400, 1000, 10_000),
    "shrink": (0.0, 10.0, 50.0),
    "window": (3, 5, 10, 20, None),
}
# Dense rows at a time: memory stays below 4 * BLOCK * num_items floats.
BLOCK = 1024
# Successors of an item that the baseline keeps, as recipes.train does.
NUM_TRANSITIONS = 200

RANGES = {"k": ("10 or more, since the metrics count the first 10 items", lambda length: length >= 10)}


@dataclass
class BaselineArguments:
    """Data and results of the baselines."""

    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare."})
    output_file: str | None = field(
        default=None, metadata={"help": "JSON file that receives the results. None: print the test metrics only."}
    )
    k: int = field(default=50, metadata={"help": "Items of a ranked list. MRR counts within the list."})


class Ranker:
    """
    Base class of the baselines: rank items by scores.

    Args:
        num_items (`int`): Items of the catalog.
    """

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items

    def fit(self, histories: Histories) -> "Ranker":
        """Fit the baseline to the training histories: catalog indices, oldest first."""
        raise NotImplementedError

    def scores(self, histories: Histories) -> np.ndarray:
        """Score every item for every history, float32 `[B, num_items]`; a higher score is better."""
        raise NotImplementedError

    def choose(self, histories: Histories, targets: Sequence[int], exclude_history: bool) -> dict[str, Any]:
        """Choose settings by the NDCG@10 of validation users, and return them; here there are none."""
        return {}

    def top_items(self, histories: Histories, k: int = 50, *, exclude_history: bool = True) -> np.ndarray:
        """
        List the catalog indices of the `k` best items, int64 `[B, min(k, num_items)]`, best first.

        Args:
            histories: Catalog indices of each history, oldest first.
            k: Length of a list, in items.
            exclude_history: Leave the items of a history out of its list. -1 pads a list of fewer than `k` items.
        """
        lists = []
        for start in range(0, len(histories), BLOCK):
            block = histories[start : start + BLOCK]
            scores = self.scores(block)
            if exclude_history:
                rows, items, _ = _flatten(block)
                scores[rows, items] = -np.inf
            lists.append(_top(scores, k))
        return np.concatenate(lists)


class Popularity(Ranker):
    """Rank items by their number of training interactions: the same list for all users."""

    def fit(self, histories: Histories) -> "Popularity":
        """Count the interactions of each item."""
        _, items, _ = _flatten(histories)
        self.counts = np.bincount(items, minlength=self.num_items).astype(np.float32)
        return self

    def scores(self, histories: Histories) -> np.ndarray:
        """Return the counts for each history."""
        return np.tile(self.counts, (len(histories), 1))


class Recency(Ranker):
    """Rank the items of the history, the last item first: a strong baseline if users return to items."""

    def fit(self, histories: Histories) -> "Recency":
        """Fit nothing: recency needs no training."""
        return self

    def scores(self, histories: Histories) -> np.ndarray:
        """Return each item's negative distance from the end of the history; -inf for all other items."""
        rows, items, distance = _flatten(histories)
        scores = np.full((len(histories), self.num_items), -np.inf, np.float32)
        np.maximum.at(scores, (rows, items), -distance.astype(np.float32))
        return scores


class ItemKNN(Ranker):
    """
    Rank items by nearest neighbors (Sarwar et al., WWW 2001, section 3; shrinkage as in Bell and Koren, KDD 2007).

    The similarity of items i and j is `co / (sqrt(n_i * n_j) + shrink)`: `co` users have both items, `n_i` users have
    item i. A candidate's score is the sum of its similarities to the items of the history.

    Args:
        num_items (`int`): Items of the catalog.
        neighbors (`int`, defaults to 100): Most similar items that each item keeps.
        shrink (`float`, defaults to 10.0): Shrinkage of the similarity of rare items. 0: none.
        window (`int`, *optional*): Last items of the history that count, with weights 1, 1 - 1/window, ... from the
            end. None: the whole history with equal weights, the textbook's item-kNN.
    """

    def __init__(
        self, num_items: int, *, neighbors: int = 100, shrink: float = 10.0, window: int | None = None
    ) -> None:
        super().__init__(num_items)
        self.neighbors = neighbors
        self.shrink = shrink
        self.window = window

    def fit(self, histories: Histories) -> "ItemKNN":
        """Compute the similarities of each item to its neighbors."""
        rows, items, _ = _flatten(histories)
        seen = _matrix(rows, items, np.ones(len(rows), np.float32), (len(histories), self.num_items))
        seen.data[:] = 1.0  # an item counts once for each user
        self.together = (seen.T @ seen).tocsr()
        return self.keep_neighbors()

    def keep_neighbors(self) -> "ItemKNN":
        """Compute the similarities anew, with other `neighbors` or another `shrink`."""
        norms = np.sqrt(self.together.diagonal())
        blocks = []
        for start in range(0, self.num_items, BLOCK):
            dense = self.together[start : start + BLOCK].toarray()
            # 1e-12: an item without interactions has a norm of 0.
            dense /= np.outer(norms[start : start + BLOCK], norms) + self.shrink + 1e-12
            # An item is no neighbor of itself.
            dense[np.arange(len(dense)), start + np.arange(len(dense))] = 0.0
            keep = _top(dense, self.neighbors)
            values = np.take_along_axis(dense, keep, axis=1)
            rows = np.repeat(np.arange(len(dense)), keep.shape[1])
            blocks.append(_matrix(rows, keep.ravel(), values.ravel(), dense.shape))
        self.similarity = sparse.vstack(blocks).tocsr()  # [candidates, neighbors]
        self.similarity.eliminate_zeros()
        return self

    def scores(self, histories: Histories) -> np.ndarray:
        """Return each item's sum of weighted similarities to the items of each history."""
        rows, items, distance = _flatten(histories)
        if self.window is None:
            weights = np.ones(len(rows), np.float32)
        else:
            weights = np.maximum(1 - distance / self.window, 0).astype(np.float32)
        profiles = _matrix(rows, items, weights, (len(histories), self.num_items))
        return (profiles @ self.similarity.T).toarray()

    def choose(self, histories: Histories, targets: Sequence[int], exclude_history: bool) -> dict[str, Any]:
        """Choose the settings by the NDCG@10 of validation users, one setting after the other, twice."""
        chosen = np.random.default_rng(0).permutation(len(targets))[:MAX_USERS]
        histories = [histories[row] for row in chosen]
        targets = [targets[row] for row in chosen]

        def ndcg() -> float:
            lists = self.top_items(histories, 10, exclude_history=exclude_history).tolist()
            return mean_values(target_ranks(lists, targets))["ndcg@10"]

        best = ndcg()
        for name in tqdm([*GRID] * 2, desc="item-kNN", unit="setting"):
            best_value = getattr(self, name)
            for value in GRID[name]:
                setattr(self, name, value)
                # The window needs no new similarities.
                if name != "window":
                    self.keep_neighbors()
                if (value_ndcg := ndcg()) > best:
                    best = value_ndcg
                    best_value = value
            setattr(self, name, best_value)
            self.keep_neighbors()
        return {name: getattr(self, name) for name in GRID}


class Transitions(Ranker):
    """
    Rank items by the transition score of the model: directed counts, popularity and the cosine of contents.

    Args:
        num_items (`int`): Items of the catalog.
        embeddings (`torch.Tensor` of shape `(num_items, D)`, *optional*): Content embeddings. None: no cosine.
        settings (`TransitionSettings`): Settings of the score.
    """

    def __init__(
        self, num_items: int, embeddings: torch.Tensor | None = None, settings: TransitionSettings | None = None
    ) -> None:
        super().__init__(num_items)
        self.embeddings = embeddings
        self.settings = TransitionSettings() if settings is None else settings

    def fit(self, histories: Histories) -> "Transitions":
        """Count the transitions of the training histories."""
        self.transitions = UniGRFTransitions(self.num_items, min(NUM_TRANSITIONS, self.num_items))
        self.transitions.add(histories)
        if self.embeddings is not None:
            is_taken = self.transitions.item_counts > 0
            taken = is_taken.nonzero()[:, 0]
            self.transitions.choose_stand_ins((~is_taken).nonzero()[:, 0], taken, self.embeddings)
        return self

    def scores(self, histories: Histories) -> np.ndarray:
        """Return the transition scores."""
        return score_by_transitions(self.transitions, histories, self.embeddings, self.settings)

    def choose(self, histories: Histories, targets: Sequence[int], exclude_history: bool) -> dict[str, Any]:
        """Choose the settings on validation."""

        def top_items(part: Histories, settings: TransitionSettings) -> np.ndarray:
            self.settings = settings
            return self.top_items(part, 10, exclude_history=exclude_history)

        has_content = self.embeddings is not None
        self.settings = choose_transition_settings(top_items, histories, targets, has_content)
        return asdict(self.settings)


class TextCosine(Ranker):
    """
    Rank items by the cosine of their content to that of the history, as the transition score does.

    Args:
        embeddings (`torch.Tensor` of shape `(num_items, D)`): Content embeddings.
        history_decay (`float`, defaults to 0.6): Weight of an item of the history over that of the item behind it.
    """

    def __init__(self, embeddings: torch.Tensor, history_decay: float = 0.6) -> None:
        super().__init__(len(embeddings))
        self.embeddings = embeddings
        self.settings = TransitionSettings(history_decay, popularity_weight=0.0, content_weight=1.0)

    def fit(self, histories: Histories) -> "TextCosine":
        """Count nothing: the content says all."""
        self.transitions = UniGRFTransitions(self.num_items, 1)
        return self

    def scores(self, histories: Histories) -> np.ndarray:
        """Return the cosines."""
        return score_by_transitions(self.transitions, histories, self.embeddings, self.settings)


def baseline_results(
    dataset: DatasetDict,
    num_items: int,
    k: int = 50,
    *,
    exclude_history: bool = True,
    embeddings: torch.Tensor | None = None,
) -> dict[str, dict[str, Any]]:
    """
    Fit the baselines on `train`, choose their settings on `validation`, and measure on `test`.

    Args:
        dataset: Splits of `recipes.prepare`: `train` with `items`; `validation` and `test` with `items` and `target`.
        num_items: Items of the catalog.
        k: Items of a ranked list. MRR counts within the list.
        exclude_history: Leave the items of a history out of its list. False: measure recency, too.
        embeddings: Content embeddings `[num_items, D]`. None: transitions without content, and no text cosine.

    Returns:
        A dict of the baselines `popularity`, `item_knn`, `transitions`, with embeddings `text_cosine` and, without
        `exclude_history`, `recency`. Each has
        `settings`, `validation` and `test` (values of the metric next_item), `beyond accuracy` (`ListStatistics`) and
        `ranks`: the rank of every test target from 1, None for a target outside the list.
    """
    train = dataset["train"]["items"][:]
    splits = {name: (dataset[name]["items"][:], dataset[name]["target"][:]) for name in ("validation", "test")}

    statistics = ListStatistics.of_splits(dataset, num_items, embeddings)

    def measure(ranker: Ranker, split: str) -> tuple[np.ndarray, np.ndarray]:
        histories, targets = splits[split]
        lists = ranker.top_items(histories, k, exclude_history=exclude_history)
        return lists, target_ranks(lists.tolist(), targets)

    results = {}
    rankers: dict[str, Ranker] = {
        "popularity": Popularity(num_items),
        "item_knn": ItemKNN(num_items),
        "transitions": Transitions(num_items, embeddings),
    }
    if embeddings is not None:
        rankers["text_cosine"] = TextCosine(embeddings)
    if not exclude_history:
        rankers["recency"] = Recency(num_items)
    for name, ranker in rankers.items():
        chosen = ranker.fit(train).choose(*splits["validation"], exclude_history)
        _, validation_ranks = measure(ranker, "validation")
        lists, ranks = measure(ranker, "test")
        results[name] = {
            "settings": chosen,
            "validation": mean_values(validation_ranks),
            "test": mean_values(ranks),
            "beyond accuracy": statistics.of(lists, ranks),
            "ranks": ranks_as_json(ranks),
        }
    return results


def _flatten(histories: Histories) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flatten histories into rows, items and distances from the end (0: last), each int64 `[total length]`."""
    lengths = np.fromiter(map(len, histories), dtype=np.int64, count=len(histories))
    items = np.fromiter(itertools.chain.from_iterable(histories), dtype=np.int64, count=lengths.sum())
    rows = np.repeat(np.arange(len(histories)), lengths)
    return rows, items, np.cumsum(lengths)[rows] - 1 - np.arange(len(items))


def _matrix(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """Make a sparse matrix in CSR form; entries of the same position add up."""
    return sparse.coo_array((values, (rows, columns)), shape=shape).tocsr()


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the columns of each row's `k` greatest values, int64 `[B, min(k, N)]`; -1 stands for a value of -inf."""
    k = min(k, scores.shape[1])
    # Equal values stay in the order of columns.
    columns = np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)
    values = np.take_along_axis(scores, columns, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(np.where(np.isneginf(values), -1, columns), order, axis=1)


def main() -> None:
    """Measure the baselines on a prepared folder."""
    (args,) = parse_arguments(BaselineArguments)
    check_ranges(args, RANGES)
    if args.output_file:
        check_writable(Path(args.output_file).parent, "output_file")
    data = load_prepared(args.data_dir)
    results = baseline_results(data.dataset, data.tokenizer.num_items, args.k, embeddings=data.embeddings)
    for name, result in results.items():
        numbers = ", ".join(f"{key} {value:.4f}" for key, value in result["test"].items())
        print(f"{name} {result['settings']}: {numbers} (lists of {args.k} items)")
    if args.output_file:
        write_json(Path(args.output_file), results)


if __name__ == "__main__":
    main()
