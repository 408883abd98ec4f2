"""Cache the beam candidates of RecoChain's stage II for some epochs or steps."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.cache_utils import DynamicCache

from modeling_unigrf.beam_search_unigrf import propose_items
from recipes.data.encoding import pad_rows, pad_tokens, with_item_set
from recipes.training.stateful_callback import StatefulCallback


@dataclass
class CandidateCollator:
    """What `CachedCandidates.collator` returns; a class, so that any kind of worker of a data loader can be handed it."""

    collate: Callable
    items: torch.Tensor | None  # None: the model's own hook adds them, by the rows' numbers

    def __call__(self, rows: list[dict]) -> dict:
        if "row" not in rows[0]:
            return self.collate(rows)
        batch = self.collate([{name: value for name, value in row.items() if name != "row"} for row in rows])
        numbers = torch.tensor([row["row"] for row in rows])
        if self.items is None:
            return {**batch, "row": numbers}
        return with_item_set(batch, "candidates", self.items[numbers])


class CachedCandidates(StatefulCallback):
    """
    Stage II on candidates that are kept, in place of a search in every step: proposed for all rows every `every_epochs`
    epochs, or for a row when it comes and its own are `every_steps` steps old. Cheaper from two epochs on, and without the
    dropout that a search inside a training step has.

        beams = CachedCandidates(model, rows, num_beams=20, every_epochs=2)
        Trainer(..., train_dataset=rows, data_collator=beams.collator(collate), callbacks=[beams])

    A row is seen once an epoch: with fewer steps than that between them, all are searched for when they come. They are saved
    with the Trainer's checkpoints. Those of epochs are the same on all processes; those of steps need a single one.

    Args:
        model (`UniGRFForCausalLM`)
        rows (`Dataset`): Training rows, each of one history that ends in the item that is to be ranked, with `row`, its number
            (`remove_unused_columns=False` keeps it). Their `timestamps` are read, if they have some; their `blocked_items` are no
            candidates.
        num_beams (`int`): Candidates a row.
        every_epochs (`int`): Epochs between two searches for all rows; not read with `every_steps`.
        batch_size (`int`): Rows of such a search that are run together.
        every_steps (`int`, *optional*): Steps for which a row's candidates are kept.

    Raises:
        ValueError: on numbers below 1, or rows without `row`; with `every_steps`, in training with several processes.
    """

    def __init__(
        self,
        model,
        rows: Dataset,
        num_beams: int,
        every_epochs: int = 1,
        batch_size: int = 128,
        every_steps: int | None = None,
    ):
        least = min(num_beams, every_epochs, 1 if every_steps is None else every_steps)
        if least < 1 or "row" not in rows.column_names:
            raise ValueError(
                "Expected num_beams, every_epochs and every_steps of at least 1 and rows with a column `row`, found "
                f"{num_beams}, {every_epochs}, {every_steps} and {rows.column_names}."
            )
        self.model, self.rows, self.every_epochs, self.batch_size = model, rows, every_epochs, batch_size
        self.every_steps, self.step = every_steps, 0
        self.items, self.searched_at = torch.full((len(rows), num_beams), -1), torch.full((len(rows),), -1)
        super().__init__("candidates.safetensors", {"items": self.items, "searched_at": self.searched_at})
        if every_steps is not None:
            # Not in the collator, which is batches ahead of the model.
            model.register_forward_pre_hook(self._with_candidates, with_kwargs=True)

    def collator(self, collate: Callable) -> Callable:
        """Wraps a data collator: rows with their number also get `candidates`; others (of an evaluation) pass as they are."""
        return CandidateCollator(collate, None if self.every_steps else self.items)

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.every_steps and args.world_size > 1:
            raise ValueError(
                f"Expected one process with every_steps, found {args.world_size}, of which each would know its own rows' beams "
                "alone. Use every_epochs."
            )

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def _with_candidates(self, model, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before a forward on rows of a training: their candidates, searched for again where they are too old."""
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
        epoch = int(state.epoch or 0)
        if not self.every_steps and epoch % self.every_epochs == 0 and self.made_at != epoch:
            self._propose(args, epoch)

    @torch.no_grad()
    def _search(self, rows: np.ndarray) -> torch.LongTensor:
        """The candidates of some rows, `[b, num_beams]`, -1: none: after all but their last item, when that came."""
        model, end = self.model, -self.model.layout.num_levels - 1
        rows = [self.rows[int(row)] for row in rows]
        with_times = "timestamps" in self.rows.column_names
        names = ["input_ids", "attention_mask", *(["timestamps"] if with_times else [])]
        inputs = pad_tokens({name: [row[name][:end] for row in rows] for name in names})
        if with_times:
            inputs["query_time"] = torch.tensor([row["timestamps"][end] for row in rows])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        blocked = None
        if "blocked_items" in self.rows.column_names:
            blocked = pad_rows([row["blocked_items"] for row in rows]).to(model.device)
        mask, cache = inputs["attention_mask"].bool(), DynamicCache()
        num_beams, was_training = self.items.shape[1], model.training
        model.eval()
        states = model.prefill(**inputs, cache=cache)
        query_time = inputs.get("query_time")
        items = propose_items(
            model.model, model.scorer, model.catalog.trie, blocked, states, mask, cache, num_beams, query_time
        ).cpu()
        model.train(was_training)
        return torch.nn.functional.pad(items, (0, num_beams - items.shape[1]), value=-1)

    def _propose(self, args, epoch: int) -> None:
        """Searches for all rows, each process its part of them."""
        lengths = np.array([len(ids) for ids in self.rows["input_ids"]])
        batches = self.my_batches(lengths, self.batch_size, args, "candidates")
        for of_process in gather_object([[(rows, self._search(rows)) for rows in batches]]):
            for rows, items in of_process:
                self.items[rows] = items
        self.made_at = epoch
