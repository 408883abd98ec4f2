"""The model where other tools hold its weights or its code: offloaded to CPU or disk, compiled, exported."""

import accelerate
import pytest
import torch
from helpers import build_model, labeled_batch, long_histories, random_histories

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM

WHOLE = {
    "num_retrieved_items": 3,
    "num_train_beams": 4,
    "history_item_representations": True,
    "tie_word_embeddings": True,
}
ATOMIC_COSINE = {"codebook_sizes": (40,), "code_similarity": "cosine", "code_negatives": 5}
RAGGED = [5, 2]


def answers(model):
    """Call everything that reads weights."""
    input_ids, mask, _ = random_histories(model, RAGGED)
    longer = long_histories(model, [12, 2]) if model.config.num_retrieved_items else {}
    inputs = {"attention_mask": mask, "num_beams": 5, "num_return_sequences": 5}
    items = torch.arange(model.catalog.num_items).expand(2, -1)
    recommended = model.recommend(input_ids, num_dense_candidates=5, dense_weight=1.0, **inputs, **longer)
    generated = model.generate(input_ids, return_dict_in_generate=True, output_scores=True, **inputs)
    torch.manual_seed(0)
    with torch.no_grad():
        loss = model(**labeled_batch(model, RAGGED)[0], **longer).loss
    return {
        **recommended,
        "ranking_logits": model.rank(input_ids, mask, items, **longer),
        "sequences": generated.sequences,
        "sequences_scores": generated.sequences_scores,
        "loss": loss,
    }


def offload(model, place, folder):
    """Move the weights of a model to a place, from where each layer fetches its own."""
    if place == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if place == "disk":
        return accelerate.disk_offload(model, folder, execution_device="cpu")
    # transformers itself needs tied weights, those of the first two, in one place.
    devices = {name: ("disk", "cpu")[number // 2 % 2] for number, (name, _) in enumerate(model.named_children())}
    if place == "dispatched":
        return accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=folder, force_hooks=True)
    model.save_pretrained(folder / "saved")
    return UniGRFForCausalLM.from_pretrained(folder / "saved", device_map=devices, offload_folder=folder).eval()


@pytest.mark.parametrize("place", ["cpu", "disk", "dispatched", "device_map"])
@pytest.mark.parametrize("options", [WHOLE, ATOMIC_COSINE], ids=["whole", "atomic"])
@pytest.mark.parametrize("backbone", ["llama", "hstu"])
def test_offloaded_equals_in_memory(backbone, options, place, tmp_path):
    model = build_model(backbone, **options)
    expected = answers(model)
    for name, value in answers(offload(model, place, tmp_path)).items():
        torch.testing.assert_close(
            value, expected[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: name + text
        )


def test_what_offloading_would_undo_is_rejected():
    model = accelerate.cpu_offload(build_model(), execution_device="cpu")
    codes = build_model().catalog.item_codes
    with pytest.raises(ValueError, match="must change while all weights are in memory"):
        model.set_catalog(codes[:20], torch.zeros(20, 6))
    with pytest.raises(ValueError, match="must change while all weights are in memory"):
        model.add_items(torch.tensor([[0, 0, 0, 2]]), torch.zeros(1, 6))
    assert model.config.num_items == 30
    model = accelerate.cpu_offload(build_model(), execution_device="cpu", offload_buffers=True)
    with pytest.raises(ValueError, match="buffers must be in memory"):
        model.recommend(*random_histories(build_model(), RAGGED)[:2])


@pytest.mark.parametrize("options", [{}, {"code_temperature": 0.5}], ids=["plain", "temperature"])
def test_a_resized_head_is_read_in_its_forward(options):
    model = build_model(**options)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    expected = answers(model)
    actual = answers(accelerate.cpu_offload(model, execution_device="cpu"))
    torch.testing.assert_close(actual["scores"], expected["scores"])


TRACED = {"history_item_representations": True, "num_transitions": 5}


def traced_inputs(model, lengths):
    """Make ragged histories, with times if the backbone reads them."""
    input_ids, mask, _ = random_histories(model, lengths)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if model.config.reads_times:
        inputs["timestamps"] = 1000 * torch.arange(input_ids.shape[1]).expand(len(lengths), -1)
    return inputs


@pytest.mark.parametrize("tool", ["compile", "export"])
@pytest.mark.parametrize("backbone", ["llama", "gpt2", "qwen3", "hstu"])
def test_compiled_and_exported_equal_eager(backbone, tool, tmp_path):
    build_model(backbone, **TRACED).save_pretrained(tmp_path)
    model = UniGRFForCausalLM.from_pretrained(tmp_path).eval()  # its first forward is traced
    first = traced_inputs(model, [4, 2])
    torch.compiler.reset()
    with torch.no_grad():
        if tool == "compile":
            traced = torch.compile(model, fullgraph=True, backend="eager")
        else:
            batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
            shapes = {name: {0: batch, 1: length} for name in first}
            traced = torch.export.export(model, (), first, dynamic_shapes=shapes).module()
        for lengths in ([4, 2], [3, 0, 6], [9] * 5):
            inputs = traced_inputs(model, lengths)
            torch.testing.assert_close(traced(**inputs).logits, model(**inputs).logits, atol=2e-5, rtol=1e-4)


def test_a_compiled_model_follows_its_catalog():
    model = build_model(**TRACED)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = traced_inputs(model, [4, 2])
    with torch.no_grad():
        before = compiled(**inputs).logits
        model.set_catalog(model.catalog.item_codes.roll(1, dims=0), model.catalog.content_embeddings)
        after = compiled(**inputs).logits
        torch.testing.assert_close(after, model(**inputs).logits)
    assert not torch.allclose(before, after, atol=0.01)


def test_tracing_without_a_trie_is_reported():
    config = UniGRFConfig(codebook_sizes=[4, 3, 3, 2], behaviors=["dislike", "like"], num_items=30)
    model = UniGRFForCausalLM(config).eval()
    with pytest.raises(Exception, match="trie must exist before the model is compiled"):
        torch.export.export(model, (), traced_inputs(build_model(), [4, 2]))
