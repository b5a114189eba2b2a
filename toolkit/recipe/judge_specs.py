"""How a judge is written: ``KIND`` or ``KIND:REST``."""

from __future__ import annotations

import re

from toolkit.errors import nearest

# Kind -> what follows it, as people read it.
JUDGE_FORMS = {
    "gold": "",
    "rm": "[:MODEL]",
    "implicit": "[:POLICY,REFERENCE]",
    "file": ":PATH",
    "python": ":module:function",
    "llm": ":MODEL",
    "openai": ":MODEL@BASE_URL",
}
# Lists of principles that are shipped.
SHIPPED_PRINCIPLES = ("hhh",)
_PATTERN = re.compile(
    r"gold|rm(:.+)?|implicit(:[^,]+,[^,]+)?|file:.+|python:[\w.]+:\w+|llm:.+|openai:[^@]+@https?://.+",
    re.DOTALL,
)


# What an address must not hold: a user's name and password, a query, which often is a key, and control characters.
_SECRET_IN_ADDRESS = re.compile(r"[@?#\\\s\x00-\x1f]")


def judge_problem(spec: str) -> tuple[str, str] | None:
    """What is wrong with how a judge is written, and the fix. Whether its model exists shows when it is asked.

    >>> judge_problem("golf")
    ('is no judge', "did you mean 'gold'?")
    >>> judge_problem("llm:tiny") is None
    True
    >>> judge_problem("openai:m@http://user:pw@host/v1")[0]
    'has a password, a key or a query in its address'
    """
    kind = spec.partition(":")[0]
    if kind not in JUDGE_FORMS:
        return "is no judge", nearest(kind, JUDGE_FORMS)
    if not _PATTERN.fullmatch(spec):
        quote = "; inside [ ] quote it, or its comma ends the list item" if kind == "implicit" else ""
        return "is incomplete", f"{kind}{JUDGE_FORMS[kind]}{quote}"
    if kind == "openai" and _SECRET_IN_ADDRESS.search(_address(spec)):
        fix = (
            "write openai:MODEL@BASE_URL without it, and put the key into OPENAI_API_KEY: names of judges are recorded"
        )
        return "has a password, a key or a query in its address", fix
    return None


def shown_judge(spec: str) -> str:
    """A judge as an error may name it: without what an address must not hold.

    >>> [shown_judge(spec) for spec in ("openai:m@http://user:pw@host", "openai:m@http://host?key=x", "gold")]
    ['openai:m@http://...', 'openai:m@http://...', 'gold']
    """
    if not spec.startswith("openai:") or not _SECRET_IN_ADDRESS.search(_address(spec)):
        return spec
    return f"{spec[: len(spec) - len(_address(spec))]}{_address(spec).partition('://')[0]}://..."


def _address(spec: str) -> str:
    return spec.partition("@")[2]
