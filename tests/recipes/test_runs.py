"""Run tracking: runs are resumed, repeated, collected, and stored with their command."""

import dataclasses
import json
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from recipes.common import result_files
from recipes.common import run_tracking as runs
from recipes.common.files import check_writable, whole_file, whole_folder
from recipes.common.run_tracking import Stages
from recipes.data.prepared import load_prepared
from recipes.data.prepared import prepared as data_record
from tokenization.wordlevel_backend import build_backend


def trainer_checkpoint(folder, *files):
    """Write what the Trainer resumes from, and other files of tensors."""
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, folder / name)
    for name in ("model.safetensors", *files):
        save_file({"weight": torch.zeros(9)}, folder / name)
    return folder


def test_the_folder_of_another_training_is_rejected(tmp_path):
    arguments = {"model": {"seed": 0}, "path": tmp_path}
    finished = tmp_path / "finished.json"
    assert runs.begin(tmp_path, arguments, finished) == runs.begin(tmp_path, arguments, finished)
    assert runs.begin(tmp_path, {**arguments, "model": {"seed": 1}}, finished), "no checkpoint yet"
    named = {"data": {"data_dir": str(tmp_path / ".." / tmp_path.name)}}
    assert runs.begin(tmp_path, named, finished) == {"data": {"data_dir": str(tmp_path.resolve())}}
    runs.begin(tmp_path, {**arguments, "model": {"seed": 1}}, finished)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=r"other values of \['model.seed'\]"):
        runs.begin(tmp_path, arguments, finished)
    for text in ("[1, 2]", None):  # of an older version, and missing
        (tmp_path / "arguments.json").unlink()
        if text is not None:
            (tmp_path / "arguments.json").write_text(text)
        with pytest.raises(ValueError, match=r"other values of \['model.seed', 'path'\]"):
            runs.begin(tmp_path, arguments, finished)
        (tmp_path / "arguments.json").touch()


def test_a_stage_runs_again_after_an_earlier_stage_did(tmp_path):
    ran = []

    def run(*names, seed, breaks=None):
        stages = Stages(tmp_path)
        for name in names:
            if name == breaks:
                raise KeyboardInterrupt
            stages(name, {"seed": seed} if name == "a" else {}, lambda name=name: ran.append(name))

    run("a", "b", "c", seed=0)
    run("a", "b", "c", seed=0)
    assert ran == ["a", "b", "c"], "a second run repeats no stage"
    with pytest.raises(KeyboardInterrupt):
        run("a", "b", "c", seed=1, breaks="b")
    run("a", "b", "c", seed=1)
    assert ran == ["a", "b", "c", "a", "b", "c"]
    stages = Stages(tmp_path)
    made = [tmp_path / "made"]
    stages("a", {"seed": 1}, lambda: ran.append("again"), made)
    assert ran[-1] == "again", "its output is missing"


def test_a_training_resumes_from_the_newest_whole_checkpoint(tmp_path, capsys):
    assert runs.last_checkpoint(tmp_path / "nothing") is runs.last_checkpoint(tmp_path) is None
    trainer_checkpoint(tmp_path / "checkpoint-9", "pools.safetensors")
    trainer_checkpoint(tmp_path / "checkpoint-10")
    (trainer_checkpoint(tmp_path / "checkpoint-11") / "trainer_state.json").unlink()
    assert runs.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-11: it lacks" in capsys.readouterr().out
    assert runs.last_checkpoint(tmp_path, ["pools.safetensors"]) == str(tmp_path / "checkpoint-9")


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors", "pools.safetensors"]
)
@pytest.mark.parametrize("size", [None, 0, 0.5])
def test_a_half_written_checkpoint_is_skipped(tmp_path, capsys, name, size):
    trainer_checkpoint(tmp_path / "checkpoint-9", "pools.safetensors")
    file = trainer_checkpoint(tmp_path / "checkpoint-10", "pools.safetensors") / name
    content = file.read_bytes()
    file.unlink()
    if size is not None:
        file.write_bytes(content[: int(size * len(content))])
    assert runs.last_checkpoint(tmp_path, ["pools.safetensors"]) == str(tmp_path / "checkpoint-9")
    assert f"skipped the incomplete checkpoint {tmp_path}/checkpoint-10" in capsys.readouterr().out


def test_a_moved_training_and_new_arguments_are_the_same(tmp_path):
    finished = tmp_path / "finished.json"
    first = {"training": {"output_dir": "here", "seed": 0}, "model": {"width": 8, "gone": 1}}
    recorded = runs.begin(tmp_path, first, finished)
    finished.touch()
    defaults = {"training": {"seed": 0, "newer": [1]}, "model": {"width": 4}}
    later = {"training": {"output_dir": "there", "seed": 0, "newer": (1,)}, "model": {"width": 8}}
    assert runs.begin(tmp_path, later, finished, defaults=defaults) == recorded
    for changed in ({"newer": [2]}, {"seed": 1}):
        other = {**later, "training": {**later["training"], **changed}}
        with pytest.raises(ValueError, match=rf"other values of \['training.{next(iter(changed))}'\]"):
            runs.begin(tmp_path, other, finished, defaults=defaults)


@pytest.mark.parametrize("damage", ["gone", "empty", "half", "as long"])
@pytest.mark.parametrize("name", ["rows.arrow", "record.json", "folder/codes.npy"])
def test_a_stage_with_damaged_outputs_runs_again(tmp_path, name, damage):
    outputs = [tmp_path / "rows.arrow", tmp_path / "record.json", tmp_path / "folder"]
    ran = []

    def work():
        ran.append("work")
        (tmp_path / "folder").mkdir(exist_ok=True)
        for file in ("rows.arrow", "record.json", "folder/codes.npy"):
            (tmp_path / file).write_text('{"a": 1}')

    for _ in range(2):
        Stages(tmp_path)("a", {}, work, outputs)
    (tmp_path / "record.json").write_text('{"a": 1, "b": 2}')  # by a later stage
    Stages(tmp_path)("a", {}, work, outputs)
    assert ran == ["work"]
    if damage == "gone":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text({"empty": "", "half": '{"a"', "as long": '["a", 1]'}[damage])
    Stages(tmp_path)("a", {}, work, outputs)
    assert ran == ["work"] * 2


def test_a_half_written_record_of_stages_is_no_record(tmp_path):
    (tmp_path / "stages.json").write_text('{"a": {"argum')
    ran = []
    Stages(tmp_path)("a", {}, lambda: ran.append("a"))
    assert ran == ["a"]


@pytest.mark.parametrize(
    "name", ["prepare.json", "item_embeddings.safetensors", "dataset/test/data-", "tokenizer/items"]
)
@pytest.mark.parametrize("share", [None, 0.5])
def test_a_damaged_part_of_prepared_data_is_named(prepared, tmp_path, name, share):
    folder = shutil.copytree(prepared, tmp_path / "data")
    (file,) = folder.glob(f"{name}*")
    content = file.read_bytes()
    file.unlink()
    if share is not None:
        file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=str(folder / name.split("/")[0])):
        data_record(folder)
        load_prepared(folder)


def test_a_folder_is_checked_before_the_work(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below", Path("/proc/nothing")):
        with pytest.raises(ValueError, match="`output_dir` must be a folder that can be written"):
            check_writable(folder, "output_dir")
    with pytest.raises(ValueError, match="`output_dir` must have room for"):
        check_writable(tmp_path / "new", "output_dir", 2**60)
    check_writable(tmp_path / "new", "output_dir")
    assert not list((tmp_path / "new").iterdir())


@contextmanager
def file_size_limit(num_bytes):
    """Let each writer of this process, in whatever language, fail beyond this size, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


WRITERS = {
    "text": lambda path: path.write_text("x" * 10**6),
    "safetensors": lambda path: save_file({"weight": torch.zeros(10**6)}, path),
    "torch": lambda path: torch.save(torch.zeros(10**6), path),
    "parquet": lambda path: pq.write_table(pa.table({"x": np.random.default_rng(0).normal(size=10**5)}), path),
    "tokenizer": lambda path: build_backend({f"<{i}>": i for i in range(10**5)}).save(str(path)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_named_and_earlier_files_stay(tmp_path, write):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("weights", "record"):
        (folder / name).write_text("earlier")

    def error_of(path):
        return pytest.raises(ValueError, match=f"{path} must be written whole, got .*Free some space")

    with file_size_limit(2**17):
        with error_of(folder / "weights"), whole_file(folder / "weights") as file:
            write(file)
        with error_of(folder), whole_folder(folder, "record") as unfinished:
            (unfinished / "record").write_text("later")
            write(unfinished / "weights")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"weights": "earlier", "record": "earlier"}
    with whole_folder(folder, "record") as unfinished:
        (unfinished / "part").mkdir()
        write(unfinished / "part" / "weights")
    assert sorted(path.name for path in folder.iterdir()) == ["part", "weights"], "nothing vouches for these files"


def test_collected_runs_are_merged_and_never_mixed(tmp_path):
    def run(row: str, seed: int, value: float, **others) -> dict:
        return {"arguments": {"row": row, "seed": seed, **others}, "value": value}

    def key(entry: dict) -> tuple:
        return entry["arguments"]["row"], entry["arguments"]["seed"]

    file = tmp_path / "kept.json"
    for collected in ([run("b", 0, 0.1), run("a", 1, 0.2)], [run("b", 0, 0.3), run("a", 0, 0.4)]):
        result_files.write(file, {"protocol": "one", "runs": result_files.merged(file, collected, key)})
    stored = json.loads(file.read_text())
    assert stored == {"protocol": "one", "runs": [run("a", 0, 0.4), run("a", 1, 0.2), run("b", 0, 0.3)]}
    assert sum(line.startswith('  {"arguments"') for line in file.read_text().splitlines()) == 3, "one line a run"
    rows = result_files.by_ablation(stored["runs"], lambda entry: key(entry)[:1])
    assert [[entry["value"] for entry in group] for group in rows.values()] == [[0.4, 0.2], [0.3]]
    with pytest.raises(ValueError, match=r"'a',\) .* differ in \['epochs'\]"):
        result_files.by_ablation(
            [run("a", 0, 0.4, epochs=1), run("a", 1, 0.2, epochs=2)], lambda entry: key(entry)[:1]
        )
    fields = [("data_dir", str), ("row", str, "a"), ("beams", list, dataclasses.field(default_factory=lambda: [1]))]
    fields += [("seed", int, 0), ("output_dir", str, "runs")]
    args = dataclasses.make_dataclass("Arguments", fields)("mine", row="a b", beams=[2, 3], output_dir="mine")
    line = runs.command("recipes.one", args, data_dir="path/to/data")
    assert line == "python -m recipes.one --data_dir path/to/data --row 'a b' --beams 2 3"
