"""Adapters: recipes.train --lora, and every command that takes a checkpoint, on the folder of an adapter."""

import itertools
import json
import shutil

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from helpers import GRID, build_model, long_histories, random_histories, run_elsewhere, short_id, train_flags
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from modeling_unigrf import UniGRFForCausalLM
from recipes import push_to_hub, recommend, show, train
from recipes.evaluate import EvaluateArguments, evaluate_checkpoint
from recipes.evaluation.inference import load_checkpoint
from recipes.prepare import PrepareArguments, prepare
from recipes.push_to_hub import PushArguments, push
from recipes.refresh import RefreshArguments, refresh
from recipes.training.lora import add_adapter, save_adapter

SHORT = ("--max_items=6", "--max_steps=3", "--learning_rate=0.02", "--per_device_train_batch_size=16")
REQUEST = {"items": ["i1", "i2"], "behaviors": ["like", "like"]}


def trained(prepared, folder, *flags):
    """Train for three steps and return the folder of the model."""
    return train.train(*train.parse(train_flags(prepared, folder, *SHORT, *flags)))


@pytest.fixture(scope="module")
def base(prepared, tmp_path_factory):
    """A checkpoint."""
    return trained(prepared, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(prepared, base, tmp_path_factory):
    """An adapter with other options of serving, another sampling bias and other transitions than its base."""
    options = ["--negatives_per_item=0.5", "--num_transitions=7", "--logging_steps=1", '--lora={"r": 2}']
    folder = tmp_path_factory.mktemp("adapter")
    return trained(prepared, folder, f"--init_from={base}", *options, "--max_items=5")


def test_an_adapter_has_all_that_its_model_had(base, adapter, tmp_path):
    names = {file.name for file in adapter.iterdir()}
    assert "config.json" not in names and "model.safetensors" not in names and "README.md" not in names
    assert (adapter / "adapter_model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size / 10
    log = json.loads((adapter / "training_log.json").read_text())["log_history"]
    assert {"loss", "generation_loss", "ranking_loss", "dense_loss"} <= set(log[0])

    model = UniGRFForCausalLM.from_pretrained(adapter)
    of_base = UniGRFForCausalLM.from_pretrained(base)
    assert of_base.config.next_logit_bias > model.config.next_logit_bias > 0
    assert model.config.training_config.negatives_per_item == 0.5
    assert model.config.num_transitions == model.transitions.neighbors.shape[1] == 7
    assert model.generation_config.max_items == 5 and of_base.generation_config.max_items == 6
    expected = of_base.state_dict()
    differs = {name for name, value in model.state_dict().items() if not torch.equal(value, expected[name])}
    layer = "model.language_model.layers.0.self_attn"
    assert {name for name in differs if "transitions" not in name} == {f"{layer}.{name}_proj.weight" for name in "qv"}

    recommender = pipeline("recommendation", model=str(adapter), trust_remote_code=True)
    history = recommender.tokenizer.encode_history(*REQUEST.values(), return_tensors="pt")
    scores = model.recommend(**history).scores
    for again in (recommender.model, AutoModelForCausalLM.from_pretrained(adapter), load_checkpoint(adapter)[0]):
        torch.testing.assert_close(again.recommend(**history).scores, scores)
        assert again.config.next_logit_bias == model.config.next_logit_bias
    assert [item["score"] for item in recommender(REQUEST)] == pytest.approx(scores[0].tolist(), abs=1e-5)
    assert AutoTokenizer.from_pretrained(adapter, trust_remote_code=True).titles[3] == "Film 3"
    assert UniGRFForCausalLM.from_pretrained(adapter, ranking_dropout=0.4).config.ranking_dropout == 0.4
    assert AutoModelForCausalLM.from_pretrained(adapter, ranking_dropout=0.4).config.ranking_dropout == 0.4
    assert {p.dtype for p in UniGRFForCausalLM.from_pretrained(adapter, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }
    # A plain model: it saves as a whole checkpoint.
    recommender.save_pretrained(tmp_path)
    again = UniGRFForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again.recommend(**history).scores, scores)
    written = {"_name_or_path": 0, "architectures": 0}
    assert again.config.to_dict() | written == model.config.to_dict() | written


LORA = [
    {},
    {"modules_to_save": "all"},
    {"modules_to_save": ["candidate_block"]},
    {"bias": "all"},
    {"use_dora": True},
    {"trainable_token_indices": [3, 4]},
    {"target_modules": "all-linear"},
]


@pytest.mark.parametrize("options", LORA, ids=short_id)
@pytest.mark.parametrize("name", ["llama", "gpt2", "hstu"])
def test_a_loaded_adapter_scores_as_the_trained_model(tmp_path, name, options):
    base = tmp_path / "base"
    shape = {"codebook_sizes": (4, 3, 2), "num_items": 12, "history_item_representations": True}
    build_model(name, **shape).save_pretrained(base)
    num_retrieved = 2 if "candidate_block" in options.get("modules_to_save", ()) else 0
    model = UniGRFForCausalLM.from_pretrained(base, num_retrieved_items=num_retrieved)
    model.set_transitions([[1, 2, 3], [2, 3, 4, 5]], 5)
    targets = {"llama": ["o_proj"], "gpt2": ["c_attn"], "hstu": ["uvqk_proj"]}
    options = {"r": 2, "target_modules": targets[name], **options}
    if options.get("modules_to_save") == "all":
        options["modules_to_save"] = model.modules_to_save
    if "trainable_token_indices" in options:
        options["trainable_token_indices"] = {model.modules_to_save[2]: [3, 4]}
    adapted = add_adapter(model, json.dumps(options), str(base)).eval()
    input_ids, mask, _ = random_histories(model, [3, 2])
    inputs = {"input_ids": input_ids, "attention_mask": mask, "transition_weight": 1.0}
    inputs |= long_histories(model, [3, 4]) if num_retrieved else {}
    before = model.recommend(**inputs).scores
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = model.recommend(**inputs)
    assert (expected.scores - before).abs().max() > 0.01
    save_adapter(adapted, str(base), tmp_path / "adapter")
    loaded = UniGRFForCausalLM.from_pretrained(tmp_path / "adapter").recommend(**inputs)
    torch.testing.assert_close(loaded.scores, expected.scores, atol=1e-4, rtol=1e-4)
    assert torch.equal(loaded.item_indices, expected.item_indices)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (['--lora={"r": 2}'], "`lora` must come with init_from"),
        (["--lora=[8]", "BASE"], "`lora` must be a JSON object"),
        (['--lora={"rank": 2}', "BASE"], r"`lora` must have names among .* got \['rank'\]"),
        (['--lora={"r": 0}', "BASE"], "`lora` must be a peft.LoraConfig that fits"),
        (['--lora={"target_modules": ["nope"]}', "BASE"], r"has the layers \['down_proj'"),
        (['--lora={"inference_mode": true}', "BASE"], "`lora` must train some weights"),
        (['--lora={"init_lora_weights": "pissa"}', "BASE"], "`lora` must leave the weights of `init_from`"),
        (['--lora={"r": 2}', "--freeze_base_model", "BASE"], "`lora` must not be set together with freeze_base_model"),
        (['--lora={"r": 2}', "--num_retrieved_items=2", "BASE"], r"got \['candidate_block.*Name new parts in modules"),
        (["--init_from=ADAPTER"], "`init_from` must be a whole checkpoint, got the adapter"),
    ],
    ids=short_id,
)
def test_an_adapter_that_would_lose_weights_is_rejected(prepared, base, adapter, tmp_path, flags, message):
    flags = [flag.replace("BASE", f"--init_from={base}").replace("ADAPTER", str(adapter)) for flag in flags]
    with pytest.raises(ValueError, match=message):
        trained(prepared, tmp_path, *flags)
    assert not (tmp_path / "checkpoint").is_dir() or not any((tmp_path / "checkpoint").iterdir())


def test_an_adapter_takes_no_new_items(prepared, base, tmp_path):
    tables = {name: str(tmp_path / f"{name}.parquet") for name in ("interactions", "items")}
    interactions, items = (pd.read_parquet(prepared.parent / f"{name}.parquet") for name in tables)
    pd.concat([items, items.iloc[[0]].assign(item_id="new")]).to_parquet(tables["items"])
    interactions.to_parquet(tables["interactions"])
    newer = prepare(PrepareArguments(**tables, output_dir=str(tmp_path / "newer"), tokenizer=str(base)))
    with pytest.raises(ValueError, match="keep the items of the base"):
        trained(newer, tmp_path / "run", f"--init_from={base}", '--lora={"r": 2}')


def test_tied_embeddings_are_not_trained_apart(prepared, tmp_path):
    base = trained(prepared, tmp_path / "base", "--tie_word_embeddings=True")
    for field, name in itertools.product(("modules_to_save", "target_modules"), ("lm_head", "embed_tokens")):
        lora = json.dumps({"r": 2, field: [name]})
        with pytest.raises(ValueError, match="`lora` must leave tied embeddings alone"):
            trained(prepared, tmp_path / "run", f"--init_from={base}", f"--lora={lora}")
    whole = trained(prepared, tmp_path / "run", f"--init_from={base}", '--lora={"r": 2}')
    model = UniGRFForCausalLM.from_pretrained(whole)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_every_recipe_takes_an_adapter(prepared, base, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recipes.evaluation.baselines.GRID", GRID)
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    options = {"num_beams": [10], "list_length": 10, "ranking_weights": [0.5], "store": True}
    paths = {"checkpoint": str(folder), "data_dir": str(prepared), "output_dir": str(tmp_path / "out")}
    metrics = evaluate_checkpoint(EvaluateArguments(**paths, **options))
    assert metrics["protocol"]["history"] == "the last 5 items"
    model, _ = load_checkpoint(folder)
    assert model.generation_config.num_beams == 10 and model.generation_config.ranking_weight == 0.5
    show.main(show.ShowArguments(str(folder), str(prepared), users=1))
    assert "score = " in capsys.readouterr().out

    pd.DataFrame({"user_id": ["u"], **{k: [v] for k, v in REQUEST.items()}}).to_parquet(tmp_path / "histories.parquet")
    lists = recommend.RecommendArguments(str(folder), str(tmp_path / "histories.parquet"), str(tmp_path / "lists"))
    recommend.main(lists, recommend.RecommendSettings())
    (file,) = (tmp_path / "lists").glob("*.parquet")
    recommended = pq.read_table(file)["item_ids"].to_pylist()[0]
    recommender = pipeline("recommendation", model=str(folder), trust_remote_code=True)
    assert recommended == [item["item_id"] for item in recommender(REQUEST)]

    refreshed, _ = load_checkpoint(refresh(RefreshArguments(str(folder), str(prepared), str(tmp_path / "refreshed"))))
    assert refreshed.transitions.item_counts.sum() > model.transitions.item_counts.sum()
    assert torch.equal(refreshed.lm_head.weight, model.lm_head.weight)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before, "the base stays as it is"

    # The base on the Hub, as its cache has it.
    push_to_hub_of = {"metrics": str(tmp_path / "out" / "metrics.json"), "repo_id": "me/market", "dry_run": True}
    arguments = PushArguments(str(folder), **push_to_hub_of, output_dir=str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="`base_repo_id` must be the Hub repository of the adapter's base"):
        push(arguments)
    cache = tmp_path / "cache" / "models--me--base"
    shutil.copytree(base, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    arguments.base_repo_id = "me/base"
    push(arguments)
    files = {file.name: file for file in (tmp_path / "hub").iterdir()}
    assert "config.json" not in files and "model.safetensors" not in files
    assert json.loads(files["adapter_config.json"].read_text())["base_model_name_or_path"] == "me/base"
    assert "base_model: me/base" in files["README.md"].read_text()
    assert not any(str(base).encode() in file.read_bytes() for file in files.values())
    arguments.checkpoint, arguments.output_dir = str(base), str(tmp_path / "other")
    with pytest.raises(ValueError, match="`base_repo_id` must be left out for a whole checkpoint"):
        push(arguments)


def test_a_folder_that_peft_saved_loads_too(base, tmp_path):
    adapted = get_peft_model(
        UniGRFForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    model, tokenizer = load_checkpoint(tmp_path)
    history = tokenizer.encode_history(*REQUEST.values(), return_tensors="pt")
    expected = adapted.get_base_model().eval().recommend(**history).scores
    torch.testing.assert_close(model.recommend(**history).scores, expected, atol=1e-4, rtol=1e-4)
    assert model.generation_config.max_items == 6, "the base's"


def damage(folder, base, kind):
    """Damage an adapter, or change its base."""
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    config = json.loads((folder / "adapter_config.json").read_text())
    if kind == "base":
        other = load_file(base / "model.safetensors")
        other["lm_head.weight"] += 1e-3
        save_file(other, base / "model.safetensors", {"format": "pt"})
    elif kind == "no base":
        config["base_model_name_or_path"] = str(base / "nowhere")
    elif kind == "rank":
        config["r"] = 4
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif kind == "fewer":
        tensors.popitem()
        save_file(tensors, weights)
    elif kind == "more":
        save_file(tensors | {"base_model.model.other": torch.zeros(1)}, weights)
    elif kind == "record":
        (folder / "unigrf_adapter.json").write_text("{")
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("load", [UniGRFForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("base", "must be the checkpoint that the adapter was trained on, got other weights"),
        ("no base", "base_model_name_or_path|nowhere"),
        ("rank", "must fit its base"),
        ("truncated", "must have a whole adapter_model.safetensors"),
        ("fewer", "must have the weights that adapter_config.json names, got more or fewer"),
        ("more", "must have the weights that adapter_config.json names, got more or fewer"),
        ("record", "must have a whole adapter_model.safetensors, and a whole unigrf_adapter.json"),
    ],
)
def test_an_adapter_with_another_base_is_rejected(base, adapter, tmp_path, load, kind, message):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    load(folder)
    damage(folder, tmp_path / "base", kind)
    with pytest.raises((ValueError, OSError), match=message):
        load(folder)


LOAD = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "peft" else find_spec(name, *rest)
sys.modules["peft"] = None
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).from_pretrained(sys.argv[2])
except ValueError as error:
    print(error)
"""


def test_a_whole_checkpoint_needs_no_peft(base, adapter, tmp_path):
    (message,) = run_elsewhere(LOAD, str(base), str(adapter), folder=tmp_path)
    assert "must be a whole checkpoint where PEFT is not installed" in message


@pytest.mark.parametrize("lora", [None, '{"r": 2}'])
def test_a_training_killed_at_its_end_keeps_its_bias(prepared, base, tmp_path, monkeypatch, lora):
    flags = ["--save_strategy=steps", "--save_steps=1", "--negatives_per_item=0.5", f"--init_from={base}"]
    flags += [] if lora is None else [f"--lora={lora}"]
    whole = trained(prepared, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        patch.setattr("recipes.training.run.TrainingRun.write_log", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            trained(prepared, tmp_path / "resumed", *flags)
    last = tmp_path / "resumed" / "checkpoint-3"
    for step in ("the end", "a step before"):
        if step != "the end":
            shutil.rmtree(last)
        shutil.rmtree(tmp_path / "resumed" / "checkpoint")
        again = trained(prepared, tmp_path / "resumed", *flags)
        models = [UniGRFForCausalLM.from_pretrained(folder) for folder in (whole, again)]
        assert models[0].config.next_logit_bias == models[1].config.next_logit_bias > 0, step
        for (name, first), second in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(first, second, msg=f"{step}: {name}")


def test_two_markets_share_one_base(base, adapter, prepared, tmp_path):
    other = trained(prepared, tmp_path, f"--init_from={base}", '--lora={"r": 2}', "--num_transitions=0", "--seed=1")
    assert not (other / "unigrf_transitions.safetensors").exists(), "the base has the table"
    shared = UniGRFForCausalLM.from_pretrained(base)
    market = PeftModel.from_pretrained(shared, other)
    expected = UniGRFForCausalLM.from_pretrained(other)
    input_ids, mask, _ = random_histories(expected, [3, 2])
    torch.testing.assert_close(
        market(input_ids=input_ids, attention_mask=mask).logits, expected(input_ids, mask).logits, atol=1e-4, rtol=1e-4
    )
    assert push_to_hub.find_adapter(base, {}) is None
