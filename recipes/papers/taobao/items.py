"""Map the embeddings of TAOBAO-MM's items by sorted id, and encode the items in chunks, in bounded memory.

The functions are stages of `recipes.papers.taobao.prepare`. Each one writes into its output folder and returns counts.
Some arrays of numbers grow with the items, 8 bytes per item each. The embeddings, 128 bytes per item, are a mapped
file.
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
# Items whose embeddings are floats at a time: 34 MB.
CHUNK = 65_536


def write_items(tables: Path, out: Path, embedding_column: str = EMBEDDING) -> dict:
    """
    Write `item_ids.npy` and `content_embeddings.npy`, with the first row of a repeated key.

    Args:
        tables: Folder of the tables.
        out: Folder that receives the arrays.
        embedding_column: Name of the embeddings' column.

    Returns:
        Counts of items, repeated keys, and advertised items with and without an embedding.

    Raises:
        ValueError: for a table without items.
    """
    # Sorted ids
    shards, num_rows = table_shards(tables, EMBEDDINGS, [ITEM, embedding_column])
    table_ids = np.empty(num_rows, np.int64)
    fill(table_ids, (scalars(batch, ITEM) for batch in progress(shards, [ITEM], num_rows, "item ids")))
    item_ids, places = sort_ids(table_ids)
    if len(item_ids) == 0:
        raise ValueError(f"`tables` must have items with embeddings, got none in {tables}. Download the table again.")
    with new_array(out / "item_ids.npy", np.int64, item_ids.shape) as mapped:
        mapped[:] = item_ids
    del table_ids

    # Embeddings in the order of the ids
    start = 0
    with new_array(out / "content_embeddings.npy", np.int8, (len(item_ids), DIM)) as embeddings:
        for batch in progress(shards, [embedding_column], num_rows, "embeddings"):
            values, _ = lists(batch, embedding_column, DIM)
            batch_places = places[start : start + batch.num_rows]
            is_first = batch_places >= 0
            embeddings[batch_places[is_first]] = values.reshape(-1, DIM)[is_first]
            start += batch.num_rows

    # Advertised items
    ads, num_ads = table_shards(tables, "item_features", [ITEM])
    indices = [
        find_items(item_ids, scalars(batch, ITEM)) for batch in progress(ads, [ITEM], num_ads, "advertised items")
    ]
    num_unknown = int((np.concatenate(indices) == UNKNOWN).sum()) if indices else 0
    num_repeated = num_rows - len(item_ids)
    print(f"{len(item_ids):,} items; left out {num_repeated:,} rows with a repeated key, all but the first of each")
    print(f"{num_unknown:,} of {num_ads:,} advertised items have no embedding; clicks on them will be left out")
    return {
        "items": len(item_ids),
        "repeated_keys": num_repeated,
        "advertised": num_ads,
        "advertised_unknown": num_unknown,
    }


def sort_ids(table_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Sort the ids of a table, int64 `[rows]`.

    Returns:
        Distinct ids `[N]`, sorted, and the place of each row among them, int32 `[rows]`; -1: a repeated id.
    """
    order = np.argsort(table_ids, kind="stable")
    is_first = np.ones(len(table_ids), bool)
    is_first[1:] = np.diff(table_ids[order]) != 0
    places = np.full(len(table_ids), -1, np.int32)
    places[order[is_first]] = np.arange(is_first.sum(), dtype=np.int32)
    return table_ids[order[is_first]], places


def fit(out: Path, codebook_sizes: list[int], points_per_code: int, num_iterations: int, seed: int) -> dict:
    """
    Fit the codebooks on a sample of items and write `semantic_ids.safetensors`.

    Args:
        out: Folder of the arrays, with `content_embeddings.npy`.
        codebook_sizes: Codes of each level but the collision token's.
        points_per_code: Items of the sample per code of the largest level.
        num_iterations: Iterations of k-means per level.
        seed: Seed of the sample and the codebooks.

    Returns:
        Counts of sampled items and iterations.
    """
    # Sample
    rng = np.random.default_rng(seed)
    embeddings = np.load(out / "content_embeddings.npy", mmap_mode="r")
    points = min(points_per_code * max(codebook_sizes), len(embeddings))
    sample = np.sort(rng.choice(len(embeddings), points, replace=False, shuffle=False))

    # Codebooks: as `fit` of the quantizer, with a progress bar
    quantizer = ResidualKMeans(
        codebook_sizes,
        num_iterations=num_iterations,
        max_points_per_centroid=points_per_code,
        seed=seed,
    )
    quantizer.codebooks = ()
    residual = _floats(embeddings[sample])
    for level, size in enumerate(tqdm(codebook_sizes, desc="codebooks", unit="level")):
        level_quantizer = ResidualKMeans(
            [size], num_iterations=num_iterations, max_points_per_centroid=points, seed=seed + level
        )
        residual -= level_quantizer.decode(level_quantizer.fit(residual).encode(residual))
        quantizer.codebooks += level_quantizer.codebooks
    quantizer.save(out)
    return {"points": points, "num_iterations": num_iterations}


def encode(out: Path) -> dict:
    """Write `item_codes.npy` without its last column, and remove a tokenizer of earlier codes."""
    if (out / "tokenizer").exists():
        shutil.rmtree(out / "tokenizer")
    embeddings = np.load(out / "content_embeddings.npy", mmap_mode="r")
    quantizer = ResidualKMeans.load(out)
    with (
        new_array(out / "item_codes.npy", np.int32, (len(embeddings), quantizer.num_levels + 1)) as codes,
        tqdm(total=len(embeddings), desc="codes", unit="item", unit_scale=True) as bar,
    ):
        for start in range(0, len(embeddings), CHUNK):
            chunk = embeddings[start : start + CHUNK]
            codes[start : start + CHUNK, :-1] = quantizer.encode(_floats(chunk))
            bar.update(len(chunk))
    return {"items": len(embeddings)}


def make_unique(out: Path, last_level_size: int) -> dict:
    """
    Write the collision tokens, the last column of `item_codes.npy`, and print the codebook statistics of the others.

    Args:
        out: Folder of the arrays, with codebooks and codes.
        last_level_size: Most items that may share all codes but the collision token.

    Returns:
        Codebook sizes, with that of the collision token, and the codebook statistics.

    Raises:
        ValueError: if more items share their codes.
    """
    # Collision tokens
    codes = np.load(out / "item_codes.npy", mmap_mode="r+")
    quantizer = ResidualKMeans.load(out)
    tokens = assign_collision_tokens(codes[:, :-1])
    width = int(tokens.max()) + 1
    if width > last_level_size:
        raise ValueError(
            f"`last_level_size` must be at least the number of items that share their codes, {width}, got "
            f"{last_level_size} (too few for {(tokens >= last_level_size).sum():,} items in all). Raise it, or drop "
            "items with equal embeddings from the table; the codes stay."
        )
    codes[:, -1] = tokens
    del tokens
    codes.flush()

    # Codebook statistics, with the reconstruction error of a sample
    sample = np.linspace(0, len(codes) - 1, min(len(codes), CHUNK)).astype(np.int64)
    embeddings = np.load(out / "content_embeddings.npy", mmap_mode="r")
    decoded = quantizer.decode(codes[sample, :-1])
    statistics = codebook_statistics(codes[:, :-1], quantizer.codebook_sizes, _floats(embeddings[sample]), decoded)
    print(statistics)
    return {"codebook_sizes": [*quantizer.codebook_sizes, width], "codebook_statistics": statistics.to_dict()}


def write_tokenizer(out: Path) -> dict:
    """Write `tokenizer/`; its memory grows with the items."""
    item_ids = np.load(out / "item_ids.npy")
    codes = np.load(out / "item_codes.npy")
    quantizer = ResidualKMeans.load(out)
    sizes = (*quantizer.codebook_sizes, int(codes[:, -1].max()) + 1)
    tokenizer = SemanticIdTokenizer.from_codes(item_ids, codes, sizes, BEHAVIORS, quantizer=quantizer)
    tokenizer.save_pretrained(out / "tokenizer")
    return {"items": len(item_ids)}


def _floats(embeddings: np.ndarray) -> np.ndarray:
    return embeddings.astype(np.float32) / np.float32(127)
