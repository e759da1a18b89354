"""A Hugging Face Hub on this machine: a real HTTP server that answers the real `huggingface_hub` client.

Consumes directories, each one commit of a repository; produces an address for `HF_ENDPOINT` and a record of every
request. It speaks what the client asks for when it reads: repository information, the tree of a commit, and files
with their ETag, commit and length, ranges included; large files are redirected to another host with their linked
ETag and size. Gated, unknown and broken repositories answer as the Hub answers.

With `Hub.open_for_writing` it takes uploads, too: repositories are made, front matter is validated, files go to
large-file storage (whole or in parts, checked by their SHA-256) or into the commit itself, or over Xet into a local
store; commits build on their parent, settings change who may look. `Hub.faults` spoils requests on purpose: an answer
with another status, a connection that breaks while it is read or before it is answered, one that is slow.

`HF_ENDPOINT` is read when `huggingface_hub` is imported, so what talks to this server runs in a process of its own:
`Hub.environment` is that process's environment.
"""

import base64
import contextlib
import hashlib
import json
import math
import mmap
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

MODEL, DATASET = "model", "dataset"
LARGE = (".safetensors", ".gguf", ".bin", ".png")  # what a repository's .gitattributes gives to large-file storage
PIECE = 1 << 16  # bytes of a body that are read or written at once


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
    body: bytes | mmap.mmap = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass(frozen=True)
class Fault:
    """What is wrong with the handling of one request.

    `status` answers with that, after the body was read. `cut` reads half of the body and breaks the connection, `lost`
    does what was asked and breaks it before the answer, `slow` reads with pauses. `then` is called when half of the
    body was read.
    """

    how: str
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    then: Callable[[], None] | None = None


@dataclass(frozen=True)
class Committed:
    """One commit that came over the API: its message and parent, {path: SHA-256 of the bytes} and deleted paths."""

    commit: str
    parent: str
    message: str
    files: Mapping[str, str]
    deleted: tuple[str, ...]
    private: bool


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
    private: bool = False
    history: list[Committed] = field(default_factory=list)

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
    return _hashes(path)[0]


_hashed: dict[tuple[int, int, int, int], tuple[str, str]] = {}  # a file is in many commits, each a link to it


def _hashes(path: Path) -> tuple[str, str]:
    """(SHA-256, git's id) of a file, remembered by device, inode, size and time."""
    stat = path.stat()
    mark = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
    if mark not in _hashed:
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % stat.st_size)
        with path.open("rb") as file:
            while piece := file.read(1 << 24):
                sha256.update(piece)
                git.update(piece)
        _hashed[mark] = sha256.hexdigest(), git.hexdigest()
    return _hashed[mark]


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
        self.tokens: dict[str, str] = {}  # of those who may write: token -> account
        self.faults: Callable[[str, str], Fault | None] = lambda method, path: None
        self.xet: Path | None = None  # the local store of the Xet client; None: no Xet here
        self.part_size = 1 << 20  # bytes of a part; larger files are uploaded in parts
        self.errors: list[Exception] = []
        self._store: Path | None = None
        self._lock = threading.Lock()
        name = r"(?P<name>[^/]+/[^/]+)"
        # First match wins; API before files, as files can be called anything.
        self.routes: list[tuple[str, str, Handler]] = [
            ("POST", rf"/api/(?P<kind>model|dataset)s/{name}/preupload/(?P<revision>[^/]+)", self._preupload),
            ("POST", rf"/api/(?P<kind>model|dataset)s/{name}/commit/(?P<revision>[^/]+)", self._commit),
            ("PUT", rf"/api/(?P<kind>model|dataset)s/{name}/settings", self._settings),
            ("GET", rf"/api/(?P<kind>model)s/{name}/xet-(write|read)-token/(?P<revision>[^/]+)", self._xet_token),
            ("POST", rf"/{name}\.git/info/lfs/objects/batch", self._batch),
            ("GET", rf"/api/(?P<kind>model|dataset)s/{name}(/revision/(?P<revision>[^/]+))?", self._info),
            ("GET", rf"/api/(?P<kind>model|dataset)s/{name}/refs", self._refs),
            ("GET", rf"/api/(?P<kind>model|dataset)s/{name}/tree/(?P<revision>[^/]+)", self._tree),
            ("GET", rf"/large/(?P<kind>model|dataset)s/{name}/(?P<revision>[^/]+)/(?P<file>.+)", self._large),
            ("GET", rf"/((?P<kind>dataset)s/)?{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._file),
        ]

    def open_for_writing(self, store: Path, **tokens: str) -> None:
        """Take uploads of these tokens (token -> account) and keep them in `store`."""
        self._store = store
        self.tokens = tokens
        self.pages |= {
            "/api/whoami-v2": self._whoami,
            "/api/repos/create": self._create,
            "/api/validate-yaml": self._validate,
        }

    def uploaded(self, name: str) -> Repo:
        """A repository that was made over the API."""
        return self._repos[MODEL, name]

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

    def note(self, request: Request) -> None:
        """Remember a request; not the bytes of weights, which fill the memory."""
        self.requests.append(replace(request, body=b"") if request.path.startswith("/lfs/") else request)

    def answer(self, request: Request) -> Reply:
        self.note(request)
        if request.path in self.pages:
            return self.pages[request.path](request)
        if request.path.startswith("/lfs/"):
            return self._storage(request)
        for method, pattern, handler in self.routes:
            wanted = request.method == method or (request.method, method) == ("HEAD", "GET")
            if wanted and (match := re.fullmatch(pattern, request.path)):
                found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return self._on_repo(handler, request, found)
        return _error(HTTPStatus.NOT_FOUND, "", f"no such page: {request.method} {request.path}")

    def _on_repo(self, handler: Handler, request: Request, found: dict[str, str]) -> Reply:
        repo = self._repos.get((found.pop("kind", MODEL), found.pop("name")))
        # The storage's address is enough for whoever was redirected there.
        hidden = repo is not None and repo.private and request.token not in self.tokens and handler != self._large
        if repo is None or hidden:
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
        facts = {"id": repo.name, "sha": commit, "private": repo.private, "gated": "manual" if repo.gated else False}
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
            path = repo.commits[commit] / name
            sha256, git_id = _hashes(path)
            size = path.stat().st_size
            row: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": git_id}
            if name.endswith(LARGE):
                row["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
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
            if self.xet is not None:
                known = xet_files(self.xet).get(_sha256(path))
                route = f"{self.url}/api/models/{repo.name}/xet-read-token/{commit}"
                linked |= {"X-Xet-Hash": known, "X-Xet-Refresh-Route": route} if known else {}
            return Reply(HTTPStatus.FOUND, b"", {**common, **linked, "Location": place})
        data = path.read_bytes()
        return self._bytes(request, repo, file, data, {**common, "ETag": f'"{_git_id(data)}"'})

    def _large(self, request: Request, repo: Repo, commit: str, file: str) -> Reply:
        path = repo.commits[commit] / file
        with path.open("rb") as opened:  # as much of it as is asked for is read
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        return self._bytes(request, repo, file, data, {"ETag": f'"{_sha256(path)}"'})

    # --- writing ------------------------------------------------------------------------------------------------

    def _whoami(self, request: Request) -> Reply:
        account = self.tokens.get(str(request.token))
        if account is None:
            return _error(HTTPStatus.UNAUTHORIZED, "", "Invalid username or password.")
        token = {"displayName": "test", "role": "write"}
        answer = {"type": "user", "name": account, "orgs": [{"name": "test", "roleInOrg": "write"}]}
        return _json({**answer, "auth": {"type": "access_token", "accessToken": token}})

    def _create(self, request: Request) -> Reply:
        asked = json.loads(request.body)
        name = f"{asked['organization'] or self.tokens.get(str(request.token))}/{asked['name']}"
        if request.token not in self.tokens:
            return _error(HTTPStatus.UNAUTHORIZED, "", "Invalid username or password.")
        with self._lock:
            if (MODEL, name) in self._repos:
                told = {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
                return _json(told, HTTPStatus.CONFLICT)
            assert self._store is not None
            first = self._store / "repos" / name.replace("/", "--") / "0"
            first.mkdir(parents=True)
            (first / ".gitattributes").write_text("*.gguf filter=lfs diff=lfs merge=lfs -text\n")
            made = self.repo(name, private=asked.get("visibility") == "private")
            made.commit(first, "main")
        return _json({"url": f"{self.url}/{name}", "name": name})

    @staticmethod
    def _validate(request: Request) -> Reply:
        content = json.loads(request.body)["content"]
        try:
            front = yaml.safe_load(content.split("---\n", 2)[1]) if content.startswith("---\n") else None
            wrong = [] if isinstance(front, dict) else ["no front matter"]
        except (yaml.YAMLError, IndexError) as error:
            wrong = [str(error)]
        found = {"errors": [{"message": message} for message in wrong], "warnings": []}
        return _json(found, HTTPStatus.BAD_REQUEST if wrong else HTTPStatus.OK)

    def _may_not_write(self, request: Request, repo: Repo) -> Reply | None:
        if request.token not in self.tokens:
            return _error(HTTPStatus.UNAUTHORIZED, "", "Invalid username or password.")
        return None

    def _settings(self, request: Request, repo: Repo, commit: str) -> Reply:
        if (refused := self._may_not_write(request, repo)) is not None:
            return refused
        repo.private = json.loads(request.body)["visibility"] == "private"
        return _json({})

    def _preupload(self, request: Request, repo: Repo, commit: str) -> Reply:
        if (refused := self._may_not_write(request, repo)) is not None:
            return refused
        rows = []
        for file in json.loads(request.body)["files"]:
            path = repo.commits[commit] / file["path"]
            known = _hashes(path) if path.is_file() else None
            large = file["path"].endswith(LARGE)
            row = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            rows.append(row | ({"oid": known[0 if large else 1]} if known else {}))
        return _json({"files": rows})

    def _blob(self, sha256: str) -> Path:
        assert self._store is not None
        return self._store / "blobs" / sha256

    def _batch(self, request: Request, repo: Repo, commit: str) -> Reply:
        """Where to put objects; nothing for those that are there. Source: the batch API of git-lfs."""
        if (refused := self._may_not_write(request, repo)) is not None:
            return refused
        rows = []
        for item in json.loads(request.body)["objects"]:
            oid, size = item["oid"], item["size"]
            row: dict[str, Any] = {"oid": oid, "size": size}
            if not self._blob(oid).is_file():
                upload: dict[str, Any] = {"href": f"{self.storage}/lfs/{oid}?X-Amz-Signature=signed"}
                if size > self.part_size:
                    count = math.ceil(size / self.part_size)
                    places = {
                        str(n): f"{self.storage}/lfs/{oid}/{n}?X-Amz-Signature=signed" for n in range(1, count + 1)
                    }
                    upload = {"href": f"{self.url}/lfs/{oid}/complete/{repo.name}", "header": places}
                    upload["header"] |= {"chunk_size": str(self.part_size)}
                verify = {"href": f"{self.url}/lfs/{oid}/verify/{repo.name}"}
                row["actions"] = {"upload": upload, "verify": verify}
            rows.append(row)
        return _json({"transfer": "basic", "objects": rows})

    def _storage(self, request: Request) -> Reply:
        """Large-file storage: objects, whole or in parts, kept only when they have the hash they are named by."""
        oid, *rest = request.path.removeprefix("/lfs/").split("/")
        blob = self._blob(oid)
        if request.method == "PUT" and not rest:
            return self._keep(oid, request.body)
        if request.method == "PUT":
            part = blob.with_name(f"{oid}.{rest[0]}")
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(request.body)
            return Reply(HTTPStatus.OK, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})
        if rest[0] == "complete":
            parts = [blob.with_name(f"{oid}.{part['partNumber']}") for part in json.loads(request.body)["parts"]]
            if not all(part.is_file() for part in parts):
                return self._kept(oid)
            reply = self._keep(oid, b"".join(part.read_bytes() for part in parts))
            for part in parts:
                part.unlink()
            return reply
        return self._kept(oid)

    def _keep(self, oid: str, data: bytes) -> Reply:
        if hashlib.sha256(data).hexdigest() != oid:
            return _error(HTTPStatus.BAD_REQUEST, "", "XAmzContentSHA256Mismatch")
        blob = self._blob(oid)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        return Reply(HTTPStatus.OK, b"", {"ETag": f'"{oid}"'})

    def _kept(self, oid: str) -> Reply:
        there = self._blob(oid).is_file()
        return Reply(HTTPStatus.OK) if there else _error(HTTPStatus.NOT_FOUND, "", "no such object")

    def _xet_token(self, request: Request, repo: Repo, commit: str) -> Reply:
        """Where the Xet client keeps data, and with what right: a directory of this machine, which needs none."""
        if (refused := self._may_not_write(request, repo)) is not None:
            return refused
        assert self.xet is not None, "a client without HF_HUB_DISABLE_XET"
        token = {"casUrl": f"local://{self.xet}", "accessToken": "none", "exp": int(time.time()) + 3600}
        headers = {
            "X-Xet-Cas-Url": token["casUrl"],
            "X-Xet-Access-Token": token["accessToken"],
            "X-Xet-Token-Expiration": str(token["exp"]),
        }
        return _json(token, headers={key: str(value) for key, value in headers.items()})

    def _commit(self, request: Request, repo: Repo, commit: str) -> Reply:
        """A commit on top of `parentCommit`: what it does not name stays. Large files must be in the storage."""
        if (refused := self._may_not_write(request, repo)) is not None:
            return refused
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = lines[0]["value"]
        assert self._store is not None
        with self._lock:
            if header.get("parentCommit", repo.refs["main"]) != repo.refs["main"]:
                return _error(HTTPStatus.PRECONDITION_FAILED, "", "A commit has happened since. Please refresh.")
            old = repo.commits[repo.refs["main"]]
            contents: dict[str, Path | bytes] = {name: old / name for name in files_of(old)}
            files: dict[str, str] = {}
            deleted: list[str] = []
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    contents[value["path"]] = data = base64.b64decode(value["content"])
                    files[value["path"]] = hashlib.sha256(data).hexdigest()
                elif line["key"] == "lfsFile":
                    found = self._large_content(value["oid"])
                    if found is None:
                        return _error(HTTPStatus.BAD_REQUEST, "", f"{value['path']}: no such object in the storage")
                    contents[value["path"]] = found
                    files[value["path"]] = value["oid"]
                else:
                    assert line["key"] == "deletedFile", line
                    del contents[value["path"]]
                    deleted.append(value["path"])
            new = self._store / "repos" / repo.name.replace("/", "--") / str(len(repo.commits))
            for name, content in contents.items():
                target = new / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    target.write_bytes(content)
                else:
                    target.hardlink_to(content)
            parent = repo.refs["main"]
            made = repo.commit(new, "main")
            repo.history.append(Committed(made, parent, header["summary"], files, tuple(deleted), repo.private))
        return _json({"commitUrl": f"{self.url}/{repo.name}/commit/{made}", "commitOid": made, "success": True})

    def _large_content(self, sha256: str) -> Path | None:
        """The bytes of a large file, from LFS or, read by the Xet client itself, from the local store."""
        blob = self._blob(sha256)
        if blob.is_file():
            return blob
        known = None if self.xet is None else xet_files(self.xet).get(sha256)
        if known is None:
            return None
        blob.parent.mkdir(parents=True, exist_ok=True)
        fetch_xet(str(self.xet), known, blob)
        return blob if _sha256(blob) == sha256 else None

    @staticmethod
    def _bytes(request: Request, repo: Repo, file: str, data: bytes | mmap.mmap, headers: Mapping[str, str]) -> Reply:
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


def xet_files(store: Path) -> dict[str, str]:
    """{SHA-256: Xet hash} of all files in a local store of the Xet client, from its shards.

    Format: mdb_shard of xet-core, file info section. Rows of 48 bytes: a header (hash, flags, number of segments), the
    segments, with flag 31 as many verification rows, with flag 30 one with the SHA-256; a header of ones ends it.
    """
    found: dict[str, str] = {}
    for shard in store.rglob("*.mdb"):
        data, at = shard.read_bytes(), 48
        while at + 48 <= len(data) and data[at : at + 32] != b"\xff" * 32:
            flags, count = struct.unpack_from("<II", data, at + 32)
            xet = _merkle(data[at : at + 32])
            at += 48 * (1 + count + (count if flags >> 31 else 0))
            if flags >> 30 & 1:
                found[_merkle(data[at : at + 32])] = xet
                at += 48
    return found


def _merkle(data: bytes) -> str:
    """How Xet writes a hash: four numbers of 64 bits, lowest byte first."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", data))


def fetch_xet(store: str, xet_hash: str, target: Path) -> None:
    """Read a file from a local Xet store with the Xet client."""
    import hf_xet  # type: ignore[import-untyped]  # noqa: PLC0415 - only uploads over Xet need it

    with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{store}") as group:
        group.start_download_file(hf_xet.XetFileInfo(xet_hash, None), str(target))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may be killed at any moment; anything else is a mistake of this server, raised when it stops."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError) and isinstance(error, Exception):
            self.hub.errors.append(error)


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds; no test keeps a connection longer

    def _serve(self) -> None:
        assert isinstance(self.server, _Server)
        parts = urlsplit(self.path)
        headers = {key.lower(): value for key, value in self.headers.items()}
        hub = self.server.hub
        fault = hub.faults(self.command, parts.path)
        body = self._body(headers, fault)
        if body is None:
            return
        request = Request(self.command, parts.path, parse_qs(parts.query), headers, body)
        if fault is not None and fault.status:
            hub.note(request)
            reply = _error(fault.status, "", f"on purpose: {fault.status}")
            reply = Reply(reply.status, reply.body, {**reply.headers, **fault.headers})
        else:
            reply = hub.answer(request)
        if fault is not None and fault.how == "lost":
            self._break()
            return
        self.send_response(reply.status)
        for key, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            end = len(reply.body) if reply.cut is None else reply.cut
            for at in range(0, end, PIECE):
                self.wfile.write(reply.body[at : min(end, at + PIECE)])
        if reply.cut is not None:
            self.close_connection = True

    def _body(self, headers: Mapping[str, str], fault: Fault | None) -> bytes | None:
        """What was sent, whole or in chunks; None when the connection was broken on purpose."""
        size = int(headers.get("content-length", "0"))
        data = bytearray()
        told = False
        for piece in self._chunks() if headers.get("transfer-encoding") == "chunked" else self._pieces(size):
            data += piece
            if fault is None:
                continue
            if fault.how == "slow":
                time.sleep(0.05)
            if 2 * len(data) >= size and not told:
                told = True
                if fault.then is not None:
                    fault.then()
                if fault.how == "cut":
                    self._break()
                    return None
        if fault is not None and not told:  # nothing was sent
            if fault.then is not None:
                fault.then()
            if fault.how == "cut":
                self._break()
                return None
        return bytes(data) if len(data) >= size else None  # who sent it is gone

    def _pieces(self, size: int) -> Iterator[bytes]:
        while size > 0 and (piece := self.rfile.read(min(PIECE, size))):
            size -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield from self._pieces(size)
            self.rfile.readline()
        self.rfile.readline()

    def _break(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

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
    if hub.errors:
        raise hub.errors[0]
