"""`make bench`: the fan-out engine against a loop over llama-quantize, side by side in one run.

Builds a seeded synthetic checkpoint shaped like Gemma 3 4B (SCALE=small: a smaller one; SCALE=demo: the real weights
of the demo model), converts it and computes an imatrix with the factory, then makes the same quants with
llama-quantize, with the fan-out on ggml's quantisers and with the fan-out on the kernels, alternating so that a noisy
machine hits all alike. Prints a table as it goes and one JSON line last. Loop time is llama-quantize's alone; fan-out
time is all of it: planning by dry-runs, headers, worker start, quantising, flushing to the disk. The kernels' speed,
type by type, comes before (bench_kernels.py).
"""

import argparse
import json
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_gguf import factory, fanout, gguf_io, kernel_check, llama_cpp, plan, quantize, recipes, source, tasks
from gemma_gguf.files import sha256_bytes, sha256_json, write_atomic
from gemma_gguf.libggml import Kernels
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.session import Options
from tests import bench_kernels, checkpoints


@dataclass(frozen=True)
class Shape:
    """Dimensions of a benchmark checkpoint."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


SHAPES = {
    "full": Shape(2560, 10240, 8, 8, 4, 256, 65536),
    "small": Shape(1024, 4096, 8, 4, 2, 256, 16384),
    "tiny": Shape(256, 512, 24, 4, 2, 64, 376),  # many small tensors: the overhead, not the kernels
}
NAMES = tuple(name for name in recipes.DEFAULT_NAMES if name != "bf16")
K_QUANTS = tuple(name for name in NAMES if "_K" in name)
# SCALE=small ends within minutes: all K-quants, and one or two of every other kind.
OF = {
    "full": NAMES,
    "demo": NAMES,
    "small": tuple(n for n in NAMES if n in {*K_QUANTS, "Q8_0", "Q4_0", "Q4_1", "IQ4_XS", "IQ3_M", "IQ2_M"}),
}


def write_checkpoint(directory: Path, shape: Shape, seed: int = 7) -> Path:
    """A Gemma 3 text checkpoint with normal weights whose columns differ in scale, as trained ones do."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer, pieces = checkpoints.sentencepiece_model(shape.vocabulary)
    checkpoints.write_tokenizer_files(directory, tokenizer)
    rng = np.random.default_rng(seed)

    def weights(rows: int, columns: int) -> npt.NDArray[np.float32]:
        scales = np.exp(rng.normal(0, 0.3, columns)).astype(np.float32) * np.float32(0.02)
        return rng.standard_normal((rows, columns), dtype=np.float32) * scales

    def norm(n: int) -> npt.NDArray[np.float32]:
        return rng.normal(0, 0.1, n).astype(np.float32)

    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = {"model.embed_tokens.weight": weights(len(pieces), h), "model.norm.weight": norm(h)}
    for layer in range(shape.layers):
        block = f"model.layers.{layer}"
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            tensors[f"{block}.{name}_layernorm.weight"] = norm(h)
        for name, rows, columns in (("q_proj", q, h), ("k_proj", kv, h), ("v_proj", kv, h), ("o_proj", h, q)):
            tensors[f"{block}.self_attn.{name}.weight"] = weights(rows, columns)
        for name in ("q_norm", "k_norm"):
            tensors[f"{block}.self_attn.{name}.weight"] = norm(shape.head_dim)
        for name, rows, columns in (
            ("gate_proj", shape.feed_forward, h),
            ("up_proj", shape.feed_forward, h),
            ("down_proj", h, shape.feed_forward),
        ):
            tensors[f"{block}.mlp.{name}.weight"] = weights(rows, columns)
    checkpoints.write_shards(directory, tensors)
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "torch_dtype": "bfloat16",
        **checkpoints.text_config(len(pieces), shape.layers, h),
        "intermediate_size": shape.feed_forward,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "query_pre_attn_scalar": shape.head_dim,
    }
    write_atomic(directory / "config.json", json.dumps(config))
    return directory


@dataclass
class Spent:
    """Wall and CPU seconds of one engine over some recipes."""

    wall: float = 0.0
    cpu: float = 0.0
    sha256: dict[str, str] = field(default_factory=dict)


@contextmanager
def measured(spent: Spent) -> Iterator[None]:
    """Add the wall time of the block, and the CPU time of this process and its ended children, to `spent`."""

    def cpu() -> float:
        both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    wall, used = time.monotonic(), cpu()
    yield
    spent.wall += time.monotonic() - wall
    spent.cpu += cpu() - used


class AnonymousPeak(threading.Thread):
    """The largest sum of anonymous memory (RssAnon) of this process and its descendants, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.25):
            self.peak = max(self.peak, sum(map(_anonymous_bytes, _family(os.getpid()))))

    def end(self) -> int:
        self._ended.set()
        self.join()
        return self.peak


def _family(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
        except OSError:
            continue
    found, queue = [], [pid]
    while queue:
        found.append(queue.pop())
        queue += parents.get(found[-1], [])
    return found


def _anonymous_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


@dataclass
class Bench:
    """One checkpoint's base and imatrix, and both engines over them."""

    build: Build
    directory: Path
    stem: str
    log: RunLog
    jobs: int
    loop: dict[str, Spent] = field(default_factory=dict)
    figures: fanout.Figures = field(default_factory=fanout.Figures)
    peak_anonymous: int = 0
    speeds: dict[str, float] = field(default_factory=dict)  # of ggml
    kernels: Kernels | None = None
    kernel_speeds: dict[str, float] = field(default_factory=dict)

    @property
    def set_dir(self) -> Path:
        return self.directory / "out" / f"{self.stem}-GGUF"

    @property
    def imatrix(self) -> Path:
        return self.set_dir / f"{self.stem}-imatrix.gguf"

    @property
    def base(self) -> Path:
        return self.directory / "out" / ".work" / self.stem / f"{self.stem}-bf16.gguf"

    def plans(self, names: Sequence[str]) -> list[plan.FilePlan]:
        """The plans of some recipes, and the speeds of the types in them."""
        header = gguf_io.read_header(self.base)
        plans = [
            quantize.plan_recipe(
                self.build,
                recipes.TABLE[name],
                f"../.work/{self.stem}/{self.base.name}",
                imatrix=self.imatrix.name,
                n_tensors=len(header.tensors),
                cwd=self.set_dir,
                log=self.log,
            )
            for name in names
        ]
        for speeds, kernels in ((self.speeds, None), (self.kernel_speeds, self.kernels)):
            missing = sorted(set(plan.work_of(plans).distinct) - set(speeds))
            if missing:
                with fanout.local_executor(1, self.directory) as pool:
                    bin_dir = str(self.build.bin_dir)
                    speeds.update(pool.submit(tasks.measure_speeds, bin_dir, missing, 0.5, kernels).result())
                tasks.clear_slots(self.directory)
        return plans

    def run_loop(self, names: Sequence[str]) -> None:
        """llama-quantize once per recipe; outputs are hashed and removed."""
        for name in names:
            out = self.directory / f"{name}.loop.gguf"
            argv = quantize.quantize_argv(
                self.build,
                recipes.TABLE[name],
                f"../.work/{self.stem}/{self.base.name}",
                str(out.resolve()),
                imatrix=self.imatrix.name,
                threads=self.jobs,
            )
            spent = self.loop.setdefault(name, Spent())
            with measured(spent):
                quantize.run_llama_quantize(argv, name, cwd=self.set_dir, log=self.log)
            spent.sha256[name] = sha256_bytes(out.read_bytes())
            out.unlink()
            say(f"  llama-quantize {name:<8} {spent.wall:7.1f} s wall {spent.cpu:7.1f} s CPU")

    def run_fanout(self, names: Sequence[str], jobs: int, *, with_kernels: bool = False) -> Spent:
        """The fan-out engine over some recipes; outputs are hashed and removed."""
        kernels, speeds = (self.kernels, self.kernel_speeds) if with_kernels else (None, self.speeds)
        spent, watch = Spent(), AnonymousPeak()
        watch.start()
        job_dir = self.directory / "fanout"
        shutil.rmtree(job_dir, ignore_errors=True)
        with measured(spent):
            header, imatrix = gguf_io.read_header(self.base), gguf_io.read_header(self.imatrix)
            numbers = quantize.ftype_numbers(self.build, self.log)
            plans = self.plans(names)
            outputs = []
            for name, asked in zip(names, plans, strict=True):
                keys = fanout.quantize_keys(numbers[recipes.TABLE[name].ftype], self.imatrix.name, imatrix)
                partial = self.directory / f"{name}.fanout.gguf"
                outputs.append(fanout.Output(name, partial, fanout.new_header(header, asked, keys), asked))
            job = fanout.build_job(
                header,
                outputs,
                imatrix=self.imatrix,
                bin_dir=self.build.bin_dir,
                inputs=sha256_json([names, jobs, time.time_ns()]),
                phase_of=plan.phases(plans, speeds),
                kernels=kernels,
            )
            path, done, skip = fanout.prepare(job, job_dir, outputs)
            self.figures = fanout.run(
                path,
                done,
                skip,
                executor=lambda: fanout.local_executor(jobs, job_dir),
                jobs=jobs,
                costs=fanout.task_costs(job, speeds),
                on_output=lambda _: None,
            )
        self.peak_anonymous = max(self.peak_anonymous, watch.end())
        for output in outputs:
            spent.sha256[output.recipe] = sha256_bytes(output.partial.read_bytes())
            output.partial.unlink()
        what = "fan-out with kernels" if with_kernels else "fan-out"
        say(f"  {what} of {len(names)}, {jobs} workers: {spent.wall:.1f} s wall {spent.cpu:.1f} s CPU")
        return spent

    def loop_total(self, names: Sequence[str]) -> Spent:
        parts = [self.loop[name] for name in names]
        return Spent(
            sum(p.wall for p in parts), sum(p.cpu for p in parts), {k: v for p in parts for k, v in p.sha256.items()}
        )

    def predicted(self, names: Sequence[str]) -> float:
        """Asked work over distinct work, by the measured speed of each type."""
        asked, distinct = plan.work_of(self.plans(names)).seconds(self.speeds)
        return asked / distinct


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prepare(scale: str, directory: Path, jobs: int) -> Bench:
    """Checkpoint, base and imatrix of a scale; kept for the next run."""
    model, name = "demo", None
    if scale != "demo":
        checkpoint = directory / "checkpoint" / "model"
        model, name = str(checkpoint), "bench/model"
        if not (checkpoint / "config.json").is_file():
            say(f"writing the {scale} checkpoint")
            write_checkpoint(checkpoint, SHAPES[scale])
    options = Options(model, name=name, out=directory / "out", chunks=4, until="imatrix")
    stem = source.understand(model, name).stem
    factory.run(options, say=lambda done: say(f"  {done.stage} {done.name}: {done.seconds:.0f} s"))
    log, build = RunLog(directory / "bench.log"), llama_cpp.build()
    checked = kernel_check.ready(build, "auto", jobs=jobs, log=log)
    say(f"  kernels: {checked.facts.model_dump()}")
    return Bench(build, directory, stem, log, jobs, kernels=checked.kernels)


def compare_kernels(bench: Bench, names: Sequence[str]) -> tuple[dict[str, Any], Spent]:
    """The fan-out with kernels over `names`: what of it is not quantising, and its bytes."""
    spent = bench.run_fanout(names, bench.jobs, with_kernels=True)
    figures = bench.figures
    work = plan.work_of(bench.plans(names))
    predicted = work.seconds(bench.speeds)[0] / work.seconds(bench.kernel_speeds)[1]
    return {
        "kernels_wall": round(spent.wall, 1),
        "kernels_cpu": round(spent.cpu, 1),
        "kernels_ratio_predicted": round(predicted, 2),
        "kernels_share_of_cpu_in_quantize": round(figures.part_seconds["quantize"] / spent.cpu, 4),
        "kernels_task_cpu": round(figures.cpu_seconds, 1),
        "kernels_task_cpu_of": {part: round(seconds, 1) for part, seconds in figures.part_seconds.items()},
        "kernels_write_megabytes_per_second": round(figures.written_bytes / spent.wall / 1e6, 1),
    }, spent


def only_kernels(bench: Bench, names: Sequence[str]) -> dict[str, Any]:
    """The loop and the fan-out with kernels over `names`: the fan-out once before, once after the loop."""
    bench.plans(names)  # measures the speeds before anything is timed
    _, before = compare_kernels(bench, names)
    bench.run_loop(names)
    result, after = compare_kernels(bench, names)
    loop = bench.loop_total(names)
    return {
        "recipes": len(names),
        "workers": bench.jobs,
        "loop_wall": round(loop.wall, 1),
        "loop_cpu": round(loop.cpu, 1),
        **result,
        "kernels_wall_before": round(before.wall, 1),
        "kernels_cpu_before": round(before.cpu, 1),
        "kernels_ratio": round(2 * loop.wall / (before.wall + after.wall), 2),
        "kernels_ratio_cpu": round(2 * loop.cpu / (before.cpu + after.cpu), 2),
        "identical": before.sha256 == after.sha256 == loop.sha256,
    }


def compare(bench: Bench, names: Sequence[str]) -> dict[str, Any]:
    """Both engines over `names` and over the K-quants alone, alternating; then the fan-out with kernels."""
    rest = [name for name in names if name not in K_QUANTS]
    bench.plans(names)  # measures the speeds before anything is timed
    steps: list[Callable[[], object]] = []
    runs: dict[str, Spent] = {}
    steps.append(lambda: bench.run_loop(K_QUANTS[: len(K_QUANTS) // 2]))
    steps.append(lambda: runs.__setitem__("k", bench.run_fanout(K_QUANTS, bench.jobs)))
    steps.append(lambda: bench.run_loop(K_QUANTS[len(K_QUANTS) // 2 :]))
    steps.append(lambda: runs.__setitem__("k1", bench.run_fanout(K_QUANTS, 1)))
    steps.append(lambda: bench.run_loop(rest[: len(rest) // 2]))
    steps.append(lambda: runs.__setitem__("all", bench.run_fanout(names, bench.jobs)))
    steps.append(lambda: bench.run_loop(rest[len(rest) // 2 :]))
    for step in steps:
        step()
    figures = bench.figures
    with_kernels, runs["kernels"] = compare_kernels(bench, names)
    everything, k_quants = bench.loop_total(names), bench.loop_total(K_QUANTS)
    early = next(((share, at) for share, at in figures.history if share >= 0.05), (1.0, figures.wall_seconds))
    identical = all(run.sha256[name] == everything.sha256[name] for run in runs.values() for name in run.sha256)
    return {
        "recipes": len(names),
        "loop_wall": round(everything.wall, 1),
        "loop_cpu": round(everything.cpu, 1),
        "fanout_wall": round(runs["all"].wall, 1),
        "fanout_cpu": round(runs["all"].cpu, 1),
        "ratio": round(everything.wall / runs["all"].wall, 3),
        "ratio_cpu": round(everything.cpu / runs["all"].cpu, 3),
        "ratio_predicted": round(bench.predicted(names), 3),
        "k_quants_ratio": round(k_quants.wall / runs["k"].wall, 3),
        "k_quants_ratio_cpu": round(k_quants.cpu / runs["k"].cpu, 3),
        "k_quants_ratio_predicted": round(bench.predicted(K_QUANTS), 3),
        "workers": bench.jobs,
        "speedup_over_one_worker": round(runs["k1"].wall / runs["k"].wall, 3),
        "share_of_cpu_in_ggml_quantize": round(figures.part_seconds["quantize"] / runs["all"].cpu, 4),
        "task_cpu_of": {part: round(seconds, 1) for part, seconds in figures.part_seconds.items()},
        "share_of_task_cpu_in_ggml_quantize": round(figures.part_seconds["quantize"] / figures.cpu_seconds, 4),
        "bytes_read": figures.read_bytes,
        "bytes_written": figures.written_bytes,
        "peak_anonymous_bytes": bench.peak_anonymous,
        "eta_error_at_5_percent": round(early[1] / early[0] / figures.wall_seconds - 1, 3),
        "identical": identical,
        **with_kernels,
        "kernels_ratio": round(everything.wall / runs["kernels"].wall, 2),
        "kernels_ratio_cpu": round(everything.cpu / runs["kernels"].cpu, 2),
        "speeds_million_per_second": {name: round(speed / 1e6, 2) for name, speed in sorted(bench.speeds.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=list(OF), default="full")
    parser.add_argument("--dir", type=Path, default=Path("out/.bench"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kernels-only", action="store_true", help="only the loop and the fan-out with kernels")
    parser.add_argument("--types-only", action="store_true", help="only the kernels' speed, type by type")
    parser.add_argument("--prototype", type=Path, help="directory of the kernels' prototype, to compare with")
    given = parser.parse_args()
    say("kernels, million elements per CPU second")
    types = bench_kernels.measure(llama_cpp.build(), llama_cpp.build_kernels().library, given.prototype, say)
    if given.types_only:
        print(json.dumps({"kernels": types}))
        return
    if given.kernels_only:
        result = only_kernels(prepare(given.scale, given.dir / given.scale, given.jobs), OF[given.scale])
        print(json.dumps({"scale": given.scale, "kernels": types, **result}))
        return
    tiny = prepare("tiny", given.dir / "tiny", given.jobs)
    tiny.plans(K_QUANTS)
    tiny.run_loop(K_QUANTS)
    many_small = tiny.run_fanout(K_QUANTS, given.jobs)
    result = compare(prepare(given.scale, given.dir / given.scale, given.jobs), OF[given.scale])
    result["tiny_tensors_ratio"] = round(tiny.loop_total(K_QUANTS).wall / many_small.wall, 3)
    result["identical"] = result["identical"] and many_small.sha256 == tiny.loop_total(K_QUANTS).sha256
    print(json.dumps({"scale": given.scale, "kernels": types, **result}))


if __name__ == "__main__":
    main()
