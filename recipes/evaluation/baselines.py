"""Popularity and item-kNN on a prepared dataset: the floor that a generative recommender has to clear.

    python -m recipes.evaluation.baselines --data_dir runs/demo/data --output_file runs/demo/baselines.json

Both are fitted on the training histories only (the interactions that a model trains on), the settings of item-kNN are
chosen by validation NDCG@10, and the test history is training + validation item. The whole catalog is ranked; items
of the history are left out.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict, load_from_disk
from scipy import sparse
from tqdm.auto import tqdm

from recipes.common.arguments import parse_arguments
from recipes.data.prepared import prepared
from recipes.evaluation.inference import ranks_as_json
from recipes.evaluation.metrics.next_item.next_item import mean_values, target_ranks

Histories = Sequence[Sequence[int]]

GRID: dict[str, tuple[Any, ...]] = {
    "neighbors": (50, 100, 200, 400, 1000, 10_000),
    "shrink": (0.0, 10.0, 50.0),
    "window": (3, 5, 10, 20, None),
}
BLOCK = 1024  # rows that are dense at a time: bounds memory at four times BLOCK x num_items floats


@dataclass
class BaselineArguments:
    """Which prepared folder to measure, and where the numbers go."""

    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the results; printed either way."})
    k: int = field(default=50, metadata={"help": "Length of the ranked lists, in items."})


class Ranker:
    """What the baselines share: lists of items from scores."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items

    def fit(self, histories: Histories) -> "Ranker":
        """Learn from the training histories (catalog indices, oldest first)."""
        raise NotImplementedError

    def scores(self, histories: Histories) -> np.ndarray:
        """Score every item for every history, float32 `[B, num_items]`, higher is better."""
        raise NotImplementedError

    def top_items(self, histories: Histories, k: int = 50, *, exclude_history: bool = True) -> np.ndarray:
        """Catalog indices of the `k` best items, int64 `[B, min(k, num_items)]`, best first.

        With `exclude_history` a history's own items are left out; -1 pads where fewer than `k` items remain.
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
    """Items by their number of training interactions, the same list for everybody."""

    def fit(self, histories: Histories) -> "Popularity":
        _, items, _ = _flatten(histories)
        self.counts = np.bincount(items, minlength=self.num_items).astype(np.float32)
        return self

    def scores(self, histories: Histories) -> np.ndarray:
        return np.tile(self.counts, (len(histories), 1))


class Recency(Ranker):
    """The items of the history itself, the last one first: what there is to beat where users come back to items."""

    def fit(self, histories: Histories) -> "Recency":
        return self

    def scores(self, histories: Histories) -> np.ndarray:
        rows, items, distance = _flatten(histories)
        scores = np.full((len(histories), self.num_items), -np.inf, np.float32)
        np.maximum.at(scores, (rows, items), -distance.astype(np.float32))
        return scores


class ItemKNN(Ranker):
    """Item-based nearest neighbors (Sarwar et al., WWW 2001, section 3; shrinkage as in Bell and Koren, KDD 2007).

    Similarity of two items is `co / (sqrt(n_i * n_j) + shrink)`, with `co` the users that have both and `n` the users
    that have each; an item keeps its `neighbors` most similar items. A candidate's score is the sum of its
    similarities to the last `window` items of the history, weighted 1, 1 - 1/window, ... from the last backwards;
    `window=None` takes the whole history with equal weights, which is the textbook's item-kNN.
    """

    def __init__(
        self, num_items: int, *, neighbors: int = 100, shrink: float = 10.0, window: int | None = None
    ) -> None:
        super().__init__(num_items)
        self.neighbors, self.shrink, self.window = neighbors, shrink, window

    def fit(self, histories: Histories) -> "ItemKNN":
        rows, items, _ = _flatten(histories)
        seen = _matrix(rows, items, np.ones(len(rows), np.float32), (len(histories), self.num_items))
        seen.data[:] = 1.0  # binary: an item that a user took twice counts once
        together = (seen.T @ seen).tocsr()
        norms = np.sqrt(together.diagonal())
        blocks = []
        for start in range(0, self.num_items, BLOCK):
            dense = together[start : start + BLOCK].toarray()
            dense /= np.outer(norms[start : start + BLOCK], norms) + self.shrink + 1e-12  # 1e-12: items nobody took
            dense[np.arange(len(dense)), start + np.arange(len(dense))] = 0.0  # an item is no neighbor of itself
            keep = _top(dense, self.neighbors)
            values = np.take_along_axis(dense, keep, axis=1)
            rows = np.repeat(np.arange(len(dense)), keep.shape[1])
            blocks.append(_matrix(rows, keep.ravel(), values.ravel(), dense.shape))
        self.similarity = sparse.vstack(blocks).tocsr()  # [num_items (candidate), num_items (its neighbors)]
        self.similarity.eliminate_zeros()
        return self

    def scores(self, histories: Histories) -> np.ndarray:
        rows, items, distance = _flatten(histories)
        if self.window is None:
            weights = np.ones(len(rows), np.float32)
        else:
            weights = np.maximum(1 - distance / self.window, 0).astype(np.float32)
        profiles = _matrix(rows, items, weights, (len(histories), self.num_items))
        return (profiles @ self.similarity.T).toarray()


def baseline_results(
    dataset: DatasetDict,
    num_items: int,
    k: int = 50,
    *,
    exclude_history: bool = True,
) -> dict[str, dict[str, Any]]:
    """Fit the baselines on `train`, choose item-kNN's settings out of `GRID` on `validation`, measure on `test`.

    Args:
        dataset: splits of [`recipes.prepare`]: `train` with `items`; `validation` and `test` with `items`, `target`.
        num_items: size of the catalog.
        k: length of the ranked lists, in items (mrr is over such a list).
        exclude_history: leave a history's own items out of its list; else recency is a third baseline.

    Returns:
        `{"popularity": ..., "item_knn": ...}`, and `recency` where it may list something, each with `settings`,
        `validation` and `test` (the values of the metric next_item) and `ranks` (of every test target, 1 = first; None
        where it is not among the `k`).
    """
    train = dataset["train"]["items"][:]
    splits = {name: (dataset[name]["items"][:], dataset[name]["target"][:]) for name in ("validation", "test")}

    def measure(ranker: Ranker, split: str) -> tuple[dict[str, float], np.ndarray]:
        histories, targets = splits[split]
        ranks = target_ranks(ranker.top_items(histories, k, exclude_history=exclude_history).tolist(), targets)
        return mean_values(ranks), ranks

    best, settings = -1.0, {}
    fits = list(itertools.product(GRID["neighbors"], GRID["shrink"]))
    for neighbors, shrink in tqdm(fits, desc="item-kNN", unit="fit"):
        knn = ItemKNN(num_items, neighbors=neighbors, shrink=shrink).fit(train)
        for knn.window in GRID["window"]:  # the window needs no new fit
            reached = measure(knn, "validation")[0]["ndcg@10"]
            if reached > best:
                best, settings = reached, {"neighbors": neighbors, "shrink": shrink, "window": knn.window}

    results = {}
    rankers: dict[str, Ranker] = {"popularity": Popularity(num_items), "item_knn": ItemKNN(num_items, **settings)}
    if not exclude_history:
        rankers["recency"] = Recency(num_items)
    for name, ranker in rankers.items():
        validation, _ = measure(ranker.fit(train), "validation")
        test, ranks = measure(ranker, "test")
        chosen = settings if name == "item_knn" else {}
        results[name] = {"settings": chosen, "validation": validation, "test": test, "ranks": ranks_as_json(ranks)}
    return results


def _flatten(histories: Histories) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, items and distances from the end (0 = last), each int64 `[total length]`."""
    lengths = np.fromiter(map(len, histories), dtype=np.int64, count=len(histories))
    items = np.fromiter(itertools.chain.from_iterable(histories), dtype=np.int64, count=lengths.sum())
    rows = np.repeat(np.arange(len(histories)), lengths)
    return rows, items, np.cumsum(lengths)[rows] - 1 - np.arange(len(items))


def _matrix(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """CSR matrix; entries of one place add up."""
    return sparse.coo_array((values, (rows, columns)), shape=shape).tocsr()


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns of the `k` greatest values of a row, int64 `[B, min(k, N)]`, greatest first; -1 for a value of -inf."""
    k = min(k, scores.shape[1])
    # Sorted columns and a stable sort: within the list, equal values go by column.
    columns = np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)
    values = np.take_along_axis(scores, columns, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(np.where(np.isneginf(values), -1, columns), order, axis=1)


def main() -> None:
    """Measure both baselines on a prepared folder."""
    (args,) = parse_arguments(BaselineArguments)
    num_items = prepared(args.data_dir)["counts"]["catalog"]
    results = baseline_results(load_from_disk(str(Path(args.data_dir) / "dataset")), num_items, args.k)
    for name, result in results.items():
        numbers = ", ".join(f"{key} {value:.4f}" for key, value in result["test"].items())
        print(f"{name} {result['settings']}: {numbers} (lists of {args.k} items)")
    if args.output_file:
        Path(args.output_file).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
