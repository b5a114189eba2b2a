"""Recorded judgements as a judge of a run: which of them are of its responses, and whose answers they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from toolkit.evals.training_signals import TRAINING_SIGNALS
from toolkit.evals.words import counted
from toolkit.judging import scorers
from toolkit.judging.prompt_ids import ids_of_prompts
from toolkit.judging.records import Judgement, response_hash
from toolkit.judging.responses import PolicyResponses, Scores

# As many answers that are all those of a training signal are no accident.
MIN_SAME_ANSWERS = 50
PolicyScores = Mapping[str, Scores]  # by policy


@dataclass(frozen=True)
class MatchedJudgements:
    """The judgements of a file that are of a run's responses, and how many of its ``n_recorded`` are not.

    ``n_elsewhere`` are of other prompts or policies, ``n_other_responses`` of other responses to these prompts: both
    are left out. ``n_unverified`` are among ``matching`` without a record of the responses that were judged: they may
    be of other samples of the same policies.
    """

    matching: list[Judgement]
    n_recorded: int
    n_elsewhere: int
    n_other_responses: int
    n_unverified: int

    def notes(self, file: str) -> list[str]:
        """A sentence for each kind of judgement that was left out, or cannot be verified."""
        unverified = (
            "does not record which responses it is of, and was taken by prompt and policy",
            "do not record which responses they are of, and were taken by prompt and policy",
        )
        counts = (
            (self.n_elsewhere, *_left_out("of other prompts or policies")),
            (self.n_other_responses, *_left_out("of other responses to these prompts")),
            (self.n_unverified, *unverified),
        )
        of_all = f"{file}: of {counted(self.n_recorded, 'judgement')}"
        return [f"{of_all} {n:,} {one if n == 1 else several}" for n, one, several in counts if n]


def _left_out(why: str) -> tuple[str, str]:
    """The words for one judgement, and for several."""
    return f"is {why} and was left out", f"are {why} and were left out"


def matched(judgements: Sequence[Judgement], responses: PolicyResponses) -> MatchedJudgements:
    """Match recorded judgements with responses by the policies, the prompt and the hashes of both texts.

    A file may have a prompt under another id (:func:`toolkit.judging.prompt_ids.other_ids`): a vote on the text of a
    question is one on the conversation that holds it alone. Those that match have the prompt's id here.
    """
    names = ids_of_prompts(zip(responses.prompt_ids, responses.prompts, strict=True))
    hashes = {
        (policy, prompt_id): {response_hash(text) for text in texts}
        for policy, of_prompt in responses.texts.items()
        for prompt_id, texts in zip(responses.prompt_ids, of_prompt, strict=True)
        if texts
    }
    matching, unverified, elsewhere, other_texts = [], 0, 0, 0
    for j in judgements:
        if (here := names.get(j.prompt_id, j.prompt_id)) != j.prompt_id:
            j = replace(j, prompt_id=here)
        sides = [
            (hashes.get((j.policy, j.prompt_id)), j.policy_hash),
            (hashes.get((j.baseline, j.prompt_id)), j.baseline_hash),
        ]
        if any(known is None for known, _ in sides):
            elsewhere += 1
        elif any(recorded and known is not None and recorded not in known for known, recorded in sides):
            other_texts += 1
        else:
            matching.append(j)
            unverified += not all(recorded for _, recorded in sides)
    return MatchedJudgements(matching, len(judgements), elsewhere, other_texts, unverified)


def signals_by_answers(
    judgements: Sequence[Judgement], responses: PolicyResponses, known_scores: Mapping[str, PolicyScores]
) -> dict[str, str]:
    """Judge -> the reason why it is a training signal by another name: it gives that signal's answer on every pair.

    ``known_scores`` are the run's scores of these responses by judge. A judge with fewer than ``MIN_SAME_ANSWERS``
    answers is not looked at.
    """
    by_judge: dict[str, list[Judgement]] = defaultdict(list)
    for j in judgements:
        if j.preference is not None and j.judge not in TRAINING_SIGNALS:
            by_judge[j.judge].append(j)
    reasons = {}
    for judge, members in by_judge.items():
        for signal in sorted(TRAINING_SIGNALS.keys() & known_scores.keys()):
            n = _same_answers(members, signal, responses, known_scores[signal])
            if n >= MIN_SAME_ANSWERS:
                reasons[judge] = f"{TRAINING_SIGNALS[signal]} by another name (the same answer on all {n} pairs)"
    return reasons


def _same_answers(members: Sequence[Judgement], signal: str, responses: PolicyResponses, scores: PolicyScores) -> int:
    """How many judgements give the signal's answer, if all of them do; otherwise 0."""
    pairs = sorted({(j.policy, j.baseline) for j in members})
    answers: dict[tuple[str, ...], set[float | None]] = defaultdict(set)
    for policy, baseline in pairs:
        for own in scorers.compare(signal, policy, baseline, responses, scores):
            for hashes in ((own.policy_hash, own.baseline_hash), ("", "")):
                answers[(own.prompt_id, policy, baseline, *hashes)].add(own.preference)
    keys = [
        (j.prompt_id, j.policy, j.baseline, *((j.policy_hash, j.baseline_hash) if j.policy_hash else ("", "")))
        for j in members
    ]
    same = all(answers[key] == {j.preference} for key, j in zip(keys, members, strict=True))
    return len(members) if same else 0
