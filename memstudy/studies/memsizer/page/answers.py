"""Trained models that answer questions about digits: found, loaded and asked."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memstudy.studies.memsizer.encoder_decoder import PLACES, Seq2SeqLM, state_bytes
from memstudy.studies.memsizer.run import Seq2SeqRun

LOCK = threading.Lock()  # one question at a time: the models are shared, and timings would spoil each other


@dataclass(frozen=True)
class Answer:
    """A model's answer and its cost.

    ``latency_ms`` is the time from the question's text to the answer's; ``state_bytes`` is the size of the decoding
    state at the last token.
    """

    text: str
    latency_ms: float
    state_bytes: int


@dataclass(frozen=True)
class Model:
    """A trained model, its tokenizers, and the run that made it."""

    name: str
    run: Seq2SeqRun
    network: Seq2SeqLM
    read: PreTrainedTokenizerFast
    write: PreTrainedTokenizerFast

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def longest_question(self) -> int:
        """Most characters of a question; the end token takes one more position."""
        return self.run.seq_len - 1

    @torch.no_grad()
    def ask(self, question: str) -> Answer:
        """Answer greedily; ``question`` has at most `longest_question` characters."""
        with LOCK:
            began = time.perf_counter()
            tokens = self.read(question, add_special_tokens=False)["input_ids"]
            output = self.network.generate(
                torch.tensor([[*tokens, self.read.eos_token_id]]),
                max_new_tokens=self.run.target_len,
                do_sample=False,
                return_dict_in_generate=True,
            )
            text = self.write.decode(output.sequences[0], skip_special_tokens=True).strip()
            latency = time.perf_counter() - began
        return Answer(text, 1e3 * latency, state_bytes(output.past_key_values))


def name_of(run: Seq2SeqRun) -> str:
    """Transformer, MemSizer, or MemSizer in some places."""
    places = [place for place in PLACES if place in run.memsizer]
    if len(places) in (0, 3):
        return "MemSizer" if places else "Transformer"
    return f"MemSizer in {' and '.join(places)}"


def load(folder: Path) -> Model:
    """Load the model that `seq2seq.execute` saved in ``folder``.

    Raises
    ------
    ValueError
        When a file is missing or damaged, or the weights do not fit.
    """
    try:
        run = Seq2SeqRun.model_validate_json((folder / "run.json").read_text(encoding="utf-8"))
        network, found = Seq2SeqLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        read, write = (
            AutoTokenizer.from_pretrained(folder / side, local_files_only=True) for side in ("source", "target")
        )
    except (OSError, ValueError, RuntimeError, ValidationError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"the model in {folder} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    left = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[kind]]
    if left:
        raise ValueError(f"the model in {folder} cannot be loaded: its weights do not fit, {left[0]} first")
    return Model(name_of(run), run, network.eval(), read, write)


def load_all(folder: Path) -> tuple[dict[str, Model], list[str]]:
    """The newest model of each name below ``folder`` that answers questions about digits, and all loading errors."""
    models: dict[str, Model] = {}
    problems: list[str] = []
    for path in sorted(folder.glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            model = load(path.parent)
        except ValueError as error:
            problems.append(str(error))
            continue
        if model.run.target_vocab_size:
            models.setdefault(model.name, model)
    return dict(sorted(models.items(), reverse=True)), problems
