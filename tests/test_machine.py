"""The machine's name and bfloat16 speed, and their effect on runs, parameters and records."""

import json

import papermill
import pytest
from support.results import committed
from support.tiny_run import tiny_run

from memstudy import machine, project, records
from memstudy.cli import jobs
from memstudy.study import Study

SLOW, FAST = 0.02, 1.9
AVX2 = "sse4_2 avx avx2"
AVX512 = f"{AVX2} avx512f avx512_vnni"


@pytest.fixture
def processor(monkeypatch):
    """Make the system report the given values about its processor."""
    for variable in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)

    def say(**told):
        monkeypatch.setattr(machine, "_told", lambda: told)
        machine.cpu.cache_clear()

    yield say
    machine.cpu.cache_clear()


@pytest.fixture
def probe(monkeypatch, tmp_path):
    """Make the bf16 probe return a given speed, here and in child processes."""
    monkeypatch.setenv("MEMSTUDY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()

    def answer(speed):
        monkeypatch.setattr(machine, "_measured_bf16_speed", lambda: speed)
        (tmp_path / "cache" / "bf16_speed.json").unlink(missing_ok=True)
        assert machine.bf16_speed() == speed

    return answer


@pytest.mark.parametrize(
    ("flags", "sets"),
    [
        ("sse4_2", []),
        (AVX2, ["AVX2"]),
        (AVX512, ["AVX-512"]),
        (f"{AVX512} avx512_bf16", ["AVX-512", "bf16"]),
        (f"{AVX512} avx512_bf16 amx_bf16", ["AVX-512", "bf16", "AMX"]),
    ],
)
def test_instruction_sets_are_read_from_the_processor(processor, flags, sets):
    processor(flags=flags)
    assert machine.instruction_sets() == sets


@pytest.mark.parametrize(("variable", "value"), [("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX2")])
def test_a_processor_that_is_held_to_avx2_is_called_so(processor, monkeypatch, variable, value):
    processor(flags=f"{AVX512} avx512_bf16 amx_bf16")
    monkeypatch.setenv(variable, value)
    assert machine.instruction_sets() == ["AVX2"]


def test_processors_of_one_name_with_other_instructions_are_other_machines(processor):
    names = set()
    for flags in (AVX2, AVX512, f"{AVX512} avx512_bf16"):
        processor(flags=flags, **{"model name": "AMD EPYC"})
        names.add(machine.cpu())
    assert len(names) == 3
    assert all(name.startswith("AMD EPYC, ") and "cores" in name and "thread" in name for name in names)


def test_a_processor_without_a_name_goes_by_its_family_and_number(processor):
    processor(flags=AVX2, vendor_id="AuthenticAMD", model="17", **{"cpu family": "25"})
    assert machine.cpu().startswith("AuthenticAMD family 25 model 17, AVX2, ")


def test_every_committed_record_is_read_with_instruction_sets():
    devices = {record["provenance"]["device"] for record in committed().values()}
    assert devices
    assert all("AVX-512 bf16" in device and "thread" in device for device in devices)


def test_the_speed_is_measured_once_and_kept(probe, monkeypatch):
    probe(1.25)
    monkeypatch.setattr(machine, "_measured_bf16_speed", lambda: pytest.fail("measured again"))
    assert machine.bf16_speed() == 1.25


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"another machine": 3}'])
def test_a_damaged_note_of_the_speed_is_measured_again(probe, tmp_path, text):
    probe(1.25)
    (tmp_path / "cache" / "bf16_speed.json").write_text(text)
    assert machine.bf16_speed() == 1.25


def test_the_probe_measures():
    assert 0 < machine._measured_bf16_speed() < 1000


@pytest.mark.parametrize(("speed", "emulated"), [(SLOW, True), (FAST, False)])
def test_a_step_in_emulated_bfloat16_is_measured_and_not_timed(probe, tmp_path, speed, emulated):
    probe(speed)
    metrics = tiny_run(techniques=("bf16",)).execute(tmp_path)["metrics"]
    assert metrics.get("emulated", False) == emulated
    assert ("step_time_ms" in metrics) != emulated
    assert ("tokens_per_s" in metrics) != emulated
    assert metrics["peak_allocated_mib"] > 0


def test_a_step_in_fp32_is_timed_on_any_machine(probe, tmp_path):
    probe(SLOW)
    metrics = tiny_run().execute(tmp_path)["metrics"]
    assert "emulated" not in metrics
    assert metrics["step_time_ms"] > 0


@pytest.mark.parametrize(("asked", "speed", "techniques"), [
    ("auto", FAST, ["bf16"]), ("auto", SLOW, []), (["bf16"], SLOW, ["bf16"]), ([], FAST, []),
])  # fmt: skip
def test_auto_asks_the_machine_and_a_list_does_not(probe, tmp_path, asked, speed, techniques):
    probe(speed)
    namespace = project.notebook_parameters("glue_lowrank") | {
        "results_dir": str(tmp_path / "results"), "out_dir": str(tmp_path),
    }  # fmt: skip
    assert Study("glue_lowrank", namespace).precision(asked) == techniques


@pytest.mark.parametrize(("said", "techniques"), [("bf16", ["bf16"]), ("fp32", [])])
def test_where_the_runs_are_for_another_machine_auto_asks_that(probe, tmp_path, monkeypatch, said, techniques):
    probe(SLOW if techniques else FAST)
    monkeypatch.setenv(records.PRECISION, said)
    namespace = project.notebook_parameters("glue_lowrank") | {
        "results_dir": str(tmp_path / "results"), "out_dir": str(tmp_path),
    }  # fmt: skip
    assert Study("glue_lowrank", namespace).precision("auto") == techniques


def test_the_reference_never_asks_the_machine():
    for stem in project.studies():
        if "precision" in project.notebook_parameters(stem):
            assert project.read_parameters(stem, "full")["precision"] == ["bf16"]


@pytest.mark.slow
def test_what_a_study_plans_on_a_slow_machine_differs_in_precision_alone(probe, tmp_path):
    planned = {}
    for speed in (SLOW, FAST):
        probe(speed)
        planned[speed] = jobs.missing("glue_lowrank", "smoke", tmp_path / str(speed))
    slow, fast = (list(planned[speed].values()) for speed in (SLOW, FAST))
    trained = [config for config in fast if config["kind"] == "fine_tune"]
    assert trained
    assert all(config["techniques"] == ["bf16"] for config in trained)
    for config in trained:
        del config["techniques"]
    assert sorted(map(json.dumps, slow)) == sorted(map(json.dumps, fast))


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["glue_lowrank", "lab4_grid"])
def test_the_reference_prints_the_same_tables_on_a_slow_machine(stem, probe, tmp_path):
    printed = {}
    for speed in (SLOW, FAST):
        probe(speed)
        out = tmp_path / str(speed)
        places = {"results_dir": str(records.ROOT / "results"), "out_dir": str(out), "run_missing": False}
        papermill.execute_notebook(
            records.ROOT / "notebooks" / f"{stem}.ipynb", None, cwd=records.ROOT / "notebooks", progress_bar=False,
            parameters=project.read_parameters(stem, "full") | places,
        )  # fmt: skip
        printed[speed] = {path.name: path.read_text("utf-8") for path in sorted((out / "report").rglob("*.tex"))}
    assert len(printed[SLOW]) > 3
    assert printed[SLOW] == printed[FAST]


def test_a_record_says_how_fast_bfloat16_was(probe, tmp_path):
    probe(SLOW)
    record = records.perform(
        tiny_run().model_dump(mode="json"), tmp_path, lambda _: {"metrics": {}, "curves": {}, "data": {}}
    )
    assert record["provenance"]["bf16_speed"] == SLOW
