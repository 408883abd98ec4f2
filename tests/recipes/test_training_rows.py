"""Training rows: their items, their labels, and what they leave out."""

from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset, Features, load_from_disk

from recipes.data import training_datasets as training_rows
from recipes.data.windows import cut_windows
from recipes.training.collator import TrainingCollator
from tokenization import SemanticIdTokenizer


def test_a_stage_two_row_does_not_leak_its_last_item(prepared):
    tokenizer = SemanticIdTokenizer.from_pretrained(prepared / "tokenizer")
    histories = load_from_disk(str(prepared / "dataset"))["train"]
    rows = training_rows.second_stage_rows(histories, tokenizer, 3, 3, 5)
    places = [(user, end) for user, items in enumerate(histories["items"]) for end in range(1, len(items) + 1)]
    assert len(rows) == len(places), "every item is the last of a row"
    for row, (user, end) in zip(rows, places, strict=True):
        items, behaviors = (histories[user][name] for name in ("items", "behaviors"))
        assert tokenizer.decode_indices(np.array(row["input_ids"])).tolist() == items[max(0, end - 4) : end]
        assert row["long_items"] == items[max(0, end - 6) : end - 1]
        assert row["long_behaviors"] == behaviors[max(0, end - 6) : end - 1]
    batch = TrainingCollator()([rows[0], rows[3]])
    assert batch["long_history"]["items"].tolist() == [[-1] * 3, rows[3]["long_items"]]
    assert batch["input_ids"].shape == batch["labels"].shape
    assert "long_items" not in training_rows.second_stage_rows(histories, tokenizer, 3, 1, 0).column_names
    every_other = training_rows.second_stage_rows(histories, tokenizer, 3, 1, 0, stride=2, exclude_history=True)
    places = [(user, end) for user, end in places if (len(histories[user]["items"]) - end) % 2 == 0]
    assert every_other["blocked_items"][:] == [histories[user]["items"][: end - 1] for user, end in places]
    batch = TrainingCollator()([every_other[0], every_other[1]])
    assert batch["item_sets"]["blocked_items"].tolist()[0][-2:] == [-1, -1]
    split = load_from_disk(str(prepared / "dataset"))["validation"]
    for row, user in zip(training_rows.held_out_rows(split, tokenizer, 3, 5), split, strict=True):
        assert row["long_items"] == user["items"][-5:] and row["long_behaviors"] == user["behaviors"][-5:]


def test_each_crop_supervises_every_item_once(prepared):
    tokenizer = SemanticIdTokenizer.from_pretrained(prepared / "tokenizer")
    histories = load_from_disk(str(prepared / "dataset"))["train"]
    total = sum(map(len, histories["items"]))
    for crops_per_epoch in (1, 3, 5, 7):
        alone = training_rows.history_rows(histories, tokenizer, 6, crops_per_epoch)
        assert max(alone["length"]) == 1 + 7 * (tokenizer.num_levels + 1)
        rows = training_rows.packed_rows(histories, tokenizer, 6, crops_per_epoch, seed=0)
        decoded = [tokenizer.decode_indices(np.array(row)) for row in rows["input_ids"]]
        # Rows of six items and their next item.
        assert sum(map(len, decoded)) == crops_per_epoch * total and max(map(len, decoded)) == 7
        assert np.mean([len(items) for items in decoded]) > 6, "rows are packed"
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
            assert labels == [-100 if token == tokenizer.bos_token_id else token for token in ids]
    assert len(set(cut_windows(17, 6, 3))) > len(training_rows.cut_windows(17, 6, 1))


def test_users_with_an_empty_long_history_may_come_first(prepared):
    """The first 1,000 rows alone do not determine the types of the columns."""
    tokenizer = SemanticIdTokenizer.from_pretrained(prepared / "tokenizer")
    lists = {"items": [[3]] * 1200 + [[1, 2, 3]], "behaviors": [[0]] * 1200 + [[1, 0, 1]]}
    kinds = load_from_disk(str(prepared / "dataset"))["train"].features
    histories = Dataset.from_dict(lists, features=Features({name: kinds[name] for name in lists}))
    rows = training_rows.second_stage_rows(histories, tokenizer, 3, 1, 5, exclude_history=True)
    assert rows[-1]["long_items"] == rows[-1]["blocked_items"] == [1, 2] and rows[0]["long_items"] == []


@pytest.mark.parametrize(("length", "stride"), [(17, 1), (17, 4), (6, 1), (3, 2), (7, 50)])
def test_sliding_windows_hold_every_item_at_any_stride(length, stride):
    windows = training_rows.cut_windows(length, 6, 1, stride)
    assert windows[0] == (max(0, length - 6), length) and windows[-1] == (0, min(6, length))
    assert all(end - start == min(6, length) for start, end in windows) and len(set(windows)) == len(windows)
    starts = [start for start, _ in windows]
    assert {first - second for first, second in pairwise(starts[:-1])} <= {stride}
    if stride == 1:
        assert starts == list(range(max(0, length - 6), -1, -1))


def test_only_the_held_out_item_is_supervised_in_validation(prepared):
    tokenizer = SemanticIdTokenizer.from_pretrained(prepared / "tokenizer")
    split = load_from_disk(str(prepared / "dataset"))["validation"]
    for row, target in zip(training_rows.held_out_rows(split, tokenizer, 4), split["target"], strict=True):
        supervised = [token for token in row["labels"] if token != -100]
        assert supervised == row["input_ids"][-len(supervised) :]
        assert tokenizer.decode_indices(np.array(supervised)).tolist() == [target]
