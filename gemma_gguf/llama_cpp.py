"""llama.cpp: obtain one source, build it once, run its tools. The only user of `subprocess` in the package.

Consumes a source specification (`pypi:<llama-cpp-python release>`, `git:<tag or sha>`, `dir:<path>`), a backend and
CMake flags; produces a `Build`: a directory in the user's cache with the tools, the shared libraries, the converter,
`gguf-py` and, for `pypi:`, the pure-Python bindings of that release. The directory's key is a hash of everything
that can change its bytes, so a build is made once per machine and two builds can serve one run.

The Python index is the default because its source archive vendors the complete llama.cpp under a sha256, and needs
neither git nor a GitHub connection.
"""

import codecs
import contextlib
import http.client
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import platformdirs
import psutil

from gemma_gguf.errors import BadInputError, DiskError, KilledError, MissingToolError, ToolFailedError
from gemma_gguf.files import locked, open_log, sha256_bytes, sha256_json, sha256_tree, write_atomic
from gemma_gguf.progress import Progress, silent
from gemma_gguf.redact import HUB_TOKENS, Redactor, known_secrets

DEFAULT_SPEC = "pypi:0.3.36"
REPOSITORY = "https://github.com/ggml-org/llama.cpp"
PYPI_SHA256 = {
    "0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    "0.3.35": "1139dbb54509074b70893fab8554e3b079aa9f4d312058ce4018ef0019e3de12",
}
TOOLS = (
    "llama-quantize",
    "llama-imatrix",
    "llama-perplexity",
    "llama-bench",
    "llama-gguf-split",
    "llama-server",
    "llama-mtmd-cli",
)
BACKENDS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("-DGGML_METAL=OFF",),
    "cuda": ("-DGGML_CUDA=ON",),
    "hip": ("-DGGML_HIP=ON",),
    "vulkan": ("-DGGML_VULKAN=ON",),
    "metal": ("-DGGML_METAL=ON",),
    "sycl": ("-DGGML_SYCL=ON", "-DCMAKE_C_COMPILER=icx", "-DCMAKE_CXX_COMPILER=icpx"),
}
CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",  # tools find their libraries beside them, wherever the directory moves
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # the prebuilt web interface is a download
)
# Only ggml-base quantises. Fused multiply-add changes the last bits of a quant from one CPU family to another, so it is
# compiled without. Upstream compiles it for a generic CPU; for this one most types are 1.05 to 1.35 times as fast, with
# the same bytes (README). DEFER waits until the project has defined the target; subprojects include this file, too.
PROJECT_INCLUDE = """if(NOT GEMMA_GGUF_INCLUDED)
  set(GEMMA_GGUF_INCLUDED TRUE)
  set(GEMMA_GGUF_OPTIONS -ffp-contract=off)
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-march=native GEMMA_GGUF_MARCH_NATIVE)
  if(GEMMA_GGUF_MARCH_NATIVE AND NOT (DEFINED GGML_NATIVE AND NOT GGML_NATIVE))
    list(APPEND GEMMA_GGUF_OPTIONS -march=native)
  endif()
  cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL
    target_compile_options ggml-base PRIVATE ${GEMMA_GGUF_OPTIONS})
endif()
"""
GGML_BASE_OPTIONS = "ggml-base: -ffp-contract=off -march=native (where the compiler has it)"
# Variables that CMake reads; they are part of a build's identity when they are set.
COMPILER_VARIABLES = ("CC", "CFLAGS", "CXX", "CXXFLAGS", "LDFLAGS")
# What of llama.cpp's source a finished build keeps: the converter and what it imports.
KEPT_SOURCES = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")
KERNEL_SOURCE = Path(__file__).with_name("kernels")
KERNEL_LIBRARIES = ("libgemma-kernels.so", "libgemma-kernels.dylib")
TAIL_LINES = 15
# What a confined process gets of the environment: what Python itself may need to start, and the time zone.
CONFINED_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")


# --- running tools -----------------------------------------------------------------------------------------------


class RunLog:
    """One text file per run: every child's argv, output, exit code and time, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # One small file for each child that runs now; what is there when the lock is taken was left by a crash.
        self.running = path.parent / "running"
        self._file: IO[bytes] | None = None
        self.redactor = Redactor(known_secrets())

    def write(self, data: bytes) -> None:
        """Append without secrets; the file appears with its first byte."""
        self._append(self.redactor.feed(data))

    def _append(self, data: bytes) -> None:
        if not data:
            return
        # A log that cannot be written is no reason to stop; what is worth stopping for is written elsewhere.
        with contextlib.suppress(OSError):
            if self._file is None:
                self._file = open_log(self.path)
            self._file.write(data)
            self._file.flush()

    def note(self, text: str) -> None:
        """One line of our own, marked and dated."""
        self._append(self.redactor.rest())
        self._append(self.redactor.text(f"## {time.strftime('%H:%M:%S')} {text}\n").encode())

    def close(self) -> None:
        self._append(self.redactor.rest())
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class ToolRun:
    """A child process that ended with exit code 0: what was run, what it printed, how long it took.

    `peak_memory` is the most resident memory, in bytes, that it had whenever it printed something; mapped files count
    where they are in memory. 0 when it never printed.
    """

    argv: tuple[str, ...]
    output: str
    seconds: float
    peak_memory: int = 0


def run_tool(
    argv: Sequence[str | Path],
    *,
    log: RunLog,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_piece: Callable[[str], None] | None = None,
    separators: str = r"[\r\n]",
    ok_codes: tuple[int, ...] = (0,),
) -> ToolRun:
    """Run a child to its end; stdout and stderr go, together and in order, to the log and to `on_piece`.

    `on_piece` gets the output cut at `separators`, as it comes (llama-imatrix separates its progress by commas).
    `env` is added to this process's environment, less the Hub's tokens. Raises `ToolFailedError` with the last lines
    when the exit code is not in `ok_codes`, `MissingToolError` when there is no such program. The child and its own
    children are stopped if this process is interrupted.
    """
    words = tuple(str(word) for word in argv)
    started = time.monotonic()
    child, note = _start(words, log, cwd=cwd, env=env)
    collected = bytearray()
    pending = ""
    peak_memory = 0
    cut = re.compile(separators)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a letter may come in two reads
    assert child.stdout is not None
    try:
        while chunk := os.read(child.stdout.fileno(), 1 << 16):
            with contextlib.suppress(psutil.Error):
                peak_memory = max(peak_memory, psutil.Process(child.pid).memory_info().rss)
            collected += chunk
            log.write(chunk)
            if on_piece is not None:
                *pieces, pending = cut.split(pending + decoder.decode(chunk))
                for piece in pieces:
                    on_piece(piece)
        if on_piece is not None and (pending := pending + decoder.decode(b"", final=True)):
            on_piece(pending)
        code = child.wait()
    except BaseException:
        _stop(child)
        raise
    finally:
        child.stdout.close()
        _forget(note)
    seconds = time.monotonic() - started
    log.note(f"exit code {code} after {seconds:.1f} s")
    output = collected.decode("utf-8", errors="replace")
    if code not in ok_codes:
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        last = log.redactor.text("\n".join(output.strip().splitlines()[-TAIL_LINES:]))
        kind = KilledError if code == -signal.SIGKILL else ToolFailedError
        raise kind(f"{Path(words[0]).name} {ended}. Its last lines:\n{last}", log=log.path)
    return ToolRun(words, output, seconds, peak_memory)


def _start(
    words: Sequence[str],
    log: RunLog,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    without: tuple[str, ...] = (),
) -> tuple[subprocess.Popen[bytes], Path]:
    """(a child whose output comes in one pipe, the note of it that `end_leftovers` finds after a crash).

    It inherits this process's environment but for the Hub's tokens and what begins with one of `without`.
    """
    kept = {n: os.environ[n] for n in os.environ if n not in HUB_TOKENS and not n.startswith(without)}
    log.note(f"{shlex.join(words)}" + (f"   (in {cwd})" if cwd else ""))
    try:
        child = subprocess.Popen(
            words,
            cwd=cwd,
            env={**kept, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise MissingToolError(f"{words[0]} is not installed") from error
    note = log.running / str(child.pid)
    with contextlib.suppress(psutil.Error, DiskError):
        write_atomic(note, str(psutil.Process(child.pid).create_time()), durable=False)
    return child, note


def _forget(note: Path) -> None:
    note.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other children may run
        note.parent.rmdir()


@dataclass(frozen=True)
class Server:
    """A llama-server that runs: ask it with `post`."""

    port: int
    key: str  # who does not know it gets no answer
    output: Callable[[], str]  # what it has printed by now

    def post(self, path: str, document: Mapping[str, object], *, seconds: float = 60.0) -> tuple[int, Any]:
        """(HTTP status, JSON answer). Raises `ToolFailedError` when there is no such answer within `seconds`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
            connection.request("POST", path, json.dumps(document).encode(), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            last = "\n".join(self.output().strip().splitlines()[-TAIL_LINES:])
            raise ToolFailedError(
                f"llama-server gave no answer to {path} ({type(error).__name__}: {error}). Its last lines:\n{last}"
            ) from error
        finally:
            connection.close()


@contextlib.contextmanager
def serving(
    build: "Build", arguments: Sequence[str | Path], *, log: RunLog, wait_seconds: float = 3600.0
) -> Iterator[Server]:
    """Run this build's llama-server on a free port of the loopback interface, as long as the context lasts.

    It chooses the port itself and says which, so no other process can take it in between. Settings that it would take
    from `LLAMA_ARG_*` variables are kept from it: what it does must not depend on who asks. Raises `ToolFailedError`
    when it ends, or has not loaded its model within `wait_seconds`.
    """
    words = [str(build.tool("llama-server")), *map(str, arguments), "--host", "127.0.0.1", "--port", "0"]
    key = secrets.token_hex(16)
    child, note = _start(words, log, env={"LLAMA_API_KEY": key}, without=("LLAMA_ARG_", "LLAMA_API_"))
    assert child.stdout is not None
    said = bytearray()
    news = threading.Condition()
    descriptor = child.stdout.fileno()

    def read() -> None:
        while chunk := os.read(descriptor, 1 << 16):
            log.write(chunk)
            with news:
                said.extend(chunk)
                news.notify_all()
        with news:
            ended.append(True)
            news.notify_all()

    def output() -> str:
        return said.decode("utf-8", errors="replace")

    def port() -> int | None:
        found = re.search(r"listening on http://127\.0\.0\.1:([0-9]{1,5})\b", output())
        return int(found[1]) if found else None

    ended: list[bool] = []
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        with news:
            news.wait_for(lambda: ended or port() is not None, wait_seconds)
        listening = port()
        if listening is None:
            last = log.redactor.text("\n".join(output().strip().splitlines()[-TAIL_LINES:]))
            how = "ended" if ended else f"was not ready after {wait_seconds:.0f} s"
            killed = bool(ended) and child.wait() == -signal.SIGKILL
            kind = KilledError if killed else ToolFailedError
            raise kind(f"llama-server {how}. Its last lines:\n{last}", log=log.path)
        yield Server(listening, key, output)
    finally:
        _stop(child)
        reader.join(timeout=10)
        child.stdout.close()
        _forget(note)
        log.note("llama-server was stopped")


def ask_confined(
    module: str, arguments: Sequence[str], request: str, *, wait_seconds: float
) -> tuple[int | None, bytes]:
    """Run a module of this package as a process that shares nothing with this one but the installed packages.

    It gets `request` on stdin and neither our environment, where tokens may be, nor a place in our log. Returns (exit
    code, stdout); the code is None when it was ended because `wait_seconds` had passed.
    """
    # The same packages as here, wherever they are installed; -P keeps the working directory out.
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    kept = {name: os.environ[name] for name in CONFINED_VARIABLES if name in os.environ}
    child = subprocess.Popen(
        [sys.executable, "-P", "-s", "-W", "ignore", "-m", module, *arguments],
        env={**kept, "PYTHONPATH": paths, "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(request.encode("utf-8", errors="surrogatepass"), timeout=wait_seconds)
    except subprocess.TimeoutExpired:
        _stop(child)
        return None, b""
    except BaseException:
        _stop(child)
        raise
    finally:
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
    return child.returncode, output


def check_ended(code: int | None, what: str, waited: float) -> None:
    """Raise `KilledError` when a process of `ask_confined` was killed from outside, or `waited` seconds in vain: that
    tells nothing of what it was asked. `what` says for it what the process does."""
    if code is None or code == -signal.SIGKILL:
        happened = "was killed" if code else f"did not end within {waited:g} s"
        raise KilledError(
            f"the process that {what} {happened}",
            next_step="Run the same command again, when the machine has memory and computing time to spare.",
        )


def end_leftovers(log: RunLog) -> int:
    """End children that an earlier run left when it was killed: they would go on writing. Returns how many."""
    ended = 0
    for note in log.running.glob("[0-9]*") if log.running.is_dir() else ():
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            left = psutil.Process(int(note.name))
            if f"{left.create_time()}" == note.read_text():  # not another process that got the same number
                os.killpg(left.pid, signal.SIGKILL)
                left.wait(timeout=10)
                ended += 1
        note.unlink(missing_ok=True)
    if ended:
        log.note(f"ended {ended} child processes of a run that was killed")
    return ended


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a child with its whole process group: politely, then not. The child may be gone before its own children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=5)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


# --- a build -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceSpec:
    """Where llama.cpp comes from: kind `pypi`, `git` or `dir`, and its version, ref or path."""

    kind: str
    value: str

    @classmethod
    def parse(cls, text: str) -> "SourceSpec":
        """`pypi:0.3.36`, `git:b9999` or `dir:../llama.cpp`; raises `BadInputError` for anything else."""
        kind, _, value = text.partition(":")
        allowed = {"pypi": r"\d+(\.\d+)+(\.?(a|b|rc|post|dev)\d+)*", "git": r"[\w][\w./-]*", "dir": r".+"}
        if kind not in allowed or not re.fullmatch(allowed[kind], value):
            raise BadInputError(
                f"{text!r} is no llama.cpp source",
                next_step="Use pypi:<llama-cpp-python version>, git:<tag or commit> or dir:<path>.",
            )
        return cls(kind, value)

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}"


@dataclass(frozen=True)
class Build:
    """A finished build. Everything but `root` is also in its `build.json`."""

    root: Path
    key: str
    source: str
    source_sha256: str
    version: str  # as the tools print it, e.g. 0.5.0-dev
    build_number: int  # 0 when the source does not say
    commit: str
    backend: str
    compiler: str
    cmake_args: tuple[str, ...]
    machine: str
    seconds: float

    @property
    def bin_dir(self) -> Path:
        return self.root / "bin"

    @property
    def converter(self) -> Path:
        return self.root / "source" / "convert_hf_to_gguf.py"

    @property
    def gguf_py(self) -> Path:
        return self.root / "source" / "gguf-py"

    @property
    def bindings(self) -> Path | None:
        """Directory to import `llama_cpp` from, or None: only `pypi:` builds have bindings that fit them."""
        path = self.root / "bindings"
        return path if path.is_dir() else None

    def tool(self, name: str) -> Path:
        return self.bin_dir / name

    def facts(self) -> dict[str, object]:
        """What `build --json` prints."""
        facts = {name: value for name, value in asdict(self).items() if name != "root"}
        return {"bin_dir": str(self.bin_dir), **facts}


def cache_dir() -> Path:
    """The user's cache directory of this package; `GEMMA_GGUF_CACHE` overrides it."""
    override = os.environ.get("GEMMA_GGUF_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("gemma-gguf"))


def find_tool(name: str, hint: str) -> Path:
    """A program beside this Python (a virtual environment's bin directory) or on PATH."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    found = shutil.which(name, path=path)
    if found is None:
        raise MissingToolError(f"{name} is not installed", next_step=hint)
    return Path(found)


def compiler_version(backend: str) -> str:
    """First line of `--version` of the C++ compiler that CMake will take ($CXX, else c++, g++, clang++)."""
    wanted = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["c++"], ["g++"], ["clang++"]]
    if backend == "sycl":
        wanted = [["icpx"]]
    for words in wanted:
        with contextlib.suppress(OSError):
            done = subprocess.run([*words, "--version"], capture_output=True, text=True, check=False)
            if done.returncode == 0 and done.stdout.strip():
                return done.stdout.splitlines()[0].strip()
    raise MissingToolError(
        f"no C++ compiler works here (looked for {', '.join(map(shlex.join, wanted))})",
        next_step="Install one: apt install g++, dnf install gcc-c++, or xcode-select --install.",
    )


def _compiler_variables() -> dict[str, str]:
    return {name: os.environ[name] for name in COMPILER_VARIABLES if os.environ.get(name)}


def machine_id() -> str:
    """Architecture and a hash of the CPU's features: a native build may not run on another CPU."""
    features = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                features = " ".join(sorted(line.partition(":")[2].split()))
                break
    return f"{platform.system()}-{platform.machine()}-{sha256_bytes(features.encode())[:12]}"


def cpu_name() -> str:
    """What this machine's processor is called."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_threads() -> int:
    """Threads that computing profits from: one per physical core, as llama.cpp's tools take them by default."""
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def cmake_args(backend: str, extra: Sequence[str], commit: str, build_number: int) -> tuple[str, ...]:
    """Arguments of `cmake` after source, build directory and generator."""
    if backend not in BACKENDS:
        raise BadInputError(f"unknown backend {backend!r}", next_step=f"Choose one of: {', '.join(BACKENDS)}.")
    stamp = (f"-DLLAMA_BUILD_NUMBER={build_number}", f"-DLLAMA_BUILD_COMMIT={commit or 'unknown'}")
    return (*CMAKE_FLAGS, *BACKENDS[backend], *stamp, *extra)


def parse_ninja_line(line: str) -> tuple[int, int] | None:
    """(done, total) from a line such as `[12/230] Building CXX object ...`."""
    match = re.match(r"\[([0-9]{1,9})/([0-9]{1,9})\] ", line)
    return (int(match[1]), int(match[2])) if match else None


def parse_version(text: str) -> tuple[str, int, str]:
    """(version, build number, commit) from what a tool prints for `--version`.

    Known forms: `version: 0.5.0 (build 123, commit abcdef)` and the older `version: 4567 (abcdef)`.
    """
    if match := re.search(r"version: (\S+) \(build ([0-9]{1,9}), commit (\w+)\)", text):
        return match[1], int(match[2]), match[3]
    if match := re.search(r"version: ([0-9]{1,9}) \((\w+)\)", text):
        return f"b{match[1]}", int(match[1]), match[2]
    raise ToolFailedError(f"cannot read llama.cpp's version from {text.strip()[:200]!r}")


def vendored_commit(changelog: str, version: str) -> str:
    """The llama.cpp commit that a llama-cpp-python release vendors, from its CHANGELOG.md ("" if not named)."""
    section = re.search(rf"^## \[{re.escape(version)}\]$(.*?)(?=^## \[|\Z)", changelog, re.MULTILINE | re.DOTALL)
    named = re.search(r"ggml-org/llama\.cpp@([0-9a-f]{7,40})", section[1]) if section else None
    return named[1] if named else ""


@dataclass(frozen=True)
class _Source:
    """A source that is on this disk: an archive or a directory, its hash, and what is known of its commit."""

    spec: SourceSpec
    path: Path
    sha256: str
    commit: str
    build_number: int


def build(
    spec_text: str = DEFAULT_SPEC,
    *,
    backend: str = "cpu",
    extra_cmake_args: Sequence[str] = (),
    jobs: int | None = None,
    wait: bool = False,
    progress: Progress = silent,
) -> Build:
    """The build of a llama.cpp source, from the cache or made now.

    `jobs` limits parallel compilation (default: all cores). Raises `MissingToolError` without a compiler, CMake or
    Ninja, `BusyError` when another process builds the same thing (unless `wait`), `ToolFailedError` with the last
    lines of the log when the build fails; a failed or killed build goes on where it stopped.
    """
    if backend not in BACKENDS:
        raise BadInputError(f"unknown backend {backend!r}", next_step=f"Choose one of: {', '.join(BACKENDS)}.")
    spec = SourceSpec.parse(spec_text)
    compiler = compiler_version(backend)
    cache = cache_dir()
    builds = cache / "builds"
    log = RunLog(cache / "logs" / f"build-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log")
    try:
        source = _obtain(spec, cache / "sources", log)
        # Everything but the stamp of commit and number, which follow from the source.
        flags = cmake_args(backend, extra_cmake_args, source.commit, source.build_number)
        machine = machine_id()
        key = _build_key(source.sha256, backend, flags, compiler, machine)
        root = builds / key
        if (root / "build.json").is_file():
            return _load(root)
        with locked(builds / f"{key}.lock", f"the build of llama.cpp {spec}", wait=wait):
            if not (root / "build.json").is_file():
                log.running = builds / f"{key}.running"  # not the children of other builds
                end_leftovers(log)
                _make(
                    source,
                    root,
                    compiler=compiler,
                    machine=machine,
                    backend=backend,
                    flags=flags,
                    jobs=jobs or os.cpu_count() or 1,
                    log=log,
                    progress=progress,
                )
        return _load(root)
    finally:
        log.close()


def _build_key(source_sha256: str, backend: str, flags: Sequence[str], compiler: str, machine: str) -> str:
    identity: list[Any] = [source_sha256, backend, flags, compiler, machine, TOOLS, PROJECT_INCLUDE, KEPT_SOURCES]
    if variables := _compiler_variables():
        identity.append(variables)
    return sha256_json(identity)[:20]


def is_built(spec_text: str, *, backend: str, extra_cmake_args: Sequence[str], compiler: str) -> bool:
    """Whether the cache has a build that looks like the one `build` will want."""
    return find_built(spec_text, backend=backend, extra_cmake_args=extra_cmake_args, compiler=compiler) is not None


def find_built(spec_text: str, *, backend: str, extra_cmake_args: Sequence[str], compiler: str) -> "Build | None":
    """The build in the cache that looks like the one `build` will want; nothing is fetched or hashed for it.

    A directory or a git ref may have changed since: then `build` makes a new one all the same.
    """
    spec = SourceSpec.parse(spec_text)
    source = f"dir:{Path(spec.value).expanduser().resolve()}" if spec.kind == "dir" else str(spec)
    machine = machine_id()
    for path in (cache_dir() / "builds").glob("*/build.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            made = _load(path.parent)
            first, stamp = (*CMAKE_FLAGS, *BACKENDS.get(backend, ())), 2
            same = made.cmake_args == (*first, *made.cmake_args[len(first) :][:stamp], *extra_cmake_args)
            # Of the same source all the rest must be the same, too, or `build` makes another.
            key = _build_key(made.source_sha256, backend, made.cmake_args, compiler, machine)
            if same and made.source == source and made.key == key:
                return made
    return None


def find_build(key: str) -> Build | None:
    """The build with this key, if the cache has it."""
    root = cache_dir() / "builds" / key
    return _load(root) if re.fullmatch(r"[0-9a-f]{20}", key) and (root / "build.json").is_file() else None


def _load(root: Path) -> Build:
    facts = json.loads((root / "build.json").read_text())
    return Build(root=root, **{**facts, "cmake_args": tuple(facts["cmake_args"])})


def _obtain(spec: SourceSpec, sources: Path, log: RunLog) -> _Source:
    sources.mkdir(parents=True, exist_ok=True)
    return {"pypi": _obtain_pypi, "git": _obtain_git, "dir": _obtain_dir}[spec.kind](spec, sources, log)


def _obtain_pypi(spec: SourceSpec, sources: Path, log: RunLog) -> _Source:
    archive = sources / f"llama_cpp_python-{spec.value}.tar.gz"
    pinned = PYPI_SHA256.get(spec.value)
    if not archive.is_file():
        with tempfile.TemporaryDirectory(dir=sources) as scratch:
            # pip is the index's ordinary client: it knows the user's mirror, proxy and certificates.
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
            try:
                run_tool([*command, "--dest", scratch, f"llama-cpp-python=={spec.value}"], log=log)
            except ToolFailedError as error:
                raise BadInputError(
                    f"cannot download the source of llama-cpp-python {spec.value}: {error.what}",
                    next_step="Check the version and the network, or use --llama-cpp dir:<llama.cpp checkout>.",
                    log=log.path,
                ) from error
            Path(scratch, archive.name).replace(archive)
    digest = sha256_bytes(archive.read_bytes())
    if pinned is not None and digest != pinned:
        archive.unlink()
        raise BadInputError(
            f"llama-cpp-python {spec.value} has sha256 {digest}, expected {pinned}; the download was deleted",
            next_step="Run the same command again; if it happens twice, do not trust the package index you use.",
        )
    with tarfile.open(archive) as tar:
        changelog = ""
        with contextlib.suppress(KeyError):
            member = tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/CHANGELOG.md")
            changelog = member.read().decode(errors="replace") if member else ""
    return _Source(spec, archive, digest, vendored_commit(changelog, spec.value), 0)


def _obtain_git(spec: SourceSpec, sources: Path, log: RunLog) -> _Source:
    git = find_tool("git", "Install git, or use --llama-cpp pypi:<version>.")
    checkout = sources / f"git-{re.sub(r'[^0-9A-Za-z.-]', '_', spec.value)}-{sha256_bytes(spec.value.encode())[:8]}"
    if not checkout.is_dir():
        with tempfile.TemporaryDirectory(dir=sources) as scratch:
            fetched = Path(scratch, "checkout")
            try:
                run_tool([git, "init", "--quiet", fetched], log=log)
                run_tool([git, "-C", fetched, "fetch", "--quiet", "--depth", "1", REPOSITORY, spec.value], log=log)
                run_tool([git, "-C", fetched, "checkout", "--quiet", "FETCH_HEAD"], log=log)
            except ToolFailedError as error:
                raise BadInputError(
                    f"cannot fetch {spec.value} from {REPOSITORY}: {error.what}",
                    next_step="Give a tag such as b9999 or a full commit; without GitHub use pypi: or dir:.",
                    log=log.path,
                ) from error
            # Complete, so it gets its name; when another process was faster, its checkout is the same.
            with contextlib.suppress(OSError):
                fetched.rename(checkout)
    commit = run_tool([git, "-C", checkout, "rev-parse", "HEAD"], log=log).output.strip()
    tag = re.fullmatch(r"b(\d+)", spec.value)
    return _Source(spec, checkout, sha256_bytes(commit.encode()), commit, int(tag[1]) if tag else 0)


def _obtain_dir(spec: SourceSpec, sources: Path, log: RunLog) -> _Source:
    path = Path(spec.value).expanduser().resolve()
    if not (path / "CMakeLists.txt").is_file() or not (path / "convert_hf_to_gguf.py").is_file():
        raise BadInputError(f"{path} is not a llama.cpp source tree (no CMakeLists.txt and convert_hf_to_gguf.py)")
    commit = ""
    if (path / ".git").exists() and shutil.which("git"):
        commit = run_tool(["git", "-C", path, "rev-parse", "HEAD"], log=log).output.strip()
    skip = frozenset({".git", "build", "__pycache__"})
    return _Source(SourceSpec("dir", str(path)), path, sha256_tree(path, skip), commit, 0)


def _make(
    source: _Source,
    root: Path,
    *,
    compiler: str,
    machine: str,
    backend: str,
    flags: tuple[str, ...],
    jobs: int,
    log: RunLog,
    progress: Progress,
) -> None:
    """Unpack, configure, compile, keep what is needed, and rename into place."""
    cmake = find_tool("cmake", "pip install 'gemma-gguf[build]'")
    ninja = find_tool("ninja", "pip install 'gemma-gguf[build]'")
    started = time.monotonic()
    partial = root.with_name(f"{root.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    tree, archive_root = _unpack(source, partial)
    include = partial / "project-include.cmake"
    write_atomic(include, PROJECT_INCLUDE)
    objects = partial / "objects"
    cache = objects / "CMakeCache.txt"
    if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={tree}\n" not in cache.read_text():
        shutil.rmtree(objects)  # what a failed build left, of the same tree at another path
    configure: list[str | Path] = [cmake, "-S", tree, "-B", objects, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    run_tool([*configure, f"-DCMAKE_PROJECT_INCLUDE={include}", *flags], log=log)

    def show(line: str) -> None:
        if counted := parse_ninja_line(line):
            progress("building llama.cpp", *counted, "steps")

    run_tool([cmake, "--build", objects, "-j", str(jobs), "--target", *TOOLS], log=log, on_piece=show)
    finished = partial / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    shutil.copytree(objects / "bin", finished / "bin", symlinks=True)
    for name in KEPT_SOURCES:
        kept = tree / name
        if not kept.exists():
            continue  # older trees have the whole converter in one file
        copy = shutil.copytree if kept.is_dir() else shutil.copy2
        (finished / "source").mkdir(exist_ok=True)
        copy(kept, finished / "source" / name)
    if archive_root is not None:
        shutil.copytree(archive_root / "llama_cpp", finished / "bindings" / "llama_cpp")
    version, number, commit = parse_version(run_tool([finished / "bin" / "llama-imatrix", "--version"], log=log).output)
    facts = {
        "key": root.name,
        "source": str(source.spec),
        "source_sha256": source.sha256,
        "version": version,
        "build_number": number,
        "commit": source.commit or commit,
        "backend": backend,
        "compiler": compiler,
        "cmake_args": list(flags),
        "machine": machine,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_atomic(finished / "build.json", json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(root, ignore_errors=True)
    finished.replace(root)
    shutil.rmtree(partial)


# --- the kernels -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelBuild:
    """The compiled kernels: `key` hashes everything that can change their code."""

    library: Path
    key: str
    source_sha256: str
    compiler: str
    seconds: float


def build_kernels(progress: Progress = silent) -> KernelBuild:
    """The quantisation kernels, from the cache or compiled now (seconds).

    They are no part of a llama.cpp build: a new version of them leaves builds as they are. Raises `MissingToolError`
    or `ToolFailedError` where they cannot be compiled; ggml then does the work.
    """
    compiler = compiler_version("cpu")
    digest, root = _kernels_place(compiler)
    key, cache = root.name, cache_dir()
    if not (root / "kernels.json").is_file():
        log = RunLog(cache / "logs" / f"kernels-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log")
        with contextlib.closing(log), locked(root.with_name(f"{key}.lock"), "the build of the kernels", wait=True):
            if not (root / "kernels.json").is_file():
                log.running = root.with_name(f"{key}.running")
                end_leftovers(log)
                progress("compiling the kernels", 0, 1, "steps")
                _make_kernels(root, {"source_sha256": digest, "compiler": compiler}, log)
    return _load_kernels(root)


def find_kernels() -> KernelBuild | None:
    """The kernels that `build_kernels` would take from the cache; nothing is compiled. Raises `MissingToolError`."""
    _, root = _kernels_place(compiler_version("cpu"))
    return _load_kernels(root) if (root / "kernels.json").is_file() else None


def _kernels_place(compiler: str) -> tuple[str, Path]:
    """(hash of the kernels' source, where they lie when this compiler made them)."""
    digest = sha256_tree(KERNEL_SOURCE)
    key = sha256_json([digest, compiler, platform.system(), platform.machine(), _compiler_variables()])[:20]
    return digest, cache_dir() / "kernels" / key


def _load_kernels(root: Path) -> KernelBuild:
    facts = json.loads((root / "kernels.json").read_text())
    return KernelBuild(library=root / facts.pop("library"), key=root.name, **facts)


def _make_kernels(root: Path, facts: Mapping[str, str], log: RunLog) -> None:
    cmake = find_tool("cmake", "pip install 'gemma-gguf[build]'")
    ninja = find_tool("ninja", "pip install 'gemma-gguf[build]'")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        objects = Path(scratch, "objects")
        configure: list[str | Path] = [cmake, "-S", KERNEL_SOURCE, "-B", objects, "-G", "Ninja"]
        run_tool([*configure, f"-DCMAKE_MAKE_PROGRAM={ninja}"], log=log)
        run_tool([cmake, "--build", objects], log=log)
        finished = Path(scratch, "finished")
        finished.mkdir()
        library = next((name for name in KERNEL_LIBRARIES if (objects / name).is_file()), None)
        if library is None:
            raise ToolFailedError("the kernels were compiled, but there is no library", log=log.path)
        shutil.copy2(objects / library, finished / library)
        written = {**facts, "library": library, "seconds": round(time.monotonic() - started, 1)}
        write_atomic(finished / "kernels.json", json.dumps(written, indent=1) + "\n")
        shutil.rmtree(root, ignore_errors=True)
        finished.replace(root)


def _unpack(source: _Source, partial: Path) -> tuple[Path, Path | None]:
    """(llama.cpp's tree, root of the llama-cpp-python archive or None). An unpacked tree is used again."""
    if source.spec.kind != "pypi":
        return source.path, None
    archive_root = partial / "archive" / source.path.name.removesuffix(".tar.gz")
    done = partial / "unpacked"
    if not done.exists():
        shutil.rmtree(partial / "archive", ignore_errors=True)
        with tarfile.open(source.path) as tar:
            tar.extractall(partial / "archive", filter="data")
        # The archive's one-commit .git would make CMake report its commit as llama.cpp's.
        for git_dir in archive_root.glob("**/.git"):
            shutil.rmtree(git_dir) if git_dir.is_dir() else git_dir.unlink()
        done.touch()
    return archive_root / "vendor" / "llama.cpp", archive_root


def ask_bindings(
    build: Build,
    command: str,
    model: Path,
    text: Path | None,
    log: RunLog,
    *,
    settings: Mapping[str, object] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run a command of `bindings.py` in a process of this build; its JSON answer.

    `on_progress(done, total)` is called as the command says how far it is. Raises `ToolFailedError` when it fails. The
    build must have bindings.
    """
    argv = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "gemma_gguf.bindings",
        command,
        str(model.resolve()),
        str(text.resolve()) if text else "",
        json.dumps(settings or {}),
    ]
    env = python_env(build)
    # Last, so that a working directory or package of the same name cannot come before the build's own.
    env["PYTHONPATH"] = os.pathsep.join((env["PYTHONPATH"], str(Path(__file__).parents[1])))

    def show(line: str) -> None:
        if match := re.fullmatch(r"progress ([0-9]{1,9}) ([0-9]{1,9})", line):
            on_progress(int(match[1]), int(match[2]))

    output = run_tool(argv, log=log, env=env, on_piece=show).output
    answer = next(line for line in reversed(output.splitlines()) if line.startswith("{"))
    return dict(json.loads(answer))


def python_env(build: Build) -> dict[str, str]:
    """Environment of a Python child that must use this build's gguf-py, bindings and libraries, offline."""
    paths = [str(build.gguf_py), *([str(build.bindings)] if build.bindings else [])]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "LLAMA_CPP_LIB_PATH": str(build.bin_dir),
        "MTMD_CPP_LIB": str(build.bin_dir),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
    }
