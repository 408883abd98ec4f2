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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput, set_seed

from modeling_unigrf import RecommendationPipeline
from recipes.common.arguments import parse_arguments
from recipes.common.files import write_json
from recipes.common.hashing import weights_of
from recipes.common.run_tracking import begin, last_checkpoint, require_single_device
from recipes.data.prepared import load_prepared, prepared
from recipes.training.arguments import TRAINER_DEFAULTS, DataArguments, ModelArguments, check_together
from recipes.training.callbacks import build_callbacks
from recipes.training.datasets import build_datasets
from recipes.training.model_init import build_model
from recipes.training.stateful_callback import StatefulCallback


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Path:
    """Train a model, resuming where the last run stopped, and return the folder of the finished model."""
    require_single_device(training_args)
    run = TrainingRun.begin(model_args, data_args, training_args)
    if run.is_finished():
        print(f"{run.folder} was trained with these arguments and data, reused")  # resuming it would train on
        return run.folder
    check_together(model_args, data_args)
    set_seed(training_args.seed)

    # Data and model
    data = load_prepared(data_args.data_dir)
    model = build_model(model_args, data_args, data)
    with training_args.main_process_first(desc="rows"):
        train_rows, validation_rows = build_datasets(
            model_args, data_args, data, training_args.seed, with_times=model.config.reads_times
        )

    # Training
    callbacks, collator = build_callbacks(model_args, data_args, model, data, train_rows, training_args.seed)
    trainer = Trainer(
        model=model,
        args=replace(training_args, remove_unused_columns=False),  # the collator chooses the columns
        data_collator=collator,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        processing_class=data.tokenizer,
        callbacks=callbacks,
    )
    saved = [callback.file for callback in callbacks if isinstance(callback, StatefulCallback)]
    result = trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir, saved))

    # Result
    if trainer.is_world_process_zero():
        RecommendationPipeline(model=trainer.model, tokenizer=data.tokenizer).save_pretrained(run.folder)
        run.write_log(trainer, result)
    if training_args.distributed_state is not None:
        training_args.distributed_state.wait_for_everyone()  # the caller of any process may read the folder
    return run.folder


@dataclass
class TrainingRun:
    """
    The folder of a finished model, and a key of everything that it was made from.

    Args:
        folder (`Path`): Receives the model and `training_log.json`.
        work (`str`): Hash of the arguments, of the prepared data and of the checkpoint that the training starts from.
        interactions (`str`): Hash of the interactions; `recipes.evaluate` compares it with those that it measures on.
    """

    folder: Path
    work: str
    interactions: str

    @classmethod
    def begin(
        cls, model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
    ) -> "TrainingRun":
        """Record the arguments in `output_dir`; raise `ValueError` if it holds another training."""
        folder = Path(data_args.checkpoint_dir or Path(training_args.output_dir) / "checkpoint")
        asked = {"model": asdict(model_args), "data": asdict(data_args), "training": training_args.to_dict()}
        asked["prepared"] = prepared(data_args.data_dir)
        if model_args.init_from is not None:  # the path stays when the checkpoint is trained again
            asked["init_from"] = weights_of(model_args.init_from)
        with training_args.main_process_first(desc="arguments"):  # one process writes what the others compare
            is_first = training_args.process_index == 0
            asked = begin(Path(training_args.output_dir), asked, folder / "training_log.json", writes=is_first)
        work = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        return cls(folder, work, asked["prepared"]["inputs"]["interactions"])

    @property
    def log_file(self) -> Path:
        """The training log, which stands beside a finished model only."""
        return self.folder / "training_log.json"

    def is_finished(self) -> bool:
        """Return whether the folder holds the model of this very work."""
        return self.log_file.exists() and json.loads(self.log_file.read_text()).get("work") == self.work

    def write_log(self, trainer: Trainer, result: TrainOutput) -> None:
        """Write the log, which marks the run as finished."""
        log = {"work": self.work, "metrics": result.metrics, "log_history": trainer.state.log_history}
        write_json(self.log_file, {**log, "interactions": self.interactions})


def parse(arguments: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse the command line, with defaults of `TrainingArguments` that suit a small model."""
    return parse_arguments(
        ModelArguments, DataArguments, TrainingArguments, defaults=TRAINER_DEFAULTS, arguments=arguments
    )


if __name__ == "__main__":
    train(*parse())
