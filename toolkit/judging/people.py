"""People as judges: one local page of blind pairs, whose votes are kept as they come."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

from toolkit.errors import StoreError
from toolkit.judging.memory import Answer, Memory, Question, remembering
from toolkit.judging.records import Judgement
from toolkit.preferences.formats import Prompt, readable

_VALUES = {"A": 1.0, "B": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, by whom they are, and what a person sees of it."""

    blank: Judgement  # without a preference; its ``order`` says who stands first
    question: Question


def blind_pairs(
    policy: str,
    baseline: str,
    prompt_ids: Sequence[str],
    prompts: Sequence[Prompt],
    texts: dict[str, Sequence[Sequence[str]]],
    *,
    annotator: str,
    seed: int,
) -> list[Pair]:
    """Every pair of samples once, in a random order of pairs and of places that ``seed`` fixes."""
    rng = random.Random(f"{seed}/{annotator}")
    pairs = []
    for row, (identity, prompt) in enumerate(zip(prompt_ids, prompts, strict=True)):
        for a, b in zip(texts[policy][row], texts[baseline][row], strict=True):
            order = rng.randrange(2)
            judge = f"human:{annotator}"
            blank = Judgement(
                identity, policy, baseline, judge, None, order, policy_length=len(a), baseline_length=len(b)
            )
            pairs.append(Pair(blank, Question(judge, "vote", prompt, *((b, a) if order else (a, b)))))
    rng.shuffle(pairs)
    return pairs


def votes(pairs: Sequence[Pair], memory: Memory) -> list[Judgement]:
    """The judgements that have been made so far."""
    known = memory.answers(pair.question for pair in pairs)
    out = []
    for pair in pairs:
        if pair.question.key in known:
            value = known[pair.question.key].value
            assert value is not None
            out.append(replace(pair.blank, preference=1.0 - value if pair.blank.order == 1 else value))
    return out


@contextmanager
def serving(pairs: Sequence[Pair], memory_path: Path, port: int = 0) -> Iterator[HTTPServer]:
    """A server for the page on 127.0.0.1, and nowhere else. The page knows keys and texts, and no policy's name.

    Raises StoreError where the port is taken.
    """
    with remembering(memory_path) as memory:
        by_key = {pair.question.key: pair for pair in pairs}
        page = resources.files("toolkit.judging").joinpath("vote.html").read_bytes()

        def state() -> dict[str, Any]:
            known = memory.answers(pair.question for pair in pairs)
            pair = next((p for p in pairs if p.question.key not in known), None)
            voted = sum(p.question.key in known for p in pairs)
            if pair is None:
                return {"pair": None, "voted": voted, "total": len(pairs)}
            question = pair.question
            text = readable(question.prompt)
            shown = {"id": question.key, "prompt": text, "a": question.first, "b": question.second}
            return {"pair": shown, "voted": voted, "total": len(pairs)}

        class Handler(BaseHTTPRequestHandler):
            def answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

            def trusted(self) -> bool:
                """Whether the browser asked for this machine by name, and not a page elsewhere through it."""
                host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
                if host in ("127.0.0.1", "localhost"):
                    return True
                self.answer(HTTPStatus.FORBIDDEN, "text/plain", b"open this page as 127.0.0.1")
                return False

            def do_GET(self) -> None:
                if not self.trusted():
                    return
                if self.path == "/":
                    self.answer(HTTPStatus.OK, "text/html", page)
                elif self.path == "/next":
                    self.answer(HTTPStatus.OK, "application/json", json.dumps(state()).encode())
                elif self.path == "/export":
                    lines = [json.dumps(asdict(vote)) for vote in votes(pairs, memory)]
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
                    value, pair = _VALUES[vote["verdict"]], by_key[vote["id"]]
                except (ValueError, KeyError, TypeError):
                    wrong = True
                if wrong:
                    self.answer(HTTPStatus.BAD_REQUEST, "text/plain", b"this is no vote")
                    return
                memory.keep(pair.question, Answer(value))
                self.answer(HTTPStatus.OK, "application/json", json.dumps(state()).encode())

            def log_message(self, *args: Any) -> None:
                return None

        try:
            server = HTTPServer(("127.0.0.1", port), Handler)
        except OSError as error:
            raise StoreError(f"port {port} cannot be served: {error}", where="--port", fix="name another") from error
        try:
            yield server
        finally:
            server.server_close()
