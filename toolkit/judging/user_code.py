"""Functions of the user's own as judges: ``python:MODULE:FUNCTION``. Their code runs in this process, unrestricted.

The rule for what a function returns: one number for each response. None and NaN mean that it cannot judge a response,
which counts as a failed judgement. Everything else is an error that names the function, the response and the cause.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import math
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, redirect_stdout
from functools import cache
from itertools import islice
from typing import Any

from toolkit.errors import ModelError, RecipeError, first_line
from toolkit.judging.function_identity import function_fingerprint
from toolkit.preferences.rows import Prompt

_log = logging.getLogger(__name__)

HANDED_OVER = "duel_functions"  # the module of functions that a caller from Python hands over


def function_scores(spec: str, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """The score of each response by ``MODULE:FUNCTION``; NaN where it gives none.

    What the function prints goes to stderr. Raises RecipeError where there is no such function, ModelError where it
    raises or returns something else.
    """
    function = _function(spec)
    where = f"python:{spec}"
    try:
        with _contained():
            returned = function(prompts=copy.deepcopy(list(prompts)), completions=list(responses))
            values = _as_list(returned, len(responses), where)
    except ModelError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise ModelError(
            f"the judge's function raised {_described(error)}",
            where=where,
            fix="mend the function, or return None for what it cannot score",
        ) from error
    if len(values) != len(responses):
        count = f"more than {len(responses)}" if len(values) > len(responses) else str(len(values))
        raise ModelError(
            f"the judge returned {count} scores for {len(responses)} responses",
            where=where,
            fix="return one number for each response, in their order",
        )
    return [_number(value, row, where) for row, value in enumerate(values)]


def hand_over(function: Callable[[Sequence[Any], Sequence[str]], Any]) -> str:
    """The name of a judge, ``python:MODULE:FUNCTION``, for a function of the caller's f(prompts, completions).

    The name holds the fingerprint of what the function computes, so that another function of the same name, or the same
    one with another default, is another judge.
    """
    module = sys.modules.setdefault(HANDED_OVER, types.ModuleType(HANDED_OVER))
    name = re.sub(r"\W", "_", getattr(function, "__name__", type(function).__name__))
    name = f"{name}_{function_fingerprint(function)}"
    setattr(module, name, lambda prompts, completions: function(prompts, completions))
    return f"python:{HANDED_OVER}:{name}"


def _function(spec: str) -> Callable[..., Any]:
    module_name, _, name = spec.partition(":")
    where = f"python:{spec}"
    try:
        with _contained():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module's own code runs, and may raise anything
        raise RecipeError(
            f"the judge's module cannot be imported: {_described(error)}",
            where=where,
            fix="name it as python:MODULE:FUNCTION, with the module on PYTHONPATH (PYTHONPATH=. for this folder)",
        ) from error
    file = getattr(module, "__file__", None) or "the interpreter"
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(
            f"{module_name!r}, which is {file}, has no function {name!r}",
            where=where,
            fix="correct the name; if that is another module of the same name, rename yours",
        )
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise RecipeError("the judge's function is asynchronous", where=where, fix="name a function without async")
    if module_name != HANDED_OVER:  # who hands a function over knows it
        _say_whose_code_runs(spec, str(file))
    return function  # type: ignore[no-any-return]


@contextmanager
def _contained() -> Iterator[None]:
    """The user's code prints to stderr, and paths mean the same after it, whatever folder it changes to."""
    before = os.getcwd()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.chdir(before)


@cache
def _say_whose_code_runs(spec: str, file: str) -> None:
    _log.warning("python:%s runs your code, %s, with all your rights", spec, file)


def _as_list(returned: Any, n: int, where: str) -> list[Any]:
    """The returned scores, at most ``n`` + 1 of them: a generator may never end."""
    if inspect.isawaitable(returned):
        returned.close() if inspect.iscoroutine(returned) else None
        raise ModelError("the judge's function is asynchronous", where=where, fix="name a function without async")
    unordered = isinstance(returned, str | bytes | Mapping | Set)
    if unordered or not isinstance(returned, Iterable):
        raise ModelError(
            f"the judge returned {_a(returned)}, not a list of scores",
            where=where,
            fix=f"return a list of {n} numbers, one for each response",
        )
    return list(islice(returned, n + 1))


def _number(value: Any, row: int, where: str) -> float:
    """Raises ModelError for what is no number; numbers of numpy and torch are some."""
    if value is None:
        return math.nan
    try:
        if isinstance(value, str | bytes):
            raise TypeError("text is no number")
        return float(value)
    except Exception as error:  # float() runs the value's own code
        raise ModelError(
            f"the judge returned {_a(value)} for response {row}: {type(error).__name__}: {first_line(error)}",
            where=where,
            fix="return a number, or None where there is no score",
        ) from error


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _described(error: BaseException) -> str:
    """An error's type, message and place; its own code may fail as well."""
    try:
        text = first_line(error)
    except Exception:  # an error whose message raises
        text = "an error without a message"
    name = type(error).__name__
    last, frame = None, error.__traceback__
    while frame is not None:
        last, frame = frame, frame.tb_next
    place = f" ({last.tb_frame.f_code.co_filename}, line {last.tb_lineno})" if last is not None else ""
    return (name if text == name else f"{name}: {text}") + place
