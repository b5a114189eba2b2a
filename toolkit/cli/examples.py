"""Examples that ``--help`` of a command ends with. A test parses each."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "run": (
        "duel run smoke",
        "duel run quickstart --set data.source=pairs.jsonl --dry-run",
    ),
    "validate": ("duel validate my.yaml --set dpo.beta=0.2",),
    "sweep": ("duel sweep smoke --grid dpo.beta=0.1,0.5 --seeds 2",),
    "copy": ("duel recipes copy quickstart my.yaml",),
    "check": ("duel check pairs.jsonl --model smollm2-135m",),
    "rewards": (
        "duel rewards --policy runs/smoke/dpo/model --reference runs/smoke/sft/model --data reviews --out r.parquet",
    ),
    "score": ("duel score --rm runs/smoke/reward_model/model --data answers.jsonl --out scores.parquet",),
    "compare": ("duel compare runs/smoke/ppo/model runs/smoke/dpo/model --data reviews --judge gold --out compared",),
    "label": (
        "duel label --data answers.jsonl --judge llm:smollm2-135m --principles hhh --out pairs.jsonl.gz",
        "duel label --policy tiny --data prompts.txt --judge gold --out pairs.jsonl.gz",
    ),
    "simulate": ("duel simulate --data reviews --policy tiny --limit 50 --out simulated.jsonl.gz",),
    "judge": (
        "duel judge a.json b.json --judge llm:smollm2-135m --out judged.parquet",
        "duel judge runs/smoke --policy rm_ppo --baseline dpo --human --out votes.parquet",
    ),
    "winrate": ("duel winrate judged.parquet --length-control --human votes.parquet",),
    "filter": (
        "duel filter --rm runs/smoke/reward_model/model --data all.jsonl --calibrate c.jsonl --fpr 0.1 --out ok.jsonl",
    ),
    "rm-card": ("duel rm-card runs/smoke/reward_model/model --data reviews",),
    "study": ("duel study study-tiny --dry-run",),
    "report": ("duel report runs/smoke", "duel report runs/first runs/second --out both.html"),
    "watch": ("duel watch runs/smoke",),
    "diff": ("duel diff runs/first runs/second",),
    "rerun": ("duel rerun runs/smoke",),
    "push": ("duel push runs/smoke USER/NAME", "duel push runs/smoke --to merged"),
}
"""The examples of each command, by its name."""


def epilog(name: str | None) -> str | None:
    """The examples of a command as its help shows them: each on lines of its own, none wider than 79 columns."""
    examples = EXAMPLES.get(name or "", ())
    if not examples:
        return None
    heading = "Example:" if len(examples) == 1 else "Examples:"
    return "\n".join(["\b", heading, *(f"  {line}" for example in examples for line in _lines(example))])


def _lines(example: str) -> list[str]:
    """A command on as many lines as it needs, broken before an option, with backslashes as a shell takes them."""
    lines = [""]
    for words in example.replace(" --", "\n--").split("\n"):
        if lines[-1] and len(lines[-1]) + len(words) > 70:
            lines[-1] += " \\"
            lines.append(f"  {words}")
        else:
            lines[-1] += f" {words}" if lines[-1] else words
    return lines
