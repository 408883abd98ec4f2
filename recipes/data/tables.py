"""Tables that `recipes.prepare` reads, validated: whatever is wrong is said with its rows."""

from pathlib import Path

import numpy as np
import pandas as pd

SECONDS, MILLISECONDS = (1e8, 1e10), 5e11  # Unix times from 1973 to 2286, and those after 1985


def read_table(path: Path, ids: list[str]) -> pd.DataFrame:
    """The table with columns `ids` present and not null; `user_id` and `item_id` become str."""
    separators = {".csv": ",", ".tsv": "\t"}
    if not path.is_file() or path.suffix not in (*separators, ".parquet"):
        raise ValueError(f"expected an existing .csv, .tsv or .parquet file, found {path}: check path and suffix")
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            # As text: an id "007" stays one, and a film called "NA" or "null" is no missing value.
            table = pd.read_csv(path, sep=separators[path.suffix], dtype="str", keep_default_na=False, na_values=[""])
    except (ValueError, OSError) as error:  # all of what pandas and Arrow raise on files that are none
        raise ValueError(
            f"expected a whole {path.suffix} table (in UTF-8, if it is text), found {path}, which cannot be read: {error}"
        ) from error
    if path.suffix != ".parquet" and not isinstance(table.index, pd.RangeIndex):
        raise ValueError(
            f"expected as many fields in a row as the header of {path} has, found more: does every row end in a separator?"
        )
    missing = [name for name in ids if name not in table]
    if missing:
        raise ValueError(f"expected the columns {ids} in {path}, found {list(table.columns)}: rename or add {missing}")
    if len(table) == 0:
        raise ValueError(f"expected rows in {path}, found none below the header: check how the file was written")
    for name in ids:
        check_rows(table[name].notna(), table[name], f"a {name} in every row", "an empty value", path)
    return table.reset_index(drop=True).astype({name: "str" for name in ids if name.endswith("_id")})


def read_interactions(path: Path) -> pd.DataFrame:
    """Validated interactions: `user_id`, `item_id`, `behavior` (str), `timestamp`, `position` (int64 or float64), in file order.

    `position` is what orders a user's interactions: the file's, or else the timestamp. A file with positions may do without
    timestamps: none is known then (-1).

    Raises:
        ValueError: missing columns, null values, timestamps that are neither numbers nor ISO 8601 dates, positions that are
            no numbers.
    """
    table = read_table(path, ["user_id", "item_id"])
    if "timestamp" not in table and "position" not in table:
        raise ValueError(
            f"expected a column `timestamp`, or `position`, in {path}, found {list(table.columns)}: rename or add one"
        )
    given = table["timestamp"] if "timestamp" in table else pd.Series(-1, index=table.index)
    numbers = given if pd.api.types.is_datetime64_any_dtype(given) else pd.to_numeric(given, errors="coerce")
    if pd.api.types.is_numeric_dtype(numbers) and numbers.notna().any():
        timestamps = numbers
    else:
        dates = pd.to_datetime(given, utc=True, errors="coerce", format="ISO8601")
        timestamps = (dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    valid = pd.Series(np.isfinite(timestamps.to_numpy(dtype=np.float64)), index=table.index)
    check_rows(valid, given, "timestamps that are all numbers or all ISO 8601 dates", "an unparsable timestamp", path)
    usable = (timestamps >= -1) & (timestamps < 2**63)
    check_rows(usable, given, "timestamps of 0 or more (or -1, not known) below 2**63", "another", path)
    is_fine = ~(timestamps.between(*SECONDS) & (timestamps > MILLISECONDS).any())
    check_rows(is_fine, given, "timestamps in one unit", "seconds beside milliseconds or finer ones", path)
    position = timestamps
    if "position" not in table:
        expected = "known timestamps, or a column `position` to order the interactions by,"
        check_rows(timestamps != -1, given, expected, "an unknown one (-1)", path)
    else:
        position = pd.to_numeric(table["position"], errors="coerce")
        check_rows(position.notna(), table["position"], "a number as position in every row", "another value", path)
    if "behavior" in table:
        check_rows(table["behavior"].notna(), table["behavior"], "a behavior in every row", "an empty behavior", path)
        behavior = table["behavior"].astype(str)
    else:
        behavior = pd.Series("interact", index=table.index, dtype="str")
    if behavior.nunique() > 127:
        raise ValueError(
            f"expected at most 127 kinds of behavior, found {behavior.nunique()} in {path}: is the column `behavior` "
            "a rating or a count? Map it to a few names such as like and dislike"
        )
    return table[["user_id", "item_id"]].assign(timestamp=timestamps, position=position, behavior=behavior)


def check_rows(valid: pd.Series, shown: pd.Series, expected: str, found: str, path: str | Path) -> None:
    """`ValueError` that counts the rows that are not `valid` and shows the first three of them, by their row in the file."""
    if valid.all():
        return
    rows = np.flatnonzero(~valid.to_numpy())
    first = ", ".join(f"row {valid.index[row]} ({shown.iloc[row]!r})" for row in rows[:3])
    raise ValueError(
        f"expected {expected} in {path}, found {found} in {len(rows):,} of {len(valid):,} rows, first {first} "
        "(rows counted from 0, without the header): correct or drop these rows"
    )
