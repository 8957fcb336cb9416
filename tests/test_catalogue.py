"""Models by name and by hub id: their settings, what is fetched, and what can't be had."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers as hf
from support.command_line import assert_one_line, invoke
from support.hub_server import ModelHubHandler, serving
from support.tiers import slow_but
from support.tiny_models import TINY

from memstudy.data import sources
from memstudy.huggingface import hub
from memstudy.huggingface.catalogue import hub_models, model_config
from memstudy.profiler import measure, predict
from memstudy.trainers.hub_model import HubModelRun

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")

PREDICT = ["predict", "--batch", 2, "--seq-len", 16, "--model"]

# Weights that were published in another class than the one that is trained: with more heads, without the head, or
# with the vision part.
PUBLISHED_AS = {
    "bert-base-uncased": hf.BertForPreTraining,
    "bert-large-uncased": hf.BertForPreTraining,
    "all-MiniLM-L6-v2": hf.BertModel,
    **dict.fromkeys([f"deberta-v3-{size}" for size in ("xsmall", "small", "base", "large")], hf.DebertaV2Model),
    "reformer-crime-and-punishment": hf.ReformerModel,
}
VISION = {  # of Gemma 3: Gemma team 2025, arXiv:2503.19786, section 2.1; the sizes in its config.json
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 896, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip


def published_class(name: str) -> hf.PreTrainedModel:
    """The model in the class of its published weights, without bytes."""
    if name in ("gemma-3-4b", "gemma-3-12b", "gemma-3-27b"):
        whole = hf.Gemma3Config(text_config=model_config(name), vision_config=VISION)
        return hf.Gemma3ForConditionalGeneration(whole)
    if name in PUBLISHED_AS:
        return PUBLISHED_AS[name](model_config(name))
    sizes = {"vit-base": (197, "classification"), "vit-large": (197, "classification")}
    sizes |= dict.fromkeys([name for name in hub_models() if name.startswith("clip-")], (77, "contrastive"))
    seq_len, task = sizes.get(name, (16, "lm"))
    return HubModelRun(experiment="test", model=name, batch_size=2, seq_len=seq_len, task=task).make_model()


@pytest.mark.parametrize("name", [name for name, known in hub_models().items() if known.parameters])
def test_a_model_known_by_name_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = published_class(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == hub_models()[name].parameters


def test_each_model_known_by_name_has_its_source_and_each_hub_id_one_name():
    assert len(hub_models()) >= 90
    assert all(known.source for known in hub_models().values())
    ids = [id for known in hub_models().values() for id in known.hub]
    assert len(ids) == len(set(ids)) > len(hub_models())
    assert all(id.count("/") == 1 for id in ids)
    unpublished = {name for name, known in hub_models().items() if not known.parameters}
    assert unpublished == {name for name, known in hub_models().items() if not known.hub}


@pytest.mark.parametrize(
    ("id", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("google-bert/bert-base-uncased", "bert-base-uncased"),
    ],
)
def test_a_hub_id_of_the_catalogue_needs_no_network(id, name, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("looked at the internet"))
    assert model_config(id).to_dict() == model_config(name).to_dict()


def test_the_list_of_models_has_id_family_and_parameters():
    lines = {line.split()[0]: line.split() for line in invoke("list", "models").stdout.splitlines()}
    assert lines["llama-3.1-8b"] == ["llama-3.1-8b", "meta-llama/Llama-3.1-8B", "llama", "8,030,261,248"]
    assert lines["reformer-enwik8-learned-positions"][1:] == ["–", "reformer", "–"]


# --- the families of the models known by name

NEW = ["llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-2-2b", "gemma-3-270m", "mistral-7b", "phi-4-mini",
       "smollm2-135m", "smollm3-3b", "olmo-2-1b", "modernbert-base", "deberta-v3-xsmall"]  # fmt: skip
SMALL = {
    "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "local_attention": 8,
    "position_buckets": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "techniques"),
    slow_but([(name, ()) for name in NEW], [(name, bf16) for bf16 in ((), ("bf16",)) for name in NEW]),
)
def test_a_step_of_a_small_model_of_each_family_takes_what_is_predicted(name, techniques, tmp_path):
    settings = hub_models()[name].config
    small = {key: SMALL[key] for key in SMALL if (model_config(name).to_dict() | settings).get(key) is not None}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings | small))
    run = HubModelRun(experiment="test", model=str(path), batch_size=4, seq_len=32, techniques=techniques)
    measured, predicted = measure(run.build()), predict(run.build())
    assert predicted.peak_bytes == measured.peak_bytes
    assert predicted.peak_by_category == measured.peak_by_category


# --- models of the hub


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A hub on this machine; returns its folder. The client's cache is empty, and nobody is logged in."""
    served = tmp_path / "served"
    served.mkdir()
    for name, value in {"HF_HUB_CACHE": tmp_path / "cache", "HF_TOKEN_PATH": tmp_path / "token"}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, str(value))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.fetch_config.cache_clear()
    sources.online.cache_clear()
    with serving(served, ModelHubHandler) as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address.rstrip("/"))
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.split("/", 3)[3]
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
        yield served
    hub.fetch_config.cache_clear()
    sources.online.cache_clear()


def publish(served: Path, repository: str, given: dict) -> None:
    folder = served / repository / "resolve" / "main"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(given))


def tiny(family="llama", **changes) -> dict:
    return TINY[family]().to_dict() | changes


def test_of_a_model_on_the_hub_only_the_config_is_fetched(models, tmp_path):
    publish(models, "someone/tiny", tiny())
    (models / "someone/tiny/resolve/main/model.safetensors").write_bytes(b"weights")
    found = invoke(*PREDICT, "someone/tiny", "--json")
    assert found.exit_code == 0, found.output
    path = tmp_path / "local.json"
    path.write_text(json.dumps(tiny()))
    same = json.loads(invoke(*PREDICT, path, "--json").stdout)
    assert json.loads(found.stdout)["peak_allocated_mib"] == same["peak_allocated_mib"] > 0
    assert [file.name for file in (tmp_path / "cache").rglob("snapshots/*/*")] == ["config.json"]


def test_a_gated_model_wants_the_token_of_somebody_who_may_read_it(models, monkeypatch):
    publish(models, "someone/gated", tiny())
    (models / "someone/gated/gated").touch()
    page = "https://huggingface.co/someone/gated"
    assert_one_line(invoke(*PREDICT, "someone/gated"), "someone/gated: gated", page, "`hf auth login`", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "stranger")
    assert_one_line(invoke(*PREDICT, "someone/gated"), "someone/gated: gated", "your token has no access", page)
    monkeypatch.setenv("HF_TOKEN", "granted")
    assert model_config("someone/gated").hidden_size == 128


def test_a_model_that_does_not_exist_is_told_in_one_line(models, monkeypatch):
    assert_one_line(invoke(*PREDICT, "someone/none"), "model someone/none: the hub has no such", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", "stranger")
    said = invoke(*PREDICT, "someone/none")
    assert_one_line(said, "model someone/none: the hub has no such model; check the id")
    assert "login" not in said.stderr
    (models / "someone/files").mkdir(parents=True)
    assert_one_line(invoke(*PREDICT, "someone/files"), "someone/files: the repository has no config.json")
    assert_one_line(invoke(*PREDICT, "some/one/else"), "some/one/else: this is no hub id", "owner/name")


def unplug(monkeypatch, how: str) -> None:
    """Cut this process off from the hub."""
    hub.fetch_config.cache_clear()
    sources.online.cache_clear()
    if how == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # no server


@pytest.mark.parametrize(("how", "said"), [("offline", "HF_HUB_OFFLINE is set"), ("alone", "the hub is not reached")])
def test_without_the_hub_the_cache_is_read(how, said, models, monkeypatch):
    publish(models, "someone/tiny", tiny())
    assert model_config("someone/tiny").hidden_size == 128
    unplug(monkeypatch, how)
    assert model_config("someone/tiny").hidden_size == 128
    refused = invoke(*PREDICT, "someone/other")
    assert_one_line(refused, f"someone/other: {said}", "no config.json of it", "`memstudy list models`")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}},
            ["model_type='mine' is unknown to transformers", "the code of its auto_map is never run"],
        ),
        ({"model_type": "mine"}, ["model_type='mine' is unknown to transformers"]),
        (
            tiny("bert", architectures=["BertModel"]),
            ["architectures=['BertModel']: a language model's class is needed"],
        ),
        (
            tiny(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
            ["quantised by 'bitsandbytes'", "as a technique"],
        ),
        (tiny(num_hidden_layers="two"), ["num_hidden_layers"]),
    ],
    ids=["remote code", "unknown", "no language model", "quantised", "wrong type"],
)
def test_a_config_of_the_hub_that_describes_no_such_model_is_told_in_one_line(given, said, models):
    publish(models, "someone/odd", given)
    assert_one_line(invoke(*PREDICT, "someone/odd"), "model someone/odd: ", *said)


def test_a_known_family_needs_no_code_of_its_repository_and_weights_are_fp32(models):
    publish(models, "someone/phi", tiny(auto_map={"AutoModelForCausalLM": "mine.Model"}, dtype="bfloat16"))
    model = HubModelRun(experiment="test", model="someone/phi", batch_size=2, seq_len=16).make_model()
    assert type(model) is hf.LlamaForCausalLM
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_of_a_multimodal_model_the_language_model_is_taken(family, models):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    text = {"gemma3": hf.Gemma3TextConfig, "mistral3": hf.MistralConfig}[family](**sizes, vocab_size=100)
    whole = {"gemma3": hf.Gemma3Config, "mistral3": hf.Mistral3Config}[family](text_config=text)
    names = {"gemma3": "Gemma3ForConditionalGeneration", "mistral3": "Mistral3ForConditionalGeneration"}
    publish(models, "someone/sees", whole.to_dict() | {"architectures": [names[family]]})
    run = HubModelRun(experiment="test", model="someone/sees", batch_size=2, seq_len=16)
    model = run.make_model()
    assert type(model) is {"gemma3": hf.Gemma3ForCausalLM, "mistral3": hf.MistralForCausalLM}[family]
    assert model.config.hidden_size == 32
    assert not any("vision" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("florence2", "Florence2ForConditionalGeneration"), ("grounding-dino", "GroundingDinoForObjectDetection")],
)
def test_a_text_part_that_is_no_language_model_of_its_own_is_not_taken(family, architecture, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": family, "architectures": [architecture]}))
    assert_one_line(invoke(*PREDICT, path), f"architectures=['{architecture}']: a language model's class is needed")
