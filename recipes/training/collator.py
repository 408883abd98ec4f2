"""Collate training rows into padded batches."""

from typing import Any

from recipes.data.encoding import (
    ITEM_SETS,
    LONG_HISTORY,
    TOKEN_PADDING,
    long_history_inputs,
    pad_rows,
    pad_tokens,
    with_item_set,
)


class TrainingCollator:
    """
    Collate rows into a batch of the model's inputs.

    Tokens, labels and times are padded on the left, and long histories and item sets by -1. A batch has the inputs
    whose columns the rows have; other columns are left out. A `Trainer` needs `remove_unused_columns=False`: by
    itself it drops columns that `forward` does not name, such as `long_items`.
    """

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        """Collate rows that all have the same columns."""

        def column(name: str) -> list:
            return [row[name] for row in rows]

        batch = pad_tokens({name: column(name) for name in TOKEN_PADDING if name in rows[0]})
        batch |= long_history_inputs({name: column(long) for name, long in LONG_HISTORY.items() if long in rows[0]})
        for name in ITEM_SETS:
            if name in rows[0]:
                batch = with_item_set(batch, name, pad_rows(column(name)))
        return batch
