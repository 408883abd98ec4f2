"""From two plain tables to the prepared folder that training, evaluation and the baselines read.

    python -m recipes.data.movielens --output_dir runs/demo/tables
    python -m recipes.prepare --interactions runs/demo/tables/interactions.csv --items runs/demo/tables/items.csv \
        --output_dir runs/demo/data

Interactions (CSV, TSV or Parquet): `user_id`, `item_id`, `timestamp` (a number, kept as it is, or a date, kept as Unix
seconds), optionally `behavior` (else every interaction is an `interact`) and, where not all times are known (-1) or
`timestamp` is left out, `position`, which then orders a user's interactions. Items: `item_id` and `text`, or the columns of
`--text_template "{title}. {genres}"`, or a list column `embedding`, or `--embeddings rows.npy` row by row; optionally
`title`. Every item of the items table is in the catalog, also one that nobody took (its semantic id makes
it recommendable); an interaction with an item outside of it is an error.

Split: leave-one-out. A user's last interaction is the test target, the one before it the validation target, the rest
is training; popularity is counted on training only. Output:

    tokenizer/                    SemanticIdTokenizer.save_pretrained
    item_embeddings.safetensors   `embeddings` float32 [num_items, D], rows in the order of tokenizer.item_ids
    dataset/                      DatasetDict: train (user_id, items, behaviors, timestamps); validation and test (the
                                  same of the history before the target, and target, target_behavior,
                                  target_timestamp)
    prepare.json                  arguments, hashes of the inputs, counts, behaviors, codebook health

Items are catalog indices (int32), behaviors indices into tokenizer.behaviors (int8). A second run with equal
arguments and input files does nothing; one with other codebooks encodes no text again. With `--tokenizer training/checkpoint`
the codes of another folder stay and new items are added behind its own, so that `recipes.train --init_from training/checkpoint`
goes on with newer data.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from modeling_unigrf.configuration_unigrf import NEXT_TARGET
from recipes.common.arguments import parse_arguments
from recipes.common.files import write_json
from recipes.common.hashing import sha256, weights_of
from recipes.data.leave_one_out import leave_one_out
from recipes.data.tables import check_rows, read_interactions, read_table
from recipes.data.text_encoders import MINILM, content_embeddings
from tokenization import CodebookStatistics, ResidualKMeans, SemanticIdTokenizer
from tokenization.vocabulary_layout import check_behaviors

QUANTIZING = ("codebook_sizes", "normalize", "pca_dim", "atomic", "seed")
TABLES = ("interactions", "items", "embeddings")
PATHS = (*TABLES, "tokenizer", "output_dir")  # of which the content matters, or nothing, but not the name


@dataclass
class PrepareArguments:
    """Tables in, prepared folder out."""

    interactions: str = field(
        metadata={"help": "CSV, TSV or Parquet: user_id, item_id, timestamp or position[, behavior]."}
    )
    items: str = field(metadata={"help": "CSV, TSV or Parquet: item_id and text or embedding[, title]."})
    output_dir: str = field(metadata={"help": "Folder that receives the prepared data."})
    embeddings: str | None = field(default=None, metadata={"help": ".npy [items, D]; row k = row k of the items."})
    text_template: str | None = field(default=None, metadata={"help": 'As "{title}. {genres}"; default: column text.'})
    encoder: str | None = field(
        default=None, metadata={"help": f"Folder or Hub id for AutoModel; default: {MINILM} of its wheel."}
    )
    encoder_dtype: str = field(
        # bfloat16 on a CPU that has it: 2.7-3.2 times as fast, cosine to float32 0.9999.
        default="bfloat16",
        metadata={"help": "Computation of the encoder; the result is float32.", "choices": ["bfloat16", "float32"]},
    )
    max_text_tokens: int = field(default=128, metadata={"help": "Texts are cut to this many tokens."})
    min_interactions: int = field(default=3, metadata={"help": "Users with fewer are dropped; at least 3."})
    codebook_sizes: list[int] = field(default_factory=lambda: [256, 256, 256], metadata={"help": "Codes a level."})
    normalize: bool = field(default=False, metadata={"help": "Quantize L2-normalized embeddings."})
    pca_dim: int | None = field(default=None, metadata={"help": "Quantize this many principal components."})
    atomic: bool = field(default=False, metadata={"help": "One code an item, its own: no codebooks (SASRec's ids)."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder whose codes and codebooks stay; its items come first, new ones are added. No new codebooks."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the codebooks."})


def with_known_first(items: pd.DataFrame, known: SemanticIdTokenizer, path: str) -> pd.DataFrame:
    """The items table in the order of a tokenizer's items, which it must have all, and new ones behind them."""
    places = pd.Index(items["item_id"]).get_indexer(known.item_ids)
    missing = [known.item_ids[row] for row in np.flatnonzero(places < 0)]
    if missing:
        raise ValueError(
            f"expected all {known.num_items} items of the tokenizer in {path}, found {len(missing)} missing, for instance "
            f"{missing[:5]}: its codes stay, so its items do, too"
        )
    new = np.setdiff1d(np.arange(len(items)), places)
    return items.iloc[np.concatenate([places, new])]


def prepare(args: PrepareArguments) -> Path:
    """Write the prepared folder (see the module's docstring) and return its path.

    Does nothing where `prepare.json` records equal arguments and input files.

    Raises:
        ValueError: for tables that are not as described; says which rows and what to do.
    """
    output_dir = Path(args.output_dir)
    record_file = output_dir / "prepare.json"
    earlier = None if args.tokenizer is None else SemanticIdTokenizer.from_pretrained(args.tokenizer)
    record = work_record(args, earlier)
    if record_file.exists() and _same_work(json.loads(record_file.read_text()), record):
        print(f"{output_dir} is already prepared with these arguments and inputs")
        return output_dir

    # Tables
    interactions, items, kept = read_tables(args)
    if earlier is not None:
        items = with_known_first(items, earlier, args.items)
    behaviors = behaviors_of(kept, earlier, args.interactions)
    splits = leave_one_out(
        users=kept["user_id"].to_numpy(),
        items=pd.Index(items["item_id"]).get_indexer(kept["item_id"]),
        behaviors=pd.Index(behaviors).get_indexer(kept["behavior"]),
        timestamps=kept["timestamp"].to_numpy(),
        positions=kept["position"].to_numpy(),
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    record_file.unlink(missing_ok=True)  # written last: a folder that has it is complete

    # Embeddings and semantic IDs
    embeddings, source = content_embeddings(
        items,
        args.items,
        output_dir / "item_embeddings.safetensors",
        embeddings_file=args.embeddings,
        text_template=args.text_template,
        encoder=args.encoder,
        encoder_dtype=args.encoder_dtype,
        max_text_tokens=args.max_text_tokens,
    )
    train_items = splits["train"].data.column("items").combine_chunks().flatten().to_numpy()
    popularity = np.bincount(train_items, minlength=len(items))
    if earlier is None:
        provenance = {**source, "inputs": record["inputs"]}  # the tokenizer adds to it
        tokenizer = new_tokenizer(args, items, embeddings, behaviors, popularity, provenance)
    else:
        tokenizer = with_new_items(earlier, items, embeddings)
    tokenizer.save_pretrained(output_dir / "tokenizer")
    splits.save_to_disk(output_dir / "dataset")

    # Record
    # The statistics of an earlier tokenizer describe its first items only.
    statistics = None if earlier is not None else tokenizer.provenance.get("codebook_statistics")
    ordered_by = "position" if (interactions["position"] != interactions["timestamp"]).any() else "timestamp"
    record["counts"] = counts_of(interactions, kept, len(splits["train"]), popularity, behaviors)
    record |= {"behaviors": behaviors, "embeddings": source, "codebook_health": statistics, "ordered_by": ordered_by}
    write_json(record_file, record)
    print(", ".join(f"{name}: {count:,}" for name, count in record["counts"].items()))
    print(f"dropped {record['counts']['dropped_users']:,} users with fewer than {args.min_interactions} interactions")
    if statistics is not None:
        print(CodebookStatistics(**statistics))
    return output_dir


def work_record(args: PrepareArguments, earlier: SemanticIdTokenizer | None) -> dict[str, Any]:
    """Record the arguments and hashes of the inputs; raise `ValueError` for arguments that do not go together."""
    record: dict[str, Any] = {
        "arguments": asdict(args),
        "inputs": {name: sha256(Path(path)) for name in TABLES if (path := getattr(args, name))},
    }
    if args.encoder and (weights := weights_of(args.encoder)):  # its folder's name may stay when they change
        record["inputs"]["encoder"] = weights
    defaults = PrepareArguments("", "", "")
    without_use = [name for name in QUANTIZING if getattr(args, name) != getattr(defaults, name)]
    if earlier is not None and without_use:
        raise ValueError(
            f"expected none of {without_use} beside --tokenizer, whose codebooks stay, found values of them: leave them "
            "out"
        )
    if earlier is not None:
        record["inputs"]["tokenizer"] = earlier.provenance["sha256"]
    return record


def read_tables(args: PrepareArguments) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Read and check the interactions and the items, and keep the interactions of users who have enough of them."""
    if args.min_interactions < 3:
        raise ValueError(
            f"expected min_interactions of 3 or more, found {args.min_interactions}: leave-one-out takes one "
            "interaction for the test, one for validation and needs one to train on"
        )
    interactions = read_interactions(Path(args.interactions))
    items = read_table(Path(args.items), ["item_id"])
    check_rows(~items["item_id"].duplicated(), items["item_id"], "one row an item", "duplicate item_id", args.items)
    known = interactions["item_id"].isin(items["item_id"])
    check_rows(known, interactions["item_id"], "items of the items table", "an unknown item_id", args.interactions)
    per_user = interactions.groupby("user_id")["user_id"].transform("size")
    kept = interactions[per_user >= args.min_interactions]
    if len(kept) == 0:
        raise ValueError(
            f"expected users with {args.min_interactions} or more interactions, found at most {per_user.max()} in "
            f"{args.interactions}: lower --min_interactions or bring longer histories"
        )
    return interactions, items, kept


def behaviors_of(kept: pd.DataFrame, earlier: SemanticIdTokenizer | None, path: str) -> list[str]:
    """List the behaviors, those of the earlier tokenizer if there is one; raise `ValueError` for names of other use."""
    behaviors = sorted(kept["behavior"].unique())
    if earlier is not None:
        is_known = kept["behavior"].isin(earlier.behaviors)
        check_rows(is_known, kept["behavior"], f"behaviors among {earlier.behaviors}", "another", path)
        behaviors = list(earlier.behaviors)
    check_behaviors(behaviors)  # before what takes minutes
    if NEXT_TARGET in behaviors:
        raise ValueError(
            f"expected behaviors other than {NEXT_TARGET!r}, which is a ranking target of its own, found it: rename it"
        )
    return behaviors


def titles_of(items: pd.DataFrame) -> list[str] | None:
    """Return the titles of the items; None without such a column."""
    return items["title"].fillna("").astype(str).tolist() if "title" in items else None


def with_new_items(earlier: SemanticIdTokenizer, items: pd.DataFrame, embeddings: np.ndarray) -> SemanticIdTokenizer:
    """Add the items behind the earlier ones to their tokenizer."""
    ids, titles, count = items["item_id"].tolist(), titles_of(items), earlier.num_items
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
    """Make codes of the embeddings, or one code an item with `--atomic`, and a tokenizer of them."""
    ids, titles = items["item_id"].tolist(), titles_of(items)
    if args.atomic:
        codes = np.arange(len(ids))[:, None]
        return SemanticIdTokenizer.from_codes(ids, codes, [len(ids)], behaviors, titles, provenance=provenance)
    quantizer = ResidualKMeans(
        tuple(args.codebook_sizes), normalize=args.normalize, pca_dim=args.pca_dim, seed=args.seed
    ).fit(embeddings)
    return SemanticIdTokenizer.from_embeddings(
        ids, embeddings, quantizer, behaviors, titles, popularity.tolist(), provenance=provenance
    )


def counts_of(
    interactions: pd.DataFrame, kept: pd.DataFrame, num_users: int, popularity: np.ndarray, behaviors: list[str]
) -> dict[str, int]:
    """Count users, interactions and items, and what was dropped."""
    return {
        "users": num_users,
        "interactions": len(kept),
        "dropped_users": interactions["user_id"].nunique() - num_users,
        "dropped_interactions": len(interactions) - len(kept),
        "catalog": len(popularity),
        "items_in_training": int((popularity > 0).sum()),
        "repeated_pairs": int(kept.duplicated(["user_id", "item_id"]).sum()),
        # Their order within the second (or day) is the file's: a limit of what a leave-one-out result means.
        "interactions_of_tied_time": int(kept.duplicated(["user_id", "position"], keep=False).sum()),
        **{f"behavior {name}": int((kept["behavior"] == name).sum()) for name in behaviors},
    }


def _same_work(old: dict[str, Any], new: dict[str, Any]) -> bool:
    def without_paths(record: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in record["arguments"].items() if name not in PATHS}

    return without_paths(old) == without_paths(new) and old["inputs"] == new["inputs"]


if __name__ == "__main__":
    prepare(*parse_arguments(PrepareArguments))
