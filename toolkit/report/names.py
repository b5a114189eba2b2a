"""Names and colours of arms, policies and rewards.

A colour is written ``"@name"`` or ``"@name/alpha"`` and resolved in the browser against :data:`PALETTE`, so that one
figure serves light and dark.
"""

from __future__ import annotations

from toolkit.evals.words import ARM_NAMES, policy_name

__all__ = ["ARM_NAMES", "PALETTE", "REWARDS", "REWARD_COLOR", "arm_name", "arm_of", "color", "policy_name"]

# rm_ppo and dpo are an orange and a blue that every common colour blindness can tell apart. All else is neutral.
PALETTE = {
    "light": {
        "paper": "#fcfcfb",
        "panel": "#ffffff",
        "sunken": "#f4f4f2",
        "ink": "#191c20",
        "muted": "#5c636b",
        "line": "#dcdedd",
        "rm_ppo": "#b2480b",
        "dpo": "#1d5fa8",
        "sft": "#5d6670",
        "base": "#777f88",
        "best_of_n": "#4f5860",
        "rft": "#3f474e",
        "warn": "#8a5a00",
        "mark": "#fbe7a1",
    },
    "dark": {
        "paper": "#14171a",
        "panel": "#1a1e22",
        "sunken": "#20252a",
        "ink": "#e7e9ea",
        "muted": "#9ea6ad",
        "line": "#353b41",
        "rm_ppo": "#f09355",
        "dpo": "#6fb0f2",
        "sft": "#a9b2ba",
        "base": "#8d969e",
        "best_of_n": "#bcc4cb",
        "rft": "#c9d0d6",
        "warn": "#e3b341",
        "mark": "#6b5510",
    },
}
CONTROL_NAMES = {
    "online_dpo": "online DPO",
    "online_dpo_gold": "online DPO, judge's labels",
    "rloo": "RLOO",
    "more_prompts": "RM + PPO, more prompts",
    "length_only": "PPO on length alone",
}
REWARDS = {"gold_reward": "gold reward", "explicit_reward": "explicit reward", "implicit_reward": "implicit reward"}
# PPO is trained on the explicit reward and DPO on the implicit one, so these have the colour of that arm.
REWARD_COLOR = {"gold_reward": "@ink", "explicit_reward": "@rm_ppo", "implicit_reward": "@dpo"}


def arm_name(arm: str) -> str:
    """The name of a study's arm or control for readers.

    >>> arm_name("dpo"), arm_name("rloo"), arm_name("my_control")
    ('DPO', 'RLOO', 'my_control')
    """
    return (ARM_NAMES | CONTROL_NAMES).get(arm, arm)


def arm_of(policy: str) -> str:
    """The arm of a policy, as the page's colours name it: one of ``ARM_NAMES``, "best_of_n" or "other"."""
    head = policy.partition("@")[0]
    return "best_of_n" if head.startswith("best_of_") else head if head in ARM_NAMES else "other"


def color(policy: str) -> str:
    """The colour of a policy's lines.

    >>> color("dpo@6"), color("best_of_4_rm"), color("another")
    ('@dpo', '@best_of_n', '@muted')
    """
    arm = arm_of(policy)
    return "@muted" if arm == "other" else f"@{arm}"
