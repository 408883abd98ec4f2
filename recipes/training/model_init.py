"""The model that a training starts with, fresh or a checkpoint's, and the arguments that say which."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields

import numpy as np
import torch

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM
from recipes.data.prepared import check_same_spelling
from tokenization import SemanticIdTokenizer

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
CONFIG_FIELDS = [one.name for one in dataclass_fields(UniGRFConfig)]
SAME_ENCODER = 0.9  # median cosine of an item's embeddings, then and now: a few items' texts may change


@dataclass
class ModelArguments:
    """What is trained."""

    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to start from, of these items or the first of them; it brings its own backbone."
        },
    )
    num_retrieved_items: int = field(
        default=0, metadata={"help": "Items of the long history that a candidate is ranked with."}
    )
    exclude_candidate: bool = field(default=False, metadata={"help": "The candidate itself is none of them."})
    num_train_beams: int = field(default=0, metadata={"help": "Own beams that are ranked in training, for `next`."})
    candidate_refresh_epochs: int = field(
        default=0, metadata={"help": "Epochs that a row keeps its beams; 0: they are searched for in every step."}
    )
    candidate_refresh_steps: int = field(
        default=0, metadata={"help": "The same in steps: searched for when the row comes."}
    )
    stop_gradient_history: bool = field(default=False, metadata={"help": "Their gradient does not reach the history."})
    freeze_base_model: bool = field(
        default=False,
        metadata={
            "help": "Of init_from, what ranks alone is trained; generation and item-level score stay as they are."
        },
    )
    text_config: str = field(
        default=json.dumps(LLAMA), metadata={"help": "The backbone's config as JSON, as `AutoConfig` takes it."}
    )
    negatives_per_item: float = field(
        default=1.0, metadata={"help": "Random candidates an item, for target `next`; none in stage II."}
    )
    generation_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the generation loss; 0: ranking alone."}
    )
    ranking_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the ranking loss; 0: generation alone."}
    )
    adaptive_weights: bool = field(default=False, metadata={"help": "Weigh the losses by how slowly they converge."})
    adaptive_temperature: float = field(
        default=0.1, metadata={"help": "Of the adaptive weights; lower: further apart."}
    )
    adaptive_form: str = field(
        default="loss_ratio", metadata={"help": "Of the adaptive weights.", "choices": ["loss_ratio", "gradient_norm"]}
    )
    adaptive_window: int | None = field(default=None, metadata={"help": "Steps of their windows; default: an epoch."})
    enhancer: bool = field(
        default=False, metadata={"help": "Correct the negatives of retrieval by what ranking says (UniGRF)."}
    )
    enhancer_target: str = field(default="like", metadata={"help": "The ranking target that says it."})
    relabel: bool = field(default=False, metadata={"help": "Its favorites become positives, too."})
    enhancer_options: str = field(
        default="{}",
        metadata={"help": "More arguments of RankingDrivenEnhancer, as JSON: num_negatives, threshold, ..."},
    )
    dense_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the softmax over items."})
    ranking_dropout: float = field(default=0.1, metadata={"help": "Dropout in the ranking head."})
    embedding_dropout: float = field(default=0.2, metadata={"help": "Dropout on the token embeddings."})
    project_content_embeddings: bool = field(
        default=True, metadata={"help": "Item vectors are made of item embeddings, too."}
    )
    embedding_table_size: int | None = field(
        default=None, metadata={"help": "Learned rows of items for the ranking head; default: one an item. 0: none."}
    )
    history_item_representations: bool = field(
        default=True,
        metadata={"help": "Histories are read by the items' vectors, too; a model without any needs False."},
    )
    config_fields: str = field(default="{}", metadata={"help": "More fields of UniGRFConfig, as JSON."})

    @property
    def second_stage(self) -> bool:
        """Whether candidates are ranked for the last item of a row alone."""
        return self.num_retrieved_items > 0 or self.num_train_beams > 0


def from_json(text: str, argument: str) -> dict:
    """A dict; `ValueError` if the text is none."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected {argument} as JSON, found {text!r} ({error}). Is it in single quotes?") from None
    if not isinstance(found, dict):
        raise ValueError(f"Expected {argument} as a JSON object, found {text!r}. Write it in braces.")
    return found


def named(options: str, known: Iterable[str], argument: str) -> dict:
    """A dict from JSON; `ValueError` if a name in it is not among those that are known."""
    found = from_json(options, argument)
    if strange := sorted(set(found).difference(known)):
        raise ValueError(f"Expected {argument} among {sorted(known)}, found {strange}. Is one misspelt?")
    return found


def build_model(
    args: ModelArguments,
    tokenizer: SemanticIdTokenizer,
    embeddings: torch.Tensor,
    max_items: int,
    max_long_items: int | None = None,
) -> UniGRFForCausalLM:
    """
    A model for the tokenizer's items, fresh or from `args.init_from`. `embeddings`: `[num_items, D]`. `ValueError` if the
    checkpoint is of other items, or of other parts than are asked for.
    """
    fields = {
        "max_items": max_items,
        "max_long_items": max_long_items,
        "num_retrieved_items": args.num_retrieved_items,
        "exclude_candidate": args.exclude_candidate,
        "num_train_beams": args.num_train_beams,
        "stop_gradient_history": args.stop_gradient_history,
        "negatives_per_item": 0.0 if args.second_stage else args.negatives_per_item,
        "generation_loss_weight": args.generation_loss_weight,
        "ranking_loss_weight": args.ranking_loss_weight,
        "dense_loss_weight": args.dense_loss_weight,
        "ranking_dropout": args.ranking_dropout,
        "embedding_dropout": args.embedding_dropout,
    }
    if args.init_from is not None:
        # A weight that validation chose is kept, but for the 0 of a model that did not rank yet.
        chosen = UniGRFConfig.from_pretrained(args.init_from).ranking_weight or 1.0
        fields["ranking_weight"] = chosen if args.ranking_loss_weight else 0.0
        fields |= named(args.config_fields, CONFIG_FIELDS, "config_fields")
        model = UniGRFForCausalLM.from_pretrained(args.init_from, dtype=torch.float32, **fields)
        earlier = SemanticIdTokenizer.from_pretrained(args.init_from)
        check_same_spelling(earlier, tokenizer, "data_dir")
        ids = earlier.item_ids
        same = tokenizer.item_ids[: len(ids)] == ids
        if not same or not np.array_equal(model.catalog.item_codes, tokenizer.item_codes[: len(ids)]):
            raise ValueError(
                f"Expected a checkpoint of the first of the {tokenizer.num_items} items in data_dir, found {len(ids)} items, or other "
                f"ids or codes, in {args.init_from}. Start from a model that was trained on this data, or prepare the data with "
                f"--tokenizer {args.init_from}."
            )
        rows = model.config.embedding_table_size if args.embedding_table_size is None else args.embedding_table_size
        asked = {
            "project_content_embeddings": args.project_content_embeddings,
            "history_item_representations": args.history_item_representations,
            "embedding_table_size": rows,
        }
        if changed := [name for name, value in asked.items() if getattr(model.config, name) != value]:
            raise ValueError(
                f"Expected a checkpoint with { ({name: asked[name] for name in changed}) }, found "
                f"{ ({name: getattr(model.config, name) for name in changed}) } in {args.init_from}, whose weights are made for "
                "these. Ask for the same (project_content_embeddings, history_item_representations, embedding_table_size)."
            )
        if model.config.content_embedding_dim:
            stored = model.catalog.embeddings_of(torch.arange(len(ids)))
            found = f"some of width {embeddings.shape[1]}"
            if stored.shape[1] == embeddings.shape[1]:
                now = embeddings[: len(ids)]
                alike = torch.cosine_similarity(stored, now).where((stored != now).any(dim=1), 1.0).median()
                found = (
                    None
                    if alike >= SAME_ENCODER
                    else f"a cosine of {alike:.2f} between an item's then and now (median)"
                )
            if found:
                raise ValueError(
                    f"Expected embeddings of the kind that {args.init_from} was trained with, found {found}. Prepare the data with the "
                    f"same encoder, text template or embeddings; the tokenizer's provenance says which: {earlier.provenance}."
                )
        if tokenizer.num_items > len(ids):
            new = slice(len(ids), None)
            more = embeddings[new] if model.config.content_embedding_dim else None
            model.add_items(torch.from_numpy(tokenizer.item_codes[new].copy()), more)
        return model
    fields["ranking_weight"] = 1.0 if args.ranking_loss_weight else 0.0
    config = UniGRFConfig(
        **tokenizer.config_fields(),
        text_config=from_json(args.text_config, "text_config"),
        content_embedding_dim=embeddings.shape[1],
        project_content_embeddings=args.project_content_embeddings,
        embedding_table_size=tokenizer.num_items if args.embedding_table_size is None else args.embedding_table_size,
        history_item_representations=args.history_item_representations,
        **{**fields, **named(args.config_fields, CONFIG_FIELDS, "config_fields")},
    )
    model = UniGRFForCausalLM(config)
    model.set_catalog(torch.from_numpy(tokenizer.item_codes.copy()), embeddings)
    return model
