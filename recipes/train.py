"""Train generation and ranking in one model, with the stock `Trainer`, on prepared data.

    python -m recipes.train --data_dir runs/demo/data --output_dir runs/demo/training --bf16 \
        --crops_per_epoch 8 --num_train_epochs 1 --learning_rate 2e-3 --per_device_train_batch_size 32
    # several processes
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m recipes.train ...
    # RecoChain's stage II, from a checkpoint of stage I
    python -m recipes.train --init_from runs/demo/checkpoint --output_dir runs/demo/second_stage \
        --num_retrieved_items 10 --num_train_beams 20 ...

The recipe takes every argument of `transformers.TrainingArguments`. The checkpoint goes to `--checkpoint_dir`
(default: `output_dir/checkpoint`): model, tokenizer, codebooks, item map, code, and the training log. A second run of
the same command resumes from the last of the Trainer's checkpoints, or reuses a finished model. A run with other
arguments or data needs another `--output_dir`.

- Rows: a window of `--max_items` items and the next item. Several windows are packed into a row, to avoid padding.
  With `--enhancer`, a row has a single window, since its pools belong to a user. The rows stay in memory, in each
  process: some 70 bytes per interaction and crop.
- Evaluation loss: the loss of each user's validation target, which is not trained on.
- Stage II (`--num_retrieved_items`, `--num_train_beams`): a row is a history and its next item, for which the model
  ranks its own beams. Histories are cut at their last items, or with `--stride` at every so many items.
  `--exclude_history` keeps a user's items out of the beams.
- Times: a backbone such as `--text_config '{"model_type": "hstu", "num_time_buckets": 128, ...}'` reads the times of
  the interactions, in seconds; -1 is an unknown time.
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
    """Train a model, or resume its training, and return the folder of the finished model."""
    require_single_device(training_args)
    run = TrainingRun.begin(model_args, data_args, training_args)
    # Resuming a finished training would train on.
    if run.is_finished():
        print(f"{run.folder} was trained with these arguments and data, reused")
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
        # The caller of any process may read the folder.
        training_args.distributed_state.wait_for_everyone()
    return run.folder


@dataclass
class TrainingRun:
    """
    The folder of a finished model, and hashes of the inputs of its training.

    Args:
        folder (`Path`): Folder that receives the model and `training_log.json`.
        work (`str`): Hash of the arguments, the prepared data and the checkpoint to start from.
        interactions (`str`): Hash of the interactions. `recipes.evaluate` compares it with the hash of its data.
    """

    folder: Path
    work: str
    interactions: str

    @classmethod
    def begin(
        cls, model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
    ) -> "TrainingRun":
        """
        Record the arguments in `output_dir`.

        Raises:
            ValueError: if `output_dir` holds a training with other arguments.
        """
        folder = Path(data_args.checkpoint_dir or Path(training_args.output_dir) / "checkpoint")
        arguments = {"model": asdict(model_args), "data": asdict(data_args), "training": training_args.to_dict()}
        arguments["prepared"] = prepared(data_args.data_dir)
        # A checkpoint that is trained again keeps its path.
        if model_args.init_from is not None:
            arguments["init_from"] = weights_of(model_args.init_from)
        # The first process writes the file, which the others compare.
        with training_args.main_process_first(desc="arguments"):
            is_first = training_args.process_index == 0
            arguments = begin(Path(training_args.output_dir), arguments, folder / "training_log.json", writes=is_first)
        work = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()
        return cls(folder, work, arguments["prepared"]["inputs"]["interactions"])

    @property
    def log_file(self) -> Path:
        """The training log, which marks a finished model."""
        return self.folder / "training_log.json"

    def is_finished(self) -> bool:
        """Return whether the folder holds a model of the same work."""
        return self.log_file.exists() and json.loads(self.log_file.read_text()).get("work") == self.work

    def write_log(self, trainer: Trainer, result: TrainOutput) -> None:
        """Write the training log."""
        log = {"work": self.work, "metrics": result.metrics, "log_history": trainer.state.log_history}
        write_json(self.log_file, {**log, "interactions": self.interactions})


def parse(arguments: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse the command line, with the Trainer's defaults for a small model."""
    return parse_arguments(
        ModelArguments, DataArguments, TrainingArguments, defaults=TRAINER_DEFAULTS, arguments=arguments
    )


if __name__ == "__main__":
    train(*parse())
