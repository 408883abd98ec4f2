"""Write whole files or none, read them with errors that name them, and check paths before the work."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors import SafetensorError

from recipes.common.hashing import sha256

# Words for a full or failing disk. Many writers report it without a file, in errors of their own.
WRITE_FAILURES = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "Input/output error",
    "Read-only file system",
    # torch.save
    "file write failed",
    "unexpected pos",
)


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Raise `ValueError` with the path where the disk is full, or fails, in a `with` block that writes there."""
    try:
        yield
    except Exception as error:
        # A `ValueError` names the path already.
        if isinstance(error, ValueError) or not any(words in str(error) for words in WRITE_FAILURES):
            raise
        raise ValueError(
            f"{path} must be written whole, got {type(error).__name__}: {error}. Free some space, or choose another "
            "folder, and run the command again."
        ) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """
    Yield a hidden temporary path, and rename it to `path` at the end.

    An interrupted run leaves no half-written `path`. Its mode follows the umask, also if safetensors writes the file.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.unlink(missing_ok=True)
    unfinished.touch()
    mode = unfinished.stat().st_mode
    try:
        with write_errors(path):
            yield unfinished
        unfinished.chmod(mode)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path, record: str) -> Iterator[Path]:
    """
    Yield a hidden folder, and move its files to `folder` at the end: all of them or, after an error, none.

    Args:
        folder: Folder that receives the files. Its other files stay.
        record: Name of the file that vouches for the others. It goes first and comes last.
    """
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with write_errors(folder):
            unfinished.mkdir(parents=True)
            yield unfinished
            files = [path for path in unfinished.rglob("*") if path.is_file()]
            (folder / record).unlink(missing_ok=True)
            for file in sorted(files, key=lambda file: file == unfinished / record):
                target = folder / file.relative_to(unfinished)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: Path, data: dict) -> None:
    """Write the whole file, or leave the earlier file as it is."""
    with whole_file(path) as file:
        file.write_text(json.dumps(data, indent=1), encoding="utf-8")


@contextmanager
def errors_with_path(path: str | Path) -> Iterator[None]:
    """Raise `ValueError` with the path where a reader of JSON, Arrow or safetensors fails, which may not name it."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, SafetensorError, pa.ArrowException) as error:
        raise ValueError(
            f"{path} must be there and whole, got {type(error).__name__}: {error} Restore it, or make it again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise `ValueError`, with the path, for a file that is missing or holds something else."""
    with errors_with_path(path):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {value!r:.80}. Restore the file, or make it again.")
    return value


def is_whole_json(path: Path) -> bool:
    """Return whether a file can be read, and holds a JSON object to its end."""
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError):
        return False


def check_writable(folder: str | Path, name: str, num_bytes: int = 2**20) -> None:
    """
    Create a folder for results before the work, and check that `num_bytes` can be written there.

    Args:
        folder: The folder.
        name: The argument that names the folder, for the message.
        num_bytes: Bytes that the results need, 1 MiB by default.

    Raises:
        ValueError: if the folder is a file, cannot be written, or has too little room.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(2**16))
    except OSError as error:
        raise ValueError(
            f"`{name}` must be a folder that can be written, got {folder}: {error}. Choose another folder."
        ) from error
    if (free := shutil.disk_usage(folder).free) < num_bytes:
        raise ValueError(
            f"`{name}` must have room for {num_bytes / 2**20:,.1f} MB, got {free / 2**20:,.1f} MB in {folder}. Free "
            "some space, or choose another folder."
        )


def file_hashes(paths: Iterable[Path], root: Path) -> dict[str, str | None]:
    """
    Return the SHA-256 of each file, and of the files in each folder, by its path below `root`.

    The hash of a JSON file is None: a later stage may rewrite it.
    """
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return {
        os.path.relpath(file, root): None if file.suffix == ".json" else sha256(file)
        for file in sorted(files)
        if file.is_file()
    }


def damaged_files(hashes: Mapping[str, str | int | None], root: Path) -> list[str]:
    """List the files of `file_hashes` that are missing, have other content, or are no whole JSON file today."""
    return [name for name, known in hashes.items() if not is_as_recorded(root / name, known)]


def is_as_recorded(file: Path, known: str | int | None) -> bool:
    """Return whether a file has a known hash; None: whether it is a whole JSON file."""
    if known is None or not file.is_file():
        return is_whole_json(file)
    # Earlier records hold the size.
    return (file.stat().st_size if isinstance(known, int) else sha256(file)) == known


@contextmanager
def path_or_hub(name: str, source: str) -> Iterator[None]:
    """
    Load `source`, the value of the argument `name`, in a `with` block.

    Raises:
        ValueError: if `source` is neither an existing path nor a Hub repository that can be loaded.
    """
    message = f"`{name}` must be an existing path or a repository of the Hub, got {source!r}"
    if not Path(source).exists() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise ValueError(f"{message}, which does not exist. Check the path.")
    try:
        yield
    # Raised for files that are none, and for a repository that does not exist or cannot be reached.
    except OSError as error:
        place = "" if Path(source).exists() else "does not exist here, and "
        raise ValueError(f"{message}, which {place}cannot be loaded ({error}). Check the path.") from error
