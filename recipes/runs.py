"""Runs: what one was asked for and which of its stages are done, in its folder; how and where it was made; and finished runs
as the JSONs of `recipes/results` keep them.

There each is a line, and a table is made from the lines. Collecting adds those of the runs that are there and leaves the
others, whose folders may long be gone, as they are.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

OF_A_PROCESS = ("local_rank", "use_cpu")  # of TrainingArguments: where it runs, no part of what is done
FOLDERS = ("data_dir", "output_dir", "checkpoint_dir", "init_from")  # the same ones, from wherever they are named


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


def flat(nested: dict, prefix: str = "") -> dict:
    """A nested dict with its names joined by dots."""
    parts = [
        flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        for name, value in nested.items()
    ]
    return {name: value for part in parts for name, value in part.items()}


def one_process() -> None:
    """Refuses `torchrun`, for what writes one result; raises `ValueError`."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "Expected one process a run, found several: leave torchrun out, and run several rows beside each other."
        )


def one_device(training_args: TrainingArguments) -> None:
    """
    Refuses what spreads one process's model over devices, since callbacks and searches inside training need it whole; raises
    `ValueError`.
    """
    if training_args.n_gpu > 1:
        raise ValueError(
            f"Expected one GPU a process, found {training_args.n_gpu}, over which the Trainer would spread copies of the model in "
            "threads. Start with torchrun --nproc_per_node, one process a GPU, or name one GPU: CUDA_VISIBLE_DEVICES=0."
        )
    if training_args.fsdp or training_args.deepspeed:
        raise ValueError(
            "Expected neither --fsdp nor --deepspeed, found one: the whole model is saved, and searched with in training. Use "
            "torchrun without them."
        )


def begin(folder: Path, asked: dict, finished: Path, writes: bool = True) -> dict:
    """
    Keeps what a training is asked for as `arguments.json` in its folder (one of several processes `writes`), and returns it as
    JSON has it.

    Raises:
        ValueError: if the folder holds checkpoints or the `finished` file of another, which resuming would mix with this one.
    """
    asked, file = json.loads(json.dumps(asked, default=str)), folder / "arguments.json"
    for arguments in asked.values():
        for name in FOLDERS if isinstance(arguments, dict) else ():
            if arguments.get(name) and Path(arguments[name]).exists():
                arguments[name] = str(Path(arguments[name]).resolve())
    has_checkpoints = folder.is_dir() and get_last_checkpoint(str(folder)) is not None
    is_begun = has_checkpoints or (file.exists() and finished.exists())
    found = json.loads(file.read_text()) if is_begun and file.exists() else {}
    for one in (asked, found):
        for name in OF_A_PROCESS if isinstance(one, dict) else ():
            one.get("training", {}).pop(name, None)
    if is_begun and found != asked:
        now, then = flat(asked), flat(found) if isinstance(found, dict) else {}
        changed = sorted(
            name for name in {*now, *then} if name not in now or name not in then or now[name] != then[name]
        )
        raise ValueError(
            f"Expected a new output_dir, or the arguments and data of the training in {folder}; found other values of {changed}. "
            "Name another output_dir, or remove this one."
        )
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, asked)
    return asked


def last_checkpoint(folder: str | Path, files: Iterable[str] = ()) -> str | None:
    """
    The newest of the Trainer's checkpoints that holds all `files` (of callbacks) beside the Trainer's state, to resume from;
    None, if there is none. One that lacks some, since its training was killed while it saved, is told and passed over.
    """
    steps = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(steps, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        missing = [name for name in (TRAINER_STATE_NAME, *files) if not (path / name).is_file()]
        if not missing:
            return str(path)
        print(f"{path} was not saved to its end and is passed over: it has no {missing}", flush=True)
    return None


class Stages:
    """Runs each stage once: what was done, with which arguments and in how many seconds, is kept in `stages.json`."""

    def __init__(self, output_dir: Path):
        self.file = output_dir / "stages.json"
        self.before = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.done: dict[str, dict] = {}

    def __call__(self, name: str, arguments: dict, run: Callable[[], object], made: Iterable[Path] = ()) -> None:
        """Runs `run()` unless it was done with the same `arguments`, what it `made` is there, and every stage before it stands."""
        if self.before.get(name, {}).get("arguments") == arguments and all(path.exists() for path in made):
            print(f"== {name}: done before, reused", flush=True)
            self.done[name] = self.before[name]
            return
        self.before = {}  # what follows was made from what is made again now
        write_json(self.file, self.done)
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        run()
        seconds = round(time.perf_counter() - start, 1)
        self.done[name] = {"arguments": arguments, "seconds": seconds}
        write_json(self.file, self.done)
        print(f"== {name}: {seconds} s", flush=True)


def made_by(command: str) -> dict[str, str]:
    """How and where a figure was made: command, machine, versions, date."""
    threads, packages = torch.get_num_threads(), ("torch", "transformers", "datasets", "accelerate", "faiss-cpu")
    return {
        "command": command,
        "machine": f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {threads} thread{'s' * (threads > 1)}"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        "date": datetime.date.today().isoformat(),
    }


def command(module: str, args: object, **paths: str) -> str:
    """
    The command line of a run, as `HfArgumentParser` reads it: what the dataclass `args` says that differs from its defaults,
    with `paths` instead of this machine's (data_dir="path/to/data") and not where it wrote to.
    """
    words = ["python", "-m", module]
    for one in fields(args):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        value = paths.get(one.name, getattr(args, one.name))
        if one.name not in ("output_dir", "output") and value != default:
            words += [f"--{one.name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


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
