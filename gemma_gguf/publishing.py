"""A set on its way to the Hub: what is looked at, in which order it is sent, and how an upload goes on.

Consumes a set with its manifest, `PublishOptions` and a repository; produces commits there. Every file is read and
hashed again before the first byte is sent; then the repository is made (private), weights are committed one by one, and
what describes the set last. After every failure that may pass, the repository is listed again: what has arrived is
known by its hash, also when the answer to a commit was lost, so nothing is sent or committed twice.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gemma_gguf import card, doctor, gguf_io, hub, manifest, pictures, publish, survey, verify
from gemma_gguf.doctor import Account
from gemma_gguf.errors import BadInputError, VerificationError
from gemma_gguf.files import HashMemory, sha256_file
from gemma_gguf.hub import Addition, PassingError, Repository
from gemma_gguf.llama_cpp import RunLog
from gemma_gguf.manifest import FILE_NAME, Manifest, RemotePlace
from gemma_gguf.progress import Progress, silent
from gemma_gguf.publish import Candidate, Finding, Listing, LocalFile, Operation, Plan
from gemma_gguf.session import WORK, Done, PublishOptions, Run, open_work, told

# Seconds to wait before the next try, each time nothing has arrived since the last one; the client itself has tried
# six times before. Then the user is told.
PATIENCE = (2.0, 5.0, 15.0, 30.0, 60.0, 60.0)
LONGEST_WAIT = 900.0  # seconds that the Hub may ask for
NOWHERE = "unnamed/unnamed"  # while the account is asked what the repository is called

T = TypeVar("T")


@dataclass(frozen=True)
class Look:
    """What one look at a set and its repository found."""

    facts: Manifest
    local: dict[str, LocalFile]
    others: dict[str, int]
    remote: Listing
    plan: Plan
    refusals: tuple[Finding, ...]
    warnings: tuple[Finding, ...]

    def document(self) -> dict[str, Any]:
        """Plan and findings as JSON."""
        found = {"refusals": self.refusals, "warnings": self.warnings}
        return {**self.plan.document(), **{name: [finding.what for finding in told] for name, told in found.items()}}


@dataclass
class Upload:
    """One set and its repository. `pause` waits; tests need not."""

    set_dir: Path
    remote: Repository
    how: PublishOptions
    log: RunLog
    memory: HashMemory
    progress: Progress = silent
    say: Callable[[Done], None] = lambda _: None
    pause: Callable[[float], None] = time.sleep
    sent: int = field(default=0, init=False)  # bytes of the set that have arrived by now, for its progress
    total: int = field(default=0, init=False)

    @property
    def repo(self) -> str:
        return self.remote.name

    # --- looking -------------------------------------------------------------------------------------------------

    def look(self, facts: Manifest, *, rehash: bool) -> Look:
        """The set beside its repository; with `rehash` every byte of it is read again, as it must be before sending."""
        local = self._local_files(facts, rehash=rehash)
        others = self._others(facts, local)
        listed = self.patiently(self.remote.listing)
        cards = {
            name: front_matter(self.set_dir / name) for name in card.card_files(tuple(facts.card.languages)).values()
        }
        candidate = Candidate(
            facts=facts,
            local=local,
            cards=cards,
            remote=listed,
            repo=self.repo,
            prune=self.how.prune,
            allow_demo=self.how.allow_demo,
        )
        return Look(
            facts=facts,
            local=local,
            others=others,
            remote=listed,
            plan=self._plan(facts, local, listed, others),
            refusals=tuple(publish.refusals(candidate)),
            warnings=tuple(publish.warnings(candidate)),
        )

    def _plan(self, facts: Manifest, local: dict[str, LocalFile], listed: Listing, others: dict[str, int]) -> Plan:
        return publish.make_plan(
            facts, local, listed, self.repo, others=others, public=self.how.public, prune=self.how.prune
        )

    def _local_files(self, facts: Manifest, *, rehash: bool) -> dict[str, LocalFile]:
        """The files of the set that are on this disk."""
        names = [part.name for entry in facts.files for part in entry.parts]
        names += card.card_files(tuple(facts.card.languages)).values()
        names += [f"{pictures.FOLDER}/{name}.{kind}" for name in facts.pictures for kind in ("svg", "png")]
        names = [name for name in (*names, FILE_NAME) if (self.set_dir / name).is_file()]
        found: dict[str, LocalFile] = {}
        for done, name in enumerate(names):
            self.progress("reading the set", done, len(names), "files")
            found[name] = self._local_file(self.set_dir / name, rehash=rehash)
        return found

    def _local_file(self, path: Path, *, rehash: bool) -> LocalFile:
        n_bytes = path.stat().st_size
        git_id = git_blob_id(path.read_bytes()) if n_bytes <= publish.MAX_REGULAR else None
        is_weights = path.suffix == ".gguf"
        digest = sha256_file(path) if rehash or not is_weights else self.memory.sha256(path)
        return LocalFile(n_bytes, digest, git_id, _problem(path) if is_weights else None)

    def _others(self, facts: Manifest, local: dict[str, LocalFile]) -> dict[str, int]:
        """Files of the directory that are no part of the set; hidden ones are not looked at."""
        named = set(local) | {part.name for entry in facts.files for part in entry.parts}
        found: dict[str, int] = {}
        for path in sorted(self.set_dir.rglob("*")):
            name = path.relative_to(self.set_dir)
            if path.is_file() and name.as_posix() not in named and not any(part.startswith(".") for part in name.parts):
                found[name.as_posix()] = path.stat().st_size
        return found

    # --- sending -------------------------------------------------------------------------------------------------

    def send(self, seen: Look) -> None:
        """Do what the plan of `seen` says.

        Raises `GemmaGGUFError` subclasses before the first byte when something forbids it, or when nothing more
        arrives: then the same call, after another look, goes on with what is missing.
        """
        publish.refuse(seen.refusals, self.repo)
        readme = self.set_dir / "README.md"
        if any(operation.name == readme.name for group in seen.plan.groups for operation in group):
            self.patiently(lambda: self.remote.check_card(readme.read_text(encoding="utf-8")))
        if seen.plan.creates:
            self._create()
        for operation in seen.plan.operations:
            if operation.action == "skip":
                self.say(Done("publish", operation.name, False, operation.reason, 0.0, operation.n_bytes))
        self.sent, self.total = 0, seen.plan.n_bytes
        for group in seen.plan.groups:
            self._commit(seen.local, group)
        if seen.plan.makes_public:
            self.patiently(self.remote.make_public)
            self.say(Done("publish", self.remote.address, True, "public now", 0.0))

    def _create(self) -> None:
        started = time.monotonic()
        self.patiently(self.remote.create)
        took = time.monotonic() - started
        self.say(Done("publish", self.remote.address, True, "new repository, private", took))

    def send_file(self, facts: Manifest, name: str) -> RemotePlace:
        """Commit one file of the set, or all shards of one, unless the repository has it; where it is now.

        For sets that are sent while they are made; what describes the set comes in the end.
        """
        part = facts.model_copy(update={"files": [entry for entry in facts.files if entry.name == name]})
        names = [one.name for entry in part.files for one in entry.parts]
        local = {one: self._local_file(self.set_dir / one, rehash=True) for one in names}
        listed = self.patiently(self.remote.listing)
        candidate = Candidate(part, local, {}, listed, self.repo, self.how.prune, self.how.allow_demo)
        publish.refuse(publish.refusals(candidate, publish.GATES_OF_FILES), self.repo)
        if listed.commit is None:
            self._create()
        plan = self._plan(part, local, listed, {})
        operations = [o for o in plan.operations if o.action in publish.SENT]
        self.sent, self.total = 0, sum(operation.n_bytes for operation in operations)
        commit = self._commit(local, operations) if operations else listed.commit
        return RemotePlace(repo=self.repo, commit=str(commit))

    def _commit(self, local: Mapping[str, LocalFile], group: Sequence[Operation]) -> str:
        """Commit one group, however often the connection breaks; the repository's newest commit after it."""
        started, before = time.monotonic(), self.sent
        label = f"sending {publish.subject(group)}"

        def show(n_bytes: int) -> None:
            if hub.client_shows():
                return  # two bars would write over each other
            self.progress(label, (before + n_bytes) / 1e6, max(self.total, 1) / 1e6, "MB of the set")

        def once() -> str:
            # What has arrived is asked every time: also a commit whose answer was lost.
            listed = self.remote.listing()
            left = [operation for operation in group if not publish.is_arrived(operation, local, listed)]
            if not left:
                return str(listed.commit)
            return self.remote.commit(
                [self._addition(local, operation) for operation in left if operation.action in publish.SENT],
                [operation.name for operation in left if operation.action == "delete"],
                publish.summary(left),
                parent=listed.commit,
                progress=show,
            )

        show(0)
        commit = self.patiently(once)
        took = time.monotonic() - started
        self.sent = before + sum(operation.n_bytes for operation in group if operation.action in publish.SENT)
        for operation in group:
            self.say(Done("publish", operation.name, True, operation.reason, took, operation.n_bytes))
            self.log.note(f"{operation.action} {operation.name} ({operation.reason}): commit {commit}")
        return commit

    def _addition(self, local: Mapping[str, LocalFile], operation: Operation) -> Addition:
        path, expected = self.set_dir / operation.name, local[operation.name].sha256
        # Weights are sent from the disk and hashed on their way; the rest is small.
        return Addition(operation.name, path if path.suffix == ".gguf" else path.read_bytes(), expected)

    def patiently(self, function: Callable[[], T]) -> T:
        """The function's value, tried again while what fails may pass. It looks itself what is still to be done."""
        for wait in (*PATIENCE, None):
            try:
                return function()
            except PassingError as error:
                self.log.note(f"hub: {error.what}")
                if wait is None or (error.seconds or 0) > LONGEST_WAIT:
                    raise
                seconds = wait if error.seconds is None else error.seconds
            self.progress("waiting for the Hub", 0, seconds, "s")
            self.pause(seconds)
        raise AssertionError


# --- the files of a set ----------------------------------------------------------------------------------------------


def git_blob_id(data: bytes) -> str:
    """What git calls these bytes. Source: gitformat-pack; "blob", the length and a NUL before the content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _problem(path: Path) -> str | None:
    """What is wrong with a GGUF file as far as its header tells: cut, or with a path of this machine in a key."""
    try:
        header = gguf_io.read_header(path)
        verify.check_size(header)
        verify.check_keys(header)
    except (BadInputError, VerificationError) as error:
        return error.what
    return None


def front_matter(path: Path) -> dict[str, Any] | None:
    """The front matter of a card on this disk; None when there is none that can be read."""
    try:
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else None
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


# --- opening ----------------------------------------------------------------------------------------------------------


def repository_name(how: PublishOptions, facts: Manifest, account: Account) -> str:
    """Where a set goes: what was asked for, what its card says, or the namespace's repository of its name."""
    return how.repo or facts.card.repo or f"{how.namespace or account.name}/{facts.stem}-GGUF"


def ask_account(repository: Repository) -> Account:
    """The token's account. Raises `BadInputError` when there is no token, or the Hub does not accept it."""
    return survey.account_of(repository.endpoint, repository.account())


def _settle(upload: Upload, facts: Manifest, connect: Callable[[str], Repository]) -> None:
    """Find out where the set goes. Raises `BadInputError` for a token that may not write there."""
    account = upload.patiently(lambda: ask_account(upload.remote))
    upload.remote = connect(repository_name(upload.how, facts, account))
    if (problem := doctor.cannot_write(account, upload.repo)) is not None:
        raise BadInputError(problem, next_step=doctor.TOKEN_STEP)


@contextlib.contextmanager
def joined(state: Run, connect: Callable[[str], Repository] = Repository) -> Iterator[Upload | None]:
    """The upload that belongs to a run, None when it publishes nothing. Its card is rendered for the repository.

    Where the run streams, its quants are sent and deleted as they are finished; what an earlier run recorded as
    published and is there no more will be made again.
    """
    how = state.options.publish
    if how is None:
        yield None
        return
    with hub.client_says(state.log.note):
        upload = Upload(state.set_dir, connect(NOWHERE), how, state.log, state.memory, state.progress, state.did)
        facts = state.manifest
        _settle(upload, facts, connect)
        nothing = Candidate(facts, {}, {}, Listing(), upload.repo, how.prune, how.allow_demo)
        publish.refuse(publish.refusals(nothing, publish.GATES_BEFORE), upload.repo)
        listed = upload.patiently(upload.remote.listing)
        for entry in facts.files:
            there = all(publish.is_there(part, listed.files.get(part.name)) for part in entry.parts)
            if entry.remote is not None and not there:
                facts = facts.model_copy(update={"files": [other for other in facts.files if other is not entry]})
            elif entry.remote is not None and how.stream:
                entry.remove(state.set_dir)  # a killed run had no time to delete it
        state.manifest = facts.model_copy(update={"card": facts.card.model_copy(update={"repo": upload.repo})})
        if how.stream:
            state.take_away = lambda path: upload.send_file(state.manifest, path.relative_to(state.set_dir).as_posix())
        yield upload


@contextlib.contextmanager
def opened(
    set_dir: Path,
    how: PublishOptions,
    *,
    wait: bool = False,
    progress: Progress = silent,
    say: Callable[[Done], None] = lambda _: None,
    connect: Callable[[str], Repository] = Repository,
) -> Iterator[Upload]:
    """A set that can be sent: locked, with a log, its repository named and writable by this token.

    Raises `BadInputError` for a token that may not write there.
    """
    set_dir = set_dir.resolve()
    facts = manifest.load(set_dir)
    work = set_dir.parent / WORK / facts.stem
    with open_work(work, "publish", wait=wait) as log, hub.client_says(log.note):
        memory = HashMemory(work / "hashes.json")
        upload = Upload(set_dir, connect(NOWHERE), how, log, memory, progress, say)
        with told(log, memory):
            _settle(upload, facts, connect)
            yield upload
