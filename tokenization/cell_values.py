"""Values of tables, JSON and Python as the tokenizer reads them: what is missing, an ID, a text, a time in seconds."""

import math
from collections.abc import Iterable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import torch

from .vocabulary_layout import UNKNOWN_TIME

# First second after the year 9999; milliseconds since 1978 are larger.
END_OF_TIME = 253_402_300_800
# From here on, floats skip integers.
INEXACT = 2**53


def as_values(name: str, values: Iterable) -> list:
    """Convert a sequence, array, tensor or table column to a list.

    Raises:
        ValueError: A string, which Python would split into letters, or a value that is no list.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        kind = "string" if isinstance(values, str | bytes) else "value"
        raise ValueError(
            f"`{name}` must be a list with one value per item, got the {kind} {values!r}. Put the {kind} into a list."
        )
    return values.tolist() if isinstance(values, np.ndarray | torch.Tensor) else list(values)


def is_missing(value: Any) -> bool:
    """Return whether a value stands for no value: None, NaN, or pandas' NaT and NA."""
    try:
        return value is None or bool(value != value)
    except (TypeError, ValueError):
        # NA and arrays have no truth value.
        return type(value).__name__ == "NAType"


def as_text(value: Any) -> str | None:
    """Return the text of a value, None for a missing one; an integer that a table holds as a float has no ".0"."""
    value = _python_value(value)
    if is_missing(value):
        return None
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        value = int(value)
    return str(value)


def as_id(value: Any) -> str | None:
    """Return the string of an ID; None for what is no ID: a missing or nested value, a float that rounds integers."""
    if type(value) is str:
        return value
    value = _python_value(value)
    is_nested = isinstance(value, list | tuple | dict | set) or getattr(value, "ndim", 0) > 0
    is_rounded = isinstance(value, float) and not abs(value) < INEXACT
    return None if is_nested or is_rounded else as_text(value)


def as_seconds(values: Iterable) -> np.ndarray:
    """Convert times to seconds since 1970.

    Args:
        values: n numbers of seconds, datetimes or dates (without a zone: in UTC), or missing values.

    Returns:
        float64 [n]: -1 for a missing value and for -1; NaN for what is no time between 1970 and the year 9999, such as
        milliseconds.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    # Objects: numpy would turn mixed values into strings, and True into 1.
    array = values if isinstance(values, np.ndarray) else np.asarray(values, dtype=object)
    if array.dtype.kind == "M":
        # Years beyond 2262 overflow nanoseconds.
        seconds = array.astype("datetime64[us]").astype(np.int64) / 1e6
        seconds[np.isnat(array)] = UNKNOWN_TIME
    elif array.dtype.kind in "iuf":
        seconds = array.astype(np.float64)
        seconds[np.isnan(seconds)] = UNKNOWN_TIME
    else:
        seconds = np.array([_seconds(value) for value in array], dtype=np.float64)
    is_time = (seconds == UNKNOWN_TIME) | ((seconds >= 0) & (seconds < END_OF_TIME))
    return np.where(is_time, seconds, np.nan)


def whole_seconds(name: str, values: Iterable) -> np.ndarray:
    """Convert times to whole seconds since 1970, as `as_seconds` reads them: n times -> int64 [n].

    Args:
        name: Name of the argument, for the error message.
        values: n times.

    Raises:
        ValueError: A value that is no time, such as text or milliseconds, with its position.
    """
    values = values if isinstance(values, np.ndarray | torch.Tensor) else as_values(name, values)
    seconds = as_seconds(values)
    wrong = np.flatnonzero(np.isnan(seconds))
    if len(wrong):
        raise ValueError(
            f"`{name}` must be seconds since 1970, datetimes, or None or -1 for an unknown time, got "
            f"{values[wrong[0]]!r} at position {wrong[0]} of {len(seconds)}. Divide milliseconds by 1,000."
        )
    return seconds.astype(np.int64)


def _seconds(value: Any) -> float:
    # Python has no nanoseconds: numpy would return an integer.
    value = _python_value(value.astype("datetime64[us]") if isinstance(value, np.datetime64) else value)
    if is_missing(value):
        return UNKNOWN_TIME
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return float(value) if isinstance(value, int | float | Decimal) and not isinstance(value, bool) else math.nan


def _python_value(value: Any) -> Any:
    """Return the Python value of a numpy scalar or of a tensor without dimensions."""
    is_scalar = isinstance(value, np.generic | np.ndarray | torch.Tensor) and value.ndim == 0
    return value.item() if is_scalar else value
