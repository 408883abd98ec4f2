"""Parse the command line of every recipe."""

import json
import math
import re
import sys
import warnings
from argparse import Action, ArgumentDefaultsHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

# Flags of version 0.1 and their new names, until version 0.3.
RENAMED_FLAGS = {
    "beams_kept_epochs": "candidate_refresh_epochs",
    "beams_kept_steps": "candidate_refresh_steps",
    "catalogues": "catalogs",  # typos: ignore
    "detach_history": "stop_gradient_history",
    "history_item_vectors": "history_item_representations",
    "item_loss_weight": "dense_loss_weight",
    "item_table_size": "embedding_table_size",
    "item_weights": "dense_weights",
    "num_ranked_beams": "rerank_top_k",
    "passes": "crops_per_epoch",
    "read_item_embeddings": "project_content_embeddings",
    "union_items": "num_dense_candidates",
}
# Flags of version 0.1 that are gone, and the reason.
REMOVED_FLAGS = {
    "exclude_candidate": "it changed no result beyond the deviation over seeds",
    "config_fields": "most fields of the config have flags of their own, which --help lists",
}
TRAINER_GROUP = "Options of transformers.TrainingArguments"
# Ranges of numbers: in words, and as a function. NaN and infinity are in none of them.
Range = tuple[str, Callable[[float], bool]]
COUNT: Range = ("1 or more", lambda value: value >= 1)
NOT_NEGATIVE: Range = ("0 or more", lambda value: value >= 0)
POSITIVE: Range = ("above 0", lambda value: value > 0)
SHARE_BELOW_ONE: Range = ("0 or more and below 1", lambda value: 0 <= value < 1)
SEED: Range = ("from 0 to 4294967295", lambda value: 0 <= value < 2**32)
# The ID of a Hub repository: a name, or a user and a name.
REPOSITORY = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")


class DefaultsFormatter(ArgumentDefaultsHelpFormatter):
    """Show "Required." or the default behind each help text that states no default itself."""

    def _get_help_string(self, action: Action) -> str | None:
        text = action.help or ""
        if action.required:
            return f"{text} Required."
        # A flag without a value shares its default with the flag that it negates.
        if action.nargs == 0 or "Default: " in text:
            return text
        return super()._get_help_string(action)


def parse_arguments(
    *dataclass_types: Any, defaults: Mapping[str, Any] | None = None, arguments: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """
    Parse the command line into dataclasses, and group the options in `--help` by the dataclass that defines them.

    Args:
        dataclass_types: Dataclasses of the options. The first line of a docstring is the title of its group.
        defaults: Values that replace the defaults of the dataclasses. None: no replacement.
        arguments: Words of the command line. None: the words of the process's command line.

    Returns:
        One instance of each dataclass, in the order of `dataclass_types`.

    Raises:
        ValueError: for values that `TrainingArguments` cannot read, such as a config of a missing package.
    """
    for dataclass_type in dataclass_types:
        is_trainer = issubclass(dataclass_type, TrainingArguments)
        # transformers reads the title of a group from this attribute.
        dataclass_type._argument_group_name = TRAINER_GROUP if is_trainer else title_of(dataclass_type)
    # The list of options follows the usage.
    parser = HfArgumentParser(list(dataclass_types), usage="%(prog)s [options]", formatter_class=DefaultsFormatter)
    for action in parser._actions:
        if action.nargs == 0 and action.const is False:
            action.help = f"Set --{action.dest} to False."
    for dataclass_type in dataclass_types:
        if not issubclass(dataclass_type, TrainingArguments):
            move_inherited_options(parser, dataclass_type)
    # The hundred options of the Trainer come last.
    parser._action_groups.sort(key=lambda group: group.title == TRAINER_GROUP)
    parser.set_defaults(**(defaults or {}))
    words = sys.argv[1:] if arguments is None else list(arguments)
    words = [current_flag(word, parser) for word in words]
    try:
        return parser.parse_args_into_dataclasses(words)
    except (TypeError, AttributeError, ImportError, LookupError, OSError, json.JSONDecodeError) as error:
        flags = [word.removeprefix("--").split("=")[0].replace("-", "_") for word in words if word.startswith("--")]
        names = [f"`{name}`" for name in flags if name in TrainingArguments._VALID_DICT_FIELDS] or ["The arguments"]
        raise ValueError(
            f"{', '.join(names)} must be what transformers.TrainingArguments takes, got "
            f"{describe_error(error)}. Correct the value, install the package that it needs, or leave it out."
        ) from error


def describe_error(error: Exception) -> str:
    """Describe an error of a library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"


def check_ranges(arguments: Any, ranges: Mapping[str, Range]) -> None:
    """
    Check the numbers of a recipe, before any work. None stands for no number.

    Args:
        arguments: Dataclass of the arguments.
        ranges: Range of each number, or of each number in a list.

    Raises:
        ValueError: for a number that is outside its range or not finite, and for an empty list.
    """
    for name, (expected, is_inside) in ranges.items():
        value = getattr(arguments, name)
        if value is None:
            continue
        numbers = value if isinstance(value, list) else [value]
        if not (numbers and all(math.isfinite(number) and is_inside(number) for number in numbers)):
            kind = "hold numbers that are" if isinstance(value, list) else "be"
            raise ValueError(f"`{name}` must {kind} {expected}, got {value}. Choose another value, or leave it out.")


def check_needs(arguments: Any, needs: Mapping[str, Sequence[tuple[str, bool]]]) -> None:
    """
    Check that the arguments that are set have an effect.

    Args:
        arguments: Dataclass of the arguments.
        needs: For each argument: what it needs, in words, and whether that is there.

    Raises:
        ValueError: for an argument that differs from its default and lacks what it needs.
    """
    for option in fields(arguments):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if getattr(arguments, option.name) == default:
            continue
        for needed, is_there in needs.get(option.name, ()):
            if not is_there:
                raise ValueError(
                    f"`{option.name}` must come with {needed}, got it alone, without effect. Add {needed}, or leave "
                    f"{option.name} out."
                )


def check_folder(path: str | None, name: str, file: str = "config.json", or_repository: bool = False) -> None:
    """
    Check that a path of an argument is a folder with a file, before a loader takes it for a repository of the Hub.

    Args:
        path: The path. None: the argument is not set.
        name: Name of the argument.
        file: A file of such a folder. The default is that of a checkpoint.
        or_repository: Allow the ID of a Hub repository, unless its first part is a local folder.

    Raises:
        ValueError: if the folder or the file is missing.
    """
    if path is None or (Path(path) / file).is_file():
        return
    if or_repository and REPOSITORY.fullmatch(path) and not Path(path.split("/")[0]).exists():
        return
    problem = f"no {file} in it" if Path(path).is_dir() else "no such folder"
    raise ValueError(
        f"`{name}` must be a local folder with {file}{' or a Hub repository' * or_repository}, got {path!r}: "
        f"{problem}. Check the path, or download it first: `hf download`."
    )


def check_checkpoint(path: str, name: str) -> None:
    """Raise `ValueError` unless a path of an argument is the folder of a checkpoint or of an adapter."""
    if not (Path(path) / "adapter_config.json").is_file():
        check_folder(path, name)


def move_inherited_options(parser: HfArgumentParser, dataclass_type: type) -> None:
    """Give the options of each base class of a dataclass their own group."""
    groups = [group for group in parser._action_groups if group.title == title_of(dataclass_type)]
    for base in dataclass_type.__mro__[1:]:
        names = {entry.name for entry in fields(base)} if is_dataclass(base) else set()
        options = [option for group in groups for option in group._group_actions if option.dest in names]
        inherited = {entry.name for other in base.__bases__ if is_dataclass(other) for entry in fields(other)}
        options = [option for option in options if option.dest not in inherited]
        if not options:
            continue
        parser.add_argument_group(title_of(base))._group_actions.extend(options)
        for group in groups:
            group._group_actions[:] = [option for option in group._group_actions if option not in options]


def title_of(dataclass_type: type) -> str:
    """Return the first line of a dataclass's docstring, without its period."""
    return (dataclass_type.__doc__ or dataclass_type.__name__).strip().splitlines()[0].rstrip(".")


def current_flag(word: str, parser: HfArgumentParser) -> str:
    """Replace a flag of version 0.1 by its name of today, with a warning; exit at a flag that is gone."""
    old, *value = word.removeprefix("--").split("=", 1)
    known = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    if not word.startswith("--") or old in known:
        return word
    old = old.replace("-", "_")
    if old in REMOVED_FLAGS:
        parser.error(f"`--{old}` is gone since version 0.2: {REMOVED_FLAGS[old]}. Leave it out.")
    new = RENAMED_FLAGS.get(old.removeprefix("no_"))
    if new not in known:
        return word
    if old.startswith("no_"):
        new = f"{new}=False"
    warnings.warn(
        f"`--{old}` is called `--{new}` since version 0.2. Version 0.3 drops the old name.", FutureWarning, 2
    )
    return "=".join([f"--{new}", *value])
