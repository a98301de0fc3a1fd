"""A stub of the W&B server on 127.0.0.1 that records what it receives."""

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
    """
    status: None: it works; a number: every response has this status; "silent": it never responds. operations: the
    GraphQL requests. runs: what was sent at the start of each run. history: by run, its lines by position. uses: runs
    and the artifacts they used, as `NAME:ALIAS`.
    """

    daemon_threads = True

    def __init__(self, status: int | str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.operations: list[str] = []
        self.runs: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.asked_artifacts: list[str] = []
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.uses: list[tuple[str, str]] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""

    def stop(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def respond(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        self.operations.append(operation)
        if operation == "RunResumeStatus":
            return self.resume_status(variables["name"])
        if operation == "UpsertBucket":
            self.history.setdefault(variables["name"], {})
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
            return self.membership(variables["name"])
        if operation == "UseArtifact":
            self.uses.append((variables["runName"], variables["artifactID"]))
            artifact = {"id": "a", "digest": "d", "description": None, "state": "COMMITTED"}
            return {"useArtifact": {"artifact": artifact | {"createdAt": "2026", "metadata": None}}}
        if operation == "CreateArtifact":
            self.artifacts.append(variables["input"])
            sequence = {"id": "s", "latestArtifact": None}
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}
        return {}

    def resume_status(self, run: str) -> dict[str, Any]:
        """The state of a run that a client resumes."""
        if run not in self.history:
            return {"model": None}
        lines = self.history[run]
        last = json.dumps([json.dumps(lines[max(lines)])] if lines else [])
        counts = {"logLineCount": 0, "historyLineCount": len(lines), "eventsLineCount": 0}
        shown: dict[str, Any] = {
            "displayName": run,
            "config": "{}",
            "tags": [],
            "notes": None,
            "wandbConfig": '{"t": 1}',
        }
        told = {"id": "b", "name": run, "summaryMetrics": "{}", "historyTail": last, "eventsTail": "[]"}
        project = {"id": "p", "name": "project", "entity": {"id": "e", "name": "entity"}}
        return {"model": project | {"bucket": told | counts | shown}}

    def membership(self, name: str) -> dict[str, Any]:
        """A logged artifact by NAME:ALIAS, which is also its id here."""
        collection, _, alias = name.partition(":")
        if not any(
            made["artifactCollectionName"] == collection and alias in {a["alias"] for a in made["aliases"]}
            for made in self.artifacts
        ):
            return {"project": {"artifactCollectionMembership": None}}
        project = {"id": "p", "internalId": "p", "name": "project", "entity": {"name": "entity"}}
        sequence = {"__typename": "ArtifactSequence", "name": collection, "project": project}
        nothing = dict.fromkeys(("description", "metadata", "historyStep", "commitHash", "updatedAt"))
        counts = {"ttlDurationSeconds": -2, "size": 1, "fileCount": 1, "versionIndex": 0}
        artifact = {"__typename": "Artifact", "id": name, "artifactSequence": sequence, "tags": [], "digest": "d"}
        kind = {"artifactType": {"name": "adapter"}, "ttlIsInherited": True, "state": "COMMITTED"}
        more = {"digestAlgorithm": "MANIFEST_MD5", "createdAt": "2026-01-01T00:00:00"}
        place = {"__typename": "ArtifactCollectionMembership", "id": "m", "versionIndex": 0, "aliases": []}
        found = {"artifactCollection": sequence, "artifact": artifact | nothing | counts | kind | more}
        return {"project": {"artifactCollectionMembership": place | {"createdAt": "2026"} | found}}

    def take_stream(self, run: str, files: dict[str, Any]) -> None:
        sent: dict[str, Any] = files.get("wandb-history.jsonl") or {"offset": 0, "content": []}
        for number, line in enumerate(sent["content"]):
            self.history.setdefault(run, {})[sent["offset"] + number] = json.loads(line)


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
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        if not self.path.endswith("/graphql"):
            if self.path.endswith("/file_stream"):
                self.server.take_stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
            self.reply(200, {})
            return
        request = json.loads(body)
        found = re.match(r"\s*(?:query|mutation)\s+(\w+)", request["query"])
        operation = found.group(1) if found else ""
        self.reply(200, {"data": self.server.respond(operation, request.get("variables") or {})})

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
