"""One way to ask a judge of any kind, and the responses that it sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.errors import RecipeError
from toolkit.judging import scorers
from toolkit.judging.judge import ask_judges, judge_pairs
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import Judgement, text_measures, write_judgements
from toolkit.judging.responses import PolicyResponses
from toolkit.judging.win_rates import win_rates
from toolkit.progress import Reporter
from toolkit.recipe.training import ModelSection

QUIET = Reporter(quiet=True)
OPTIONS = JudgeOptions(ModelSection(dtype="float32"))
GOOD, BAD = " lovely and quiet, and I would stay there again.", " dirty, and the staff were rude to us."
RESPONSES = PolicyResponses(["p0"], ["The hotel was"], {"a": [[GOOD]], "b": [[BAD]], "c": [[GOOD, BAD]]})


def test_of_a_file_the_judgements_of_these_responses_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Votes on another run's samples decided this run: what does not match is left out, and said."""
    prompt_id = "p0"
    text_a, text_b = GOOD, BAD
    tied = Judgement(prompt_id, "a", "b", "me", 1.0, **text_measures(text_a, text_b))
    turned = Judgement(prompt_id, "b", "a", "me", 0.0, **text_measures(text_b, text_a))
    untied = Judgement(prompt_id, "a", "b", "me", 0.5)
    other_text = Judgement(prompt_id, "a", "b", "me", 0.0, **text_measures(text_a, text_b + "!"))
    elsewhere = [Judgement("another prompt", "a", "b", "me", 0.0), Judgement(prompt_id, "a", "z", "me", 0.0)]
    write_judgements([tied, turned, untied, other_text, *elsewhere], tmp_path / "votes.parquet")
    spec = f"file:{tmp_path / 'votes.parquet'}"
    judgements, usage = judge_pairs(spec, [("a", "b")], RESPONSES, OPTIONS, Reporter())
    assert [(j.policy, j.preference) for j in judgements] == [("a", 1.0), ("a", 1.0), ("a", 0.5)] and usage is None
    said = capsys.readouterr().err
    assert "of 6 judgements 2 are of other prompts or policies" in said
    assert "1 is of other responses to these prompts" in said and "1 does not record" in said
    # The same goes into the results, since a line on the terminal is gone with it.
    judged = ask_judges([spec], [("a", "b")], RESPONSES, OPTIONS, QUIET)
    assert judged.judgements == judgements and judged.usages == []
    assert judged.warnings == [line for line in said.splitlines() if line]


def test_known_scores_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "score", lambda *_: pytest.fail("scored again"))
    known = {"rm": {"a": [[1.0]], "b": [[2.0]], "c": [[1.0, 3.0]]}}
    judged = ask_judges(["rm"], [("a", "b"), ("c", "b")], RESPONSES, OPTIONS, QUIET, known_scores=known)
    assert [(j.policy, j.baseline, j.preference) for j in judged.judgements] == [
        ("a", "b", 0),
        ("c", "b", 0),
        ("c", "b", 1),
    ]
    assert judged.usages == judged.warnings == [] and judged.dependent == {}


def test_a_judge_that_scores_compares_every_sample_with_every_other() -> None:
    judgements, _ = judge_pairs("gold", [("a", "b"), ("a", "c")], RESPONSES, OPTIONS, QUIET)
    assert [(j.baseline, j.preference) for j in judgements] == [("b", 1.0), ("c", 0.5), ("c", 1.0)]
    with pytest.raises(RecipeError, match="is no judge"):
        judge_pairs("oracle:x", [("a", "b")], RESPONSES, OPTIONS, QUIET)


def test_equal_samples_count_as_often_as_they_were_drawn() -> None:
    """A policy with the same response in three of four samples wins three of its four comparisons."""
    texts = {"a": [[GOOD, GOOD, BAD, GOOD]], "b": [[" a house with a door."]]}
    responses = PolicyResponses(["p0"], ["The hotel was"], texts)
    judgements, _ = judge_pairs("gold", [("a", "b")], responses, OPTIONS, QUIET)
    assert [j.preference for j in judgements] == [1.0, 1.0, 0.0, 1.0]
    [row] = win_rates(judgements)
    assert (row.win_rate, row.n_prompts, row.n_judged) == (0.75, 1, 1)
    # In both orders, and with an answer that failed in one of them for one of the equal pairs.
    both = [replace(j, order=order) for j in judgements for order in (0, 1)]
    assert win_rates(both)[0].win_rate == 0.75
    assert win_rates([replace(both[0], preference=None), *both[1:]])[0].win_rate == 0.75
    # A judge that was asked with several seeds has not seen further samples.
    seeds = [replace(j, seed=seed) for j in judgements[1:3] for seed in range(3 if j.preference else 1)]
    assert win_rates(seeds)[0].win_rate == 0.5


def test_a_language_model_compares_samples_as_far_as_both_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Best-of-n has one response to a prompt, whatever the number of samples of the other policies."""
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))
    judgements, usage = judge_pairs("llm:tiny", [("b", "c")], RESPONSES, OPTIONS, QUIET)
    assert [j.order for j in judgements] == [0, 1] and usage is not None and usage.n_questions == 2
    assert list(RESPONSES.paired("c", "b")) == [("p0", "The hotel was", GOOD, BAD)]
