"""History item representations: each behavior token also carries the representation of its item (RecoChain)."""

import pytest
import torch
from helpers import STOCK_BEAM_SEARCH, build_model, exact_scores, long_histories, random_histories, short_id
from transformers import AutoModel
from transformers.cache_utils import DynamicCache

from modeling_unigrf import UniGRFForCausalLM


def embed_by_hand(model, ids):
    """Embed one history `[T]` token by token."""
    rows = []
    codes = model.catalog.item_codes.tolist()
    for position, token in enumerate(ids.tolist()):
        row = model.get_input_embeddings()(torch.tensor(token))
        if token in model.config.behavior_token_ids:
            item_codes = ids[position - model.config.num_levels : position] - torch.tensor(model.config.code_offsets)
            if item_codes.tolist() in codes:
                row = row + model.scorer.representations(torch.tensor(codes.index(item_codes.tolist())))
        rows.append(row)
    return torch.stack(rows)


def build(backbone="llama", **config):
    return build_model(backbone, history_item_representations=True, **config)


@pytest.mark.parametrize("embeddings", [True, False])
def test_item_representations_are_added_to_the_next_behavior(backbone, embeddings):
    model = build(backbone, project_content_embeddings=embeddings)
    input_ids, mask, _ = random_histories(model, [4, 2])
    timed = {"timestamps": torch.arange(input_ids.shape[1]).expand(2, -1)} if backbone == "hstu" else {}
    output = model(input_ids, mask, **timed, output_hidden_states=True)
    for row in range(2):
        ids = input_ids[row][mask[row].bool()]
        row_times = {name: times[row][mask[row].bool()][None] for name, times in timed.items()}
        states = model.model(inputs_embeds=embed_by_hand(model, ids)[None], **row_times).last_hidden_state
        torch.testing.assert_close(
            output.logits[row, -len(ids) :], model.scorer.code_logits(states)[0], atol=2e-5, rtol=1e-4
        )
    plain = model.scorer.code_logits(
        model.model(inputs_embeds=model.get_input_embeddings()(input_ids)).last_hidden_state
    )
    assert (plain[0, -1] - output.logits[0, -1]).abs().max() > 0.01, "the representations matter"


@pytest.mark.parametrize("retrieved", [0, 3])
def test_search_and_rank_on_a_partial_cache_equal_exact_scores(backbone, retrieved):
    model = build(backbone, num_retrieved_items=retrieved)
    input_ids, mask, _ = random_histories(model, [4, 2])
    everything = torch.arange(30).expand(2, -1)
    longer = long_histories(model, [12, 2]) if retrieved else {}
    log_probs = exact_scores(model, input_ids, mask)
    options = {"num_beams": 30, "num_return_sequences": 30, "ranking_weight": 0.5, **longer}
    whole = model.recommend(input_ids, mask, **options)
    torch.testing.assert_close(whole.generation_scores, log_probs.gather(1, whole.item_indices), atol=5e-5, rtol=1e-4)
    ranks = torch.nn.functional.logsigmoid(model.rank(input_ids, mask, everything, **longer)[..., 0])
    torch.testing.assert_close(whole.ranking_scores, ranks.gather(1, whole.item_indices), atol=5e-5, rtol=1e-4)
    vectors = model.scorer.history_representations(input_ids)
    # The cache ends inside an item, between codes and behavior, and at the end.
    for cached in (7, input_ids.shape[1] - 1, input_ids.shape[1]):
        cache = DynamicCache()
        part = {"cache": cache, "use_cache": True, "item_representations": vectors[:, :cached]}
        with torch.no_grad():
            model.model(input_ids[:, :cached], mask[:, :cached], **part)
        again = model.recommend(input_ids, mask, cache=cache, **options)
        assert torch.equal(again.item_indices, whole.item_indices)
        torch.testing.assert_close(again.scores, whole.scores, atol=5e-5, rtol=1e-4)


def test_the_search_equals_stock_generate_also_after_reloading(backbone, tmp_path):
    model = build(backbone)
    input_ids, mask, _ = random_histories(model, [4, 2])
    options = {"attention_mask": mask, "num_beams": 5, "num_return_sequences": 5}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    ours = model.generate(input_ids, **options)
    model.save_pretrained(tmp_path)
    loaded = UniGRFForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(input_ids, **options).sequences, ours.sequences)
    stock = loaded.generate(input_ids, **options, **STOCK_BEAM_SEARCH)
    assert torch.equal(stock.sequences, ours.sequences)
    torch.testing.assert_close(stock.sequences_scores, ours.sequences_scores, atol=5e-5, rtol=1e-4)


def test_packed_histories_train_their_item_representations(backbone):
    model = build(backbone, ranking_loss_weight=0.0)
    input_ids, mask, _ = random_histories(model, [3, 2])
    alone = [ids[row_mask.bool()] for ids, row_mask in zip(input_ids, mask, strict=True)]
    packed = torch.cat(alone)[None]
    together = model(packed, labels=packed).loss * (packed != model.config.bos_token_id).sum()
    apart = sum(model(ids[None], labels=ids[None]).loss * (len(ids) - 1) for ids in alone)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    model.zero_grad()
    model(packed, labels=packed).loss.backward()
    assert model.item_encoder.proj.weight.grad.abs().sum() > 0 and model.item_encoder.table.weight.grad.abs().sum() > 0


def test_an_item_outside_the_catalog_is_read_by_its_codes_alone():
    model = build()
    input_ids, mask, items = random_histories(model, [3])
    kept = [item for item in range(30) if item != items[0][1]]
    model.set_catalog(model.catalog.item_codes[kept], model.catalog.content_embeddings[kept])
    model.config.embedding_table_size = 29
    vectors = model.scorer.history_representations(input_ids)
    known = vectors.abs().sum(dim=2)[0] > 0
    assert known.nonzero()[:, 0].tolist() == [5, 15], "behaviors of the first and of the third item"
    states = model.model(input_ids, mask, item_representations=vectors).last_hidden_state
    expected = model.model(inputs_embeds=embed_by_hand(model, input_ids[0])[None]).last_hidden_state
    torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"embedding_table_size": 0}, {"project_content_embeddings": False}], ids=short_id
)
def test_auto_model_gives_the_states_of_any_history(backbone, options, tmp_path):
    model = build(backbone, **options)
    model.set_transitions([[1, 2, 3], [2, 4]], 3)
    model.save_pretrained(tmp_path / "whole")
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "alone")
    input_ids, mask, _ = random_histories(model, [4, 2, 0])
    for folder in ("whole", "alone"):
        loaded = AutoModel.from_pretrained(tmp_path / folder)
        states = loaded(input_ids, mask).last_hidden_state
        torch.testing.assert_close(states[:, -1], model.prefill(input_ids, mask), atol=2e-5, rtol=1e-4)


def test_missing_item_representations_are_reported():
    model = build()
    input_ids, mask, _ = random_histories(model, [3])
    with pytest.raises(ValueError, match="`item_representations` must be given for histories with behaviors"):
        model.model(input_ids, mask)
    cache = DynamicCache()
    model(input_ids[:, :5], cache=cache, use_cache=True)  # <bos> and the codes of the first item
    with pytest.raises(ValueError, match="must begin with a <bos> or a whole item"):
        model(input_ids[:, 5:], cache=cache, use_cache=True)
    assert build_model().scorer.history_representations(input_ids) is None
