"""One parser for all recipes: groups in `--help`, names of version 0.1."""

import runpy
import sys
from dataclasses import dataclass, field

import pytest
from helpers import ROOT
from transformers import TrainingArguments

from recipes.common.arguments import RENAMED_FLAGS, TRAINER_GROUP, parse_arguments

COMMANDS = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in sorted((ROOT / "recipes").rglob("*.py"))
    if 'if __name__ == "__main__":' in file.read_text()
]


@dataclass
class FirstArguments:
    """What comes first.

    The rest of the docstring is not in the help.
    """

    crops_per_epoch: int = field(default=1, metadata={"help": "Crops."})
    dense_weights: list[float] = field(default_factory=lambda: [0.0], metadata={"help": "Weights."})


@dataclass
class SecondArguments:
    """What comes second."""

    union_items: int = field(default=0, metadata={"help": "A name of 0.1 that this recipe has."})


def test_defaults_and_words_become_dataclasses():
    first, second = parse_arguments(FirstArguments, SecondArguments, defaults={"union_items": 4}, arguments=[])
    assert first == FirstArguments() and second == SecondArguments(union_items=4)
    (first,) = parse_arguments(FirstArguments, arguments=["--dense_weights", "1", "2", "--crops_per_epoch=3"])
    assert first == FirstArguments(crops_per_epoch=3, dense_weights=[1.0, 2.0])


def test_old_flags_are_taken_with_a_warning():
    with pytest.warns(FutureWarning, match="is called") as warned:
        (first,) = parse_arguments(FirstArguments, arguments=["--passes=3", "--item_weights", "1", "2"])
    assert first == FirstArguments(crops_per_epoch=3, dense_weights=[1.0, 2.0])
    assert [str(warning.message).split("`")[3] for warning in warned] == ["--crops_per_epoch", "--dense_weights"]
    _, second = parse_arguments(FirstArguments, SecondArguments, arguments=["--union_items", "5"])
    assert second.union_items == 5, "a flag that the recipe has is no old one"


def test_old_flags_have_a_name_of_today():
    from recipes import evaluate, train
    from recipes.benchmarks import decoding
    from recipes.papers.recochain import reproduce

    recipes = (train.ModelArguments, train.DataArguments, evaluate.EvaluateArguments, decoding.BenchmarkArguments)
    known = {name for recipe in (*recipes, reproduce.ReproduceArguments) for name in recipe.__dataclass_fields__}
    assert set(RENAMED_FLAGS.values()) <= known and not set(RENAMED_FLAGS) & known


@pytest.mark.parametrize(("word", "message"), [("--exclude_candidate=True", "gone since version 0.2"), ("--what", "")])
def test_flags_that_are_gone_or_unknown_are_refused(word, message, capsys):
    with pytest.raises((SystemExit, ValueError)):
        parse_arguments(FirstArguments, arguments=[word])
    assert message in capsys.readouterr().err


def test_help_is_grouped_by_dataclass(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(FirstArguments, SecondArguments, TrainingArguments, arguments=["--help"])
    text = capsys.readouterr().out
    places = [
        text.index(title) for title in ("\nWhat comes first:\n", "\nWhat comes second:\n", f"\n{TRAINER_GROUP}:\n")
    ]
    assert places == sorted(places) and "The rest of" not in text
    assert (
        places[0] < text.index("--crops_per_epoch", places[0]) < places[1] < text.rindex("--union_items") < places[2]
    )


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_every_command_has_help(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(command, run_name="__main__")
    assert stopped.value.code == 0 and "--help" in capsys.readouterr().out
