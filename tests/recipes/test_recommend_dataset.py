"""recipes.recommend over a dataset: equal to `model.recommend` row by row, in any batches, shards and processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from helpers import ROOT, build_model, short_id
from transformers import HfArgumentParser

from modeling_unigrf import RecommendationPipeline
from recipes.common.files import whole_file
from recipes.data.histories import load_histories
from recipes.recommend import RecommendArguments, RecommendSettings, main, recommend_dataset, resolve_settings
from tokenization import SemanticIdTokenizer

OPTIONS = {"num_beams": 8, "num_return_sequences": 5}
COLUMNS = ["user_id", "item_ids", "scores", "generation_scores", "ranking_scores", "dense_scores"]


@pytest.fixture
def model():
    return build_model(exclude_history=True)


@pytest.fixture
def tokenizer(model):
    ids = [f"sku-{item}" for item in range(model.config.num_items)]
    return SemanticIdTokenizer.from_codes(
        ids, model.catalog.item_codes, model.config.codebook_sizes, model.config.behaviors
    )


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def histories(lengths=(3, 1, 9, 2, 12, 5, 5, 1, 7, 4, 2), seed=0) -> Dataset:
    rng = np.random.default_rng(seed)
    return Dataset.from_dict(
        {
            "target": [0] * len(lengths),  # unused columns are allowed
            "user_id": [1000 - 7 * row for row in range(len(lengths))],
            "items": [[f"sku-{item}" for item in rng.integers(30, size=length)] for length in lengths],
            "behaviors": [[["dislike", "like"][kind] for kind in rng.integers(2, size=length)] for length in lengths],
        }
    )


def changed(dataset: Dataset, changes: dict[int, dict]) -> Dataset:
    rows = dataset.to_list()
    for row, values in changes.items():
        rows[row] |= values
    return Dataset.from_list(rows, features=dataset.features)


def recommend_one_by_one(model, tokenizer, dataset, max_items=None, unknown="error", **options) -> pd.DataFrame:
    rows = []
    for user in dataset:
        inputs = tokenizer.encode_history(
            user["items"], user["behaviors"], max_items=max_items, unknown=unknown, return_tensors="pt"
        )
        blocked = [tokenizer.item_indices(user["items"], unknown=unknown)]
        best = model.recommend(**inputs, blocked_items=blocked, **{**OPTIONS, **options})
        items = [tokenizer.item_ids[item] for item in best.item_indices[0]]
        rows.append([user["user_id"], items, *(best[name][0].tolist() for name in COLUMNS[2:])])
    return pd.DataFrame(rows, columns=COLUMNS)


def assert_same(folder: Path, expected: pd.DataFrame) -> None:
    actual = pd.read_parquet(folder)
    assert list(actual) == COLUMNS and actual["user_id"].tolist() == expected["user_id"].tolist()
    assert [list(items) for items in actual["item_ids"]] == expected["item_ids"].tolist()
    for name in COLUMNS[2:]:
        for scores, others in zip(actual[name], expected[name], strict=True):
            np.testing.assert_allclose(scores, others, rtol=1e-4, atol=1e-4)


def count_rows(model, monkeypatch, fail_at=None) -> list[int]:
    """Record the number of rows of each call of `model.recommend`; the call `fail_at` fails."""
    calls = []
    recommend = model.recommend

    def counted(input_ids, *args, **kwargs):
        if len(calls) == fail_at:
            raise RuntimeError("interrupted")
        calls.append(len(input_ids))
        return recommend(input_ids, *args, **kwargs)

    monkeypatch.setattr(model, "recommend", counted)
    return calls


@pytest.mark.parametrize(("batch_size", "shard_size"), [(1, 100), (3, 4), (32, 5), (4, 1)])
def test_any_batch_and_shard_size_equals_recommend(model, tokenizer, tmp_path, batch_size, shard_size):
    dataset = histories()
    settings = RecommendSettings(**OPTIONS, ranking_weight=0.7, batch_size=batch_size, shard_size=shard_size)
    assert recommend_dataset(model, tokenizer, dataset, tmp_path / "out", settings) == tmp_path / "out"
    assert_same(tmp_path / "out", recommend_one_by_one(model, tokenizer, dataset, ranking_weight=0.7))
    loaded = load_dataset("parquet", data_dir=str(tmp_path / "out"))["train"]
    assert loaded["user_id"][:] == dataset["user_id"][:]
    assert (
        loaded.features["item_ids"].feature.dtype == "string" and loaded.features["scores"].feature.dtype == "float32"
    )


def test_settings_reach_the_model_and_lists_end_with_the_items(model, tokenizer, tmp_path):
    dataset = histories()
    settings = {"ranking_target": "like", "num_beams": 40, "num_return_sequences": 40}
    recommend_dataset(model, tokenizer, dataset, tmp_path / "a", RecommendSettings(**settings, max_items=3))
    expected = recommend_one_by_one(model, tokenizer, dataset, max_items=3, **settings)
    for column in COLUMNS[1:]:  # without the padding
        expected[column] = [
            values[: 30 - len(set(items))] for values, items in zip(expected[column], dataset["items"], strict=True)
        ]
    assert_same(tmp_path / "a", expected)

    settings = RecommendSettings(num_beams=30, num_return_sequences=30, exclude_history=True)
    recommend_dataset(model, tokenizer, dataset, tmp_path / "b", settings)
    user_items = dataset["items"]
    listed = pd.read_parquet(tmp_path / "b")["item_ids"]
    assert all(set(items).isdisjoint(row) for items, row in zip(listed, user_items, strict=True))


def test_settings_default_to_those_of_the_checkpoint(model, tokenizer, tmp_path):
    dataset = histories()
    model.generation_config.exclude_history = False
    model.generation_config.ranking_target = "like"
    model.generation_config.rerank_top_k = 4
    assert resolve_settings(RecommendSettings(num_beams=20), model).num_return_sequences == 4
    recommend_dataset(model, tokenizer, dataset, tmp_path / "a", RecommendSettings(num_beams=20))
    expected = recommend_dataset(
        model,
        tokenizer,
        dataset,
        tmp_path / "b",
        RecommendSettings(num_beams=20, num_return_sequences=4, exclude_history=False, ranking_target="like"),
    )
    actual = pd.read_parquet(tmp_path / "a")
    expected = pd.read_parquet(expected)
    pd.testing.assert_frame_equal(actual, expected)
    repeated = [set(items) & set(row) for items, row in zip(actual["item_ids"], dataset["items"], strict=True)]
    assert any(repeated) and set(actual["item_ids"].map(len)) == {4}
    with pytest.raises(ValueError, match="got num_return_sequences=5, num_beams=20, rerank_top_k=4, "):
        resolve_settings(RecommendSettings(num_beams=20, num_return_sequences=5), model)


def test_sub_histories_come_from_the_whole_history(tokenizer, tmp_path):
    model = build_model(num_retrieved_items=3, exclude_history=True)
    dataset = histories()
    model.set_catalog(torch.tensor(tokenizer.item_codes), model.catalog.content_embeddings)
    folder = recommend_dataset(model, tokenizer, dataset, tmp_path / "out", RecommendSettings(**OPTIONS, max_items=2))
    rows = [
        recommend_one_by_one(
            model,
            tokenizer,
            dataset.select([row]),
            max_items=2,
            long_history={
                "items": torch.tensor(tokenizer.item_indices(user["items"]))[None],
                "behaviors": torch.tensor([[["dislike", "like"].index(name) for name in user["behaviors"]]]),
            },
        )
        for row, user in enumerate(dataset)
    ]
    assert_same(folder, pd.concat(rows, ignore_index=True))


def with_times(dataset: Dataset) -> Dataset:
    rng = np.random.default_rng(1)
    times = [(rng.integers(1, 10**6, size=len(items)).cumsum()).tolist() for items in dataset["items"]]
    times[2][3] = None
    requests = [None, *(row[-1] + 10**5 for row in times[1:])]
    return dataset.add_column("timestamps", times).add_column("query_time", requests)


def timed_model(tokenizer, **config):
    model = build_model("hstu", exclude_history=True, **config)
    model.set_catalog(torch.tensor(tokenizer.item_codes), model.catalog.content_embeddings)
    return model


@pytest.mark.parametrize("unit", ["s", "ns"])
def test_dates_in_histories_equal_seconds(tokenizer, tmp_path, unit):
    model = timed_model(tokenizer)
    dataset = with_times(histories())
    dates = dataset.with_format("arrow")[:]
    for name in ("timestamps", "query_time"):
        kind = pa.timestamp(unit, "Europe/Paris" if unit == "s" else None)
        column = dates[name].cast(pa.list_(pa.timestamp("s")) if name == "timestamps" else pa.timestamp("s"))
        column = column.cast(pa.list_(kind) if name == "timestamps" else kind)
        dates = dates.set_column(dates.column_names.index(name), name, column)
    settings = RecommendSettings(**OPTIONS)
    first, second = (
        pd.read_parquet(recommend_dataset(model, tokenizer, each, tmp_path / name, settings))
        for name, each in {"seconds": dataset, "dates": Dataset(dates)}.items()
    )
    pd.testing.assert_frame_equal(first, second)


@pytest.mark.parametrize(("query_time", "retrieved"), [(True, 0), (False, 0), (True, 2)])
def test_a_timed_model_reads_item_times_and_the_query_time(tokenizer, tmp_path, query_time, retrieved):
    model = timed_model(tokenizer, num_retrieved_items=retrieved)
    dataset = with_times(histories())
    dataset = dataset if query_time else dataset.remove_columns("query_time")
    strange = changed(dataset, {4: {"items": ["?", *dataset[4]["items"][1:]]}})
    settings = RecommendSettings(**OPTIONS, max_items=6, batch_size=4, unknown="skip")
    folder = recommend_dataset(model, tokenizer, strange, tmp_path / "out", settings)
    rows = []
    for user in strange:
        known = [index for index, item in enumerate(user["items"]) if item != "?"]
        everything = [[user[name][index] for index in known] for name in ("items", "behaviors", "timestamps")]
        items, behaviors, times = (column[-6:] for column in everything)
        inputs = tokenizer.encode_history(items, behaviors, timestamps=times, return_tensors="pt")
        if query_time:
            inputs["query_time"] = torch.tensor([user["query_time"] or -1])
        if retrieved:
            inputs["long_history"] = {
                "items": torch.tensor(tokenizer.item_indices(everything[0]))[None],
                "behaviors": torch.tensor([[tokenizer.behaviors.index(name) for name in everything[1]]]),
                "timestamps": torch.tensor([[-1 if time is None else time for time in everything[2]]]),
            }
        blocked = [tokenizer.item_indices(user["items"], unknown="skip")]
        best = model.recommend(**inputs, blocked_items=blocked, **OPTIONS)
        ids = [tokenizer.item_ids[item] for item in best.item_indices[0]]
        rows.append([user["user_id"], ids, *(best[name][0].tolist() for name in COLUMNS[2:])])
    assert_same(folder, pd.DataFrame(rows, columns=COLUMNS))


def test_invalid_times_are_rejected_only_by_timed_models(model, tokenizer, tmp_path):
    dataset = with_times(histories())
    settings = RecommendSettings(**OPTIONS)
    recommend_dataset(model, tokenizer, dataset, tmp_path / "untimed", settings)
    assert_same(tmp_path / "untimed", recommend_one_by_one(model, tokenizer, dataset))
    timed = timed_model(tokenizer)

    def check_rejected(dataset, message):
        with pytest.raises(ValueError, match=message):
            recommend_dataset(timed, tokenizer, dataset, tmp_path / "timed", settings)

    check_rejected(histories(), r"add \['timestamps'\]")
    check_rejected(
        changed(dataset, {1: {"timestamps": [3, 4]}}), r"1 with another number of timestamps than of items.*\[993\]"
    )
    dates = dataset.remove_columns("query_time").add_column("query_time", ["2026-01-01"] * len(dataset))
    check_rejected(dates, "got query_time of type string")
    late = changed(dataset, {2: {"query_time": 1_700_000_000_000}, 5: {"timestamps": [5, 6, 7, 8, -2]}})
    check_rejected(late, r"2 with times that are no seconds.*\[986, 965\]")
    assert not (tmp_path / "timed").exists()


@pytest.mark.parametrize("kind", [int, float])
def test_item_ids_and_user_ids_of_other_types(model, tmp_path, kind):
    codes = model.catalog.item_codes
    sizes = model.config.codebook_sizes
    names = model.config.behaviors
    tokenizer = SemanticIdTokenizer.from_codes(range(100, 130), codes, sizes, names)
    dataset = Dataset.from_dict(
        {"user_id": ["b", "a"], "items": [[kind(104), kind(129)], [kind(100)]], "behaviors": [["like"] * 2, ["like"]]}
    )
    dataset = dataset.select([1, 0, 1])  # a view of the table
    recommend_dataset(model, tokenizer, dataset, tmp_path, RecommendSettings(**OPTIONS))
    assert_same(tmp_path, recommend_one_by_one(model, tokenizer, dataset))


def test_one_behavior_needs_no_column(tmp_path):
    model = build_model(behaviors=["bought"])
    ids = [str(item) for item in range(30)]
    tokenizer = SemanticIdTokenizer.from_codes(ids, model.catalog.item_codes, model.config.codebook_sizes, ["bought"])
    dataset = Dataset.from_dict({"user_id": [1, 2], "items": [["1", "2"], ["3"]]})
    recommend_dataset(model, tokenizer, dataset, tmp_path, RecommendSettings(**OPTIONS))
    assert_same(
        tmp_path, recommend_one_by_one(model, tokenizer, dataset.add_column("behaviors", [["bought"] * 2, ["bought"]]))
    )


def test_a_resumed_call_equals_an_uninterrupted_one(model, tokenizer, tmp_path, monkeypatch, capsys):
    dataset = histories()
    settings = RecommendSettings(**OPTIONS, batch_size=2, shard_size=4)
    expected = recommend_one_by_one(model, tokenizer, dataset)
    names = [f"part-0000{k}-of-00003.parquet" for k in range(3)]

    def files():
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir() if file.suffix == ".parquet"}

    with monkeypatch.context() as patch:
        calls = count_rows(model, patch, fail_at=3)  # in the second batch of the second file
        with pytest.raises(RuntimeError, match="interrupted"):
            recommend_dataset(model, tokenizer, dataset, tmp_path, settings)
        assert calls == [2, 2, 2] and list(before := files()) == names[:1]
    with monkeypatch.context() as patch:
        calls = count_rows(model, patch)
        recommend_dataset(model, tokenizer, dataset, tmp_path, settings)
        assert sum(calls) == 4 + 3 and files().items() > before.items()
    assert sorted(files()) == names
    assert_same(tmp_path, expected)

    (tmp_path / names[1]).unlink()
    (tmp_path / f".{names[1]}.tmp").write_text("half a file")
    before = files()
    capsys.readouterr()
    calls = count_rows(model, monkeypatch)
    recommend_dataset(model, tokenizer, dataset, tmp_path, settings)
    assert sum(calls) == 4 and "2 of 3 files were made before" in capsys.readouterr().out
    assert sorted(files()) == names and files().items() > before.items()
    assert sorted(file.name for file in tmp_path.iterdir()) == [".recommend.json", *names]
    assert_same(tmp_path, expected)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "part.parquet") as file:
        file.write_text("half")
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == []
    with whole_file(tmp_path / "part.parquet") as file:
        file.write_text("whole")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["whole"]


def test_other_work_is_rejected_in_the_same_folder(model, tokenizer, tmp_path):
    dataset = histories()

    def again(dataset=dataset, **other):
        recommend_dataset(model, tokenizer, dataset, tmp_path, RecommendSettings(**{**OPTIONS, **other}))

    again()
    again(batch_size=3)
    with pytest.raises(ValueError, match=r"other values of \['num_beams', 'shard_size'\]"):
        again(num_beams=9, shard_size=100)
    with pytest.raises(ValueError, match=r"other values of \['histories', 'rows'\]"):
        again(dataset.select(range(5)))
    with pytest.raises(ValueError, match=r"other values of \['ranking_weight'\]"):
        model.generation_config.ranking_weight = 0.5  # the default of the checkpoint
        again()
    again(ranking_weight=1.0)
    with torch.no_grad():
        model.lm_head.weight[7, 3] += 1
    with pytest.raises(ValueError, match=r"other values of \['model'\]"):
        again(ranking_weight=1.0)
    (tmp_path / ".recommend.json").unlink()
    with pytest.raises(ValueError, match="other values of"):
        again()
    for file in tmp_path.glob("*.parquet"):
        file.unlink()
    again()  # nothing is left to mix with
    assert json.loads((tmp_path / ".recommend.json").read_text())["rows"] == len(dataset)


def test_all_bad_rows_are_reported_before_the_model_runs(model, tokenizer, tmp_path, monkeypatch):
    calls = count_rows(model, monkeypatch)
    bad = changed(
        histories(),
        {
            1: {"items": ["sku-1", "sku-30"], "behaviors": ["like", "like"]},
            2: {"items": [], "behaviors": []},
            4: {"items": None, "behaviors": None},
            6: {"behaviors": ["like"]},
            8: {"items": ["sku-1"], "behaviors": ["liked"]},
            9: {"items": [None], "behaviors": [None]},
            10: {"items": ["None"], "behaviors": ["like"]},
        },
    )
    with pytest.raises(ValueError) as error:
        recommend_dataset(model, tokenizer, bad, tmp_path / "out", RecommendSettings(**OPTIONS, shard_size=3))
    for message in (
        "3 with items that the catalog does not have (the first user_id: [993, 937, 930])",
        "2 without an item (the first user_id: [986, 972])",
        "1 with another number of behaviors than of items (the first user_id: [958])",
        "2 with behaviors that are none of ('dislike', 'like') (the first user_id: [944, 937])",
    ):
        assert message in str(error.value)
    with pytest.raises(ValueError) as error:
        recommend_dataset(model, tokenizer, bad, tmp_path / "out", RecommendSettings(**OPTIONS, unknown="skip"))
    assert "1 with another number" in str(error.value) and "2 with behaviors that" in str(error.value)
    assert "catalog" not in str(error.value) and "without an item" not in str(error.value)
    assert not calls and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (histories().remove_columns("behaviors"), r"the columns \['user_id', 'items', 'behaviors'\], got 11 rows"),
        (histories().rename_column("user_id", "user"), r"Rename or add \['user_id'\]"),
        (histories().select([]), "got 0 rows"),
        (Dataset.from_dict({"user_id": [1], "items": ["sku-1"], "behaviors": [["like"]]}), "items of type string"),
        (
            Dataset.from_dict({"user_id": [1], "items": [[True]], "behaviors": [["like"]]}),
            "items of type list<.*bool",
        ),
        # recipes.prepare writes indices, which are no ids.
        (Dataset.from_dict({"user_id": ["u"], "items": [[1]], "behaviors": [[0]]}), "behaviors of type list<.*int64"),
    ],
    ids=short_id,
)
def test_columns_of_other_names_or_types_are_rejected(model, tokenizer, tmp_path, dataset, message):
    with pytest.raises(ValueError, match=message):
        recommend_dataset(model, tokenizer, dataset, tmp_path / "out", RecommendSettings(**OPTIONS))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_return_sequences": 9}, "got num_return_sequences=9, num_beams=8, "),
        ({"max_items": 1000}, "`max_items` must be at most the 408 items .* got 1000"),
        ({"batch_size": 0}, "`batch_size` must be 1 or more, got 0"),
        ({"unknown": "ignore"}, "`unknown` must be 'error' or 'skip', got 'ignore'"),
        ({"ranking_target": "love"}, "`ranking_target` must be among .* got 'love'"),
    ],
    ids=short_id,
)
def test_settings_out_of_range_are_rejected(model, tokenizer, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        recommend_dataset(model, tokenizer, histories(), tmp_path, RecommendSettings(**{**OPTIONS, **wrong}))


def test_a_tokenizer_of_another_catalog_is_rejected(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`tokenizer` must have the model's codes"):
        recommend_dataset(build_model(seed=1), tokenizer, histories(), tmp_path, RecommendSettings(**OPTIONS))


def test_unknown_items_are_skipped_and_empty_rows_counted(model, tokenizer, tmp_path, capsys):
    dataset = changed(
        histories(),
        {
            1: {"items": ["sku-1", "sku-30", "sku-2"], "behaviors": ["like", "dislike", "dislike"]},
            2: {"items": [], "behaviors": []},
            4: {"items": None, "behaviors": None},
            7: {"items": ["new", None], "behaviors": ["like", "like"]},
        },
    )
    settings = RecommendSettings(**OPTIONS, unknown="skip", batch_size=3, shard_size=4)
    recommend_dataset(model, tokenizer, dataset, tmp_path, settings)
    assert "3 of 11 rows have empty lists" in capsys.readouterr().out
    known = [row for row in range(11) if row not in (2, 4, 7)]
    expected = recommend_one_by_one(model, tokenizer, dataset.select(known), unknown="skip").set_index("user_id")
    expected = expected.reindex(dataset["user_id"][:]).reset_index()
    empty = expected["item_ids"].isna()
    assert empty.sum() == 3
    assert_same(
        tmp_path, expected.where(~empty, expected[["user_id"]].assign(**{name: [[]] * 11 for name in COLUMNS[1:]}))
    )


def test_the_whole_history_is_excluded_beyond_max_items(model, tokenizer, tmp_path, capsys):
    everything = [f"sku-{item}" for item in range(30)]
    dataset = Dataset.from_dict(
        {
            "user_id": [1, 2, 3],
            "items": [everything[:25], everything, everything[:29] * 2],
            "behaviors": [["like"] * 25, ["like"] * 30, ["like"] * 58],
        }
    )
    settings = {"num_beams": 30, "num_return_sequences": 30, "max_items": 2}
    recommend_dataset(model, tokenizer, dataset, tmp_path / "without", RecommendSettings(**settings))
    lists = [set(items) for items in pd.read_parquet(tmp_path / "without")["item_ids"]]
    assert lists == [set(everything[25:]), set(), {"sku-29"}]
    assert "1 of 3 rows have empty lists" in capsys.readouterr().out
    recommend_dataset(
        model, tokenizer, dataset, tmp_path / "with", RecommendSettings(**settings, exclude_history=False)
    )
    assert [len(items) for items in pd.read_parquet(tmp_path / "with")["item_ids"]] == [30] * 3


def test_histories_are_loaded_from_files_and_folders(tmp_path):
    dataset = histories().select(range(3))
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    dataset.to_parquet(tmp_path / "folder" / "histories.parquet")
    dataset.to_json(tmp_path / "histories.jsonl")
    pd.DataFrame({"user_id": [1], "items": ["1,2"]}).to_csv(tmp_path / "histories.csv")
    for name in ("saved", "folder", "folder/histories.parquet", "histories.jsonl"):
        assert load_histories(str(tmp_path / name)).to_list() == dataset.to_list()
    assert load_histories(str(tmp_path / "splits"), "test")["user_id"][:] == [993]
    with pytest.raises(ValueError, match=r"`split` must be among \['train', 'test'\], got None"):
        load_histories(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"`split` must be among \['train'\], got test"):
        load_histories(str(tmp_path / "folder" / "histories.parquet"), "test")
    with pytest.raises(ValueError, match="A CSV file has no lists"):
        load_histories(str(tmp_path / "histories.csv"))


@pytest.mark.parametrize("name", ["histories.parquet", "histories.jsonl", "folder", "saved"])
def test_histories_are_known_by_their_content(model, tokenizer, tmp_path, name):
    def write(dataset, path):
        path.parent.mkdir(exist_ok=True)
        if name == "saved":
            dataset.save_to_disk(path)
        elif name == "histories.jsonl":
            dataset.to_json(path)
        else:
            file = path / "part.parquet" if name == "folder" else path
            file.parent.mkdir(exist_ok=True)
            # As Spark might write it: other row groups, other types.
            pq.write_table(dataset.with_format("arrow")[:], file, row_group_size=1 + len(file.parts) % 3)

    first = histories().remove_columns("target")
    write(first, path := tmp_path / "a" / name)
    settings = RecommendSettings(**OPTIONS)
    lists = recommend_dataset(model, tokenizer, load_histories(str(path)), tmp_path / "out", settings)
    file = path / "part.parquet" if name == "folder" else path
    times = file.stat()
    other = tmp_path / "elsewhere" / "b" / name
    other.parent.parent.mkdir()
    write(first.select([*range(11)]), other)
    recommend_dataset(model, tokenizer, load_histories(str(other)), lists, settings)
    if name == "saved":
        return
    os.utime(file)
    recommend_dataset(model, tokenizer, load_histories(str(path)), lists, settings)
    swapped = changed(first, {0: {"items": first[0]["items"][::-1]}})
    write(swapped, path)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load_histories(str(path)).to_list() == swapped.to_list(), "not the earlier rows of the cache"
    with pytest.raises(ValueError, match=r"other values of \['histories'\]"):
        recommend_dataset(model, tokenizer, load_histories(str(path)), lists, settings)


@pytest.mark.parametrize("source", ["/nope/a.parquet", "nope.parquet", "runs/nope", "./nope", "a/b/c.jsonl", "nope"])
def test_a_missing_path_is_reported_as_missing(model, tokenizer, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"`histories` must be an existing path.*{source}.*does not exist"):
        load_histories(source)
    histories().to_parquet("histories.parquet")
    with pytest.raises(ValueError, match="`checkpoint` must be"):
        main(RecommendArguments(source, "histories.parquet", "out"), RecommendSettings())
    Path("file").touch()
    with pytest.raises(ValueError, match="`output_dir` must be a folder that can be written, got file/out"):
        recommend_dataset(model, tokenizer, histories(), "file/out", RecommendSettings(**OPTIONS))


@pytest.mark.parametrize(
    ("name", "content"),
    [("none.parquet", None), ("bad.parquet", "no table"), ("bad.jsonl", '{"user_id":'), ("empty.jsonl", "")],
)
def test_files_without_rows_are_rejected_by_name(tmp_path, name, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    if content is None:
        histories().select([]).to_parquet(folder / name)
    else:
        (folder / name).write_text(content)
    for source in (folder / name, folder):
        with pytest.raises(ValueError, match=f"`histories` must be tables with rows, got {source}, which cannot"):
            load_histories(str(source))


def test_two_processes_equal_one_from_the_command_line(model, tokenizer, tmp_path):
    RecommendationPipeline(model=model, tokenizer=tokenizer).save_pretrained(tmp_path / "checkpoint")
    dataset = histories()
    dataset.to_parquet(tmp_path / "histories.parquet")
    command = [
        f"--checkpoint={tmp_path / 'checkpoint'}",
        f"--histories={tmp_path / 'histories.parquet'}",
        "--num_beams=8",
    ]
    command += ["--num_return_sequences=5", "--batch_size=2", "--shard_size=3"]
    parser = HfArgumentParser([RecommendArguments, RecommendSettings])
    main(*parser.parse_args_into_dataclasses([*command, f"--output_dir={tmp_path / 'one'}"]))
    assert_same(tmp_path / "one", recommend_one_by_one(model, tokenizer, dataset))

    # The second file is there; two processes make the others.
    (tmp_path / "two").mkdir()
    for name in (".recommend.json", "part-00001-of-00004.parquet"):
        (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "-m", "recipes.recommend", *command, f"--output_dir={tmp_path / 'two'}"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 of 4 files were made before") == 1
    totals = set(re.findall(r"recommending:.*?(\d+)/(\d+) \[", done.stderr))
    assert {total for _, total in totals} == {"5"}, (
        "only the main process shows progress, for the first and the last file"
    )
    assert_same(tmp_path / "two", recommend_one_by_one(model, tokenizer, dataset))
