"""Writes that are whole or not at all, hashes that are remembered, and locks held against real processes."""

import contextlib
import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gemma_gguf import files
from gemma_gguf.errors import BusyError, DiskError
from gemma_gguf.files import HashMemory, link_or_copy, locked, partial_path, replace_durably, write_atomic

ROOT = Path(__file__).parents[1]


def _python(code: str, *argv: str | Path) -> list[str]:
    return [sys.executable, "-c", code, *map(str, argv)]


@contextlib.contextmanager
def _running(code: str, *argv: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Python of its own that runs `code` and is killed at the end, however the test ends."""
    command = _python(code, *argv)
    with subprocess.Popen(command, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def _line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("final", "partial"),
    [
        ("model.gguf", "model.partial.gguf"),
        ("gemma-2.5b.Q4_K_M.gguf", "gemma-2.5b.Q4_K_M.partial.gguf"),
        ("README.md", "README.partial.md"),
        ("LICENSE", "LICENSE.partial"),
        (".lock.json", ".lock.partial.json"),
    ],
)
def test_partial_path(final: str, partial: str) -> None:
    assert partial_path(Path("set", final)) == Path("set", partial)
    assert partial_path(Path("set", final), Path("work")) == Path("work", partial)


@pytest.mark.parametrize(
    ("data", "expected"),
    [("Grüße\n", "Grüße\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b""), ("a\r\nb\n", b"a\r\nb\n")],
    ids=["text", "bytes", "empty", "line ends"],
)
def test_write_atomic(tmp_path: Path, data: str | bytes, expected: bytes) -> None:
    """Exactly these bytes, in directories made on the way, and nothing beside them."""
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomic(path, data)
    assert path.read_bytes() == expected
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_write_atomic_gives_a_new_file_and_leaves_links_to_the_old_one(tmp_path: Path) -> None:
    path, link = tmp_path / "file.txt", tmp_path / "link.txt"
    write_atomic(path, "old")
    link.hardlink_to(path)
    write_atomic(path, "new")
    assert (path.read_text(), link.read_text()) == ("new", "old")


def test_write_atomic_leaves_the_old_content_when_the_data_cannot_be_written(tmp_path: Path) -> None:
    """Half a surrogate pair is text to Python but not to UTF-8: the failure comes after the file was opened."""
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"


LIMITED = """
import resource, sys
from pathlib import Path
from gemma_gguf.errors import DiskError
from gemma_gguf.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_atomic(Path(sys.argv[1]), b"n" * 300_000)
except DiskError as error:
    print(error.__cause__.strerror)
"""


@pytest.mark.parametrize("old", [b"old content", None], ids=["over an old file", "as a new file"])
def test_write_atomic_that_fails_midway(tmp_path: Path, old: bytes | None) -> None:
    """A process that may write 100,000 bytes to a file and no more stops inside the 300,000 it was given."""
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)
    child = _python(LIMITED, path)
    done = subprocess.run(child, env=_environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "File too large\n"
    assert (path.read_bytes() if path.exists() else None) == old
    assert [p.name for p in tmp_path.iterdir() if files.PARTIAL not in p.name] == ([] if old is None else ["file.bin"])


ENDLESS = """
import sys
from pathlib import Path
from gemma_gguf.files import write_atomic
print("writing", flush=True)
turn = 0
while True:
    turn += 1
    write_atomic(Path(sys.argv[1]), bytes([turn % 256]) * 200_000)
"""


def test_readers_see_whole_files_while_one_is_written_and_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"\0" * 200_000)
    with _running(ENDLESS, path) as writer:
        assert _line(writer) == b"writing\n"
        seen: set[int] = set()
        until = time.monotonic() + 60
        while len(seen) < 5:
            data = path.read_bytes()
            assert (len(data), len(set(data))) == (200_000, 1)
            seen.add(data[0])
            assert time.monotonic() < until
    data = path.read_bytes()
    assert (len(data), len(set(data))) == (200_000, 1)


def test_replace_durably(tmp_path: Path) -> None:
    partial, final = tmp_path / "m.partial.gguf", tmp_path / "m.gguf"
    partial.write_bytes(b"new")
    final.write_bytes(b"old")
    replace_durably(partial, final)
    assert final.read_bytes() == b"new"
    assert not partial.exists()


# --- links ---------------------------------------------------------------------------------------------------------


def test_link_or_copy_links(tmp_path: Path) -> None:
    source, target = tmp_path / "source.gguf", tmp_path / "set" / "target.gguf"
    source.write_bytes(b"data")
    link_or_copy(source, target)
    assert target.samefile(source)
    assert source.read_bytes() == b"data"
    assert [p.name for p in target.parent.iterdir()] == ["target.gguf"]


def test_link_or_copy_of_what_is_linked_already(tmp_path: Path) -> None:
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    source.write_bytes(b"data")
    for _ in range(3):
        link_or_copy(source, target)
        assert target.samefile(source)
        assert source.stat().st_nlink == 2
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source.gguf", "target.gguf"]


def test_link_or_copy_to_itself(tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    source.write_bytes(b"data")
    link_or_copy(source, source)
    assert source.read_bytes() == b"data"
    assert [p.name for p in tmp_path.iterdir()] == ["source.gguf"]


def test_link_or_copy_replaces_an_older_file(tmp_path: Path) -> None:
    source, target, other = tmp_path / "source.gguf", tmp_path / "target.gguf", tmp_path / "other.gguf"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    other.hardlink_to(target)
    link_or_copy(source, target)
    assert target.samefile(source)
    assert other.read_bytes() == b"old"


def test_link_or_copy_goes_over_what_a_killed_run_left(tmp_path: Path) -> None:
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    source.write_bytes(b"new")
    partial_path(target).write_bytes(b"half")
    link_or_copy(source, target)
    assert target.samefile(source)
    assert not partial_path(target).exists()


def test_link_or_copy_copies_from_another_file_system(tmp_path: Path) -> None:
    """No hard link leads out of /proc, which every Linux has."""
    source, target = Path("/proc/version"), tmp_path / "target.txt"
    link_or_copy(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert not target.samefile(source)
    assert [p.name for p in tmp_path.iterdir()] == ["target.txt"]
    link_or_copy(source, target)
    assert target.read_bytes() == source.read_bytes()


def test_link_or_copy_of_a_symbolic_link_holds_its_bytes(tmp_path: Path) -> None:
    """The hub's cache is full of relative symbolic links; linked elsewhere they would lead nowhere."""
    blob, link = tmp_path / "blobs" / "abc", tmp_path / "snapshots" / "model.gguf"
    for path in (blob, link):
        path.parent.mkdir()
    blob.write_bytes(b"data")
    link.symlink_to(Path("../blobs/abc"))
    target = tmp_path / "deep" / "er" / "model.gguf"
    link_or_copy(link, target)
    assert not target.is_symlink()
    assert target.read_bytes() == b"data"


# --- hashes --------------------------------------------------------------------------------------------------------


def test_hashes_are_those_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert HashMemory(tmp_path / "m.json").sha256(path) == abc
    assert files.sha256_bytes(b"abc") == abc


def test_sha256_json_is_canonical() -> None:
    """Order of keys and how the value was made do not matter; order of lists, types and letters do."""
    assert files.sha256_json({"b": [1, "ü"], "a": None}) == _sha256('{"a":null,"b":[1,"ü"]}'.encode())
    assert files.sha256_json({"a": None, "b": (1, "ü")}) == files.sha256_json({"b": [1, "ü"], "a": None})
    different = [[1, 2], [2, 1], ["1", 2], [1, 2, None], [[1], 2], {"1": 2}]
    assert len({files.sha256_json(value) for value in different}) == len(different)


def _keeping_time(path: Path, data: bytes) -> None:
    """Other bytes in the same file, with the times it had."""
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture
def remembered(tmp_path: Path) -> tuple[Path, Path]:
    """(a file that holds "old", the memory that has seen it)."""
    path, memory_path = tmp_path / "a.bin", tmp_path / "hashes.json"
    path.write_bytes(b"old")
    memory = HashMemory(memory_path)
    assert memory.sha256(path) == _sha256(b"old")
    memory.save()
    return path, memory_path


def test_a_file_that_looks_the_same_is_not_read_again(remembered: tuple[Path, Path]) -> None:
    path, memory_path = remembered
    _keeping_time(path, b"new")
    assert HashMemory(memory_path).sha256(path) == _sha256(b"old")


def test_memory_works_before_it_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    memory = HashMemory(tmp_path / "hashes.json")
    assert memory.sha256(path) == _sha256(b"old")
    _keeping_time(path, b"new")
    assert memory.sha256(path) == _sha256(b"old")
    assert not (tmp_path / "hashes.json").exists()


def test_rehash_reads_every_file_again_and_remembers_it(remembered: tuple[Path, Path]) -> None:
    path, memory_path = remembered
    _keeping_time(path, b"new")
    memory = HashMemory(memory_path, rehash=True)
    assert memory.sha256(path) == _sha256(b"new")
    memory.save()
    assert HashMemory(memory_path).sha256(path) == _sha256(b"new")


def _replaced(path: Path) -> None:
    """Another file of the same size and times: only the inode tells."""
    stat = path.stat()
    other = path.with_name("other.bin")
    other.write_bytes(b"new")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


def _later(path: Path) -> None:
    stat = path.stat()
    path.write_bytes(b"new")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "content"),
    [
        pytest.param(lambda path: _keeping_time(path, b"newer"), b"newer", id="size"),
        pytest.param(_later, b"new", id="one nanosecond"),
        pytest.param(_replaced, b"new", id="inode"),
    ],
)
def test_a_file_that_looks_different_is_read_again(
    remembered: tuple[Path, Path], change: Callable[[Path], None], content: bytes
) -> None:
    path, memory_path = remembered
    change(path)
    assert HashMemory(memory_path).sha256(path) == _sha256(content)


def test_one_file_under_two_names_is_remembered_by_its_place(
    remembered: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths and symbolic links lead to the same entry."""
    path, memory_path = remembered
    _keeping_time(path, b"new")
    link = path.with_name("link.bin")
    link.symlink_to(path.name)
    monkeypatch.chdir(path.parent)
    memory = HashMemory(memory_path)
    assert memory.sha256(link) == memory.sha256(Path("a.bin")) == _sha256(b"old")


def test_files_that_are_gone_are_forgotten(remembered: tuple[Path, Path]) -> None:
    path, memory_path = remembered
    other = path.with_name("b.bin")
    other.write_bytes(b"b")
    memory = HashMemory(memory_path)
    memory.sha256(other)
    path.unlink()
    memory.save()
    assert list(json.loads(memory_path.read_text())) == [str(other)]


def _damages() -> Iterator[tuple[str, bytes]]:
    """(name, content) of memories that are of no use."""
    yield "empty", b""
    yield "cut", b'{"'
    yield "not UTF-8", b"\xff\xfe"
    yield "a list", b"[1, 2]"
    yield "null", b"null"


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in _damages()])
def test_a_memory_that_cannot_be_read_is_only_slower(remembered: tuple[Path, Path], content: bytes) -> None:
    path, memory_path = remembered
    _keeping_time(path, b"new")
    memory_path.write_bytes(content)
    memory = HashMemory(memory_path)
    assert memory.sha256(path) == _sha256(b"new")
    memory.save()
    assert HashMemory(memory_path).sha256(path) == _sha256(b"new")


@pytest.mark.parametrize(
    "shorten",
    [
        pytest.param(lambda entry: entry[:3], id="no hash"),
        pytest.param(lambda entry: entry[:2], id="no inode"),
        pytest.param(lambda _: [], id="nothing"),
        pytest.param(lambda _: None, id="null"),
        pytest.param(lambda _: "text", id="a text"),
        pytest.param(lambda entry: [*entry[:3], None], id="null for the hash"),
        pytest.param(lambda entry: [*entry[:3], {"sha256": entry[3]}], id="an object for the hash"),
    ],
)
def test_a_memory_with_a_broken_entry_is_only_slower(
    remembered: tuple[Path, Path], shorten: Callable[[list[object]], object]
) -> None:
    path, memory_path = remembered
    known = json.loads(memory_path.read_text())
    memory_path.write_text(json.dumps({name: shorten(entry) for name, entry in known.items()}))
    _keeping_time(path, b"new")
    assert HashMemory(memory_path).sha256(path) == _sha256(b"new")


# --- trees ---------------------------------------------------------------------------------------------------------


def _tree(root: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


TREE = {"a.txt": b"a", "d/b.txt": b"b", "d/e/c.txt": b""}


def test_tree_hash_is_over_names_sizes_and_bytes(tmp_path: Path) -> None:
    expected = _sha256(b"a.txt\0" + b"1\0a" + b"d/b.txt\0" + b"1\0b" + b"d/e/c.txt\0" + b"0\0")
    assert files.sha256_tree(_tree(tmp_path / "one", TREE)) == expected
    reversed_order = _tree(tmp_path / "two", dict(reversed(TREE.items())))
    (reversed_order / "empty").mkdir()
    (reversed_order / "link.txt").symlink_to("a.txt")
    assert files.sha256_tree(reversed_order) == expected


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({**TREE, "a.txt": b"A"}, id="bytes"),
        pytest.param({"b.txt": b"a", "d/b.txt": b"b", "d/e/c.txt": b""}, id="name"),
        pytest.param({"a.txt": b"a", "b.txt": b"b", "d/e/c.txt": b""}, id="place"),
        pytest.param({**TREE, "new": b""}, id="one more"),
        pytest.param({"a.txt": b"a", "d/b.txt": b"b"}, id="one less"),
        pytest.param({"a.txt": b"ad/b.txt\0" + b"1\0b", "d/e/c.txt": b""}, id="one file that holds another"),
    ],
)
def test_tree_hash_sees(tmp_path: Path, content: dict[str, bytes]) -> None:
    assert files.sha256_tree(_tree(tmp_path / "a", TREE)) != files.sha256_tree(_tree(tmp_path / "b", content))


def test_tree_hash_skips_directories_at_any_depth(tmp_path: Path) -> None:
    plain = files.sha256_tree(_tree(tmp_path / "a", TREE))
    content = {**TREE, ".git/HEAD": b"x", "d/__pycache__/b.pyc": b"x", "build/deep/er": b"x"}
    other = _tree(tmp_path / "b", content)
    assert files.sha256_tree(other, frozenset({".git", "__pycache__", "build"})) == plain
    assert files.sha256_tree(other, frozenset({".git", "build"})) != plain


# --- two writers of one file -------------------------------------------------------------------------------------

RACE = """
import sys
from pathlib import Path
from gemma_gguf.files import write_atomic
path, letter = Path(sys.argv[1]), sys.argv[2].encode()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(200):
    write_atomic(path, letter * 100_000)
"""


def test_two_processes_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    """The user's cache is shared by runs without a lock: whoever is last wins, and every state is whole."""
    path = tmp_path / "speeds" / "key.json"
    seen = set()
    with _running(RACE, path, "a") as first, _running(RACE, path, "b") as second:
        for writer in (first, second):
            assert _line(writer) == b"ready\n"
        for writer in (first, second):
            assert writer.stdin is not None
            writer.stdin.write(b"\n")
            writer.stdin.flush()
        while first.poll() is None or second.poll() is None:
            if path.exists():
                seen.add(path.read_bytes())
        assert (first.returncode, second.returncode) == (0, 0)
    assert seen <= {b"a" * 100_000, b"b" * 100_000}
    assert [p.name for p in path.parent.iterdir()] == ["key.json"]


def _leftover(path: Path, host: str, pid: int, age: float = 0) -> Path:
    left = path.with_name(f"{path.stem}.{host}-{pid}-1.partial{path.suffix}")
    left.write_bytes(b"half")
    os.utime(left, (time.time() - age,) * 2)
    return left


def test_what_killed_writers_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    here = files._here()
    ended = subprocess.Popen(["true"])
    ended.wait()
    gone = [_leftover(path, here, ended.pid), _leftover(path, "ffffff", os.getpid(), age=90_000)]
    kept = [
        _leftover(path, here, os.getppid()),  # it runs
        _leftover(path, "ffffff", ended.pid),  # of another machine, and young
        _leftover(tmp_path / "b.json", here, ended.pid),  # another file's
    ]
    (tmp_path / "a.partial.json").write_bytes(b"another scheme")
    write_atomic(path, b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.json", "a.partial.json", *(p.name for p in kept)])
    assert not [p for p in gone if p.exists()]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_self: files.System, _descriptor: int, _data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.System, "write", full)
    with pytest.raises(DiskError):
        write_atomic(tmp_path / "a.json", b"new")
    assert list(tmp_path.iterdir()) == []


# --- locks ---------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from gemma_gguf.files import locked
print("asking", flush=True)
with locked(Path(sys.argv[1]), "the set m", wait=True):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own that holds the lock of `work` until it gets a line, is killed, or the test ends."""
    with _running(HOLDER, tmp_path / "work") as process:
        assert (_line(process), _line(process)) == (b"asking\n", b"held\n")
        yield process


def test_a_second_process_is_told_who_holds_the_lock(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    work = tmp_path / "work"
    with pytest.raises(BusyError) as caught, locked(work, "the set m"):
        pytest.fail("the lock was given twice")
    since = json.loads((work / ".lock.json").read_text())["since"]
    assert caught.value.what == (
        f"the set m is in use by process {holder.pid} on {socket.gethostname()}, since {since}: {work}"
    )
    assert caught.value.next_step == "Wait for it to end, or run the same command with --wait."
    assert holder.poll() is None


@pytest.mark.parametrize(
    "note",
    [None, "", "{", "[]", "{}", "null", '{"pid": 1}'],
    ids=["missing", "empty", "cut", "list", "{}", "null", "pid"],
)
def test_a_note_that_cannot_be_read_hides_only_the_name(
    tmp_path: Path, holder: subprocess.Popen[bytes], note: str | None
) -> None:
    """Between taking the lock and writing its note, and after a full disk, there is none or a damaged one."""
    work = tmp_path / "work"
    (work / ".lock.json").unlink()
    if note is not None:
        (work / ".lock.json").write_text(note)
    with pytest.raises(BusyError) as caught, locked(work, "the set m"):
        pytest.fail("the lock was given twice")
    assert caught.value.what == f"the set m is in use by another process: {work}"
    assert holder.poll() is None


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    """Its note is still there, and is replaced by ours."""
    work = tmp_path / "work"
    holder.send_signal(signal.SIGKILL)
    assert holder.wait(timeout=10) == -signal.SIGKILL
    assert json.loads((work / ".lock.json").read_text())["pid"] == holder.pid
    with locked(work, "the set m"):
        facts = json.loads((work / ".lock.json").read_text())
        assert (facts["pid"], facts["host"]) == (os.getpid(), socket.gethostname())
    assert not (work / ".lock.json").exists()


def test_the_lock_of_a_process_that_ended_well_is_free(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    work = tmp_path / "work"
    holder.communicate(b"\n", timeout=10)
    assert holder.returncode == 0
    assert not (work / ".lock.json").exists()
    with locked(work, "the set m"):
        assert (work / ".lock.json").exists()


def test_wait_waits_for_the_holder(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    """A waiting process gets the lock when the holder ends, and not before."""
    note = tmp_path / "work" / ".lock.json"
    with _running(HOLDER, tmp_path / "work") as waiting:
        assert waiting.stdin is not None
        assert waiting.stdout is not None
        assert _line(waiting) == b"asking\n"
        os.set_blocking(waiting.stdout.fileno(), False)
        time.sleep(0.7)
        assert waiting.stdout.read() is None
        assert waiting.poll() is None
        assert json.loads(note.read_text())["pid"] == holder.pid
        holder.communicate(b"\n", timeout=10)
        os.set_blocking(waiting.stdout.fileno(), True)
        assert _line(waiting) == b"held\n"
        assert json.loads(note.read_text())["pid"] == waiting.pid
        waiting.stdin.write(b"\n")
        waiting.stdin.flush()
        assert waiting.wait(timeout=10) == 0


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
    work = tmp_path / "a" / "work"
    with pytest.raises(ZeroDivisionError), locked(work, "the set m"):
        raise ZeroDivisionError
    assert not (work / ".lock.json").exists()
    with locked(work, "the set m"):
        assert (work / ".lock.json").exists()


def test_locks_of_two_directories_are_independent(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    with locked(tmp_path / "other", "the set n"):
        assert holder.poll() is None


def test_one_process_cannot_take_a_lock_twice(tmp_path: Path) -> None:
    with locked(tmp_path, "the set m"):
        with pytest.raises(BusyError) as caught, locked(tmp_path, "the set m"):
            pytest.fail("the lock was given twice")
        assert f"process {os.getpid()} on {socket.gethostname()}" in caught.value.what


# --- copied ranges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refused", [None, errno.EXDEV, errno.ENOSYS], ids=["by the kernel", "across disks", "not there"]
)
def test_write_from_puts_a_range_behind_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int | None
) -> None:
    if refused is not None:

        def copy_file_range(*_: object) -> int:
            raise OSError(refused, "refused")

        monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(256)) * 300)
    files.write_from(target, b"head", source, 100, 70_000)
    assert target.read_bytes() == b"head" + source.read_bytes()[100:70_100]


def test_write_from_needs_the_whole_range(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"0123456789")
    with pytest.raises(DiskError, match="ends at byte 10, 2 bytes more were expected"):
        files.write_from(tmp_path / "target", b"head", source, 4, 8)
