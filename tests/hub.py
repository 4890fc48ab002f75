"""A Hugging Face Hub on the loopback interface, in memory: enough of it for the real client to work against."""

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
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, file_download

try:
    from huggingface_hub import close_session
except ImportError:  # huggingface_hub before 1.0
    from huggingface_hub.utils import reset_sessions as close_session

__all__ = ["Hub", "close_session"]


@dataclass
class Repository:
    """A model repository: commits by hash, and branches and tags by name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Add files on top of a branch; returns the commit hash."""
        tree = {**self.commits.get(self.refs.get(ref, ""), {}), **files}
        listing = json.dumps(
            [len(self.commits), sorted((n, hashlib.sha1(c).hexdigest()) for n, c in tree.items())]
        )
        commit = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[commit] = tree
        self.refs[ref] = commit
        return commit


class Hub:
    """The server's state. `requests` lists what was asked for, as "METHOD /path"."""

    def __init__(self, token: str = "hf_secret"):
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.requests: list[str] = []
        self.failure: tuple[int, str] | None = None  # status and message with which everything is answered
        self.answer: Callable[[_Handler], object] | None = (
            None  # answers everything; None from it: go on as usual
        )
        self.delivery: Callable[[bytes], bytes] = bytes  # what is sent of a file for GET, whatever HEAD said
        self.breaks: list[
            int
        ] = []  # bytes of files after which the connection breaks off, one for each answer
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())

    def stop(self) -> None:
        """From now on connections are refused. May be called twice."""
        self._server.shutdown()
        self._server.server_close()

    def lead_here(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        """Make the client of this process use this Hub and an empty cache, without waiting between tries."""
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        # The client reads its environment when it is first imported, which may be long ago.
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # Before 1.0 the module that uses it has a copy.
        patch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        patch.setattr("time.sleep", lambda _: None)
        close_session()

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        try:
            yield self
        finally:
            self.stop()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _handle(self):
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append(f"{self.command} {path}")
        if self.state.answer and self.state.answer(self):
            return None
        if self.state.failure:
            status, message = self.state.failure
            return self.send(status, {}, {"X-Error-Message": message})
        for method, pattern, respond in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return respond(self, body, **match.groupdict())
        return self.send(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, status: int, content: dict | bytes, headers: dict[str, str] | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.state.token}"

    def _resolve(self, _, repo: str, revision: str, file: str):
        repository = self.state.repositories.get(repo)
        if repository is None or (repository.private and not self._authorised()):
            # As the real one: without a token it does not tell whether a repository exists.
            return self.send(404 if self._authorised() else 401, {}, {"X-Error-Code": "RepoNotFound"})
        if repository.gated and not self._authorised():
            return self.send(401, {}, {"X-Error-Code": "GatedRepo"})
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self.send(404, {}, {"X-Error-Code": "RevisionNotFound"})
        content = repository.commits[commit].get(file)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            return self.send(404, {}, {**headers, "X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        if self.command == "GET":
            content = self.state.delivery(content)
            if self.state.breaks:
                headers["Content-Length"] = str(len(content))
                content = content[: self.state.breaks.pop()]
                self.close_connection = True
        return self.send(200, content, headers)

    def _create(self, body: bytes):
        if not self._authorised():
            return self.send(401, {"error": "Invalid username or password."})
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        # Clients differ in how they say it.
        private = asked.get("private") or asked.get("visibility") == "private"
        self.state.repository(name).private = bool(private)
        return self.send(200, {"url": f"{self.state.url}/{name}", "name": name})

    def _branch(self, body: bytes, repo: str, revision: str):
        if not self._authorised():
            return self.send(401, {"error": "Invalid username or password."})
        refs = self.state.repository(repo).refs
        if revision in refs:
            return self.send(409, {"error": "Reference already exists"})
        if "main" in refs:
            refs[revision] = refs["main"]
        return self.send(200, {})

    def _validate_card(self, body: bytes):
        """The real one knows all fields of a card's header; here it must be there and hold one field a line or item."""
        header = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.S)
        lines = header[1].splitlines() if header else ["(no header)"]
        wrong = [line for line in lines if not re.fullmatch(r"- \S+|\w+:( \S+)?", line)]
        errors = [{"message": f"not YAML: {line}"} for line in wrong]
        return self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def _preupload(self, body: bytes, repo: str, revision: str):
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
            for f in json.loads(body)["files"]
        ]
        return self.send(200, {"files": [{**f, "shouldIgnore": False} for f in files]})

    def _lfs_batch(self, body: bytes, repo: str):
        objects = []
        for item in json.loads(body)["objects"]:
            url = f"{self.state.url}/lfs/{item['oid']}"
            objects.append({**item, "actions": {"upload": {"href": url}}})
        return self.send(200, {"transfer": "basic", "objects": objects})

    def _lfs_put(self, body: bytes, oid: str):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.send(400, {"error": "wrong content"})
        self.state.objects[oid] = body
        return self.send(200, {})

    def _commit(self, body: bytes, repo: str, revision: str):
        if not self._authorised():
            return self.send(401, {"error": "Invalid username or password."})
        files = {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.state.objects[line["value"]["oid"]]
            elif line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = self.state.repository(repo).commit(files, revision)
        url = f"{self.state.url}/{repo}/commit/{commit}"
        return self.send(200, {"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""})

    ROUTES = (
        ("GET HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>.+?)/(?P<file>[^/]+)", _resolve),
        ("POST", r"/api/repos/create", _create),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>.+)", _branch),
        ("POST", r"/api/validate-yaml", _validate_card),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)", _preupload),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _lfs_batch),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]+)", _lfs_put),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)", _commit),
    )
