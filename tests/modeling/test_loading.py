"""A folder that is not whole does not load, and a whole one is readable by whoever may read its config."""

import json
import os
import shutil

import pytest
import torch
from helpers import build_model, random_histories, short_id
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, pipeline

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM
from tokenization import SemanticIdTokenizer

WEIGHTS = [
    "catalog.content_embeddings",
    "catalog.item_codes",
    "item_encoder.proj.bias",
    "item_encoder.table.weight",
    "lm_head.weight",
    "model.language_model.norm.weight",
    "ranking_head.out_proj.weight",
    "ranking_head.history_query.weight",
    "transitions.counts",
    "transitions.stand_ins",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a model that has transitions, and its tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    model = build_model()
    model.set_transitions([[1, 2, 3], [2, 4]], 3)
    model.generation_config.num_beams = 7
    model.save_pretrained(folder)
    codes = model.catalog.item_codes.numpy()
    tokenizer = SemanticIdTokenizer.from_codes(range(30), codes, model.config.codebook_sizes, ["dislike", "like"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of the whole folder."""
    return shutil.copytree(whole, tmp_path / "copy")


def change_weights(folder, change):
    """Write the weights of a folder after `change`, a function of their dict."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **fields):
    """Change fields of a folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_missing_weight_is_named(folder, name):
    change_weights(folder, lambda weights: weights.pop(name))
    for auto in (UniGRFForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=rf"must have all weights .* none for \['{name}'\]"):
            auto.from_pretrained(folder)
    if not name.startswith("model."):
        assert AutoModel.from_pretrained(folder) is not None


def test_a_backbone_alone_is_no_whole_model(folder, tmp_path):
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "backbone")
    assert AutoModel.from_pretrained(tmp_path / "backbone") is not None
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        UniGRFForCausalLM.from_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match=r"catalog\.item_codes"):
        UniGRFForCausalLM.from_pretrained(tmp_path / "backbone", generation_config=GenerationConfig())


def test_parts_that_a_changed_config_adds_start_fresh(folder, tmp_path):
    fields = {"num_retrieved_items": 2, "training_config": {"num_train_beams": 3, "negatives_per_item": None}}
    _, info = UniGRFForCausalLM.from_pretrained(folder, **fields, output_loading_info=True)
    assert info["missing_keys"] == {"candidate_block.segments.weight"}
    liked = UniGRFForCausalLM.from_pretrained(folder, ranking_targets=["like"], ignore_mismatched_sizes=True)
    assert liked.ranking_head.out_proj.out_features == 1
    liked.save_pretrained(tmp_path / "liked")
    again = UniGRFForCausalLM.from_pretrained(
        tmp_path / "liked", ranking_targets=["next"], rank_by_dense_score=True, ignore_mismatched_sizes=True
    )
    assert again.ranking_head.history_query is not None
    # With a config that says more than the weights have, the same part is lost.
    change_config(folder, **fields)
    with pytest.raises(ValueError, match="candidate_block"):
        UniGRFForCausalLM.from_pretrained(folder)


def test_tied_weights_are_not_missing(tmp_path):
    model = build_model(codebook_sizes=(40,), tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = UniGRFForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    change_weights(tmp_path, lambda weights: weights.pop("model.language_model.embed_tokens.weight"))
    with pytest.raises(ValueError, match="embed_tokens"):
        UniGRFForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [None, "", '{"num_beams": 7, "max_new', "[1]"], ids=short_id)
def test_a_missing_generation_config_is_not_filled_in(folder, content):
    file = folder / "generation_config.json"
    file.unlink() if content is None else file.write_text(content)
    for load in (UniGRFForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"must have a whole generation_config\.json, .* got none or a damaged"):
            load(folder)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        pipeline("recommendation", str(folder), trust_remote_code=True)
    chosen = UniGRFForCausalLM.from_pretrained(folder, generation_config=GenerationConfig(num_beams=5))
    assert chosen.serving_options().num_beams == 5
    assert AutoModel.from_pretrained(folder) is not None


@pytest.mark.parametrize("content", [None, "", '{"num_items": 3', "[1]"], ids=short_id)
def test_a_missing_or_damaged_config_is_named(folder, content):
    file = folder / "config.json"
    config = UniGRFConfig.from_pretrained(folder)
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ValueError, match=r"config\.json.*, got .*copy the whole folder"):
        UniGRFForCausalLM.from_pretrained(folder)
    if content is None:
        assert UniGRFForCausalLM.from_pretrained(folder, config=config).catalog.num_items == 30


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_other_shapes_are_an_error(folder, name):
    change_weights(folder, lambda weights: weights.update({name: weights[name][:-1].clone()}))
    with pytest.raises(ValueError, match=rf"{folder} must have weights of the shapes that its config describes"):
        UniGRFForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("is_int8", [True, False])
def test_int8_and_float_embeddings_are_not_mixed_up(folder, is_int8):
    if not is_int8:
        change_weights(
            folder, lambda weights: weights.update({WEIGHTS[0]: torch.full((30, 6), 127, dtype=torch.int8)})
        )
    with pytest.raises(ValueError, match=f"`int8_content_embeddings` must be {not is_int8} for the"):
        UniGRFForCausalLM.from_pretrained(folder, int8_content_embeddings=is_int8)
    change_config(folder, int8_content_embeddings=is_int8)
    with pytest.raises(ValueError, match=f"`int8_content_embeddings` must be {not is_int8} for the"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("size", [0, 4, 1000])
def test_truncated_weights_are_named(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    for auto in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file"):
            auto.from_pretrained(folder)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_saved_files_follow_the_umask(whole, tmp_path, umask):
    model = UniGRFForCausalLM.from_pretrained(whole)
    tokenizer = SemanticIdTokenizer.from_pretrained(whole)
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
        tokenizer.save_pretrained(tmp_path / "tokenizer")
    finally:
        os.umask(before)
    files = [*(tmp_path / "model").iterdir(), *(tmp_path / "tokenizer").iterdir()]
    assert len([path for path in files if path.suffix == ".safetensors"]) > 2
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "semantic_ids.safetensors", "items.json"])
def test_a_file_without_permission_says_so(folder, name, monkeypatch):
    # root may read all files.
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(name))
    with pytest.raises(ValueError, match=rf"permission.*{name}"):
        if name in ("items.json", "semantic_ids.safetensors"):
            SemanticIdTokenizer.from_pretrained(folder)
        UniGRFForCausalLM.from_pretrained(folder)


def test_a_loaded_model_recommends_as_the_saved_one(whole):
    model, loaded = (auto.from_pretrained(whole) for auto in (UniGRFForCausalLM, AutoModelForCausalLM))
    input_ids, mask, _ = random_histories(model, [4, 2])
    assert loaded.serving_options().num_beams == 7
    assert torch.equal(loaded.recommend(input_ids, mask).scores, model.recommend(input_ids, mask).scores)
