"""What a fan-out worker does: one function, self-contained, the same for every executor.

Consumes the path of a job file and the number of a task in it; produces bytes in the job's output files and a few
figures. A task is a list of (tensor, row range): the source rows are read and widened once, quantised once per
distinct target type, validated, and written to every output that wants them. Tasks share nothing and may run twice:
they write the same bytes to the same places.
"""

import contextlib
import faulthandler
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from gemma_gguf import files, gguf_io
from gemma_gguf.files import open_log, pwrite_all
from gemma_gguf.libggml import Ggml, Kernels

# What a task's CPU time goes into; `quantize` is inside ggml's functions, or the kernels'.
PARTS = ("read", "widen", "quantize", "write")


@dataclass(frozen=True)
class TaskDone:
    """Figures of one finished task: seconds of CPU in all and of its `PARTS`, bytes moved.

    `edges` are what it left to the driver: (output, offset, bytes) of blocks that it shares with other tasks.
    """

    index: int
    cpu_seconds: float
    part_seconds: Mapping[str, float]
    read_bytes: int
    written_bytes: int
    edges: tuple[tuple[int, int, bytes], ...]


class _Context:
    """What a worker process keeps open between the tasks of one job."""

    def __init__(self, job_path: Path) -> None:
        self.job: dict[str, Any] = json.loads(job_path.read_text())
        self.ggml = Ggml(Path(self.job["bin_dir"]), Kernels.parse(self.job["kernels"]))
        self.base = os.open(self.job["base"], os.O_RDONLY)
        self.outputs: dict[int, int] = {}
        self.imatrix = gguf_io.read_header(Path(self.job["imatrix"])) if self.job["imatrix"] else None
        self._weights: tuple[str, npt.NDArray[np.float32] | None] = ("", None)
        self._slot = os.open(job_path.with_name(f"busy-{os.getpid()}"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    def output(self, index: int) -> int:
        if index not in self.outputs:
            self.outputs[index] = os.open(self.job["outputs"][index], os.O_WRONLY)
        return self.outputs[index]

    def busy_with(self, what: str) -> None:
        """Leave a note of what is being computed, for whoever finds this process dead."""
        os.pwrite(self._slot, what.encode()[:200].ljust(200), 0)

    def weights(self, name: str) -> npt.NDArray[np.float32] | None:
        """The imatrix rows of a tensor, shape (experts, columns), as llama-quantize computes them: sum over count."""
        held = self._weights  # one read: a Dask worker may run tasks in several threads
        if held[0] != name:
            held = self._weights = (name, self._read_weights(name))
        return held[1]

    def _read_weights(self, name: str) -> npt.NDArray[np.float32] | None:
        header = self.imatrix
        if header is None or f"{name}.in_sum2" not in header.by_name:
            return None
        sums = header.read(header.by_name[f"{name}.in_sum2"]).view(np.float32)
        counts = np.rint(header.read(header.by_name[f"{name}.counts"]).view(np.float32).reshape(-1, 1))
        sums = sums.reshape(counts.shape[0], -1)
        # An expert that saw no token counts every column the same.
        return np.where(counts > 0, sums / np.where(counts > 0, counts, 1), np.float32(1)).astype(np.float32)


@functools.lru_cache(maxsize=1)
def _context(job_path: str, _identity: str) -> _Context:
    return _Context(Path(job_path))


def start_worker(crash_dir: str) -> None:
    """Initialise a local worker process: leave a trace of a crash, and end when the driver does, however it ends."""
    crash = open_log(Path(crash_dir, f"crash-{os.getpid()}"))  # open as long as the process lives
    faulthandler.enable(crash)
    _keep_open.append(crash)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


_keep_open: list[IO[bytes]] = []


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def run_task(job_path: str, identity: str, index: int, task: Mapping[str, Any], skip: frozenset[int]) -> TaskDone:
    """Do task `index` of a job; `task` is {phase, pieces: [[tensor, first row, rows], ...]}.

    Outputs in `skip` are finished already and not touched. Raises `VerificationError` when ggml finds its own result
    invalid.
    """
    started = time.thread_time()
    context = _context(job_path, identity)
    spent = dict.fromkeys(PARTS, 0.0)
    n_read, n_written = 0, 0
    block: int = context.job["block"]
    edges: list[tuple[int, int, bytes]] = []
    touched: set[int] = set()
    for tensor_index, first_row, n_rows in task["pieces"]:
        tensor = context.job["tensors"][tensor_index]
        source = GGMLQuantizationType[tensor["type"]]
        row_bytes = tensor["row_bytes"]
        raw = np.empty((n_rows, row_bytes), dtype=np.uint8)
        with _timed(spent, "read"):
            _read_all(context.base, raw, tensor["offset"] + first_row * row_bytes)
        n_read += raw.size
        widened: npt.NDArray[np.float32] | None = None
        for target in tensor["targets"]:
            places = [(output, place) for output, place in target["places"] if output not in skip]
            if target["phase"] != task["phase"] or not places:
                continue
            kind = GGMLQuantizationType[target["type"]]
            context.busy_with(f"{tensor['name']} as {kind.name}")
            if kind is source:
                made = raw.reshape(-1)
            else:
                if widened is None:
                    with _timed(spent, "widen"):
                        widened = context.ggml.widen(raw, source)
                with _timed(spent, "quantize"):
                    made = _quantize(context, tensor, widened, kind, first_row, static=target["static"])
            for output, place in places:
                offset = place + first_row * target["row_bytes"]
                first, end = own_blocks(offset, made.size, block)
                edges += [
                    (output, offset + at, made[at:to].tobytes()) for at, to in ((0, first), (end, made.size)) if at < to
                ]
                inner = made[first:end].data
                with _timed(spent, "write"):
                    pwrite_all(context.output(output), inner, offset + first, Path(context.job["outputs"][output]))
                n_written += made.size
                touched.add(output)
    if block:
        for output in touched:
            files.system.fsync(context.output(output))
    context.busy_with("")
    return TaskDone(index, time.thread_time() - started, spent, n_read, n_written, tuple(edges))


@contextlib.contextmanager
def _timed(spent: dict[str, float], part: str) -> Iterator[None]:
    begun = time.thread_time()
    yield
    spent[part] += time.thread_time() - begun


def own_blocks(offset: int, n_bytes: int, block: int) -> tuple[int, int]:
    """(first, end), counted from `offset`: the part of `n_bytes` bytes there that fills whole blocks of `block` bytes.

    Without a block size it is all of them. Bytes that fill no block give (n_bytes, n_bytes).
    """
    if not block:
        return 0, n_bytes
    first = min(-offset % block, n_bytes)
    return first, max(first, n_bytes - (offset + n_bytes) % block)


def _quantize(
    context: _Context,
    tensor: dict[str, Any],
    rows: npt.NDArray[np.float32],
    kind: GGMLQuantizationType,
    first_row: int,
    *,
    static: bool,
) -> npt.NDArray[np.uint8]:
    """Quantise rows of one tensor; a range over several experts is cut where the imatrix changes.

    With `static` the imatrix is left out.
    """
    weights = None if static else context.weights(tensor["name"])
    per_expert = tensor["rows_per_expert"]
    parts: list[npt.NDArray[np.uint8]] = []
    at = 0
    while at < len(rows):
        expert, inside = divmod(first_row + at, per_expert)
        count = min(len(rows) - at, per_expert - inside)
        own = None if weights is None else weights[expert]
        parts.append(context.ggml.quantize(rows[at : at + count], kind, own))
        at += count
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True)
class RowsChecked:
    """Rows of one tensor quantised again: how many, and which outputs of the job hold other bytes for them."""

    tensor: int
    n_rows: int
    differing: tuple[int, ...]


def check_rows(job_path: str, identity: str, tensor_index: int, rows: tuple[int, ...]) -> RowsChecked:
    """Quantise some rows of a tensor and compare them with what the job's outputs hold there; writes nothing.

    The outputs are finished files, of this build or another.
    """
    context = _context(job_path, identity)
    tensor = context.job["tensors"][tensor_index]
    source = GGMLQuantizationType[tensor["type"]]
    row_bytes = tensor["row_bytes"]
    differing: set[int] = set()
    n_compared = 0
    for row in rows:
        raw = np.empty((1, row_bytes), dtype=np.uint8)
        _read_all(context.base, raw, tensor["offset"] + row * row_bytes)
        for target in tensor["targets"]:
            kind = GGMLQuantizationType[target["type"]]
            context.busy_with(f"{tensor['name']} as {kind.name}")
            made = raw.reshape(-1)
            if kind is not source:
                made = _quantize(context, tensor, context.ggml.widen(raw, source), kind, row, static=target["static"])
            for output, place in target["places"]:
                held = np.empty(made.size, dtype=np.uint8)
                with Path(context.job["outputs"][output]).open("rb") as file:
                    _read_all(file.fileno(), held, place + row * target["row_bytes"])
                n_compared += 1
                if not np.array_equal(made, held):
                    differing.add(output)
    context.busy_with("")
    return RowsChecked(tensor_index, n_compared, tuple(sorted(differing)))


def _read_all(descriptor: int, into: npt.NDArray[np.uint8], offset: int) -> None:
    view = into.reshape(-1).data
    while view:
        n = os.preadv(descriptor, [view], offset)
        if n == 0:
            raise EOFError(f"the base ends at byte {offset}")
        view, offset = view[n:], offset + n


def measure_speeds(
    bin_dir: str, type_names: list[str], seconds: float = 0.15, kernels: Kernels | None = None
) -> dict[str, float]:
    """Elements per second and core of the quantiser of each type, with an imatrix, on normal weights."""
    ggml = Ggml(Path(bin_dir), kernels)
    rng = np.random.default_rng(0)
    columns = 1024
    weights = rng.random(columns, dtype=np.float32)
    speeds: dict[str, float] = {}
    for name in type_names:
        kind = GGMLQuantizationType[name]
        rows = rng.normal(0, 0.02, (32, columns)).astype(np.float32)
        ggml.quantize(rows[:1], kind, weights)  # builds the tables of the type
        begun, done = time.thread_time(), 0
        while (spent := time.thread_time() - begun) < seconds:
            ggml.quantize(rows, kind, weights)
            done += rows.size
        speeds[name] = done / spent
    return speeds


def clear_slots(job_dir: Path) -> list[str]:
    """Read and remove what dead workers left: notes of the tensors they were at, those of crashed ones alone if any."""
    busy: dict[str, str] = {}
    crashed: list[str] = []
    for slot in sorted(job_dir.glob("busy-*")):
        busy[slot.name.removeprefix("busy-")] = slot.read_text(errors="replace").strip(" \0")
        slot.unlink()
    for crash in sorted(job_dir.glob("crash-*")):
        with contextlib.suppress(OSError):
            if crash.stat().st_size:
                crashed.append(busy.get(crash.name.removeprefix("crash-"), "") or "an unknown tensor")
        crash.unlink()
    return crashed
