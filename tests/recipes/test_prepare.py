"""recipes.prepare: tables in, prepared data out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from helpers import short_id
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

from recipes.data import text_encoders as embeddings_module
from recipes.data.movielens import ML_100K_GENRES, clean_titles, movielens_1m, movielens_100k
from recipes.data.tables import read_interactions, read_table
from recipes.data.text_encoders import encode_texts, texts_of
from recipes.prepare import PrepareArguments, prepare
from tokenization import SemanticIdTokenizer

ITEM_IDS = [f"{number:03d}" for number in range(12)]  # as numbers they would lose their zeros
# User b has two interactions at time 5, user c has too few.
INTERACTIONS = [
    ("b", "003", 5, "like"),
    ("a", "001", 40, "like"),
    ("b", "002", 5, "skip"),
    ("a", "000", 10, "like"),
    ("c", "009", 1, "like"),
    ("a", "002", 30, "skip"),
    ("b", "001", 1, "like"),
    ("a", "003", 20, "skip"),
    ("c", "009", 2, "like"),
]


def interactions_table() -> pd.DataFrame:
    return pd.DataFrame(INTERACTIONS, columns=["user_id", "item_id", "timestamp", "behavior"])


def items_table() -> pd.DataFrame:
    titles = [f"Film {number}" for number in range(len(ITEM_IDS))]
    return pd.DataFrame({"item_id": ITEM_IDS, "title": titles, "text": [f"{title} drama" for title in titles]})


@pytest.fixture
def arguments(tmp_path):
    """Writes tables and returns arguments; keyword arguments replace tables or options."""

    def build(interactions=None, items=None, embeddings=None, suffix=".csv", **options) -> PrepareArguments:
        tables = {
            "interactions": interactions_table() if interactions is None else interactions,
            "items": items_table() if items is None else items,
        }
        paths = {}
        for name, table in tables.items():
            paths[name] = str(tmp_path / f"{name}{suffix}")
            if suffix == ".parquet":
                table.to_parquet(paths[name])
            else:
                table.to_csv(paths[name], index=False, sep="\t" if suffix == ".tsv" else ",")
        if embeddings is not None:
            np.save(tmp_path / "rows.npy", embeddings)
            paths["embeddings"] = str(tmp_path / "rows.npy")
        return PrepareArguments(**paths, output_dir=str(tmp_path / "data"), **{"codebook_sizes": [4, 4], **options})

    return build


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(len(ITEM_IDS), 8)).astype(np.float32)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """The folder of a tiny random BERT with its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "Film", "drama", *map(str, range(12))]
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def test_users_are_split_by_time_with_ties_in_file_order(arguments, embeddings):
    splits = load_from_disk(str(prepare(arguments(embeddings=embeddings)) / "dataset"))
    like = 0
    skip = 1
    assert splits["train"].to_list() == [
        {"user_id": "b", "items": [1], "behaviors": [like], "timestamps": [1]},
        {"user_id": "a", "items": [0, 3], "behaviors": [like, skip], "timestamps": [10, 20]},
    ]
    names = ("target", "target_behavior", "target_timestamp", "items", "timestamps")
    targets = [tuple(row[name] for name in names) for row in splits["validation"]]
    assert targets == [(3, like, 5, [1], [1]), (2, skip, 30, [0, 3], [10, 20])]
    targets = [tuple(row[name] for name in names) for row in splits["test"]]
    assert targets == [(2, skip, 5, [1, 3], [1, 5]), (1, like, 40, [0, 3, 2], [10, 20, 30])]


def test_positions_order_interactions_with_unknown_times(arguments, embeddings):
    positions = [2, 4, 3, 1, 1, 3, 1, 2, 2]
    table = interactions_table().assign(position=positions)
    table["timestamp"] = [-1, 40, 5, 10, -1, -1, 1, -1, -1]
    args = arguments(table, embeddings=embeddings)
    folder = prepare(args)
    (first, other) = load_from_disk(str(folder / "dataset"))["test"].to_list()
    assert (first["items"], first["timestamps"], first["target"], first["target_timestamp"]) == ([1, 3], [1, -1], 2, 5)
    assert (other["items"], other["timestamps"], other["target_timestamp"]) == ([0, 3, 2], [10, -1, -1], 40)
    assert json.loads((folder / "prepare.json").read_text())["counts"]["interactions_of_tied_time"] == 0
    without = load_from_disk(
        str(prepare(arguments(table.drop(columns="timestamp"), embeddings=embeddings)) / "dataset")
    )["test"]
    assert [user["items"] for user in without] == [first["items"], other["items"]] and without[0]["timestamps"] == [
        -1,
        -1,
    ]
    with pytest.raises(ValueError, match=r"a number as position in every row.*row 2 \('last'\)"):
        prepare(arguments(changed(table, 2, "position", "last"), embeddings=embeddings))


def test_the_folder_holds_the_catalog_and_reports_drops(arguments, embeddings, capsys):
    folder = prepare(arguments(embeddings=embeddings))
    tokenizer = SemanticIdTokenizer.from_pretrained(folder / "tokenizer")
    assert list(tokenizer.item_ids) == ITEM_IDS
    assert list(tokenizer.behaviors) == ["like", "skip"]
    np.testing.assert_array_equal(load_file(folder / "item_embeddings.safetensors")["embeddings"], embeddings)
    record = json.loads((folder / "prepare.json").read_text())
    expected = {"users": 2, "interactions": 7, "dropped_users": 1, "catalog": 12, "interactions_of_tied_time": 2}
    assert expected.items() <= record["counts"].items()
    assert "dropped 1 users with fewer than 3 interactions" in capsys.readouterr().out


def test_popularity_counts_training_interactions_only(arguments):
    # All items collide, so the collision token is the rank by popularity, with ties in table order.
    # Items 0, 1 and 3 are in training once. Item 2 is a target twice, and in training never.
    folder = prepare(arguments(embeddings=np.ones((len(ITEM_IDS), 8), np.float32)))
    suffixes = np.asarray(SemanticIdTokenizer.from_pretrained(folder / "tokenizer").item_codes)[:, -1]
    assert suffixes[:4].tolist() == [0, 1, 3, 2]


def test_csv_tsv_and_parquet_give_the_same_dataset(arguments, embeddings):
    dates = interactions_table()
    dates["timestamp"] = pd.to_datetime(dates["timestamp"], unit="s")
    with_column = items_table().assign(embedding=list(embeddings))
    datasets = []
    for tables in (
        {"embeddings": embeddings},
        {"embeddings": embeddings, "suffix": ".tsv"},
        {"embeddings": embeddings, "interactions": dates},
        {"items": with_column, "interactions": dates, "suffix": ".parquet"},
    ):
        args = arguments(**tables)
        shutil.rmtree(args.output_dir, ignore_errors=True)
        splits = load_from_disk(str(prepare(args) / "dataset"))
        datasets.append({name: split.to_list() for name, split in splits.items()})
    assert all(splits == datasets[0] for splits in datasets)


def test_a_second_run_reuses_what_is_unchanged(arguments, encoder, monkeypatch, tmp_path):
    args = arguments(encoder=encoder)
    written = (prepare(args) / "prepare.json").stat().st_mtime_ns

    def encode_again(*args, **kwargs):
        raise AssertionError("the texts were encoded again")

    monkeypatch.setattr(embeddings_module, "encode_texts", encode_again)
    assert (prepare(args) / "prepare.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="min_interactions"):
        prepare(replace(args, min_interactions=2))
    assert (prepare(args) / "prepare.json").stat().st_mtime_ns == written, "a rejected call changes nothing"
    for part in ("dataset", "tokenizer"):
        shutil.rmtree(Path(args.output_dir) / part)
        assert (prepare(args) / part).is_dir(), "a part that is gone is made again, from the stored embeddings"
    next(Path(args.output_dir).glob("dataset/train/*.arrow")).write_bytes(b"cut")
    assert len(load_from_disk(str(prepare(args) / "dataset"))["train"]), "a damaged file is made again"
    args.codebook_sizes = [2, 2]
    assert json.loads((prepare(args) / "prepare.json").read_text())["arguments"]["codebook_sizes"] == [2, 2]
    with pytest.raises(AssertionError, match="encoded again"):
        prepare(arguments(items=items_table().assign(text="another"), encoder=encoder))
    other = shutil.copytree(encoder, tmp_path / "encoder")
    args = replace(arguments(encoder=str(other)), output_dir=str(tmp_path / "other"))
    monkeypatch.undo()
    prepare(args)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(embeddings_module, "encode_texts", encode_again)
    with pytest.raises(AssertionError, match="encoded again"):
        prepare(args)  # the encoder has the same name and other weights


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("item_embeddings.safetensors", "changed"),
        ("dataset/train/*.arrow", "changed"),
        ("tokenizer/semantic_ids.safetensors", "changed"),
        ("tokenizer/items.json", b"[]"),
        ("dataset/train/state.json", b"{}"),
        ("dataset/dataset_dict.json", None),
        ("prepare.json", b"{}"),
        ("prepare.json", b"[]"),
    ],
)
@pytest.mark.parametrize("has_hashes", [True, False])
def test_damage_of_the_same_size_is_repaired(arguments, embeddings, name, content, has_hashes, capsys):
    args = arguments(embeddings=embeddings)
    folder = prepare(args)
    (file,) = folder.glob(name)
    before = file.read_bytes()
    record = json.loads((folder / "prepare.json").read_text())
    if not has_hashes:
        (folder / "prepare.json").write_text(json.dumps({**record, "files": {}}))  # as 0.1 wrote it
        content = None if content == "changed" else content
    file.unlink()
    if content is not None:
        half = len(before) // 2
        file.write_bytes(before[:half] + bytes(64) + before[half + 64 :] if content == "changed" else content)
    prepare(args)
    assert "already prepared" not in capsys.readouterr().out
    if file.suffix != ".json":
        assert file.read_bytes() == before
    prepare(args)
    assert "already prepared" in capsys.readouterr().out


def test_an_existing_tokenizer_is_kept_and_extended(arguments, embeddings, tmp_path, capsys):
    old_rows = [row for row in range(12) if row not in (2, 7)]
    old_items = items_table().iloc[old_rows]
    interactions = interactions_table()
    interactions = interactions[interactions["item_id"].isin(old_items["item_id"])]
    first = prepare(
        replace(
            arguments(interactions, old_items, embeddings=embeddings[old_rows], min_interactions=3),
            output_dir=str(tmp_path / "first"),
        )
    )
    of_first = {"tokenizer": str(first / "tokenizer"), "codebook_sizes": [256, 256, 256]}
    before = SemanticIdTokenizer.from_pretrained(first / "tokenizer")
    order = np.random.default_rng(0).permutation(12)
    args = arguments(None, items_table().iloc[order], embeddings=embeddings[order], **of_first)
    folder = prepare(args)
    after = SemanticIdTokenizer.from_pretrained(folder / "tokenizer")
    assert after.item_ids[:10] == before.item_ids and set(after.item_ids[10:]) == {"002", "007"}
    np.testing.assert_array_equal(after.item_codes[:10], before.item_codes)
    assert after.titles == [f"Film {int(item)}" for item in after.item_ids]
    stored = load_file(folder / "item_embeddings.safetensors")["embeddings"]
    np.testing.assert_array_equal(stored, embeddings[[int(item) for item in after.item_ids]].astype(np.float32))
    user = load_from_disk(str(folder / "dataset"))["train"][0]
    expected = [row[1] for row in sorted(INTERACTIONS, key=lambda row: row[2]) if row[0] == user["user_id"]][:-2]
    assert [after.item_ids[item] for item in user["items"]] == expected
    renamed = items_table().assign(title=[None, "Film I", *(f"Film {number}" for number in range(2, 12))])
    again = prepare(arguments(None, renamed, embeddings=embeddings, **of_first))
    assert "1 of 10 items of the tokenizer have another title" in capsys.readouterr().out
    after = SemanticIdTokenizer.from_pretrained(again / "tokenizer")
    titles = dict(zip(after.item_ids, after.titles, strict=True))
    assert titles == {item: f"Film {int(item)}" for item in ITEM_IDS} | {"001": "Film I"}
    titled = SemanticIdTokenizer.from_pretrained(first / "tokenizer")
    titled.set_titles(["Another", *titled.titles[1:]])
    titled.save_pretrained(first / "tokenizer")
    prepare(arguments(None, renamed, embeddings=embeddings, **of_first))
    assert "already prepared" not in capsys.readouterr().out, "the tokenizer has another title"
    with pytest.raises(ValueError, match=r"1 missing, for instance \['003'\]"):
        some = items_table().drop(index=3)
        prepare(arguments(interactions_table().query("item_id != '003'"), some, **of_first))
    with pytest.raises(ValueError, match=r"without \['codebook_sizes', 'atomic'\]"):
        prepare(replace(args, atomic=True, codebook_sizes=[4, 4]))
    with pytest.raises(ValueError, match=r"behaviors among .*row 1 \('bought'\)"):
        prepare(
            replace(args, interactions=arguments(changed(interactions_table(), 1, "behavior", "bought")).interactions)
        )


def test_text_embeddings_are_unit_vectors_in_any_batch(encoder):
    texts = ["Film 1 drama", "drama", "Film Film Film 3 4 5", "2"]
    together = encode_texts(texts, encoder, dtype="float32")
    alone = np.concatenate([encode_texts([text], encoder, dtype="float32") for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_the_text_template_joins_columns(arguments, encoder):
    first = prepare(arguments(encoder=encoder, text_template="{title} drama"))
    templated = load_file(first / "item_embeddings.safetensors")["embeddings"].copy()
    plain = load_file(prepare(arguments(encoder=encoder)) / "item_embeddings.safetensors")["embeddings"]
    np.testing.assert_array_equal(templated, plain)
    with pytest.raises(ValueError, match=r"the columns \['item_id', 'title', 'text'\] without \['genres'\]"):
        prepare(arguments(encoder=encoder, text_template="{title}. {genres}"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{price:.2f}", r"a format for \['price'\]"),
        ("{title!r}", r"a format for \['title'\]"),
        ("{title", "expected '}'"),
        ("title}", "Single '}'"),
        ("{}", r"without \[''\]"),
        ("{title.x}", r"without \['title.x'\]"),
        ("text", "name columns"),
    ],
)
def test_templates_that_name_no_column_are_rejected(template, message):
    with pytest.raises(ValueError, match=rf"`text_template` must .*{message}"):
        texts_of(template, items_table().assign(price=1.5), "items.csv")


def test_templates_take_any_name_and_value(tmp_path):
    table = pd.DataFrame({"item_id": ["1", "2"], "a.b [c]": ["x", "y"], "year": [1984.0, None]})
    assert texts_of("{{{a.b [c]}}} of {year}", table, "") == ["{x} of 1984", "{y} of "]


@pytest.mark.parametrize("max_text_tokens", [0, 513])
def test_an_encoder_reads_only_its_positions(arguments, encoder, max_text_tokens):
    with pytest.raises(ValueError, match=f"`max_text_tokens` must be from 1 to 512.*got {max_text_tokens}"):
        prepare(arguments(encoder=encoder, max_text_tokens=max_text_tokens))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_of_an_encoder_decoder_the_encoder_runs(arguments, encoder, tmp_path, kind):
    other = shutil.copytree(encoder, tmp_path / "encoder")
    sizes = {"t5": {"d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}, "bart": {"max_position_embeddings": 64}}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = AutoConfig.for_model(kind, **sizes[kind], **(layers if kind == "bart" else {}), d_model=8, vocab_size=999)
    AutoModel.from_config(config).save_pretrained(other)
    texts = ["Film 1 drama", "drama", "Film Film Film 3 4 5"]
    embeddings = encode_texts(texts, str(other), dtype="float32")
    assert embeddings.shape == (3, 8)
    np.testing.assert_allclose(encode_texts(texts[:1], str(other), dtype="float32"), embeddings[:1], atol=1e-6)
    assert load_file(prepare(arguments(encoder=str(other), max_text_tokens=60)) / "item_embeddings.safetensors")


def test_an_encoder_needs_no_pad_token(encoder, tmp_path):
    texts = ["Film 1 drama", "drama"]
    other = shutil.copytree(encoder, tmp_path / "encoder")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(other)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(other)
    np.testing.assert_array_equal(encode_texts(texts, str(other)), encode_texts(texts, encoder))


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        ({"atomic": True, "codebook_sizes": [256, 256, 256]}, {"pca_dim": 4, "normalize": True, "seed": 3}),
        ({"atomic": True, "codebook_sizes": [256, 256, 256]}, {"codebook_sizes": [4, 4]}),
        ({"embeddings": np.ones((12, 8))}, {"encoder_dtype": "float32", "max_text_tokens": 9}),
        ({"embeddings": np.ones((12, 8))}, {"encoder": "x", "text_template": "{title}"}),
        ({"items": items_table().assign(embedding=[[1.0]] * 12), "suffix": ".parquet"}, {"text_template": "{title}"}),
    ],
    ids=short_id,
)
def test_arguments_without_effect_are_rejected(arguments, options, ignored):
    for name, value in ignored.items():
        with pytest.raises(ValueError, match=rf"must come without \['{name}'\]"):
            prepare(arguments(**{**options, name: value}))


@pytest.mark.parametrize("name", ["interactions", "items", "embeddings", "encoder", "tokenizer", "output_dir"])
@pytest.mark.parametrize("path", ["/nope/at/all", "nope", "./nope", "nope/at", "a-file"])
def test_a_wrong_path_is_reported_by_its_argument(arguments, tmp_path, monkeypatch, name, path):
    monkeypatch.chdir(tmp_path)
    args = arguments(codebook_sizes=[256, 256, 256]) if name == "tokenizer" else arguments()
    Path("a-file").write_text("no table")
    if name == "output_dir":
        path = "a-file/data"
    with pytest.raises(ValueError, match=f"`({name}|path)` must be .*{Path(path)}"):
        prepare(replace(args, **{name: path}))
    assert not (tmp_path / "data").exists()


def changed(table: pd.DataFrame, row: int, column: str, value: object) -> pd.DataFrame:
    """Replace a value of the table."""
    table = table.astype({column: object})
    table.loc[row, column] = value
    return table


NAN_ROW = np.where(np.arange(12)[:, None] == 4, np.nan, np.ones((12, 8), np.float32))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"interactions": interactions_table().drop(columns="item_id")}, r"Rename or add \['item_id'\]"),
        ({"interactions": interactions_table().drop(columns="timestamp")}, "a column `timestamp`, or `position`"),
        ({"interactions": changed(interactions_table(), 4, "user_id", None)}, "user_id in every row.*1 of 9.*row 4"),
        ({"interactions": changed(interactions_table(), 2, "timestamp", "soon")}, r"row 2 \('soon'\)"),
        (
            {"interactions": changed(interactions_table(), 2, "timestamp", -1)},
            r"an unknown one \(-1\) in 1 of 9.*row 2",
        ),
        ({"items": changed(items_table(), 3, "item_id", ""), "suffix": ".parquet"}, "item_id in every row.*row 3"),
        (
            {"items": items_table().assign(item_id=np.arange(12) + 2.0**53), "suffix": ".parquet"},
            "a string or an integer as item_id.*12 of 12",
        ),
        (
            {"items": items_table().assign(item_id=[[item] for item in ITEM_IDS]), "suffix": ".parquet"},
            "a string or an integer as item_id.*12 of 12",
        ),
        ({"interactions": changed(interactions_table(), 5, "behavior", None)}, "empty behavior.*row 5"),
        ({"interactions": changed(interactions_table(), 1, "item_id", "77")}, r"unknown item_id in 1 of 9.*\('77'\)"),
        ({"interactions": interactions_table()[4:]}, "users with 3 or more interactions, got at most 2"),
        (
            {"interactions": changed(interactions_table(), 1, "behavior", "add to cart")},
            "Rename the behavior, for instance to add_to_cart",
        ),
        ({"interactions": changed(interactions_table(), 1, "behavior", "next")}, "behaviors other than 'next'"),
        ({"items": changed(items_table(), 3, "item_id", "001")}, r"duplicate item_id in 1 of 12.*row 3 \('001'\)"),
        ({"items": changed(items_table(), 6, "text", " ")}, r"an empty text in 1 of 12 rows.*row 6 \('006'\)"),
        ({"items": items_table().drop(columns="text")}, "Pass --text_template"),
        ({"embeddings": NAN_ROW}, r"NaN or infinity in 1 of 12 rows, first row 4 \('004'\)"),
        ({"embeddings": np.ones((11, 8), np.float32)}, r"shape \[12, D\].*got \[11, 8\]"),
        ({"embeddings": np.ones((12, 0), np.float32)}, r"shape \[12, D\].*got \[12, 0\]"),
        ({"items": items_table().assign(embedding=[[]] * 12), "suffix": ".parquet"}, r"got \[12, 0\]"),
        ({"embeddings": np.full((12, 2), "x")}, "must be numbers, got <U1"),
        ({"embeddings": np.ones((12, 2), np.float32), "pca_dim": 3}, "`pca_dim` must be at most 2"),
        ({"embeddings": np.ones((12, 2), np.float32), "codebook_sizes": [13]}, "at most the number of items, 12"),
        ({"items": items_table().assign(embedding="[1.0, 2.0]")}, "an embedding in every row, as a list.*12 of 12"),
        ({"min_interactions": 2}, "`min_interactions` must be 3 or more, got 2"),
    ],
    ids=short_id,
)
def test_invalid_tables_are_rejected_with_the_row(arguments, wrong, message):
    args = arguments(**wrong)
    with pytest.raises(ValueError, match=message):
        prepare(args)
    assert not (Path(args.output_dir) / "prepare.json").exists()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("times", "wrong"),
    [
        ([5] * 8 + [-2], "1 of 9 rows, first row 8"),
        ([1_600_000_000] * 3 + [1_700_000_000_000] * 6, "6 of 9 rows, first row 3"),
        ([1_700_000_000_000] * 4 + [1_600_000_000_000_000] * 5, "9 of 9"),
        ([1e19, *[5] * 8], "1 of 9 rows, first row 0"),
        (["1969-12-31", *["2026-01-01"] * 8], "1 of 9 rows, first row 0"),
        (["2026-01-01"] * 8 + ["soon"], "an unparsable timestamp in 1 of 9 rows, first row 8"),
        ([5.0] * 8 + [np.inf], "1 of 9 rows, first row 8"),
    ],
    ids=short_id,
)
def test_times_that_are_no_seconds_are_rejected_by_row(arguments, times, wrong, suffix):
    with pytest.raises(ValueError, match=rf"must have timestamps.*{wrong}"):
        prepare(arguments(interactions_table().assign(timestamp=times), suffix=suffix))


@pytest.mark.parametrize("unit", ["text", "zone", "s", "ns", "object"])
def test_dates_of_any_type_are_seconds(tmp_path, unit):
    dates = pd.Series(["2026-01-01T01:00:00+01:00", "1970-01-01T00:00:00Z"])
    if unit != "text":
        dates = pd.to_datetime(dates, utc=True)
        dates = dates if unit == "zone" else dates.dt.tz_localize(None)
        dates = dates.dt.date if unit == "object" else dates.astype(f"datetime64[{unit}]") if unit != "zone" else dates
    pd.DataFrame({"user_id": "a", "item_id": "1", "timestamp": dates}).to_parquet(tmp_path / "table.parquet")
    assert read_interactions(tmp_path / "table.parquet")["timestamp"].tolist() == [1_767_225_600, 0]
    pd.DataFrame({"user_id": ["a"], "item_id": ["1"], "timestamp": ["9999-12-31"]}).to_csv(tmp_path / "t.csv")
    assert read_interactions(tmp_path / "t.csv")["timestamp"].tolist() == [253_402_214_400]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("item_id,text\n1,caf\u00e9\n".encode("latin-1"), "in UTF-8.*items.csv, which cannot be read"),
        (b"", "items.csv, which cannot be read"),
    ],
    ids=short_id,
)
def test_unreadable_files_are_rejected_by_name(arguments, content, message):
    args = arguments()
    Path(args.items).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(args)
    several = Path(args.items).with_name("rows.npz")
    np.savez(several, a=np.ones(3))
    with pytest.raises(ValueError, match=r"one array in a \.npy"):
        prepare(replace(arguments(), embeddings=str(several)))
    save_file({"embeddings": np.ones((12, 2))}, several.with_suffix(".safetensors"))
    for name, content in ("rows.safetensors", None), ("empty.npy", b""), ("text.npy", b"1,2"):
        if content is not None:
            several.with_name(name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"one array in a \.npy file, got .*{name}, which cannot be read"):
            prepare(replace(arguments(), embeddings=str(several.with_name(name))))


@pytest.mark.parametrize("dtype", ["int64", "float64", "Int64", "category", "object", "bytes"])
def test_ids_and_titles_of_any_type_become_their_text(arguments, embeddings, dtype):
    numbers = pd.Series(range(12))
    ids = numbers.astype(str).str.encode("utf-8") if dtype == "bytes" else numbers.astype(dtype)
    titles = pd.Series([None, *range(1, 12)], dtype="Int64" if dtype == "int64" else "object")
    titles = titles.astype("object" if dtype == "bytes" else "float64" if dtype == "float64" else titles.dtype)
    interactions = interactions_table().assign(item_id=interactions_table()["item_id"].astype(int).astype("float32"))
    args = arguments(interactions, pd.DataFrame({"item_id": ids, "title": titles}), embeddings, suffix=".parquet")
    tokenizer = SemanticIdTokenizer.from_pretrained(prepare(args) / "tokenizer")
    assert tokenizer.item_ids == [str(number) for number in range(12)]
    assert tokenizer.titles == ["", *(str(number) for number in range(1, 12))]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1,a", "2,b,c,d"], "a row of 2 fields in each line, got 4 fields in line 3"),
        (["1,a,", "2,b,"], "got 3 fields in line 2"),
        (["1,a", "2"], "got 1 fields in line 3"),
        (["", "1,a", "2,b,c"], "got 3 fields in line 4"),
        (['1,"red', "2,b", '3,"blue'], "got quotes that enclose no field in line 2"),
        (["1,a", '2,"red', '3,blue"'], "got quotes that enclose no field in line 3"),
        (["1,a", '"2,"b'], "got quotes that enclose no field in line 3"),
        (['1,"a"b'], "got quotes that enclose no field in line 2"),
    ],
    ids=short_id,
)
def test_lines_that_are_no_rows_are_rejected(tmp_path, suffix, lines, message):
    text = "\n".join(["item_id,text", *lines]).replace(",", {".csv": ",", ".tsv": "\t"}[suffix])
    (tmp_path / f"items{suffix}").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / f"items{suffix}", ["item_id"])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("names", [["item_id", "item_id", "title"], ["\ufeffitem_id", "title", '"title"']])
def test_a_column_that_is_named_twice_is_refused(tmp_path, suffix, names):
    path = tmp_path / f"items{suffix}"
    if suffix == ".parquet":
        names = [name.strip('\ufeff"') for name in names]
        pq.write_table(pa.table([pa.array(["1"])] * 3, names=names), path)
    else:
        separator = {".csv": ",", ".tsv": "\t"}[suffix]
        path.write_text(f"{separator.join(names)}\n{separator.join('123')}\n")
    twice = "item_id" if names.count("item_id") == 2 else "title"
    with pytest.raises(ValueError, match=rf"items{suffix}.*\b{twice}\b"):
        read_table(path, ["item_id"])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "mac"])
def test_quotes_inside_of_fields_are_kept(tmp_path, end):
    lines = ['\ufeff"item_id",text', '1,12" record', '2,"a, ""b"""', "", "3,"]
    (tmp_path / "items.csv").write_bytes(end.join(lines).encode())
    table = read_table(tmp_path / "items.csv", ["item_id"])
    assert table.fillna("").to_numpy().tolist() == [["1", '12" record'], ["2", 'a, "b"'], ["3", ""]]


def test_movielens_folders_become_tables(tmp_path):
    (tmp_path / "u.data").write_text("196\t1\t3\t881250949\n186\t2\t4\t891717742\n")
    flags = ["1" if genre in ("Action", "Sci-Fi") else "0" for genre in ML_100K_GENRES]
    lines = [
        "|".join([str(number), title, "01-Jan-1999", "", "", *flags])
        for number, title in ((1, "Matrix, The (1999)"), (2, '"Délits (1999)'), (3, "NA"))
    ]
    (tmp_path / "u.item").write_text("\n".join(lines), encoding="latin-1")
    interactions, items = movielens_100k(str(tmp_path))
    assert interactions["behavior"].tolist() == ["dislike", "like"]
    assert items["text"].tolist()[0] == "The Matrix (1999). Genres: Action, Sci-Fi."
    assert items["title"].tolist()[1:] == ['"Délits (1999)', "NA"]
    with pytest.raises(ValueError, match=r"the MovieLens file ratings\.dat"):
        movielens_1m(str(tmp_path))
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n")
    (tmp_path / "movies.dat").write_text("1193::Good, the Bad, The (1999)::Drama|War\n", encoding="latin-1")
    interactions, items = movielens_1m(str(tmp_path))
    assert interactions.to_dict("records") == [
        {"user_id": 1, "item_id": 1193, "rating": 5, "timestamp": 978300760, "behavior": "like"}
    ]
    assert items["genres"].tolist() == ["Drama, War"]
    (tmp_path / "ratings.dat").unlink()
    times = pd.array([978300760, None], dtype="Int64")
    ordered = pd.DataFrame({"user_id": [1, 1], "item_id": [1193, 7], "rating": [5, 3], "position": [2, 1]})
    ordered.assign(timestamp=times).to_parquet(tmp_path / "interactions.parquet")
    assert movielens_1m(str(tmp_path))[0][["timestamp", "position"]].to_dict("list") == {
        "timestamp": [978300760, -1],
        "position": [2, 1],
    }
    translated = pd.Series(
        ["Big Blue, The (Grand bleu, Le) (1988)", "Paris, Texas (1984)", "Star Maker, The (Uomo, L')"]
    )
    assert clean_titles(translated).tolist() == [
        "The Big Blue (Le Grand bleu) (1988)",
        "Paris, Texas (1984)",
        "The Star Maker (L'Uomo)",
    ]
