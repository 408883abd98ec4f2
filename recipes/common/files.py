"""Write whole files or none."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    yield unfinished
    unfinished.chmod(mode)
    os.replace(unfinished, path)


def write_json(path: Path, data: dict) -> None:
    """Write the whole file, or leave the earlier file as it is."""
    with whole_file(path) as file:
        file.write_text(json.dumps(data, indent=1))
