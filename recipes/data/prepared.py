"""Load a prepared folder, read its record, and check that a model belongs to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict, load_from_disk
from safetensors.torch import load_file

from recipes.common.files import errors_with_path, read_json
from tokenization import SemanticIdTokenizer


@dataclass
class PreparedData:
    """
    Contents of a folder that `recipes.prepare` wrote.

    Args:
        tokenizer (`SemanticIdTokenizer`): Tokenizer of the items.
        dataset (`DatasetDict`): Splits `train`, `validation` and `test`.
        embeddings (`torch.FloatTensor` of shape `(num_items, D)`): Content embeddings of the items.
    """

    tokenizer: SemanticIdTokenizer
    dataset: DatasetDict
    embeddings: torch.Tensor


def load_prepared(folder: str | Path) -> PreparedData:
    """Load a prepared folder; raise `ValueError`, with the path, for a part that is missing or damaged."""
    folder = Path(folder)
    file = folder / "item_embeddings.safetensors"
    with errors_with_path(folder / "tokenizer"):
        tokenizer = SemanticIdTokenizer.from_pretrained(folder / "tokenizer")
    with errors_with_path(file):
        embeddings = load_file(file)["embeddings"]
    return PreparedData(tokenizer, load_splits(folder), embeddings)


def load_splits(folder: str | Path) -> DatasetDict:
    """Load the splits of a prepared folder; raise `ValueError`, with the path, if they are missing or damaged."""
    with errors_with_path(Path(folder) / "dataset"):
        return load_from_disk(str(Path(folder) / "dataset"))


def prepared(folder: str | Path) -> dict[str, Any]:
    """Read the record of a prepared folder; raise `ValueError` if preparation did not finish there."""
    file = Path(folder) / "prepare.json"
    if not file.is_file():
        raise ValueError(
            f"`data_dir` must be a folder that recipes.prepare wrote, got no {file}. Check the path, or prepare the "
            "folder."
        )
    record = read_json(file)
    # Keys of 0.1, which 0.3 will not read.
    if "catalogue" in record["counts"]:  # typos: ignore
        record["counts"]["catalog"] = record["counts"].pop("catalogue")  # typos: ignore
    return record


def check_same_items(tokenizer: SemanticIdTokenizer, folder: str | Path) -> None:
    """
    Check that the items of a prepared folder are the first items of a model.

    Args:
        tokenizer: Tokenizer of the model, which may have added items behind those of the folder.
        folder: The prepared folder.

    Raises:
        ValueError: unless both have the same items, codes, behaviors and token ids, in the same rows.
    """
    folder_tokenizer = SemanticIdTokenizer.from_pretrained(Path(folder) / "tokenizer")
    check_same_encoding(tokenizer, folder_tokenizer, folder)
    count = folder_tokenizer.num_items
    has_same_ids = tokenizer.item_ids[:count] == folder_tokenizer.item_ids
    if not has_same_ids or not np.array_equal(tokenizer.item_codes[:count], folder_tokenizer.item_codes):
        raise ValueError(
            f"`data_dir` must hold the items of the model, got {count} items in {folder} and {tokenizer.num_items} "
            "with other ids or codes in the model. Take the folder that the model was trained on."
        )


def check_same_encoding(
    tokenizer: SemanticIdTokenizer, folder_tokenizer: SemanticIdTokenizer, folder: str | Path
) -> None:
    """
    Check that two tokenizers encode histories alike.

    The last level may differ in width, because it grows when items join a full group. It ends the vocabulary, so the
    other token ids stay.

    Args:
        tokenizer: Tokenizer of the model.
        folder_tokenizer: Tokenizer of the prepared folder.
        folder: The prepared folder, for the error message.

    Raises:
        ValueError: unless both have the same behaviors, levels and token ids.
    """
    fields, folder_fields = (
        {**each.config_fields(), "codebook_sizes": each.codebook_sizes[:-1]} for each in (tokenizer, folder_tokenizer)
    )
    growing = ("num_items", "vocab_size", "item_ids_fingerprint")
    compared = sorted((fields.keys() | folder_fields.keys()).difference(growing))
    changed = [name for name in compared if fields.get(name) != folder_fields.get(name)]
    if changed:
        raise ValueError(
            "`data_dir` must encode histories as the model does, got "
            f"{ ({name: folder_fields.get(name) for name in changed}) } in {folder} and "
            f"{ ({name: fields.get(name) for name in changed}) } in the model. Take the folder that the model was "
            "trained on."
        )
