"""Studies' parameters: any YAML text gives a dict of known keys or a `ValueError` of one line."""

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memstudy.project import check_parameters, notebook_parameters, parameters_in, read_parameters, scales, studies

CELL = parameters_in("""
dataset: str = "miniature"
n_layers: int = 2
learning_rate: float = 0.001
run_missing: bool = True
seeds: list = [0]
precision: str = "auto"
size: dict = {"width": 64, "dropout": 0.1}
texts: dict[str, dict] = {"ptb": {"rows": 32}, "xsum": {"rows": 8, "beams": 1}}
lengths: dict[str, list] = {"ptb": [64]}
""")
DEFAULTS = {name: default for name, (_, default) in CELL.items()}

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates()
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(sorted(DEFAULTS)) | st.text(), inner),
    max_leaves=8,
)
yaml_like = st.text(alphabet=st.sampled_from(list("abc019.:-_[]{}!&*#|>'\"%@`,?=~<\n \t\x00ł")))
tagged = st.builds(
    "{}: !!{} {}".format,
    st.sampled_from(sorted(DEFAULTS)),
    st.sampled_from(["int", "float", "bool", "timestamp", "binary", "set", "omap", "python/object/apply:os.system"]),
    st.text(alphabet="0123456789xb_.:-eT '\"[]{}", max_size=12),
)


@settings(max_examples=1000, deadline=None)
@given(st.text() | yaml_like | tagged | documents.map(yaml.safe_dump) | st.binary())
@example("n_layers: !!bool 3")  # PyYAML raises KeyError,
@example("n_layers: !!timestamp x")  # AttributeError,
@example("n_layers: !!int ''")  # IndexError,
@example("[" * 1500)  # and RecursionError
@example("false")
@example("[]")
@example(b"\xff\xfe\x00")
def test_any_text_gives_known_keys_of_the_right_type_or_one_line(text):
    try:
        read = check_parameters(text, CELL, where="quick/some.yaml")
    except ValueError as error:
        read, said = {}, str(error)
    else:
        said = "quick/some.yaml: "
    assert said.startswith("quick/some.yaml: ")
    assert len(said.splitlines()) == 1
    assert read.keys() <= DEFAULTS.keys()
    for name, value in read.items():
        also = {"learning_rate": int, "precision": list}.get(name)
        assert type(value) in (type(DEFAULTS[name]), also)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "dataset": st.text(),
            "n_layers": st.integers(),
            "learning_rate": st.floats(allow_nan=False) | st.integers(),
            "run_missing": st.booleans(),
            "seeds": st.lists(st.integers()),
            "precision": st.just("auto") | st.lists(st.text()),
            "size": st.fixed_dictionaries({}, optional={"width": st.integers(), "dropout": st.integers()}),
            "texts": st.dictionaries(st.text(), st.fixed_dictionaries({}, optional={"rows": st.integers()})),
            "lengths": st.dictionaries(st.text(), st.lists(st.integers())),
        },
    )
)
def test_parameters_of_the_right_types_are_read_as_they_were_written(given):
    assert check_parameters(yaml.safe_dump(given), CELL, where="") == given


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_file_sets_nothing(text):
    assert check_parameters(text, CELL, where="") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: 3", "unknown key 'layers'; known: dataset, n_layers, learning_rate, run_missing, seeds, "),
        ("3: 3", "unknown key 3; known: dataset, "),
        ("n_layers: two", "n_layers='two' is of type str, int is needed"),
        ("n_layers: true", "n_layers=True is of type bool, int is needed"),
        ("n_layers: 2.0", "n_layers=2.0 is of type float, int is needed"),
        ("run_missing: 1", "run_missing=1 is of type int, bool is needed"),
        ("seeds: 3", "seeds=3 is of type int, list is needed"),
        ("learning_rate: 1e-3", "learning_rate='1e-3' is of type str, float is needed"),  # YAML 1.1 needs 1.0e-3
        ("seeds: [0, one]", "seeds[1]='one' is of type str, int is needed"),
        ("size: {widht: 64}", "unknown key 'widht' in size; known: width, dropout"),
        ("size: {width: wide}", "size['width']='wide' is of type str, int is needed"),
        ("texts: {wmt: {row: 32}}", "unknown key 'row' in texts['wmt']; known: rows, beams"),
        ("texts: {wmt: 32}", "texts['wmt']=32 is of type int, dict is needed"),
        ("lengths: {wmt: [64, x]}", "lengths['wmt'][1]='x' is of type str, int is needed"),
        ("precision: 16", "precision=16 is of type int, str is needed"),
        ("- n_layers", "a mapping of parameters is needed, got list"),
        ("n_layers", "a mapping of parameters is needed, got str"),
        ("0", "a mapping of parameters is needed, got int"),
        ("n_layers: [1", "not YAML: while parsing a flow sequence"),
        ("n_layers: !!python/name:os.system", "not YAML: could not determine a constructor"),
    ],
)
def test_the_error_names_the_file_the_key_the_value_and_what_is_allowed(text, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        check_parameters(text, CELL, where="quick/some.yaml")
    assert str(caught.value).startswith(f"quick/some.yaml: {message}")


@pytest.mark.parametrize(("stem", "scale"), [(stem, scale) for stem in studies() for scale in scales(stem)])
def test_every_parameter_file_fits_its_notebook(stem, scale):
    assert read_parameters(stem, scale).keys() <= notebook_parameters(stem).keys()


def test_an_unknown_study_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"unknown study 'lab5'; known: .*lab4_grid"):
        read_parameters("lab5", "quick")


def test_an_unknown_scale_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"study lab4_grid has no scale 'huge'; there are: .*quick"):
        read_parameters("lab4_grid", "huge")
