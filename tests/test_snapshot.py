"""Snapshots for PyTorch's memory viewer, and Chrome traces: checked by PyTorch's own tools, and by the viewer."""

import io
import itertools
import json
import pickle
import pickletools
from functools import partial

import pytest
import torch
from support.command_line import assert_one_line, invoke
from support.tiny_models import config_file
from torch import nn
from torch.cuda import _memory_viz

from memstudy.profiler import find_gpu, measure, predict
from memstudy.profiler.snapshot import CATEGORIES, pickled, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")
T4 = find_gpu("T4")
SMALL = T4.model_copy(update={"name": "small", "memory_mib": T4.context_mib + 24})  # 24 MiB for segments
# What the viewer's reader takes (unpickle in torch/utils/viz/MemoryViz.js).
READ_BY_THE_VIEWER = {
    "APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINUNICODE", "EMPTY_DICT",
    "EMPTY_LIST", "EMPTY_TUPLE", "FRAME", "LONG1", "LONG_BINGET", "MARK", "MEMOIZE", "NEWFALSE", "NEWTRUE", "NONE",
    "PROTO", "SETITEM", "SETITEMS", "SHORT_BINUNICODE", "STOP", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
}  # fmt: skip


def build(rows=300):
    model = nn.Sequential()
    model.add_module("up", nn.Sequential(nn.Linear(256, 1024), nn.GELU()))
    model.add_module("down", nn.Linear(1024, 256))
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = torch.randn(rows, 256)

    def step():
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.fixture(
    scope="module",
    params=[{"gpu": T4}, {"gpu": T4, "expandable_segments": True}, {"gpu": SMALL}, {}, None],
    ids=["gpu", "expandable", "small gpu", "cpu", "measured"],
)
def report(request):
    return measure(build) if request.param is None else predict(build, **request.param)


@pytest.fixture(scope="module")
def shot(report):
    return report.snapshot()


def events_of(shot):
    (trace,) = shot["device_traces"]
    return trace


def at_each_moment(shot):
    """Yield the live allocations by address after each event, from the trace alone."""
    live = {}
    for event in events_of(shot):
        if event["action"] == "alloc":
            assert event["addr"] not in live
            live[event["addr"]] = event
        elif event["action"] == "free_completed":
            assert live.pop(event["addr"])["size"] == event["size"]
        yield live


def test_blocks_tile_their_segment_and_are_those_that_the_trace_leaves(shot):
    *_, live = at_each_moment(shot)
    found = {}
    for segment in shot["segments"]:
        place = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == place
            assert block["size"] > 0
            place += block["size"]
            if block["state"] == "active_allocated":
                found[block["address"]] = block["requested_size"]
        assert place == segment["address"] + segment["total_size"]
        assert segment["allocated_size"] == sum(b["size"] for b in segment["blocks"] if b["state"] != "inactive")
    assert found == {address: event["size"] for address, event in live.items()}
    assert found


def test_segments_are_those_that_the_trace_leaves_and_hold_each_allocation(report, shot):
    reserved, most = {}, 0
    for event in events_of(shot):
        whole = range(event["addr"], event["addr"] + event["size"])
        if event["action"] in ("segment_alloc", "segment_map"):
            reserved[whole.start] = whole
            most = max(most, sum(map(len, reserved.values())))
        elif event["action"] == "segment_free":
            assert reserved.pop(whole.start) == whole
        elif event["action"] == "alloc":
            ends = {each.stop: each for each in reserved.values()}
            start, stop = next((r.start, r.stop) for r in reserved.values() if whole.start in r)
            while stop < whole.stop:  # granules of an expandable segment
                stop = reserved[stop].stop
            assert start in reserved
            assert stop in ends
    assert sum(map(len, reserved.values())) == sum(segment["total_size"] for segment in shot["segments"])
    if report.gpu:
        assert most == report.peak_reserved_bytes


def test_the_trace_reaches_the_peak_by_category(report, shot):
    """On a CPU to the byte; on a GPU, a trace has what was requested, as PyTorch's own."""
    most, at_peak = 0, {}
    for live in at_each_moment(shot):
        now = sum(event["size"] for event in live.values())
        if now > most:
            most = now
            at_peak = dict.fromkeys([CATEGORIES.get(name, name) for name in report.peak_by_category], 0)
            for event in live.values():
                at_peak[event["category"]] += event["size"]
    expected = {CATEGORIES.get(name, name): size for name, size in report.peak_by_category.items()}
    if report.gpu:
        assert report.requested_bytes <= most <= report.peak_bytes
        assert at_peak == pytest.approx(expected, rel=0.02, abs=4096)
    else:
        assert (most, at_peak) == (report.peak_bytes, expected)


def test_frames_are_modules_from_the_innermost_on_and_the_phase_of_the_step(shot):
    stacks = {tuple(f"{f['filename']}:{f['line']}:{f['name']}" for f in e["frames"]) for e in events_of(shot)}
    assert ("module:0:up.0", "module:0:up", "step:2:forward") in stacks
    assert ("step:1:backward",) in stacks
    assert ("step:1:optimizer",) in stacks
    assert ("step:0:build",) in stacks


def test_a_category_is_unknown_as_the_viewer_demands(shot):
    categories = {event["category"] for event in events_of(shot) if "category" in event}
    assert {"unknown", "parameter", "gradient", "optimizer_state", "activation"} <= categories


class Plain(pickle.Unpickler):
    """Reads numbers, texts, lists, dicts and tuples alone."""

    def find_class(self, module, name):
        raise AssertionError(f"{module}.{name} in a snapshot")


def test_the_file_has_only_what_the_viewers_reader_takes(report):
    data = pickled(report)
    assert {opcode.name for opcode, _, _ in pickletools.genops(data)} <= READ_BY_THE_VIEWER
    assert data[:2] == b"\x80\x04"
    assert Plain(io.BytesIO(data)).load() == report.snapshot()


def test_an_address_is_exact_in_a_browser(shot):
    assert max(segment["address"] + segment["total_size"] for segment in shot["segments"]) < 2**53


def same(text):
    return text


def test_pytorchs_own_tools_read_it(shot):
    total = sum(segment["total_size"] for segment in shot["segments"])
    summary = _memory_viz.segsum(shot)
    assert f"segments: {len(shot['segments'])}\n" in summary
    assert f"total_reserved: {_memory_viz.Bytes(total)}\n" in summary
    told = _memory_viz.trace(shot)
    assert told.count("\ndel ") == sum(event["action"] == "free_requested" for event in events_of(shot))
    sizes = [int(line.rsplit(" ", 1)[1]) for line in _memory_viz.memory(shot, same).splitlines()]
    assert sum(sizes) == total
    assert "step:0:build" in _memory_viz.segments(shot, same)


def test_pytorchs_compare_tells_two_steps_apart():
    first, second = (predict(partial(build, rows), gpu=T4).snapshot()["segments"] for rows in (300, 3000))
    assert _memory_viz.compare(first, first, same) == ""
    assert "only_after;" in _memory_viz.compare(first, second, same)


def test_a_step_that_does_not_fit_has_its_out_of_memory_error_in_the_trace():
    report = predict(build, gpu=SMALL)
    events = report.snapshot()["device_traces"][0]
    (place,) = (i for i, event in enumerate(events) if event["action"] == "oom")
    assert events[place]["size"] == report.out_of_memory.bytes
    assert events[place]["frames"][-1]["name"] == report.out_of_memory.phase
    assert events[place]["device_free"] < report.out_of_memory.bytes
    assert events[place + 1]["action"] == "segment_alloc"  # the prediction goes on
    assert "raise OutOfMemoryError" in _memory_viz.trace(report.snapshot())


def by_kind(report, kind):
    return [event for event in report.trace()["traceEvents"] if event["ph"] == kind]


def test_the_counters_of_a_trace_reach_the_peak(report):
    parts = [event["args"] for event in by_kind(report, "C") if "category" in event["name"]]
    totals = [event["args"] for event in by_kind(report, "C") if "category" not in event["name"]]
    assert max(parts, key=lambda part: sum(part.values())) == report.peak_by_category
    assert max(total["allocated"] for total in totals) == report.peak_bytes
    times = [event["ts"] for event in by_kind(report, "C")]
    assert times == sorted(times)
    if report.gpu:
        assert max(total["reserved"] for total in totals) == report.peak_reserved_bytes
    assert json.loads(json.dumps(report.trace())) == report.trace()


def test_the_phases_of_a_trace_follow_each_other(report):
    phases = [event for event in by_kind(report, "X") if event["cat"] == "phase"]
    steps = 1 if report.gpu or report.kind == "measured" else 2
    assert [phase["name"] for phase in phases][-3:] == ["forward", "backward", "optimizer"]
    assert len(phases) == 3 * steps
    for before, after in itertools.pairwise(phases):
        assert before["ts"] + before["dur"] == pytest.approx(after["ts"], abs=0.002)


def test_the_ops_of_a_trace_take_the_predicted_time():
    report = predict(build, gpu=T4)
    ops = [event for event in by_kind(report, "X") if event["cat"] != "phase"]
    assert ops[0]["name"] == "aten::addmm"
    assert {op["args"]["phase"] for op in ops} == {"forward", "backward", "optimizer"}
    assert ops[-1]["ts"] + ops[-1]["dur"] == pytest.approx(1e3 * report.time.step_time_ms, rel=1e-3)
    for before, after in itertools.pairwise(ops):
        assert before["ts"] + before["dur"] <= after["ts"] + 0.002
    phases = [event for event in by_kind(report, "X") if event["cat"] == "phase"]
    for phase in phases:
        inside = [op for op in ops if op["args"]["phase"] == phase["name"]]
        assert phase["ts"] <= inside[0]["ts"] + 0.002
        assert phase["ts"] + phase["dur"] >= inside[-1]["ts"]
    products = sum(op["dur"] for op in ops if op["cat"] == "products")
    assert products == pytest.approx(1e3 * report.time.by_kind_ms["products"], rel=1e-3)


def test_a_trace_of_unknown_times_says_so():
    report = predict(build, gpu=T4.model_copy(update={"speed": None}))
    assert report.trace()["otherData"]["times"] == "order of events alone, 1 µs each"
    assert all(event["cat"] == "phase" for event in by_kind(report, "X"))


ASKED = ("--batch", 2, "--gpu", "T4")


def test_the_command_writes_both_files(tmp_path):
    model = config_file(tmp_path, "gpt2")
    files = tmp_path / "out.pickle", tmp_path / "out.json"
    options = ("--snapshot", files[0], "--trace", files[1])
    result = invoke("predict", "--model", model, "--seq-len", 16, *ASKED, *options)
    assert result.exit_code == 0, result.output
    written = Plain(io.BytesIO(files[0].read_bytes())).load()
    assert written["memstudy"] == {"kind": "predicted", "device": "T4"}
    assert json.loads(files[1].read_text())["otherData"]["kind"] == "predicted"
    modules = {frame["name"] for event in events_of(written) for frame in event["frames"]}
    assert "transformer.h.0.attn" in modules
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2-0.json", "out.json", "out.pickle"]


def test_the_command_writes_generation_too(tmp_path):
    model = config_file(tmp_path, "gpt2")
    path = tmp_path / "out.pickle"
    result = invoke("predict", "--model", model, "--prompt", 8, "--generate", 20, *ASKED, "--snapshot", path)
    assert result.exit_code == 0, result.output
    written = Plain(io.BytesIO(path.read_bytes())).load()
    assert {"cache", "logits", "unknown"} <= {event.get("category") for event in events_of(written)}


@pytest.mark.parametrize("option", ["--snapshot", "--trace"])
@pytest.mark.parametrize(
    ("place", "words"),
    [("missing/out", "No such file or directory"), ("here", "is a folder"), ("file/out", "Not a directory")],
)
def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path, option, place, words):
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / place
    result = invoke("predict", "--model", "gpt2", "--seq-len", 16, *ASKED, option, path)
    assert_one_line(result, option, str(path), words, "give ")


def test_a_failed_prediction_leaves_no_file(tmp_path):
    path = tmp_path / "out.pickle"
    result = invoke("predict", "--model", "gpt2", "--seq-len", 99999, *ASKED, "--snapshot", path)
    assert_one_line(result, "1024 positions")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("plot", [_memory_viz.trace_plot, _memory_viz.segment_plot], ids=["trace", "segments"])
def test_the_viewer_draws_it(browser, tmp_path, report, plot):
    """The page is PyTorch's own; its script comes from the network."""
    shot = snapshot(report)
    path = tmp_path / "page.html"
    path.write_text(plot(report.snapshot()))
    page = browser.new_page()
    errors, unreached = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: unreached.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_load_state("networkidle")
    if unreached:
        pytest.skip(f"the viewer's script cannot be had here: {unreached[0]}")
    page.wait_for_selector("svg")
    page.wait_for_timeout(500)
    n_allocations = sum(event["action"] == "alloc" for event in events_of(shot))
    if plot is _memory_viz.trace_plot:
        assert page.locator("polygon").count() >= n_allocations
        assert "optimizer_state" in page.locator("svg").first.text_content()
    else:
        assert page.locator("rect").count() >= sum(len(segment["blocks"]) > 0 for segment in shot["segments"])
    assert errors == []
    page.close()
