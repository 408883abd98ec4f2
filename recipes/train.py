"""Train generation and ranking in one model, with the stock `Trainer`, on prepared data.

    python -m recipes.train --data_dir runs/demo/data --output_dir runs/demo/training --bf16
    # several processes
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m recipes.train ...
    # RecoChain's stage II, from a checkpoint of stage I
    python -m recipes.train --init_from runs/demo/checkpoint --output_dir runs/demo/second_stage \
        --num_retrieved_items 10 --num_train_beams 20 ...

    # a LoRA adapter on a checkpoint, which stays as it is
    python -m recipes.train --init_from runs/demo/checkpoint --output_dir runs/demo/adapter --lora '{"r": 8}' ...

The recipe takes every argument of `transformers.TrainingArguments`. The checkpoint goes to `--checkpoint_dir`
(default: `output_dir/checkpoint`): model, tokenizer, codebooks, item map, code, and the training log. A second run of
the same command resumes from the last of the Trainer's checkpoints, or reuses a finished model. A run with other
arguments or data needs another `--output_dir`.

- Rows: a window of `--max_items` items and the next item, without a share of the items (`--item_dropout`). An epoch
  cuts each history `--crops_per_epoch` times, at other places; a second epoch would repeat the same windows. Several
  windows are packed into a row, to avoid padding.
  With `--enhancer`, a row has a single window, since its pools belong to a user. The rows stay in memory, in each
  process: some 70 bytes per interaction and crop.
- Evaluation loss: the loss of each user's validation target, which is not trained on.
- Stage II (`--num_retrieved_items`, `--num_train_beams`): a row is a history and its next item, for which the model
  ranks its own beams. Histories are cut at their last items, or with `--stride` at every so many items.
  `--exclude_history` keeps a user's items out of the beams.
- Times: a backbone such as `--text_config '{"model_type": "hstu", "num_time_buckets": 128, ...}'` reads the times of
  the interactions, in seconds; -1 is an unknown time.
"""

from recipes.training.run import parse, train

if __name__ == "__main__":
    train(*parse())
