"""The config: its checks, and what it saves and loads."""

import numpy as np
import pytest
import torch
from helpers import BACKBONES, build_model, random_codes, short_id
from transformers import AutoConfig

from modeling_unigrf import HSTUConfig, UniGRFConfig, UniGRFForCausalLM


def test_a_reused_text_config_is_not_changed():
    base = AutoConfig.for_model("llama", **BACKBONES["llama"])
    first = UniGRFConfig(text_config=base, codebook_sizes=[4, 4, 2])
    vocab_size = first.vocab_size
    assert UniGRFConfig(text_config=base, codebook_sizes=[8, 8, 2]).vocab_size > first.vocab_size == vocab_size
    with pytest.raises(Exception, match="eos_token_id"):
        UniGRFConfig(eos_token_id=[2, 3])
    config = UniGRFConfig(negatives_per_item=4.0, codebook_sizes=[4, 4, 4, 4])
    model = UniGRFForCausalLM(config)
    model.set_catalog(random_codes(200, [4, 4, 4, 4], torch.Generator().manual_seed(0)))
    assert model.config.next_logit_bias == pytest.approx(np.log(199 / 4)), "computed from the size of the catalog"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codebook_sizes": []}, "one positive codebook size"),
        ({"codebook_sizes": [4, 0]}, "one positive codebook size"),
        ({"codebook_sizes": [4, 4], "code_offsets": [5]}, "one code offset a level"),
        ({"behaviors": []}, "at least one behavior"),
        ({"behaviors": ["view", "like"], "behavior_token_ids": [4]}, "one token id a behavior"),
        ({"behaviors": ["next"]}, "may not be called 'next'"),
        ({"behavior_token_ids": [2]}, "Token ids overlap"),
        ({"codebook_sizes": [4, 4], "code_offsets": [5, 8]}, "Token ids overlap"),
        ({"codebook_sizes": [4, 4], "vocab_size": 12}, "at least 13 tokens .* found vocab_size=12"),
        ({"num_items": 0}, "found num_items=0"),
        ({"ranking_targets": []}, "ranking targets among"),
        ({"ranking_targets": ["share"]}, "ranking targets among"),
        ({"ranking_target": "interact"}, "a ranking_target among"),
        ({"retrieval_behaviors": []}, "retrieval_behaviors among"),
        ({"behaviors": ["view"], "retrieval_behaviors": ["like"]}, "retrieval_behaviors among"),
        ({"dense_loss_weight": 1.0}, "dense_loss_weight=1.0 needs the ranking target 'next' and item vectors"),
        ({"history_item_representations": True}, "history_item_representations needs item vectors"),
        ({"rank_by_dense_score": False}, "needs dense_loss_weight"),
        ({"stop_gradient_dense_score": True}, "needs dense_loss_weight"),
        ({"negatives_per_item": -1.0}, r"0 or more, found {'negatives_per_item': -1.0}"),
        ({"given_negative_weight": 0.5}, "given_negative_weight >= 1"),
        ({"code_similarity": "l2"}, "code_similarity 'dot' or 'cosine'"),
        ({"code_temperature": 0.0}, "a positive code_temperature"),
        ({"code_negatives": -1}, "code_negatives >= 0"),
        ({"num_train_beams": -1}, "num_train_beams of 0 or more"),
        ({"num_retrieved_items": -1}, "num_retrieved_items and num_train_beams of 0 or more"),
        ({"num_retrieved_items": 3}, "needs item embeddings"),
        ({"num_retrieved_items": 3, "embedding_table_size": 9}, "needs item embeddings"),
        (
            {"num_retrieved_items": 3, "content_embedding_dim": 6, "project_content_embeddings": False},
            "item vectors to read",
        ),
        ({"num_train_beams": 5, "negatives_per_item": 1.0}, "Set negatives_per_item=0"),
        ({"max_long_items": 0}, "max_long_items of 1 or more"),
        ({"max_items": 0}, "max_items of 1 or more"),
        (
            {"max_items": 0, "text_config": {"model_type": "bloom"}},
            "max_items of 1 or more",
        ),  # a backbone without positions
    ],
    ids=short_id,
)
def test_invalid_configs_are_rejected(fields, message):
    with pytest.raises(ValueError, match=message):
        UniGRFConfig(**fields)


def test_integers_and_tuples_equal_floats_and_lists(tmp_path):
    text_config = HSTUConfig(dropout=0, layer_norm_eps=1)
    lists = {"code_offsets": (6, 8), "behavior_token_ids": (4, 5), "ranking_targets": ("next",)}
    lists |= {"codebook_sizes": (2, 2), "behaviors": ("dislike", "like"), "retrieval_behaviors": ("like",)}
    config = UniGRFConfig(text_config=text_config, ranking_weight=1, embedding_dropout=0, **lists)
    assert {name: tuple(getattr(config, name)) for name in lists} == lists
    config.save_pretrained(tmp_path)
    assert UniGRFConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert UniGRFConfig.from_pretrained(tmp_path, ranking_weight=2).ranking_weight == 2


@pytest.mark.parametrize(
    "changed", [{"codebook_sizes": [4, 4, 3, 2]}, {"pad_token_id": 7}], ids=["codebook_sizes", "pad_token_id"]
)
def test_token_ids_changed_at_load_are_checked_again(changed, tmp_path):
    build_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Token ids overlap"):
        UniGRFForCausalLM.from_pretrained(tmp_path, **changed)


def test_semantic_id_tokens_cannot_be_removed():
    model = build_model()
    needed = model.config.num_spelling_tokens
    assert model.resize_token_embeddings(needed + 3).num_embeddings == needed + 3
    for part in (model, model.model):
        with pytest.raises(ValueError, match=f"at least the {needed} tokens"):
            part.resize_token_embeddings(needed - 1)
    assert model.resize_token_embeddings(needed).num_embeddings == needed
