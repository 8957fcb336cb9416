"""Every CUDA path of memstudy, executed without a GPU: on fake ``cuda`` tensors, see README.md.

An op that gets tensors of two devices is an error there as on a GPU. A line for each path says ``ok`` or names the
error; a tensor that a step makes on the CPU in between is named too.

    ORACLE_SM=80 LD_PRELOAD=$PWD/stub.so PYTHONPATH=. oracle-venv/bin/python benchmarks/cuda_oracle/paths.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from oracle import Recorder
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_iter
from transformers import BertConfig, GPT2Config, LlamaConfig
from transformers.modeling_utils import local_torch_dtype

from memstudy import attention, techniques
from memstudy.kinds import parse_run
from memstudy.profiler.cuda.attention import flash_attn
from memstudy.profiler.prediction import swap_tensors
from memstudy.profiler.subclasses import making_fake_subclasses
from memstudy.trainers.trainer import make_trainer

SIZES = {"n_layers": 2, "hidden_size": 64, "n_heads": 4, "feed_forward": 128, "vocab_size": 101, "seq_len": 32}
STEP = {"experiment": "paths", "batch_size": 4, "measure_steps": 1}
LM = {"kind": "language_model", **SIZES, **STEP}
VARIANTS = {
    "softmax": [
        {"implementation": "eager"},
        {"implementation": "sdpa"},
        {"implementation": "flash_attention_2"},
        {"recompute": True},
    ],
    "window": [{"window": 8}, {"window": 8, "implementation": "flash_attention_2"}, {"window": 8, "chunked": True}],
    "linformer": [{"rank": 8, "max_len": 32}],
    "lowrank": [{"rank": 8}],
    "nystrom": [{"landmarks": 8}],
    "lsh": [{"num_hashes": 2, "chunk_length": 8}],
    "memsizer": [{"slots": 4}],
    "performer": [{"features": 16}],
}


SMALL = {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 128, "max_position_embeddings": 32}
MODELS = {
    "bert": BertConfig(**SMALL, architectures=["BertForMaskedLM"]),
    "gpt2": GPT2Config(
        vocab_size=101,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["GPT2LMHeadModel"],
    ),
    "llama": LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"]),
}
# Kinds of run in params/gpu, with their settings there at a small size.
BERT = {"model": "bert", "seq_len": 16}  # of MODELS
HUB = {"kind": "hub_model", **BERT}
REFORMER = {"kind": "reformer", "n_layers": 2, "hidden_size": 64, "n_heads": 2, "head_dim": 32, "feed_forward": 128}
REFORMER |= {"vocab_size": 101, "seq_len": 64, "reversible": True}
SEQ2SEQ = {"kind": "seq2seq", **SIZES, "target_len": 16}
RUNS: dict[str, dict] = {
    "hub_model lora trl": {
        "kind": "hub_model",
        **BERT,
        "model": "llama",
        "techniques": ["lora=8", "convention=trl", "checkpointing"],
    },
    "hub_model window": {
        "kind": "hub_model",
        **BERT,
        "model": "gpt2",
        "convert_to": {"variant": "window", "window": 8},
    },
    "hub_model lowrank": {
        "kind": "hub_model",
        **BERT,
        "task": "classification",
        "convert_to": {"variant": "lowrank", "rank": 8},
    },
    "hub_model fp16 8-bit": {
        "kind": "hub_model",
        **BERT,
        "techniques": ["fp16", "checkpointing", "accumulation=4", "adamw_8bit"],
    },
    "fine_tune lora": {
        "kind": "fine_tune",
        **BERT,
        "dataset": "glue/sst2",
        "data_hash": "none",
        "train_rows": 8,
        "measure_steps": 0,
        "techniques": ["lora=8:query+key+value+dense:fp32"],
    },
    "fine_tune ia3": {
        "kind": "fine_tune",
        **BERT,
        "dataset": "glue/sst2",
        "data_hash": "none",
        "train_rows": 8,
        "measure_steps": 0,
        "techniques": ["ia3"],
    },
    "reformer lsh": REFORMER | {"attention": {"variant": "lsh", "num_hashes": 2, "chunk_length": 16}},
    "reformer exact": REFORMER | {"attention": {"variant": "softmax", "implementation": "sdpa"}},
    "seq2seq": SEQ2SEQ,
    "seq2seq memsizer": SEQ2SEQ | {"memsizer": {place: {"slots": 4} for place in ("encoder", "decoder", "cross")}},
    "inference": {"kind": "inference", **BERT},
    "inference pruned": {"kind": "inference", **BERT, "techniques": ["pruned=0.9"]},
    "inference fewer_heads": {"kind": "inference", **BERT, "techniques": ["fewer_heads=0.5"]},
    "generation": {"kind": "generation", "model": "gpt2", "seq_len": 16, "new_tokens": 4},
    "validation": {"kind": "validation", "of": {**HUB, **STEP}, "timed_steps": 2},
}


# Techniques that need another or a setting.
TOGETHER = {
    "convention": ["convention", "lora"],
    "nf4_weights": ["nf4_weights", "lora"],
    "int8_weights": ["int8_weights", "lora"],
    "ia3": ["ia3"],
    "prefix": ["prefix=4"],
    "prompt": ["prompt=4"],
}


class Watching(Recorder):
    """Also notes which ops make tensors of one dimension or more on the CPU while ``watching``."""

    def __init__(self):
        super().__init__("cuda")
        self.watching = False
        self.on_cpu: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.watching and any(
            isinstance(value, torch.Tensor) and value.dim() and value.device.type == "cpu"
            for value in tree_iter(result)
        ):
            self.on_cpu.add(str(func))
        return result


@contextmanager
def on_fake_cuda() -> Iterator[Watching]:
    """Fake tensors, whose default device is the CPU, as a user's is."""
    watching = Watching()
    with ExitStack() as stack:
        stack.enter_context(patch("transformers.utils.import_utils.is_fake_tensor", lambda tensor: False))
        for known_types in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
            stack.enter_context(patch(f"{known_types}._foreach_supported_types", [torch.nn.Parameter, FakeTensor]))
        stack.enter_context(patch("torch.utils.swap_tensors", swap_tensors))
        # How many columns of 8-bit products have outliers depends on values, which fake tensors lack: none has.
        stack.enter_context(patch("torch._library.fake_impl.FakeImplCtx.new_dynamic_size", lambda *_, **__: 0))
        stack.enter_context(patch("torch.compile", lambda function, **options: function))  # refuses fakes
        stack.enter_context(making_fake_subclasses())
        stack.enter_context(flash_attn())
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        fake.cache_enabled = False
        stack.enter_context(watching)
        yield watching


def op(name: str, settings: dict, *, is_causal: bool, dtype: torch.dtype, watching: Watching) -> None:
    """The op of a variant, with padding unless it takes none, forward and backward."""
    config = attention.ATTENTION[name](**settings)
    config.check_causal(is_causal)
    with torch.device("cuda"), local_torch_dtype(dtype):
        tensors = [torch.randn(2, 32, 4, 16).transpose(1, 2).requires_grad_() for _ in range(3)]
        weights = config.make_weights(16)
        mask = torch.ones(2, 32, dtype=torch.bool)
    given = {} if weights is None else {"weights": weights}
    if settings.get("implementation") != "flash_attention_2":  # which takes no padding
        given["key_padding_mask"] = mask
    watching.watching = True
    config.attend(*tensors, is_causal=is_causal, **given).sum().backward()


def layer(name: str, settings: dict, *, is_causal: bool, watching: Watching) -> None:
    """The layer of a variant, forward and backward, moved to the GPU as a user does."""
    config = attention.ATTENTION[name](**settings)
    config.check_causal(is_causal)
    with torch.device("cuda"):
        made = config.module(64, 4, config, is_causal=is_causal)
        x = torch.randn(2, 32, 64, requires_grad=True)
        mask = torch.ones(2, 32, dtype=torch.bool)
    watching.watching = True
    # softmax refuses padding on CUDA where it computes again
    output = made(x) if settings.get("recompute") else made(x, key_padding_mask=mask)
    (output[0] if isinstance(output, tuple) else output).sum().backward()


def run(config: dict, *, watching: Watching) -> None:
    """Two updates of a run, or two of its passes, from building on; a validation is carried out whole."""
    with tempfile.TemporaryDirectory() as folder:
        _run(_with_model(config, Path(folder)), watching)


def _with_model(config: dict, folder: Path) -> dict:
    """``config`` with the path of the configuration of its model in MODELS."""
    if "of" in config:
        return config | {"of": _with_model(config["of"], folder)}
    if "model" not in config:
        return config
    path = folder / "config.json"
    MODELS[config["model"]].to_json_file(path, use_diff=False)
    return config | {"model": str(path)}


def _on_cuda(make: Callable) -> Callable:
    """``make`` with its new tensors on the GPU, where the Trainer then moves them: a model of fakes cannot be moved."""

    def made(*args, **kwargs):
        with torch.device("cuda"):
            return make(*args, **kwargs)

    return made


def _run(config: dict, watching: Watching) -> None:
    planned = parse_run(config)
    kind = type(getattr(planned, "of", planned))
    making = [patch.object(kind, "make_model", _on_cuda(kind.make_model))]
    making.append(patch("memstudy.trainers.step.make_trainer", _on_cuda(make_trainer)))
    with making[0], making[1]:
        if planned.kind == "validation":
            planned.execute(None)
            return
        step = planned.build()()
        watching.watching = True
        step()
        step()


def paths() -> Iterator[tuple[str, Callable]]:
    """The name of each path, and a function that takes it."""
    for name, several in VARIANTS.items():
        for settings in several:
            said = " ".join([name, *(f"{key}={value}" for key, value in settings.items())])
            config = attention.ATTENTION[name](**settings)
            for is_causal in config.causal:
                way = "causal" if is_causal else "bidirectional"
                if name not in ("lowrank", "memsizer") and not settings.get("recompute"):
                    for dtype in (torch.float32, torch.bfloat16):
                        if dtype is torch.float32 and "flash_attention_2" in settings.values():
                            continue
                        yield (
                            f"op {said} {way} {str(dtype).removeprefix('torch.')}",
                            partial(op, name, settings, is_causal=is_causal, dtype=dtype),
                        )
                if "flash_attention_2" not in settings.values():
                    yield f"layer {said} {way}", partial(layer, name, settings, is_causal=is_causal)
            if True in config.causal and name != "memsizer" and not settings.get("recompute"):
                chosen = LM | {"attention": {"variant": name} | settings, "techniques": ["bf16"]}
                yield f"language_model {said} bf16", partial(run, chosen)
    for name, config in RUNS.items():
        step = {"experiment": "paths"} if name == "validation" else STEP
        yield f"run {name}", partial(run, step | config)
    for text, technique in techniques.TECHNIQUES.items():
        if technique.in_training and not technique.several_processes:
            # peft knows Llama's layers, and virtual tokens need positions beyond the text's.
            base = HUB | {"model": "llama"} if text in ("ia3", "prefix", "prompt") else LM
            yield f"technique {text}", partial(run, base | STEP | {"techniques": TOGETHER.get(text, [text])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="take the paths whose names contain one of these")
    parser.add_argument("--trace", action="store_true", help="print the traceback of each error")
    given = parser.parse_args()
    failed = 0
    for name, take in paths():
        if not any(text in name for text in given.only):
            continue
        with on_fake_cuda() as watching:
            try:
                take(watching=watching)
                said = "ok"
            except Exception as error:
                failed += 1
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                if given.trace:
                    traceback.print_exc()
        if watching.on_cpu:
            said += f"; on the CPU: {', '.join(sorted(watching.on_cpu))}"
        print(f"{name:60} {said}", flush=True)
    sys.exit(f"{failed} paths failed" if failed else 0)


if __name__ == "__main__":
    main()
