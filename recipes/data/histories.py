"""Histories in the user's own ids, as `recipes.recommend` takes them: loaded, checked and looked up.

Columns: `user_id` (of any type), `items` (a list of item ids, strings or integers, oldest first) and, if the tokenizer
knows several, `behaviors` (a list of as many names). From a table of interactions:

    table = pd.read_csv("interactions.csv", dtype={"user_id": str, "item_id": str})
    users = table.sort_values("timestamp", kind="stable").groupby("user_id")
    users.agg(items=("item_id", list), behaviors=("behavior", list)).reset_index().to_parquet("histories.parquet")

A model that reads times also reads `timestamps` (a list of as many numbers: seconds, null where not known; above:
`timestamps=("timestamp", list)`) and, if there is one, `query_time` (a number: when the next item is asked for, null
where not known; without the column, when the last item was).

The `dataset/` of recipes.prepare is none: it holds catalog indices, and ends before the held-out interactions.
"""

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from tqdm.auto import tqdm

from tokenization import SemanticIdTokenizer
from tokenization.vocabulary_layout import UNKNOWN_TIME

COLUMNS = ("user_id", "items", "behaviors", "timestamps", "query_time")
TIMES = COLUMNS[3:]
FILES = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
UNKNOWN, EMPTY = "with items that the catalog does not have", "without an item"


@dataclass
class Histories:
    """
    Some rows, looked up.

    Args:
        items (`list` of int64 arrays): Catalog rows of each history's known items, oldest first.
        behaviors (`list` of int64 arrays): Indices into `tokenizer.behaviors`, one an item.
        timestamps (`list` of int64 arrays, *optional*): Seconds, one an item, -1 where not known.
        query_time (int64 `[N]`, *optional*): When each list is asked for, -1 where not known.
        answered (bool `[N]`): Whether there is an item to go by and, with `exclude_history`, one left to list.
        problems (`dict[str, np.ndarray]`): Numbers of the rows that have a problem, for each kind.
    """

    items: list[np.ndarray]
    behaviors: list[np.ndarray]
    timestamps: list[np.ndarray] | None
    query_time: np.ndarray | None
    answered: np.ndarray
    problems: dict[str, np.ndarray]


def load_histories(source: str, split: str | None = None) -> Dataset:
    """
    What `Dataset.save_to_disk` wrote, a .parquet or .json(l) file, or what `datasets.load_dataset` makes of `source` (a
    folder of such files, a data set of the Hub).

    Raises:
        ValueError: on other files, or if there are several splits and `split` is none of them.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in FILES:
            raise ValueError(
                f"Expected histories in a file of {list(FILES)}, found {source}. A CSV file has no lists: the docstring of "
                "recipes.data.histories shows how histories are made of a table of interactions."
            )
        data = load_dataset(FILES[path.suffix], data_files=glob.escape(source))  # a name with brackets is no pattern
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        data = load_from_disk(source)
    else:
        data = load_dataset(source, split=split)
    if isinstance(data, DatasetDict):
        name = next(iter(data)) if split is None and len(data) == 1 else split
        if name not in data:
            raise ValueError(f"Expected a split among {list(data)}, found {split}. Name one of them.")
        data = data[name]
    return data


def check_columns(dataset: Dataset, tokenizer: SemanticIdTokenizer, with_times: bool) -> list[str]:
    """The columns that are read. `ValueError` unless there are rows, with the columns and types of the module's docstring."""
    columns = [name for name in COLUMNS if with_times or name not in TIMES]
    optional = {"query_time", *(["behaviors"] if len(tokenizer.behaviors) == 1 else [])}
    missing = [name for name in columns if name not in {*dataset.column_names, *optional}]
    if missing or len(dataset) == 0:
        raise ValueError(
            f"Expected rows with the columns {[name for name in columns if name not in optional]}, found {len(dataset)} rows "
            f"with {dataset.column_names}. Rename or add {missing or 'rows'}."
        )
    columns = [name for name in columns if name in dataset.column_names]
    for name in columns[1:]:
        found = dataset.features.arrow_schema.field(name).type
        value = found if name == "query_time" else getattr(found, "value_type", pa.null())
        of_names = pa.types.is_string(value) or pa.types.is_large_string(value)
        of_numbers = pa.types.is_integer(value) or pa.types.is_floating(value)
        if name in TIMES and not of_numbers:
            raise ValueError(
                f"Expected seconds in the columns timestamps (lists of numbers) and query_time (a number), found {name} "
                f"of type {found}. Convert it."
            )
        if name not in TIMES and not (of_names or (name == "items" and pa.types.is_integer(value))):
            raise ValueError(
                f"Expected lists in the columns items (your item ids: strings or integers) and behaviors (names out of "
                f"{tokenizer.behaviors}), found {name} of type {found}. The data set of recipes.prepare holds indices: the "
                "docstring of recipes.data.histories shows how histories are made of a table of interactions."
            )
    return columns


def seconds(column: pa.Array) -> np.ndarray:
    """Numbers as int64, -1 for what is none."""
    values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return np.where(np.isfinite(values), values, UNKNOWN_TIME).astype(np.int64)


def read_histories(table: pa.Table, tokenizer: SemanticIdTokenizer, exclude_history: bool) -> Histories:
    """Looks up the items and behaviors of some rows, and times if the table has them. What is wrong is told, not raised."""
    column, count = table["items"].combine_chunks(), len(table)
    ids, row = pc.list_flatten(column).cast(pa.string()), pc.list_parent_indices(column).to_numpy()
    # The tokenizer looks up every id once and Arrow spreads what it found: a cost of these rows, not of the catalog.
    found = tokenizer.item_indices(ids.unique().to_pylist(), unknown="skip")
    names = pa.array([tokenizer.item_ids[item] for item in found], pa.string())
    items = pa.array(found).take(pc.index_in(ids, value_set=names)).fill_null(-1).to_numpy()
    behaviors, behavior_row = np.zeros_like(items), row
    if "behaviors" in table.column_names:
        column = table["behaviors"].combine_chunks()
        names, behavior_row = pc.list_flatten(column).cast(pa.string()), pc.list_parent_indices(column).to_numpy()
        behaviors = pc.index_in(names, value_set=pa.array(tokenizer.behaviors)).fill_null(-1).to_numpy()
    timestamps, requests, time_row = None, None, row
    if "timestamps" in table.column_names:
        column = table["timestamps"].combine_chunks()
        timestamps, time_row = seconds(pc.list_flatten(column)), pc.list_parent_indices(column).to_numpy()
    if "query_time" in table.column_names:
        requests = seconds(table["query_time"].combine_chunks())
    lengths = np.bincount(row, minlength=count)
    uneven, uneven_times = (
        np.flatnonzero(lengths != np.bincount(one, minlength=count)) for one in (behavior_row, time_row)
    )
    problems = {
        UNKNOWN: np.unique(row[items < 0]),
        EMPTY: np.flatnonzero(lengths == 0),
        "with another number of behaviors than of items": uneven,
        "with another number of timestamps than of items": uneven_times,
        f"with behaviors that are none of {tokenizer.behaviors}": np.unique(behavior_row[behaviors < 0]),
    }
    if len(uneven):  # which ends in an error, whatever stands here
        behaviors = np.zeros_like(items)
    if len(uneven_times):
        timestamps = np.zeros_like(items)
    known = items >= 0
    ends = np.bincount(row[known], minlength=count).cumsum()[:-1]
    kept = np.split(items[known], ends)
    times = None if timestamps is None else np.split(timestamps[known], ends)
    everything = tokenizer.num_items if exclude_history else np.inf
    answered = [len(one) > 0 and (len(one) < everything or len(np.unique(one)) < everything) for one in kept]
    return Histories(kept, np.split(behaviors[known], ends), times, requests, np.array(answered), problems)


def check_rows(
    dataset: Dataset,
    tokenizer: SemanticIdTokenizer,
    shards: range,
    exclude_history: bool,
    unknown: Literal["error", "skip"],
) -> int:
    """
    Reads all rows, each process its part of `shards` (the first rows of each), and returns how many have no answer.

    Raises:
        ValueError: with the number of rows that have a problem, for each kind, and the first users.
    """
    state = PartialState()
    allowed = (UNKNOWN, EMPTY) if unknown == "skip" else ()
    unanswered, found = 0, []
    mine = shards[state.process_index :: state.num_processes]
    for start in tqdm(mine, desc="checking", unit="shard", disable=not state.is_main_process):
        table = dataset[start : start + shards.step]
        histories = read_histories(table, tokenizer, exclude_history)
        unanswered += int((~histories.answered).sum())
        for kind, rows in histories.problems.items():
            if len(rows) and kind not in allowed:
                found.append((start, kind, len(rows), table["user_id"].take(rows[:5]).to_pylist()))
    kinds: dict[str, tuple[int, list]] = {}
    for _, kind, count, users in sorted(gather_object(found), key=lambda one: one[0]):
        before, first = kinds.get(kind, (0, []))
        kinds[kind] = before + count, (first + users)[:5]
    if kinds:
        raise ValueError(
            f"Expected {len(dataset):,} histories of known items with a behavior each, found "
            + "; ".join(f"{count:,} {kind} (the first user_id: {users})" for kind, (count, users) in kinds.items())
            + ". Correct or drop these rows; unknown='skip' drops unknown items, and gives an empty list where none is left."
        )
    return sum(gather_object([unanswered]))
