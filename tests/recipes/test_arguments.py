"""One parser for all recipes: groups in `--help`, names of version 0.1."""

import importlib
import runpy
import sys
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import get_args

import pytest
from helpers import ROOT, short_id
from transformers import HfArgumentParser, PreTrainedConfig, TrainingArguments

from modeling_unigrf import UniGRFConfig, UniGRFTrainingConfig
from recipes import evaluate
from recipes.benchmarks import decoding
from recipes.common.arguments import RENAMED_FLAGS, TRAINER_GROUP, parse_arguments, title_of
from recipes.papers.recochain import reproduce
from recipes.papers.unigrf.reproduce import ReproduceArguments, check_arguments
from recipes.training import arguments as training_arguments
from recipes.training.arguments import DataArguments, ModelArguments

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

# Arguments of the commands that 0.1 had under other names.
RENAMED = (
    training_arguments.ModelArguments,
    training_arguments.DataArguments,
    evaluate.EvaluateArguments,
    decoding.BenchmarkArguments,
    reproduce.ReproduceArguments,
)
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
    known = {entry.name for recipe in RENAMED for entry in fields(recipe)}
    assert set(RENAMED_FLAGS.values()) <= known and not set(RENAMED_FLAGS) & known


def is_required(entry):
    """Return whether a field has no default."""
    return entry.default is MISSING and entry.default_factory is MISSING


@pytest.mark.parametrize("old", RENAMED_FLAGS)
def test_an_old_flag_sets_what_its_new_name_sets(old):
    new = RENAMED_FLAGS[old]
    recipes = [recipe for recipe in RENAMED if new in {entry.name for entry in fields(recipe)}]
    assert recipes
    for recipe in recipes:
        required = [f"--{entry.name}=x" for entry in fields(recipe) if is_required(entry)]
        (default,) = parse_arguments(recipe, arguments=required)
        expected = {word: parse_arguments(recipe, arguments=[*required, f"--{new}={word}"]) for word in "01"}
        word = next(word for word, (arguments,) in expected.items() if arguments != default)
        for flag in (f"--{old}={word}", f"--{old.replace('_', '-')}={word}"):
            with pytest.warns(FutureWarning, match=f"`--{old}` is called `--{new}` since version 0.2"):
                actual = parse_arguments(recipe, arguments=[*required, flag])
            assert actual == expected[word]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("--history_item_representations", True),
        ("--history_item_representations=False", False),
        ("--history_item_vectors", True),
        ("--no_history_item_vectors", False),
        ("--no-history-item-vectors", False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*since version 0.2:FutureWarning")
def test_flags_of_the_config_may_stand_alone(word, value):
    (arguments,) = parse_arguments(ModelArguments, arguments=[word])
    assert arguments == ModelArguments(history_item_representations=value)


def own_fields(dataclass_type):
    """Return the names of the fields that a dataclass adds to those of its bases."""
    inherited = {entry.name for base in dataclass_type.__bases__ if is_dataclass(base) for entry in fields(base)}
    return {entry.name for entry in fields(dataclass_type)} - inherited


def test_every_field_of_the_config_has_a_flag():
    # The data determines the others.
    of_data = {"behaviors", "codebook_sizes", "num_items", "content_embedding_dim", "int8_content_embeddings"}
    of_data |= {
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "next_logit_bias",
        "training_config",
        "num_transitions",
        "item_ids_fingerprint",
    }
    inherited = {entry.name for entry in fields(PreTrainedConfig)}
    of_config = {entry.name for entry in fields(UniGRFConfig)} - inherited - of_data
    of_config |= {"tie_word_embeddings"} & {entry.name for entry in fields(UniGRFConfig)}
    assert {*training_arguments.ARCHITECTURE, "num_retrieved_items"} == of_config
    of_training = {entry.name for entry in fields(UniGRFTrainingConfig)} - inherited
    assert set(training_arguments.OBJECTIVE) == of_training
    assert of_config | of_training <= {entry.name for entry in fields(ModelArguments)}


def test_flags_default_to_the_fields_of_the_config():
    arguments = ModelArguments()
    defaults = UniGRFTrainingConfig()
    # The generation loss counts as an item's: its default follows from the tokenizer.
    same = [name for name in training_arguments.OBJECTIVE if name != "generation_loss_weight"]
    assert arguments.objective() == {name: getattr(defaults, name) for name in same}
    assert arguments.architecture() == {"num_retrieved_items": UniGRFConfig().num_retrieved_items}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--exclude_candidate=True", "gone since version 0.2"),
        ("--config_fields={}", "most fields of the config have flags"),
        ("--what", ""),
    ],
)
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


def parser_of(command, monkeypatch):
    """Return the parser of a command."""
    parsers = []
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(HfArgumentParser, "print_help", lambda parser, *_: parsers.append(parser))
        patch.setattr(sys, "argv", [command, "--help"])
        runpy.run_module(command, run_name="__main__")
    return parsers[0]


def test_flags_of_a_training_are_grouped_by_their_dataclass(monkeypatch):
    groups = parser_of("recipes.train", monkeypatch)._action_groups
    flags = {group.title: {option.dest for option in group._group_actions} for group in groups}
    kinds = [kind for kind in ModelArguments.__mro__ if is_dataclass(kind)]
    assert len(kinds) == 6
    for kind in (*kinds, DataArguments):
        assert flags[title_of(kind)] == own_fields(kind)
    titles = [group.title for group in groups if group._group_actions]
    assert titles[-1] == TRAINER_GROUP and len(titles) == len(set(titles)) == 9, "and one of --help"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_flag_stands_alone(command, monkeypatch):
    groups = parser_of(command, monkeypatch)._action_groups
    options = [option for group in groups if group.title != TRAINER_GROUP for option in group._group_actions]
    texts = {option.dest: option.help or "" for option in options if option.dest != "help"}
    assert texts
    assert {name: text for name, text in texts.items() if not (text[:1].isupper() and text.endswith("."))} == {}


@dataclass
class ThirdArguments:
    """What comes third."""

    needed: str = field(metadata={"help": "Needed."})
    described: int | None = field(default=None, metadata={"help": "Number. Default: the checkpoint's value."})
    shown: int = field(default=3, metadata={"help": "Shown."})
    is_on: bool = field(default=True, metadata={"help": "Switch it on."})


def test_help_states_each_default_once(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(ThirdArguments, arguments=["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("Needed. Required.", "checkpoint's value. --shown", "Shown. (default: 3)", "on. (default: True)"):
        assert part in text
    assert text.endswith("--no-is-on Set --is_on to False.")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(command, run_name="__main__")
    assert stopped.value.code == 0 and "--help" in capsys.readouterr().out


def commands_with_ranges():
    """Pair each command's module with its dataclass of arguments, if the module has ranges."""
    for command in COMMANDS:
        module = importlib.import_module(command)
        for value in vars(module).values():
            if is_dataclass(value) and value.__module__ == command and value.__name__.endswith("Arguments"):
                yield pytest.param(module, value, id=command.removeprefix("recipes."))


def is_number(annotation):
    """Return whether an annotation holds int or float."""
    return bool({int, float} & {annotation, *get_args(annotation)}) or any(map(is_number, get_args(annotation)))


@pytest.mark.parametrize(("module", "arguments"), commands_with_ranges())
def test_every_number_of_a_command_has_a_range(module, arguments):
    numbers = {entry.name for entry in fields(arguments) if is_number(entry.type)}
    own_checks = {"recipes.prepare": numbers, "recipes.demo": {"seed"}, "recipes.show": {"users"}}
    own_checks["recipes.results.lists"] = {"seeds"}
    assert numbers - own_checks.get(module.__name__, set()) <= set(getattr(module, "RANGES", {}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "`epochs` must be 1 or more, got 0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be above 0, got nan"),
        ({"row": "joint", "relabel": True}, "`relabel` must come with a --row with the enhancer"),
        ({"row": "enhancer", "form": "gradient_norm"}, "`form` must come with a --row with the weighter"),
        ({"ids": "semantic", "code_temperature": 0.05}, "`code_temperature` must come with --ids atomic"),
        ({"row": "retrieval", "ranking_loss_weight": 2.0}, "`ranking_loss_weight` must come with a --row that trains"),
        ({"config_fields": '{"num_items": 5}'}, r"`config_fields` must have names among .* got \['num_items'\]"),
    ],
    ids=short_id,
)
def test_arguments_of_an_ablation_are_checked_first(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_arguments(ReproduceArguments(data="x", output_dir=str(tmp_path / "runs"), **options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_beams=0"], "`num_beams` must hold numbers that are 1 or more"),
        (["--ranking_weights", "1", "nan"], "`ranking_weights` must hold numbers"),
        (["--row=k0", "--max_long_items=5"], "`max_long_items` must come with a --row with sub-histories"),
        (["--rerank_top_k=300"], "`rerank_top_k` must come with a number of beams above 300"),
        (["--text_config=x"], "`text_config` must be JSON"),
        ([], "/nope"),
    ],
    ids=short_id,
)
def test_arguments_of_recochain_are_checked_first(flags, message, tmp_path):
    words = ["--data_dir=/nope", f"--output_dir={tmp_path / 'runs'}", *flags]
    with pytest.raises(ValueError, match=message):
        reproduce.run(*parse_arguments(reproduce.ReproduceArguments, arguments=words))
    assert not list(tmp_path.iterdir())
