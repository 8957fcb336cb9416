"""Engines that run a trained model's forward pass, instead of eager PyTorch."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from memstudy.techniques.base import Technique


@dataclass(frozen=True)
class Engine(Technique):
    """Base of the inference engines."""

    group = "engine"
    at_inference = True
    in_training = False
    predicted = False


@dataclass(frozen=True)
class Compile(Engine):
    """Kernels made for the model by ``torch.compile`` (Ansel et al. 2024).

    In training, at most the share ``budget`` of the activations that its partitioner would save is saved for the
    backward pass (``activation_memory_budget``); the others are computed again.
    """

    budget: float = 1.0
    summary = "the model compiled by torch.compile; what is saved for backward is its partitioner's choice"
    in_training = True
    prepared = 2  # with adapters and checkpointing
    one_process = True
    predicted = True
    needs_compiler = True

    def __post_init__(self):
        if not 0 <= self.budget <= 1:
            raise ValueError(f"budget {self.budget:g}: a share from 0 to 1 is needed")

    def prepare(self, model):
        model.compile()

    def around_loss(self):
        import torch._functorch.config as functorch

        return functorch.patch(activation_memory_budget=self.budget)


@dataclass(frozen=True)
class Int8(Engine):
    """8-bit weights; each layer's input is quantized to 8 bits at run time. By torchao."""

    summary = "8-bit weights, layers' inputs quantized to 8 bits at run time (torchao)"
    exact = False
    packages = ("torchao",)

    def prepare(self, model):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())


@dataclass(frozen=True)
class OnnxRuntime(Engine):
    """The model exported to ONNX and run by ONNX Runtime, which allocates its own memory."""

    summary = "the model exported and run by ONNX Runtime"
    in_pytorch = False
    packages = ("onnxruntime", "onnxscript")

    def forward_pass(self, model, batch):
        import onnxruntime

        on_gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        providers = ["CUDAExecutionProvider"] * on_gpu + ["CPUExecutionProvider"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            torch.onnx.export(model, (), path, kwargs=batch, dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(path, providers=providers)
        given = {name: tensor.cpu().numpy() for name, tensor in batch.items()}
        return lambda: session.run(None, given)


@dataclass(frozen=True)
class TensorRT(Engine):
    """Kernels that TensorRT chooses, through ``torch_tensorrt``; CUDA only."""

    summary = "the forward pass compiled by TensorRT"
    packages = ("torch_tensorrt",)
    requires = "cuda"
    in_pytorch = False

    def forward_pass(self, model, batch):
        compiled = torch.compile(model, backend="torch_tensorrt")
        return lambda: compiled(**batch)
