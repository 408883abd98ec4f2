"""The table of the lists of all data sets."""

import json

import pytest

from recipes.results.lists import ListsArguments, collect_lists, table


def metrics(ranked, seed):
    values = {"recall@10": ranked, "ndcg@10": ranked / 2}
    other = {"recall@10": 0.1, "ndcg@10": 0.05}
    return {
        "protocol": {"users": 4000, "catalog size": 99, "history": "all items", "trained on": "these interactions"},
        "baselines": {"transitions": other} if seed == 0 else {},
        "parts": {"generation": other, "dense": {"recall@10": 0.08, "ndcg@10": 0.04}},
        "generation": other,
        "ranked": values,
        "ranking": {},
        "new items": {},
        "selection": {"num_beams": 5},
    }


def test_a_line_has_the_mean_of_its_seeds_and_the_gain(tmp_path):
    for seed, ranked in enumerate((0.11, 0.13)):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "metrics.json").write_text(json.dumps(metrics(ranked, seed)))
    runs = [str(tmp_path / str(seed)) for seed in range(2)]
    arguments = ListsArguments("shop", "a shop", "--max_items 20", runs, [0, 1])
    result = collect_lists(arguments)
    text = table({"lists_shop": result, "decoding": {}})
    line = next(line for line in text.splitlines() if line.startswith("| a shop (2 seeds)"))
    assert "**0.1200 ± 0.0141 / 0.0600 ± 0.0071**" in line and "+20.0 %" in line
    assert "| 0.1000 / 0.0500 |" in line, "the baselines are those of the first run"
    with pytest.raises(ValueError, match="one seed for each of 2 runs"):
        collect_lists(ListsArguments("shop", "a shop", "", runs, [0]))
    other = metrics(0.1, 1) | {"protocol": {"users": 3}}
    (tmp_path / "1" / "metrics.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="must share one protocol"):
        collect_lists(arguments)
