"""Trains generation and ranking in one model, with the stock `Trainer`, on a prepared folder.

    python -m recipes.train --data_dir runs/demo/data --output_dir runs/demo/training --bf16 \
        --crops_per_epoch 8 --num_train_epochs 1 --learning_rate 2e-3 --per_device_train_batch_size 32
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from modeling_unigrf import RecommendationPipeline
from recipes.common.files import write_json
from recipes.common.hashing import weights_of
from recipes.common.run_tracking import begin, last_checkpoint, one_device
from recipes.data.leave_one_out import columns_read
from recipes.data.prepared import prepared
from recipes.data.training_datasets import held_out_rows, history_rows, packed_rows, second_stage_rows
from recipes.training.adaptive_weighter import AdaptiveWeighter
from recipes.training.cached_candidates import CachedCandidates
from recipes.training.collator import TrainingCollator
from recipes.training.enhancer import ENHANCER_OPTIONS, RankingDrivenEnhancer
from recipes.training.loss_parts import LossParts
from recipes.training.model_init import ModelArguments, build_model, named
from recipes.training.stateful_callback import StatefulCallback
from tokenization import SemanticIdTokenizer

ADAPTIVE = ("adaptive_temperature", "adaptive_form", "adaptive_window")
ENHANCING = ("enhancer_target", "relabel", "enhancer_options")


@dataclass
class DataArguments:
    """What it is trained on."""

    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare."})
    checkpoint_dir: str | None = field(default=None, metadata={"help": "Where the finished model goes."})
    max_items: int = field(default=50, metadata={"help": "Items of a history that the model reads."})
    crops_per_epoch: int = field(
        default=1, metadata={"help": "Passes over the data in one epoch, each cut at other places."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Instead: windows that begin so many items apart and overlap; 1: all of them."}
    )
    max_long_items: int = field(default=1000, metadata={"help": "Items of a long history, for num_retrieved_items."})
    exclude_history: bool = field(
        default=False,
        metadata={"help": "A user's own items are no beams of stage II, as they are none when it is asked."},
    )


def check_together(model_args: ModelArguments, data_args: DataArguments) -> None:
    """Refuses arguments that exclude each other, or that would do nothing; raises `ValueError`."""
    given = {name for name, value in asdict(model_args).items() if value != getattr(ModelArguments, name)}
    if model_args.candidate_refresh_epochs and model_args.candidate_refresh_steps:
        raise ValueError("Expected candidate_refresh_epochs or candidate_refresh_steps, found both. Leave one out.")
    if model_args.freeze_base_model and model_args.adaptive_weights:
        raise ValueError(
            "Expected freeze_base_model or adaptive_weights, found both: of two losses only one is trained then."
        )
    if model_args.enhancer and model_args.second_stage:
        raise ValueError("Expected the enhancer or stage II, found both: each says which items a row is set against.")
    for name, is_asked, needed, is_there in (
        (
            "candidate_refresh_epochs",
            model_args.candidate_refresh_epochs > 0,
            "num_train_beams",
            model_args.num_train_beams > 0,
        ),
        (
            "candidate_refresh_steps",
            model_args.candidate_refresh_steps > 0,
            "num_train_beams",
            model_args.num_train_beams > 0,
        ),
        ("exclude_history", data_args.exclude_history, "num_train_beams", model_args.num_train_beams > 0),
        (
            "stop_gradient_history",
            model_args.stop_gradient_history,
            "num_train_beams or num_retrieved_items",
            model_args.second_stage,
        ),
        ("exclude_candidate", model_args.exclude_candidate, "num_retrieved_items", model_args.num_retrieved_items > 0),
        ("freeze_base_model", model_args.freeze_base_model, "init_from", model_args.init_from is not None),
        ("freeze_base_model", model_args.freeze_base_model, "ranking_loss_weight", model_args.ranking_loss_weight > 0),
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
    cut = (dataset["train"], tokenizer, data_args.max_items, data_args.crops_per_epoch)
    model = build_model(model_args, tokenizer, embeddings, data_args.max_items, max_long_items or None)
    if model_args.freeze_base_model:
        model.freeze_base_model()
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
    collate = TrainingCollator()
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
    if model_args.num_train_beams and (model_args.candidate_refresh_epochs or model_args.candidate_refresh_steps):
        train_dataset = train_dataset.add_column("row", range(len(train_dataset)))
        training_args = replace(training_args, remove_unused_columns=False)
        kept = {
            "every_epochs": model_args.candidate_refresh_epochs or 1,
            "every_steps": model_args.candidate_refresh_steps or None,
        }
        callbacks.append(CachedCandidates(model, train_dataset, model_args.num_train_beams, **kept))
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
    saved = [callback.file for callback in callbacks if isinstance(callback, StatefulCallback)]
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
        ddp_broadcast_buffers=False,  # the catalog, in every step
        use_cpu=not torch.cuda.is_available(),  # the Trainer asks for it, where bf16 runs on a CPU
    )
    return parser.parse_args_into_dataclasses(arguments)


if __name__ == "__main__":
    train(*parse())
