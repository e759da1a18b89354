"""llama.cpp: the runner of every tool, and builds: a small stand-in through our whole pipeline, then the real one."""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gemma_gguf import llama_cpp
from gemma_gguf.errors import BadInputError, BusyError, MissingToolError, ToolFailedError
from gemma_gguf.llama_cpp import Build, RunLog, SourceSpec, run_tool

REPO = Path(__file__).parents[1]


# --- names, arguments, what tools print --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("pypi:0.3.36", "pypi", "0.3.36"),
        ("pypi:1.0rc1", "pypi", "1.0rc1"),
        ("pypi:0.3.36.post2", "pypi", "0.3.36.post2"),
        ("git:b9999", "git", "b9999"),
        ("git:" + "0a" * 20, "git", "0a" * 20),
        ("git:refs/pull/1/head", "git", "refs/pull/1/head"),
        ("dir:../llama.cpp", "dir", "../llama.cpp"),
        ("dir:/with space/and:colon", "dir", "/with space/and:colon"),
    ],
)
def test_a_source_is_parsed_and_shown_as_it_was_typed(text: str, kind: str, value: str) -> None:
    spec = SourceSpec.parse(text)
    assert spec == SourceSpec(kind, value)
    assert str(spec) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0.3.36",
        "pypi",
        "pypi:",
        "pypi:1",
        "pypi:latest",
        "pypi:>=0.3",
        "pypi:0.3.36 --index-url=x",
        "PYPI:0.3.36",
        "git:",
        "git:--upload-pack=x",
        "git:b1 b2",
        "git:b1\n",
        "dir:",
        "zip:a.zip",
        "https://github.com/ggml-org/llama.cpp",
    ],
)
def test_what_is_no_source(text: str) -> None:
    with pytest.raises(BadInputError) as caught:
        SourceSpec.parse(text)
    assert caught.value.what == f"{text!r} is no llama.cpp source"
    assert caught.value.next_step == "Use pypi:<llama-cpp-python version>, git:<tag or commit> or dir:<path>."


COMMON = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


@pytest.mark.parametrize(
    ("backend", "own"),
    [
        ("cpu", ("-DGGML_METAL=OFF",)),
        ("cuda", ("-DGGML_CUDA=ON",)),
        ("hip", ("-DGGML_HIP=ON",)),
        ("vulkan", ("-DGGML_VULKAN=ON",)),
        ("metal", ("-DGGML_METAL=ON",)),
        ("sycl", ("-DGGML_SYCL=ON", "-DCMAKE_C_COMPILER=icx", "-DCMAKE_CXX_COMPILER=icpx")),
    ],
)
def test_cmake_arguments(backend: str, own: tuple[str, ...]) -> None:
    stamp = ("-DLLAMA_BUILD_NUMBER=7", "-DLLAMA_BUILD_COMMIT=abc1234")
    assert llama_cpp.cmake_args(backend, ["-DA=1", "-DB=2"], "abc1234", 7) == (
        *COMMON,
        *own,
        *stamp,
        "-DA=1",
        "-DB=2",
    )


def test_every_backend_is_in_the_table_above() -> None:
    assert list(llama_cpp.BACKENDS) == ["cpu", "cuda", "hip", "vulkan", "metal", "sycl"]


def test_an_unknown_backend() -> None:
    with pytest.raises(BadInputError, match="unknown backend 'opencl'") as caught:
        llama_cpp.cmake_args("opencl", [], "", 0)
    assert caught.value.next_step == "Choose one of: cpu, cuda, hip, vulkan, metal, sycl."
    with pytest.raises(BadInputError, match="unknown backend 'opencl'"):
        llama_cpp.build(backend="opencl")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[12/230] Building CXX object src/CMakeFiles/llama.dir/llama.cpp.o", (12, 230)),
        ("[230/230] Linking CXX executable bin/llama-server", (230, 230)),
        ("[0/2] Re-checking globbed directories...", (0, 2)),
        ("[ 12%] Building CXX object", None),
        ("-- [1/2] a message of CMake", None),
        ("ninja: no work to do.", None),
        ("", None),
    ],
)
def test_ninja_lines(line: str, expected: tuple[int, int] | None) -> None:
    assert llama_cpp.parse_ninja_line(line) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("version: 0.5.0 (build 123, commit abcdef0)\nbuilt with GNU 12.2.0", ("0.5.0", 123, "abcdef0")),
        ("version: 0.5.0-dev (build 0, commit 0c1e57098)\n", ("0.5.0-dev", 0, "0c1e57098")),
        ("ggml_cuda_init: found 1 device\nversion: 0.5.0 (build 1, commit unknown)", ("0.5.0", 1, "unknown")),
        ("version: 4567 (abcdef01)\nbuilt with cc", ("b4567", 4567, "abcdef01")),
    ],
    ids=["release", "dev", "after other lines", "older"],
)
def test_versions(text: str, expected: tuple[str, int, str]) -> None:
    assert llama_cpp.parse_version(text) == expected


@pytest.mark.parametrize("text", ["", "version 1", "version: (abc)", "error: unknown argument: --version"])
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(ToolFailedError, match=re.escape(f"cannot read llama.cpp's version from {text!r}")):
        llama_cpp.parse_version(text)


CHANGELOG = """# Changelog

## [Unreleased]

- ggml-org/llama.cpp@1111111

## [0.3.36]

- feat: Update llama.cpp to ggml-org/llama.cpp@0c1e57098
- feat: before that, ggml-org/llama.cpp@2222222

## [0.3.35]

- fix: nothing of llama.cpp

## [0.3.3]

- feat: Update llama.cpp to ggml-org/llama.cpp@1234567890123456789012345678901234567890
"""


@pytest.mark.parametrize(
    ("version", "commit"),
    [
        ("0.3.36", "0c1e57098"),
        ("0.3.35", ""),
        ("0.3.3", "1234567890123456789012345678901234567890"),
        ("0.3.34", ""),
        ("0.3", ""),
        ("0.3.3.", ""),
    ],
)
def test_the_commit_that_a_release_vendors(version: str, commit: str) -> None:
    assert llama_cpp.vendored_commit(CHANGELOG, version) == commit


# --- the compiler ------------------------------------------------------------------------------------------------


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_compiler_is_known_by_its_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(tmp_path / "c++", "#!/bin/sh\necho 'cc (Test 1.2) 3.4  '\necho and more\n")
    write_program(tmp_path / "g++", "#!/bin/sh\necho never asked\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert llama_cpp.compiler_version("cpu") == "cc (Test 1.2) 3.4"
    monkeypatch.setenv("CXX", str(write_program(tmp_path / "mine", "#!/bin/sh\necho mine 5\n")))
    assert llama_cpp.compiler_version("cpu") == "mine 5"


def test_cxx_may_hold_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CMake takes it: a compiler and what is always passed to it."""
    monkeypatch.delenv("CXX", raising=False)
    expected = llama_cpp.compiler_version("cpu")
    monkeypatch.setenv("CXX", f"{shutil.which('c++')} -pipe")
    assert llama_cpp.compiler_version("cpu") == expected


@pytest.mark.parametrize(("backend", "names"), [("cpu", "c++, g++, clang++"), ("sycl", "icpx")])
def test_no_compiler(backend: str, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("GEMMA_GGUF_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MissingToolError) as caught:
        llama_cpp.build("dir:nowhere", backend=backend)
    assert caught.value.what == f"no C++ compiler works here (looked for {names})"
    assert "apt install g++" in (caught.value.next_step or "")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "text",
    ["#!/bin/sh\necho version 1; exit 1\n", "#!/bin/sh\nexit 0\n", "no program\n", None],
    ids=["fails", "says nothing", "no program", "not there"],
)
def test_a_cxx_that_does_not_work(text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "my-cxx"
    if text is not None:
        write_program(compiler, text)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(MissingToolError) as caught:
        llama_cpp.compiler_version("cpu")
    assert caught.value.what == f"no C++ compiler works here (looked for {compiler})"
    assert "apt install g++" in (caught.value.next_step or "")


def test_a_missing_tool_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingToolError, match=r"^no-such-tool is not installed$") as caught:
        llama_cpp.find_tool("no-such-tool", "Install it.")
    assert caught.value.next_step == "Install it."
    assert llama_cpp.find_tool(Path(sys.executable).name, "") == Path(sys.executable)


# --- the runner --------------------------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_output_and_exit_code_go_to_the_log(log: RunLog, tmp_path: Path) -> None:
    done = run_tool(["sh", "-c", "echo one; echo two >&2; pwd"], log=log, cwd=tmp_path)
    assert done.argv == ("sh", "-c", "echo one; echo two >&2; pwd")
    assert done.output == f"one\ntwo\n{tmp_path}\n"
    assert done.seconds > 0
    pattern = (
        rf"## \d\d:\d\d:\d\d sh -c 'echo one; echo two >&2; pwd'   \(in {re.escape(str(tmp_path))}\)\n"
        rf"one\ntwo\n{re.escape(str(tmp_path))}\n## \d\d:\d\d:\d\d exit code 0 after \d+\.\d s\n"
    )
    assert re.fullmatch(pattern, log.path.read_text())


def test_a_log_appears_with_its_first_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "logs" / "run.log")
    assert not (tmp_path / "logs").exists()
    log.note("hello")
    log.close()
    assert re.fullmatch(r"## \d\d:\d\d:\d\d hello\n", log.path.read_text())


def test_the_environment_is_added_to_and_stdin_is_empty(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "kept")
    done = run_tool(["sh", "-c", 'echo "$KEPT $ADDED"; cat'], log=log, env={"ADDED": "added"})
    assert done.output == "kept added\n"


@pytest.mark.parametrize(
    ("code", "separators", "pieces"),
    [
        pytest.param("print('a'); print('b')", r"[\r\n]", ["a", "b"], id="lines"),
        pytest.param("print('1%\\r2%\\r', end='')", r"[\r\n]", ["1%", "2%"], id="one line written over"),
        pytest.param("print('[1]5.2,[2]4.1,', end='')", ",", ["[1]5.2", "[2]4.1"], id="commas"),
        pytest.param("print('a'); print('b', end='')", r"[\r\n]", ["a", "b"], id="no end of line"),
        pytest.param(
            "import sys, time; out = sys.stdout.buffer\n"
            "for byte in 'aé€\\n'.encode(): out.write(bytes([byte])); out.flush(); time.sleep(0.02)",
            r"[\r\n]",
            ["aé€"],
            id="letters that come in parts",
        ),
    ],
)
def test_pieces(code: str, separators: str, pieces: list[str], log: RunLog) -> None:
    got: list[str] = []
    run_tool(python(code), log=log, on_piece=got.append, separators=separators)
    assert got == pieces


def test_memory_is_what_the_child_had_when_it_printed(log: RunLog) -> None:
    full = run_tool(python("import time; kept = b'x' * 200_000_000; print('full'); time.sleep(1)"), log=log)
    empty = run_tool(python("import time; print('empty'); time.sleep(1)"), log=log)
    assert full.peak_memory - empty.peak_memory == pytest.approx(200_000_000, rel=0.15)
    assert run_tool(["true"], log=log).peak_memory == 0


def test_pieces_come_while_the_tool_runs(log: RunLog, tmp_path: Path) -> None:
    go = tmp_path / "go"
    wait = f"while [ ! -e {go} ]; do sleep 0.02; done"
    # Had the piece come only at the end, nobody would make the file and the tool would never end.
    done = run_tool(["sh", "-c", f"echo ready; {wait}; echo done"], log=log, on_piece=lambda _: go.touch())
    assert done.output == "ready\ndone\n"


def test_a_tool_that_fails_shows_its_last_lines(log: RunLog) -> None:
    code = "import sys\nfor i in range(40): print('line', i)\nprint('the reason', file=sys.stderr)\nsys.exit(3)"
    with pytest.raises(ToolFailedError) as caught:
        run_tool(python(code), log=log)
    last = "\n".join([*(f"line {i}" for i in range(26, 40)), "the reason"])
    assert caught.value.what == f"{Path(sys.executable).name} ended with exit code 3. Its last lines:\n{last}"
    assert caught.value.log == log.path
    assert re.search(r"^line 0$", log.path.read_text(), re.MULTILINE)
    assert re.search(r"^## \S+ exit code 3 after ", log.path.read_text(), re.MULTILINE)


def test_a_tool_that_is_killed(log: RunLog) -> None:
    with pytest.raises(ToolFailedError, match=r"^sh was killed by signal 9\. Its last lines:\nhello$") as caught:
        run_tool(["sh", "-c", "echo hello; kill -9 $$"], log=log)
    assert caught.value.log == log.path


def test_exit_codes_that_are_expected(log: RunLog) -> None:
    assert run_tool(["sh", "-c", "echo no; exit 1"], log=log, ok_codes=(0, 1)).output == "no\n"
    with pytest.raises(ToolFailedError, match="ended with exit code 2"):
        run_tool(["sh", "-c", "exit 2"], log=log, ok_codes=(0, 1))


def test_a_program_that_is_not_there(log: RunLog) -> None:
    with pytest.raises(MissingToolError, match=r"^no-such-program is not installed$"):
        run_tool(["no-such-program", "--version"], log=log)


def test_bytes_that_are_no_text_do_not_stop_a_run(log: RunLog) -> None:
    done = run_tool(python("import sys; sys.stdout.buffer.write(b'a\\xffb')"), log=log)
    assert done.output == "a\ufffdb"
    assert b"a\xffb" in log.path.read_bytes()


# A tool and a child of its own hold a named pipe open; its reader sees the end when both are gone.
FAMILY = """
exec 3>"$0"
(%s echo child >&3; exec sleep 60) &
%s
echo leader $$ >&3
wait
wait
"""
# A shell ignores Ctrl-C in what it starts in the background, and whoever ignores a signal passes that on.
RUN = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from gemma_gguf.llama_cpp import RunLog, run_tool
try:
    run_tool(["sh", "-c", sys.argv[1], sys.argv[2]], log=RunLog(Path(sys.argv[3])))
except KeyboardInterrupt:
    sys.exit("interrupted")
"""


@pytest.mark.parametrize(
    ("child", "leader"),
    [
        pytest.param("", "", id="both end when asked"),
        pytest.param("trap '' TERM;", "", id="the child of the tool must be killed"),
        pytest.param("trap '' TERM;", "trap '' TERM", id="both must be killed"),
    ],
)
def test_an_interrupt_ends_the_whole_family_of_a_tool(child: str, leader: str, tmp_path: Path) -> None:
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    argv = [sys.executable, "-c", RUN, FAMILY % (child, leader), str(fifo), str(tmp_path / "log")]
    said = b""
    with subprocess.Popen(argv, cwd=REPO, stderr=subprocess.PIPE) as driver:
        try:
            while b"child\n" not in said or not re.search(rb"leader \d+\n", said):
                assert select.select([reader], [], [], 30)[0], said
                time.sleep(0.02)  # before the first writer comes, an empty pipe reads as ended
                said += os.read(reader, 100)
            driver.send_signal(signal.SIGINT)
            assert select.select([reader], [], [], 10)[0], "the family of the tool is still alive"
            assert os.read(reader, 100) == b""
            assert driver.wait(10) == 1
            assert driver.stderr is not None
            assert driver.stderr.read() == b"interrupted\n"
        finally:
            os.close(reader)
            driver.kill()
            if match := re.search(rb"leader (\d+)", said):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(match[1]), signal.SIGKILL)


# --- a stand-in for llama.cpp, through the whole pipeline --------------------------------------------------------

FAKE_CMAKE = """cmake_minimum_required(VERSION 3.20)
project(fake-llama.cpp CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_subdirectory(ggml)
foreach(tool IN ITEMS TOOLS)
  add_executable(${tool} tools/${tool}.cpp)
  target_link_libraries(${tool} PRIVATE ggml-base)
  if(FAKE_STAMPED)  # as llama.cpp does: what the command line says, also if it says nothing
    target_compile_definitions(${tool} PRIVATE NUMBER=${LLAMA_BUILD_NUMBER} COMMIT="${LLAMA_BUILD_COMMIT}")
  endif()
endforeach()
if(FAKE_HEADER)  # a file outside this tree, needed by the last tool, which waits for the first one
  target_compile_definitions(llama-mtmd-cli PRIVATE HEADER="${FAKE_HEADER}")
  set_source_files_properties(tools/llama-mtmd-cli.cpp PROPERTIES OBJECT_DEPENDS ${CMAKE_BINARY_DIR}/bin/llama-quantize)
endif()
if(CMAKE_EXPORT_COMPILE_COMMANDS)  # the objects are removed after a build, so the commands are kept beside the tools
  add_custom_command(TARGET llama-quantize POST_BUILD
    COMMAND ${CMAKE_COMMAND} -E copy ${CMAKE_BINARY_DIR}/compile_commands.json ${CMAKE_BINARY_DIR}/bin)
endif()
"""
FAKE_GGML_CMAKE = """project(ggml CXX)
add_library(ggml-base ggml-base.cpp)
set_target_properties(ggml-base PROPERTIES VERSION 0.1.2 SOVERSION 0)
if(FAKE_GATE)  # the build waits here until there is such a file
  add_custom_command(TARGET ggml-base POST_BUILD COMMAND sh ${CMAKE_SOURCE_DIR}/gate.sh ${FAKE_GATE})
endif()
"""
FAKE_TOOL = """#include <cstdio>
#include <cstring>
#ifdef HEADER
#include HEADER
#endif
#ifndef COMMIT
#define NUMBER 7
#define COMMIT "abcdef0"
#endif
const char * ggml_name();
int main(int argc, char ** argv) {
    if (argc > 1 && !strcmp(argv[1], "--version")) {
        printf("version: 0.5.0 (build %d, commit %s)\\n", NUMBER, COMMIT);
        return 0;
    }
    printf("TOOL with %s\\n", ggml_name());
}
"""
FAKE_GATE = 'touch "$1.reached"\nn=0\nwhile [ ! -e "$1" ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n+1)); done\n'


def write_fake(root: Path) -> Path:
    """A source tree with llama.cpp's shape and eight files to compile."""
    files = {
        "CMakeLists.txt": FAKE_CMAKE.replace("TOOLS", " ".join(llama_cpp.TOOLS)),
        "gate.sh": FAKE_GATE,
        "ggml/CMakeLists.txt": FAKE_GGML_CMAKE,
        "ggml/ggml-base.cpp": 'const char * ggml_name() { return "ggml-base"; }\n',
        "convert_hf_to_gguf.py": "print('the converter')\n",
        "conversion/__init__.py": "",
        "conversion/gemma.py": "name = 'gemma'\n",
        "gguf-py/gguf/__init__.py": "",
        "LICENSE": "MIT\n",
        "README.md": "not kept\n",
        **{f"tools/{tool}.cpp": FAKE_TOOL.replace("TOOL", tool) for tool in llama_cpp.TOOLS},
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    return write_fake(tmp_path / "llama.cpp")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_GGUF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@dataclass(frozen=True)
class Made:
    """One build of the stand-in, in a cache of its own, and what was told while it was made."""

    tree: Path
    cache: Path
    build: Build
    told: list[tuple[str, float, float, str]]


EXPORT = "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("fake")
    tree = write_fake(root / "llama.cpp")
    told: list[tuple[str, float, float, str]] = []

    def tell(label: str, done: float, total: float, unit: str = "") -> None:
        told.append((label, done, total, unit))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_GGUF_CACHE", str(root / "cache"))
        build = llama_cpp.build(f"dir:{tree}", extra_cmake_args=[EXPORT], progress=tell)
    return Made(tree, root / "cache", build, told)


@pytest.fixture
def made(made_once: Made, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setenv("GEMMA_GGUF_CACHE", str(made_once.cache))
    return made_once


def run(*argv: str | Path) -> str:
    return subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=True).stdout


def test_facts_of_a_build(made: Made) -> None:
    facts = made.build.facts()
    assert re.fullmatch(r"[0-9a-f]{20}", made.build.key)
    assert re.fullmatch(r"[0-9a-f]{64}", made.build.source_sha256)
    assert isinstance(facts.pop("seconds"), float)
    assert facts == {
        "bin_dir": str(made.cache / "builds" / made.build.key / "bin"),
        "key": made.build.key,
        "source": f"dir:{made.tree}",
        "source_sha256": made.build.source_sha256,
        "version": "0.5.0",
        "build_number": 7,
        "commit": "abcdef0",
        "backend": "cpu",
        "compiler": llama_cpp.compiler_version("cpu"),
        "cmake_args": llama_cpp.cmake_args("cpu", [EXPORT], "", 0),
        "machine": llama_cpp.machine_id(),
    }


def test_what_a_build_keeps(made: Made) -> None:
    root = made.build.root
    for tool in llama_cpp.TOOLS:
        assert run(made.build.tool(tool)) == f"{tool} with ggml-base\n"
    assert run(sys.executable, made.build.converter) == "the converter\n"
    kept = sorted(p.relative_to(root / "source").as_posix() for p in (root / "source").rglob("*") if p.is_file())
    assert kept == [
        "LICENSE",
        "conversion/__init__.py",
        "conversion/gemma.py",
        "convert_hf_to_gguf.py",
        "gguf-py/gguf/__init__.py",
    ]
    assert made.build.gguf_py == root / "source" / "gguf-py"
    assert made.build.bindings is None
    assert (root / "bin" / "libggml-base.so").is_symlink()
    assert [path.name for path in (made.cache / "builds").glob("*.partial")] == []


def test_progress_is_ninjas_counter(made: Made) -> None:
    totals = {total for _, _, total, _ in made.told}
    assert {(label, unit) for label, _, _, unit in made.told} == {("building llama.cpp", "steps")}
    assert len(totals) == 1
    # Eight files, seven programs, one library with its two links: at least these are steps.
    assert totals.pop() >= 16
    assert [done for _, done, _, _ in made.told] == [float(i) for i in range(1, len(made.told) + 1)]


def test_a_build_is_made_once(made: Made) -> None:
    before = (made.build.root / "build.json").stat()
    told: list[object] = []
    again = llama_cpp.build(
        f"dir:{made.tree}/../{made.tree.name}",
        extra_cmake_args=[EXPORT],
        progress=lambda *told_now: told.append(told_now),
    )
    assert again == made.build
    after = (made.build.root / "build.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert told == []


def test_only_the_quantising_library_is_compiled_without_fused_multiply_add(made: Made) -> None:
    commands = json.loads((made.build.bin_dir / "compile_commands.json").read_text())
    assert len(commands) == 1 + len(llama_cpp.TOOLS)
    without = [Path(entry["file"]).name for entry in commands if "-ffp-contract=off" in entry["command"].split()]
    assert without == ["ggml-base.cpp"]


def test_tools_run_where_the_cache_was_moved_to(made: Made, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    hidden = made.cache.with_name("elsewhere")
    shutil.copytree(made.build.root, moved, symlinks=True)
    made.cache.rename(hidden)
    try:
        assert run(moved / "bin" / "llama-quantize") == "llama-quantize with ggml-base\n"
        (moved / "bin" / "libggml-base.so.0").unlink()
        with pytest.raises(subprocess.CalledProcessError):  # it was that library and no other
            run(moved / "bin" / "llama-quantize")
    finally:
        hidden.rename(made.cache)


def test_a_changed_source_is_another_build(made: Made, tmp_path: Path) -> None:
    tree = shutil.copytree(made.tree, tmp_path / "changed")
    (tree / "ggml" / "ggml-base.cpp").write_text('const char * ggml_name() { return "changed"; }\n')
    other = llama_cpp.build(f"dir:{tree}", extra_cmake_args=[EXPORT])
    assert (other.key, other.source_sha256) != (made.build.key, made.build.source_sha256)
    assert run(other.tool("llama-bench")) == "llama-bench with changed\n"
    assert run(made.build.tool("llama-bench")) == "llama-bench with ggml-base\n"


def test_other_cmake_arguments_are_another_build(made: Made) -> None:
    other = llama_cpp.build(f"dir:{made.tree}", extra_cmake_args=[EXPORT, "-DCMAKE_CXX_FLAGS=-DMORE"])
    assert other.key != made.build.key
    assert other.source_sha256 == made.build.source_sha256
    commands = json.loads((other.bin_dir / "compile_commands.json").read_text())
    assert all("-DMORE" in entry["command"].split() for entry in commands)


@pytest.mark.parametrize(
    ("changes", "there"),
    [
        pytest.param({}, True, id="the same"),
        pytest.param({"extra_cmake_args": []}, False, id="fewer arguments"),
        pytest.param({"extra_cmake_args": [EXPORT, "-DMORE=1"]}, False, id="more arguments"),
        pytest.param({"compiler": "c++ 1.0"}, False, id="another compiler"),
        pytest.param({"backend": "cuda"}, False, id="another backend"),
        pytest.param({"backend": "opencl"}, False, id="no backend"),
        pytest.param({"spec_text": "pypi:0.0.1"}, False, id="another source"),
    ],
)
def test_a_build_in_the_cache_is_found_without_making_it(changes: dict[str, Any], there: bool, made: Made) -> None:
    asked: dict[str, Any] = {"spec_text": f"dir:{made.tree}", "backend": "cpu", "compiler": made.build.compiler}
    found = llama_cpp.find_built(**{**asked, "extra_cmake_args": [EXPORT], **changes})
    assert found == (made.build if there else None)


def test_a_build_of_an_older_version_of_this_package_is_not_taken_for_todays(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another way of building is another key: `build` would make a new one, which takes tools, time and room."""
    monkeypatch.setattr(llama_cpp, "PROJECT_INCLUDE", "another")
    asked = {"backend": "cpu", "compiler": made.build.compiler, "extra_cmake_args": [EXPORT]}
    assert not llama_cpp.is_built(f"dir:{made.tree}", **asked)  # type: ignore[arg-type]


def test_what_is_built_or_versioned_in_a_tree_does_not_change_its_key(made: Made) -> None:
    for name in ("build/CMakeCache.txt", "gguf-py/gguf/__pycache__/x.pyc"):
        (made.tree / name).parent.mkdir(parents=True)
        (made.tree / name).write_text("x")
    try:
        assert llama_cpp.build(f"dir:{made.tree}", extra_cmake_args=[EXPORT]) == made.build
    finally:
        shutil.rmtree(made.tree / "build")
        shutil.rmtree(made.tree / "gguf-py" / "gguf" / "__pycache__")


def test_a_tree_that_is_no_repository_has_no_commit(cache: Path, fake: Path) -> None:
    """llama.cpp takes the commit from CMake's arguments when they have one, also an empty one."""
    build = llama_cpp.build(f"dir:{fake}", extra_cmake_args=["-DFAKE_STAMPED=ON"])
    assert (build.version, build.build_number) == ("0.5.0", 0)


def test_a_compile_error_shows_the_last_lines_and_the_log(cache: Path, fake: Path) -> None:
    broken = fake / "tools" / "llama-bench.cpp"
    good = broken.read_text()
    broken.write_text(f"#error to be mended\n{good}")
    with pytest.raises(ToolFailedError) as caught:
        llama_cpp.build(f"dir:{fake}")
    assert caught.value.what.startswith("cmake ended with exit code 1. Its last lines:\n")
    assert "#error to be mended" in caught.value.what
    assert caught.value.log is not None
    assert caught.value.log.parent == cache / "logs"
    assert "#error to be mended" in caught.value.log.read_text()
    assert list((cache / "builds").glob("*/build.json")) == []
    broken.write_text(good)
    assert run(llama_cpp.build(f"dir:{fake}").tool("llama-bench")) == "llama-bench with ggml-base\n"


def test_a_failed_build_goes_on_where_it_stopped(cache: Path, fake: Path, tmp_path: Path) -> None:
    header = tmp_path / "outside.h"
    told: list[tuple[float, float]] = []

    def build() -> Build:
        told.clear()
        extra = [f"-DFAKE_HEADER={header}"]
        note = lambda label, done, total, unit="": told.append((done, total))  # noqa: E731 - a Progress in one line
        return llama_cpp.build(f"dir:{fake}", extra_cmake_args=extra, jobs=1, progress=note)

    with pytest.raises(ToolFailedError, match=r"outside\.h"):
        build()
    done, total = told[-1]
    [first] = (cache / "builds").glob("*.partial/objects/bin/llama-quantize")
    before = first.stat().st_mtime_ns
    header.write_text("")
    finished = build()
    assert finished.tool("llama-quantize").stat().st_mtime_ns == before
    # The step that failed was counted, too, and is done again.
    assert told[-1] == (total - done + 1, total - done + 1)


def test_a_failed_build_does_not_hinder_the_same_tree_elsewhere(cache: Path, fake: Path, tmp_path: Path) -> None:
    header = tmp_path / "outside.h"
    with pytest.raises(ToolFailedError, match=r"outside\.h"):
        llama_cpp.build(f"dir:{fake}", extra_cmake_args=[f"-DFAKE_HEADER={header}"])
    header.write_text("")
    moved = fake.rename(tmp_path / "moved")
    build = llama_cpp.build(f"dir:{moved}", extra_cmake_args=[f"-DFAKE_HEADER={header}"])
    assert build.source == f"dir:{moved}"


BUILD = """
import json, sys
from gemma_gguf import llama_cpp
told = []
made = llama_cpp.build(
    sys.argv[1], extra_cmake_args=sys.argv[3:], wait=sys.argv[2] == "wait", progress=lambda *now: told.append(now)
)
print(json.dumps({"facts": made.facts(), "told": len(told)}))
"""


def start_build(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", BUILD, *arguments]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_make_one_build(cache: Path, fake: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    spec, argument = f"dir:{fake}", f"-DFAKE_GATE={gate}"
    with start_build(spec, "refuse", argument) as maker:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "gate.reached").exists():
                assert maker.poll() is None, maker.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            with pytest.raises(BusyError) as caught:
                llama_cpp.build(spec, extra_cmake_args=[argument])
            with start_build(spec, "wait", argument) as waiter:
                time.sleep(1)  # time enough to be refused or to make a build of its own
                assert waiter.poll() is None
                gate.touch()
                first, second = (json.loads(child.communicate(timeout=60)[0]) for child in (maker, waiter))
        finally:
            gate.touch()
    who = re.match(
        rf"the build of llama\.cpp {re.escape(spec)} is in use by process (\d+) on {re.escape(socket.gethostname())}, "
        r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}: ",
        caught.value.what,
    )
    assert who is not None, caught.value.what
    assert int(who[1]) == maker.pid
    assert "--wait" in (caught.value.next_step or "")
    assert first["facts"] == second["facts"]
    assert first["told"] > 0
    assert second["told"] == 0


# --- where sources come from -------------------------------------------------------------------------------------


@pytest.fixture
def remote(fake: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """(repository, commit of tag b7): a local repository that stands in for llama.cpp's address."""
    for number, (key, value) in enumerate(
        [
            (f"url.{fake}.insteadOf", llama_cpp.REPOSITORY),
            ("user.name", "Test"),
            ("user.email", "test@example.com"),
            ("init.defaultBranch", "master"),
        ]
    ):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{number}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{number}", value)
        monkeypatch.setenv("GIT_CONFIG_COUNT", str(number + 1))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for variable in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(variable, raising=False)
    run("git", "init", "--quiet", fake)
    run("git", "-C", fake, "add", ".")
    run("git", "-C", fake, "commit", "--quiet", "-m", "first")
    run("git", "-C", fake, "tag", "b7")
    commit = run("git", "-C", fake, "rev-parse", "HEAD").strip()
    (fake / "ggml" / "ggml-base.cpp").write_text('const char * ggml_name() { return "newer"; }\n')
    run("git", "-C", fake, "commit", "--quiet", "-a", "-m", "second")
    return fake, commit


STAMPED = ["-DFAKE_STAMPED=ON"]


def test_a_tag_of_the_repository(cache: Path, remote: tuple[Path, str], tmp_path: Path) -> None:
    repository, commit = remote
    build = llama_cpp.build("git:b7", extra_cmake_args=STAMPED)
    assert (build.source, build.version, build.build_number, build.commit) == ("git:b7", "0.5.0", 7, commit)
    assert run(build.tool("llama-bench")) == "llama-bench with ggml-base\n"
    assert run(build.tool("llama-bench"), "--version") == f"version: 0.5.0 (build 7, commit {commit})\n"
    assert build.bindings is None
    repository.rename(tmp_path / "the network is down")
    assert llama_cpp.build("git:b7", extra_cmake_args=STAMPED) == build


def test_a_commit_of_the_repository(cache: Path, remote: tuple[Path, str]) -> None:
    _, commit = remote
    build = llama_cpp.build(f"git:{commit}", extra_cmake_args=STAMPED)
    assert (build.source, build.build_number, build.commit) == (f"git:{commit}", 0, commit)
    assert run(build.tool("llama-bench")) == "llama-bench with ggml-base\n"


def test_a_ref_that_the_repository_does_not_have(cache: Path, remote: tuple[Path, str]) -> None:
    with pytest.raises(BadInputError) as caught:
        llama_cpp.build("git:b8")
    assert caught.value.what.startswith(f"cannot fetch b8 from {llama_cpp.REPOSITORY}: git ended with exit code 128.")
    assert "couldn't find remote ref b8" in caught.value.what
    assert "full commit" in (caught.value.next_step or "")
    assert caught.value.log is not None
    assert "couldn't find remote ref b8" in caught.value.log.read_text()


def test_a_checkout_of_the_users(cache: Path, remote: tuple[Path, str]) -> None:
    repository, first = remote
    build = llama_cpp.build(f"dir:{repository}", extra_cmake_args=STAMPED)
    head = run("git", "-C", repository, "rev-parse", "HEAD").strip()
    assert head != first
    assert (build.commit, build.build_number) == (head, 0)
    assert run(build.tool("llama-bench")) == "llama-bench with newer\n"


@pytest.mark.parametrize("missing", ["CMakeLists.txt", "convert_hf_to_gguf.py", None])
def test_a_directory_that_is_no_llama_cpp(missing: str | None, cache: Path, fake: Path, tmp_path: Path) -> None:
    if missing:
        (fake / missing).unlink()
    path = fake if missing else tmp_path / "nowhere"
    with pytest.raises(BadInputError, match=re.escape(f"{path} is not a llama.cpp source tree")):
        llama_cpp.build(f"dir:{path}")


def test_a_release_with_other_bytes_is_refused_and_deleted(cache: Path) -> None:
    version, pinned = next(iter(llama_cpp.PYPI_SHA256.items()))
    archive = cache / "sources" / f"llama_cpp_python-{version}.tar.gz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"not that release")
    with pytest.raises(BadInputError) as caught:
        llama_cpp.build(f"pypi:{version}")
    digest = hashlib.sha256(b"not that release").hexdigest()
    assert caught.value.what == (
        f"llama-cpp-python {version} has sha256 {digest}, expected {pinned}; the download was deleted"
    )
    assert "Run the same command again" in (caught.value.next_step or "")
    assert not archive.exists()


def write_release(sources: Path, tree: Path, version: str, **files: str) -> None:
    """A source archive of llama-cpp-python whose vendored llama.cpp is `tree`."""
    root = f"llama_cpp_python-{version}"
    sources.mkdir(parents=True)
    with tarfile.open(sources / f"{root}.tar.gz", "w:gz") as tar:
        tar.add(tree, f"{root}/vendor/llama.cpp")
        for name, text in {"llama_cpp/__init__.py": f"__version__ = {version!r}\n", **files}.items():
            member = tarfile.TarInfo(f"{root}/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))


def test_a_release_brings_its_bindings_and_its_commit(cache: Path, fake: Path) -> None:
    (fake / ".git").write_text("gitdir: ../.git/modules/llama.cpp\n")
    changelog = "# Changelog\n\n## [0.0.9]\n\n- feat: Update llama.cpp to ggml-org/llama.cpp@1234abcd\n"
    write_release(cache / "sources", fake, "0.0.9", **{"CHANGELOG.md": changelog})
    build = llama_cpp.build("pypi:0.0.9", extra_cmake_args=STAMPED)
    archive = (cache / "sources" / "llama_cpp_python-0.0.9.tar.gz").read_bytes()
    assert (build.source, build.source_sha256) == ("pypi:0.0.9", hashlib.sha256(archive).hexdigest())
    assert (build.version, build.build_number, build.commit) == ("0.5.0", 0, "1234abcd")
    assert build.bindings is not None
    assert (build.bindings / "llama_cpp" / "__init__.py").read_text() == "__version__ = '0.0.9'\n"
    assert run(sys.executable, build.converter) == "the converter\n"
    assert llama_cpp.build("pypi:0.0.9", extra_cmake_args=STAMPED) == build


def test_a_release_without_a_changelog(cache: Path, fake: Path) -> None:
    write_release(cache / "sources", fake, "0.0.8")
    build = llama_cpp.build("pypi:0.0.8")
    assert (build.source, build.commit) == ("pypi:0.0.8", "abcdef0")


def test_an_older_tree_without_the_converters_package(cache: Path, fake: Path) -> None:
    shutil.rmtree(fake / "conversion")
    build = llama_cpp.build(f"dir:{fake}")
    assert run(sys.executable, build.converter) == "the converter\n"


def test_a_release_that_cannot_be_had(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(BadInputError) as caught:
        llama_cpp.build("pypi:0.0.99")
    assert caught.value.what.startswith("cannot download the source of llama-cpp-python 0.0.99: ")
    assert "llama-cpp-python==0.0.99" in caught.value.what
    assert "dir:" in (caught.value.next_step or "")
    assert caught.value.log is not None
    assert caught.value.log.is_file()
    assert [path.name for path in (cache / "sources").iterdir()] == []


# --- the real build ----------------------------------------------------------------------------------------------


def test_the_default_is_the_release_that_is_installed(build: Build) -> None:
    kind, _, version = llama_cpp.DEFAULT_SPEC.partition(":")
    assert kind == "pypi"
    assert version == importlib.metadata.version("llama-cpp-python")
    project: dict[str, Any] = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert [d for d in project["dependencies"] if d.startswith("llama-cpp-python")] == [f"llama-cpp-python=={version}"]
    assert version in llama_cpp.PYPI_SHA256
    assert f"LLAMA_CPP ?= pypi:{version}\n" in (REPO / "Makefile").read_text()
    assert (build.source, build.source_sha256) == (llama_cpp.DEFAULT_SPEC, llama_cpp.PYPI_SHA256[version])


def test_facts_of_the_real_build(build: Build) -> None:
    facts = build.facts()
    assert facts["bin_dir"] == str(build.root / "bin")
    assert (facts["backend"], facts["compiler"]) == ("cpu", llama_cpp.compiler_version("cpu"))
    assert facts["machine"] == llama_cpp.machine_id()
    assert facts["cmake_args"] == llama_cpp.cmake_args("cpu", [], build.commit, 0)
    said = subprocess.run([build.tool("llama-imatrix"), "--version"], capture_output=True, text=True, check=True)
    assert llama_cpp.parse_version(said.stdout + said.stderr) == (build.version, build.build_number, build.commit)
    assert re.fullmatch(r"[0-9a-f]{7,40}", build.commit)
    assert json.loads(json.dumps(facts)) == {**facts, "cmake_args": list(build.cmake_args)}


def test_the_real_build_has_everything(build: Build) -> None:
    for tool in llama_cpp.TOOLS:
        assert os.access(build.tool(tool), os.X_OK), tool
    assert build.converter.is_file()
    assert (build.gguf_py / "gguf" / "__init__.py").is_file()
    assert (build.root / "source" / "conversion").is_dir()
    assert (build.root / "source" / "LICENSE").is_file()
    assert build.bindings == build.root / "bindings"
    assert (build.bindings / "llama_cpp" / "llama_cpp.py").is_file()
    assert not build.root.with_name(f"{build.root.name}.partial").exists()


def test_a_child_finds_the_real_builds_bindings_and_gguf(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    environment = llama_cpp.python_env(build)
    assert environment["PYTHONPATH"] == f"{build.gguf_py}:{build.bindings}:/somewhere"
    code = "import gguf, llama_cpp; print(gguf.__file__); print(llama_cpp.__file__); print(llama_cpp.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert build.bindings is not None
    assert done.stdout.splitlines() == [
        str(build.gguf_py / "gguf" / "__init__.py"),
        str(build.bindings / "llama_cpp" / "__init__.py"),
        llama_cpp.DEFAULT_SPEC.removeprefix("pypi:"),
    ]
