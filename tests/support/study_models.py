"""Tiny versions of the studies' models, without Lab 4's decoder."""

from memstudy.studies.memsizer.run import Seq2SeqRun
from memstudy.studies.reformer.run import ReformerRun
from memstudy.trainers.hub_model import HubModelRun
from support.tiny_models import config_file

SIZES = {"experiment": "tiny", "batch_size": 4, "measure_steps": 1}
LSH = {"variant": "lsh", "num_hashes": 2, "chunk_length": 8, "num_buckets": 4, "hash_seed": 0}


def classifier(folder, **changes):
    """GLUE: an encoder whose projections are factored."""
    model = config_file(folder, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    factored = {"variant": "lowrank", "rank": 4}
    return HubModelRun(model=model, task="classification", seq_len=16, convert_to=factored, **SIZES, **changes)


def masked(folder, **changes):
    """GLUE: an encoder that fills in words."""
    model = config_file(folder, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return HubModelRun(model=model, seq_len=16, **SIZES, **changes)


def reformer(folder, **changes):
    sizes = {"n_layers": 2, "hidden_size": 32, "n_heads": 2, "head_dim": 8, "feed_forward": 48, "vocab_size": 300}
    return ReformerRun(**sizes, seq_len=32, attention=LSH, dropout=0.0, **SIZES, **changes)


def seq2seq(folder, **changes):
    """MemSizer in the decoder, exact attention elsewhere."""
    sizes = {"n_layers": 2, "hidden_size": 32, "n_heads": 2, "feed_forward": 64, "vocab_size": 60, "seq_len": 24}
    return Seq2SeqRun(**sizes, target_len=16, memsizer={"decoder": {"slots": 4}}, dropout=0.0, **SIZES, **changes)


MODELS = {made.__name__: made for made in (classifier, masked, reformer, seq2seq)}
