"""Data of version 0.1 that 0.2 still reads: prepared folders, and tables of histories."""

import json
import shutil

import pytest
from datasets import Dataset

from recipes.data.histories import load_histories
from recipes.data.prepared import prepared as read_record


def test_the_record_of_a_0_1_folder_has_todays_keys(prepared, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(prepared, folder)
    record = json.loads((folder / "prepare.json").read_text())
    old_counts = dict(record["counts"])
    old_counts["catalogue"] = old_counts.pop("catalog")  # typos: ignore
    (folder / "prepare.json").write_text(json.dumps({**record, "counts": old_counts}))
    assert read_record(folder) == record


def test_the_old_column_of_a_query_time_is_renamed(tmp_path):
    rows = Dataset.from_dict({"user_id": ["a"], "items": [["x"]], "request_timestamp": [5]})
    rows.to_parquet(tmp_path / "histories.parquet")
    with pytest.warns(FutureWarning, match="Name it query_time"):
        loaded = load_histories(str(tmp_path / "histories.parquet"))
    assert loaded["query_time"][:] == [5] and "request_timestamp" not in loaded.column_names
