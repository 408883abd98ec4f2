"""Cut histories into windows, and pack windows into rows."""

from itertools import pairwise

import numpy as np


def cut_windows(length: int, window: int, crops_per_epoch: int, stride: int | None = None) -> list[tuple[int, int]]:
    """
    Windows `(start, end)` of at most `window` items of a history of `length` items, `crops_per_epoch` times at different places:
    every item is supervised once a pass, each time with another amount of history before it. With a `stride`, windows that
    slide by it instead, from the end to the first that holds the history's beginning (shorter ones would be its beginning
    again, which a causal model reads in it).
    """
    if stride is not None:
        if stride < 1:
            raise ValueError(f"Expected a stride of at least one item, found {stride}.")
        last = min(length, window)
        ends = [*range(length, last, -stride), last]
        return [(max(0, end - window), end) for end in ends]
    windows: list[tuple[int, int]] = []
    for offset in {number * window // crops_per_epoch for number in range(crops_per_epoch)}:
        places = {length, *range(length - offset, 0, -window)}
        windows += pairwise([0, *sorted(places)])
    return windows


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of windows that share a row of `capacity` items, longest first."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left -> rows
    for index in np.argsort(-lengths, kind="stable"):
        length = lengths[index]
        room = next((room for room in range(length, capacity + 1) if with_room[room]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, capacity
        else:
            row = with_room[room].pop()
        rows[row].append(int(index))
        with_room[room - length].append(row)
    return rows
