"""Branches: each is read as if it were alone behind its history, with every kind of attention."""

from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from helpers import BACKBONES, build_model, random_histories
from transformers.cache_utils import DynamicCache

from modeling_unigrf import UniGRFConfig, shared_prefix_unigrf
from modeling_unigrf.shared_prefix_unigrf import (
    Branches,
    read_branches,
    shared_prefix_attention,
    shares_prefix,
    sliding_window,
)


def states_of_branches(model, input_ids, mask, branches):
    """Return the states at the last tokens of `branches [B, N, s]`, by forwards over unpadded rows without a cache."""
    states = torch.empty(*branches.shape[:2], model.config.hidden_size)
    for row, (ids, row_mask) in enumerate(zip(input_ids, mask, strict=True)):
        for column, tokens in enumerate(branches[row]):
            with torch.no_grad():
                whole = torch.cat([ids[row_mask.bool()], tokens])[None]
                states[row, column] = model.model(whole).last_hidden_state[0, -1]
    return states


@pytest.mark.parametrize("kernel", ["shared", "shared in chunks", "packed", "eager"])
def test_a_tree_of_branches_is_read_as_each_path_alone(backbone, kernel, monkeypatch):
    if backbone == "hstu" and kernel != "eager":
        pytest.skip("HSTU has an attention of its own")
    model = build_model(backbone)
    model.set_attn_implementation("eager" if kernel == "eager" else "sdpa")
    model.model.hands_down_arguments = "shared" in kernel
    windowed = "sliding_window" in BACKBONES[backbone]
    if kernel == "shared in chunks":
        monkeypatch.setattr(shared_prefix_unigrf, "MAX_SCORES", 1)
    input_ids, mask, _ = random_histories(model, [1, 0] if windowed and "shared" in kernel else [5, 2])
    generator = torch.Generator().manual_seed(1)
    history_mask = mask.bool()
    cache = DynamicCache()
    with torch.no_grad():
        model.model(input_ids, mask, cache=cache, use_cache=True)
        tokens = torch.randint(4, model.config.vocab_size, (2, 3, 1), generator=generator)
        paths = tokens
        keys = torch.empty(2, 3, 0, dtype=torch.long)
        states, keys = read_branches(model.model, tokens, history_mask, keys, cache)
        for width, steps in ((5, 1), (4, 2)):  # random parents: some have several children, some have none
            parent = torch.randint(paths.shape[1], (2, width, 1), generator=generator)
            tokens = torch.randint(4, model.config.vocab_size, (2, width, steps), generator=generator)
            paths = torch.cat([paths.gather(1, parent.expand(-1, -1, paths.shape[2])), tokens], dim=2)
            keys = keys.gather(1, parent.expand(-1, -1, keys.shape[2]))
            states, keys = read_branches(model.model, tokens, history_mask, keys, cache)
    assert shares_prefix(model.model) == ("shared" in kernel), "the tested kernel was used"
    torch.testing.assert_close(
        states[:, :, -1], states_of_branches(model, input_ids, mask, paths), atol=2e-5, rtol=1e-4, check_stride=False
    )


def test_a_backbone_that_ignores_the_branches_is_detected(monkeypatch):
    model = build_model()
    backbone = model.model.language_model
    threads = ThreadPoolExecutor(1)
    concurrent = []
    forward = backbone.forward
    last = backbone.layers[1].forward

    def drop_branches(*args, branches=None, **kwargs):
        if branches is not None:  # while the check runs
            concurrent.append(threads.submit(shares_prefix, model.model))
            wait(concurrent, timeout=0.05)
        return forward(*args, **kwargs)

    def fail(*args, branches=None, **kwargs):
        return last(*args, **kwargs) if branches is None else 1 / 0

    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(backbone.layers[1], "forward", fail)
        shares_prefix(model.model)
    assert backbone.config._attn_implementation == "sdpa"
    monkeypatch.setattr(backbone, "forward", drop_branches)
    input_ids, mask, _ = random_histories(model, [4, 2])
    actual = model.recommend(input_ids, mask, num_beams=12)
    assert not shares_prefix(model.model) and not concurrent[0].result()
    assert backbone.config._attn_implementation == "sdpa"
    shared = build_model()
    torch.testing.assert_close(actual.scores, shared.recommend(input_ids, mask, num_beams=12).scores)
    assert shares_prefix(shared.model)


def test_sums_over_a_long_history_fit_into_a_float16():
    length = 2048
    count = 3
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, n, 8, generator=generator) for n in (count, length + count))
    query *= 0.01  # nearly equal attention weights
    value = 40.0 + torch.randn(key.shape, generator=generator)  # the sum of 2,048 exceeds 65,504
    own_keys = (length + torch.arange(count)).view(1, count, 1)
    states = [tensor.half() for tensor in (query, key, value)]
    history = torch.ones(1, length, dtype=torch.bool)
    actual, _ = shared_prefix_attention(None, *states, None, branches=Branches(history, own_keys))
    mask = torch.cat([history.expand(count, -1), torch.eye(count, dtype=torch.bool)], dim=1)
    expected = torch.nn.functional.scaled_dot_product_attention(*(tensor.float() for tensor in states), mask)
    torch.testing.assert_close(actual.float(), expected.transpose(1, 2), atol=0.05, rtol=1e-3)


def test_inference_does_not_change_later_training():
    model = build_model(negatives_per_item=0.5)
    input_ids, mask, _ = random_histories(model, [4, 2])
    labels = input_ids.masked_fill(mask == 0, -100)
    before = model(input_ids, mask, labels=labels).loss
    model.recommend(input_ids, mask, num_beams=12)
    assert shares_prefix(model.model)
    torch.testing.assert_close(model(input_ids, mask, labels=labels).loss, before)


def test_a_window_that_no_layer_uses_is_none():
    fields = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "num_hidden_layers": 2}
    assert sliding_window(UniGRFConfig(text_config={**fields, "max_window_layers": 1}).text_config) == 4
    assert sliding_window(UniGRFConfig(text_config={**fields, "max_window_layers": 28}).text_config) is None
