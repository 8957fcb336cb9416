"""A tiny BERT with random weights and its tokenizer, saved like a pretrained model."""

import random

import torch
import transformers

WORDS = ["good", "bad", "the", "film", "was", "very", "a", "dull", "long", "day", "and", "we", "saw", "it", "12", "13"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_tokenizer(folder) -> transformers.PreTrainedTokenizerBase:
    """Write a WordPiece tokenizer of whole words to ``folder`` and return it."""
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n", encoding="utf-8")
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def save_tiny(folder, **changes) -> str:
    """Write a tiny BERT, with ``changes`` of its configuration, and its tokenizer; return its config.json's path."""
    folder.mkdir(parents=True, exist_ok=True)
    words = len(tiny_tokenizer(folder))
    sizes = {
        "vocab_size": words, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.1,
    }  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes | changes)).save_pretrained(folder)
    return str(folder / "config.json")


def labelled_rows(count: int) -> list[tuple[str, int]]:
    """Return sentences of random words, in which one more word, good or bad, decides the label."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        words, label = draw.choices(WORDS[2:], k=draw.randrange(2, 11)), draw.randrange(2)
        words.insert(draw.randrange(len(words) + 1), WORDS[1 - label])
        rows.append((" ".join(words), label))
    return rows


def save_table(folder, rows) -> str:
    """Write ``rows`` of (sentence, label) as a table and return its path."""
    path = folder / "own.csv"
    path.write_text("sentence,label\n" + "".join(f"{text},{label}\n" for text, label in rows), encoding="utf-8")
    return str(path)
