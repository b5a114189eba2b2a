"""What an arm's reward says of the new samples of a round, before it is trained on their labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from toolkit.files import read_table, write_table
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.tables import from_parquet

FRESH_REWARDS_FILE = "fresh_rewards.parquet"


def write_fresh_rewards(rewards: Sequence[Sequence[float]], out: Path) -> None:
    """Write what a reward gave to the responses of a round's comparisons, before it was trained on them."""
    write_table([{"rewards": list(of_example)} for of_example in rewards], out / FRESH_REWARDS_FILE)


def read_fresh(labels: Path, arm: str, stage: Path) -> tuple[list[PreferenceRow], list[list[float]]]:
    """An arm's labelled comparisons of a round, and the rewards of their responses that its stage wrote."""
    rewards = [list(row["rewards"]) for row in read_table(stage / FRESH_REWARDS_FILE)]
    return from_parquet(labels / f"{arm}.parquet"), rewards
