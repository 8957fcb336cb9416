"""The benchmarks: one run from the command line at a tiny size; refused arguments, targets, missing peers."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.benchmark import load

ROOT = Path(__file__).parents[1]


attention, decoding, memsizer, reformer = map(load, ("attention", "decoding", "memsizer", "reformer"))


def row(n, **changes):
    measured = {"time_ratio": 1.0, "time_ratio_min": 0.9, "time_ratio_max": 1.1, "peak_u": 5.0, "peak_mib": n / 1024}
    names = {"variant": "window", "who": "memstudy", "n": n, "status": "ok", "reason": "", "seconds": 1.0}
    return names | measured | {"step_time_ms": n / 8} | changes


@pytest.mark.slow
def test_attention_prints_its_rows_and_writes_them(tmp_path):
    path = tmp_path / "rows.json"
    arguments = ["--variants", "softmax", "--lengths", "128", "64", "--rounds", "1", "--json", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "benchmarks" / "attention.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    assert [(row["n"], row["who"]) for row in rows] == [(n, who) for n in (64, 128) for who in ("memstudy", "torch")]
    for row in rows:
        assert (row["variant"], row["status"], row["threads"]) == ("softmax", "ok", 1)
        assert 0 < row["time_ratio_min"] <= row["time_ratio"] * 2
        assert row["peak_mib"] == row["predicted_mib"] == pytest.approx(row["peak_u"] * row["n"] * 512 * 4 / 2**20)
        assert row["packages"]["torch"]
        assert ("met" in row) == (row["who"] == "memstudy")
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + len(rows)
    assert "1 threads; medians of 1 rounds" in lines[0]
    assert lines[2].split()[:3] == ["softmax", "memstudy", "64"]
    assert "softmax, torch, 128" in done.stderr  # the progress


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_times_on_a_gpu_need_one(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["attention_cuda.py"])
    with pytest.raises(SystemExit, match=r"^error: attention_cuda\.py times CUDA kernels, and PyTorch finds no CUDA"):
        load("attention_cuda").main()


def test_our_rows_are_held_to_their_targets():
    assert "met" not in attention.judged(row(512), [])
    assert attention.judged(row(4096), [])["met"]
    assert not attention.judged(row(4096, time_ratio=1.81), [])["met"]
    assert not attention.judged(row(16_384), [])["met"]  # 5 U; 4.5 are allowed
    torchs = row(4096, who="torch", time_ratio=2.0)
    lean = row(4096, variant="softmax_lean", time_ratio=2.1)
    assert attention.judged(lean, [torchs])["met"]
    assert not attention.judged(lean | {"time_ratio": 2.3}, [torchs])["met"]
    assert "met" not in attention.judged(lean, [torchs | {"status": "oom"}])


def test_a_length_that_would_take_too_much_is_not_tried():
    assert attention.too_much([], 10**6) == ""
    assert attention.too_much([row(1024), row(2048)], 4096) == ""
    said = attention.too_much([row(1024), row(2048)], 10**9)
    assert said.startswith("not tried: would take about 976,562, ")
    assert said.endswith("MiB are available")
    assert attention.too_much([row(1024, seconds=200.0)], 2048).endswith("would take about 800, 600 s are allowed")
    assert attention.too_much([row(1024, status="oom", reason="no room")], 2048) == "no room (at 1,024 tokens)"


def test_rows_without_numbers_say_why_and_slopes_are_those_of_both_ends():
    assert attention.line(row(64, status="oom", reason="no room")).endswith("  oom: no room")
    (line,) = attention.slopes([row(2048), row(4096), row(16_384), row(16_384, who="torch")])
    assert " ".join(line.split()) == "window memstudy memory 1.00 time 1.00 at most 1.02 and 1.15: met"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--variants", "none"], "argument --variants: invalid choice: 'none' (choose from "),
        (["--lengths", "many"], "argument --lengths: invalid int value: 'many'"),
        (["--lengths", "128", "--variants", "window"], "window at 128 tokens: window=256 is larger than seq_len=128"),
        (["--lengths", "-1", "--variants", "softmax"], "softmax at -1 tokens: Input should be greater than"),
        (["--rounds", "0"], "argument --rounds: 0: at least 1 is needed"),
        (["--json", "no/such/folder/rows.json"], "its folder is not there or cannot be written"),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_one_clear_error(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attention.py", *arguments])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as refused:
        attention.main()
    assert refused.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err.splitlines()[-1]


def test_help_teaches(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attention.py", "--help"])
    with pytest.raises(SystemExit):
        attention.main()
    said = capsys.readouterr().out
    for word in ("--variants", "--lengths", "--rounds", "--json", "bare projections", "U", "fresh process"):
        assert word in said


# --- decoding


class Averaging(torch.nn.Module):
    """A mixer with a state, in place of MemSizer: the mean of the tokens so far."""

    def __init__(self, hidden_size, num_heads, config, *, is_causal):
        super().__init__()

    def step(self, hidden_states, state=None):
        total, count = state or (torch.zeros_like(hidden_states), 0)
        return (total + hidden_states) / (count + 1), (total + hidden_states, count + 1)


@dataclass(frozen=True)
class AveragingConfig:
    slots: int
    module = Averaging


@pytest.mark.usefixtures("one_thread")
def test_decoding_prints_speed_and_what_is_kept(monkeypatch, capsys):
    monkeypatch.setitem(decoding.ATTENTION, "memsizer", AveragingConfig)
    monkeypatch.setattr(decoding, "STEPS", 2)
    monkeypatch.setattr(sys, "argv", ["decoding.py", "--lengths", "16", "8", "--batch", "2"])
    decoding.main()
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in printed if line[0] in ("8", "16")]
    assert [line[0] for line in rows] == ["8", "16"]
    assert [line[2] for line in rows] == [f"{6 * 2 * 512 * 4 / 2**20:.3f}"] * 2  # a sum per layer and sequence
    assert [line[4] for line in rows] == [f"{6 * 2 * 2 * n * 512 * 4 / 2**20:.3f}" for n in (8, 16)]  # keys and values


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--lengths", "8", "0"]], ids=" ".join)
def test_decoding_refuses_nothing_to_decode(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decoding.py", *arguments])
    with pytest.raises(SystemExit) as refused:
        decoding.main()
    assert refused.value.code == 2
    assert f"argument {arguments[0]}: 0: at least 1 is needed" in capsys.readouterr().err.splitlines()[-1]


# --- the Reformer


def test_reformers_are_compared_in_turn(monkeypatch, capsys):
    monkeypatch.setattr(reformer, "TOKENS", 256)
    found = reformer.compare(128, hashes=1, rounds=1)
    assert found.pop(reformer.PRODUCTS)[0] > 0
    assert {"memstudy", "transformers"} <= found.keys() <= reformer.MODELS.keys()
    assert ("reformer-pytorch" in found) != ("pip install 'memstudy[bench]'" in capsys.readouterr().err)
    weights = 4 * 4 * sum(p.numel() for p in reformer.ours(128, 1).parameters()) / 2**20  # and gradients, moments
    assert all(seconds > 0 and peak > weights for seconds, peak in found.values())
    ours, theirs = (make(128, 1) for make in (reformer.ours, reformer.transformers))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lengths", "1000"], "argument --lengths: 1000: a power of two from 128 on is needed"),
        (["--lengths", "64"], "argument --lengths: 64: a power of two"),
        (["--rounds", "0"], "at least 1 is needed"),
    ],
)
def test_the_reformers_benchmark_refuses(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reformer.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        reformer.main()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


# --- MemSizer


def test_memsizer_is_compared_with_its_formula():
    found = memsizer.compare(128, rounds=1)  # also asserts equal results
    assert list(found) == ["memstudy", "straightforward"]
    assert all(seconds > 0 for seconds, _ in found.values())
    tensors = 4 * memsizer.BATCH * 128 * memsizer.SLOTS * memsizer.HIDDEN / 2**20
    assert found["straightforward"][1] > 2 * tensors > found["memstudy"][1]


@pytest.mark.parametrize("arguments", [["--lengths", "0"], ["--rounds", "0"]])
def test_the_memsizer_benchmark_refuses(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memsizer.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        memsizer.main()
    assert stop.value.code == 2
    assert "at least 1 is needed" in capsys.readouterr().err


@pytest.mark.slow
def test_step_time_prints_its_rows_and_writes_them(tmp_path):
    path = tmp_path / "rows.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = ROOT / "benchmarks" / "step_time"
    command = [sys.executable, script, "mli", "hf_v100", "--rows", "batch 4", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    times = [row for row in rows if "published_ms" in row]
    assert {row["row"] for row in times} == {"batch 4", "batch 4, fp16", "batch 4, Adafactor", "batch 4, 8-bit Adam"}
    assert {row["row"] for row in rows if "published_ratio" in row} == {"fp16", "Adafactor", "8-bit Adam"}
    for row in times:
        assert row["error_percent"] == pytest.approx(100 * (row["predicted_ms"] / row["published_ms"] - 1))
        assert row["in_band"] == (row["low_ms"] <= row["published_ms"] <= row["high_ms"])
    assert "generation unseen" in done.stdout


@pytest.mark.slow
def test_step_time_compares_ratios_on_this_cpu():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "benchmarks" / "step_time" / "cpu.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    wanted = "none", "checkpointing", "checkpointing=2", "narrow=0.5"
    ratios = {line[0]: [float(text) for text in line[1:]] for line in lines if line[0] in wanted}
    assert ratios["none"] == [1, 1, 0]
    assert (
        1.0 < ratios["checkpointing=2"][1] < ratios["checkpointing"][1] < 4 / 3
    )  # repeats at most one of three passes
    assert ratios["narrow=0.5"][1] < 1
    assert [line[0] for line in lines[-2:]] == ["fp32:", "bf16:"]
