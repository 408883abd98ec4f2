"""The items of TAOBAO-MM in bounded memory: embeddings mapped by sorted id, codes by chunks, a last code to tell apart.

Stages of recipes.papers.taobao.prepare; each writes into its output folder and returns what it counted. What grows with the items are
some arrays of numbers, 8 bytes an item each; the embeddings, 128 bytes an item, are a mapped file.
"""

import shutil
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from recipes.papers.taobao.tables import (
    BEHAVIORS,
    EMBEDDING,
    EMBEDDINGS,
    ITEM,
    UNKNOWN,
    fill,
    find_items,
    lists,
    new_array,
    progress,
    scalars,
    table_shards,
)
from tokenization import ResidualKMeans, SemanticIdTokenizer, assign_collision_tokens, codebook_statistics

DIM = 128
CHUNK = 65_536  # items that are floats at a time: 34 MB


def write_items(tables: Path, out: Path, embedding_column: str = EMBEDDING) -> dict:
    """`item_ids.npy` and `content_embeddings.npy`. Of a repeated key the first row is kept."""
    shards, rows = table_shards(tables, EMBEDDINGS, [ITEM, embedding_column])
    table_ids = np.empty(rows, np.int64)
    fill(table_ids, (scalars(batch, ITEM) for batch in progress(shards, [ITEM], rows, "item ids")))
    item_ids, place = sort_ids(table_ids)
    if len(item_ids) == 0:
        raise ValueError(f"expected items with embeddings in {tables}, found none: download the table again")
    with new_array(out / "item_ids.npy", np.int64, item_ids.shape) as mapped:
        mapped[:] = item_ids
    del table_ids
    start = 0
    with new_array(out / "content_embeddings.npy", np.int8, (len(item_ids), DIM)) as embeddings:
        for batch in progress(shards, [embedding_column], rows, "embeddings"):
            values, _ = lists(batch, embedding_column, DIM)
            here = place[start : start + batch.num_rows]
            embeddings[here[here >= 0]] = values.reshape(-1, DIM)[here >= 0]
            start += batch.num_rows
    ads, count = table_shards(tables, "item_features", [ITEM])
    found = [find_items(item_ids, scalars(batch, ITEM)) for batch in progress(ads, [ITEM], count, "advertised items")]
    without = int((np.concatenate(found) == UNKNOWN).sum()) if found else 0
    repeated = rows - len(item_ids)
    print(f"{len(item_ids):,} items; {repeated:,} rows with a repeated key left out, the first of each kept")
    print(f"{without:,} of {count:,} advertised items have no embedding: clicks on them will be left out")
    return {"items": len(item_ids), "repeated_keys": repeated, "advertised": count, "advertised_unknown": without}


def sort_ids(table_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a table, int64 `[rows]` -> each once, sorted, `[N]`, and where a row goes, int32 `[rows]`; -1: a repeated key."""
    order = np.argsort(table_ids, kind="stable")
    first = np.ones(len(table_ids), bool)
    first[1:] = np.diff(table_ids[order]) != 0
    place = np.full(len(table_ids), -1, np.int32)
    place[order[first]] = np.arange(first.sum(), dtype=np.int32)
    return table_ids[order[first]], place


def fit(out: Path, codebook_sizes: list[int], points_per_code: int, num_iterations: int, seed: int) -> dict:
    """`semantic_ids.safetensors`, on a sample of items."""
    rng = np.random.default_rng(seed)
    embeddings = np.load(out / "content_embeddings.npy", mmap_mode="r")
    points = min(points_per_code * max(codebook_sizes), len(embeddings))
    rows = np.sort(rng.choice(len(embeddings), points, replace=False, shuffle=False))
    quantizer = ResidualKMeans(
        codebook_sizes,
        num_iterations=num_iterations,
        max_points_per_centroid=points_per_code,
        seed=seed,
    )
    quantizer.codebooks, residual = (), _floats(embeddings[rows])
    # What `fit` does, one level at a time: each takes minutes, and it has no bar.
    for level, size in enumerate(tqdm(codebook_sizes, desc="codebooks", unit="level")):
        one = ResidualKMeans([size], num_iterations=num_iterations, max_points_per_centroid=points, seed=seed + level)
        residual -= one.decode(one.fit(residual).encode(residual))
        quantizer.codebooks += one.codebooks
    quantizer.save(out)
    return {"points": points, "num_iterations": num_iterations}


def encode(out: Path) -> dict:
    """`item_codes.npy` but for its last column. A tokenizer, which spells by the codes before, is removed."""
    if (out / "tokenizer").exists():
        shutil.rmtree(out / "tokenizer")
    embeddings, quantizer = np.load(out / "content_embeddings.npy", mmap_mode="r"), ResidualKMeans.load(out)
    with (
        new_array(out / "item_codes.npy", np.int32, (len(embeddings), quantizer.num_levels + 1)) as codes,
        tqdm(total=len(embeddings), desc="codes", unit="item", unit_scale=True) as bar,
    ):
        for start in range(0, len(embeddings), CHUNK):
            some = embeddings[start : start + CHUNK]
            codes[start : start + CHUNK, :-1] = quantizer.encode(_floats(some))
            bar.update(len(some))
    return {"items": len(embeddings)}


def make_unique(out: Path, last_level_size: int) -> dict:
    """The last column of `item_codes.npy`, and the health of the others."""
    codes, quantizer = np.load(out / "item_codes.npy", mmap_mode="r+"), ResidualKMeans.load(out)
    suffixes = assign_collision_tokens(codes[:, :-1])
    width = int(suffixes.max()) + 1
    if width > last_level_size:
        raise ValueError(
            f"expected at most {last_level_size} items to share the first codes, found {width} (and "
            f"{(suffixes >= last_level_size).sum():,} items too many in all): are their embeddings equal? Drop such items "
            "from the table, or raise --last_level_size; the codes are kept"
        )
    codes[:, -1] = suffixes
    del suffixes
    codes.flush()
    sample = np.linspace(0, len(codes) - 1, min(len(codes), CHUNK)).astype(np.int64)
    embeddings = np.load(out / "content_embeddings.npy", mmap_mode="r")
    approximation = quantizer.decode(codes[sample, :-1])
    health = codebook_statistics(codes[:, :-1], quantizer.codebook_sizes, _floats(embeddings[sample]), approximation)
    print(health)
    return {"codebook_sizes": [*quantizer.codebook_sizes, width], "health": health.to_dict()}


def write_tokenizer(out: Path) -> dict:
    """`tokenizer/`. Its memory grows with the items."""
    item_ids, codes = np.load(out / "item_ids.npy"), np.load(out / "item_codes.npy")
    quantizer = ResidualKMeans.load(out)
    sizes = (*quantizer.codebook_sizes, int(codes[:, -1].max()) + 1)
    SemanticIdTokenizer.from_codes(item_ids, codes, sizes, BEHAVIORS, quantizer=quantizer).save_pretrained(
        out / "tokenizer"
    )
    return {"items": len(item_ids)}


def _floats(embeddings: np.ndarray) -> np.ndarray:
    return embeddings.astype(np.float32) / np.float32(127)
