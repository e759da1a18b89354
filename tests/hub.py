"""A Hugging Face Hub on this machine: a real HTTP server that answers the real `huggingface_hub` client.

Consumes directories, each one commit of a repository; produces an address for `HF_ENDPOINT` and a record of every
request. It speaks what the client asks for when it reads: repository information, the tree of a commit, and files
with their ETag, commit and length, ranges included; large files are redirected to another host with their linked
ETag and size. Gated, unknown and broken repositories answer as the Hub answers.
Writing is a matter of more rows in `Hub.routes`: a handler gets the request with its body and returns a `Reply`.

`HF_ENDPOINT` is read when `huggingface_hub` is imported, so what talks to this server runs in a process of its own:
`Hub.environment` is that process's environment.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

MODEL, DATASET = "model", "dataset"
LARGE = (".safetensors", ".gguf", ".bin")  # what a repository's .gitattributes gives to large-file storage


@dataclass(frozen=True)
class Request:
    """One request as it came: path without the query, header names in lower case."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


@dataclass(frozen=True)
class Reply:
    """What goes back. `cut` sends only that many bytes of the body and closes the connection."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass
class Repo:
    """One repository: its commits as directories, its branches and tags, and who may read it.

    `readers` are the tokens with access when it is gated. `fault` replaces every answer about it. The first request
    for a file in `cut_once` breaks off half-way.
    """

    kind: str
    name: str
    commits: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    readers: frozenset[str] = frozenset()
    fault: Reply | None = None
    cut_once: set[str] = field(default_factory=set)

    def commit(self, directory: Path, *refs: str) -> str:
        """Make `directory` a commit and let `refs` point to it; returns its 40 hexadecimal digits."""
        listing = [f"{self.name} {directory}", *refs, *(f"{n} {_sha256(directory / n)}" for n in files_of(directory))]
        digest = hashlib.sha1("\n".join(listing).encode()).hexdigest()
        self.commits[digest] = directory
        self.refs |= dict.fromkeys(refs, digest)
        return digest

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


def files_of(directory: Path) -> list[str]:
    """Relative POSIX paths of all files below a directory, sorted."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git_id(data: bytes) -> str:
    """The id git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _error(status: int, code: str, message: str) -> Reply:
    headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
    return _json({"error": message}, status, headers)


def _json(value: object, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


Handler = Callable[..., Reply]


class Hub:
    """The server's content and its answers. `requests` is everything that was asked, in order."""

    def __init__(self) -> None:
        self.url = ""
        self.storage = ""  # the same server by another host name, as large files lie on another host
        self.requests: list[Request] = []
        self._repos: dict[tuple[str, str], Repo] = {}
        self.pages: dict[str, Callable[[Request], Reply]] = {}  # by path, for what belongs to no repository
        name = r"(?P<name>[^/]+/[^/]+)"
        # First match wins; API before files, as files can be called anything.
        self.routes: list[tuple[str, str, Handler]] = [
            ("GET", rf"/api/(?P<kind>model|dataset)s/{name}(/revision/(?P<revision>[^/]+))?", self._info),
            ("GET", rf"/api/(?P<kind>model|dataset)s/{name}/refs", self._refs),
            ("GET", rf"/api/(?P<kind>model|dataset)s/{name}/tree/(?P<revision>[^/]+)", self._tree),
            ("GET", rf"/large/(?P<kind>model|dataset)s/{name}/(?P<revision>[^/]+)/(?P<file>.+)", self._large),
            ("GET", rf"/((?P<kind>dataset)s/)?{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._file),
        ]

    def repo(self, name: str, kind: str = MODEL, **options: Any) -> Repo:
        """A new repository, empty unless commits are added to it; `options` are fields of `Repo`."""
        self._repos[kind, name] = made = Repo(kind, name, **options)
        return made

    def commit_of(self, name: str, revision: str = "main", kind: str = MODEL) -> str:
        """The commit a branch or tag points to, which must exist."""
        commit = self._repos[kind, name].resolve(revision)
        assert commit is not None, f"{name} has no {revision}"
        return commit

    def environment(self, home: Path, *, token: str | None = None) -> dict[str, str]:
        """Environment of a child whose `huggingface_hub` talks to this server and keeps its files below `home`."""
        return client_environment(self.url, home, token=token)

    def asked(self, part: str) -> list[Request]:
        """The requests whose path holds `part`."""
        return [request for request in self.requests if part in request.path]

    def answer(self, request: Request) -> Reply:
        self.requests.append(request)
        if request.path in self.pages:
            return self.pages[request.path](request)
        for method, pattern, handler in self.routes:
            wanted = request.method == method or (request.method, method) == ("HEAD", "GET")
            if wanted and (match := re.fullmatch(pattern, request.path)):
                found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return self._on_repo(handler, request, found)
        return _error(HTTPStatus.NOT_FOUND, "", f"no such page: {request.method} {request.path}")

    def _on_repo(self, handler: Handler, request: Request, found: dict[str, str]) -> Reply:
        repo = self._repos.get((found.pop("kind", MODEL), found.pop("name")))
        if repo is None:
            # The Hub does not tell strangers which private repositories exist.
            if request.token is None:
                return _error(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Invalid username or password.")
            return _error(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        if repo.fault is not None:
            return repo.fault
        revision = found.pop("revision", "main")
        commit = repo.resolve(revision)
        if commit is None:
            return _error(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        return handler(request, repo, commit, **found)

    # --- handlers: (request, repo, commit, what the route's pattern named) -------------------------------------

    def _info(self, request: Request, repo: Repo, commit: str) -> Reply:
        directory = repo.commits[commit]
        siblings: list[dict[str, Any]] = [{"rfilename": file} for file in files_of(directory)]
        if request.query.get("blobs") == ["true"]:
            siblings = [{**row, "size": (directory / row["rfilename"]).stat().st_size} for row in siblings]
        facts = {"id": repo.name, "sha": commit, "private": False, "gated": "manual" if repo.gated else False}
        return _json({**facts, "tags": [], "siblings": siblings})

    def _refs(self, request: Request, repo: Repo, commit: str) -> Reply:
        """Branches and their commits; llama.cpp asks for them before it looks for a file."""
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": target} for ref, target in repo.refs.items()
        ]
        return _json({"branches": branches, "converts": [], "tags": []})

    def _tree(self, request: Request, repo: Repo, commit: str) -> Reply:
        rows = []
        for name in files_of(repo.commits[commit]):
            data = (repo.commits[commit] / name).read_bytes()
            row: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _git_id(data)}
            if name.endswith(LARGE):
                row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            rows.append(row)
        return _json(rows)

    def _file(self, request: Request, repo: Repo, commit: str, file: str) -> Reply:
        if repo.gated and request.token not in repo.readers:
            status = HTTPStatus.UNAUTHORIZED if request.token is None else HTTPStatus.FORBIDDEN
            return _error(status, "GatedRepo", f"Access to {repo.kind} {repo.name} is restricted.")
        path = repo.commits[commit] / file
        common = {"X-Repo-Commit": commit}
        if not path.is_file():
            missing = _error(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found")
            return Reply(missing.status, missing.body, {**missing.headers, **common})
        if file.endswith(LARGE):
            linked = {"X-Linked-Etag": f'"{_sha256(path)}"', "X-Linked-Size": str(path.stat().st_size)}
            place = f"{self.storage}/large/{repo.kind}s/{repo.name}/{commit}/{file}"
            return Reply(HTTPStatus.FOUND, b"", {**common, **linked, "Location": place})
        data = path.read_bytes()
        return self._bytes(request, repo, file, data, {**common, "ETag": f'"{_git_id(data)}"'})

    def _large(self, request: Request, repo: Repo, commit: str, file: str) -> Reply:
        data = (repo.commits[commit] / file).read_bytes()
        return self._bytes(request, repo, file, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    @staticmethod
    def _bytes(request: Request, repo: Repo, file: str, data: bytes, headers: Mapping[str, str]) -> Reply:
        kept = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
            start, end = int(match[1]), int(match[2] or len(data) - 1)
            if start >= len(data):
                return Reply(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", {"Content-Range": f"bytes */{len(data)}"})
            kept["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return Reply(HTTPStatus.PARTIAL_CONTENT, data[start : end + 1], kept)
        if request.method == "GET" and file in repo.cut_once:
            repo.cut_once.discard(file)
            return Reply(HTTPStatus.OK, data, kept, cut=len(data) // 2)
        return Reply(HTTPStatus.OK, data, kept)


def client_environment(url: str, home: Path, *, token: str | None = None) -> dict[str, str]:
    """This process's environment with a `huggingface_hub` that knows only the server at `url`."""
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "XDG_CACHE_HOME")
    own = {key: value for key, value in os.environ.items() if not key.upper().startswith(foreign)}
    own |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
    own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost"}
    return {**own, "HF_TOKEN": token} if token else own


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.hub = hub


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds; no test keeps a connection longer

    def _serve(self) -> None:
        assert isinstance(self.server, _Server)
        parts = urlsplit(self.path)
        headers = {key.lower(): value for key, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", "0")))
        reply = self.server.hub.answer(Request(self.command, parts.path, parse_qs(parts.query), headers, body))
        self.send_response(reply.status)
        for key, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: reply.cut])
        if reply.cut is not None:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr: `Hub.requests` is the log."""


@contextmanager
def serving() -> Iterator[Hub]:
    """A running hub without any repository; it stops with the block."""
    hub = Hub()
    with _Server(hub) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        hub.storage = f"http://localhost:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
