"""Functions of the user's own as judges: one number for each response, or an error that names what is wrong."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import DuelError, ModelError, RecipeError
from toolkit.judging import user_code
from toolkit.judging.user_code import function_scores

pytestmark = pytest.mark.fault

TEXTS = ["a", "bb", "ccc"]
GOOD = {
    "numbers": "return [1, 2.0, 3]",
    "switches": "return [len(c) == 1 for c in completions]",
    "a generator": "return (len(c) for c in completions)",
    "a tuple": "return tuple(map(len, completions))",
    "an array": "import numpy as np; return np.array([1, 2, 3])",
    "a tensor": "import torch; return torch.tensor([1.0, 2.0, 3.0], requires_grad=True)",
    "tensors": "import torch; return [torch.tensor(float(len(c))) for c in completions]",
    "it prints": "print('on stdout'); return [1, 2, 3]",
    "it changes its arguments": "prompts[0][0]['content'] = 'gone'; completions.clear(); return [1, 2, 3]",
}
BAD = {
    "None": ("return None", "returned None, not a list"),
    "a number": ("return 1.0", "returned a float, not a list"),
    "a text": ("return '123'", "returned a str, not a list"),
    "a dict": ("return {1: 1, 2: 2, 3: 3}", "returned a dict, not a list"),
    "a set": ("return {1, 2, 3}", "returned a set, not a list"),
    "too few": ("return [1]", "returned 1 scores for 3 responses"),
    "too many": ("return [1] * 9", "returned more than 3 scores for 3 responses"),
    "an endless generator": ("import itertools; return itertools.count()", "returned more than 3 scores"),
    "texts": ("return [1, '2', 3]", "a str for response 1"),
    "pairs": ("return [1, 2, (3, 4)]", "a tuple for response 2"),
    "a vector each": ("import torch; return list(torch.ones(3, 2))", "a Tensor for response 0"),
    "an array of one column": ("import numpy as np; return np.ones((3, 1))", "a ndarray for response 0"),
    "a complex number": ("return [1j, 2, 3]", "a complex for response 0"),
    "a huge number": ("return [10 ** 400, 2, 3]", "a int for response 0"),
    "it raises": ("return [1 / 0]", "raised ZeroDivisionError: division by zero"),
    "it raises without words": ("raise ValueError", "raised ValueError"),
    "its error raises": ("raise type('Odd', (Exception,), {'__str__': lambda s: 1 / 0})", "raised Odd"),
    "a generator that raises": ("return (1 / 0 for c in completions)", "raised ZeroDivisionError"),
    "it exits": ("import sys; sys.exit(0)", "raised SystemExit"),
    "it recurses": ("return judge(prompts, completions)", "raised RecursionError"),
    "a coroutine": ("async def f(): return [1]\n    return f()", "is asynchronous"),
}


def module(folder: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)
    user_code._say_whose_code_runs.cache_clear()


def scores(body: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    module(folder, "my_judge", f"def judge(prompts, completions):\n    {body}\n", monkeypatch)
    return function_scores("my_judge:judge", [[{"role": "user", "content": "hi"}]] * 3, TEXTS)


@pytest.mark.parametrize("kind", GOOD)
def test_numbers_of_any_kind_are_scores(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert scores(GOOD[kind], tmp_path, monkeypatch) == ([1, 0, 0] if kind == "switches" else [1, 2, 3])
    assert capsys.readouterr().out == ""  # --json keeps stdout


def test_none_and_nan_are_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(map(math.isnan, scores("return [None, float('nan'), 0]", tmp_path, monkeypatch))) == [True, True, False]


def test_its_arguments_are_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[Any] = [[{"role": "user", "content": "hi"}]] * 3
    module(
        tmp_path, "my_judge", f"def judge(prompts, completions):\n    {GOOD['it changes its arguments']}\n", monkeypatch
    )
    function_scores("my_judge:judge", prompts, TEXTS)
    assert prompts[0][0]["content"] == "hi" and len(TEXTS) == 3


def test_paths_mean_the_same_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = "import os\nos.chdir('/')\ndef judge(prompts, completions):\n    os.chdir('/usr')\n    return [1, 2, 3]\n"
    module(tmp_path, "my_judge", source, monkeypatch)
    assert function_scores("my_judge:judge", ["p"] * 3, TEXTS) == [1, 2, 3] and Path.cwd() == tmp_path


@pytest.mark.parametrize("kind", BAD)
def test_anything_else_names_function_row_and_cause(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, message = BAD[kind]
    with pytest.raises(ModelError) as caught:
        scores(body, tmp_path, monkeypatch)
    assert message in str(caught.value) and "python:my_judge:judge" in str(caught.value)


SOURCES = {
    "a syntax error": ("def judge(:", "SyntaxError"),
    "it raises when it is imported": ("1 / 0", "ZeroDivisionError"),
    "it exits when it is imported": ("raise SystemExit(0)", "SystemExit"),
    "an import that is missing": ("import no_such_module_here", "no_such_module_here"),
    "no such function": ("def jugde(): ...", "has no function 'judge'"),
    "no function but a number": ("judge = 3", "has no function 'judge'"),
    "async": ("async def judge(prompts, completions): ...", "is asynchronous"),
    "other arguments": ("def judge(texts): return [1] * 3", "raised TypeError"),
    "a class": ("class judge:\n    def __init__(self, prompts, completions): ...", "returned a judge, not a list"),
    "NUL bytes": ("\0", "SyntaxError"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_module_that_cannot_be_used(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, message = SOURCES[kind]
    module(tmp_path, "my_judge", source, monkeypatch)
    with pytest.raises(DuelError) as caught:
        function_scores("my_judge:judge", ["p"] * 3, TEXTS)
    assert message in str(caught.value)


def test_a_module_of_the_same_name_is_named_by_its_file() -> None:
    with pytest.raises(RecipeError, match=r"'json', which is .*json.__init__\.py, has no function 'judge'"):
        function_scores("json:judge", ["p"], ["a"])
    with pytest.raises(RecipeError, match="cannot be imported: ModuleNotFoundError"):
        function_scores("no_such_module_here:judge", ["p"], ["a"])


def test_it_says_whose_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="toolkit.judging.user_code"):
        scores("return [1, 2, 3]", tmp_path, monkeypatch)
        function_scores("my_judge:judge", ["p"] * 3, TEXTS)
    assert [r.getMessage() for r in caplog.records] == [
        f"python:my_judge:judge runs your code, {tmp_path / 'my_judge.py'}, with all your rights"
    ]
