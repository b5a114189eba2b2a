"""What the judges of an evaluation say about its policies' samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolkit.judging.judge import Judged, ask_judges
from toolkit.judging.responses import PolicyResponses
from toolkit.measure.policies import EvaluationSettings
from toolkit.preferences.samples import Sample, by_policy, by_prompt
from toolkit.progress import Reporter


def judge_all(
    judges: Sequence[str],
    samples: Sequence[Sample],
    policies: Sequence[str],
    settings: EvaluationSettings,
    reporter: Reporter,
) -> Judged:
    """Every policy against SFT, and the arms against each other, by every judge; and what language models took."""
    names = [*policies, *sorted({sample.policy for sample in samples} - set(policies))]
    pairs = [(name, "sft") for name in names if name != "sft"] + [("rm_ppo", "dpo")]
    prompt_ids = [row.prompt_id for row in settings.rows]
    of_policy = {name: by_prompt(of_name) for name, of_name in by_policy(samples).items()}

    def column(field: str) -> dict[str, list[list[Any]]]:
        return {name: [[getattr(s, field) for s in of_policy[name][key]] for key in prompt_ids] for name in names}

    responses = PolicyResponses(
        prompt_ids,
        [row.prompt for row in settings.rows],
        column("response"),
        ids=column("response_ids"),
        truncated=column("truncated"),
    )
    known = {"gold": column("gold_reward"), "rm": column("explicit_reward"), "implicit": column("implicit_reward")}
    return ask_judges(judges, pairs, responses, settings.judge_options, reporter, known_scores=known)
