"""Hash files and model weights."""

import hashlib
from pathlib import Path

import torch


def sha256(path: Path, name: str = "path") -> str:
    """
    Return the SHA-256 of a file's content.

    Raises:
        ValueError: if the file, the value of the argument `name`, does not exist.
    """
    if not path.is_file():
        raise ValueError(f"`{name}` must be an existing file, got {path}. Check the path.")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_of(encoder: str | Path) -> list[str]:
    """Return the hashes of the weight files in a local folder; an empty list for a model on the Hub."""
    files = (path for kind in ("*.safetensors", "*.bin") for path in Path(encoder).glob(kind))
    return [sha256(path) for path in sorted(files)]


def weights_hash(model: torch.nn.Module) -> str:
    """Return the SHA-256 of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
