"""Store finished runs in a result file, one run a line, and group them into the ablations of a table."""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path


def rounded(value, digits: int = 5):
    """Round all floats of a nested value."""
    if isinstance(value, dict):
        return {name: rounded(entry, digits) for name, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry, digits) for entry in value]
    return round(value, digits) if isinstance(value, float) else value


def result_entry(run: dict) -> dict:
    """Make a run's entry of a result file: measured values are rounded, arguments are not."""
    return {**rounded(run), "arguments": run["arguments"]}


def merged(file: Path, new_runs: list[dict], key: Callable[[dict], tuple]) -> list[dict]:
    """Merge the runs of a result file with new runs, sorted by `key`; a new run replaces the run of the same key."""
    old_runs = json.loads(file.read_text())["runs"] if file.exists() else []
    runs = {key(run): run for run in [*old_runs, *new_runs]}
    return [runs[name] for name in sorted(runs)]


def by_ablation(
    runs: list[dict], ablation: Callable[[dict], tuple], free_arguments: tuple[str, ...] = ("seed",)
) -> dict[tuple, list[dict]]:
    """
    Group runs by ablation.

    Args:
        runs: Runs of a result file.
        ablation: Function that returns the key of a run's ablation.
        free_arguments: Arguments that may differ between the runs of an ablation.

    Raises:
        ValueError: if runs of an ablation differ in another argument, for instance if only some of its seeds were
            run again with other settings.
    """
    groups = defaultdict(list)
    for run in runs:
        groups[ablation(run)].append(run)
    for key, group in groups.items():
        settings = [
            {name: value for name, value in run["arguments"].items() if name not in free_arguments} for run in group
        ]
        for other in settings[1:]:
            # An older run may lack an argument that is None today.
            if names := sorted(name for name in {*settings[0], *other} if other.get(name) != settings[0].get(name)):
                raise ValueError(
                    f"Runs of ablation {key} must share all arguments but {list(free_arguments)}, got runs that "
                    f"differ in {names}. Run all of its seeds with the same arguments, or remove the old runs from "
                    "the JSON file."
                )
    return dict(groups)


def spread(values: list[float]) -> tuple[float, float | None]:
    """Return the mean and the standard deviation; the deviation of a single value is None."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def plus_minus(mean: float, deviation: float | None) -> str:
    """Format what `spread` returns for a table."""
    return f"{mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def write(file: Path, data: dict) -> None:
    """Write `data` as JSON, its `runs` one a line, so that a diff shows a new run as a new line."""
    head = {name: value for name, value in data.items() if name != "runs"}
    lines = ",\n".join("  " + json.dumps(run) for run in data["runs"])
    file.write_text(json.dumps({**head, "runs": []}, indent=1)[: -len("[]\n}")] + f"[\n{lines}\n ]\n}}\n")
