# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Adapters: a folder with the few weights that PEFT trained, and the name of the checkpoint below them, the base.

PEFT's files hold weights alone. `recipes.train --lora` writes two files beside them: `RECORD_FILE` has the hash of the
base's weights and the model's config, and `TRANSITIONS_FILE` has the table of transitions, if it is not the base's.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import cached_file, find_adapter_config_file, is_peft_available

from .loading_unigrf import local_folder
from .transitions_unigrf import UniGRFTransitions

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
RECORD_FILE = "unigrf_adapter.json"
TRANSITIONS_FILE = "unigrf_transitions.safetensors"


def find_adapter(source: str | os.PathLike, place: dict) -> Path | None:
    """
    Return the folder of an adapter, also in the Hub's cache; None for a whole checkpoint.

    Args:
        source (`str` or `os.PathLike`): A folder or a repository of the Hub.
        place (`dict`): The arguments of `from_pretrained` that choose a place.

    Raises:
        ValueError: for a folder with an adapter, without PEFT.
    """
    if (Path(source) / "config.json").is_file():
        return None
    if not is_peft_available():
        if (Path(source) / ADAPTER_CONFIG_FILE).is_file():
            raise ValueError(
                f"{source} must be a whole checkpoint where PEFT is not installed, got an adapter. Install PEFT: "
                "`pip install peft`."
            )
        return None
    file = find_adapter_config_file(source, **place)
    if file is None or cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False, **place):
        return None
    folder = Path(file).parent
    for name in (ADAPTER_WEIGHTS_FILE, RECORD_FILE, TRANSITIONS_FILE, "generation_config.json"):
        # Downloads the file from the Hub.
        cached_file(source, name, _raise_exceptions_for_missing_entries=False, **place)
    return folder


def base_of(adapter: Path) -> str:
    """Return the name of an adapter's base, a folder or a repository; raise `ValueError` if it names none."""
    base = json.loads((adapter / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base or (os.path.isabs(base) and not os.path.isdir(base)):
        raise ValueError(
            f"`base_model_name_or_path` in {adapter / ADAPTER_CONFIG_FILE} must be the checkpoint below the "
            f"adapter, got {base!r}, which is not there. Correct the path."
        )
    return base


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of all tensors of a checkpoint, however its files divide them."""
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= dict.fromkeys(file.keys(), path)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        with safe_open(tensors[name], "pt") as file:
            tensor = file.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Adapter:
    """
    An adapter and what it changes in its base beside weights.

    Args:
        folder (`Path`): The adapter's folder.

    Raises:
        ValueError: for a damaged record, and without the weights.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.record = {}
        try:
            # Raise here for a damaged file, not in the middle of loading.
            with safe_open(folder / ADAPTER_WEIGHTS_FILE, "pt") as file:
                self.names = set(file.keys())
            if (folder / RECORD_FILE).is_file():
                self.record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
                self.record["base_weights"], self.record["config"]
        except Exception as error:
            raise ValueError(
                f"{folder} must have a whole {ADAPTER_WEIGHTS_FILE}, and a whole {RECORD_FILE} or none, got "
                f"{type(error).__name__}: {error} Copy the whole folder again."
            ) from error

    def config(self, base_config: PreTrainedConfig, changes: dict) -> PreTrainedConfig:
        """Return the config to load the base with: the adapter's and `changes`, but the size of the base's table."""
        fields = {**(self.record["config"] if self.record else base_config.to_dict()), **changes}
        config = type(base_config).from_dict(fields | {"num_transitions": base_config.num_transitions})
        config.dtype = base_config.dtype
        return config

    def generation_config(self) -> GenerationConfig | None:
        """Return the serving options; None: the base's."""
        has_file = (self.folder / "generation_config.json").is_file()
        return GenerationConfig.from_pretrained(self.folder) if has_file else None

    def check_base(self, base: str, place: dict) -> None:
        """Raise `ValueError` unless the loaded base is the checkpoint that the adapter was trained on."""
        expected = self.record.get("base_weights")
        if expected is not None and weights_digest(local_folder(base, place)) != expected:
            raise ValueError(
                f"The base of {self.folder} must be the checkpoint that the adapter was trained on, got other weights "
                f"in {base}. Name that checkpoint in {ADAPTER_CONFIG_FILE}, or train the adapter again."
            )

    def put_on(self, model: nn.Module) -> nn.Module:
        """
        Merge the adapter into its base, and return the model, a plain one.

        Raises:
            ValueError: for weights that do not fit the base, or that adapter_config.json does not name.
        """
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        # transformers asks for the imports of remote code, but for those in a `try`: whole checkpoints need no PEFT.
        try:
            from peft import PeftModel, get_peft_model_state_dict

            adapted = PeftModel.from_pretrained(model, self.folder)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"The adapter {self.folder} must fit its base, got {error} Name the base that the adapter was trained "
                f"on in {ADAPTER_CONFIG_FILE}."
            ) from error
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if different := sorted(expected ^ self.names):
            raise ValueError(
                f"{self.folder / ADAPTER_WEIGHTS_FILE} must have the weights that {ADAPTER_CONFIG_FILE} names, got "
                f"more or fewer: {different[:20]}. Copy the whole folder again."
            )
        model = adapted.merge_and_unload()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
        file = self.folder / TRANSITIONS_FILE
        if file.is_file():
            table = load_file(file)
            model.config.num_transitions = table["neighbors"].shape[1]
            model.transitions = UniGRFTransitions(*table["neighbors"].shape)
            model.transitions.load_state_dict(table)
            model.transitions.to(model.catalog.item_codes.device)
        return model.eval()
