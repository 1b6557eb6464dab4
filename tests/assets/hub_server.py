"""A stand-in for the hub on localhost: the routes that huggingface_hub uses to list and download a repository."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REVISION = "0123456789abcdef0123456789abcdef01234567"


class HubServer(AbstractContextManager["HubServer"]):
    """Serves `files` of one `repo` at `REVISION`.

    `error` makes every answer that X-Error-Code; `break_after` closes each download after that many bytes, so often
    as `breaks` says; `delay` waits before each piece of 64 KiB; requests whose path has
    `silent` in it are taken and never answered.
    """

    def __init__(self, repo: str, files: dict[str, bytes], kind: str = "models") -> None:
        self.repo, self.files, self.kind = repo, files, kind
        self.error: tuple[int, str] | None = None
        self.break_after: int | None = None
        self.breaks = 0
        self.delay = 0.0
        self.silent: str | None = None
        self._closed = threading.Event()
        self.requests: list[tuple[str, str, str | None]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def downloads(self) -> list[str]:
        """The files that were asked for by GET, in order."""
        return [
            path.rpartition(f"{REVISION}/")[2]
            for verb, path, _ in self.requests
            if verb == "GET" and "/resolve/" in path
        ]


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(send_body=False)

        def do_GET(self) -> None:
            self.answer(send_body=True)

        def answer(self, send_body: bool) -> None:
            hub.requests.append((self.command, self.path, self.headers.get("Range")))
            if hub.silent and hub.silent in self.path:
                hub._closed.wait()
                self.close_connection = True
                return None
            path = self.path.partition("?")[0]
            prefix = "" if hub.kind == "models" else f"{hub.kind}/"
            if hub.error is not None:
                return self.refuse(*hub.error)
            if path == f"/api/{hub.kind}/{hub.repo}/tree/{REVISION}":
                tree: list[dict[str, Any]] = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in hub.files.items()
                ]
                return self.send(json.dumps(tree).encode(), {"Content-Type": "application/json"}, send_body)
            resolved = re.fullmatch(f"/{prefix}{hub.repo}/resolve/{REVISION}/(.+)", path)
            if resolved is None:
                return self.refuse(404, "RevisionNotFound" if hub.repo in path else "RepoNotFound")
            if resolved.group(1) not in hub.files:
                return self.refuse(404, "EntryNotFound")
            data = hub.files[resolved.group(1)]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.send(data, {"ETag": etag, "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}, send_body)

        def send(self, data: bytes, headers: dict[str, str], send_body: bool) -> None:
            found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            start = int(found.group(1)) if found else 0
            self.send_response(206 if found else 200)
            if found:
                headers = {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            for name, value in {**headers, "Content-Length": str(len(data) - start)}.items():
                self.send_header(name, value)
            self.end_headers()
            if not send_body:
                return
            body = data[start:]
            if hub.break_after is not None and hub.breaks > 0 and "/resolve/" in self.path:
                hub.breaks -= 1
                body = body[: hub.break_after]
                self.close_connection = True
            for begin in range(0, len(body), 1 << 16):
                hub._closed.wait(hub.delay)  # Tests take the client its sleep.
                self.wfile.write(body[begin : begin + (1 << 16)])

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return Handler
