"""A small task whose steps can be checked: sums worked out one operation a line.

The prompt ``3+2-1=`` has the solution ``3+2=5`` and ``5-1=4``, a step a line. ``scripts/build_arithmetic.py`` makes
the shipped data ``arithmetic`` of it: comparisons of solutions, and a label for each of their steps.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from toolkit.preferences.rows import Prompt

LARGEST = 5  # of all results on the way: few enough facts that a small model can learn them
SEPARATOR = "\n"
_STEP = re.compile(r"(\d+)([+-])(\d)=(\d+)")
_OPERATION = re.compile(r"([+-])(\d)")


def new_problem(rng: random.Random) -> str:
    """A prompt of 2 to 4 operations whose results all lie between 0 and ``LARGEST``."""
    value = rng.randint(1, LARGEST)
    text = str(value)
    for _ in range(rng.randint(2, 4)):
        sign, number = rng.choice([(s, n) for s in (1, -1) for n in range(1, 10) if 0 <= value + s * n <= LARGEST])
        value += sign * number
        text += f"{'+' if sign > 0 else '-'}{number}"
    return f"{text}="


def solve(problem: str) -> list[str]:
    """The right steps.

    >>> solve("3+2-1=")
    ['3+2=5', '5-1=4']
    """
    return solve_with_errors(problem, [0] * len(_OPERATION.findall(problem)))


def solve_with_errors(problem: str, errors: Sequence[int]) -> list[str]:
    """Steps whose results are off by ``errors``; each goes on from the result before it, right or wrong.

    >>> solve_with_errors("3+2-1=", [-1, 0])
    ['3+2=4', '4-1=3']
    """
    value, steps = int(problem[0]), []
    for (sign, number), error in zip(_OPERATION.findall(problem), errors, strict=True):
        result = value + (1 if sign == "+" else -1) * int(number) + error
        steps.append(f"{value}{sign}{number}={result}")
        value = result
    return steps


def check_steps(problem: str, steps: Sequence[str]) -> list[bool]:
    """Whether each step is right: it goes on from the result before it with the problem's next operation, and adds up.

    >>> check_steps("3+2-1=", ["3+2=4", "4-1=3", "3+1=4"])
    [False, True, False]
    """
    operations, value, checked = _OPERATION.findall(problem), problem[:1], []
    for k, step in enumerate(steps):
        match = _STEP.fullmatch(step.strip())
        if match is None or k >= len(operations):
            checked.append(False)
            continue
        before, sign, number, result = match.groups()
        right = int(before) + (1 if sign == "+" else -1) * int(number) == int(result)
        checked.append(right and before == value and (sign, number) == operations[k])
        value = result
    return checked


def progress(prompts: Sequence[Prompt], completions: Sequence[str], **_: object) -> list[float]:
    """A judge: the share of a problem's steps that a solution has got right before its first wrong one.

    Usable as ``python:toolkit.preferences.arithmetic:progress``.

    >>> progress(["3+2-1="] * 3, ["3+2=5\\n5-1=4", "3+2=5\\n5-1=3", "12"])
    [1.0, 0.5, 0.0]
    """
    shares = []
    for prompt, completion in zip(prompts, completions, strict=True):
        problem = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        steps = [step for step in completion.split(SEPARATOR) if step.strip()]
        checked = [*check_steps(problem, steps), False]
        shares.append(checked.index(False) / max(1, len(_OPERATION.findall(problem))))
    return shares
