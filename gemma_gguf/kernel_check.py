"""The start-up check: which kernels write, on this CPU, the bytes that this build's own ggml writes.

Consumes a llama.cpp build and the compiled kernels; produces the `Kernels` that workers may use and the facts for the
manifest. Every type is compared with ggml on a few thousand blocks, ordinary and at the edges; one wrong byte, or a
crash, switches the type off. Done once per build, kernel library and CPU, and remembered in the cache. It catches a
compiler that breaks a kernel and a llama.cpp whose quantiser has changed; that the kernels are right is the business
of the tests and of `make proof PART=kernels`.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from gemma_gguf import fanout, llama_cpp
from gemma_gguf.errors import MissingToolError, ToolFailedError
from gemma_gguf.files import make_directory, sha256_json, write_atomic
from gemma_gguf.libggml import KERNEL_TYPES, Ggml, KernelLibrary, Kernels
from gemma_gguf.llama_cpp import Build, KernelBuild, RunLog
from gemma_gguf.manifest import KernelFacts
from gemma_gguf.progress import Progress, silent

CHOICES = ("auto", "ggml")
COLUMNS = 768  # of the checked matrices: three super-blocks, 24 blocks
_UNWRITTEN = 0xA5  # what an output holds before: a byte that a kernel leaves out shows, too

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Checked:
    """What the fan-out may use, and what the manifest says about it."""

    kernels: Kernels | None
    facts: KernelFacts
    key: str  # of the implementation, for measured speeds: empty for ggml alone


def ready(build: Build, choice: str, *, jobs: int, log: RunLog, progress: Progress = silent) -> Checked:
    """Compile the kernels and check them, or take both from the cache; `choice` is `auto` or `ggml`.

    What goes wrong is written to the log and the facts, and ggml does the work: no kernel is worth a failed run.
    """
    if choice == "ggml":
        return _without("switched off with --kernels ggml")
    made, why = compiled(progress)
    if made is None:
        log.note(f"kernels: {why}; ggml quantises")
        return _without(why)
    path, result = remembered(build, made)
    if not result:
        result = check(build, made, jobs=jobs, directory=path.parent, progress=progress)
        write_atomic(path, json.dumps(result, indent=1) + "\n")
    for name, why in result["off"].items():
        log.note(f"kernels: {name} is switched off, ggml quantises it: {why}")
    facts = KernelFacts(
        version=result["version"],
        source_sha256=made.source_sha256,
        isa=result["isa"],
        types=result["types"],
        off=result["off"],
        why_none=None if result["types"] else "no kernel for this CPU" if result["isa"] == "none" else "all are off",
    )
    log.note(f"kernels: version {facts.version}, {facts.isa}, {len(facts.types)} types: {' '.join(facts.types)}")
    types = tuple(GGMLQuantizationType[name] for name in facts.types)
    kernels = Kernels(made.library, facts.isa, types) if types else None
    return Checked(kernels, facts, path.stem if kernels else "")


def remembered(build: Build, made: KernelBuild) -> tuple[Path, dict[str, Any]]:
    """(where the result of the check is kept, the result as `check` gives it, or nothing when there was none yet)."""
    path = llama_cpp.cache_dir() / "kernel-checks" / f"{_check_key(build, made)}.json"
    result: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        result = json.loads(path.read_text())
    return path, result


def compiled(progress: Progress = silent) -> tuple[KernelBuild | None, str]:
    """The compiled kernels and "", or None and why this machine cannot compile them."""
    try:
        return llama_cpp.build_kernels(progress), ""
    except (MissingToolError, ToolFailedError) as error:
        where = f" (log: {error.log.name})" if error.log else ""  # its directory is this machine's business
        return None, f"not compiled: {error.what.splitlines()[0]}{where}"


def _without(why: str) -> Checked:
    return Checked(None, KernelFacts(version=None, source_sha256=None, isa="none", types=[], off={}, why_none=why), "")


def _check_key(build: Build, made: KernelBuild) -> str:
    return sha256_json([build.key, made.key, llama_cpp.machine_id()])[:20]


def check(
    build: Build, made: KernelBuild, *, jobs: int, directory: Path, progress: Progress = silent
) -> dict[str, Any]:
    """Compare every type in worker processes: {version, isa, types: approved, off: {type: why}}.

    A type that the library leaves to ggml altogether is in neither. A worker that dies takes its type with it: each is
    then tried again alone.
    """
    make_directory(directory)
    names = [kind.name for kind in KERNEL_TYPES]
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        version, isa = fanout.in_a_worker(Path(scratch), "loads the kernels", _identity, str(made.library))
        found: dict[str, str | None] = {}
        if isa != "none":
            found = _compare_all(
                str(build.bin_dir), str(made.library), names, jobs=jobs, scratch=Path(scratch), progress=progress
            )
    off = {name: why for name, why in found.items() if why}
    return {"version": version, "isa": isa, "types": [n for n, why in found.items() if why is None], "off": off}


def _compare_all(
    bin_dir: str, library: str, names: list[str], *, jobs: int, scratch: Path, progress: Progress
) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    left = list(names)
    with contextlib.suppress(BrokenProcessPool), fanout.local_executor(jobs, scratch) as pool:
        answers = {name: pool.submit(compare, bin_dir, library, name) for name in names}
        for name, answer in answers.items():
            progress("checking the kernels", len(found), len(names), "types")
            found[name] = answer.result()
            left.remove(name)
    for name in left:
        try:
            with fanout.local_executor(1, scratch) as pool:
                found[name] = pool.submit(compare, bin_dir, library, name).result()
        except BrokenProcessPool:
            found[name] = "the process that compared it with ggml died"
    return {name: why for name, why in found.items() if why != ""}


def _identity(library: str) -> tuple[int, str]:
    loaded = KernelLibrary(Path(library))
    return loaded.version, loaded.isa


def compare(bin_dir: str, library: str, name: str) -> str | None:
    """Compare one type on all cases: None when every byte is the same, "" when the library takes none of them, else
    what differs."""
    ggml, loaded, kind = Ggml(Path(bin_dir)), KernelLibrary(Path(library)), GGMLQuantizationType[name]
    taken = False
    for case, rows, weights in cases(kind):
        if weights is None and ggml.requires_imatrix(kind):
            continue
        size = len(rows) * ggml.row_size(kind, rows.shape[1])
        ours = np.full(size, _UNWRITTEN, dtype=np.uint8)
        if not loaded.quantize(rows, kind, weights, ours):
            continue
        taken = True
        theirs = np.empty(size, dtype=np.uint8)
        ggml.reference(rows, kind, weights, theirs)
        if differing := int((ours != theirs).sum()):
            return f"{differing} of {size} bytes are not ggml's ({case})"
    return None if taken else ""


def cases(kind: GGMLQuantizationType) -> Iterator[tuple[str, Floats, Floats | None]]:
    """(what it is, rows, imatrix row or None), seeded. Rows of different kinds stand side by side in one matrix, so
    that lanes of one vector do different things."""
    rng = np.random.default_rng(20)
    ordinary = (rng.standard_t(5, (240, COLUMNS)) * 0.02).astype(np.float32)
    edge = edge_rows(rng, COLUMNS)
    weights = (rng.gamma(1.0, size=COLUMNS) ** 2 + 1e-3).astype(np.float32)
    zeros = np.where(rng.random(COLUMNS) < 0.3, 0, weights).astype(np.float32)
    zeros[256:512] = 0
    extreme = (weights * 10.0 ** rng.uniform(-12, 4, COLUMNS)).astype(np.float32)
    yield "ordinary weights", ordinary, weights
    yield "ordinary weights, no imatrix", ordinary, None
    yield "ordinary weights, an imatrix of ones", ordinary[:61], np.ones(COLUMNS, np.float32)
    yield "edge cases", edge, weights
    yield "edge cases, no imatrix", that_ggml_survives(edge, kind, with_imatrix=False), None
    yield "edge cases, zeros in the imatrix", edge, zeros
    yield "edge cases, extreme imatrix", edge, extreme


def that_ggml_survives(rows: Floats, kind: GGMLQuantizationType, *, with_imatrix: bool) -> Floats:
    """Rows that ggml can quantise: for IQ2 and IQ3 their squares, without an imatrix their fourth powers, must be
    representable.

    It weights by the magnitude, or by the square; where the sums overflow or vanish no grid point is nearest, and it
    aborts.
    """
    if not kind.name.startswith(("IQ2", "IQ3")):
        return rows
    magnitude = np.abs(rows)
    lowest, highest = (0.0, 1e16) if with_imatrix else (1e-8, 1e8)
    kept: Floats = rows[((magnitude == 0) | ((magnitude > lowest) & (magnitude < highest))).all(axis=1)]
    return kept


def edge_rows(rng: np.random.Generator, columns: int) -> Floats:
    """Rows on which quantisers branch: zeros, constants, ties, denormals, huge and tiny scales, outliers."""
    block = 32

    def per_block(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values.repeat(block)

    def noise() -> npt.NDArray[np.float64]:
        return rng.standard_t(3, columns) * 0.02

    n_blocks = columns // block
    at = np.arange(columns)
    rows = [np.zeros(columns), np.full(columns, -0.0)]
    rows += [np.full(columns, value) for value in (0.5, -0.5, 1e-20, 1e-15, 2e-15, 1e-38, 1e-42, 1e4, -3.0)]
    rows += [noise() * scale for scale in (1e-42, 1e-38, 1e-30, 1e-17, 1e-12, 1e-7, 1e4, 1e8, 1e15)]
    rows += [np.abs(noise()), -np.abs(noise()), np.sign(noise()) * 0.03, np.where(at % 2, 0.03, -0.03)]
    rows += [np.where(rng.random(columns) < share, 0, noise()) for share in (0.3, 0.9, 0.97, 0.997)]
    rows += [np.round(noise() * 100) / 100, rng.integers(-3, 4, columns) * 1.0, rng.integers(-8, 8, columns) * 0.0117]
    rows += [at % 32 * 1.0, -(at % 32) * 1.0, at % 16 - 8.0, (at % 8 - 3.5) * 0.25]
    rows += [3.0 + 1e-6 * noise(), -3.0 + 1e-6 * noise(), per_block(rng.uniform(-1, 1, n_blocks))]
    rows += [np.where(at % block == 0, value, noise()) for value in (1000.0, -1e5, 1e8)]
    rows += [np.where(rng.random(columns) < 0.01, noise() * 1000, noise() * 1e-3)]
    rows += [noise() * per_block(10.0 ** rng.uniform(-12, 3, n_blocks)) for _ in range(12)]
    rows += [np.where(per_block(rng.random(n_blocks) < 0.3), 0, noise()) for _ in range(8)]
    rows += [noise() + per_block(rng.uniform(-1, 1, n_blocks)) for _ in range(8)]
    lattice = [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    rows += [rng.choice(lattice, columns) * per_block(2.0 ** rng.integers(-8, 2, n_blocks)) for _ in range(8)]
    return np.asarray(rows, dtype=np.float32)
