"""Read the published tables of TAOBAO-MM in bounded memory: histories, clicks, and rows for the trainer.

| table | columns | size |
| --- | --- | --- |
| scl_embedding_int8_p90*.parquet | 205 item, 205_c int8 [128]: a unit vector times 127 | 35.5M items, 5.3 GB |
| {train,test}_samples*.parquet | 129_1 user, 205 item, label_0: [0, 1] clicked, [1, 0] not | 99.0M samples |
| {train,test}_user_features*.parquet | 129_1 user, 150_2_180 items, oldest first, 0 = padding | 8.79M users, 44.6 GB |

Some copies name the embeddings' column as their table; pass `--embedding_column` for these.

The samples that are clicks are small: 16 bytes each, 14 % of all. The recipe sorts them by user on disk and maps them.
It streams the user table past them, and finds each user's clicks by binary search. Memory holds the ids of the user
table alone, 8 bytes per user.

The published user table has row groups of 1,048,576 users, as `pyarrow` makes them, with 8 GB of histories each.
`load_dataset("parquet", streaming=True)` scans with `pyarrow.dataset`, which decodes a whole row group before its
first batch. It takes 33 bytes per history item, so 34 GB for a published row group. `ParquetFile.iter_batches` on a
buffered stream holds single pages: 28 MB for a row group of 40,000 users. The generator of the
`datasets.IterableDataset` here reads with it, and its shards are row groups.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import IterableDataset
from numpy.lib.format import open_memmap
from tqdm.auto import tqdm

from recipes.data.encoding import LONG_HISTORY, encode_history
from tokenization.vocabulary_layout import VocabularyLayout

# File and row group of each shard.
Shards = list[tuple[str, int]]

# Names of the tables.
EMBEDDINGS = "scl_embedding_int8_p90"
SAMPLES = "{}_samples"
USERS = "{}_user_features"
# Names of the columns.
USER = "129_1"
ITEM = "205"
EMBEDDING = "205_c"
LABEL = "label_0"
HISTORY = "150_2_180"
TYPES = {
    USER: pa.int64(),
    ITEM: pa.int64(),
    # The embeddings' column has either name.
    **dict.fromkeys((EMBEDDING, EMBEDDINGS), pa.list_(pa.int8())),
    LABEL: pa.list_(pa.int8()),
    HISTORY: pa.list_(pa.int64()),
}
BEHAVIORS = ("click",)
# Values in place of a catalog index.
PADDING = -2
UNKNOWN = -1
# Rows per batch: scalars and embeddings; histories (2 MB).
BATCH_ROWS = 16_384
BATCH_USERS = 256


def table_files(folder: str | Path, table: str) -> list[Path]:
    """
    List the files of a table, in order.

    Raises:
        ValueError: if there are no files.
    """
    files = sorted(Path(folder).glob(f"{table}*.parquet"))
    if not files:
        names = sorted(path.name for path in Path(folder).glob("*"))[:10]
        raise ValueError(
            f"`tables` must have files {table}*.parquet, got {names} in {folder}. Download the folder raw/ of "
            "TaoBao-MM/Taobao-MM, or make tables with recipes.papers.taobao.synthetic."
        )
    return files


def table_shards(folder: str | Path, table: str, columns: list[str]) -> tuple[Shards, int]:
    """
    List the row groups of a table's files, and count their rows.

    Raises:
        ValueError: for missing or damaged files, and for missing columns or other types.
    """
    shards = []
    num_rows = 0
    for file in table_files(folder, table):
        try:
            with pq.ParquetFile(file) as parquet:
                schema = parquet.schema_arrow
                metadata = parquet.metadata
        except (pa.ArrowException, OSError) as error:
            raise _damaged(file, error) from error
        for name in columns:
            if name not in schema.names or schema.field(name).type != TYPES[name]:
                actual = schema.field(name).type if name in schema.names else f"the columns {schema.names}"
                other = ", or name its column by --embedding_column" if name in (EMBEDDING, EMBEDDINGS) else ""
                raise ValueError(
                    f"`{file.name}` must have a column {name} of {TYPES[name]}, got {actual} in {file}. Take the "
                    f"table as published{other}."
                )
        shards += [(str(file), group) for group in range(metadata.num_row_groups)]
        num_rows += metadata.num_rows
    return shards, num_rows


def read_batches(shards: Shards, columns: list[str], batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """
    Read batches of at most `batch_rows` rows; memory holds pages, not row groups.

    Raises:
        ValueError: for damaged files.
    """
    for file, group in shards:
        try:
            with pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as parquet:
                yield from parquet.iter_batches(batch_rows, row_groups=[group], columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(file, error) from error


def scalars(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """Read a column of integers as int64 `[n]`; raise `ValueError` for an empty cell."""
    return _without_nulls(batch.column(name), name).to_numpy()


def lists(batch: pa.RecordBatch, name: str, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """
    Read a column of lists.

    Args:
        batch: Rows of a table.
        name: Name of the column.
        width: Number of values that every list must have. None: lists of any length.

    Returns:
        The values of all lists, one after another, and the end of each list in them, int64 `[n]`.

    Raises:
        ValueError: for an empty cell, or a list of another length than `width`.
    """
    column = _without_nulls(batch.column(name), name)
    ends = column.offsets.to_numpy().astype(np.int64)
    lengths = np.diff(ends)
    if width is not None and (lengths != width).any():
        wrong = np.flatnonzero(lengths != width)
        raise ValueError(
            f"`{name}` must have lists of {width} values, got a list of {lengths[wrong[0]]} in row {wrong[0]} of a "
            f"batch, which has {len(wrong)} such rows. Correct or drop these rows."
        )
    return _without_nulls(column.flatten(), name).to_numpy(), ends[1:] - ends[0]


def find_items(item_ids: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """
    Find the catalog indices int32 `[n]` of ids int64 `[n]`, by binary search in sorted ids `[N]`.

    An id that is not there has the index `UNKNOWN`.
    """
    # Search in order: neighbors stay in the processor's cache.
    distinct, inverse = np.unique(ids, return_inverse=True)
    places = np.searchsorted(item_ids, distinct)
    places[places == len(item_ids)] = 0
    return np.where(item_ids[places] == distinct, places, UNKNOWN).astype(np.int32)[inverse]


def user_histories(
    shards: Shards, data_dir: str | Path, split: str
) -> Iterator[tuple[int, np.ndarray, np.ndarray, int]]:
    """
    Stream the user table past the clicks, and skip users without a click.

    Args:
        shards: Row groups of the split's user table.
        data_dir: Output folder of recipes.papers.taobao.prepare, with `item_ids.npy`, `{split}_click_users.npy` and
            `{split}_click_items.npy`.
        split: Name of the split, train or test.

    Yields:
        User id, known items of the history int32 `[n]`, clicked items int32 `[m]`, and the number of unknown items of
        the history. Histories are oldest first, without padding, and m >= 1.
    """
    item_ids, click_users, click_items = (
        np.load(Path(data_dir) / f"{name}.npy", mmap_mode="r")
        for name in ("item_ids", f"{split}_click_users", f"{split}_click_items")
    )
    for batch in read_batches(shards, [USER, HISTORY], BATCH_USERS):
        users = scalars(batch, USER)
        first, last = (np.searchsorted(click_users, users, side) for side in ("left", "right"))
        clicked = np.flatnonzero(last > first)
        if len(clicked) == 0:
            continue
        values, ends = lists(batch.take(pa.array(clicked)), HISTORY)
        indices = np.where(values == 0, PADDING, find_items(item_ids, values))
        for place, history in zip(clicked, np.split(indices, ends[:-1]), strict=True):
            num_unknown = int((history == UNKNOWN).sum())
            clicks = np.array(click_items[first[place] : last[place]])
            yield int(users[place]), history[history >= 0], clicks, num_unknown


class ClickTokenizer:
    """
    Encode histories of clicks as a `SemanticIdTokenizer` does, from codes alone.

    A tokenizer's list of all item ids would not fit into memory.

    Args:
        codebook_sizes (`Sequence[int]`): Codes of each level.
        item_codes (int32 `[N, L]`): Codes of each item; may be a mapped file.
    """

    def __init__(self, codebook_sizes: Sequence[int], item_codes: np.ndarray):
        self.layout = VocabularyLayout(BEHAVIORS, tuple(codebook_sizes))
        self.item_codes = item_codes

    def encode_indices(self, item_index: np.ndarray, behavior_index: np.ndarray) -> np.ndarray:
        """Encode catalog indices `[n]` as `<bos> s1 .. sL b ...`: int64 `[1 + n * (L + 1)]`."""
        return self.layout.encode(self.item_codes[item_index], behavior_index)


def training_rows(
    shards: Shards, data_dir: str, split: str, codebook_sizes: tuple[int, ...], max_items: int, max_long_items: int
) -> Iterator[dict[str, Any]]:
    """
    Make a training row for each click of a user whose history has a known item.

    Args:
        shards: Row groups of the split's user table.
        data_dir: Output folder of recipes.papers.taobao.prepare.
        split: Name of the split, train or test.
        codebook_sizes: Codes of each level.
        max_items: Most recent known items of a row, before the clicked one.
        max_long_items: Most recent known items of the long history. 0: no long history.

    Yields:
        `input_ids`, `attention_mask` and `labels`, int64 `[T]`: the known items and the clicked one. All tokens but
        `<bos>` have a label. With a long history also `long_items` int32 `[H]`, oldest first, without the clicked
        item.
    """
    codes = np.load(Path(data_dir) / "item_codes.npy", mmap_mode="r")
    tokenizer = ClickTokenizer(codebook_sizes, codes)
    for _, history, clicks, _ in user_histories(shards, data_dir, split):
        for item in clicks if len(history) else ():
            items = np.append(history[-max_items:], item)
            row = encode_history(tokenizer, items, np.zeros_like(items))
            row["labels"] = row["input_ids"].copy()
            row["labels"][0] = -100
            if max_long_items:
                row[LONG_HISTORY["items"]] = history[-max_long_items:]
            yield row


def stream_rows(
    tables: str | Path,
    data_dir: str | Path,
    split: str,
    codebook_sizes: list[int],
    max_items: int,
    max_long_items: int,
) -> IterableDataset:
    """Stream `training_rows` as a dataset that can be shuffled with a buffer, split over processes, and resumed."""
    shards, _ = table_shards(tables, USERS.format(split), [USER, HISTORY])
    # `datasets` hashes these, copies them to workers, and splits the list.
    rows: dict[str, Any] = {"shards": shards, "data_dir": str(data_dir), "split": split}
    rows |= {"codebook_sizes": tuple(codebook_sizes), "max_items": max_items, "max_long_items": max_long_items}
    return IterableDataset.from_generator(training_rows, gen_kwargs=rows)


def progress(shards: Shards, columns: list[str], rows: int, text: str) -> Iterator[pa.RecordBatch]:
    """Read batches under a progress bar."""
    with tqdm(total=rows, desc=text, unit="row", unit_scale=True) as bar:
        for batch in read_batches(shards, columns):
            yield batch
            bar.update(batch.num_rows)


@contextmanager
def new_array(file: Path, dtype: type, shape: tuple[int, ...]) -> Iterator[np.memmap]:
    """
    Create a mapped array that replaces `file` when it is complete; readers of the old file keep the old data.

    Raises:
        OSError: on a full disk.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        array = open_memmap(temporary, "w+", dtype, shape)
        # Allocate first: a full disk would be a bus error later.
        if hasattr(os, "posix_fallocate"):
            with temporary.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, temporary.stat().st_size)
        yield array
        array.flush()
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def fill(array: np.ndarray, parts: Iterable[np.ndarray]) -> None:
    """Write parts into an array of their total length, one after another."""
    start = 0
    for part in parts:
        array[start : start + len(part)] = part
        start += len(part)


def _without_nulls(column: pa.Array, name: str) -> pa.Array:
    if column.null_count:
        raise ValueError(
            f"`{name}` must have a value in every row, got {column.null_count} empty cells of {len(column)} in a "
            "batch. Correct or drop these rows."
        )
    return column


def _damaged(file: str | Path, error: Exception) -> ValueError:
    return ValueError(
        f"`{Path(file).name}` must be a complete Parquet file, got a truncated or damaged one at {file} ({error}). "
        "Download it again."
    )
