# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The key-value cache: what is appended to it for a while, and taken off again."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


def check_cache(cache: Cache) -> None:
    """Raises `ValueError` unless tokens can be appended to the cache and taken off again."""
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise ValueError(
            f"`cache` must be a `DynamicCache()` with plain layers, got {type(cache).__name__} with layers {kinds}. "
            "Beams and candidates are appended to it and taken off again: pass `DynamicCache()`, or leave the cache "
            "out."
        )


@contextmanager
def cache_rollback(cache: Cache, only_on_error: bool = False) -> Iterator[Cache]:
    """Crops the cache back to its length on exit; with `only_on_error`, only where an exception is raised."""
    lengths = [layer.get_seq_length() for layer in cache.layers]
    completed = False
    try:
        yield cache
        completed = True
    finally:
        if not (completed and only_on_error):
            # Layer by layer: a forward that failed has not reached the last ones.
            for layer, length in zip_longest(cache.layers, lengths, fillvalue=0):
                if excess := layer.get_seq_length() - length:
                    layer.crop(-excess)


def without_gradient(cache: DynamicCache) -> DynamicCache:
    """Copies the cache: the same keys and values, into which no gradient flows."""
    copy = DynamicCache()
    for index, layer in enumerate(cache.layers):
        copy.update(layer.keys.detach(), layer.values.detach(), index)
    return copy
