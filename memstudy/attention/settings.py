"""Make a variant's config from its settings as plain JSON values."""

from __future__ import annotations

from dataclasses import fields

from memstudy.attention import ATTENTION, AttentionConfig


def mixer_of(attention: dict[str, bool | str | int | float]) -> AttentionConfig:
    """Config of the variant ``attention["variant"]`` with the other items as settings; ValueError for unknown ones."""
    settings = dict(attention)
    variant = settings.pop("variant", None)
    if variant not in ATTENTION:
        raise ValueError(f"unknown attention variant {variant!r}; known: {', '.join(ATTENTION)}")
    try:
        return ATTENTION[variant](**settings)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(ATTENTION[variant]))
        raise ValueError(f"attention {variant!r}: {error}; its settings: {known}") from None


def check_window(mixer: AttentionConfig, seq_len: int) -> None:
    """Raise ValueError if a window is longer than the sequence."""
    window = getattr(mixer, "window", 0)
    if window > seq_len:
        raise ValueError(f"window={window} is larger than seq_len={seq_len}")
