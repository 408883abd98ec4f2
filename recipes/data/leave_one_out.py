"""Split interactions by leave-one-out.

The last interaction of a user is the test target, and the interaction before it the validation target.
"""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetDict

# Columns of a history, and of its target in a held-out split.
TARGETS = {"items": "target", "behaviors": "target_behavior", "timestamps": "target_timestamp"}


def leave_one_out(
    users: np.ndarray, items: np.ndarray, behaviors: np.ndarray, timestamps: np.ndarray, positions: np.ndarray
) -> DatasetDict:
    """
    Split N interactions as the module's docstring describes.

    Users keep the order of their first row; interactions at the same position keep the order of their rows.

    Args:
        users: str `[N]`; each user at least 3 times.
        items: int `[N]`, catalog indices.
        behaviors: int `[N]`, indices below 128.
        timestamps: int or float `[N]`; -1: unknown. Stored as int64.
        positions: int or float `[N]`, which sort the interactions of each user.

    Returns:
        `DatasetDict` with the splits `train`, `validation` and `test`.
    """
    # Columns, sorted by user and position.
    user_codes, user_ids = pd.factorize(users)
    # The sort is stable.
    order = np.lexsort((positions, user_codes))
    columns: dict[str, np.ndarray] = {
        "items": items[order].astype(np.int32),
        "behaviors": behaviors[order].astype(np.int8),
        "timestamps": timestamps[order].astype(np.int64),
    }
    counts = np.bincount(user_codes)
    ends = np.cumsum(counts)
    # Interactions between a row and its user's last one.
    num_later = ends[user_codes[order]] - 1 - np.arange(len(order))

    # Splits
    def split(num_held_out: int, with_target: bool) -> Dataset:
        offsets = pa.array(np.r_[0, np.cumsum(counts - num_held_out)], pa.int32())
        table: dict[str, Any] = {"user_id": pa.array(user_ids, pa.string())}
        for name, values in columns.items():
            table[name] = pa.ListArray.from_arrays(offsets, pa.array(values[num_later >= num_held_out]))
        if with_target:
            for name, target in TARGETS.items():
                table[target] = pa.array(columns[name][ends - num_held_out])
        return Dataset.from_dict(table)

    return DatasetDict(train=split(2, False), validation=split(2, True), test=split(1, True))


def with_held_out(dataset: DatasetDict, refit: str) -> DatasetDict:
    """
    Return the splits with held-out items in training: those of `"validation"`, or of both (`"test"`).

    The items of a test history are the training items and the validation item.
    """
    test = dataset["test"]
    targets = [target for target in TARGETS.values() if target in test.column_names]
    train = test
    if refit == "test":
        train = test.map(
            lambda user: {name: [*user[name], user[TARGETS[name]]] for name in TARGETS if name in user},
            features=test.features,
            keep_in_memory=True,
            desc="held-out items",
        )
    return DatasetDict({**dataset, "train": train.remove_columns(targets)})


def columns_read(split: Dataset, with_times: bool) -> dict[str, str]:
    """
    Return the columns of a history that a model reads, each with the column of its target.

    Raises:
        ValueError: if the split lacks a column.
    """
    columns = {name: target for name, target in TARGETS.items() if with_times or name != "timestamps"}
    targets = [target for target in columns.values() if "target" in split.column_names]
    missing = {*columns, *targets}.difference(split.column_names)
    if missing:
        raise ValueError(
            f"`split` must have the columns {[*columns, *targets]}, got {split.column_names} without "
            f"{sorted(missing)}. Run recipes.prepare again, into another folder."
        )
    return columns


def unseen_targets(train: Dataset, split: Dataset) -> int:
    """Count the targets of a split that never occur in training."""
    trained_items = np.concatenate([np.array(row) for row in train["items"][:]])
    return int((~np.isin(split["target"][:], trained_items)).sum())
