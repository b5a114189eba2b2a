"""``python -m toolkit.stages REQUEST.json``: one stage in one of several processes, as the pipeline launches it."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from toolkit.engine.facts import PEAK_FILE, compute, peak_memory
from toolkit.errors import DuelError, RecipeError
from toolkit.files import read_json, write_json
from toolkit.models.remote_code import remote_code
from toolkit.models.sharding import Sharding, sharded_training
from toolkit.progress import Reporter, RunLog, Trackers, show_notes
from toolkit.recipe.rounds import kind_of
from toolkit.runs.store import RunFolder
from toolkit.stages.contexts import from_json


def main(file: Path) -> int:
    """Run the stage of a request, and leave its metrics beside it. Returns the exit code."""
    import transformers

    from toolkit.engine.distributed import end_with_launcher

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    end_with_launcher()
    run_folder = file.parents[2]  # the file lies in RUN/.work/STAGE-KEY
    with RunFolder(run_folder).as_worker():
        return run_stage(file, run_folder)


def run_stage(file: Path, run_folder: Path) -> int:
    """What :func:`main` does in the run folder."""
    from toolkit.engine.distributed import join_group, launched_processes, leave_group, main_process, world

    request = read_json(file)
    writes = main_process()
    trackers = Trackers(tuple(request["trackers"]["names"]), request["trackers"]["run_name"], run_folder)
    inputs = {name: Path(path) for name, path in request["inputs"].items()}
    stage = importlib.import_module(f"toolkit.stages.{kind_of(request['stage'])}")
    context = from_json(request["stage"], request["context"])
    log = RunLog(run_folder) if writes else None
    try:
        with Reporter(quiet=not writes).in_stage(request["stage"], log=log, trackers=trackers) as reporter:
            show_notes(reporter)
            check_processes(launched_processes(), request["processes"])
            join_group()
            processes = world()[1]
            sharding = Sharding(**request["sharding"]) if request["sharding"] is not None else None
            with peak_memory() as peak, remote_code(request["trust_remote_code"]), sharded_training(sharding):
                metrics = stage.run(context, inputs, file.parent, reporter)
    except DuelError as error:
        print(f"error: {error.render()}", file=sys.stderr)
        return 2
    if file.is_file():  # the stage goes on; the command that launched the processes reads these files
        write_json(file.parent / PEAK_FILE.format(os.environ.get("RANK", "0")), {"peak_gib": peak.gib})
    if writes:
        write_json(file.parent / "answer.json", {**metrics, "processes": processes, "compute": compute()})
    leave_group()
    return 0


def check_processes(started: int, planned: int) -> None:
    """Raises RecipeError where accelerate started another number of processes than the stage's key says."""
    if started != planned:
        raise RecipeError(
            f"accelerate launch started {started} processes, and the stage's key is that of {planned}",
            where="the arguments after --",
            fix=f"say how many you want, for instance --num_processes {started}",
        )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
