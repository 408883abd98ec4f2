"""Cache the beam candidates of RecoChain's stage II for some epochs or steps."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.cache_utils import DynamicCache

from modeling_unigrf import UniGRFForCausalLM
from modeling_unigrf.stage_two_unigrf import propose_items
from recipes.data.encoding import pad_rows, pad_tokens, with_item_set
from recipes.training.stateful_callback import StatefulCallback


@dataclass
class CandidateCollator:
    """
    Add cached candidates to the batches of another collator.

    This is a class because data loaders of some platforms pickle their collator.

    Args:
        collate: The other collator.
        items: Candidates of all rows. None: batches get the rows' numbers instead, and a hook of the model adds the
            candidates.
    """

    collate: Callable
    items: torch.Tensor | None

    def __call__(self, rows: list[dict]) -> dict:
        """Collate rows; rows without a number, those of an evaluation, get no candidates."""
        if "row" not in rows[0]:
            return self.collate(rows)
        batch = self.collate([{name: value for name, value in row.items() if name != "row"} for row in rows])
        numbers = torch.tensor([row["row"] for row in rows])
        if self.items is None:
            return {**batch, "row": numbers}
        return with_item_set(batch, "candidates", self.items[numbers])


class CachedCandidates(StatefulCallback):
    """
    Train stage II on cached candidates instead of a search in every step.

        cached = CachedCandidates(model, rows, num_beams=20, every_epochs=2)
        Trainer(..., train_dataset=rows, data_collator=cached.collator(TrainingCollator()), callbacks=[cached])

    The candidates of all rows are searched for every `every_epochs` epochs. With `every_steps`, a row's candidates are
    searched for when the row is due and they are `every_steps` steps old. Caching pays off from two epochs on. Its
    search runs without dropout, unlike a search inside a training step.

    A row is due once an epoch, so `every_steps` below the steps of an epoch caches nothing. The Trainer's checkpoints
    save the candidates.

    Args:
        model (`UniGRFForCausalLM`): The model that is trained.
        rows (`Dataset`): Training rows of one history each, which ends in the item to rank. Their column `row` is the
            number of the row; `remove_unused_columns=False` keeps it. Optional columns: `timestamps` of the tokens and
            `blocked_items`, which are never candidates.
        num_beams (`int`): Candidates of a row.
        every_epochs (`int`): Epochs between two searches, 1 by default; not used with `every_steps`. All processes
            have the same candidates.
        batch_size (`int`): Rows that a search of all rows runs together, 128 by default.
        every_steps (`int`, *optional*): Steps between two searches for a row, in a single process. None, the default:
            `every_epochs` decides.

    Raises:
        ValueError: for numbers below 1, rows without `row`, and `every_steps` in several processes.
    """

    def __init__(
        self,
        model: UniGRFForCausalLM,
        rows: Dataset,
        num_beams: int,
        every_epochs: int = 1,
        batch_size: int = 128,
        every_steps: int | None = None,
    ):
        if min(num_beams, every_epochs, 1 if every_steps is None else every_steps) < 1:
            raise ValueError(
                f"`num_beams`, `every_epochs` and `every_steps` must be at least 1, got {num_beams}, {every_epochs} "
                f"and {every_steps}. Raise them, or leave every_steps out."
            )
        if "row" not in rows.column_names:
            raise ValueError(
                f"`rows` must have a column `row`, got {rows.column_names}. Add the number of each row as a column."
            )
        self.model = model
        self.rows = rows
        self.every_epochs = every_epochs
        self.batch_size = batch_size
        self.every_steps = every_steps
        self.step = 0
        self.items = torch.full((len(rows), num_beams), -1)
        self.searched_at = torch.full((len(rows),), -1)
        super().__init__("candidates.safetensors", {"items": self.items, "searched_at": self.searched_at})
        if every_steps is not None:
            # Not in the collator, which runs batches ahead of the model.
            model.register_forward_pre_hook(self._add_candidates, with_kwargs=True)

    def collator(self, collate: Callable) -> Callable:
        """Wrap a collator, so that numbered rows get `candidates`."""
        return CandidateCollator(collate, None if self.every_steps else self.items)

    def on_train_begin(self, args, state, control, **kwargs):
        """Restore the candidates, and reject `every_steps` in several processes."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.every_steps and args.world_size > 1:
            raise ValueError(
                f"`every_steps` must be None with several processes, got {self.every_steps} with {args.world_size}, "
                "each of which would cache its own rows only. Use every_epochs."
            )

    def on_step_begin(self, args, state, control, **kwargs):
        """Count the steps."""
        self.step = state.global_step

    def _add_candidates(self, model, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Add the candidates of numbered rows before a forward, and refresh those that are too old."""
        rows = kwargs.pop("row", None)
        if rows is None:
            return None
        rows = rows.cpu()
        is_old = (self.searched_at[rows] < 0) | (self.step - self.searched_at[rows] >= self.every_steps)
        if is_old.any():
            self.items[rows[is_old]] = self._search(rows[is_old].numpy())
            self.searched_at[rows[is_old]] = self.step
        return args, with_item_set(kwargs, "candidates", self.items[rows].to(model.device))

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Refresh the candidates of all rows if they are due."""
        epoch = int(state.epoch or 0)
        if not self.every_steps and epoch % self.every_epochs == 0 and self.made_at != epoch:
            self._refresh(args, epoch)

    @torch.no_grad()
    def _search(self, rows: np.ndarray) -> torch.LongTensor:
        """
        Search for candidates of b rows, from the history before the last item and at that item's time.

        Returns:
            `[b, num_beams]`, item indices; -1: none.
        """
        # Inputs: the rows without their last item.
        model = self.model
        end = -model.layout.num_levels - 1
        histories = [self.rows[int(row)] for row in rows]
        columns = self.rows.column_names
        names = [name for name in ("input_ids", "attention_mask", "timestamps") if name in columns]
        inputs = pad_tokens({name: [row[name][:end] for row in histories] for name in names})
        if "timestamps" in columns:
            inputs["query_time"] = torch.tensor([row["timestamps"][end] for row in histories])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        blocked_items = None
        if "blocked_items" in columns:
            blocked_items = pad_rows([row["blocked_items"] for row in histories]).to(model.device)

        # Search, without dropout.
        was_training = model.training
        model.eval()
        cache = DynamicCache()
        states = model.prefill(**inputs, cache=cache)
        num_beams = self.items.shape[1]
        items = propose_items(
            model.model,
            model.scorer,
            model.catalog.trie,
            blocked_items,
            states,
            inputs["attention_mask"].bool(),
            cache,
            num_beams,
            inputs.get("query_time"),
        ).cpu()
        model.train(was_training)
        return torch.nn.functional.pad(items, (0, num_beams - items.shape[1]), value=-1)

    def _refresh(self, args, epoch: int) -> None:
        """Search for candidates of all rows, each process for its part of them."""
        lengths = np.array([len(ids) for ids in self.rows["input_ids"]])
        batches = self.process_batches(lengths, self.batch_size, args, "candidates")
        for process_batches in gather_object([[(rows, self._search(rows)) for rows in batches]]):
            for rows, items in process_batches:
                self.items[rows] = items
        self.made_at = epoch
