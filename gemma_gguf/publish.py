"""What publishing a set would do, and what forbids it: pure functions over a manifest and two listings.

Consumes the manifest, the files on this disk and those of the repository, each with size and hash; produces a `Plan`,
in which every file has an operation with its reason, also those that nothing is done about, and the refusals that must
be empty before the first byte is sent. Nothing here looks at a disk or asks the Hub, so every case is a row of a test.

Weights come first and what describes them last, in one commit with every deletion: a reader of a public repository
never sees a card that links to a missing file. Hashes decide what is there already, so a killed upload is resumed by
planning again.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from gemma_gguf import gates
from gemma_gguf.errors import BadInputError, VerificationError
from gemma_gguf.manifest import FILE_NAME, Manifest, Shard
from gemma_gguf.names import is_model

MAX_FILE = 500_000_000_000  # bytes; the Hub refuses larger files
LARGE_FILE = 200_000_000_000  # bytes; the Hub recommends less
# Only large files are hashed as such by the Hub; what it keeps in git itself is below this size.
MAX_REGULAR = 20_000_000
# The Hub writes this file itself: which names go to large-file storage.
OF_THE_HUB = frozenset({".gitattributes"})

# Fields of a model card's front matter that decide who may use a model, and what must be said to whom.
LEGAL_KEYS = frozenset({"license", "license_name", "license_link", "licence"})
GATING = "extra_gated_"
PICTURES = "assets"

Action = Literal["upload", "replace", "skip", "delete", "keep", "leave"]
SENT: tuple[Action, ...] = ("upload", "replace")


@dataclass(frozen=True)
class LocalFile:
    """A file of the set on this disk. `git_id` is what git calls its bytes, None for files too large for git itself;
    `problem` what is wrong with its content, as far as its header tells."""

    n_bytes: int
    sha256: str
    git_id: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository; `sha256` is known of large files only."""

    n_bytes: int
    git_id: str
    sha256: str | None


@dataclass(frozen=True)
class Listing:
    """A repository at one commit; `commit` is None when there is no such repository."""

    commit: str | None = None
    private: bool = True
    files: Mapping[str, RemoteFile] = field(default_factory=dict)


@dataclass(frozen=True)
class Operation:
    """What is done about one file, and why. `keep` is a remote file and `leave` a local one that the set does not
    name."""

    action: Action
    name: str
    n_bytes: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """Everything an upload does, in order: `groups` are the commits, each with its operations."""

    repo: str
    creates: bool
    makes_public: bool
    operations: tuple[Operation, ...]
    groups: tuple[tuple[Operation, ...], ...]

    @property
    def n_bytes(self) -> int:
        """What is sent, at most: the Hub keeps content that it knows once."""
        return sum(operation.n_bytes for group in self.groups for operation in group if operation.action in SENT)

    @property
    def is_done(self) -> bool:
        return not (self.groups or self.creates or self.makes_public)

    def document(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {
            "repo": self.repo,
            "creates": self.creates,
            "makes_public": self.makes_public,
            "n_bytes": self.n_bytes,
            "operations": [asdict(operation) for operation in self.operations],
            "commits": [[operation.name for operation in group] for group in self.groups],
        }


# --- the plan ------------------------------------------------------------------------------------------------------


def make_plan(
    facts: Manifest,
    local: Mapping[str, LocalFile],
    remote: Listing,
    repo: str,
    *,
    others: Mapping[str, int] | None = None,
    public: bool = False,
    prune: bool = False,
) -> Plan:
    """Compare what is here with what is there.

    `local` holds the files of the set by name: those the manifest names, its cards and pictures, and itself. `others`
    are files of the directory that are no part of the set, with their sizes.
    """
    operations = [_about(name, local[name], remote.files.get(name)) for name in in_order(facts, local)]
    for entry in facts.files:
        if entry.remote is not None and entry.name not in local:
            reason = f"published before, not on this disk: commit {entry.remote.commit[:9]}"
            operations += [Operation("skip", part.name, part.n_bytes, reason) for part in entry.parts]
    named = {operation.name for operation in operations} | OF_THE_HUB
    for name, found in sorted(remote.files.items()):
        if name not in named:
            action: Action = "delete" if prune else "keep"
            reason = "not in the set" if prune else "not in the set; --prune deletes it"
            operations.append(Operation(action, name, found.n_bytes, reason))
    for name, n_bytes in sorted((others or {}).items()):
        operations.append(Operation("leave", name, n_bytes, f"not named by {FILE_NAME}"))
    return Plan(
        repo=repo,
        creates=remote.commit is None,
        makes_public=public and remote.private,
        operations=tuple(operations),
        groups=_commits(operations),
    )


def in_order(facts: Manifest, local: Mapping[str, LocalFile]) -> list[str]:
    """The names of `local` in the order of sending: imatrix, projectors, models, then what describes them."""
    kinds = ("imatrix", "mmproj", "model")
    weights = sorted(
        (e for e in facts.files if e.name in local), key=lambda entry: (kinds.index(entry.kind), -entry.n_bytes)
    )
    names = [part.name for entry in weights for part in entry.parts if part.name in local]
    rest = sorted(set(local) - set(names), key=lambda name: (name == FILE_NAME, name))
    return [*names, *rest]


def is_same(here: LocalFile, there: RemoteFile) -> bool:
    """Whether the Hub has these bytes: by SHA-256 for large files, by git's own hash for small ones."""
    if here.n_bytes != there.n_bytes:
        return False
    return here.sha256 == there.sha256 if there.sha256 is not None else here.git_id == there.git_id


def _about(name: str, here: LocalFile, there: RemoteFile | None) -> Operation:
    if there is None:
        return Operation("upload", name, here.n_bytes, "not in the repository")
    if is_same(here, there):
        return Operation("skip", name, here.n_bytes, "the same bytes are there")
    if here.n_bytes != there.n_bytes:
        reason = f"another size there: {there.n_bytes:,} bytes"
    elif there.sha256 is not None:
        reason = f"other bytes there: sha256 {there.sha256[:9]} for {here.sha256[:9]}"
    else:
        reason = "other bytes there"
    return Operation("replace", name, here.n_bytes, reason)


def is_last(name: str) -> bool:
    """Whether a file describes the set, and so is committed after all weights."""
    return not name.endswith(".gguf")


def is_arrived(operation: Operation, local: Mapping[str, LocalFile], remote: Listing) -> bool:
    """Whether nothing is left to be done for an operation."""
    there = remote.files.get(operation.name)
    if operation.action == "delete":
        return there is None
    return operation.action not in SENT or (there is not None and is_same(local[operation.name], there))


def _commits(operations: Iterable[Operation]) -> tuple[tuple[Operation, ...], ...]:
    """One commit per file or folder of shards; cards, pictures, the manifest and all deletions are the last one."""
    weights: dict[str, list[Operation]] = {}
    last: list[Operation] = []
    for operation in operations:
        if operation.action in SENT and not is_last(operation.name):
            folder, slash, _ = operation.name.partition("/")
            weights.setdefault(folder + slash, []).append(operation)
        elif operation.action in (*SENT, "delete"):
            last.append(operation)
    return tuple(tuple(group) for group in (*weights.values(), last) if group)


def subject(group: Sequence[Operation]) -> str:
    """What a commit is about: a file, the shards of one, or the card and all that goes with it."""
    first = group[0]
    if len(group) == 1 or is_last(first.name) or first.action not in SENT:
        return first.name if len(group) == 1 else "the card"
    return f"{PurePosixPath(first.name).parent}, {len(group)} shards"


def summary(group: Sequence[Operation]) -> str:
    """The message of a commit."""
    first = group[0]
    if not is_last(first.name) and first.action in SENT:
        return f"{'Replace' if first.action == 'replace' else 'Add'} {subject(group)}"
    deleted = sum(operation.action == "delete" for operation in group)
    card_is_sent = any(operation.name == "README.md" and operation.action in SENT for operation in group)
    what = "Update the card" if card_is_sent else "Update what describes the set"
    if deleted == len(group):
        return f"Delete {first.name}" if deleted == 1 else f"Delete {deleted} files"
    return f"{what}, delete {deleted} {'file' if deleted == 1 else 'files'}" if deleted else what


# --- what forbids it -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A set that is about to be published: what every gate looks at.

    `cards` is the front matter of every card that the set should have, None where it cannot be read.
    """

    facts: Manifest
    local: Mapping[str, LocalFile]
    cards: Mapping[str, Mapping[str, Any] | None]
    remote: Listing
    repo: str
    prune: bool = False
    allow_demo: bool = False


@dataclass(frozen=True)
class Finding:
    """Something about a set that its publisher must know. Of a refusal `next_step` says what would mend it."""

    what: str
    next_step: str | None = None


Gate = Callable[[Candidate], Iterator[Finding]]


def _demo(candidate: Candidate) -> Iterator[Finding]:
    if candidate.facts.model.base_is_dequantised and not candidate.allow_demo:
        yield Finding(
            "the weights of this set were rebuilt from a quant (the demo): its files prove the factory, nothing else",
            "Publish a set of original weights, or add --allow-demo.",
        )


def _whole(candidate: Candidate) -> Iterator[Finding]:
    """Every file is the one that the manifest names."""
    again = "Make it again with: gemma-gguf run MODEL"
    for entry, part in ((one, part) for one in candidate.facts.files for part in one.parts):
        found = candidate.local.get(part.name)
        if found is None and entry.remote is None:
            yield Finding(f"{part.name} is missing", again)
        elif found is not None and (found.n_bytes, found.sha256) != (part.n_bytes, part.sha256):
            yield Finding(f"{part.name} is not the file that {FILE_NAME} names: its sha256 is {found.sha256}", again)


def _published(candidate: Candidate) -> Iterator[Finding]:
    """A file that is only in the repository is there."""
    for entry in candidate.facts.files:
        if entry.remote is None or entry.name in candidate.local:
            continue
        lost = [part for part in entry.parts if not is_there(part, candidate.remote.files.get(part.name))]
        if entry.remote.repo != candidate.repo:
            what = f"{entry.name} is not on this disk, but in {entry.remote.repo}"
            yield Finding(what, f"Publish to it: --repo {entry.remote.repo}")
        elif lost:
            yield Finding(
                f"{lost[0].name} is neither on this disk nor in {candidate.repo}, where {FILE_NAME} says it is",
                "Make it again with: gemma-gguf run MODEL --publish --stream",
            )


def is_there(part: Shard, there: RemoteFile | None) -> bool:
    """Whether a file of the repository is the one that the manifest names."""
    return there is not None and there.n_bytes == part.n_bytes and there.sha256 == part.sha256


def _size(candidate: Candidate) -> Iterator[Finding]:
    for name, found in candidate.local.items():
        if found.n_bytes > MAX_FILE:
            yield Finding(
                f"{name} has {found.n_bytes:,} bytes, the Hub takes files up to {MAX_FILE:,}",
                "Split it, or leave its recipe out.",
            )


def _keys(candidate: Candidate) -> Iterator[Finding]:
    for found in candidate.local.values():
        if found.problem is not None:
            yield Finding(found.problem, "Make it again with: gemma-gguf run MODEL")


def _checked(candidate: Candidate) -> Iterator[Finding]:
    for entry in candidate.facts.files:
        if entry.kind != "imatrix" and entry.checks is None:
            what = f"{entry.name} was never verified (no checks in {FILE_NAME})"
            yield Finding(what, "Make it again with: gemma-gguf run MODEL")


def _quality(candidate: Candidate) -> Iterator[Finding]:
    """Files that gave no finite figures, or are too far from the base."""
    for what in gates.refusals(candidate.facts):
        yield Finding(what, "Leave these recipes out of --recipes, or move the bound: --max-kld, --max-kld-ratio.")


def _card(candidate: Candidate) -> Iterator[Finding]:
    """The cards are there, and carry licence and gating of the base model."""
    facts = candidate.facts
    render = "gemma-gguf card DIR"
    original = facts.model.front_matter
    must = {key: value for key, value in original.items() if key in LEGAL_KEYS or key.startswith(GATING)}
    if facts.model.license is not None:
        must["license"] = facts.model.license
    for file, front in candidate.cards.items():
        if front is None:
            yield Finding(f"{file} is missing, or its front matter cannot be read", render)
            continue
        for key, value in must.items():
            if front.get(key) != value:
                shown = "nothing" if key not in front else repr(front[key])
                yield Finding(f"{file} says {shown} for {key}, the base model {value!r}", render)


def _pictures(candidate: Candidate) -> Iterator[Finding]:
    """The pictures that the card shows are there."""
    for name, picture in candidate.facts.pictures.items():
        for file, digest in ((f"{name}.svg", picture.svg_sha256), (f"{name}.png", picture.png_sha256)):
            found = candidate.local.get(f"{PICTURES}/{file}")
            if found is None or found.sha256 != digest:
                yield Finding(f"the picture {PICTURES}/{file} is missing or changed", "gemma-gguf card DIR")


def _tags(candidate: Candidate) -> Iterator[Finding]:
    """`llama-server -hf repo:TAG` must find the file of that recipe, whatever order the Hub lists files in.

    It takes the first model whose path holds TAG before a dot or a hyphen, ignoring case (find_best_model in
    common/download.cpp); so only one file of the repository may match, but for the shards of one folder.
    """
    kept = set() if candidate.prune else set(candidate.remote.files)
    names = kept | set(candidate.local) | {part.name for e in candidate.facts.files for part in e.parts}
    models = [name for name in sorted(names) if is_model(name)]
    for entry in candidate.facts.files:
        if entry.kind != "model" or entry.recipe is None:
            continue
        pattern = re.compile(rf"{re.escape(entry.recipe)}[.-]", re.IGNORECASE)
        own = _folder(entry.name)
        wrong = [name for name in models if pattern.search(name) and _folder(name) != own]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            yield Finding(
                f"the tag {entry.recipe} is ambiguous: it names {entry.name}, and {wrong[0]}{more} matches it, too",
                "Delete what is not in the set with --prune, or choose another --name ORG/MODEL for the set.",
            )


def _folder(name: str) -> str:
    """What the shards of one file have in common: their folder, or the name of a file alone."""
    return name.rpartition("/")[0] or name


# What a set must pass before its first byte is sent; a new gate is a function and its name here.
GATES: tuple[Gate, ...] = (_demo, _whole, _published, _size, _keys, _checked, _quality, _card, _pictures, _tags)
# What is known before a set is made.
GATES_BEFORE: tuple[Gate, ...] = (_demo,)
# Of files that are sent while the rest of their set is still to be made.
GATES_OF_FILES: tuple[Gate, ...] = (_demo, _whole, _size, _keys, _checked, _quality, _tags)


def refusals(candidate: Candidate, checks: Iterable[Gate] = GATES) -> list[Finding]:
    """Everything that forbids publishing this set; empty when it may be sent."""
    return [finding for gate in checks for finding in gate(candidate)]


def warnings(candidate: Candidate) -> list[Finding]:
    """What a publisher should know, and may accept."""
    facts = candidate.facts
    found = [
        Finding(f"{name} has {local.n_bytes:,} bytes; the Hub recommends files below {LARGE_FILE:,}")
        for name, local in candidate.local.items()
        if LARGE_FILE < local.n_bytes <= MAX_FILE
    ]
    models = [entry for entry in facts.files if entry.kind == "model"]
    made = {entry.recipe for entry in models}
    if missing := [name for name in facts.recipes if name not in made]:
        found.append(Finding(f"not made: {', '.join(missing)}; the card says so"))
    unmeasured = [e.name for e in models if (known := facts.evidence.get(e.sha256)) is None or known.quality is None]
    if unmeasured:
        found.append(Finding(f"quality not measured: {len(unmeasured)} of {len(models)} files; the card says so"))
    return found


def refuse(found: Sequence[Finding], repo: str) -> None:
    """Raise one error with everything that forbids publishing; nothing when nothing does."""
    if not found:
        return
    error = VerificationError if len(found) > 1 else BadInputError
    if len(found) == 1:
        raise error(f"not published: {found[0].what}", next_step=found[0].next_step)
    steps = dict.fromkeys(finding.next_step for finding in found if finding.next_step)
    listed = "\n".join(f"  {finding.what}" for finding in found)
    raise error(
        f"{len(found)} things forbid publishing to {repo}:\n{listed}",
        next_step="mend these first.\n" + "\n".join(f"  {step}" for step in steps),
    )
