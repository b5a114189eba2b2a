"""A page for the browser of this machine alone: what all pages that duel serves have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from toolkit.errors import StoreError


class LocalHandler(BaseHTTPRequestHandler):
    """Answers only a browser that asked for this machine by name, so that no other page can ask through the browser."""

    timeout = 10  # browsers open connections in advance and leave them silent, and the server answers one at a time

    def answer(self, status: HTTPStatus, kind: str, body: bytes, *, keep: bool = False) -> None:
        """Send one whole reply. The browser stores it only with ``keep``."""
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "max-age=86400, immutable" if keep else "no-store")
        self.end_headers()
        self.wfile.write(body)

    def trusted(self) -> bool:
        """Whether the request may be answered. If not, a refusal has been sent."""
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if host in ("127.0.0.1", "localhost"):
            return True
        self.answer(HTTPStatus.FORBIDDEN, "text/plain", b"open this page as 127.0.0.1")
        return False

    def log_message(self, *args: Any) -> None:
        return None


@contextmanager
def listening(
    handler: type[LocalHandler], port: int, server_type: type[HTTPServer] = HTTPServer
) -> Iterator[HTTPServer]:
    """A server on 127.0.0.1 only. Port 0 takes a free port. Raises StoreError where the port is taken."""
    try:
        server = server_type(("127.0.0.1", port), handler)
    except OSError as error:
        raise StoreError(f"port {port} cannot be served: {error}", where="--port", fix="name another") from error
    try:
        yield server
    finally:
        server.server_close()
