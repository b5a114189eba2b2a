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
_PATTERN = re.compile(
    r"gold|rm(:.+)?|implicit(:[^,]+,[^,]+)?|file:.+|python:[\w.]+:\w+|llm:.+|openai:[^@]+@https?://.+"
)


def judge_problem(spec: str) -> tuple[str, str] | None:
    """What is wrong with how a judge is written, and the fix. Whether its model exists shows when it is asked.

    >>> judge_problem("golf")
    ('is no judge', "did you mean 'gold'?")
    >>> judge_problem("llm:tiny") is None
    True
    """
    kind = spec.partition(":")[0]
    if kind not in JUDGE_FORMS:
        return "is no judge", nearest(kind, JUDGE_FORMS)
    if _PATTERN.fullmatch(spec):
        return None
    quote = "; inside [ ] quote it, or its comma ends the list item" if kind == "implicit" else ""
    return "is incomplete", f"{kind}{JUDGE_FORMS[kind]}{quote}"
