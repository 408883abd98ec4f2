"""Split interactions by leave-one-out: a user's last interaction is the test target, the one before is for validation."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetDict

# Columns of a history, and of what comes after it in a held-out split.
TARGETS = {"items": "target", "behaviors": "target_behavior", "timestamps": "target_timestamp"}


def leave_one_out(
    users: np.ndarray, items: np.ndarray, behaviors: np.ndarray, timestamps: np.ndarray, positions: np.ndarray
) -> DatasetDict:
    """Splits of the module's docstring; users in the order of their first row, ties of position in the rows' order.

    Args:
        users: str `[N]`, each user at least 3 times.
        items: int `[N]`, catalog indices.
        behaviors: int `[N]`, indices below 128.
        timestamps: int or float `[N]`, -1 where not known; stored as int64.
        positions: int or float `[N]`, by which each user's interactions are sorted.
    """
    user_codes, user_ids = pd.factorize(users)
    order = np.lexsort((positions, user_codes))  # stable
    columns: dict[str, np.ndarray] = {
        "items": items[order].astype(np.int32),
        "behaviors": behaviors[order].astype(np.int8),
        "timestamps": timestamps[order].astype(np.int64),
    }
    counts = np.bincount(user_codes)
    ends = np.cumsum(counts)
    # How many interactions from a row to its user's last one: 0 for the last.
    left = ends[user_codes[order]] - 1 - np.arange(len(order))

    def split(held_out: int, with_target: bool) -> Dataset:
        offsets = pa.array(np.r_[0, np.cumsum(counts - held_out)], pa.int32())
        table: dict[str, Any] = {"user_id": pa.array(user_ids, pa.string())}
        for name, values in columns.items():
            table[name] = pa.ListArray.from_arrays(offsets, pa.array(values[left >= held_out]))
        if with_target:
            for name, target in TARGETS.items():
                table[target] = pa.array(columns[name][ends - held_out])
        return Dataset.from_dict(table)

    return DatasetDict(train=split(2, False), validation=split(2, True), test=split(1, True))


def columns_read(split: Dataset, with_times: bool) -> dict[str, str]:
    """The columns of a history that a model reads, and those of what came next; `ValueError` if the split lacks one."""
    columns = {name: target for name, target in TARGETS.items() if with_times or name != "timestamps"}
    targets = [target for target in columns.values() if "target" in split.column_names]
    missing = {*columns, *targets}.difference(split.column_names)
    if missing:
        raise ValueError(
            f"Expected a split with the columns {[*columns, *targets]}, found {split.column_names}, without "
            f"{sorted(missing)}. Run recipes.prepare again, into another folder."
        )
    return columns


def unseen_targets(train: Dataset, split: Dataset) -> int:
    """How many targets of a split never occur in training."""
    return int((~np.isin(split["target"][:], np.concatenate([np.array(row) for row in train["items"][:]]))).sum())
