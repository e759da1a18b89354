"""Every write this package makes goes through here, and so does every hash it remembers.

A name without `.partial` in it is a promise that the bytes are whole: files are written under a partial name,
flushed to the disk, renamed, and the directory is flushed too. Hashes are remembered by (size, mtime, inode), so a
second look at a set of many gigabytes costs a few `stat` calls.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import filelock

from gemma_gguf.errors import BusyError, DiskError, GemmaGGUFError

PARTIAL = ".partial"
DAY = 86_400.0  # seconds
# What a system says that does not copy ranges, or not between these two file systems.
CANNOT_COPY_RANGES = frozenset({errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})


def partial_path(final: Path, directory: Path | None = None) -> Path:
    """Where `final` is written until it is whole: `name.partial.gguf` for `name.gguf`, in `directory` if given."""
    return (directory or final.parent) / f"{final.stem}{PARTIAL}{final.suffix}"


def partial_folder(final: Path, directory: Path) -> Path:
    """Where the files of the folder `final` are written until all are whole; they have their names already."""
    return directory / f"{final.name}{PARTIAL}"


def is_file(path: Path) -> bool:
    """`Path.is_file`, also for names that no file system takes."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_dir(path: Path) -> bool:
    """`Path.is_dir`, also for names that no file system takes."""
    try:
        return path.is_dir()
    except OSError:
        return False


@contextlib.contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A directory for this block alone: what an earlier run left in it goes first, and all of it goes last."""
    shutil.rmtree(directory, ignore_errors=True)
    make_directory(directory)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def make_directory(path: Path) -> None:
    """Have a directory, or one clear error."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GemmaGGUFError(
            f"cannot make the directory {path}: {error.strerror}", next_step="Choose another place with --out."
        ) from error


class System:
    """The calls to the operating system behind every write of this package.

    One object, `system`, so that tests can put a faulty one in its place: short writes, a full disk, a failing flush,
    a crash before or after a rename.
    """

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags, 0o644)

    def write(self, descriptor: int, data: memoryview) -> int:
        return os.write(descriptor, data)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        return os.pwrite(descriptor, data, offset)

    def copy_range(self, source: int, target: int, n_bytes: int, start: int, offset: int) -> int:
        """Copy at most `n_bytes`; how many there were, 0 at the end of the source."""
        if hasattr(os, "copy_file_range"):
            try:
                return os.copy_file_range(source, target, min(n_bytes, 1 << 30), start, offset)
            except OSError as error:
                if error.errno not in CANNOT_COPY_RANGES:
                    raise
        data = os.pread(source, min(n_bytes, 1 << 24), start)
        return os.pwrite(target, data, offset) if data else 0

    def allocate(self, descriptor: int, n_bytes: int) -> None:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, n_bytes)
        else:
            os.truncate(descriptor, n_bytes)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def replace(self, partial: Path, final: Path) -> None:
        partial.replace(final)


system = System()


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """A failing disk is one clear error; nothing has got its final name."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"cannot write {path}: {error.strerror or error}",
            next_step="Make room, or mend the disk, then run the same command again: finished files are kept.",
        ) from error


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = system.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    with _disk_errors(path), _opened(path, os.O_RDONLY) as descriptor:
        system.fsync(descriptor)


def replace_durably(partial: Path, final: Path) -> None:
    """Give a finished partial file its final name: flush it, rename it, flush the directory."""
    fsync(partial)
    with _disk_errors(final):
        system.replace(partial, final)
    fsync(final.parent)


def replace_folder_durably(partial: Path, final: Path) -> None:
    """Give a finished folder of files its final name, all at once: a reader sees the whole old folder or the new one,
    or for a moment none, never a part.

    A folder cannot be renamed over another, so an old one is first moved beside the partial one and deleted last.
    """
    for path in sorted(partial.iterdir()):
        fsync(path)
    fsync(partial)
    old = partial.with_name(f"{final.name}.old{PARTIAL}")
    shutil.rmtree(old, ignore_errors=True)
    with _disk_errors(final):
        if final.exists():
            system.replace(final, old)
        system.replace(partial, final)
    fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_stream(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file piece by piece, under whatever name it has; the caller renames it when it is whole."""
    with _disk_errors(path), _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
        for piece in pieces:
            data = memoryview(piece)
            while data:
                data = data[system.write(descriptor, data) :]


def write_atomic(path: Path, data: str | bytes, *, durable: bool = True) -> None:
    """Write a whole small file so that a reader sees the old bytes or the new ones, never a part.

    What means nothing after the machine went down need not be `durable`: then nothing waits for the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    # A name of this thread's own: two runs may write the same file of the user's cache at a time.
    partial = path.with_name(f"{path.stem}.{_here()}-{os.getpid()}-{threading.get_ident()}{PARTIAL}{path.suffix}")
    try:
        write_stream(partial, [data.encode() if isinstance(data, str) else data])
        if durable:
            replace_durably(partial, path)
        else:
            with _disk_errors(path):
                system.replace(partial, path)
    except (Exception, KeyboardInterrupt):
        partial.unlink(missing_ok=True)
        raise


def _here() -> str:
    """This machine, in six digits of a file name: process numbers mean nothing on another one."""
    return sha256_bytes(socket.gethostname().encode())[:6]


def _remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed left of `path`: those of this machine, and of others after a day."""
    own = re.compile(rf"{re.escape(path.stem)}\.([0-9a-f]{{6}})-(\d+)-\d+{re.escape(PARTIAL + path.suffix)}")
    for other in path.parent.iterdir():
        if match := own.fullmatch(other.name):
            with contextlib.suppress(OSError):  # whoever it belongs to may rename it just now
                here, number = match[1] == _here(), int(match[2])
                if (here and not _is_running(number)) or time.time() - other.stat().st_mtime > DAY:
                    other.unlink()


def _is_running(number: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # another user's
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` hold the bytes of `source`: a hard link where the file system can, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(target)
    partial.unlink(missing_ok=True)
    try:
        partial.hardlink_to(source.resolve())  # the file, not a symbolic link to it
    except OSError:
        copy(source, partial)
    # POSIX rename of two links to one file does nothing and leaves both names, so the old name goes first.
    if target.exists() and target.samefile(partial):
        partial.unlink()
        return
    replace_durably(partial, target)


def copy(source: Path, target: Path) -> None:
    """Copy the bytes of a file, in pieces."""
    with source.open("rb") as file:
        write_stream(target, iter(lambda: file.read(1 << 24), b""))


def write_from(path: Path, head: bytes, source: Path, start: int, n_bytes: int) -> None:
    """Write a file that begins with `head` and goes on with `n_bytes` bytes of `source` from `start` on.

    The kernel copies the range, where it can: the bytes do not pass through this process.
    """
    write_stream(path, [head])
    with (
        _disk_errors(path),
        _opened(source, os.O_RDONLY) as reading,
        _opened(path, os.O_WRONLY) as writing,
    ):
        at, to, left = start, len(head), n_bytes
        while left:
            moved = system.copy_range(reading, writing, left, at, to)
            if moved == 0:
                raise OSError(f"{source} ends at byte {at}, {left} bytes more were expected")
            at, to, left = at + moved, to + moved, left - moved


def preallocate(path: Path, n_bytes: int) -> None:
    """Make `path` a file of `n_bytes` whose blocks are reserved: a full disk shows now, not hours later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _disk_errors(path), _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
        system.allocate(descriptor, n_bytes)


def pwrite_all(descriptor: int, data: memoryview, offset: int, path: Path) -> None:
    """Write all of `data` at `offset` of an open file, however little each call takes; `path` names it in errors."""
    with _disk_errors(path):
        while data:
            written = system.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written


def write_at(path: Path, data: bytes, offset: int) -> None:
    """Overwrite bytes of an existing (partial) file."""
    with _disk_errors(path), _opened(path, os.O_WRONLY) as descriptor:
        pwrite_all(descriptor, memoryview(data), offset, path)


def append_line(path: Path, line: str) -> None:
    """Add one line to a journal: after a crash it is there whole, or its newline is missing."""
    data = memoryview(f"{line}\n".encode())
    with _disk_errors(path), _opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as descriptor:
        while data:
            data = data[system.write(descriptor, data) :]


def open_log(path: Path) -> IO[bytes]:
    """A file to append what happened to; logs are the one thing that may be cut by a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read now."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """SHA-256 of a JSON-able value in canonical form (sorted keys, no spaces): the key of a stage or a build."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def sha256_tree(root: Path, skip: frozenset[str] = frozenset()) -> str:
    """SHA-256 over the names and bytes of every regular file below `root`, without directories named in `skip`."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if skip.isdisjoint(relative.parts) and path.is_file() and not path.is_symlink():
            digest.update(f"{relative.as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class HashMemory:
    """SHA-256 of files, remembered in one JSON file by (size, mtime in ns, inode) of each path.

    With `rehash=True` nothing is taken from memory: every file asked for is read once more.
    """

    def __init__(self, path: Path, *, rehash: bool = False) -> None:
        self._path = path
        self._known: dict[str, list[object]] = {}
        if not rehash:
            # A memory that cannot be read is only slower, never wrong: start from nothing.
            with contextlib.suppress(OSError, ValueError):
                loaded = json.loads(path.read_text())
                self._known = loaded if isinstance(loaded, dict) else {}

    def sha256(self, path: Path) -> str:
        """SHA-256 of the file's bytes; read only when the file has changed since the last time."""
        path = path.resolve()
        stat = path.stat()
        mark: list[object] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._known.get(str(path))
        if isinstance(known, list) and len(known) == 4 and known[:3] == mark and isinstance(known[3], str):
            return known[3]
        digest = sha256_file(path)
        self._known[str(path)] = [*mark, digest]
        return digest

    def remember(self, path: Path, digest: str) -> None:
        """The bytes of a file were read elsewhere, and this is their SHA-256."""
        path = path.resolve()
        stat = path.stat()
        self._known[str(path)] = [stat.st_size, stat.st_mtime_ns, stat.st_ino, digest]

    def moved(self, old: Path, new: Path) -> None:
        """A file that was hashed as `old`, or a folder of such files, is now called `new`."""
        was, now = str(old.resolve()), str(new.resolve())
        for path in [path for path in self._known if path == was or path.startswith(f"{was}{os.sep}")]:
            self._known[now + path.removeprefix(was)] = self._known.pop(path)

    def save(self) -> None:
        """Write the memory back; entries whose file is gone are dropped."""
        kept = {name: entry for name, entry in self._known.items() if Path(name).exists()}
        write_atomic(self._path, json.dumps(kept, indent=0, sort_keys=True))


@contextlib.contextmanager
def locked(directory: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `directory` (an advisory file lock that dies with its process).

    Raises `BusyError` naming the holder unless `wait`, which blocks until the lock is free.
    """
    make_directory(directory)
    holder = directory / ".lock.json"
    lock = filelock.FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        who = "another process"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads(holder.read_text())
            who = f"process {facts['pid']} on {facts['host']}, since {facts['since']}"
        raise BusyError(
            f"{what} is in use by {who}: {directory}",
            next_step="Wait for it to end, or run the same command with --wait.",
        ) from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        write_atomic(holder, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
