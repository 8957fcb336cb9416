"""The wheel, installed without its repository: its commands, its Python, and what each refusal says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from support.distributions import closure, declared, environment

from memstudy import data
from memstudy.studies.memsizer.run import Seq2SeqRun

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
(IN_README,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
STEP = ("--model", "gpt2", "--batch", "2", "--seq-len", "64")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "memstudy", source / "memstudy", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", source / "dist", source]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = (source / "dist").glob("*.whl")
    return built


def installed(wheel, folder, *extras):
    """Install `wheel` where only what `extras` declare is; pip checks that nothing is missing. Return its Python."""
    python = environment(folder, closure(declared(*extras)))
    asked = f"{wheel}[{','.join(extras)}]" if extras else wheel
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", asked]
    subprocess.run(command, check=True, capture_output=True)
    return python


@pytest.fixture(scope="module")
def base(wheel, tmp_path_factory):
    return installed(wheel, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def with_study(wheel, tmp_path_factory):
    return installed(wheel, tmp_path_factory.mktemp("study"), "study")


@pytest.fixture
def surroundings(tmp_path):
    """The environment of a user who has no repository and no network."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MEMSTUDY_CACHE": str(tmp_path / "cache")}


@pytest.fixture
def ask(tmp_path, surroundings):
    """Run a program of an environment in an empty folder."""

    def run(python, *arguments):
        folder = tmp_path / "here"
        folder.mkdir(exist_ok=True)
        return subprocess.run(
            [python.parent / arguments[0], *arguments[1:]], cwd=folder, env=surroundings, capture_output=True, text=True
        )

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("predict", *STEP, "--gpu", "T4", "--technique", "bf16_weights,lora=8"), "fits: "),
        (("fit", "--model", "gpt2", "--seq-len", "64", "--gpu", "T4"), "largest batch "),
        (("advise", "--model", "gpt2", "--batch", "64", "--seq-len", "512", "--gpu", "T4"), "fits: --technique "),
        (("advise", *STEP, "--budget-mib", "1200"), "fits: --technique "),
        (("compare", *STEP, "--gpu", "T4,L4"), "fastest that fits: "),
        (("list", "variants"), "performer"),
        (("list", "techniques"), "checkpointing"),
        (("list", "gpus"), "H100-80GB"),
        (("list", "models"), "openai/whisper-medium"),
        (("list", "runs"), "no runs yet"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_the_base_install_predicts_and_lists(base, ask, arguments, said):
    done = ask(base, "memstudy", *arguments)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


CONVERTS = """
import torch, transformers
from memstudy.attention import WindowConfig
from memstudy.huggingface.convert import convert_attention
config = transformers.AutoConfig.for_model("gpt2", n_layer=2, n_embd=32, n_head=2)
model = transformers.AutoModelForCausalLM.from_config(config).eval()
tokens = torch.arange(16)[None]
before = model(tokens).logits
convert_attention(model, WindowConfig(window=4))
after = model(tokens).logits
assert torch.allclose(before[:, 0], after[:, 0], atol=1e-5) and not torch.allclose(before[:, -1], after[:, -1])
"""


@pytest.mark.parametrize("code", [IN_README, CONVERTS], ids=["profiler", "convert_attention"])
def test_the_base_install_profiles_and_converts(base, ask, code):
    done = ask(base, "python", "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("extras", "arguments", "words"),
    [
        ((), ("serve",), ["flask", "pip install 'memstudy[study]'"]),
        ((), ("list", "datasets"), ["datasets", "pip install 'memstudy[study]'"]),
        *[
            (("study",), arguments, ["repository", "clone", "make", ".venv/bin/memstudy"])
            for arguments in (("report",), ("report", "lab4_grid"), ("plan", "lab4_grid"), ("list", "studies"))
        ],
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_not_there_is_named_with_its_remedy(extras, arguments, words, request, ask):
    done = ask(request.getfixturevalue("with_study" if extras else "base"), "memstudy", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


def test_with_the_study_extra_a_run_is_carried_out_and_its_model_answers(with_study, ask, surroundings, tmp_path):
    loaded = data.load("place-value-200")
    run = Seq2SeqRun(
        experiment="wheel", n_layers=1, hidden_size=16, n_heads=2, feed_forward=32, vocab_size=48, seq_len=56,
        target_vocab_size=16, target_len=4, memsizer={}, train_steps=2, batch_size=4, eval_rows=4,
        dataset=loaded.name, data_hash=loaded.content_hash,
    )  # fmt: skip
    (tmp_path / "run.json").write_text(run.model_dump_json())
    done = ask(with_study, "memstudy", "run", tmp_path / "run.json")
    assert done.returncode == 0, done.stderr
    assert "ok" in done.stdout
    assert "wheel" in ask(with_study, "memstudy", "list", "runs").stdout
    (record,) = (tmp_path / "here" / "results" / "single").glob("*.json")
    assert json.loads(record.read_text())["provenance"]["commit"] == "unknown"
    command = [with_study.parent / "memstudy", "serve", "--port", "0"]
    server = subprocess.Popen(command, cwd=tmp_path / "here", env=surroundings, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().split()[0]
        with urlopen(f"{address}?{urlencode({'question': 'What is the tens digit of 89290?'})}", timeout=60) as page:
            assert "<output>" in page.read().decode()
    finally:
        server.terminate()
        server.wait()
