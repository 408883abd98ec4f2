"""Make a recipe's arguments from the fields of a config, with its types, defaults and help texts."""

import inspect
import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from functools import partial
from typing import Any, Union, get_args, get_origin

ENTRY = re.compile(r"^(\w+(?:, \w+)*) \(.*\):")


def help_texts(config_class: type) -> dict[str, str]:
    """Read the help text of each field from the `Args:` of a config's docstring."""
    lines = inspect.cleandoc(config_class.__doc__ or "").split("\n")
    start = lines.index("Args:") + 1
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in lines[start:]:
        if line and not line.startswith(" "):  # the next section, such as "Raises:"
            break
        if line.startswith("    ") and (entry := ENTRY.match(line[4:])):
            names = entry[1].split(", ")
            line = line[4 + entry.end() :]
        for name in names:
            texts[name] = f"{texts.get(name, '')} {line.strip()}".strip()
    return {name: text.replace("`", "") for name, text in texts.items()}


def argument_type(annotation: Any) -> Any:
    """
    Turn a field's annotation into a type that the command line can parse.

    Numbers become `float`, lists and tuples become `list`, dicts become JSON text. None stays possible.
    """
    is_union = get_origin(annotation) in (Union, types.UnionType)
    options = list(get_args(annotation)) if is_union else [annotation]
    is_optional = type(None) in options
    lists = [option for option in options if get_origin(option) is list]
    if dict in options:
        kind: Any = str
    elif lists:
        kind = lists[0]
    else:
        kind = next(option for option in (float, bool, int, str) if option in options)
    return kind | None if is_optional else kind


def _with_help(kind: Any, default: Any, text: str) -> Any:
    metadata: dict[str, Any] = {"help": text.replace("%", "%%")}  # argparse formats help texts
    # HfArgumentParser reads a bare flag as True for other defaults only.
    if kind == bool | None and default is None:
        metadata |= {"nargs": "?", "const": True}
    if isinstance(default, list | tuple):
        return field(default_factory=partial(list, default), metadata=metadata)
    return field(default=default, metadata=metadata)


def arguments_from_config(name: str, doc: str, config_class: type, names: Sequence[str], are_optional: bool) -> type:
    """
    Make a dataclass of arguments, one for each of the config's fields `names`.

    Args:
        name: Name of the dataclass.
        doc: Docstring of the dataclass. Its first line is the group's title in `--help`.
        config_class: Config class, with a docstring that explains each field in its `Args:`.
        names: Fields of the config.
        are_optional: Make None the default of each argument; it stands for the checkpoint's value. False: copy the
            config's defaults.

    Raises:
        ValueError: for a name that the config lacks, or that its docstring does not explain.
    """
    known = {entry.name: entry for entry in fields(config_class)}
    texts = help_texts(config_class)
    columns = []
    for argument in names:
        if argument not in known or argument not in texts:
            raise ValueError(
                f"`names` must be fields that the docstring of {config_class.__name__} explains, got {argument!r}. "
                "Add it there."
            )
        default: Any = known[argument].default
        default = None if default is MISSING else default
        kind = argument_type(known[argument].type)
        text = texts[argument]
        if dict in (known[argument].type, *get_args(known[argument].type)):
            text += " Write a JSON object."
        if are_optional:
            text += f" Default: the checkpoint's value, or {default} in a new model."
            kind = kind | None
            default = None
        columns.append((argument, kind, _with_help(kind, default, text)))
    arguments_class = make_dataclass(name, columns)
    arguments_class.__doc__ = doc
    return arguments_class
