"""Build the model that a training starts with, fresh or from a checkpoint."""

import numpy as np
import torch
from transformers import GenerationConfig

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM
from modeling_unigrf.pipeline_unigrf import check_tokenizer
from recipes.data.prepared import PreparedData, check_same_encoding
from recipes.training.arguments import DataArguments, ModelArguments
from tokenization import SemanticIdTokenizer

# Fields that the weights of a checkpoint fix.
FIXED_PARTS = (
    "text_config",
    "ranking_targets",
    "project_content_embeddings",
    "embedding_table_size",
    "representation_size",
    "history_item_representations",
    "tie_word_embeddings",
)
# Least median cosine of stored and current embeddings: few texts may change.
SAME_ENCODER = 0.9


def build_model(model_args: ModelArguments, data_args: DataArguments, data: PreparedData) -> UniGRFForCausalLM:
    """
    Build a model for the items of a prepared folder, fresh or from `model_args.init_from`.

    Raises:
        ValueError: for a checkpoint of other items or with other parts than the arguments name, and for a backbone
            with too few positions for `data_args.max_items`.
    """
    model = fresh_model(model_args, data) if model_args.init_from is None else model_from_checkpoint(model_args, data)
    if data_args.num_transitions:
        model.set_transitions(data.dataset["train"]["items"][:], data_args.num_transitions)
    serving = model.generation_config
    serving.max_items = data_args.max_items
    serving.max_long_items = (data_args.max_long_items if model_args.num_retrieved_items else None) or None
    # Keep a weight that validation chose, but no 0 from retrieval alone.
    serving.ranking_weight = (serving.ranking_weight or 1.0) if model_args.ranking_loss_weight else 0.0
    if data_args.refit_from is not None:
        model.generation_config = GenerationConfig.from_pretrained(data_args.refit_from)
    check_positions(model, data_args.max_items)
    if model_args.freeze_base_model:
        model.freeze_base_model()
    return model


def create_model(
    config: UniGRFConfig, item_codes: torch.Tensor, embeddings: torch.Tensor | None = None
) -> UniGRFForCausalLM:
    """Create a model with random weights and the catalog: codes int `[N, L]` and content embeddings `[N, D]`."""
    model = UniGRFForCausalLM(config)
    model.set_catalog(item_codes, embeddings)
    return model


def fresh_model(model_args: ModelArguments, data: PreparedData) -> UniGRFForCausalLM:
    """Create a model with random weights."""
    config = UniGRFConfig(
        **data.tokenizer.config_fields(),
        content_embedding_dim=data.embeddings.shape[1],
        **model_args.architecture(),
        training_config={"generation_loss_weight": data.tokenizer.num_levels, **model_args.objective()},
    )
    return create_model(config, torch.from_numpy(data.tokenizer.item_codes.copy()), data.embeddings)


def model_from_checkpoint(model_args: ModelArguments, data: PreparedData) -> UniGRFForCausalLM:
    """Load the checkpoint `init_from`, check that it fits, and add the items that are new."""
    checkpoint = str(model_args.init_from)
    fields = model_args.architecture()
    check_same_parts(UniGRFConfig.from_pretrained(checkpoint), fields, checkpoint)
    fields = {name: value for name, value in fields.items() if name not in FIXED_PARTS}
    model = UniGRFForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, **fields, training_config=model_args.objective()
    )
    earlier = SemanticIdTokenizer.from_pretrained(checkpoint)
    check_tokenizer(model, earlier)
    check_first_items(model, earlier, data.tokenizer, checkpoint)
    add_new_items(model, earlier, data, checkpoint)
    return model


def add_new_items(model: UniGRFForCausalLM, earlier: SemanticIdTokenizer, data: PreparedData, checkpoint: str) -> None:
    """Add the items of a prepared folder that the `earlier` tokenizer lacks, after a check of the embeddings."""
    reads_embeddings = model.config.content_embedding_dim > 0
    if reads_embeddings:
        check_same_encoder(model, earlier, data.embeddings, checkpoint)
    if data.tokenizer.num_items > earlier.num_items:
        new_items = slice(earlier.num_items, None)
        codes = torch.from_numpy(data.tokenizer.item_codes[new_items].copy())
        model.add_items(codes, data.embeddings[new_items] if reads_embeddings else None)


def check_first_items(
    model: UniGRFForCausalLM, earlier: SemanticIdTokenizer, tokenizer: SemanticIdTokenizer, checkpoint: str
) -> None:
    """Raise `ValueError` unless the checkpoint's items are the tokenizer's first, with the same ids and codes."""
    check_same_encoding(earlier, tokenizer, "data_dir")
    count = len(earlier.item_ids)
    has_same_ids = tokenizer.item_ids[:count] == earlier.item_ids
    if not has_same_ids or not np.array_equal(model.catalog.item_codes, tokenizer.item_codes[:count]):
        raise ValueError(
            f"`init_from` must be a checkpoint of the first of the {tokenizer.num_items} items in data_dir, got "
            f"{count} items, or other ids or codes, in {checkpoint}. Start from a model that was trained on this "
            f"data, or prepare the data with --tokenizer {checkpoint}."
        )


def check_same_parts(config: UniGRFConfig, fields: dict, checkpoint: str) -> None:
    """Raise `ValueError` unless a checkpoint has the weights of the parts that `fields` names."""
    requested = {name: fields[name] for name in FIXED_PARTS if name in fields and name != "text_config"}
    stored = {name: getattr(config, name) for name in requested}
    if "text_config" in fields:
        backbone = requested_backbone(fields["text_config"])
        requested |= backbone
        stored |= {name: config.text_config.to_dict().get(name) for name in backbone}
    if changed := [name for name, value in requested.items() if stored[name] != value]:
        raise ValueError(
            f"`init_from` must be a checkpoint with { ({name: requested[name] for name in changed}) }, got "
            f"{ ({name: stored[name] for name in changed}) } in {checkpoint}, which fit its weights. Set the same "
            f"values, or leave {changed} out."
        )


def requested_backbone(text_config: dict) -> dict:
    """Return the fields that `text_config` sets, by the names and in the form of the backbone's own config."""
    backbone = UniGRFConfig(text_config=text_config).text_config
    fields = backbone.to_dict()
    names = {backbone.attribute_map.get(name, name) for name in ("model_type", *text_config)}
    # Some names set other fields: `rope_theta` becomes a part of `rope_parameters`.
    if not names.issubset(fields):
        default = UniGRFConfig(text_config={"model_type": backbone.model_type}).text_config.to_dict()
        names |= {name for name, value in fields.items() if value != default.get(name)}
    return {name: value for name, value in fields.items() if name in names}


def check_same_encoder(
    model: UniGRFForCausalLM, earlier: SemanticIdTokenizer, embeddings: torch.Tensor, checkpoint: str
) -> None:
    """Raise `ValueError` unless the content embeddings are of the kind that the checkpoint was trained with."""
    stored = model.scorer.content_embeddings(torch.arange(earlier.num_items))
    difference = f"embeddings of width {embeddings.shape[1]}"
    if stored.shape[1] == embeddings.shape[1]:
        current = embeddings[: earlier.num_items]
        cosine = torch.cosine_similarity(stored, current).where((stored != current).any(dim=1), 1.0).median()
        if cosine >= SAME_ENCODER:
            return
        difference = f"a median cosine of {cosine:.2f} between an item's stored and current embedding"
    raise ValueError(
        f"`data_dir` must have embeddings of the kind that {checkpoint} was trained with, got {difference}. Prepare "
        "the data with the encoder, text template or embeddings that the tokenizer's provenance names: "
        f"{earlier.provenance}."
    )


def check_positions(model: UniGRFForCausalLM, max_items: int) -> None:
    """Raise `ValueError` if the backbone has too few positions for a history and the item after it."""
    longest = getattr(model.config.text_config, "max_position_embeddings", None)
    needed = 1 + (max_items + 1) * (model.layout.num_levels + 1)
    if longest is not None and needed > longest:
        raise ValueError(
            f"`max_position_embeddings` must be at least {needed} for max_items={max_items} and the item after them, "
            f"got {longest}. Take fewer items, or more positions."
        )
