"""Keep finished runs in a result file, one run a line, and group them into the rows of a table."""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path


def rounded(value, digits: int = 5):
    """All floats of a nested value, rounded."""
    if isinstance(value, dict):
        return {name: rounded(one, digits) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one, digits) for one in value]
    return round(value, digits) if isinstance(value, float) else value


def kept(run: dict) -> dict:
    """A run as a JSON keeps it: what was found rounded, what was asked for as it was."""
    return {**rounded(run), "arguments": run["arguments"]}


def merged(file: Path, found: list[dict], key: Callable[[dict], tuple]) -> list[dict]:
    """The runs that `file` holds already, each replaced by the one of `found` with the same key, and the others of `found`."""
    old = json.loads(file.read_text())["runs"] if file.exists() else []
    runs = {key(run): run for run in [*old, *found]}
    return [runs[one] for one in sorted(runs)]


def by_row(
    runs: list[dict], row: Callable[[dict], tuple], apart: tuple[str, ...] = ("seed",)
) -> dict[tuple, list[dict]]:
    """
    Runs of the same row, which differ in their seed (in the arguments `apart`) alone; raises `ValueError` if they differ in
    more, as when only one of the seeds was run again with other settings.
    """
    groups = defaultdict(list)
    for run in runs:
        groups[row(run)].append(run)
    for name, group in groups.items():
        settings = [{one: value for one, value in run["arguments"].items() if one not in apart} for run in group]
        for other in settings[1:]:
            # An argument that an older run did not have yet is one that was not given.
            if names := sorted(one for one in {*settings[0], *other} if other.get(one) != settings[0].get(one)):
                raise ValueError(
                    f"Expected the seeds of row {name} to share all other arguments, found that they differ in {names}. Run "
                    "all of its seeds with the same, or take the old ones out of the JSON."
                )
    return dict(groups)


def spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; of one value there is none."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def plus_minus(mean: float, deviation: float | None) -> str:
    """As tables tell what `spread` returns."""
    return f"{mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def write(file: Path, data: dict) -> None:
    """`data` as JSON, its `runs` one a line: a new run is a new line of the file's history."""
    head = {name: value for name, value in data.items() if name != "runs"}
    lines = ",\n".join("  " + json.dumps(run) for run in data["runs"])
    file.write_text(json.dumps({**head, "runs": []}, indent=1)[: -len("[]\n}")] + f"[\n{lines}\n ]\n}}\n")
