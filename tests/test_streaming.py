"""`kill -9` while a set is made, sent and deleted wave by wave: the same command goes on, and sends nothing twice."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from gemma_gguf import manifest
from gemma_gguf.files import sha256_file
from gemma_gguf.llama_cpp import Build
from gemma_gguf.recipes import for_proof
from gemma_gguf.session import Report
from tests.hub import Fault, Hub, Repo, files_of, serving
from tests.test_publish import TOKEN, check_nothing_doubled, commits
from tests.test_resume import stage_of

# Runs the command, and kills it where it is about to remove a file whose path ends like the first argument.
KILLED_AT_REMOVAL = """
import os, signal, sys
from gemma_gguf.cli import main
ending = sys.argv.pop(1)
def watch(event, args):
    if event == "os.remove" and str(args[0]).endswith(ending):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
main(prog_name="gemma-gguf")
"""


@dataclass
class Stream:
    """One streaming run's command, its place and its repository on a server."""

    server: Hub
    place: Path
    model: Path
    name: str
    recipes: tuple[str, ...]
    budget: int
    options: tuple[str, ...]

    @property
    def stem(self) -> str:
        return self.name.replace("/", "_")

    @property
    def repo_name(self) -> str:
        return f"{self.name}-GGUF"

    @property
    def repo(self) -> Repo:
        return self.server.uploaded(self.repo_name)

    @property
    def set_dir(self) -> Path:
        return self.place / "out" / f"{self.stem}-GGUF"

    @property
    def talk(self) -> str:
        return (self.place / "talk").read_text(errors="replace")

    def start(self, killed_before_removing: str | None = None) -> subprocess.Popen[bytes]:
        """The same command every time; what it says is in `talk`."""
        self.place.mkdir(exist_ok=True)
        watched = killed_before_removing is not None
        command = ["-c", KILLED_AT_REMOVAL, str(killed_before_removing)] if watched else ["-m", "gemma_gguf"]
        command += ["run", str(self.model), "--name", self.name, "--out", str(self.place / "out"), "--jobs", "2"]
        command += ["--recipes", ",".join(self.recipes), "--disk-budget", str(self.budget), *self.options]
        command += ["--publish", "--stream", "--public", "--repo", self.repo_name]
        environment = self.server.environment(self.place / "home", token=TOKEN) | {"HF_HUB_DISABLE_XET": "1"}
        environment |= {"PYTHONPATH": str(Path(__file__).parents[1])}
        with (self.place / "talk").open("wb") as talk:
            return subprocess.Popen(
                [sys.executable, *command], stdout=talk, stderr=talk, start_new_session=True, env=environment
            )

    def check_nothing_lost(self) -> None:
        """Whatever the manifest names is whole: on this disk, or in the repository."""
        if not (self.set_dir / manifest.FILE_NAME).is_file():
            return
        there = self.published()
        for entry in manifest.load(self.set_dir).files:
            assert entry.sha256 in (self.on_disk(entry.name), there.get(entry.name)), entry.name
            assert entry.state == "local" or there.get(entry.name) == entry.sha256, entry.name

    def on_disk(self, name: str) -> str | None:
        path = self.set_dir / name
        return sha256_file(path) if path.is_file() else None

    def published(self) -> dict[str, str]:
        """{file: SHA-256} of the repository's newest commit; empty while there is none."""
        with contextlib.suppress(KeyError):
            newest = self.repo.commits[self.repo.refs["main"]]
            return {name: sha256_file(newest / name) for name in files_of(newest) if not name.startswith(".")}
        return {}

    def check_complete(self, expected: dict[str, str]) -> None:
        """The repository holds the files with these hashes, each committed once, the card last; quants are gone here,
        and everything that is no quant is still there."""
        there = self.published()
        assert {name: sha256 for name, sha256 in there.items() if name.endswith(".gguf")} == expected
        facts = manifest.load(self.set_dir)
        assert {entry.name: entry.sha256 for entry in facts.files} == expected
        # What describes the set is sent as it is in the end.
        for name in ("README.md", manifest.FILE_NAME):
            assert there[name] == self.on_disk(name), name
        check_nothing_doubled(self.repo)
        weights, last = commits(self.repo)[:-1], commits(self.repo)[-1]
        assert {"README.md", manifest.FILE_NAME} <= set(last)
        assert all(name.endswith(".gguf") for group in weights for name in group)
        assert all(commit.private for commit in self.repo.history)
        assert not self.repo.private
        quants = {entry.name for entry in facts.files if entry.recipe in self.recipes and entry.recipe != "bf16"}
        assert {entry.name for entry in facts.files if entry.state == "remote"} == quants
        assert {path.name for path in self.set_dir.glob("*.gguf")} == set(expected) - quants
        left = [path.name for path in (self.place / "out" / ".work" / self.stem).rglob("*.gguf")]
        assert left == [f"{self.stem}-bf16.gguf"], left


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    with serving() as hub:
        hub.open_for_writing(tmp_path / "store", **{TOKEN: "test"})
        yield hub


def killing(running: list[subprocess.Popen[bytes]], how: str) -> Fault:
    """A request in whose middle the running command is killed: `cut` loses it, `lost` carries it out."""
    return Fault(how, then=running[-1].kill)


def test_a_kill_at_every_step_of_a_file(finished: Report, vision_checkpoint: Path, server: Hub, tmp_path: Path) -> None:
    """Killed in a transfer, between a commit and its record, between the record and the deletion, and between the
    card's commit and the end: five runs of one command, and every file was sent once."""
    stem = "test_tiny-vision"
    recipes = ("Q5_K_M", "Q4_K_M", "Q2_K")
    base, imatrix = (finished.set_dir / f"{stem}-{what}.gguf" for what in ("bf16", "imatrix"))
    given = ("--base", str(base), "--imatrix", str(imatrix), "--no-evaluate")
    sizes = [(finished.set_dir / f"{stem}-{recipe}.gguf").stat().st_size for recipe in recipes]
    # The largest beside the smallest, which is made twice, just fits: what is left to be made must not need more.
    budget = max(sizes) + min(sizes)
    stream = Stream(server, tmp_path / "run", vision_checkpoint, "test/tiny-vision", recipes, budget, given)
    running: list[subprocess.Popen[bytes]] = []

    def killed(faults: Callable[[str, str], Fault | None], removing: str | None = None) -> None:
        server.faults = faults
        running.append(stream.start(removing))
        assert running[-1].wait() == -signal.SIGKILL, stream.talk
        server.faults = lambda method, path: None
        stream.check_nothing_lost()

    def in_transfer(method: str, path: str) -> Fault | None:
        return killing(running, "cut") if (method, path[:5]) == ("PUT", "/lfs/") else None

    def in_commit(method: str, path: str) -> Fault | None:
        return killing(running, "lost") if path.endswith("/commit/main") else None

    def in_last_commit(method: str, path: str) -> Fault | None:
        return in_commit(method, path) if len(stream.repo.history) == n_weights else None

    def states() -> dict[str, str]:
        return {entry.name: entry.state for entry in manifest.load(stream.set_dir).files if entry.kind == "model"}

    n_weights = len(recipes) + 1  # and the imatrix; a base that is given comes without projectors
    killed(in_transfer)
    assert stream.published() == {}
    assert set(states().values()) == {"local"}
    killed(in_commit)
    (first,) = stream.published()  # committed, and not written down
    assert states()[first] == "local"
    assert stream.on_disk(first) is not None
    killed(lambda method, path: None, f"-GGUF/{first}")
    assert states()[first] == "remote"  # written down, and not deleted
    assert stream.on_disk(first) is not None
    killed(in_last_commit)
    assert "README.md" in stream.published()
    assert stream.repo.private
    running.append(stream.start())
    assert running[-1].wait() == 0, stream.talk
    assert stream.on_disk(first) is None
    names = [f"{stem}-{recipe}.gguf" for recipe in (*recipes, "imatrix")]
    stream.check_complete({name: sha256_file(finished.set_dir / name) for name in names})


class Disk(threading.Thread):
    """The most bytes that the quants of a set took at a time, finished or not, as seen every few milliseconds."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.held: dict[str, int] = {}  # then
        self._stream = stream
        self._ended = threading.Event()

    def run(self) -> None:
        places = (self._stream.set_dir, self._stream.place / "out" / ".work" / self._stream.stem)
        while not self._ended.wait(0.005):
            held: dict[str, int] = {}
            for path in (path for place in places for path in place.glob("*.gguf")):
                if not any(what in path.name for what in ("-bf16", "-imatrix", "mmproj-")):
                    with contextlib.suppress(FileNotFoundError):
                        held[path.name] = path.stat().st_blocks * 512
            if sum(held.values()) > self.most:
                self.most, self.held = sum(held.values()), held

    def stop(self) -> None:
        self._ended.set()
        self.join()


@dataclass
class Killer:
    """Kills so many times, at random moments within `seconds`: the command, or one of its children."""

    rng: random.Random
    left: int
    seconds: float
    stages: Counter[str] = field(default_factory=Counter)

    def strike(self, driver: subprocess.Popen[bytes], stream: Stream) -> str:
        """What was killed; "none" when the command had ended by then."""
        time.sleep(self.rng.uniform(0.2, self.seconds))
        if driver.poll() is None:
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):  # it ended by itself
                family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
                target = family[0] if self.rng.random() < 0.7 else self.rng.choice(family)
                stage, command = stage_of(stream.talk), " ".join(target.cmdline())[-200:]
                os.kill(target.pid, signal.SIGKILL)
                self.left -= 1
                self.stages[stage] += 1
                return f"{stage}: {command}"
        return "none"

    def until_it_is_done(self, stream: Stream, at_most: int) -> None:
        """The same command, killed at most so often, until it ends well."""
        code, struck = -1, 0
        while code != 0:
            driver, what = stream.start(), "none"
            if self.left and struck < at_most:
                what = self.strike(driver, stream)
                struck += what != "none"
            code = driver.wait(timeout=1200)
            said = f"{sum(self.stages.values())} kills, last {what}; exit code {code}: {stream.talk}"
            assert code in (0, -signal.SIGKILL) or "next:" in stream.talk, said
            assert code == 0 or what != "none", said
            stream.check_nothing_lost()


@contextlib.contextmanager
def slow_hub(store: Path) -> Iterator[Hub]:
    """A server that takes its time for weights, so that kills hit transfers, too."""
    with serving() as hub:
        hub.open_for_writing(store, **{TOKEN: "test"})
        hub.part_size = 1 << 18
        hub.faults = lambda method, path: Fault("slow") if (method, path[:5]) == ("PUT", "/lfs/") else None
        yield hub


@pytest.mark.proof
def test_publish_stream_through_random_kills(build: Build, text_checkpoint: Path, tmp_path: Path) -> None:
    """50 kills at random moments of converting, making, verifying, measuring, sending and deleting, over some sets.

    Each set ends with the bytes of an undisturbed run, none of them sent twice, and never with more of its quants on
    the disk than the budget. SEED and KILLS choose others.
    """
    assert build.key
    seed, kills = (int(os.environ.get(name, default)) for name, default in (("SEED", time.time_ns()), ("KILLS", 50)))
    recipes = ("bf16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XS")
    given = ("--chunks", "8", "--eval-chunks", "1", "--bench", "none")
    name = "test/tiny-text"
    with slow_hub(tmp_path / "store") as server:
        undisturbed = Stream(server, tmp_path / "undisturbed", text_checkpoint, name, recipes, 10**9, given)
        begun = time.monotonic()
        assert undisturbed.start().wait() == 0, undisturbed.talk
        killer = Killer(random.Random(seed), kills, time.monotonic() - begun)
        expected = {name: sha for name, sha in undisturbed.published().items() if name.endswith(".gguf")}
        assert set(expected) == {f"{undisturbed.stem}-{name}.gguf" for name in (*recipes, "imatrix")}
        undisturbed.check_complete(expected)
    sizes = {entry.recipe: entry.n_bytes for entry in manifest.load(undisturbed.set_dir).files}
    # The largest file beside the one that is made twice, and little more: the rest comes in some waves.
    quants = {name: sizes[name] for name in recipes if name != "bf16"}
    budget = max(quants.values()) + quants[for_proof(quants)] + 100_000
    most: list[int] = []
    while killer.left or not most:
        with slow_hub(tmp_path / f"store-{len(most)}") as server:
            stream = Stream(server, tmp_path / f"disturbed-{len(most)}", text_checkpoint, name, recipes, budget, given)
            watched = Disk(stream)
            watched.start()
            killer.until_it_is_done(stream, at_most=12)
            watched.stop()
            stream.check_complete(expected)
            assert watched.most <= budget, f"{watched.most} bytes of {budget}: {watched.held}"
            most.append(watched.most)
    print(
        f"\n{kills} kills (seed {seed}, {dict(killer.stages.most_common())}), {len(most)} sets of {len(expected)} "
        f"files sent, nothing lost, nothing twice, the card last; quants took at most {max(most):,} bytes of the disk "
        f"at a time, budget {budget:,}, {sum(sizes[name] for name in recipes):,} are in a set"
    )
