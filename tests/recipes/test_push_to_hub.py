"""recipes.push_to_hub: the repository works by itself, its card has the metrics, and invalid pushes are rejected."""

import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import HISTORY, ROOT, SHORT_HISTORY, approximately, run_elsewhere
from huggingface_hub import ModelCard
from transformers import HfArgumentParser

from modeling_unigrf import RecommendationPipeline, UniGRFForCausalLM, UniGRFModel
from recipes import push_to_hub
from recipes.push_to_hub import PushArguments, check_files, check_loading, push
from recipes.recommend import weights_hash
from tokenization import SemanticIdTokenizer

REPO_ID = "someone/films"
COMMIT = "0123456789" * 4


def random_metrics(seed):
    """Draw the metrics of a method."""
    values = np.random.default_rng(seed).random(5).tolist()
    return dict(zip(("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr"), values, strict=True))


METRICS = {
    "protocol": {"split": "leave-one-out", "users": 943, "seed": 0},
    "selection": {"chosen on": "validation, ranked ndcg@10", "num_beams": 10, "ranking_weight": 1.0, "tried": []},
    "baselines": {"popularity": random_metrics(1), "item_knn": random_metrics(2)},
    "generation": random_metrics(3),
    "ranked": random_metrics(4),
    "ranking": {"auc": 0.8125, "share_of_likes": 0.55, "interactions": 943},
    "invalid_items": 0,
    "generated_items_checked": 9430,
    "seconds": {"train": 61.5},
}


@pytest.fixture(scope="module")
def run(recommender, tmp_path_factory):
    """The output of a training: checkpoint, metrics and pictures, with files that must not be uploaded."""
    run = tmp_path_factory.mktemp("run")
    recommender.save_pretrained(run / "checkpoint")
    (run / "checkpoint" / "training_args.bin").write_bytes(b"a pickle")
    (run / "checkpoint" / "training_log.json").write_text('{"metrics": {"train_loss": 1.25}, "log_history": []}')
    METRICS["weights"] = weights_hash(recommender.model)
    (run / "metrics.json").write_text(json.dumps(METRICS))
    (run / "recall_at_k.png").write_bytes(b"a picture")
    (run / "private.png").write_bytes(b"no part of the report")
    return run


@pytest.fixture(scope="module")
def repository(run):
    """The folder that a dry run writes and checks, and does not upload."""
    folder = run / "hub"
    push(arguments(run, dry_run=True, output_dir=str(folder)))
    return folder


class RecordingApi:
    """Records the calls that would go to the Hub."""

    calls: list = []

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create_repo", repo_id, kwargs))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, folder_path, **kwargs):
        self.calls.append(("upload_folder", sorted(path.name for path in Path(folder_path).iterdir()), kwargs))


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """The recorded calls of the Hub."""
    monkeypatch.setattr(RecordingApi, "calls", [])
    monkeypatch.setattr(push_to_hub, "HfApi", RecordingApi)
    return RecordingApi.calls


def arguments(run, **changes):
    """Make the arguments of a push."""
    paths = {"checkpoint": str(run / "checkpoint"), "metrics": str(run / "metrics.json")}
    return PushArguments(**{**paths, "repo_id": REPO_ID, "dataset_name": "Films of 1998", **changes})


LOAD_AND_RUN = """
import re
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

requests, results = json.loads(sys.argv[1]), []
for name, again in (("repository", "from_folder"), ("someone/films", "from_hub")):
    config, backbone, model, tokenizer = (
        auto.from_pretrained(name, trust_remote_code=True)
        for auto in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer)
    )
    recommender = pipeline("recommendation", model=name, trust_remote_code=True)
    parts = (config, backbone, model, tokenizer, recommender, recommender.model, recommender.tokenizer)
    inputs = tokenizer.encode_history(requests[0]["items"], requests[0]["behaviors"], return_tensors="pt")
    with torch.no_grad():
        added = model.scorer.history_representations(inputs["input_ids"])
        results.append({
            "parts": [f"{type(part).__module__.split('.')[0]}.{type(part).__name__}" for part in parts],
            "states": backbone(**inputs, item_representations=added).last_hidden_state.tolist(),
            "logits": model(**inputs).logits.tolist(),
            "recommended": recommender(requests),
        })
    recommender.save_pretrained(again)
    backbone.save_pretrained(again + "_backbone")
for snippet in re.findall("```python\\n(.*?)```", open("repository/README.md", encoding="utf-8").read(), re.DOTALL):
    exec(snippet)
print(json.dumps(results))
"""


def test_the_repository_alone_works_and_saves_the_same_again(recommender, repository, tmp_path):
    shutil.copytree(repository, tmp_path / "repository")
    cache = tmp_path / "home" / "hub" / "models--someone--films"
    shutil.copytree(repository, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    tokenizer = recommender.tokenizer
    *printed, last = run_elsewhere(LOAD_AND_RUN, json.dumps([HISTORY, SHORT_HISTORY]), folder=tmp_path)
    # The two snippets of the card agree on the first film.
    assert printed[0].rpartition(" ")[0] in {
        f"{i} {t}" for i, t in zip(tokenizer.item_ids, tokenizer.titles, strict=True)
    }
    assert len(printed) == 12 and printed[10].startswith(f"['{printed[0].partition(' Title')[0]}'")

    inputs = recommender.tokenizer.encode_history(*HISTORY.values(), return_tensors="pt")
    with torch.no_grad():
        logits = recommender.model(**inputs).logits
        added = recommender.model.scorer.history_representations(inputs["input_ids"])
        states = recommender.model.model(**inputs, item_representations=added).last_hidden_state
    classes = ["UniGRFConfig", "UniGRFModel", "UniGRFForCausalLM", "SemanticIdTokenizer", "RecommendationPipeline"]
    expected = [approximately(row) for row in recommender([HISTORY, SHORT_HISTORY])]
    for loaded in json.loads(last):
        assert loaded["parts"] == [f"transformers_modules.{name}" for name in (*classes, classes[2], classes[3])]
        torch.testing.assert_close(torch.tensor(loaded["logits"]), logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(loaded["states"]), states, rtol=0, atol=1e-6)
        assert loaded["recommended"] == expected

    for source in ("from_folder", "from_hub"):
        folder = tmp_path / source
        again = RecommendationPipeline(
            model=UniGRFForCausalLM.from_pretrained(folder), tokenizer=SemanticIdTokenizer.from_pretrained(folder)
        )
        backbone = UniGRFModel.from_pretrained(tmp_path / f"{source}_backbone")
        with torch.no_grad():
            assert torch.equal(again.model(**inputs).logits, logits)
            assert torch.equal(backbone(**inputs, item_representations=added).last_hidden_state, states)
        assert [approximately(row) for row in again([HISTORY, SHORT_HISTORY])] == expected
        config = json.loads((folder / "config.json").read_text())
        # The saved folder refers to its own code, not to that of the repository.
        assert config == json.loads((repository / "config.json").read_text())
        code = {path.name for path in repository.glob("*.py")}
        assert {path.name for path in folder.glob("*.py")} == code


def test_the_repository_holds_every_part_and_no_pickle(repository, run, hub):
    names = {path.name for path in repository.iterdir()}
    code = {path.name for package in ("modeling_unigrf", "tokenization") for path in (ROOT / package).glob("*.py")}
    assert names == (code - {"__init__.py"}) | {
        "README.md",
        "config.json",
        "generation_config.json",
        "items.json",
        "metrics.json",
        "model.safetensors",
        "recall_at_k.png",
        "semantic_ids.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.json",
    }
    assert hub == [], "a dry run uploads nothing"
    for path in repository.iterdir():
        assert str(run).encode() not in path.read_bytes(), f"{path.name} names a folder of this machine"
    (run / "extra").mkdir()
    (run / "extra" / "training_args.bin").touch()
    with pytest.raises(ValueError, match=r"got \['training_args.bin'\]"):
        check_files(run / "extra")


def test_the_card_states_the_metrics_in_metadata_and_text(repository, recommender):
    card = ModelCard.load(repository / "README.md")
    data = card.data
    metadata = data.to_dict()
    assert tuple(metadata[name] for name in ("library_name", "license", "pipeline_tag")) == (
        "transformers",
        "apache-2.0",
        "other",
    )
    assert {"recommendation", "recommender-system", "generative-retrieval", "semantic-ids", "ranking"} <= {*data.tags}
    assert data.model_name == "films" and data.datasets == ["Films-of-1998"]
    values = {(entry.task_type, entry.metric_name): entry.metric_value for entry in data.eval_results}
    expected = {("recommendation", f"{k}, by score"): v for k, v in METRICS["ranked"].items()}
    expected |= {("recommendation", f"{k}, by generation_score"): v for k, v in METRICS["generation"].items()}
    assert values == expected | {("ranking", "AUC"): 0.8125}
    index = data.to_dict()["model-index"][0]
    assert index["name"] == "films" and len(index["results"]) == 2
    for entry in index["results"]:
        assert entry["dataset"] == {"name": "Films of 1998", "type": "Films-of-1998", "split": "test"}
        assert entry["task"]["type"] and all({"type", "name", "value"} <= set(metric) for metric in entry["metrics"])

    for row in (*METRICS["baselines"].values(), METRICS["generation"], METRICS["ranked"]):
        assert " | ".join(f"{value:.4f}" for value in row.values()) in card.text.replace("**", "")
    provenance = recommender.tokenizer.provenance
    for text in (
        "0.8125",
        "9,430",
        "leave-one-out",
        provenance["sha256"],
        "c0ffee",
        "2504.16454",
        "2604.25787",
        "1.25",
    ):
        assert text in card.text
    # Jinja prints nothing for a field that the config does not have.
    assert re.search(r"One llama backbone of 2 layers, width 32 and 4 heads\n\([\d,]+ parameters", card.text)
    assert re.search(r"\| ranking: .* \"next\", \"dislike\", \"like\" \| 1 \|", card.text)
    assert "\n| dense: softmax over items, for `dense_score` | 1 |\n" in card.text
    assert "\nRanking learns from 0.1 random negatives for each supervised item.\n" in card.text
    assert "![Recall@K of every method](recall_at_k.png)" in card.text and "codebooks.png" not in card.text
    assert not re.search(r"\{\{|\{%|Undefined|None\b|\n\n\n", card.text)


def test_a_folder_is_uploaded_in_one_commit_after_it_loaded(run, hub, monkeypatch):
    monkeypatch.setattr(push_to_hub, "check_loading", lambda *_: hub.append("loaded"))
    push(arguments(run, private=True))
    loaded, created, uploaded = hub
    assert loaded == "loaded" and created == ("create_repo", REPO_ID, {"private": True, "exist_ok": True})
    assert uploaded[0] == "upload_folder" and uploaded[2]["repo_id"] == REPO_ID
    assert {"README.md", "model.safetensors", "metrics.json", "pipeline_unigrf.py"} <= set(uploaded[1])


def test_a_folder_that_does_not_load_is_not_uploaded(run, hub, monkeypatch):
    monkeypatch.setattr(push_to_hub, "check_files", lambda folder: (folder / "trie_unigrf.py").unlink())
    with pytest.raises(ValueError, match=r"(?s)got .*trie_unigrf.*nothing was uploaded"):
        push(arguments(run))
    assert hub == []


@pytest.mark.parametrize(("loaded", "expected"), [("NaN", 1.0), ("1.0", float("nan")), ("NaN", float("nan"))])
def test_scores_of_nan_are_not_uploaded(tmp_path, monkeypatch, loaded, expected):
    process = SimpleNamespace(returncode=0, stdout=f'[{{"score": {loaded}}}]')
    monkeypatch.setattr(push_to_hub.subprocess, "run", lambda *_, **__: process)
    with pytest.raises(ValueError, match="must recommend with the checkpoint's scores"):
        check_loading(tmp_path, lambda *_, **__: [{"score": expected}], HISTORY)


def test_an_invalid_push_is_rejected_before_writing(run, hub, tmp_path):
    def check_rejected(message, **changes):
        with pytest.raises(ValueError, match=message):
            push(arguments(run, **{"dry_run": True, "output_dir": str(tmp_path / "out"), **changes}))
        assert not (tmp_path / "out").exists() and hub == []

    def metrics_with(**changes):
        file = tmp_path / "changed.json"
        metrics = {name: value for name, value in (METRICS | changes).items() if value is not None}
        file.write_text(json.dumps(metrics))
        return str(file)

    check_rejected("`checkpoint` must be a local folder with config.json", checkpoint=str(tmp_path / "nowhere"))
    check_rejected("`checkpoint` must be a local folder with config.json", checkpoint=str(run))
    check_rejected("got no file at", metrics=str(tmp_path / "nowhere.json"))
    check_rejected(r"without \['ranked', 'ranking'\]", metrics=metrics_with(ranked=None, ranking=None))
    check_rejected(
        r"without \['generation.mrr'\]",
        metrics=metrics_with(generation={"recall@5": 0.1, "recall@10": 0.2, "ndcg@5": 0.1, "ndcg@10": 0.1}),
    )
    check_rejected(
        "metrics of this checkpoint", metrics=metrics_with(selection={"num_beams": 50, "ranking_weight": 1.0})
    )
    check_rejected(
        "and {'dense_weight': 0.0} in", metrics=metrics_with(selection=METRICS["selection"] | {"dense_weight": 2.0})
    )
    check_rejected("those of other weights", metrics=metrics_with(weights="0" * 64))
    check_rejected("Repo id", repo_id="a folder/name/of three")
    check_rejected("`output_dir` must be set", output_dir=None)
    with pytest.raises(ValueError, match="a new or empty folder"):
        push(arguments(run, dry_run=True, output_dir=str(run)))


HOSTILE = "<script>alert(1)</script> | [x](https://evil.example) ![y](z) `code`\n# Heading <img src=x onerror=y>"


def test_names_reach_the_card_as_plain_text(recommender, tmp_path, monkeypatch):
    tokenizer = copy.deepcopy(recommender.tokenizer)
    tokenizer.provenance.update({"encoder": HOSTILE, HOSTILE: "value", "inputs": {HOSTILE: HOSTILE}})
    model = copy.deepcopy(recommender.model)
    RecommendationPipeline(model=model, tokenizer=tokenizer).save_pretrained(tmp_path / "checkpoint")
    metrics = METRICS | {
        "weights": weights_hash(model),
        "protocol": {HOSTILE: HOSTILE},
        "baselines": {HOSTILE: METRICS["ranked"]},
        "selection": METRICS["selection"] | {"chosen on": HOSTILE},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    monkeypatch.setattr(push_to_hub, "check_loading", lambda *_: None)
    push(arguments(tmp_path, dataset_name=HOSTILE, dry_run=True, output_dir=str(tmp_path / "hub")))
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    for markup in ("<script", "<img", "[x](", "![y](", "\n# Heading", " `code`"):
        assert markup not in card.text
    assert card.text.count(r"&lt;script&gt;alert(1)&lt;/script&gt; \| \[x\](https") >= 8


@pytest.mark.parametrize("name", ["metrics.json", "recall_at_k.png", "codebooks.png", "checkpoint/training_log.json"])
def test_links_are_not_published(run, hub, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("hub"))
    (tmp_path / "secret").write_text((folder / "metrics.json").read_text())
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"got the links .*{name.split('/')[-1]}"):
        push(arguments(folder, dry_run=True, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists() and hub == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", None])
@pytest.mark.parametrize("part", ["ranked", "baseline", "auc"])
def test_figures_that_are_not_finite_are_not_published(run, tmp_path, hub, part, value):
    metrics = json.loads((run / "metrics.json").read_text())
    if part == "auc":
        metrics["ranking"]["auc"] = value
    else:
        values = metrics["ranked"] if part == "ranked" else metrics["baselines"]["popularity"]
        values["recall@10"] = value
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="`metrics` must have finite figures, got"):
        push(arguments(run, metrics=str(tmp_path / "metrics.json"), dry_run=True, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists() and hub == []


def test_the_training_log_is_published_as_figures():
    log = {"metrics": {"train_loss": 1.5, "path": "/home/me"}, "log_history": [{"step": 1, "note": "/home/me"}]}
    log["log_history"][0]["grad_norm"] = float("nan")
    log |= {"work": "hash", "files": {"/home/me": 1}, "data_dir": "/home/me"}
    assert push_to_hub.figures_of(log) == {"metrics": {"train_loss": 1.5}, "log_history": [{"step": 1}]}


def test_the_docstring_command_is_understood(run):
    command = re.search(r"push_to_hub (--check.*?)\n\n", push_to_hub.__doc__, re.DOTALL)[1]
    first = command.replace("\\\n", " ").splitlines()[0].split()
    parsed = HfArgumentParser(PushArguments).parse_args_into_dataclasses(first)[0]
    assert parsed.repo_id == "user/name" and parsed.private and not parsed.dry_run
