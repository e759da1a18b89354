"""Fuzzing of everything that reads foreign bytes: `python -m tests.fuzz READER --seconds N --seed S --corpus DIR`.

Consumes the name of a reader; produces one JSON line with what was done and found, and exit code 1 when anything was
found. The package may answer any bytes with a value or with a `GemmaGGUFError` that can be printed; another exception,
over 5 seconds for one input or over 1 GB is a finding, kept in `DIR/READER/findings` with its traceback. The engine is
atheris: libFuzzer, steered by the coverage of the package's own bytecode, with mutations that know GGUF, JSON and text.

A worker process fuzzes and goes on after each finding; this process counts, and starts another worker when one dies.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from gemma_gguf import card, coverage, gguf_io, imatrix, llama_cpp, manifest, plan, recipes, source
from gemma_gguf.errors import GemmaGGUFError
from gemma_gguf.files import HashMemory
from gemma_gguf.manifest import ModelFacts
from gemma_gguf.plan import FilePlan, PlannedTensor
from gemma_gguf.source import ModelName
from tests import checkpoints, examples, test_gguf_io, test_imatrix, test_llama_cpp, test_plan, test_recipes
from tests.test_source import safetensors_bytes

ROOT = Path(__file__).parents[1]
MAX_SECONDS = 5  # of processor time: other programs on the machine do not make a hang
MAX_BYTES = 10**9  # of address space, above what the process had at its start
WALL_SECONDS = 60  # for one input; only what sleeps or never returns to Python comes so far
MAX_WORKERS = 20  # in one campaign; a worker ends early when the interpreter itself dies


# --- the readers -------------------------------------------------------------------------------------------------

DEQUANTIZED = frozenset({"F32", "F16", "BF16", "Q8_0", "Q4_K"})


def read_gguf(data: bytes, directory: Path) -> None:
    """The header, every key, the first and last row of every tensor, and a header derived from it."""
    path = directory / "model.gguf"
    path.write_bytes(data)
    header = gguf_io.read_header(path)
    for name in header.keys:
        header.get(name)
    for _ in header.strings():
        pass
    assert header.by_name.keys() == {tensor.name for tensor in header.tensors}
    assert header.bits_per_weight >= 0
    assert sum(header.type_histogram().values()) == len(header.tensors)
    for tensor in header.tensors:
        assert header.data_start <= tensor.offset <= header.file_size - tensor.n_bytes
        for row in sorted({0, tensor.n_elements // tensor.shape[0] - 1}):
            raw = header.read(tensor, row, 1)
            if tensor.ggml_type.name in DEQUANTIZED:
                assert gguf_io.dequantize(raw, tensor.ggml_type).shape == (1, tensor.shape[0])
    plan.layout_of(header.tensors)
    table = [(tensor.name, tensor.shape, tensor.ggml_type) for tensor in header.tensors]
    gguf_io.derived_header(header, table, [("general.file_type", 7)])


# The files of a checkpoint in one input: each begins with MARK and a byte that is its place in this list.
MARK = b"\xff\xfe\xfd"
PIECES = (
    "config.json",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "adapter_config.json",
    "pytorch_model.bin",
)


def unpack(data: bytes) -> list[tuple[int, bytes]]:
    """(place in PIECES, content) of the files in an input."""
    return [(piece[0] % len(PIECES), piece[1:]) for piece in data.split(MARK) if piece]


def pack(pieces: list[tuple[int, bytes]]) -> bytes:
    return b"".join(MARK + bytes([place]) + content for place, content in pieces)


def packed(**files: bytes | str) -> bytes:
    """A small whole checkpoint as an input, with the files given in place or added: `config_json` is `config.json`."""
    names = {re.sub(r"\W", "_", name): place for place, name in enumerate(PIECES)}
    small: dict[str, bytes | str] = {
        "config_json": '{"architectures": ["Gemma3ForCausalLM"]}',
        "tokenizer_json": "{}",
        "model_safetensors": safetensors_bytes({"a": (2, 3), "b": (4,)}),
    }
    whole = {**small, **files}
    return pack([(names[name], text if isinstance(text, bytes) else text.encode()) for name, text in whole.items()])


def read_checkpoint(data: bytes, directory: Path) -> None:
    """A directory of config, index, weights and card, fetched; its facts must survive the manifest's JSON."""
    path = directory / "model"
    path.mkdir(exist_ok=True)
    for file in path.iterdir():
        file.unlink()
    for place, content in unpack(data):
        (path / PIECES[place]).write_bytes(content)
    try:
        facts = source.fetch(
            ModelName("local", "local", "model", path), directory, HashMemory(directory / "none")
        ).facts
    except GemmaGGUFError:  # perhaps before it came to the weights
        for weights in sorted(path.glob("*.safetensors")):
            with contextlib.suppress(GemmaGGUFError):
                source.read_safetensors_header(weights)
        with contextlib.suppress(GemmaGGUFError):
            source._tensor_shapes(path, source._needed_files(path))
        raise
    assert ModelFacts.model_validate(json.loads(facts.model_dump_json())) == facts


def base_header(directory: Path) -> gguf_io.Header:
    """The model that an imatrix is checked against, written on first use."""
    path = directory / "base.gguf"
    if not path.exists():
        tensors = {name: np.zeros(shape, dtype=np.float16) for name, shape in test_imatrix.BASE.items()}
        test_imatrix._write(path, {"general.type": "model"}, tensors)
    return gguf_io.read_header(path)


def read_imatrix(data: bytes, directory: Path) -> None:
    """The file, then the checks against a model, and what of it a recipe lacks."""
    path = directory / "imatrix.gguf"
    path.write_bytes(data)
    read, base = imatrix.read(path), base_header(directory)
    for n_chunks in (None, read.n_chunks, 8):
        with contextlib.suppress(GemmaGGUFError):
            imatrix.check(read, base, n_chunks=n_chunks)
    q4_k = GGMLQuantizationType.Q4_K
    planned = [PlannedTensor(tensor.name, tensor.shape, tensor.ggml_type, q4_k, q4_k) for tensor in base.tensors]
    coverage.gaps(read, base, {"Q4_K_M": FilePlan("Q4_K_M", tuple(planned))})
    imatrix.check(read, base)


def read_logs(data: bytes, directory: Path) -> None:
    """Output of llama.cpp's tools, decoded as `run_tool` does, by every parser of it."""
    text = data.decode("utf-8", errors="replace")
    for line in text.splitlines():
        llama_cpp.parse_ninja_line(line)
    llama_cpp.vendored_commit(text, "0.3.36")
    with contextlib.suppress(GemmaGGUFError):
        offered = recipes.parse_quantize_help(text)
        recipes.select(["Q4_K_M", *list(offered)[:3]], offered)
    with contextlib.suppress(GemmaGGUFError):
        llama_cpp.parse_version(text)
    promised = re.search(r"/ *([0-9]{1,4})\]", text)
    planned = plan.parse_dry_run_log(text, "Q4_K_M", int(promised[1]) if promised else 1)
    assert planned.differs_from(planned) == []
    assert len(planned.layout_sha256) == 64
    assert sum(tensor.n_bytes for tensor in planned.tensors) >= 0
    assert sum(planned.fallbacks.values()) <= len(planned.tensors)
    plan.work_of([planned])


def read_manifest(data: bytes, directory: Path) -> None:
    """What loads can be saved and loaded again, and has a card."""
    (directory / manifest.FILE_NAME).write_bytes(data)
    loaded = manifest.load(directory)
    again = directory / "again"
    manifest.save(loaded, again)
    assert manifest.load(again) == loaded
    card.render(loaded).encode()


# --- mutations ---------------------------------------------------------------------------------------------------

INTEGERS = (
    *(0, 1, 2, 3, 7, 8, 12, 13, 16, 31, 32, 33, 63, 64, 127, 128, 255, 256, 4096, 2**15, 2**16 - 1),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1),
)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """A number that is at the edge of something, somewhere, more likely near the start."""
    layout, bits = rng.choice((("<B", 8), ("<H", 16), ("<I", 32), ("<Q", 64)))
    number = struct.pack(layout, rng.choice(INTEGERS) & (2**bits - 1))
    at = int(len(data) * rng.random() ** 3)
    return data[:at] + number + data[at + len(number) :]


def _text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def _strings(*texts: bytes) -> bytes:
    return struct.pack("<IQ", GGUFValueType.STRING, len(texts)) + b"".join(map(_text, texts))


GGUF_NAMES = (
    *(b"general.alignment", b"general.type", b"general.architecture", b"imatrix.datasets", b"imatrix.chunk_count"),
    *(b"imatrix.chunk_size", b"blk.0.attn_q.weight", b"blk.0.attn_q.weight.in_sum2", b"blk.0.attn_q.weight.counts"),
    *(b"n" * 63, b"\xff" * 21, b"\xc3", "é".encode() * 31, b".in_sum2", b".counts", b"a\0b", b"a/b", b"\n", b""),
)
GGUF_VALUES: tuple[tuple[int, bytes], ...] = (
    *((GGUFValueType.UINT32, struct.pack("<I", number)) for number in (0, 1, 8, 32, 64, 4096, 2**31, 2**32 - 1)),
    *((kind, b"\xff" * struct.calcsize(layout)) for kind, layout in gguf_io._SCALARS.items()),
    *((GGUFValueType.STRING, _text(text)) for text in (b"imatrix", b"model", b"", b"\xff\xed\xa0\x80", b"a\0b")),
    (GGUFValueType.ARRAY, _strings(b"a.txt", b"", b"\xff", b"a\0b")),
    (GGUFValueType.ARRAY, _strings()),
    (GGUFValueType.ARRAY, struct.pack("<IQ???", GGUFValueType.BOOL, 3, True, False, True)),
    (GGUFValueType.ARRAY, struct.pack("<IQf", GGUFValueType.FLOAT32, 1, float("nan"))),
    (GGUFValueType.ARRAY, struct.pack("<IQIQ", GGUFValueType.ARRAY, 1, GGUFValueType.UINT8, 0)),
)


@dataclass
class Parts:
    """A GGUF file taken apart, to be changed and put together again with lengths and offsets that are right."""

    keys: list[tuple[bytes, int, bytes]]  # name, type, value
    tensors: list[tuple[bytes, tuple[int, ...], int, bytes]]  # name, shape, type, data

    @classmethod
    def of(cls, data: bytes) -> "Parts":
        """Raises `ValueError`, `KeyError` or `struct.error` when the bytes are not so whole."""
        n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)
        at, parts = 24, cls([], [])

        def take(layout: str) -> Any:
            nonlocal at
            at += struct.calcsize(layout)
            return struct.unpack_from(layout, data, at - struct.calcsize(layout))[0]

        def text() -> bytes:
            length = take("<Q")
            return bytes(take(f"{length}s")) if length <= len(data) else b""

        for _ in range(n_keys):
            name, kind = text(), take("<I")
            start = at
            element, count = (take("<I"), take("<Q")) if kind == GGUFValueType.ARRAY else (kind, 1)
            for _ in range(count):
                text() if element == GGUFValueType.STRING else take(gguf_io._SCALARS[GGUFValueType(element)])
            parts.keys.append((name, kind, data[start:at]))
        rows = []
        for _ in range(n_tensors):
            name, n_dims = text(), take("<I")
            shape = tuple(take("<Q") for _ in range(n_dims % 8))
            rows.append((name, shape, take("<I"), take("<Q")))
        start = -(-at // parts.alignment) * parts.alignment
        for name, shape, kind, offset in rows:
            parts.tensors.append((name, shape, kind, data[start + offset :][: _data_bytes(shape, kind)]))
        return parts

    @property
    def alignment(self) -> int:
        named = {name: value for name, _, value in self.keys}.get(b"general.alignment", b"")
        return struct.unpack("<I", named)[0] % 4097 or 32 if len(named) == 4 else 32

    def whole(self) -> bytes:
        out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.keys)))
        for name, kind, value in self.keys:
            out += _text(name) + struct.pack("<I", kind) + value
        data = bytearray()
        for name, shape, kind, content in self.tensors:
            out += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(data))
            data += content + bytes(-len(content) % self.alignment)
        return bytes(out + bytes(-len(out) % self.alignment) + data)


def _data_bytes(shape: tuple[int, ...], kind: int, most: int = 1 << 14) -> int:
    """How many bytes a tensor takes, as far as it is small."""
    n_elements = 1
    for length in shape:
        n_elements *= length
    block, n_bytes = map(int, GGML_QUANT_SIZES.get(GGMLQuantizationType(kind), (1, 1)))
    return min(most, n_elements // block * n_bytes)


def change_gguf(data: bytes, rng: random.Random) -> bytes:
    """Keys and tensors dropped, doubled, renamed and retyped in a file that stays whole, then perhaps a number."""
    try:
        parts = Parts.of(data)
    except (ValueError, KeyError, struct.error, OverflowError, MemoryError):
        return overwrite(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _change_key(parts.keys, rng) if rng.random() < 0.4 or not parts.tensors else _change_tensor(parts.tensors, rng)
    whole = parts.whole()
    return overwrite(whole, rng) if rng.random() < 0.3 else whole


def _change_key(keys: list[tuple[bytes, int, bytes]], rng: random.Random) -> None:
    at = rng.randrange(len(keys) + 1)
    if at == len(keys) or rng.random() < 0.2:
        keys.insert(at, (rng.choice(GGUF_NAMES), *rng.choice(GGUF_VALUES)))
    elif rng.random() < 0.3:
        keys.pop(at)
    elif rng.random() < 0.5:
        keys[at] = (keys[at][0], *rng.choice(GGUF_VALUES))
    else:
        keys[at] = (rng.choice(GGUF_NAMES), *keys[at][1:])


def _change_tensor(tensors: list[tuple[bytes, tuple[int, ...], int, bytes]], rng: random.Random) -> None:
    at = rng.randrange(len(tensors))
    name, shape, kind, content = tensors[at]
    match rng.randrange(6):
        case 0:
            tensors.pop(at)
        case 1:
            tensors.insert(at, (name + rng.choice((b"2", b".counts", b".in_sum2")), shape, kind, content))
        case 2:
            tensors[at] = (rng.choice(GGUF_NAMES), shape, kind, content)
        case 3:
            other = rng.choice(list(GGMLQuantizationType)) if rng.random() < 0.95 else rng.choice(INTEGERS) % 2**32
            with contextlib.suppress(ValueError):
                content = rng.choice((b"\0", b"\x7f", b"\xff")) * _data_bytes(shape, other)
            tensors[at] = (name, shape, int(other), content)
        case 4:
            dims = list(shape) or [1]
            dims[rng.randrange(len(dims))] = rng.choice((*INTEGERS, 1, 32, 64, 256, 512))
            if rng.random() < 0.5:
                dims.insert(rng.randrange(len(dims) + 1), rng.choice((1, 1, 2, 4)))
            dims = [dim for dim in dims if rng.random() < 0.9]
            with contextlib.suppress(ValueError):
                content = bytes(_data_bytes(tuple(dims), kind))
            tensors[at] = (name, tuple(dims), kind, content)
        case 5:
            pattern = rng.choice((b"\xff", b"\0", b"\0\0\xc0\x7f", b"\0\x7c", b"\x80\x7f", b"\1"))
            tensors[at] = (name, shape, kind, (pattern * (len(content) // len(pattern) + 1))[: len(content)])


# Written into JSON as they stand: what Python's own writer would not write.
TOKENS = (
    *("NaN", "Infinity", "1e999", "-0.0", "1e-400", "1E400", "true", "null", '""', "[]", "{}", '"\\ud800"'),
    *('"' + "x" * 300 + '"', "1" + "0" * 400, "-1" + "0" * 400, "9" * 4300, "9" * 4301, "9" * 18, "1.0"),
    *("[" * depth + "]" * depth for depth in (50, 120, 300, 900, 2000)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (50, 120, 300, 900)),
    *('["ab", 1000000000000]', "[0, 1000000000000]", "[[]]", "[1, 2]", '[{"name": [], "template": 1}]'),
    *('{"a": 1, "b": [1, {"c": null}]}', "[4294967296, 4294967296, 4294967296]", "[-1]", "[1.5]"),
)
JSON_KEYS = (
    *("license", "language", "datasets", "tags", "pipeline_tag", "license_name", "extra_gated_prompt", "auto_map"),
    *("chat_template", "architectures", "vision_config", "shape", "data_offsets", "weight_map", "__metadata__", ""),
)
SNIPPETS = (
    *("\n", "\r\n", "---\n", "\n---\n", "|", "`", "\\", "{{ 1/0 }}", "{% raw %}", "${", "<b>", "\0", "\x85", "\u2028"),
    *("٣", "９", "²", "é" * 40, "\ud800", "𝕏", ": ", "- ", "? ", "!!int ''", "!!bool x", "!!timestamp x", "!!float ''"),
    *("!!binary é", "!!set {a}", "!!omap [1]", "!!pairs [1]", "&a ", "*a", "<<: *a", "<<: [1]", "0x", "0b", "1:60"),
    *("2001-99-99", "0001-01-01 00:00:00 +10:00", "[*a,*a,*a,*a]", "%YAML 9.9", "=", "{", "}", "[", "]", '"', "'"),
    *("[   1/   6] ", "- [   640,     1]", ", type = bf16, size = 1.0 MiB", " -> 1.0 MiB (q8_0)", "type = f99,"),
    *("warning: a - ", "(required for type q4_K)", " -> falling back to q5_0", "version: 1 (a)", "9" * 5000, " : "),
    *("   2  or  ", "(build 1, commit a)", "## [0.3.36]", "ggml-org/llama.cpp@0c1e57098", "[12/230] ", "Q4_K_M"),
)


def change_text(text: str, rng: random.Random) -> str:
    """Snippets put in, and slices removed, doubled, repeated many times or moved."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        a, b = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        b = min(b, a + rng.choice((1, 8, 80, 800)))
        match rng.randrange(7):
            case 0:
                text = text[:a] + text[b:]
            case 1:
                text = text[:b] + text[a:]
            case 2:
                text = text[:a] + text[a:b] * rng.choice((2, 10, 100, 1000)) + text[b:]
            case 3:
                lines = text.split("\n")
                lines.insert(rng.randrange(len(lines)), lines.pop(rng.randrange(len(lines))))
                text = "\n".join(lines)
            case 4 if numbers := list(re.finditer(r"\d+", text)):
                number = rng.choice(numbers)
                text = text[: number.start()] + str(rng.choice(INTEGERS)) + text[number.end() :]
            case _:
                text = text[:a] + rng.choice(SNIPPETS) + text[a:]
        text = text[: 1 << 16]
    return text


def change_json(data: bytes, rng: random.Random) -> bytes:
    """One or a few values of a document replaced, renamed, doubled or dropped, mostly by others of their kind."""
    try:
        document = [json.loads(data)]
        raw = False
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            raw |= _change_node(document, rng)
        text = json.dumps(document[0])
    except (ValueError, RecursionError):
        return change_text(data.decode("utf-8", errors="replace"), rng).encode(errors="replace")
    if raw:
        text = re.sub(r'"@(\d{1,3})@"', lambda match: TOKENS[int(match[1]) % len(TOKENS)], text)
    return text.encode()


def _change_node(document: list[Any], rng: random.Random) -> bool:
    """True when the document now holds a placeholder for one of TOKENS."""
    places: list[tuple[Any, Any]] = []
    stack: list[Any] = [document]
    while stack:
        node = stack.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                stack.append(node[key])
    node, key = rng.choice(places)
    what = rng.random()
    if what < 0.15:
        node[key] = f"@{rng.randrange(len(TOKENS))}@"
        return True
    if what < 0.25:
        other, place = rng.choice(places)
        node[key] = json.loads(json.dumps(other[place]))
    elif what < 0.3 and node is not document:
        del node[key]
    elif what < 0.35 and isinstance(node, dict):
        node[rng.choice(JSON_KEYS)] = node.pop(key)
    elif what < 0.4:
        node[key] = rng.choice(([node[key], node[key]], {rng.choice(JSON_KEYS): node[key]}, [], {}, None))
    else:
        node[key] = _like(node[key], rng)
    return False


def _like(value: Any, rng: random.Random) -> Any:
    """Another value of the same type."""
    choices: tuple[Any, ...] = (0, "", "x", [], {}, 1.5, True)
    match value:
        case str():
            choices = (change_text(value, rng),)
        case bool():
            choices = (not value,)
        case int():
            choices = (*INTEGERS, -1, value + 1, value - 1, -value, float(value % 2**52))
        case float():
            choices = (0.0, -0.0, 1e308, -1e308, 5e-324, 1e16, 0.1, value * 2)
        case list():
            choices = ([*value, rng.choice((*value, None, 0, "x", -1))],)
        case dict():
            choices = ({**value, rng.choice(JSON_KEYS): rng.choice((*value.values(), None, 0, "x", ["x"]))},)
    return rng.choice(choices)


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header's JSON changed under a length that is right again."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.1 or length > len(data):
        return overwrite(data, rng)
    header = change_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def change_checkpoint(data: bytes, rng: random.Random) -> bytes:
    """One of the files changed by what it is, or put in, dropped or given another name."""
    pieces = unpack(data)
    if not pieces or rng.random() < 0.05:
        pieces.append((rng.randrange(len(PIECES)), b"{}"))
    at = rng.randrange(len(pieces))
    place, content = pieces[at]
    if rng.random() < 0.05:
        pieces.pop(at)
    elif rng.random() < 0.05:
        pieces[at] = (rng.randrange(len(PIECES)), content)
    elif PIECES[place].endswith(".safetensors"):
        pieces[at] = (place, change_safetensors(content, rng))
    elif PIECES[place].endswith(".json"):
        pieces[at] = (place, change_json(content, rng))
    else:
        pieces[at] = (place, change_log(content, rng))
    return pack(pieces)


def change_log(data: bytes, rng: random.Random) -> bytes:
    return change_text(data.decode("utf-8", errors="replace"), rng).encode(errors="replace")


# --- seeds: small whole files, written as the tests write them ---------------------------------------------------


def gguf_seeds(directory: Path) -> list[bytes]:
    path, tensors = directory / "seed.gguf", test_gguf_io._tensors()
    return [
        test_gguf_io._write_gguf(path, tensors).read_bytes(),
        test_gguf_io._write_gguf(path, tensors[:4], keys=False).read_bytes(),
        test_gguf_io._write_gguf(path, tensors[:2], keys=False, alignment=64).read_bytes(),
        test_gguf_io._gguf([], [test_gguf_io._tensor("t")], version=2),
        test_gguf_io.GOOD,
    ]


YAML = """\
int: [!!int '3', 0x1f, 0b1, 017, 1:60, 1_000]
bool: !!bool yes
float: [!!float '1.5', .5e+3, 1:60.5]
time: [2025-03-12, !!timestamp '2001-12-14t21:59:43.10-05:00']
binary: !!binary aGk=
set: !!set {a, b}
pairs: [!!pairs [a: 1], !!omap [b: 2]]
? complex
: <<: {a: 1}
text: |+
  kept

folded: >-2
   text
"\\u0041\\x42": 'it''s'
null: ~
"""


def checkpoint_seeds(directory: Path) -> list[bytes]:
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {"hidden_size": 64}}
    tokenizer = {"chat_template": [{"name": "default", "template": "{{ bos_token }}"}], "bos_token": "<bos>"}
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    return [
        packed(README_md=checkpoints.CARD),
        packed(tokenizer_config_json=json.dumps(tokenizer), config_json=json.dumps(config)),
        packed(chat_template_jinja=checkpoints.CHAT_TEMPLATE, README_md="---\na: &a [x]\nb: [*a, *a]\n---\n"),
        packed(README_md=f"---\n{YAML}---\n"),
        packed(chat_template_json=json.dumps({"chat_template": "{{ bos_token }}"}), preprocessor_config_json="{}"),
        packed(
            model_00001_of_00002_safetensors=safetensors_bytes({"a": (2, 3)}),
            model_00002_of_00002_safetensors=safetensors_bytes({"b": (4,), "c": ()}),
            model_safetensors_index_json=json.dumps(index),
            README_md="---\nlicense: gemma\nlanguage: [en, de]\n---\n",
        ),
    ]


def imatrix_seeds(directory: Path) -> list[bytes]:
    path, tensors = directory / "seed.gguf", test_imatrix._tensors()
    several = {**test_imatrix.METADATA, "imatrix.datasets": ["a.txt", "b.txt"]}
    one = {name: data for name, data in tensors.items() if name.startswith(test_imatrix.Q)}
    return [
        test_imatrix._write(path, test_imatrix.METADATA, tensors).read_bytes(),
        test_imatrix._write(path, several, one).read_bytes(),
    ]


def log_seeds(directory: Path) -> list[bytes]:
    versions = "version: 0.5.0-dev (build 0, commit 0c1e57098)\nversion: 4567 (abcdef01)\nbuilt with cc\n"
    ninja = "[12/230] Building CXX object a.o\n[230/230] Linking\n"
    changelog = f"{test_llama_cpp.CHANGELOG}\n## [0.3.36]\n\n- feat: Update llama.cpp to ggml-org/llama.cpp@1234abcd\n"
    texts = (test_plan.LOG, test_recipes.HELP, versions, ninja, changelog)
    return [text.encode() for text in (*texts, "".join(texts))]


def manifest_seeds(directory: Path) -> list[bytes]:
    whole = examples.example()
    model = whole.model.model_copy(update={"repo": None, "audio": True, "base_is_dequantised": True, "license": None})
    few = whole.model_copy(update={"files": [whole.files[0], whole.files[4]], "model": model, "stages": {}})
    bare = few.model_copy(update={"imatrix": None, "calibration": None, "files": []})
    given = few.model_copy(update={"calibration": None, "files": [whole.files[1], whole.files[6]]})
    return [made.model_dump_json().encode() for made in (whole, few, bare, given)]


@dataclass(frozen=True)
class Reader:
    """What is fuzzed: `read` gets an input and a directory of its own, `change` knows the format."""

    read: Callable[[bytes, Path], None]
    seeds: Callable[[Path], list[bytes]]
    change: Callable[[bytes, random.Random], bytes]
    max_bytes: int


READERS = {
    "gguf": Reader(read_gguf, gguf_seeds, change_gguf, 1 << 14),
    "safetensors": Reader(read_checkpoint, checkpoint_seeds, change_checkpoint, 1 << 14),
    "imatrix": Reader(read_imatrix, imatrix_seeds, change_gguf, 1 << 13),
    "logs": Reader(read_logs, log_seeds, change_log, 1 << 15),
    "manifest": Reader(read_manifest, manifest_seeds, change_json, 1 << 15),
}


# --- one input ---------------------------------------------------------------------------------------------------


class HangError(BaseException):
    """Raised into code that runs too long; not an `Exception`, so that nothing on its way swallows it."""


class UnprintableError(Exception):
    """An error of the package's own that a terminal or a log cannot show."""


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextlib.contextmanager
def limits(n_bytes: int | None = None) -> Iterator[None]:
    """Within: `HangError` after MAX_SECONDS of processor time, `MemoryError` beyond `n_bytes` of address space."""

    def hang(number: int, frame: types.FrameType | None) -> None:
        raise HangError(f"over {MAX_SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, hang)
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes or _address_space() + MAX_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def execute(reader: Reader, data: bytes, directory: Path) -> GemmaGGUFError | None:
    """Give one input to a reader: the clean error that it raised, or None when it took it. The rest is a finding."""
    try:
        reader.read(data, directory)
    except GemmaGGUFError as error:
        try:
            f"{error.what} {error.next_step}".encode()
        except UnicodeEncodeError as why:
            raise UnprintableError(f"{type(error).__name__} with a text that cannot be printed: {why}") from error
        return error
    return None


# --- the worker: fuzzes until its time is over -------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """An input that was answered wrongly: its file in the findings, the exception, and where in the package."""

    file: str
    exception: str
    last_line: str
    at: str


def _frames(error: BaseException | None) -> list[str]:
    """The package's own lines in a traceback, or in that of its cause when it has none, or this file's."""
    frames: list[traceback.FrameSummary] = []
    for room in ("/gemma_gguf/", "/tests/"):
        cause = error
        while cause is not None and not frames:
            frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if room in frame.filename]
            cause = cause.__cause__
    return [f"{Path(f.filename).relative_to(ROOT)}:{f.lineno} in {f.name}" for f in frames]


JOURNAL = "findings.jsonl"


class Findings:
    """One file of JSON lines, and for each finding its bytes and its traceback; each traceback is kept once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.journal = directory / JOURNAL
        self.seen = {finding.file for finding in self.read()}

    def read(self) -> list[Finding]:
        if not self.journal.exists():
            return []
        return [Finding(**json.loads(line)) for line in self.journal.read_text().splitlines()]

    def add(self, error: BaseException, data: bytes) -> None:
        frames = _frames(error)
        identity = [type(error).__name__, *frames]
        if not isinstance(error, HangError | MemoryError | RecursionError):  # which end anywhere below the cause
            deepest = traceback.extract_tb(error.__traceback__)[-1]
            identity.append(f"{deepest.filename}:{deepest.lineno}")
        name = f"{type(error).__name__}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:12]}"
        if name in self.seen:
            return
        text = "".join(traceback.format_exception(error, limit=-40))
        last = traceback.format_exception_only(error)[-1].strip()[:300]
        self.write(Finding(name, type(error).__name__, last, frames[-1] if frames else ""), data, text)

    def write(self, finding: Finding, data: bytes, text: str) -> None:
        self.seen.add(finding.file)
        (self.directory / finding.file).write_bytes(data)
        (self.directory / f"{finding.file}.txt").write_text(text, errors="backslashreplace")
        with self.journal.open("a") as out:
            out.write(json.dumps(finding.__dict__) + "\n")


# `-c`, because the package must be imported under the eyes of the engine, and this module imports it. Of YAML, they
# look at what makes values: its scanner is looked at by every character, which takes half of the time.
WORKER = """
import sys, atheris
unseen = [f"yaml.{name}" for name in ("reader", "scanner", "parser", "composer", "emitter", "serializer")]
with atheris.instrument_imports(include=["gemma_gguf", "yaml"], exclude=unseen):
    from tests import fuzz
fuzz.work(atheris, *sys.argv[1:])
"""


def work(engine: Any, name: str, seconds: str, seed: str, folder: str) -> None:
    """Fuzz one reader for some seconds; never returns, libFuzzer ends the process."""
    reader, kept = READERS[name], Findings(Path(folder, "findings"))
    scratch = Path(tempfile.mkdtemp(prefix="gemma-gguf-fuzz-", dir=os.environ["GEMMA_GGUF_FUZZ_SCRATCH"]))
    _compile_templates_once()
    most = _address_space() + MAX_BYTES

    def one(data: bytes) -> None:
        try:
            with limits(most):
                execute(reader, data, scratch)
        except (Exception, HangError, SystemExit) as error:  # noqa: BLE001 - what gets here is what is looked for
            kept.add(error, data)

    def change(data: bytes, max_size: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < 0.4:
            return bytes(engine.Mutate(data, max_size))
        try:
            return reader.change(data, rng)[:max_size]
        except Exception:  # noqa: BLE001 - a bug of this file, which the engine would not survive to tell
            traceback.print_exc()
            os._exit(1)

    options = (
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-max_len={reader.max_bytes}",
        f"-timeout={WALL_SECONDS}",
        "-rss_limit_mb=0",  # ours is finer
        "-use_value_profile=1",
        f"-artifact_prefix={folder}/findings/",
    )
    engine.Setup([sys.argv[0], *options, f"{folder}/corpus", f"{folder}/seeds"], one, custom_mutator=change)
    engine.Fuzz()


def _compile_templates_once() -> None:
    """The card's templates are not foreign; compiling them anew for each card takes nine tenths of its time."""
    jinja2: Any = importlib.import_module("jinja2")
    compiled: dict[tuple[str, str | None, str | None], types.CodeType] = {}
    really = jinja2.Environment.compile

    def compile_once(self: Any, text: str, name: str | None = None, filename: str | None = None) -> types.CodeType:
        if (text, name, filename) not in compiled:
            compiled[text, name, filename] = really(self, text, name, filename)
        return compiled[text, name, filename]

    jinja2.Environment.compile = compile_once


# --- the campaign ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """A worker's end, from what libFuzzer printed."""

    code: int
    executions: int
    edges: int
    last_lines: list[str]


def campaign(name: str, seconds: float, seed: int, directory: Path) -> dict[str, Any]:
    """Fuzz one reader for `seconds`, with as many workers after each other as it takes; what was done and found."""
    folder = (directory / name).resolve()
    for part in ("seeds", "corpus", "findings"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "findings" / JOURNAL).unlink(missing_ok=True)
    found = Findings(folder / "findings")
    started = time.monotonic()
    executions = edges = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        for data in READERS[name].seeds(Path(scratch)):
            (folder / "seeds" / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        for number in range(MAX_WORKERS):
            left = round(seconds - (time.monotonic() - started if number else 0))
            if left < 1:
                break
            ended = _run_worker([name, str(left), str(seed + number), str(folder)], scratch)
            executions, edges = executions + ended.executions, max(edges, ended.edges)
            if ended.code == 0:
                break
            if ended.executions == 0 and number == 0:
                raise RuntimeError("the worker did not start:\n" + "\n".join(ended.last_lines))
            _record_death(found, ended)
    return {
        "reader": name,
        "seconds": round(time.monotonic() - started, 1),
        "executions": executions,
        "edges": edges,
        "findings": [finding.__dict__ | {"file": str(found.directory / finding.file)} for finding in found.read()],
    }


def _run_worker(arguments: list[str], scratch: str) -> Ended:
    env = {**os.environ, "GEMMA_GGUF_FUZZ_SCRATCH": scratch, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", WORKER, *arguments]
    child = subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    executions = edges = 0
    last_lines: deque[str] = deque(maxlen=40)
    assert child.stderr is not None
    try:
        for raw in child.stderr:
            line = raw.decode(errors="replace").rstrip()
            last_lines.append(line)
            if match := re.match(r"#(\d+)\s.*\bcov: (\d+)", line):
                executions, edges = int(match[1]), int(match[2])
        code = child.wait()
    finally:
        child.kill()
        child.wait()
        child.stderr.close()
    return Ended(code, executions, edges, list(last_lines))


def _record_death(found: Findings, ended: Ended) -> None:
    """The input that libFuzzer saved when a worker died, as a finding; the same input once."""
    saved = [path for kind in ("crash", "timeout", "oom") for path in found.directory.glob(f"{kind}-*")]
    newest = max(saved, key=lambda path: path.stat().st_mtime, default=None)
    data = newest.read_bytes() if newest else b""
    name = f"death-{newest.name if newest else ended.code}"
    said = next((line for line in ended.last_lines if "ERROR" in line or "Timeout" in line), f"exit code {ended.code}")
    if name not in found.seen:
        found.write(Finding(name, f"exit code {ended.code}", said, ""), data, "\n".join(ended.last_lines))
    if newest:
        newest.unlink()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, default=ROOT / "out" / ".work" / "fuzz", help="directory that is kept")
    given = parser.parse_args(arguments)
    result = campaign(given.reader, given.seconds, given.seed, given.corpus)
    print(json.dumps(result))
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
