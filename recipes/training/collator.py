"""Collate training rows into padded batches."""

from transformers import DataCollatorForSeq2Seq

from recipes.data.encoding import padded


class Collator(DataCollatorForSeq2Seq):
    """Pads lists of items with -1, which is no item and no time, and the rest as the tokenizer does."""

    def __call__(self, features, return_tensors=None):
        names = {"long_items", "long_behaviors", "long_timestamps", "blocked_items"} & set(features[0])
        longer = {name: padded([row[name] for row in features]) for name in names}
        rest = [{name: value for name, value in row.items() if name not in names} for row in features]
        return {**super().__call__(rest, return_tensors), **longer}
