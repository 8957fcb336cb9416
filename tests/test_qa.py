"""The page: its answers, its refusals, its survival of bad requests; also in a real browser."""

import contextlib
import http.client
import random
import re
import shutil
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlencode
from urllib.request import urlopen

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from memstudy import data
from memstudy.cli.main import app as cli
from memstudy.cli.serve import quick_runs
from memstudy.studies.memsizer.page import answers
from memstudy.studies.memsizer.page.app import BOTH, EXAMPLES, HEADERS, create_app, make_server_for
from memstudy.studies.memsizer.run import Seq2SeqRun

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTION = "What is the tens digit of 89290?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models trained for two steps."""
    root = tmp_path_factory.mktemp("qa")
    loaded = data.load("place-value-200")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMSTUDY_CACHE", str(root / "cache"))
        for name, memsizer in (("exact", {}), ("memsizer", {p: {"slots": 4} for p in ("encoder", "decoder", "cross")})):
            run = Seq2SeqRun(
                experiment="page", n_layers=1, hidden_size=16, n_heads=2, feed_forward=32, vocab_size=48, seq_len=56,
                target_vocab_size=16, target_len=4, memsizer=memsizer, train_steps=2, batch_size=4, eval_rows=4,
                dataset=loaded.name, data_hash=loaded.content_hash,
            )  # fmt: skip
            run.execute(root / "checkpoints" / name)
    return root / "models"


@pytest.fixture
def client(folder):
    return create_app(folder).test_client()


@pytest.fixture(scope="module")
def server(folder):
    """A real server on a free port."""
    made = make_server_for(folder, "127.0.0.1", 0)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    thread.join()
    made.server_close()


def said(html: str) -> dict[str, str]:
    """The answers on a page, by model."""
    return dict(re.findall(r'data-model="([^"]+)".*?<output>(.*?)</output>', html, re.DOTALL))


def shown_error(html: str) -> str:
    return re.search(r'class="error" role="alert">(.*?)</p>', html)[1]


def test_the_page_shows_what_the_models_say(client, folder):
    models, problems = answers.load_all(folder)
    assert (list(models), problems) == (["Transformer", "MemSizer"], [])
    html = client.get("/", query_string={"question": QUESTION}).text
    assert said(html) == {name: model.ask(QUESTION).text or "(nothing)" for name, model in models.items()}
    for model in models.values():
        assert f"{model.n_parameters:,}" in html
        assert f"{model.ask(QUESTION).state_bytes / 1024:.1f} KiB" in html
    one = client.get("/", query_string={"question": QUESTION, "model": "MemSizer"}).text
    assert said(one) == {"MemSizer": said(html)["MemSizer"]}
    assert len(re.findall("right|wrong: it is 9", one.partition("Examples")[0])) >= 1


def test_memsizers_state_has_one_size(folder):
    model = answers.load_all(folder)[0]["MemSizer"]
    held = {model.ask(question).state_bytes for question in EXAMPLES}
    assert held == {4 * (4 * 16 + 4 * 16) + 8}  # one layer: the decoder's sum and count, the encoder's summary


def test_other_questions_are_answered_with_a_warning(client):
    page = client.get("/", query_string={"question": "Who are you?"})
    assert page.status_code == 200
    assert "not trained on such questions, so their answers are guesses" in page.text
    assert "at most ten digits" in client.get("/", query_string={"question": EXAMPLES[-1]}).text
    assert "at most ten digits" not in client.get("/", query_string={"question": EXAMPLES[1]}).text


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("question=", "The question is empty"),
        ("question=+%20", "The question is empty"),
        ("question=" + "9" * 56, "The question has 56 characters; at most 55 can be read."),
        ("question=" + "9" * 10_000, "The question has 10,000 characters; at most 55 can be read."),
        ("question=%FF%FE", "The question is not UTF-8 text."),
        ("question=What&model=GPT-9", "There is no model &#39;GPT-9&#39;; choose one of Transformer, MemSizer."),
    ],
)
def test_what_is_refused(client, query, message):
    page = client.get(f"/?{query}")
    assert (page.status_code, message in shown_error(page.text)) == (400, True), shown_error(page.text)
    assert said(client.get("/", query_string={"question": QUESTION}).text)  # the server still answers


def test_input_is_escaped(client):
    html = client.get("/", query_string={"question": "<script>alert(1)</script>\"'>"}).text
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    html = client.get("/", query_string={"question": "x", "model": "<b>"}).text
    assert "<b>" not in html


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=st.text(max_size=70), model=st.one_of(st.none(), st.sampled_from(["MemSizer", BOTH]), st.text()))
def test_any_text_gets_a_page(client, question, model):
    page = client.get("/", query_string={"question": question} | ({} if model is None else {"model": model}))
    assert page.status_code in (200, 400)
    assert "</html>" in page.text


@pytest.mark.parametrize(
    ("method", "path", "status"), [("get", "/etc/passwd", 404), ("post", "/", 405), ("get", "/static/../app.py", 404)]
)
def test_there_is_nothing_else(client, method, path, status):
    page = getattr(client, method)(path)
    assert page.status_code == status
    assert shown_error(page.text)


def test_every_answer_has_the_headers(client):
    for path in ("/", "/?question=", "/nothing", "/static/page.css"):
        headers = client.get(path).headers
        assert {name: headers[name] for name in HEADERS} == HEADERS
    assert "script" not in client.get("/").text


def test_another_sites_name_is_refused(folder):
    client = create_app(folder, trusted_hosts=["127.0.0.1"]).test_client()
    assert client.get("/", headers={"Host": "127.0.0.1:8000"}).status_code == 200
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400


def test_a_failure_is_one_message_and_the_server_lives_on(folder, monkeypatch):
    client = create_app(folder).test_client()
    with monkeypatch.context() as patch:
        patch.setattr(answers.Model, "ask", lambda self, question: 1 / 0)
        page = client.get("/", query_string={"question": QUESTION})
        assert (page.status_code, "ZeroDivision" in page.text) == (500, False)
        assert "its log says why" in page.text
    assert said(client.get("/", query_string={"question": QUESTION}).text)


@pytest.mark.parametrize("damage", ["truncated", "missing", "other shape", "no json", "no tokenizer"])
def test_a_damaged_model_is_told_and_the_other_answers(folder, tmp_path, damage):
    shutil.copytree(folder, tmp_path / "models")
    broken = tmp_path / "models" / "exact"
    weights = broken / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    elif damage == "other shape":
        text = (broken / "config.json").read_text()
        (broken / "config.json").write_text(text.replace('"encoder_ffn_dim": 32', '"encoder_ffn_dim": 48'))
    elif damage == "no json":
        (broken / "run.json").write_text("{")
    else:
        shutil.rmtree(broken / "source")
    client = create_app(tmp_path / "models").test_client()
    page = client.get("/", query_string={"question": QUESTION})
    assert page.status_code == 200
    assert list(said(page.text)) == ["MemSizer"]
    assert f"the model in {broken} cannot be loaded" in page.text


def test_without_models_the_page_says_what_to_do(tmp_path):
    client = create_app(tmp_path).test_client()
    assert "memstudy serve --train" in client.get("/").text
    page = client.get("/", query_string={"question": QUESTION})
    assert (page.status_code, "memstudy serve --train" in shown_error(page.text)) == (400, True)


def test_fifty_at_once_get_their_own_answers(server, folder):
    models, _ = answers.load_all(folder)
    questions = [f"What is the {place} digit of {12345 + 1234 * n}?" for n in range(25) for place in ("units", "tens")]
    wanted = {q: {name: m.ask(q).text or "(nothing)" for name, m in models.items()} for q in questions}

    def get(question):
        with urlopen(f"{server}/?{urlencode({'question': question})}", timeout=60) as answer:
            return question, answer.status, said(answer.read().decode())

    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(get, questions))
    assert Counter(status for _, status, _ in found) == {200: 50}
    assert {question: told for question, _, told in found} == wanted


def test_raw_nonsense_does_not_stop_the_server(server):
    address = server.removeprefix("http://")
    for path in (
        "/?question=%",
        "/?question=%00",
        "/?" + "a=" * 5000,
        "/?question=" + quote("ä" * 300),
        "//",
        "/?model",
    ):
        connection = http.client.HTTPConnection(address, timeout=20)
        connection.request("GET", path)
        assert connection.getresponse().status < 500
        connection.close()
    with urlopen(server, timeout=20) as page:
        assert page.status == 200


def test_an_address_in_use_is_one_line(server):
    port = int(server.rpartition(":")[2])
    with pytest.raises(ValueError, match=rf"cannot listen on 127.0.0.1:{port} "):
        make_server_for(Path("unused"), "127.0.0.1", port)


def test_serve_without_models_asks_first(tmp_path):
    done = CliRunner().invoke(cli, ["serve", "--models", str(tmp_path)], input="n\n")
    assert done.exit_code == 1
    assert "no trained models in" in done.output


def test_the_quick_runs_are_runs():
    assert [answers.name_of(run) for run in quick_runs("0" * 16)] == ["Transformer", "MemSizer"]


@pytest.mark.slow
def test_two_thousand_senseless_requests_do_not_end_it(server):
    address = server.removeprefix("http://").split(":")
    chance = random.Random(0)

    def request(number: int) -> bytes:
        noise = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 200)))
        path = quote(noise[:60])
        return [
            noise,
            b"GET /?question=" + noise.replace(b" ", b"+") + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            f"GET /{path}?{path}={path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode(),
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n" + noise,
            f"GET /?question={path}&model={path} HTTP/1.0\r\n\r\n".encode(),
        ][number % 5]

    def send(content: bytes) -> None:
        with socket.create_connection((address[0], int(address[1])), timeout=10) as connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):  # the server may hang up
                connection.recv(100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, map(request, range(2000))))
    with urlopen(f"{server}/?{urlencode({'question': QUESTION})}") as page:
        assert said(page.read().decode())


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280], ids=["phone", "desk"])
def test_a_visitor_with_a_keyboard(browser, server, width):
    page = browser.new_page(viewport={"width": width, "height": 740})
    problems = []
    page.on("console", lambda message: problems.append(message.text))
    page.goto(server)
    page.set_default_timeout(10_000)
    page.wait_for_selector("#question:focus")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowUp")  # from "side by side" to the option before it
    page.keyboard.press("Enter")
    page.wait_for_selector("article")
    assert page.locator("article").count() == 1
    assert page.locator("article h2").inner_text() == "MemSizer"
    assert page.input_value("#question") == QUESTION
    page.get_by_role("link", name=EXAMPLES[0]).click()
    page.get_by_label("side by side").check()
    page.get_by_role("button", name="Ask").click()
    page.locator("article").nth(1).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # no horizontal scrolling
    page.fill("#question", "")
    page.get_by_role("button", name="Ask").click()
    assert page.get_by_role("alert").inner_text().startswith("The question is empty")
    assert [text for text in problems if "400" not in text] == []
    page.close()
