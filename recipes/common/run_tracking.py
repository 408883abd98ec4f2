"""
Track runs: record the arguments of a run, skip its finished stages, resume it, and note how it was made.

A run's folder holds `arguments.json` (of a training) and `stages.json` (of a recipe of several stages).
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from recipes.common.files import check_writable, damaged_files, file_hashes, is_whole_json, read_json, write_json

# Arguments that do not change the result: the process, and the folders of the results, which may move.
WITHOUT_RESULT = ("local_rank", "use_cpu", "output_dir", "checkpoint_dir")
# Compare these by their absolute paths: the working directory may differ.
FOLDERS = ("data_dir", "init_from", "refit_from")
# Differs from every value.
UNKNOWN = object()
# What the Trainer resumes from, beside the weights.
RESUMED_FILES = (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME)


def flat(nested: dict, prefix: str = "") -> dict:
    """Flatten a nested dict; dots join the names."""
    parts = [
        flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        for name, value in nested.items()
    ]
    return {name: value for part in parts for name, value in part.items()}


def require_single_process() -> None:
    """
    Check that `torchrun` did not start several processes, for a recipe that writes one result.

    Raises:
        ValueError: if there are several.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes > 1:
        raise ValueError(
            f"A run must be a single process, got {num_processes} processes. Leave torchrun out, and start the runs "
            "beside each other."
        )


def require_single_device(training_args: TrainingArguments, may_shard: bool = False) -> None:
    """
    Check that a process trains on a single device.

    Args:
        training_args: The Trainer's arguments.
        may_shard: Whether FSDP and DeepSpeed may spread the weights over the processes. False: for callbacks,
            searches and adapters that need the whole model.

    Raises:
        ValueError: if the Trainer would spread the model over several devices, or would ignore FSDP.
    """
    if training_args.n_gpu > 1:
        raise ValueError(
            f"A process must have a single GPU, got {training_args.n_gpu}, over which the Trainer would spread copies "
            "of the model in threads. Start with torchrun --nproc_per_node, one process a GPU, or choose a GPU: "
            "CUDA_VISIBLE_DEVICES=0."
        )
    is_sharded = training_args.fsdp or training_args.deepspeed
    if is_sharded and not may_shard:
        raise ValueError(
            f"`fsdp` and `deepspeed` must be unset, got {training_args.fsdp} and {training_args.deepspeed}; this "
            "training needs the whole model in each process. Use torchrun without them."
        )
    if training_args.fsdp and training_args.device.type == "cpu":
        raise ValueError(
            f"`fsdp` must be unset on a CPU, got {training_args.fsdp}: the Trainer shards over GPUs only. Leave it "
            "out, or train on GPUs."
        )


def begin(folder: Path, arguments: dict, finished: Path, writes: bool = True, defaults: dict | None = None) -> dict:
    """
    Record the arguments of a training as `arguments.json` in its folder.

    Args:
        folder: Folder of the Trainer's checkpoints.
        arguments: Arguments of the training, as nested dicts.
        finished: File that a finished training writes.
        writes: Write the file. False: a process other than the first only compares.
        defaults: Defaults of the arguments, nested in the same way. A record that lacks an argument, because an older
            version wrote it, stands for the default. None: no defaults.

    Returns:
        The arguments as JSON stores them, without those that do not change the result. A training that continues
        returns its own record, also after an update that brings new arguments.

    Raises:
        ValueError: if the folder holds checkpoints, or the `finished` file, of a training with other arguments.
    """
    # The arguments of this training, and those of the training in the folder.
    file = folder / "arguments.json"
    arguments = _comparable(arguments)
    has_checkpoints = folder.is_dir() and get_last_checkpoint(str(folder)) is not None
    if not (has_checkpoints or (file.exists() and finished.exists())):
        if writes:
            check_writable(folder, "output_dir")
            write_json(file, arguments)
        return arguments
    try:
        stored = _comparable(read_json(file))
    except ValueError:
        stored = {}

    # Resuming would mix two trainings.
    now = flat(arguments)
    then = flat(stored)
    implied = flat(_comparable(defaults or {}))
    changed = [name for name in now if now[name] != then.get(name, implied.get(name, UNKNOWN))]
    # An argument that this version lacks is no flag of the command.
    changed += [name for name in then if name not in now and name.split(".")[0] not in (defaults or {})]
    if changed:
        raise ValueError(
            f"`output_dir` must be new, or hold a training with the same arguments and data, got {folder} with other "
            f"values of {sorted(changed)}. Choose another output_dir, or remove this folder."
        )
    return stored


def _comparable(arguments: dict) -> dict:
    """Convert arguments to JSON values and absolute paths, and leave out those that do not change the result."""
    arguments = json.loads(json.dumps(arguments, default=str))
    for group in arguments.values():
        for name in WITHOUT_RESULT if isinstance(group, dict) else ():
            group.pop(name, None)
        for name in FOLDERS if isinstance(group, dict) else ():
            if group.get(name) and Path(group[name]).exists():
                group[name] = str(Path(group[name]).resolve())
    return arguments


def last_checkpoint(folder: str | Path, files: Iterable[str] = ()) -> str | None:
    """
    Return the newest complete checkpoint of the Trainer, to resume from; None if there is none.

    A checkpoint is incomplete if its training was killed while it saved: files are missing, or end too early. A
    message reports each of them.

    Args:
        folder: Folder of the Trainer's checkpoints.
        files: Names of the files that callbacks save beside the Trainer's state.
    """
    steps = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(steps, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if not (problems := checkpoint_problems(path, files)):
            return str(path)
        print(f"skipped the incomplete checkpoint {path}: {'; '.join(problems)}", flush=True)
    return None


def checkpoint_problems(folder: Path, files: Iterable[str] = ()) -> list[str]:
    """Say which files of a Trainer's checkpoint are missing or cannot be read to their end."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    weights = set(read_json(index)["weight_map"].values()) if is_whole_json(index) else {SAFE_WEIGHTS_NAME}
    if (folder / "adapter_config.json").is_file():
        weights = {"adapter_model.safetensors"}
    names = [*RESUMED_FILES, *sorted(weights), *files]
    problems = (
        [f"it lacks {missing}"] if (missing := [name for name in names if not (folder / name).is_file()]) else []
    )
    for file in sorted(folder.iterdir()):
        try:
            if file.suffix == ".json":
                read_json(file)
            elif file.suffix == ".safetensors":
                # Reads the header, and compares the file's size with it.
                with safe_open(file, framework="pt"):
                    pass
            elif file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):
                problems.append(f"{file.name} is truncated")
        except (ValueError, SafetensorError) as error:
            problems.append(f"{file.name}: {error}")
    return problems


class Stages:
    """
    Run each stage of a recipe once: `stages.json` stores the finished stages, with their arguments and seconds.

    Args:
        output_dir: Folder of `stages.json`.
    """

    def __init__(self, output_dir: Path):
        self.file = output_dir / "stages.json"
        # Without a whole record, nothing is known to be finished.
        self.before = read_json(self.file) if is_whole_json(self.file) else {}
        self.done: dict[str, dict] = {}

    def __call__(self, name: str, arguments: dict, run: Callable[[], object], outputs: Iterable[Path] = ()) -> None:
        """
        Run a stage, unless its result can be reused.

        A result can be reused if the arguments are the same, the outputs are there and whole, and no earlier stage ran
        again.

        Args:
            name: Name of the stage.
            arguments: Arguments of the stage.
            run: Function that does the work.
            outputs: Files that the function writes or changes, and folders that it fills.
        """
        earlier = self.before.get(name, {})
        outputs = list(outputs)
        if earlier.get("arguments") == arguments and all(path.exists() for path in outputs):
            if not (damaged := damaged_files(earlier.get("files", {}), self.file.parent)):
                print(f"== {name}: reused from an earlier run", flush=True)
                self.done[name] = earlier
                return
            print(f"== {name}: runs again, since {damaged} are missing or damaged", flush=True)
        self.before = {}  # later stages read the new result
        write_json(self.file, self.done)
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        run()
        seconds = round(time.perf_counter() - start, 1)
        hashes = file_hashes(outputs, self.file.parent)
        # A file that this stage changed is whole as it is now, also for the stage that wrote it.
        for stage in self.done.values():
            stage["files"] = {file: hashes.get(file, value) for file, value in stage.get("files", {}).items()}
        self.done[name] = {"arguments": arguments, "seconds": seconds, "files": hashes}
        write_json(self.file, self.done)
        print(f"== {name}: {seconds} s", flush=True)


def made_by(command: str) -> dict[str, str]:
    """Describe how and where a figure was measured: command, machine, versions, date."""
    packages = ("torch", "transformers", "datasets", "accelerate", "faiss-cpu")
    threads = torch.get_num_threads()
    processor = f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    graphics = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": command,
        "machine": f"{processor}, {threads} thread{'s' * (threads > 1)}, {graphics}",
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        "date": datetime.date.today().isoformat(),
    }


def command(module: str, args: Any, **paths: str) -> str:
    """
    Write the command line of a run, for `HfArgumentParser`: the arguments that differ from their defaults.

    Args:
        module: Module of the recipe.
        args: Dataclass of the arguments. The output folder is left out.
        paths: Paths that replace those of this machine, such as data_dir="path/to/data".
    """
    words = ["python", "-m", module]
    for entry in fields(args):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        value = paths.get(entry.name, getattr(args, entry.name))
        if entry.name not in ("output_dir", "output") and value != default:
            words += [f"--{entry.name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
