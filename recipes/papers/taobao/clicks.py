"""The users of TAOBAO-MM in bounded memory: clicks sorted on disk, and all rows read once before training reads them.

Stages of recipes.papers.taobao.prepare, after the items; each returns what it counted.
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

RECENT = 5


def write_clicks(tables: Path, out: Path, split: str) -> dict:
    """`{split}_click_users.npy` and `{split}_click_items.npy`: samples that are clicks on known items, sorted by user; those
    of a user in the order of the table."""
    columns = [LABEL, USER, ITEM]
    shards, rows = table_shards(tables, SAMPLES.format(split), columns)
    item_ids = np.load(out / "item_ids.npy", mmap_mode="r")
    users, items, all_clicks = [], [], 0
    for batch in progress(shards, columns, rows, f"{split} samples"):
        labels = lists(batch, LABEL, 2)[0].reshape(-1, 2)
        wrong = labels[(labels.sum(axis=1) != 1) | (labels.min(axis=1) != 0)]
        if len(wrong):
            raise ValueError(
                f"expected [0, 1] (clicked) or [1, 0] in the column {LABEL} of {SAMPLES.format(split)}, found "
                f"{wrong[0].tolist()} and {len(wrong) - 1} more such in a batch: correct or drop these rows"
            )
        clicked = labels[:, 1] == 1
        found = find_items(item_ids, scalars(batch, ITEM)[clicked])
        users.append(scalars(batch, USER)[clicked][found >= 0])
        items.append(found[found >= 0])
        all_clicks += len(found)
    user, item = np.concatenate([*users, np.empty(0, np.int64)]), np.concatenate([*items, np.empty(0, np.int32)])
    order = np.argsort(user, kind="stable")
    for name, column in (("users", user), ("items", item)):
        with new_array(out / f"{split}_click_{name}.npy", column.dtype.type, column.shape) as mapped:
            mapped[:] = column[order]
    print(f"{rows:,} samples, {all_clicks:,} clicks, {all_clicks - len(user):,} of them on items without an embedding")
    return {"samples": rows, "clicks": all_clicks, "clicks_on_unknown_items": all_clicks - len(user)}


def check_users(tables: Path, out: Path, split: str, unknown_users: str) -> dict:
    """Reads the user ids alone: every user one row, every click's user there. `ValueError` otherwise."""
    shards, rows = table_shards(tables, USERS.format(split), [USER, HISTORY])
    users = np.empty(rows, np.int64)
    fill(users, (scalars(batch, USER) for batch in progress(shards, [USER], rows, f"{split} users")))
    users.sort()
    clicks = np.load(out / f"{split}_click_users.npy", mmap_mode="r")
    repeated = users[1:][np.diff(users) == 0]
    if len(repeated):
        raise ValueError(
            f"expected one row a user in {USERS.format(split)}, found {len(repeated):,} more, of user {repeated[0]} for "
            "instance: drop them, or their clicks count twice"
        )
    lost = clicks[find_items(users, clicks) == UNKNOWN] if rows else clicks
    if len(lost) and unknown_users == "error":
        raise ValueError(
            f"expected a history for each of {len(clicks):,} clicks, found {len(lost):,} of users without a row in "
            f"{USERS.format(split)}, of user {lost[0]} for instance: bring all files of the table, or pass --unknown_users "
            "skip to leave these clicks out"
        )
    print(f"{rows:,} users; {len(lost):,} clicks of users without a history left out")
    return {"users": rows, "clicks_of_unknown_users": len(lost)}


def check_rows(tables: Path, out: Path, split: str) -> dict:
    """Reads the user table through, as training will: what is dropped, and what the last items of a history reach."""
    shards, _ = table_shards(tables, USERS.format(split), [USER, HISTORY])
    users = np.load(out / f"{split}_click_users.npy", mmap_mode="r")
    bar = {"desc": f"{split} rows", "unit": "user", "total": 1 + int((users[1:] != users[:-1]).sum())}
    counts = dict.fromkeys(("users", "rows", "history_items", "unknown_items", "rows_without_history"), 0)
    repeats = recent = 0
    for _, history, clicks, unknown in tqdm(user_histories(shards, out, split), **bar):
        counts["users"] += 1
        counts["history_items"] += len(history) + unknown
        counts["unknown_items"] += unknown
        counts["rows" if len(history) else "rows_without_history"] += len(clicks)
        repeats += int((clicks[:, None] == history).any(axis=1).sum())
        recent += sum(item in last_distinct(history) for item in clicks.tolist())
    if counts["rows"] == 0:
        raise ValueError(
            f"expected clicks of users with known items in the {split} tables, found none: {counts}. Are the tables of one "
            "download? The ten-row demo tables share neither users nor items"
        )
    shares = {"repeat_share": repeats / counts["rows"], f"recency_recall@{RECENT}": recent / counts["rows"]}
    print(", ".join(f"{name}: {count:,}" for name, count in counts.items()))
    print(
        f"{split}: {shares['repeat_share']:.1%} of the clicks repeat the history, {1 - shares['repeat_share']:.1%} explore; "
        f"the {RECENT} last distinct items: Recall@{RECENT} {shares[f'recency_recall@{RECENT}']:.4f}"
    )
    return counts | {name: round(share, 5) for name, share in shares.items()}


def last_distinct(history: np.ndarray) -> list[int]:
    """The last distinct items of a history `[n]`, at most `RECENT`, the last first: the recency baseline's list."""
    found: dict[int, None] = {}
    for item in history[::-1]:
        found[int(item)] = None
        if len(found) == RECENT:
            break
    return list(found)
