"""Models that can be run: those known by name, other config.json files, and the refused choices for both."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from support.command_line import invoke
from support.results import committed
from support.tiers import cover, slow_but
from support.tiny_models import TINY, config_file
from support.tiny_run import tiny_run
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, ReformerModelWithLMHead

from memstudy import kinds, records
from memstudy.huggingface.catalogue import hub_models
from memstudy.kinds import PredictionRun, parse_run
from memstudy.profiler import measure, predict
from memstudy.studies.glue.run import FineTuneRun
from memstudy.trainers.hub_model import HubModelRun
from memstudy.trainers.inference import InferenceRun
from memstudy.trainers.language_model import LanguageModelRun

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")

POSITIONS = {
    "bert-base-uncased": 512,
    "roberta-base": 512,
    "distilbert-base-uncased": 512,
    "gpt2": 1024,
    "gpt2-xl": 1024,
    "bart-large": 1024,
    "llama-2-7b": 4096,
    "llama-3-8b": 8192,
    "llama-3.2-1b": 131_072,
    "mistral-7b": 32_768,
}


def hub_run(model="gpt2", **changes):
    return HubModelRun(**{"experiment": "test", "model": model, "seq_len": 16, "batch_size": 2, **changes})


def refusal(make=hub_run, **choices) -> str:
    """Return the error message for refused choices, which must be one error of one line."""
    with pytest.raises(ValidationError) as refused:
        make(**choices)
    (error,) = refused.value.errors()
    assert "\n" not in error["msg"]
    return error["msg"]


# --- models by name


LEARNED = ["reformer-crime-and-punishment-learned-positions", "reformer-enwik8-learned-positions"]


@pytest.mark.parametrize("name", LEARNED)
def test_learned_positions_take_the_place_of_axial_ones_alone(name):
    """The published models have axial positions: 149,182,722 parameters are enwik8's, with the head."""
    axial = {"axial_pos_embds": True, "axial_pos_shape": [128, 512], "axial_pos_embds_dim": [256, 768]}
    config = hub_run(name).config()
    published = hub_run(name).config()
    published.update(axial if "enwik8" in name else {"axial_pos_embds": True})
    with torch.device("meta"):
        learned, whole = ReformerModelWithLMHead(config), ReformerModelWithLMHead(published)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (learned, whole)]
    tables = sum(
        rows * width for rows, width in zip(published.axial_pos_shape, published.axial_pos_embds_dim, strict=True)
    )
    assert counts[0] - counts[1] == config.hidden_size * config.max_position_embeddings - tables
    assert counts[1] == {LEARNED[0]: 2_584_064 + 164_160, LEARNED[1]: 149_182_722}[name]


def test_axial_positions_train_on_all_of_them_and_read_fewer():
    said = refusal(model="reformer-crime-and-punishment", seq_len=1024)
    assert "seq_len=1024: with the axial positions of reformer-crime-and-punishment it trains on 524288 tokens" in said
    run = InferenceRun(experiment="tiny", model="reformer-crime-and-punishment", batch_size=1, seq_len=128)
    assert measure(run.build(), iterations=1).peak_bytes > 4 * hub_models()["reformer-crime-and-punishment"].parameters


@pytest.mark.parametrize("name", POSITIONS)
def test_a_sequence_fills_the_models_positions_and_no_more(name):
    positions = POSITIONS[name]
    assert hub_run(name, seq_len=positions).seq_len == positions
    said = refusal(model=name, seq_len=positions + 1)
    assert f"seq_len={positions + 1} is more than the {positions} positions of {name}" in said


def test_relative_positions_have_no_end():
    assert hub_run("t5-small", seq_len=100_000).seq_len == 100_000


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_is_the_one_asked_for(implementation):
    with FakeTensorMode():
        model = hub_run("gpt2", attention=implementation).make_model()
    assert model.config._attn_implementation == implementation


def test_an_unknown_name_is_told_similar_ones_and_the_remedy():
    said = refusal(model="gpt3")
    for word in (
        "unknown model 'gpt3'",
        "similar: gpt2",
        "`memstudy list models`",
        "hub id",
        "path of its config.json",
    ):
        assert word in said


# --- models by the path of a config.json


TASKS = [
    *((family, "lm") for family in TINY),
    *((family, "classification") for family in ("gpt2", "llama", "bert", "roberta")),
]


@pytest.mark.parametrize(("family", "task"), slow_but(cover(TASKS), TASKS))
def test_a_step_of_a_model_in_a_file_takes_what_is_predicted(family, task, tmp_path):
    make = hub_run(config_file(tmp_path, family), task=task, techniques=("bf16",)).build()
    measured, predicted = measure(make), predict(make)
    assert predicted.peak_bytes == measured.peak_bytes
    assert predicted.peak_by_category == measured.peak_by_category


def test_a_file_that_has_only_what_differs_from_the_familys_defaults_is_enough(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(hub_models()["gpt2-medium"].config))
    with FakeTensorMode():
        model = hub_run(str(path)).make_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == hub_models()["gpt2-medium"].parameters


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"{n_layer: 2}", "not JSON"),
        (b'{"model_type": "gpt2\xff"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["gpt2"]', "model_type=None is unknown to transformers"),
        (b'{"n_layer": 2}', "model_type=None is unknown to transformers"),
        (b'{"model_type": ["gpt2"]}', "model_type=['gpt2'] is unknown to transformers"),
        (b'{"model_type": "gpt9", "auto_map": {"AutoConfig": "x--y.Z"}}', "model_type='gpt9' is unknown to"),
        (b'{"model_type": "gpt2"}', "architectures=None: a language model's class is needed"),
        (b'{"model_type": "gpt2", "architectures": []}', "architectures=[]: a language model's class is needed"),
        (b'{"model_type": "gpt2", "architectures": ["GPT2Model"]}', "architectures=['GPT2Model']"),
        (b'{"model_type": "gpt2", "architectures": ["NoSuchModel"]}', "architectures=['NoSuchModel']"),
        (b'{"model_type": "gpt2", "architectures": "GPT2LMHeadModel"}', "architectures='GPT2LMHeadModel'"),
        (b'{"model_type": "vit", "architectures": ["ViTForImageClassification"]}', "is needed, or task classification"),
        (b'{"model_type": "clip", "architectures": ["CLIPModel"]}', "is needed, or task contrastive"),
        (b'{"model_type": "gpt2", "architectures": ["BertForMaskedLM"]}', "BertForMaskedLM is not of its model_type"),
        (b'{"model_type": "gpt2", "n_layer": "two"}', "Field 'n_layer' expected int, got str"),
    ],
    ids=lambda value: value[:60].decode(errors="replace") if isinstance(value, bytes) else "",
)
def test_a_file_that_describes_no_language_model_is_named_with_the_reason(content, said, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    told = refusal(model=str(path))
    assert f"model {path}: " in told
    assert said in told


def test_a_path_that_is_no_file_is_refused_without_a_look_at_the_internet(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("looked at the internet"))
    monkeypatch.chdir(tmp_path)
    assert "model none.json: No such file or directory; the path of a config.json" in refusal(model="none.json")
    (tmp_path / "folder.json").mkdir()
    assert "model folder.json: Is a directory" in refusal(model="folder.json")


@pytest.mark.parametrize(("family", "positions"), [("gpt2", 64), ("roberta", 64), ("bert", 64)])
def test_the_positions_of_a_model_in_a_file_count_too(family, positions, tmp_path):
    path = config_file(tmp_path, family)
    hub_run(path, seq_len=positions)
    assert f"the {positions} positions of {path}" in refusal(model=path, seq_len=positions + 1)


@pytest.mark.parametrize("family", ["camembert", "xlm-roberta", "mpnet"])
def test_tables_with_rows_for_the_padding_have_fewer_positions(family, tmp_path):
    config = AutoConfig.for_model(family, max_position_embeddings=66, pad_token_id=1)
    config.architectures = [
        {"camembert": "Camembert", "xlm-roberta": "XLMRoberta", "mpnet": "MPNet"}[family] + "ForMaskedLM"
    ]
    path = str(tmp_path / "config.json")
    config.to_json_file(path)
    hub_run(path, seq_len=64)
    assert "the 64 positions" in refusal(model=path, seq_len=65)


# --- choices


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; known: adamw, adamw_torch"),
        ({"task": "translation"}, "'lm', 'classification' or 'contrastive'"),
        ({"attention": "tiled"}, "'eager', 'sdpa' or 'flash'"),
        ({"measure_steps": 0}, "greater than 0"),
        ({"techniques": ("fp8",)}, "unknown technique 'fp8'; known: bf16"),
        ({"techniques": ("accumulation=4",)}, "accumulation=4 does not divide batch_size=2"),
        ({"techniques": ("adamw_8bit",), "optimizer": "sgd"}, "adamw_8bit is an optimizer itself and excludes"),
        ({"model": "t5-small", "task": "classification"}, "classification is for encoders and decoders"),
        ({"model": "bart-base", "task": "classification"}, "classification is for encoders and decoders"),
    ],
    ids=str,
)
def test_bad_choices_are_refused(choices, said):
    assert said in refusal(**choices)


@pytest.mark.parametrize("model", ["gpt2", "llama-2-7b", "mistral-7b"])
def test_a_chunked_loss_is_for_causal_language_models(model):
    assert hub_run(model, techniques=("chunked_loss",)).techniques == ("chunked_loss",)
    assert "task classification is none" in refusal(model=model, techniques=("chunked_loss",), task="classification")


@pytest.mark.parametrize(
    "model", ["bert-base-uncased", "roberta-base", "distilbert-base-uncased", "t5-small", "bart-base"]
)
def test_a_chunked_loss_is_for_no_others(model):
    said = refusal(model=model, techniques=("chunked_loss",))
    assert f"chunked_loss is for causal language models; {model} with task lm is none" in said


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_torch", "adafactor", "sgd"])
def test_the_optimizer_is_trainers(optimizer, tmp_path):
    run = hub_run(config_file(tmp_path, "gpt2"), optimizer=optimizer)
    report = predict(run.build())
    state = report.peak_by_category["optimizer"] / report.peak_by_category["parameters"]
    assert state == pytest.approx({"adamw": 2, "adamw_torch": 2, "adafactor": 0.03, "sgd": 0}[optimizer], abs=0.03)


@pytest.mark.parametrize("report_on", slow_but([predict], [predict, measure]))
def test_an_8bit_optimizer_takes_the_same_whatever_was_before(report_on, tmp_path):
    """bitsandbytes would remember that BERT's third parameter is an embedding and keep its state in 32 bits."""
    makes = [
        hub_run(config_file(tmp_path, family), techniques=("adamw_8bit",)).build()
        for family in ("gpt2", "bert", "gpt2")
    ]
    before, between, after = (report_on(make).peak_by_category["optimizer"] for make in makes)
    assert before == after != between


# --- descriptions as JSON


def test_no_default_changes_since_a_records_name_leaves_defaults_out():
    """A changed default would rename records; a new field with a line in defaults.json renames none."""
    defaults = {
        name: {
            field: choice.get_default(call_default_factory=True)
            for field, choice in kind.model_fields.items()
            if field != "kind" and not choice.is_required()
        }
        for name, kind in kinds.KINDS.items()
    }
    for kind, frozen in json.loads(Path(__file__).with_name("defaults.json").read_text()).items():
        assert json.loads(json.dumps(defaults[kind])) | frozen == json.loads(json.dumps(defaults[kind]))


def test_a_description_names_what_is_not_at_its_default_and_its_kind():
    assert tiny_run().model_dump(mode="json") == tiny_run(seed=0, processes=1).model_dump(mode="json")
    assert {"processes", "seed", "techniques"}.isdisjoint(tiny_run().model_dump(mode="json"))
    nested = PredictionRun(experiment="of", of=tiny_run(seed=3)).model_dump(mode="json")
    assert nested == {"kind": "prediction", "experiment": "of", "of": tiny_run(seed=3).model_dump(mode="json")}


RECORDS = committed("lab4_grid")


def test_the_records_of_the_study_still_describe_the_runs_that_their_names_say():
    assert len(RECORDS) > 50
    for path, record in RECORDS.items():
        run = parse_run(record["config"])
        assert isinstance(getattr(run, "of", run), LanguageModelRun)
        assert records.run_id(run.model_dump(mode="json")) == record["run_id"]
        assert path.stem.startswith(record["run_id"])


def test_each_kind_of_run_has_its_own_fields():
    with pytest.raises(ValueError, match=r"unknown field 'n_layers' of a hub_model run; known: .*optimizer"):
        parse_run(hub_run().model_dump(mode="json") | {"n_layers": 2})
    with pytest.raises(ValueError, match=r"unknown field 'optimizer' of a language_model run; known: .*n_layers"):
        parse_run(tiny_run().model_dump(mode="json") | {"optimizer": "sgd"})
    with pytest.raises(ValueError, match=r"unknown kind of run 'encoder'; known: language_model, hub_model"):
        parse_run(hub_run().model_dump(mode="json") | {"kind": "encoder"})


def test_a_run_of_a_model_in_a_file_leaves_a_record(tmp_path):
    run = hub_run(config_file(tmp_path, "gpt2"), measure_steps=2)
    path = tmp_path / "run.json"
    path.write_text(run.model_dump_json())
    result = invoke("run", path, "--results", tmp_path / "results")
    assert result.exit_code == 0, result.output
    (record,) = records.read_records(tmp_path / "results")
    assert (record["status"], record["config"]) == ("ok", run.model_dump(mode="json"))
    assert len(record["curves"]["step_times_ms"]) == 2
    assert record["metrics"]["n_parameters"] == sum(parameter.numel() for parameter in run.make_model().parameters())
    assert record["metrics"]["peak_allocated_mib"] == predict(run.build()).peak_allocated_mib


def test_a_run_whose_optimizer_is_not_installed_is_unavailable(tmp_path):
    run = hub_run(config_file(tmp_path, "gpt2"), optimizer="lomo")
    path = tmp_path / "run.json"
    path.write_text(run.model_dump_json())
    assert invoke("run", path, "--results", tmp_path / "results").exit_code == 0
    (record,) = records.read_records(tmp_path / "results")
    assert record["status"] == "unavailable"
    assert "lomo" in record["reason"]


def test_the_tokens_of_a_batch_are_the_models(tmp_path):
    run = hub_run(config_file(tmp_path, "bert"), batch_size=8, seq_len=64)
    batch = run.make_batch()
    assert batch["input_ids"].shape == (8, 64)
    assert batch["labels"] is batch["input_ids"]
    assert 900 < batch["input_ids"].max() < 1000
    labels = hub_run(config_file(tmp_path, "bert"), batch_size=8, task="classification").make_batch()["labels"]
    assert labels.shape == (8,)
    assert set(labels.tolist()) <= {0, 1}
    assert labels.dtype is torch.int64


# --- variants in place of a model's attention, forward passes, fine-tunings

LOW_RANK = {"variant": "lowrank", "rank": 16}
OF_A_VARIANT = [
    ({"convert_to": {"variant": "lowrank", "rank": 769}}, "rank=769 is above the width of bert-base-uncased, 768"),
    (
        {"convert_to": {"variant": "linformer", "rank": 17, "max_len": 64}},
        "rank=17 is more than seq_len=16 tokens",
    ),
    ({"convert_to": {"variant": "linformer", "rank": 4, "max_len": 15}}, "max_len=15 is less than seq_len=16"),
    ({"layers": (0,)}, "layers=[0] needs a convert_to that replaces projections: lowrank"),
    ({"layers": (0,), "convert_to": {"variant": "window", "window": 4}}, "layers=[0] needs a convert_to that replaces"),
    ({"layers": (0, 12), "convert_to": LOW_RANK}, "layers=[0, 12]: bert-base-uncased has 12, counted from 0"),
    ({"layers": (-1,), "convert_to": LOW_RANK}, "greater than or equal to 0"),
    ({"convert_to": {"variant": "low_rank"}}, "unknown attention variant 'low_rank'; known: softmax, window"),
    ({"convert_to": {"rank": 4}}, "unknown attention variant None; known: softmax"),
    ({"convert_to": {"variant": "lowrank", "size": 4}}, "attention 'lowrank': .*'size'; its settings: rank, parts"),
    ({"convert_to": {"variant": "lowrank", "rank": 0}}, "lowrank: rank=0; take at least 1"),
    ({"convert_to": {"variant": "lowrank", "parts": "qx"}}, "lowrank: parts='qx'; take letters of 'qkvo'"),
]
KINDS = {
    "hub_model": lambda **changes: hub_run(**changes),
    "inference": lambda **changes: InferenceRun(**sizes(changes)),
    "fine_tune": lambda **changes: FineTuneRun(**sizes(changes), dataset="glue/sst2", data_hash="0", train_rows=8),
}


def sizes(changes):
    return {"experiment": "test", "model": "bert-base-uncased", "seq_len": 16, "batch_size": 2, **changes}


def fine_tune(**changes):
    return FineTuneRun(**sizes({"dataset": "glue/sst2", "data_hash": "0" * 16, "train_rows": 8, **changes}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("choices", "said"), OF_A_VARIANT, ids=lambda value: "" if isinstance(value, str) else None)
def test_a_variant_that_does_not_fit_is_refused(kind, choices, said):
    message = refusal(KINDS[kind], model="bert-base-uncased", **choices)
    for part in said.split(".*"):
        assert part in message


@pytest.mark.parametrize(
    "choices",
    [
        {"convert_to": {"variant": "lowrank", "rank": 768}},
        {"convert_to": {"variant": "linformer", "rank": 16, "max_len": 16}},
        {"convert_to": LOW_RANK, "layers": (0, 11)},
        {"convert_to": {"variant": "window", "window": 4}},
    ],
    ids=str,
)
def test_a_variant_may_go_to_the_ends_of_the_range(choices):
    with FakeTensorMode():
        model = hub_run("bert-base-uncased", **choices).make_model()
    assert model.config.memstudy_attention["variant"] == choices["convert_to"]["variant"]


def test_a_variant_that_is_not_causal_is_refused_a_decoder_when_it_is_made():
    run = hub_run("gpt2", convert_to={"variant": "linformer", "rank": 4, "max_len": 16})
    with FakeTensorMode(), pytest.raises(ValueError, match=r"linformer .*is_causal=True"):
        run.make_model()


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"model": "gpt2"}, "no trained weights are known for model 'gpt2'; known: all-MiniLM-L6-v2, bert-base"),
        ({"techniques": ("optimizer_in_backward",)}, "optimizer_in_backward never has all gradients, which a fine-tun"),
        ({"train_rows": -1}, "greater than or equal to 0"),
        ({"eval_rows": 0}, "greater than 0"),
        ({"epochs": 0}, "greater than 0"),
        ({"measure_steps": 1}, "Input should be 0"),
        ({"task": "ner"}, "'lm' or 'classification'"),
        ({"seq_len": 513}, "seq_len=513 is more than the 512 positions"),
    ],
    ids=str,
)
def test_bad_choices_of_a_fine_tuning_are_refused(choices, said):
    assert said in refusal(fine_tune, **choices)


def test_a_fine_tuning_of_no_config_json_is_refused(tmp_path):
    assert "No such file or directory" in refusal(fine_tune, model=f"{tmp_path}/config.json")


def test_a_fine_tuning_on_an_unknown_data_set_is_refused_before_it_begins():
    with pytest.raises(ValueError, match=r"unknown data set 'glue/sst3'; known: polish-books") as refused:
        fine_tune(dataset="glue/sst3").load_data()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "run",
    [
        tiny_run(techniques=("bf16",)),
        hub_run(techniques=("bf16",), optimizer="adafactor"),
        hub_run("bert-base-uncased", convert_to=LOW_RANK, layers=(1, 3)),
        InferenceRun(**sizes({"convert_to": {"variant": "linformer", "rank": 4, "max_len": 16}, "measure_steps": 5})),
        fine_tune(convert_to=LOW_RANK, layers=(0,), techniques=("bf16",), epochs=3),
        fine_tune(task="lm", dataset="wikitext-2-v1", model="all-MiniLM-L6-v2"),
    ],
    ids=["language", "hub", "converted", "inference", "fine-tune", "lm"],
)
def test_each_kind_of_run_survives_json(run):
    again = parse_run(json.loads(run.model_dump_json()))
    assert again == run
    assert type(again) is type(run)
    assert records.run_id(again.model_dump(mode="json")) == records.run_id(run.model_dump(mode="json"))


def test_the_layers_are_part_of_a_runs_name():
    names = {
        records.run_id(hub_run("bert-base-uncased", convert_to=LOW_RANK, layers=layers).model_dump(mode="json"))
        for layers in ((), (0,), (0, 1))
    }
    assert len(names) == 3
