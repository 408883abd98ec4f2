"""Test --refit: training on held-out items, after validation has chosen."""

import json

import pytest
from helpers import train_flags

from modeling_unigrf import UniGRFForCausalLM
from recipes import train
from recipes.data.leave_one_out import with_held_out
from recipes.data.prepared import load_prepared
from recipes.evaluate import EvaluateArguments, evaluate_checkpoint


def test_a_refit_learns_held_out_items_and_keeps_the_choice(prepared, tmp_path):
    def trained(name, *flags):
        short = ("--max_items=4", "--max_steps=2", *flags)
        return train.train(*train.parse(train_flags(prepared, tmp_path / name, *short)))

    def measured(checkpoint):
        arguments = EvaluateArguments(
            str(checkpoint), str(prepared), str(tmp_path / "metrics"), [5], list_length=10, store=True
        )
        return evaluate_checkpoint(arguments)

    first = trained("first")
    before = measured(first)
    refit = trained("refit", "--refit=validation", f"--refit_from={first}")
    after = measured(refit)

    dataset = load_prepared(prepared).dataset
    num_users = len(dataset["test"])
    counted = [
        int(UniGRFForCausalLM.from_pretrained(folder).transitions.item_counts.sum()) for folder in (first, refit)
    ]
    assert counted[1] - counted[0] == num_users
    names = [name for name in before["selection"] if not name.startswith(("chosen on", "settings of"))]
    assert {name: after["selection"][name] for name in names} == {name: before["selection"][name] for name in names}
    assert after["selection"]["chosen on"] == "validation, before the refit"
    assert after["protocol"]["trained on"] == "these interactions, and those of validation"
    assert after["validation"] == [] and after["baselines"] == {} and set(after["parts"]) >= {"generation", "dense"}

    production = trained("production", "--refit=test", f"--refit_from={first}")
    with pytest.raises(ValueError, match="must not know the test items"):
        measured(production)
    train_items = with_held_out(dataset, "test")["train"]["items"][:]
    assert [len(items) for items in train_items] == [len(items) + 2 for items in dataset["train"]["items"][:]]
    assert [items[-1] for items in train_items] == dataset["test"]["target"][:]
    assert json.loads((production / "training_log.json").read_text())["refit"] == "test"


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--refit=validation"], "`refit` must come with refit_from"),
        (["--refit_from=x"], "`refit_from` must come with refit"),
        (["--refit=test", "--refit_from=missing"], "must be a checkpoint that recipes.evaluate measured"),
        (["--refit=test", "--refit_from=x", "--eval_strategy=epoch"], "`eval_strategy` must be 'no'"),
    ],
)
def test_a_refit_without_its_parts_is_refused(prepared, tmp_path, flags, match):
    with pytest.raises(ValueError, match=match):
        train.train(*train.parse(train_flags(prepared, tmp_path / "run", "--max_steps=1", *flags)))
