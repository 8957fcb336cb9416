"""Runs of the Reformer: a frozen description, and its model and tokenizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from memstudy import data
from memstudy.studies.reformer.model import ReformerLM, ReversibleConfig
from memstudy.trainers.language_model import LanguageModelRun, data_as_planned


class ReformerRun(LanguageModelRun):
    """Every choice of one run of a Reformer, or of the same model with exact attention.

    ``attention`` is ``lsh`` with its settings, where layers alternate between local (with the same ``chunk_length``)
    and hashed attention, or ``softmax``, exact in all layers. ``reversible`` says whether backward recomputes layers or
    autograd keeps their activations. Positions are learned, one for each of ``max_positions`` (0: ``seq_len``), or
    axial if ``axial_shape`` is given: rows × columns = ``seq_len``, with vectors of the widths ``axial_widths``.

    ``vocabulary`` names the text that the tokenizer of ``vocab_size`` pieces is trained on, or is ``bytes``.
    """

    kind: Literal["reformer"] = "reformer"
    attention: dict[str, bool | str | int | float]
    head_dim: PositiveInt
    reversible: bool = True
    max_positions: NonNegativeInt = 0
    axial_shape: tuple[PositiveInt, PositiveInt] | tuple[()] = ()
    axial_widths: tuple[PositiveInt, PositiveInt] | tuple[()] = ()
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    optimizer: Literal["adamw", "adafactor"] = "adafactor"
    vocabulary: str = ""
    vocabulary_hash: str = ""
    processes: Literal[1] = 1  # DDP and FSDP do not support reversible layers

    @model_validator(mode="after")
    def _suits_the_layers(self):
        mixer = self.mixer()
        if mixer.name not in ("lsh", "softmax"):
            raise ValueError(f"attention {mixer.name!r}: a Reformer's is 'lsh', or 'softmax' in its place")
        chunk = getattr(mixer, "chunk_length", self.seq_len)
        if self.seq_len % chunk and self.seq_len > chunk:
            below = self.seq_len // chunk * chunk
            raise ValueError(
                f"seq_len={self.seq_len} is no multiple of chunk_length={chunk}: take {below} or {below + chunk}"
            )
        if bool(self.axial_shape) != bool(self.axial_widths):
            raise ValueError("axial_shape and axial_widths: give both, or neither for learned positions")
        if self.axial_shape:
            rows, columns = self.axial_shape
            if rows * columns != self.seq_len:
                raise ValueError(f"axial_shape={rows} × {columns} makes {rows * columns} positions, not {self.seq_len}")
            if sum(self.axial_widths) != self.hidden_size:
                raise ValueError(f"axial_widths={list(self.axial_widths)} do not add up to {self.hidden_size}")
        elif self.max_positions and self.max_positions < self.seq_len:
            raise ValueError(f"max_positions={self.max_positions} is less than seq_len={self.seq_len}")
        if self.train_steps and not self.vocabulary:
            raise ValueError("vocabulary: name a text, or bytes")
        return self

    def make_model(self) -> ReformerLM:
        """The model with random weights."""
        mixer = self.mixer()
        exact = mixer.name == "softmax"
        options: dict = {"axial_pos_embds": bool(self.axial_shape)}
        if self.axial_shape:
            options |= {"axial_pos_shape": self.axial_shape, "axial_pos_embds_dim": self.axial_widths}
        if not exact:
            factors = mixer.factors(self.seq_len)
            options |= {
                "num_hashes": mixer.num_hashes,
                "num_buckets": factors if len(factors) > 1 else mixer.buckets(self.seq_len),
                "hash_seed": mixer.hash_seed,
                "lsh_attn_chunk_length": mixer.chunk_length,
                "local_attn_chunk_length": mixer.chunk_length,
            }
        config = ReversibleConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            attn_layers=[("local", "local" if exact else "lsh")[n % 2] for n in range(self.n_layers)],
            num_attention_heads=self.n_heads,
            attention_head_size=self.head_dim,
            feed_forward_size=self.feed_forward,
            hidden_act="relu",
            max_position_embeddings=max(self.max_positions, self.seq_len),
            hidden_dropout_prob=self.dropout,
            local_attention_probs_dropout_prob=0.0 if exact else self.dropout,
            lsh_attention_probs_dropout_prob=0.0,
            exact=exact,
            reversible=self.reversible,
            **options,
        )
        return ReformerLM(config)

    def flags(self):
        optimizer = {} if self.optimizer == "adamw" else {"optim": self.optimizer}
        return super().flags() | {"weight_decay": 0.01} | optimizer

    def tokenizer(self, loaded):
        if self.vocabulary == "bytes":
            return data.train_tokenizer(loaded.splits["train"]["text"][:1], 257)
        pieces = data_as_planned("vocabulary", self.vocabulary, self.vocabulary_hash)
        return data.train_tokenizer(pieces.splits["train"]["text"], self.vocab_size, unit="character")
