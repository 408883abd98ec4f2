"""Train an adapter on a checkpoint, the base, and write the folder of the adapter."""

from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGET_MODULES
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_unigrf import UniGRFForCausalLM
from modeling_unigrf.adapters_unigrf import (
    ADAPTER_WEIGHTS_FILE,
    RECORD_FILE,
    TRANSITIONS_FILE,
    weights_digest,
)
from modeling_unigrf.loading_unigrf import local_folder
from recipes.common.files import whole_file, write_json
from recipes.training.arguments import named

# Fields of a config that describe a file or a machine.
OF_FILES = ("_name_or_path", "dtype", "transformers_version", "architectures", "auto_map", "custom_pipelines")
# Parts of the names of an adapter's tensors.
OF_ADAPTER = (".lora_", ".modules_to_save.", ".original_module.", ".token_adapter.")


def lora_fields(options: str) -> dict:
    """Read fields of `peft.LoraConfig` from a JSON object; raise `ValueError` for other names."""
    return named(options, {field.name for field in fields(LoraConfig)}, "lora")


def add_adapter(model: UniGRFForCausalLM, options: str, base: str) -> PeftModel:
    """
    Put a fresh LoRA adapter on a model, whose other weights it freezes.

    Args:
        model: The model, from the checkpoint `base`.
        options: Fields of `peft.LoraConfig` as a JSON object. Without `target_modules`: those that PEFT chooses for
            the backbone.
        base: The checkpoint that the adapter will name.

    Raises:
        ValueError: for options that PEFT rejects, that train nothing or that change the base, and for a model with
            weights that neither the base nor the adapter has.
    """
    chosen = lora_fields(options)
    backbone = model.config.text_config.model_type
    if chosen.get("target_modules") is None:
        if backbone not in TARGET_MODULES:
            raise ValueError(
                f"`lora` must have `target_modules` for the backbone {backbone!r}, for which PEFT chooses none, got "
                f"{options}. Name some of {layers_of(model)}."
            )
        chosen["target_modules"] = TARGET_MODULES[backbone]
    try:
        adapted = get_peft_model(model, LoraConfig(**chosen))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"`lora` must be a peft.LoraConfig that fits the model, got {options} ({error}). Correct it; the backbone "
            f"has the layers {layers_of(model)}."
        ) from error
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise ValueError(f"`lora` must train some weights, got {options}. Leave out inference_mode.")
    tied = (model.lm_head, model.get_input_embeddings()) if model.config.tie_word_embeddings else ()
    if any(type(layer).__module__.startswith("peft.") for layer in tied):
        raise ValueError(
            f"`lora` must leave tied embeddings alone, which it would train apart, got {options}. Leave lm_head and "
            f"{model.modules_to_save[2]} out."
        )
    check_only_adapter_differs(adapted, base)
    return adapted


def layers_of(model: UniGRFForCausalLM) -> list[str]:
    """Return the names of the backbone's layers that LoRA can adapt."""
    layers = [name for name, module in model.model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    return sorted({name.rpartition(".")[2] for name in layers})


def check_only_adapter_differs(adapted: PeftModel, base: str) -> dict[str, torch.Tensor]:
    """
    Check that base and adapter together have all of a model's weights, so that a saved adapter drops none.

    Returns:
        The tensors of the table of transitions, by their names in the table; empty if they are those of the base.

    Raises:
        ValueError: for weights that differ from those of the base, and weights that neither of the two has.
    """
    prefix = "base_model.model."
    saved = {name.removeprefix(prefix) for name in get_peft_model_state_dict(adapted, save_embedding_layers=False)}
    expected = UniGRFForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    table = {}
    lost = []
    for name, tensor in adapted.get_base_model().state_dict().items():
        base_name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if name.startswith("transitions."):
            table[name.partition(".")[2]] = tensor
        elif base_name in expected:
            stored = expected[base_name]
            if name not in saved and not (stored.shape == tensor.shape and torch.equal(stored, tensor.cpu())):
                lost.append(base_name)
        elif not any(part in name for part in OF_ADAPTER):
            lost.append(name)
    if lost:
        raise ValueError(
            f"`lora` must leave the weights of `init_from` as they are, and train all others, got {lost[:10]} that "
            f"differ from {base} or that it lacks. Name new parts in modules_to_save, keep the items of the base, and "
            "choose an init_lora_weights that does not change the base."
        )
    is_same = table.keys() and all(
        f"transitions.{name}" in expected and torch.equal(expected[f"transitions.{name}"], tensor.cpu())
        for name, tensor in table.items()
    )
    return {} if is_same else table


def record_of(model: UniGRFForCausalLM, base: str) -> dict:
    """Return what PEFT does not save: the hash of the base's weights, and the model's config."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in OF_FILES}
    return {"base_weights": weights_digest(local_folder(base, {})), "config": config}


class SaveRecord(TrainerCallback):
    """
    Save what PEFT does not beside the adapter in the Trainer's checkpoints.

    Args:
        model (`UniGRFForCausalLM`): The model that is trained.
        base (`str`): The checkpoint below the adapter.
    """

    def __init__(self, model: UniGRFForCausalLM, base: str):
        self.model = model
        self.base = base

    def on_save(self, args, state, control, **kwargs):
        """Write the record."""
        if args.should_save:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_json(folder / RECORD_FILE, record_of(self.model, self.base))


def save_adapter(adapted: PeftModel, base: str, folder: Path) -> None:
    """
    Write an adapter that `modeling_unigrf` and PEFT load: its weights, and what its model has beside weights.

    Raises:
        ValueError: if a weight would be lost.
    """
    model = adapted.get_base_model()
    table = check_only_adapter_differs(adapted, base)
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for file, tensors in ((ADAPTER_WEIGHTS_FILE, weights), (TRANSITIONS_FILE, table)):
        if not tensors:
            (folder / file).unlink(missing_ok=True)
            continue
        with whole_file(folder / file) as path:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    write_json(folder / RECORD_FILE, record_of(model, base))
    peft_config = adapted.peft_config["default"]
    is_inference = peft_config.inference_mode
    peft_config.inference_mode = True
    # An absolute path: whoever loads the adapter may run elsewhere.
    peft_config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    peft_config.save_pretrained(str(folder))
    peft_config.inference_mode = is_inference
    model.generation_config.save_pretrained(folder)
