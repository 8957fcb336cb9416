"""The GPUs to predict for: ``gpus.yaml``, one entry per card, each figure with its source."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from memstudy.profiler.events import MIB

CATALOGUE = Path(__file__).with_name("gpus.yaml")
EXAMPLE = '{compute_capability: "8.0", memory_mib: 40448, context_mib: 501}'


Positive = Annotated[float, Field(gt=0)]


class Speed(BaseModel):
    """Published peaks of one card, none of them reached in training.

    Attributes
    ----------
    bandwidth_gb_s : float
        Bandwidth of the GPU's memory [1e9 bytes/s].
    tensor_tflops : float
        Tensor cores multiplying fp16 or bf16 and adding up in fp32, without sparsity [1e12 FLOP/s]. GeForce cards add
        up in fp32 at half the rate of fp16.
    tf32_tflops : float or None
        Tensor cores on TF32, without sparsity [1e12 FLOP/s]; None where the card has no TF32 (Volta, Turing).
    fp32_tflops : float
        fp32 without tensor cores [1e12 FLOP/s].
    sms : int
        Streaming multiprocessors enabled.
    l2_mib : float
        L2 cache [MiB].
    pcie_gb_s : float
        Link to the host, one direction, as its standard has it [1e9 bytes/s].
    watts : float
        Power limit of the board as sold [W].
    speed_source : str
        Where the figures come from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bandwidth_gb_s: Positive
    tensor_tflops: Positive
    tf32_tflops: Positive | None
    fp32_tflops: Positive
    sms: Annotated[int, Field(gt=0)]
    l2_mib: Positive
    pcie_gb_s: Positive
    watts: Positive
    speed_source: Annotated[str, Field(min_length=1)]


class Gpu(BaseModel):
    """One card; sizes in MiB.

    Attributes
    ----------
    name : str
        Key in the catalogue, or name of the YAML file.
    compute_capability : tuple of int
        Major and minor version; decides which kernels are available.
    memory_mib : float
        All memory that CUDA reports (``torch.cuda.get_device_properties().total_memory``).
    context_mib : float
        A process's memory outside the caching allocator's segments: CUDA's context and loaded kernels.
    memory_source, context_source : str
        Where the two figures come from.
    speed : Speed, optional
        Published peaks; None for a card described without them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    compute_capability: tuple[Annotated[int, Field(ge=5)], Annotated[int, Field(ge=0)]]
    memory_mib: Positive
    context_mib: Annotated[float, Field(ge=0)]
    memory_source: str = ""
    context_source: str = ""
    speed: Speed | None = None

    @field_validator("compute_capability", mode="before")
    @classmethod
    def _from_text(cls, given: object) -> object:
        if isinstance(given, tuple):
            return given
        major, _, minor = str(given).partition(".")
        if not (major.isdecimal() and minor.isdecimal()):
            raise ValueError("major and minor number are needed, with a dot between them")
        return int(major), int(minor)

    @model_validator(mode="after")
    def _has_room(self) -> Gpu:
        if self.context_mib >= self.memory_mib:
            raise ValueError("context_mib must be less than memory_mib")
        return self

    @property
    def bf16_is_fast(self) -> bool:
        """Whether its tensor cores multiply bfloat16: from Ampere on."""
        return self.compute_capability >= (8, 0)

    @property
    def capacity_bytes(self) -> int:
        """Memory left for the caching allocator's segments [bytes]."""
        return int((self.memory_mib - self.context_mib) * MIB)


def find_gpu(name: str) -> Gpu:
    """The GPU called ``name`` in the catalogue, or described by the YAML file at path ``name``.

    Raises
    ------
    ValueError
        For an unknown name, and for a file that is missing or describes no GPU.
    """
    if name.endswith((".yaml", ".yml")):
        where = f"GPU file {name}"
        try:
            given = yaml.safe_load(Path(name).read_bytes())
        except OSError as error:
            raise ValueError(f"{where}: {error.strerror}; known GPUs: {', '.join(gpus())}") from None
        except Exception as error:  # PyYAML raises errors of any kind: KeyError for '!!bool x', RecursionError, ...
            raise ValueError(f"{where}: YAML error: {' '.join(str(error).split())}; expected e.g. {EXAMPLE}") from None
        return _parse(Path(name).stem, given, where=where)
    known = gpus()
    if name not in known:
        raise ValueError(f"unknown GPU {name!r}; known: {', '.join(known)}, or a .yaml file that describes one")
    return known[name]


def gpus() -> dict[str, Gpu]:
    """The catalogue, by name."""
    return {name: _parse(name, given, where=name) for name, given in yaml.safe_load(CATALOGUE.read_bytes()).items()}


def _parse(name: str, given: object, *, where: str) -> Gpu:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: {reprlib.repr(given)} is not a mapping; expected e.g. {EXAMPLE}")
    try:
        return Gpu.model_validate({"name": name} | given)
    except ValidationError as error:
        first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        wrong = f"{field} is missing"
    elif first["type"] == "extra_forbidden":
        known = Speed.model_fields if len(first["loc"]) > 1 else Gpu.model_fields
        wrong = f"unknown key {field}; known: {', '.join(known)}"
    else:
        wrong = f"{field}={reprlib.repr(first['input'])}: {first['msg']}"
    raise ValueError(f"{where}: {wrong}; expected e.g. {EXAMPLE}")
