"""Sort the clicks of TAOBAO-MM on disk, check its users, and read all rows once before training does.

The functions are stages of `recipes.papers.taobao.prepare`, after those of the items, and return counts.
"""

from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from recipes.papers.taobao.tables import (
    HISTORY,
    ITEM,
    LABEL,
    SAMPLES,
    UNKNOWN,
    USER,
    USERS,
    fill,
    find_items,
    lists,
    new_array,
    progress,
    scalars,
    table_shards,
    user_histories,
)

# Length of the lists of the recency baseline.
RECENT = 5


def write_clicks(tables: Path, out: Path, split: str) -> dict:
    """
    Write the clicks on known items, sorted by user: `{split}_click_users.npy` and `{split}_click_items.npy`.

    The clicks of a user keep the order of the table.

    Args:
        tables: Folder of the tables.
        out: Folder of the arrays, with `item_ids.npy`.
        split: Name of the split, train or test.

    Returns:
        Counts of samples, clicks and clicks on unknown items.

    Raises:
        ValueError: for a label other than [0, 1] and [1, 0].
    """
    columns = [LABEL, USER, ITEM]
    shards, num_samples = table_shards(tables, SAMPLES.format(split), columns)
    item_ids = np.load(out / "item_ids.npy", mmap_mode="r")
    users = [np.empty(0, np.int64)]
    items = [np.empty(0, np.int32)]
    num_clicks = 0

    # Clicks of the samples
    for batch in progress(shards, columns, num_samples, f"{split} samples"):
        labels = lists(batch, LABEL, 2)[0].reshape(-1, 2)
        wrong = labels[(labels.sum(axis=1) != 1) | (labels.min(axis=1) != 0)]
        if len(wrong):
            raise ValueError(
                f"`{LABEL}` must be [0, 1] (clicked) or [1, 0] in {SAMPLES.format(split)}, got {wrong[0].tolist()} "
                f"and {len(wrong) - 1} other wrong labels in a batch. Correct or drop these rows."
            )
        clicked = labels[:, 1] == 1
        indices = find_items(item_ids, scalars(batch, ITEM)[clicked])
        users.append(scalars(batch, USER)[clicked][indices >= 0])
        items.append(indices[indices >= 0])
        num_clicks += len(indices)

    # Sorted arrays
    click_users = np.concatenate(users)
    click_items = np.concatenate(items)
    order = np.argsort(click_users, kind="stable")
    for name, column in (("users", click_users), ("items", click_items)):
        with new_array(out / f"{split}_click_{name}.npy", column.dtype.type, column.shape) as mapped:
            mapped[:] = column[order]
    num_unknown = num_clicks - len(click_users)
    print(f"{num_samples:,} samples, {num_clicks:,} clicks, {num_unknown:,} of them on items without an embedding")
    return {"samples": num_samples, "clicks": num_clicks, "clicks_on_unknown_items": num_unknown}


def check_users(tables: Path, out: Path, split: str, unknown_users: str) -> dict:
    """
    Check that every user has one row, and that the user of every click has a row; read the user ids alone.

    Args:
        tables: Folder of the tables.
        out: Folder of the arrays, with `{split}_click_users.npy`.
        split: Name of the split, train or test.
        unknown_users: Clicks of users without a row: "error" rejects them, "skip" leaves them out.

    Raises:
        ValueError: for a user with several rows, or a click of a user without a row.
    """
    shards, num_users = table_shards(tables, USERS.format(split), [USER, HISTORY])
    users = np.empty(num_users, np.int64)
    fill(users, (scalars(batch, USER) for batch in progress(shards, [USER], num_users, f"{split} users")))
    users.sort()
    clicks = np.load(out / f"{split}_click_users.npy", mmap_mode="r")
    repeated = users[1:][np.diff(users) == 0]
    if len(repeated):
        raise ValueError(
            f"`{USERS.format(split)}` must have one row per user, got {len(repeated):,} further rows, the first of "
            f"user {repeated[0]}. Drop them, or their clicks count twice."
        )
    lost = clicks[find_items(users, clicks) == UNKNOWN] if num_users else clicks
    if len(lost) and unknown_users == "error":
        raise ValueError(
            f"`{USERS.format(split)}` must have a history for each of {len(clicks):,} clicks, got {len(lost):,} of "
            f"users without a row, the first of user {lost[0]}. Bring all files of the table, or pass "
            "--unknown_users skip to leave these clicks out."
        )
    print(f"{num_users:,} users; {len(lost):,} clicks of users without a history left out")
    return {"users": num_users, "clicks_of_unknown_users": len(lost)}


def check_rows(tables: Path, out: Path, split: str) -> dict:
    """
    Read the user table as training will; count dropped items, and measure the recency baseline.

    Args:
        tables: Folder of the tables.
        out: Folder of the arrays of items and clicks.
        split: Name of the split, train or test.

    Raises:
        ValueError: if no click has a user with known items.
    """
    shards, _ = table_shards(tables, USERS.format(split), [USER, HISTORY])
    users = np.load(out / f"{split}_click_users.npy", mmap_mode="r")
    num_users = 1 + int((users[1:] != users[:-1]).sum())
    counts = dict.fromkeys(("users", "rows", "history_items", "unknown_items", "rows_without_history"), 0)
    repeats = recent = 0

    # Counts
    histories = user_histories(shards, out, split)
    for _, history, clicks, unknown in tqdm(histories, desc=f"{split} rows", unit="user", total=num_users):
        counts["users"] += 1
        counts["history_items"] += len(history) + unknown
        counts["unknown_items"] += unknown
        counts["rows" if len(history) else "rows_without_history"] += len(clicks)
        repeats += int((clicks[:, None] == history).any(axis=1).sum())
        recent += sum(item in last_distinct(history) for item in clicks.tolist())
    if counts["rows"] == 0:
        raise ValueError(
            f"`tables` must have clicks of users with known items in {split}, got none: {counts}. Take all tables "
            "from one download; the ten-row demo tables share neither users nor items."
        )

    # Shares
    shares = {"repeat_share": repeats / counts["rows"], f"recency_recall@{RECENT}": recent / counts["rows"]}
    print(", ".join(f"{name}: {count:,}" for name, count in counts.items()))
    print(
        f"{split}: {shares['repeat_share']:.1%} of the clicks repeat the history, {1 - shares['repeat_share']:.1%} "
        f"explore; the {RECENT} last distinct items: Recall@{RECENT} {shares[f'recency_recall@{RECENT}']:.4f}"
    )
    return counts | {name: round(share, 5) for name, share in shares.items()}


def last_distinct(history: np.ndarray) -> list[int]:
    """Return the `RECENT` last distinct items of a history `[n]`, the last one first: the recency baseline's list."""
    items: dict[int, None] = {}
    for item in history[::-1]:
        items[int(item)] = None
        if len(items) == RECENT:
            break
    return list(items)
