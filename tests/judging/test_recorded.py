"""Judgements from a file: a training signal that comes back through a file is no independent judge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from toolkit.evals.training_signals import TRAINING_SIGNALS
from toolkit.judging import scorers
from toolkit.judging.judge import ask_judges
from toolkit.judging.options import JudgeOptions
from toolkit.judging.recorded import MIN_SAME_ANSWERS, MatchedJudgements, matched, signals_by_answers
from toolkit.judging.records import Judgement, turned, write_judgements
from toolkit.judging.responses import PolicyResponses
from toolkit.progress import Reporter
from toolkit.recipe.training import ModelSection

N = 40
IDS = [f"p{p}" for p in range(N)]
TEXTS = {name: [[f"{name} {p}"] for p in range(N)] for name in ("sft", "rm_ppo", "dpo")}
RESPONSES = PolicyResponses(IDS, ["a prompt"] * N, TEXTS)
KNOWN: dict[str, Any] = {
    signal: {name: [[float((3 * k + (p * (k + 2)) % 7) % 5)] for p in range(N)] for k, name in enumerate(TEXTS)}
    for signal in ("rm",)
}
KNOWN["implicit"] = {name: [[-value for value in of] for of in scores] for name, scores in KNOWN["rm"].items()}
PAIRS = [("rm_ppo", "sft"), ("rm_ppo", "dpo")]


def answers(signal: str, name: str, n: int = 2 * N) -> list[Judgement]:
    """The signal's own judgements of the responses under another name."""
    both = [j for pair in PAIRS for j in scorers.compare(signal, *pair, RESPONSES, KNOWN[signal])]
    return [replace(j, judge=name) for j in both][:n]


@pytest.mark.parametrize("signal", ["rm", "implicit"])
@pytest.mark.parametrize("hashes", [True, False])
def test_a_signal_under_another_name_is_known_by_its_answers(signal: str, hashes: bool) -> None:
    votes = answers(signal, "a careful annotator")
    if not hashes:
        votes = [replace(j, policy_hash="", baseline_hash="") for j in votes]
    reason = f"{TRAINING_SIGNALS[signal]} by another name (the same answer on all {2 * N} pairs)"
    assert signals_by_answers(votes, RESPONSES, KNOWN) == {"a careful annotator": reason}
    assert signals_by_answers([*map(turned, votes)], RESPONSES, KNOWN).keys() == {"a careful annotator"}


def test_one_other_answer_makes_another_judge() -> None:
    votes = answers("rm", "me")
    votes[7] = replace(votes[7], preference=1.0 - (votes[7].preference or 0.0))
    assert votes[7].preference != 0.5 and signals_by_answers(votes, RESPONSES, KNOWN) == {}


def test_few_answers_say_nothing_and_failed_ones_are_none() -> None:
    assert signals_by_answers(answers("rm", "me", MIN_SAME_ANSWERS - 1), RESPONSES, KNOWN) == {}
    votes = answers("rm", "me", MIN_SAME_ANSWERS)
    failed = replace(votes[0], preference=None, error="timeout")
    assert signals_by_answers([*votes, failed], RESPONSES, KNOWN).keys() == {"me"}
    # By its own name it is known already.
    assert signals_by_answers(answers("rm", "rm"), RESPONSES, KNOWN) == {}


def test_asking_a_file_says_so(tmp_path: Path) -> None:
    mixed = [*answers("rm", "me"), *answers("rm", "rm"), *answers("rm", "you", 3)]
    write_judgements(mixed, tmp_path / "votes.parquet")
    options = JudgeOptions(ModelSection(dtype="float32"))
    spec, quiet = f"file:{tmp_path / 'votes.parquet'}", Reporter(quiet=True)
    judged = ask_judges([spec], PAIRS, RESPONSES, options, quiet, known_scores=KNOWN)
    assert judged.dependent.keys() == {"me"} and len(judged.judgements) == 4 * N + 3
    write_judgements([*map(turned, mixed)], tmp_path / "votes.parquet")  # with what was asked about called the baseline
    assert ask_judges([spec], PAIRS, RESPONSES, options, quiet, known_scores=KNOWN) == judged


def test_mirrored_judgements_match_too() -> None:
    result = matched([turned(j) for j in answers("rm", "me") if j.baseline == "dpo"], RESPONSES)
    assert len(result.matching) == N and result.notes("votes") == []
    assert {(j.policy, j.baseline) for j in result.matching} == {("dpo", "rm_ppo")}


def test_one_judgement_and_several_are_said_alike() -> None:
    assert MatchedJudgements([], 1, 1, 0, 0).notes("votes") == [
        "votes: of 1 judgement 1 is of other prompts or policies and was left out"
    ]
    assert MatchedJudgements([], 1200, 0, 1100, 1).notes("votes") == [
        "votes: of 1,200 judgements 1,100 are of other responses to these prompts and were left out",
        "votes: of 1,200 judgements 1 does not record which responses it is of, and was taken by prompt and policy",
    ]
