"""What an evaluation says in sentences."""

from __future__ import annotations

from toolkit.evals.hacking import drift
from toolkit.evals.summary import drift_warnings


def test_a_policy_whose_texts_changed_is_named_with_what_changed() -> None:
    longer, same = [10.0 + k for k in range(8)], [5.0] * 8
    rows = drift({"n_words": longer, "eos": same}, {"n_words": [1.0] * 8, "eos": same}, list(range(8)))
    assert drift_warnings({"dpo": rows, "rm_ppo": rows[1:]}) == [
        "the responses of dpo differ from those of sft: length in words"
    ]
