"""Run the model tests of transformers (`ModelTesterMixin`, from its source distribution) on UniGRF."""

import importlib
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch
import transformers

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM, UniGRFModel

SOURCES = Path(sys.prefix) / f"transformers-{transformers.__version__}" / "tests"
if not SOURCES.is_dir():
    pytest.skip(f"{SOURCES} is missing: `make test` fetches it.", allow_module_level=True)


# Modules missing from the distribution, with the names that the common tests import.
LEFT_OUT = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
}


def import_common_tests():
    """Import the common tests as a separate package."""

    def add_module(name, **attributes):
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        sys.modules[name] = module

    add_module("transformers_tests", __path__=[str(SOURCES)])
    for name, contents in LEFT_OUT.items():
        add_module(f"transformers_tests.{name.split('.')[0]}", __path__=[])
        add_module(f"transformers_tests.{name}", **contents)
    return importlib.import_module("transformers_tests.test_modeling_common")


common = import_common_tests()
# The tests look in these tables for models with a loss.
common.MODEL_MAPPING_NAMES["unigrf"] = UniGRFModel.__name__
common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["unigrf"] = UniGRFForCausalLM.__name__


class UniGRFModelTester:
    """A tiny model and valid histories, as `ModelTesterMixin` expects them."""

    batch_size = 3
    num_histories_items = 3
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def __init__(self, parent):
        self.parent = parent
        self.seq_length = 1 + self.num_histories_items * 4
        self.encoder_seq_length = self.key_length = self.seq_length

    def get_config(self):
        return UniGRFConfig(
            text_config={
                "model_type": "llama",
                "hidden_size": self.hidden_size,
                "intermediate_size": 37,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
            },
            vocab_size=64,  # more than the semantic-ID tokens, so that it can shrink
            codebook_sizes=[8, 8, 4],
            behaviors=["dislike", "like"],
            num_items=20,
            content_embedding_dim=5,
            embedding_table_size=7,
            history_item_representations=False,  # `UniGRFModel` alone cannot make them
            ranking_dropout=0.0,
            embedding_dropout=0.0,
            training_config={"negatives_per_item": 0.5, "dense_loss_weight": 0.5},
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        rng = torch.Generator().manual_seed(0)
        items = torch.randint(config.num_items, (self.batch_size, self.num_histories_items), generator=rng)
        codes = torch.stack([items // 32, items // 4 % 8, items % 4], dim=-1)  # the catalog of a new model
        tokens = codes + torch.tensor(config.code_offsets)
        behaviors = torch.randint(4, 6, (*items.shape, 1), generator=rng)
        history = torch.cat([tokens, behaviors], dim=-1).flatten(1)
        input_ids = torch.cat([torch.full((self.batch_size, 1), config.bos_token_id), history], dim=1)
        return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class UniGRFModelTest(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (UniGRFModel, UniGRFForCausalLM)
    model_split_percents = [0.5, 0.7, 0.8]

    def setUp(self):
        self.model_tester = UniGRFModelTester(self)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs_dict = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels and model_class is UniGRFForCausalLM:
            inputs_dict["labels"] = inputs_dict["input_ids"].clone()
        return inputs_dict

    def test_resize_tokens_embeddings(self):
        # The test ends with 4 tokens, fewer than the semantic-ID tokens.
        for model_class in (UniGRFModel, UniGRFForCausalLM):
            self.all_model_classes = (model_class,)
            with self.assertRaisesRegex(ValueError, r"at least.* 26 tokens .*got 4\b"):
                super().test_resize_tokens_embeddings()

    def test_base_model_prefix_loads_base_weights(self):
        # The test puts new heads and an unknown catalog on a backbone.
        with self.assertRaisesRegex(ValueError, "must have a whole generation_config.json"):
            super().test_base_model_prefix_loads_base_weights()

    def test_correct_missing_keys(self):
        # The same as above.
        with self.assertRaisesRegex(ValueError, "must have a whole generation_config.json"):
            super().test_correct_missing_keys()

    def test_model_weights_reload_no_missing_tied_weights(self):
        # The test loads a folder without weights.
        with self.assertRaisesRegex(ValueError, "must have all weights of its config.json"):
            super().test_model_weights_reload_no_missing_tied_weights()
