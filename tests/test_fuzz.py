"""Fuzzing finds nothing: three seconds of it here, the long campaigns in `make proof`; and what it once found."""

import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import GGUFValueType as V

from gemma_gguf.errors import BadInputError
from tests import examples, fuzz
from tests.fuzz import READERS, Findings, HangError, Reader, UnprintableError, packed
from tests.test_gguf_io import _array, _gguf, _key

SECONDS = os.environ.get("GEMMA_GGUF_FUZZ_SECONDS", "600")


def _campaign(reader: str, seconds: str, seed: int, corpus: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.fuzz", reader, "--seconds", seconds, "--seed", str(seed)]
    done = subprocess.run(
        [*command, "--corpus", str(corpus)], cwd=fuzz.ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    line = done.stdout.splitlines()[-1]
    print(line)
    result = json.loads(line)
    assert isinstance(result, dict)
    assert done.returncode == (1 if result["findings"] else 0)
    return result


@pytest.mark.proof
@pytest.mark.parametrize("reader", READERS)
def test_fuzz(reader: str, tmp_path: Path) -> None:
    """As long as GEMMA_GGUF_FUZZ_SECONDS says, with a seed of its own each time; the line says what was done."""
    assert _campaign(reader, SECONDS, time.time_ns() % 2**31, tmp_path)["findings"] == []


@pytest.mark.proof
@pytest.mark.parametrize("reader", READERS)
def test_three_seconds(reader: str, tmp_path: Path) -> None:
    result = _campaign(reader, "3", 1, tmp_path)
    assert result["findings"] == []
    assert result["executions"] > 10  # each manifest is rendered, too
    assert result["edges"] > 40


@pytest.mark.parametrize("reader", READERS)
def test_seeds_are_taken(reader: str, tmp_path: Path) -> None:
    """The fuzzer starts from what is whole; of the logs each seed is for one of the parsers only."""
    errors = [fuzz.execute(READERS[reader], data, tmp_path) for data in READERS[reader].seeds(tmp_path)]
    assert errors
    assert all(error is None or reader == "logs" for error in errors)
    assert None in errors


# --- what was found ----------------------------------------------------------------------------------------------

DIGITS = b"9" * 5000  # Python's int() takes 4300


@dataclass(frozen=True)
class Found:
    """An input that was a finding, and what is said of it now: a pattern of the error, `^$` when it is taken."""

    reader: str
    data: bytes | Callable[[], bytes]
    says: str


def _safetensors(header: object) -> bytes:
    text = json.dumps(header).encode()
    return packed(model_safetensors=struct.pack("<Q", len(text)) + text)


def _sized(*shape: object) -> bytes:
    return _safetensors({"a": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}})


def _card(yaml: str) -> bytes:
    return packed(README_md=f"---\n{yaml}\n---\n")


def _manifest(place: str, token: str) -> bytes:
    """The example's JSON with `token`, as it stands, at a place such as `files.3.n_bytes`."""
    raw = json.loads(examples.example().model_dump_json())
    *steps, last = place.split(".")
    node = raw
    for step in steps:
        node = node[int(step) if isinstance(node, list) else step]
    node[last] = "@@"
    return json.dumps(raw).replace('"@@"', token).encode()


def _measured(token: str) -> bytes:
    """The example's JSON with `token` as the standard error of a divergence."""
    return _manifest(f"evidence.{examples.sha(f'{examples.STEM}-Q4_K_M.gguf')}.quality.kld.se", token)


def _aliases() -> str:
    lines = (f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(12))
    return "\n".join(["a0: &a0 [x]", *lines])


DRY_RUN, WHOLE_NUMBER = "llama-quantize --dry-run", int("9" * 4300)
NESTED = "[" * 300 + "]" * 300
FOUND = {
    "dry-run: index of 5000 digits": Found("logs", b"[ %b/1] a - [1], type = f32, size = 1 MiB\n" % DIGITS, DRY_RUN),
    "dry-run: total of 5000 digits": Found("logs", b"[ 1/%b] a - [1], type = f32, size = 1 MiB\n" % DIGITS, DRY_RUN),
    "dry-run: shape of 5000 digits": Found("logs", b"[1/1] a - [%b], type = f32, size = 1 MiB\n" % DIGITS, DRY_RUN),
    "ninja: 5000 digits": Found("logs", b"[1/%b] Linking\n" % DIGITS, DRY_RUN),
    "version: build of 5000 digits": Found("logs", b"version: 0.5 (build %b, commit a)" % DIGITS, DRY_RUN),
    "version: 5000 digits": Found("logs", b"version: %b (a)" % DIGITS, DRY_RUN),
    "manifest: infinity as 1e999": Found(
        "manifest", _manifest("model.front_matter.language", "1e999"), r"quantset\.json"
    ),
    "manifest: 300 lists in each other": Found(
        "manifest", _manifest("model.front_matter.language", NESTED), r"quantset\.json"
    ),
    "manifest: an error below zero": Found(
        "manifest", _measured("-0.5"), r"kld\.se: Input should be greater than or equal"
    ),
    "manifest: an error of 1e308": Found("manifest", _measured("1e308"), r"kld\.se: Input should be less than"),
    "manifest: an error of 5e-324": Found("manifest", _measured("5e-324"), "^$"),
    "manifest: 10^400 bytes": Found("manifest", _manifest("files.3.n_bytes", "1" + "0" * 400), r"files\.3\.n_bytes"),
    "manifest: a sum of 4301 digits": Found(
        "manifest", _manifest("files.3.fallbacks", json.dumps({"a": WHOLE_NUMBER, "b": WHOLE_NUMBER})), "fallbacks"
    ),
    "manifest: an option without its value": Found(
        "manifest", _manifest("files.3.flags", '["--pure"]'), r"files\.3\.flags"
    ),
    "manifest: a ratio of 1e305": Found("manifest", _manifest("gates.max_kld_ratio", "1e305"), "^$"),
    "template: not UTF-8": Found("safetensors", packed(chat_template_jinja=b"\xff"), r"chat_template\.jinja"),
    "template: half a surrogate pair": Found(
        "safetensors", packed(tokenizer_config_json='{"chat_template": "\\ud800"}'), r"tokenizer_config\.json"
    ),
    "template: a list as its name": Found(
        "safetensors",
        packed(tokenizer_config_json='{"chat_template": [{"name": [], "template": "x"}]}'),
        r"^$|tokenizer_config\.json",
    ),
    "config: half a surrogate pair as architecture": Found(
        "safetensors", packed(config_json='{"architectures": ["\\ud800"]}'), r"config\.json|architecture"
    ),
    "index: half a surrogate pair as shard": Found(
        "safetensors", packed(model_safetensors_index_json='{"weight_map": {"a": "\\ud800"}}'), "model"
    ),
    "index: half a surrogate pair as tensor": Found(
        "safetensors",
        packed(model_safetensors_index_json='{"weight_map": {"\\ud800": "model.safetensors"}}'),
        "model",
    ),
    "shape: text times a number": Found("safetensors", _sized("ab", 10**12), r"model\.safetensors"),
    "shape: more elements than JSON can say": Found(
        "safetensors", _sized(WHOLE_NUMBER, WHOLE_NUMBER), r"model\.safetensors"
    ),
    "shape: minutes of multiplication": Found(
        "safetensors", lambda: _sized(*[WHOLE_NUMBER] * 460), r"model\.safetensors"
    ),
    "card: an integer of no digits": Found("safetensors", _card("a: !!int ''"), "^$"),
    "card: a float of no digits": Found("safetensors", _card("a: !!float ''"), "^$"),
    "card: a truth value that is none": Found("safetensors", _card("a: !!bool x"), "^$"),
    "card: a time that is none": Found("safetensors", _card("a: !!timestamp x"), "^$"),
    "card: 300 lists in each other": Found("safetensors", _card(f"a: {NESTED}"), "^$"),
    "card: aliases of aliases": Found("safetensors", _card(_aliases()), "^$"),
    "gguf: an alignment of 16 million bytes": Found(
        "gguf",
        lambda: _gguf([_key("general.alignment", V.ARRAY, _array(V.UINT8, 16_000_000, bytes(16_000_000)))]),
        r"general\.alignment",
    ),
}


@pytest.mark.parametrize("found", [pytest.param(found, id=name) for name, found in FOUND.items()])
def test_what_was_found_is_answered_now(found: Found, tmp_path: Path) -> None:
    data = found.data if isinstance(found.data, bytes) else found.data()
    with fuzz.limits():
        error = fuzz.execute(READERS[found.reader], data, tmp_path)
    assert re.search(found.says, error.what if error else "")


# --- the net has no holes ----------------------------------------------------------------------------------------


def _reader(read: Callable[[], object]) -> Reader:
    def call(data: bytes, directory: Path) -> None:
        read()

    return Reader(call, lambda directory: [], lambda data, rng: data, 10)


def _spin() -> None:
    while True:
        pass


def _refuse() -> None:
    raise BadInputError("\ud800")


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        pytest.param(_spin, HangError, id="hang"),
        pytest.param(lambda: bytearray(2 * 10**9), MemoryError, id="memory"),
        pytest.param([].pop, IndexError, id="exception"),
        pytest.param(_refuse, UnprintableError, id="unprintable"),
    ],
)
def test_a_finding_is_kept_once(
    read: Callable[[], object], kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "MAX_SECONDS", 0.2)
    kept = Findings(tmp_path)
    for data in (b"first", b"second"):
        with pytest.raises(kind) as caught, fuzz.limits():
            fuzz.execute(_reader(read), data, tmp_path)
        kept.add(caught.value, data)
    (finding,) = Findings(tmp_path).read()
    assert finding.exception == kind.__name__
    assert (tmp_path / finding.file).read_bytes() == b"first"
    assert kind.__name__ in (tmp_path / f"{finding.file}.txt").read_text()


def test_a_campaign_goes_on_when_a_worker_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is killed leaves its input as a finding, another one takes its place."""
    program = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv[4])
number = len(list(folder.glob("worker-*")))
(folder / f"worker-{number}").touch()
print("#7\\tNEW    cov: 3 ft: 3", file=sys.stderr, flush=True)
if number < 2:
    (folder / "findings" / f"crash-{number}").write_bytes(b"killer")
    os.kill(os.getpid(), 9)
"""
    monkeypatch.setattr(fuzz, "WORKER", program)
    result = fuzz.campaign("logs", 30, 1, tmp_path)
    assert [Path(finding["file"]).name for finding in result["findings"]] == ["death-crash-0", "death-crash-1"]
    assert [finding["exception"] for finding in result["findings"]] == ["exit code -9"] * 2
    assert Path(result["findings"][0]["file"]).read_bytes() == b"killer"
    assert (result["executions"], result["edges"]) == (21, 3)
