"""A stub of the hub and loads from it; as a program, it prints the result of each load as JSON.

A separate program, since the hub's clients read their address on import. It answers the few
requests that `datasets` makes for a repository of data files: resolve, tree, paths-info and the repository's state.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

import pyarrow
import pyarrow.parquet

Files = dict[str, bytes]
_REVISION = r"(main|refs/convert/parquet|[0-9a-f]{40})"


def parquet(rows: int) -> bytes:
    content = io.BytesIO()
    records = [{"text": f"row {number}", "label": number % 2} for number in range(rows)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), content)
    return content.getvalue()


README = b"""---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train-*}
  - {split: near, path: small/near-*}
  - {split: far, path: small/far-*}
---
"""
REPOSITORIES: dict[str, dict[str, Files]] = {
    "org/plain": {
        "main": {
            "README.md": README,
            "small/train-00000-of-00001.parquet": parquet(10),
            "small/near-00000-of-00001.parquet": parquet(4),
            "small/far-00000-of-00001.parquet": parquet(5),
        }
    },
    "org/scripted": {
        "main": {"README.md": b"---\nlicense: mit\n---\n", "scripted.py": b"raise SystemExit"},
        "refs/convert/parquet": {"default/train/0000.parquet": parquet(20), "default/test/0000.parquet": parquet(3)},
    },
    "org/broken": {"main": {"README.md": b"---\nlicense: mit\n---\n", "train.parquet": b"no parquet"}},
}


class Hub(BaseHTTPRequestHandler):
    requests = 0

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        Hub.requests += 1
        path = unquote(self.path.split("?")[0])
        found = re.fullmatch(rf"/datasets/(org/\w+)/resolve/{_REVISION}/(.+)", path)
        if found:
            return self.resolve(*self.files(found[1], found[2]), found[3])
        found = re.fullmatch(rf"/api/datasets/(org/\w+)/(tree|paths-info)/{_REVISION}/?(.*)", path)
        if found:
            files, _ = self.files(found[1], found[3])
            wanted = self.paths(body) if found[2] == "paths-info" else None
            return self.give_json(self.listing(files, found[4], wanted))
        found = re.fullmatch(rf"/api/datasets/(org/\w+)(?:/revision/{_REVISION})?", path)
        files, commit = self.files(found[1], found[2] or "main") if found else ({}, "")
        if not files:
            return self.give(404, error="RepoNotFound")
        siblings = [{"rfilename": name} for name in files]
        return self.give_json({"id": found and found[1], "sha": commit, "private": False, "siblings": siblings})

    do_HEAD = do_POST = do_GET

    def files(self, name: str, revision: str) -> tuple[Files, str]:
        for branch, files in REPOSITORIES.get(name, {}).items():
            commit = hashlib.sha1(f"{name} {branch}".encode()).hexdigest()
            if revision in (branch, commit):
                return files, commit
        return {}, ""

    def resolve(self, files: Files, commit: str, name: str) -> None:
        if not files:
            return self.give(404, error="RepoNotFound")
        if name not in files:
            return self.give(404, error="EntryNotFound", commit=commit)
        return self.give(200, files[name], commit=commit, etag=hashlib.sha1(files[name]).hexdigest())

    def paths(self, body: bytes) -> list[str]:
        try:
            return json.loads(body)["paths"]
        except ValueError:
            return parse_qs(body.decode())["paths"]

    def listing(self, files: Files, folder: str, wanted: list[str] | None) -> list[dict[str, Any]]:
        folders = {name.rsplit("/", depth)[0] for name in files for depth in range(1, name.count("/") + 1)}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        for path, content in files.items():
            oid = hashlib.sha1(content).hexdigest()
            entries.append({"type": "file", "path": path, "oid": oid, "size": len(content)})
        if wanted is not None:
            return [entry for entry in entries if entry["path"] in wanted]
        inside = [entry for entry in entries if str(entry["path"]).startswith(f"{folder}/" if folder else "")]
        if "recursive=true" in self.path.lower():
            return inside
        return [entry for entry in inside if "/" not in str(entry["path"])[len(folder) :].strip("/")]

    def give_json(self, content: Any) -> None:
        self.give(200, json.dumps(content).encode(), kind="application/json")

    def give(
        self, code: int, body: bytes = b"", error: str = "", commit: str = "", etag: str = "", kind: str = "text/plain"
    ) -> None:
        self.send_response(code)
        headers = {"X-Error-Code": error, "X-Repo-Commit": commit, "ETag": f'"{etag}"' if etag else ""}
        for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def main(home: str) -> None:
    server = ThreadingHTTPServer(("localhost", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("HF_") or name.lower().endswith("_proxy")]:
        del os.environ[name]
    os.environ.update(HF_HOME=home, HF_ENDPOINT=f"http://localhost:{server.server_port}")

    from fusion.config.data import DataConfig
    from fusion.config.task import TaskConfig
    from fusion.data.rows import load_rows
    from fusion.errors import UserError
    from fusion.hub.access import hub_is_reachable
    from fusion.tasks.task import HubConfig

    def load(case: str, split: str, path: str, name: str | None = None, revision: str | None = None) -> None:
        splits = {"train": "train", "validation": ["near", "far"]}
        if path == "org/scripted":
            splits = {"train": "train[:80%]", "validation": "train[80%:]", "test": "test"}
        hub = HubConfig(path, name, revision, splits)
        task = TaskConfig(name="pets", text="text", labels=["cat", "dog"], metrics=["accuracy"], hub=hub)
        asked, started = Hub.requests, time.monotonic()
        result: dict[str, Any]
        try:
            rows = load_rows(task, DataConfig(), split)
            result = {"rows": [text for (text,) in rows.texts], "labels": rows.labels}
        except UserError as error:
            result = {"error": str(error)}
        results[case] = {**result, "requests": Hub.requests - asked, "seconds": time.monotonic() - started}

    results: dict[str, Any] = {}
    converted = "refs/convert/parquet"
    load("first", "train", "org/plain", "small")
    load("again", "train", "org/plain", "small")
    load("near", "near", "org/plain", "small")
    load("far", "far", "org/plain", "small")
    load("no configuration", "train", "org/plain", "large")
    load("no repository", "train", "org/nothing")
    load("script", "train", "org/scripted")
    load("broken", "train", "org/broken")
    load("converted train", "train", "org/scripted", None, converted)
    load("converted validation", "validation", "org/scripted", None, converted)
    server.shutdown()
    server.server_close()
    hub_is_reachable.cache_clear()
    load("offline", "train", "org/plain", "small")
    load("offline, converted", "test", "org/scripted", None, converted)
    load("offline, not cached", "train", "org/other")
    load("offline, other configuration", "train", "org/plain", "large")
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
