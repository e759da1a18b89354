"""GGUF headers and tensor tables, read strictly.

Consumes a path, produces a `Header`: keys with their exact bytes, and for every tensor its name, shape, type and
place. It never reads tensor data and never trusts a length before it has compared it with what is left of the file,
so a cut or hostile file ends in one clear error. `gguf.GGUFReader` is not used for this: it decodes each of Gemma's
262,144 vocabulary entries on every open, and it checks neither overlap nor the end of the file. Enumerations and
block sizes are the `gguf` package's. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import itertools
import math
import mmap
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from gemma_gguf.errors import BadInputError
from gemma_gguf.files import write_stream

MAX_DIMS = 4
MAX_NAME_BYTES = 63  # ggml's GGML_MAX_NAME, less its terminator
# More than these no model has, and each bounds what a hostile file can make us do: Gemma's largest are beside them.
MAX_KEYS = 1 << 16  # some 60
MAX_TENSORS = 1 << 16  # 2,100, of an imatrix
MAX_ARRAY = 1 << 24  # elements; 514,906 merges
MAX_STRING = 1 << 24  # bytes; 20 kB of chat template
MAX_HEADER = 1 << 28  # bytes before the tensor table; 6.5 MB of 270M, some 15 MB where merges are added
MIN_KEY_BYTES = 8 + 4 + 1  # empty name, type, the smallest value
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # empty name, one dimension, type, offset

_SCALARS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


def n_bytes_of(ggml_type: GGMLQuantizationType, n_elements: int) -> int:
    """Bytes that `n_elements` (a multiple of the type's block) take in a ggml type."""
    block, size = map(int, GGML_QUANT_SIZES[ggml_type])
    return n_elements // block * size


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table. `shape` is in ggml's order: the length of a row (columns) first."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    offset: int  # bytes from the start of the file

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return n_bytes_of(self.ggml_type, self.n_elements)


@dataclass(frozen=True)
class Key:
    """One metadata key: its type and where in the file the value lies, so that it can be copied or decoded."""

    name: str
    type: GGUFValueType
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """Everything a GGUF file says before its tensor data."""

    path: Path
    version: int
    keys: dict[str, Key]
    tensors: tuple[TensorInfo, ...]
    data_start: int
    file_size: int
    alignment: int

    @cached_property
    def by_name(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def written_again(self) -> dict[str, bytes]:
        """{key: its bytes as ggml writes them}. Kept: of a large vocabulary they take a second, and a set needs them
        once per file."""
        with _Bytes(self.path) as data:
            return {
                key.name: _packed(key.name) + struct.pack("<I", key.type) + data.value_bytes(key)
                for key in self.keys.values()
            }

    @property
    def n_elements(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per element, as llama.cpp counts BPW (headers left out)."""
        return 8 * sum(tensor.n_bytes for tensor in self.tensors) / max(1, self.n_elements)

    def type_histogram(self) -> dict[str, int]:
        """Number of tensors of each ggml type, the most frequent first."""
        return dict(Counter(tensor.ggml_type.name for tensor in self.tensors).most_common())

    def get(self, name: str, default: Any = None) -> Any:
        """The decoded value of key `name` (a scalar, a string, or a list), or `default`."""
        key = self.keys.get(name)
        if key is None:
            return default
        with _Bytes(self.path) as data:
            return data.value(key.type, key.start)[0]

    def token_texts(self, *names: str) -> list[str]:
        """The texts of the tokens called `bos`, `eos`, ...; "" for one that the file does not name."""
        tokens = self.get("tokenizer.ggml.tokens", [])
        numbers = [self.get(f"tokenizer.ggml.{name}_token_id") for name in names]
        return [tokens[n] if isinstance(n, int) and n < len(tokens) else "" for n in numbers]

    def strings(self) -> Iterator[tuple[str, str]]:
        """(key, text) of every string value outside arrays: where a path of this machine could hide."""
        with _Bytes(self.path) as data:
            for key in self.keys.values():
                if key.type is GGUFValueType.STRING:
                    yield key.name, data.value(key.type, key.start)[0]

    def read(self, tensor: TensorInfo, first_row: int = 0, n_rows: int | None = None) -> npt.NDArray[np.uint8]:
        """Raw bytes of rows `[first_row, first_row + n_rows)` of a tensor, shape (n_rows, bytes per row)."""
        columns = tensor.shape[0]
        row_bytes = n_bytes_of(tensor.ggml_type, columns)
        total = tensor.n_elements // columns
        count = total - first_row if n_rows is None else min(n_rows, total - first_row)
        raw = np.fromfile(
            self.path, dtype=np.uint8, count=count * row_bytes, offset=tensor.offset + first_row * row_bytes
        )
        if raw.size != count * row_bytes:
            raise BadInputError(f"{self.path} ends inside tensor {tensor.name}")
        return raw.reshape(count, row_bytes)


class _Bytes:
    """A mapped file and a decoder that checks every length before it uses it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        try:
            self.data = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            self._file.close()
            raise BadInputError(f"{path} is empty, not a GGUF file") from None
        self.size = len(self.data)

    def __enter__(self) -> "_Bytes":
        return self

    def __exit__(self, *exc: object) -> None:
        self.data.close()
        self._file.close()

    def fail(self, why: str) -> BadInputError:
        return BadInputError(f"{self.path} is not a whole GGUF file: {why}", next_step="Make or download it again.")

    def scalar(self, layout: str, at: int) -> tuple[Any, int]:
        end = at + struct.calcsize(layout)
        if end > self.size:
            raise self.fail(f"it ends inside its header (at byte {at} of {self.size})")
        return struct.unpack_from(layout, self.data, at)[0], end

    def check_text(self, length: int, at: int) -> None:
        """The string of `length` bytes at `at` is in the file, and not longer than any we know."""
        if length > self.size - at:
            raise self.fail(f"a string at byte {at} claims {length} bytes, {self.size - at} are left")
        if length > MAX_STRING:
            raise self.fail(
                f"a string at byte {at} claims {length:,} bytes, more than the {MAX_STRING:,} that are read"
            )

    def text(self, at: int) -> tuple[str, int]:
        length, at = self.scalar("<Q", at)
        self.check_text(length, at)
        return self.data[at : at + length].decode("utf-8", errors="replace"), at + length

    def array_start(self, at: int) -> tuple[GGUFValueType, int, int]:
        raw, at = self.scalar("<I", at)
        try:
            element = GGUFValueType(raw)
        except ValueError:
            raise self.fail(f"unknown array type {raw} at byte {at}") from None
        if element is GGUFValueType.ARRAY:
            raise self.fail("arrays of arrays are not part of the format")
        count, at = self.scalar("<Q", at)
        smallest = 8 if element is GGUFValueType.STRING else struct.calcsize(_SCALARS[element])
        if count > (self.size - at) // smallest:
            raise self.fail(f"an array at byte {at} claims {count} elements, more than the file can hold")
        if count > MAX_ARRAY:
            raise self.fail(
                f"an array at byte {at} claims {count:,} elements, more than the {MAX_ARRAY:,} that are read"
            )
        return element, count, at

    def skip(self, kind: GGUFValueType, at: int) -> int:
        """Where the value that starts at `at` ends."""
        if kind is GGUFValueType.STRING:
            length, at = self.scalar("<Q", at)
            self.check_text(length, at)
            return int(at + length)
        if kind is not GGUFValueType.ARRAY:
            return self.scalar(_SCALARS[kind], at)[1]
        element, count, at = self.array_start(at)
        if element is not GGUFValueType.STRING:
            return at + count * struct.calcsize(_SCALARS[element])
        unpack, data, last = struct.Struct("<Q").unpack_from, self.data, self.size - 8
        for _ in range(count):
            if at > last:
                raise self.fail(f"it ends inside an array of strings (at byte {at} of {self.size})")
            at += 8 + unpack(data, at)[0]
        if at > self.size:
            raise self.fail("the last string of an array reaches past the end")
        return at

    def value_bytes(self, key: Key) -> bytes:
        """The value as ggml would write it again: an array's strings end at their first NUL."""
        raw = bytes(self.data[key.start : key.end])
        if key.type is GGUFValueType.STRING:
            text = raw[8:].partition(b"\0")[0]
            return struct.pack("<Q", len(text)) + text
        if key.type is not GGUFValueType.ARRAY:
            return raw
        element, count, at = self.array_start(key.start)
        if element is not GGUFValueType.STRING:
            return raw
        out = bytearray(raw[:12])
        for _ in range(count):
            length, at = self.scalar("<Q", at)
            text = self.data[at : at + length].partition(b"\0")[0]
            out += struct.pack("<Q", len(text)) + text
            at += length
        return bytes(out)

    def value(self, kind: GGUFValueType, at: int) -> tuple[Any, int]:
        if kind is GGUFValueType.STRING:
            return self.text(at)
        if kind is not GGUFValueType.ARRAY:
            return self.scalar(_SCALARS[kind], at)
        element, count, at = self.array_start(at)
        if element is not GGUFValueType.STRING:
            layout = _SCALARS[element]
            end = at + count * struct.calcsize(layout)
            return list(struct.unpack_from(f"<{count}{layout[1]}", self.data, at)), end
        texts = []
        for _ in range(count):
            text, at = self.text(at)
            texts.append(text)
        return texts, at


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file (version 2 or 3, little endian).

    Raises `BadInputError` when the file is missing, cut, or says impossible things: lengths past its end, unknown
    types, doubled names, misaligned, overlapping or missing tensor data.
    """
    if not path.is_file():
        raise BadInputError(f"there is no file {path}")
    with _Bytes(path) as data:
        magic, at = data.scalar("<I", 0)
        if magic != int.from_bytes(b"GGUF", "little"):
            raise BadInputError(f"{path} is not a GGUF file (it does not start with GGUF)")
        version, at = data.scalar("<I", at)
        if version not in (2, 3):
            raise data.fail(f"version {version} is not known here (2 and 3 are)")
        n_tensors, at = data.scalar("<Q", at)
        n_keys, at = data.scalar("<Q", at)
        if n_keys > data.size // MIN_KEY_BYTES or n_tensors > data.size // MIN_TENSOR_BYTES:
            raise data.fail(f"it claims {n_keys} keys and {n_tensors} tensors in {data.size} bytes")
        if n_keys > MAX_KEYS or n_tensors > MAX_TENSORS:
            raise data.fail(f"it claims {n_keys:,} keys and {n_tensors:,} tensors, more than are read")
        keys, at = _read_keys(data, n_keys, at)
        alignment = GGUF_DEFAULT_ALIGNMENT
        if (key := keys.get("general.alignment")) is not None:
            if key.type is GGUFValueType.ARRAY:
                raise data.fail("general.alignment is an array, not a power of two")
            alignment = data.value(key.type, key.start)[0]
            if key.type is not GGUFValueType.UINT32 or alignment <= 0 or alignment & (alignment - 1):
                raise data.fail(f"general.alignment is {alignment!r}, not a power of two")
        table, at = _read_tensor_table(data, n_tensors, at)
        data_start = -(-at // alignment) * alignment
        tensors = tuple(_check_layout(data, table, data_start, alignment))
        return Header(path, version, keys, tensors, data_start, data.size, alignment)


def _read_keys(data: _Bytes, n_keys: int, at: int) -> tuple[dict[str, Key], int]:
    keys: dict[str, Key] = {}
    for _ in range(n_keys):
        name, at = data.text(at)
        raw, at = data.scalar("<I", at)
        try:
            kind = GGUFValueType(raw)
        except ValueError:
            raise data.fail(f"key {name!r} has the unknown type {raw}") from None
        if not name:
            raise data.fail("a key has no name")
        if name in keys:
            raise data.fail(f"key {name!r} stands twice")
        end = data.skip(kind, at)
        if end > MAX_HEADER:
            raise data.fail(f"its keys take more than the {MAX_HEADER:,} bytes that are read")
        keys[name] = Key(name, kind, at, end)
        at = end
    return keys, at


def _read_tensor_table(data: _Bytes, n_tensors: int, at: int) -> tuple[list[TensorInfo], int]:
    table: list[TensorInfo] = []
    seen: set[str] = set()
    for _ in range(n_tensors):
        name, at = data.text(at)
        if not name or len(name.encode()) > MAX_NAME_BYTES or "/" in name or "\\" in name:
            raise data.fail(f"a tensor is named {name[:80]!r}")
        if name in seen:
            raise data.fail(f"tensor {name} stands twice")
        seen.add(name)
        n_dims, at = data.scalar("<I", at)
        if not 1 <= n_dims <= MAX_DIMS:
            raise data.fail(f"tensor {name} has {n_dims} dimensions")
        shape = []
        for _ in range(n_dims):
            length, at = data.scalar("<Q", at)
            shape.append(length)
        raw_type, at = data.scalar("<I", at)
        try:
            ggml_type = GGMLQuantizationType(raw_type)
        except ValueError:
            raise data.fail(f"tensor {name} has the unknown type {raw_type}") from None
        offset, at = data.scalar("<Q", at)
        table.append(TensorInfo(name, tuple(shape), ggml_type, offset))
    return table, at


def _check_layout(data: _Bytes, table: list[TensorInfo], data_start: int, alignment: int) -> Iterator[TensorInfo]:
    """Yield each tensor with its offset in the file, when all of them lie inside it and apart from each other."""
    end_of_previous, previous = 0, "the header"
    for tensor in sorted(table, key=lambda t: t.offset):
        block, _ = GGML_QUANT_SIZES[tensor.ggml_type]
        if 0 in tensor.shape or tensor.shape[0] % block:
            raise data.fail(f"tensor {tensor.name} of shape {list(tensor.shape)} cannot be {tensor.ggml_type.name}")
        if tensor.offset % alignment:
            raise data.fail(f"tensor {tensor.name} is not aligned to {alignment} bytes")
        if tensor.offset < end_of_previous:
            raise data.fail(f"tensor {tensor.name} overlaps {previous}")
        end_of_previous, previous = tensor.offset + tensor.n_bytes, tensor.name
        if data_start + end_of_previous > data.size:
            missing = data_start + end_of_previous - data.size
            raise data.fail(f"tensor {tensor.name} reaches {missing} bytes past the end")
    expected = 0
    for tensor in table:
        if tensor.offset != expected:  # llama.cpp wants the data in the table's order and without gaps
            raise data.fail(f"tensor {tensor.name} stands at byte {tensor.offset} of the data, not at {expected}")
        expected += -(-tensor.n_bytes // alignment) * alignment
        yield TensorInfo(tensor.name, tensor.shape, tensor.ggml_type, data_start + tensor.offset)


def expected_size(data_start: int, sizes: list[int], alignment: int) -> int:
    """Size in bytes of a GGUF file whose tensors take `sizes` bytes: each is padded to the alignment, the last too."""
    return data_start + sum(-(-size // alignment) * alignment for size in sizes)


@dataclass(frozen=True)
class NewHeader:
    """The header of a file to be written: its bytes up to the tensor data, where each tensor goes, and the end."""

    data: bytes
    offsets: tuple[int, ...]  # bytes from the start of the file, in the order of the tensors
    file_size: int


def derived_keys(
    base: Header, values: Sequence[tuple[str, int | str]], removed: Collection[str] = ()
) -> dict[str, bytes]:
    """{key: its bytes} of a file that llama.cpp makes from `base`, in order: those of the base, then `values`.

    A key set anew moves to the end, as ggml's `gguf_set_val_*` does; integers become UINT32. ggml keeps strings as C
    strings, so array elements end at their first NUL. Source: `gguf_set_kv` in ggml/src/gguf.cpp.
    """
    gone = {*removed, *(name for name, _ in values)}
    keys = {name: base.written_again[name] for name in base.keys if name not in gone}
    for name, value in values:
        if isinstance(value, int):
            keys[name] = integer_key(name, GGUFValueType.UINT32, value)
        else:
            keys[name] = _packed(name) + struct.pack("<I", GGUFValueType.STRING) + _packed(value)
    return keys


def integer_key(name: str, kind: GGUFValueType, value: int) -> bytes:
    """A key that holds one integer, as it stands in a file."""
    return _packed(name) + struct.pack("<I", kind) + struct.pack(_SCALARS[kind], value)


def header_of(
    keys: Collection[bytes], tensors: Sequence[tuple[str, tuple[int, ...], GGMLQuantizationType]]
) -> NewHeader:
    """The header llama.cpp writes for a file of these keys and tensors (name, shape, type): see `gguf_write_out`."""
    out = bytearray(struct.pack("<IIQQ", int.from_bytes(b"GGUF", "little"), 3, len(tensors), len(keys)))
    for key in keys:
        out += key
    place, places = 0, []
    for name, shape, ggml_type in tensors:
        places.append(place)
        out += _packed(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, ggml_type, place)
        place += padded(n_bytes_of(ggml_type, math.prod(shape)))
    out += bytes(-len(out) % GGUF_DEFAULT_ALIGNMENT)
    return NewHeader(bytes(out), tuple(len(out) + place for place in places), len(out) + place)


def padded(n_bytes: int) -> int:
    """What the data of a tensor takes in a file of ggml's default alignment."""
    return n_bytes + -n_bytes % int(GGUF_DEFAULT_ALIGNMENT)


def derived_header(
    base: Header,
    tensors: Sequence[tuple[str, tuple[int, ...], GGMLQuantizationType]],
    values: Sequence[tuple[str, int | str]],
    removed: Collection[str] = (),
) -> NewHeader:
    """The header llama.cpp writes for a file made from `base`: `derived_keys`, then a table of `tensors`."""
    return header_of(derived_keys(base, values, removed).values(), tensors)


def differing_keys(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> tuple[str, ...]:
    """Names of the keys that differ, or are in one alone; all of them when only their order differs."""
    names = [*one, *(name for name in other if name not in one)]
    differing = tuple(name for name in names if one.get(name) != other.get(name))
    return differing if differing or list(one) == list(other) else tuple(names)


def strings_value(texts: Sequence[str]) -> bytes:
    """An array of strings as the raw value of a key."""
    return struct.pack("<IQ", GGUFValueType.STRING, len(texts)) + b"".join(map(_packed, texts))


def write_with_values(header: Header, target: Path, replaced: Mapping[str, bytes]) -> None:
    """Write the file of `header` anew with the raw values of some keys replaced; tensor data is copied as it is."""
    keys = header.keys.values()
    out = bytearray(struct.pack("<IIQQ", int.from_bytes(b"GGUF", "little"), 3, len(header.tensors), len(keys)))
    with _Bytes(header.path) as data:
        for key in keys:
            raw = replaced.get(key.name, data.data[key.start : key.end])
            out += _packed(key.name) + struct.pack("<I", key.type) + raw
        for tensor in header.tensors:
            shape = tensor.shape
            place = tensor.offset - header.data_start
            out += _packed(tensor.name)
            out += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.ggml_type, place)
        out += bytes(-len(out) % header.alignment)
        step = 1 << 24
        starts = range(header.data_start, data.size, step)
        write_stream(target, itertools.chain([bytes(out)], (data.data[at : at + step] for at in starts)))


def _packed(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def dequantize(rows: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    """Rows of raw bytes as float32, shape (rows, columns), by the `gguf` package's reference code."""
    from gguf.quants import dequantize as reference  # noqa: PLC0415 - builds its tables on import, which is slow

    if ggml_type is GGMLQuantizationType.F32:
        return rows.view(np.float32)
    if ggml_type is GGMLQuantizationType.F16:
        return rows.view(np.float16).astype(np.float32)
    return np.asarray(reference(rows, ggml_type), dtype=np.float32)
