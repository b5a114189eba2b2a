"""Judgements from a file: a training signal that comes back through a file is no independent judge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from toolkit.evals.training_signals import TRAINING_SIGNALS
from toolkit.judging import alpaca_eval, scorers
from toolkit.judging.judge import ask_judges
from toolkit.judging.options import JudgeOptions
from toolkit.judging.prompt_ids import ids_of_prompts
from toolkit.judging.recorded import MIN_SAME_ANSWERS, MatchedJudgements, matched, signals_by_answers
from toolkit.judging.records import Judgement, read_judgements, text_measures, turned, write_judgements
from toolkit.judging.responses import PolicyResponses
from toolkit.preferences.rows import Prompt, prompt_id
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


def test_a_vote_on_the_text_of_a_question_is_one_on_its_conversation(tmp_path: Path) -> None:
    """Files of battles have the id of a text, AlpacaEval's annotations another; a run has that of its messages."""
    chats: list[Prompt] = [[{"role": "user", "content": f"Why {p}?"}] for p in range(N)]
    chats[1] = [{"role": "system", "content": "Be brief."}, *chats[1]]
    responses = PolicyResponses([prompt_id(chat) for chat in chats], chats, TEXTS)
    battles = [
        {"prompt": f"Why {p}?", "model_a": "rm_ppo", "model_b": "dpo", "response_a": TEXTS["rm_ppo"][p][0],
         "response_b": TEXTS["dpo"][p][0], "winner": "model_a", "judge": "ann"} for p in range(N)
    ]  # fmt: skip
    file = tmp_path / "votes.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in battles))
    result = matched(read_judgements([file]), responses)
    assert (len(result.matching), result.n_elsewhere) == (N - 1, 1)  # a system message makes another prompt
    assert {j.prompt_id for j in result.matching} == {*responses.prompt_ids} - {responses.prompt_ids[1]}
    own = [
        Judgement(key, "rm_ppo", "dpo", "gold", 1.0, **text_measures(TEXTS["rm_ppo"][p][0], TEXTS["dpo"][p][0]))
        for p, key in enumerate(responses.prompt_ids)
    ]
    alpaca_eval.write_annotations(own, responses, tmp_path / "annotations.json")
    result = matched(read_judgements([tmp_path / "annotations.json"]), responses)
    assert [j.prompt_id for j in result.matching] == responses.prompt_ids and result.notes("a") == []


def test_one_text_of_two_prompts_names_neither() -> None:
    assert ids_of_prompts([("p", "Why?"), ("q", "Why?")]) == {"p": "p", "q": "q"}
