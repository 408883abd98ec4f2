"""What ranking costs beside generation, with and without sub-histories: a part of `recipes.benchmarks.decoding`.

A short window of the history (RecoChain: about 32 tokens) and a long history that candidates' sub-histories come from;
items have embeddings of 128 numbers. `recommend` is search and ranking in one call, of all beams or of the best `RANKED`
(as many as stage II is trained on) by generation and item-level score; `retrieve` is what of the first call finds the
sub-histories. The training step is forward and backward of stage II on candidates that are given, without the search.
"""

from collections.abc import Callable

import torch

from modeling_unigrf import UniGRFForCausalLM
from modeling_unigrf.candidates_unigrf import retrieve

WINDOW, NUM_BEAMS, RETRIEVED, RANKED = 7, 256, 10, 20
# Items of a candidate's sub-history, items of the long history.
CELLS = [(0, 0), (RETRIEVED, 1_000), (RETRIEVED, 10_000)]
USERS = (1, 8)
TRAINING_ROWS, TRAINING_CANDIDATES = 32, 20


def long_history(model: UniGRFForCausalLM, rows: int, length: int) -> dict[str, dict[str, torch.Tensor]]:
    """Draw random long histories `[rows, length]`, as the model takes them; empty for a model that reads none."""
    generator = torch.Generator().manual_seed(3)
    items = torch.randint(model.catalog.num_items, (rows, length), generator=generator)
    return {"long_history": {"items": items.to(model.device)}} if model.config.num_retrieved_items else {}


def serving(model: UniGRFForCausalLM, input_ids: torch.LongTensor, length: int) -> dict[str, Callable]:
    """What is measured of histories `[B, T]` with long histories of so many items, by its name."""
    mask, beams = torch.ones_like(input_ids), {"num_beams": NUM_BEAMS, "num_return_sequences": NUM_BEAMS}
    longer = long_history(model, len(input_ids), length)
    cut = {**beams, "num_return_sequences": RANKED, "rerank_top_k": RANKED, "dense_weight": 1.0}
    calls = {
        "generate": lambda: model.generate(input_ids, attention_mask=mask, **beams),
        "recommend": lambda: model.recommend(input_ids, mask, **beams, **longer),
        "recommend, cut": lambda: model.recommend(input_ids, mask, **cut, **longer),
    }
    if longer:
        candidates, _ = torch.randint(model.catalog.num_items, (2, len(input_ids), NUM_BEAMS), device=model.device)
        embeddings, items = model.catalog.content_embeddings, longer["long_history"]["items"]
        calls["retrieve"] = lambda: retrieve(embeddings, items, candidates, RETRIEVED)
    return calls


def training(model: UniGRFForCausalLM, input_ids: torch.LongTensor, length: int) -> dict[str, Callable]:
    """A step of stage II on rows `[B, T]`, by its name."""
    longer = long_history(model, len(input_ids), length)
    candidates = torch.randint(model.catalog.num_items, (len(input_ids), TRAINING_CANDIDATES), device=model.device)

    @torch.enable_grad()
    def step():
        model(input_ids, labels=input_ids, item_sets={"candidates": candidates}, **longer).loss.backward()
        model.zero_grad()

    return {"training step": step}
