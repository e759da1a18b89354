"""Imatrix files in llama-imatrix's layout, whole and broken, and its command line."""

import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFWriter
from gguf.constants import GGUFValueType as V

from gemma_gguf import calibration, gguf_io, imatrix
from gemma_gguf.errors import BadInputError, ToolFailedError, VerificationError
from gemma_gguf.gguf_io import Header
from gemma_gguf.imatrix import Imatrix
from gemma_gguf.llama_cpp import Build, RunLog, run_tool
from gemma_gguf.session import Report

Array = npt.NDArray[Any]
Q, DOWN, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_down.weight", "blk.0.ffn_gate_exps.weight"
# name -> shape of the base's tensor as numpy has it: (experts, rows, columns)
BASE = {"token_embd.weight": (10, 32), Q: (16, 32), DOWN: (32, 64), EXPERTS: (4, 16, 32), "output_norm.weight": (32,)}
METADATA: dict[str, Any] = {
    "general.type": "imatrix",
    "imatrix.datasets": ["calibration-default.txt"],
    "imatrix.chunk_count": 8,
    "imatrix.chunk_size": 512,
}


def _write(path: Path, metadata: dict[str, Any], tensors: dict[str, Array]) -> Path:
    writer = GGUFWriter(path, "none")
    writer.kv_data[0].clear()  # llama-imatrix writes no architecture
    for name, value in metadata.items():
        kind = V.UINT32 if type(value) is int else V.get_type(value)
        writer.add_key_value(name, value, kind)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors() -> dict[str, Array]:
    """Sums of squares and counts of three weights, as ggml writes them: no dimension for a single matrix."""
    rng = np.random.default_rng(5)
    made: dict[str, Array] = {}
    for name, sums, counts in ((Q, (32,), (1,)), (DOWN, (64,), (1,)), (EXPERTS, (4, 32), (4, 1))):
        made[f"{name}.in_sum2"] = rng.uniform(1, 9, sums).astype(np.float32)
        made[f"{name}.counts"] = np.full(counts, 4096, dtype=np.float32)
    return made


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return _write(tmp_path / "good.gguf", METADATA, _tensors())


@pytest.fixture
def base(tmp_path: Path) -> Header:
    tensors = {name: np.zeros(shape, dtype=np.float16) for name, shape in BASE.items()}
    return gguf_io.read_header(_write(tmp_path / "base.gguf", {"general.type": "model"}, tensors))


# --- read ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "n_chunks"),
    [({}, 8), ({DOWN: 8192}, 4), ({Q: 0}, 8), ({EXPERTS: 10}, 8)],
    ids=["once", "twice", "queries-unseen", "experts-seen-less"],
)
def test_chunks_are_those_of_text(counts: dict[str, int], n_chunks: int, tmp_path: Path) -> None:
    """llama-imatrix counts by the tensor that was used most; some of Gemma 3n's are used twice for every token."""
    tensors = _tensors()
    for name, count in counts.items():
        tensors[f"{name}.counts"][...] = count
    assert imatrix.read(_write(tmp_path / "i.gguf", METADATA, tensors)).n_chunks == n_chunks


def test_read(good: Path) -> None:
    read = imatrix.read(good)
    assert (read.path, read.n_chunks, read.chunk_size) == (good, 8, 512)
    assert read.datasets == ("calibration-default.txt",)
    assert list(read.entries) == [Q, DOWN, EXPERTS]
    written = _tensors()
    for name, entry in read.entries.items():
        assert entry.sums.dtype == entry.counts.dtype == np.float32
        assert np.array_equal(entry.sums, np.atleast_2d(written[f"{name}.in_sum2"]))
        assert np.array_equal(entry.counts, written[f"{name}.counts"].reshape(-1))
    assert read.entries[Q].sums.shape == (1, 32)
    assert read.entries[EXPERTS].sums.shape == (4, 32)
    assert read.entries[EXPERTS].counts.shape == (4,)


def test_read_several_datasets(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.gguf", {**METADATA, "imatrix.datasets": ["a.txt", "b.txt"]}, _tensors())
    assert imatrix.read(path).datasets == ("a.txt", "b.txt")


def _legacy() -> bytes:
    """The format before GGUF: entries of name, calls, values; then chunks and dataset."""
    entry = struct.pack("<i", len(Q)) + Q.encode() + struct.pack("<2i32f", 8, 32, *[1.0] * 32)
    return struct.pack("<i", 1) + entry + struct.pack("<ii", 8, 5) + b"a.txt"


@pytest.mark.parametrize(
    "content",
    [pytest.param(_legacy(), id="legacy"), pytest.param(b"", id="empty"), pytest.param(b"GGU", id="three bytes")],
)
def test_what_is_no_gguf_is_told_how_to_become_one(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(content)
    with pytest.raises(BadInputError) as caught:
        imatrix.read(path)
    assert caught.value.what == f"{path} is not an imatrix in GGUF format"
    assert caught.value.next_step == (
        "Convert an old one: llama-imatrix --in-file old.dat -o new.gguf --output-format gguf"
    )


def _without(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


NO_TYPE = " is a GGUF file, but not an imatrix (general.type is not imatrix)"
NO_CHUNKS = " does not say how many chunks it was computed on"


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        pytest.param({**METADATA, "general.type": "model"}, _tensors(), NO_TYPE, id="a model"),
        pytest.param(_without(METADATA, "general.type"), _tensors(), NO_TYPE, id="no type"),
        pytest.param(_without(METADATA, "imatrix.chunk_count"), _tensors(), NO_CHUNKS, id="no chunk count"),
        pytest.param(_without(METADATA, "imatrix.chunk_size"), _tensors(), NO_CHUNKS, id="no chunk size"),
        pytest.param({**METADATA, "imatrix.chunk_count": "8"}, _tensors(), NO_CHUNKS, id="chunk count as text"),
        pytest.param({**METADATA, "imatrix.chunk_size": 512.0}, _tensors(), NO_CHUNKS, id="chunk size as a float"),
        pytest.param(
            METADATA,
            _without(_tensors(), f"{DOWN}.counts"),
            f" has {DOWN}.in_sum2 but not {DOWN}.counts",
            id="counts missing",
        ),
    ],
)
def test_a_gguf_that_is_no_imatrix(
    tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Array], message: str
) -> None:
    path = _write(tmp_path / "m.gguf", metadata, tensors)
    with pytest.raises(BadInputError) as caught:
        imatrix.read(path)
    assert caught.value.what == f"{path}{message}"


def _changed(name: str, change: Callable[[Array], Array]) -> dict[str, Array]:
    tensors = _tensors()
    tensors[name] = change(tensors[name])
    return tensors


NOT_FOR_LLAMA_QUANTIZE = [
    pytest.param(METADATA, _changed(f"{Q}.in_sum2", lambda a: a.astype(np.float16)), id="sums in F16"),
    pytest.param(METADATA, _changed(f"{Q}.in_sum2", lambda a: a[:31].astype(np.float16)), id="31 sums in F16"),
    pytest.param(METADATA, _changed(f"{Q}.in_sum2", lambda a: a.astype(np.float64)), id="sums in F64"),
    pytest.param(METADATA, _changed(f"{Q}.counts", lambda a: a.astype(np.int32)), id="counts in I32"),
    pytest.param(METADATA, _changed(f"{Q}.counts", lambda a: a.astype(np.float16)), id="counts in F16"),
    pytest.param(METADATA, _without(_tensors(), f"{Q}.counts"), id="sums without counts"),
    pytest.param(METADATA, _without(_tensors(), f"{Q}.in_sum2"), id="counts without sums"),
    pytest.param(METADATA, {}, id="no tensors"),
    pytest.param(_without(METADATA, "imatrix.datasets"), _tensors(), id="no datasets"),
    pytest.param(_without(METADATA, "imatrix.chunk_count"), _tensors(), id="no chunk count"),
]


@pytest.mark.parametrize(("metadata", "tensors"), NOT_FOR_LLAMA_QUANTIZE)
def test_what_llama_quantize_refuses_is_refused_by_read(
    tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Array]
) -> None:
    path = _write(tmp_path / "m.gguf", metadata, tensors)
    with pytest.raises(BadInputError) as caught:
        imatrix.read(path)
    assert str(path) in caught.value.what


def _ask_llama_quantize(build: Build, path: Path, log: RunLog) -> str:
    """What llama-quantize says of an imatrix before it looks for the model, which is not there."""
    argv: list[str | Path] = [
        build.tool("llama-quantize"),
        "--imatrix",
        path,
        "--dry-run",
        path.with_name("none.gguf"),
        "Q4_0",
    ]
    with pytest.raises(ToolFailedError):
        run_tool(argv, log=log)
    return log.path.read_text()


@pytest.mark.parametrize(("metadata", "tensors"), NOT_FOR_LLAMA_QUANTIZE)
def test_llama_quantize_does_refuse_them(
    tmp_path: Path, build: Build, log: RunLog, metadata: dict[str, Any], tensors: dict[str, Array]
) -> None:
    """The oracle of the test above."""
    said = _ask_llama_quantize(build, _write(tmp_path / "m.gguf", metadata, tensors), log)
    assert re.search("load_imatrix: (failed to load imatrix from|missing imatrix metadata in file)", said)
    assert "have 3 importance matrix entries" not in said


def test_llama_quantize_takes_the_good_one(build: Build, log: RunLog, good: Path) -> None:
    """The files of these tests are in the layout that llama.cpp reads."""
    said = _ask_llama_quantize(build, good, log)
    assert "load_imatrix: imatrix datasets=['calibration-default.txt']" in said
    assert f"load_imatrix: loaded 3 importance matrix entries from {good} computed on 8 chunks" in said


@pytest.mark.parametrize("datasets", [5, "calibration.txt", [1, 2]], ids=["a number", "a text", "numbers"])
def test_datasets_that_are_no_list_of_texts(tmp_path: Path, datasets: object) -> None:
    """llama.cpp passes over them; here they are refused or passed over, never a bug and never a list of letters."""
    path = _write(tmp_path / "m.gguf", {**METADATA, "imatrix.datasets": datasets}, _tensors())
    try:
        read = imatrix.read(path)
    except BadInputError:
        return
    assert read.datasets == ()


def test_cut_anywhere_it_is_refused(good: Path) -> None:
    """Every tenth of the file and both ends; what is left is never taken for an imatrix."""
    whole = good.read_bytes()
    header = gguf_io.read_header(good)
    last = header.tensors[-1]
    assert len(whole) - last.offset - last.n_bytes < 32
    for at in (*range(0, last.offset, max(1, last.offset // 100)), last.offset + last.n_bytes - 1):
        good.write_bytes(whole[:at])
        with pytest.raises(BadInputError):
            imatrix.read(good)


# --- check ---------------------------------------------------------------------------------------------------------


def _read(tmp_path: Path, tensors: dict[str, Array]) -> Imatrix:
    return imatrix.read(_write(tmp_path / "m.gguf", METADATA, tensors))


@pytest.mark.parametrize("n_chunks", [None, 8])
def test_check_of_a_good_one(good: Path, base: Header, n_chunks: int | None) -> None:
    """No exception, and what was read is still what was written."""
    read = imatrix.read(good)
    imatrix.check(read, base, n_chunks=n_chunks)
    assert np.array_equal(read.entries[Q].sums[0], _tensors()[f"{Q}.in_sum2"])


class Refused(NamedTuple):
    """A change of one tensor and what `check` must say of it."""

    tensor: str
    change: Callable[[Array], Array]
    what: str
    next_step: str


def _put(index: int, value: float) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        array.reshape(-1)[index] = value
        return array

    return change


OTHER = "Use the imatrix of this very model, or leave --imatrix out to compute one."


@pytest.mark.parametrize(
    "refused",
    [
        pytest.param(
            Refused(f"{Q}.in_sum2", lambda a: a[:31], f"is of another model: {Q} has 31 columns there", OTHER),
            id="a column less",
        ),
        pytest.param(
            Refused(
                f"{Q}.in_sum2",
                lambda a: np.concatenate([a, a]),
                f"is of another model: {Q} has 64 columns there",
                OTHER,
            ),
            id="twice the columns",
        ),
    ],
)
def test_check_refuses(tmp_path: Path, base: Header, refused: Refused) -> None:
    read = _read(tmp_path, _changed(refused.tensor, refused.change))
    with pytest.raises(VerificationError) as caught:
        imatrix.check(read, base, n_chunks=8)
    assert caught.value.what == f"{read.path} {refused.what}"
    assert caught.value.next_step == refused.next_step


def test_check_refuses_a_tensor_that_the_base_does_not_have(tmp_path: Path, base: Header) -> None:
    tensors = {**_tensors(), "blk.1.attn_q.weight.in_sum2": np.ones((1, 32), dtype=np.float32)}
    tensors["blk.1.attn_q.weight.counts"] = np.ones((1, 1), dtype=np.float32)
    read = _read(tmp_path, tensors)
    with pytest.raises(VerificationError) as caught:
        imatrix.check(read, base)
    assert caught.value.what == (f"{read.path} is of another model: blk.1.attn_q.weight is not a tensor of this one")


@pytest.mark.parametrize("experts", [1, 2, 8])
def test_check_refuses_another_number_of_experts(tmp_path: Path, base: Header, experts: int) -> None:
    """llama-quantize wants a sum for every column of every expert, and stops at the first tensor without."""
    tensors = _tensors()
    tensors[f"{EXPERTS}.in_sum2"] = np.ones((experts, 32), dtype=np.float32)
    tensors[f"{EXPERTS}.counts"] = np.ones((experts, 1), dtype=np.float32)
    read = _read(tmp_path, tensors)
    with pytest.raises(VerificationError, match=f"is of another model: {EXPERTS}"):
        imatrix.check(read, base)


@pytest.mark.parametrize("n_chunks", [0, 7, 9])
def test_check_refuses_another_number_of_chunks(good: Path, base: Header, n_chunks: int) -> None:
    """llama-imatrix saves every ten chunks: a file of a stopped run looks whole otherwise."""
    with pytest.raises(VerificationError) as caught:
        imatrix.check(imatrix.read(good), base, n_chunks=n_chunks)
    assert caught.value.what == f"{good} holds 8 chunks, {n_chunks} were to be computed"


# --- llama-imatrix -------------------------------------------------------------------------------------------------

A_BUILD = Build(
    root=Path("/builds/abc"),
    key="abc",
    source="pypi:0.3.36",
    source_sha256="0" * 64,
    version="0.5.0-dev",
    build_number=0,
    commit="0c1e57098",
    backend="cpu",
    compiler="c++ 12",
    cmake_args=(),
    machine="Linux-x86_64",
    seconds=1.0,
)


@pytest.mark.parametrize(
    ("options", "more"),
    [
        pytest.param({}, [], id="defaults"),
        pytest.param({"chunks": 8}, ["--chunks", "8"], id="chunks"),
        pytest.param({"threads": 2}, ["-t", "2"], id="threads"),
        pytest.param({"gpu_layers": 99}, ["-ngl", "99"], id="gpu"),
        pytest.param({"gpu_layers": 0, "chunks": None, "threads": None}, [], id="nothing asked for"),
        pytest.param(
            {"gpu_layers": 1, "threads": 16, "chunks": 120},
            ["--chunks", "120", "-t", "16", "-ngl", "1"],
            id="everything",
        ),
    ],
)
def test_imatrix_argv(options: dict[str, Any], more: list[str]) -> None:
    assert imatrix.imatrix_argv(A_BUILD, "m-bf16.gguf", "text.txt", "m-imatrix.partial.gguf", **options) == [
        "/builds/abc/bin/llama-imatrix",
        "-m",
        "m-bf16.gguf",
        "-f",
        "text.txt",
        "-o",
        "m-imatrix.partial.gguf",
        "--parse-special",
        "-c",
        "512",
        "-b",
        "512",
        "-ub",
        "512",
        *more,
    ]


# --- coverage ------------------------------------------------------------------------------------------------------


def _entry(*experts: tuple[float, list[float]]) -> imatrix.Entry:
    """(tokens, sum of squared activations per column) of each expert."""
    return imatrix.Entry(
        np.array([sums for _, sums in experts], dtype=np.float32),
        np.array([count for count, _ in experts], dtype=np.float32),
    )


def _imatrix(entries: dict[str, imatrix.Entry]) -> Imatrix:
    return Imatrix(Path("made-up"), 1, 512, ("text",), entries)


@pytest.mark.parametrize(
    ("sums", "active", "evenness"),
    [
        pytest.param([4.0, 4.0, 4.0, 4.0], 1.0, 1.0, id="all alike"),
        pytest.param([8.0, 0.0, 0.0, 0.0], 0.25, 0.0, id="one alone"),
        pytest.param([2.0, 2.0, 0.0, 0.0], 0.5, 0.5, id="two of four"),
        pytest.param([0.0, 0.0, 0.0, 0.0], 0.0, 0.0, id="nothing"),
        pytest.param([4.0, 4.0, 4.0, 1e-6], 0.75, 0.7925, id="one below what counts as active"),
    ],
)
def test_coverage_of_columns(sums: list[float], active: float, evenness: float) -> None:
    (row,) = imatrix.coverage(_imatrix({"blk.0.attn_q.weight": _entry((2, sums))}))
    assert row.active == [active]
    assert row.evenness == [pytest.approx(evenness, abs=1e-4)]


def test_coverage_by_kind_and_layer() -> None:
    entries = {
        "blk.10.ffn_down.weight": _entry((512, [1.0, 1.0])),
        "blk.2.ffn_down.weight": _entry((512, [1.0, 0.0])),
        "blk.2.attn_k.weight": _entry((512, [1.0, 1.0])),
        "output.weight": _entry((512, [1.0, 1.0])),
    }
    rows = imatrix.coverage(_imatrix(entries))
    assert [(row.kind, row.layers, row.evenness) for row in rows] == [
        ("attn_k", [2], [1.0]),
        ("ffn_down", [2, 10], [0.0, 1.0]),
    ]


def test_coverage_of_experts() -> None:
    """Tokens of the least, the middle and the most used expert; those without data do not count for the columns."""
    experts = _entry((0, [0.0, 0.0]), (5, [5.0, 5.0]), (100, [100.0, 100.0]), (7, [7.0, 7.0]), (0, [0.0, 0.0]))
    (row,) = imatrix.coverage(_imatrix({"blk.0.ffn_down_exps.weight": experts}))
    assert (row.n_experts, row.tokens_min, row.tokens_median, row.tokens_max) == (5, [0], [5], [100])
    assert (row.unseen, row.active, row.evenness) == ([2], [1.0], [1.0])


def test_coverage_is_what_llama_imatrix_shows(build: Build, log: RunLog, finished: Report) -> None:
    """ "% Active" and "E (norm)" of `--show-statistics`, which wants a model's name without reading it.

    The tool may end before its log is written, so it is asked until it has told of every tensor.
    """
    (path,) = finished.set_dir.glob("*-imatrix.gguf")
    ours = {
        (row.kind, layer): [f"{100 * row.active[n]:.2f}", f"{100 * row.evenness[n]:.2f}"]
        for row in imatrix.coverage(imatrix.read(path))
        for n, layer in enumerate(row.layers)
    }
    shown: dict[tuple[str, int], list[str]] = {}
    for _ in range(300):
        argv: list[str | Path] = [build.tool("llama-imatrix"), "-m", "none", "--in-file", path, "--show-statistics"]
        for line in run_tool(argv, log=log).output.splitlines():
            if match := re.search(r"(\d+)\s+((?:attn|ffn)_\w+)\s+\d.*%.*%", line):
                shown[match[2], int(match[1])] = re.findall(r"([\d.]+)%", line)[:2]
        if len(shown) >= len(ours):
            break
    assert len(ours) == 21
    assert ours == shown


def test_file_name() -> None:
    assert imatrix.file_name("google_gemma-3-4b-it") == "google_gemma-3-4b-it-imatrix.gguf"


def _fake_tool(tmp_path: Path, script: str) -> list[str]:
    """A real executable in the place of llama-imatrix."""
    path = replace(A_BUILD, root=tmp_path).tool("llama-imatrix")
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return [str(path)]


def test_compute_reports_every_chunk(tmp_path: Path, log: RunLog) -> None:
    """llama-imatrix separates its chunks by commas and flushes in the middle of one."""
    argv = _fake_tool(
        tmp_path,
        "echo 'compute_imatrix: computing over 3 chunks, n_ctx=512, batch_size=512, n_seq=1' >&2\n"
        "printf '[1]25.1234,[2]2'; sleep 0.2; printf '4.9876,[3]24.5000,\\n'\n"
        "echo 'Final estimate: PPL = 24.5000 +/- 1.2'\n"
        "pwd",
    )
    seen: list[tuple[str, float, float, str]] = []
    done, planned = imatrix.run_segment(
        argv,
        32,
        35,
        cwd=tmp_path,
        log=log,
        progress=lambda label, n, total, unit="": seen.append((label, n, total, unit)),
    )
    assert planned == 3
    assert seen == [("computing the imatrix", 32 + n, 35, "chunks") for n in (1, 2, 3)]
    assert done.output.splitlines()[-1] == str(tmp_path)


def test_compute_that_does_not_say_what_it_computes(tmp_path: Path, log: RunLog) -> None:
    with pytest.raises(VerificationError) as caught:
        imatrix.run_segment(_fake_tool(tmp_path, "echo '[1]2.0,'"), 0, 9, cwd=tmp_path, log=log)
    assert caught.value.what == "llama-imatrix did not say how many chunks it computes"
    assert caught.value.log == log.path


@pytest.mark.parametrize(
    ("n_chunks", "size", "expected"),
    [
        pytest.param(5, 32, [(0, 5)], id="one run"),
        pytest.param(64, 32, [(0, 32), (32, 32)], id="two runs"),
        pytest.param(66, 32, [(0, 32), (32, 34)], id="two chunks left are refused by llama-imatrix"),
        pytest.param(67, 32, [(0, 32), (32, 32), (64, 3)], id="three are not"),
        pytest.param(1, 32, [(0, 1)], id="a single chunk"),
        pytest.param(4, 1, [(0, 1), (1, 3)], id="the shortest runs"),
    ],
)
def test_segments(n_chunks: int, size: int, expected: list[tuple[int, int]]) -> None:
    assert imatrix.segments(n_chunks, size) == expected
    assert sum(count for _, count in expected) == n_chunks


def test_runs_in_parts_end_with_the_bytes_of_one_run(
    build: Build, finished: Report, log: RunLog, tmp_path: Path
) -> None:
    """Real llama-imatrix: 11 chunks at once, in runs of 4, and in runs of 4 of which one was killed and one done."""
    shutil.copy(finished.set_dir / "test_tiny-vision-bf16.gguf", tmp_path / "base.gguf")
    (tmp_path / "text.txt").write_bytes(calibration.load("default", tmp_path).data)

    def argv_of(first: int, count: int | None, continue_from: str | None, out: str) -> list[str]:
        return imatrix.imatrix_argv(
            build, "base.gguf", "text.txt", out, first_chunk=first, chunks=count, continue_from=continue_from
        )

    def compute(name: str, size: int) -> tuple[bytes, int]:
        path, computed, _ = imatrix.compute(
            argv_of, n_chunks=11, directory=tmp_path / name, cwd=tmp_path, log=log, segment_chunks=size
        )
        return path.read_bytes(), computed

    whole, in_parts = compute("whole", 99), compute("parts", 4)
    assert whole == in_parts
    assert whole[1] == 11
    plain = imatrix.imatrix_argv(build, "base.gguf", "text.txt", "plain.gguf", chunks=11)
    run_tool(plain, log=log, cwd=tmp_path)
    assert (tmp_path / "plain.gguf").read_bytes() == whole[0]
    (tmp_path / "killed").mkdir()
    shutil.copy(tmp_path / "parts" / "part-0.gguf", tmp_path / "killed")
    (tmp_path / "killed" / "part-4.partial.gguf").write_bytes(whole[0][:1000])  # what a killed run left
    started = log.path.read_text().count("llama-imatrix -m")
    assert compute("killed", 4) == whole
    assert log.path.read_text().count("llama-imatrix -m") == started + 2
