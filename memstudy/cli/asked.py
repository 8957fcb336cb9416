"""The options that commands about a training step share, and the prediction of the step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Literal, get_type_hints

import typer

from memstudy.cli.errors import one_line

if TYPE_CHECKING:
    from memstudy.profiler import Gpu, MemoryReport
    from memstudy.studies.ablation.advice import Alone
    from memstudy.trainers.hub_model import HubModelRun

Batch = Annotated[int, typer.Option(help="Sequences per optimizer update.", min=1, max=2**31)]
Keep = Annotated[
    Literal["exact", "full"] | None,
    typer.Option(help="Advise only what keeps the result (exact) or trains all weights (full)."),
]
Budget = Annotated[float | None, typer.Option(help="Budget [MiB] instead of the whole GPU; needed without --gpu.")]


@dataclass(frozen=True)
class Asked:
    """The shared options, one field each."""

    model: Annotated[
        str,
        typer.Option(
            help="A name from `memstudy list models`, a hub id (of a multimodal model its language model), or the path "
            "of a config.json."
        ),
    ]
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.", min=2, max=2**31)]
    gpu: Annotated[
        str | None, typer.Option(help="A name from `memstudy list gpus`, or a .yaml file. Without it: this CPU.")
    ] = None
    technique: Annotated[
        str, typer.Option(help="Names from `memstudy list techniques`, or sft (TRL's defaults), comma-separated.")
    ] = ""
    optimizer: Annotated[str, typer.Option(help="adamw (fused), adamw_torch (foreach), adafactor, sgd, ...")] = "adamw"
    task: Annotated[
        str, typer.Option(help="lm (the model's pretraining task), classification, or contrastive (CLIP).")
    ] = "lm"
    attention: Annotated[str, typer.Option(help="sdpa (PyTorch's fused kernels), eager, or flash (flash_attn's).")] = (
        "sdpa"
    )
    expandable_segments: Annotated[
        bool, typer.Option("--expandable-segments", help="As with PYTORCH_ALLOC_CONF=expandable_segments:True.")
    ] = False
    processes: Annotated[
        int, typer.Option(help="GPUs that share the batch: DDP, or FSDP with technique fsdp.", min=1, max=4096)
    ] = 1
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False

    @property
    def techniques(self) -> tuple[str, ...]:
        """The names given to ``--technique``, with those that a preset stands for."""
        from memstudy.techniques import PRESETS

        names = (text.strip() for text in self.technique.split(",") if text.strip())
        return tuple(text for name in names for text in PRESETS.get(name, (name,)))

    def checked(self) -> Asked:
        """These options, if they don't contradict each other; else ValueError."""
        return self

    def card(self) -> Gpu | None:
        """The GPU of ``--gpu``; None for this CPU."""
        from memstudy.profiler import find_gpu

        return find_gpu(self.gpu) if self.gpu else None

    @property
    def is_timed(self) -> bool:
        """Whether step times are predicted: on a GPU whose speed is known."""
        card = self.card()
        return card is not None and card.speed is not None

    def sizes(self) -> dict[str, object]:
        """The fields of a `HubModelRun` except the batch and the techniques."""
        names = ("model", "seq_len", "optimizer", "task", "attention", "processes")
        return {name: getattr(self, name) for name in names}

    def run(self, batch_size: int, techniques: tuple[str, ...]) -> HubModelRun:
        """The run that takes the step."""
        from memstudy.trainers.hub_model import HubModelRun

        return HubModelRun(experiment="asked", batch_size=batch_size, techniques=techniques, **self.sizes())

    def report(self, batch_size: int, techniques: tuple[str, ...]) -> MemoryReport:
        """The prediction of the step; a terminal shows a status line meanwhile."""
        from rich.console import Console

        run = self.run(batch_size, techniques)
        with Console(stderr=True).status(f"tracing {run.model} on fake tensors: {run.what}"):
            return run.foretell(self.card(), expandable_segments=self.expandable_segments)

    def advised(self, batch_size: int) -> list[str]:
        """The techniques advised by the memory ablation that suit the model and are available here."""
        from memstudy.studies.ablation import advice, reference

        suited = advice.suited(reference.advised(), batch_size=batch_size, **self.sizes())
        return [text for text in suited if self.takes(batch_size, (text,))]

    def estimates(self, batch_size: int) -> Callable[[tuple[str, ...]], list[float]] | None:
        """The `advice.estimates` of the step; None where no time is predicted."""
        from memstudy.studies.ablation import advice

        if not self.is_timed:
            return None
        return advice.estimates(self.run(batch_size, ()), self.card(), expandable_segments=self.expandable_segments)

    def alone(self, batch_size: int, figures: Callable[[tuple[str, ...]], list[float]] | None) -> Alone:
        """The advised techniques, each alone: predicted if there are the step's ``figures``, otherwise measured."""
        from rich.console import Console

        from memstudy.studies.ablation import advice, reference

        texts = self.advised(batch_size)
        if figures is None:
            return advice.measured_alone(reference.reference().rows, texts)
        with Console(stderr=True).status(f"{self.model}: the time of each technique alone on {self.gpu}"):
            return advice.predicted_alone(figures, texts)

    def takes(self, batch_size: int, techniques: tuple[str, ...]) -> bool:
        """Whether the step can be predicted with ``techniques``; tells on stderr which package is missing."""
        from memstudy.attention import Unavailable

        try:
            self.run(batch_size, techniques).build(gpu=self.card())
        except Unavailable as error:
            typer.echo(f"not advised: {error}", err=True)
            return False
        return True

    def result(self, techniques: tuple[str, ...]) -> str:
        """Whether ``techniques`` give the same result as none: ``yes``, ``no``, or the share of weights trained."""
        from memstudy.studies.ablation import advice
        from memstudy.techniques import parse

        chosen = parse(techniques)
        for text, technique in zip(techniques, chosen, strict=True):
            if technique.group == "adapters":
                share = advice.share_trained(text, batch_size=self.processes, **self.sizes())
                return f"trains {100 * share:.2g} %"
        return "yes" if all(technique.exact for technique in chosen) else "no"


@dataclass(frozen=True)
class AskedOfText(Asked):
    """As `Asked`; with ``generate``, the memory of generating a text is asked for, and not of a training step."""

    seq_len: Annotated[int | None, typer.Option(help="Tokens per sequence, to train on.", min=2, max=2**31)] = None
    generate: Annotated[
        int | None, typer.Option(help="Instead of training, generate that many tokens per sequence.", min=1, max=2**31)
    ] = None
    prompt: Annotated[int | None, typer.Option(help="Tokens of the prompt, with --generate.", min=1, max=2**31)] = None
    cache: Annotated[
        Literal["growing", "static", "fp8", "quanto4", "quanto2"] | None,
        typer.Option(
            help="With --generate: growing (the default), static (as long as the whole text at once), or quantised: "
            "fp8, or optimum-quanto's of 4 or 2 bits (slow: each token is followed)."
        ),
    ] = None
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="With --generate: the weights' format; bf16.")
    ] = None

    def checked(self):
        if self.generate is None:
            if self.prompt or self.cache or self.dtype:
                raise ValueError("--prompt, --cache and --dtype are for --generate")
            if self.seq_len is None:
                raise ValueError("missing option --seq-len, to train, or --generate and --prompt")
            return self
        if self.seq_len is not None or self.prompt is None:
            raise ValueError("--generate needs --prompt, the number of tokens before, and no --seq-len")
        return replace(self, seq_len=self.prompt + self.generate)

    def run(self, batch_size, techniques):
        if self.generate is None:
            return super().run(batch_size, techniques)
        from memstudy.trainers.generation import GenerationRun

        chosen = {name: value for name in ("cache", "dtype") if (value := getattr(self, name))}
        return GenerationRun(
            experiment="asked",
            batch_size=batch_size,
            techniques=techniques,
            new_tokens=self.generate,
            **self.sizes(),
            **chosen,
        )

    def result(self, techniques):
        if self.generate is None:
            return super().result(techniques)
        from memstudy.techniques import parse

        return "yes" if all(technique.exact for technique in parse(techniques, trained=False)) else "no"


def about_a_step(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with its first parameter, an `Asked`, replaced by one option for each field of its class.

    An option of ``command`` takes the place of the shared one of its name, which is then at its default.
    """
    first, *own = inspect.signature(command, eval_str=True).parameters.values()
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    kind = first.annotation
    hints = get_type_hints(kind, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)
        if field.name not in {parameter.name for parameter in own}
    ]

    def with_options(**given) -> None:
        asked = kind(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        with _one_line():
            command(asked.checked(), **given)

    with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
    with_options.__signature__ = inspect.Signature([*shared[:2], *own, *shared[2:]])
    with_options.__annotations__ = {}
    return with_options


@contextmanager
def _one_line() -> Iterator[None]:
    """As `one_line`, also for `Unavailable` and for tensors whose size overflows."""
    from memstudy.cli.quick_imports import import_step

    import_step()
    from memstudy.attention import Unavailable

    with one_line():
        try:
            yield
        except Unavailable as error:
            raise ValueError(str(error)) from None
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            raise ValueError("a tensor would have more than 2^63 bytes: take a smaller batch or sequence") from None
