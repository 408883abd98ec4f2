"""The tables of TAOBAO-MM as they are published, read in bounded memory: histories, clicks, rows for the trainer.

    scl_embedding_int8_p90*.parquet    205 item, 205_c int8 [128], a unit vector times 127       35.5M items, 5.3 GB
    {train,test}_samples*.parquet      129_1 user, 205 item, label_0 [0, 1] clicked, [1, 0] not   99.0M
    {train,test}_user_features*.parquet   129_1 user, 150_2_180 items, oldest first, 0 = padding  8.79M users, 44.6 GB

Where the embeddings' column is called as their table is, say so by `--embedding_column`.

The samples that are clicks are small (16 bytes each, 14 % of all), so they are sorted by user on disk and mapped; the
user table is streamed past them and each user's clicks are found by binary search. Of the user table nothing but its
ids, 8 bytes a user, is ever held.

The published user table has row groups as `pyarrow` makes them, of 1,048,576 users (7 for 6.9M), 8 GB of history each.
`load_dataset("parquet", streaming=True)` scans with `pyarrow.dataset`, which decodes a whole one before its first batch:
33 bytes an item on a group of 40,000 users, which makes 34 GB of a published one. `ParquetFile.iter_batches` on a buffered
stream holds pages: 28 MB there. It is what the generator of the `datasets.IterableDataset` here reads with; its shards are
row groups.
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

Shards = list[tuple[str, int]]  # file, row group

EMBEDDINGS, SAMPLES, USERS = "scl_embedding_int8_p90", "{}_samples", "{}_user_features"
USER, ITEM, EMBEDDING, LABEL, HISTORY = "129_1", "205", "205_c", "label_0", "150_2_180"
TYPES = {
    USER: pa.int64(),
    ITEM: pa.int64(),
    **dict.fromkeys((EMBEDDING, EMBEDDINGS), pa.list_(pa.int8())),  # the column has either name
    LABEL: pa.list_(pa.int8()),
    HISTORY: pa.list_(pa.int64()),
}
BEHAVIORS = ("click",)
PADDING, UNKNOWN = -2, -1  # in place of a catalog index
BATCH_ROWS = 16_384  # of scalars and embeddings
BATCH_USERS = 256  # 2 MB of history


def table_files(folder: str | Path, table: str) -> list[Path]:
    """The files of a table, in order; `ValueError` if there are none."""
    files = sorted(Path(folder).glob(f"{table}*.parquet"))
    if not files:
        found = sorted(path.name for path in Path(folder).glob("*"))[:10]
        raise ValueError(
            f"expected {table}*.parquet in {folder}, found {found}: download the folder raw/ of TaoBao-MM/Taobao-MM, or "
            "make tables with recipes.papers.taobao.synthetic"
        )
    return files


def table_shards(folder: str | Path, table: str, columns: list[str]) -> tuple[Shards, int]:
    """Row groups of a table's files, and their rows. `ValueError` on missing or damaged files or columns."""
    shards, rows = [], 0
    for file in table_files(folder, table):
        try:
            with pq.ParquetFile(file) as parquet:
                schema, metadata = parquet.schema_arrow, parquet.metadata
        except (pa.ArrowException, OSError) as error:
            raise _damaged(file, error) from error
        for name in columns:
            if name not in schema.names or schema.field(name).type != TYPES[name]:
                type_found = schema.field(name).type if name in schema.names else f"the columns {schema.names}"
                other = " or name its column by --embedding_column" if name in (EMBEDDING, EMBEDDINGS) else ""
                raise ValueError(
                    f"expected a column {name} of {TYPES[name]} in {file}, found {type_found}: bring the table as published{other}"
                )
        shards += [(str(file), group) for group in range(metadata.num_row_groups)]
        rows += metadata.num_rows
    return shards, rows


def read_batches(shards: Shards, columns: list[str], batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """Batches of at most `batch_rows` rows. Holds pages, not row groups. `ValueError` on damaged files."""
    for file, group in shards:
        try:
            with pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as parquet:
                yield from parquet.iter_batches(batch_rows, row_groups=[group], columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(file, error) from error


def scalars(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A column of integers as int64 `[n]`. `ValueError` on an empty cell."""
    return _without_nulls(batch.column(name), name).to_numpy()


def lists(batch: pa.RecordBatch, name: str, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists: its values one after another, and where each list ends, int64 `[n]`. `ValueError` on an empty
    cell, or a list that has not `width` values."""
    column = _without_nulls(batch.column(name), name)
    ends = column.offsets.to_numpy().astype(np.int64)
    lengths = np.diff(ends)
    if width is not None and (lengths != width).any():
        wrong = int(np.flatnonzero(lengths != width)[0])
        raise ValueError(
            f"expected lists of {width} in the column {name}, found one of {lengths[wrong]} ({(lengths != width).sum()} "
            f"such in a batch, row {wrong} the first): correct or drop these rows"
        )
    return _without_nulls(column.flatten(), name).to_numpy(), ends[1:] - ends[0]


def find_items(item_ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Catalog indices int32 `[n]` of ids int64 `[n]`, by binary search in sorted ids `[N]`; `UNKNOWN`: not there."""
    distinct, back = np.unique(wanted, return_inverse=True)  # sorted: neighbors stay in the cache
    at = np.searchsorted(item_ids, distinct)
    at[at == len(item_ids)] = 0
    return np.where(item_ids[at] == distinct, at, UNKNOWN).astype(np.int32)[back]


def user_histories(
    shards: Shards, data_dir: str | Path, split: str
) -> Iterator[tuple[int, np.ndarray, np.ndarray, int]]:
    """Streams the user table past the clicks.

    Args:
        shards: of the split's user table.
        data_dir: what recipes.papers.taobao.prepare prepared: `item_ids.npy`, `{split}_click_users.npy`, `{split}_click_items.npy`.

    Yields:
        user id, known items of the history int32 `[n]` (oldest first, padding and unknown ones dropped), clicked items
        int32 `[m]`, m >= 1, and how many items were unknown; users without a click are passed over.
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
        found = np.where(values == 0, PADDING, find_items(item_ids, values))
        for row, history in zip(clicked, np.split(found, ends[:-1]), strict=True):
            unknown = int((history == UNKNOWN).sum())
            yield int(users[row]), history[history >= 0], np.array(click_items[first[row] : last[row]]), unknown


class ClickTokenizer:
    """
    Encode histories of clicks as a `SemanticIdTokenizer` does, from codes alone: a list of all item ids would not fit in memory.

    Args:
        codebook_sizes (`Sequence[int]`): Codes of each level.
        item_codes (int32 `[N, L]`): Codes of each item; may be a mapped file.
    """

    def __init__(self, codebook_sizes: Sequence[int], item_codes: np.ndarray):
        self.layout, self.item_codes = VocabularyLayout(BEHAVIORS, tuple(codebook_sizes)), item_codes

    def encode_indices(self, item_index: np.ndarray, behavior_index: np.ndarray) -> np.ndarray:
        """Encode catalog indices `[n]` as `<bos> s1 .. sL b ...`: int64 `[1 + n * (L + 1)]`."""
        return self.layout.encode(self.item_codes[item_index], behavior_index)


def training_rows(
    shards: Shards, data_dir: str, split: str, codebook_sizes: tuple[int, ...], max_items: int, max_long_items: int
) -> Iterator[dict[str, Any]]:
    """A row for each click of a user with a known item in the history, as a Trainer takes it.

    Yields:
        `input_ids`, `attention_mask`, `labels` int64 `[T]`: the last `max_items` known items and the clicked one; all but
        `<bos>` is supervised. With `max_long_items` also `long_items` int32: that many last known items of the history,
        oldest first, the window's among them, the clicked one not.
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
    """`training_rows` as a streaming dataset: shuffle it with a buffer, split it over processes, resume it."""
    shards, _ = table_shards(tables, USERS.format(split), [USER, HISTORY])
    # Names and numbers alone: `datasets` hashes these arguments and copies them to workers. The list is the shards.
    rows: dict[str, Any] = {"shards": shards, "data_dir": str(data_dir), "split": split}
    rows |= {"codebook_sizes": tuple(codebook_sizes), "max_items": max_items, "max_long_items": max_long_items}
    return IterableDataset.from_generator(training_rows, gen_kwargs=rows)


def progress(shards: Shards, columns: list[str], rows: int, text: str) -> Iterator[pa.RecordBatch]:
    """`read_batches` with a bar."""
    with tqdm(total=rows, desc=text, unit="row", unit_scale=True) as bar:
        for batch in read_batches(shards, columns):
            yield batch
            bar.update(batch.num_rows)


@contextmanager
def new_array(file: Path, dtype: type, shape: tuple[int, ...]) -> Iterator[np.memmap]:
    """A mapped array that replaces `file` when it is whole: who has the old one open keeps that. `OSError` on a full disk."""
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        array = open_memmap(temporary, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # or a full disk would be a bus error at some page
            with temporary.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, temporary.stat().st_size)
        yield array
        array.flush()
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def fill(array: np.ndarray, parts: Iterable[np.ndarray]) -> None:
    """Writes parts into an array of their whole length, one after another."""
    start = 0
    for part in parts:
        array[start : start + len(part)] = part
        start += len(part)


def _without_nulls(column: pa.Array, name: str) -> pa.Array:
    if column.null_count:
        raise ValueError(
            f"expected a value in every row of the column {name}, found {column.null_count} empty ones of {len(column)} "
            "in a batch: correct or drop these rows"
        )
    return column


def _damaged(file: str | Path, error: Exception) -> ValueError:
    return ValueError(
        f"expected a complete Parquet file at {file}, found one that cannot be read ({error}): it is truncated or damaged, "
        "download it again"
    )
