"""Names and colours of arms, policies and rewards.

A colour is written ``"@name"`` or ``"@name/alpha"`` and resolved in the browser against :data:`PALETTE`, so that one
figure serves light and dark.
"""

from __future__ import annotations

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
        "warn": "#e3b341",
        "mark": "#6b5510",
    },
}
ARM_NAMES = {"rm_ppo": "RM + PPO", "dpo": "DPO", "sft": "SFT", "base": "base"}
REWARDS = {"gold_reward": "gold reward", "explicit_reward": "explicit reward", "implicit_reward": "implicit reward"}
# PPO is trained on the explicit reward and DPO on the implicit one, so these have the colour of that arm.
REWARD_COLOR = {"gold_reward": "@ink", "explicit_reward": "@rm_ppo", "implicit_reward": "@dpo"}


def policy_name(policy: str) -> str:
    """The name of a policy for readers.

    >>> policy_name("rm_ppo"), policy_name("dpo@6"), policy_name("dpo@kl-2"), policy_name("best_of_4_rm")
    ('RM + PPO', 'DPO, step 6', 'DPO, milestone of 2 nats', 'best of 4 by RM')
    """
    head, _, step = policy.partition("@")
    if head.startswith("best_of_"):
        n, _, by = head.removeprefix("best_of_").partition("_")
        return f"best of {n} by {'RM' if by == 'rm' else by}"
    if step.startswith("kl-"):
        return f"{ARM_NAMES.get(head, head)}, milestone of {step.removeprefix('kl-')} nats"
    return ARM_NAMES.get(head, head) + (f", step {step}" if step else "")


def arm_of(policy: str) -> str:
    """The arm of a policy, as the page's colours name it: "rm_ppo", "dpo", "sft", "base", "best_of_n" or "other"."""
    head = policy.partition("@")[0]
    return "best_of_n" if head.startswith("best_of_") else head if head in ARM_NAMES else "other"


def color(policy: str) -> str:
    """The colour of a policy's lines.

    >>> color("dpo@6"), color("best_of_4_rm"), color("another")
    ('@dpo', '@best_of_n', '@muted')
    """
    arm = arm_of(policy)
    return "@muted" if arm == "other" else f"@{arm}"
