"""Runs: what one was asked for and which of its stages are done, in its folder; how and where it was made; and finished runs
as the JSONs in `results/` beside a recipe keep them.

There each is a line, and a table is made from the lines. Collecting adds those of the runs that are there and leaves the
others, whose folders may long be gone, as they are.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from recipes.common.files import write_json

OF_A_PROCESS = ("local_rank", "use_cpu")  # of TrainingArguments: where it runs, no part of what is done
FOLDERS = ("data_dir", "output_dir", "checkpoint_dir", "init_from")  # the same ones, from wherever they are named


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


def command(module: str, args: Any, **paths: str) -> str:
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
