"""Refresh a checkpoint with newer interactions and new items: in seconds, without training.

    python -m recipes.prepare --tokenizer runs/demo/checkpoint --interactions newer.csv --items items.csv \
        --output_dir runs/newer/data
    python -m recipes.refresh --checkpoint runs/demo/checkpoint --data_dir runs/newer/data \
        --output_dir runs/newer/checkpoint

The table of transitions counts all interactions of the prepared folder anew, and new items join the catalog. The
weights stay as they are. The held-out interactions count, too: do not evaluate the new checkpoint on this folder.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from modeling_unigrf import RecommendationPipeline
from recipes.common.arguments import check_checkpoint, parse_arguments
from recipes.common.files import check_writable, whole_folder, write_json
from recipes.data.prepared import load_prepared, prepared
from recipes.evaluation.inference import load_checkpoint
from recipes.training.model_init import add_new_items, check_first_items


@dataclass
class RefreshArguments:
    """The checkpoint, the newer data, and the folder of the result."""

    checkpoint: str = field(metadata={"help": "Local checkpoint or adapter; it stays as it is."})
    data_dir: str = field(metadata={"help": "Folder that recipes.prepare wrote with --tokenizer CHECKPOINT."})
    output_dir: str = field(metadata={"help": "New folder that receives the refreshed checkpoint, a whole one."})


def refresh(args: RefreshArguments) -> Path:
    """
    Write a checkpoint with the transitions and items of a prepared folder, and return its folder.

    Raises:
        ValueError: for a checkpoint without transitions or of other items, and for an output folder that is not new.
    """
    started = time.perf_counter()
    output_dir = Path(args.output_dir)
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(f"`output_dir` must be new or empty, got {output_dir}. Choose another folder.")
    check_checkpoint(args.checkpoint, "checkpoint")
    record = prepared(args.data_dir)
    check_writable(output_dir, "output_dir", sum(file.stat().st_size for file in Path(args.checkpoint).glob("*")))
    model, earlier = load_checkpoint(args.checkpoint)
    if model.transitions is None:
        raise ValueError(
            f"`checkpoint` must have a table of transitions, got num_transitions=0 in {args.checkpoint}. Train it "
            "with --num_transitions above 0."
        )
    data = load_prepared(args.data_dir)
    check_first_items(model, earlier, data.tokenizer, args.checkpoint)
    add_new_items(model, earlier, data, args.checkpoint)
    test = data.dataset["test"]
    histories = [[*items, target] for items, target in zip(test["items"][:], test["target"][:], strict=True)]
    before = int(model.transitions.item_counts.sum())
    model.transitions.clear()
    model.update_transitions(histories)
    with whole_folder(output_dir, "training_log.json") as folder:
        # recipes.evaluate must not measure on what was counted.
        log = {"interactions": record["inputs"]["interactions"], "refit": "test"}
        write_json(folder / "training_log.json", log)
        RecommendationPipeline(model=model, tokenizer=data.tokenizer).save_pretrained(folder)
    print(
        f"{output_dir}: {int(model.transitions.item_counts.sum()):,} interactions instead of {before:,}, "
        f"{data.tokenizer.num_items - earlier.num_items:,} new items, {time.perf_counter() - started:.1f} seconds"
    )
    return output_dir


if __name__ == "__main__":
    refresh(*parse_arguments(RefreshArguments))
