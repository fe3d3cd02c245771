"""A hub on localhost, in memory: as much of its HTTP interface as huggingface_hub asks for to push and to pull.

Tensor files go the way of large files (LFS) and come from another address, as from a content delivery network; other
files are part of the commit. Tests may make it refuse, break off or lose files, and see what was asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]
WRITERS = {"hf_user": "user", "hf_guest": "guest"}  # users by token
READERS = {"hf_reader": "user"}


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Files, ref: str, message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> str | None:
        """The commit of a branch or of a commit's own name."""
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What goes wrong with requests that match: a status, or a body that ends after so many bytes."""

    method: str
    path: str
    status: int | None = None
    cut_after: int | None = None
    times: int = 1
    code: str | None = None


@dataclass
class StandInHub:
    endpoint: str = ""
    elsewhere: str = ""  # another name of the same address, as if it were another machine
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: Files = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def files(self, repo_id: str, revision: str = "main") -> Files:
        """The files of a repository, which a test may change."""
        repository = self.repositories[repo_id]
        return repository.commits[repository.refs.get(revision, revision)]

    def downloads(self) -> list[str]:
        """The names of the files that were downloaded, in order."""
        names = {hashlib.sha256(x).hexdigest(): name for r in self.repositories.values()
                 for files in r.commits.values() for name, x in files.items()}  # fmt: skip
        found = [path for method, path in self.asked if method == "GET" and ("/resolve/" in path or "/cdn/" in path)]
        return [names.get(path.rpartition("/")[2], path.rpartition("/")[2]) for path in found]

    def fail(self, method: str, path: str, **how: Any) -> None:
        """Let requests whose path matches fail; see `Fault`."""
        self.faults.append(Fault(method, path, **how))

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None


@contextmanager
def running() -> Iterator[StandInHub]:
    hub = StandInHub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint, hub.elsewhere = (f"http://{host}:{server.server_address[1]}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", url: str = "") -> None:
        self.status, self.code, self.answer = status, code, {"error": message, "url": url}


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        self.body = self._read_body()
        self.hub.asked.append((method, path))
        self.fault = self.hub.fault(method, path)
        try:
            if self.fault is not None and self.fault.status is not None:
                raise _RefusedError(self.fault.status, self.fault.code or "", "as the test wants it")
            for pattern, methods, answer in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method in methods:
                    answer(self, **found.groupdict())
                    return
            raise _RefusedError(404, message=f"the stand-in knows no {method} {path}")
        except _RefusedError as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            self._send(refused.status, json.dumps(refused.answer).encode(), **headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = None if self.fault is None else self.fault.cut_after
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), Content_Type="application/json")

    # Who may do what

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _repository(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        user = (WRITERS | READERS).get(self._token)
        if repository is None or (repository.private and user != repo_id.partition("/")[0]):
            raise _RefusedError(404 if user else 401, "RepoNotFound", "Repository not found")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        sha = repository.at(revision)
        if sha is None:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def _writer(self, repo_id: str) -> None:
        if self._token not in WRITERS | READERS:
            raise _RefusedError(401, message="Invalid username or password.")
        if WRITERS.get(self._token) != repo_id.partition("/")[0]:
            raise _RefusedError(403, message="Forbidden")

    # Pushing

    def create(self) -> None:
        asked = json.loads(self.body)
        user = WRITERS.get(self._token, "nobody")
        repo_id = f"{asked.get('organization') or user}/{asked['name']}"
        self._writer(repo_id)
        if repo_id in self.hub.repositories:
            there = f"{self.hub.endpoint}/{repo_id}"
            raise _RefusedError(409, message="You already created this model repo", url=there)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repositories[repo_id] = Repository(private)
        self.hub.repositories[repo_id].commit({".gitattributes": b"*.safetensors lfs"}, "main", "initial commit")
        self._json({"url": f"{self.hub.endpoint}/{repo_id}"})

    def branch(self, repo_id: str, revision: str) -> None:
        self._writer(repo_id)
        repository = self._repository(repo_id)
        if revision in repository.refs:
            raise _RefusedError(409, message="Reference already exists")
        repository.refs[revision] = repository.refs["main"]
        self._json({})

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        repository = self._repository(repo_id)
        files = repository.commits[self._commit_of(repository, revision)]
        if "create_pr" not in self.query:
            self._writer(repo_id)
        described = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": _oid(each["path"], files[each["path"]]) if each["path"] in files else None,
            }
            for each in json.loads(self.body)["files"]
        ]
        self._json({"files": described})

    def lfs_batch(self, repo_id: str) -> None:
        objects = []
        for each in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}
            objects.append(each if each["oid"] in self.hub.large else each | {"actions": {"upload": upload}})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _RefusedError(400, message="the content is not that of its name")
        self.hub.large[oid] = self.body
        self._send(200, b"")

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self._repository(repo_id)
        create_pr = "create_pr" in self.query
        if not create_pr:
            self._writer(repo_id)
        files = dict(repository.commits[self._commit_of(repository, revision)])
        message = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files, "refs/pr/1" if create_pr else revision, message)
        url = f"{self.hub.endpoint}/{repo_id}"
        answer = {"commitUrl": f"{url}/commit/{sha}", "commitOid": sha}
        self._json(answer | ({"pullRequestUrl": f"{url}/discussions/1"} if create_pr else {}))

    # Pulling

    def info(self, repo_id: str, revision: str | None = None) -> None:
        repository = self._repository(repo_id)
        sha = self._commit_of(repository, revision or "main")
        siblings = [{"rfilename": name} for name in repository.commits[sha]]
        self._json({"id": repo_id, "modelId": repo_id, "sha": sha, "private": repository.private, "siblings": siblings})

    def tree(self, repo_id: str, revision: str) -> None:
        repository = self._repository(repo_id)
        files = repository.commits[self._commit_of(repository, revision)]
        self._json([_described(name, content) for name, content in files.items()])

    def paths_info(self, repo_id: str, revision: str) -> None:
        repository = self._repository(repo_id)
        files = repository.commits[self._commit_of(repository, revision)]
        asked = parse_qs(self.body.decode())["paths"]
        self._json([_described(name, files[name]) for name in asked if name in files])

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        repository = self._repository(repo_id)
        sha = self._commit_of(repository, revision)
        files = repository.commits[sha]
        if name not in files:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        content, oid = files[name], _oid(name, files[name])
        headers = {"X_Repo_Commit": sha, "ETag": f'"{oid}"'}
        if not name.endswith(".safetensors"):
            self._send(200, content, **headers)
            return
        self.hub.large[oid] = content
        more = {"X_Linked_ETag": f'"{oid}"', "X_Linked_Size": str(len(content))}
        self._send(302, b"", Location=f"{self.hub.elsewhere}/cdn/{oid}", **headers, **more)

    def from_cdn(self, oid: str) -> None:
        content, first = self.hub.large[oid], self.headers.get("Range")
        if first is None:
            self._send(200, content, ETag=f'"{oid}"')
            return
        start = int(re.findall(r"bytes=(\d+)-", first)[0])
        whole = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206, content[start:], Content_Range=whole)


def _oid(name: str, content: bytes) -> str:
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _described(name: str, content: bytes) -> dict[str, Any]:
    described: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _oid(name, content)}
    if name.endswith(".safetensors"):
        described["lfs"] = {"oid": _oid(name, content), "size": len(content), "pointerSize": 130}
    return described


_REPO, _REVISION = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>.+)"
_ROUTES: list[tuple[str, set[str], Callable[..., None]]] = [
    (r"/api/repos/create", {"POST"}, _Handler.create),
    (r"/api/validate-yaml", {"POST"}, _Handler.validate_yaml),
    (rf"/api/models/{_REPO}/branch/{_REVISION}", {"POST"}, _Handler.branch),
    (rf"/api/models/{_REPO}/preupload/{_REVISION}", {"POST"}, _Handler.preupload),
    (rf"/api/models/{_REPO}/commit/{_REVISION}", {"POST"}, _Handler.commit),
    (rf"/api/models/{_REPO}/paths-info/{_REVISION}", {"POST"}, _Handler.paths_info),
    (rf"/api/models/{_REPO}/tree/{_REVISION}", {"GET"}, _Handler.tree),
    (rf"/api/models/{_REPO}/revision/{_REVISION}", {"GET"}, _Handler.info),
    (rf"/api/models/{_REPO}", {"GET"}, _Handler.info),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", {"POST"}, _Handler.lfs_batch),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", {"PUT"}, _Handler.lfs_upload),
    (r"/cdn/(?P<oid>[0-9a-f]{64})", {"GET", "HEAD"}, _Handler.from_cdn),
    (rf"/{_REPO}/resolve/{_REVISION}/(?P<name>[^/]+)", {"GET", "HEAD"}, _Handler.resolve),
]
