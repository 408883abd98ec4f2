"""Tables in the schema of TAOBAO-MM, of any size, to try recipes.papers.taobao.prepare on: 1M items and 200k users take some minutes.

    python -m recipes.papers.taobao.synthetic --output_dir runs/taobao/tables
    python -m recipes.papers.taobao.synthetic --output_dir runs/taobao-small/tables --num_items 250000 --num_users 50000

What is like the original: types, names, hashed ids sorted as text, one row group a user table, one duplicated key
among the embeddings, embeddings cut to int8 with clusters within clusters and some equal ones, rare items of the
histories without an embedding, repeats (a fifth of all steps repeats the one before), 14 % clicks, of which
most repeat the history. What is not: the sizes, and that no columns but those that the recipe reads mean anything.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from recipes.common.arguments import parse_arguments
from recipes.papers.taobao.tables import EMBEDDING, EMBEDDINGS, HISTORY, ITEM, LABEL, SAMPLES, USER, USERS

DIM = 128
CHUNK = 50_000  # items
CHUNK_USERS = 2_000


@dataclass
class SyntheticArguments:
    """How large."""

    output_dir: str = field(metadata={"help": "Folder that receives the tables."})
    num_items: int = field(default=1_000_000, metadata={"help": "With an embedding; a tenth more are without."})
    num_users: int = field(default=200_000, metadata={"help": "A fifth of them are test users."})
    num_clusters: int = field(default=2_000, metadata={"help": "Groups of like items; a user has five favorites."})
    max_history: int = field(default=1_000, metadata={"help": "Length of most histories."})
    samples_per_user: float = field(
        default=11.0, metadata={"help": "Mean number; 14 percent of the samples are clicks."}
    )
    seed: int = field(default=0, metadata={"help": "Of everything."})


def main(args: SyntheticArguments) -> Path:
    """Writes the five tables and returns their folder."""
    folder, rng = Path(args.output_dir), np.random.default_rng(args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    # The last tenth has no embedding. An item's cluster is its position modulo their number.
    items = random_ids(args.num_items + args.num_items // 10, rng)
    write_embeddings(folder, items[: args.num_items], args.num_clusters, rng)
    ads = np.sort(rng.choice(items[: args.num_items], max(1, args.num_items // 9), replace=False))
    others = {name: rng.integers(1, 400, len(ads)) for name in ("206", "213", "214")}
    pq.write_table(pa.table({ITEM: ads, **others}), folder / "item_features.parquet")
    users = random_ids(args.num_users, rng)
    tests = args.num_users // 5
    for split, some in (("train", users[tests:]), ("test", users[:tests])):
        write_users(folder, split, in_text_order(some), items, args, rng)
    return folder


def random_ids(count: int, rng: np.random.Generator) -> np.ndarray:
    """Distinct int64 ids of either sign, none of them 0, in random order."""
    ids = np.empty(0, np.int64)
    while len(ids) < count:
        ids = np.union1d(ids, rng.integers(-(2**63), 2**63, count - len(ids), dtype=np.int64))
        ids = ids[ids != 0]
    return rng.permutation(ids)


def in_text_order(ids: np.ndarray) -> np.ndarray:
    """As the published tables are sorted: "-10" before "-9" before "8"."""
    return ids[np.argsort(ids.astype("S20"), kind="stable")]


def write_embeddings(folder: Path, items: np.ndarray, num_clusters: int, rng: np.random.Generator) -> None:
    """Unit vectors times 127, cut to int8: a center, one of its 40 sub-centers, and noise; 2 % equal another one."""
    top, sub = rng.normal(size=(num_clusters, DIM)), 0.6 * rng.normal(size=(num_clusters, 40, DIM))
    top, sub = top.astype(np.float32), sub.astype(np.float32)
    file, type_ = folder / f"{EMBEDDINGS}.parquet", pa.list_(pa.int8())
    clusters = dict(zip(items.tolist(), (np.arange(len(items)) % num_clusters).tolist(), strict=True))
    ordered = in_text_order(items)
    with pq.ParquetWriter(file, pa.schema({ITEM: pa.int64(), EMBEDDING: type_})) as writer:
        for start in tqdm(range(0, len(ordered), CHUNK), desc="embeddings"):
            ids = ordered[start : start + CHUNK]
            cluster = np.array([clusters[item] for item in ids.tolist()])
            vectors = top[cluster] + sub[cluster, rng.integers(0, 40, len(ids))]
            vectors += 0.4 * rng.standard_normal(vectors.shape, dtype=np.float32)
            copies = rng.random(len(ids)) < 0.02
            vectors[copies] = vectors[rng.integers(0, min(64, len(ids)), copies.sum())]
            if start + CHUNK >= len(ordered):  # the duplicated key
                ids, vectors = np.append(ids, ids[:1]), np.concatenate([vectors, vectors[:1] + 1])
            vectors *= 127 / np.linalg.norm(vectors, axis=1, keepdims=True)
            offsets = pa.array(np.arange(len(ids) + 1) * DIM, pa.int32())
            lists = pa.ListArray.from_arrays(offsets, pa.array(vectors.astype(np.int8).ravel()))
            writer.write_table(pa.table({ITEM: ids, EMBEDDING: lists}))


def draw_steps(
    favorites: np.ndarray, num_items: int, num_clusters: int, length: int, rng: np.random.Generator
) -> np.ndarray:
    """Positions of items, int64 `[users, length]`: from one of a user's clusters for a while, popular ones first, or a
    repeat of what came a step or some steps before."""
    count = len(favorites)
    # A new interest at a tenth of the steps.
    change = np.where(rng.random((count, length)) < 0.1, np.arange(length), 0)
    interest = rng.integers(0, favorites.shape[1], (count, length))
    interest = np.take_along_axis(interest, np.maximum.accumulate(change, axis=1), axis=1)
    cluster = np.take_along_axis(favorites, interest, axis=1)
    size = -(-num_items // num_clusters)
    within = (size * rng.random((count, length)) ** 3).astype(np.int64)
    steps = np.minimum(within * num_clusters + cluster, num_items - 1)
    chance = rng.random((count, length))
    lag = np.where(chance < 0.2, 1, np.where(chance < 0.42, rng.geometric(0.03, (count, length)), 0))
    source = np.maximum(np.arange(length) - lag, 0)
    rows = np.arange(count)
    for step in range(1, length):  # in order: what is repeated may be a repeat
        steps[:, step] = steps[rows, source[:, step]]
    return steps


def write_users(
    folder: Path, split: str, users: np.ndarray, items: np.ndarray, args: SyntheticArguments, rng: np.random.Generator
) -> None:
    """The user table, as one row group up to 1,048,576 users as `pyarrow` writes it, and the samples."""
    length, known = args.max_history, args.num_items
    histories = np.empty((len(users), length), np.int64)
    sample_users, sample_items, labels = [], [], []
    for start in tqdm(range(0, len(users), CHUNK_USERS), desc=f"{split} users"):
        some = users[start : start + CHUNK_USERS]
        favorites = rng.integers(0, args.num_clusters, (len(some), 5))
        steps = draw_steps(favorites, len(items), args.num_clusters, length, rng)
        padding = np.where(rng.random(len(some)) < 0.02, rng.integers(0, length, len(some)), 0)  # most are full
        histories[start : start + len(some)] = np.where(np.arange(length) < padding[:, None], 0, items[steps])
        counts = rng.geometric(1 / args.samples_per_user, len(some))
        row = np.repeat(np.arange(len(some)), counts)
        clicked = rng.random(len(row)) < 0.14
        within = (known // args.num_clusters * rng.random(len(row)) ** 3).astype(np.int64)
        favorite = favorites[row, rng.integers(0, 5, len(row))]
        shown = np.where(clicked, favorite, rng.integers(0, args.num_clusters, len(row)))
        target = np.minimum(within * args.num_clusters + shown, known - 1)
        again = steps[row, length - np.minimum(rng.geometric(0.1, len(row)), length)]
        target = np.where(clicked & (rng.random(len(row)) < 0.4) & (again < known), again, target)
        sample_users.append(some[row])
        sample_items.append(items[target])
        labels.append(clicked)
    offsets = pa.array(np.arange(len(users) + 1) * length, pa.int32())
    table = {USER: pa.array(users), **{f"130_{field}": pa.array(users % (5 * field)) for field in range(1, 6)}}
    table[HISTORY] = pa.ListArray.from_arrays(offsets, pa.array(histories.ravel()))
    table["151_2_180"] = pa.ListArray.from_arrays(offsets, pa.array(histories.ravel() % 25))
    pq.write_table(pa.table(table), folder / f"{USERS.format(split)}.parquet")
    clicked = np.concatenate(labels)
    one_hot = np.column_stack([~clicked, clicked]).astype(np.int8)
    label = pa.ListArray.from_arrays(pa.array(np.arange(len(clicked) + 1) * 2, pa.int32()), pa.array(one_hot.ravel()))
    samples = {LABEL: label, USER: np.concatenate(sample_users), ITEM: np.concatenate(sample_items)}
    pq.write_table(pa.table(samples), folder / f"{SAMPLES.format(split)}.parquet")


if __name__ == "__main__":
    main(*parse_arguments(SyntheticArguments))
