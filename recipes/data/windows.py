"""Cut histories into windows, and pack windows into rows."""

from itertools import pairwise

import numpy as np


def cut_windows(length: int, window: int, crops_per_epoch: int, stride: int | None = None) -> list[tuple[int, int]]:
    """
    Cut a history into windows.

    Without a stride, each crop cuts the whole history at other places. Training so sees every item once a crop, each
    time with another amount of history before it.

    Args:
        length: Number of items of the history.
        window: Most items of a window.
        crops_per_epoch: Number of crops. Crops that start at the same place count once.
        stride: Items between the ends of two windows, from the end of the history back to its first full window. A
            causal model reads shorter windows within that window. None, the default: `crops_per_epoch` cuts the
            history.

    Returns:
        Start and end of every window.

    Raises:
        ValueError: for a stride below 1.
    """
    if stride is not None:
        if stride < 1:
            raise ValueError(f"`stride` must be 1 or more, got {stride}. Leave it out for windows without overlap.")
        last_end = min(length, window)
        ends = [*range(length, last_end, -stride), last_end]
        return [(max(0, end - window), end) for end in ends]
    windows: list[tuple[int, int]] = []
    for offset in {crop * window // crops_per_epoch for crop in range(crops_per_epoch)}:
        places = {length, *range(length - offset, 0, -window)}
        windows += pairwise([0, *sorted(places)])
    return windows


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack windows into rows of `capacity` items by best-fit decreasing: the indices of each row, longest first."""
    rows: list[list[int]] = []
    # Rows by the room that is left in them.
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    for index in np.argsort(-lengths, kind="stable"):
        length = lengths[index]
        room = next((room for room in range(length, capacity + 1) if rows_by_room[room]), None)
        if room is None:
            rows.append([])
            row = len(rows) - 1
            room = capacity
        else:
            row = rows_by_room[room].pop()
        rows[row].append(int(index))
        rows_by_room[room - length].append(row)
    return rows
