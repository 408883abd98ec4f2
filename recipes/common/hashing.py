"""Hash files and model weights."""

import hashlib
from pathlib import Path

import torch


def sha256(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"expected an existing file, found none at {path}: check the path")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_of(encoder: str | Path) -> list[str]:
    """Hashes of the weights in a local folder; none of a model on the Hub."""
    files = (path for kind in ("*.safetensors", "*.bin") for path in Path(encoder).glob(kind))
    return [sha256(path) for path in sorted(files)]


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 of all weights and buffers, wherever they were loaded from."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
