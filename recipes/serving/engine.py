"""Answer batches of requests by the pipeline; swap the model, the block list and the parts of the catalog."""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers.pipelines.base import pad_collate_fn

from modeling_unigrf import CatalogTrie, RecommendationPipeline, UniGRFConfig, UniGRFForCausalLM
from modeling_unigrf.item_lists_unigrf import NoItemLeft
from modeling_unigrf.pipeline_unigrf import NumberedRequest
from modeling_unigrf.shared_prefix_unigrf import token_columns
from recipes.common.files import path_or_hub
from recipes.serving.caches import User, Users, joined, split
from recipes.serving.metrics import Metrics
from recipes.serving.schemas import NoList, Refusal, Request
from tokenization import SemanticIdTokenizer

HISTORY = ("items", "behaviors", "timestamps")
ID_FIELDS = ("items", "allowed_items", "blocked_items")


@dataclass
class Lists:
    """
    What the shop serves at the moment.

    Args:
        blocked: Ids of the items that no list may hold.
        parts: Ids of the items of each named part of the catalog.
    """

    blocked: Sequence = ()
    parts: dict[str, Sequence] = field(default_factory=dict)


@dataclass
class Served:
    """
    A checkpoint that answers requests.

    Args:
        checkpoint: Its folder or repository.
        pipeline: Its pipeline.
        tries: The items of each part that are not blocked; those of the whole catalog under None. A trie of None
            stands for all items.
    """

    checkpoint: str
    pipeline: RecommendationPipeline
    tries: dict[str | None, CatalogTrie | None] = field(default_factory=lambda: {None: None})

    @property
    def item_ids(self) -> list[str]:
        """The ids of all items."""
        return self.pipeline.tokenizer.item_ids

    def with_lists(self, lists: Lists, unknown: str) -> "Served":
        """
        Return the same checkpoint with other lists.

        Raises:
            Refusal: for unknown items (`unknown="error"`), and a part without items.
        """
        is_allowed = np.ones(len(self.item_ids), dtype=bool)
        is_allowed[self._indices("blocked", lists.blocked, unknown)] = False
        tries: dict[str | None, CatalogTrie | None] = {None: None}
        wanted = {None: np.arange(len(self.item_ids))} if len(lists.blocked) else {}
        wanted |= {name: self._indices(f"parts[{name!r}]", items, unknown) for name, items in lists.parts.items()}
        for name, indices in wanted.items():
            items = np.unique(indices[is_allowed[indices]])
            if not len(items):
                place = "The catalog" if name is None else f"`parts[{name!r}]`"
                raise Refusal(422, f"{place} must keep an item that is not blocked, got none. Block fewer.", "items")
            tries[name] = self.pipeline.model.catalog.subset(torch.from_numpy(items))
        return replace(self, tries=tries)

    def _indices(self, name: str, items: Sequence, unknown: str) -> np.ndarray:
        try:
            return self.pipeline.tokenizer.item_indices(list(items), unknown=unknown)
        except ValueError as error:
            raise Refusal(422, f"`{name}`: {error}", "items") from error


def load(checkpoint: str) -> Served:
    """
    Load a checkpoint, and ask it for a list.

    Raises:
        ValueError: for a checkpoint that is missing, damaged, or without a list.
    """
    with path_or_hub("checkpoint", checkpoint):
        model = UniGRFForCausalLM.from_pretrained(checkpoint).eval()
        tokenizer = SemanticIdTokenizer.from_pretrained(checkpoint)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = RecommendationPipeline(model=model, tokenizer=tokenizer)
    # The first call also builds what later calls reuse.
    if not pipeline({"items": tokenizer.item_ids[:1], "behaviors": list(tokenizer.behaviors[:1])}):
        raise ValueError(f"`checkpoint` must recommend an item, got an empty list from {checkpoint}. Train it anew.")
    return Served(checkpoint, pipeline)


def is_float32(checkpoint: str) -> bool:
    """Return whether loading leaves torch's default dtype, which all threads share, as it is."""
    try:
        return UniGRFConfig.from_pretrained(checkpoint).dtype in (None, torch.float32)
    except Exception:  # `load` says what is wrong
        return True


class Engine:
    """
    The served model. All methods but `prepare` run in the model's thread, one at a time.

    Args:
        served: The checkpoint.
        users: The users to keep between requests.
        lists: The block list and the parts of the catalog.
        unknown: "error" refuses unknown items, "skip" drops them.
        metrics: Receives what the engine counts.
    """

    def __init__(self, served: Served, users: Users, lists: Lists, unknown: str, metrics: Metrics):
        self.unknown = unknown
        self.users = users
        self.lists = lists
        self.metrics = metrics
        self.served = served.with_lists(lists, unknown)
        self.previous: Served | None = None

    # Swaps
    def prepare(self, checkpoint: str, allow_removed_items: bool) -> Served:
        """
        Load another checkpoint beside the present one; this may run in another thread.

        Raises:
            Refusal: for a checkpoint that cannot be loaded, that lacks items, or whose catalog does not fit the lists.
        """
        try:
            served = load(checkpoint)
        except Exception as error:  # whatever a damaged folder causes, the present checkpoint goes on
            message = f"`checkpoint` must be whole, got {type(error).__name__}: {error} The old one goes on."
            raise Refusal(422, message, "checkpoint") from error
        removed = sorted(set(self.served.item_ids) - set(served.item_ids))
        if removed and not allow_removed_items:
            raise Refusal(
                422,
                f"`checkpoint` must have all {len(self.served.item_ids)} items of the present one, got "
                f"{len(removed)} missing, for instance {removed[:5]}. Pass allow_removed_items to take it.",
                "checkpoint",
            )
        return served.with_lists(self.lists, self.unknown)

    def take(self, served: Served) -> dict:
        """Serve another checkpoint, keep the present one as the way back, and describe the change."""
        before = set(self.served.item_ids)
        self.previous = self.served
        self.served = served
        self.users.forget_key_values()
        now = set(served.item_ids)
        counts = {"num_items": len(now), "new_items": len(now - before), "removed_items": len(before - now)}
        return {"checkpoint": served.checkpoint, "previous": self.previous.checkpoint, **counts}

    def roll_back(self) -> dict:
        """
        Serve the checkpoint before the present one.

        Raises:
            Refusal: if there is none, or its catalog does not fit today's lists.
        """
        if self.previous is None:
            raise Refusal(409, "There must be a checkpoint before the present one, got none. Reload one first.")
        return self.take(self.previous.with_lists(self.lists, self.unknown))

    def set_lists(self, lists: Lists) -> None:
        """Serve with another block list and other parts; on a `Refusal` the old ones go on."""
        self.served = self.served.with_lists(lists, self.unknown)
        self.lists = lists

    # Requests
    def answer(self, requests: list[Request]) -> list[dict | Refusal]:
        """Answer requests of the same options: a JSON object, or the reason why there is none, for each of them."""
        options = requests[0].options
        try:
            preprocess, forward = self._parameters(*options)
        except Refusal as refusal:
            return [refusal] * len(requests)
        results: list[Any] = [None] * len(requests)
        inputs = {}
        histories = {}
        for row, request in enumerate(requests):
            try:
                histories[row] = self._history(request)
                inputs[row] = self._encode(request, histories[row], preprocess)
            except Refusal as refusal:
                results[row] = refusal
        # A request whose lists leave no item does not fail the others.
        outputs = None
        while inputs and outputs is None:
            rows = list(inputs)
            try:
                outputs, kept = self._forward([inputs[row] for row in rows], [requests[row] for row in rows], forward)
            except NoItemLeft as error:
                row = rows[error.request]
                del inputs[row]
                message = error.message.replace("{request}", "the request")
                results[row] = NoList(422, message, field_of(error, ID_FIELDS))
        if not inputs:
            return results
        self.metrics.batch_size.observe(len(rows))
        for place, row in enumerate(rows):
            output = {name: values[place : place + 1] for name, values in outputs.items()}
            known_items = None
            if (user_id := requests[row].user_id) is not None:
                user = User.of(histories[row], kept[place])
                known_items = len(histories[row]["items"]) if self.users.put(user_id, user) else None
            results[row] = {
                "items": self.served.pipeline.postprocess(output),
                "known_items": known_items,
                "checkpoint": self.served.checkpoint,
            }
        return results

    def _parameters(
        self,
        part: str | None,
        num_return_sequences: int | None,
        ranking_target: str | None,
        exclude_history: bool | None,
        num_reasons: int,
    ) -> tuple[dict, dict]:
        """Check the options of requests, and return the pipeline's parameters of `preprocess` and `forward`."""
        model = self.served.pipeline.model
        if part not in self.served.tries:
            names = sorted(name for name in self.served.tries if name is not None)
            raise Refusal(422, f"`part` must be among {names}, got {part!r}. Leave it out for all items.", "part")
        chosen = {"num_return_sequences": num_return_sequences, "ranking_target": ranking_target}
        try:
            model.serving_options(**chosen)
        except ValueError as error:
            raise Refusal(422, str(error), field_of(error, chosen)) from error
        if num_reasons and model.transitions is None:
            message = "`num_reasons` must be 0 for a model without transitions, got more. Leave it out."
            raise Refusal(422, message, "num_reasons")
        preprocess = {"unknown": self.unknown, "exclude_history": exclude_history}
        return preprocess, {**chosen, "catalog": self.served.tries[part], "num_reasons": num_reasons}

    def _history(self, request: Request) -> dict:
        """Return a request's whole history: what the server keeps of the user, then what the request sends."""
        sent = {name: getattr(request, name) for name in HISTORY}
        if not request.known_items:
            return sent
        user = self.users.get(request.user_id)
        earlier = user.read() if user else {"items": []}
        if len(earlier["items"]) < request.known_items:
            raise Refusal(
                409,
                f"`known_items` must be at most the {len(earlier['items'])} items that the server keeps of this user, "
                f"got {request.known_items}. Send the whole history, without known_items.",
                "known_items",
                known_items=len(earlier["items"]),
            )
        first = {name: values and values[: request.known_items] for name, values in earlier.items()}
        if not request.items:
            return first
        history = {"items": first["items"] + request.items}
        for name in HISTORY[1:]:
            if first[name] is None and sent[name] is None:
                history[name] = None
                continue
            parts = ((first[name], request.known_items), (sent[name], len(request.items)))
            history[name] = [
                value for values, count in parts for value in ([None] * count if values is None else values)
            ]
        return history

    def _encode(self, request: Request, history: dict, preprocess: dict) -> dict:
        fields = history | {name: getattr(request, name) for name in ("query_time", *ID_FIELDS[1:])}
        fields = {name: value for name, value in fields.items() if value is not None}
        try:
            inputs = self.served.pipeline.preprocess(NumberedRequest(0, fields), **preprocess)
        except ValueError as error:
            message = str(error).removeprefix("Request 0: ")
            raise Refusal(422, message, self._field(error, fields)) from error
        if not inputs.pop("is_answered").all():
            message = "`items` and `allowed_items` must have a known item each, got none. Send known items."
            raise NoList(422, message, "items")
        return inputs

    def _field(self, error: ValueError, fields: dict) -> str | None:
        """Return the field that an error of the pipeline is about."""
        for name in ID_FIELDS:
            try:
                self.served.pipeline.tokenizer.item_indices(fields.get(name, []), unknown=self.unknown)
            except ValueError:
                return name
        return field_of(error, Request.model_fields) or "items"

    def _forward(self, inputs: list[dict], requests: list[Request], options: dict) -> tuple[dict, list]:
        """Run a batch on the caches of its users; return the model's outputs, and the users' caches afterwards."""
        pipeline = self.served.pipeline
        batch = pad_collate_fn(pipeline.tokenizer, None)(inputs)
        # The pipeline then raises `NoItemLeft`: it knows no caches to shorten.
        batch["row"] = torch.full((len(inputs),), -1)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        columns = token_columns(*self._tokens(batch))
        users = [self.users.get(request.user_id) if request.user_id else None for request in requests]
        kept = [user.key_values if user else None for user in users]
        cache, num_spared = joined(kept, columns, lengths)
        outputs = pipeline.forward(batch, cache=cache, **options)
        self.metrics.count_tokens(num_spared, sum(lengths) - num_spared)
        self.metrics.count_users(
            hits=sum(values is not None for values in kept),
            misses=sum(request.user_id is not None for request in requests)
            - sum(values is not None for values in kept),
        )
        after = [
            split(cache, row, columns[row, -length:]) if requests[row].user_id else None
            for row, length in enumerate(lengths)
        ]
        return outputs, after

    @staticmethod
    def _tokens(batch: dict) -> tuple:
        """Return what the keys and values of a batch depend on, as `token_columns` takes it."""
        times = batch.get("timestamps")
        targets = None if times is None else torch.cat([times[:, 1:], batch["query_time"].view(-1, 1)], dim=1)
        return batch["input_ids"], batch["attention_mask"], times, targets


def field_of(error: ValueError, names: Container[str]) -> str | None:
    """Return the first of the names that an error's message has in backticks; None without any."""
    return next((name for name in re.findall(r"`(\w+)`", str(error)) if name in names), None)
