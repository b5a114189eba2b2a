"""As much of the hub's HTTP API as uploading and loading of repositories takes, on this machine, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standin"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    card: str = ""

    @property
    def sha(self) -> str:
        text = json.dumps({name: hashlib.sha1(body).hexdigest() for name, body in sorted(self.files.items())})
        return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Hub:
    """``repositories[kind, id]`` with kind models or datasets; ``calls`` are (method, path) as they came."""

    endpoint: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def standin() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, value: Any, status: int = 200) -> None:
            self.reply(status, json.dumps(value).encode(), Content_Type="application/json")

        def missing(self, code: str) -> None:
            self.reply(404, b"{}", X_Error_Code=code, X_Error_Message="not here")

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def handle_any(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.calls.append((self.command, path))
            sent = self.body() if self.command == "POST" else b""
            if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.json({"error": "who are you?"}, 401)
                return
            if path == "/api/repos/create":
                asked = json.loads(sent)
                kind = asked.get("type", "model") + "s"
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                hub.repositories.setdefault(
                    (kind, name), Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
                )
                prefix = "datasets/" if kind == "datasets" else ""
                self.json({"url": f"{hub.endpoint}/{prefix}{name}", "name": name})
                return
            if path == "/api/validate-yaml":
                self.json({"errors": [], "warnings": []})
                return
            parts = path.strip("/").split("/")
            if parts[0] == "api":
                self.api(parts[1], "/".join(parts[2:4]), parts[4:], sent)
                return
            kind = "datasets" if parts[0] == "datasets" else "models"
            parts = parts[1:] if kind == "datasets" else parts
            repository = hub.repositories.get((kind, "/".join(parts[:2])))
            if repository is None:
                self.missing("RepoNotFound")
            elif parts[2] == "resolve" and (body := repository.files.get("/".join(parts[4:]))) is not None:
                etag = f'"{hashlib.sha256(body).hexdigest()}"'
                headers = {"ETag": etag, "X_Repo_Commit": repository.sha, "Accept_Ranges": "bytes"}
                asked_range = self.headers.get("Range")
                if asked_range and self.command == "GET":
                    first, _, last = asked_range.removeprefix("bytes=").partition("-")
                    body, status = body[int(first) : int(last) + 1 if last else None], 206
                else:
                    status = 200
                self.reply(status, body, Content_Length=str(len(body)), **headers)
            else:
                self.missing("EntryNotFound")

        def api(self, kind: str, name: str, rest: list[str], sent: bytes) -> None:
            repository = hub.repositories.get((kind, name))
            if repository is None:
                self.missing("RepoNotFound")
                return
            files = [
                {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for path, body in sorted(repository.files.items())
            ]
            if not rest or rest[0] == "revision":
                siblings = [{"rfilename": file["path"]} for file in files]
                facts = {"id": name, "sha": repository.sha, "siblings": siblings, "private": repository.private}
                self.json({**facts, "tags": [], "downloads": 0, "likes": 0})
            elif rest[0] == "preupload":
                asked = json.loads(sent)["files"]
                self.json(
                    {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
                )
            elif rest[0] == "commit":
                for line in sent.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        repository.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                prefix = "datasets/" if kind == "datasets" else ""
                url = f"{hub.endpoint}/{prefix}{name}/commit/{repository.sha}"
                self.json({"commitUrl": url, "commitOid": repository.sha})
            elif rest[0] == "tree":
                folder = "/".join(rest[2:])
                found = [f for f in files if f["path"].startswith(folder)]
                self.json(found) if found else self.missing("EntryNotFound")
            elif rest[0] == "paths-info":
                wanted = json.loads(sent)["paths"]
                folders = {p for p in wanted if any(f["path"].startswith(f"{p}/") for f in files)}
                entries = [f for f in files if f["path"] in wanted]
                self.json(entries + [{"type": "directory", "path": p, "oid": "0" * 40} for p in sorted(folders)])
            else:
                self.missing("EntryNotFound")

        do_GET = do_POST = do_HEAD = handle_any

        def log_message(self, *args: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
