"""The two files that a folder of semantic IDs adds to a tokenizer's own files: names and readers with clear errors.

`semantic_ids.safetensors` holds the codebooks (`codebook_0`, ..., float32 [K, D]) and the quantizer's settings as
metadata. In a tokenizer's folder it also holds the item codes (`item_codes`, int32 [N, L]).
`items.json` holds item IDs, titles and provenance.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

ITEMS_FILE = "items.json"
SEMANTIC_IDS_FILE = "semantic_ids.safetensors"


def read_tensors(path: str | Path | None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the arrays and the metadata of a safetensors file.

    Raises:
        ValueError: The file is missing or damaged.
    """
    path = _require_file(path, SEMANTIC_IDS_FILE)
    try:
        with safe_open(str(path), framework="numpy") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} must be a complete safetensors file, got a truncated or damaged file ({error}). Save or download "
            "the file again."
        ) from error


def write_tensors(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Write a whole safetensors file or none, which whoever may read the user's other files may read."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.unlink(missing_ok=True)
    # safetensors makes files that only their owner may read, whatever the umask.
    unfinished.touch()
    mode = unfinished.stat().st_mode
    save_file(tensors, unfinished, metadata=metadata)
    unfinished.chmod(mode)
    os.replace(unfinished, path)


def read_json_object(path: str | Path | None, name: str) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Args:
        path: Path of the file. None: the file is missing.
        name: File name for the error message.

    Raises:
        ValueError: The file is missing or damaged, or holds another JSON type.
    """
    path = _require_file(path, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    # JSONDecodeError and UnicodeDecodeError are both ValueErrors.
    except ValueError as error:
        raise ValueError(
            f"{path} must be a complete JSON file, got a truncated or damaged file ({error}). Save or download the "
            "file again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}. Save the folder again.")
    return content


def _require_file(path: str | Path | None, name: str) -> Path:
    if path is None or not Path(path).is_file():
        place = "" if path is None else f" at {path}"
        raise ValueError(
            f"{name} must stand beside the other tokenizer files, got no file{place}. Copy or download the whole "
            "folder that `save_pretrained` wrote."
        )
    # safetensors reports such a file as missing.
    if not os.access(path, os.R_OK):
        raise ValueError(
            f"{path} must be readable, got no permission to read {name}. Ask its owner for it (`chmod a+r`)."
        )
    return Path(path)
