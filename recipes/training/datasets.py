"""Choose the training and validation rows that a training needs."""

from datasets import Dataset

from recipes.data.prepared import PreparedData
from recipes.data.training_datasets import held_out_rows, history_rows, packed_rows, second_stage_rows
from recipes.training.arguments import DataArguments, ModelArguments

# Crops of a history in an epoch, and most items of an epoch.
CROPS = 12
MAX_EPOCH_ITEMS = 10_000_000


def default_crops(train: Dataset, is_packed: bool) -> int:
    """Return the crops of each history in an epoch: fewer for more interactions, 1 for rows that are not packed."""
    num_items = sum(len(items) for items in train["items"])
    return max(1, min(CROPS, MAX_EPOCH_ITEMS // max(1, num_items))) if is_packed else 1


def build_datasets(
    model_args: ModelArguments, data_args: DataArguments, data: PreparedData, seed: int, with_times: bool
) -> tuple[Dataset, Dataset]:
    """
    Build the training rows, and the validation rows whose target alone has a loss.

    A row holds packed windows. With the enhancer it holds one window, and in stage II one history and the item after
    it.

    Args:
        model_args: Options of the model.
        data_args: Options of the data.
        data: The prepared data.
        seed: Seed of the order of packed windows.
        with_times: Whether rows have timestamps.
    """
    train = data.dataset["train"]
    tokenizer = data.tokenizer
    is_packed = not (model_args.enhancer or model_args.second_stage)
    crop_options = (data_args.max_items, data_args.crops_per_epoch or default_crops(train, is_packed))
    max_long_items = data_args.max_long_items if model_args.num_retrieved_items else 0
    excludes_history = data_args.exclude_history and model_args.second_stage
    if model_args.enhancer:
        train_rows = history_rows(train, tokenizer, *crop_options, data_args.stride, with_times=with_times)
    elif model_args.second_stage:
        train_rows = second_stage_rows(
            train, tokenizer, *crop_options, max_long_items, data_args.stride, excludes_history, with_times=with_times
        )
    else:
        train_rows = packed_rows(
            train,
            tokenizer,
            *crop_options,
            seed,
            data_args.stride,
            item_dropout=data_args.item_dropout,
            with_times=with_times,
        )
    if model_args.caches_candidates:
        train_rows = train_rows.add_column("row", range(len(train_rows)))
    validation_rows = held_out_rows(
        data.dataset["validation"],
        tokenizer,
        data_args.max_items,
        max_long_items,
        excludes_history,
        with_times=with_times,
    )
    return train_rows, validation_rows
