"""Histories whose items are read by their vectors, too (RecoChain's ITEM of a history block)."""

import pytest
import torch
from helpers import build_model, exact_scores, long_histories, random_histories
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache

from modeling_unigrf import UniGRFForCausalLM


def by_hand(model, ids):
    """Embeddings of one history `[T]`, behavior by behavior."""
    rows, codes = [], model.catalog.item_codes.tolist()
    for position, token in enumerate(ids.tolist()):
        row = model.get_input_embeddings()(torch.tensor(token))
        if token in model.config.behavior_token_ids:
            spelt = ids[position - model.config.num_levels : position] - torch.tensor(model.config.code_offsets)
            if spelt.tolist() in codes:
                row = row + model.item_representations(torch.tensor(codes.index(spelt.tolist())))
        rows.append(row)
    return torch.stack(rows)


def build(backbone="llama", **config):
    return build_model(backbone, history_item_representations=True, **config)


@pytest.mark.parametrize("embeddings", [True, False])
def test_the_vector_of_each_item_is_added_to_the_behavior_behind_it(backbone, embeddings):
    model = build(backbone, project_content_embeddings=embeddings)
    input_ids, mask, _ = random_histories(model, [4, 2])
    timed = {"timestamps": torch.arange(input_ids.shape[1]).expand(2, -1)} if backbone == "hstu" else {}
    found = model(input_ids, mask, **timed, output_hidden_states=True)
    for row in range(2):
        ids = input_ids[row][mask[row].bool()]
        own = {name: times[row][mask[row].bool()][None] for name, times in timed.items()}
        states = model.model(inputs_embeds=by_hand(model, ids)[None], **own).last_hidden_state
        torch.testing.assert_close(found.logits[row, -len(ids) :], model.code_logits(states)[0], atol=2e-5, rtol=1e-4)
    plain = model.code_logits(model.model(inputs_embeds=model.get_input_embeddings()(input_ids)).last_hidden_state)
    assert (plain[0, -1] - found.logits[0, -1]).abs().max() > 0.01, "it would be seen if they were left out"


@pytest.mark.parametrize("retrieved", [0, 3])
def test_search_and_ranking_on_any_part_of_a_cache_equal_exact_scoring(backbone, retrieved):
    model = build(backbone, num_retrieved_items=retrieved)
    input_ids, mask, _ = random_histories(model, [4, 2])
    everything, longer = torch.arange(30).expand(2, -1), long_histories(model, [12, 2]) if retrieved else {}
    log_probs = exact_scores(model, input_ids, mask)
    asked = {"num_beams": 30, "num_return_sequences": 30, "ranking_weight": 0.5, **longer}
    whole = model.recommend(input_ids, mask, **asked)
    torch.testing.assert_close(whole.generation_scores, log_probs.gather(1, whole.item_indices), atol=5e-5, rtol=1e-4)
    ranks = torch.nn.functional.logsigmoid(model.rank(input_ids, mask, everything, **longer)[..., 0])
    torch.testing.assert_close(whole.ranking_scores, ranks.gather(1, whole.item_indices), atol=5e-5, rtol=1e-4)
    vectors = model.history_item_representations(input_ids)
    # Ends in the middle of an item, before a behavior whose codes are on the cache, at the end.
    for cached in (7, input_ids.shape[1] - 1, input_ids.shape[1]):
        cache = DynamicCache()
        part = {"cache": cache, "use_cache": True, "item_representations": vectors[:, :cached]}
        with torch.no_grad():
            model.model(input_ids[:, :cached], mask[:, :cached], **part)
        again = model.recommend(input_ids, mask, cache=cache, **asked)
        assert torch.equal(again.item_indices, whole.item_indices)
        torch.testing.assert_close(again.scores, whole.scores, atol=5e-5, rtol=1e-4)


def test_our_search_equals_stock_generate_and_the_artefact_comes_back(backbone, tmp_path):
    model = build(backbone)
    input_ids, mask, _ = random_histories(model, [4, 2])
    asked = {"attention_mask": mask, "num_beams": 5, "num_return_sequences": 5}
    asked |= {"output_scores": True, "return_dict_in_generate": True}
    ours = model.generate(input_ids, **asked)
    model.save_pretrained(tmp_path)
    loaded = UniGRFForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(input_ids, **asked).sequences, ours.sequences)
    loaded._beam_search = GenerationMixin._beam_search.__get__(loaded)
    stock = loaded.generate(input_ids, **asked)
    assert torch.equal(stock.sequences, ours.sequences)
    torch.testing.assert_close(stock.sequences_scores, ours.sequences_scores, atol=5e-5, rtol=1e-4)


def test_histories_packed_in_one_row_keep_their_vectors_and_the_vectors_learn(backbone):
    model = build(backbone, ranking_loss_weight=0.0)
    input_ids, mask, _ = random_histories(model, [3, 2])
    alone = [ids[one.bool()] for ids, one in zip(input_ids, mask, strict=True)]
    packed = torch.cat(alone)[None]
    together = model(packed, labels=packed).loss * (packed != model.config.bos_token_id).sum()
    apart = sum(model(ids[None], labels=ids[None]).loss * (len(ids) - 1) for ids in alone)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    model.zero_grad()
    model(packed, labels=packed).loss.backward()
    assert model.item_encoder.proj.weight.grad.abs().sum() > 0 and model.item_encoder.table.weight.grad.abs().sum() > 0


def test_an_item_that_the_catalog_lacks_is_read_by_its_codes_alone():
    model = build()
    input_ids, mask, items = random_histories(model, [3])
    kept = [item for item in range(30) if item != items[0][1]]
    model.set_catalog(model.catalog.item_codes[kept], model.catalog.content_embeddings[kept])
    model.config.embedding_table_size = 29
    vectors = model.history_item_representations(input_ids)
    known = vectors.abs().sum(dim=2)[0] > 0
    assert known.nonzero()[:, 0].tolist() == [5, 15], "behaviors of the first and of the third item"
    states = model.model(input_ids, mask, item_representations=vectors).last_hidden_state
    expected = model.model(inputs_embeds=by_hand(model, input_ids[0])[None]).last_hidden_state
    torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-4)


def test_vectors_that_are_missing_are_asked_for():
    model = build()
    input_ids, mask, _ = random_histories(model, [3])
    with pytest.raises(ValueError, match="pass item_representations="):
        model.model(input_ids, mask)
    cache = DynamicCache()
    model(input_ids[:, :5], cache=cache, use_cache=True)  # <bos> and the codes of the first item
    with pytest.raises(ValueError, match="Begin with a <bos> or a whole item"):
        model(input_ids[:, 5:], cache=cache, use_cache=True)
    assert build_model().history_item_representations(input_ids) is None
