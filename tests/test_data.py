"""Data sets by name: their sources, refused names and files, tokenizers and blocks."""

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub_server import serving

from memstudy import data

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
POLISH = ["Zażółć gęślą jaźń. ", "W Szczebrzeszynie chrząszcz brzmi w trzcinie. ", "Litwo! "]


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """Give every test an empty data folder, an empty cache, and no network."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("MEMSTUDY_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MEMSTUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    data.sources.online.cache_clear()
    yield
    data.sources.online.cache_clear()


@pytest.fixture
def may_ask(monkeypatch):
    """Let this process check whether it is online."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def serve():
    """Serve a folder over HTTP on this machine; return the address."""
    with ExitStack() as servers:
        yield lambda folder: servers.enter_context(serving(folder))


def write_set(folder, **splits):
    folder.mkdir(parents=True)
    for split, texts in splits.items():
        pq.write_table(pa.table({"text": texts}), folder / f"{split}.parquet")


def write_polish(tmp_path, repeat=40):
    write_set(tmp_path / "data" / "polish-books", train=POLISH * repeat, validation=POLISH)


def fresh(code, **environ):
    """Run ``code`` in its own process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


# Where a set comes from


def test_folder_splits_are_used_as_they_are(tmp_path):
    write_polish(tmp_path)
    loaded = data.load("polish-books")
    assert (loaded.name, loaded.source, loaded.revision) == (
        "polish-books",
        "folder",
        "unversioned",
    )
    assert set(loaded.splits) == {"train", "validation"}
    assert loaded.splits["validation"]["text"][:] == POLISH


def test_content_hash_follows_the_bytes(tmp_path):
    write_polish(tmp_path)
    first = data.load("polish-books").content_hash
    assert len(first) == 16
    assert data.load("polish-books").content_hash == first
    pq.write_table(pa.table({"text": [*POLISH, "!"]}), tmp_path / "data/polish-books/validation.parquet")
    assert data.load("polish-books").content_hash != first


def test_set_found_nowhere_becomes_the_miniature_with_a_warning():
    with pytest.warns(UserWarning, match=r"wikitext-2-v1 not found .*the hub not reached.*miniature"):
        loaded = data.load("wikitext-2-v1")
    assert (loaded.name, loaded.source) == ("wikitext-2-v1", "miniature")


def test_labelled_set_found_nowhere_is_refused():
    with pytest.raises(ValueError, match=r"glue/sst2 not found .*go online"):
        data.load("glue/sst2")


def test_miniature_by_name_is_prose_split_by_document(recwarn):
    loaded = data.load("miniature")
    assert not recwarn.list
    sizes = {split: sum(map(len, rows["text"])) for split, rows in loaded.splits.items()}
    assert sum(sizes.values()) > 300_000
    for split, share in data.sources.SHARES.items():
        assert sizes[split] / sum(sizes.values()) == pytest.approx(share / 100, abs=0.02)
    documents = [text for rows in loaded.splits.values() for text in rows["text"]]
    assert len(set(documents)) == len(documents)
    assert data.load("miniature").content_hash == loaded.content_hash


def test_hub_copy_is_fetched_at_the_pinned_commit_and_kept(tmp_path, serve):
    repository, commit = data.sets.WIKITEXT
    served = tmp_path / "served"
    files = served / "datasets" / repository / "resolve" / commit / "wikitext-2-v1"
    names = [f"{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")]
    write_set(files, **{Path(name).stem: POLISH for name in names})
    listing = served / "api" / "datasets" / repository / "tree" / commit
    listing.parent.mkdir(parents=True)
    sizes = {name: (files / name).stat().st_size for name in names}
    listing.write_text(
        json.dumps(
            [
                {"type": "file", "path": f"wikitext-2-v1/{name}", "size": size, "oid": name}
                for name, size in sizes.items()
            ]
        )
    )
    code = (
        "import memstudy.data as data\n"
        "loaded = data.load('wikitext-2-v1')\n"
        "print(loaded.source, loaded.revision, sorted(loaded.splits), loaded.content_hash)"
    )
    # In fresh processes, since the hub's client reads these variables when it is imported.
    environ = {"HF_ENDPOINT": serve(served).rstrip("/"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    online, offline = (fresh(code, HF_HUB_OFFLINE=off, **environ).stdout for off in "01")
    assert online.startswith(f"hub {commit} ['test', 'train', 'validation'] ")
    assert offline == online


def test_hub_copy_in_the_hubs_cache_serves_offline(tmp_path):
    repository, commit = data.sets.WIKITEXT
    snapshot = tmp_path / "hub" / f"datasets--{repository.replace('/', '--')}" / "snapshots" / commit
    folder = snapshot / "wikitext-2-v1"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        pq.write_table(pa.table({"text": POLISH}), folder / f"{split}-00000-of-00001.parquet")
    loaded = data.load("wikitext-2-v1")
    assert (loaded.source, loaded.revision) == ("hub", commit)
    assert set(loaded.splits) == {"train", "validation"}


def test_another_folder_of_a_cached_repository_is_not_the_set(tmp_path):
    repository, commit = data.sets.GLUE
    snapshot = tmp_path / "hub" / f"datasets--{repository.replace('/', '--')}" / "snapshots" / commit
    write_set(snapshot / "cola", train=POLISH)
    assert data.load("glue/cola").source == "hub"
    with pytest.raises(ValueError, match="glue/sst2 not found"):
        data.load("glue/sst2")


def test_speakleash_corpus_through_its_own_package(tmp_path, monkeypatch, may_ask, serve):
    speakleash = pytest.importorskip("speakleash")
    import zstandard

    documents = [f"Dokument {i}: {POLISH[i % 3]}" for i in range(2000)]
    lines = "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in documents)
    packed = zstandard.compress(lines.encode())
    served = tmp_path / "served"
    served.mkdir()
    (served / "proba.jsonl.zst").write_bytes(packed)
    (served / "proba.manifest").write_text(json.dumps({"file_size": len(packed)}))
    address = serve(served)
    monkeypatch.setattr(speakleash.Speakleash, "get_url", staticmethod(lambda lang: address))

    loaded = data.load("speakleash/proba")
    assert loaded.source == "speakleash"
    split_texts = {split: set(rows["text"]) for split, rows in loaded.splits.items()}
    assert set.union(*split_texts.values()) == set(documents)
    assert sum(map(len, split_texts.values())) == len(documents)
    for split, share in data.sources.SHARES.items():
        assert len(split_texts[split]) / len(documents) == pytest.approx(share / 100, abs=0.02)

    with pytest.raises(ValueError, match="speakleash/no_such: no such corpus"):
        data.load("speakleash/no_such")
    data.sources.online.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again = data.load("speakleash/proba")
    assert (again.source, again.content_hash) == ("speakleash", loaded.content_hash)


def test_speakleash_corpus_offline_becomes_the_miniature():
    with pytest.warns(UserWarning, match="speakleash/shopping_1_general_corpus not found"):
        assert data.load("speakleash/shopping_1_general_corpus").source == "miniature"


def test_datasets_available_says_where_each_would_come_from(tmp_path):
    write_polish(tmp_path)
    sources = {row["name"]: row["source"] for row in data.datasets_available()}
    assert sources["polish-books"] == "folder"
    assert sources["wikitext-2-v1"] == "miniature"
    assert sources["glue/sst2"] == "nowhere"
    assert all(row["what"] and row["licence"] for row in data.datasets_available())


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the folder of real data is not here")
def test_real_folder_holds_every_set_named(monkeypatch):
    monkeypatch.delenv("MEMSTUDY_DATA")
    for name in set(data.DATASETS) - {"miniature", data.sets.SPEAKLEASH, "wikitext-103-v1"}:  # not in the folder
        assert data.load(name).source == "folder"
    assert data.load("polish-books").splits.num_rows == {
        "train": 5562, "validation": 310, "test": 314
    }  # fmt: skip
    label = data.load("glue/sst2").splits["train"].features["label"]
    assert label.names == ["negative", "positive"]


# Refused data


@pytest.mark.parametrize("name", ["wikitext", "../../etc", "/etc", "", "speakleash/../../x", "glue"])
def test_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown data set .*polish-books.*miniature"):
        data.load(name)


def test_missing_data_folder_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMSTUDY_DATA", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"MEMSTUDY_DATA=.*gone is not a folder; create it") as error:
        data.load("polish-books")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 99])
def test_damaged_parquet_is_refused_by_name(tmp_path, damage):
    write_polish(tmp_path)
    path = tmp_path / "data/polish-books/validation.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"polish-books/validation\.parquet can't be read"):
        data.load("polish-books")


def test_folder_without_train_split_is_refused(tmp_path):
    write_set(tmp_path / "data" / "polish-books", test=POLISH)
    with pytest.raises(ValueError, match=r"polish-books holds no train"):
        data.load("polish-books")


def test_plain_texts_are_the_train_split(tmp_path):
    folder = tmp_path / "data" / "crime-and-punishment"
    folder.mkdir(parents=True)
    (folder / "b.txt").write_text("Zbrodnia\ni kara", encoding="utf-8")
    (folder / "a.txt").write_text("Crime", encoding="utf-8")
    loaded = data.load("crime-and-punishment")
    assert {split: rows["text"][:] for split, rows in loaded.splits.items()} == {"train": ["Crime", "Zbrodnia\ni kara"]}
    (folder / "a.txt").write_text("Crimes", encoding="utf-8")
    assert data.load("crime-and-punishment").content_hash != loaded.content_hash
    (folder / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.txt can't be read .*copy or fetch it again"):
        data.load("crime-and-punishment")


def test_the_sentences_of_a_treebank_are_its_text(tmp_path):
    folder = tmp_path / "data" / "ptb"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"sentence": ["no it was n't"]}), folder / "train.parquet")
    assert data.load("ptb").splits["train"]["text"][:] == ["no it was n't"]


def test_unwritable_cache_is_refused(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMSTUDY_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set MEMSTUDY_CACHE to a folder"):
        data.train_tokenizer(POLISH, 300)


# Offline is noticed soon


def test_a_resolver_that_hangs_counts_as_offline_and_is_not_waited_for(monkeypatch, may_ask):
    done, waited_for = threading.Event(), []

    def hang(*args, **kwargs):
        if not done.wait(60):
            waited_for.append(args)
        raise OSError("no answer")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with pytest.warns(UserWarning, match="miniature"):
        assert data.load("wikitext-2-v1").source == "miniature"
    data.datasets_available()
    assert waited_for == []
    done.set()


def test_a_silent_server_counts_as_offline(monkeypatch, may_ask):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        assert address not in data.sources.online()


def test_server_that_refuses_counts_as_online(monkeypatch, may_ask, serve, tmp_path):
    address = serve(tmp_path) + "not-there"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    assert address in data.sources.online()


def test_hf_hub_offline_asks_no_resolver():
    code = (
        "import socket, memstudy.data as data\n"
        "def refuse(*args, **kwargs): raise SystemExit('asked the resolver')\n"
        "socket.getaddrinfo = refuse\n"
        "print(data.load('wikitext-2-v1').source)"
    )
    done = fresh(code, HF_HUB_OFFLINE="1")
    assert done.stdout.strip() == "miniature", done.stderr


# Tokenizer


def test_tokenizer_gives_every_text_back():
    tokenizer = data.train_tokenizer(POLISH * 20, 300)
    assert len(tokenizer) == 300
    assert tokenizer.eos_token == "<|endoftext|>"
    for text in [*POLISH, "never seen: 漢字 \x00 🙂\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_is_trained_once_and_the_same_again(tmp_path, monkeypatch):
    first = data.train_tokenizer(POLISH * 20, 300)
    (file,) = (tmp_path / "cache" / "tokenizers").glob("*/tokenizer.json")
    written = file.stat().st_mtime_ns
    again = data.train_tokenizer((text for text in POLISH * 20), 300)
    assert file.stat().st_mtime_ns == written
    assert again.get_vocab() == first.get_vocab()
    assert [path.name for path in file.parents[1].iterdir()] == [file.parent.name]
    monkeypatch.setenv("MEMSTUDY_CACHE", str(tmp_path / "other"))
    assert data.train_tokenizer(POLISH * 20, 300).get_vocab() == first.get_vocab()


def test_tokenizer_cache_tells_texts_and_sizes_apart(tmp_path):
    for texts, size in ([["ab", "c"], 300], [["a", "bc"], 300], [["ab", "c"], 301]):
        data.train_tokenizer(texts, size)
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 3


def test_killed_training_leaves_no_tokenizer(tmp_path):
    code = (
        "import os, memstudy.data as data\n"
        "def half_saved(self, path):\n"
        "    open(path, 'w').write('{')\n"
        "    os.kill(os.getpid(), 9)\n"
        "data.text.Tokenizer.save = half_saved\n"
        f"data.train_tokenizer({POLISH!r}, 300)"
    )
    assert fresh(code).returncode == -9
    assert len(data.train_tokenizer(POLISH, 300)) > 256


def test_tokenizer_of_characters_marks_spaces_and_what_it_has_not_seen():
    tokenizer = data.train_tokenizer(["the cat sat on the mat, the rat"] * 9, 24, unit="character")
    assert len(tokenizer) == 24
    assert tokenizer.tokenize("the cat") == ["▁the", "▁cat"]
    assert tokenizer.decode(tokenizer("the rat, the hat", add_special_tokens=False)["input_ids"]) == "the rat, the hat"
    assert tokenizer.tokenize("the <unk> 漢字")[-3:] == ["<unk>", "▁", "<unk>"]
    assert tokenizer.eos_token == "<|endoftext|>"
    with pytest.raises(ValueError, match=r"vocab_size is 3; 12 characters and .* need at least 14"):
        data.train_tokenizer(["the cat sat on the mat, the rat"], 3, unit="character")


@pytest.mark.parametrize(("texts", "size", "message"), [
    ([], 300, "texts holds no text"), (["", ""], 300, "texts holds no text"),
    (POLISH, 256, "vocab_size is 256"),
])  # fmt: skip
def test_tokenizer_refuses(texts, size, message):
    with pytest.raises(ValueError, match=message):
        data.train_tokenizer(texts, size)


# Blocks


@pytest.fixture
def polish(tmp_path):
    write_polish(tmp_path)
    loaded = data.load("polish-books")
    return loaded, data.train_tokenizer(loaded.splits["train"]["text"], 300)


def test_blocks_are_the_documents_each_ended_by_eos(polish):
    loaded, tokenizer = polish
    blocks = data.blocks(loaded, tokenizer, 16)
    for split, rows in blocks.items():
        assert rows.column_names == ["input_ids"]
        expected = []
        for text in loaded.splits[split]["text"]:
            expected += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        flat = [token for row in rows["input_ids"] for token in row]
        assert flat == expected[: len(expected) // 16 * 16]
        assert len(expected) - len(flat) < 16
    tensor = blocks["train"].with_format("torch")[:2]["input_ids"]
    assert (tensor.shape, str(tensor.dtype)) == ((2, 16), "torch.int64")


def test_blocks_up_to_a_limit_are_the_first_ones(polish):
    loaded, tokenizer = polish
    every, first = (data.blocks(loaded, tokenizer, 8, limit_tokens=n) for n in (None, 35))
    assert first["train"].num_rows == 4
    assert first["train"]["input_ids"][:] == every["train"]["input_ids"][:4]


def test_blocks_are_kept_per_data_tokenizer_and_size(polish, tmp_path):
    loaded, tokenizer = polish
    other = data.train_tokenizer(POLISH, 290)
    for tok, seq_len in ((tokenizer, 8), (tokenizer, 8), (tokenizer, 16), (other, 8)):
        assert len(data.blocks(loaded, tok, seq_len)["train"]["input_ids"][0]) == seq_len
    assert len(list((tmp_path / "cache" / "blocks").iterdir())) == 3


@pytest.mark.parametrize(("seq_len", "limit", "message"), [
    (0, None, "seq_len is 0"), (-3, None, "seq_len is -3"), (8, 7, "limit_tokens is 7"),
    (5000, None, "polish-books: .* a block has 5000; choose a smaller seq_len"),
])  # fmt: skip
def test_blocks_refuse(polish, seq_len, limit, message):
    with pytest.raises(ValueError, match=message):
        data.blocks(*polish, seq_len, limit_tokens=limit)


def test_blocks_refuse_what_is_not_running_text(polish, tmp_path):
    folder = tmp_path / "data" / "glue" / "sst2"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"sentence": POLISH, "label": [0, 1, 1]}), folder / "train.parquet")
    with pytest.raises(ValueError, match="glue/sst2 has no column text"):
        data.blocks(data.load("glue/sst2"), polish[1], 8)
