"""Speed of the kernels, type by type, against ggml and, if given, against the prototype they grew from.

Consumes a build and the compiled kernels; produces million elements per CPU second and the ratios. The contestants of a
type take turns, each is taken at its best of several rounds, and every result is compared with ggml's bytes first.
"""

import ctypes
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from gemma_gguf.kernel_check import Floats
from gemma_gguf.libggml import KERNEL_TYPES, Ggml, KernelLibrary
from gemma_gguf.llama_cpp import Build
from tests.kernel_fuzz import ISAS

ROWS, COLUMNS = 64, 2560
ROUNDS = 4
SECONDS = 0.1  # of CPU, per contestant and round
# Paths of large tensors that Gemma quantises without an imatrix (token_embd) and that kernels cover.
WITHOUT_IMATRIX = ("Q6_K", "Q5_K", "IQ3_S")
PROTOTYPES = {
    "qk2.cpp": ("Q5_K", "Q4_K", "Q2_K", "Q4_1"),
    "q6.cpp": ("Q6_K",),
    "iq4.cpp": ("IQ4_XS", "IQ4_NL"),
    "iqb.cpp": ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
}
FLAGS = {
    "avx2": "-mavx2 -mbmi2 -mf16c -mfma",
    "avx512": "-march=native -DUSE512",
}


@dataclass(frozen=True)
class Contestant:
    """One way to quantise the rows into a buffer."""

    name: str
    run: Callable[[Floats, Floats | None, Any], None]


def compile_prototype(directory: Path, build: Build, scratch: Path) -> dict[tuple[str, str], list[Any]]:
    """{(type, ISA): functions} of the prototype, made now by the compiler the kernels are made by.

    Its IQ2 and IQ3 read ggml's tables by their place in the library of another build: the places are replaced.
    """
    library = next(build.bin_dir.glob("libggml-base.so"))
    listed = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout
    place = {line.split()[-1]: int(line.split()[0], 16) for line in listed.splitlines() if len(line.split()) == 3}
    new = {"0x2e880": "ggml_quantize_init", "0xcc440": "iq2_data", "0xcc400": "iq3_data"}
    made: dict[tuple[str, str], list[Any]] = {}
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    for source, names in PROTOTYPES.items():
        text = (directory / source).read_text()
        for old, symbol in new.items():
            text = text.replace(old, hex(place[symbol]))
        (scratch / source).write_text(text)
        for isa, flags in FLAGS.items():
            for unroll in ("1", "2") if source == "iq4.cpp" else ("1",):
                out = scratch / f"{source}-{isa}-{unroll}.so"
                options = f"-O3 -std=c++17 {flags} -DUQ={unroll} -ffp-contract=off -shared -fPIC -w -I{directory}"
                subprocess.run([*compiler, *shlex.split(options), str(scratch / source), "-o", str(out)], check=True)
                loaded = ctypes.CDLL(str(out))
                for name in names:
                    made.setdefault((name, isa), []).append(_prototype(loaded, name, library))
    return made


def _prototype(loaded: ctypes.CDLL, name: str, library: Path) -> Any:
    function_name = re.sub(r"_k$", "_K", name.lower())
    if name.startswith(("IQ2", "IQ3")):
        base = ctypes.CDLL(str(library))
        base.ggml_quantize_init(int(GGMLQuantizationType[name]))
        setup = getattr(loaded, f"my_setup_{function_name}")
        setup.argtypes = [ctypes.c_void_p]
        setup(ctypes.cast(base.ggml_quantize_init, ctypes.c_void_p).value)
    function = getattr(loaded, f"my_{function_name}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    function.restype = None
    return function


def measure(build: Build, library: Path, prototype: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """{type: {million elements per CPU second of each contestant, ratios}}; types without imatrix as `Q6_K/plain`."""
    ggml, kernels = Ggml(build.bin_dir), KernelLibrary(library)
    isas = [isa for isa in ISAS if kernels.force_isa(isa)]
    rng = np.random.default_rng(3)
    rows = (rng.standard_t(5, (ROWS, COLUMNS)) * 0.02).astype(np.float32)
    rows.view(np.uint32)[:] &= 0xFFFF0000  # as a BF16 base gives them
    weights = (rng.gamma(1.0, size=COLUMNS) ** 2 + 1e-3).astype(np.float32)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        prototypes = compile_prototype(prototype, build, Path(scratch)) if prototype else {}
        for kind in KERNEL_TYPES:
            for given in (weights, None) if kind.name in WITHOUT_IMATRIX else (weights,):
                field = kind.name if given is not None else f"{kind.name}/plain"
                contestants = _contestants(ggml, kernels, kind, isas, prototypes if given is not None else {})
                speeds = _race(ggml, kind, contestants, rows, given)
                result[field] = _with_ratios(speeds, isas)
                say(f"  {field:12} " + "  ".join(f"{name} {value}" for name, value in result[field].items()))
    return result


def _contestants(
    ggml: Ggml,
    kernels: KernelLibrary,
    kind: GGMLQuantizationType,
    isas: list[str],
    prototypes: dict[tuple[str, str], list[Any]],
) -> list[Contestant]:
    def by_kernel(isa: str) -> Callable[[Floats, Floats | None, Any], None]:
        def run(rows: Floats, weights: Floats | None, out: Any) -> None:
            kernels.force_isa(isa)
            assert kernels.quantize(rows, kind, weights, out), f"{kind.name} is left to ggml"

        return run

    def by_prototype(function: Any) -> Callable[[Floats, Floats | None, Any], None]:
        def run(rows: Floats, weights: Floats | None, out: Any) -> None:
            assert weights is not None
            function(rows.ctypes.data, out.ctypes.data, len(rows), rows.shape[1], weights.ctypes.data)

        return run

    made = [Contestant("ggml", lambda rows, weights, out: ggml.reference(rows, kind, weights, out))]
    for isa in isas:
        made.append(Contestant(isa, by_kernel(isa)))
        made += [Contestant(f"prototype_{isa}", by_prototype(f)) for f in prototypes.get((kind.name, isa), [])]
    return made


def _race(
    ggml: Ggml, kind: GGMLQuantizationType, contestants: list[Contestant], rows: Floats, weights: Floats | None
) -> dict[str, float]:
    """Best speed of each contestant, in elements per CPU second. Raises when one makes other bytes."""
    size = len(rows) * ggml.row_size(kind, rows.shape[1])
    expected, out = np.empty(size, np.uint8), np.empty(size, np.uint8)
    ggml.reference(rows, kind, weights, expected)
    best: dict[str, float] = {}
    for contestant in contestants:
        contestant.run(rows, weights, out)
        assert (out == expected).all(), f"{contestant.name} makes other {kind.name} than ggml"
    for _ in range(ROUNDS):
        for contestant in contestants:
            begun, done, spent = time.thread_time(), 0, 0.0
            while spent < SECONDS:
                few = rows[:8] if contestant.name == "ggml" else rows
                contestant.run(few, weights, out[: size // len(rows) * len(few)])
                done += few.size
                spent = time.thread_time() - begun
            best[contestant.name] = max(best.get(contestant.name, 0.0), done / spent)
    return best


def _with_ratios(speeds: dict[str, float], isas: list[str]) -> dict[str, float]:
    made = {name: round(speed / 1e6, 2) for name, speed in speeds.items()}
    for isa in isas:
        made[f"{isa}_ratio"] = round(speeds[isa] / speeds["ggml"], 2)
        if f"prototype_{isa}" in speeds:
            made[f"{isa}_of_prototype"] = round(speeds[isa] / speeds[f"prototype_{isa}"], 3)
    return made
