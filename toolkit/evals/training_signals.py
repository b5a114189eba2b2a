"""The judges that cannot decide between the arms, because an arm was trained on them."""

from __future__ import annotations

TRAINING_SIGNALS = {
    "rm": "the reward model that PPO was trained against",
    "implicit": "the implicit reward of DPO's own policy",
}


def is_neutral(judge: str) -> bool:
    """Whether no arm was trained on this judge: its win rate says which arm is better, not how far one climbed."""
    return judge not in TRAINING_SIGNALS
