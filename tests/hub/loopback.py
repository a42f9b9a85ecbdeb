# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A Hub on the loopback interface: as much of its HTTP interface as pushing and downloading need, in memory."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


TOKEN = "hf_loopback"
USER = "me"


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files of every commit
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(f"{len(self.commits)}".encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        self.commits[digest.hexdigest()] = files
        self.branches[branch] = digest.hexdigest()
        return digest.hexdigest()

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


class LoopbackHub:
    """Starts on a free port. `cuts` downloads are still to be cut off half-way."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.cuts = 0
        self.requests: list[tuple[str, str]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status=200, content=None, headers=None, body=None):
        body = json.dumps(content).encode() if body is None else body
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(body),
            **(headers or {}),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status, code):
        self.reply(status, {"error": code}, {"X-Error-Code": code})

    @property
    def signed_in(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo_of(self, name):
        """The repo, or nothing after an answer that does not tell a private repo from none."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.signed_in):
            self.fail(404 if self.signed_in else 401, "RepoNotFound")
            return None
        return repo

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(("POST", self.path))
        if self.path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/loopback/cuts/(\d+)", self.path):  # a client that asks for trouble
            self.hub.cuts = int(match[1])
            return self.reply(200, {})
        if not self.signed_in:
            return self.reply(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked.get('organization') or USER}/{asked['name']}"
            url = f"{self.hub.url}/{name}"
            if name in self.hub.repos:
                return self.reply(409, {"error": "You already created this model repo", "url": url})
            self.hub.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
            self.hub.repos[name].commit("main", {".gitattributes": b""})
            return self.reply(200, {"url": url, "name": name})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/(.+)", self.path):
            repo = self.repo_of(match[1])
            if repo is None:
                return None
            if match[2] == "preupload":
                files = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(content)["files"]]
                return self.reply(200, {"files": [{**each, "shouldIgnore": False, "oid": None} for each in files]})
            files = dict(repo.files(match[3])[1])
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    files.pop(line["value"]["path"], None)
            sha = repo.commit(match[3], files)
            url = f"{self.hub.url}/{match[1]}/commit/{sha}"
            return self.reply(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})
        return self.fail(404, "EntryNotFound")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path))
        if path == "/api/whoami-v2":
            if not self.signed_in:
                return self.reply(401, {"error": "Invalid username or password."})
            return self.reply(200, {"type": "user", "name": USER, "auth": {"accessToken": {"role": "write"}}})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path):
            repo = self.repo_of(match[1])
            if repo is None:
                return None
            found = repo.files(match[3] or "main")
            if found is None:
                return self.fail(404, "RevisionNotFound")
            sha, files = found
            if match[2] == "tree":
                folder = f"{match[4]}/" if match[4] else ""
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                    if name.startswith(folder)
                ]
                return self.reply(200, entries)
            siblings = [{"rfilename": name} for name in files]
            return self.reply(
                200, {"id": match[1], "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}
            )
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo = self.repo_of(match[1])
            if repo is None:
                return None
            found = repo.files(match[2])
            if found is None:
                return self.fail(404, "RevisionNotFound")
            sha, files = found
            if match[3] not in files:
                return self.reply(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return self.send_file(sha, files[match[3]])
        return self.fail(404, "EntryNotFound")

    def send_file(self, sha, data):
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        status = 200
        if start:
            status, total = 206, len(data)
            headers["Content-Range"] = f"bytes {start[1]}-{total - 1}/{total}"
            data = data[int(start[1]) :]
        if self.command == "GET" and self.hub.cuts and len(data) > 10_000:
            self.hub.cuts -= 1
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(data)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        return self.reply(status, headers={**headers, "Content-Type": "application/octet-stream"}, body=data)
