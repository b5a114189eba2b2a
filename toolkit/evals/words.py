"""Counts and the names of policies, as sentences have them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

ARM_NAMES = {"rm_ppo": "RM + PPO", "dpo": "DPO", "rft": "rejection sampling", "sft": "SFT", "base": "base"}


def lines_of(text: str, width: int, further: str = "") -> list[str]:
    """Text as lines of a width, at least one; ``further`` stands before all but the first.

    Words stay whole, and so does the name of an arm.

    >>> lines_of("4 wins of RM + PPO", 14)
    ['4 wins of', 'RM + PPO']
    """
    name = ARM_NAMES["rm_ppo"]
    unbroken = name.replace(" ", "\N{NO-BREAK SPACE}")
    lines = textwrap.wrap(
        text.replace(name, unbroken), width, subsequent_indent=further, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(unbroken, name) for line in lines] or [""]


def policy_name(policy: str) -> str:
    """The name of a policy for readers.

    >>> policy_name("rm_ppo"), policy_name("dpo@6"), policy_name("dpo@kl-2"), policy_name("best_of_4_rm")
    ('RM + PPO', 'DPO, step 6', 'DPO, milestone of 2 nats', 'best of 4 by RM')
    >>> policy_name("dpo@round-1")
    'DPO, round 1'
    """
    head, _, step = policy.partition("@")
    if head.startswith("best_of_"):
        n, _, by = head.removeprefix("best_of_").partition("_")
        return f"best of {n} by {'RM' if by == 'rm' else by}"
    if step.startswith("round-"):
        return f"{ARM_NAMES.get(head, head)}, round {step.removeprefix('round-')}"
    if step.startswith("kl-"):
        return f"{ARM_NAMES.get(head, head)}, milestone of {step.removeprefix('kl-')} nats"
    return ARM_NAMES.get(head, head) + (f", step {step}" if step else "")


def on_fewer_prompts(policies: Sequence[Mapping[str, Any]]) -> str:
    """Which of the policies in ``results.json`` were sampled on fewer prompts than others; empty for none.

    >>> rows = [("base", "base", 50), ("sft", "sft", 200), ("dpo@6", "checkpoint", 50), ("dpo", "final", 200)]
    >>> on_fewer_prompts([{"policy": name, "kind": kind, "n_prompts": n} for name, kind, n in rows])
    'base and checkpoints on 50 of 200'
    """
    most = max((row["n_prompts"] for row in policies), default=0)
    fewer = {row["kind"]: row["n_prompts"] for row in policies if row["n_prompts"] < most}
    names = [word for kind, word in (("base", "base"), ("checkpoint", "checkpoints")) if kind in fewer]
    return f"{' and '.join(names)} on {max(fewer.values()):,} of {most:,}" if names else ""


def counted(n: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "judgement"), counted(1200, "judgement")
    ('1 judgement', '1,200 judgements')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
