"""The config: its checks, and what it saves and loads."""

import numpy as np
import pytest
import torch
from helpers import BACKBONES, build_model, labeled_batch, random_codes, short_id, split_options
from transformers import AutoConfig, GenerationConfig

from modeling_unigrf import HSTUConfig, ServingOptions, UniGRFConfig, UniGRFForCausalLM, UniGRFTrainingConfig


def test_a_text_config_without_a_name_has_our_other_fields():
    for fields in ({}, {"num_hidden_layers": 3}):
        config = UniGRFConfig(text_config=fields).text_config
        assert (config.model_type, config.hidden_size) == ("llama", 128)
        assert config.num_hidden_layers == fields.get("num_hidden_layers", 2)


def test_a_reused_text_config_is_not_changed():
    base = AutoConfig.for_model("llama", **BACKBONES["llama"])
    first = UniGRFConfig(text_config=base, codebook_sizes=[4, 4, 2])
    vocab_size = first.vocab_size
    assert UniGRFConfig(text_config=base, codebook_sizes=[8, 8, 2]).vocab_size > first.vocab_size == vocab_size
    with pytest.raises(Exception, match="eos_token_id"):
        UniGRFConfig(eos_token_id=[2, 3])


def test_training_stores_the_sampling_bias_of_its_negatives(tmp_path):
    model = build_model(codebook_sizes=(4, 4, 4, 4), negatives_per_item=4.0)
    model.set_catalog(random_codes(200, [4, 4, 4, 4], torch.Generator().manual_seed(0)), torch.randn(200, 6))
    batch, _ = labeled_batch(model, [3, 2])
    model(**batch)
    assert model.config.next_logit_bias == 0.0, "evaluation changes nothing"
    model.train()(**batch)
    bias = pytest.approx(np.log(199 / 4))
    assert model.config.next_logit_bias == bias, "computed from the size of the catalog"
    model.config.save_pretrained(tmp_path)
    loaded = UniGRFConfig.from_pretrained(tmp_path, training_config={"negatives_per_item": 9.0})
    assert loaded.next_logit_bias == bias, "training fields do not change inference"
    for options in ({"negatives_per_item": 0.0}, {"num_train_beams": 4}):
        model = build_model(next_logit_bias=1.0, **options)
        model.train()(**labeled_batch(model, [3, 2])[0])
        assert model.config.next_logit_bias == 0.0, "there are no random negatives"


NO_REPRESENTATIONS = {"embedding_table_size": 0, "history_item_representations": False}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codebook_sizes": []}, "one positive size a level"),
        ({"codebook_sizes": [4, 0]}, "one positive size a level"),
        ({"codebook_sizes": [4, 4], "code_offsets": [5]}, r"`code_offsets` must be \[5, 9\].* got \[5\]"),
        ({"behaviors": []}, "`behaviors` must hold one name or more"),
        (
            {"behaviors": ["view", "like"], "behavior_token_ids": [4]},
            r"`behavior_token_ids` must be \[4, 5\].* got \[4\]",
        ),
        ({"behaviors": ["next"]}, "none of them 'next'"),
        ({"behavior_token_ids": [2]}, r"`behavior_token_ids` must be \[4\].* got \[2\]"),
        ({"codebook_sizes": [4, 4], "code_offsets": [5, 8]}, r"`code_offsets` must be \[5, 9\].* got \[5, 8\]"),
        ({"codebook_sizes": [4, 4], "vocab_size": 12}, "at least the 13 tokens .* got 12"),
        ({"pad_token_id": 4}, r"three different ids below 4, got \[4, 1, 2\]"),
        ({"bos_token_id": 2}, r"three different ids below 4, got \[0, 2, 2\]"),
        ({"num_items": 0}, "`num_items` must be 1 or more, got 0"),
        ({"ranking_targets": []}, r"`ranking_targets` must be among .* got \[\]"),
        ({"ranking_targets": ["share"]}, r"`ranking_targets` must be among .* got \['share'\]"),
        ({"retrieval_behaviors": []}, "`retrieval_behaviors` must be among"),
        ({"behaviors": ["view"], "retrieval_behaviors": ["like"]}, "`retrieval_behaviors` must be among"),
        (
            {"dense_loss_weight": 1.0, **NO_REPRESENTATIONS},
            "`dense_loss_weight=1.0` must come with the ranking target 'next' and item representations",
        ),
        (
            {"dense_loss_weight": 1.0, "behaviors": ["view"], "ranking_targets": ["view"]},
            "`dense_loss_weight=1.0` must come with the ranking target 'next'",
        ),
        ({"embedding_table_size": 0}, "`history_item_representations=True` must come with item representations"),
        ({"rank_by_dense_score": False, "dense_loss_weight": 0}, "must come with dense_loss_weight"),
        (
            {"stop_gradient_dense_score": True, "dense_loss_weight": 0},
            "with rank_by_dense_score and",
        ),
        ({"negatives_per_item": -1.0}, "`negatives_per_item` must be .* 0 or more, got -1.0"),
        ({"generation_loss_weight": float("nan")}, "`generation_loss_weight` must be .* 0 or more, got nan"),
        ({"code_similarity": "l2"}, "`code_similarity` must be 'dot' or 'cosine'"),
        ({"code_temperature": 0.0}, "`code_temperature` positive"),
        ({"code_negatives": -1}, "`code_negatives` must be .* 0 or more, got -1"),
        ({"num_train_beams": -1}, "`num_train_beams` must be .* 0 or more, got -1"),
        ({"num_retrieved_items": -1}, "`num_retrieved_items` must be 0 or more, got -1"),
        ({"embedding_table_size": -1}, "`embedding_table_size` must be 0 or more, got -1"),
        ({"num_retrieved_items": 3}, "must come with content embeddings"),
        ({"num_retrieved_items": 3, "embedding_table_size": 9}, "must come with content embeddings"),
        (
            {
                "num_retrieved_items": 3,
                "content_embedding_dim": 6,
                "project_content_embeddings": False,
                "dense_loss_weight": 0,
                **NO_REPRESENTATIONS,
            },
            "item representations to read",
        ),
        ({"num_train_beams": 5, "negatives_per_item": 1.0}, "`negatives_per_item` must be 0 or None"),
    ],
    ids=short_id,
)
def test_invalid_configs_are_rejected(fields, message):
    with pytest.raises(ValueError, match=message):
        UniGRFConfig(**split_options(fields)[0])


@pytest.mark.parametrize("name", ["dense_loss_weight", "stop_gradient_history", "dense_weight", "rerank_top_k"])
def test_fields_in_the_wrong_part_are_rejected(name):
    with pytest.raises(ValueError, match=rf"`UniGRFConfig` must get .* got \['{name}'\]"):
        UniGRFConfig(**{name: 1})


def test_configs_share_no_part():
    training_config = UniGRFTrainingConfig(dense_loss_weight=0)
    first, second = (UniGRFConfig(training_config=training_config) for _ in range(2))
    first.training_config.code_negatives = 5
    assert second.training_config.code_negatives == training_config.code_negatives == 0


@pytest.mark.parametrize(
    ("options", "text_config", "message"),
    [
        ({"ranking_target": "interact"}, {}, r"`ranking_target` must be among \['next'\], got 'interact'"),
        ({"max_long_items": 0}, {}, "`max_long_items` must be 1 or more"),
        ({"max_items": 0}, {}, "`max_items` must be 1 or more"),
        ({"max_items": 0}, {"model_type": "bloom"}, "`max_items` must be 1 or more"),  # no positions
        ({"max_item": 5}, {}, r"must be among .* got \['max_item'\]"),
    ],
    ids=short_id,
)
def test_invalid_serving_options_are_rejected(options, text_config, message):
    with pytest.raises(ValueError, match=message):
        ServingOptions.from_generation_config(GenerationConfig(), UniGRFConfig(text_config=text_config), options)


def test_integers_and_tuples_equal_floats_and_lists(tmp_path):
    text_config = HSTUConfig(dropout=0, layer_norm_eps=1)
    lists = {"ranking_targets": ("next",), "codebook_sizes": (2, 2), "behaviors": ("dislike", "like")}
    training_config = {"retrieval_behaviors": ("like",), "ranking_loss_weight": 2}
    fields = {"text_config": text_config, "training_config": training_config, "code_temperature": 1}
    config = UniGRFConfig(**fields, embedding_dropout=0, **lists)
    assert {name: tuple(getattr(config, name)) for name in lists} == lists
    assert config.training_config.retrieval_behaviors == ["like"]
    assert (config.code_offsets, config.behavior_token_ids) == ([6, 8], [4, 5])
    config.save_pretrained(tmp_path)
    assert UniGRFConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert UniGRFConfig.from_pretrained(tmp_path, code_temperature=2).code_temperature == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"codebook_sizes": [4, 4, 3, 2]}, "at least the 19 tokens"), ({"pad_token_id": 7}, "ids below 4, got")],
    ids=["codebook_sizes", "pad_token_id"],
)
def test_token_ids_changed_at_load_are_checked_again(changed, message, tmp_path):
    build_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        UniGRFForCausalLM.from_pretrained(tmp_path, **changed)


def test_semantic_id_tokens_cannot_be_removed():
    model = build_model()
    needed = model.config.num_item_tokens
    assert model.resize_token_embeddings(needed + 3).num_embeddings == needed + 3
    for part in (model, model.model):
        with pytest.raises(ValueError, match=f"at least the {needed} tokens"):
            part.resize_token_embeddings(needed - 1)
    assert model.resize_token_embeddings(needed).num_embeddings == needed
