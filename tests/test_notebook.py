"""The cell magics, the pictures of reports, and the widgets of `memstudy.explore`."""

import asyncio
import re
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

import pytest
import torch
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from support.tiny_models import config_file
from torch import nn

import memstudy
from memstudy.notebook.explorer import Explorer, offered
from memstudy.notebook.forecast import forecast
from memstudy.profiler import MemoryReport, compare, find_gpu, measure, predict
from memstudy.profiler.drawing import COLOURS

pytestmark = pytest.mark.usefixtures("one_thread")
MIB = 2**20
CELL = """
import torch
model = torch.nn.Linear(512, 512)
optimizer = torch.optim.AdamW(model.parameters())
inputs = torch.randn(128, 512)
def step():
    model(inputs).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def build(width=512):
    model = nn.Linear(width, width)
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = torch.randn(128, width)

    def step():
        model(inputs).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.fixture(scope="module")
def reports():
    small = find_gpu("T4").model_copy(update={"name": "<small>", "memory_mib": find_gpu("T4").context_mib + 2})
    return {
        "fits": predict(build, gpu="T4"),
        "does not fit": predict(build, gpu=small),
        "cpu": predict(build),
        "measured": measure(build),
    }


@pytest.fixture
def shell():
    """An IPython shell with the extension loaded."""
    made = InteractiveShell()
    made.run_line_magic("load_ext", "memstudy")
    return made


def test_a_predicted_cell_is_a_build(shell, reports):
    report = shell.run_cell_magic("predict", "--gpu T4", CELL)
    assert report.kind == "predicted"
    assert report.peak_by_category == reports["fits"].peak_by_category
    assert report.time == reports["fits"].time


def test_a_predicted_cell_leaves_nothing_but_its_report(shell):
    before = set(shell.user_ns)
    shell.run_cell_magic("predict", "there", CELL)
    assert set(shell.user_ns) - before == {"there"}
    assert isinstance(shell.user_ns["there"], MemoryReport)


def test_a_cell_sees_the_variables_of_the_notebook(shell):
    shell.user_ns["width"] = 64
    cell = CELL.replace("512", "width")
    assert shell.run_cell_magic("predict", "", cell).peak_bytes < 200_000


def test_a_measured_cell_with_a_step_is_a_build_and_its_variables_stay(shell, reports):
    report = shell.run_cell_magic("memory", "here", CELL)
    assert report.kind == "measured"
    assert report.peak_by_category == reports["measured"].peak_by_category
    assert shell.user_ns["here"] is report
    assert shell.user_ns["model"].weight.shape == (512, 512)


def test_a_measured_cell_without_a_step_is_measured_itself(shell):
    report = shell.run_cell_magic("memory", "", "import torch\nkept = torch.ones(256, 1024)\n(kept + kept).sum()")
    assert report.peak_by_category["other"] == MIB
    assert report.peak_by_category["temporary"] == MIB + 4  # the doubled tensor, and its sum
    assert len(report.iteration_peaks) == 1
    assert shell.user_ns["kept"].shape == (256, 1024)


@pytest.mark.parametrize(
    ("line", "cell", "words"),
    [
        ("--gpu T4", "x = 1", ["no step", "def step():"]),
        ("--gpu T4", "print(step)", ["no step"]),
        ("--gpu T5", CELL, ["unknown GPU 'T5'", "T4"]),
        ("--gpu none.yaml", CELL, ["none.yaml", "No such file"]),
        ("--gpu", CELL, ["expected one argument"]),
        ("", CELL + "    torch.ones(1, device='cuda')", ["leave everything on the CPU"]),
        ("", "def step():\n    made_before(inputs).sum().backward()", ["make the model inside build()"]),
    ],
)
def test_a_cell_that_cannot_be_predicted_is_refused_in_one_line(shell, line, cell, words):
    shell.user_ns |= {"made_before": nn.Linear(2, 2), "inputs": torch.ones(2, 2)}
    with pytest.raises(UsageError) as refusal:
        shell.run_cell_magic("predict", line, cell)
    (said,) = str(refusal.value).splitlines()
    for word in words:
        assert word in said


def test_a_step_of_an_earlier_cell_is_not_taken_for_one_of_this_cell(shell):
    shell.run_cell(CELL)
    with pytest.raises(UsageError, match="no step"):
        shell.run_cell_magic("predict", "", "x = 1")


def test_an_error_of_the_cell_itself_stays_what_it_is(shell):
    with pytest.raises(ZeroDivisionError):
        shell.run_cell_magic("predict", "", CELL + "    1 / 0")
    with pytest.raises(ValueError, match="mine"):
        shell.run_cell_magic("memory", "", "raise ValueError('mine')")


def drawings(html):
    """Return the pictures in `html`, parsed: they must be well-formed."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.S)]


@pytest.mark.parametrize("name", ["fits", "does not fit", "cpu", "measured"])
def test_a_report_shows_itself(reports, name):
    report = reports[name]
    html = report._repr_html_()
    waterfall, timeline = drawings(html)
    bars = {rect.find("title").text.partition(":")[0]: rect for rect in waterfall.iter("rect")}
    assert list(bars)[:-1] == list(report.waterfall_mib())
    end = None
    for bar in list(bars.values())[:-1]:  # each begins where the one above ends
        begin = float(bar.get("x"))
        assert end is None or begin == pytest.approx(end, abs=1)
        end = begin + float(bar.get("width"))
    assert {shape.get("fill") for shape in timeline.iter("polygon")} <= set(COLOURS.values())
    assert "optimizer" in [text.text for text in timeline.iter("text")]
    assert name not in ("fits", "does not fit") or f"{name}: " in html
    assert ("a step takes" in html) == (report.time is not None)
    assert "<small>" not in html


def test_the_timeline_of_a_picture_has_the_peak(reports):
    report = reports["cpu"]
    top = min(
        float(point.split(",")[1])
        for shape in drawings(report._repr_html_())[1].iter("polygon")
        for point in shape.get("points").split()
    )
    assert top == 18  # the upper edge
    assert f"{report.peak_bytes / MIB:,.0f} MiB" in report._repr_html_()


def test_the_text_of_a_report_is_short(reports):
    assert len(repr(reports["fits"])) < 3000


def test_reports_are_compared_on_one_scale(reports):
    wide = predict(partial(build, 1024), gpu="T4")
    html = compare(reports["fits"], wide=wide)._repr_html_()
    widths = [
        next(float(r.get("width")) for r in drawing.iter("rect") if r.find("title").text.startswith("whole"))
        for drawing in drawings(html)
    ]
    assert widths[0] / widths[1] == pytest.approx(reports["fits"].whole_gpu_mib / wide.whole_gpu_mib, rel=0.01)
    table = ElementTree.fromstring(re.search(r"<table.*</table>", html, re.S)[0])
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.iter("tr")}
    assert rows["MiB"] == ["1: T4, predicted", "wide", "difference"]
    assert rows["parameters"] == ["1.0", "4.0", "3.0"]
    three = compare(*reports.values())._repr_html_()
    assert "difference" not in three
    assert "&lt;small&gt;" in three


def test_a_comparison_needs_two_reports(reports):
    with pytest.raises(ValueError, match="at least two reports"):
        compare(reports["cpu"])


def test_techniques_on_offer_are_for_training_in_one_process():
    assert {"bf16", "checkpointing"} <= set(offered())
    assert not {"fsdp", "sparse"} & set(offered())


def test_a_forecast_is_a_report_or_one_line(tmp_path):
    tiny = config_file(tmp_path, "bert")
    asked = {"gpu": "T4", "batch_size": 2, "seq_len": 16, "techniques": ("bf16",)}
    assert "T4, predicted: fits" in forecast(tiny, **asked)
    assert "no prediction:</b> unknown model" in forecast("bert-bse", **asked)
    assert "64 positions" in forecast(tiny, **asked | {"seq_len": 128})
    assert "unknown GPU" in forecast(tiny, **asked | {"gpu": "T5"})


async def answered(explorer, change=None):
    """Press the button, make the `change`, and wait; return the lines of progress seen."""
    explorer.button.click()
    seen = []
    while True:
        await asyncio.sleep(0.1)
        seen.append(explorer.status.value)
        if change and seen[-1]:
            change()
            change = None
        if explorer._task.done():
            return seen


@pytest.mark.slow
def test_the_widgets_answer_for_the_latest_settings(tmp_path):
    tiny = config_file(tmp_path, "bert")
    explorer = memstudy.explore(model=tiny, batch_size=2, seq_len=16)
    assert isinstance(explorer, Explorer)
    seen = asyncio.run(answered(explorer, lambda: explorer.gpu.set_trait("value", "L4")))
    assert any("s left" in line for line in seen)
    assert "L4, predicted: fits" in explorer.answer.value
    assert explorer.status.value == ""

    async def wrong():
        explorer.seq_len.value = 4096
        while not explorer._task.done():
            await asyncio.sleep(0.1)

    asyncio.run(wrong())
    assert "64 positions" in explorer.answer.value


@pytest.mark.slow
def test_the_widgets_survive_the_end_of_the_predicting_process(tmp_path):
    explorer = memstudy.explore(model=config_file(tmp_path, "bert"), batch_size=2, seq_len=16)

    def end():
        for process in explorer._pool._processes.values():
            process.kill()

    asyncio.run(answered(explorer, end))
    assert "its process has ended" in explorer.answer.value
    asyncio.run(answered(explorer))
    assert "T4, predicted: fits" in explorer.answer.value


def test_the_cells_of_the_tutorial_run(shell):
    page = (Path(__file__).parents[1] / "docs" / "tutorials" / "notebook.rst").read_text("utf-8")
    cells = re.findall(r"^\.\. code-block:: ipython\n\n((?: {3}.*\n|\n)+)", page, re.MULTILINE)
    assert len(cells) == 6
    results = [shell.run_cell(textwrap.dedent(cell).strip()).result for cell in cells]
    assert [type(result).__name__ for result in results] == [
        "NoneType", "MemoryReport", "MemoryReport", "Comparison", "Explorer", "tuple",
    ]  # fmt: skip


def test_widgets_without_ipywidgets_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'memstudy[notebook]'")):
        memstudy.explore()
