"""``python -m toolkit.stages REQUEST.json``: one stage in one of several processes, as the pipeline launches it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from toolkit.errors import DuelError
from toolkit.files import read_json, write_json
from toolkit.progress import Reporter
from toolkit.stages.contexts import from_json


def main(request: Path) -> int:
    import transformers

    from toolkit.engine.distributed import leave_group, main_process, world

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    asked = read_json(request)
    writes = main_process()
    # The request lies in RUN/.work/STAGE-KEY.
    metrics = request.parents[2] / "metrics.jsonl" if writes else None
    reporter = Reporter(quiet=not writes, metrics=metrics)
    reporter.overall = asked["stage"]
    reporter.trackers, reporter.run_name = tuple(asked["trackers"]), asked["run_name"]
    inputs = {name: Path(path) for name, path in asked["inputs"].items()}
    stage = importlib.import_module(f"toolkit.stages.{asked['stage']}")
    try:
        metrics = stage.run(from_json(asked["stage"], asked["context"]), inputs, request.parent, reporter)
    except DuelError as error:
        print(f"error: {error.render()}", file=sys.stderr)
        return 2
    if writes:
        write_json(request.parent / "answer.json", {**metrics, "processes": world()[1]})
    leave_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
