"""Data sets by name (`sets`), from several sources (`sources`); running text as tokens and blocks (`text`)."""

from memstudy.data.sets import DATASETS, LoadedData, datasets_available, load
from memstudy.data.text import blocks, train_tokenizer

__all__ = ["DATASETS", "LoadedData", "blocks", "datasets_available", "load", "train_tokenizer"]
