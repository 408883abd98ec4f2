"""Names of version 0.1: folders, inputs and requests with them mean what they meant."""

import json
import logging

import pytest
import torch
from helpers import build_model, labeled_batch, long_histories
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from modeling_unigrf import RecommendationPipeline, UniGRFConfig, UniGRFForCausalLM
from tokenization import SemanticIdTokenizer

MODEL_FIELDS = {
    "item_embedding_dim": "content_embedding_dim",
    "int8_item_embeddings": "int8_content_embeddings",
    "read_item_embeddings": "project_content_embeddings",
    "item_table_size": "embedding_table_size",
    "history_item_vectors": "history_item_representations",
    "rank_by_item_score": "rank_by_dense_score",
}
TRAINING_FIELDS = {
    "item_loss_weight": "dense_loss_weight",
    "detach_history": "stop_gradient_history",
    "detach_item_score": "stop_gradient_dense_score",
    **{
        name: name
        for name in (
            "generation_loss_weight",
            "ranking_loss_weight",
            "code_negatives",
            "negatives_per_item",
            "num_train_beams",
            "inject_target",
            "retrieval_behaviors",
        )
    },
}
SERVING_FIELDS = {"item_weight": "dense_weight", "union_items": "num_dense_candidates"}
SERVING_FIELDS |= {"num_ranked_beams": "rerank_top_k", "ranking_weight": "ranking_weight"}
SERVING_FIELDS |= {"ranking_target": "ranking_target", "exclude_history": "exclude_history", "max_items": "max_items"}
SERVED = {"dense_weight": 0.5, "num_dense_candidates": 4, "rerank_top_k": 6, "ranking_weight": 0.3}
SERVED |= {"ranking_target": "like", "exclude_history": True, "max_items": 5}
WEIGHTS = {"item_codes": "item_codes", "content_embeddings": "item_embeddings"}


def write_old_folder(model, folder):
    """Save a model as 0.1 would: one flat config, nothing of serving in generation_config.json, other buffers."""
    model.save_pretrained(folder)
    fields = model.config.to_dict()
    fields.pop("next_logit_bias")
    training = fields.pop("training_config")
    fields |= {old: fields.pop(new) for old, new in MODEL_FIELDS.items()}
    fields |= {old: training[new] for old, new in TRAINING_FIELDS.items()}
    fields |= {old: getattr(model.generation_config, new, None) for old, new in SERVING_FIELDS.items()}
    fields |= {"code_offsets": model.config.code_offsets, "behavior_token_ids": model.config.behavior_token_ids}
    fields |= {"share_code_negatives": True, "given_negative_weight": 30.0, "candidate_loss_weight": 10.0}
    (folder / "config.json").write_text(json.dumps(fields))
    generation = json.loads((folder / "generation_config.json").read_text())
    rest = {name: value for name, value in generation.items() if name not in SERVING_FIELDS.values()}
    (folder / "generation_config.json").write_text(json.dumps(rest))
    weights = load_file(folder / "model.safetensors")
    for new, old in WEIGHTS.items():
        weights[f"catalogue.{old}"] = weights.pop(f"catalog.{new}")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(autouse=True)
def repeated_warnings():
    """Forget which warnings other tests have seen: each is logged once."""
    logging.Logger.warning_once.cache_clear()


def test_a_folder_of_0_1_serves_and_trains_as_before(tmp_path, caplog):
    options = {"negatives_per_item": 2.0, "dense_loss_weight": 0.5, "history_item_representations": True}
    model = build_model(**options, **SERVED)
    batch, _ = labeled_batch(model, [4, 2])
    model.train()(**batch)  # stores the sampling bias, which 0.1 computed from the config
    model.eval()
    write_old_folder(model, tmp_path / "old")
    loaded = UniGRFForCausalLM.from_pretrained(tmp_path / "old")
    assert "item_table_size" in caplog.text and "names of unigrf 0.1" in caplog.text
    caplog.clear()
    loaded.save_pretrained(tmp_path / "new")
    again = UniGRFForCausalLM.from_pretrained(tmp_path / "new")
    assert not caplog.messages, "a saved model has the new names"
    saved = [json.loads((tmp_path / "new" / f"{name}.json").read_text()) for name in ("config", "generation_config")]
    assert not {*saved[0], *saved[0]["training_config"]} & {"item_table_size", "code_offsets", *SERVED}
    assert {name: saved[1][name] for name in SERVED} == SERVED
    expected = model.recommend(batch["input_ids"], batch["attention_mask"])
    for copy in (loaded, again):
        for name in (*MODEL_FIELDS.values(), "next_logit_bias"):
            assert getattr(copy.config, name) == getattr(model.config, name)
        for name in TRAINING_FIELDS.values():
            assert getattr(copy.config.training_config, name) == getattr(model.config.training_config, name)
        best = copy.recommend(batch["input_ids"], batch["attention_mask"])
        assert torch.equal(best.item_indices, expected.item_indices) and torch.equal(best.scores, expected.scores)
        assert torch.equal(copy(**batch).loss, model(**batch).loss)


def test_old_fields_may_still_change_a_loaded_config(tmp_path, caplog):
    build_model().save_pretrained(tmp_path)
    fields = {"num_train_beams": 5, "detach_history": True, "num_retrieved_items": 2}
    model = UniGRFForCausalLM.from_pretrained(tmp_path, history_item_vectors=True, **fields)
    assert (model.config.training_config.num_train_beams, model.config.num_retrieved_items) == (5, 2)
    assert model.config.training_config.stop_gradient_history and model.config.history_item_representations
    assert "detach_history" in caplog.text and "num_retrieved_items" not in caplog.text


def test_a_removed_option_warns_that_it_has_no_effect(caplog):
    UniGRFConfig(exclude_candidate=False, given_negative_weight=30.0)
    assert "no effect" not in caplog.text
    UniGRFConfig(exclude_candidate=True, given_negative_weight=5.0)
    assert "exclude_candidate=True has no effect" in caplog.text
    assert "given_negative_weight=5.0 has no effect" in caplog.text


@pytest.mark.parametrize("name", ["code_offsets", "behavior_token_ids"])
def test_old_token_ids_must_follow_from_the_other_fields(name, tmp_path):
    model = build_model()
    write_old_folder(model, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields[name][-1] += 1
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"`{name}` must be \[.*\], as behaviors and codebook_sizes say"):
        AutoConfig.from_pretrained(tmp_path)


def test_old_inputs_equal_the_nested_ones(caplog):
    model = build_model("hstu", num_retrieved_items=3)
    batch, _ = labeled_batch(model, [4, 2])
    histories = {name: batch[name] for name in ("input_ids", "attention_mask")}
    times = torch.arange(batch["input_ids"].shape[1]).expand(2, -1)
    long_history = {**long_histories(model, [12, 2])["long_history"], "timestamps": torch.arange(12).expand(2, -1)}
    old_history = {f"long_{name}": value for name, value in long_history.items()}
    candidates = torch.tensor([[1, 2], [3, 4]])
    requests = {"timestamps": times, "query_time": times[:, -1] + 500}
    old_requests = {"timestamps": times, "request_timestamps": times[:, -1] + 500}

    actual = model(**batch, timestamps=times, candidates=candidates, **old_history)
    expected = model(**batch, timestamps=times, item_sets={"candidates": candidates}, long_history=long_history)
    assert torch.equal(actual.loss, expected.loss)
    actual = model.rank(**histories, candidates=candidates, **old_requests, **old_history)
    assert torch.equal(actual, model.rank(**histories, candidates=candidates, **requests, long_history=long_history))
    part = model.catalog.subset(range(9))
    old_options = {"item_weight": 0.5, "union_items": 2, "num_ranked_beams": 3, "catalogue": part}
    options = {"dense_weight": 0.5, "num_dense_candidates": 2, "rerank_top_k": 3, "catalog": part}
    actual = model.recommend(**histories, **old_requests, **old_history, **old_options)
    expected = model.recommend(**histories, **requests, long_history=long_history, **options)
    assert torch.equal(actual.scores, expected.scores)
    actual = model.generate(**histories, **old_requests, catalogue=part, num_beams=4)
    assert torch.equal(actual, model.generate(**histories, **requests, catalog=part, num_beams=4))
    for name in (*old_history, *old_options, "request_timestamps"):
        assert name in caplog.text


def test_old_item_sets_equal_the_nested_ones():
    model = build_model(negatives_per_item=1.0)
    batch, _ = labeled_batch(model, [4, 2])
    hard_negatives = torch.tensor([[7, 8], [9, -1]])
    excluded_positives = torch.tensor([[1], [2]])
    actual = model(**batch, negative_items=hard_negatives, favorite_items=excluded_positives)
    item_sets = {"hard_negatives": hard_negatives, "excluded_positives": excluded_positives}
    assert torch.equal(actual.loss, model(**batch, item_sets=item_sets).loss)
    assert not torch.equal(actual.loss, model(**batch).loss)


def test_old_names_of_the_pipeline_equal_the_new_ones():
    model = build_model("hstu")
    names = [f"i{item}" for item in range(30)]
    codes = model.catalog.item_codes.numpy()
    tokenizer = SemanticIdTokenizer.from_codes(names, codes, model.config.codebook_sizes, model.config.behaviors)
    recommender = RecommendationPipeline(model=model, tokenizer=tokenizer)
    history = {"items": ["i3", "i4"], "behaviors": ["like", "like"], "timestamps": [100, 9000]}
    old = recommender({**history, "request_timestamp": 500_000}, item_weight=0.5, union_items=3)
    new = recommender({**history, "query_time": 500_000}, dense_weight=0.5, num_dense_candidates=3)
    assert old == new != recommender(history, dense_weight=0.5, num_dense_candidates=3)
