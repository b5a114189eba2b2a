"""What is said of the arms' differences: what matters most first, and nothing that is equal by the way."""

from __future__ import annotations

from typing import Any

import pytest

from toolkit.recipe.arms import Measured, planned_differences, trained_differences
from toolkit.recipe.files import load_recipe
from toolkit.recipe.schema import Recipe

EQUAL = ["dpo.learning_rate=1e-3", "ppo.adam_epsilon=1e-8", "dpo.beta=0.05", "ppo.missing_eos_penalty=null"]
UNKNOWN = Measured()


def recipe_of(*sets: str) -> Recipe:
    return load_recipe("smoke", [*EQUAL, *sets]).recipe


def differing(*sets: str, measured: Measured = UNKNOWN) -> dict[str, tuple[Any, Any]]:
    return {d.name: (d.ppo, d.dpo) for d in planned_differences(recipe_of(*sets), measured) if d.differs}


def test_shared_settings_that_differ() -> None:
    sets = ("ppo.learning_rate=3e-4", "dpo.warmup_ratio=0")
    assert differing(*sets) == {"learning_rate": (3e-4, 1e-3), "warmup_ratio": (0.1, 0.0)}
    assert differing("ppo.per_device_train_batch_size=32", "dpo.num_train_epochs=7") == {}


def test_what_matters_most_comes_first() -> None:
    measured = Measured(kl_nats=(12.9, 3.0), prompts_seen=(112, 200), response_tokens_trained=(9_000, 24_000))
    sets = ("dpo.beta=0.3", "ppo.missing_eos_penalty=-1", "ppo.response_length=40", "ppo.adam_epsilon=1e-5")
    rows = planned_differences(recipe_of(*sets), measured)
    assert [row.name for row in rows] == [
        *("kl_nats", "kl_coef, beta", "prompts_seen", "response_tokens_trained", "tuning_trials"),
        *("missing_eos_penalty", "response_length", "adam_epsilon"),
    ]
    assert [row.name for row in rows if not row.differs] == ["tuning_trials"]
    assert (rows[0].ppo, rows[0].dpo) == (12.9, 3.0) and (rows[4].ppo, rows[4].dpo) == (1, 1)


def test_the_two_weights_of_the_kl_are_one_parameter() -> None:
    rows = {row.name: row for row in planned_differences(recipe_of())}
    assert not rows["kl_coef, beta"].differs and "one parameter" in rows["kl_coef, beta"].note
    assert differing("dpo.beta=0.1") == {"kl_coef, beta": (0.05, 0.1)}
    assert planned_differences(recipe_of("dpo.beta=0.1"))[0].sentence == (
        "the arms differ in the weight of the KL (ppo.kl_coef, dpo.beta): RM + PPO 0.05, DPO 0.1 (one parameter where "
        "labels are Bradley-Terry: both arms aim at pi_ref exp(reward / beta))"
    )


@pytest.mark.parametrize("sets", [("dpo.loss_type=ipo",), ("ppo.whiten_rewards=true",), ("ppo.adaptive_kl=true",)])
def test_equal_numbers_on_two_scales_are_not_equal(sets: tuple[str, ...]) -> None:
    [row] = [row for row in planned_differences(recipe_of(*sets)) if row.name == "kl_coef, beta"]
    assert row.differs and (row.ppo, row.dpo) == (0.05, 0.05)


def test_help_that_dpo_does_not_get() -> None:
    assert differing("ppo.missing_eos_penalty=-1") == {"missing_eos_penalty": (-1.0, None)}
    assert differing("ppo.response_length=40") == {"response_length": (40, 48)}
    assert differing("ppo.response_length=48") == {}  # as long as the data's responses


@pytest.mark.parametrize(
    ("kl_nats", "differs"), [((3.0, 3.2), False), ((12.9, 3.0), True), ((0.0, 0.0), False), ((-0.1, 2.0), True)]
)
def test_measured_quantities_are_equal_within_a_tenth(kl_nats: tuple[float, float], differs: bool) -> None:
    assert ("kl_nats" in differing(measured=Measured(kl_nats=kl_nats))) == differs


def test_of_trained_arms_the_settings_come_from_their_records() -> None:
    recipe = load_recipe("smoke", ["dpo.beta=0.3", "ppo.kl_milestones=[1, 2]"]).recipe

    def record(section: str, prompts: int, tokens: int) -> dict[str, Any]:
        values = getattr(recipe, section).model_dump(mode="json")
        fields = {f"{section}.{name}": value for name, value in values.items()} | {"seed": 0, "code": "0" * 16}
        return {"fields": fields, "metrics": {"prompts_seen": prompts, "response_tokens_trained": tokens}}

    records = {"ppo": record("ppo", 90, 5_000), "dpo": record("dpo", 96, 5_100)}
    rows = trained_differences(records, {"sft": 0.0, "rm_ppo": 1.5, "dpo": 1.4}, 48)
    assert rows == planned_differences(recipe, Measured((1.5, 1.4), (90, 96), (5_000, 5_100)))
    assert {row.name: row.differs for row in rows[:4]} == {
        **{"kl_nats": False, "kl_coef, beta": True, "prompts_seen": True, "response_tokens_trained": False}
    }
