"""A hub on this machine: as much of the Hugging Face API as pushing and fetching need, kept in memory.

Creating a repository, asking how files go up, LFS batches and uploads, commits as NDJSON, and downloads by revision.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.seen: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: Any = b"", **headers: str) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.server.token}":
            return True
        self._send(401, {"error": "Invalid username or password."}, X_Error_Message="Invalid username or password.")
        return False

    def do_POST(self) -> None:
        body = self._body()
        self.server.seen.append(self.path)
        if not self._allowed():
            return
        asked = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit|branch)/([\w.%-]+)", self.path)
        if self.path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            errors = [] if isinstance(head, dict) else [{"message": "no metadata"}]
            self._send(400 if errors else 200, {"errors": errors, "warnings": []})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif asked and asked[2] == "preupload":
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            chosen = [{"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")]} for f in files]
            self._send(200, {"files": [{**f, "shouldIgnore": False, "oid": None} for f in chosen]})
        elif asked and asked[2] == "commit":
            self._commit(self.server.repos[asked[1]], asked[1], asked[3], body.decode())
        elif asked and asked[2] == "branch":
            repo = self.server.repos[asked[1]]
            repo.branches[asked[3]] = repo.branches["main"]
            self._send(200, {})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        else:
            self._send(404, {"error": self.path})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        status = 409 if name in self.server.repos else 200
        first = hashlib.sha1(name.encode()).hexdigest()
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        new = Repo(private=private, commits={first: {}}, branches={"main": first})
        self.server.repos.setdefault(name, new)
        self._send(status, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}", "header": {}}}}
            for each in asked["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo: Repo, name: str, branch: str, body: str) -> None:
        files = dict(repo.commits[repo.branches[branch]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        commit = hashlib.sha1(body.encode()).hexdigest()
        repo.commits[commit] = files
        repo.branches[branch] = commit
        url = f"{self.server.url}/{name}/commit/{commit}"
        self._send(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def do_PUT(self) -> None:
        body = self._body()
        self.server.seen.append(self.path)
        if hashlib.sha256(body).hexdigest() != self.path.rpartition("/")[2]:
            self._send(400)
            return
        self.server.objects[self.path.rpartition("/")[2]] = body
        self._send(200)

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.%-]+)/([^?]+)", self.path)
        repo = self.server.repos.get(found[1]) if found else None
        if found is None or repo is None:
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        if repo.private and not self._allowed():
            return
        at = repo.at(found[2])
        if at is None:
            self._send(404, {"error": "Invalid rev"}, X_Error_Code="RevisionNotFound")
        elif found[3] not in at[1]:
            self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=at[0])
        else:
            raw = at[1][found[3]]
            self._send(200, raw, X_Repo_Commit=at[0], ETag=f'"{hashlib.sha256(raw).hexdigest()}"')

    do_HEAD = do_GET


@contextmanager
def running(token: str = "hf_" + "x" * 34) -> Iterator[Hub]:
    hub = Hub(token)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
