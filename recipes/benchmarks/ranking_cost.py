"""Measure what ranking costs beside generation, with and without sub-histories, as a part of the decoding benchmark.

    python -m recipes.benchmarks.decoding --parts ranking

A history has a short window (RecoChain: about 32 tokens) and a long history for the candidates' sub-histories. Items
have content embeddings of 128 numbers. Tasks:

- `recommend`: search and ranking of all beams, in one call.
- `recommend, cut`: ranking of the best `RANKED` beams by generation and dense-retrieval score, as many as stage II
  trains.
- `retrieve`: the part of `recommend` that retrieves the sub-histories.
- `training step`: forward and backward of stage II, without the search for its candidates.
"""

from collections.abc import Callable

import torch

from modeling_unigrf import UniGRFForCausalLM
from modeling_unigrf.candidates_unigrf import retrieve

# Items of a window.
WINDOW = 7
NUM_BEAMS = 256
# Items of a sub-history.
RETRIEVED = 10
# Beams that `recommend, cut` ranks.
RANKED = 20
# Items of a candidate's sub-history, and items of the long history.
CELLS = [(0, 0), (RETRIEVED, 1_000), (RETRIEVED, 10_000)]
USERS = (1, 8)
TRAINING_ROWS = 32
TRAINING_CANDIDATES = 20


def long_history(model: UniGRFForCausalLM, num_rows: int, length: int) -> dict[str, dict[str, torch.Tensor]]:
    """Draw the input `long_history` of random items `[num_rows, length]`; no input for a model that reads none."""
    generator = torch.Generator().manual_seed(3)
    items = torch.randint(model.catalog.num_items, (num_rows, length), generator=generator)
    return {"long_history": {"items": items.to(model.device)}} if model.config.num_retrieved_items else {}


def serving(model: UniGRFForCausalLM, input_ids: torch.LongTensor, length: int) -> dict[str, Callable]:
    """
    Make the serving calls to measure, by task.

    Args:
        model: The model.
        input_ids: Histories, `[B, T]`.
        length: Items of the long histories.
    """
    mask = torch.ones_like(input_ids)
    beams = {"num_beams": NUM_BEAMS, "num_return_sequences": NUM_BEAMS}
    cut = {**beams, "num_return_sequences": RANKED, "rerank_top_k": RANKED, "dense_weight": 1.0}
    inputs = long_history(model, len(input_ids), length)
    calls = {
        "generate": lambda: model.generate(input_ids, attention_mask=mask, **beams),
        "recommend": lambda: model.recommend(input_ids, mask, **beams, **inputs),
        "recommend, cut": lambda: model.recommend(input_ids, mask, **cut, **inputs),
    }
    if inputs:
        candidates, _ = torch.randint(model.catalog.num_items, (2, len(input_ids), NUM_BEAMS), device=model.device)
        embeddings = model.catalog.content_embeddings
        items = inputs["long_history"]["items"]
        calls["retrieve"] = lambda: retrieve(embeddings, items, candidates, RETRIEVED)
    return calls


def training(model: UniGRFForCausalLM, input_ids: torch.LongTensor, length: int) -> dict[str, Callable]:
    """
    Make a training step of stage II to measure, by task.

    Args:
        model: The model, in training mode.
        input_ids: Histories that end in the item to rank, `[B, T]`.
        length: Items of the long histories.
    """
    inputs = long_history(model, len(input_ids), length)
    candidates = torch.randint(model.catalog.num_items, (len(input_ids), TRAINING_CANDIDATES), device=model.device)
    item_sets = {"candidates": candidates}

    @torch.enable_grad()
    def step():
        model(input_ids, labels=input_ids, item_sets=item_sets, **inputs).loss.backward()
        model.zero_grad()

    return {"training step": step}
