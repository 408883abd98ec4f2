"""What a training reads: histories cut into windows, and windows laid into rows of tokens, with their labels.

Of a split that recipes.prepare wrote. `with_times`: rows have `timestamps`, for a model whose config `reads_times`.
"""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, Features, List, Value

from recipes.data.encoding import LONG_HISTORY, encode_history
from recipes.data.leave_one_out import columns_read
from recipes.data.windows import cut_windows, pack
from tokenization import SemanticIdTokenizer


def encode_row(tokenizer: SemanticIdTokenizer, *columns: Sequence) -> dict[str, np.ndarray]:
    """Encode one history, as `encode_history` does, with `labels`: every token but `<bos>` is supervised."""
    row = encode_history(tokenizer, *columns)
    row["labels"] = np.where(row["input_ids"] == tokenizer.bos_token_id, -100, row["input_ids"])
    return row


def packed_rows(
    histories: Dataset,
    tokenizer: SemanticIdTokenizer,
    max_items: int,
    crops_per_epoch: int,
    seed: int,
    stride: int | None = None,
    *,
    with_times: bool = False,
) -> Dataset:
    """
    Histories cut into windows of `max_items` and the item after them, as long as what is read when the next item is asked for,
    and windows packed into rows of `max_items + 1` items, so that hardly any padding is left. The model reads every `<bos>` as
    the beginning of another history.

    Returns:
        Dataset with the columns of `encode_row`.
    """
    windows = [
        (user, start, end)
        for user, items in enumerate(histories["items"])
        for start, end in cut_windows(len(items), max_items + 1, crops_per_epoch, stride)
    ]
    # Shuffled first, so that what shares a row is not what one user did.
    windows = [windows[index] for index in np.random.default_rng(seed).permutation(len(windows))]
    rows = pack(np.array([end - start for _, start, end in windows]), max_items + 1)
    columns = [histories[name][:] for name in columns_read(histories, with_times)]

    def encode_rows(batch):
        encoded = [
            [
                encode_row(tokenizer, *(column[user][start:end] for column in columns))
                for user, start, end in (windows[index] for index in row)
            ]
            for row in batch["windows"]
        ]
        return {name: [np.concatenate([part[name] for part in parts]) for parts in encoded] for name in encoded[0][0]}

    return Dataset.from_dict({"windows": rows}).map(
        encode_rows, batched=True, remove_columns=["windows"], desc="training rows"
    )


def history_rows(
    histories: Dataset,
    tokenizer: SemanticIdTokenizer,
    max_items: int,
    crops_per_epoch: int,
    stride: int | None = None,
    *,
    with_times: bool = False,
) -> Dataset:
    """
    One window a row, as of `packed_rows`, for what belongs to a user (`recipes.training.enhancer`).

    Returns:
        Dataset with the columns of `encode_row`, `user` (row of `histories`), `last` (whether the window ends where the history
        does) and `length`, in tokens.
    """
    columns, rows = [histories[name][:] for name in columns_read(histories, with_times)], []
    for user, history in enumerate(zip(*columns, strict=True)):
        count = len(history[0])
        for start, end in cut_windows(count, max_items + 1, crops_per_epoch, stride):
            row = encode_row(tokenizer, *(column[start:end] for column in history))
            rows.append({"user": user, "last": end == count, **row, "length": len(row["input_ids"])})
    return Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})


def second_stage_rows(
    histories: Dataset,
    tokenizer: SemanticIdTokenizer,
    max_items: int,
    crops_per_epoch: int,
    max_long_items: int,
    stride: int | None = None,
    exclude_history: bool = False,
    *,
    with_times: bool = False,
) -> Dataset:
    """
    Histories of at most `max_items` items with the item after them, one in a row: one for each place where `cut_windows`
    would end a window, or for every `stride`-th item, counted from the last one.

    Returns:
        Dataset with the columns of `encode_row`, `long_items`, `long_behaviors` and, with times, `long_timestamps` (up to
        `max_long_items` before the last item, and never that item or a later one), unless that is 0; and, to
        `exclude_history`, with `blocked_items`, all before the last item.
    """

    def ends_in(length: int) -> list[int]:
        if stride is not None:  # only a row's last item is ranked, so that no longer history stands for a shorter one
            return list(range(length, 0, -stride))[::-1]
        return sorted({end for _, end in cut_windows(length, max_items, crops_per_epoch)})

    ends = [(user, end) for user, items in enumerate(histories["items"]) for end in ends_in(len(items))]
    columns = {name: histories[name][:] for name in columns_read(histories, with_times)}

    def encode_place(place):
        user, end = place["user"], place["end"]
        row = encode_row(tokenizer, *(column[user][max(0, end - 1 - max_items) : end] for column in columns.values()))
        if max_long_items:
            before = slice(max(0, end - 1 - max_long_items), end - 1)
            row |= {LONG_HISTORY[name]: column[user][before] for name, column in columns.items()}
        if exclude_history:
            row["blocked_items"] = columns["items"][user][: end - 1]
        return row

    places = {"user": [user for user, _ in ends], "end": [end for _, end in ends]}
    # Given, since types cannot be inferred where the first rows hold only empty lists.
    kinds = {name: List(Value("int64")) for name in ("input_ids", "attention_mask", "labels")}
    kinds |= {"timestamps": List(Value("int64"))} if with_times else {}
    kinds |= {LONG_HISTORY[name]: histories.features[name] for name in columns} if max_long_items else {}
    kinds |= {"blocked_items": histories.features["items"]} if exclude_history else {}
    return Dataset.from_dict(places).map(
        encode_place, remove_columns=list(places), features=Features(kinds), desc="training rows"
    )


def held_out_rows(
    split: Dataset,
    tokenizer: SemanticIdTokenizer,
    max_items: int,
    max_long_items: int = 0,
    exclude_history: bool = False,
    *,
    with_times: bool = False,
) -> Dataset:
    """
    Histories followed by their target, on which alone the loss is taken; columns as in `packed_rows` or, with
    `max_long_items` or `exclude_history`, in `second_stage_rows`.
    """
    columns = columns_read(split, with_times)

    def append(user):
        row = encode_row(tokenizer, *([*user[name][-max_items:], user[target]] for name, target in columns.items()))
        row["labels"][: -tokenizer.num_levels - 1] = -100
        if max_long_items:
            row |= {LONG_HISTORY[name]: user[name][-max_long_items:] for name in columns}
        if exclude_history:
            row["blocked_items"] = user["items"]
        return row

    # In memory, as the training rows are: a map of a data set in a folder writes there.
    return split.map(append, remove_columns=split.column_names, keep_in_memory=True, desc="validation rows")
