"""Faults injected under every write: nothing gets a final name that is not whole, and nothing finished is lost."""

import ast
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from gemma_gguf import factory, fanout, files, gguf_io, imatrix, llama_cpp, manifest, tasks, verify
from gemma_gguf.errors import DiskError, GemmaGGUFError
from gemma_gguf.files import HashMemory
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.session import Options, Report
from tests.examples import example
from tests.test_fanout import STEM, Job, hashes, make_job

PACKAGE = Path(files.__file__).parent


class CrashError(BaseException):
    """The process ends here, as far as the code under test can tell: no handler of `Exception` sees it."""


@dataclass
class Faulty(files.System):
    """The operating system, but call number `at` to `call` fails as `how` says."""

    call: str
    at: int
    how: str
    count: int = 0

    def hit(self, call: str) -> bool:
        self.count += call == self.call
        return call == self.call and self.count == self.at

    def fail(self) -> None:
        if self.how == "crash":
            raise CrashError
        raise OSError(getattr(errno, self.how), os.strerror(getattr(errno, self.how)))

    def write(self, descriptor: int, data: memoryview) -> int:
        if self.hit("write"):
            if self.how != "short":
                super().write(descriptor, data[: len(data) // 2])
                self.fail()
            return super().write(descriptor, data[: max(1, len(data) // 3)])
        return super().write(descriptor, data)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        if self.hit("pwrite"):
            if self.how != "short":
                super().pwrite(descriptor, data[: len(data) // 2], offset)
                self.fail()
            return super().pwrite(descriptor, data[: max(1, len(data) // 3)], offset)
        return super().pwrite(descriptor, data, offset)

    def allocate(self, descriptor: int, n_bytes: int) -> None:
        if self.hit("allocate"):
            self.fail()
        super().allocate(descriptor, n_bytes)

    def fsync(self, descriptor: int) -> None:
        if self.hit("fsync"):
            self.fail()
        super().fsync(descriptor)

    def replace(self, partial: Path, final: Path) -> None:
        if self.hit("replace"):
            self.fail()
        super().replace(partial, final)
        if self.hit("replaced"):
            self.fail()


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[[Faulty], Faulty]:
    def put(faulty: Faulty) -> Faulty:
        monkeypatch.setattr(files, "system", faulty)
        return faulty

    return put


Inject = Callable[[Faulty], Faulty]
FAULTS = [
    pytest.param("write", "ENOSPC", id="disk full"),
    pytest.param("write", "EIO", id="write error"),
    pytest.param("fsync", "EIO", id="flush error"),
    pytest.param("write", "crash", id="crash while writing"),
    pytest.param("fsync", "crash", id="crash before the flush"),
    pytest.param("replace", "crash", id="crash before the rename"),
    pytest.param("replace", "EIO", id="rename error"),
]


@pytest.mark.parametrize(("call", "how"), FAULTS)
def test_small_file_is_old_or_new(tmp_path: Path, inject: Inject, call: str, how: str) -> None:
    path = tmp_path / "quantset.json"
    files.write_atomic(path, b"old" * 1000)
    inject(Faulty(call, 1, how))
    with pytest.raises((DiskError, CrashError)) as caught:
        files.write_atomic(path, b"new" * 1000)
    assert path.read_bytes() == b"old" * 1000
    if how != "crash":
        assert isinstance(caught.value, DiskError)
        assert "the same command again" in (caught.value.next_step or "")


def test_short_writes_are_continued(tmp_path: Path, inject: Inject) -> None:
    inject(Faulty("write", 1, "short"))
    files.write_atomic(tmp_path / "a", b"abc" * 1000)
    assert (tmp_path / "a").read_bytes() == b"abc" * 1000
    files.preallocate(tmp_path / "b", 3000)
    inject(Faulty("pwrite", 1, "short"))
    files.write_at(tmp_path / "b", b"xyz" * 1000, 0)
    assert (tmp_path / "b").read_bytes() == b"xyz" * 1000


@pytest.mark.parametrize("at", range(1, 9))
def test_manifest_never_names_a_file_that_is_not_whole(tmp_path: Path, inject: Inject, at: int) -> None:
    """Crash at each write, flush and rename of `save` in turn: what is there loads, and is the old or the new one."""
    old = example()
    new = old.model_copy(update={"stem": "another"})
    manifest.save(old, tmp_path)
    call = ("write", "fsync", "replace", "replaced")[at % 4]
    inject(Faulty(call, 1 + at // 4 - (at % 4 == 0), "crash"))
    with contextlib.suppress(CrashError):
        manifest.save(new, tmp_path)
    assert manifest.load(tmp_path) in (old, new)


# --- the fan-out, its workers in this process so that they meet the faults too ---------------------------------------


@contextlib.contextmanager
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool
    tasks._context.cache_clear()


def run(job: Job) -> fanout.Figures:
    path, done, skip = fanout.prepare(job.content, job.dir, job.outputs)
    count = len(fanout.load_job(path)["tasks"])
    return fanout.run(path, done, skip, executor=threads, jobs=1, costs=[1.0] * count, on_output=lambda _: None)


@pytest.fixture
def job(build: Build, finished: Report, log: RunLog, tmp_path: Path) -> Job:
    return make_job(build, finished, log, tmp_path / "fanout", task_elements=1 << 17)


@pytest.mark.parametrize(
    ("call", "at", "how"),
    [
        pytest.param("pwrite", 40, "ENOSPC", id="output-disk-full"),
        pytest.param("pwrite", 90, "EIO", id="output-write-error"),
        pytest.param("pwrite", 60, "crash", id="output-crash"),
        pytest.param("pwrite", 2, "EIO", id="header-write-error"),
        pytest.param("write", 12, "ENOSPC", id="journal-disk-full"),
        pytest.param("write", 20, "crash", id="journal-crash"),
        pytest.param("fsync", 4, "EIO", id="output-flush-error"),
        pytest.param("allocate", 3, "ENOSPC", id="reserve-disk-full"),
        pytest.param("pwrite", 50, "short", id="output-short-write"),
    ],
)
def test_fan_out_goes_on_after_any_fault_with_the_same_bytes(
    job: Job, inject: Inject, monkeypatch: pytest.MonkeyPatch, *, call: str, at: int, how: str
) -> None:
    faulty = inject(Faulty(call, at, how))
    if how == "short":
        run(job)
    else:
        with pytest.raises((DiskError, CrashError)):
            run(job)
    assert faulty.count >= at, "the fault was never reached"
    tasks._context.cache_clear()
    monkeypatch.setattr(files, "system", files.System())
    run(job)
    assert job.hashes() == job.expected


def test_finished_tasks_are_not_done_again_after_a_full_disk(job: Job, inject: Inject) -> None:
    inject(Faulty("pwrite", 100, "ENOSPC"))
    with pytest.raises(DiskError):
        run(job)
    tasks._context.cache_clear()
    inject(Faulty("nothing", 0, "EIO"))
    figures = run(job)
    total = len(fanout.load_job(job.dir / "job.json")["tasks"])
    assert figures.resumed_tasks + figures.tasks == total
    assert figures.resumed_tasks >= 5


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 3, 6])
def test_crash_around_a_final_name_costs_that_file_at_most(
    finished: Report, set_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """A run that ends right after a rename, before the manifest knows of it, ends with the same set when run again."""
    options = replace(
        set_options,
        out=tmp_path / "out",
        base=finished.set_dir / f"{STEM}-bf16.gguf",
        imatrix=finished.set_dir / f"{STEM}-imatrix.gguf",
        recipes=("Q8_0", "Q4_0", "Q6_K"),
        proof=False,
    )
    renamed = 0
    real = files.System().replace

    class CrashAfterRename(files.System):
        def replace(self, partial: Path, final: Path) -> None:
            nonlocal renamed
            real(partial, final)
            if final.suffix == ".gguf":
                renamed += 1
                if renamed == at:
                    raise CrashError

    monkeypatch.setattr(files, "system", CrashAfterRename())
    if at <= 4:
        with pytest.raises(CrashError):
            factory.run(options)
    else:
        factory.run(options)
    monkeypatch.setattr(files, "system", files.System())
    set_dir = tmp_path / "out" / f"{STEM}-GGUF"
    if (set_dir / manifest.FILE_NAME).exists():
        memory = HashMemory(tmp_path / "unused", rehash=True)
        for entry in manifest.load(set_dir).files:
            assert memory.sha256(set_dir / entry.name) == entry.sha256
    factory.run(options)
    made = hashes(set_dir)
    reference = hashes(finished.set_dir)
    assert {name: reference[name] for name in made} == made
    assert len(made) == 4


def test_children_of_a_killed_run_are_ended_by_the_next(tmp_path: Path) -> None:
    """`kill -9` of a driver leaves its tool running; the next run in that place ends it before it starts."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom gemma_gguf.llama_cpp import RunLog, run_tool\n"
        "run_tool(['sleep', '300'], log=RunLog(Path(sys.argv[1])))\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run.log")])
    deadline = time.monotonic() + 120
    while not (notes := [p for p in tmp_path.glob("running/*") if p.name.isdigit()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    (note,) = notes
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    left = psutil.Process(int(note.name))
    assert left.is_running()
    log = RunLog(tmp_path / "run.log")
    assert llama_cpp.end_leftovers(log) == 1
    log.close()
    assert not psutil.pid_exists(left.pid) or left.status() == psutil.STATUS_ZOMBIE
    assert not list((tmp_path / "running").iterdir())


def test_another_process_with_the_number_of_a_child_is_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    (tmp_path / "running").mkdir()
    (tmp_path / "running" / str(other.pid)).write_text("1.0")
    log = RunLog(tmp_path / "run.log")
    assert llama_cpp.end_leftovers(log) == 0
    assert other.poll() is None
    other.kill()
    other.wait()


# --- what is broken is refused ----------------------------------------------------------------------------------------


def test_nan_in_a_finished_file_is_found(finished: Report, tmp_path: Path) -> None:
    path = Path(shutil.copy(finished.set_dir / f"{STEM}-Q8_0.gguf", tmp_path))
    tensor = gguf_io.read_header(path).by_name["output_norm.weight"]
    data = bytearray(path.read_bytes())
    data[tensor.offset : tensor.offset + 4] = b"\x00\x00\xc0\x7f"
    path.write_bytes(data)
    with pytest.raises(GemmaGGUFError, match=r"row 0 of output_norm\.weight \(F32\) holds NaN or Inf"):
        verify.check_rows(gguf_io.read_header(path))


def test_file_that_llama_cpp_does_not_load_is_refused(
    build: Build, finished: Report, log: RunLog, tmp_path: Path
) -> None:
    data = (finished.set_dir / f"{STEM}-Q8_0.gguf").read_bytes()
    path = tmp_path / "other.gguf"
    path.write_bytes(data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    text = tmp_path / "text.txt"
    text.write_text("Some words to read, more than a few of them. " * 20)
    with pytest.raises(GemmaGGUFError, match=r"does not load in llama\.cpp"):
        verify.check_load(path, text, build=build, log=log)
    assert verify.check_load(finished.set_dir / f"{STEM}-Q8_0.gguf", text, build=build, log=log) == "bindings"


def test_calibration_text_that_is_too_short(finished: Report, set_options: Options, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("too short")
    options = replace(
        set_options,
        out=tmp_path / "out",
        base=finished.set_dir / f"{STEM}-bf16.gguf",
        calibration=str(tmp_path / "text.txt"),
    )
    with pytest.raises(GemmaGGUFError, match=r"has only \d+ tokens") as caught:
        factory.run(options)
    assert caught.value.log is not None
    assert f"ended: {caught.value.what}\n" in caught.value.log.read_text()
    assert imatrix.file_name(STEM) not in {path.name for path in (tmp_path / "out").rglob("*")}


# --- no write past the layer ------------------------------------------------------------------------------------------


def test_no_module_writes_past_the_layer() -> None:
    """Outside files.py nothing opens a file for writing; inside, only the layer and the logs do."""
    offenders = []
    for path in sorted(PACKAGE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            constants = [
                a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)
            ]
            modes = [c for c in constants if isinstance(c, str) and len(c) <= 3 and set(c) & set("wax+")]
            writes = (name == "open" and modes) or name in {
                "write_text",
                "write_bytes",
                "copyfile",
                "fdopen",
                "mkstemp",
            }
            raw = name in {"pwrite", "posix_fallocate", "ftruncate"} and path.name != "files.py"
            if (writes or raw) and path.name != "files.py":
                offenders.append(f"{path.name}:{node.lineno} {name}")
    # A worker's note of what it is doing is a diagnostic that only a dead worker's driver reads.
    assert [o for o in offenders if not (o.startswith("tasks.py") and o.endswith("pwrite"))] == []
    assert len([o for o in offenders if o.startswith("tasks.py")]) <= 1
