"""``duel watch``: the growing report of a run, served to the browser of this machine while the run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import HTTPServer
from pathlib import Path

from toolkit.errors import StoreError
from toolkit.files import fingerprint
from toolkit.progress import METRICS_FILE, PROGRESS_FILE, Reporter
from toolkit.report.page import build_live
from toolkit.report.render import plotly_script
from toolkit.report.server import LocalHandler, listening
from toolkit.runs.store import MANIFEST_FILE, RESULTS_FILE, RunFolder

WATCHED = (MANIFEST_FILE, METRICS_FILE, RESULTS_FILE, PROGRESS_FILE)


def version(folder: Path) -> str:
    """Changes whenever the page does: with its files, and when a process starts or ends work on the run."""
    stats = [(folder / name).stat() if (folder / name).is_file() else None for name in WATCHED]
    return fingerprint([RunFolder(folder).busy(), *([s.st_mtime_ns, s.st_size] if s else None for s in stats)])


@contextmanager
def serving(folder: Path, *, port: int, max_samples: int) -> Iterator[HTTPServer]:
    """A server of the page of ``folder`` on 127.0.0.1. Raises StoreError where there is no run or the port is taken."""
    build_live(folder, version="", max_samples=1)

    class Handler(LocalHandler):
        def do_GET(self) -> None:
            if not self.trusted():
                return
            if self.path == "/plotly.js":
                self.answer(HTTPStatus.OK, "text/javascript", plotly_script().encode(), keep=True)
            elif self.path == "/version":
                self.answer(HTTPStatus.OK, "text/plain", version(folder).encode())
            elif self.path == "/":
                now = version(folder)
                try:
                    page = build_live(folder, version=now, max_samples=max_samples)
                except StoreError as error:  # the folder was removed or damaged while it was watched
                    self.answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", error.render().encode())
                else:
                    self.answer(HTTPStatus.OK, "text/html", page.encode())
            else:
                self.answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is nothing here")

    with listening(Handler, port) as server:
        yield server


def watch(folder: Path, *, port: int, max_samples: int, reporter: Reporter) -> None:
    """Serve until Ctrl-C."""
    with serving(folder, port=port, max_samples=max_samples) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/", flush=True)
        reporter.line(f"watching {folder}; Ctrl-C ends the page and leaves the run alone")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            reporter.line("closing the page")
