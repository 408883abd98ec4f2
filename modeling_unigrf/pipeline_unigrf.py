# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""`pipeline("recommendation")`: histories of the user's item ids in, recommended items with the same ids out."""

from collections.abc import Sized
from dataclasses import dataclass
from types import GeneratorType
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Pipeline

from .catalog_unigrf import codes_version
from .item_lists_unigrf import NoItemLeft, RequestError, describe
from .old_names_unigrf import convert_old_inputs, convert_old_request
from .recommendation_unigrf import ServingOptions, UniGRFRecommendation

REQUEST_KEYS = ("items", "behaviors", "timestamps", "query_time", "allowed_items", "blocked_items")
PREPROCESS = ("max_items", "max_long_items", "unknown", "exclude_history")
FORWARD = (
    "num_beams",
    "num_return_sequences",
    "generation_weight",
    "ranking_weight",
    "ranking_target",
    "dense_weight",
    "num_dense_candidates",
    "transition_weight",
    "num_transition_candidates",
    "history_decay",
    "transition_smoothing",
    "popularity_weight",
    "content_weight",
    "new_item_bonus",
    "popularity_correction",
    "diversity",
    "rerank_top_k",
    "catalog",
    "num_reasons",
)
# Scores of `recommend`, and their names in an item of the list.
SCORES = {
    "scores": "score",
    "generation_scores": "generation_score",
    "ranking_scores": "ranking_score",
    "dense_scores": "dense_score",
    "transition_scores": "transition_score",
}
SAME_FOLDER = (
    "Load both from one folder. After `codes = tokenizer.add_items(...)`, call `model.add_items(codes, ...)`."
)
LONG_HISTORY = {"items": "long_items", "behaviors": "long_behaviors", "timestamps": "long_timestamps"}


@dataclass
class NumberedRequest:
    """A request of a call with many, and its row, which errors name."""

    row: int
    request: Any


class NumberedRequests(Dataset):
    """The requests of a data set, numbered."""

    def __init__(self, requests):
        self.requests = requests

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.requests)

    def __getitem__(self, row: int) -> NumberedRequest:
        """Return a request with its row."""
        return NumberedRequest(row, self.requests[row])


def select_requests(inputs: dict, rows: list[int]) -> dict:
    """Select the rows of a batch: of tensors, of lists and of nested inputs; an empty dict becomes None."""
    return {
        name: (select_requests(value, rows) or None)
        if isinstance(value, dict)
        else value[rows]
        if isinstance(value, torch.Tensor)
        else [value[row] for row in rows]
        for name, value in inputs.items()
    }


def is_dataset(inputs: Any) -> bool:
    """Return whether `inputs` are a data set of torch, or a data set or column of the library datasets."""
    # The library need not be installed.
    return isinstance(inputs, Dataset) or (
        type(inputs).__module__.startswith("datasets.")
        and type(inputs).__name__ in ("Dataset", "IterableDataset", "Column", "IterableColumn")
    )


def check_columns(dataset: Any) -> None:
    """Raise `ValueError` for a data set without requests, or with other columns than requests have."""
    columns = getattr(dataset, "column_names", None)
    names = convert_old_request(dict.fromkeys(columns or ["items"]))
    if set(names) - set(REQUEST_KEYS) or "items" not in names:
        known = [name for name in columns if name in REQUEST_KEYS]
        raise ValueError(
            f"A data set of histories must have `items` and columns among {list(REQUEST_KEYS)}, got {list(columns)}. "
            f"Rename a misspelled column, and leave the others out: `dataset.select_columns({known})`."
        )
    if isinstance(dataset, Sized) and not len(dataset):
        raise ValueError("`inputs` must hold histories, got a data set without rows. Pass some.")


def check_tokenizer(model, tokenizer) -> None:
    """Raise `ValueError` unless model and tokenizer have the same items and behaviors, in the same rows."""
    check_same_vocabulary(model, tokenizer)
    check_same_items(model, tokenizer)


def check_same_vocabulary(model, tokenizer) -> None:
    """Raise `ValueError` unless model and tokenizer have the same behaviors, levels and number of items."""
    if not hasattr(tokenizer, "config_fields"):
        raise ValueError(f"`tokenizer` must be a SemanticIdTokenizer, got {describe(tokenizer)}. {SAME_FOLDER}")
    expected = {
        "num_items": len(model.catalog.item_codes),
        **{name: getattr(model.config, name) for name in ("codebook_sizes", "behaviors", "bos_token_id")},
    }
    actual = tokenizer.config_fields()
    for name, value in expected.items():
        if actual[name] != value:
            raise ValueError(
                f"`tokenizer` must have the model's {name}={value}, got {name}={actual[name]}. {SAME_FOLDER}"
            )


def check_same_items(model, tokenizer) -> None:
    """Raise `ValueError` unless the rows of model and tokenizer have the same codes and ids."""
    codes = model.catalog.item_codes
    differs = (codes.cpu().numpy() != tokenizer.item_codes).any(axis=1)
    if differs.any():
        item = int(differs.argmax())
        raise ValueError(
            f"`tokenizer` must have the model's codes {codes[item].tolist()} for item {item}, got "
            f"{tokenizer.item_codes[item].tolist()} for the item {tokenizer.item_ids[item]!r}. {SAME_FOLDER}"
        )
    expected = model.config.item_ids_fingerprint
    # Older checkpoints have none.
    if expected is not None and tokenizer.item_ids_fingerprint(expected["num_items"]) != expected:
        raise ValueError(
            f"`tokenizer` must have the ids of the model's first {expected['num_items']} items in their order, got "
            f"other ids or another order from {tokenizer.item_ids[0]!r} on. {SAME_FOLDER}"
        )


class RecommendationPipeline(Pipeline):
    """
    Recommend items from histories. Model, codebooks and item map come from a folder or Hub repository.

        recommender = pipeline("recommendation", model=folder, trust_remote_code=True)
        recommender({"items": ["50", "172"], "behaviors": ["like", "like"]})

    Parameters, of the constructor or of a call:
        max_items (`int`, *optional*): Most recent items of a history to encode. None: the number in
            `generation_config`, or as many items as fit.
        max_long_items (`int`, *optional*): Most recent items of a long history. None: as `generation_config` says, or
            all.
        unknown (`"error"` or `"skip"`, defaults to `"error"`): Reject or skip item ids that the item map lacks.
        exclude_history (`bool`, *optional*): Recommend no item of the history. None: the choice in
            `generation_config`.
        num_beams, num_return_sequences, generation_weight, ranking_weight, ranking_target, dense_weight,
            num_dense_candidates, transition_weight, num_transition_candidates, history_decay, transition_smoothing,
            popularity_weight, content_weight, new_item_bonus, popularity_correction, diversity, rerank_top_k: The
            fields of `ServingOptions`. None: the values in `generation_config`.
        catalog (`CatalogTrie`, *optional*): Recommend only items of this part of the catalog, made by
            `model.catalog.subset(items)`. None: the whole catalog.
        num_reasons (`int`, defaults to 0): Most items of the history that `because` names for each recommended item,
            by what they add to its transition score. 0: none.

    A model with `num_retrieved_items` also searches the history beyond `max_items`, up to `max_long_items` of its
    items.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    # Optional for `pipeline(...)`, so that `__init__` can say what a folder lacks.
    _load_tokenizer = None

    def __init__(self, model, tokenizer=None, **kwargs):
        """
        Make the pipeline from `model` and `tokenizer`; other arguments are those of `Pipeline` and of a call.

        Raises:
            ValueError: without a tokenizer, for a tokenizer of another model, and for misspelled parameters.
        """
        if tokenizer is None:
            folder = model.name_or_path
            raise ValueError(
                f"`tokenizer` must be the SemanticIdTokenizer of the model, got {self._tokenizer_error(folder)}. Add "
                f"it to the folder (`tokenizer.save_pretrained({folder!r})`), or pass it "
                "(`pipeline(..., tokenizer=tokenizer)`)."
            )
        super().__init__(model=model, tokenizer=tokenizer, **kwargs)
        self._checked_items = (None, None)
        self.check_tokenizer()

    @classmethod
    def _tokenizer_error(cls, folder: str) -> str:
        """Say why a folder gives no tokenizer, which `pipeline(...)` does not."""
        try:
            # Who runs a folder's pipeline trusts its tokenizer, too.
            is_trusted = cls.__module__.startswith("transformers_modules.")
            AutoTokenizer.from_pretrained(folder, trust_remote_code=is_trusted)
        except (ValueError, OSError) as error:
            return f"none from {folder!r} ({error})"
        return "none"

    def check_tokenizer(self) -> None:
        """
        Check that model and tokenizer have the same items, codes and behaviors. Items that fit are compared once.

        Raises:
            ValueError: for a tokenizer of another model, and items that one of the two lacks.
        """
        check_same_vocabulary(self.model, self.tokenizer)
        codes = self.model.catalog.item_codes
        fingerprint = self.model.config.item_ids_fingerprint
        checked = (codes, self.tokenizer.item_codes, codes_version(codes), fingerprint)
        known = self._checked_items
        if known[0] is codes and known[1] is self.tokenizer.item_codes and known[2:] == checked[2:]:
            return
        check_same_items(self.model, self.tokenizer)
        self._checked_items = checked

    def _sanitize_parameters(self, **kwargs):
        kwargs = convert_old_inputs(kwargs)
        if strange := sorted(set(kwargs) - {*PREPROCESS, *FORWARD}):
            raise ValueError(
                f"Parameters must be among {[*PREPROCESS, *FORWARD]}, got {strange}. Correct or remove them."
            )
        return (
            {name: kwargs[name] for name in PREPROCESS if name in kwargs},
            {name: kwargs[name] for name in FORWARD if name in kwargs},
            {},
        )

    def __call__(self, inputs, **kwargs):
        """
        Recommend items for a history or for many histories.

        Args:
            inputs: A history or a list of histories (or a `Dataset` of torch or datasets, or a generator of
                histories, which are answered one batch after the other, as the result is read). A history is a
                list of item ids, or a dict with `items`. A model of several behaviors also needs `behaviors`. A model
                that reads times also takes `timestamps` and `query_time`, in seconds or as datetimes. The lists of
                item ids `allowed_items` and `blocked_items` restrict the request.
            batch_size (`int`, *optional*): Histories that run together. None: 1.

        Returns:
            A list of dicts for each history, best first, with `item_id`, `title` (None without titles), `score`
            (fused), `generation_score` (log P) and `ranking_score` (log sigmoid). Models with dense-retrieval scores
            add `dense_score`, and models that serve transitions add `transition_score`. With `num_reasons`, `because`
            lists the ids of the history's items that speak most for the item. Several histories have a list of such
            lists.

        Raises:
            ValueError: for unknown items or behaviors, empty histories, misspelled parameters, an allow-list without
                items, and a tokenizer of another model. The message names the request, counted from 0. A request of
                many that has no item left gets an empty list, and so does one without a known item with
                `unknown="skip"`.
        """
        self.check_tokenizer()
        if isinstance(inputs, (list, tuple)):
            if not inputs:
                raise ValueError(
                    "`inputs` must be a history or a list of histories, got an empty list. Pass item ids."
                )
            # A history may be an array.
            is_batch = isinstance(inputs[0], (list, tuple, dict)) or getattr(inputs[0], "ndim", 0) > 0
            inputs = list(NumberedRequests(inputs)) if is_batch else {"items": list(inputs)}
        elif is_dataset(inputs) and isinstance(inputs, Sized):
            check_columns(inputs)
            inputs = NumberedRequests(inputs)
        elif is_dataset(inputs) or isinstance(inputs, GeneratorType):
            check_columns(inputs)
            inputs = (NumberedRequest(row, request) for row, request in enumerate(inputs))
        return super().__call__(inputs, **kwargs)

    def preprocess(self, inputs, max_items=None, max_long_items=None, unknown="error", exclude_history=None):
        """Turn a request into the inputs of `recommend`, and the request's row (-1: the only request)."""
        config = self.model.config
        if max_long_items is not None and not config.num_retrieved_items:
            raise ValueError(
                f"`max_long_items` needs a model that reads a sub-history of long histories, got {max_long_items} and "
                "num_retrieved_items=0. Leave it out."
            )
        options = self.model.serving_options(
            max_items=max_items, max_long_items=max_long_items, exclude_history=exclude_history
        )
        if not isinstance(inputs, NumberedRequest):
            return {**self._encode(inputs, unknown, options), "row": torch.tensor([-1])}
        try:
            request = inputs.request
            is_answered = unknown != "skip" or self._has_known_items(request)
            if not is_answered:
                # Any history: its list stays empty.
                request = {"items": self.tokenizer.item_ids[:1], "behaviors": self.tokenizer.behaviors[:1]}
            encoded = self._encode(request, unknown, options)
        except ValueError as error:
            raise ValueError(f"Request {inputs.row}: {error}") from error
        return {**encoded, "row": torch.tensor([inputs.row]), "is_answered": torch.tensor([is_answered])}

    def _has_known_items(self, inputs) -> bool:
        """Return whether the item map has an item of a request's history and, with an allow-list, of that list."""
        request = self._check_request(inputs if isinstance(inputs, dict) else {"items": inputs})
        lists = [request["items"], request.get("allowed_items")]
        return all(len(self.tokenizer.item_indices(list(ids), unknown="skip")) for ids in lists if ids is not None)

    def _encode(self, inputs, unknown: str, options: ServingOptions) -> dict[str, torch.LongTensor]:
        # The history.
        request = self._check_request(inputs if isinstance(inputs, dict) else {"items": inputs})
        items = list(request["items"])
        config = self.model.config
        encoded = self.tokenizer.encode_history(
            items,
            request.get("behaviors"),
            max_items=options.max_items or config.max_history_items,
            unknown=unknown,
            timestamps=request.get("timestamps"),
            return_tensors="pt",
        )
        if len(encoded["input_ids"]) != 1:
            raise ValueError(
                f"A request must hold one history, got {len(encoded['input_ids'])}. Pass a list of histories, each a "
                "list of ids."
            )

        # Times: other requests of the batch may have some.
        if config.reads_times and "timestamps" not in encoded:
            encoded["timestamps"] = torch.full_like(encoded["input_ids"], -1)
        if request.get("query_time") is not None:
            encoded["query_time"] = torch.as_tensor(self.tokenizer.encode_times([request["query_time"]])[:1])
        elif "timestamps" in encoded:
            encoded["query_time"] = encoded["timestamps"][:, -1]

        # Item lists, and the long history.
        allowed, blocked = (
            [] if request.get(name) is None else list(request[name]) for name in ("allowed_items", "blocked_items")
        )
        allowed_indices = self._indices(allowed, unknown)
        if request.get("allowed_items") is not None and not allowed_indices.any():
            raise ValueError(
                f"`allowed_items` must hold an item that the item map has, got {request['allowed_items']!r}. Leave "
                "it out to allow all items."
            )
        # Block the items beyond `max_items`, too.
        if options.exclude_history:
            blocked += items
        if config.num_retrieved_items:
            encoded |= self._long_history(request, unknown, options.max_long_items)
        return {**encoded, "allowed_items": allowed_indices, "blocked_items": self._indices(blocked, unknown)}

    @staticmethod
    def _check_request(request: dict) -> dict:
        request = convert_old_request(request)
        if set(request) - set(REQUEST_KEYS) or "items" not in request:
            raise ValueError(
                f"A history must have `items` and keys among {list(REQUEST_KEYS)}, got {list(request)}. Correct or "
                "remove the others."
            )
        for name in ("items", "allowed_items", "blocked_items"):
            ids = request.get(name)
            # Python would read a string as a list of one-letter ids.
            if isinstance(ids, str):
                raise ValueError(f"`{name}` must be a list of item ids, got the string {ids!r}. Put it in a list.")
            is_list = hasattr(ids, "__iter__") and not isinstance(ids, bytes | dict) and getattr(ids, "ndim", 1) > 0
            if not is_list and (ids is not None or name == "items"):
                raise ValueError(f"`{name}` must be a list of item ids, got {ids!r}. Put the ids in a list.")
        return request

    def _long_history(self, request: dict, unknown: str, max_long_items: int | None) -> dict[str, torch.LongTensor]:
        """Return known items, their behaviors and times, each plus one as in `_indices`: padding is no item."""
        encoded = self.tokenizer.encode_history(
            list(request["items"]),
            request.get("behaviors"),
            max_items=max_long_items,
            unknown=unknown,
            timestamps=request.get("timestamps"),
            return_tensors="pt",
        )
        tokens = encoded["input_ids"][0]
        indices = torch.as_tensor(self.tokenizer.decode_indices(tokens)).long()
        behavior_tokens = tokens[1:].view(len(indices), -1)[:, -1:]
        behavior_ids = tokens.new_tensor(self.model.config.behavior_token_ids)
        columns = {"items": indices, "behaviors": (behavior_tokens == behavior_ids).int().argmax(dim=1)}
        # Other requests of the batch may have times.
        if self.model.config.reads_times:
            times = encoded.get("timestamps", torch.full_like(encoded["input_ids"], -1))
            columns["timestamps"] = times[0, 1:].view(len(indices), -1)[:, -1]
        return {
            LONG_HISTORY[name]: torch.nn.functional.pad(column + 1, (1, 0))[None] for name, column in columns.items()
        }

    def _indices(self, item_ids: list, unknown: str) -> torch.LongTensor:
        """
        Return a zero, then item indices plus one, `[1, 1 + n]`.

        The zeros that pad a batch are no items then. `Pipeline` cannot pad a row without elements, hence the first
        zero.
        """
        indices = torch.as_tensor(self.tokenizer.item_indices(item_ids, unknown=unknown)).long()
        return torch.nn.functional.pad(indices + 1, (1, 0))[None]

    def _forward(self, model_inputs, num_reasons=0, **parameters):
        numbers = model_inputs.pop("row").tolist()
        is_answered = model_inputs.pop("is_answered", torch.tensor([True] * len(numbers))).tolist()
        lists = {}
        for name in ("allowed_items", "blocked_items"):
            rows = [row[row > 0] - 1 for row in model_inputs.pop(name)]
            if any(len(row) for row in rows):
                lists[name] = rows
        # Beside requests with a list, others may show all items.
        if "allowed_items" in lists:
            everything = torch.arange(self.model.config.num_items, device=self.model.device)
            lists["allowed_items"] = [row if len(row) else everything for row in lists["allowed_items"]]
        long_history = {name: model_inputs.pop(key) - 1 for name, key in LONG_HISTORY.items() if key in model_inputs}
        inputs = {**model_inputs, **lists, "long_history": long_history}
        # `preprocess` has blocked the whole history.
        best = self._recommend(inputs, numbers, is_answered, **parameters, exclude_history=False)
        if not num_reasons:
            return best
        history, shares = self.model.explain(
            model_inputs["input_ids"], model_inputs["attention_mask"], best.item_indices
        )
        shares, places = shares.topk(min(num_reasons, shares.shape[2]), dim=2)
        history = history[:, None].expand(-1, shares.shape[1], -1)
        reasons = history.gather(2, places).masked_fill(shares <= 0, -1)
        return {**best, "reasons": reasons}

    def _recommend(self, inputs: dict, numbers: list[int], is_answered: list[bool], **parameters):
        """
        Recommend to the requests of a batch, of these `numbers`.

        A request without an answer gets no item, and so does one of many that has no item left.

        Raises:
            NoItemLeft: for a single request.
        """
        rows = [row for row, answered in enumerate(is_answered) if answered]
        while rows:
            try:
                best = self.model.recommend(**select_requests(inputs, rows), **parameters)
            except NoItemLeft as error:
                if numbers[rows[error.request]] < 0:
                    raise
                del rows[error.request]
            except RequestError as error:
                raise RequestError(error.message, max(0, numbers[rows[error.request]])) from error
            else:
                break
        else:
            return UniGRFRecommendation(item_indices=torch.full((len(numbers), 1), -1))
        if len(rows) == len(numbers):
            return best
        columns = {}
        for name, column in best.items():
            fill = -1 if name == "item_indices" else -torch.inf
            columns[name] = column.new_full((len(numbers), column.shape[1]), fill)
            columns[name][rows] = column
        return UniGRFRecommendation(**columns)

    def postprocess(self, model_outputs):
        """Turn the output of `recommend` for a request into a list of dicts, best first."""
        item_ids = self.tokenizer.item_ids
        titles = self.tokenizer.titles
        scores = {name: model_outputs[key][0].tolist() for key, name in SCORES.items() if key in model_outputs}
        reasons = model_outputs["reasons"][0].tolist() if "reasons" in model_outputs else None
        return [
            {
                "item_id": item_ids[item],
                "title": None if titles is None else titles[item],
                **{name: values[row] for name, values in scores.items()},
                **({"because": [item_ids[i] for i in reasons[row] if i >= 0]} if reasons is not None else {}),
            }
            for row, item in enumerate(model_outputs["item_indices"][0].tolist())
            if item >= 0
        ]


# A repository's class needs this to save a pipeline with its code.
RecommendationPipeline._registered_impl = {
    "recommendation": {"impl": RecommendationPipeline, "pt": (AutoModelForCausalLM,)}
}
