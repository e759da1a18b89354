"""The fan-out engine: each distinct (tensor, ggml type) is quantised once for the whole set.

Consumes the plans that llama-quantize printed (`--dry-run`), the base and the imatrix; produces partial files that
hold, byte for byte, what llama-quantize of the same build writes. All shapes and types are known beforehand, so every
header, size and offset is: the headers are written and the space reserved first, then tasks fill in tensor data in any
order. A journal records finished tasks; a killed run resumes there.

The journal has one line per task, written when the task's bytes are in the files. A flush of the files runs beside
the work: `mark N` when it begins, `sync N` when it has ended. Lines before a mark that was synced hold after anything,
later ones while the machine has not restarted since: then the page cache has kept what a killed process wrote. The boot
id tells the two apart.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from gemma_gguf import gguf_io, shards, tasks
from gemma_gguf.errors import BadInputError, DiskError, GemmaGGUFError, MissingToolError, ToolFailedError
from gemma_gguf.files import (
    PARTIAL,
    append_line,
    fsync,
    partial_folder,
    partial_path,
    preallocate,
    sha256_bytes,
    write_at,
    write_atomic,
)
from gemma_gguf.gguf_io import Header, NewHeader, n_bytes_of
from gemma_gguf.libggml import Kernels
from gemma_gguf.plan import FilePlan
from gemma_gguf.progress import Progress, silent
from gemma_gguf.tasks import TaskDone

TASK_ELEMENTS = 1 << 19  # a worker holds one task: about 4 MB, and at most seconds of work are in flight
# Machines that share files over a network keep pages of them: two that write to one page can lose each other's bytes.
# So a worker writes only whole blocks that are all its own, flushes them, and the driver writes what lies between.
SHARED_BLOCK = 1 << 16
SHARED_TASK_ELEMENTS = 1 << 22  # larger tasks have fewer edges
TASKS_AHEAD = 4  # handed to the executor per worker, so that none waits for the driver
# Anonymous memory of one worker: interpreter, numpy, ggml's tables and the arrays of one task (measured: 45 MB).
WORKER_BYTES = 64_000_000
T = TypeVar("T")
MAX_MEMORY = 3_000_000_000  # of all workers together, whatever the model's size
SYNC_SECONDS = 60.0
DASK_SECONDS = 10  # to wait for a scheduler
RESTARTS = 3  # of the pool when a worker was killed from outside
COPY_SPEED = 1e9  # elements per second that copied tensors count for in estimates


@dataclass(frozen=True)
class Output:
    """One file to be made: which recipe, where it is written, its header and its plan.

    With the headers of `shards` it is a folder of them instead: `partial` is that folder, and `header` that of the
    whole file, which nothing writes.
    """

    recipe: str
    partial: Path
    header: NewHeader
    plan: FilePlan
    shards: tuple[NewHeader, ...] = ()

    @property
    def parts(self) -> list[tuple[Path, NewHeader]]:
        """(path, header) of each file on the disk."""
        prefix = self.partial.name.removesuffix(PARTIAL)
        names = [shards.name(prefix, number, len(self.shards)) for number in range(len(self.shards))]
        listed = [(self.partial / name, header) for name, header in zip(names, self.shards, strict=True)]
        return listed or [(self.partial, self.header)]

    @property
    def places(self) -> list[tuple[int, int]]:
        """(number of the part, offset in it) of every tensor, in the order of the plan."""
        return [(number, offset) for number, (_, header) in enumerate(self.parts) for offset in header.offsets]

    @property
    def n_bytes(self) -> int:
        return sum(header.file_size for _, header in self.parts)

    def remove(self) -> None:
        """Delete what was written of it."""
        if self.shards:
            shutil.rmtree(self.partial, ignore_errors=True)
        else:
            self.partial.unlink(missing_ok=True)


@dataclass
class Figures:
    """What a fan-out did, summed over its tasks. Seconds are CPU seconds of the workers."""

    tasks: int = 0
    resumed_tasks: int = 0
    cpu_seconds: float = 0.0
    part_seconds: Counter[str] = field(default_factory=Counter)  # of `tasks.PARTS`
    read_bytes: int = 0
    written_bytes: int = 0
    wall_seconds: float = 0.0
    # (share of the work done, seconds since the start) at every finished task: what estimates are judged by
    history: list[tuple[float, float]] = field(default_factory=list)


def quantize_keys(ftype_number: int, imatrix_file: str | None, imatrix: Header | None) -> list[tuple[str, int | str]]:
    """The keys llama-quantize sets, in its order; strings are cut at 127 bytes as it does.

    Source: tools/quantize/quantize.cpp and llama_model_quantize_impl in src/llama-quant.cpp.
    """
    keys: list[tuple[str, int | str]] = [("general.quantization_version", 2), ("general.file_type", ftype_number)]
    if imatrix_file is None or imatrix is None:
        return keys
    keys.append(("quantize.imatrix.file", _cut(imatrix_file)))
    datasets = imatrix.get("imatrix.datasets") or []
    if datasets:
        keys.append(("quantize.imatrix.dataset", _cut(datasets[0])))
    n_entries = sum(name.endswith(".in_sum2") for name in imatrix.by_name)
    keys.append(("quantize.imatrix.entries_count", n_entries))
    n_chunks = imatrix.get("imatrix.chunk_count", 0)
    if n_chunks > 0:
        keys.append(("quantize.imatrix.chunks_count", n_chunks))
    return keys


def _cut(text: str) -> str:
    return text.encode()[:127].decode("utf-8", errors="ignore")


def new_output(
    base: Header, plan: FilePlan, keys: Sequence[tuple[str, int | str]], final: Path, *, work: Path, limit: int
) -> Output:
    """The file `final`, written below `work` until it is whole; of more than `limit` bytes of tensors it is a folder.

    Raises `BadInputError` as `new_header` and `shards.counts` do.
    """
    header = new_header(base, plan, keys)
    if header.file_size <= limit:
        return Output(plan.recipe, partial_path(final, work), header, plan)
    rows = [(t.name, t.shape, t.target) for t in plan.tensors]
    parts = shards.headers(gguf_io.derived_keys(base, keys, shards.KEYS).values(), rows, limit)
    if len(parts) == 1:
        return Output(plan.recipe, partial_path(final, work), header, plan)
    return Output(plan.recipe, partial_folder(final.with_suffix(""), work), header, plan, tuple(parts))


def new_header(base: Header, plan: FilePlan, keys: Sequence[tuple[str, int | str]]) -> NewHeader:
    """The header of one file. Raises `BadInputError` for a base whose alignment is not ggml's default."""
    if base.alignment != GGUF_DEFAULT_ALIGNMENT:
        raise BadInputError(
            f"{base.path} has an alignment of {base.alignment} bytes, which the fan-out engine does not write",
            next_step="Use --engine llama-quantize.",
        )
    rows = [(t.name, t.shape, t.target) for t in plan.tensors]
    return gguf_io.derived_header(base, rows, keys, removed=shards.KEYS)


def build_job(
    base: Header,
    outputs: Sequence[Output],
    *,
    imatrix: Path | None,
    bin_dir: Path,
    inputs: str,
    phase_of: Mapping[str, int],
    kernels: Kernels | None = None,
    task_elements: int | None = None,
    shared: bool = False,
) -> dict[str, Any]:
    """The job file's content: where everything is read and written, and the tasks. `inputs` is a hash of what the
    bytes depend on; a journal is used again only for a job with the same one. `phase_of` is `plan.phases`; `kernels`
    quantise in ggml's place. With `shared`, workers on several machines write into the same files: see
    `SHARED_BLOCK`."""
    if task_elements is None:
        task_elements = SHARED_TASK_ELEMENTS if shared else TASK_ELEMENTS
    order = [tensor.name for tensor in outputs[0].plan.tensors]
    for output in outputs:
        if [tensor.name for tensor in output.plan.tensors] != order:
            raise ToolFailedError(f"llama-quantize plans {output.recipe} in another tensor order than the rest")
    # Where there is no data, files with and without the imatrix hold the same bytes.
    weighted = set(gguf_io.read_header(imatrix).by_name) if imatrix is not None else set()
    parts = [(output, path, header) for output in outputs for path, header in output.parts]
    first_part = [sum(len(other.parts) for other in outputs[:index]) for index in range(len(outputs))]
    places_of = [output.places for output in outputs]
    tensors: list[dict[str, Any]] = []
    for position, name in enumerate(order):
        info = base.by_name[name]
        targets: dict[tuple[GGMLQuantizationType, bool], list[list[int]]] = {}
        for index, output in enumerate(outputs):
            planned = output.plan.tensors[position]
            static = output.plan.static and planned.is_quantized and f"{name}.in_sum2" in weighted
            part, offset = places_of[index][position]
            targets.setdefault((planned.target, static), []).append([first_part[index] + part, offset])
        columns = info.shape[0]
        tensors.append(
            {
                "name": name,
                "type": info.ggml_type.name,
                "columns": columns,
                "rows": info.n_elements // columns,
                "rows_per_expert": info.shape[1] if len(info.shape) > 1 else 1,
                "row_bytes": n_bytes_of(info.ggml_type, columns),
                "offset": info.offset,
                "targets": [
                    {
                        "type": kind.name,
                        "static": static,
                        "row_bytes": n_bytes_of(kind, columns),
                        "phase": min(phase_of[parts[index][0].recipe] for index, _ in places),
                        "places": places,
                    }
                    for (kind, static), places in targets.items()
                ],
            }
        )
    return {
        "inputs": inputs,
        "base": str(base.path),
        "imatrix": str(imatrix) if imatrix else None,
        "bin_dir": str(bin_dir),
        "kernels": kernels.document() if kernels else None,
        "block": SHARED_BLOCK if shared else 0,
        "recipes": [output.recipe for output, _, _ in parts],  # of each part: a recipe has one, or its shards
        "outputs": [str(path) for _, path, _ in parts],
        "sizes": [header.file_size for _, _, header in parts],
        "tensors": tensors,
        "tasks": _cut_tasks(tensors, task_elements),
    }


def _cut_tasks(tensors: Sequence[Mapping[str, Any]], task_elements: int) -> list[dict[str, Any]]:
    """[{phase, pieces: [[tensor, first row, rows], ...]}, ...] in the order of phases.

    Large tensors are cut by rows and small ones gathered, so that tasks are about equal in size.
    """
    cut: list[dict[str, Any]] = []
    for phase in sorted({target["phase"] for tensor in tensors for target in tensor["targets"]}):
        pieces: list[list[int]] = []
        room = task_elements
        for index, tensor in enumerate(tensors):
            row = 0 if any(target["phase"] == phase for target in tensor["targets"]) else tensor["rows"]
            while row < tensor["rows"]:
                count = min(tensor["rows"] - row, max(1, room // tensor["columns"]))
                pieces.append([index, row, count])
                row += count
                room -= count * tensor["columns"]
                if room < tensor["columns"]:
                    cut.append({"phase": phase, "pieces": pieces})
                    pieces, room = [], task_elements
        if pieces:
            cut.append({"phase": phase, "pieces": pieces})
    return cut


def task_costs(job: Mapping[str, Any], speeds: Mapping[str, float]) -> list[float]:
    """Estimated CPU seconds of each task, from speeds in elements per second."""

    def per_row(tensor: Mapping[str, Any], phase: int) -> float:
        types = [target["type"] for target in tensor["targets"] if target["phase"] == phase]
        columns = int(tensor["columns"])
        return sum(columns / (speeds[t] if t != tensor["type"] else COPY_SPEED) for t in types)

    tensors = job["tensors"]
    return [sum(per_row(tensors[i], task["phase"]) * rows for i, _, rows in task["pieces"]) for task in job["tasks"]]


class Journal:
    """Which tasks of a job are done: `journal.txt` beside the job file."""

    def __init__(self, job_path: Path) -> None:
        self._job_path = job_path
        self._path = job_path.with_name("journal.txt")

    def done(self) -> set[int]:
        """Tasks whose bytes are in the files, by what the journal says and what the machine went through since."""
        try:
            lines = self._path.read_text().split("\n")[:-1]  # a line without its end was cut by a crash
        except FileNotFoundError:
            return set()
        if lines[:1] != [f"job {self._identity()}"]:
            return set()
        finished: set[int] = set()
        pending: set[int] = set()
        marked: dict[str, set[int]] = {}
        boot = ""
        for line in lines[1:]:
            word, _, rest = line.partition(" ")
            if word == "boot":
                # What an earlier boot wrote and did not flush may be lost.
                if boot and rest != boot:
                    pending.clear()
                marked.clear()  # a flush that began in an earlier process ended with it
                boot = rest
            elif word == "done" and rest.isdecimal():
                pending.add(int(rest))
            elif word == "open" and rest.isdecimal():
                pending.discard(int(rest))
                finished.discard(int(rest))
            elif word == "lost":
                pending.clear()
                marked.clear()
            elif word == "mark":
                marked[rest] = set(pending)
            elif word == "sync":
                finished |= marked.get(rest, set()) & pending
                pending -= finished
        return finished | pending if boot == boot_id() else finished

    def begin(self, *, fresh: bool) -> None:
        """Start writing: a new journal, or a new `boot` line in an old one (after a line that a crash may have cut)."""
        if fresh:
            write_atomic(self._path, f"job {self._identity()}\nboot {boot_id()}\n")
        else:
            append_line(self._path, f"\nboot {boot_id()}")

    def forget(self, indices: Iterable[int]) -> None:
        """These tasks are to be done again: a file they wrote to is gone."""
        for index in indices:
            append_line(self._path, f"open {index}")

    def add(self, index: int) -> None:
        append_line(self._path, f"done {index}")

    def mark(self) -> str:
        """What is done by now is what the flush that begins here will hold; its name, for `sync`."""
        name = uuid.uuid4().hex[:8]
        append_line(self._path, f"mark {name}")
        return name

    def sync(self, mark: str, outputs: Sequence[Path]) -> None:
        """Flush the outputs, then say so durably. What a failed flush may have lost does not count as done."""
        self.flush(outputs)
        append_line(self._path, f"sync {mark}")
        fsync(self._path)

    def flush(self, outputs: Sequence[Path]) -> None:
        """Flush those outputs that still have their partial name."""
        try:
            for path in outputs:
                if path.exists():
                    fsync(path)
        except DiskError:
            self.lost()
            raise

    def lost(self) -> None:
        """The system reports a failed flush once and may drop the pages: tasks since the last `sync` are open again."""
        with contextlib.suppress(DiskError):
            append_line(self._path, "lost")

    def _identity(self) -> str:
        return sha256_bytes(self._job_path.read_bytes())


def boot_id() -> str:
    """Changes when the machine restarts; where the system does not say, it is new for every process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"process-{os.getpid()}-{time.time_ns()}"


def prepare(job: dict[str, Any], job_dir: Path, outputs: Sequence[Output]) -> tuple[Path, set[int], set[int]]:
    """Have the job on disk with its files; (job file, tasks done, outputs to skip).

    An earlier job over the same inputs, in the same places, that includes every wanted recipe is continued. Its outputs
    that are not wanted any more are skipped, and their partial files removed: a later run that wants them must not take
    the tasks that passed them over for done. A wanted file that is gone is reserved anew, and the tasks of its phases
    are open again. Otherwise everything starts anew.
    """
    job_path = job_dir / "job.json"
    job_dir.mkdir(parents=True, exist_ok=True)
    tasks.clear_slots(job_dir)
    journal = Journal(job_path)
    old: dict[str, Any] | None = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        old = load_job(job_path)
    if old is not None and _continues(old, job):
        wanted = {str(path): header for output in outputs for path, header in output.parts}
        done = journal.done()
        skip: set[int] = set()
        gone: set[int] = set()
        for index, path in enumerate(map(Path, old["outputs"])):
            if str(path) not in wanted:
                skip.add(index)
                path.unlink(missing_ok=True)
            elif not path.is_file() or path.stat().st_size != old["sizes"][index]:
                gone |= _tasks_of(old, index)
                _reserve(path, wanted[str(path)])
        if done - gone:
            journal.begin(fresh=False)
            journal.forget(sorted(done & gone))
            return job_path, done - gone, skip
    (job_dir / "journal.txt").unlink(missing_ok=True)  # before any file it speaks of is emptied
    # A number of its own, so that no long-lived worker takes this job for an earlier one whose files it has open.
    job = {**job, "nonce": uuid.uuid4().hex}
    write_atomic(_tasks_path(job_path), json.dumps(job.pop("tasks")))
    write_atomic(job_path, json.dumps(job))
    for path in map(Path, old["outputs"] if old is not None else []):
        if path.is_relative_to(job_dir.parent):  # the job of a copied directory names files of the original
            path.unlink(missing_ok=True)
    try:
        for output in outputs:
            output.remove()  # a folder of other shards must not add its own to these
            for path, header in output.parts:
                _reserve(path, header)
    except DiskError:
        for output in outputs:
            output.remove()
        raise
    journal.begin(fresh=True)
    return job_path, set(), set()


def _reserve(path: Path, header: NewHeader) -> None:
    """A file of the final size with its header, in an inode of its own."""
    path.unlink(missing_ok=True)
    preallocate(path, header.file_size)
    write_at(path, header.data, 0)


def _continues(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether `old` reads and writes in the places of `new`, and includes all of its outputs."""
    fields = ("inputs", "base", "imatrix", "bin_dir", "kernels", "block")
    same = all(old.get(field) == new[field] for field in fields)
    made = [set(zip(job["recipes"], job["outputs"], job["sizes"], strict=True)) for job in (new, old)]
    return same and made[0] <= made[1]


def _phases_of(job: Mapping[str, Any], output: int) -> set[int]:
    """The phases whose tasks write to an output."""
    return {
        target["phase"]
        for tensor in job["tensors"]
        for target in tensor["targets"]
        if any(index == output for index, _ in target["places"])
    }


def _tasks_of(job: Mapping[str, Any], output: int) -> set[int]:
    phases = _phases_of(job, output)
    return {index for index, task in enumerate(job["tasks"]) if task["phase"] in phases}


def _tasks_path(job_path: Path) -> Path:
    """The tasks lie in a file of their own: of a large model they are many, and a worker needs one at a time."""
    return job_path.with_name("tasks.json")


def load_job(job_path: Path) -> dict[str, Any]:
    """A job with its tasks, as the driver needs it."""
    return {**json.loads(job_path.read_text()), "tasks": json.loads(_tasks_path(job_path).read_text())}


def interrupted(job_dir: Path, inputs: str) -> frozenset[str]:
    """Recipes of the job that an earlier run over the same inputs did not end."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        old = load_job(job_dir / "job.json")
        if old["inputs"] == inputs:
            return frozenset(old["recipes"])
    return frozenset()


def workers_for(jobs: int | None, max_memory: int) -> int:
    """How many worker processes to start: `jobs`, or one per core, as far as the memory goes."""
    return max(1, min(jobs or os.cpu_count() or 1, max_memory // WORKER_BYTES))


@contextlib.contextmanager
def local_executor(jobs: int, job_dir: Path) -> Iterator[Executor]:
    """Worker processes on this machine; they end with this process, however it ends."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=tasks.start_worker, initargs=(str(job_dir),))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Workers:
    """Worker processes on this machine for many jobs, one after the other: they keep ggml's tables, which take longer
    than the few rows of a small job. They are started when they are asked for, and anew after one of them died.

    Job files are to lie in `directory`, which is for these workers alone.
    """

    def __init__(self, jobs: int, directory: Path) -> None:
        self.jobs, self.directory = jobs, directory
        self._running = contextlib.ExitStack()
        self._pool: Executor | None = None

    def pool(self) -> Executor:
        if self._pool is None:
            self._pool = self._running.enter_context(local_executor(self.jobs, self.directory))
        return self._pool

    def end(self) -> None:
        self._pool = None
        self._running.close()


@contextlib.contextmanager
def workers_in(directory: Path, jobs: int) -> Iterator[Workers]:
    """Workers that end with the block; none is started before it is needed."""
    workers = Workers(jobs, directory)
    try:
        yield workers
    finally:
        workers.end()


def in_a_worker(directory: Path, what: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What one call gives in a worker process of its own, so that an abort inside ggml ends in one clear error.

    `what` says for it what the process does. Raises `ToolFailedError` when it dies.
    """
    try:
        with local_executor(1, directory) as pool:
            return pool.submit(function, *args, **kwargs).result()
    except BrokenProcessPool as error:
        raise ToolFailedError(
            f"the process that {what} died", next_step="Run the same command again; is there enough memory?"
        ) from error
    finally:
        tasks.clear_slots(directory)


@contextlib.contextmanager
def _dask_client(address: str) -> Iterator[Any]:
    try:
        from distributed import Client  # noqa: PLC0415 - the `cluster` extra
    except ImportError as error:
        raise MissingToolError("--scheduler needs Dask", next_step="pip install 'gemma-gguf[cluster]'") from error
    try:
        client = Client(address, timeout=f"{DASK_SECONDS}s", set_as_default=False)
    except OSError as error:
        raise BadInputError(
            f"no Dask scheduler answers at {address}: {error}", next_step="Start one with: dask scheduler"
        ) from error
    with client:
        yield client


def dask_workers(address: str) -> int:
    """How many tasks the cluster can do at a time. Raises `BadInputError` when no scheduler answers."""
    with _dask_client(address) as client:
        return max(1, sum(map(int, client.ncores().values())))


@contextlib.contextmanager
def dask_executor(address: str) -> Iterator[Executor]:
    """Workers of a Dask cluster that see the same files under the same paths; Dask moves a dead one's tasks."""
    with _dask_client(address) as client:
        try:
            yield client.get_executor(pure=False, retries=RESTARTS)
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "distributed":
                raise
            raise ToolFailedError(
                f"the Dask cluster failed: {error}",
                next_step="Finished work is kept: look at the workers' logs, then run the same command again.",
            ) from error


def run(
    job_path: Path,
    done: set[int],
    skip: set[int],
    *,
    executor: Callable[[], contextlib.AbstractContextManager[Executor]],
    jobs: int,
    costs: Sequence[float],
    on_output: Callable[[str], None],
    on_stop: Callable[[], object] = lambda: None,
    progress: Progress = silent,
) -> Figures:
    """Do the tasks of a job that are not done; `on_output` is called with each recipe whose bytes are all there.

    It is called in a thread of its own, one output at a time, while the workers go on; `on_stop` is called when the
    run ends early, so that it can end what `on_output` waits for. Raises `ToolFailedError` naming tensor and type when
    ggml aborts in a worker; what was finished stays. A worker that is killed from outside is replaced, and its task
    done again.
    """
    job = load_job(job_path)
    identity = sha256_bytes(job_path.read_bytes())
    with ThreadPoolExecutor(1, thread_name_prefix="finish") as finisher:
        state = _State(job_path, job, done, skip, finisher, costs=costs, on_output=on_output, progress=progress)
        try:
            state.finish_outputs()
            for restarts in range(RESTARTS + 1):
                try:
                    with executor() as pool:
                        state.drain(pool, identity, jobs * TASKS_AHEAD)
                    break
                except BrokenProcessPool as error:
                    crashed = tasks.clear_slots(job_path.parent)
                    if crashed or restarts == RESTARTS:
                        at = f" at {crashed[0]}" if crashed else ", again and again: is there enough memory?"
                        raise ToolFailedError(
                            f"a worker process died{at}",
                            next_step="Finished work is kept. Leave that recipe out, or lower --jobs, and run again.",
                        ) from error
            state.sync()
            state.wait_for_finished()
        except BaseException:
            finisher.shutdown(wait=False, cancel_futures=True)
            on_stop()
            raise
    tasks.clear_slots(job_path.parent)
    state.figures.wall_seconds = time.monotonic() - state.started
    return state.figures


class _State:
    """The driver's view of a job: what is done, what each output still lacks, how far the whole is.

    Flushing and handing over run in the one thread of `finisher`, in the order they are asked for, so that a flush
    never meets a file that is being renamed, and workers never wait for either.
    """

    def __init__(
        self,
        job_path: Path,
        job: dict[str, Any],
        done: set[int],
        skip: set[int],
        finisher: Executor,
        *,
        costs: Sequence[float],
        on_output: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self.journal = Journal(job_path)
        self.job_path, self.job, self.skip, self.costs = job_path, job, frozenset(skip), costs
        self.on_output, self.progress, self.finisher = on_output, progress, finisher
        self.finishing: list[Future[None]] = []
        self.flushing: Future[None] | None = None
        self.open = {index: None for index in range(len(job["tasks"])) if index not in done}
        # A recipe is whole when every task of every phase that writes to one of its parts is done.
        self.parts_of: dict[str, list[int]] = {}
        for index, recipe in enumerate(job["recipes"]):
            if index not in skip:
                self.parts_of.setdefault(recipe, []).append(index)
        self.unfinished = list(self.parts_of)
        self.phases_of = {
            recipe: set().union(*(_phases_of(job, index) for index in parts)) for recipe, parts in self.parts_of.items()
        }
        self.open_in_phase = Counter(job["tasks"][index]["phase"] for index in self.open)
        self.total = sum(costs)
        self.done_cost = sum(costs[index] for index in done)
        self.figures = Figures(resumed_tasks=len(done))
        self.started = time.monotonic()
        self.synced = self.started

    def finish_outputs(self) -> None:
        """Hand over every recipe whose files no open task writes to."""
        whole = [name for name in self.unfinished if not any(self.open_in_phase[p] for p in self.phases_of[name])]
        for recipe in whole:
            self.unfinished.remove(recipe)
            self.finishing.append(self.finisher.submit(self._finish, recipe))

    def _finish(self, recipe: str) -> None:
        self.journal.flush([Path(self.job["outputs"][index]) for index in self.parts_of[recipe]])
        self.on_output(recipe)

    def sync(self) -> None:
        """Flush what the workers wrote, beside their work. Outputs that have their final name were flushed before."""
        mark, outputs = self.journal.mark(), [Path(path) for path in self.job["outputs"]]
        self.flushing = self.finisher.submit(self.journal.sync, mark, outputs)
        self.finishing.append(self.flushing)
        self.synced = time.monotonic()

    def wait_for_finished(self, timeout: float | None = None) -> None:
        """Raise what went wrong in the finishing thread; without a timeout, wait for all of it."""
        ended = wait(self.finishing, timeout=timeout).done
        self.finishing = [future for future in self.finishing if future not in ended]
        for future in ended:
            future.result()

    def drain(self, pool: Executor, identity: str, window: int) -> None:
        running: dict[Future[TaskDone], int] = {}
        waiting = iter(list(self.open))
        try:
            while True:
                while len(running) < window and (index := next(waiting, None)) is not None:
                    task = self.job["tasks"][index]
                    future = pool.submit(tasks.run_task, str(self.job_path), identity, index, task, self.skip)
                    running[future] = index
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._record(future.result(), running.pop(future))
                self.wait_for_finished(timeout=0)
        except GemmaGGUFError:
            for future in running:
                future.cancel()
            raise

    def _record(self, result: TaskDone, index: int) -> None:
        for output, offset, edge in result.edges:
            write_at(Path(self.job["outputs"][output]), edge, offset)
        self.journal.add(index)
        self.open.pop(index)
        phase = self.job["tasks"][index]["phase"]
        self.open_in_phase[phase] -= 1
        self.done_cost += self.costs[index]
        figures = self.figures
        figures.tasks += 1
        figures.cpu_seconds += result.cpu_seconds
        figures.part_seconds.update(result.part_seconds)
        figures.read_bytes += result.read_bytes
        figures.written_bytes += result.written_bytes
        now = time.monotonic()
        figures.history.append((self.done_cost / self.total, now - self.started))
        self.progress("quantising", self.done_cost, self.total, "s of work")
        if now - self.synced > SYNC_SECONDS and (self.flushing is None or self.flushing.done()):
            self.sync()
        if not self.open_in_phase[phase]:
            self.finish_outputs()
