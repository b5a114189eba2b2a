"""All ratios against peers in one table, from the committed results, and which of them are older than the code.

usage: python scripts/bench/table.py [--json]

A result is older than the code that it measured if a module that computes has changed since: docstrings, comments and
formatting aside. Results without a record of their code go by the dates of commits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ratio:
    """How many times a peer's speed, or which share of its memory. ``low`` and ``high`` are those of single turns."""

    bench: str
    ratio: str
    value: float
    low: float | None
    high: float | None
    processor: str
    date: str
    older_than_code: bool


def ratios(results: Path = harness.RESULTS) -> Iterator[Ratio]:
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and "ratios" in record:
            yield from _ratios(path.stem, record)


def _ratios(name: str, record: Mapping[str, Any]) -> Iterator[Ratio]:
    machine = record["machine"]
    processor = machine if isinstance(machine, str) else machine["processor"]
    older = is_older(name, record)
    values: dict[str, Any] = dict(record["ratios"])
    for peer, share in record.get("memory_over_trl", {}).items():
        values[f"{peer}, of the peer's peak memory"] = share
    for ratio, value in values.items():
        turns = value if isinstance(value, list) else [value]
        low, high = (min(turns), max(turns)) if len(turns) > 1 else (None, None)
        yield Ratio(name, ratio, statistics.median(turns), low, high, processor, record["date"], older)


def is_older(name: str, record: Mapping[str, Any]) -> bool:
    """Whether the code that a bench measures has changed since its result was written.

    A result of another machine or precision is named after its bench: ``ppo_epyc``, ``reward_model_float32``.
    """
    bench = next(bench for bench in sorted(harness.MODULES, key=len, reverse=True) if name.startswith(bench))
    if "code" in record:
        return bool(record["code"] != harness.code_of(bench))
    files = [str(file.relative_to(ROOT)) for file in harness.files_of(bench)]
    log = ["git", "log", "-1", "--format=%cs", "--", *files]
    changed = subprocess.run(log, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return changed > record["date"]


def rendered(rows: list[Ratio]) -> str:
    lines = [f"{'bench':<22}{'ratio':<38}{'value':>7}  {'turns':<14}{'date':<12}processor"]
    for row in rows:
        turns = f"{row.low:.2f} to {row.high:.2f}" if row.low is not None else ""
        old = "  older than the code" if row.older_than_code else ""
        lines.append(f"{row.bench:<22}{row.ratio:<38}{row.value:>7.2f}  {turns:<14}{row.date:<12}{row.processor}{old}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    rows = list(ratios())
    print(json.dumps([asdict(row) for row in rows], indent=2) if parser.parse_args().json else rendered(rows))


if __name__ == "__main__":
    main()
