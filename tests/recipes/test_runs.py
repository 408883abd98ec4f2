"""Runs: which are gone on with, done again, collected, and told by their command."""

import dataclasses
import json

import pytest

from recipes.common import result_files
from recipes.common import run_tracking as runs
from recipes.common.run_tracking import Stages


def test_another_trainings_folder_is_not_gone_on_with(tmp_path):
    asked, finished = {"model": {"seed": 0}, "path": tmp_path}, tmp_path / "finished.json"
    assert runs.begin(tmp_path, asked, finished) == runs.begin(tmp_path, asked, finished)
    assert runs.begin(tmp_path, {**asked, "model": {"seed": 1}}, finished), "nothing was trained yet"
    named = {"data": {"data_dir": str(tmp_path / ".." / tmp_path.name)}}
    assert runs.begin(tmp_path, named, finished) == {"data": {"data_dir": str(tmp_path.resolve())}}
    runs.begin(tmp_path, {**asked, "model": {"seed": 1}}, finished)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=r"found other values of \['model.seed'\]"):
        runs.begin(tmp_path, asked, finished)
    for text in ("[1, 2]", None):  # of an older version, and of somebody else's Trainer
        (tmp_path / "arguments.json").unlink()
        if text is not None:
            (tmp_path / "arguments.json").write_text(text)
        with pytest.raises(ValueError, match=r"found other values of \['model.seed', 'path'\]"):
            runs.begin(tmp_path, asked, finished)
        (tmp_path / "arguments.json").touch()


def test_a_stage_is_done_again_when_one_before_it_was_even_if_a_run_broke_off_between(tmp_path):
    ran = []

    def run(*names, seed, breaks=None):
        stages = Stages(tmp_path)
        for name in names:
            if name == breaks:
                raise KeyboardInterrupt
            stages(name, {"seed": seed} if name == "a" else {}, lambda name=name: ran.append(name))

    run("a", "b", "c", seed=0)
    run("a", "b", "c", seed=0)
    assert ran == ["a", "b", "c"], "a second run does nothing"
    with pytest.raises(KeyboardInterrupt):
        run("a", "b", "c", seed=1, breaks="b")
    run("a", "b", "c", seed=1)
    assert ran == ["a", "b", "c", "a", "b", "c"]
    stages, made = Stages(tmp_path), [tmp_path / "made"]
    stages("a", {"seed": 1}, lambda: ran.append("again"), made)
    assert ran[-1] == "again", "what it made is gone"


def test_a_training_resumes_from_the_newest_checkpoint_that_is_whole(tmp_path, capsys):
    assert runs.last_checkpoint(tmp_path / "nothing") is runs.last_checkpoint(tmp_path) is None
    for step, names in {
        9: ["trainer_state.json", "pools.safetensors"],
        10: ["trainer_state.json"],
        11: ["pools.safetensors"],
    }.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    assert runs.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-11 was not saved to its end" in capsys.readouterr().out
    assert runs.last_checkpoint(tmp_path, ["pools.safetensors"]) == str(tmp_path / "checkpoint-9")


def test_collected_runs_replace_their_own_stay_without_a_folder_and_are_not_mixed(tmp_path):
    def run(row: str, seed: int, value: float, **others) -> dict:
        return {"arguments": {"row": row, "seed": seed, **others}, "value": value}

    def key(one: dict) -> tuple:
        return one["arguments"]["row"], one["arguments"]["seed"]

    file = tmp_path / "kept.json"
    for found in ([run("b", 0, 0.1), run("a", 1, 0.2)], [run("b", 0, 0.3), run("a", 0, 0.4)]):
        result_files.write(file, {"protocol": "one", "runs": result_files.merged(file, found, key)})
    kept = json.loads(file.read_text())
    assert kept == {"protocol": "one", "runs": [run("a", 0, 0.4), run("a", 1, 0.2), run("b", 0, 0.3)]}
    assert sum(line.startswith('  {"arguments"') for line in file.read_text().splitlines()) == 3, "a line each"
    rows = result_files.by_row(kept["runs"], lambda one: key(one)[:1])
    assert [[one["value"] for one in group] for group in rows.values()] == [[0.4, 0.2], [0.3]]
    with pytest.raises(ValueError, match=r"'a',\) .* differ in \['epochs'\]"):
        result_files.by_row([run("a", 0, 0.4, epochs=1), run("a", 1, 0.2, epochs=2)], lambda one: key(one)[:1])
    asked = [("data_dir", str), ("row", str, "a"), ("beams", list, dataclasses.field(default_factory=lambda: [1]))]
    asked += [("seed", int, 0), ("output_dir", str, "runs")]
    args = dataclasses.make_dataclass("Arguments", asked)("mine", row="a b", beams=[2, 3], output_dir="mine")
    line = runs.command("recipes.one", args, data_dir="path/to/data")
    assert line == "python -m recipes.one --data_dir path/to/data --row 'a b' --beams 2 3"
