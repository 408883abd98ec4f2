"""Run tracking: runs are resumed, repeated, collected, and stored with their command."""

import dataclasses
import json

import pytest

from recipes.common import result_files
from recipes.common import run_tracking as runs
from recipes.common.run_tracking import Stages


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
    assert "checkpoint-11: it lacks" in capsys.readouterr().out
    assert runs.last_checkpoint(tmp_path, ["pools.safetensors"]) == str(tmp_path / "checkpoint-9")


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
