"""Differential fuzzing of the kernels against ggml: seeded matrices and imatrix rows, byte for byte, both ISAs.

`python -m tests.kernel_fuzz --types Q4_K --elements 5e6` for one type while working on it; `make proof PART=kernels`
runs the campaign. One case is a number: its matrix depends on the seed and nothing else, so a difference is found
again with `--first N --cases 1`.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gemma_gguf import gguf_io, kernel_check, llama_cpp
from gemma_gguf.kernel_check import Floats
from gemma_gguf.libggml import KERNEL_TYPES, Ggml, KernelLibrary

ISAS = ("avx2", "avx512")
CANARY = 0xA5
GUARD = 64  # bytes after the output that must stay as they are
Doubles = npt.NDArray[np.floating[Any]]


@dataclass
class Tally:
    """What a campaign did: per (type, ISA) matrices compared, elements in them, and bytes that were not ggml's."""

    runs: Counter[tuple[str, str]] = field(default_factory=Counter)
    elements: Counter[tuple[str, str]] = field(default_factory=Counter)
    differing: Counter[tuple[str, str]] = field(default_factory=Counter)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)  # matrices the kernel left to ggml
    found: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.runs += other.runs
        self.elements += other.elements
        self.differing += other.differing
        self.left += other.left
        self.found += other.found

    def lines(self) -> list[str]:
        """One line per type and ISA."""
        return [
            f"{name:8} {isa:6} {self.runs[name, isa]:7} matrices {self.elements[name, isa] / 1e6:8.1f} M elements "
            f"{self.left[name, isa]:5} left to ggml {self.differing[name, isa]:6} differing bytes"
            for name, isa in sorted(self.runs | self.left)
        ]


def matrix(rng: np.random.Generator, n_rows: int, columns: int) -> Doubles:
    """One of many distributions, each aimed at a branch or a rounding of some quantiser."""
    f: Doubles = rng.standard_t(rng.uniform(2, 8), (n_rows, columns))
    per_block = int(rng.choice([8, 16, 32, 256]))
    shape = (n_rows, columns // per_block)
    lattice = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])

    def blocks(values: npt.NDArray[Any]) -> Doubles:
        return values.astype(np.float64).repeat(per_block, axis=1)

    kinds: list[Callable[[], Doubles]] = [
        lambda: f,
        lambda: np.round(f * rng.uniform(0.5, 4)),  # ties
        lambda: rng.integers(-8, 8, f.shape) * 0.0117,
        lambda: np.where(rng.random(f.shape) < rng.uniform(0.1, 0.95), 0, f),  # many zeros
        lambda: f * blocks(10.0 ** rng.uniform(-9, 2, shape)),  # scales that differ from block to block
        lambda: f + blocks(rng.uniform(-5, 5, shape)),  # far from zero
        lambda: rng.choice(lattice, f.shape) * blocks(2.0 ** rng.integers(-8, 2, shape)),
        lambda: np.where(rng.random(f.shape) < 0.01, f * 1000, f * 1e-3),  # outliers
        lambda: rng.choice([1.0, -1.0], f.shape) * blocks(rng.uniform(0.01, 1, shape)),  # two values
        lambda: blocks(rng.uniform(-1, 1, shape)) * (1 + 1e-6 * f),  # almost constant
        lambda: np.where(blocks(rng.random(shape)) < rng.uniform(0.05, 0.8), 0.0, f),  # zero blocks among others
        lambda: f * 10.0 ** rng.uniform(-44, -18),  # denormals, and products that vanish
        lambda: f * 10.0 ** rng.uniform(3, 15),  # huge
        lambda: np.abs(f) * blocks(rng.choice([1.0, -1.0], shape)) + rng.uniform(0, 0.1),  # one sign
        lambda: rng.integers(-256, 257, f.shape) * 2.0 ** rng.integers(-10, -2),  # exact halves of a coarse grid
        lambda: np.clip(f, -1, 1) * blocks(rng.uniform(0.01, 1, shape)),  # many equal extremes
    ]
    made: Doubles = kinds[int(rng.integers(len(kinds)))]() * rng.choice([1, 0.02])
    return made


def imatrix_row(rng: np.random.Generator, columns: int, *, extreme: float) -> Floats | None:
    """None in one of four cases, else weights like those of real text, with zeros, ones or extreme values in some."""
    kind = int(rng.integers(12))
    if kind < 3:
        return None
    w: Doubles = rng.gamma(rng.uniform(0.05, 2), size=columns) + (1e-6 if kind % 2 else 0)
    if kind in (3, 4):
        w[rng.random(columns) < rng.uniform(0.05, 0.9)] = 0
    elif kind == 5:
        w[:] = rng.choice([1.0, 0.0, 1e-8, 300.0])
    elif kind == 6:
        w *= 10.0 ** rng.uniform(-12, extreme, columns)
    elif kind == 7:
        w[: columns // 2] = 0
    return w.astype(np.float32)


def case(seed: int, kind: GGMLQuantizationType) -> tuple[Floats, Floats | None]:
    """The matrix and imatrix row of a number; every row length from one block up comes up."""
    rng = np.random.default_rng(seed)
    block = GGML_QUANT_SIZES[kind][0]
    n_rows = int(rng.choice([1, 2, 3, 7, 15, 16, 17, 40])) * (1 if block == 256 else int(rng.choice([1, 4, 9])))
    n_blocks = int(rng.integers(1, 2 * 8)) if rng.random() < 0.8 else int(rng.integers(1, 41))
    columns = -(-block * n_blocks // 256) * 256  # what every per-block distribution divides
    values = kernel_check.edge_rows(rng, columns) if rng.random() < 0.05 else matrix(rng, n_rows, columns)
    # One float from an aligned place, as rows of a mapped file may be.
    rows: Floats = np.empty((len(values), block * n_blocks + 1), np.float32).reshape(-1)[1:]
    rows = rows[: len(values) * block * n_blocks].reshape(len(values), -1)
    rows[:] = values[:, : block * n_blocks]
    if rng.random() < 0.3:  # as BF16 holds them
        rows.view(np.uint32)[:] &= 0xFFFF0000
    fragile = kind.name.startswith(("IQ2", "IQ3"))
    weights = imatrix_row(rng, block * n_blocks, extreme=4 if fragile else 25)
    if weights is None:
        rows = kernel_check.that_ggml_survives(rows, kind, with_imatrix=False)
    return np.ascontiguousarray(rows), weights


def fuzz(
    bin_dir: Path, library: Path, names: Sequence[str], isas: Sequence[str], seeds: range, *, show: bool = False
) -> Tally:
    """Compare the cases `seeds` of every type."""
    ggml, loaded, tally = Ggml(bin_dir), KernelLibrary(library), Tally()
    for seed in seeds:
        for name in names:
            kind = GGMLQuantizationType[name]
            rows, weights = case(seed, kind)
            if not len(rows) or (weights is None and ggml.requires_imatrix(kind)):
                continue
            if show:
                print(seed, name, rows.shape, weights is not None, file=sys.stderr, flush=True)
            tally.add(compare(f"case {seed}", ggml, loaded, kind, rows=rows, weights=weights, isas=isas))
    return tally


def compare(
    what: str,
    ggml: Ggml,
    library: KernelLibrary,
    kind: GGMLQuantizationType,
    *,
    rows: Floats,
    weights: Floats | None,
    isas: Sequence[str],
) -> Tally:
    """One matrix by the kernels and by ggml; outputs lie at odd addresses between guards.

    ggml comes last, and not at all where every kernel leaves the matrix to it: on some it aborts.
    """
    name, tally = kind.name, Tally()
    size = len(rows) * ggml.row_size(kind, rows.shape[1])
    made: dict[str, npt.NDArray[np.uint8]] = {}
    for isa in isas:
        assert library.force_isa(isa), isa
        made[isa] = np.full(1 + size + GUARD, CANARY, np.uint8)
        if not library.quantize(rows, kind, weights, made[isa][1 : 1 + size]):
            tally.left[name, isa] += 1
            del made[isa]
    if not made:
        return tally
    theirs = np.full(1 + size + GUARD, CANARY, np.uint8)
    ggml.reference(rows, kind, weights, theirs[1 : 1 + size])
    for isa, ours in made.items():
        tally.runs[name, isa] += 1
        tally.elements[name, isa] += rows.size
        if differing := int((ours != theirs).sum()):
            tally.differing[name, isa] += differing
            tally.found.append(
                f"{what} {name} {isa} {rows.shape} imatrix {weights is not None}: {differing} bytes, "
                f"first at {int(np.argmax(ours != theirs)) - 1} of {size}"
            )
    return tally


def real_weights(
    bin_dir: Path, library: Path, base: Path, imatrix: Path, *, name: str, isas: Sequence[str], elements: float
) -> Tally:
    """Every matrix of a base by one type, as many rows of each as make `elements` in all, with the base's imatrix.

    Where a row has no whole number of super-blocks, several rows are taken as one, with their imatrix repeated.
    """
    ggml, loaded, tally = Ggml(bin_dir), KernelLibrary(library), Tally()
    kind = GGMLQuantizationType[name]
    block = GGML_QUANT_SIZES[kind][0]
    header, sums = gguf_io.read_header(base), gguf_io.read_header(imatrix)
    matrices = [t for t in header.tensors if len(t.shape) > 1 and t.ggml_type is GGMLQuantizationType.BF16]
    share = min(1.0, 1.2 * elements / sum(t.n_elements for t in matrices))
    for tensor in matrices:
        columns = tensor.shape[0]
        joined = block // np.gcd(block, columns)
        n_rows = int(np.ceil(share * tensor.n_elements / columns / joined)) * joined
        n_rows = min(n_rows, tensor.n_elements // columns // joined * joined)
        rows = ggml.widen(header.read(tensor, 0, n_rows).reshape(n_rows, -1), tensor.ggml_type)
        weights = None
        if f"{tensor.name}.in_sum2" in sums.by_name:
            total = sums.read(sums.by_name[f"{tensor.name}.in_sum2"]).view(np.float32).reshape(-1)
            count = sums.read(sums.by_name[f"{tensor.name}.counts"]).view(np.float32)[0]
            weights = np.tile((total / count).astype(np.float32), joined)
        elif ggml.requires_imatrix(kind) or block == 32:  # left to ggml: with equal weights instead
            weights = np.ones(columns * joined, np.float32)
        rows = rows.reshape(-1, columns * joined)
        tally.add(compare(tensor.name, ggml, loaded, kind, rows=rows, weights=weights, isas=isas))
    return tally


def campaign(
    bin_dir: Path,
    library: Path,
    *,
    names: Sequence[str],
    isas: Sequence[str],
    elements: float,
    seed: int,
    jobs: int,
) -> Tally:
    """Run cases on all cores until every type has had `elements` elements."""
    total, step, first = Tally(), 20, seed * 10_000_000
    left = dict.fromkeys(names, elements)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        while left:
            ranges = [range(first + k * step, first + (k + 1) * step) for k in range(4 * jobs)]
            first = ranges[-1].stop
            for made in [pool.submit(fuzz, bin_dir, library, list(left), isas, seeds) for seeds in ranges]:
                total.add(made.result())
            left = {n: e for n, e in left.items() if min(total.elements[n, isa] for isa in isas) < elements}
            if not any(total.elements.values()) or len(total.found) > 100:
                break
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", default=",".join(kind.name for kind in KERNEL_TYPES))
    parser.add_argument("--elements", type=float, default=2e6, help="per type and ISA")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, help="run only cases from this number, in this process")
    parser.add_argument("--cases", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--isa", choices=[*ISAS, "both"], default="both")
    parser.add_argument("--library", type=Path, help="default: the kernels of this checkout, compiled now")
    given = parser.parse_args()
    bin_dir = llama_cpp.build().bin_dir
    library = given.library or llama_cpp.build_kernels().library
    loaded = KernelLibrary(library)
    isas = [isa for isa in ISAS if given.isa in (isa, "both") and loaded.force_isa(isa)]
    names = given.types.upper().split(",")
    if given.first is not None:
        tally = fuzz(bin_dir, library, names, isas, range(given.first, given.first + given.cases), show=True)
    else:
        tally = campaign(
            bin_dir, library, names=names, isas=isas, elements=given.elements, seed=given.seed, jobs=given.jobs
        )
    print("\n".join([*tally.lines(), *tally.found[:20]]))
    sys.exit(bool(tally.found))


if __name__ == "__main__":
    main()
