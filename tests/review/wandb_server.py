"""A stand-in of the W&B server on 127.0.0.1: it takes runs and remembers what it was told."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """`status`: None answers; a number refuses everything with it; "silent" never answers.

    `runs` holds what was sent at each run's start, `operations` the name of each GraphQL request.
    """

    daemon_threads = True

    def __init__(self, status: int | str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.operations: list[str] = []
        self.runs: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.asked_artifacts: list[str] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no matter here."""

    def stop(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        self.operations.append(operation)
        if operation == "UpsertBucket":
            if variables.get("displayName"):
                self.runs.append(variables)
            project = {"id": "p", "name": "project", "entity": {"id": "e", "name": "entity"}}
            bucket = {"id": "b", "name": variables.get("name"), "config": variables.get("config")}
            more = {"displayName": None, "description": None, "sweepName": None, "historyLineCount": 0}
            return {"upsertBucket": {"bucket": bucket | more | {"project": project}, "inserted": True}}
        if operation == "Viewer":
            who = {"id": "v", "entity": "entity", "username": "user", "email": "user@example.org"}
            return {"viewer": who | {"flags": "{}", "teams": {"edges": []}}}
        if operation == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/files/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if operation == "ArtifactType":
            return {"project": {"artifact": None}}
        if operation == "ArtifactMembershipByName":
            self.asked_artifacts.append(variables["name"])
        if operation == "CreateArtifact":
            self.artifacts.append(variables["input"])
            sequence = {"id": "s", "latestArtifact": None}
            return {
                "createArtifact": {
                    "artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}
                }
            }
        return {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.server.status == "silent":
            self.server.closing.wait(60)
            return
        if isinstance(self.server.status, int):
            self.reply(self.server.status, {})
            return
        if not self.path.endswith("/graphql"):
            self.reply(200, {})
            return
        request = json.loads(
            gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        )
        found = re.match(r"\s*(?:query|mutation)\s+(\w+)", request["query"])
        operation = found.group(1) if found else ""
        self.reply(200, {"data": self.server.answer(operation, request.get("variables") or {})})

    do_GET = do_PUT = do_POST

    def reply(self, status: int, values: dict[str, Any]) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@contextmanager
def wandb_server(status: int | str | None = None) -> Iterator[WandbServer]:
    server = WandbServer(status)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.stop()
