"""Functions that a caller hands over: a changed one is another judge, and an equal one is the same in every process."""

from __future__ import annotations

import copy
import enum
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.running import environment

from toolkit.judging.function_identity import function_fingerprint
from toolkit.judging.user_code import hand_over

# What judges, and the same with one thing changed.
CHANGED = {
    "a default": ("def judge(p, c, n=40): return [n for _ in c]", "n=40", "n=60"),
    "a default by keyword": ("def judge(p, c, *, n=40): return [n for _ in c]", "n=40", "n=60"),
    "a constant": ("def judge(p, c): return [len(t) + 1 for t in c]", "+ 1", "+ 2"),
    "a method": ("def judge(p, c): return [t.count('!') for t in c]", "count", "find"),
    "a function of Python": ("def judge(p, c): return [min(map(len, c))] * len(c)", "min", "max"),
    "which helper": (
        "def size(t): return len(t)\ndef words(t): return t.count(' ')\ndef judge(p, c): return [size(t) for t in c]",
        "[size",
        "[words",
    ),
    "a helper": (
        "def size(t): return len(t)\ndef judge(p, c): return [size(t) for t in c]",
        "return len",
        "return -len",
    ),
    "a helper's helper": (
        "def sign(): return 1\ndef size(t): return sign() * len(t)\ndef judge(p, c): return [size(t) for t in c]",
        "return 1",
        "return -1",
    ),
    "a helper in a lambda": ("def size(t): return len(t)\njudge = lambda p, c: [size(t) for t in c]", "len(t)", "0"),
    "a number": ("N = 40\ndef judge(p, c): return [N for _ in c]", "N = 40", "N = 60"),
    "a list": ("WORDS = ['a', 'b']\ndef judge(p, c): return [t in WORDS for t in c]", "'b'", "'c'"),
    "a table": ("N = {'a': 1}\ndef judge(p, c): return [N.get(t) for t in c]", "1", "2"),
    "a function inside": (
        "def judge(p, c):\n    def size(t, n=2): return n * len(t)\n    return [size(t) for t in c]",
        "* len",
        "+ len",
    ),
    "a closure": (
        "def make(n):\n    def judge(p, c): return [n for _ in c]\n    return judge\njudge = make(40)",
        "make(40)",
        "make(60)",
    ),
    "an attribute": ("def judge(p, c): return [judge.n for _ in c]\njudge.n = 40", "n = 40", "n = 60"),
    "a partial function": (
        "import functools\ndef near(p, c, n): return [n for _ in c]\njudge = functools.partial(near, n=40)",
        "n=40",
        "n=60",
    ),
    "a cached function": (
        "import functools\n@functools.cache\ndef size(t): return len(t)\ndef judge(p, c): return [size(t) for t in c]",
        "return len",
        "return -len",
    ),
    "a decorated function": (
        "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def g(*a): return [2 * x for x in f(*a)]\n"
        "    return g\n@twice\ndef judge(p, c): return list(map(len, c))",
        "map(len",
        "map(hash",
    ),
    "an object": (
        "class Near:\n    def __init__(self, n): self.n = n\n    def __call__(self, p, c): return [self.n for _ in c]\n"
        "judge = Near(40)",
        "Near(40)",
        "Near(60)",
    ),
    "the class of an object": (
        "class Near:\n    def __call__(self, p, c): return [40 for _ in c]\njudge = Near()",
        "[40",
        "[60",
    ),
    "a bound method": (
        "class Near:\n    def __init__(self, n): self.n = n\n    def scores(self, p, c): return [self.n for _ in c]\n"
        "judge = Near(40).scores",
        "Near(40)",
        "Near(60)",
    ),
    "a class that it names": (
        "class Rule:\n    @property\n    def n(self): return 40\ndef judge(p, c): return [Rule().n for _ in c]",
        "return 40",
        "return 60",
    ),
    "a pattern": (
        "import re\nWORD = re.compile('a')\ndef judge(p, c): return [len(WORD.findall(t)) for t in c]",
        "'a'",
        "'b'",
    ),
}
SAME = {
    "lines and remarks": ("def judge(p, c): return [len(t) for t in c]", "def judge", "# By length.\n\n\ndef judge"),
    "names of variables": ("def judge(p, c): return [len(t) for t in c]", "[len(t) for t", "[len(text) for text"),
    "what it does not name": ("N = 40\ndef judge(p, c): return [len(t) for t in c]", "N = 40", "N = 60"),
    "an attribute that is also a global": (
        "count = 40\ndef judge(p, c): return [t.count('!') for t in c]",
        "count = 40",
        "count = 60",
    ),
}
Import = Callable[[str], Any]


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Import:
    """The function ``judge`` of a module with this source, written and imported anew."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of two files of one second the first one's would count

    def judge_of(source: str) -> Any:
        import importlib

        (tmp_path / "handed_over.py").write_text(source)
        monkeypatch.delitem(sys.modules, "handed_over", raising=False)
        importlib.invalidate_caches()
        return importlib.import_module("handed_over").judge

    return judge_of


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_function_is_another_judge(what: str, imported: Import) -> None:
    source, old, new = CHANGED[what]
    assert source.count(old) == 1
    name = hand_over(imported(source))
    assert hand_over(imported(source)) == name
    assert hand_over(imported(source.replace(old, new))) != name


@pytest.mark.parametrize("what", SAME)
def test_a_function_that_computes_the_same_is_the_same_judge(what: str, imported: Import) -> None:
    source, old, new = SAME[what]
    assert source.count(old) == 1
    assert hand_over(imported(source.replace(old, new))) == hand_over(imported(source))


def test_a_function_stays_the_same_while_it_runs(imported: Import) -> None:
    source = (
        "import functools\nMODEL = None\n@functools.cache\ndef size(t): return len(t)\n"
        "def load():\n    global MODEL\n    MODEL = MODEL or object()\n"
        "def judge(p, c):\n    load()\n    return [size(t) for t in c if (lambda: judge)()]\n"
    )
    judge = imported(source)
    name = hand_over(judge)
    for k in range(100):  # Python makes its code faster meanwhile
        judge(["p"], [f"{k}"])
    assert hand_over(judge) == name


PROGRAM = """
import functools, re
from toolkit.judging.user_code import hand_over
class Rule:
    words = {"good", "fine", "fun"}
    def bonus(self): return {t: len(t) for t in self.words}
class Plain:
    pass
RULE, THING, WORD = Rule(), Plain(), re.compile("a+")
@functools.cache
def size(text): return len(text)
def brevity(prompts, completions, unit=Plain):
    return [-size(text) for text in completions if text not in {"a", "b", "c"} and RULE and THING and WORD]
print(hand_over(brevity), hand_over(lambda p, c: [1 for _ in c]), hand_over(functools.partial(brevity, unit=size)))
"""


def test_a_function_is_the_same_judge_in_every_process() -> None:
    """Code inside it, objects, and sets in whatever order: their ``repr`` is another in each process."""
    names = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**environment(), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(names) == 1


class Level(enum.Enum):
    LOW = 1
    HIGH = 2


class Weighted:
    def __init__(self) -> None:
        self.weight = 1.0

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        return [len(text) * self.weight for text in completions]


def by_level(prompts: list[str], completions: list[str]) -> list[float]:
    return [Level.HIGH.value for _ in completions if Level.LOW]


def test_looking_at_a_judge_does_not_change_it() -> None:
    """Python leaves a note in the class of an object that it copies."""
    judge = Weighted()
    assert function_fingerprint(judge) == function_fingerprint(judge) == function_fingerprint(copy.copy(judge))
    assert function_fingerprint(by_level) == function_fingerprint(by_level)
