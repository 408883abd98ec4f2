# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""`pipeline("recommendation")`: histories of the user's own item ids in, the user's own item ids out."""

import torch
from transformers import AutoModelForCausalLM, Pipeline

REQUEST_KEYS = {"items", "behaviors", "timestamps", "query_time", "allowed_items", "blocked_items"}
PREPROCESS = ("max_items", "unknown", "exclude_history")
FORWARD = ("num_beams", "num_return_sequences", "ranking_weight", "ranking_target", "catalog")
FORWARD += ("dense_weight", "num_dense_candidates", "rerank_top_k")
# Of what `recommend` returns, and what they are called in a row of the list.
COLUMNS = {"scores": "score", "generation_scores": "generation_score", "ranking_scores": "ranking_score"}
COLUMNS |= {"dense_scores": "dense_score"}


class RecommendationPipeline(Pipeline):
    """
    Recommends items from histories, with model, codebooks and item map in one folder or Hub repository.

        recommender = pipeline("recommendation", model=folder, trust_remote_code=True)
        recommender({"items": ["50", "172"], "behaviors": ["like", "like"]})

    Parameters, of the constructor or of a call:
        max_items (`int`, *optional*): Keep this many of the most recent items; by default as many as the model was trained
            with (`config.max_items`), or as many as fit.
        unknown (`"error"` or `"skip"`): What to do with an item id that the item map does not have.
        exclude_history (`bool`, *optional*): Never recommend an item of the history; by default as the config says.
        num_beams, num_return_sequences, ranking_weight, ranking_target, catalog, dense_weight, num_dense_candidates,
            rerank_top_k: As in `UniGRFForCausalLM.recommend`.

    A model with `num_retrieved_items` also searches the history beyond `max_items` (`config.max_long_items` of it).
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(self, **kwargs):
        unknown = set(kwargs) - {*PREPROCESS, *FORWARD}
        if unknown:
            raise ValueError(f"Expected parameters among {[*PREPROCESS, *FORWARD]}, found {sorted(unknown)}.")
        return (
            {name: kwargs[name] for name in PREPROCESS if name in kwargs},
            {name: kwargs[name] for name in FORWARD if name in kwargs},
            {},
        )

    def __call__(self, inputs, **kwargs):
        """
        Args:
            inputs: one history or a list of them (or a torch `Dataset` or generator of them). A history is a list of item ids
                or a dict with `items` and, if the model knows several behaviors, `behaviors`; for a model that reads times
                also `timestamps`, seconds, and `query_time`; the dict may restrict its own request by
                `allowed_items` and `blocked_items`, lists of item ids.
            batch_size (`int`, *optional*): Histories run together.

        Returns:
            A list of dicts for each history, best first: `item_id`, `title` (None without titles), `score`,
            `generation_score` (`log P`), `ranking_score` (`log sigmoid`) and, of a model that has one, `dense_score`. A list of
            such lists for several histories.

        Raises:
            ValueError: on unknown items or behaviors, empty histories, misspelt parameters, an allow-list without items.
        """
        if isinstance(inputs, (list, tuple)):
            if not inputs:
                raise ValueError("Expected a history or a list of histories, found an empty list.")
            is_batch = isinstance(inputs[0], (list, tuple, dict)) or getattr(inputs[0], "ndim", 0) > 0  # an array
            inputs = list(inputs) if is_batch else {"items": list(inputs)}
        return super().__call__(inputs, **kwargs)

    def preprocess(self, inputs, max_items=None, unknown="error", exclude_history=None):
        request = inputs if isinstance(inputs, dict) else {"items": inputs}
        strange = set(request) - REQUEST_KEYS
        if strange or "items" not in request:
            raise ValueError(
                f"Expected a history with `items` and keys among {sorted(REQUEST_KEYS)}, found {list(request)}."
            )
        for name in ("items", "allowed_items", "blocked_items"):
            if isinstance(request.get(name), str):  # which Python would read as a list of one-letter ids
                raise ValueError(f"Expected a list of item ids in `{name}`, found the one string {request[name]!r}.")
        items, config = list(request["items"]), self.model.config
        encoded = self.tokenizer.encode_history(
            items,
            request.get("behaviors"),
            max_items=(config.max_items or config.max_history_items) if max_items is None else max_items,
            unknown=unknown,
            timestamps=request.get("timestamps"),
            return_tensors="pt",
        )
        if len(encoded["input_ids"]) != 1:
            raise ValueError(
                f"Expected one history a request, found {len(encoded['input_ids'])}. Give a list of histories, each a list of ids."
            )
        if config.reads_times and "timestamps" not in encoded:  # beside a request that has them
            encoded["timestamps"] = torch.full_like(encoded["input_ids"], -1)
        query_time = request.get("query_time")
        if query_time is not None:
            encoded["query_time"] = torch.tensor([query_time]).long()
        elif "timestamps" in encoded:
            encoded["query_time"] = encoded["timestamps"][:, -1]
        lists = {
            name: [] if request.get(name) is None else list(request[name])
            for name in ("allowed_items", "blocked_items")
        }
        allowed, blocked = self._indices(lists["allowed_items"], unknown), lists["blocked_items"]
        if request.get("allowed_items") is not None and not allowed.any():
            raise ValueError(
                f"Expected a known item in `allowed_items`, found {request['allowed_items']!r}. Leave it out to allow all."
            )
        if config.exclude_history if exclude_history is None else exclude_history:  # also what is beyond `max_items`
            blocked += items
        if config.num_retrieved_items:
            encoded |= self._long_history(items, request.get("behaviors"), request.get("timestamps"), unknown)
        return {**encoded, "allowed_items": allowed, "blocked_items": self._indices(blocked, unknown)}

    def _long_history(self, items, behaviors, timestamps, unknown) -> dict[str, torch.LongTensor]:
        """Known items, their behaviors and times, each as `_indices`, so that padding is no item here either."""
        encoded = self.tokenizer.encode_history(
            items,
            behaviors,
            max_items=self.model.config.max_long_items,
            unknown=unknown,
            timestamps=timestamps,
            return_tensors="pt",
        )
        tokens = encoded["input_ids"][0]
        indices = torch.as_tensor(self.tokenizer.decode_indices(tokens)).long()
        on_them = tokens[1:].view(len(indices), -1)[:, -1:]
        names = (on_them == tokens.new_tensor(self.model.config.behavior_token_ids)).int().argmax(dim=1)
        columns = {"long_items": indices, "long_behaviors": names}
        if self.model.config.reads_times:  # also for a request without any, beside one that has them
            times = encoded.get("timestamps", torch.full_like(encoded["input_ids"], -1))
            columns["long_timestamps"] = times[0, 1:].view(len(indices), -1)[:, -1]
        return {name: torch.nn.functional.pad(column + 1, (1, 0))[None] for name, column in columns.items()}

    def _indices(self, item_ids, unknown) -> torch.LongTensor:
        """
        A zero, then item indices plus one, `[1, 1 + n]`: a batch is padded with zeros, which are no item then. The first
        zero is there because `Pipeline` cannot pad a row of no elements.
        """
        indices = torch.as_tensor(self.tokenizer.item_indices(item_ids, unknown=unknown)).long()
        return torch.nn.functional.pad(indices + 1, (1, 0))[None]

    def _forward(self, model_inputs, **parameters):
        lists = {}
        for name in ("allowed_items", "blocked_items"):
            rows = [row[row > 0] - 1 for row in model_inputs.pop(name)]
            if any(len(row) for row in rows):
                lists[name] = rows
        if "allowed_items" in lists:  # a request without a list, beside one that has one
            everything = torch.arange(self.model.config.num_items, device=self.model.device)
            lists["allowed_items"] = [row if len(row) else everything for row in lists["allowed_items"]]
        for name in ("long_items", "long_behaviors", "long_timestamps"):
            if name in model_inputs:
                lists[name] = model_inputs.pop(name) - 1
        # What is left out was said by `preprocess`, which knows more of the history than the model reads.
        return self.model.recommend(**model_inputs, **lists, **parameters, exclude_history=False)

    def postprocess(self, model_outputs):
        item_ids, titles = self.tokenizer.item_ids, self.tokenizer.titles
        scores = {
            name: model_outputs[column][0].tolist() for column, name in COLUMNS.items() if column in model_outputs
        }
        return [
            {
                "item_id": item_ids[item],
                "title": None if titles is None else titles[item],
                **{name: values[row] for name, values in scores.items()},
            }
            for row, item in enumerate(model_outputs["item_indices"][0].tolist())
            if item >= 0
        ]


# Registration sets this on the installed class. A class that was loaded from a repository needs it too, or a pipeline that
# is saved again would name code that it does not bring.
RecommendationPipeline._registered_impl = {
    "recommendation": {"impl": RecommendationPipeline, "pt": (AutoModelForCausalLM,)}
}
