"""What a training reads: histories cut into windows, and windows laid into rows of tokens, with their labels.

Of a split that recipes.prepare wrote (`items`, `behaviors`; of a held-out one also `target`, `target_behavior`).
"""

from itertools import pairwise

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from recipes.histories import padded
from tokenization import SemanticIdTokenizer


def cut_windows(length: int, max_items: int, passes: int, stride: int | None = None) -> list[tuple[int, int]]:
    """
    Windows `(start, end)` of at most `max_items` of a history of `length` items, `passes` times at different places:
    every item is supervised once a pass, each time with another amount of history before it. With a `stride`, windows that
    slide by it instead, from the end to the first that holds the history's beginning (shorter ones would be its beginning
    again, which a causal model reads in it).
    """
    if stride is not None:
        if stride < 1:
            raise ValueError(f"Expected a stride of at least one item, found {stride}.")
        last = min(length, max_items)
        ends = [*range(length, last, -stride), last]
        return [(max(0, end - max_items), end) for end in ends]
    windows = []
    for offset in range(0, max_items, -(-max_items // passes)):
        ends = {length, *range(length - offset, 0, -max_items)}
        windows += pairwise([0, *sorted(ends)])
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


def packed_rows(
    histories: Dataset,
    tokenizer: SemanticIdTokenizer,
    max_items: int,
    passes: int,
    seed: int,
    stride: int | None = None,
) -> Dataset:
    """
    Histories cut into windows, and windows packed into rows of `max_items` items, so that hardly any padding is left. The
    model reads every `<bos>` as the beginning of another history.

    Returns:
        Dataset with `input_ids`, `attention_mask` and `labels` (every token but `<bos>` is supervised).
    """
    windows = [
        (user, start, end)
        for user, items in enumerate(histories["items"])
        for start, end in cut_windows(len(items), max_items, passes, stride)
    ]
    # Shuffled first, so that what shares a row is not what one user did.
    windows = [windows[index] for index in np.random.default_rng(seed).permutation(len(windows))]
    rows = pack(np.array([end - start for _, start, end in windows]), max_items)
    items, behaviors = histories["items"][:], histories["behaviors"][:]

    def spell(batch):
        spelt = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in batch["windows"]:
            parts = [
                tokenizer.encode_indices(np.array(items[user][start:end]), np.array(behaviors[user][start:end]))
                for user, start, end in (windows[index] for index in row)
            ]
            tokens = np.concatenate(parts)
            spelt["input_ids"].append(tokens)
            spelt["attention_mask"].append(np.ones_like(tokens))
            spelt["labels"].append(np.where(tokens == tokenizer.bos_token_id, -100, tokens))
        return spelt

    return Dataset.from_dict({"windows": rows}).map(
        spell, batched=True, remove_columns=["windows"], desc="training rows"
    )


def history_rows(
    histories: Dataset, tokenizer: SemanticIdTokenizer, max_items: int, passes: int, stride: int | None = None
) -> Dataset:
    """
    One window a row, for what belongs to a user (`recipes.enhancer`).

    Returns:
        Dataset as of `packed_rows`, with `user` (row of `histories`), `last` (whether the window ends where the history does)
        and `length`, in tokens.
    """
    rows: dict[str, list] = {name: [] for name in ("user", "last", "input_ids", "attention_mask", "labels", "length")}
    for user, (items, behaviors) in enumerate(zip(histories["items"][:], histories["behaviors"][:], strict=True)):
        for start, end in cut_windows(len(items), max_items, passes, stride):
            tokens = tokenizer.encode_indices(np.array(items[start:end]), np.array(behaviors[start:end]))
            rows["user"].append(user)
            rows["last"].append(end == len(items))
            rows["input_ids"].append(tokens)
            rows["attention_mask"].append(np.ones_like(tokens))
            rows["labels"].append(np.where(tokens == tokenizer.bos_token_id, -100, tokens))
            rows["length"].append(len(tokens))
    return Dataset.from_dict(rows)


def second_stage_rows(
    histories: Dataset,
    tokenizer: SemanticIdTokenizer,
    max_items: int,
    passes: int,
    max_long_items: int,
    stride: int | None = None,
    exclude_history: bool = False,
) -> Dataset:
    """
    Histories of at most `max_items` items with the item after them, one in a row: one for each place where `cut_windows`
    would end a window, or for every `stride`-th item, counted from the last one.

    Returns:
        Dataset as of `packed_rows`, with `long_items` and `long_behaviors` (up to `max_long_items` before the last item,
        and never that item or a later one), unless that is 0; and, to `exclude_history`, with `blocked_items`, all before the
        last item.
    """

    def places(length: int) -> list[int]:
        if (
            stride is not None
        ):  # a short history is none that a longer one holds: only the last item of a row is ranked
            return list(range(length, 0, -stride))[::-1]
        return sorted({end for _, end in cut_windows(length, max_items, passes)})

    ends = [(user, end) for user, items in enumerate(histories["items"]) for end in places(len(items))]
    items, behaviors = histories["items"][:], histories["behaviors"][:]

    def spell(batch):
        rows = {"input_ids": [], "attention_mask": [], "labels": []}
        if max_long_items:
            rows |= {"long_items": [], "long_behaviors": []}
        if exclude_history:
            rows["blocked_items"] = []
        for user, end in zip(batch["user"], batch["end"], strict=True):
            window = slice(max(0, end - 1 - max_items), end)
            tokens = tokenizer.encode_indices(np.array(items[user][window]), np.array(behaviors[user][window]))
            rows["input_ids"].append(tokens)
            rows["attention_mask"].append(np.ones_like(tokens))
            rows["labels"].append(np.where(tokens == tokenizer.bos_token_id, -100, tokens))
            if max_long_items:
                before = slice(max(0, end - 1 - max_long_items), end - 1)
                rows["long_items"].append(items[user][before])
                rows["long_behaviors"].append(behaviors[user][before])
            if exclude_history:
                rows["blocked_items"].append(items[user][: end - 1])
        return rows

    columns = {"user": [user for user, _ in ends], "end": [end for _, end in ends]}
    return Dataset.from_dict(columns).map(spell, batched=True, remove_columns=list(columns), desc="training rows")


def held_out_rows(
    split: Dataset,
    tokenizer: SemanticIdTokenizer,
    max_items: int,
    max_long_items: int = 0,
    exclude_history: bool = False,
) -> Dataset:
    """
    Histories followed by their target, on which alone the loss is taken; columns as in `packed_rows` or, with
    `max_long_items` or `exclude_history`, in `second_stage_rows`.
    """

    def append(user):
        items = [*user["items"][-max_items:], user["target"]]
        behaviors = [*user["behaviors"][-max_items:], user["target_behavior"]]
        tokens = tokenizer.encode_indices(np.array(items), np.array(behaviors))
        labels = tokens.copy()
        labels[: -tokenizer.num_levels - 1] = -100
        row = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": labels}
        if max_long_items:
            row |= {f"long_{name}": user[name][-max_long_items:] for name in ("items", "behaviors")}
        if exclude_history:
            row["blocked_items"] = user["items"]
        return row

    return split.map(append, remove_columns=split.column_names, desc="validation rows")


class Collator(DataCollatorForSeq2Seq):
    """Pads lists of items with -1, which is no item, and the rest as usual."""

    def __call__(self, features, return_tensors=None):
        names = {"long_items", "long_behaviors", "blocked_items"} & set(features[0])
        longer = {name: padded([row[name] for row in features]) for name in names}
        rest = [{name: value for name, value in row.items() if name not in names} for row in features]
        return {**super().__call__(rest, return_tensors), **longer}
