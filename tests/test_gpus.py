"""The catalogue of GPUs, and the errors for unknown GPUs and bad GPU files."""

import re
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memstudy.profiler.catalogue import CATALOGUE, Gpu, find_gpu, gpus
from memstudy.profiler.events import MIB

# From NVIDIA's table of CUDA GPUs and the data sheets: compute capability, GB (or GiB) on the box, and the memory's bus
# [bits] and rate [Gbit/s for each of them], of which the bandwidth is the product.
PUBLISHED = {
    "T4": ((7, 5), 16, 256, 10), "RTX2080Ti": ((7, 5), 11, 352, 14), "V100-PCIe-16GB": ((7, 0), 16, 4096, 1.755),
    "V100-16GB": ((7, 0), 16, 4096, 1.755), "V100-32GB": ((7, 0), 32, 4096, 1.755), "RTX3060": ((8, 6), 12, 192, 15),
    "RTX3090": ((8, 6), 24, 384, 19.5), "RTX3090Ti": ((8, 6), 24, 384, 21), "A6000": ((8, 6), 48, 384, 16),
    "RTX4060Ti-16GB": ((8, 9), 16, 128, 18), "RTX4070": ((8, 9), 12, 192, 21), "RTX4080": ((8, 9), 16, 256, 22.4),
    "RTX4090": ((8, 9), 24, 384, 21), "RTX6000Ada": ((8, 9), 48, 384, 20), "RTX5070Ti": ((12, 0), 16, 256, 28),
    "RTX5080": ((12, 0), 16, 256, 30), "RTX5090": ((12, 0), 32, 512, 28), "RTXPRO6000": ((12, 0), 96, 512, 28),
    "A10": ((8, 6), 24, 384, 12.5), "A10G": ((8, 6), 24, 384, 12.5), "A30": ((8, 0), 24, 3072, 2.43),
    "A40": ((8, 6), 48, 384, 14.5), "A100-40GB": ((8, 0), 40, 5120, 2.43),
    "A100-PCIe-40GB": ((8, 0), 40, 5120, 2.43), "A100-80GB": ((8, 0), 80, 5120, 3.186),
    "L4": ((8, 9), 24, 192, 12.5), "L40S": ((8, 9), 48, 384, 18), "H100-PCIe": ((9, 0), 80, 5120, 3.125),
    "H100-80GB": ((9, 0), 80, 5120, 5.234), "H200": ((9, 0), 141, 6144, 6.25), "GH200": ((9, 0), 96, 6144, 5.2),
    "H20": ((9, 0), 96, 6144, 5.2),
    "B200": ((10, 0), 180, 8192, 7.8),
}  # fmt: skip
# fp32 cores of an SM, and tensor FLOP of fp16 for one FLOP of fp32: Hopper and B200 clock their tensor cores lower.
SM = {
    (7, 0): (64, 8), (7, 5): (64, 8), (8, 0): (64, 16), (8, 6): (128, 4), (8, 9): (128, 4), (9, 0): (128, 14.8),
    (10, 0): (128, 28), (12, 0): (128, 4),
}  # fmt: skip
LIMITED = {"H20": 3.36}  # tensor FLOP for one of fp32, for export
# A GeForce card adds up in fp32 at half the rate of its generation, and so does AWS's A10G.
HALF = {name for name in PUBLISHED if name.startswith("RTX")} - {"RTX6000Ada", "RTXPRO6000"} | {"A10G"}


def test_the_catalogue_has_these_cards():
    assert sorted(gpus()) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_card_is_as_published_and_every_figure_has_a_source(name):
    card = find_gpu(name)
    capability, gigabytes, _, _ = PUBLISHED[name]
    assert card == gpus()[name]
    assert card.name == name
    assert card.compute_capability == capability
    # CUDA reports up to a tenth less than the box says; the box counts in 2^30 or 10^9 bytes.
    assert 0.9 * gigabytes * 1000**3 < card.memory_mib * MIB < gigabytes * 1024**3
    assert 50 < card.context_mib < 1000  # with kernels loaded lazily
    assert card.capacity_bytes == (card.memory_mib - card.context_mib) * MIB
    shown = str(round(card.memory_mib)), f"{card.memory_mib / 1024:.2f} GiB"
    assert any(text in card.memory_source for text in shown)
    assert "out-of-memory message" in card.context_source or "estimated from" in card.context_source


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_peaks_of_a_card_fit_together(name):
    capability, _, bits, rate = PUBLISHED[name]
    speed = find_gpu(name).speed
    assert speed.bandwidth_gb_s == pytest.approx(bits * rate / 8, rel=0.005)
    cores, tensor = SM[capability][0], LIMITED.get(name, SM[capability][1])
    hertz = speed.fp32_tflops * 1e12 / (2 * cores * speed.sms)  # two FLOP in a multiply-add
    assert 1.3e9 < hertz < 2.7e9
    assert speed.tensor_tflops == pytest.approx(speed.fp32_tflops * tensor / (2 if name in HALF else 1), rel=0.03)
    if capability < (8, 0):
        assert speed.tf32_tflops is None
    else:
        assert speed.tf32_tflops == pytest.approx(speed.tensor_tflops / 2, rel=0.03)


def test_bf16_is_fast_from_ampere_on():
    assert {name: find_gpu(name).bf16_is_fast for name in ("T4", "V100-16GB", "A30", "RTX4090")} == {
        "T4": False, "V100-16GB": False, "A30": True, "RTX4090": True,
    }  # fmt: skip


def test_the_catalogue_is_installed_with_the_package():
    root = Path(__file__).parents[1]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["memstudy"]
    installed = {path for pattern in patterns for path in (root / "memstudy").glob(pattern)}
    assert CATALOGUE in installed


def described(tmp_path, text, name="card.yaml"):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return find_gpu(str(path))


GOOD = 'compute_capability: "8.0"\nmemory_mib: 1000\ncontext_mib: 100.5\n'
SPEED = (
    "speed: {bandwidth_gb_s: 900, tensor_tflops: 125, tf32_tflops: null, fp32_tflops: 15.7, sms: 80, l2_mib: 6,"
    " pcie_gb_s: 15.75, watts: 300, speed_source: data sheet}\n"
)


@pytest.mark.parametrize("name", ["card.yaml", "card.yml"])
def test_a_users_own_card(tmp_path, name):
    assert described(tmp_path, GOOD, name) == Gpu(
        name="card", compute_capability=(8, 0), memory_mib=1000, context_mib=100.5
    )


def test_a_users_own_card_may_have_a_name_and_sources(tmp_path):
    card = described(tmp_path, GOOD.replace('"8.0"', "12.1") + "name: Mine\nmemory_source: read off\n")
    assert (card.name, card.memory_source, card.compute_capability) == ("Mine", "read off", (12, 1))
    assert card.capacity_bytes == 899.5 * MIB


def test_a_users_own_card_may_have_its_speed(tmp_path):
    speed = described(tmp_path, GOOD + SPEED).speed
    assert (speed.tensor_tflops, speed.tf32_tflops, speed.sms) == (125, None, 80)


def test_an_unknown_name_is_told_with_what_is_known():
    with pytest.raises(ValueError, match=r"unknown GPU 'GTX970'; known: T4, .*B200, or a .yaml file") as caught:
        find_gpu("GTX970")
    assert all(name in str(caught.value) for name in PUBLISHED)


NEEDED = r"; expected e.g. \{compute_capability: \"8.0\", memory_mib: .*\}$"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"card.yaml: None is not a mapping" + NEEDED),
        ("- T4\n", r"card.yaml: \['T4'\] is not a mapping" + NEEDED),
        ("a: [", r"card.yaml: YAML error: while parsing.*" + NEEDED),
        ("memory_mib: !!bool perhaps", r"card.yaml: YAML error: 'perhaps'" + NEEDED),
        ("[" * 5000, r"card.yaml: YAML error: .*recursion" + ".*" + NEEDED),
        (GOOD + "cores: 80\n", r"card.yaml: unknown key cores; known: name, compute_capability, .*" + NEEDED),
        (GOOD + "3: 80\n", r"card.yaml: .*3.*" + NEEDED),
        (GOOD.replace("memory_mib: 1000", ""), r"card.yaml: memory_mib is missing" + NEEDED),
        (GOOD.replace('compute_capability: "8.0"', ""), r"card.yaml: compute_capability is missing" + NEEDED),
        (GOOD.replace("1000", "-1"), r"card.yaml: memory_mib=-1: .*greater than 0" + NEEDED),
        (GOOD.replace("1000", ".nan"), r"card.yaml: memory_mib=nan: .*" + NEEDED),
        (GOOD.replace("1000", "lots"), r"card.yaml: memory_mib='lots': .*number" + NEEDED),
        (GOOD.replace("100.5", "-0.5"), r"card.yaml: context_mib=-0.5: .*greater than or equal to 0" + NEEDED),
        (GOOD.replace("100.5", "1000"), r"card.yaml: .*context_mib must be less than memory_mib" + NEEDED),
        (GOOD + "speed: fast\n", r"card.yaml: speed='fast': Input should be .*" + NEEDED),
        (GOOD + SPEED.replace("sms: 80,", ""), r"card.yaml: speed.sms is missing" + NEEDED),
        (GOOD + SPEED.replace("tf32_tflops: null,", ""), r"card.yaml: speed.tf32_tflops is missing" + NEEDED),
        (GOOD + SPEED.replace("sms", "cores"), r"card.yaml: speed.sms is missing" + NEEDED),
        (GOOD + SPEED.replace("sms: 80", "sms: 80, cores: 1"), r"unknown key speed.cores; known: bandwidth_.*sms"),
        (GOOD + SPEED.replace("80", "80.5"), r"card.yaml: speed.sms=80.5: .*integer.*" + NEEDED),
        (GOOD + SPEED.replace("900", "0"), r"card.yaml: speed.bandwidth_gb_s=0: .*greater than 0" + NEEDED),
        (GOOD + SPEED.replace("null", "-1"), r"card.yaml: speed.tf32_tflops=-1: .*greater than 0" + NEEDED),
        (GOOD + SPEED.replace("300", ".inf"), r"card.yaml: speed.watts=inf: .*finite.*" + NEEDED),
        (GOOD + SPEED.replace("data sheet", "''"), r"card.yaml: speed.speed_source='': .*1 character" + NEEDED),
        (GOOD.replace('"8.0"', "4.5"), r"card.yaml: compute_capability.0=4: .*greater than or equal to 5" + NEEDED),
    ],
)
def test_a_bad_description_is_told_with_what_is_needed(tmp_path, text, said):
    with pytest.raises(ValueError, match=said) as caught:
        described(tmp_path, text)
    assert type(caught.value) is ValueError
    assert str(caught.value).startswith("GPU file ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", "8"),
        ("ampere", "'ampere'"),
        ('"8.x"', "'8.x'"),
        ('"8.0.1"', "'8.0.1'"),
        ('"-8.0"', "'-8.0'"),
        ("[8, 0]", "[8, 0]"),
        ("", "None"),
    ],
)
def test_a_capability_that_is_none(tmp_path, text, value):
    said = f"card.yaml: compute_capability={value}: Value error, major and minor number are needed, with a dot between"
    with pytest.raises(ValueError, match=re.escape(said) + ".*" + NEEDED):
        described(tmp_path, GOOD.replace('"8.0"', text))


@pytest.mark.parametrize(("name", "why"), [("none.yaml", "No such file"), (".yaml", "Is a directory")])
def test_a_file_that_cannot_be_read(tmp_path, name, why):
    (tmp_path / ".yaml").mkdir()
    with pytest.raises(ValueError, match=rf"GPU file .*{name}: {why}.*; known GPUs: T4, ") as caught:
        find_gpu(str(tmp_path / name))
    assert type(caught.value) is ValueError


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
texts = st.one_of(
    st.text(),
    st.binary(),
    st.text(alphabet="ab:{}[]-!&*%#'\"|>?, \n\t0.~", max_size=40),
    st.builds(
        lambda entries: "\n".join(f"{key}: {value}" for key, value in entries),
        st.lists(st.tuples(st.sampled_from(list(Gpu.model_fields)), values), max_size=6),
    ),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("gpus") / "card.yaml"


@settings(max_examples=300, deadline=None)
@given(text=texts)
@example(text="compute_capability: 0x1" + 5000 * "0")  # more digits than Python converts to text
@example(text=GOOD.replace("1000", "1" + 400 * "0"))  # too large for a float
@example(text=GOOD.replace("1000", "0x1" + 5000 * "0"))
@example(text="compute_capability: 2024-13-45")
@example(text="memory_mib: !!timestamp x")
@example(text="&a [*a]")
@example(text="&a {name: *a}")
@example(text='compute_capability: "²."')
@example(text=GOOD + "speed: {3: 80}")
@example(text=GOOD + "speed: &a {sms: *a}")
def test_whatever_a_file_says_there_is_a_gpu_or_a_value_error(file, text):
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with suppress(ValueError):
        card = find_gpu(str(file))
        assert isinstance(card, Gpu)
        assert 0 < card.capacity_bytes <= card.memory_mib * MIB
