"""The questions to a language model as a judge, and the reading of its answers.

A template is a YAML file with ``kind``, ``system``, ``user`` (Jinja2) and ``max_tokens``. Shipped are ``choice`` (a
verdict in words), ``score`` (1 to 10, one response at a time) and ``logprob`` (the probabilities of A and B).
``principle`` and ``principle-logprob`` are ``choice`` and ``logprob`` with a written principle to judge by. Users can
name a file of their own instead: text, values, ``if``, ``for`` and a few filters (``sandbox.py``). ``{{ mark }}`` is a
word that no response can guess, for the lines around what is judged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from toolkit.errors import RecipeError
from toolkit.files import fingerprint
from toolkit.judging.answers import Answer
from toolkit.judging.sandbox import TemplateError, check_template, render
from toolkit.preferences.rows import Prompt, readable
from toolkit.recipe.yaml_values import read_yaml

SHIPPED = ("choice", "score", "logprob", "principle", "principle-logprob")
_NEEDS = {"choice": ("prompt", "response_a", "response_b"), "score": ("prompt", "response")}
_NEEDS["logprob"] = _NEEDS["choice"]
# Hexadecimal digits: too many to find a response that has its own mark in it.
MARK_LENGTH = 12
_VERDICT = re.compile(r"\[\[([^\[\]]*)\]\]")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["choice", "score", "logprob"]
    user: str
    system: str = ""
    max_tokens: PositiveInt = Field(512, le=100_000)


@dataclass(frozen=True)
class Template:
    """A question to a judge. ``principled``: it shows a principle."""

    name: str
    kind: Literal["choice", "score", "logprob"]
    system: str
    user: str
    max_tokens: int
    principled: bool = False

    @property
    def fingerprint(self) -> str:
        """A hash of the content: another wording is another judge."""
        return fingerprint([self.kind, self.system, self.user, self.max_tokens])

    def messages(self, prompt: Prompt, first: str, second: str, principle: str = "") -> list[dict[str, str]]:
        """The conversation to send. A template of kind ``score`` shows ``first`` alone."""
        values = {"prompt": readable(prompt), "response": first, "response_a": first, "response_b": second}
        # Whoever wrote a response does not know the others, so that no response can write the lines that end it.
        values |= {"principle": principle, "mark": fingerprint([values["prompt"], first, second])[:MARK_LENGTH]}
        try:
            user = render(self.user, values)
        except TemplateError as error:
            raise RecipeError(f"this judge template cannot be used: {error}", where=self.name) from error
        return [
            *([{"role": "system", "content": self.system}] if self.system else []),
            {"role": "user", "content": user},
        ]

    def verdict(self, reply: str, *, cut: bool) -> tuple[float | None, str]:
        """:func:`read_verdict` of a reply in words. One that was ``cut`` at the limit has none.

        The verdict stands at the end: what is in double brackets before a cut may be a quotation or a first thought.
        """
        assert self.kind != "logprob"
        return (None, f"cut at {self.max_tokens} tokens") if cut else read_verdict(self.kind, reply)

    def was_cut(self, stored: Answer) -> bool:
        """Whether a stored answer seems to come from a reply that was cut, which earlier versions read a verdict in.

        The reason why a reply ended is not stored: such a one has as many tokens as there may be, and goes on behind
        its verdict.
        """
        ends = stored.raw.rstrip(" .!*`\"')\n").endswith("]]")
        return self.kind != "logprob" and stored.completion_tokens == self.max_tokens and not ends


def load_template(name_or_path: str) -> Template:
    """A shipped template by name, or a YAML file.

    Raises RecipeError where there is none, or where it leaves out what a judge must see.
    """
    if name_or_path in SHIPPED:
        path = Path(str(resources.files("toolkit.judging").joinpath("templates", f"{name_or_path}.yaml")))
    else:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise RecipeError(
                "there is no such judge template", where=name_or_path, fix=f"name {', '.join(SHIPPED)}, or a YAML file"
            )
    try:
        file = _File.model_validate(read_yaml(path))
        used = check_template(file.user)
    except (ValidationError, TemplateError) as error:
        raise RecipeError(f"this judge template cannot be read: {error}", where=name_or_path) from error
    principled = "principle" in used and file.kind != "score"
    if used - {"mark"} - ({"principle"} if principled else set()) != set(_NEEDS[file.kind]):
        raise RecipeError(
            f"the template uses {sorted(used)}, a {file.kind} template uses {sorted(_NEEDS[file.kind])}",
            where=name_or_path,
            fix="write them as {{ prompt }}",
        )
    return Template(name_or_path, file.kind, file.system, file.user, file.max_tokens, principled)


def check_template_of(judges: Sequence[str], template: str | None) -> None:
    """Raises RecipeError for a template that cannot be used, before anything is computed for its judge."""
    if template is not None and any(judge.startswith(("llm:", "openai:")) for judge in judges):
        load_template(template)


def read_verdict(kind: Literal["choice", "score"], reply: str) -> tuple[float | None, str]:
    """``(value, "")`` of a reply in words, or ``(None, reason)``: 1, 0 or 1/2 for A, B or C; 1 to 10 for a score.

    A reply has exactly one verdict in double brackets. Nothing is guessed.

    >>> read_verdict("choice", "Both are fine, A is clearer. [[A]]")
    (1.0, '')
    >>> read_verdict("choice", "A is better.")
    (None, 'no verdict in double brackets')
    >>> read_verdict("score", "[[11]]")
    (None, "'11' is no verdict")
    """
    verdicts = {match.strip() for match in _VERDICT.findall(reply)}
    if not verdicts:
        return None, "no verdict in double brackets"
    if len(verdicts) > 1:
        return None, f"{len(verdicts)} different verdicts"
    [verdict] = verdicts
    if kind == "choice":
        value = {"A": 1.0, "B": 0.0, "C": 0.5}.get(verdict)
    else:
        value = float(verdict) if re.fullmatch(r"[1-9]|10", verdict) else None
    return (value, "") if value is not None else (None, f"{verdict!r} is no verdict")
