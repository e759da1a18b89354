"""The fan-out's driver without llama.cpp: what its journal says holds after a power cut at any moment.

Tasks write a few bytes of their own here, into files whose durable bytes are followed: what is there when a flush
begins is what a power cut leaves. Of the journal every line may survive, so each is checked when it is written.
"""

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import GGMLQuantizationType

from gemma_gguf import fanout, files, gguf_io, plan, shards, tasks
from gemma_gguf.errors import BadInputError, GemmaGGUFError
from gemma_gguf.fanout import Output
from gemma_gguf.gguf_io import NewHeader
from gemma_gguf.plan import FilePlan, PlannedTensor

F32, BF16, Q4_K, Q6_K, Q8_0 = (GGMLQuantizationType[name] for name in ("F32", "BF16", "Q4_K", "Q6_K", "Q8_0"))
RECIPES = ("a", "b", "c")  # `c` in two shards
TASKS, SIZE = 60, 8  # bytes of each task in each file: half are the worker's, half are left to the driver


def bytes_of(task: int) -> bytes:
    return f"{task:08d}".encode()


@dataclass
class Disk(files.System):
    """The operating system, and what a power cut would leave of each file; `on_line` is called after each line that is
    added to the journal. A flush takes its time, so that others write meanwhile."""

    on_line: Callable[[], None]
    durable: dict[Path, bytes] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @staticmethod
    def path(descriptor: int) -> Path:
        return Path(f"/proc/self/fd/{descriptor}").readlink()

    def write(self, descriptor: int, data: memoryview) -> int:
        written = super().write(descriptor, data)
        if self.path(descriptor).name == "journal.txt":
            with self.lock:
                self.on_line()
        return written

    def fsync(self, descriptor: int) -> None:
        path = self.path(descriptor)
        there = path.read_bytes() if path.is_file() else b""
        time.sleep(0.003)
        super().fsync(descriptor)
        self.durable[path] = there


@dataclass(frozen=True)
class Written:
    """A prepared job whose tasks write `bytes_of` their number into every file."""

    job_path: Path
    outputs: tuple[Output, ...]

    @property
    def paths(self) -> list[Path]:
        return [path for output in self.outputs for path, _ in output.parts]

    def holds(self, data: Mapping[Path, bytes], index: int) -> bool:
        place = slice(index * SIZE, (index + 1) * SIZE)
        return all(data.get(path, b"")[place] == bytes_of(index) for path in self.paths)

    def now(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.paths}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    header = NewHeader(b"", (0,), TASKS * SIZE)
    work = tmp_path / "work"
    outputs = []
    for recipe in RECIPES:
        empty = FilePlan(recipe, ())
        cut = (header, header) if recipe == "c" else ()
        partial = work / ("c.partial" if recipe == "c" else f"{recipe}.partial.gguf")
        outputs.append(Output(recipe, partial, header, empty, cut))
    paths = [(output.recipe, str(path)) for output in outputs for path, _ in output.parts]
    # Each phase writes to one more recipe; the second shard of `c` is whole later than the first.
    targets = [{"phase": phase, "places": [[phase, 0]]} for phase in range(len(paths))]
    job: dict[str, Any] = {
        "inputs": "test",
        "base": "base",
        "imatrix": None,
        "bin_dir": "bin",
        "kernels": None,
        "block": 0,
        "recipes": [recipe for recipe, _ in paths],
        "outputs": [path for _, path in paths],
        "sizes": [TASKS * SIZE] * len(paths),
        "tensors": [{"name": "x", "targets": targets}],
        "tasks": [{"phase": index * len(paths) // TASKS, "pieces": []} for index in range(TASKS)],
    }
    path, done, skip = fanout.prepare(job, work / "job", outputs)
    assert (done, skip) == (set(), set())

    def run_task(job_path: str, identity: str, index: int, task: Any, skip: frozenset[int]) -> tasks.TaskDone:
        data = bytes_of(index)
        edges = []
        for output, (_, place) in enumerate(paths):
            if Path(place).exists():
                files.write_at(Path(place), data[:4], index * SIZE)
                edges.append((output, index * SIZE + 4, data[4:]))
        return tasks.TaskDone(index, 0.0, {}, 0, 0, tuple(edges))

    monkeypatch.setattr(tasks, "run_task", run_task)
    return Written(path, tuple(outputs))


@contextmanager
def two_threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def run(written: Written, done: set[int], **how: Any) -> fanout.Figures:
    given: dict[str, Any] = {"executor": two_threads, "jobs": 2, "costs": [1.0] * TASKS, "on_output": lambda _: None}
    return fanout.run(written.job_path, done, set(), **{**given, **how})


def test_journal_never_says_more_than_a_power_cut_leaves(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[str] = []
    trusted: list[int] = []

    def check() -> None:
        said = fanout.Journal(written.job_path).done()  # by a machine that has restarted
        trusted.append(len(said))
        wrong.extend(f"{index} was not flushed" for index in said if not written.holds(disk.durable, index))
        lines = written.job_path.with_name("journal.txt").read_text().split("\n")[:-1]
        now = written.now()
        counted = [int(line.removeprefix("done ")) for line in lines if line.startswith("done ")]
        wrong.extend(f"{index} was not written" for index in counted if not written.holds(now, index))

    disk = Disk(check)
    monkeypatch.setattr(files, "system", disk)
    monkeypatch.setattr(fanout, "SYNC_SECONDS", 0.0)
    monkeypatch.setattr(fanout, "boot_id", lambda: "another")
    figures = run(written, set())
    assert not wrong
    assert figures.tasks == TASKS
    assert len(set(trusted)) > 3, "flushes ran beside the work"
    # What the disk has of the journal when the run has ended counts everything.
    journal = written.job_path.with_name("journal.txt")
    journal.write_bytes(disk.durable[journal])
    assert fanout.Journal(written.job_path).done() == set(range(TASKS))


def test_failed_flush_opens_what_it_may_have_lost(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks since the last good flush are done again, also by the same boot: the pages may be gone."""

    class Failing(files.System):
        calls = 0

        def fsync(self, descriptor: int) -> None:
            self.calls += 1
            if self.calls == 7:
                raise OSError(5, "Input/output error")
            super().fsync(descriptor)

    monkeypatch.setattr(files, "system", Failing())
    monkeypatch.setattr(fanout, "SYNC_SECONDS", 0.0)
    with pytest.raises(GemmaGGUFError, match="Input/output error"):
        run(written, set())
    lines = written.job_path.with_name("journal.txt").read_text().split("\n")
    after = lines[lines.index("lost") + 1 :]
    synced = [line for line in lines[: lines.index("lost")] if line.startswith("sync ")]
    assert synced
    first = lines.index(f"mark {synced[-1].removeprefix('sync ')}")
    kept = {int(line.split()[1]) for line in [*lines[:first], *after] if line.startswith("done ")}
    assert fanout.Journal(written.job_path).done() == kept
    assert len(kept) < TASKS


def test_recipe_is_handed_over_once_when_all_of_its_parts_are_whole(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, bool]] = []
    handed_over = threading.Event()
    quick = tasks.run_task

    def run_task(job_path: str, identity: str, index: int, task: Any, skip: frozenset[int]) -> tasks.TaskDone:
        if index == 45:  # the first that only the second shard of `c` needs: time for whoever does not wait for it
            handed_over.wait(0.5)
        return quick(job_path, identity, index, task, skip)

    def take(recipe: str) -> None:
        output = next(output for output in written.outputs if output.recipe == recipe)
        wanted = b"".join(bytes_of(index) for index in range({"a": 15, "b": 30, "c": 60}[recipe]))
        order.append((recipe, all(path.read_bytes().startswith(wanted) for path, _ in output.parts)))
        if recipe == "c":
            handed_over.set()

    monkeypatch.setattr(tasks, "run_task", run_task)

    run(written, set(), on_output=take)
    assert sorted(order) == [("a", True), ("b", True), ("c", True)]  # flushed side by side: whichever is first


@pytest.mark.parametrize("seed", range(3))
def test_run_that_is_stopped_anywhere_is_continued(written: Written, seed: int) -> None:
    """Every task is done by one of the runs, and by one alone."""
    rng = random.Random(seed)
    done: set[int] = set()
    total = 0
    for _ in range(TASKS):
        stop = rng.randint(1, 25)
        counter = itertools.count(1)

        def count(*_: Any, counter: Iterator[int] = counter, stop: int = stop) -> None:
            if next(counter) >= stop:
                raise GemmaGGUFError("stopped")

        before = len(done)
        with suppress(GemmaGGUFError):
            run(written, done, progress=count)
        now = fanout.Journal(written.job_path).done()
        assert done <= now
        total += len(now) - before
        done = now
        if len(done) == TASKS:
            break
    assert total == TASKS
    assert all(written.holds(written.now(), index) for index in range(TASKS))


# --- jobs ------------------------------------------------------------------------------------------------------------

ROWS = 1000


def base_of(directory: Path) -> gguf_io.Header:
    header = gguf_io.header_of([], [("x", (256, ROWS), BF16), ("y", (256, ROWS), BF16), ("norm", (256,), F32)])
    path = directory / "base.gguf"
    path.write_bytes(header.data + bytes(header.file_size - len(header.data)))
    return gguf_io.read_header(path)


def planned(recipe: str, x: GGMLQuantizationType, y: GGMLQuantizationType) -> FilePlan:
    large = [PlannedTensor(name, (256, ROWS), BF16, kind, kind) for name, kind in (("x", x), ("y", y))]
    return FilePlan(recipe, (*large, PlannedTensor("norm", (256,), F32, F32, F32)))


PLANS = (planned("q4", Q4_K, Q4_K), planned("mix", Q4_K, Q6_K), planned("q6", Q6_K, Q6_K), planned("q8", Q8_0, Q6_K))
SPEEDS = {"Q4_K": 1e6, "Q6_K": 2e6, "Q8_0": 4e6}


def job_of(
    directory: Path, limit: int = 1 << 40, plans: Sequence[FilePlan] = PLANS
) -> tuple[dict[str, Any], list[Output]]:
    base = base_of(directory)
    outputs = [
        fanout.new_output(base, p, [], directory / f"m-{p.recipe}.gguf", work=directory / "work", limit=limit)
        for p in plans
    ]
    job = fanout.build_job(
        base,
        outputs,
        imatrix=None,
        bin_dir=directory,
        inputs="test",
        phase_of=plan.phases(plans, SPEEDS),
        task_elements=1 << 16,
    )
    return job, outputs


def test_each_tensor_and_type_is_one_target(tmp_path: Path) -> None:
    """What several files want is computed once: the work of the job is the distinct work of the plans."""
    job, _ = job_of(tmp_path)
    found = {
        tensor["name"]: {t["type"]: [job["recipes"][output] for output, _ in t["places"]] for t in tensor["targets"]}
        for tensor in job["tensors"]
    }
    assert found == {
        "x": {"Q4_K": ["q4", "mix"], "Q6_K": ["q6"], "Q8_0": ["q8"]},
        "y": {"Q4_K": ["q4"], "Q6_K": ["mix", "q6", "q8"]},
        "norm": {"F32": ["q4", "mix", "q6", "q8"]},
    }
    assert [sum(t["type"] == kind for t in tensor["targets"]) for tensor in job["tensors"] for kind in SPEEDS] == [
        1, 1, 1, 1, 1, 0, 0, 0, 0,
    ]  # fmt: skip
    copied = 256 / fanout.COPY_SPEED
    assert sum(fanout.task_costs(job, SPEEDS)) == pytest.approx(plan.work_of(PLANS).seconds(SPEEDS)[1] + copied)


def test_phases_end_with_the_dearest_file(tmp_path: Path) -> None:
    job, _ = job_of(tmp_path)
    order = plan.phases(PLANS, SPEEDS)
    assert sorted(order, key=lambda recipe: order[recipe]) == ["q8", "q6", "mix", "q4"]
    assert [task["phase"] for task in job["tasks"]] == sorted(task["phase"] for task in job["tasks"])
    for tensor in job["tensors"]:
        for target in tensor["targets"]:
            assert target["phase"] == min(order[job["recipes"][output]] for output, _ in target["places"])


@pytest.mark.parametrize("budget", [1_100_000, 1_500_000, 2_000_000, 10_000_000])
def test_waves_stay_within_their_budget(budget: int) -> None:
    sizes = {p.recipe: sum(t.n_bytes for t in p.tensors) for p in PLANS}
    groups = plan.waves(PLANS, sizes, SPEEDS, budget)
    assert sorted(name for group in groups for name in group) == sorted(sizes)
    assert all(sum(sizes[name] for name in group) <= budget for group in groups)
    smallest = min(sizes.values())
    assert len(groups) <= -(-sum(sizes.values()) // max(1, budget - smallest + 1)) + 1


@pytest.mark.parametrize("seed", range(5))
def test_blocks_of_two_neighbours_never_meet(seed: int) -> None:
    """Ranges side by side, as tasks write them: each block belongs to one of them at most, and no byte is lost."""
    rng = random.Random(seed)
    block, at, owners = 64, rng.randrange(1000), set[int]()
    for _ in range(200):
        n_bytes = rng.randint(1, 400)
        first, end = tasks.own_blocks(at, n_bytes, block)
        assert 0 <= first <= end <= n_bytes
        assert first == end or ((at + first) % block, (at + end) % block) == (0, 0)
        assert first + n_bytes - end < 2 * block
        own = set(range((at + first) // block, (at + end) // block)) if first < end else set()
        assert not own & owners
        owners |= own
        at += n_bytes


def test_shards_are_parts_of_the_job(tmp_path: Path) -> None:
    """Places of tensors in shards; another limit starts anew and leaves no shard."""
    job, outputs = job_of(tmp_path, limit=280_000)
    parts = [(output.recipe, path) for output in outputs for path, _ in output.parts]
    assert [len(output.shards) for output in outputs] == [2, 2, 2, 2]
    assert job["recipes"] == [recipe for recipe, _ in parts]
    assert [Path(path) for path in job["outputs"]] == [path for _, path in parts]
    for tensor in job["tensors"]:
        for target in tensor["targets"]:
            for part, offset in target["places"]:
                recipe, path = parts[part]
                header = next(h for output in outputs for p, h in output.parts if p == path)
                rows = {"x": ["x"], "y": ["y", "norm"]}[("x", "y")[path.name.endswith("2-of-00002.gguf")]]
                assert offset == header.offsets[rows.index(tensor["name"])], (recipe, tensor["name"])
    fanout.prepare(job, tmp_path / "work" / "job", outputs)
    assert {path.relative_to(tmp_path / "work").as_posix() for path in (tmp_path / "work").rglob("*.gguf")} == {
        f"m-{p.recipe}.partial/{shards.name(f'm-{p.recipe}', number, 2)}" for p in PLANS for number in (0, 1)
    }
    single, one_each = job_of(tmp_path)
    fanout.prepare(single, tmp_path / "work" / "job", one_each)
    assert sorted(path.name for path in (tmp_path / "work").rglob("*.gguf")) == sorted(
        f"m-{p.recipe}.partial.gguf" for p in PLANS
    )


def test_job_with_as_many_shards_cut_elsewhere_is_another_job(tmp_path: Path) -> None:
    place = tmp_path / "work" / "job"
    path, _, _ = fanout.prepare(*_job_and_place(tmp_path, 280_000, place))
    fanout.Journal(path).add(0)
    assert fanout.prepare(*_job_and_place(tmp_path, 280_000, place))[1] == {0}
    job, _, outputs = _job_and_place(tmp_path, 288_500, place)
    assert fanout.prepare(job, place, outputs)[1] == set()
    assert [len(header.offsets) for _, header in outputs[0].parts] == [2, 1]
    assert [path.stat().st_size for path, _ in outputs[0].parts] == [h.file_size for _, h in outputs[0].parts]


def _job_and_place(directory: Path, limit: int, place: Path) -> tuple[dict[str, Any], Path, list[Output]]:
    job, outputs = job_of(directory, limit, PLANS[:1])
    return job, place, outputs


def test_job_that_wants_fewer_recipes_drops_the_shards_of_the_rest(tmp_path: Path) -> None:
    """A later job that wants them again must not take for done what passed them over."""
    job, outputs = job_of(tmp_path, limit=280_000)
    place = tmp_path / "work" / "job"
    path, _, _ = fanout.prepare(job, place, outputs)
    fanout.Journal(path).add(0)
    chosen = {field: job[field][2:4] for field in ("recipes", "outputs", "sizes")}
    _, done, skip = fanout.prepare({**job, **chosen}, place, outputs[1:2])
    assert (done, skip) == ({0}, {0, 1, 4, 5, 6, 7})
    assert sorted(path.name for path in (tmp_path / "work").rglob("*.gguf")) == [p.name for p, _ in outputs[1].parts]
    _, done, skip = fanout.prepare(job, place, outputs)
    assert skip == set()
    assert 0 not in done, "its phase writes to files that are new"


def test_first_tensor_over_the_limit_is_said_when_the_job_is_planned(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="the first tensor alone"):
        job_of(tmp_path, limit=100_000)
