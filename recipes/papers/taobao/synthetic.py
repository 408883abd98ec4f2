"""Write synthetic tables in the schema of TAOBAO-MM, of any size, to try `recipes.papers.taobao.prepare`.

    python -m recipes.papers.taobao.synthetic --output_dir runs/taobao/tables
    python -m recipes.papers.taobao.synthetic --output_dir runs/taobao-small/tables \
        --num_items 250000 --num_users 50000

The folder receives six Parquet files. The default size, 1M items and 200k users, takes some minutes.

Like the published tables, the synthetic ones have:

- the same column names and types, hashed ids sorted as text, and one row group per user table;
- one duplicated key among the embeddings; embeddings in int8 with clusters within clusters, some of them equal;
- rare items of the histories without an embedding;
- repeats: a fifth of all steps repeats the step before;
- 14 % clicks, most of which repeat the history.

Unlike the published tables, they are small, and columns that the recipe does not read have no meaning.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from recipes.common.arguments import COUNT, SEED, check_ranges, parse_arguments
from recipes.common.files import check_writable
from recipes.papers.taobao.tables import EMBEDDING, EMBEDDINGS, HISTORY, ITEM, LABEL, SAMPLES, USER, USERS

DIM = 128
# Items and users that are written together.
CHUNK = 50_000
CHUNK_USERS = 2_000

RANGES = {
    **dict.fromkeys(("num_items", "num_clusters", "max_history", "samples_per_user"), COUNT),
    "num_users": ("5 or more, since a fifth of them are test users", lambda value: value >= 5),
    "seed": SEED,
}


@dataclass
class SyntheticArguments:
    """Sizes of the synthetic tables."""

    output_dir: str = field(metadata={"help": "Folder that receives the tables."})
    num_items: int = field(
        default=1_000_000, metadata={"help": "Items with an embedding. A tenth as many items have no embedding."}
    )
    num_users: int = field(default=200_000, metadata={"help": "Users. A fifth of them are test users."})
    num_clusters: int = field(
        default=2_000, metadata={"help": "Clusters of similar items. Each user likes five of them."}
    )
    max_history: int = field(default=1_000, metadata={"help": "Items of a history, of which a few are shorter."})
    samples_per_user: float = field(
        default=11.0, metadata={"help": "Mean number of samples per user. 14 percent of the samples are clicks."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of all random draws."})


def main(args: SyntheticArguments) -> Path:
    """Write the six tables and return their folder."""
    check_ranges(args, RANGES)
    if args.num_clusters > args.num_items:
        raise ValueError(
            f"`num_clusters` must be at most num_items={args.num_items}, got {args.num_clusters}. Lower it."
        )
    check_writable(args.output_dir, "output_dir")
    folder = Path(args.output_dir)
    rng = np.random.default_rng(args.seed)
    # The last items have no embedding. Position modulo `num_clusters`: the cluster.
    items = random_ids(args.num_items + args.num_items // 10, rng)
    write_embeddings(folder, items[: args.num_items], args.num_clusters, rng)
    ads = np.sort(rng.choice(items[: args.num_items], max(1, args.num_items // 9), replace=False))
    others = {name: rng.integers(1, 400, len(ads)) for name in ("206", "213", "214")}
    pq.write_table(pa.table({ITEM: ads, **others}), folder / "item_features.parquet")
    users = random_ids(args.num_users, rng)
    num_test_users = args.num_users // 5
    for split, split_users in (("train", users[num_test_users:]), ("test", users[:num_test_users])):
        write_users(folder, split, in_text_order(split_users), items, args, rng)
    return folder


def random_ids(count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw distinct int64 ids of either sign, without 0, in random order."""
    ids = np.empty(0, np.int64)
    while len(ids) < count:
        ids = np.union1d(ids, rng.integers(-(2**63), 2**63, count - len(ids), dtype=np.int64))
        ids = ids[ids != 0]
    return rng.permutation(ids)


def in_text_order(ids: np.ndarray) -> np.ndarray:
    """Sort ids as text, as in the published tables: "-10" before "-9" before "8"."""
    return ids[np.argsort(ids.astype("S20"), kind="stable")]


def write_embeddings(folder: Path, items: np.ndarray, num_clusters: int, rng: np.random.Generator) -> None:
    """
    Write the embedding table: unit vectors times 127 in int8.

    A vector is the sum of a cluster's center, one of its 40 sub-centers, and noise; 2 % equal another vector.
    """
    # Centers
    centers = rng.normal(size=(num_clusters, DIM))
    sub_centers = 0.6 * rng.normal(size=(num_clusters, 40, DIM))
    centers = centers.astype(np.float32)
    sub_centers = sub_centers.astype(np.float32)

    # Table
    file = folder / f"{EMBEDDINGS}.parquet"
    schema = pa.schema({ITEM: pa.int64(), EMBEDDING: pa.list_(pa.int8())})
    clusters = dict(zip(items.tolist(), (np.arange(len(items)) % num_clusters).tolist(), strict=True))
    ordered = in_text_order(items)
    with pq.ParquetWriter(file, schema) as writer:
        for start in tqdm(range(0, len(ordered), CHUNK), desc="embeddings"):
            ids = ordered[start : start + CHUNK]
            cluster = np.array([clusters[item] for item in ids.tolist()])
            vectors = centers[cluster] + sub_centers[cluster, rng.integers(0, 40, len(ids))]
            vectors += 0.4 * rng.standard_normal(vectors.shape, dtype=np.float32)
            copies = rng.random(len(ids)) < 0.02
            vectors[copies] = vectors[rng.integers(0, min(64, len(ids)), copies.sum())]
            # The last chunk has the duplicated key.
            if start + CHUNK >= len(ordered):
                ids = np.append(ids, ids[:1])
                vectors = np.concatenate([vectors, vectors[:1] + 1])
            vectors *= 127 / np.linalg.norm(vectors, axis=1, keepdims=True)
            offsets = pa.array(np.arange(len(ids) + 1) * DIM, pa.int32())
            lists = pa.ListArray.from_arrays(offsets, pa.array(vectors.astype(np.int8).ravel()))
            writer.write_table(pa.table({ITEM: ids, EMBEDDING: lists}))


def draw_steps(
    favorites: np.ndarray, num_items: int, num_clusters: int, length: int, rng: np.random.Generator
) -> np.ndarray:
    """
    Draw the histories of users, as positions of items int64 `[users, length]`.

    A user stays with a cluster for a while, and popular items come first. Some steps repeat an earlier one.

    Args:
        favorites: Clusters that each user likes, int64 `[users, 5]`.
        num_items: Number of items.
        num_clusters: Number of clusters.
        length: Items of a history.
        rng: Random generator.
    """
    count = len(favorites)
    # A tenth of the steps begin a new interest.
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
    users = np.arange(count)
    # Copy in order: a repeated step may itself repeat.
    for step in range(1, length):
        steps[:, step] = steps[users, source[:, step]]
    return steps


def write_users(
    folder: Path, split: str, users: np.ndarray, items: np.ndarray, args: SyntheticArguments, rng: np.random.Generator
) -> None:
    """
    Write the user table and the samples of a split.

    `pyarrow` writes up to 1,048,576 users as one row group, as in the published tables.
    """
    length = args.max_history
    histories = np.empty((len(users), length), np.int64)
    samples = []
    for start in tqdm(range(0, len(users), CHUNK_USERS), desc=f"{split} users"):
        chunk = users[start : start + CHUNK_USERS]
        favorites = rng.integers(0, args.num_clusters, (len(chunk), 5))
        steps = draw_steps(favorites, len(items), args.num_clusters, length, rng)
        # Most histories are full.
        padding = np.where(rng.random(len(chunk)) < 0.02, rng.integers(0, length, len(chunk)), 0)
        histories[start : start + len(chunk)] = np.where(np.arange(length) < padding[:, None], 0, items[steps])
        sample_users, targets, clicked = draw_samples(favorites, steps, args, rng)
        samples.append((chunk[sample_users], items[targets], clicked))
    write_user_table(folder / f"{USERS.format(split)}.parquet", users, histories)
    write_samples(folder / f"{SAMPLES.format(split)}.parquet", *map(np.concatenate, zip(*samples, strict=True)))


def draw_samples(
    favorites: np.ndarray, steps: np.ndarray, args: SyntheticArguments, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Draw the samples of users: the user's place, the item's position and whether it was clicked, each `[samples]`.

    Args:
        favorites: Clusters that each user likes, int64 `[users, 5]`.
        steps: Histories as `draw_steps` returns them, int64 `[users, length]`.
        args: Sizes of the tables.
        rng: Random generator.
    """
    num_users, length = steps.shape
    counts = rng.geometric(1 / args.samples_per_user, num_users)
    user = np.repeat(np.arange(num_users), counts)
    clicked = rng.random(len(user)) < 0.14

    # Clicks are on items of a favorite cluster
    within = (args.num_items // args.num_clusters * rng.random(len(user)) ** 3).astype(np.int64)
    favorite = favorites[user, rng.integers(0, favorites.shape[1], len(user))]
    cluster = np.where(clicked, favorite, rng.integers(0, args.num_clusters, len(user)))
    target = np.minimum(within * args.num_clusters + cluster, args.num_items - 1)

    # Some clicks repeat a recent item with an embedding
    repeated = steps[user, length - np.minimum(rng.geometric(0.1, len(user)), length)]
    is_repeat = clicked & (rng.random(len(user)) < 0.4) & (repeated < args.num_items)
    return user, np.where(is_repeat, repeated, target), clicked


def write_user_table(file: Path, users: np.ndarray, histories: np.ndarray) -> None:
    """Write the user ids `[users]`, some features without meaning, and the histories of item ids `[users, length]`."""
    length = histories.shape[1]
    offsets = pa.array(np.arange(len(users) + 1) * length, pa.int32())
    table = {USER: pa.array(users), **{f"130_{field}": pa.array(users % (5 * field)) for field in range(1, 6)}}
    table[HISTORY] = pa.ListArray.from_arrays(offsets, pa.array(histories.ravel()))
    table["151_2_180"] = pa.ListArray.from_arrays(offsets, pa.array(histories.ravel() % 25))
    pq.write_table(pa.table(table), file)


def write_samples(file: Path, users: np.ndarray, items: np.ndarray, clicked: np.ndarray) -> None:
    """Write samples: user ids, item ids and labels, each `[samples]`; a label is one-hot."""
    one_hot = np.column_stack([~clicked, clicked]).astype(np.int8)
    offsets = pa.array(np.arange(len(clicked) + 1) * 2, pa.int32())
    label = pa.ListArray.from_arrays(offsets, pa.array(one_hot.ravel()))
    pq.write_table(pa.table({LABEL: label, USER: users, ITEM: items}), file)


if __name__ == "__main__":
    main(*parse_arguments(SyntheticArguments))
