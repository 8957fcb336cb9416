"""`memstudy compare`: each cell is what `memstudy predict` says of the same step."""

import json
import re

import pytest
from support.command_line import assert_one_line, invoke
from support.tiny_models import config_file

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")

SIZES = ("--batch", 4, "--seq-len", 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The path of a config.json."""
    return config_file(tmp_path_factory.mktemp("models"), "gpt2", n_layer=1)


@pytest.fixture(scope="module")
def untimed_gpu(tmp_path_factory):
    """The path of a YAML file that describes a GPU with 512 MiB, without its speed."""
    path = tmp_path_factory.mktemp("gpus") / "small.yaml"
    path.write_text('compute_capability: "8.0"\nmemory_mib: 512\ncontext_mib: 100\n')
    return str(path)


def test_each_cell_is_what_predict_says(model, untimed_gpu):
    rows, cards = ("", "bf16, checkpointing", "accumulation=4"), ("T4", "H100-80GB", untimed_gpu)
    options = [word for text in rows[1:] for word in ("--technique", text)]
    compared = invoke("compare", "--model", model, *SIZES, "--gpu", ",".join(cards), *options, "--json")
    assert (compared.exit_code, compared.stderr) == (0, "")
    assert json.loads(compared.stdout) == [
        json.loads(invoke("predict", "--model", model, *SIZES, "--gpu", card, "--technique", text, "--json").stdout)
        for text in rows
        for card in cards
    ]


def test_the_table_has_memory_time_and_speed(model, untimed_gpu):
    options = ("--technique", "tf32", "--gpu", f"T4,H100-80GB,{untimed_gpu}")
    shown = invoke("compare", "--model", model, "--batch", 512, "--seq-len", 64, *options)
    assert (shown.exit_code, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    (first,) = [line for line in lines if line.split()[:1] == ["none"]]
    assert re.fullmatch(r" *none +fits: \d\.\d GiB +fits: \d\.\d GiB +no: \d+\.\d MiB *", first)
    first, second = [line for line in lines if re.search(r"tokens/s  ", line)]
    assert len(re.findall(r"[\d,]+ tokens/s", first)) == 2  # none on the GPU of unknown speed
    (rate,) = re.findall(r"([\d,]+) tokens/s", second)
    assert f"fastest that fits: tf32 on H100-80GB, {rate} tokens/s" in lines
    assert "tf32 on T4: tf32 needs compute capability 8.0, and this GPU has 7.5" in lines
    assert shown.stdout.count("not here") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gpu", "T4,T5"), ["unknown GPU 'T5'", "H100-80GB"]),
        (("--gpu", ","), ["compare needs at least one GPU"]),
        (("--gpu", "T4", "--technique", "bf16", "--technique", "fp8"), ["unknown technique 'fp8'"]),
        (("--gpu", "T4", "--technique", "accumulation=3"), ["accumulation=3 does not divide batch_size=4"]),
    ],
    ids=["gpu", "no gpu", "technique", "parts"],
)
def test_what_cannot_be_is_told_in_one_line(options, words, model):
    assert_one_line(invoke("compare", "--model", model, *SIZES, *options), *words)


def test_help_teaches():
    text = " ".join(invoke("compare", "--help").stdout.split())
    for words in ("--gpu RTX4090,A100-80GB --technique bf16", "Repeat it", "nothing is run", "band", "Exit status 0"):
        assert words in text
