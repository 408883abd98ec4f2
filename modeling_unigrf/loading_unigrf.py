# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Checks of a saved model: its files are readable and whole, and nothing that is missing is filled in."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from .old_names_unigrf import OLD_CONTENT_EMBEDDINGS

# Arguments of `from_pretrained` that choose a place.
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
# Methods that run parts of the model beside `forward`.
CALLS = ("prefill", "rank", "recommend", "item_representations", "similar_items", "user_vectors")
CONTENT_EMBEDDINGS = ("catalog.content_embeddings", OLD_CONTENT_EMBEDDINGS)


def hub_arguments(arguments: dict) -> dict:
    """Return those of the arguments of `from_pretrained` that choose a place."""
    return {name: value for name, value in arguments.items() if name in HUB_ARGUMENTS and value is not None}


def register_calls(model: PreTrainedModel) -> PreTrainedModel:
    """
    Let FSDP gather the weights for all calls of a model, as it does for `forward`; other models stay as they are.

    `from_pretrained(distributed_config=...)` does so by itself. After torch's `fully_shard(model)`, call it once.
    """
    for name in CALLS if isinstance(model, FSDPModule) else ():
        register_fsdp_forward_method(model, name)
    return model


def local_folder(source: str | os.PathLike, place: dict) -> Path | None:
    """Return the folder of a checkpoint, also in the Hub's cache; None without a config.json there."""
    file = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False, **place)
    return None if file is None else Path(file).parent


def stored_dtypes(folder: Path) -> dict[str, str]:
    """
    Return the dtype of each weight in the safetensors files of a folder.

    Raises:
        ValueError: for files that are not whole, or that this user may not read.
    """
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".py", ".safetensors")]
    if secret := [path.name for path in files if not os.access(path, os.R_OK)]:
        raise ValueError(
            f"The files of {folder} must be readable, got no permission to read {secret}. Ask their owner for it "
            "(`chmod a+r`)."
        )
    dtypes = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                dtypes |= {name: file.get_slice(name).get_dtype() for name in names}
        except SafetensorError as error:
            raise ValueError(
                f"{path} must be a whole safetensors file, got a truncated or damaged one ({error}). Save or download "
                "it again."
            ) from error
    return dtypes


def check_json_files(folder: Path) -> None:
    """Raise `ValueError` unless the config of a model in a folder, and the index of its weights, are JSON objects."""
    for path in [*folder.glob("config.json"), *folder.glob("model*.index.json")]:
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            content = error
        if not isinstance(content, dict):
            raise ValueError(
                f"{path} must hold a JSON object, got {content!r:.200}. Save it again, or copy the whole folder."
            )


def check_generation_config(source: str | os.PathLike, place: dict) -> None:
    """Raise `ValueError` unless a checkpoint has its generation_config.json, which transformers would replace."""
    try:
        GenerationConfig.from_pretrained(source, **hub_arguments(place))
    except (OSError, TypeError) as error:
        raise ValueError(
            f"{source} must have a whole generation_config.json, which says how the model serves, got none or a "
            f"damaged one ({error}). Copy the whole folder, or pass generation_config=GenerationConfig() for the "
            "defaults."
        ) from error


def check_weights(model: PreTrainedModel, missing: set[str], place: dict) -> None:
    """
    Check that a checkpoint has all weights of the model that it describes.

    Parts that only a changed config asks for, such as the candidate block of a stage II, start fresh.

    Args:
        model (`PreTrainedModel`): The loaded model.
        missing (`set[str]`): Names of its weights that the checkpoint lacks.
        place (`dict`): The arguments of `from_pretrained` that choose a place.

    Raises:
        ValueError: for missing weights, and for content embeddings that are int8 where the config says float, or the
            reverse.
    """
    source = model.config.name_or_path
    if missing:
        stored = type(model.config).from_pretrained(source, **place)
        with torch.device("meta"):
            expected = set(type(model)(stored).state_dict())
        if lost := sorted(missing & expected):
            raise ValueError(
                f"{source} must have all weights of its config.json, got none for {lost[:20]}. Save the model again, "
                "or copy the whole folder."
            )
    folder = local_folder(source, place)
    dtypes = {} if folder is None else stored_dtypes(folder)
    is_int8 = model.config.int8_content_embeddings
    for name in CONTENT_EMBEDDINGS:
        if name in dtypes and (dtypes[name] == "I8") != is_int8:
            raise ValueError(
                f"`int8_content_embeddings` must be {not is_int8} for the {dtypes[name]} content embeddings of "
                f"{source}, got {is_int8}. Correct config.json, or leave the argument out."
            )
