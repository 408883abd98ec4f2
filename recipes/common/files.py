"""Write files whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden name to write to, renamed to `path` when all is written: an interrupted run leaves no half file."""
    unfinished = path.with_name(f".{path.name}.tmp")
    yield unfinished
    os.replace(unfinished, path)


def write_json(path: Path, data: dict) -> None:
    """The whole file, or the one that was there."""
    with whole_file(path) as file:
        file.write_text(json.dumps(data, indent=1))
