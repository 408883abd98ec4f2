"""Turn two plain tables into the prepared folder that training, evaluation and the baselines read.

    python -m recipes.data.movielens --output_dir runs/demo/tables
    python -m recipes.prepare --interactions runs/demo/tables/interactions.csv --items runs/demo/tables/items.csv \
        --output_dir runs/demo/data

The tables are CSV, TSV or Parquet files.

- Interactions: `user_id`, `item_id` and `timestamp` (a number, or a date, which becomes Unix seconds). An optional
  `behavior` defaults to `interact`. An optional `position` orders a user's interactions; a table without timestamps,
  or with unknown timestamps (-1), needs it.
- Items: `item_id`, an optional `title`, and the content. The content is the column `text`, or the columns of
  `--text_template "{title}. {genres}"`. A list column `embedding`, or the rows of `--embeddings rows.npy`, replaces
  the text.

The catalog holds every item of the items table, also an item without interactions: its semantic ID makes it
recommendable. An interaction with an item outside the table is an error.

The split is leave-one-out: a user's last interaction is the test target, the interaction before it the validation
target, the rest training data. Popularity counts training data alone. The output folder holds:

    tokenizer/                    SemanticIdTokenizer.save_pretrained
    item_embeddings.safetensors   `embeddings` float32 [num_items, D], in the order of tokenizer.item_ids
    dataset/                      DatasetDict of train (user_id, items, behaviors, timestamps), validation and test
                                  (the history before the target in the same columns; target, target_behavior,
                                  target_timestamp)
    prepare.json                  arguments, hashes of the inputs, counts, behaviors, codebook statistics

Items are catalog indices (int32), behaviors are indices into tokenizer.behaviors (int8). A second run with equal
arguments and input files does nothing. A run with other codebooks reuses the encoded texts.

`--tokenizer training/checkpoint` reuses the codes of a checkpoint, takes the titles of the items table, and adds new
items after the checkpoint's items. Then
`recipes.train --init_from training/checkpoint` continues the training with newer data.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import DatasetDict

from modeling_unigrf.configuration_unigrf import NEXT_TARGET
from recipes.common.arguments import check_folder, parse_arguments
from recipes.common.files import check_writable, damaged_files, file_hashes, is_whole_json, write_errors, write_json
from recipes.common.hashing import sha256, weights_of
from recipes.data.leave_one_out import leave_one_out
from recipes.data.prepared import load_prepared
from recipes.data.tables import check_rows, read_interactions, read_table, text_column
from recipes.data.text_encoders import MINILM, check_encoder, encoded_embeddings, read_content, write_embeddings
from tokenization import CodebookStatistics, ResidualKMeans, SemanticIdTokenizer
from tokenization.semantic_id_files import ITEMS_FILE, SEMANTIC_IDS_FILE
from tokenization.vocabulary_layout import check_behaviors

QUANTIZATION = ("codebook_sizes", "normalize", "pca_dim", "atomic", "seed")
TEXT_OPTIONS = ("text_template", "encoder", "encoder_dtype", "max_text_tokens")
TABLES = ("interactions", "items", "embeddings")
# The folder's parts, beside its record.
PARTS = ("item_embeddings.safetensors", "tokenizer", "dataset")
# Hashes compare the content of these paths; their names may differ.
PATHS = (*TABLES, "tokenizer", "output_dir")


@dataclass
class PrepareArguments:
    """Tables, content embeddings, semantic IDs, and the prepared folder."""

    interactions: str = field(
        metadata={"help": "CSV, TSV or Parquet table: user_id, item_id, timestamp or position, optionally behavior."}
    )
    items: str = field(metadata={"help": "CSV, TSV or Parquet table: item_id, text or embedding, optionally title."})
    output_dir: str = field(metadata={"help": "Folder that receives the prepared data."})
    embeddings: str | None = field(
        default=None,
        metadata={
            "help": "NumPy file of content embeddings [items, D], in the order of the items table. None: the column "
            "embedding, or encoded texts."
        },
    )
    text_template: str | None = field(
        default=None,
        metadata={"help": 'Template of an item\'s text, such as "{title}. {genres}". None: the column text.'},
    )
    encoder: str | None = field(
        default=None,
        metadata={"help": f"Text encoder: a folder or Hub ID for AutoModel. None: {MINILM}, from its wheel."},
    )
    encoder_dtype: str = field(
        # On CPUs with bfloat16: 2.7-3.2 times as fast, cosine 0.9999.
        default="bfloat16",
        metadata={"help": "Data type of the encoder; the embeddings are float32.", "choices": ["bfloat16", "float32"]},
    )
    max_text_tokens: int = field(
        default=128, metadata={"help": "Tokens of a text that the encoder reads; the rest is cut off."}
    )
    min_interactions: int = field(
        default=3, metadata={"help": "Drop users with fewer interactions than this number, at least 3."}
    )
    codebook_sizes: list[int] = field(
        default_factory=lambda: [256, 256, 256], metadata={"help": "Number of codes of each codebook level."}
    )
    normalize: bool = field(default=False, metadata={"help": "Quantize L2-normalized embeddings."})
    pca_dim: int | None = field(
        default=None, metadata={"help": "Principal components of the embeddings to quantize. None: whole embeddings."}
    )
    atomic: bool = field(
        default=False, metadata={"help": "Give each item a single code of its own, as SASRec does, without codebooks."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a tokenizer to reuse. Its items and codes come first; new items follow. None: make a "
            "new tokenizer."
        },
    )
    seed: int = field(default=0, metadata={"help": "Random seed of the codebooks."})


def prepare(args: PrepareArguments) -> Path:
    """
    Write the prepared folder, which the module's docstring describes, and return its path.

    Do nothing if `prepare.json` records equal arguments and input files, and its outputs are whole.

    Raises:
        ValueError: for tables that do not fit the description, with the rows and the remedy.
    """
    output_dir = Path(args.output_dir)
    record_file = output_dir / "prepare.json"
    check_arguments(args)
    earlier = None if args.tokenizer is None else SemanticIdTokenizer.from_pretrained(args.tokenizer)
    record = work_record(args, earlier)
    before = json.loads(record_file.read_text()) if is_whole_json(record_file) else None
    if before is not None and _same_work(before, record):
        if not (problem := damage(before, output_dir)):
            print(f"{output_dir} is already prepared with these arguments and inputs")
            return output_dir
        print(f"{output_dir} is prepared again, since {problem}")

    # Tables
    interactions, items, selected = read_tables(args)
    if earlier is not None:
        items = order_by_tokenizer(items, earlier, args.items)
    behaviors = behaviors_of(selected, earlier, args.interactions)
    splits = split_interactions(selected, items, behaviors)
    content = checked_content(args, items)
    check_writable(output_dir, "output_dir")
    record_file.unlink(missing_ok=True)  # written last, so that it marks a complete folder

    # Content embeddings and semantic IDs
    embeddings, source = embed(args, content, output_dir / "item_embeddings.safetensors")
    popularity = training_popularity(splits, len(items))
    if earlier is None:
        # The tokenizer adds its statistics to this dict.
        provenance = {**source, "inputs": record["inputs"]}
        tokenizer = new_tokenizer(args, items, embeddings, behaviors, popularity, provenance)
    else:
        tokenizer = with_new_items(earlier, items, embeddings)
    with write_errors(output_dir):
        tokenizer.save_pretrained(output_dir / "tokenizer")
        splits.save_to_disk(output_dir / "dataset")

    # Record
    # The statistics of an earlier tokenizer describe its first items only.
    statistics = None if earlier is not None else tokenizer.provenance.get("codebook_statistics")
    ordered_by = "position" if (interactions["position"] != interactions["timestamp"]).any() else "timestamp"
    record["counts"] = counts_of(interactions, selected, len(splits["train"]), popularity, behaviors)
    record |= {
        "behaviors": behaviors,
        "embeddings": source,
        "codebook_statistics": statistics,
        "ordered_by": ordered_by,
    }
    record["files"] = file_hashes([output_dir / name for name in PARTS], output_dir)
    write_json(record_file, record)
    print_summary(record)
    return output_dir


def damage(record: dict[str, Any], folder: Path) -> str | None:
    """Say which parts of a prepared folder are missing or damaged; None: the folder is whole."""
    # Records of 0.1 name no files.
    if damaged := damaged_files(record.get("files", {}), folder):
        return f"{damaged} are missing or damaged"
    try:
        load_prepared(folder)
    except ValueError as error:
        return str(error)
    return None


def check_arguments(args: PrepareArguments) -> None:
    """
    Check the arguments before the tables are read.

    Raises:
        ValueError: for arguments out of range or without effect, and for paths that do not exist.
    """
    if args.min_interactions < 3:
        raise ValueError(
            f"`min_interactions` must be 3 or more, got {args.min_interactions}. Raise it: leave-one-out uses an "
            "interaction each for test, validation and training."
        )
    if args.encoder_dtype not in ("bfloat16", "float32"):
        raise ValueError(f"`encoder_dtype` must be bfloat16 or float32, got {args.encoder_dtype}. Choose one of them.")
    if args.tokenizer is not None:
        reject_unused(args, "tokenizer", QUANTIZATION, "its codebooks stay")
        check_folder(args.tokenizer, "tokenizer", ITEMS_FILE)
    if args.atomic:
        unused = [name for name in QUANTIZATION if name != "atomic"]
        reject_unused(args, "atomic", unused, "it needs no codebooks")
    quantizer_of(args)


def reject_unused(args: PrepareArguments, name: str, unused: Sequence[str], reason: str) -> None:
    """Raise `ValueError` if arguments that have no effect beside the argument `name` differ from their defaults."""
    defaults = PrepareArguments("", "", "")
    values = {other: getattr(args, other) for other in unused if getattr(args, other) != getattr(defaults, other)}
    if values:
        raise ValueError(
            f"`{name}` must come without {list(values)}, since {reason}, got {values}. Leave {list(values)} out."
        )


def quantizer_of(args: PrepareArguments) -> ResidualKMeans:
    """Make the quantizer that the arguments describe; raise `ValueError` for a number out of range."""
    return ResidualKMeans(tuple(args.codebook_sizes), normalize=args.normalize, pca_dim=args.pca_dim, seed=args.seed)


def checked_content(args: PrepareArguments, items: pd.DataFrame) -> np.ndarray | list[str]:
    """
    Read the embeddings or texts of the items, and check what the next steps need.

    Raises:
        ValueError: for content that `read_content` rejects, for text options beside embeddings, and for more codes
            than items.
    """
    if args.embeddings is not None or "embedding" in items:
        reject_unused(args, "embeddings", TEXT_OPTIONS, "embeddings replace the texts")
    content = read_content(items, args.items, args.embeddings, args.text_template)
    if isinstance(content, list):
        check_encoder(args.encoder, args.max_text_tokens)
    elif (args.pca_dim or 0) > content.shape[1]:
        raise ValueError(
            f"`pca_dim` must be at most {content.shape[1]}, the width of the embeddings, got {args.pca_dim}. Lower it."
        )
    if args.tokenizer is None and not args.atomic and len(items) < max(args.codebook_sizes):
        raise ValueError(
            f"`codebook_sizes` must be at most the number of items, {len(items)}, got {args.codebook_sizes}. Use "
            "smaller codebooks."
        )
    return content


def embed(args: PrepareArguments, content: np.ndarray | list[str], file: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """
    Write the content embeddings of the items to `file`; encode texts first, or reuse those of the same texts.

    Returns:
        Embeddings, float32 `[num_items, D]`, and their source, for the tokenizer's provenance.
    """
    if isinstance(content, list):
        return encoded_embeddings(
            content, file, args.encoder, args.encoder_dtype, args.max_text_tokens, args.text_template
        )
    write_embeddings(content, file)
    return content, {"embeddings": "column" if args.embeddings is None else "file"}


def work_record(args: PrepareArguments, earlier: SemanticIdTokenizer | None) -> dict[str, Any]:
    """Record the arguments and the hashes of the inputs; raise `ValueError` for an input that does not exist."""
    record: dict[str, Any] = {
        "arguments": asdict(args),
        "inputs": {name: sha256(Path(path), name) for name in TABLES if (path := getattr(args, name))},
    }
    # New weights may come in a folder of the same name.
    if args.encoder and (weights := weights_of(args.encoder)):
        record["inputs"]["encoder"] = weights
    if earlier is not None:
        # The hash of the catalog leaves out titles and codebooks.
        folder = Path(args.tokenizer or "")
        hashes = [sha256(folder / name) for name in (ITEMS_FILE, SEMANTIC_IDS_FILE)]
        record["inputs"]["tokenizer"] = [*hashes, list(earlier.behaviors)]
    return record


def read_tables(args: PrepareArguments) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """
    Read and check the tables.

    Returns:
        All interactions, the items, and the interactions of users who have at least `min_interactions`.

    Raises:
        ValueError: for tables that do not fit the module's docstring.
    """
    interactions = read_interactions(args.interactions)
    items = read_table(args.items, ["item_id"])
    check_rows(~items["item_id"].duplicated(), items["item_id"], "one row per item", "duplicate item_id", args.items)
    known = interactions["item_id"].isin(items["item_id"])
    check_rows(known, interactions["item_id"], "items of the items table", "an unknown item_id", args.interactions)
    per_user = interactions.groupby("user_id")["user_id"].transform("size")
    selected = interactions[per_user >= args.min_interactions]
    if len(selected) == 0:
        raise ValueError(
            f"`interactions` must have users with {args.min_interactions} or more interactions, got at most "
            f"{per_user.max()} in {args.interactions}. Lower --min_interactions, or pass longer histories."
        )
    return interactions, items, selected


def order_by_tokenizer(items: pd.DataFrame, tokenizer: SemanticIdTokenizer, path: str) -> pd.DataFrame:
    """
    Sort the items table: the tokenizer's items first, in its order, then new items.

    Raises:
        ValueError: if the table lacks an item of the tokenizer.
    """
    places = pd.Index(items["item_id"]).get_indexer(tokenizer.item_ids)
    missing = [tokenizer.item_ids[row] for row in np.flatnonzero(places < 0)]
    if missing:
        raise ValueError(
            f"`items` must have all {tokenizer.num_items} items of the tokenizer, got {path} with {len(missing)} "
            f"missing, for instance {missing[:5]}. Add their rows: their codes stay in the catalog."
        )
    new = np.setdiff1d(np.arange(len(items)), places)
    return items.iloc[np.concatenate([places, new])]


def behaviors_of(interactions: pd.DataFrame, earlier: SemanticIdTokenizer | None, path: str) -> list[str]:
    """
    List the behaviors: those of the earlier tokenizer, or else those of the interactions.

    Raises:
        ValueError: for a behavior that the earlier tokenizer lacks, and for a reserved name.
    """
    behaviors = sorted(interactions["behavior"].unique())
    if earlier is not None:
        is_known = interactions["behavior"].isin(earlier.behaviors)
        expected = f"behaviors among {earlier.behaviors}"
        check_rows(is_known, interactions["behavior"], expected, "another behavior", path)
        behaviors = list(earlier.behaviors)
    check_behaviors(behaviors)  # now: the next steps take minutes
    if NEXT_TARGET in behaviors:
        raise ValueError(
            f"`interactions` must have behaviors other than {NEXT_TARGET!r}, the name of a ranking target, got "
            f"{behaviors} in {path}. Rename the behavior."
        )
    return behaviors


def split_interactions(interactions: pd.DataFrame, items: pd.DataFrame, behaviors: list[str]) -> DatasetDict:
    """Split the interactions by leave-one-out, with catalog and behavior indices."""
    return leave_one_out(
        users=interactions["user_id"].to_numpy(),
        items=pd.Index(items["item_id"]).get_indexer(interactions["item_id"]),
        behaviors=pd.Index(behaviors).get_indexer(interactions["behavior"]),
        timestamps=interactions["timestamp"].to_numpy(),
        positions=interactions["position"].to_numpy(),
    )


def training_popularity(splits: DatasetDict, num_items: int) -> np.ndarray:
    """Count the training interactions of each item, int64 `[num_items]`."""
    train_items = splits["train"].data.column("items").combine_chunks().flatten().to_numpy()
    return np.bincount(train_items, minlength=num_items)


def titles_of(items: pd.DataFrame) -> list[str] | None:
    """Return the titles of the items; None if the table has no titles."""
    return text_column(items["title"]).fillna("").tolist() if "title" in items else None


def with_new_items(earlier: SemanticIdTokenizer, items: pd.DataFrame, embeddings: np.ndarray) -> SemanticIdTokenizer:
    """Add the items after the tokenizer's items to the tokenizer, and take the titles of the table."""
    ids = items["item_id"].tolist()
    titles = titles_of(items)
    count = earlier.num_items
    if titles is not None:
        # An item without a title in the table keeps its title.
        old_titles = earlier.titles or [""] * count
        new_titles = [new or old for new, old in zip(titles, old_titles, strict=False)]
        changed = sum(new != old for new, old in zip(new_titles, old_titles, strict=True))
        earlier.set_titles(new_titles)
        print(f"{changed:,} of {count:,} items of the tokenizer have another title")
    if len(ids) > count:
        earlier.add_items(ids[count:], embeddings[count:], titles and titles[count:])
    return earlier


def new_tokenizer(
    args: PrepareArguments,
    items: pd.DataFrame,
    embeddings: np.ndarray,
    behaviors: list[str],
    popularity: np.ndarray,
    provenance: dict[str, Any],
) -> SemanticIdTokenizer:
    """Quantize the embeddings, or number the items (`--atomic`), and make a tokenizer of the codes."""
    ids = items["item_id"].tolist()
    titles = titles_of(items)
    if args.atomic:
        codes = np.arange(len(ids))[:, None]
        return SemanticIdTokenizer.from_codes(ids, codes, [len(ids)], behaviors, titles, provenance=provenance)
    quantizer = quantizer_of(args).fit(embeddings)
    return SemanticIdTokenizer.from_embeddings(
        ids, embeddings, quantizer, behaviors, titles, popularity.tolist(), provenance=provenance
    )


def counts_of(
    interactions: pd.DataFrame, selected: pd.DataFrame, num_users: int, popularity: np.ndarray, behaviors: list[str]
) -> dict[str, int]:
    """Count the selected users, interactions and items, and the dropped ones."""
    return {
        "users": num_users,
        "interactions": len(selected),
        "dropped_users": interactions["user_id"].nunique() - num_users,
        "dropped_interactions": len(interactions) - len(selected),
        "catalog": len(popularity),
        "items_in_training": int((popularity > 0).sum()),
        "repeated_pairs": int(selected.duplicated(["user_id", "item_id"]).sum()),
        # The file orders these, which limits the meaning of a leave-one-out result.
        "interactions_of_tied_time": int(selected.duplicated(["user_id", "position"], keep=False).sum()),
        **{f"behavior {name}": int((selected["behavior"] == name).sum()) for name in behaviors},
    }


def print_summary(record: dict[str, Any]) -> None:
    """Print the counts and the codebook statistics of a prepared folder's record."""
    counts = record["counts"]
    min_interactions = record["arguments"]["min_interactions"]
    print(", ".join(f"{name}: {count:,}" for name, count in counts.items()))
    print(f"dropped {counts['dropped_users']:,} users with fewer than {min_interactions} interactions")
    if record["codebook_statistics"] is not None:
        print(CodebookStatistics(**record["codebook_statistics"]))


def _same_work(old: dict[str, Any], new: dict[str, Any]) -> bool:
    def without_paths(record: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in record.get("arguments", {}).items() if name not in PATHS}

    return without_paths(old) == without_paths(new) and old.get("inputs") == new["inputs"]


if __name__ == "__main__":
    prepare(*parse_arguments(PrepareArguments))
