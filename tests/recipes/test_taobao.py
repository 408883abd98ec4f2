"""recipes.taobao: synthetic tables in the schema of TAOBAO-MM become training rows and trained models."""

import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import short_id
from transformers import pipeline

from modeling_unigrf import UniGRFForCausalLM
from recipes.common.profiling import PeakMemory
from recipes.papers.taobao import items as taobao_items
from recipes.papers.taobao import report as taobao_report
from recipes.papers.taobao import scaling as taobao_scaling
from recipes.papers.taobao import train as taobao_train
from recipes.papers.taobao.clicks import check_rows, check_users, last_distinct, write_clicks
from recipes.papers.taobao.items import fit, make_unique, write_items
from recipes.papers.taobao.prepare import TaobaoArguments, prepare
from recipes.papers.taobao.scaling import FULL, MEASURES, UNITS, extrapolate
from recipes.papers.taobao.synthetic import SyntheticArguments, main
from recipes.papers.taobao.tables import new_array, read_batches, stream_rows, table_shards
from recipes.training.collator import TrainingCollator
from tokenization import ResidualKMeans, SemanticIdTokenizer

EMBEDDINGS = "scl_embedding_int8_p90"
MAX_ITEMS = 4
MAX_LONG_ITEMS = 9


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    return main(SyntheticArguments(str(folder), num_items=400, num_users=150, num_clusters=8, max_history=40))


@pytest.fixture(scope="module")
def arguments(tables, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    return TaobaoArguments(str(tables), str(out), codebook_sizes=[8, 8, 8], points_per_code=16, tokenizer=True)


@pytest.fixture(scope="module")
def prepared(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taobao_items, "CHUNK", 150)
        return prepare(arguments)


def rows_of(arguments, prepared, split):
    sizes = prepared["suffixes"]["codebook_sizes"]
    return stream_rows(arguments.tables, arguments.output_dir, split, sizes, MAX_ITEMS, MAX_LONG_ITEMS)


def change(folder, tmp_path, table, edit):
    """Copy the tables and edit one of them as a data frame."""
    copy = shutil.copytree(folder, tmp_path / f"tables with other {table}")
    file = copy / f"{table}.parquet"
    schema = pq.read_schema(file)
    frame = edit(pd.read_parquet(file))
    columns = pa.schema([field for field in schema if field.name in frame])
    pq.write_table(pa.Table.from_pandas(frame, columns, preserve_index=False), file)
    return copy


def test_the_maps_hold_each_item_once_ordered_by_id(tables, arguments, prepared, tmp_path):
    table = pd.read_parquet(tables / f"{EMBEDDINGS}.parquet")
    assert len(table) == 401 and prepared["items"]["repeated_keys"] == 1
    first = {}
    for item, embedding in zip(table["205"], table["205_c"], strict=True):
        first.setdefault(item, embedding)
    ids = np.load(f"{arguments.output_dir}/item_ids.npy", mmap_mode="r")
    embeddings = np.load(f"{arguments.output_dir}/content_embeddings.npy", mmap_mode="r")
    assert ids.tolist() == sorted(first) and embeddings.dtype == np.int8
    assert np.array_equal(embeddings, np.stack([first[item] for item in ids]))
    renamed = pq.read_table(tables / f"{EMBEDDINGS}.parquet").rename_columns({"205_c": EMBEDDINGS})
    copy = shutil.copytree(tables, tmp_path / "renamed")
    pq.write_table(renamed, copy / f"{EMBEDDINGS}.parquet")
    with pytest.raises(ValueError, match="must have a column 205_c"):
        write_items(copy, tmp_path)
    write_items(copy, tmp_path, EMBEDDINGS)
    assert np.array_equal(np.load(tmp_path / "content_embeddings.npy"), embeddings)


def test_codebooks_of_a_sample_encode_all_items_in_chunks(arguments, prepared):
    out = Path(arguments.output_dir)
    codes = np.load(out / "item_codes.npy")
    quantizer = ResidualKMeans.load(out)
    assert prepared["codebooks"]["points"] == 16 * 8 < len(codes)
    embeddings = np.load(out / "content_embeddings.npy").astype("float32") / 127
    assert np.array_equal(codes[:, :-1], quantizer.encode(embeddings)) and len(np.unique(codes, axis=0)) == len(codes)


def test_long_stages_show_progress(arguments, prepared, tmp_path, capsys):
    out = shutil.copytree(arguments.output_dir, tmp_path / "prepared")
    fit(out, [8, 4, 8], points_per_code=16, num_iterations=5, seed=3)
    rows = np.sort(np.random.default_rng(3).choice(400, 128, replace=False, shuffle=False))
    embeddings = np.load(out / "content_embeddings.npy")[rows].astype("float32") / 127
    whole = ResidualKMeans([8, 4, 8], num_iterations=5, max_points_per_centroid=16, seed=3).fit(embeddings)
    assert all(map(np.array_equal, whole.codebooks, ResidualKMeans.load(out).codebooks))
    users = check_rows(arguments.tables, out, "train")["users"]
    bars = capsys.readouterr().err
    assert "| 3/3 [" in bars and f"| {users}/{users} [" in bars


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_equal_a_slow_join_of_the_tables(tables, arguments, prepared, split):
    ids = np.load(f"{arguments.output_dir}/item_ids.npy").tolist()
    codes = np.load(f"{arguments.output_dir}/item_codes.npy")
    sizes = prepared["suffixes"]["codebook_sizes"]
    samples = pd.read_parquet(tables / f"{split}_samples.parquet")
    expected = []
    unknown = 0
    padding = 0
    for user in pd.read_parquet(tables / f"{split}_user_features.parquet").to_dict("records"):
        clicks = [
            ids.index(item)
            for label, of, item in zip(samples["label_0"], samples["129_1"], samples["205"], strict=True)
            if of == user["129_1"] and list(label) == [0, 1]
        ]
        history = [ids.index(item) for item in user["150_2_180"] if item in ids]
        padding += (user["150_2_180"] == 0).sum()
        unknown += sum(item != 0 and item not in ids for item in user["150_2_180"]) if clicks else 0
        for click in clicks if history else ():
            tokens = [1]
            for item in [*history[-MAX_ITEMS:], click]:
                tokens += [5 + sum(sizes[:level]) + code for level, code in enumerate(codes[item])] + [4]
            expected.append((tokens, [-100, *tokens[1:]], [1] * len(tokens), history[-MAX_LONG_ITEMS:]))
    actual = [
        tuple(row[name].tolist() for name in ("input_ids", "labels", "attention_mask", "long_items"))
        for row in rows_of(arguments, prepared, split)
    ]
    assert actual == expected and unknown > 0 and len(expected) > 20
    assert prepared[f"{split} rows"]["unknown_items"] == unknown and prepared[f"{split} rows"]["rows"] == len(expected)
    assert split == "test" or padding > 0


def test_the_tokenizer_decodes_the_rows(tables, arguments, prepared):
    tokenizer = SemanticIdTokenizer.from_pretrained(f"{arguments.output_dir}/tokenizer")
    assert list(tokenizer.codebook_sizes) == prepared["suffixes"]["codebook_sizes"]
    ids = np.load(f"{arguments.output_dir}/item_ids.npy")
    for row in rows_of(arguments, prepared, "test"):
        items = tokenizer.decode_items(row["input_ids"])
        assert tokenizer.encode_history(items)["input_ids"] == row["input_ids"].tolist()
        assert items[:-1] == [str(ids[item]) for item in row["long_items"][-len(items) + 1 :]]


def test_every_row_comes_once_when_shuffled_or_sharded(tables, arguments, prepared, tmp_path):
    def sorted_tokens(rows):
        return sorted(row["input_ids"].tolist() for row in rows)

    table = pq.read_table(tables / "train_user_features.parquet")
    copy = shutil.copytree(tables, tmp_path / "tables")
    pq.write_table(table.slice(0, 50), copy / "train_user_features.parquet", row_group_size=20)
    pq.write_table(table.slice(50), copy / "train_user_features-2.parquet")
    everything = rows_of(arguments, prepared, "train")
    split = rows_of(replace(arguments, tables=str(copy)), prepared, "train")
    assert split.num_shards == 4
    parts = [split.shard(2, index) for index in range(2)]
    assert sorted_tokens(everything) == sorted_tokens(split) == sorted_tokens([row for part in parts for row in part])
    assert sorted_tokens(everything) == sorted_tokens(everything.shuffle(seed=1, buffer_size=7))


def test_a_second_run_reads_only_changed_tables(arguments, prepared, tmp_path, capsys):
    copy = shutil.copytree(arguments.tables, tmp_path / "tables")
    out = tmp_path / "prepared"
    shutil.copytree(arguments.output_dir, out)
    times = {file: file.stat().st_mtime_ns for file in out.glob("*.npy")}
    again = replace(arguments, tables=str(copy), output_dir=str(out))
    assert prepare(again) == prepared
    lines = [line for line in capsys.readouterr().out.splitlines() if "private_mb" in line]
    assert len(lines) == len(prepared), "the memory of each stage is printed"
    assert times == {file: file.stat().st_mtime_ns for file in out.glob("*.npy")}
    with pytest.raises(ValueError, match=r"must have files .*parquet, .*typo"):
        prepare(replace(again, tables=str(tmp_path / "typo")))
    assert prepare(again) == prepared, "finished stages stay"
    (out / "test_click_items.npy").unlink()
    prepare(again)
    assert (out / "test_click_items.npy").is_file(), "a missing file is made again"
    times = {file: file.stat().st_mtime_ns for file in out.glob("*.npy")}
    (copy / "test_samples.parquet").touch()
    prepare(again)
    changed = {file.name for file in times if file.stat().st_mtime_ns != times[file]}
    assert changed == {"test_click_users.npy", "test_click_items.npy"}


def test_an_array_replaces_another_only_when_whole(tmp_path, monkeypatch):
    file = tmp_path / "items.npy"
    with new_array(file, np.int32, (0,)):
        pass
    assert np.load(file, mmap_mode="r").shape == (0,)
    np.save(file, np.arange(3))
    before = np.load(file, mmap_mode="r")
    with pytest.raises(ZeroDivisionError), new_array(file, np.int64, (4,)) as array:
        array[:] = 1 / 0
    with new_array(file, np.int64, (4,)) as array:
        array[:] = 7
        assert np.load(file).tolist() == [0, 1, 2]
    assert np.load(file).tolist() == [7] * 4 and before.tolist() == [0, 1, 2]

    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"), new_array(file, np.int64, (5,)):
        pytest.fail("the disk is full")
    assert np.load(file).tolist() == [7] * 4 and list(tmp_path.iterdir()) == [file]


def test_a_row_group_is_not_read_into_memory_whole(tmp_path):
    values = np.random.default_rng(0).integers(1, 2**60, 20_000 * 100)
    lists = pa.ListArray.from_arrays(pa.array(np.arange(20_001, dtype=np.int32) * 100), pa.array(values))
    pq.write_table(pa.table({"150_2_180": lists}), tmp_path / "users.parquet")
    shards, rows = table_shards(tmp_path, "users", ["150_2_180"])
    assert len(shards) == 1 and rows == 20_000
    before = pa.total_allocated_bytes()
    most = 0
    for _ in read_batches(shards, ["150_2_180"], 256):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < values.nbytes / 3


def test_the_five_last_distinct_items_are_the_recency_baseline():
    assert last_distinct(np.array([9, 1, 2, 3, 3, 2, 4, 5, 5])) == [5, 4, 2, 3, 1]


def truncated(tables, tmp_path, table):
    copy = shutil.copytree(tables, tmp_path / "tables")
    file = copy / f"{table}.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    return copy


def nulled(column):
    return lambda frame: frame.assign(**{column: [None, *frame[column][1:]]})


@pytest.mark.parametrize(
    ("table", "edit", "message"),
    [
        (EMBEDDINGS, None, "must be a complete Parquet file"),
        ("test_user_features", None, "must be a complete Parquet file"),
        (EMBEDDINGS, lambda frame: frame.drop(columns="205_c"), "must have a column 205_c of list<.*int8>"),
        (EMBEDDINGS, lambda frame: frame.assign(**{"205_c": [row[:64] for row in frame["205_c"]]}), "lists of 128"),
        ("train_samples", nulled("label_0"), "`label_0` must have a value in every row, got 1 empty"),
        ("train_samples", lambda frame: frame.assign(label_0=[[1, 1]] * len(frame)), r"or \[1, 0\].*got \[1, 1\]"),
        ("train_user_features", nulled("150_2_180"), "`150_2_180` must have a value in every row"),
        ("train_user_features", lambda frame: frame[:3], "clicks, got .* of users without a row"),
        ("test_user_features", lambda frame: pd.concat([frame, frame[:1]]), "one row per user"),
    ],
    ids=short_id,
)
def test_invalid_taobao_tables_are_rejected(tables, arguments, prepared, tmp_path, table, edit, message):
    copy = truncated(tables, tmp_path, table) if edit is None else change(tables, tmp_path, table, edit)
    out = shutil.copytree(arguments.output_dir, tmp_path / "prepared")
    with pytest.raises(ValueError, match=message):
        prepare(replace(arguments, tables=str(copy), output_dir=str(out)))


def test_rows_that_cannot_be_joined_are_counted_or_rejected(tables, arguments, prepared, tmp_path, capsys):
    def stranger(frame):  # a click on an item without an embedding
        clicked = [list(label) == [0, 1] for label in frame["label_0"]]
        frame.loc[clicked.index(True), "205"] = 12345
        return frame

    def padded(frame):  # clicks of users without a history
        return frame.assign(**{"150_2_180": [np.zeros(3, np.int64)] * len(frame)})

    copy = change(tables, tmp_path, "test_samples", stranger)
    copy = change(copy, tmp_path, "test_user_features", padded)
    out = shutil.copytree(arguments.output_dir, tmp_path / "prepared")
    counts = write_clicks(copy, out, "test")
    assert (
        counts["clicks_on_unknown_items"] == 1 and "1 of them on items without an embedding" in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match=f"got none: .*'rows_without_history': {counts['clicks'] - 1}"):
        check_rows(copy, out, "test")
    np.save(out / "test_click_users.npy", np.array([7, 7, 8]))
    assert check_users(copy, out, "test", "skip")["clicks_of_unknown_users"] == 3
    with pytest.raises(ValueError, match="items that share their codes"):
        make_unique(out, last_level_size=1)
    with pytest.raises(ValueError, match=r"must have files scl_embedding_int8_p90\*.parquet"):
        write_items(tmp_path, out)


def run_training(arguments, output_dir, *extra):
    options = [
        f"--tables={arguments.tables}",
        f"--data_dir={arguments.output_dir}",
        f"--output_dir={output_dir}",
        "--embedding_table_size=64",
        "--max_steps=40",
        "--learning_rate=5e-3",
        "--logging_steps=5",
        "--save_steps=30",
        "--shuffle_rows=20",
        "--disable_tqdm=True",
        *extra,
    ]
    return taobao_train.train(*taobao_train.parse(options))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--num_beams=4", "`num_beams` must be 5 or more.* got 4"),
        ("--eval_rows=0", "`eval_rows` must be 1 or more, got 0"),
        ("--resume_from_checkpoint=x", "`resume_from_checkpoint` must be None, got 'x'"),
        ("--max_long_items=7", "`max_long_items` must come with num_retrieved_items"),
        ("--init_from=/nope", "`embedding_table_size` must come with a new model"),
        (
            "--num_train_epochs=3",
            r"`num_train_epochs` must be 0.* {rows} rows, 8 per step: pass --max_steps {steps} ",
        ),
    ],
    ids=short_id,
)
def test_invalid_options_are_rejected_before_training(arguments, prepared, tmp_path, option, message):
    rows = prepared["train rows"]["rows"]
    with pytest.raises(ValueError, match=message.format(rows=rows, steps=math.ceil(3 * rows / 8))):
        run_training(arguments, tmp_path / "training", option)
    assert not (tmp_path / "training").exists()


def test_a_tokenizer_of_other_codes_is_rejected(arguments, prepared, tmp_path):
    out = shutil.copytree(arguments.output_dir, tmp_path / "prepared")
    again = replace(arguments, output_dir=str(out), seed=1, tokenizer=False)
    mapped = np.load(out / "item_codes.npy", mmap_mode="r")
    prepare(again)
    codes = np.load(out / "item_codes.npy")
    assert np.array_equal(mapped, np.load(f"{arguments.output_dir}/item_codes.npy")), (
        "a running training keeps its map"
    )
    assert not np.array_equal(mapped, codes)
    assert not (out / "tokenizer").exists(), "a tokenizer of old codes is removed"
    shutil.copytree(Path(arguments.output_dir, "tokenizer"), out / "tokenizer")
    assert taobao_train.item_map(out, codes) is None, "no stage wrote it"
    prepare(replace(again, tokenizer=True))
    assert taobao_train.item_map(out, codes) == out / "tokenizer"
    shutil.copytree(Path(arguments.output_dir, "tokenizer"), out / "tokenizer", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="must have a tokenizer of the 400 items and their codes"):
        run_training(again, tmp_path / "training")
    assert not list(tmp_path.glob("training/checkpoint*"))


def test_training_on_the_stream_is_reused_or_resumed(arguments, prepared, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(arguments.output_dir, tmp_path / "prepared")

    def run(*options):
        return run_training(
            replace(arguments, output_dir=str(folder)), tmp_path / "training", "--save_total_limit=2", *options
        )

    with monkeypatch.context() as patch:
        patch.setattr(taobao_train, "evaluate", lambda *unused: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()
    weights = (tmp_path / "training/checkpoint/model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(taobao_train, "fit", None)  # the finished training is only evaluated
        log = run()
    losses = [entry["loss"] for entry in log["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    rows = [row for row in log["evaluation"] if row.startswith("recency")]
    assert len(rows) == 3 and log["evaluation"]["recency_recall@5_explore"] == 0
    assert run() == json.loads(json.dumps(log)), "a finished training is reused"
    with pytest.raises(ValueError, match="other values of"):
        run("--seed=1")
    stages = json.loads((folder / "stages.json").read_text())
    other = stages | {"codebooks": {"arguments": stages["codebooks"]["arguments"] | {"seed": 1}}}
    (folder / "stages.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"other values of \['stages.codebooks.seed'\]"):
        run()
    slower = {name: stage | {"seconds": 1e6} for name, stage in stages.items()}
    (folder / "stages.json").write_text(json.dumps(slower))
    (tmp_path / "training/training_log.json").unlink()
    shutil.rmtree(tmp_path / "training/checkpoint-40")

    def evaluated(*unused, evaluate=taobao_train.evaluate):
        written = re.findall(
            r"/content_embeddings.npy\n(?:\w+: .*\n)*?Anonymous: +(\d+)", Path("/proc/self/smaps").read_text()
        )
        assert set(written) <= {"0"}, "the embeddings stay mapped"
        return evaluate(*unused)

    monkeypatch.setattr(taobao_train, "evaluate", evaluated)
    again = run()
    assert "checkpoint-30: the 240 rows before it are read again" in capsys.readouterr().out
    assert (tmp_path / "training/checkpoint/model.safetensors").read_bytes() == weights, "resumed = uninterrupted"
    assert again["evaluation"] == log["evaluation"]


def test_stage_two_reads_long_histories_of_the_same_items(arguments, prepared, tmp_path):
    run_training(arguments, tmp_path / "one", "--eval_rows=8")
    # The checkpoint fixes the size of its table.
    second = (f"--init_from={tmp_path / 'one/checkpoint'}", "--embedding_table_size=65536")
    second += ("--num_train_beams=4", "--num_retrieved_items=3")
    second += ("--max_long_items=20", "--eval_rows=40")
    second += ('--config_fields={"inject_target": false}',)
    log = run_training(arguments, tmp_path / "two", *second)
    recommender = pipeline("recommendation", model=str(tmp_path / "two/checkpoint"), trust_remote_code=True)
    assert (
        recommender.model.config.training_config.inject_target is False
        and not recommender.model.generation_config.exclude_history
    )
    ids = recommender.tokenizer.item_ids[:3]
    assert {item["item_id"] for item in recommender(ids, num_return_sequences=20, num_beams=20)} & set(ids), (
        "history items are recommended"
    )
    assert all("dense_loss" in entry for entry in log["log_history"] if "loss" in entry)
    losses = [entry["ranking_loss"] for entry in log["log_history"] if "ranking_loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert log["evaluation"]["rows"] == 40 and log["cpu_seconds"]["evaluation"] > 0
    model = UniGRFForCausalLM.from_pretrained(tmp_path / "two/checkpoint").eval()
    before = UniGRFForCausalLM.from_pretrained(tmp_path / "one/checkpoint").eval()
    embeddings = torch.from_numpy(np.load(f"{arguments.output_dir}/content_embeddings.npy"))
    assert torch.equal(model.catalog.content_embeddings, embeddings) and model.config.next_logit_bias == 0
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert model.lm_head.weight.shape == before.lm_head.weight.shape
    row = next(iter(rows_of(arguments, prepared, "test")))
    request = {"input_ids": torch.from_numpy(row["input_ids"])[None, :-5], "candidates": torch.arange(4)[None]}
    longer = torch.from_numpy(row["long_items"]).long()[None]
    scores = [model.rank(**request, long_history={"items": longer[:, -length:]}) for length in (9, 1)]
    assert not torch.equal(*scores), "the long history is read"
    before.catalog.item_codes = before.catalog.item_codes.flip(0)
    before.save_pretrained(tmp_path / "others")
    with pytest.raises(ValueError, match=r"must be a checkpoint of the 400 items .*or other codes"):
        run_training(arguments, tmp_path / "three", *second[1:], f"--init_from={tmp_path / 'others'}")


def test_rows_of_different_lengths_are_padded_on_the_left():
    rows = [{"input_ids": np.arange(n), "labels": np.arange(n), "long_items": np.arange(3 - n)} for n in (1, 2)]
    batch = TrainingCollator()(rows)
    assert torch.equal(batch["input_ids"], torch.tensor([[0, 0], [0, 1]]))
    assert batch["labels"].tolist() == [[-100, 0], [0, 1]]
    assert batch["long_history"]["items"].tolist() == [[0, 1], [0, -1]]


def test_a_linear_cost_is_extrapolated_exactly():
    def measured(items, users, samples):
        count = {"items": items, "users": users, "samples": samples}
        stages = {name: dict.fromkeys(MEASURES, 5 + 3 * count[unit]) | count for name, unit in UNITS.items()}
        return stages | {"codebooks": dict.fromkeys(MEASURES, 2) | {"points": 1024, "num_iterations": 10}}

    slopes, full = extrapolate(measured(10, 4, 7), measured(30, 5, 9))
    assert all(slope["seconds"] == 3 for slope in slopes.values())
    assert full["items"]["private_mb"] == 5 + 3 * FULL["items"] and full["rows"]["seconds"] == 5 + 3 * FULL["users"]
    assert full["codebooks"]["seconds"] == 2 * 1024 * 2, "1,024 points a code and 20 iterations"


def test_memory_at_full_size_includes_codes_and_trie():
    results = json.loads(Path(taobao_report.__file__).with_name("results").joinpath("taobao.json").read_text())
    additional_mb = 34_400_000 * 32 / 2**20  # beyond the runs of 1M items
    results["training at full size"]["stage II"]["private_mb"] = 5000  # extrapolated
    assert f" {(603 + additional_mb) / 1024:.1f} GB private, " in (text := taobao_report.table(results))
    assert " 4.9 GB private. " in text and "arithmetic" in text


@pytest.mark.filterwarnings("ignore:COLLAPSED CODEBOOK")  # of synthetic items
def test_two_runs_extrapolate_to_the_full_size(arguments, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(taobao_scaling, "FULL", {"items": 4000, "users": 1500, "samples": 9000})
    tables = SyntheticArguments(str(tmp_path / "tables"), num_items=200, num_users=80, num_clusters=8, max_history=40)
    smaller = TaobaoArguments(
        str(main(tables)), str(tmp_path / "small"), codebook_sizes=[8, 8, 8], num_iterations=10, tokenizer=True
    )
    prepare(smaller)
    larger = replace(arguments, output_dir=str(shutil.copytree(arguments.output_dir, tmp_path / "large")))
    for run in (smaller, larger):
        steps = ("--max_steps=4", "--logging_steps=2", "--eval_rows=4")
        run_training(run, f"{run.output_dir}/training", *steps)
        second = (
            "--num_train_beams=4",
            "--num_retrieved_items=3",
            "--embedding_table_size=65536",
            f"--init_from={run.output_dir}/training/checkpoint",
        )
        run_training(run, f"{run.output_dir}/second", *steps, *second)
    file = tmp_path / "taobao.json"
    note = "Beside other work."
    result = taobao_scaling.main(
        taobao_scaling.ScalingArguments([smaller.output_dir, larger.output_dir], str(file), note)
    )
    assert json.loads(file.read_text()) == result
    names = [run["what"] for run in result["training"]]
    assert names == [f"{stage}, {count} items" for stage in ("stage I", "stage II") for count in (200, 400)]
    assert [run["rows"] for run in result["training"]] == [32] * 4
    rows, samples = (
        sum(prepared[f"{split} {stage}"][name] for split in ("train", "test"))
        for stage, name in (("rows", "rows"), ("clicks", "samples"))
    )
    assert result["training at full size"]["stage II"]["rows"] == round(9000 * rows / samples)
    text = capsys.readouterr().out
    assert "\n| codes | " in text and "\n| stage II, 400 items | " in text and note in text


def test_peak_memory_counts_what_was_held_in_between():
    with PeakMemory() as before:
        pass
    with PeakMemory() as peak:
        held = np.ones(8 << 20)
        torch.tensor(held.sum()).item()
        del held
    assert peak.private > before.private + (50 << 20) and peak.resident >= peak.private
    assert peak.added > 50 << 20 > before.added
