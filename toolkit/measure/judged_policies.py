"""What the judges of an evaluation say about its policies' samples."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.judging.judge import Judged, ask_judges
from toolkit.judging.responses import of_samples, sample_column
from toolkit.measure.policies import EvaluationSettings
from toolkit.preferences.samples import Sample, by_policy
from toolkit.progress import Reporter


def judge_all(
    judges: Sequence[str],
    samples: Sequence[Sample],
    policies: Sequence[str],
    settings: EvaluationSettings,
    reporter: Reporter,
) -> Judged:
    """What every judge says, and what language models took: of every policy against SFT, and of the arms against each
    other, in every round, and against rejection sampling.
    """
    names = [*policies, *sorted({sample.policy for sample in samples} - set(policies))]
    pairs = [(name, "sft") for name in names if name != "sft"] + [("rm_ppo", "dpo")]
    of_rounds = [name for name in names if name.startswith("rm_ppo@round-")]
    pairs += [(name, f"dpo@{name.partition('@')[2]}") for name in of_rounds]
    pairs += [(arm, "rft") for arm in ("rm_ppo", "dpo") if "rft" in names]
    of_policy = by_policy(samples)
    ordered = {name: of_policy[name] for name in names}
    responses = of_samples(ordered, settings.rows)
    scores = {"gold": "gold_reward", "rm": "explicit_reward", "implicit": "implicit_reward"}
    known = {judge: sample_column(ordered, responses.prompt_ids, name) for judge, name in scores.items()}
    return ask_judges(judges, pairs, responses, settings.judge_options, reporter, known_scores=known)
