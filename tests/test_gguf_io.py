"""Headers as `gguf` writes them, read back exactly; then every way of damaging one, each with its own message."""

import ctypes
import math
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader, GGUFWriter, quants
from gguf.constants import GGMLQuantizationType as T
from gguf.constants import GGUFValueType as V

from gemma_gguf.errors import BadInputError
from gemma_gguf.gguf_io import (
    Header,
    TensorInfo,
    dequantize,
    expected_size,
    n_bytes_of,
    read_header,
)
from gemma_gguf.llama_cpp import Build

# --- whole files, written by the gguf package ----------------------------------------------------------------------

KEYS: tuple[tuple[str, Any, V, V | None], ...] = (
    ("k.uint8", 255, V.UINT8, None),
    ("k.int8", -128, V.INT8, None),
    ("k.uint16", 65535, V.UINT16, None),
    ("k.int16", -32768, V.INT16, None),
    ("k.uint32", 2**32 - 1, V.UINT32, None),
    ("k.int32", -(2**31), V.INT32, None),
    ("k.uint64", 2**64 - 1, V.UINT64, None),
    ("k.int64", -(2**63), V.INT64, None),
    ("k.float32", -0.15625, V.FLOAT32, None),
    ("k.float64", 1e-300, V.FLOAT64, None),
    ("k.true", True, V.BOOL, None),
    ("k.false", False, V.BOOL, None),
    ("k.string", "Grüße, ▁the 😀\n", V.STRING, None),
    ("a.uint8", [0, 1, 255], V.ARRAY, V.UINT8),
    ("a.int8", [-128, 127], V.ARRAY, V.INT8),
    ("a.uint16", [65535], V.ARRAY, V.UINT16),
    ("a.int16", [-1, 0, 1], V.ARRAY, V.INT16),
    ("a.uint32", [2**32 - 1, 0], V.ARRAY, V.UINT32),
    ("a.int32", list(range(-5, 5)), V.ARRAY, V.INT32),
    ("a.uint64", [2**64 - 1], V.ARRAY, V.UINT64),
    ("a.int64", [-(2**63), 2**63 - 1], V.ARRAY, V.INT64),
    ("a.float32", [0.5, -2.0], V.ARRAY, V.FLOAT32),
    ("a.float64", [1e-300, math.inf], V.ARRAY, V.FLOAT64),
    ("a.bool", [True, False, True], V.ARRAY, V.BOOL),
    ("a.string", ["", "a", "Ü▁", "x" * 300], V.ARRAY, V.STRING),
)


def _blocks(rng: np.random.Generator, rows: int, block_bytes: int, blocks: int, scales: int) -> npt.NDArray[np.uint8]:
    """Random blocks of a type that `gguf` cannot quantise to; the `scales` leading float16 of each are made finite."""
    raw = rng.integers(0, 256, (rows, blocks, block_bytes), dtype=np.uint8)
    finite = rng.uniform(-0.1, 0.1, (rows, blocks, scales)).astype(np.float16)
    raw[:, :, : 2 * scales] = finite.view(np.uint8)
    return raw.reshape(rows, -1)


def _write_gguf(
    path: Path, tensors: Sequence[tuple[str, npt.NDArray[Any], T]], *, keys: bool = True, alignment: int | None = None
) -> Path:
    writer = GGUFWriter(path, "gemma3")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, value, kind, element in KEYS if keys else ():
        writer.add_key_value(name, value, kind, element)
    for name, data, ggml_type in tensors:
        writer.add_tensor(name, data, raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors() -> list[tuple[str, npt.NDArray[Any], T]]:
    """One tensor of each layout: plain, with blocks of 32, and K- and I-quants with blocks of 256."""
    rng = np.random.default_rng(7)
    values = rng.normal(0, 1, (3, 512)).astype(np.float32)
    return [
        ("token_embd.weight", values[:, :8].copy(), T.F32),
        ("blk.0.norm.weight", values[0, :5].astype(np.float16), T.F16),
        ("blk.0.attn_q.weight", quants.quantize(values, T.BF16), T.BF16),
        ("blk.0.attn_k.weight", quants.quantize(values, T.Q8_0), T.Q8_0),
        ("blk.0.ffn_up.weight", _blocks(rng, 3, 144, 2, 2), T.Q4_K),
        ("blk.0.ffn_gate_exps.weight", _blocks(rng, 6, 74, 1, 1).reshape(2, 3, 74), T.IQ2_XS),
        ("blk.0.scale", values[1, :7].copy(), T.F32),
    ]


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    return _write_gguf(tmp_path / "sample.gguf", _tensors())


def test_keys_are_in_the_files_order_with_their_types(sample: Path) -> None:
    header = read_header(sample)
    assert header.version == 3
    assert header.file_size == sample.stat().st_size
    expected = [("general.architecture", V.STRING), *((name, kind) for name, _, kind, _ in KEYS)]
    assert [(key.name, key.type) for key in header.keys.values()] == expected


@pytest.mark.parametrize(("name", "value"), [pytest.param(name, value, id=name) for name, value, _, _ in KEYS])
def test_get_decodes_every_type(sample: Path, name: str, value: Any) -> None:
    decoded = read_header(sample).get(name)
    assert decoded == value
    assert type(decoded) is type(value)


def test_get_of_a_key_that_is_not_there(sample: Path) -> None:
    header = read_header(sample)
    assert header.get("no.such.key") is None
    assert header.get("no.such.key", 3) == 3


def test_key_bytes_can_be_copied(sample: Path) -> None:
    """`start` and `end` enclose exactly the value as it stands in the file."""
    raw, header = sample.read_bytes(), read_header(sample)

    def value(name: str) -> bytes:
        return raw[header.keys[name].start : header.keys[name].end]

    assert value("k.int16") == struct.pack("<h", -32768)
    assert value("general.architecture") == struct.pack("<Q", 6) + b"gemma3"
    assert value("a.uint32") == struct.pack("<IQII", V.UINT32, 2, 2**32 - 1, 0)
    assert value("a.bool") == struct.pack("<IQ???", V.BOOL, 3, True, False, True)


def test_strings_are_those_outside_arrays(sample: Path) -> None:
    assert list(read_header(sample).strings()) == [
        ("general.architecture", "gemma3"),
        ("k.string", "Grüße, ▁the 😀\n"),
    ]


def test_tensors_in_order_with_shapes_as_ggml_counts_them(sample: Path) -> None:
    header = read_header(sample)
    start = header.data_start
    assert start % 32 == 0
    # Name, shape with columns first, type, offset after padding to 32 bytes.
    assert header.tensors == (
        TensorInfo("token_embd.weight", (8, 3), T.F32, start),
        TensorInfo("blk.0.norm.weight", (5,), T.F16, start + 96),
        TensorInfo("blk.0.attn_q.weight", (512, 3), T.BF16, start + 128),
        TensorInfo("blk.0.attn_k.weight", (512, 3), T.Q8_0, start + 3200),
        TensorInfo("blk.0.ffn_up.weight", (512, 3), T.Q4_K, start + 4832),
        TensorInfo("blk.0.ffn_gate_exps.weight", (256, 3, 2), T.IQ2_XS, start + 5696),
        TensorInfo("blk.0.scale", (7,), T.F32, start + 6144),
    )
    assert [t.n_bytes for t in header.tensors] == [96, 10, 3072, 1632, 864, 444, 28]
    assert [t.n_elements for t in header.tensors] == [24, 5, 1536, 1536, 1536, 1536, 7]
    assert header.by_name["blk.0.scale"] is header.tensors[-1]
    assert header.n_elements == 6180
    assert header.bits_per_weight == 8 * (96 + 10 + 3072 + 1632 + 864 + 444 + 28) / 6180
    assert header.type_histogram() == {"F32": 2, "F16": 1, "BF16": 1, "Q8_0": 1, "Q4_K": 1, "IQ2_XS": 1}
    assert next(iter(header.type_histogram())) == "F32"
    assert header.file_size == start + 6144 + 32


def test_same_table_as_the_gguf_package_reads(sample: Path) -> None:
    header, reference = read_header(sample), GGUFReader(sample)
    assert [(t.name, list(t.shape), t.ggml_type, t.offset, t.n_bytes, t.n_elements) for t in header.tensors] == [
        (t.name, t.shape.tolist(), t.tensor_type, t.data_offset, t.n_bytes, t.n_elements) for t in reference.tensors
    ]
    assert header.data_start == reference.data_offset


def test_rows_are_the_bytes_the_gguf_package_reads(sample: Path) -> None:
    header = read_header(sample)
    for tensor, reference in zip(header.tensors, GGUFReader(sample).tensors, strict=True):
        whole = np.ascontiguousarray(reference.data).view(np.uint8)
        n_rows = tensor.n_elements // tensor.shape[0]
        rows = whole.reshape(n_rows, -1)
        assert np.array_equal(header.read(tensor), rows)
        for first in range(n_rows):
            assert np.array_equal(header.read(tensor, first, 1), rows[first : first + 1])
        assert np.array_equal(header.read(tensor, n_rows - 1, 5), rows[n_rows - 1 :])
        assert header.read(tensor, n_rows).shape == (0, rows.shape[1])


@pytest.mark.parametrize("name", [pytest.param(name, id=kind.name) for name, _, kind in _tensors()[:-1]])
def test_dequantize_is_the_reference_code(sample: Path, name: str) -> None:
    """Values and shape are those of `gguf.quants`, which works on the whole tensor at once."""
    header = read_header(sample)
    tensor = header.by_name[name]
    data = next(t.data for t in GGUFReader(sample).tensors if t.name == name)
    reference = quants.dequantize(data, tensor.ggml_type).reshape(-1, tensor.shape[0])
    values = dequantize(header.read(tensor), tensor.ggml_type)
    assert values.dtype == np.float32
    assert values.shape == (tensor.n_elements // tensor.shape[0], tensor.shape[0])
    assert np.isfinite(values).all()
    assert np.ptp(values) > 0
    assert np.array_equal(values, reference.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        pytest.param("blk.0.norm.weight", "ggml_fp16_to_fp32_row", id="F16"),
        pytest.param("blk.0.attn_q.weight", "ggml_bf16_to_fp32_row", id="BF16"),
        pytest.param("blk.0.attn_k.weight", "dequantize_row_q8_0", id="Q8_0"),
        pytest.param("blk.0.ffn_up.weight", "dequantize_row_q4_K", id="Q4_K"),
        pytest.param("blk.0.ffn_gate_exps.weight", "dequantize_row_iq2_xs", id="IQ2_XS"),
    ],
)
def test_dequantize_is_what_llama_cpp_computes(sample: Path, build: Build, name: str, function: str) -> None:
    """The build's own C code is the oracle; only fused multiply-add may change the last bits."""
    header = read_header(sample)
    tensor = header.by_name[name]
    raw = header.read(tensor)
    expected = np.zeros(tensor.n_elements, dtype=np.float32)
    oracle = getattr(ctypes.CDLL(str(build.bin_dir / "libggml-base.so")), function)
    oracle.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    oracle.restype = None
    oracle(raw.ctypes.data, expected.ctypes.data, tensor.n_elements)
    np.testing.assert_allclose(dequantize(raw, tensor.ggml_type).reshape(-1), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_alignment_key_is_respected(tmp_path: Path, alignment: int) -> None:
    path = _write_gguf(tmp_path / "aligned.gguf", _tensors()[:3], alignment=alignment)
    header = read_header(path)
    assert header.alignment == alignment
    assert header.data_start % alignment == 0
    assert header.data_start == GGUFReader(path).data_offset
    pads = [-(-size // alignment) * alignment for size in (96, 10, 3072)]
    assert [t.offset - header.data_start for t in header.tensors] == [0, pads[0], pads[0] + pads[1]]
    assert header.file_size == header.data_start + sum(pads)
    assert expected_size(header.data_start, [96, 10, 3072], alignment) == header.file_size


def test_no_alignment_key_means_32(sample: Path) -> None:
    assert read_header(sample).alignment == 32


@pytest.mark.parametrize(
    ("ggml_type", "n_elements", "n_bytes"),
    [
        pytest.param(T.F32, 3, 12, id="F32"),
        pytest.param(T.BF16, 3, 6, id="BF16"),
        pytest.param(T.Q4_0, 64, 36, id="Q4_0"),
        pytest.param(T.Q8_0, 64, 68, id="Q8_0"),
        pytest.param(T.Q2_K, 256, 84, id="Q2_K"),
        pytest.param(T.Q6_K, 512, 420, id="Q6_K"),
        pytest.param(T.IQ2_XXS, 256, 66, id="IQ2_XXS"),
        pytest.param(T.IQ4_NL, 64, 36, id="IQ4_NL"),
    ],
)
def test_bytes_of_a_type(ggml_type: T, n_elements: int, n_bytes: int) -> None:
    assert n_bytes_of(ggml_type, n_elements) == n_bytes


# --- damaged files, written byte by byte ---------------------------------------------------------------------------


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _key(name: str, kind: int, value: bytes) -> bytes:
    return _string(name) + struct.pack("<I", kind) + value


def _array(element: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", element, count) + values


def _tensor(name: str | bytes, shape: Sequence[int] = (32,), kind: int = T.F32, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _string(name) + dims + struct.pack("<IQ", kind, offset)


def _gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    data: int = 128,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """A file of these keys and tensors, padded to 32 bytes, then `data` zero bytes."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(data)


U32 = struct.pack("<I", 7)
GOOD = _gguf([_key("k", V.UINT32, U32), _key("s", V.STRING, _string("text"))], [_tensor("t")])


def _alignment(kind: int, value: bytes) -> bytes:
    return _gguf([_key("general.alignment", kind, value)], [_tensor("t")])


class Accepted(NamedTuple):
    """A file at the edge of what is whole, and what its header must say."""

    data: bytes
    keys: dict[str, Any]
    tensors: list[tuple[str, tuple[int, ...]]]


@pytest.mark.parametrize(
    "accepted",
    [
        pytest.param(Accepted(GOOD, {"k": 7, "s": "text"}, [("t", (32,))]), id="small"),
        pytest.param(Accepted(_gguf(), {}, []), id="nothing in it"),
        pytest.param(Accepted(_gguf([], [_tensor("t")], version=2), {}, [("t", (32,))]), id="version 2"),
        pytest.param(Accepted(_gguf([_key("s", V.STRING, _string(""))]), {"s": ""}, []), id="empty string"),
        pytest.param(Accepted(_gguf([_key("a", V.ARRAY, _array(V.STRING, 0))]), {"a": []}, []), id="empty array"),
        pytest.param(Accepted(_gguf([], [_tensor("n" * 63)]), {}, [("n" * 63, (32,))]), id="name of 63 bytes"),
        pytest.param(
            Accepted(_gguf([], [_tensor("t", (8, 1, 2, 2))]), {}, [("t", (8, 1, 2, 2))]), id="four dimensions"
        ),
    ],
)
def test_whole_files(tmp_path: Path, accepted: Accepted) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(accepted.data)
    header = read_header(path)
    assert {name: header.get(name) for name in header.keys} == accepted.keys
    assert [(t.name, t.shape) for t in header.tensors] == accepted.tensors


NOT_WHOLE = " is not a whole GGUF file: "
NOT_GGUF = " is not a GGUF file (it does not start with GGUF)"
BIG = 2**63

DAMAGED = [
    ("empty", b"", " is empty, not a GGUF file"),
    ("three bytes", b"GGU", NOT_WHOLE + "it ends inside its header (at byte 0 of 3)"),
    ("wrong magic", _gguf(magic=b"GGML"), NOT_GGUF),
    ("safetensors", b"\x08\0\0\0\0\0\0\0{}      ", NOT_GGUF),
    ("version 1", _gguf(version=1), NOT_WHOLE + "version 1 is not known here (2 and 3 are)"),
    ("version 4", _gguf(version=4), NOT_WHOLE + "version 4 is not known here (2 and 3 are)"),
    ("big endian", _gguf(version=3 << 24), NOT_WHOLE + "version 50331648 is not known here (2 and 3 are)"),
    ("2^63 keys", _gguf(n_keys=BIG), NOT_WHOLE + f"it claims {BIG} keys and 0 tensors in 160 bytes"),
    ("2^63 tensors", _gguf(n_tensors=BIG), NOT_WHOLE + f"it claims 0 keys and {BIG} tensors in 160 bytes"),
    ("13 keys in 160 bytes", _gguf(n_keys=13), NOT_WHOLE + "it claims 13 keys and 0 tensors in 160 bytes"),
    ("6 tensors in 160 bytes", _gguf(n_tensors=6), NOT_WHOLE + "it claims 0 keys and 6 tensors in 160 bytes"),
    ("a tensor too many", _gguf([], [_tensor("t")], n_tensors=2), NOT_WHOLE + "a tensor is named ''"),
    (
        "key name past the end",
        _gguf([struct.pack("<Q", BIG)]),
        NOT_WHOLE + f"a string at byte 32 claims {BIG} bytes, 128 are left",
    ),
    (
        "string one byte past the end",
        _gguf([_key("s", V.STRING, struct.pack("<Q", 148))], data=128),
        NOT_WHOLE + "a string at byte 45 claims 148 bytes, 147 are left",
    ),
    ("unknown key type", _gguf([_key("k", 13, U32)]), NOT_WHOLE + "key 'k' has the unknown type 13"),
    (
        "doubled key",
        _gguf([_key("k", V.UINT32, U32), _key("k", V.STRING, _string("x"))]),
        NOT_WHOLE + "key 'k' stands twice",
    ),
    (
        "array too long",
        _gguf([_key("a", V.ARRAY, _array(V.UINT8, BIG))]),
        NOT_WHOLE + f"an array at byte 49 claims {BIG} elements, more than the file can hold",
    ),
    (
        "array one element too long",
        _gguf([_key("a", V.ARRAY, _array(V.UINT64, 18))], data=128),
        NOT_WHOLE + "an array at byte 49 claims 18 elements, more than the file can hold",
    ),
    (
        "array of strings too long",
        _gguf([_key("a", V.ARRAY, _array(V.STRING, 2**61))]),
        NOT_WHOLE + f"an array at byte 49 claims {2**61} elements, more than the file can hold",
    ),
    (
        "unknown array type",
        _gguf([_key("a", V.ARRAY, _array(99, 1))]),
        NOT_WHOLE + "unknown array type 99 at byte 41",
    ),
    (
        "nested array",
        _gguf([_key("a", V.ARRAY, _array(V.ARRAY, 1, _array(V.UINT8, 1, b"\1")))]),
        NOT_WHOLE + "arrays of arrays are not part of the format",
    ),
    (
        "first string of an array past the end",
        _gguf([_key("a", V.ARRAY, _array(V.STRING, 2, struct.pack("<Q", BIG)))]),
        NOT_WHOLE + f"it ends inside an array of strings (at byte {57 + BIG} of 192)",
    ),
    (
        "last string of an array past the end",
        _gguf([_key("a", V.ARRAY, _array(V.STRING, 1, struct.pack("<Q", 136)))]),
        NOT_WHOLE + "the last string of an array reaches past the end",
    ),
    ("no tensor name", _gguf([], [_tensor("")]), NOT_WHOLE + "a tensor is named ''"),
    ("slash in a name", _gguf([], [_tensor("../t")]), NOT_WHOLE + "a tensor is named '../t'"),
    ("backslash in a name", _gguf([], [_tensor("a\\t")]), NOT_WHOLE + "a tensor is named 'a\\\\t'"),
    ("name of 64 bytes", _gguf([], [_tensor("n" * 64)]), NOT_WHOLE + f"a tensor is named '{'n' * 64}'"),
    ("name of 32 letters, 64 bytes", _gguf([], [_tensor("é" * 32)]), NOT_WHOLE + f"a tensor is named '{'é' * 32}'"),
    ("doubled tensor", _gguf([], [_tensor("t"), _tensor("t", offset=128)]), NOT_WHOLE + "tensor t stands twice"),
    ("no dimensions", _gguf([], [_tensor("t", ())]), NOT_WHOLE + "tensor t has 0 dimensions"),
    ("five dimensions", _gguf([], [_tensor("t", (2, 2, 2, 2, 2))]), NOT_WHOLE + "tensor t has 5 dimensions"),
    (
        "2^32-1 dimensions",
        _gguf([], [_string("t") + struct.pack("<I", 2**32 - 1)]),
        NOT_WHOLE + "tensor t has 4294967295 dimensions",
    ),
    ("removed type Q4_2", _gguf([], [_tensor("t", kind=4)]), NOT_WHOLE + "tensor t has the unknown type 4"),
    ("unknown tensor type", _gguf([], [_tensor("t", kind=999)]), NOT_WHOLE + "tensor t has the unknown type 999"),
    ("zero columns", _gguf([], [_tensor("t", (0,))]), NOT_WHOLE + "tensor t of shape [0] cannot be F32"),
    ("zero rows", _gguf([], [_tensor("t", (32, 0))]), NOT_WHOLE + "tensor t of shape [32, 0] cannot be F32"),
    (
        "columns not a multiple of 32",
        _gguf([], [_tensor("t", (48, 2), T.Q8_0)]),
        NOT_WHOLE + "tensor t of shape [48, 2] cannot be Q8_0",
    ),
    (
        "columns not a multiple of 256",
        _gguf([], [_tensor("t", (128, 2), T.Q4_K)]),
        NOT_WHOLE + "tensor t of shape [128, 2] cannot be Q4_K",
    ),
    ("misaligned", _gguf([], [_tensor("t", (8,), offset=16)]), NOT_WHOLE + "tensor t is not aligned to 32 bytes"),
    (
        "misaligned by the file's own alignment",
        _gguf([_key("general.alignment", V.UINT32, struct.pack("<I", 64))], [_tensor("t", (8,), offset=32)]),
        NOT_WHOLE + "tensor t is not aligned to 64 bytes",
    ),
    ("same place", _gguf([], [_tensor("a"), _tensor("b")], data=256), NOT_WHOLE + "tensor b overlaps a"),
    (
        "overlap by one byte",
        _gguf([], [_tensor("b", (8,), offset=128), _tensor("a", (129,), T.I8)], data=256),
        NOT_WHOLE + "tensor b overlaps a",
    ),
    ("cut in the data", _gguf([], [_tensor("t")], data=127), NOT_WHOLE + "tensor t reaches 1 bytes past the end"),
    ("no data", _gguf([], [_tensor("t")], data=0), NOT_WHOLE + "tensor t reaches 128 bytes past the end"),
    (
        "offset past the end",
        _gguf([], [_tensor("t", offset=2**64 - 32)]),
        NOT_WHOLE + f"tensor t reaches {2**64 - 32} bytes past the end",
    ),
    (
        "shape of 2^252 elements",
        _gguf([], [_tensor("t", (BIG, BIG, BIG, BIG))]),
        NOT_WHOLE + f"tensor t reaches {4 * BIG**4 - 128} bytes past the end",
    ),
    ("alignment 0", _alignment(V.UINT32, bytes(4)), NOT_WHOLE + "general.alignment is 0, not a power of two"),
    (
        "alignment 48",
        _alignment(V.UINT32, struct.pack("<I", 48)),
        NOT_WHOLE + "general.alignment is 48, not a power of two",
    ),
    (
        "alignment -32",
        _alignment(V.INT32, struct.pack("<i", -32)),
        NOT_WHOLE + "general.alignment is -32, not a power of two",
    ),
    (
        "alignment as a float",
        _alignment(V.FLOAT32, struct.pack("<f", 32)),
        NOT_WHOLE + "general.alignment is 32.0, not a power of two",
    ),
    (
        "alignment as text",
        _alignment(V.STRING, _string("32")),
        NOT_WHOLE + "general.alignment is '32', not a power of two",
    ),
    (
        "alignment as an array",
        _alignment(V.ARRAY, _array(V.UINT32, 1, struct.pack("<I", 32))),
        NOT_WHOLE + "general.alignment is an array, not a power of two",
    ),
    (
        "alignment as a truth value",
        _alignment(V.BOOL, b"\1"),
        NOT_WHOLE + "general.alignment is True, not a power of two",
    ),
    (
        "alignment of 2^31",
        _alignment(V.UINT32, struct.pack("<I", 2**31)),
        NOT_WHOLE + f"tensor t reaches {2**31 + 128 - 224} bytes past the end",
    ),
]


@pytest.mark.parametrize(("data", "message"), [pytest.param(data, why, id=name) for name, data, why in DAMAGED])
def test_damaged_files_are_refused_with_their_reason(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(BadInputError) as caught:
        read_header(path)
    assert caught.value.what == f"{path}{message}"
    if message.startswith(NOT_WHOLE):
        assert caught.value.next_step == "Make or download it again."


# Each claim fits a file of a terabyte, which here is a hole without bytes on the disk.
ENORMOUS = {
    "keys": (_gguf(n_keys=65_537), "it claims 65,537 keys and 0 tensors, more than are read"),
    "tensors": (_gguf(n_tensors=1 << 30), "it claims 0 keys and 1,073,741,824 tensors, more than are read"),
    "string": (
        _gguf([_key("k", V.STRING, struct.pack("<Q", 1 << 30))]),
        "a string at byte 45 claims 1,073,741,824 bytes, more than the 16,777,216 that are read",
    ),
    "name of a key": (
        _gguf([struct.pack("<Q", 1 << 30)], n_keys=1),
        "a string at byte 32 claims 1,073,741,824 bytes, more than the 16,777,216 that are read",
    ),
    "name of a tensor": (
        _gguf([], [struct.pack("<Q", 1 << 30)]),
        "a string at byte 32 claims 1,073,741,824 bytes, more than the 16,777,216 that are read",
    ),
    "array": (
        _gguf([_key("k", V.ARRAY, _array(V.UINT8, 1 << 30))]),
        "an array at byte 49 claims 1,073,741,824 elements, more than the 16,777,216 that are read",
    ),
    "array of strings": (
        _gguf([_key("k", V.ARRAY, _array(V.STRING, (1 << 24) + 1))]),
        "an array at byte 49 claims 16,777,217 elements, more than the 16,777,216 that are read",
    ),
    "one long string of an array": (
        _gguf([_key("k", V.ARRAY, _array(V.STRING, 1, struct.pack("<Q", 1 << 30)))], n_keys=2),
        "its keys take more than the 268,435,456 bytes that are read",
    ),
}


@pytest.mark.parametrize(("data", "why"), ENORMOUS.values(), ids=ENORMOUS)
def test_claims_beyond_any_model_are_refused_unread(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(data)
        file.truncate(10**12)
    with pytest.raises(BadInputError) as caught:
        read_header(path)
    assert caught.value.what == f"{path}{NOT_WHOLE}{why}"


def test_alignment_must_have_the_type_that_llama_cpp_reads(tmp_path: Path) -> None:
    """llama.cpp refuses any type but uint32 (ggml/src/gguf.cpp), whatever the number is."""
    path = tmp_path / "model.gguf"
    path.write_bytes(_alignment(V.UINT64, struct.pack("<Q", 32)))
    with pytest.raises(BadInputError, match=r"general\.alignment"):
        read_header(path)


@pytest.mark.parametrize("missing", ["no-such-file.gguf", "."], ids=["missing", "directory"])
def test_no_file(tmp_path: Path, missing: str) -> None:
    path = tmp_path / missing
    with pytest.raises(BadInputError) as caught:
        read_header(path)
    assert caught.value.what == f"there is no file {path}"


@pytest.fixture
def compact(tmp_path: Path) -> Path:
    """A file of `gguf` with few keys, so that its header can be damaged at every byte of it."""
    return _write_gguf(tmp_path / "compact.gguf", _tensors()[:4], keys=False)


def _outcome(path: Path) -> Header | str | None:
    """The header, None when it was refused as it should be, or the text of any other exception."""
    try:
        header = read_header(path)
        for name in header.keys:
            header.get(name)
        for tensor in header.tensors:
            header.read(tensor)
    except BadInputError:
        return None
    except Exception as error:  # noqa: BLE001 - that there is none is what these tests are about
        return repr(error)
    return header


@pytest.mark.parametrize("with_keys", [True, False], ids=["many keys", "few keys"])
def test_cut_at_every_byte_of_the_header(tmp_path: Path, with_keys: bool) -> None:
    """A file that ends anywhere before its data is refused, and never as a bug."""
    whole = _write_gguf(tmp_path / "whole.gguf", _tensors(), keys=with_keys)
    data, start = whole.read_bytes(), read_header(whole).data_start
    path = tmp_path / "cut.gguf"
    assert start > 50
    accepted = {}
    for at in range(start + 1):
        path.write_bytes(data[:at])
        if (outcome := _outcome(path)) is not None:
            accepted[at] = outcome
    assert accepted == {}


FIFTIETHS = [pytest.param(part, id=f"{part} fiftieths") for part in range(50)]


@pytest.mark.parametrize("part", FIFTIETHS)
def test_cut_says_that_the_file_is_not_whole(sample: Path, part: int) -> None:
    header = read_header(sample)
    data = sample.read_bytes()[: header.data_start * part // 50]
    sample.write_bytes(data)
    with pytest.raises(BadInputError, match=r"ends inside|is empty|claims|reaches|past the end") as caught:
        read_header(sample)
    assert str(sample) in caught.value.what


def test_cut_in_the_data_names_the_tensor(sample: Path) -> None:
    """The tensor that the cut falls into is named, wherever in its data that is."""
    header, data = read_header(sample), sample.read_bytes()
    for tensor in header.tensors:
        end = tensor.offset + tensor.n_bytes
        for at, missing in ((tensor.offset, tensor.n_bytes), (end - 1, 1)):
            sample.write_bytes(data[:at])
            with pytest.raises(BadInputError) as caught:
                read_header(sample)
            assert caught.value.what.endswith(f"tensor {tensor.name} reaches {missing} bytes past the end")


@pytest.mark.parametrize(
    "change", [0x00, 0x01, 0x7F, 0xFF], ids=["zero", "low bit", "all but the high bit", "all bits"]
)
def test_any_changed_byte_is_understood_or_refused(compact: Path, change: int) -> None:
    """A changed byte in the header gives another header or `BadInputError`, never another exception."""
    data, start = compact.read_bytes(), read_header(compact).data_start
    bugs = {}
    for at in range(start):
        value = 0 if change == 0 else data[at] ^ change
        compact.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
        if isinstance(outcome := _outcome(compact), str):
            bugs[at] = outcome
        elif isinstance(outcome, Header):
            by_place = sorted(outcome.tensors, key=lambda t: t.offset)
            assert all(a.offset + a.n_bytes <= b.offset for a, b in pairwise(by_place))
            assert all(t.offset + t.n_bytes <= len(data) for t in outcome.tensors)
    assert bugs == {}


def test_reading_a_file_that_was_cut_after_its_header_was_read(sample: Path) -> None:
    header = read_header(sample)
    tensor = header.by_name["blk.0.attn_k.weight"]
    sample.write_bytes(sample.read_bytes()[: tensor.offset + 700])
    assert header.read(tensor, 0, 1).shape == (1, 544)
    with pytest.raises(BadInputError) as caught:
        header.read(tensor, 1, 1)
    assert caught.value.what == f"{sample} ends inside tensor blk.0.attn_k.weight"
