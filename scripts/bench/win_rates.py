"""Times the win rates of 58 AlpacaEval models, with length control (auxiliary table) and 2,000 draws an interval.

usage: DUEL_REAL_DATA=FOLDER taskset -c 0 python scripts/bench/win_rates.py [--models 58] [--draws 2000] [--ranking]

The models are the annotation files of ``FOLDER/alpaca_eval``, taken again under other names until there are enough.
What was measured is written to ``results/win_rates.json`` beside this file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from datetime import date
from pathlib import Path

import harness

from toolkit.evals.length_control import load_length_table
from toolkit.judging.win_rates import Controls, winrate_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=58)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--ranking", action="store_true", help="with Bradley-Terry strengths of all models")
    parser.add_argument("--day", default=date.today().isoformat())
    options = parser.parse_args()
    data = Path(os.environ["DUEL_REAL_DATA"]) / "alpaca_eval"
    sources = sorted((data / "annotations").glob("*.json"))
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for k in range(options.models):
            source = sources[k % len(sources)]
            name = source.stem if k < len(sources) else f"{source.stem} ({k // len(sources) + 1})"
            files.append(Path(shutil.copy(source, Path(folder) / f"{name}.json")))
        wall, cpu = time.perf_counter(), time.process_time()
        controls = Controls(length=True, table=load_length_table(data))
        found = winrate_report(files, controls=controls, n_resamples=options.draws, ranking=options.ranking)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert len(found["win_rates"]) == options.models
    assert all(row["lc_ci_low"] is not None and row["ci_low"] is not None for row in found["win_rates"])
    measured = {
        "command": "taskset -c 0 python scripts/bench/win_rates.py" + (" --ranking" if options.ranking else ""),
        "date": options.day,
        "cores": len(os.sched_getaffinity(0)),
        "models": options.models,
        "draws": options.draws,
        "ranking": options.ranking,
        "wall_s": round(wall, 2),
        "cpu_s": round(cpu, 2),
        "load_average": round(os.getloadavg()[0], 1),  # above 1 a core, the wall time is that of a shared machine
    }
    print(measured)
    harness.write(harness.RESULTS / ("win_rates_ranking.json" if options.ranking else "win_rates.json"), measured)


if __name__ == "__main__":
    main()
