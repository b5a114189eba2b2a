"""People as judges: a local page of blind pairs, for several annotators at once; votes are kept as they come."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from toolkit.errors import StoreError
from toolkit.judging.answers import Answer, Memory, Question, remembering
from toolkit.judging.records import Judgement, measured
from toolkit.preferences.rows import Prompt, readable
from toolkit.report.server import LocalHandler

_VALUES = {"A": 1.0, "B": 0.0, "tie": 0.5}
_LONGEST_NAME = 60


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, by whom they are, and what a person sees of it."""

    blank: Judgement  # without a preference; its ``order`` says who stands first
    question: Question


@dataclass(frozen=True)
class Ballots:
    """What is voted on: ``texts[policy][prompt]`` are a policy's samples."""

    policy: str
    baseline: str
    prompt_ids: Sequence[str]
    prompts: Sequence[Prompt]
    texts: dict[str, Sequence[Sequence[str]]] | dict[str, list[list[str]]]
    seed: int

    def of(self, annotator: str) -> list[Pair]:
        """Every pair of samples once, in an order of pairs and of places that seed and annotator fix."""
        rng = random.Random(f"{self.seed}/{annotator}")
        judge = f"human:{annotator}"
        pairs = []
        for row, (identity, prompt) in enumerate(zip(self.prompt_ids, self.prompts, strict=True)):
            for a, b in zip(self.texts[self.policy][row], self.texts[self.baseline][row], strict=True):
                order = rng.randrange(2)
                blank = Judgement(identity, self.policy, self.baseline, judge, None, order, **measured(a, b))
                pairs.append(Pair(blank, Question(judge, "vote", prompt, *((b, a) if order else (a, b)))))
        rng.shuffle(pairs)
        return pairs


def votes(ballots: Ballots, memory: Memory) -> list[Judgement]:
    """The judgements that have been made so far, by everybody."""
    out = []
    for judge in memory.judges():
        pairs = ballots.of(judge.removeprefix("human:"))
        known = memory.answers(pair.question for pair in pairs)
        for pair in pairs:
            if pair.question.key in known:
                value = known[pair.question.key].value
                assert value is not None
                out.append(replace(pair.blank, preference=1.0 - value if pair.blank.order == 1 else value))
    return out


@contextmanager
def serving(
    ballots: Ballots, memory_path: Path, port: int = 0, *, annotator: str = "me"
) -> Iterator[ThreadingHTTPServer]:
    """A server for the page on 127.0.0.1, and nowhere else. The page knows keys and texts, and no policy's name.

    ``annotator`` is who votes where the page's address names nobody (``/?annotator=NAME``; the page asks as well).
    Raises StoreError where the port is taken.
    """
    with remembering(memory_path) as memory:
        page = resources.files("toolkit.judging").joinpath("vote.html").read_bytes()
        lock = threading.Lock()  # one memory, a thread for each request
        by_annotator: dict[str, dict[str, Pair]] = {}

        def pairs_of(name: str) -> dict[str, Pair]:
            if name not in by_annotator:
                by_annotator[name] = {pair.question.key: pair for pair in ballots.of(name)}
            return by_annotator[name]

        def state(name: str) -> dict[str, Any]:
            pairs = pairs_of(name)
            known = memory.answers(pair.question for pair in pairs.values())
            facts = {"annotator": name, "voted": len(known), "total": len(pairs)}
            pair = next((p for key, p in pairs.items() if key not in known), None)
            if pair is None:
                return {"pair": None, **facts}
            question = pair.question
            text = readable(question.prompt)
            return {"pair": {"id": question.key, "prompt": text, "a": question.first, "b": question.second}, **facts}

        class Handler(LocalHandler):
            def do_GET(self) -> None:
                if not self.trusted():
                    return
                address = urlsplit(self.path)
                name = _name(parse_qs(address.query).get("annotator", [annotator])[0])
                if address.path == "/":
                    self.answer(HTTPStatus.OK, "text/html", page)
                elif address.path == "/next" and name:
                    with lock:
                        body = json.dumps(state(name)).encode()
                    self.answer(HTTPStatus.OK, "application/json", body)
                elif address.path == "/export":
                    with lock:
                        lines = [json.dumps(asdict(vote)) for vote in votes(ballots, memory)]
                    self.answer(HTTPStatus.OK, "application/jsonl", "".join(f"{line}\n" for line in lines).encode())
                else:
                    self.answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is nothing here")

            def do_POST(self) -> None:
                if not self.trusted():
                    return
                # A form on another page cannot send this type without asking first.
                wrong = self.path != "/vote" or self.headers.get("Content-Type") != "application/json"
                try:
                    vote = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
                    name = _name(vote.get("annotator", annotator))
                    with lock:
                        value, pair = _VALUES[vote["verdict"]], pairs_of(name)[vote["id"]]
                except (ValueError, KeyError, TypeError, AttributeError):
                    wrong = True
                if wrong:
                    self.answer(HTTPStatus.BAD_REQUEST, "text/plain", b"this is no vote")
                    return
                with lock:
                    memory.keep(pair.question, Answer(value))
                    body = json.dumps(state(name)).encode()
                self.answer(HTTPStatus.OK, "application/json", body)

        try:
            server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except OSError as error:
            raise StoreError(f"port {port} cannot be served: {error}", where="--port", fix="name another") from error
        server.daemon_threads = True  # an idle connection of a browser does not hold the end up
        try:
            yield server
        finally:
            server.server_close()


def _name(text: str) -> str:
    """An annotator's name as it is kept: one line, no blanks around it."""
    return " ".join(text.split())[:_LONGEST_NAME]
