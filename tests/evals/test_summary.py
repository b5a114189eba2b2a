"""What an evaluation says in sentences."""

from __future__ import annotations

from typing import Any

import pytest

from toolkit.evals.hacking import drift
from toolkit.evals.summary import drift_warnings, verdict


def test_a_policy_whose_texts_changed_is_named_with_what_changed() -> None:
    longer, same = [10.0 + k for k in range(8)], [5.0] * 8
    rows = drift({"n_words": longer, "eos": same}, {"n_words": [1.0] * 8, "eos": same}, list(range(8)))
    assert drift_warnings({"dpo": rows, "rm_ppo": rows[1:]}) == [
        "the responses of dpo differ from those of sft: length in words"
    ]


@pytest.mark.parametrize(
    ("judge", "interval", "winner", "words"),
    [
        ("gold", (0.55, 0.7), "rm_ppo", "RM + PPO is better on this data"),
        (
            "gold",
            (0.3, 0.7),
            "undecided",
            "the interval contains one half. To settle an effect of this size takes about",
        ),
        ("rm", (0.55, 0.7), "undecided", "no independent judge compared the two arms"),
        ("gold", (None, None), "undecided", "no interval"),
    ],
)
def test_verdict(judge: str, interval: tuple[Any, Any], winner: str, words: str) -> None:
    row = {"policy": "rm_ppo", "baseline": "dpo", "judge": judge, "win_rate": 0.62, "p_value": 0.01, "n_judged": 90}
    row |= {"ci_low": interval[0], "ci_high": interval[1], "prompts_needed": 1234}
    result = verdict([row])
    assert result["winner"] == winner and words in result["sentence"]
