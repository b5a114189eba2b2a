"""A page for the browser of this machine alone: what all pages that duel serves have in common.

An address has a token that each start draws anew. Without it nothing is answered: another user of this machine, or a
page that guesses the port, does not know it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from toolkit.errors import StoreError

# Bytes of the largest request that a page of ours sends.
LARGEST_REQUEST = 64 * 2**10


class LocalServer(ThreadingHTTPServer):
    """A server on 127.0.0.1 with a thread for each connection, so that a silent one blocks no other."""

    daemon_threads = True

    def __init__(self, port: int, handler: type[LocalHandler]) -> None:
        self.token = secrets.token_urlsafe(16)
        super().__init__(("127.0.0.1", port), handler)

    @property
    def address(self) -> str:
        """The page's address, with the token."""
        return f"http://127.0.0.1:{self.server_address[1]}/{self.token}/"

    def handle_error(self, *args: Any) -> None:
        """A client that went away is no news."""


class LocalHandler(BaseHTTPRequestHandler):
    """Answers a browser that knows the token and asked for this machine by name, so that no other page can ask through
    the browser. ``scripts`` are the inline scripts that the page may run.
    """

    server: LocalServer
    timeout = 10  # browsers open connections in advance and leave them silent
    scripts: Sequence[str] = ()

    @property
    def route(self) -> str:
        """What is asked for, behind the token: ``/`` is the page."""
        return self.path.removeprefix(f"/{self.server.token}")

    def answer(self, status: HTTPStatus, kind: str, body: bytes, *, keep: bool = False) -> None:
        """Send one whole reply. The browser stores it only with ``keep``."""
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "max-age=86400, immutable" if keep else "no-store")
        self.send_header("Content-Security-Policy", content_policy(self.scripts))
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def trusted(self) -> bool:
        """Whether the request may be answered. If not, a refusal has been sent."""
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost"):
            self.answer(HTTPStatus.FORBIDDEN, "text/plain", b"open this page as 127.0.0.1")
            return False
        token = self.path.partition("?")[0].split("/")[1:2]
        if not hmac.compare_digest("".join(token).encode("utf-8", "replace"), self.server.token.encode()):
            self.answer(HTTPStatus.FORBIDDEN, "text/plain", b"open the whole address that the command printed")
            return False
        return True

    def body(self) -> bytes:
        """What a request sent. Raises ValueError where it is more than any page of ours sends."""
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 <= length <= LARGEST_REQUEST:
            raise ValueError(f"{length} bytes are no request of this page")
        return self.rfile.read(length)

    def log_message(self, *args: Any) -> None:
        return None


def content_policy(scripts: Sequence[str]) -> str:
    """The policy of a page that runs these inline scripts and files of its server, and reaches nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(["'self'", *(f"'sha256-{digest}'" for digest in hashes)])
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data: blob:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )


@contextmanager
def listening(handler: type[LocalHandler], port: int) -> Iterator[LocalServer]:
    """A server on 127.0.0.1 only. Port 0 takes a free port. Raises StoreError where the port is taken."""
    try:
        server = LocalServer(port, handler)
    except OSError as error:
        raise StoreError(f"port {port} cannot be served: {error}", where="--port", fix="name another") from error
    try:
        yield server
    finally:
        server.server_close()
