"""Which text the imatrix is computed from, and which text quality is measured on.

Consumes a name: `default` (the mix in `calibration/`, ours, CC0), a file of the user's, or a well-known public set
that is fetched when the network allows. Produces a `Text` with its hash. The mix and the held-out text are disjoint:
no sequence of eight words stands twice in the two together (tests check it). Documents of all parts are interleaved,
so that the first chunks of either text already hold every kind: `--chunks` cuts depth, not variety.
"""

import difflib
import http.client
import random
import re
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_gguf.errors import BadInputError, GemmaGGUFError
from gemma_gguf.files import is_file, sha256_bytes, write_atomic
from gemma_gguf.gemma import Turns
from gemma_gguf.resources import CALIBRATION

SEPARATOR = "\n%%%%\n"  # between documents of one part
MAX_FETCHED = 100_000_000  # bytes of a public set; they have some 0.3 MB
SPLITS = ("mix", "heldout")
TURN = re.compile(r"<start_of_turn>(\w+)\n(.*?)<end_of_turn>", re.DOTALL)  # in the parts of kind `chat`
CONTINUE = "Continue this text:"

Conversation = list[dict[str, str]]  # messages with `role` and `content`


@dataclass(frozen=True)
class Part:
    """One file of `calibration/`: `split/kind-name.txt`, as its row in `parts.toml` says."""

    split: str
    name: str
    kind: str
    n_documents: int
    n_bytes: int
    sha256: str

    @property
    def path(self) -> Path:
        return CALIBRATION / self.split / f"{self.name}.txt"


@dataclass(frozen=True)
class Text:
    """A calibration or held-out text: what it is called, where it came from, its UTF-8 bytes."""

    name: str
    source: str
    data: bytes

    @property
    def sha256(self) -> str:
        return sha256_bytes(self.data)

    @property
    def file_name(self) -> str:
        """The bare name that ends in the GGUF key `quantize.imatrix.dataset`."""
        return f"calibration-{self.name}.txt"


@dataclass(frozen=True)
class PublicSet:
    """A text that others publish: a plain URL, or a file of a Hub dataset repository."""

    about: str
    url: str = ""
    hub_repo: str = ""
    hub_file: str = ""


PUBLIC_SETS = {
    "bartowski-v3": PublicSet(
        "bartowski's calibration_datav3, used for most of his sets",
        url="https://gist.githubusercontent.com/bartowski1182/eb213dccb3571f863da82e99418f81e8/raw/calibration_datav3.txt",
    ),
    "groups-merged": PublicSet(
        "kalomaze's groups_merged, short and very mixed", hub_repo="froggeric/imatrix", hub_file="groups_merged.txt"
    ),
    "technical": PublicSet("froggeric's technical text", hub_repo="froggeric/imatrix", hub_file="technical.txt"),
}


def parts(split: str | None = None) -> list[Part]:
    """The rows of `parts.toml`, of one split or of both."""
    table = tomllib.loads((CALIBRATION / "parts.toml").read_text(encoding="utf-8"))
    rows = [Part(**row) for row in table["part"]]
    return [row for row in rows if split in (None, row.split)]


def scan_parts() -> list[Part]:
    """What `parts.toml` should say: one row for every file that is there."""
    found = []
    for split in SPLITS:
        for path in sorted((CALIBRATION / split).glob("*.txt")):
            data = path.read_bytes()
            documents = data.decode("utf-8").count(SEPARATOR) + 1
            kind = path.stem.partition("-")[0]
            found.append(Part(split, path.stem, kind, documents, len(data), sha256_bytes(data)))
    return found


def write_table() -> Path:
    """Write `parts.toml` anew from the files; for whoever edits the texts (`make calibration-table`)."""
    lines = [
        "# The parts of the calibration mix and of the held-out text; `make calibration-table` writes this file.\n"
    ]
    for part in scan_parts():
        lines.append(
            f'[[part]]\nsplit = "{part.split}"\nname = "{part.name}"\nkind = "{part.kind}"\n'
            f'n_documents = {part.n_documents}\nn_bytes = {part.n_bytes}\nsha256 = "{part.sha256}"\n'
        )
    table = CALIBRATION / "parts.toml"
    write_atomic(table, "\n".join(lines))
    return table


def _documents(split: str, kind: str | None = None) -> list[str]:
    """All documents of a split, or of one kind, in a fixed order that keeps every kind spread over the whole length.

    Each document gets a place at an even distance within its kind, shifted by a seeded random number.
    """
    by_kind: dict[str, list[str]] = {}
    for part in parts(split):
        if kind not in (None, part.kind):
            continue
        by_kind.setdefault(part.kind, []).extend(_text_of(part).split(SEPARATOR))
    placed: list[tuple[float, str]] = []
    rng = random.Random(20261122)
    for documents in by_kind.values():
        rng.shuffle(documents)
        offset = rng.random()
        placed += [((i + offset) / len(documents), text) for i, text in enumerate(documents)]
    placed.sort()
    return [text.strip("\n") for _, text in placed]


def part_documents(split: str) -> dict[str, str]:
    """{`lang-ja/3`: text} of every document of a split: what is in it, not in what order it is read."""
    found: dict[str, str] = {}
    for part in parts(split):
        documents = _text_of(part).split(SEPARATOR)
        found |= {f"{part.name}/{number}": text for number, text in enumerate(documents, start=1)}
    return found


def _text_of(part: Part) -> str:
    data = part.path.read_bytes()
    if sha256_bytes(data) != part.sha256:
        raise BadInputError(
            f"{part.path} is not the text that calibration/parts.toml names",
            next_step="Restore it, or write the table anew with: make calibration-table",
        )
    return data.decode("utf-8").strip("\n")


def _interleaved(split: str) -> Text:
    data = _joined(_documents(split))
    return Text("default" if split == "mix" else "heldout", f"gemma-gguf calibration/{split}", data)


def _joined(documents: Iterable[str]) -> bytes:
    return ("\n\n".join(documents) + "\n").encode("utf-8")


def in_turns(split: str, write: Callable[[list[Conversation]], Sequence[str]], how: str) -> Text:
    """A split with its conversations as `write` makes text of them; they are stored in the turns of Gemma 1 to 3.

    `how` says in what turns they are, for the text's `source`; a text that stays as it is stored keeps that, too.
    """
    stored = _interleaved(split)
    documents = _documents(split)
    talks = [number for number, document in enumerate(documents) if TURN.match(document)]
    for number, text in zip(talks, write([_conversation(documents[number]) for number in talks]), strict=True):
        documents[number] = text.strip("\n")
    data = _joined(documents)
    return stored if data == stored.data else replace(stored, source=f"{stored.source}, {how}", data=data)


def turns_of(turns: Turns | None, conversations: Iterable[Conversation]) -> list[str]:
    """Conversations in the turns of a family; as paragraphs where it takes none."""
    if turns is None:
        return ["\n\n".join(message["content"] for message in messages) for messages in conversations]
    roles = {"assistant": "model"}
    return [
        "".join(
            f"{turns.opening}{roles.get(message['role'], message['role'])}\n{message['content']}{turns.closing}\n"
            for message in messages
        )
        for messages in conversations
    ]


def kinds() -> list[str]:
    """The kinds of text in the mix: `lang`, `code`, `prose`, ..."""
    return sorted({part.kind for part in parts("mix")})


def of_kind(kind: str) -> Text:
    """The documents of the mix that are of one kind."""
    joined = "\n\n".join(_documents("mix", kind)) + "\n"
    return Text(kind, f"gemma-gguf calibration/mix/{kind}-*", joined.encode("utf-8"))


def from_file(path: Path) -> Text:
    """A text of the user's. Raises `BadInputError` when there is none, or when it is empty or not UTF-8."""
    if not is_file(path):
        raise BadInputError(f"there is no text {path}", next_step="Give the path of a text file.")
    return _checked(Text(_safe_stem(path), path.name, path.read_bytes()), path)


def held_out() -> Text:
    """The text that quality is measured on; never part of any imatrix of ours."""
    return _interleaved("heldout")


def held_out_conversations() -> list[Conversation]:
    """The same documents as conversations that begin with `user` and end with `assistant`, in the same order.

    Those written in turns are taken as they are. Of any other document the user brings the first third, and the model
    goes on with the rest.
    """
    return [_conversation(document) for document in _documents("heldout")]


def _conversation(document: str) -> Conversation:
    if turns := TURN.findall(document):
        roles = {"model": "assistant"}
        return [{"role": roles.get(role, role), "content": text.strip()} for role, text in turns]
    third = len(document) // 3
    space = re.compile(r"\s").search(document, third, 2 * third)  # some scripts have none
    cut = space.start() if space else third
    opening, rest = document[:cut].strip(), document[cut:].strip()
    return [{"role": "user", "content": f"{CONTINUE}\n\n{opening}"}, {"role": "assistant", "content": rest}]


def load(name: str, download_dir: Path) -> Text:
    """The calibration text called `name`: `default`, a public set, or a file.

    Raises `BadInputError` for an unknown name (with the nearest ones), an empty file, or bytes that are not UTF-8;
    `GemmaGGUFError` when a public set cannot be fetched.
    """
    if name == "default":
        return _interleaved("mix")
    if name in PUBLIC_SETS:
        return _fetch(name, PUBLIC_SETS[name], download_dir)
    path = Path(name)
    if not is_file(path):
        known = ["default", *PUBLIC_SETS]
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
        meant = f"Did you mean {' or '.join(near)}? " if near else ""
        raise BadInputError(
            f"there is no calibration file or set called {name!r}",
            next_step=f"{meant}Give a text file or one of: {', '.join(known)}.",
        )
    return from_file(path)


def _safe_stem(path: Path) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in path.stem)[:80] or "text"


def _checked(text: Text, where: Path | str) -> Text:
    try:
        if not text.data.decode("utf-8").strip():
            raise BadInputError(f"the calibration text {where} is empty", next_step="Give a file with some text in it.")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"the calibration text {where} is not UTF-8 ({error.reason} at byte {error.start})",
            next_step="Convert it, for example with iconv -t UTF-8.",
        ) from error
    return text


def _fetch(name: str, public: PublicSet, download_dir: Path) -> Text:
    if public.url:
        source = public.url
        target = download_dir / f"{name}.txt"
        if not target.is_file():
            try:
                with urllib.request.urlopen(public.url, timeout=60) as answer:
                    data = answer.read(MAX_FETCHED + 1)
                    lost = answer.length
                if len(data) > MAX_FETCHED:
                    raise BadInputError(
                        f"{public.url} sends more than the {MAX_FETCHED:,} bytes that are read",
                        next_step="Use --calibration default or a file of your own.",
                    )
                if lost:  # a read with a limit does not tell of a connection that broke off
                    raise http.client.IncompleteRead(data, lost)
                write_atomic(target, data)
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                raise _unreachable(name, source, error) from error
        return _checked(Text(name, source, target.read_bytes()), source)
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - slow to import, needed for public sets alone
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    source = f"hf.co/datasets/{public.hub_repo}/{public.hub_file}"
    try:
        path = hf_hub_download(public.hub_repo, public.hub_file, repo_type="dataset")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _unreachable(name, source, error) from error
    return _checked(Text(name, source, Path(path).read_bytes()), source)


def _unreachable(name: str, source: str, error: Exception) -> GemmaGGUFError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return GemmaGGUFError(
        f"the calibration set {name} cannot be fetched from {source}: {reason}",
        next_step="Check the network, or use --calibration default or a file of your own.",
    )
