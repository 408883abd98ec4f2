"""Load, check and look up histories in the user's own ids, as `recipes.recommend` takes them.

Columns: `user_id` (any type), `items` (a list of item ids, strings or numbers, oldest first) and `behaviors` (a list
of as many names). A tokenizer with a single behavior needs no `behaviors`. These lines make histories from a table of
interactions:

    names = {"item_id": "items", "behavior": "behaviors", "timestamp": "timestamps"}
    table = read_interactions("interactions.csv").sort_values("position", kind="stable").drop(columns="position")
    table.rename(columns=names).groupby("user_id").agg(list).reset_index().to_parquet("histories.parquet")

`recipes.data.tables.read_interactions` reads a table as recipes.prepare does.

A model that reads times needs `timestamps`: a list of as many seconds or dates, null for an unknown time. The optional
column `query_time` holds the time at which the next item is requested. A null, or no such column, stands for the time
of the last item.

The `dataset/` of recipes.prepare holds no such histories: its items are catalog indices, without the held-out ones.
"""

import glob
import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict, config, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from tqdm.auto import tqdm

from recipes.common.files import path_or_hub
from recipes.common.hashing import sha256
from tokenization import SemanticIdTokenizer
from tokenization.cell_values import as_id, as_seconds
from tokenization.vocabulary_layout import UNKNOWN_TIME

COLUMNS = ("user_id", "items", "behaviors", "timestamps", "query_time")
TIMES = COLUMNS[3:]
FILES = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
HASHED_ROWS = 4096
# Problems of a row that `unknown="skip"` allows.
UNKNOWN = "with items that the catalog does not have"
EMPTY = "without an item"
WRONG_TIMES = "with times that are no seconds from 1970 to the year 9999, such as milliseconds"


@dataclass
class Histories:
    """
    Histories of N users, looked up in the catalog.

    Args:
        items (`list` of int64 arrays): Catalog rows of each history's known items, oldest first.
        behaviors (`list` of int64 arrays): Indices into `tokenizer.behaviors`, one per item.
        timestamps (`list` of int64 arrays, *optional*): Seconds, one per item; -1: unknown. None: the table has no
            times.
        query_time (int64 `[N]`, *optional*): Seconds at which each list is requested; -1: unknown. None: the table has
            none.
        answered (bool `[N]`): Whether the history has a known item and, with `exclude_history`, leaves an item to
        list.
        problems (`dict[str, np.ndarray]`): Numbers of the rows with a problem, for each kind of problem.
    """

    items: list[np.ndarray]
    behaviors: list[np.ndarray]
    timestamps: list[np.ndarray] | None
    query_time: np.ndarray | None
    answered: np.ndarray
    problems: dict[str, np.ndarray]


def load_histories(source: str, split: str | None = None) -> Dataset:
    """
    Load a data set of histories.

    Args:
        source: A folder that `Dataset.save_to_disk` wrote, a .parquet, .json or .jsonl file, a folder of such files,
            or a data set of the Hub.
        split: Name of the split. None: the only split.

    Raises:
        ValueError: for a path that does not exist, for other files, for tables without rows, and for several splits of
            which `split` names none.
    """
    path = Path(source)
    with path_or_hub("histories", source):
        data = load_splits(path) if path.exists() else load_dataset(source, split=split)
    if isinstance(data, DatasetDict):
        name = next(iter(data)) if split is None and len(data) == 1 else split
        if name not in data:
            raise ValueError(f"`split` must be among {list(data)}, got {split}. Name one of these splits.")
        data = data[name]
    if "request_timestamp" in data.column_names:
        warnings.warn(
            "`request_timestamp` is a name of 0.1, which 0.3 will refuse. Name it query_time.", FutureWarning, 2
        )
        data = data.rename_column("request_timestamp", "query_time")
    return data


def load_splits(path: Path) -> Dataset | DatasetDict:
    """Load a saved Dataset, or a file or folder of tables; raise `ValueError` for what is neither, or has no row."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return load_from_disk(str(path))
    if path.is_file() and path.suffix not in FILES:
        raise ValueError(
            f"`histories` must be a file of type {list(FILES)}, got {path}. Make it from the table of interactions as "
            "the docstring of recipes.data.histories shows. A CSV file has no lists."
        )
    # The cache knows a file by its path and time: keep a cache for each content.
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    content = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
    cache = str(Path(config.HF_DATASETS_CACHE) / "histories" / content)
    try:
        if path.is_dir():
            return load_dataset(str(path), cache_dir=cache)
        # A name with brackets is no pattern.
        return load_dataset(FILES[path.suffix], data_files=glob.escape(str(path)), cache_dir=cache)
    # Raised for damaged files, and for files without rows.
    except (ValueError, DatasetGenerationError, StopIteration) as error:
        raise ValueError(
            f"`histories` must be tables with rows, got {path}, which cannot be read: {error.__cause__ or error}. "
            "Write the files again, without those that have no row."
        ) from error


def content_hash(dataset: Dataset) -> str:
    """Return the SHA-256 of the rows, whatever file they come from and however that file stores them."""
    digest = hashlib.sha256()
    names = sorted(set(COLUMNS) & set(dataset.column_names))
    rows = dataset.select_columns(names).with_format("arrow")
    for start in range(0, len(dataset), HASHED_ROWS):
        table = rows[start : start + HASHED_ROWS]
        for name in names:
            digest.update(name.encode())
            hash_values(digest, table[name].combine_chunks())
    return digest.hexdigest()


def hash_values(digest: Any, values: pa.Array) -> None:
    """Add values, or lists of values, to a digest."""
    if hasattr(values.type, "value_type"):
        lengths = pc.fill_null(pc.list_value_length(values), -1)
        digest.update(lengths.to_numpy().astype(np.int64).tobytes())
        hash_values(digest, pc.list_flatten(values))
        return
    # Equal values get equal numbers, in the order of their first row.
    distinct = values.dictionary_encode()
    digest.update(json.dumps(distinct.dictionary.to_pylist(), default=str).encode())
    digest.update(pc.fill_null(distinct.indices, -1).to_numpy().astype(np.int64).tobytes())


def check_columns(dataset: Dataset, tokenizer: SemanticIdTokenizer, with_times: bool) -> list[str]:
    """
    Return the names of the columns to read.

    Raises:
        ValueError: unless there are rows, with the columns and types of the module's docstring.
    """
    columns = [name for name in COLUMNS if with_times or name not in TIMES]
    optional = {"query_time", *(["behaviors"] if len(tokenizer.behaviors) == 1 else [])}
    missing = [name for name in columns if name not in {*dataset.column_names, *optional}]
    if missing or len(dataset) == 0:
        raise ValueError(
            f"`histories` must be rows with the columns {[name for name in columns if name not in optional]}, got "
            f"{len(dataset)} rows with {dataset.column_names}. Rename or add {missing or 'rows'}."
        )
    columns = [name for name in columns if name in dataset.column_names]
    for name in columns[1:]:
        check_type(name, dataset.features.arrow_schema.field(name).type, tokenizer)
    return columns


def check_type(name: str, column_type: pa.DataType, tokenizer: SemanticIdTokenizer) -> None:
    """Raise `ValueError` unless a column of this name and type holds item ids, behaviors or seconds."""
    value_type = column_type if name == "query_time" else getattr(column_type, "value_type", pa.null())
    is_text = pa.types.is_string(value_type) or pa.types.is_large_string(value_type)
    is_number = pa.types.is_integer(value_type) or pa.types.is_floating(value_type)
    is_date = pa.types.is_timestamp(value_type) or pa.types.is_date(value_type)
    if name in TIMES and not (is_number or is_date):
        raise ValueError(
            f"`timestamps` must be lists of seconds or dates and `query_time` one of them, got {name} of type "
            f"{column_type}. Convert the column."
        )
    if name not in TIMES and not (is_text or (name == "items" and is_number)):
        raise ValueError(
            "`items` must be lists of item ids (strings or numbers) and `behaviors` lists of names out of "
            f"{tokenizer.behaviors}, got {name} of type {column_type}. Make histories from the table of interactions "
            "as the docstring of recipes.data.histories shows. The data set of recipes.prepare holds indices."
        )


def read_histories(table: pa.Table, tokenizer: SemanticIdTokenizer, exclude_history: bool) -> Histories:
    """
    Look up the items and behaviors of some rows, and read their times if the table has them.

    Problems of the rows are returned in `Histories.problems`, not raised.
    """
    # Values of all rows, and the row of each value.
    ids, item_rows = flatten_lists(table["items"])
    items = look_up_items(ids, tokenizer)
    behaviors = np.zeros_like(items)
    behavior_rows = time_rows = item_rows
    timestamps = query_time = None
    wrong_times = []
    if "behaviors" in table.column_names:
        names, behavior_rows = flatten_lists(table["behaviors"])
        known_names = pa.array(tokenizer.behaviors)
        behaviors = pc.index_in(names.cast(pa.string()), value_set=known_names).fill_null(-1).to_numpy()
    if "timestamps" in table.column_names:
        times, time_rows = flatten_lists(table["timestamps"])
        timestamps, is_wrong = read_times(times)
        wrong_times.append(time_rows[is_wrong])
    if "query_time" in table.column_names:
        query_time, is_wrong = read_times(table["query_time"].combine_chunks())
        wrong_times.append(np.flatnonzero(is_wrong))

    # Problems
    lengths, num_behaviors, num_times = (
        np.bincount(rows, minlength=len(table)) for rows in (item_rows, behavior_rows, time_rows)
    )
    uneven_behaviors = np.flatnonzero(lengths != num_behaviors)
    uneven_times = np.flatnonzero(lengths != num_times)
    problems = {
        UNKNOWN: np.unique(item_rows[items < 0]),
        EMPTY: np.flatnonzero(lengths == 0),
        "with another number of behaviors than of items": uneven_behaviors,
        "with another number of timestamps than of items": uneven_times,
        WRONG_TIMES: np.unique(np.concatenate(wrong_times or [item_rows[:0]])),
        f"with behaviors that are none of {tokenizer.behaviors}": np.unique(behavior_rows[behaviors < 0]),
    }
    # Uneven rows end in an error, so any values will do.
    if len(uneven_behaviors):
        behaviors = np.zeros_like(items)
    if len(uneven_times):
        timestamps = np.zeros_like(items)

    # Histories of known items.
    is_known = items >= 0
    ends = np.bincount(item_rows[is_known], minlength=len(table)).cumsum()[:-1]
    histories = np.split(items[is_known], ends)
    limit = tokenizer.num_items if exclude_history else np.inf
    answered = [len(rows) > 0 and (len(rows) < limit or len(np.unique(rows)) < limit) for rows in histories]
    return Histories(
        histories,
        np.split(behaviors[is_known], ends),
        None if timestamps is None else np.split(timestamps[is_known], ends),
        query_time,
        np.array(answered),
        problems,
    )


def flatten_lists(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Flatten a column of lists into its n values and the row of each value, int64 `[n]`."""
    lists = column.combine_chunks()
    return pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()


def look_up_items(ids: pa.Array, tokenizer: SemanticIdTokenizer) -> np.ndarray:
    """Look up the catalog rows of n item ids of any type: int64 `[n]`, -1 for an unknown or missing id."""
    # Distinct ids alone: the cost must not grow with the history.
    distinct = ids.dictionary_encode()
    names = [as_id(value) for value in distinct.dictionary.to_pylist()]
    catalog_rows = tokenizer.item_indices(names, unknown="skip")
    known_ids = pa.array([tokenizer.item_ids[item] for item in catalog_rows], pa.string())
    rows = pa.array(catalog_rows).take(pc.index_in(pa.array(names, pa.string()), value_set=known_ids))
    return rows.take(distinct.indices).fill_null(-1).to_numpy()


def read_times(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Convert n times to seconds, int64 `[n]`, -1 for an unknown time; also return the mask of what is no time."""
    is_date = pa.types.is_temporal(column.type)
    # Numbers and null as floats; dates without their zone, since Arrow stores them in UTC.
    times = column.cast(pa.timestamp("us") if is_date else pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    seconds = as_seconds(times)
    return np.nan_to_num(seconds, nan=UNKNOWN_TIME).astype(np.int64), np.isnan(seconds)


def check_rows(
    dataset: Dataset,
    tokenizer: SemanticIdTokenizer,
    shards: range,
    exclude_history: bool,
    unknown: Literal["error", "skip"],
) -> int:
    """
    Check all rows and count those without an answer.

    Args:
        dataset: Histories, in Arrow format.
        tokenizer: Tokenizer of the model.
        shards: First row of each shard. Each process checks its part of the shards.
        exclude_history: Whether lists leave out the items of the history.
        unknown: "error": reject unknown items and empty histories. "skip": allow both.

    Returns:
        Number of rows, over all processes, that get an empty list.

    Raises:
        ValueError: with the number of rows that have a problem, for each kind of problem, and the first users.
    """
    state = PartialState()
    allowed = (UNKNOWN, EMPTY) if unknown == "skip" else ()

    # Problems in the shards of this process.
    num_unanswered = 0
    problems = []
    own_shards = shards[state.process_index :: state.num_processes]
    for start in tqdm(own_shards, desc="checking", unit="shard", disable=not state.is_main_process):
        table = dataset[start : start + shards.step]
        histories = read_histories(table, tokenizer, exclude_history)
        num_unanswered += int((~histories.answered).sum())
        for kind, rows in histories.problems.items():
            if len(rows) and kind not in allowed:
                problems.append((start, kind, len(rows), table["user_id"].take(rows[:5]).to_pylist()))

    # Problems in all shards, in the order of the rows.
    kinds: dict[str, tuple[int, list]] = {}
    for _, kind, count, users in sorted(gather_object(problems), key=lambda problem: problem[0]):
        earlier_count, first_users = kinds.get(kind, (0, []))
        kinds[kind] = earlier_count + count, (first_users + users)[:5]
    if kinds:
        raise ValueError(
            f"`histories` must be {len(dataset):,} rows of known items with a behavior each, got "
            + "; ".join(f"{count:,} {kind} (the first user_id: {users})" for kind, (count, users) in kinds.items())
            + ". Correct or drop these rows, or pass unknown='skip'. It drops unknown items, and rows without a "
            "known item get an empty list."
        )
    return sum(gather_object([num_unanswered]))
