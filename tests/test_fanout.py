"""The fan-out engine: the same bytes as llama-quantize, whatever is killed on the way."""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import LocalCluster
from gguf.constants import GGMLQuantizationType

from gemma_gguf import factory, fanout, gguf_io, plan, proof, quantize, recipes, tasks
from gemma_gguf.errors import GemmaGGUFError, ToolFailedError, VerificationError
from gemma_gguf.files import sha256_bytes, write_at
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.plan import FilePlan, PlannedTensor
from gemma_gguf.session import Options, Report
from tests import checkpoints, gemma4

STEM = "test_tiny-vision"
SOME = ("Q8_0", "Q4_K_M", "Q2_K", "IQ2_XS")


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256_bytes(path.read_bytes()) for path in sorted(directory.glob("*.gguf"))}


# --- identity ----------------------------------------------------------------------------------------------------


def both_engines(checkpoint: Path, tmp_path: Path, names: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """Hashes of the set by fan-out and by the loop, from one base and one imatrix."""
    options = Options(
        str(checkpoint),
        name="test/model",
        out=tmp_path / "fanout",
        chunks=16,
        recipes=("bf16", *names),
        proof=False,
        evaluate=False,
    )
    made = factory.run(options)
    loop = replace(
        options,
        out=tmp_path / "loop",
        engine="llama-quantize",
        base=made.set_dir / "test_model-bf16.gguf",
        imatrix=made.set_dir / "test_model-imatrix.gguf",
    )
    return hashes(made.set_dir), hashes(factory.run(loop).set_dir)


def test_every_default_recipe_is_llama_quantizes_file(finished: Report, set_options: Options, tmp_path: Path) -> None:
    loop = replace(
        set_options,
        out=tmp_path,
        engine="llama-quantize",
        base=finished.set_dir / f"{STEM}-bf16.gguf",
        imatrix=finished.set_dir / f"{STEM}-imatrix.gguf",
    )
    reference = hashes(factory.run(loop).set_dir)
    ours = {name: digest for name, digest in hashes(finished.set_dir).items() if not name.startswith("mmproj")}
    assert len(ours) == 28
    assert ours == reference


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("Q4_K_M", "Q4_0", "Q2_K_L", "IQ2_XS", "IQ3_M"), id="default-rows"),
        pytest.param(tuple(r.name for r in recipes.ON_REQUEST), id="on-request"),
    ],
)
def test_columns_that_256_does_not_divide(build: Build, tmp_path: Path, names: tuple[str, ...]) -> None:
    assert build.key
    checkpoint = checkpoints.write_gemma3_text(tmp_path / "narrow", hidden=160)
    ours, reference = both_engines(checkpoint, tmp_path, names)
    assert len(ours) == len(names) + 2
    assert ours == reference


def test_experts_use_their_own_imatrix_slice(build: Build, tmp_path: Path) -> None:
    assert build.key
    checkpoint = gemma4.write_gemma4_moe(tmp_path / "moe")
    ours, reference = both_engines(checkpoint, tmp_path, ("Q4_K_M", "Q4_0", "Q3_K_L", "IQ2_XXS", "IQ3_S"))
    assert len(ours) == 7
    assert ours == reference
    header = gguf_io.read_header(tmp_path / "fanout" / "test_model-GGUF" / "test_model-IQ2_XXS.gguf")
    assert any(len(tensor.shape) == 3 and tensor.shape[2] > 1 for tensor in header.tensors)


@pytest.mark.proof
def test_every_recipe_of_the_demo(build: Build, tmp_path: Path) -> None:
    """All 26 quants of real Gemma weights (about ten minutes)."""
    assert build.key
    made = factory.run(Options("demo", out=tmp_path / "out", evaluate=False))
    compared = proof.prove_set(made.set_dir)
    assert sorted(compared) == sorted(set(recipes.DEFAULT_NAMES) - {"bf16"})


# --- one job, driven directly ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A prepared job over the finished set's base, and what its files must hash to."""

    dir: Path
    outputs: tuple[fanout.Output, ...]
    content: dict[str, Any]
    expected: dict[str, str]

    def hashes(self) -> dict[str, str]:
        return {output.recipe: sha256_bytes(output.partial.read_bytes()) for output in self.outputs}


def make_job(build: Build, finished: Report, log: RunLog, directory: Path, task_elements: int = 1 << 14) -> Job:
    base = gguf_io.read_header(finished.set_dir / f"{STEM}-bf16.gguf")
    imatrix = finished.set_dir / f"{STEM}-imatrix.gguf"
    numbers = quantize.ftype_numbers(build, log)
    outputs = []
    for name in SOME:
        recipe = recipes.TABLE[name]
        asked = quantize.plan_recipe(
            build, recipe, base.path.name, imatrix=imatrix.name, n_tensors=41, cwd=finished.set_dir, log=log
        )
        keys = fanout.quantize_keys(numbers[recipe.ftype], imatrix.name, gguf_io.read_header(imatrix))
        header = fanout.new_header(base, asked, keys)
        outputs.append(fanout.Output(name, directory / f"{name}.partial.gguf", header, asked))
    content = fanout.build_job(
        base,
        outputs,
        imatrix=imatrix,
        bin_dir=build.bin_dir,
        inputs="test",
        phase_of={name: min(index, 2) for index, name in enumerate(SOME)},
        task_elements=task_elements,
    )
    expected = {name: sha256_bytes((finished.set_dir / f"{STEM}-{name}.gguf").read_bytes()) for name in SOME}
    return Job(directory / "job", tuple(outputs), content, expected)


def run_job(
    job: Job, jobs: int = 2, handed_over: list[str] | None = None, stop_after: float = float("inf"), **how: Any
) -> fanout.Figures:
    """Do a job; with `stop_after`, until that many tasks are done, then fail as an interrupted run does.

    `how` are other arguments of `fanout.run`.
    """

    def count(label: str, done: float, total: float, unit: str = "") -> None:
        if done >= stop_after:
            raise GemmaGGUFError(f"{label}: stopped at {done} of {total} {unit}")

    path, done, skip = fanout.prepare(job.content, job.dir, job.outputs)
    defaults = {"on_output": (handed_over if handed_over is not None else []).append, "progress": count}
    return fanout.run(
        path,
        done,
        skip,
        executor=lambda: fanout.local_executor(jobs, job.dir),
        jobs=jobs,
        costs=[1.0] * len(fanout.load_job(path)["tasks"]),
        **{**defaults, **how},
    )


@pytest.fixture
def job(build: Build, finished: Report, log: RunLog, tmp_path: Path) -> Job:
    return make_job(build, finished, log, tmp_path / "fanout")


def test_job_makes_the_files_and_hands_them_over_in_phases(job: Job) -> None:
    order: list[str] = []
    figures = run_job(job, handed_over=order)
    assert job.hashes() == job.expected
    assert order[:2] == ["Q8_0", "Q4_K_M"]
    assert sorted(order) == sorted(SOME)
    assert figures.tasks == len(fanout.load_job(job.dir / "job.json")["tasks"])
    assert figures.written_bytes == sum(tensor.n_bytes for output in job.outputs for tensor in output.plan.tensors)
    assert set(figures.part_seconds) == set(tasks.PARTS)
    assert 0 < figures.part_seconds["quantize"] < sum(figures.part_seconds.values()) <= figures.cpu_seconds


def test_finished_job_does_nothing_again(job: Job) -> None:
    run_job(job)
    order: list[str] = []
    again = run_job(job, handed_over=order)
    assert (again.tasks, again.written_bytes) == (0, 0)
    assert again.resumed_tasks > 100
    assert sorted(order) == sorted(SOME)


def test_damage_in_the_journal_only_costs_time(job: Job) -> None:
    """The second half of the journal is cut in the middle of a line: those tasks are done again."""
    run_job(job)
    journal = job.dir / "journal.txt"
    data = journal.read_bytes()
    journal.write_bytes(data[: len(data) // 2])
    again = run_job(job)
    assert 0 < again.tasks < again.resumed_tasks + again.tasks
    assert job.hashes() == job.expected


def test_lost_partial_file_costs_its_own_tasks(job: Job) -> None:
    """The last recipe's file is gone: the tasks of its phases are done again, those of other phases are not."""
    run_job(job)
    job.outputs[3].partial.unlink()
    again = run_job(job)
    assert again.resumed_tasks > 0
    assert again.tasks > 0
    assert job.hashes() == job.expected


def test_finished_outputs_are_left_alone_on_resume(job: Job) -> None:
    """A file that got its final name is skipped, its tasks' other files are still made."""
    run_job(job)
    first, *rest = job.outputs
    first.partial.unlink()
    journal = job.dir / "journal.txt"
    journal.write_text("\n".join(journal.read_text().splitlines()[:40]) + "\n")
    fewer = replace(job, outputs=tuple(rest))
    figures = run_job(fewer)
    assert figures.resumed_tasks > 0
    assert figures.tasks > 0
    assert not first.partial.exists()
    assert fewer.hashes() == {name: job.expected[name] for name in SOME[1:]}


def test_interrupted_run_of_fewer_recipes_leaves_no_holes(job: Job) -> None:
    """Tasks that passed an output over, because it was not wanted then, are not done for it."""
    with pytest.raises(GemmaGGUFError, match="stopped"):
        run_job(job, stop_after=10)
    fewer = replace(job, outputs=job.outputs[1:2], content=_content_of(job, [1]))
    with pytest.raises(GemmaGGUFError, match="stopped"):
        run_job(fewer, stop_after=60)
    run_job(job)
    assert job.hashes() == job.expected


def test_interrupted_job_is_known_and_makes_room_for_another(job: Job) -> None:
    """What was begun is told to a run over the same inputs; where another job comes first, its files must not stay."""
    assert fanout.interrupted(job.dir, "test") == frozenset()
    fanout.prepare(_content_of(job, [0, 1]), job.dir, job.outputs[:2])
    assert fanout.interrupted(job.dir, "test") == set(SOME[:2])
    assert fanout.interrupted(job.dir, "other inputs") == frozenset()
    fanout.prepare(_content_of(job, [1, 2]), job.dir, job.outputs[1:3])
    assert [output.recipe for output in job.outputs if output.partial.exists()] == [*SOME[1:3]]
    assert fanout.interrupted(job.dir, "test") == set(SOME[1:3])


def _content_of(job: Job, indices: list[int]) -> dict[str, Any]:
    """The job of a run that wants only some of the outputs, as `prepare` sees it before it finds the old one."""
    chosen = {field: [job.content[field][i] for i in indices] for field in ("recipes", "outputs", "sizes")}
    return {**job.content, **chosen}


def test_job_in_another_place_is_not_continued(job: Job, tmp_path: Path) -> None:
    """A copied work directory writes into its own files, not into those of the directory it was copied from."""
    with pytest.raises(GemmaGGUFError, match="stopped"):
        run_job(job, stop_after=10)
    shutil.copytree(tmp_path / "fanout", tmp_path / "copy")
    places = [str(Path(place).parent.parent / "copy" / Path(place).name) for place in job.content["outputs"]]
    outputs = tuple(replace(output, partial=Path(place)) for output, place in zip(job.outputs, places, strict=True))
    there = replace(job, dir=tmp_path / "copy" / "job", outputs=outputs, content={**job.content, "outputs": places})
    assert run_job(there).resumed_tasks == 0
    assert there.hashes() == job.expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param(["boot HERE", "done 1", "lost", "done 2"], {2}, id="failed-flush"),
        pytest.param(["boot HERE", "done 1", "done 2", "mark a", "sync a", "open 1"], {2}, id="file-gone"),
        pytest.param(
            ["boot old", "done 12", "", "boot HERE", "done 3", "mark a", "sync a"], {3}, id="cut-line-then-boot"
        ),
        pytest.param(["boot HERE", "done 1", "done 2"], {1, 2}, id="same-boot-needs-no-sync"),
        pytest.param(["boot old", "done 1", "mark a", "sync a", "done 2"], {1}, id="other-boot-trusts-synced-lines"),
        pytest.param(
            ["boot old", "done 1", "mark a", "sync a", "done 2", "boot HERE", "done 3"], {1, 3}, id="restart-between"
        ),
        pytest.param(["boot old", "done 1", "mark a", "done 2", "sync a"], {1}, id="done-while-flushing"),
        pytest.param(
            ["boot old", "done 1", "mark a", "done 2", "mark b", "sync a", "sync b"], {1, 2}, id="two-flushes"
        ),
        pytest.param(["boot old", "done 1", "mark a", "lost", "sync a"], set(), id="lost-while-flushing"),
        pytest.param(["boot old", "done 1", "mark a", "boot old", "sync a"], set(), id="flush-of-a-dead-process"),
        pytest.param(["boot HERE", "done 1", "done 22222"], {1, 22222}, id="all-lines-whole"),
        pytest.param([], set(), id="empty"),
    ],
)
def test_journal_trusts_what_the_machine_kept(tmp_path: Path, lines: list[str], expected: set[int]) -> None:
    job_path = tmp_path / "job.json"
    job_path.write_text("{}")
    text = "\n".join([f"job {sha256_bytes(b'{}')}", *lines]).replace("HERE", fanout.boot_id())
    (tmp_path / "journal.txt").write_text(text + "\n")
    assert fanout.Journal(job_path).done() == expected
    (tmp_path / "journal.txt").write_text(text + "\ndone 7")  # no newline: cut by a crash
    assert 7 not in fanout.Journal(job_path).done()
    job_path.write_text("{ }")
    assert fanout.Journal(job_path).done() == set()


def test_abort_in_ggml_names_tensor_and_type(job: Job) -> None:
    """IQ2_XS without imatrix data makes ggml abort its process; the run ends with an error, and keeps its work."""
    content = {**job.content, "imatrix": None}
    with pytest.raises(ToolFailedError, match=r"worker process died at blk\.\d+\.\w+\.weight as IQ2_XS"):
        run_job(replace(job, content=content))
    assert "done" in (job.dir / "journal.txt").read_text()


def test_full_disk_is_said_before_work_and_leaves_nothing(job: Job, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, hard))
    try:
        with pytest.raises(GemmaGGUFError, match=r"cannot write .*File too large"):
            fanout.prepare(job.content, job.dir, job.outputs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "fanout").glob("*.partial.gguf"))


def test_dask_cluster_that_loses_a_worker(job: Job) -> None:
    """Two worker processes, one killed after the first finished tasks: the other does its work, too."""
    content = {**job.content, "block": 4096}
    path, done, skip = fanout.prepare(content, job.dir, job.outputs)
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        pids = [worker.pid for worker in cluster.workers.values()]
        killed: list[int] = []

        def kill_one(label: str, done: float, total: float, unit: str = "") -> None:
            assert total > 0, (label, unit)
            if not killed and done > 5:
                os.kill(pids[0], signal.SIGKILL)
                killed.append(pids[0])

        figures = fanout.run(
            path,
            done,
            skip,
            executor=lambda: fanout.dask_executor(cluster.scheduler_address),
            jobs=2,
            costs=[1.0] * len(content["tasks"]),
            on_output=lambda _: None,
            progress=kill_one,
        )
    assert killed
    assert figures.tasks == len(content["tasks"])
    assert job.hashes() == job.expected


@pytest.mark.parametrize(
    ("offset", "n_bytes", "expected"),
    [
        pytest.param(0, 8192, (0, 8192), id="aligned"),
        pytest.param(100, 8192, (3996, 8092), id="both-ends"),
        pytest.param(100, 3996, (3996, 3996), id="ends-where-a-block-begins"),
        pytest.param(100, 500, (500, 500), id="inside-one-block"),
        pytest.param(4000, 500, (96, 96), id="across-an-edge"),
        pytest.param(4096, 4095, (0, 0), id="one-byte-short"),
    ],
)
def test_blocks_that_are_a_workers_own(offset: int, n_bytes: int, expected: tuple[int, int]) -> None:
    assert tasks.own_blocks(offset, n_bytes, 4096) == expected
    assert tasks.own_blocks(offset, n_bytes, 0) == (0, n_bytes)


def test_worker_of_a_shared_job_writes_only_blocks_of_its_own(job: Job) -> None:
    """Two machines never write to one block: what a worker leaves for the driver is in `edges`."""
    path, _, _ = fanout.prepare({**job.content, "block": 4096}, job.dir, job.outputs)
    before = [output.partial.read_bytes() for output in job.outputs]
    loaded = fanout.load_job(path)
    task = next(task for task in loaded["tasks"] if any(rows > 50 for _, _, rows in task["pieces"]))
    done = tasks.run_task(str(path), "shared", 0, task, frozenset())
    assert done.edges
    for index, output in enumerate(job.outputs):
        after = np.frombuffer(output.partial.read_bytes(), dtype=np.uint8)
        changed = set((np.flatnonzero(after != np.frombuffer(before[index], dtype=np.uint8)) // 4096).tolist())
        given = {block for i, at, edge in done.edges if i == index for block in _blocks(at, len(edge))}
        assert not changed & given
    for index, at, edge in done.edges:
        assert len(edge) < 2 * 4096
        write_at(job.outputs[index].partial, edge, at)
    whole = [output.partial.read_bytes() for output in job.outputs]
    for output in job.outputs:
        output.partial.unlink()
    fresh, _, _ = fanout.prepare({**job.content, "inputs": "alone"}, job.dir, job.outputs)
    tasks.run_task(str(fresh), "alone", 0, task, frozenset())
    assert whole == [output.partial.read_bytes() for output in job.outputs]


def _blocks(at: int, n_bytes: int) -> range:
    return range(at // 4096, (at + n_bytes - 1) // 4096 + 1)


def test_workers_go_on_while_a_file_is_finished(job: Job) -> None:
    """Checking a whole file takes its time; the workers get their tasks meanwhile."""
    first, more = threading.Event(), threading.Event()

    def slow(recipe: str) -> None:
        if not first.is_set():
            first.set()
            assert more.wait(60), recipe

    def count(label: str, done: float, total: float, unit: str = "") -> None:
        if first.is_set() and done > len(job.content["tasks"]) / 2:
            more.set()

    run_job(job, on_output=slow, progress=count)
    assert more.is_set()
    assert job.hashes() == job.expected


def test_file_that_fails_its_checks_ends_the_run(job: Job) -> None:
    """An error of the finishing thread is the run's, what it waits for is ended, and finished work is kept."""
    stopped: list[bool] = []

    def bad(recipe: str) -> None:
        raise VerificationError(f"{recipe} is bad")

    with pytest.raises(VerificationError, match="Q8_0 is bad"):
        run_job(job, on_output=bad, on_stop=lambda: stopped.append(True))
    assert stopped == [True]
    assert run_job(job).resumed_tasks > 0
    assert job.hashes() == job.expected


def test_no_scheduler_is_one_clear_error() -> None:
    with pytest.raises(GemmaGGUFError, match="no Dask scheduler answers"), fanout.dask_executor("tcp://127.0.0.1:9"):
        pass


# --- kills -------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def start(options: Options, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gemma_gguf", "quantize", options.model, "--name", str(options.name)]
    command += ["--out", str(out), "--recipes", ",".join(SOME), "--no-proof", "--jobs", "2"]
    command += ["--base", str(options.base), "--imatrix", str(options.imatrix)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def kill_campaign(finished: Report, options: Options, out: Path, kills: int, seed: int) -> None:
    """Kill the driver or one of its children at random moments until `kills` have hit; every finished set is right."""
    rng = random.Random(seed)
    options = replace(
        options,
        base=finished.set_dir / f"{STEM}-bf16.gguf",
        imatrix=finished.set_dir / f"{STEM}-imatrix.gguf",
    )
    expected = {
        f"{STEM}-{name}.gguf": sha256_bytes((finished.set_dir / f"{STEM}-{name}.gguf").read_bytes()) for name in SOME
    }
    hit = sets = 0
    while hit < kills or not sets:
        driver = start(options, out)
        time.sleep(rng.uniform(0.5, 8.0))
        target = driver.pid if rng.random() < 0.5 else rng.choice(children(driver.pid) or [driver.pid])
        if hit < kills and driver.poll() is None:
            os.kill(target, signal.SIGKILL)
            hit += 1
        code = driver.wait(timeout=120)
        if code == 0:
            made = hashes(out / f"{STEM}-GGUF")
            assert {name: made[name] for name in expected} == expected, f"seed {seed}, after {hit} kills"
            sets += 1
            shutil.rmtree(out)
    print(f"{hit} kills (seed {seed}), {sets} sets, all identical")


def test_kills_end_with_identical_bytes(finished: Report, set_options: Options, tmp_path: Path) -> None:
    kill_campaign(finished, set_options, tmp_path / "out", kills=3, seed=random.SystemRandom().randrange(10**6))


@pytest.mark.proof
def test_twenty_kills_end_with_identical_bytes(finished: Report, set_options: Options, tmp_path: Path) -> None:
    kill_campaign(finished, set_options, tmp_path / "out", kills=20, seed=random.SystemRandom().randrange(10**6))


def test_workers_end_with_their_driver(job: Job, tmp_path: Path) -> None:
    """After `kill -9` of the driver no worker is left behind, so that nothing writes into a later run."""
    script = (
        "import sys, json, time, multiprocessing\n"
        "from pathlib import Path\n"
        "from gemma_gguf import fanout\n"
        "if __name__ == '__main__':\n"
        "    with fanout.local_executor(2, Path(sys.argv[1])) as pool:\n"
        "        list(pool.map(time.sleep, [0.1, 0.1]))\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
    )
    (tmp_path / "driver.py").write_text(script)
    (tmp_path / "slots").mkdir()
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "slots")]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"ready\n"
    group = [pid for pid in children(driver.pid) if pid]
    assert len(group) >= 2
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in group) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in group if Path(f"/proc/{pid}").exists()]
    assert job.dir.name == "job"


# --- the pure parts ----------------------------------------------------------------------------------------------

BF16, Q4_K, Q6_K, F32 = (GGMLQuantizationType[name] for name in ("BF16", "Q4_K", "Q6_K", "F32"))


def file_plan(recipe: str, **types: GGMLQuantizationType) -> FilePlan:
    tensors = [PlannedTensor(name, (256, 1000), BF16, kind, kind) for name, kind in types.items()]
    return FilePlan(recipe, (*tensors, PlannedTensor("norm", (256,), F32, F32, F32)))


A = file_plan("a", x=Q4_K, y=Q4_K)
B = file_plan("b", x=Q4_K, y=Q6_K)
C = file_plan("c", x=Q6_K, y=Q6_K)
SPEEDS = {"Q4_K": 256_000.0, "Q6_K": 512_000.0}


def test_shared_work_is_counted_once() -> None:
    work = plan.work_of([A, B, C])
    assert work.asked == {"Q4_K": 3 * 256_000, "Q6_K": 3 * 256_000}
    assert work.distinct == {"Q4_K": 2 * 256_000, "Q6_K": 2 * 256_000}
    assert work.seconds(SPEEDS) == (4.5, 3.0)


def test_phases_are_cheapest_first_and_not_too_small() -> None:
    assert plan.phases([A, B, C], SPEEDS, share=0.1) == {"c": 0, "b": 1, "a": 2}
    assert plan.phases([A, B, C], SPEEDS, share=1.0) == {"c": 0, "b": 0, "a": 0}


def test_waves_keep_shared_work_together() -> None:
    sizes = {"a": 10, "b": 10, "c": 10}
    assert plan.waves([A, B, C], sizes, SPEEDS, 30) == [["a", "b", "c"]]
    assert plan.waves([C, B, A], sizes, SPEEDS, 20) == [["a", "b"], ["c"]]
    with pytest.raises(GemmaGGUFError, match="b alone needs 50 bytes"):
        plan.waves([A, B, C], {**sizes, "b": 50}, SPEEDS, 20)


@pytest.mark.parametrize(
    ("jobs", "memory", "expected"),
    [
        pytest.param(4, 3_000_000_000, 4, id="room-for-all"),
        pytest.param(64, 3_000_000_000, 46, id="memory-limits"),
        pytest.param(64, 1, 1, id="at-least-one"),
        pytest.param(None, 10**12, os.cpu_count(), id="all-cores"),
    ],
)
def test_workers_fit_the_memory(jobs: int | None, memory: int, expected: int) -> None:
    assert fanout.workers_for(jobs, memory) == expected


def test_what_fits_is_the_most_files() -> None:
    assert plan.that_fit({"big": 100, "small": 5, "middle": 20}, 30) == ["small", "middle"]
    assert plan.that_fit({"big": 100}, 30) == []


@pytest.mark.parametrize("elements", [1, 300, 4096, 1 << 30])
def test_tasks_cover_every_row_of_every_phase_once(job: Job, elements: int) -> None:
    tensors = job.content["tensors"]
    cut = fanout._cut_tasks(tensors, elements)
    seen: dict[tuple[int, int], list[int]] = {}
    for task in cut:
        for index, first, count in task["pieces"]:
            seen.setdefault((task["phase"], index), []).extend(range(first, first + count))
    expected = {
        (target["phase"], index): list(range(tensor["rows"]))
        for index, tensor in enumerate(tensors)
        for target in tensor["targets"]
    }
    assert seen == expected
    assert [task["phase"] for task in cut] == sorted(task["phase"] for task in cut)


def _die(_: int) -> None:
    os.abort()


def test_one_call_in_a_worker(tmp_path: Path) -> None:
    """Its value; or, when the process dies, one error that says what it did. Nothing of it stays."""
    assert fanout.in_a_worker(tmp_path, "counts", len, "four") == 4
    with pytest.raises(ToolFailedError, match=r"^the process that counts with ggml died$") as caught:
        fanout.in_a_worker(tmp_path, "counts with ggml", _die, 1)
    assert caught.value.next_step == "Run the same command again; is there enough memory?"
    assert list(tmp_path.iterdir()) == []
