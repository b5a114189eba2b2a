"""What a judge scores: the ids that were sampled, without an end that a cut response did not come to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from toolkit.engine.engine import Engine
from toolkit.judging.options import JudgeOptions
from toolkit.judging.responses import PolicyResponses
from toolkit.judging.scorers import score_policies
from toolkit.models.encoding import text_encoder
from toolkit.models.save import write_training_record
from toolkit.recipe.training import ModelSection

pytestmark = pytest.mark.invariant

OPTIONS = JudgeOptions(ModelSection(dtype="float32"))
PROMPT, TEXT = "The hotel was", " lovely and quiet, and I would stay"


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The responses' ids of every tree that an engine scores."""
    seen: list[list[list[int]]] = []

    def scores(self: Engine, trees: Any, **_: Any) -> list[list[float]]:
        seen.extend([list(map(list, tree.response_ids)) for tree in trees])
        return [[0.0] * len(tree.response_ids) for tree in trees]

    monkeypatch.setattr(Engine, "outputs", scores)
    return seen


def test_a_cut_response_is_scored_without_an_end(reward_folder: Path, tokenizer: Any, scored: Any) -> None:
    encoder = text_encoder(tokenizer, PROMPT)
    [[ended]], _ = [encoder.encode(PROMPT, [TEXT], 100).tree.response_ids], None
    responses = PolicyResponses(["p"], [PROMPT], {"a": [[TEXT]], "b": [[TEXT]]})
    score_policies(f"rm:{reward_folder}", responses, OPTIONS)
    assert scored.pop() == [ended, ended]  # nothing is known: both are taken as ended
    cut = replace(responses, truncated={"a": [[True]], "b": [[False]]})
    score_policies(f"rm:{reward_folder}", cut, OPTIONS)
    assert scored.pop() == [ended[:-1], ended]
    # A sampled split of the text into ids is not always the one that the tokenizer makes of it.
    sampled = [encoder.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in TEXT]
    letters = [i for ids in sampled for i in ids]
    known = replace(cut, ids={"a": [[letters]], "b": [[[*letters, encoder.end_id]]]})
    score_policies(f"rm:{reward_folder}", known, OPTIONS)
    expected = [letters, [*letters, encoder.end_id]] if encoder.decode(letters) == TEXT else [ended[:-1], ended]
    assert scored.pop() == expected


@pytest.mark.parametrize(("loss", "per_token"), [("sigmoid", False), ("sigmoid_norm", True), ("ipo", True)])
def test_an_implicit_judge_scores_what_the_policys_loss_defines(
    reward_folder: Path, tiny: Any, tokenizer: Any, tmp_path: Path, loss: str, per_token: bool
) -> None:
    policy = tmp_path / "policy"
    tiny.save_pretrained(policy, state_dict={n: w * 1.1 for n, w in tiny.state_dict().items()})
    tokenizer.save_pretrained(policy)
    write_training_record(policy, beta=0.1, loss_type=loss)
    longer = TEXT + " there again with my family and all of our friends."
    responses = PolicyResponses(["p"], [PROMPT], {"a": [[TEXT]], "b": [[longer]]})
    scores = score_policies(f"implicit:{policy},tiny", responses, OPTIONS)
    write_training_record(policy, beta=0.1, loss_type="sigmoid")
    sums = score_policies(f"implicit:{policy},tiny", responses, OPTIONS)
    encoder = text_encoder(tokenizer, PROMPT)
    for name, text in (("a", TEXT), ("b", longer)):
        n = len(encoder.encode(PROMPT, [text], 1000).tree.response_ids[0]) if per_token else 1
        assert scores[name][0][0] == pytest.approx(sums[name][0][0] / n, rel=1e-5)
