"""People as judges: a local page of blind pairs, for several annotators at once. Every vote is stored at once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from toolkit.files import fingerprint
from toolkit.judging.answers import Answer, Memory, Question, remembering
from toolkit.judging.prompt_ids import plain_prompt
from toolkit.judging.records import Judgement, text_measures
from toolkit.judging.responses import PolicyResponses
from toolkit.preferences.rows import Prompt, readable
from toolkit.report.server import LocalHandler, LocalServer, listening

_VALUES = {"A": 1.0, "B": 0.0, "tie": 0.5}
_LONGEST_NAME = 60


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt: whose they are, and what a person sees of them.

    ``earlier`` is the prompt as earlier versions had it in the question: without the role of a single message, or as a
    list of messages.
    """

    blank: Judgement  # without a preference; its ``order`` says who stands first
    question: Question
    earlier: tuple[Prompt, ...]

    def asked(self) -> list[tuple[int | None, Question]]:
        """(order, question): how the pair is shown, and how earlier versions may have shown it and stored a vote."""
        order, q = self.blank.order, self.question
        questions = [q, *(replace(q, prompt=prompt) for prompt in self.earlier if prompt != q.prompt)]
        turned = [replace(question, first=q.second, second=q.first) for question in questions]
        return [*((order, question) for question in questions), *((1 - (order or 0), question) for question in turned)]

    def judged(self, answers: Mapping[str, Answer]) -> Judgement | None:
        """The vote among these answers, however the pair was shown; None where there is none."""
        for order, question in self.asked():
            answer = answers.get(question.key)
            if answer is not None and answer.value is not None:
                preference = 1.0 - answer.value if order == 1 else answer.value
                return replace(self.blank, order=order, preference=preference)
        return None


@dataclass(frozen=True)
class Ballots:
    """What is voted on: the responses of a policy against those of a baseline."""

    policy: str
    baseline: str
    responses: PolicyResponses
    seed: int

    def of(self, annotator: str) -> list[Pair]:
        """Every pair of samples once.

        A hash of seed, annotator and the pair fixes where the pair stands among the others, and who stands first in
        it: further prompts move neither. Samples with equal texts are one pair, and are voted on once.
        """
        judge = f"human:{annotator}"
        drawn: list[tuple[str, Pair]] = []
        for prompt_id, prompt, a, b in self.responses.paired(self.policy, self.baseline):
            number = fingerprint([self.seed, annotator, prompt_id, a, b])
            order = int(number, 16) % 2
            blank = Judgement(prompt_id, self.policy, self.baseline, judge, None, order, **text_measures(a, b))
            question = Question(judge, "vote", readable(prompt), *((b, a) if order else (a, b)))
            drawn.append((number, Pair(blank, question, (readable(plain_prompt(prompt)), plain_prompt(prompt)))))
        return [pair for _, pair in sorted(drawn, key=lambda entry: entry[0])]


def votes(ballots: Ballots, memory: Memory) -> list[Judgement]:
    """The judgements of all annotators so far."""
    judged = []
    for judge in memory.judges():
        pairs = ballots.of(judge.removeprefix("human:"))
        answers = _stored(pairs, memory)
        judged += [pair.judged(answers) for pair in pairs]
    return [judgement for judgement in judged if judgement is not None]


def n_other_votes(ballots: Ballots, memory: Memory) -> int:
    """How many stored votes are on other responses than those of the ballots, or on other prompts."""
    judges = memory.judges()
    of_ballots = sum(len(_stored(ballots.of(judge.removeprefix("human:")), memory)) for judge in judges)
    return memory.n_answers() - of_ballots


def _stored(pairs: Iterable[Pair], memory: Memory) -> dict[str, Answer]:
    """The stored votes on pairs, by the key of their question."""
    return memory.answers(question for pair in pairs for _, question in pair.asked())


class AlreadyVotedError(Exception):
    """A second vote of one person on one pair."""


class Poll:
    """The votes on some ballots while the page is open. Its methods may be called by several threads at once."""

    def __init__(self, ballots: Ballots, memory: Memory) -> None:
        self.ballots, self.memory = ballots, memory
        self._lock = threading.Lock()
        self._pairs: dict[str, dict[str, Pair]] = {}

    def next_pair(self, annotator: str) -> bytes:
        """JSON for the page: the annotator's next pair, or null after the last, and how many are voted on."""
        with self._lock:
            return self._next_pair(annotator)

    def vote(self, annotator: str, key: str, verdict: str) -> bytes:
        """Store a vote, and return the next pair.

        Raises KeyError for a pair or a verdict that there is not, AlreadyVotedError for a second vote on a pair.
        """
        with self._lock:
            value, pair = _VALUES[verdict], self._pairs_of(annotator)[key]
            if _stored([pair], self.memory):
                raise AlreadyVotedError("this pair has a vote of yours already, and the first one counts")
            self.memory.keep(pair.question, Answer(value))
            return self._next_pair(annotator)

    def export(self) -> bytes:
        """All votes so far, one JSON object a line."""
        with self._lock:
            lines = [json.dumps(asdict(vote)) for vote in votes(self.ballots, self.memory)]
        return "".join(f"{line}\n" for line in lines).encode()

    def _pairs_of(self, annotator: str) -> dict[str, Pair]:
        if annotator not in self._pairs:
            self._pairs[annotator] = {pair.question.key: pair for pair in self.ballots.of(annotator)}
        return self._pairs[annotator]

    def _next_pair(self, annotator: str) -> bytes:
        pairs = self._pairs_of(annotator)
        answers = _stored(pairs.values(), self.memory)
        left = [pair.question for pair in pairs.values() if pair.judged(answers) is None]
        question = left[0] if left else None
        shown = None
        if question is not None:
            shown = {"id": question.key, "prompt": question.prompt, "a": question.first, "b": question.second}
        state = {"pair": shown, "annotator": annotator, "voted": len(pairs) - len(left), "total": len(pairs)}
        return json.dumps(state).encode()


class VoteHandler(LocalHandler):
    """What answers the page's requests. The page learns keys and texts, and no policy's name."""

    poll: Poll
    default_annotator: str
    page: str

    def do_GET(self) -> None:
        if not self.trusted():
            return
        address = urlsplit(self.route)
        annotator = _name(parse_qs(address.query).get("annotator", [self.default_annotator])[0])
        if address.path == "/":
            self.answer(HTTPStatus.OK, "text/html", self.page.encode())
        elif address.path == "/next" and annotator:
            self.answer(HTTPStatus.OK, "application/json", self.poll.next_pair(annotator))
        elif address.path == "/export":
            self.answer(HTTPStatus.OK, "application/jsonl", self.poll.export())
        else:
            self.answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is nothing here")

    def do_POST(self) -> None:
        if not self.trusted():
            return
        try:
            vote = self.read_vote()
            annotator = _name(vote.get("annotator", self.default_annotator))
            body = self.poll.vote(annotator, vote["id"], vote["verdict"])
        except AlreadyVotedError as error:
            self.answer(HTTPStatus.CONFLICT, "text/plain", str(error).encode())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.answer(HTTPStatus.BAD_REQUEST, "text/plain", b"this is no vote")
        else:
            self.answer(HTTPStatus.OK, "application/json", body)

    def read_vote(self) -> Any:
        """Raises ValueError for what is no vote."""
        # A form on another page cannot send this type without asking first.
        if self.route != "/vote" or self.headers.get("Content-Type") != "application/json":
            raise ValueError("this is no vote")
        return json.loads(self.body())


def _handler(poll: Poll, default_annotator: str) -> type[VoteHandler]:
    page = resources.files("toolkit.judging").joinpath("vote.html").read_text("utf-8")
    scripts = (page.partition("<script>")[2].partition("</script>")[0],)
    members = {"poll": poll, "default_annotator": default_annotator, "page": page, "scripts": scripts}
    return type("Handler", (VoteHandler,), members)


@contextmanager
def serving(ballots: Ballots, memory_path: Path, port: int = 0, *, annotator: str = "me") -> Iterator[LocalServer]:
    """A server of the voting page on 127.0.0.1, and nowhere else; port 0 takes a free one.

    ``annotator`` is who votes where the page's address names nobody (``/?annotator=NAME``); the page asks as well.
    Raises StoreError where the port is taken.
    """
    with remembering(memory_path) as memory:
        handler = _handler(Poll(ballots, memory), annotator)
        with listening(handler, port) as server:
            yield server


def _name(text: str) -> str:
    """An annotator's name as it is stored: one line, no blanks around it."""
    return " ".join(text.split())[:_LONGEST_NAME]
