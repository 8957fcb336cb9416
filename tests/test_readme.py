"""The README's tables equal the committed rows, and its commands, code and links work."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
from matplotlib.image import imread
from support.results import committed
from support.tiers import slow_but
from typer.testing import CliRunner

from memstudy.cli.main import app
from memstudy.kinds import parse_run
from memstudy.project import read_parameters, studies
from memstudy.studies.published.rows import compared
from memstudy.studies.published.times.errors import by_source, summary_of_ratios
from memstudy.studies.seeds import interval
from memstudy.techniques import parse

ROOT = Path(__file__).parents[1]
UPDATES = 1500  # of the trainings of the ablation's inexact techniques
README = (ROOT / "README.md").read_text("utf-8")
ACCURACY = (ROOT / "docs" / "accuracy.rst").read_text("utf-8")
SHOWN = (
    "accumulation=4", "checkpointing", "bf16_weights", "selective_checkpointing=0.5", "chunked_loss", "adafactor",
    "bf16", "adamw_8bit", "optimizer_in_backward", "masks=0.5",
)  # fmt: skip


def headline() -> list[str]:
    """The table's lines from the committed records of each technique alone on the ablation's model."""
    measured, predicted, quality = {}, {}, {}
    for record in committed("memory_ablation").values():
        run = parse_run(record["config"])
        of = getattr(run, "of", run)
        if record["status"] != "ok" or of.kind != "language_model" or len(of.techniques) > 1:
            continue
        if of.experiment != "".join(of.techniques or ["baseline"]):
            continue
        if of.train_steps == UPDATES:
            of_seeds = quality.setdefault(of.experiment, {}).setdefault(of.learning_rate, {})
            of_seeds[of.seed] = record["metrics"]["test_perplexity"]
        elif of.batch_size == 4 and of.seq_len == 512 and not of.train_steps:
            kept = measured if of is run else predicted if run.gpu == "A100-40GB" else {}
            kept[of.experiment] = record["metrics"]
    trained = {name: pd.Series(max(of_rates.values(), key=len)) for name, of_rates in quality.items()}
    lines = [
        "| technique, alone | memory saved: measured | on an A100, predicted | time of a step: measured "
        "| on an A100, predicted [ms] | change of the perplexity: measured | exact |",
        "|---" * 7 + "|",
    ]
    for technique in ("baseline", *SHOWN):
        here, there = (
            100 * (1 - rows[technique]["peak_allocated_mib"] / rows["baseline"]["peak_allocated_mib"])
            for rows in (measured, predicted)
        )
        time = measured[technique]["step_time_ms"] / measured["baseline"]["step_time_ms"]
        on_gpu, low, high = (predicted[technique][f"step_time_{end}ms"] for end in ("", "low_", "high_"))
        exact, change = technique == "baseline" or parse([technique])[0].exact, "same"
        if not exact:
            by_seed = 100 * (trained[technique] / trained["baseline"] - 1)
            mean, least, most = interval(by_seed.to_frame())[["mean", "low", "high"]].squeeze()
            change = f"{mean:+.1f} % ({least:+.1f} to {most:+.1f})"
        lines.append(
            f"| `{technique}` | {here:.0f} % | {there:.0f} % | × {time:.1f} | {on_gpu:.0f} ({low:.0f} to {high:.0f}) "
            f"| {change} | {'yes' if exact else 'no'} |"
        )
    return lines


def test_the_headline_table_is_that_of_the_committed_rows():
    assert "\n".join(headline()) in README


MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b")
METHODS = {
    "full": "full, bf16", "full 8-bit": "full, AdamW in 8 bits", "LoRA": "LoRA, rank 16", "DoRA": "DoRA, rank 16",
    "QLoRA": "QLoRA, rank 16",
}  # fmt: skip


def card() -> list[str]:
    """The lines of the table of one card, from the committed predictions of the study of fine-tuning."""
    cells = {}
    for record in committed("fine_tuning").values():
        run = parse_run(record["config"])
        if run.kind == "prediction" and (run.gpu, run.of.batch_size, run.of.seq_len) == ("RTX4090", 1, 2048):
            taken = f"{record['metrics']['whole_gpu_mib'] / 1024:.1f} GiB"
            cells[run.of.model, run.experiment] = taken if record["metrics"]["fits"] else f"*no*: {taken}"
    lines = [f"| | {' | '.join(METHODS.values())} |", "|---" * (1 + len(METHODS)) + "|"]
    return lines + [f"| `{model}` | {' | '.join(cells[model, method] for method in METHODS)} |" for model in MODELS]


def test_the_table_of_a_card_is_that_of_the_committed_rows():
    assert "\n".join(card()) in README


SOURCES = {
    "lambda_bert": "BERT on SQuAD, fp16 and fp32, four GPUs (Lambda)",
    "hf_v100": "BERT-large, nine combinations of techniques, V100 (2022)",
    "peft_l40s": "Llama-3.2-3B, PEFT's 27 methods, L40S (2026)",
    "fms": "santacoder and Mistral-7B: full, LoRA, 4-bit; A100 (2025)",
    "vision": "vision transformers, RTX 3090 (timm, 2022)",
    "neusight_models": "whole models in fp32, V100 and A100 (NeuSight, 2025)",
    "all steps": "all steps",
    "all steps, held out": "all steps, held out",
    "by us where others are": "those of NeuSight's that others predict, by us",
    "by neusight": "the same, by NeuSight",
    "by habitat": "the same, by Habitat",
    "by roofline": "the same, by a roofline",
    "mosaic, a lower bound": "MPT with FSDP, A100 and H100 (MosaicML, 2023): a lower bound, no claim",
    "mli": "layers and products of BERT-large, V100 and RTX 3090 Ti (2022)",
    "mli_best": "layers and products at the best batch, five GPUs (2022)",
    "liger": "single ops, five GPUs (Liger-Kernel, 2024 to 2026)",
    "neusight_ops": "single ops in fp32, V100 and A100 (NeuSight, 2025)",
    "vidur": "kernels of decoders in fp16, A100 and H100 (Vidur, 2024)",
}

SHOWN_ERRORS = {
    "n": ".0f", "n_chosen": ".0f", "median": ".1f", "p90": ".0f", "worst": ".0f", "bias": "+.1f", "in_band": ".0f",
    "unseen": ".1f",
}  # fmt: skip


def records(study: str, kind: str) -> list[dict]:
    """The committed records of a ``kind`` of run that ended well."""
    found = committed(study).values()
    return [record for record in found if (record["config"]["kind"], record["status"]) == (kind, "ok")]


def published_times() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The errors of predicted times by source, and the ratios of times, from the committed records."""
    curves = [record["curves"] for record in records("what_fits", "published_times")]
    rows, ratios = (pd.DataFrame([row for one in curves for row in one[name]]) for name in ("rows", "ratios"))
    return by_source(rows), ratios


MEMORY = {
    "what_fits": "memory: single ops, forward passes, training of BERT-large (2020 to 2024)",
    "fine_tuning": "memory: models of 1 to 7 B, full, LoRA, 4-bit weights, one and two GPUs (2024 to 2026)",
}
TIME = {
    "all steps, held out": "time of a step, on rows that chose no constant",
    "all steps": "time of a step, on all rows",
}


def summary() -> list[str]:
    """The lines on all errors in short."""
    lines = ["| measured by others | rows | median error | worst |", "|---|---|---|---|"]
    for study, said in MEMORY.items():
        rows = pd.DataFrame([record["config"] | record["metrics"] for record in records(study, "published_row")])
        off = compared(rows)["error_percent"].abs()
        lines.append(f"| {said} | {len(off)} | {off.median():.2f} % | {off.max():.1f} % |")
    found = published_times()[0]
    for source, said in TIME.items():
        n, median, worst = found.loc[source, ["n", "median", "worst"]]
        lines.append(f"| {said} | {n:.0f} | {median:.1f} % | {worst:.0f} % |")
    return lines


def test_the_errors_in_short_are_those_of_the_committed_rows():
    assert "\n".join(summary()) in README


def step_times() -> list[str]:
    """The lines on predicted times, from the committed records of the published ones."""
    found, ratios = published_times()
    heads = "rows | chosen on | median | p90 | worst | bias | in band | unseen"
    lines = [f"   errors of times [%]: measured by others | {heads}"]
    for source, said in SOURCES.items():
        texts = [f"{found.at[source, column]:{spec}}".replace("nan", "–") for column, spec in SHOWN_ERRORS.items()]
        lines.append(f"   {said} | {' | '.join(texts)}")
    between = "{n} ratios of steps on one GPU: median error {median:.1f} %, worst {worst:.0f} %; {right:.0f} % have the"
    return [*lines, "", f"{between.format(**summary_of_ratios(ratios))} right sign."]


def test_the_table_of_step_times_is_that_of_the_committed_rows():
    assert "\n".join(step_times()) in ACCURACY


COMMANDS = re.findall(r"^\.venv/bin/memstudy (\w+.*)$", README, re.MULTILINE)


@pytest.mark.parametrize("command", slow_but(COMMANDS[1:2], COMMANDS))
def test_a_command_does_what_it_says(command):
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    assert "GiB" in result.output or "MiB" in result.output


@pytest.mark.slow
def test_the_first_command_answers_as_printed():
    answer, *_ = re.findall(r"^fits: .*$", README, re.MULTILINE)
    result = CliRunner().invoke(app, COMMANDS[0].split())
    assert answer in result.output
    assert all(amount in result.output for amount in re.findall(r"[\d.]+ GiB", README.partition(answer)[0]))


def test_the_first_prediction_ends_as_printed():
    (lines,) = re.findall(
        r"^```\n(fits: .*?)^```$", README.partition("## On your own model")[2], re.MULTILINE | re.DOTALL
    )
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, COMMANDS[1].split())
    assert result.output.endswith(lines)


def test_the_loop_of_ones_own_runs_as_printed():
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    on_gpu, here, by_category = done.stdout.strip().splitlines()
    assert float(on_gpu) > float(here) > 0
    assert "'activations'" in by_category


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make (\w+)", README))))
def test_every_target_of_make_is_there(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("name", re.findall(r"\(figures/(\w+)\.png\)", README))
def test_a_figure_is_that_of_the_committed_rows(name, tmp_path):
    (stem,) = (stem for stem in studies() if name.startswith(f"{stem}_"))
    places = {"results_dir": str(ROOT / "results"), "out_dir": str(tmp_path), "run_missing": False}
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{stem}.ipynb", None, parameters=read_parameters(stem, "full") | places,
        cwd=ROOT / "notebooks", kernel_name="python3", progress_bar=False,
    )  # fmt: skip
    drawn, shown = (imread(folder / "figures" / f"{name}.png") for folder in (tmp_path, ROOT))
    assert np.array_equal(drawn, shown)


def test_what_it_links_to_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
