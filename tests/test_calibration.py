"""The calibration mix and the held-out text, and texts of the user's or of others."""

import gc
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from gemma_gguf import calibration, chat, gemma, prompts
from gemma_gguf.calibration import PublicSet, Text
from gemma_gguf.errors import BadInputError, GemmaGGUFError
from gemma_gguf.files import sha256_bytes
from tests import checkpoints, gemma4
from tests.hub import DATASET, client_environment, serving

REPO = Path(__file__).parents[1]
KINDS = {"lang", "code", "math", "data", "prose", "chat"}
FILES = sorted((REPO / "calibration").glob("*/*.txt"))
# Kinds of code that are no programming languages.
NOT_PROGRAMMING = {"code-html", "code-diff", "code-build"}


def documents(path: Path) -> list[str]:
    """The documents of one part, cut at the lines that separate them."""
    found: list[list[str]] = [[]]
    for line in path.read_text(encoding="utf-8").splitlines():
        if line == "%%%%":
            found.append([])
        else:
            found[-1].append(line)
    return ["\n".join(lines).strip("\n") for lines in found]


# --- the parts ---------------------------------------------------------------------------------------------------


def test_the_table_says_what_is_there() -> None:
    assert calibration.parts() == calibration.scan_parts()
    assert [(part.split, part.path) for part in calibration.parts()] == [
        (path.parent.name, path) for split in ("mix", "heldout") for path in FILES if path.parent.name == split
    ]
    assert [part.n_documents for part in calibration.parts()] == [
        len(documents(part.path)) for part in calibration.parts()
    ]


def test_the_table_is_written_from_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (REPO / "calibration" / "parts.toml").read_text(encoding="utf-8")
    monkeypatch.setattr(calibration, "CALIBRATION", shutil.copytree(REPO / "calibration", tmp_path / "calibration"))
    (tmp_path / "calibration" / "parts.toml").unlink()
    assert calibration.write_table() == tmp_path / "calibration" / "parts.toml"
    assert (tmp_path / "calibration" / "parts.toml").read_text(encoding="utf-8") == before


@pytest.mark.parametrize(("split", "least"), [("mix", 100_000), ("heldout", 30_000)])
def test_how_much_text_there_is(split: str, least: int) -> None:
    parts = calibration.parts(split)
    assert sum(part.n_bytes for part in parts) >= least
    assert {part.kind for part in parts} == KINDS
    assert all(part.split == split for part in parts)


def test_many_languages_of_people() -> None:
    languages = [p for p in calibration.parts("mix") if p.kind == "lang"]
    assert len(languages) >= 20
    assert [part.name for part in languages if part.n_bytes < 1000] == []
    assert [part.name for part in languages if not re.fullmatch(r"lang-[a-z]{2}(-Han[st])?", part.name)] == []


def test_many_languages_of_machines() -> None:
    for split in calibration.SPLITS:
        code = {p.name for p in calibration.parts(split) if p.kind == "code"} - NOT_PROGRAMMING
        assert len(code) >= 10


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.name.startswith("chat-")], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_chats_are_made_of_gemmas_turns(path: Path) -> None:
    turn = r"<start_of_turn>(user|model)\n(?:(?!<start_of_turn>|<end_of_turn>).)+<end_of_turn>\n?"
    for document in documents(path):
        assert re.fullmatch(f"({turn})+", document, re.DOTALL), document[:200]
        speakers = [match[1] for match in re.finditer(turn, document, re.DOTALL)]
        assert speakers == ["user", "model"] * (len(speakers) // 2)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_part_is_clean_text(path: Path) -> None:
    data = path.read_bytes()
    text = data.decode("utf-8")
    assert data.endswith(b"\n")
    assert not data.endswith(b"\n\n\n")
    assert b"\r" not in data
    assert b"\0" not in data
    assert "\ufeff" not in text
    assert "\ufffd" not in text
    assert re.findall(r"^\t+$", text, re.MULTILINE) == []
    assert all(documents(path)), "a document is empty"


# --- conversations in a model's turns ------------------------------------------------------------------------------


def rendered(template: str) -> Callable[[list[calibration.Conversation]], list[str]]:
    """By the template, in the way of transformers, without the first token."""
    return lambda talks: [
        text.removeprefix("<bos>")
        for text in chat.render_many(
            template, talks, add_generation_prompt=False, bos_token="<bos>", eos_token="<eos>", now=prompts.NOW
        )
    ]


@pytest.mark.parametrize("split", calibration.SPLITS)
@pytest.mark.parametrize(
    "write",
    [rendered(checkpoints.CHAT_TEMPLATE), lambda talks: calibration.turns_of(gemma.GEMMA_TURNS, talks)],
    ids=["template", "family"],
)
def test_in_gemmas_own_turns_the_text_is_as_it_is_stored(
    split: str, write: Callable[[list[calibration.Conversation]], list[str]]
) -> None:
    stored = calibration.load("default", Path("unused")) if split == "mix" else calibration.held_out()
    assert calibration.in_turns(split, write, "said nowhere") == stored


@pytest.mark.parametrize(
    "write",
    [rendered(gemma4.CHAT_TEMPLATE), lambda talks: calibration.turns_of(gemma.GEMMA4_TURNS, talks)],
    ids=["template", "family"],
)
def test_gemma_4_reads_conversations_in_its_own_turns(
    write: Callable[[list[calibration.Conversation]], list[str]],
) -> None:
    stored = calibration.load("default", Path("unused"))
    text = calibration.in_turns("mix", write, "conversations in turns")
    assert (text.name, text.source) == ("default", f"{stored.source}, conversations in turns")
    assert text.sha256 != stored.sha256
    written = text.data.decode("utf-8")
    assert "_of_turn>" not in written
    back = written.replace("<|turn>", "<start_of_turn>").replace("<turn|>", "<end_of_turn>")
    assert back == stored.data.decode("utf-8")


def test_a_model_without_turns_reads_paragraphs() -> None:
    talk = [{"role": "user", "content": "Which one?"}, {"role": "assistant", "content": "That one."}]
    assert calibration.turns_of(None, [talk]) == ["Which one?\n\nThat one."]
    written = calibration.in_turns("mix", lambda talks: calibration.turns_of(None, talks), "as paragraphs")
    assert b"_of_turn>" not in written.data


# --- nothing twice -----------------------------------------------------------------------------------------------


def whitespace_words(text: str) -> list[str]:
    return text.split()


def letters_and_digits(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def unspaced_characters(text: str) -> list[str]:
    """Characters of scripts that put no spaces between words: Thai, Lao, Khmer, kana, Han."""
    return re.findall("[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]", text)


def windows(row: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    """Every sequence of `length` units that stand in a row."""
    return zip(*(row[start:] for start in range(length)), strict=False)


def repeats(texts: Mapping[str, str], units: Callable[[str], list[str]], length: int) -> list[str]:
    """Every sequence of `length` units that stands twice in the texts together, with both places."""
    seen: dict[tuple[str, ...], str] = {}
    found = []
    for name, text in texts.items():
        for window in windows(units(text), length):
            if window in seen:
                found.append(f"{seen[window]} and {name}: {' '.join(window)}")
            seen[window] = name
    return found


UNITS = pytest.mark.parametrize(
    ("units", "length"),
    [(whitespace_words, 8), (letters_and_digits, 8), (unspaced_characters, 14)],
    ids=["words", "words without marks", "characters"],
)


@UNITS
def test_nothing_stands_twice_in_both_splits_together(units: Callable[[str], list[str]], length: int) -> None:
    texts = {f"{path.parent.name}/{path.stem}": path.read_text(encoding="utf-8") for path in FILES}
    assert repeats(texts, units, length) == []


@UNITS
def test_a_repeat_would_be_found(units: Callable[[str], list[str]], length: int) -> None:
    """The search itself: one sequence copied from the mix into the held-out text."""
    part = "lang-ja" if units is unspaced_characters else "prose-essays"
    row = units((REPO / "calibration" / "mix" / f"{part}.txt").read_text(encoding="utf-8"))
    copied = ("" if units is unspaced_characters else " ").join(row[20 : 20 + length])
    texts = {path.stem: path.read_text(encoding="utf-8") for path in FILES if path.stem in {part, "math-proofs"}}
    found = repeats({**texts, "copy": f"new {copied} end"}, units, length)
    assert found == [f"{part} and copy: {' '.join(row[20 : 20 + length])}"]


# --- the two texts -----------------------------------------------------------------------------------------------


def text_of(split: str) -> Text:
    return calibration.load("default", Path("unused")) if split == "mix" else calibration.held_out()


@pytest.mark.parametrize(
    ("split", "name", "file_name"),
    [("mix", "default", "calibration-default.txt"), ("heldout", "heldout", "calibration-heldout.txt")],
)
def test_a_text_is_the_same_every_time(split: str, name: str, file_name: str) -> None:
    text = text_of(split)
    assert text == text_of(split)
    assert (text.name, text.source, text.file_name) == (name, f"gemma-gguf calibration/{split}", file_name)
    assert text.sha256 == sha256_bytes(text.data)


@pytest.mark.parametrize("split", ["mix", "heldout"])
def test_a_text_does_not_depend_on_the_process(split: str) -> None:
    code = (
        "from pathlib import Path; from gemma_gguf import calibration as c; "
        f"print((c.held_out() if {split!r} == 'heldout' else c.load('default', Path('x'))).sha256)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == text_of(split).sha256


@pytest.mark.parametrize("split", ["mix", "heldout"])
def test_a_text_holds_every_document_once(split: str) -> None:
    text = text_of(split).data.decode("utf-8")
    everything = [document for path in FILES if path.parent.name == split for document in documents(path)]
    assert sorted(text.count(document) for document in everything) == [1] * len(everything)
    assert "%%%%" not in text
    # Nothing but these, with an empty line between them.
    assert len(text) == sum(map(len, everything)) + 2 * (len(everything) - 1) + 1
    assert text.endswith("\n")


@pytest.mark.parametrize("split", ["mix", "heldout"])
@pytest.mark.parametrize("tenth", range(10))
def test_every_tenth_of_a_text_holds_every_kind(split: str, tenth: int) -> None:
    text = text_of(split).data.decode("utf-8")
    start, end = len(text) * tenth // 10, len(text) * (tenth + 1) // 10
    inside: dict[str, int] = defaultdict(int)
    for path in FILES:
        for document in documents(path) if path.parent.name == split else ():
            at = text.index(document)
            inside[path.stem.partition("-")[0]] += max(0, min(at + len(document), end) - max(at, start))
    assert {kind for kind, n_characters in inside.items() if n_characters > 0} == KINDS


def test_a_changed_part_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CALIBRATION", shutil.copytree(REPO / "calibration", tmp_path / "calibration"))
    changed = tmp_path / "calibration" / "mix" / "lang-de.txt"
    changed.write_bytes(changed.read_bytes() + b"neu\n")
    with pytest.raises(BadInputError) as caught:
        calibration.load("default", tmp_path)
    assert caught.value.what == f"{changed} is not the text that calibration/parts.toml names"
    assert "make calibration-table" in (caught.value.next_step or "")
    assert calibration.held_out().data  # the other split is whole
    calibration.write_table()
    assert "neu" in calibration.load("default", tmp_path).data.decode("utf-8")


# --- a text of the user's ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("mine.txt", "mine"),
        ("my text (2).md", "my_text__2_"),
        ("größe.txt", "größe"),
        ("x" * 120 + ".txt", "x" * 80),
        ("no-suffix", "no-suffix"),
    ],
)
def test_a_file_of_the_users(file: str, name: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes("Grüße\r\n".encode())
    text = calibration.load(str(tmp_path / file), tmp_path / "downloads")
    assert text == Text(name, file, "Grüße\r\n".encode())
    assert text.file_name == f"calibration-{name}.txt"
    assert not (tmp_path / "downloads").exists()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("defualt", "Did you mean default? "),
        ("groups-merge", "Did you mean groups-merged? "),
        ("bartowski-v5", "Did you mean bartowski-v3? "),
        ("tecnical", "Did you mean technical or default? "),
        ("/nowhere/at/all.txt", ""),
        ("y" * 300, ""),
    ],
    ids=["default", "groups", "bartowski", "technical", "path", "too long for a file name"],
)
def test_an_unknown_name(name: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError) as caught:
        calibration.load(name, tmp_path)
    assert caught.value.what == f"there is no calibration file or set called {name!r}"
    assert caught.value.next_step == (
        f"{meant}Give a text file or one of: default, bartowski-v3, groups-merged, technical."
    )


def test_a_directory_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="there is no calibration file or set called"):
        calibration.load(str(tmp_path), tmp_path)


@pytest.mark.parametrize("data", [b"", b" \n\t\n", "\u3000\n".encode()], ids=["nothing", "blanks", "wide blanks"])
def test_an_empty_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(data)
    with pytest.raises(BadInputError) as caught:
        calibration.load(str(path), tmp_path)
    assert caught.value.what == f"the calibration text {path} is empty"


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(BadInputError) as caught:
        calibration.load(str(path), tmp_path)
    assert caught.value.what == f"the calibration text {path} is not UTF-8 (invalid start byte at byte 2)"
    assert "iconv" in (caught.value.next_step or "")


# --- texts of others: a plain address ----------------------------------------------------------------------------


class _Page(BaseHTTPRequestHandler):
    """`/text` is whole, `/cut` ends before its announced length, `/greeting` is no HTTP, the rest is missing."""

    def do_GET(self) -> None:
        assert isinstance(self.server, _Pages)
        self.server.asked.append(self.path)
        if self.path == "/greeting":
            self.wfile.write(b"220 mail server ready\r\n\r\n")
            return
        if self.path not in {"/text", "/cut"}:
            self.send_error(404)
            return
        body = b"A text of others.\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + (self.path == "/cut")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr: `asked` is the log."""


class _Pages(HTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Page)
        self.asked: list[str] = []


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Pages]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with _Pages() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nobody answers and nobody else can begin to."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{closed.getsockname()[1]}"


def test_a_public_text_is_fetched_once(pages: _Pages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{pages.server_address[1]}/text"
    monkeypatch.setitem(calibration.PUBLIC_SETS, "bartowski-v3", PublicSet("a test", url=url))
    expected = Text("bartowski-v3", url, b"A text of others.\n")
    assert calibration.load("bartowski-v3", tmp_path / "downloads") == expected
    assert calibration.load("bartowski-v3", tmp_path / "downloads") == expected
    assert pages.asked == ["/text"]
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["bartowski-v3.txt"]


@pytest.mark.parametrize("page", ["/missing", "/cut", "/greeting"])
def test_a_public_text_that_does_not_come(
    page: str, pages: _Pages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{pages.server_address[1]}{page}"
    monkeypatch.setitem(calibration.PUBLIC_SETS, "bartowski-v3", PublicSet("a test", url=url))
    with pytest.raises(GemmaGGUFError) as caught:
        calibration.load("bartowski-v3", tmp_path / "downloads")
    assert caught.value.what.startswith(f"the calibration set bartowski-v3 cannot be fetched from {url}: ")
    assert not (tmp_path / "downloads" / "bartowski-v3.txt").exists()
    # An answer that nobody closed warns when it is thrown away: here, whenever that would be otherwise.
    thrown: list[object] = [caught.value]
    thrown.append(thrown)
    del caught, thrown
    gc.collect()


def test_a_public_text_without_a_network(nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(calibration.PUBLIC_SETS, "bartowski-v3", PublicSet("a test", url=f"{nobody}/text"))
    with pytest.raises(GemmaGGUFError) as caught:
        calibration.load("bartowski-v3", tmp_path)
    assert re.fullmatch(
        rf"the calibration set bartowski-v3 cannot be fetched from {nobody}/text: .*Connection refused.*",
        caught.value.what,
    )
    assert "--calibration default" in (caught.value.next_step or "")


def test_the_address_of_the_public_text() -> None:
    assert [(name, s.url, s.hub_repo, s.hub_file) for name, s in calibration.PUBLIC_SETS.items()] == [
        (
            "bartowski-v3",
            "https://gist.githubusercontent.com/bartowski1182/eb213dccb3571f863da82e99418f81e8/raw/calibration_datav3.txt",
            "",
            "",
        ),
        ("groups-merged", "", "froggeric/imatrix", "groups_merged.txt"),
        ("technical", "", "froggeric/imatrix", "technical.txt"),
    ]


# --- texts of others: the hub ------------------------------------------------------------------------------------

# The client reads its settings when it is imported, so it runs in another process.
ASK = """
import json, sys, time, traceback
from pathlib import Path
from gemma_gguf import calibration
time.sleep = lambda seconds: None  # the client waits half a minute, all in all, between its tries
from gemma_gguf.errors import GemmaGGUFError
answers = {}
for name in sys.argv[2:]:
    try:
        text = calibration.load(name, Path(sys.argv[1]))
        answers[name] = {"name": text.name, "source": text.source, "text": text.data.decode()}
    except GemmaGGUFError as error:
        answers[name] = {"what": error.what, "next_step": error.next_step}
    except Exception:
        answers[name] = {"traceback": traceback.format_exc()}
print(json.dumps(answers))
"""


def ask(downloads: Path, environment: Mapping[str, str], *names: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-c", ASK, str(downloads), *names]
    done = subprocess.run(command, cwd=REPO, env=dict(environment), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return answers


def test_sets_of_the_hub(tmp_path: Path) -> None:
    content = tmp_path / "content"
    content.mkdir()
    (content / "groups_merged.txt").write_text("Gruppen – groups\n", encoding="utf-8")
    (content / "other.txt").write_text("not asked for\n")
    with serving() as hub:
        hub.repo("froggeric/imatrix", DATASET).commit(content, "main")
        answers = ask(tmp_path, hub.environment(tmp_path / "home"), "groups-merged", "technical")
        asked = {request.path for request in hub.requests}
    assert answers["groups-merged"] == {
        "name": "groups-merged",
        "source": "hf.co/datasets/froggeric/imatrix/groups_merged.txt",
        "text": "Gruppen – groups\n",
    }
    source = "hf.co/datasets/froggeric/imatrix/technical.txt"
    assert (
        answers["technical"]
        .get("what", answers["technical"])
        .startswith(f"the calibration set technical cannot be fetched from {source}: 404 Client Error.")
    )
    assert asked == {f"/datasets/froggeric/imatrix/resolve/main/{name}.txt" for name in ("groups_merged", "technical")}


def test_sets_of_the_hub_without_a_network(nobody: str, tmp_path: Path) -> None:
    answers = ask(tmp_path, client_environment(nobody, tmp_path / "home"), "groups-merged", "technical")
    for name, file in (("groups-merged", "groups_merged.txt"), ("technical", "technical.txt")):
        source = f"hf.co/datasets/froggeric/imatrix/{file}"
        assert (
            answers[name]
            .get("what", answers[name])
            .startswith(f"the calibration set {name} cannot be fetched from {source}: ")
        )
        assert "--calibration default" in answers[name]["next_step"]
