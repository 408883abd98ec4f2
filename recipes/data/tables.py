"""Read and validate the tables of `recipes.prepare`; errors name the rows."""

import csv
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tokenization.cell_values import as_id, as_seconds, as_text

SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_table(path: str | Path, required: list[str]) -> pd.DataFrame:
    """
    Read a table.

    Args:
        path: A .csv, .tsv or .parquet file.
        required: Columns that must be present and have no null. Those that end in `_id` become str.

    Raises:
        ValueError: for a file that is missing, unreadable or empty, lines that are no rows, columns of one name, and
            missing columns or values.
    """
    path = Path(path)
    if not path.is_file() or path.suffix not in (*SEPARATORS, ".parquet"):
        raise ValueError(f"`path` must be an existing .csv, .tsv or .parquet file, got {path}. Check path and suffix.")
    if path.suffix in SEPARATORS:
        check_lines(path)
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            # As text: "007" keeps its zeros, and "NA" is a title.
            table = pd.read_csv(path, sep=SEPARATORS[path.suffix], dtype="str", keep_default_na=False, na_values=[""])
    except (ValueError, OSError) as error:
        # pandas and Arrow raise no others for unreadable files.
        raise ValueError(
            f"`path` must be a whole {path.suffix} table (in UTF-8, if it is text), got {path}, which cannot be read: "
            f"{error}. Write the file again."
        ) from error
    missing = [name for name in required if name not in table]
    if missing:
        raise ValueError(
            f"`path` must be a table with the columns {required}, got {list(table.columns)} in {path}. Rename or add "
            f"{missing}."
        )
    if len(table) == 0:
        raise ValueError(f"`path` must be a table with rows, got only a header in {path}. Check how it was written.")
    table = table.reset_index(drop=True)
    for name in required:
        # A text file cannot tell an empty value from a missing one.
        is_filled = table[name].notna() & (table[name] != "")
        check_rows(is_filled, table[name], f"a {name} in every row", "an empty value", path)
        if name.endswith("_id"):
            ids = text_column(table[name], as_id)
            check_rows(ids.notna(), table[name], f"a string or an integer as {name}", "another value", path)
            table[name] = ids
    return table


def text_column(column: pd.Series, convert: Callable[[Any], str | None] = as_text) -> pd.Series:
    """Convert the distinct values of a column to str by `convert`; missing and nested values stay missing."""
    if pd.api.types.is_object_dtype(column):
        column = column.where(column.map(lambda value: isinstance(value, Hashable)), None)
    codes, distinct = pd.factorize(column)
    texts = np.array([*map(convert, distinct), None], dtype=object)
    return pd.Series(texts[codes], index=column.index, dtype="str")


def check_lines(path: Path) -> None:
    """
    Check that each line of a .csv or .tsv file is a row of as many fields as the header, which has distinct names.

    A quote that nobody closes would swallow separators and line breaks, and rows with them.

    Raises:
        ValueError: with the first line that is no such row, or the names that the header repeats.
    """
    separator = SEPARATORS[path.suffix]
    num_expected = None
    # pandas reports bytes that are not UTF-8.
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        for number, line in enumerate(file, start=1):
            num_fields = count_fields(line, separator)
            # pandas skips lines without text.
            if num_fields == num_expected or not line.strip():
                continue
            if num_expected is not None or num_fields is None:
                problem = "quotes that enclose no field" if num_fields is None else f"{num_fields} fields"
                raise ValueError(
                    f"`{path}` must have a row of {num_expected or 'all'} fields in each line, got {problem} in line "
                    f"{number}. Put a field with quotes into quotes, and double those inside. For texts with line "
                    "breaks, write a Parquet file."
                )
            num_expected = num_fields
            check_names(next(csv.reader([line], delimiter=separator)), path)


def check_names(names: list[str], path: Path) -> None:
    """Raise `ValueError` for names that a header repeats; pandas would rename the later columns."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"`{path}` must name each column once, got {repeated} more than once in its header. Rename or remove the "
            "columns that are not meant."
        )


def count_fields(line: str, separator: str) -> int | None:
    """Count the fields of a line; None if a quoted field does not end with its quote."""
    if '"' not in line:
        return line.count(separator) + 1
    try:
        return len(next(csv.reader([line], delimiter=separator, strict=True)))
    except csv.Error:
        return None


def read_interactions(path: str | Path) -> pd.DataFrame:
    """
    Read and validate interactions.

    Args:
        path: A table with `user_id`, `item_id`, `timestamp` or `position`, and optionally `behavior`.

    Returns:
        `user_id`, `item_id` and `behavior` (str), `timestamp` (seconds, float64) and `position`, in file order.
        `position` orders the interactions of a user: the column of the file, or else the timestamp. Without a column
        `timestamp`, all timestamps are -1 (unknown).

    Raises:
        ValueError: for missing columns, null values, timestamps that are neither seconds nor ISO 8601 dates, and
            positions that are no numbers.
    """
    table = read_table(path, ["user_id", "item_id"])
    if "timestamp" not in table and "position" not in table:
        raise ValueError(
            f"`path` must be a table with a column `timestamp`, or `position`, got {list(table.columns)} in {path}. "
            "Rename or add a column."
        )

    # Order
    timestamps = read_timestamps(table, path)
    if "position" in table:
        position = pd.to_numeric(table["position"], errors="coerce")
        is_number = np.isfinite(position.astype("float64"))
        check_rows(is_number, table["position"], "a number as position in every row", "another value", path)
    else:
        position = timestamps
        expected = "known timestamps, or a column `position` to order the interactions by,"
        check_rows(timestamps != -1, table["timestamp"], expected, "an unknown one (-1)", path)

    # Behaviors
    if "behavior" in table:
        check_rows(table["behavior"].notna(), table["behavior"], "a behavior in every row", "an empty behavior", path)
        behavior = text_column(table["behavior"])
    else:
        behavior = pd.Series("interact", index=table.index, dtype="str")
    if behavior.nunique() > 127:
        raise ValueError(
            f"`behavior` must have at most 127 distinct values, got {behavior.nunique()} in {path}. Map a rating or a "
            "count to a few names such as like and dislike."
        )
    return table[["user_id", "item_id"]].assign(timestamp=timestamps, position=position, behavior=behavior)


def read_timestamps(table: pd.DataFrame, path: str | Path) -> pd.Series:
    """Read seconds, or dates as seconds, float64; -1 without the column; raise `ValueError` for other values."""
    values = table["timestamp"] if "timestamp" in table else pd.Series(-1, index=table.index)
    times = values if pd.api.types.is_datetime64_any_dtype(values) else pd.to_numeric(values, errors="coerce")
    if not times.notna().any() or pd.api.types.is_datetime64_any_dtype(times):
        times = pd.to_datetime(values, utc=True, errors="coerce", format="ISO8601").dt.tz_convert(None)
    expected = "timestamps that are all numbers or all ISO 8601 dates"
    check_rows(times.notna(), values, expected, "an unparsable timestamp", path)
    timestamps = pd.Series(as_seconds(times.to_numpy()), index=table.index)
    expected = "timestamps in seconds, or dates, from 1970 to the year 9999 (or -1, not known)"
    check_rows(timestamps.notna(), values, expected, "others, such as milliseconds,", path)
    return timestamps


def check_rows(valid: pd.Series, shown: pd.Series, expected: str, problem: str, path: str | Path) -> None:
    """
    Check a condition on every row of a table.

    Args:
        valid: Whether each row fulfills the condition; its index numbers the rows of the file.
        shown: Values that the error message shows.
        expected: The condition, for the error message, as an object of "must have".
        problem: Contents of the rows that fail, for the error message.
        path: The file, for the error message.

    Raises:
        ValueError: with the number of rows that fail, and the first three of them.
    """
    if valid.all():
        return
    rows = np.flatnonzero(~valid.to_numpy())
    first = ", ".join(f"row {valid.index[row]} ({shown.iloc[row]!r})" for row in rows[:3])
    raise ValueError(
        f"`{path}` must have {expected}, got {problem} in {len(rows):,} of {len(valid):,} rows, first {first} (rows "
        "counted from 0, without the header). Correct or drop these rows."
    )
