"""The wheel: what is in it, and that it serves a checkpoint without the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT

from modeling_unigrf import RecommendationPipeline, UniGRFConfig, UniGRFForCausalLM
from tokenization import SemanticIdTokenizer

SOURCES = ("modeling_unigrf", "recipes", "tokenization", "pyproject.toml", "LICENSE")
HISTORY = {"items": ["film 3", "film 5"], "behaviors": ["like", "dislike"]}

# Runs with `-S`: without it, the editable install of the checkout would put the checkout on the path.
ELSEWHERE = """
import importlib.util
import json
import sys

leaked = [name for name in ("recipes", "tokenization") if importlib.util.find_spec(name)]
assert not leaked, leaked
from transformers import AutoModelForCausalLM, pipeline

def file_of(instance):
    return sys.modules[type(instance).__module__].__file__

files = {}
lists = []
for imported in (False, True):
    if imported:
        import modeling_unigrf
    recommender = pipeline("recommendation", model=sys.argv[1], trust_remote_code=True)
    files["imported model" if imported else "model"] = file_of(recommender.model)
    files |= {"tokenizer": file_of(recommender.tokenizer), "pipeline": file_of(recommender)}
    lists.append(recommender(json.loads(sys.argv[2])))
files["model without trust"] = file_of(AutoModelForCausalLM.from_pretrained(sys.argv[1]))
print(json.dumps({"files": files, "lists": lists}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel as a zip file, built without a network from a copy of what a build reads."""
    source = tmp_path_factory.mktemp("source")
    output = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", output, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = output.glob("*.whl")
    return path


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_wheel_holds_the_model_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    metadata = f"unigrf-{project()['version']}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"modeling_unigrf", metadata}
    modules = {f"modeling_unigrf/{path.name}" for path in (ROOT / "modeling_unigrf").glob("*.py")}
    assert {*modules, "modeling_unigrf/py.typed"} == {name for name in names if name.startswith("modeling_unigrf/")}
    assert f"{metadata}/licenses/LICENSE" in names


def test_wheel_serves_a_checkpoint_elsewhere(wheel, tmp_path):
    codes = np.stack(np.unravel_index(np.arange(60), (4, 4, 4)), axis=1)
    ids = [f"film {number}" for number in range(60)]
    tokenizer = SemanticIdTokenizer.from_codes(ids, codes, (4, 4, 4), ["dislike", "like"], titles=ids)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = UniGRFForCausalLM(UniGRFConfig(**tokenizer.config_fields(), text_config=sizes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    model.set_catalog(torch.from_numpy(tokenizer.item_codes.copy()))
    recommender = RecommendationPipeline(model=model, tokenizer=tokenizer)
    recommender.save_pretrained(tmp_path / "checkpoint")

    zipfile.ZipFile(wheel).extractall(tmp_path / "wheel")
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    variables |= {"PYTHONPATH": os.pathsep.join([str(tmp_path / "wheel"), *packages]), "PYTHONSAFEPATH": "1"}
    variables |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", "-c", ELSEWHERE, tmp_path / "checkpoint", json.dumps(HISTORY)]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    answer = json.loads(done.stdout.splitlines()[-1])
    expected = [
        {name: pytest.approx(value, abs=1e-5) if isinstance(value, float) else value for name, value in row.items()}
        for row in recommender(HISTORY)
    ]
    assert len(expected) == 10 and answer["lists"] == [expected, expected]
    # Below `home` is the code of the checkpoint, which transformers copies there.
    origins = {part: Path(file).relative_to(tmp_path).parts[0] for part, file in answer["files"].items()}
    assert origins == {
        "model": "home",
        "tokenizer": "home",
        "pipeline": "home",
        "imported model": "wheel",
        "model without trust": "wheel",
    }


def test_versions_agree_in_all_files():
    version = project()["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


def test_hooks_run_what_lint_runs():
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        if hook["entry"].partition(" ")[0] in ("ruff", "typos"):
            assert set(hook["additional_dependencies"]) <= set(pinned), hook["id"]
