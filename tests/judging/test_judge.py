"""One way to ask a judge of any kind, and the responses that it sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.errors import RecipeError
from toolkit.judging import scorers
from toolkit.judging.judge import ask_judges, judge_pairs
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import Judgement, write_judgements
from toolkit.judging.responses import PolicyResponses
from toolkit.progress import Reporter
from toolkit.recipe.schema import ModelSection

QUIET = Reporter(quiet=True)
OPTIONS = JudgeOptions(ModelSection(dtype="float32"))
GOOD, BAD = " lovely and quiet, and I would stay there again.", " dirty, and the staff were rude to us."
RESPONSES = PolicyResponses(["p0"], ["The hotel was"], {"a": [[GOOD]], "b": [[BAD]], "c": [[GOOD, BAD]]})


def test_a_file_is_returned_as_it_is(tmp_path: Path) -> None:
    rows = [Judgement("another prompt", "x", "y", "me", 0.25, 1)]
    write_judgements(rows, tmp_path / "votes.parquet")
    assert judge_pairs(f"file:{tmp_path / 'votes.parquet'}", [("a", "b")], RESPONSES, OPTIONS, QUIET) == (rows, None)


def test_known_scores_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "score", lambda *_: pytest.fail("scored again"))
    known = {"rm": {"a": [[1.0]], "b": [[2.0]], "c": [[1.0, 3.0]]}}
    judgements, usage = ask_judges(["rm"], [("a", "b"), ("c", "b")], RESPONSES, OPTIONS, QUIET, known_scores=known)
    assert [(j.policy, j.baseline, j.preference) for j in judgements] == [("a", "b", 0), ("c", "b", 0), ("c", "b", 1)]
    assert usage == []


def test_a_judge_that_scores_compares_every_sample_with_every_other() -> None:
    judgements, _ = judge_pairs("gold", [("a", "b"), ("a", "c")], RESPONSES, OPTIONS, QUIET)
    assert [(j.baseline, j.preference) for j in judgements] == [("b", 1.0), ("c", 0.5), ("c", 1.0)]
    with pytest.raises(RecipeError, match="does not score"):
        judge_pairs("oracle:x", [("a", "b")], RESPONSES, OPTIONS, QUIET)


def test_a_language_model_compares_samples_as_far_as_both_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Best-of-n has one response to a prompt, whatever the number of samples of the other policies."""
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))
    judgements, usage = judge_pairs("llm:tiny", [("b", "c")], RESPONSES, OPTIONS, QUIET)
    assert [j.order for j in judgements] == [0, 1] and usage is not None and usage.n_questions == 2
    assert list(RESPONSES.paired("c", "b")) == [("p0", "The hotel was", GOOD, BAD)]
