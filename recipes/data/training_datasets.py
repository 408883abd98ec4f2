"""Build training rows: cut histories into windows, and encode windows as rows of tokens with labels.

The histories are splits that `recipes.prepare` wrote. With `with_times`, rows also have `timestamps`, for a model
whose config `reads_times`.
"""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, Features, List, Value

from recipes.data.encoding import LONG_HISTORY, encode_history
from recipes.data.leave_one_out import columns_read
from recipes.data.windows import cut_windows, pack
from tokenization import SemanticIdTokenizer


def encode_row(tokenizer: SemanticIdTokenizer, *columns: Sequence) -> dict[str, np.ndarray]:
    """Encode a history, as `encode_history` does, with `labels`: every token but `<bos>` is supervised."""
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
    item_dropout: float = 0.0,
    with_times: bool = False,
) -> Dataset:
    """
    Build rows of several windows, so that batches need hardly any padding.

    A window has `max_items` items and the item after them, as a request has. A row has room for `max_items + 1`
    items. The model reads every `<bos>` in a row as the start of another history.

    Args:
        histories: Training split.
        tokenizer: Tokenizer of the items.
        max_items: Most items of a history.
        crops_per_epoch: Number of crops of each history.
        seed: Seed that mixes the windows of all users before they are packed.
        stride: Items between two overlapping windows. None, the default: `crops_per_epoch` cuts the histories.
        item_dropout: Share of the items that each window leaves out, other ones in every crop.
        with_times: Whether rows have timestamps.

    Returns:
        `Dataset` with the columns of `encode_row`.
    """
    generator = np.random.default_rng(seed)
    windows = [
        (user, np.arange(start, end))
        for user, items in enumerate(histories["items"])
        for start, end in cut_windows(len(items), max_items + 1, crops_per_epoch, stride)
    ]
    # Shuffle first, so that a row holds windows of several users.
    windows = [windows[index] for index in generator.permutation(len(windows))]
    if item_dropout:
        kept = [(user, places[generator.random(len(places)) >= item_dropout]) for user, places in windows]
        windows = [(user, places) for user, places in kept if len(places)]
    rows = pack(np.array([len(places) for _, places in windows]), max_items + 1)
    columns = [[np.asarray(values) for values in histories[name]] for name in columns_read(histories, with_times)]

    def encode_rows(batch):
        encoded = [
            [
                encode_row(tokenizer, *(column[user][places] for column in columns))
                for user, places in (windows[index] for index in row)
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
    Build rows of one window each, for the enhancer, whose item sets belong to a user.

    The arguments are those of `packed_rows`.

    Returns:
        `Dataset` with the columns of `encode_row` and three others. `user` is the row of `histories`, `last`
        whether the window ends where the history does, and `length` the number of tokens.
    """
    columns = [histories[name][:] for name in columns_read(histories, with_times)]
    rows = []
    for user, history in enumerate(zip(*columns, strict=True)):
        num_items = len(history[0])
        for start, end in cut_windows(num_items, max_items + 1, crops_per_epoch, stride):
            row = encode_row(tokenizer, *(column[start:end] for column in history))
            rows.append({"user": user, "last": end == num_items, **row, "length": len(row["input_ids"])})
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
    Build rows of stage II: a history and the item after it, whose candidates are ranked.

    A history gives a row for each end of its windows of `max_items` items. Other arguments are those of `packed_rows`.

    Args:
        max_long_items: Most items before the last one that `long_items`, `long_behaviors` and, with times,
            `long_timestamps` hold. 0: no such columns.
        stride: Items between the ends of two rows, counted from the end of the history. None, the default:
            `crops_per_epoch` cuts the histories.
        exclude_history: Whether rows have `blocked_items`: all items before the last one.

    Returns:
        `Dataset` with the columns of `encode_row` and those named above. None of them holds a later item, and the long
        history and the blocked items hold no last item, which would leak the answer.
    """

    def row_ends(length: int) -> list[int]:
        # Every end needs a row: only its last item is ranked.
        if stride is not None:
            return list(range(length, 0, -stride))[::-1]
        return sorted({end for _, end in cut_windows(length, max_items, crops_per_epoch)})

    ends = [(user, end) for user, items in enumerate(histories["items"]) for end in row_ends(len(items))]
    columns = {name: histories[name][:] for name in columns_read(histories, with_times)}

    def encode_place(place):
        user = place["user"]
        end = place["end"]
        row = encode_row(tokenizer, *(column[user][max(0, end - 1 - max_items) : end] for column in columns.values()))
        if max_long_items:
            before = slice(max(0, end - 1 - max_long_items), end - 1)
            row |= {LONG_HISTORY[name]: column[user][before] for name, column in columns.items()}
        if exclude_history:
            row["blocked_items"] = columns["items"][user][: end - 1]
        return row

    # Types cannot be inferred if the first rows hold only empty lists.
    types = {name: List(Value("int64")) for name in ("input_ids", "attention_mask", "labels")}
    types |= {"timestamps": List(Value("int64"))} if with_times else {}
    types |= {LONG_HISTORY[name]: histories.features[name] for name in columns} if max_long_items else {}
    types |= {"blocked_items": histories.features["items"]} if exclude_history else {}
    places = {"user": [user for user, _ in ends], "end": [end for _, end in ends]}
    return Dataset.from_dict(places).map(
        encode_place, remove_columns=list(places), features=Features(types), desc="training rows"
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
    Build rows of a history and its held-out target, whose tokens alone are supervised.

    Args:
        split: Split with targets.
        tokenizer: Tokenizer of the items.
        max_items: Most items of a history.
        max_long_items: Most items of the long history. 0, the default: rows have no long history.
        exclude_history: Whether rows have `blocked_items`: all items of the history.
        with_times: Whether rows have timestamps.

    Returns:
        `Dataset` with the columns of `packed_rows` or, with a long history or blocked items, of `second_stage_rows`.
    """
    columns = columns_read(split, with_times)

    def append_target(user):
        row = encode_row(tokenizer, *([*user[name][-max_items:], user[target]] for name, target in columns.items()))
        row["labels"][: -tokenizer.num_levels - 1] = -100
        if max_long_items:
            row |= {LONG_HISTORY[name]: user[name][-max_long_items:] for name in columns}
        if exclude_history:
            row["blocked_items"] = user["items"]
        return row

    # `map` would write beside a data set that lies in a folder.
    return split.map(append_target, remove_columns=split.column_names, keep_in_memory=True, desc="validation rows")
