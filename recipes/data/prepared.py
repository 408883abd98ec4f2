"""Load a prepared folder, read its record, and check that a model belongs to it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict, load_from_disk
from safetensors.torch import load_file

from tokenization import SemanticIdTokenizer


@dataclass
class PreparedData:
    """
    What `recipes.prepare` wrote, loaded.

    Args:
        tokenizer (`SemanticIdTokenizer`): The tokenizer of the items.
        dataset (`DatasetDict`): Splits `train`, `validation` and `test`.
        embeddings (`torch.FloatTensor` of shape `(num_items, D)`): Content embeddings.
    """

    tokenizer: SemanticIdTokenizer
    dataset: DatasetDict
    embeddings: torch.Tensor


def load_prepared(folder: str | Path) -> PreparedData:
    """Load the tokenizer, the splits and the content embeddings of a prepared folder."""
    folder = Path(folder)
    return PreparedData(
        SemanticIdTokenizer.from_pretrained(folder / "tokenizer"),
        load_from_disk(str(folder / "dataset")),
        load_file(folder / "item_embeddings.safetensors")["embeddings"],
    )


def prepared(folder: str | Path) -> dict[str, Any]:
    """The record of a prepared folder; `ValueError` if it is none, or not complete."""
    file = Path(folder) / "prepare.json"
    if not file.is_file():
        raise ValueError(
            f"expected a folder that recipes.prepare wrote, found no {file}: check the path, or prepare it"
        )
    return json.loads(file.read_text())


def check_same_items(tokenizer: SemanticIdTokenizer, folder: str | Path) -> None:
    """`ValueError` unless a model's tokenizer spells the items and behaviors of a prepared folder by the same rows."""
    ours = SemanticIdTokenizer.from_pretrained(Path(folder) / "tokenizer")
    check_same_spelling(tokenizer, ours, folder)
    same = tokenizer.item_ids[: ours.num_items] == ours.item_ids  # what was added to the model comes behind them
    if not same or not np.array_equal(tokenizer.item_codes[: ours.num_items], ours.item_codes):
        raise ValueError(
            f"expected a model of the {ours.num_items} items of {folder}, found one of {tokenizer.num_items} items with other "
            "ids or codes: its rows are not the rows of that folder, take the folder that it was trained on"
        )


def check_same_spelling(tokenizer: SemanticIdTokenizer, other: SemanticIdTokenizer, folder: str | Path) -> None:
    """
    `ValueError` unless both have the same behaviors, levels and token ids; `other` is that of the folder. The last level, at
    the vocabulary's end, may differ in width: it grows where items are added to a group that fills it.
    """
    fields, others = ({**one.config_fields(), "codebook_sizes": one.codebook_sizes[:-1]} for one in (tokenizer, other))
    grows = ("num_items", "vocab_size")
    if changed := [name for name in fields if name not in grows and fields[name] != others[name]]:
        raise ValueError(
            f"expected a model that spells histories as {folder} does, found { ({name: fields[name] for name in changed}) } in the "
            f"model and { ({name: others[name] for name in changed}) } there: take the folder that it was trained on"
        )
