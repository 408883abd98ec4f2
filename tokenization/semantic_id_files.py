"""The two files that a semantic-id folder adds to a tokenizer's own: their names, and reading them with clear errors.

`semantic_ids.safetensors` holds the codebooks (`codebook_0` ... float32 [K, D]) with the quantizer's settings in its
metadata, and in a tokenizer's folder also the item codes (`item_codes` int32 [N, L]). `items.json` holds item ids,
titles and provenance.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

ITEMS_FILE = "items.json"
SEMANTIC_IDS_FILE = "semantic_ids.safetensors"


def read_tensors(path: str | Path | None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a safetensors file into numpy arrays and its metadata. `ValueError` if it is missing or damaged."""
    path = _require_file(path, SEMANTIC_IDS_FILE)
    try:
        with safe_open(str(path), framework="numpy") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"expected a complete safetensors file at {path}, found one that cannot be read ({error}): it is "
            "truncated or damaged, save or download it again"
        ) from error


def read_json_object(path: str | Path | None, name: str) -> dict[str, Any]:
    """Reads a JSON file that holds one object. `ValueError` if it is missing, damaged or something else."""
    path = _require_file(path, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ValueError(
            f"expected a complete JSON file at {path}, found one that cannot be read ({error}): it is truncated or "
            "damaged, save or download it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {path}, found a {type(content).__name__}: save the folder again")
    return content


def _require_file(path: str | Path | None, name: str) -> Path:
    if path is None or not Path(path).is_file():
        raise ValueError(
            f"expected the file {name} beside the other tokenizer files, found none: a folder that was saved with "
            "`save_pretrained` has it, copy or download the whole folder"
        )
    return Path(path)
