"""The semantic-ID tokenizer: encoding and decoding, growing, saving and loading."""

import copy
import datetime
import json
import shutil
from decimal import Decimal
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, run_elsewhere, short_id
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from tokenization import ResidualKMeans, SemanticIdTokenizer

DIM = 6


def random_embeddings(num_items, seed=0):
    """Draw content embeddings."""
    return np.random.default_rng(seed).normal(size=(num_items, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def quantizer():
    return ResidualKMeans((8, 8)).fit(random_embeddings(400))


@pytest.fixture
def tokenizer(quantizer):
    return SemanticIdTokenizer.from_embeddings(
        [f"item{i}" for i in range(300)],
        random_embeddings(300),
        quantizer,
        ["view", "like"],
        titles=[f"Title {i}" for i in range(300)],
        popularity=np.arange(300),
        provenance={"encoder": "none", "text_template": "{title}"},
    )


def small_tokenizer(behaviors=("like",)):
    """Make a tokenizer of three items with two codes each."""
    codes = [[0, 0], [0, 1], [2, 0]]
    return SemanticIdTokenizer.from_codes(["x", "y", "z"], np.array(codes), (3, 2), behaviors)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    num_behaviors=st.integers(1, 3),
)
def test_encoded_histories_decode_to_the_same_items(seed, sizes, num_behaviors):
    rng = np.random.default_rng(seed)
    item_codes = np.stack(np.unravel_index(rng.permutation(np.prod(sizes))[:40], sizes), axis=1)
    ids = rng.permutation(1000)[: len(item_codes)]
    names = [f"b{i}" for i in range(num_behaviors)]
    tokenizer = SemanticIdTokenizer.from_codes(ids, item_codes, sizes, names)
    histories = [rng.choice(ids, rng.integers(1, 6)).tolist() for _ in range(4)]
    behaviors = [[names[i] for i in rng.integers(0, num_behaviors, len(history))] for history in histories]
    batch = tokenizer.encode_history(histories, behaviors, return_tensors="pt")
    assert batch["input_ids"].dtype == torch.int64
    expected = [[str(x) for x in history] for history in histories]
    for form in (batch["input_ids"], batch["input_ids"].numpy(), batch["input_ids"].tolist()):
        assert tokenizer.decode_items(form) == expected
    for i, (items, actions) in enumerate(zip(histories, behaviors, strict=True)):
        text = "<bos>"
        for item, action in zip(items, actions, strict=True):
            codes = item_codes[list(ids).index(item)]
            text += "".join(f" <{'abcde'[level]}_{code}>" for level, code in enumerate(codes)) + f" <{action}>"
        single = tokenizer.encode_history(items, actions)["input_ids"]
        assert single == tokenizer(text)["input_ids"] == tokenizer(text.replace(" ", ""))["input_ids"]
        assert single == batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist()
        rows = tokenizer.item_indices(items)
        fast = tokenizer.encode_indices(rows, np.array([names.index(action) for action in actions]))
        assert fast.tolist() == single and tokenizer.decode_indices(single).tolist() == rows.tolist()
        assert tokenizer.decode(single) == text.replace(" ", "")


def test_the_vocabulary_is_specials_behaviors_and_codes(tokenizer):
    last = tokenizer.codebook_sizes[-1]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[:6] == ["<pad>", "<bos>", "<eos>", "<unk>", "<view>", "<like>"]
    assert tokens[6:] == [f"<{x}_{i}>" for x, size in (("a", 8), ("b", 8), ("c", last)) for i in range(size)]
    assert tokenizer.config_fields() == {
        "vocab_size": 22 + last,
        "codebook_sizes": [8, 8, last],
        "behaviors": ["view", "like"],
        "num_items": 300,
        "item_ids_fingerprint": tokenizer.item_ids_fingerprint(300),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    json.dumps(tokenizer.config_fields())
    assert (tokenizer.code_offsets, tokenizer.behavior_token_ids) == ((6, 14, 22), (4, 5))
    assert tokenizer.padding_side == "left" and tokenizer.unk_token_id == 3


def test_popular_items_of_a_colliding_group_come_first(tokenizer):
    codes = tokenizer.item_codes
    assert len(np.unique(codes, axis=0)) == 300
    assert len(np.unique(codes[:, :-1], axis=0)) == (codes[:, -1] == 0).sum() < 300
    order = np.lexsort((codes[:, -1], codes[:, 1], codes[:, 0]))
    same = (codes[order][1:, :-1] == codes[order][:-1, :-1]).all(1)
    assert (np.diff(order)[same] < 0).all()


def test_provenance_holds_origin_seed_hash_and_statistics(tokenizer, quantizer):
    provenance = tokenizer.provenance
    assert (provenance["encoder"], provenance["embedding_dim"], provenance["seed"], provenance["num_items"]) == (
        "none",
        DIM,
        0,
        300,
    )
    statistics = provenance["codebook_statistics"]
    assert statistics["collision_rate"] > 0 and 0 < statistics["reconstruction_error"] < 1
    other = SemanticIdTokenizer.from_embeddings(range(300), random_embeddings(300), quantizer, ["view"])
    assert len(provenance["sha256"]) == 64 != other.provenance["sha256"]


def test_a_collapsed_quantizer_warns_when_the_ids_are_made():
    points = np.tile(random_embeddings(2), (50, 1))
    with pytest.warns(UserWarning, match="COLLAPSED"):
        SemanticIdTokenizer.from_embeddings(range(100), points, ResidualKMeans((16,)).fit(points), ["view"])


def test_a_batch_is_padded_left_and_max_items_keeps_the_latest():
    tokenizer = small_tokenizer()
    batch = tokenizer.encode_history([["x", "y", "z"], ("z",)], max_items=2)
    assert batch["input_ids"] == [[1, 5, 9, 4, 7, 8, 4], [0, 0, 0, 1, 7, 8, 4]]
    assert batch["attention_mask"] == [[1] * 7, [0] * 3 + [1] * 4]
    assert tokenizer.encode_history(["x"], return_tensors="np")["input_ids"].shape == (1, 4)
    assert tokenizer.encode_history(np.array(["x", "z"]))["input_ids"] == [1, 5, 8, 4, 7, 8, 4]
    numbered = SemanticIdTokenizer.from_codes([1, 2], [[0], [1]], [2], [f"b{number}" for number in range(127)])
    tensors = list(torch.tensor([2, 1]))
    assert numbered.encode_history(tensors, ["b0", "b126"]) == numbered.encode_history([2, 1], ["b0", "b126"])
    tokens = numbered.encode_indices(np.array([1]), np.array([126], np.int8))  # the dtype of a dataset
    assert tokens.tolist() == [1, 132, 130]


def test_times_are_repeated_for_each_token_and_padded():
    tokenizer = small_tokenizer()
    step = tokenizer.num_levels + 1
    times = [tokenizer.encode_times(np.array(values)) for values in ([7, -1, 9], [5])]
    assert times[0].tolist() == [7] + [7] * step + [-1] * step + [9] * step
    assert tokenizer.encode_times(np.array([])).tolist() == [-1], "only a <bos>"
    tokens = [tokenizer.encode_indices(np.arange(count), np.zeros(count, int)) for count in (3, 1)]
    for side in ("left", "right"):
        batch = tokenizer.pad({"input_ids": tokens, "timestamps": times}, padding_side=side, return_tensors="pt")
        missing = [-1] * 2 * step
        padded = [*missing, *times[1]] if side == "left" else [*times[1], *missing]
        assert batch["timestamps"].tolist() == [times[0].tolist(), padded]
    rows = [
        {"input_ids": values.tolist(), "timestamps": when.tolist()} for values, when in zip(tokens, times, strict=True)
    ]
    batch = DataCollatorForSeq2Seq(tokenizer)([{**row, "labels": row["input_ids"]} for row in rows])
    assert batch["timestamps"][1].tolist() == [-1] * 2 * step + times[1].tolist()
    assert batch["attention_mask"][1].tolist() == [0] * 2 * step + [1] * (1 + step)


@pytest.mark.parametrize(
    "times",
    [
        [86_400, None],
        [86_400.9, float("nan")],
        np.array(["1970-01-02", "NaT"], "datetime64[ns]"),
        np.array(["1970-01-02", "NaT"], "datetime64[D]"),
        pd.to_datetime(["1970-01-02", None], utc=True),
        pd.Series(pd.to_datetime(["1970-01-02", None])),
        pd.Series([86_400, None], dtype="Int64"),
        [pd.Timestamp("1970-01-02T05:00:00+05:00"), pd.NaT],
        [datetime.date(1970, 1, 2), pd.NA],
        [np.datetime64("1970-01-02", "ns"), -1],
        torch.tensor([86_400, -1]),
    ],
    ids=short_id,
)
def test_any_time_becomes_seconds(times):
    tokenizer = small_tokenizer()
    expected = tokenizer.encode_history(["x", "y"], timestamps=[86_400, -1])
    assert tokenizer.encode_history(["x", "y"], timestamps=times) == expected
    assert tokenizer.encode_times(times).tolist() == expected["timestamps"]
    batch = tokenizer.encode_history([["x", "y"]] * 2, timestamps=[times, times])
    assert batch["timestamps"] == [expected["timestamps"]] * 2


@pytest.mark.parametrize(
    "time", [1_700_000_000_000, -2, "2026-01-01", True, float("inf"), datetime.date(1969, 1, 1), [5]], ids=repr
)
def test_what_is_no_time_is_rejected_with_its_position(time):
    tokenizer = small_tokenizer()
    with pytest.raises(ValueError, match=r"`timestamps` must be seconds since 1970.* at position 1 of 2"):
        tokenizer.encode_history(["x", "y"], timestamps=[5, time])
    with pytest.raises(ValueError, match="must be a list with one value per item"):
        tokenizer.encode_history(["x"], timestamps=5)


def test_missing_titles_are_empty_and_a_failed_save_is_harmless(tmp_path):
    columns = ([[0], [1], [2]], [3], ["view"])
    tokenizer = SemanticIdTokenizer.from_codes(list("xyz"), *columns, titles=["one", None, float("nan")])
    assert tokenizer.titles == ["one", "", ""]
    tokenizer.save_pretrained(tmp_path)
    before = (tmp_path / "items.json").read_bytes()
    with pytest.raises(UnicodeEncodeError):
        SemanticIdTokenizer.from_codes(["x", "y", "\ud800"], *columns).save_pretrained(tmp_path)
    assert (tmp_path / "items.json").read_bytes() == before


def test_unknown_items_are_named_or_skipped_with_their_behaviors():
    tokenizer = small_tokenizer(("view", "like"))
    with pytest.raises(ValueError, match=r"got 6 unknown, for instance \['0', '1', '2', '3', '4'\]"):
        tokenizer.item_indices([0, "x", 1, 2, 3, 4, 5])
    assert tokenizer.item_indices(["q", "z"], unknown="skip").tolist() == [2]
    skipped = tokenizer.encode_history(["q", "x", 7, "z"], ["like", "view", "like", "like"], unknown="skip")
    assert skipped == tokenizer.encode_history(["x", "z"], ["view", "like"])
    with pytest.raises(ValueError, match="got none in row 1: all of its item IDs are unknown"):
        tokenizer.encode_history([["x"], ["q"]], [["like"], ["like"]], unknown="skip")


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA, pd.NaT, np.float32("nan"), 2.0**53, ["x"]], ids=repr)
def test_missing_values_are_no_items_and_no_titles(missing):
    columns = ([[0], [1]], [2], ["view"])
    with pytest.raises(ValueError, match=r"must have an ID for each item, got .* at index 1 of 2"):
        SemanticIdTokenizer.from_codes(["x", missing], *columns)
    names = ["None", "nan", "<NA>", "NaT", "9007199254740992", "['x']"]
    tokenizer = SemanticIdTokenizer.from_codes(names, np.arange(6)[:, None], [6], ["view"])
    with pytest.raises(ValueError, match="got 1 unknown"):
        tokenizer.encode_history([names[0], missing])
    assert tokenizer.item_indices([missing, "nan"], unknown="skip").tolist() == [1]
    if str(missing) in names[:4]:
        assert SemanticIdTokenizer.from_codes(["x", "y"], *columns, titles=["X", missing]).titles == ["X", ""]


@pytest.mark.parametrize("kind", [str, int, float, str.encode, np.int32, np.float32, np.str_, torch.tensor, Decimal])
def test_an_id_is_the_same_string_in_any_type(kind):
    values = [kind(item if kind in (str, str.encode, np.str_) else int(item)) for item in ("7", "30")]
    tokenizer = SemanticIdTokenizer.from_codes(values, [[0], [1]], [2], ["1", "2"], titles=values)
    assert tokenizer.item_ids == tokenizer.titles == ["7", "30"]
    assert tokenizer.item_indices(values[::-1]).tolist() == [1, 0]
    behaviors = [kind("2") if kind in (str, str.encode, np.str_) else kind(2)] * 2
    assert tokenizer.encode_history(values, behaviors) == tokenizer.encode_history([7, 30], ["2", "2"])


def test_malformed_histories_are_rejected():
    tokenizer = small_tokenizer(("view", "like"))
    with pytest.raises(ValueError, match="got None"):
        tokenizer.encode_history(["x"])
    with pytest.raises(ValueError, match=r"got \['buy'\]"):
        tokenizer.encode_history(["x"], ["buy"])
    with pytest.raises(ValueError, match="`behaviors` must have as many values as items"):
        tokenizer.encode_history([["x"], ["y", "z"]], [["like"], ["like"]])
    for empty in ([], [["x"], []]):
        with pytest.raises(ValueError, match="at least one item in a history"):
            tokenizer.encode_history(empty, empty)
    with pytest.raises(ValueError, match="the string 'xy'"):  # a string is no list of items
        tokenizer.encode_history("xy", ["like", "like"])
    with pytest.raises(ValueError, match="the string 'xy'"):
        tokenizer.item_indices("xy")
    column = pd.Series(["x", "z"], index=[7, 9])  # the index of a filtered table
    assert tokenizer.encode_history(column, pd.Series(["like", "view"])) == tokenizer.encode_history(
        ["x", "z"], ["like", "view"]
    )
    with pytest.raises(ValueError, match="`max_items` must be at least 1"):
        tokenizer.encode_history(["x"], ["like"], max_items=0)
    with pytest.raises(ValueError, match="'error' or 'skip', got 'drop'"):
        tokenizer.item_indices(["x"], unknown="drop")
    with pytest.raises(ValueError, match=r"rows must be in \[0, 3\), got -1 to -1"):
        tokenizer.encode_indices(np.array([-1]), np.array([0]))
    with pytest.raises(ValueError, match=r"`behavior_index` must be in \[0, 2\), got 2 to 2"):
        tokenizer.encode_indices(np.array([0]), np.array([2]))
    with pytest.raises(ValueError, match="one integer per item"):
        tokenizer.encode_indices(np.array([0]), np.array([0, 1]))


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([1, 7, 9, 4], "'<a_2> <b_1>' at position 1, which encodes no item"),
        ([[1, 5, 8, 4], [0, 1, 7, 9]], "'<a_2> <b_1>' at position 2 of row 1, which encodes no item"),
        ([1, 8, 5], "whole items of 2 codes in level order, got '<b_0> <a_0>' at position 1"),
        ([5, 8, 5], "whole items.*got '<a_0>' at position 2"),
        ([[5, 8], [5, 4], [8, 4]], "whole items.*got '<a_0> <like>' at position 0 of row 1"),
        ([5, 4, 8], "whole items.*got '<a_0> <like>' at position 0"),
        ([5, -100], r"in \[0, 10\), got -100 at position 1"),
        ([5.0, 8.0], r"integers \[T\] or \[B, T\]"),
        ([[5.7, 8.0]], "rows of integers"),
    ],
    ids=short_id,
)
def test_tokens_that_are_no_items_are_rejected_with_position(token_ids, message):
    with pytest.raises(ValueError, match=message):
        small_tokenizer().decode_items(token_ids)


def test_tokens_without_codes_decode_to_no_items():
    tokenizer = small_tokenizer()
    assert tokenizer.decode_items([]) == tokenizer.decode_items([0, 1, 2, 3, 4]) == []
    assert tokenizer.decode_items([[0, 1], [5, 9], [0, 0]]) == [[], ["y"], []]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_ids": ["x", "x", "z"]}, r"distinct as strings, got \['x'\]"),
        ({"item_ids": [1, "1", 2]}, r"distinct as strings, got \['1'\]"),
        ({"item_ids": ["x", "y"]}, "got 2 item IDs and 3 rows"),
        ({"codes": [[0, 0], [0, 1], [0, 0]]}, "`codes` must be unique, got 1 repeated rows.*'x' and 'z'|'z' and 'x'"),
        ({"codes": [[0, 0], [0, 2], [1, 0]]}, "got 2 in row 1, level 1"),
        ({"codes": [[0, 0], [0, -1], [1, 0]]}, "got -1 in row 1, level 1"),
        ({"codes": [[0.0, 0], [0, 1], [1, 0]]}, "`codes` must be integers"),
        ({"codebook_sizes": (3,)}, "one codebook size per level"),
        ({"codebook_sizes": (2**40, 2**40)}, "product below 2"),
        ({"titles": ["one"]}, "one title per item"),
        ({"item_ids": ["x", None, "z"]}, "got None at index 1 of 3"),
        ({"codes": [[2**32, 0], [0, 1], [2, 0]], "codebook_sizes": (2**33, 2)}, "from 1 to 2"),
        ({"behaviors": []}, "list of at least one name"),
        ({"behaviors": "like"}, "list of at least one name"),
        ({"behaviors": ["a_1"]}, "no special token and no code"),
        ({"behaviors": ["bos"]}, "no special token and no code"),
        ({"behaviors": ["add to cart"]}, "without spaces"),
        ({"behaviors": ["like", "like"]}, "`behaviors` must be distinct"),
        ({"quantizer": ResidualKMeans((4,))}, "have all levels but the last"),
        ({"provenance": {"encoder": object()}}, "JSON types"),
    ],
    ids=short_id,
)
def test_invalid_catalogs_are_rejected(change, message):
    good = {
        "item_ids": ["x", "y", "z"],
        "codes": [[0, 0], [0, 1], [2, 0]],
        "codebook_sizes": (3, 2),
        "behaviors": ["like"],
    }
    SemanticIdTokenizer.from_codes(**good)
    with pytest.raises(ValueError, match=message):
        SemanticIdTokenizer.from_codes(**(good | change))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), num_new=st.integers(0, 30), copies=st.booleans())
def test_added_items_are_unique_and_keep_the_old_ones(quantizer, seed, num_new, copies):
    old = SemanticIdTokenizer.from_embeddings(range(100), random_embeddings(100), quantizer, ["view"])
    tokenizer = copy.deepcopy(old)
    # Copies of an embedding make the last level grow.
    new = random_embeddings(100)[:1].repeat(num_new, 0) if copies else random_embeddings(num_new, seed)
    codes = tokenizer.add_items([f"new{i}" for i in range(num_new)], new)
    assert codes.shape == (num_new, 3) and tokenizer.num_items == 100 + num_new
    np.testing.assert_array_equal(codes[:, :2], quantizer.encode(new))
    np.testing.assert_array_equal(tokenizer.item_codes[:100], old.item_codes)
    np.testing.assert_array_equal(tokenizer.item_tokens(np.arange(100)), old.item_tokens(np.arange(100)))
    assert tokenizer.get_vocab().items() >= old.get_vocab().items()
    assert len(tokenizer) == tokenizer.code_offsets[-1] + tokenizer.codebook_sizes[-1]
    assert len(np.unique(tokenizer.item_codes, axis=0)) == 100 + num_new
    assert tokenizer.decode_items(tokenizer.item_tokens(np.arange(100 + num_new))) == [[i] for i in tokenizer.item_ids]
    for prefix in np.unique(tokenizer.item_codes[:, :2], axis=0):
        group = tokenizer.item_codes[(tokenizer.item_codes[:, :2] == prefix).all(1), 2]
        assert sorted(group) == list(range(len(group)))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), counts=st.lists(st.integers(0, 20), min_size=1, max_size=3), copies=st.booleans())
def test_an_appended_catalog_equals_one_built_at_once(quantizer, seed, counts, copies):
    num_items = 50 + sum(counts)
    embeddings = random_embeddings(num_items, seed)
    if copies:
        embeddings[50:] = embeddings[0]
    ids = [f"item{i}" for i in range(num_items)]
    tokenizer = SemanticIdTokenizer.from_embeddings(ids[:50], embeddings[:50], quantizer, ["view"], titles=ids[:50])
    first = 50
    for count in counts:
        new = slice(first, first + count)
        with mock.patch("numpy.argsort", wraps=np.argsort) as sort, mock.patch("json.dumps", wraps=json.dumps) as dump:
            tokenizer.add_items(ids[new], embeddings[new], ids[new])
        assert all(len(call.args[0]) <= count for call in sort.call_args_list), "sort new items alone"
        assert all(len(call.args[0]) < 50 for call in dump.call_args_list), "write no list of all items"
        first += count
    at_once = SemanticIdTokenizer.from_codes(
        ids, tokenizer.item_codes, tokenizer.codebook_sizes, ["view"], ids, quantizer, tokenizer.provenance
    )
    everything = np.array(list(np.ndindex(*tokenizer.codebook_sizes)))
    for catalog in (tokenizer, at_once):
        assert catalog.item_ids == catalog.titles == ids
        assert catalog.item_indices(ids).tolist() == list(range(num_items))
        known = {tuple(code) for code in catalog.item_codes.tolist()}
        tokens = everything[[tuple(code) in known for code in everything.tolist()]] + np.array(catalog.code_offsets)
        np.testing.assert_array_equal(catalog.item_tokens(catalog.decode_indices(tokens.flatten())), tokens)
    assert tokenizer.provenance == at_once.provenance and tokenizer.get_vocab() == at_once.get_vocab()


def test_invalid_additions_leave_the_tokenizer_unchanged(tokenizer):
    before = (tokenizer.item_codes.tobytes(), list(tokenizer.item_ids), len(tokenizer), tokenizer.provenance)
    nan = random_embeddings(2)
    nan[1] = np.nan
    cases = [
        (["item0", "n"], random_embeddings(2), r"got 1 that exist already: \['item0'\]"),
        (["n", "n"], random_embeddings(2), "distinct as strings"),
        (["n", "m"], random_embeddings(3), r"one row per item \(2\), got 3"),
        (["n", "m"], np.zeros((2, 5), np.float32), "width 6.*got width 5"),
        (["n", "m"], nan, "NaN or infinity in 1 of 2 rows, the first in row 1"),
        ("nm", random_embeddings(2), "got the string 'nm'"),
    ]
    for ids, embeddings, message in cases:
        with pytest.raises(ValueError, match=message):
            tokenizer.add_items(ids, embeddings)
    with pytest.raises(ValueError, match="one title per item"):
        tokenizer.add_items(["n"], random_embeddings(1), titles=["a", "b"])
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match="got 1 tokens added after it"):
        tokenizer.add_items([f"n{i}" for i in range(50)], random_embeddings(1).repeat(50, 0))
    assert before == (tokenizer.item_codes.tobytes(), tokenizer.item_ids, len(tokenizer) - 1, tokenizer.provenance)
    with pytest.raises(ValueError, match="got a catalog built from codes alone"):
        small_tokenizer().add_items(["n"], random_embeddings(1))


def test_new_items_of_atomic_ids_take_the_next_codes():
    atomic = SemanticIdTokenizer.from_codes(["a", "b"], np.arange(2)[:, None], [2], ["view"])
    assert atomic.add_items(["c", "d"], random_embeddings(2)).tolist() == [[2], [3]]
    assert atomic.codebook_sizes == (4,) and atomic.decode_items(atomic.encode_history(["d"])["input_ids"]) == ["d"]
    with pytest.raises(ValueError, match=r"one row per item \(1\), got 2"):
        atomic.add_items(["e"], random_embeddings(2))
    assert atomic.encode_indices([], []).tolist() == [atomic.bos_token_id]


def test_save_load_save_writes_the_same_files(tokenizer, tmp_path):
    tokenizer.add_items([f"new{i}" for i in range(40)], random_embeddings(1).repeat(40, 0))
    tokenizer(["<a_1> <b_1>", "<a_1>"], padding=True)
    tokenizer.save_pretrained(tmp_path / "one")
    loaded = SemanticIdTokenizer.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"tokenizer.json", "items.json", "semantic_ids.safetensors", "tokenization_unigrf.py"} <= set(names)
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert loaded.item_ids == tokenizer.item_ids and loaded.provenance == tokenizer.provenance
    assert loaded.titles == tokenizer.titles and loaded.titles[-1] == ""
    assert loaded.config_fields() == tokenizer.config_fields()
    np.testing.assert_array_equal(
        loaded.add_items(["n"], random_embeddings(1)), tokenizer.add_items(["n"], random_embeddings(1))
    )


def test_padding_and_added_tokens_work_as_in_any_tokenizer(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path)
    for copied in (tokenizer, SemanticIdTokenizer.from_pretrained(tmp_path), copy.deepcopy(tokenizer)):
        batch = copied(["<bos> <a_2> <b_0> <like>", "<extra> what"], padding=True, return_tensors="pt")
        assert batch["input_ids"].tolist() == [[1, 7, 8, 4], [0, 0, 10, 3]]
        assert copied.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["<a_2><b_0><like>", "<extra>"]
        assert len(copied) == 11 and copied.vocab_size == 10


def test_truncation_keeps_the_last_tokens(tmp_path):
    small_tokenizer().save_pretrained(tmp_path)
    for kind in (SemanticIdTokenizer, PreTrainedTokenizerFast):
        tokenizer = kind.from_pretrained(tmp_path)
        text = "<bos> <a_2> <b_0> <like>"
        assert tokenizer(text, truncation=True, max_length=2)["input_ids"] == tokenizer(text)["input_ids"][-2:]
        tokenizer.truncation_side = "right"
        assert tokenizer(text, truncation=True, max_length=2)["input_ids"] == tokenizer(text)["input_ids"][:2]


LOAD_AND_GROW = """
from transformers import AutoTokenizer
import numpy as np
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer.encode_history(["item7", "item3"], ["like", "view"])["input_ids"]
codes = tokenizer.add_items(["new"], np.ones((1, 6), np.float32))
try:
    tokenizer.quantizer.fit(np.ones((9, 6), np.float32))
except ImportError as error:
    message = str(error)
tokenizer.save_pretrained(sys.argv[2])
again = AutoTokenizer.from_pretrained(sys.argv[2], trust_remote_code=True)
print(json.dumps([type(again).__name__, ids, tokenizer.decode_items(ids), codes.tolist(), again.num_items, message]))
"""


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_a_saved_tokenizer_loads_without_project_and_faiss(tokenizer, tmp_path, source):
    home = tmp_path / "home"
    commit = "0123456789" * 4
    cache = home / "hub" / "models--someone--items"
    folder = cache / "snapshots" / commit if source == "hub" else tmp_path / "folder"
    tokenizer.save_pretrained(folder)
    if source == "hub":
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(commit)
        # A download marks files that the repository does not have.
        (cache / ".no_exist" / commit).mkdir(parents=True)
        (cache / ".no_exist" / commit / "config.json").touch()
    name = "someone/items" if source == "hub" else str(folder)
    again = str(tmp_path / "again")
    lines = run_elsewhere(
        LOAD_AND_GROW, name, again, folder=tmp_path, hidden=["faiss"], HF_HOME=str(home), OMP_NUM_THREADS="2"
    )
    expected_ids = tokenizer.encode_history(["item7", "item3"], ["like", "view"])["input_ids"]
    codes = tokenizer.add_items(["new"], np.ones((1, DIM), np.float32)).tolist()
    loaded = json.loads(lines[-1])
    assert loaded[:5] == ["SemanticIdTokenizer", expected_ids, ["item7", "item3"], codes, 301]
    assert "pip install faiss-cpu" in loaded[5]


def test_auto_tokenizer_takes_the_installed_class(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for trust in (None, False, True):
        assert type(AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trust)) is SemanticIdTokenizer


def test_the_plain_class_reads_the_text(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = tokenizer.encode_history(["item1"], ["like"])["input_ids"]
    assert plain(tokenizer.decode(ids))["input_ids"] == ids and plain.padding_side == "left"


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def damage(folder: Path, other: Path, name: str, how: str) -> None:
    """Remove, truncate or replace a file of the folder."""
    path = folder / name
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        shutil.copy(other / name, path)


@pytest.mark.parametrize("how", ["missing", "truncated", "swapped"])
@pytest.mark.parametrize("name", ["items.json", "semantic_ids.safetensors", *TOKENIZER_FILES])
def test_missing_truncated_and_mixed_up_files_are_rejected(tokenizer, quantizer, tmp_path, name, how):
    tokenizer.save_pretrained(tmp_path / "one")
    SemanticIdTokenizer.from_embeddings(range(9), random_embeddings(9), quantizer, ["view"]).save_pretrained(
        tmp_path / "other"
    )
    damage(tmp_path / "one", tmp_path / "other", name, how)
    with pytest.raises(ValueError) as raised:
        SemanticIdTokenizer.from_pretrained(tmp_path / "one")
    if (name, how) != ("tokenizer_config.json", "swapped"):
        # The behaviors of this file make the vocabulary, which then differs from that of tokenizer.json.
        assert name in str(raised.value)
    assert "must" in str(raised.value)


def test_an_edited_item_map_is_rejected_by_its_hash(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "items.json").read_text())
    content["item_ids"][:2] = content["item_ids"][1::-1]
    (tmp_path / "items.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must hold item IDs and codes of hash"):
        SemanticIdTokenizer.from_pretrained(tmp_path)


def test_statistics_of_a_0_1_folder_still_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "items.json").read_text())
    content["provenance"]["health"] = content["provenance"].pop("codebook_statistics")
    (tmp_path / "items.json").write_text(json.dumps(content))
    assert SemanticIdTokenizer.from_pretrained(tmp_path).provenance == tokenizer.provenance


def test_the_example_of_the_package_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "tokenization" / "README.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out
