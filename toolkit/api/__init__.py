"""duel from Python: a function for every command. Results are mappings that show themselves as tables."""

from toolkit.api.inputs import Data, Judge, Model
from toolkit.api.judging import compare, judge, label, simulate, winrate
from toolkit.api.results import Result
from toolkit.api.rewards import check, filter_rows, implicit_rewards, rm_card, score
from toolkit.api.running import (
    diff,
    env,
    list_runs,
    push,
    recipes,
    rerun,
    run,
    schema,
    study,
    sweep,
    validate,
    watch,
    write_report,
)

__all__ = [
    "Data",
    "Judge",
    "Model",
    "Result",
    "check",
    "compare",
    "diff",
    "env",
    "filter_rows",
    "implicit_rewards",
    "judge",
    "label",
    "list_runs",
    "push",
    "recipes",
    "rerun",
    "rm_card",
    "run",
    "schema",
    "score",
    "simulate",
    "study",
    "sweep",
    "validate",
    "watch",
    "winrate",
    "write_report",
]
