"""torchtune's table of techniques for Llama-3.2-3B, an A100 and two sequences of 4,096 tokens, predicted.

README.md of pytorch/torchtune, "Optimization flags": peak memory active, by torchtune of late 2024. The step is that of
its recipe full_finetune_single_device: each layer compiled, the chunked loss compiled, the whole loss not (the recipe
drops what ``compile_loss`` returns). The band is from fused kernels to op by op; that fused kernels write over what
they read last was chosen after the error of the row with checkpointing was seen. torchtune 0.4.0 and what it imports
are not memstudy's own dependencies:

  pip install --no-deps torchtune==0.4.0 torchao==0.9.0 torchdata omegaconf antlr4-python3-runtime==4.9.3 \
      sentencepiece tiktoken blobfile kagglehub
  python benchmarks/compiled.py                 three minutes
"""

from __future__ import annotations

import pandas as pd
import torch
from torchtune import modules, training
from torchtune.models.llama3_1 import _position_embeddings
from torchtune.models.llama3_2 import llama3_2_3b
from torchtune.modules.loss import CEWithChunkedOutputLoss

from memstudy.profiler import predict
from memstudy.studies.published import HERE

BATCH, SEQ, IGNORED = 2, 4096, -100
# GiB, printed with one decimal; each row adds one technique.
PUBLISHED = pd.read_csv(HERE / "compiled.csv").set_index("row")["published_gib"]


def build(chosen: set[str]):
    """The ``build`` of one step with the techniques ``chosen``."""

    def make():
        with training.set_default_dtype(torch.bfloat16):
            model = llama3_2_3b()
        if "compile" in chosen:
            training.compile_model(model, verbose=False)
        if "checkpointing" in chosen:
            training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
        loss = torch.nn.CrossEntropyLoss(ignore_index=IGNORED)
        if "chunked loss" in chosen:
            loss = CEWithChunkedOutputLoss(ignore_index=IGNORED)
            model.set_num_output_chunks(loss.num_output_chunks)
            training.compile_loss(loss, verbose=False)
        whole = torch.optim.AdamW(model.parameters(), fused=True)
        if "optimizer in backward" in chosen:
            training.register_optim_in_bwd_hooks(
                model, {parameter: torch.optim.AdamW([parameter], fused=True) for parameter in model.parameters()}
            )
        tokens, labels = (torch.randint(128_256, (BATCH, SEQ)) for _ in range(2))

        def step():
            logits = model(tokens)
            shifted = torch.hstack((labels[..., 1:], torch.full((BATCH, 1), IGNORED)))
            if not isinstance(logits, list):
                logits, shifted = logits.reshape(-1, logits.size(-1)), shifted.reshape(-1)
            value = loss(logits, shifted)
            del logits
            value.backward()
            if "optimizer in backward" not in chosen:
                whole.step()
                whole.zero_grad(set_to_none=True)

        return step

    return make


def main() -> None:
    """Print each row: published, predicted from fused to op by op, and the error of the nearer end."""
    # It makes a tensor of a list of tensors, which fake ones are refused; the scaling changes no size.
    _position_embeddings.Llama3ScaledRoPE.apply_scaling = lambda self, frequencies, *others: frequencies
    print(f"{'and then':22} {'published':>9} {'predicted [GiB]':>18} {'error [%]':>9}")
    chosen: set[str] = set()
    for name, published in PUBLISHED.items():
        chosen.add(name)
        report = predict(build(chosen), gpu="A100-80GB")
        high = report.peak_bytes / 2**30
        low = report.fused.peak_bytes / 2**30 if report.fused else high
        error = 100 * (min(max(published, low), high) / published - 1)
        print(f"{name:22} {published:9.1f} {low:8.2f} to {high:6.2f} {error:+9.2f}", flush=True)


if __name__ == "__main__":
    main()
