# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The names of version 0.1. The model accepts them, with a warning, until 0.3: delete this file then."""

from dataclasses import is_dataclass
from math import log

from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

MODEL_FIELDS = {
    "item_embedding_dim": "content_embedding_dim",
    "int8_item_embeddings": "int8_content_embeddings",
    "read_item_embeddings": "project_content_embeddings",
    "item_table_size": "embedding_table_size",
    "history_item_vectors": "history_item_representations",
    "rank_by_item_score": "rank_by_dense_score",
}
TRAINING_FIELDS = {
    "generation_loss_weight": "generation_loss_weight",
    "ranking_loss_weight": "ranking_loss_weight",
    "item_loss_weight": "dense_loss_weight",
    "code_negatives": "code_negatives",
    "negatives_per_item": "negatives_per_item",
    "num_train_beams": "num_train_beams",
    "inject_target": "inject_target",
    "detach_history": "stop_gradient_history",
    "detach_item_score": "stop_gradient_dense_score",
    "retrieval_behaviors": "retrieval_behaviors",
}
SERVING_FIELDS = {
    "max_items": "max_items",
    "max_long_items": "max_long_items",
    "exclude_history": "exclude_history",
    "ranking_target": "ranking_target",
    "ranking_weight": "ranking_weight",
    "item_weight": "dense_weight",
    "union_items": "num_dense_candidates",
    "num_ranked_beams": "rerank_top_k",
}
# Token ids follow from the other fields now.
DERIVED_FIELDS = ("code_offsets", "behavior_token_ids")
# Removed options, with the values that the code now has.
REMOVED_FIELDS = {
    "share_code_negatives": True,
    "given_negative_weight": 30.0,
    "candidate_loss_weight": 10.0,
    "exclude_candidate": False,
}
INPUTS = {
    "catalogue": "catalog",
    "request_timestamps": "query_time",
    "next_timestamps": "target_timestamps",
    "item_weight": "dense_weight",
    "union_items": "num_dense_candidates",
    "num_ranked_beams": "rerank_top_k",
}
LONG_HISTORY = {"long_items": "items", "long_behaviors": "behaviors", "long_timestamps": "timestamps"}
ITEM_SETS = {
    "negative_items": "hard_negatives",
    "favorite_items": "excluded_positives",
    "candidates": "candidates",
    "blocked_items": "blocked_items",
}
OLD_CONTENT_EMBEDDINGS = "catalogue.item_embeddings"
# Patterns of weights' names.
OLD_WEIGHTS = {
    r"^catalogue\.item_codes$": "catalog.item_codes",
    r"^catalogue\.item_embeddings$": "catalog.content_embeddings",
}


def warn_of_old_names(names: list[str], instead: str) -> None:
    """Log a warning of old `names`, with the advice `instead`."""
    logger.warning_once(f"{', '.join(names)}: names of unigrf 0.1, which 0.3 will reject. {instead}")


def convert_old_fields(config: PreTrainedConfig, fields: dict) -> bool:
    """
    Take the fields of a 0.1 config out of `fields`, and set `config` and its `training_config` by them.

    Serving fields wait in `config.old_serving_fields` for the model, which has the `generation_config`.

    Returns:
        Whether there were such fields.

    Raises:
        ValueError: for token ids that do not follow from behaviors and codebook sizes.
    """
    known = (*MODEL_FIELDS, *TRAINING_FIELDS, *SERVING_FIELDS, *DERIVED_FIELDS, *REMOVED_FIELDS)
    old = {name: fields.pop(name) for name in known if name in fields}
    if not old:
        return False
    warn_of_old_names(sorted(old), "Save the model again, or see CHANGELOG.md for the new names.")
    for name, new_name in MODEL_FIELDS.items():
        if name in old:
            setattr(config, new_name, old[name])
    training = {new_name: old[name] for name, new_name in TRAINING_FIELDS.items() if name in old}
    if is_dataclass(config.training_config):
        for name, value in training.items():
            setattr(config.training_config, name, value)
    else:
        config.training_config = training | (config.training_config or {})
    if old.get("negatives_per_item") and not config.next_logit_bias:
        config.next_logit_bias = log(max(1, config.num_items - 1) / old["negatives_per_item"])
    for name in DERIVED_FIELDS:
        if old.get(name) is not None and list(old[name]) != getattr(config, name):
            raise ValueError(
                f"`{name}` must be {getattr(config, name)}, as behaviors and codebook_sizes say, got "
                f"{list(old[name])}. Make the tokenizer and the model again."
            )
    for name, value in REMOVED_FIELDS.items():
        if old.get(name, value) != value:
            logger.warning_once(f"{name}={old[name]} has no effect any more: the model always uses {value}.")
    config.old_serving_fields = {new_name: old[name] for name, new_name in SERVING_FIELDS.items() if name in old}
    return True


def convert_old_overrides(fields: dict) -> dict:
    """Convert the config fields that `from_pretrained` was given: training fields of 0.1 go to `training_config`."""
    training = {new_name: fields[name] for name, new_name in TRAINING_FIELDS.items() if name in fields}
    old = [name for name in (*TRAINING_FIELDS, *MODEL_FIELDS) if name in fields]
    if not old:
        return fields
    warn_of_old_names(old, "Pass training_config={...}, or see CHANGELOG.md for the new names.")
    rest = {MODEL_FIELDS.get(name, name): value for name, value in fields.items() if name not in TRAINING_FIELDS}
    if training:
        rest["training_config"] = training | rest.get("training_config", {})
    return rest


def take_old_serving_fields(fields: dict) -> tuple[dict, dict]:
    """Split what `from_pretrained` was given: serving fields of 0.1 by their new names, and the rest."""
    old = [name for name in (*SERVING_FIELDS, *REMOVED_FIELDS) if name in fields]
    if old:
        warn_of_old_names(old, "Set model.generation_config after loading; removed options are ignored.")
    serving = {new_name: fields[name] for name, new_name in SERVING_FIELDS.items() if name in fields}
    return serving, {name: value for name, value in fields.items() if name not in old}


def convert_old_inputs(inputs: dict) -> dict:
    """Rename keyword arguments of 0.1's `forward`, `rank`, `recommend` and `generate`."""
    old = [name for name in (*INPUTS, *LONG_HISTORY, *ITEM_SETS) if name in inputs]
    if not old:
        return inputs
    warn_of_old_names(old, "See CHANGELOG.md for the new names.")
    inputs = {INPUTS.get(name, name): value for name, value in inputs.items()}
    for group, names in (("long_history", LONG_HISTORY), ("item_sets", ITEM_SETS)):
        values = {new_name: inputs.pop(name, None) for name, new_name in names.items()}
        values = {name: value for name, value in values.items() if value is not None}
        if values:
            inputs[group] = values | (inputs.get(group) or {})
    return inputs


def convert_old_request(request: dict) -> dict:
    """Rename the keys of a 0.1 request to the pipeline."""
    if "request_timestamp" not in request:
        return request
    warn_of_old_names(["request_timestamp"], "Name it query_time.")
    return {"query_time" if name == "request_timestamp" else name: value for name, value in request.items()}
