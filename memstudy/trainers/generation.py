"""Generation: a prompt is read in one pass, then tokens are chosen one by one, with a cache of keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import PositiveInt, model_validator
from transformers import PreTrainedModel, set_seed

from memstudy import techniques
from memstudy.huggingface.quanto import quantised_cache
from memstudy.profiler import find_gpu, roles
from memstudy.profiler.generation import predict_generation
from memstudy.techniques.base import check_dtype
from memstudy.trainers.hub_model import CAUSAL, HubModelRun


def generate(model: PreTrainedModel, prompt: torch.Tensor, tokens: int, total: int, **options) -> None:
    """Generate the first ``tokens`` of a text that ends at ``total``; each is an iteration to the profiler."""
    chosen = 0

    def unfinished(*args, **kwargs):  # asked before each token is chosen
        nonlocal chosen
        chosen += 1
        if 1 < chosen <= tokens:
            roles.next_iteration()
        return chosen <= tokens

    model._has_unfinished_sequences = unfinished
    new = total - prompt.shape[1]
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, **options)


class GenerationRun(HubModelRun):
    """Every choice of one run of transformers' ``generate``, which chooses the likeliest token.

    ``seq_len`` counts the prompt's tokens and the ``new_tokens`` generated. The ``cache`` grows with each token, or is
    ``static``: as long as the whole text from the beginning. ``fp8``, ``quanto4`` and ``quanto2`` grow and are
    quantised; optimum-quanto's two keep up to 128 tokens unquantised, so a prediction follows each token. Prefill
    computes the logits of the last token alone, as the installed transformers does (``logits_to_keep``).
    """

    kind: Literal["generation"] = "generation"
    new_tokens: PositiveInt
    cache: Literal["growing", "static", "fp8", "quanto4", "quanto2"] = "growing"
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    measure_steps: PositiveInt = 1
    processes: Literal[1] = 1
    task: Literal["lm"] = "lm"

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.seq_len - self.new_tokens

    @property
    def what(self):
        return f"{self.new_tokens:,} tokens generated after {self.prompt:,}"

    @property
    def length(self):
        return f"a prompt of {self.prompt} and {self.new_tokens} new tokens"

    @model_validator(mode="after")
    def _can_generate(self):
        if self.prompt < 1:
            raise ValueError(f"new_tokens={self.new_tokens}: seq_len={self.seq_len} leaves no token to the prompt")
        family = self._family(self.config())
        if family.__name__ not in CAUSAL or not family.can_generate():
            raise ValueError(f"generation is for causal language models; {self.model}, {family.__name__}, is none")
        return self

    def parsed_techniques(self):
        return techniques.parse(self.techniques, trained=False)

    @staticmethod
    def _takes(technique):
        return technique.group == "weights" or (technique.at_inference and technique.in_pytorch)

    def weights_dtype(self):
        return check_dtype(self.dtype)

    def _generates(self, prompt: int, tokens: int):
        """The ``build`` of a step that generates the first ``tokens`` of the text left after ``prompt`` tokens."""

        def make():
            set_seed(self.seed)
            model = self.make_model().eval()
            device = "cuda" if torch.cuda.is_available() else "cpu"
            if device != "cpu":
                model.to(device)
            for technique in self.parsed_techniques():
                technique.prepare(model)
            ids = torch.randint(self.config().get_text_config().vocab_size, (self.batch_size, prompt), device=device)

            def step():
                generate(model, ids, tokens, self.seq_len, do_sample=False, **self._cache())

            step.n_parameters = sum(parameter.numel() for parameter in model.parameters())
            return step

        return make

    def _cache(self) -> dict:
        """The options of ``generate`` for the cache."""
        if self.cache == "growing":
            return {}
        if self.cache == "static":
            return {"cache_implementation": "static"}
        if not self._family(self.config())._supports_default_dynamic_cache():
            raise ValueError(f"cache {self.cache}: {self.model} keeps other states than keys and values: take growing")
        return {"past_key_values": quantised_cache(self.config(), self.cache)}

    def build(self, *, gpu=None, parts=None):
        """As `StepRun.build`; the step generates the whole text. Raises also for an unsuited cache."""
        self._cache()
        card = find_gpu(gpu) if isinstance(gpu, str) else gpu
        techniques.check_available(self.parsed_techniques(), capability=card and card.compute_capability)
        return self._generates(self.prompt, self.new_tokens)

    def steps_to_settle(self):
        return 1

    def foretell(self, gpu=None, *, expandable_segments=False):
        self.build(gpu=gpu or None)
        report = predict_generation(
            self._generates,
            prompt=self.prompt,
            tokens=self.new_tokens,
            gpu=gpu or None,
            expandable_segments=expandable_segments,
            uniform=not self.cache.startswith("quanto"),
        )
        if not gpu or self.cache != "static":
            return report
        # On a GPU, generate compiles each token's pass over a static cache: its time is not that of the ops followed.
        compiled = "compiled passes over the static cache (followed without compilation)"
        times = {name: time for name, time in report.time_by_pass.items() if name != "token"}
        return replace(report, unverified=(*report.unverified, compiled), time_by_pass=times)
