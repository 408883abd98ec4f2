"""Histories in the user's own ids, as `recipes.recommend` takes them: loaded, checked and looked up.

Columns: `user_id` (of any type), `items` (a list of item ids, strings or integers, oldest first) and, if the tokenizer
knows several, `behaviors` (a list of as many names). From a table of interactions:

    table = pd.read_csv("interactions.csv", dtype=str).astype({"timestamp": float})
    users = table.sort_values("timestamp", kind="stable").groupby("user_id")
    users.agg(items=("item_id", list), behaviors=("behavior", list)).reset_index().to_parquet("histories.parquet")

The `dataset/` of recipes.prepare is none: it holds catalogue indices, and ends before the held-out interactions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from tqdm.auto import tqdm

from tokenization import SemanticIdTokenizer

COLUMNS = ("user_id", "items", "behaviors")
FILES = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
UNKNOWN, EMPTY = "with items that the catalogue does not have", "without an item"


@dataclass
class Histories:
    """
    Some rows, looked up.

    Args:
        items (`list` of int64 arrays): Catalogue rows of each history's known items, oldest first.
        behaviors (`list` of int64 arrays): Indices into `tokenizer.behaviors`, one an item.
        answered (bool `[N]`): Whether there is an item to go by and, with `exclude_history`, one left to list.
        problems (`dict[str, np.ndarray]`): Numbers of the rows that have a problem, for each kind.
    """

    items: list[np.ndarray]
    behaviors: list[np.ndarray]
    answered: np.ndarray
    problems: dict[str, np.ndarray]


def padded(rows: list) -> torch.LongTensor:
    """Rows of integers, of any lengths -> `[B, longest]`, filled up by -1, as `long_items` and `long_behaviors` are."""
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


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
                "recipes.histories shows how histories are made of a table of interactions."
            )
        data = load_dataset(FILES[path.suffix], data_files=source)
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


def check_columns(dataset: Dataset, tokenizer: SemanticIdTokenizer) -> None:
    """`ValueError` unless there are rows, with the columns and types of the module's docstring."""
    needed = COLUMNS if len(tokenizer.behaviors) > 1 else COLUMNS[:2]
    missing = [name for name in needed if name not in dataset.column_names]
    if missing or len(dataset) == 0:
        raise ValueError(
            f"Expected rows with the columns {list(needed)}, found {len(dataset)} rows with {dataset.column_names}. Rename "
            f"or add {missing or 'rows'}."
        )
    for name in COLUMNS[1:]:
        if name not in dataset.column_names:
            continue
        found = dataset.features.arrow_schema.field(name).type
        value = getattr(found, "value_type", pa.null())
        of_names = pa.types.is_string(value) or pa.types.is_large_string(value)
        if not (of_names or (name == "items" and pa.types.is_integer(value))):
            raise ValueError(
                f"Expected lists in the columns items (your item ids: strings or integers) and behaviors (names out of "
                f"{tokenizer.behaviors}), found {name} of type {found}. The data set of recipes.prepare holds indices: the "
                "docstring of recipes.histories shows how histories are made of a table of interactions."
            )


def read_histories(table: pa.Table, tokenizer: SemanticIdTokenizer, exclude_history: bool) -> Histories:
    """Looks up the items and behaviours of some rows. What is wrong with them is told, not raised."""
    column, count = table["items"].combine_chunks(), len(table)
    ids, row = pc.list_flatten(column).cast(pa.string()), pc.list_parent_indices(column).to_numpy()
    # The tokenizer looks up every id once and Arrow spreads what it found: a cost of these rows, not of the catalogue.
    found = tokenizer.item_indices(ids.unique().to_pylist(), unknown="skip")
    names = pa.array([tokenizer.item_ids[item] for item in found], pa.string())
    items = pa.array(found).take(pc.index_in(ids, value_set=names)).fill_null(-1).to_numpy()
    behaviors, behavior_row = np.zeros_like(items), row
    if "behaviors" in table.column_names:
        column = table["behaviors"].combine_chunks()
        names, behavior_row = pc.list_flatten(column).cast(pa.string()), pc.list_parent_indices(column).to_numpy()
        behaviors = pc.index_in(names, value_set=pa.array(tokenizer.behaviors)).fill_null(-1).to_numpy()
    lengths = np.bincount(row, minlength=count)
    uneven = np.flatnonzero(lengths != np.bincount(behavior_row, minlength=count))
    problems = {
        UNKNOWN: np.unique(row[items < 0]),
        EMPTY: np.flatnonzero(lengths == 0),
        "with another number of behaviors than of items": uneven,
        f"with behaviors that are none of {tokenizer.behaviors}": np.unique(behavior_row[behaviors < 0]),
    }
    if len(uneven):  # which ends in an error, whatever stands here
        behaviors = np.zeros_like(items)
    known = items >= 0
    ends = np.bincount(row[known], minlength=count).cumsum()[:-1]
    kept = np.split(items[known], ends)
    everything = tokenizer.num_items if exclude_history else np.inf
    answered = [len(one) > 0 and (len(one) < everything or len(np.unique(one)) < everything) for one in kept]
    return Histories(kept, np.split(behaviors[known], ends), np.array(answered), problems)


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
    kinds = {}
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
