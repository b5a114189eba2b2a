"""``duel watch``: the growing report of a run or a study, served to the browser of this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

from toolkit.errors import StoreError
from toolkit.files import fingerprint
from toolkit.progress import METRICS_FILE, PROGRESS_FILE, Reporter
from toolkit.report.page import build_live
from toolkit.report.render import inline_scripts, plotly_script
from toolkit.report.server import LocalHandler, LocalServer, listening
from toolkit.report.study_page import is_study
from toolkit.report.study_progress import TRIALS_FOLDER, is_begun
from toolkit.report.study_watch import build_live_study
from toolkit.runs.store import (
    FAILURE_FILE,
    MANIFEST_FILE,
    RESULTS_FILE,
    SCORES_FOLDER,
    STUDY_FILE,
    TRIALS_FILE,
    RunFolder,
)

WATCHED = (MANIFEST_FILE, METRICS_FILE, RESULTS_FILE, PROGRESS_FILE)
WATCHED_OF_STUDY = (STUDY_FILE, TRIALS_FILE, PROGRESS_FILE)
WATCHED_OF_TRIAL = (MANIFEST_FILE, METRICS_FILE, PROGRESS_FILE, FAILURE_FILE, SCORES_FOLDER)


def version(folder: Path) -> str:
    """Changes whenever the page does: with its files, and when a process starts or ends work on the run."""
    paths = [folder / name for name in (*WATCHED, *WATCHED_OF_STUDY)]
    trials = sorted((folder / TRIALS_FOLDER).glob("*"))
    paths += [trial / name for trial in trials for name in WATCHED_OF_TRIAL]
    stats = [path.stat() if path.exists() else None for path in paths]
    busy = [RunFolder(each).busy() for each in (folder, *trials)]
    return fingerprint([busy, *([s.st_mtime_ns, s.st_size] if s else None for s in stats)])


def build_page(folder: Path, *, version: str, max_samples: int | None) -> str:
    """The page of a run or a study. Raises StoreError where the folder has neither."""
    if is_begun(folder) or is_study(folder):
        return build_live_study(folder, version=version)
    return build_live(folder, version=version, max_samples=max_samples)


@contextmanager
def serving(folder: Path, *, port: int, max_samples: int | None) -> Iterator[LocalServer]:
    """A server of the page of ``folder`` on 127.0.0.1. Raises StoreError where there is no run or the port is taken."""
    build_page(folder, version="", max_samples=1)

    one_at_a_time = threading.Lock()

    class Handler(LocalHandler):
        scripts = inline_scripts()

        def do_GET(self) -> None:
            if not self.trusted():
                return
            if self.route == "/plotly.js":
                self.answer(HTTPStatus.OK, "text/javascript", plotly_script().encode(), keep=True)
            elif self.route == "/version":
                self.answer(HTTPStatus.OK, "text/plain", version(folder).encode())
            elif self.route == "/":
                try:
                    with one_at_a_time:
                        page = build_page(folder, version=version(folder), max_samples=max_samples)
                except StoreError as error:  # the folder was removed or damaged while it was watched
                    self.answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", error.render().encode())
                else:
                    self.answer(HTTPStatus.OK, "text/html", page.encode())
            else:
                self.answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is nothing here")

    with listening(Handler, port) as server:
        yield server


def watch(folder: Path, *, port: int, max_samples: int | None, reporter: Reporter) -> None:
    """Serve until Ctrl-C."""
    with serving(folder, port=port, max_samples=max_samples) as server:
        print(server.address, flush=True)
        reporter.line(f"watching {folder}; Ctrl-C ends the page and leaves the run alone")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            reporter.line("closing the page")
