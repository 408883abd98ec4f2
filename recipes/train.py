"""Trains generation and ranking in one model, with the stock `Trainer`, on a prepared folder.

    python -m recipes.train --data_dir runs/demo/data --output_dir runs/demo/training --bf16 \
        --passes 8 --num_train_epochs 1 --learning_rate 2e-3 --per_device_train_batch_size 32
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m recipes.train ...     # several processes
    python -m recipes.train --init_from runs/demo/checkpoint --output_dir runs/demo/second_stage \
        --num_retrieved_items 10 --num_train_beams 20 ...                         # RecoChain's stage II, from a stage I

Every argument of `transformers.TrainingArguments` is taken. Histories are cut into windows of `--max_items` and the item after
them, and windows packed into rows, so that padding does not eat the machine (with `--enhancer`, one a row: its items are a
user's). The validation target of each user is held out of training and its loss is the evaluation loss. A second run of the same command
resumes from the last checkpoint in `--output_dir`, or does nothing if that was finished; one with other arguments or data is
refused there.
In stage II (`--num_retrieved_items`, `--num_train_beams`) a row is one history and the item after it, for which the model
ranks its own beams; the places where histories are cut are those of its last items
(with `--stride`, every so many items), and `--exclude_history` keeps a user's own items out of the beams.
With a backbone that reads times (`--text_config '{"model_type": "hstu", "num_time_buckets": 128, ...}'`) rows have those of
the interactions, which are to be in seconds then, -1 where not known.
Training rows are made first and stay in memory, some 70 bytes an interaction and pass, in each process.
The result, `--checkpoint_dir` (default: `output_dir/checkpoint`), holds model, tokenizer, codebooks, item map and code.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path

import numpy as np
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from modeling_unigrf import RecommendationPipeline, UniGRFConfig, UniGRFForCausalLM
from recipes.callbacks import AdaptiveWeighter, KeptBeams, LossParts, SavedTensors
from recipes.embeddings import weights_of
from recipes.enhancer import RankingDrivenEnhancer
from recipes.prepare import check_same_spelling, prepared
from recipes.runs import begin, last_checkpoint, one_device, write_json
from recipes.training_rows import Collator, columns_read, held_out_rows, history_rows, packed_rows, second_stage_rows
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
ADAPTIVE = ("adaptive_temperature", "adaptive_form", "adaptive_window")
ENHANCING = ("enhancer_target", "relabel", "enhancer_options")
SAME_ENCODER = 0.9  # median cosine of an item's embeddings, then and now: a few items' texts may change
# Of RankingDrivenEnhancer, beside those that have an argument of their own.
ENHANCER_OPTIONS = {
    "pool",
    "pool_size",
    "num_negatives",
    "penalty",
    "threshold",
    "max_favorites",
    "warm_up_epochs",
    "every_epochs",
}


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
    beams_kept_epochs: int = field(
        default=0, metadata={"help": "Epochs that a row keeps its beams; 0: they are searched for in every step."}
    )
    beams_kept_steps: int = field(default=0, metadata={"help": "The same in steps: searched for when the row comes."})
    detach_history: bool = field(default=False, metadata={"help": "Their gradient does not reach the history."})
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
    relabel: bool = field(default=False, metadata={"help": "Its favourites become positives, too."})
    enhancer_options: str = field(
        default="{}",
        metadata={"help": "More arguments of RankingDrivenEnhancer, as JSON: num_negatives, threshold, ..."},
    )
    item_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the softmax over items."})
    ranking_dropout: float = field(default=0.1, metadata={"help": "Dropout in the ranking head."})
    embedding_dropout: float = field(default=0.2, metadata={"help": "Dropout on the token embeddings."})
    read_item_embeddings: bool = field(
        default=True, metadata={"help": "Item vectors are made of item embeddings, too."}
    )
    item_table_size: int | None = field(
        default=None, metadata={"help": "Learned rows of items for the ranking head; default: one an item. 0: none."}
    )
    history_item_vectors: bool = field(
        default=True,
        metadata={"help": "Histories are read by the items' vectors, too; a model without any needs False."},
    )
    config_fields: str = field(default="{}", metadata={"help": "More fields of UniGRFConfig, as JSON."})

    @property
    def second_stage(self) -> bool:
        """Whether candidates are ranked for the last item of a row alone."""
        return self.num_retrieved_items > 0 or self.num_train_beams > 0


@dataclass
class DataArguments:
    """What it is trained on."""

    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare."})
    checkpoint_dir: str | None = field(default=None, metadata={"help": "Where the finished model goes."})
    max_items: int = field(default=50, metadata={"help": "Items of a history that the model reads."})
    passes: int = field(default=1, metadata={"help": "Passes over the data in one epoch, each cut at other places."})
    stride: int | None = field(
        default=None, metadata={"help": "Instead: windows that begin so many items apart and overlap; 1: all of them."}
    )
    max_long_items: int = field(default=1000, metadata={"help": "Items of a long history, for num_retrieved_items."})
    exclude_history: bool = field(
        default=False,
        metadata={"help": "A user's own items are no beams of stage II, as they are none when it is asked."},
    )


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
        "detach_history": args.detach_history,
        "negatives_per_item": 0.0 if args.second_stage else args.negatives_per_item,
        "generation_loss_weight": args.generation_loss_weight,
        "ranking_loss_weight": args.ranking_loss_weight,
        "item_loss_weight": args.item_loss_weight,
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
        if not same or not np.array_equal(model.catalogue.item_codes, tokenizer.item_codes[: len(ids)]):
            raise ValueError(
                f"Expected a checkpoint of the first of the {tokenizer.num_items} items in data_dir, found {len(ids)} items, or other "
                f"ids or codes, in {args.init_from}. Start from a model that was trained on this data, or prepare the data with "
                f"--tokenizer {args.init_from}."
            )
        rows = model.config.item_table_size if args.item_table_size is None else args.item_table_size
        asked = {
            "read_item_embeddings": args.read_item_embeddings,
            "history_item_vectors": args.history_item_vectors,
            "item_table_size": rows,
        }
        if changed := [name for name, value in asked.items() if getattr(model.config, name) != value]:
            raise ValueError(
                f"Expected a checkpoint with { ({name: asked[name] for name in changed}) }, found "
                f"{ ({name: getattr(model.config, name) for name in changed}) } in {args.init_from}, whose weights are made for "
                "these. Ask for the same (read_item_embeddings, history_item_vectors, item_table_size)."
            )
        if model.config.item_embedding_dim:
            stored = model.catalogue.embeddings_of(torch.arange(len(ids)))
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
            more = embeddings[new] if model.config.item_embedding_dim else None
            model.add_items(torch.from_numpy(tokenizer.item_codes[new].copy()), more)
        return model
    fields["ranking_weight"] = 1.0 if args.ranking_loss_weight else 0.0
    config = UniGRFConfig(
        **tokenizer.config_fields(),
        text_config=from_json(args.text_config, "text_config"),
        item_embedding_dim=embeddings.shape[1],
        read_item_embeddings=args.read_item_embeddings,
        item_table_size=tokenizer.num_items if args.item_table_size is None else args.item_table_size,
        history_item_vectors=args.history_item_vectors,
        **{**fields, **named(args.config_fields, CONFIG_FIELDS, "config_fields")},
    )
    model = UniGRFForCausalLM(config)
    model.set_catalogue(torch.from_numpy(tokenizer.item_codes.copy()), embeddings)
    return model


def check_together(model_args: ModelArguments, data_args: DataArguments) -> None:
    """Refuses arguments that exclude each other, or that would do nothing; raises `ValueError`."""
    given = {name for name, value in asdict(model_args).items() if value != getattr(ModelArguments, name)}
    if model_args.beams_kept_epochs and model_args.beams_kept_steps:
        raise ValueError("Expected beams_kept_epochs or beams_kept_steps, found both. Leave one out.")
    if model_args.enhancer and model_args.second_stage:
        raise ValueError("Expected the enhancer or stage II, found both: each says which items a row is set against.")
    for name, is_asked, needed, is_there in (
        ("beams_kept_epochs", model_args.beams_kept_epochs > 0, "num_train_beams", model_args.num_train_beams > 0),
        ("beams_kept_steps", model_args.beams_kept_steps > 0, "num_train_beams", model_args.num_train_beams > 0),
        ("exclude_history", data_args.exclude_history, "num_train_beams", model_args.num_train_beams > 0),
        (
            "detach_history",
            model_args.detach_history,
            "num_train_beams or num_retrieved_items",
            model_args.second_stage,
        ),
        ("exclude_candidate", model_args.exclude_candidate, "num_retrieved_items", model_args.num_retrieved_items > 0),
        *((name, name in given, "adaptive_weights", model_args.adaptive_weights) for name in ADAPTIVE),
        *((name, name in given, "enhancer", model_args.enhancer) for name in ENHANCING),
        ("enhancer", model_args.enhancer, "ranking_loss_weight", model_args.ranking_loss_weight > 0),
    ):
        if is_asked and not is_there:
            raise ValueError(
                f"Expected {needed} with {name}, which does nothing in training without it. Add it, or leave {name} out."
            )


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Path:
    """Trains, resuming where the last run stopped, and returns the folder of the finished model."""
    one_device(training_args)
    folder = Path(data_args.checkpoint_dir or Path(training_args.output_dir) / "checkpoint")
    log_file = folder / "training_log.json"  # beside a finished model
    asked = {"model": asdict(model_args), "data": asdict(data_args), "training": training_args.to_dict()}
    asked["prepared"] = prepared(data_args.data_dir)
    if model_args.init_from is not None:  # a path does not tell that what is there was trained again
        asked["init_from"] = weights_of(model_args.init_from)
    with training_args.main_process_first(desc="arguments"):  # which writes what the others compare
        is_first = training_args.process_index == 0
        asked = begin(Path(training_args.output_dir), asked, log_file, writes=is_first)
    work = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    if log_file.exists() and json.loads(log_file.read_text()).get("work") == work:
        print(f"{folder} was trained with these arguments and data, reused")  # resuming it would train on
        return folder
    check_together(model_args, data_args)
    set_seed(training_args.seed)
    data_dir = Path(data_args.data_dir)
    tokenizer = SemanticIdTokenizer.from_pretrained(data_dir / "tokenizer")
    dataset = load_from_disk(str(data_dir / "dataset"))
    embeddings = load_file(data_dir / "item_embeddings.safetensors")["embeddings"]
    max_long_items = data_args.max_long_items if model_args.num_retrieved_items else 0
    cut = (dataset["train"], tokenizer, data_args.max_items, data_args.passes)
    model = build_model(model_args, tokenizer, embeddings, data_args.max_items, max_long_items or None)
    with_times = model.config.reads_times
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = 1 + (data_args.max_items + 1) * (tokenizer.num_levels + 1)
    if longest is not None and needed > longest:
        raise ValueError(
            f"Expected positions for max_items={data_args.max_items} and the item after them, {needed}, found a backbone of "
            f"{longest}. Take fewer items, or more positions (max_position_embeddings)."
        )
    with training_args.main_process_first(desc="rows"):
        if model_args.enhancer:
            train_dataset = history_rows(*cut, data_args.stride, with_times=with_times)
        elif model_args.second_stage:
            own = data_args.exclude_history
            train_dataset = second_stage_rows(*cut, max_long_items, data_args.stride, own, with_times=with_times)
        else:
            train_dataset = packed_rows(*cut, training_args.seed, data_args.stride, with_times=with_times)
        eval_dataset = held_out_rows(
            dataset["validation"],
            tokenizer,
            data_args.max_items,
            max_long_items,
            data_args.exclude_history and model_args.second_stage,
            with_times=with_times,
        )
    callbacks = [LossParts(model)]
    if model_args.adaptive_weights:
        callbacks.append(
            AdaptiveWeighter(model_args.adaptive_window, model_args.adaptive_temperature, model_args.adaptive_form)
        )
    collate = Collator(tokenizer)
    if model_args.enhancer:
        training_args = replace(training_args, remove_unused_columns=False)
        callbacks.append(
            RankingDrivenEnhancer(
                model,
                tokenizer,
                *(dataset["train"][name][:] for name in columns_read(dataset["train"], with_times)),
                target=model_args.enhancer_target,
                relabel=model_args.relabel,
                max_items=data_args.max_items,
                seed=training_args.seed,
                **{
                    "pool": "uniform" if tokenizer.num_levels == 1 else "beam",
                    **named(model_args.enhancer_options, ENHANCER_OPTIONS, "enhancer_options"),
                },
            )
        )
        collate = callbacks[-1].collator(collate)
    if model_args.num_train_beams and (model_args.beams_kept_epochs or model_args.beams_kept_steps):
        train_dataset = train_dataset.add_column("row", range(len(train_dataset)))
        training_args = replace(training_args, remove_unused_columns=False)
        kept = {"every_epochs": model_args.beams_kept_epochs or 1, "every_steps": model_args.beams_kept_steps or None}
        callbacks.append(KeptBeams(model, train_dataset, model_args.num_train_beams, **kept))
        collate = callbacks[-1].collator(collate)
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=collate,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    saved = [callback.file for callback in callbacks if isinstance(callback, SavedTensors)]
    result = trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir, saved))
    if trainer.is_world_process_zero():
        RecommendationPipeline(model=trainer.model, tokenizer=tokenizer).save_pretrained(folder)
        log = {"work": work, "metrics": result.metrics, "log_history": trainer.state.log_history}
        log["interactions"] = asked["prepared"]["inputs"]["interactions"]  # recipes.evaluate asks which they were
        write_json(log_file, log)
    if training_args.distributed_state is not None:
        training_args.distributed_state.wait_for_everyone()  # who returns may read it
    return folder


def parse(arguments: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Command-line arguments, with defaults that suit this model unless given."""
    parser = HfArgumentParser([ModelArguments, DataArguments, TrainingArguments])
    parser.set_defaults(
        learning_rate=2e-3,  # small models from scratch; Trainer's own 5e-5 is for the finetuning of large ones
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta2=0.98,
        per_device_eval_batch_size=128,
        prediction_loss_only=True,
        report_to="none",
        restore_callback_states_from_checkpoint=True,  # the adaptive weights go on where they were
        ddp_broadcast_buffers=False,  # the catalogue, in every step
        use_cpu=not torch.cuda.is_available(),  # the Trainer asks for it, where bf16 runs on a CPU
    )
    return parser.parse_args_into_dataclasses(arguments)


if __name__ == "__main__":
    train(*parse())
