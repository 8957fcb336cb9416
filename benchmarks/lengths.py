"""Counts the tokens of data sets' training texts for the study of fine-tuning; rewrites its histograms.

python benchmarks/lengths.py

The texts are questions, then answers, as a model is fine-tuned on them; the tokens are those of all-MiniLM-L6-v2's
tokenizer, a WordPiece of 30,522 pieces. The data sets are found as `memstudy.data.load` finds them.
"""

from collections import Counter

import pandas as pd

from memstudy.data.lengths import token_lengths
from memstudy.huggingface.pretrained import weights_folder
from memstudy.studies.fine_tuning.epoch import HISTOGRAMS

DATASETS = ("alpaca", "flan-cot", "openorca")
TOKENIZER = "all-MiniLM-L6-v2"


def histograms() -> pd.DataFrame:
    """How many texts of each data set have so many tokens."""
    folder = str(weights_folder(TOKENIZER))
    counted = {name: Counter(token_lengths(name, folder, ("question", "response"))) for name in DATASETS}
    rows = [(name, tokens, texts) for name, counts in counted.items() for tokens, texts in sorted(counts.items())]
    return pd.DataFrame(rows, columns=["dataset", "tokens", "texts"])


if __name__ == "__main__":
    table = histograms()
    table.to_csv(HISTOGRAMS, index=False)
    for name, rows in table.groupby("dataset"):
        mean = (rows["tokens"] * rows["texts"]).sum() / rows["texts"].sum()
        print(f"{name}: {rows['texts'].sum():,} texts, {mean:.1f} tokens on average, {rows['tokens'].max():,} at most")
