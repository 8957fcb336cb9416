"""The Flask app: one page without scripts, which shows the answers of the models in a folder."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote_to_bytes

from flask import Flask, Response, render_template, request
from werkzeug.exceptions import HTTPException
from werkzeug.serving import BaseWSGIServer, make_server

from memstudy.data import place_value
from memstudy.studies.memsizer.page.answers import Model, load_all

LONGEST = 200  # most characters of a question, for any model
EXAMPLES = (
    "What is the tens digit of 89290?",
    "What is the ten thousands digit of 2087043558?",
    "What is the units digit of 7?",
    "What is the hundred billions digit of 510919142603?",
)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
BOTH = "all"


def create_app(folder: Path, *, trusted_hosts: list[str] | None = None) -> Flask:
    """The page for the models below ``folder``.

    Parameters
    ----------
    folder : Path
        Where `seq2seq.execute` saved trained models.
    trusted_hosts : list of str, optional
        Host names that the page answers to; None for any. With another site's name that site could read the answers.
    """
    app = Flask(__name__)
    app.config.update(MAX_CONTENT_LENGTH=4096, TRUSTED_HOSTS=trusted_hosts)
    models, problems = load_all(folder)

    def page(status: int = 200, **shown) -> tuple[str, int]:
        given = {"question": "", "chosen": BOTH, "answers": [], "note": "", "error": "", "right": ""} | shown
        return render_template(
            "page.html", models=models, problems=problems, examples=EXAMPLES, all=BOTH, **given
        ), status

    @app.get("/")
    def ask():
        if "question" not in request.args:
            return page()
        question, chosen = request.args["question"].strip(), request.args.get("model", BOTH)
        try:
            unquote_to_bytes(request.query_string).decode()
            asked = _check(question, chosen, models)
        except UnicodeDecodeError:
            return page(400, error="The question is not UTF-8 text.")
        except ValueError as error:
            return page(400, error=str(error), question=question[:LONGEST], chosen=chosen)
        right, note = "", ""
        try:
            right = place_value.answer(question)
        except ValueError as error:
            note = f"{error}: the models were not trained on such questions, so their answers are guesses."
        else:
            if len(question.split()[-1]) > 11:
                note = "The models were trained on numbers of at most ten digits."
        answers = [(model, model.ask(question)) for model in asked]
        return page(answers=answers, question=question, chosen=chosen, right=right, note=note)

    @app.after_request
    def secure(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    @app.errorhandler(HTTPException)
    def refused(error: HTTPException):
        return page(error.code, error=f"{error.name}: {error.description}")

    @app.errorhandler(Exception)
    def failed(error: Exception):
        app.logger.exception("a question failed")
        return page(500, error="The server could not answer this; its log says why.")

    return app


def _check(question: str, chosen: str, models: dict[str, Model]) -> list[Model]:
    """The models that should answer.

    Raises
    ------
    ValueError
        For an empty or too long question, an unknown model, or no trained models.
    """
    if not models:
        raise ValueError("There are no trained models: stop the server and start memstudy serve --train.")
    if chosen not in (BOTH, *models):
        raise ValueError(f"There is no model {chosen[:40]!r}; choose one of {', '.join(models)}.")
    asked = [model for name, model in models.items() if chosen in (BOTH, name)]
    longest = min(LONGEST, *(model.longest_question for model in asked))
    if not question:
        raise ValueError("The question is empty: type one, or choose an example.")
    if len(question) > longest:
        raise ValueError(f"The question has {len(question):,} characters; at most {longest} can be read.")
    return asked


def make_server_for(folder: Path, host: str, port: int) -> BaseWSGIServer:
    """A server for the page, to run with ``serve_forever()``; port 0 takes a free port.

    Raises
    ------
    ValueError
        When the server cannot listen on the address.
    """
    local = host in ("127.0.0.1", "localhost", "::1")
    app = create_app(folder, trusted_hosts=["127.0.0.1", "localhost", "[::1]"] if local else None)
    try:
        return make_server(host, port, app, threaded=True)
    except (OSError, SystemExit) as error:
        reason = getattr(error, "strerror", None) or "is it in use?"
        raise ValueError(f"cannot listen on {host}:{port} ({reason}): take another --port") from None
