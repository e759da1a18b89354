"""The kernels: ggml's bytes for every type, row length and instruction set; what is not theirs goes to ggml."""

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gemma_gguf import factory, fanout, kernel_check, llama_cpp, manifest, proof
from gemma_gguf.errors import VerificationError
from gemma_gguf.kernel_check import Floats
from gemma_gguf.libggml import KERNEL_TYPES, Ggml, KernelLibrary, Kernels
from gemma_gguf.llama_cpp import KERNEL_SOURCE, Build, KernelBuild, RunLog
from gemma_gguf.session import Done, Options, Report
from tests import kernel_fuzz
from tests.kernel_fuzz import CANARY, ISAS

STEM = "test_tiny-vision"
EVERY_TYPE = pytest.mark.parametrize("kind", KERNEL_TYPES, ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def made(build: Build) -> KernelBuild:
    assert build.key
    return llama_cpp.build_kernels()


@pytest.fixture(scope="module")
def ggml(build: Build) -> Ggml:
    return Ggml(build.bin_dir)


@pytest.fixture
def library(made: KernelBuild) -> Iterator[KernelLibrary]:
    loaded = KernelLibrary(made.library)
    yield loaded
    loaded.force_isa("auto")


@pytest.fixture
def isas(library: KernelLibrary) -> list[str]:
    """The instruction sets of this CPU; tests need at least one."""
    found = [isa for isa in ISAS if library.force_isa(isa)]
    library.force_isa("auto")
    if not found:
        pytest.skip(f"no kernels for this CPU ({platform.machine()}): ggml quantises, and there is nothing to compare")
    return found


def by_ggml(ggml: Ggml, kind: GGMLQuantizationType, rows: Floats, weights: Floats | None) -> bytes:
    out = np.empty(len(rows) * ggml.row_size(kind, rows.shape[1]), np.uint8)
    ggml.reference(rows, kind, weights, out)
    return out.tobytes()


def by_kernel(library: KernelLibrary, kind: GGMLQuantizationType, rows: Floats, weights: Floats | None) -> bytes | None:
    """What the kernel writes between two guards, or None when it leaves the case to ggml."""
    block, n_bytes = GGML_QUANT_SIZES[kind]
    size = rows.size // block * n_bytes
    buffer = np.full(size + 64, CANARY, np.uint8)
    taken = library.quantize(rows, kind, weights, buffer[32 : 32 + size])
    assert (buffer[:32] == CANARY).all()
    assert (buffer[32 + size :] == CANARY).all()
    return buffer[32 : 32 + size].tobytes() if taken else None


def left_to_ggml(kind: GGMLQuantizationType, weights: Floats | None) -> bool:
    """The legacy types without an imatrix: ggml only divides by the largest element there."""
    return weights is None and kind in KERNEL_TYPES[:4]


# --- identity ----------------------------------------------------------------------------------------------------


def test_the_library_knows_the_types_as_ggml_does(ggml: Ggml) -> None:
    header = (KERNEL_SOURCE / "kernels.h").read_text()
    table = re.findall(r"X\((\w+), (\d+), (\d+), (\d+)\)", header)
    assert {name.upper() for name, *_ in table} == {kind.name for kind in KERNEL_TYPES}
    for name, number, elements, n_bytes in table:
        kind = GGMLQuantizationType(int(number))
        assert kind.name == name.upper()
        assert GGML_QUANT_SIZES[kind] == (int(elements), int(n_bytes))
        assert ggml.row_size(kind, int(elements)) == int(n_bytes)


@EVERY_TYPE
def test_checked_cases(ggml: Ggml, library: KernelLibrary, isas: list[str], kind: GGMLQuantizationType) -> None:
    """The blocks of the start-up check: with an imatrix nothing is left to ggml."""
    for name, rows, weights in kernel_check.cases(kind):
        if weights is None and ggml.requires_imatrix(kind):
            continue
        expected = by_ggml(ggml, kind, rows, weights)
        for isa in isas:
            assert library.force_isa(isa)
            assert library.isa == isa
            ours = by_kernel(library, kind, rows, weights)
            assert ours == expected or (ours is None and left_to_ggml(kind, weights)), (name, isa)


@EVERY_TYPE
def test_every_row_length(ggml: Ggml, library: KernelLibrary, isas: list[str], kind: GGMLQuantizationType) -> None:
    """From one block up to more than twice the lanes, in one, two and many rows."""
    rng = np.random.default_rng(5)
    block = GGML_QUANT_SIZES[kind][0]
    slow = kind.name.startswith(("IQ2", "IQ3"))
    for n_blocks in (1, 2, 3, 5, 8, 9, 16, 17, 20) if slow else range(1, 36):
        for n_rows in (1, 2, 19 if n_blocks < 4 else 3):
            rows = (rng.standard_t(4, (n_rows, n_blocks * block)) * 0.02).astype(np.float32)
            weights = rng.gamma(1.0, size=n_blocks * block).astype(np.float32)
            for given in (weights, None):
                if given is None and ggml.requires_imatrix(kind):
                    continue
                expected = by_ggml(ggml, kind, rows, given)
                for isa in isas:
                    library.force_isa(isa)
                    ours = by_kernel(library, kind, rows, given)
                    where = (n_rows, n_blocks, given is not None, isa)
                    assert ours == expected or (ours is None and left_to_ggml(kind, given)), where


@EVERY_TYPE
def test_fuzzed(build: Build, made: KernelBuild, isas: list[str], kind: GGMLQuantizationType) -> None:
    """A little of `make proof PART=kernels`."""
    tally = kernel_fuzz.fuzz(build.bin_dir, made.library, [kind.name], isas, range(12))
    assert tally.found == []
    assert all(tally.runs[kind.name, isa] for isa in isas)


# --- what is left to ggml ----------------------------------------------------------------------------------------


def test_what_the_library_does_not_take(library: KernelLibrary) -> None:
    rows = np.ones((2, 512), np.float32)
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.IQ1_S, GGMLQuantizationType.F16):
        assert by_kernel(library, kind, rows, None) is None
    out = np.empty(10_000, np.uint8)
    for columns in (31, 33, 255, 288):
        short = np.ones((1, columns), np.float32)
        assert not library.quantize(short, GGMLQuantizationType.Q4_K, None, out[: 144 * 2])
    assert library.force_isa("none")
    assert library.isa == "none"
    assert by_kernel(library, GGMLQuantizationType.Q4_K, rows, np.ones(512, np.float32)) is None
    assert not library.force_isa("sse2")
    assert library.isa == "none"


def outcome(ggml: Ggml, kind: GGMLQuantizationType, rows: Floats, weights: Floats) -> bytes | str:
    try:
        return ggml.quantize(rows, kind, weights).tobytes()
    except VerificationError as error:
        return error.what


@EVERY_TYPE
def test_nan_and_inf_are_ggmls(
    build: Build, made: KernelBuild, library: KernelLibrary, isas: list[str], kind: GGMLQuantizationType
) -> None:
    """In any place of the rows or of the imatrix: nothing is taken. Rows give ggml's own error, or its own bytes where
    it does not notice."""
    rng = np.random.default_rng(6)
    good = (rng.standard_normal((20, 768)) * 0.02).astype(np.float32)
    weights = np.ones(768, np.float32)
    ggml, both = Ggml(build.bin_dir), Ggml(build.bin_dir, Kernels(made.library, library.isa, (kind,)))
    for value in (np.nan, np.inf, -np.inf):
        for row, column in ((0, 0), (19, 767), (16, 300), (7, 511)):
            rows = good.copy()
            rows[row, column] = value
            bad_weights = weights.copy()
            bad_weights[column] = value
            for isa in isas:
                library.force_isa(isa)
                assert by_kernel(library, kind, rows, weights) is None
                assert by_kernel(library, kind, good, bad_weights) is None
            if kind.name.startswith("IQ"):
                continue  # ggml aborts on these
            assert outcome(both, kind, rows, weights) == outcome(ggml, kind, rows, weights)


def test_ggmls_own_error_for_inf(build: Build, made: KernelBuild, library: KernelLibrary) -> None:
    kind = GGMLQuantizationType.Q4_0
    both = Ggml(build.bin_dir, Kernels(made.library, library.isa, (kind,)))
    with pytest.raises(VerificationError) as caught:
        both.quantize(np.full((3, 32), np.inf, np.float32), kind, np.ones(32, np.float32))
    assert caught.value.what == "ggml made invalid Q4_0 data"


def test_an_unchecked_instruction_set_is_not_used(build: Build, made: KernelBuild, library: KernelLibrary) -> None:
    """A worker on another machine: its CPU is not the one the kernels were compared on."""
    checked = Kernels(made.library, library.isa, (GGMLQuantizationType.Q4_0,))
    assert Ggml(build.bin_dir, checked).approved == {GGMLQuantizationType.Q4_0}
    assert Ggml(build.bin_dir, replace(checked, isa="avx1024")).approved == frozenset()
    assert Ggml(build.bin_dir).approved == frozenset()


def test_only_the_c_functions_are_exported(made: KernelBuild) -> None:
    command = ["nm", "--demangle", "--dynamic", "--defined-only", str(made.library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {name for line in listed if (name := line.split(maxsplit=2)[2]).startswith("gemma")} == {
        "gemma_quantize",
        "gemma_kernels_isa",
        "gemma_kernels_force_isa",
        "gemma_kernels_version",
    }


def test_no_code_of_one_instruction_set_is_shared() -> None:
    """A library template that is compiled for AVX2 and AVX-512 has one name: the linker may keep the one for both that
    ends on an older CPU in an illegal instruction. So files that are compiled twice use none."""
    plain = re.findall(r"set\(GEMMA_PLAIN (.+?)\)", (KERNEL_SOURCE / "CMakeLists.txt").read_text())[0].split()
    twice = [path for path in KERNEL_SOURCE.glob("*.[ch]*") if path.name not in plain]
    assert {"simd.h", "iq4.cpp", "finite.cpp"} <= {path.name for path in twice}
    for path in twice:
        code = re.sub(r"//.*", "", path.read_text())
        assert "std::" not in code, path.name
        headers = set(re.findall(r"#include <(.+)>", code))
        assert headers <= {"cfloat", "cmath", "cstddef", "cstdint", "cstring", "immintrin.h"}, path.name


# --- the start-up check ------------------------------------------------------------------------------------------


def test_everything_is_approved_here(build: Build, log: RunLog) -> None:
    checked = kernel_check.ready(build, "auto", jobs=2, log=log)
    assert checked.facts.off == {}
    assert set(checked.facts.types) == {kind.name for kind in KERNEL_TYPES}
    assert checked.facts.version == int(re.findall(r"VERSION (\d+)", (KERNEL_SOURCE / "kernels.h").read_text())[0])
    assert checked.kernels is not None
    assert Kernels.parse(json.loads(json.dumps(checked.kernels.document()))) == checked.kernels


def test_kernels_ggml_uses_none(build: Build, log: RunLog) -> None:
    checked = kernel_check.ready(build, "ggml", jobs=1, log=log)
    assert (checked.kernels, checked.key) == (None, "")
    assert (checked.facts.isa, checked.facts.why_none) == ("none", "switched off with --kernels ggml")


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path.name} has no {old!r} any more"
    path.write_text(text.replace(old, new, 1))


def changed_source(tmp_path: Path, file: str, old: str, new: str) -> Path:
    """A copy of the kernels with one change."""
    copy = shutil.copytree(KERNEL_SOURCE, tmp_path / "kernels")
    change(copy / file, old, new)
    return copy


@pytest.fixture
def own_cache(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, in which only the build is the shared one."""
    cache = tmp_path / "cache"
    (cache / "builds").mkdir(parents=True)
    (cache / "builds" / build.key).symlink_to(build.root)
    for name in ("sources", "calibration"):
        shared = llama_cpp.cache_dir() / name
        if shared.exists():
            (cache / name).symlink_to(shared)
    monkeypatch.setenv("GEMMA_GGUF_CACHE", str(cache))
    return cache


def test_a_compiler_that_fails_is_said_and_ggml_works(
    build: Build, own_cache: Path, tmp_path: Path, log: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert own_cache.is_dir()
    bad = changed_source(tmp_path, "CMakeLists.txt", "project(", "this_is_no_command(")
    monkeypatch.setattr(llama_cpp, "KERNEL_SOURCE", bad)
    checked = kernel_check.ready(build, "auto", jobs=1, log=log)
    assert checked.kernels is None
    assert checked.facts.why_none is not None
    assert re.fullmatch(
        r"not compiled: cmake ended with exit code 1\. Its last lines: \(log: kernels-[\d-]+\.log\)",
        checked.facts.why_none,
    )
    assert f"kernels: {checked.facts.why_none}; ggml quantises" in log.path.read_text()


def test_a_library_for_another_machine_takes_nothing(
    build: Build, own_cache: Path, tmp_path: Path, log: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled on ARM, here by pretending that x86-64 is not there."""
    assert own_cache.is_dir()
    other = changed_source(tmp_path, "CMakeLists.txt", "!defined(__x86_64__)", "!defined(__other_machine__)")
    monkeypatch.setattr(llama_cpp, "KERNEL_SOURCE", other)
    checked = kernel_check.ready(build, "auto", jobs=1, log=log)
    assert checked.kernels is None
    assert (checked.facts.isa, checked.facts.why_none) == ("none", "no kernel for this CPU")


# One constant of one kernel in each family: what a slip of the finger would change. (type, file, from, to)
SLIPS = (
    ("Q6_K", "k_quants.cpp", "splat(-128.0f) / fits", "splat(-127.0f) / fits"),
    ("Q4_0", "legacy.cpp", "LOWEST = -8, HIGHEST = 7", "LOWEST = -8, HIGHEST = 6"),
    ("IQ4_NL", "iq4.cpp", "static_cast<float>(LEVELS[0])", "static_cast<float>(LEVELS[1])"),
    ("IQ3_S", "iq3.cpp", "d * 1.033f", "d * 1.034f"),
    ("IQ2_S", "iq2.cpp", "d * 0.9875f", "d * 0.9885f"),
)
BROKEN = {name for name, *_ in SLIPS} | {"IQ4_XS"}  # which shares IQ4_NL's search


@pytest.fixture(scope="module")
def broken(build: Build, tmp_path_factory: pytest.TempPathFactory) -> KernelBuild:
    """The kernels with all slips in them, compiled in a cache of their own."""
    assert build.key
    directory = tmp_path_factory.mktemp("broken")
    copy = shutil.copytree(KERNEL_SOURCE, directory / "kernels")
    for _, file, old, new in SLIPS:
        change(copy / file, old, new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "KERNEL_SOURCE", copy)
        patch.setenv("GEMMA_GGUF_CACHE", str(directory))
        return llama_cpp.build_kernels()


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_unit_comparison_catches_a_broken_constant(build: Build, broken: KernelBuild, name: str) -> None:
    isas = [isa for isa in ISAS if KernelLibrary(broken.library).force_isa(isa)]
    tally = kernel_fuzz.fuzz(build.bin_dir, broken.library, [name], isas, range(4))
    for isa in isas:
        assert tally.differing[name, isa] > 0


def test_start_up_check_and_verify_catch_a_broken_constant(
    build: Build,
    broken: KernelBuild,
    own_cache: Path,
    tmp_path: Path,
    log: RunLog,
    *,
    monkeypatch: pytest.MonkeyPatch,
    finished: Report,
    set_options: Options,
) -> None:
    monkeypatch.setattr(llama_cpp, "build_kernels", lambda _progress: broken)
    checked = kernel_check.ready(build, "auto", jobs=2, log=log)
    for name in BROKEN:
        assert re.fullmatch(r"[0-9]+ of [0-9]+ bytes are not ggml's \(.+\)", checked.facts.off[name])
        assert name not in checked.facts.types
        assert (
            f"kernels: {name} is switched off, ggml quantises it: {checked.facts.off[name]}\n" in log.path.read_text()
        )
    assert set(checked.facts.off) == BROKEN
    assert kernel_check.ready(build, "auto", jobs=2, log=log) == checked  # remembered
    # The set is right in spite of it, and says what happened.
    options = replace(
        set_options,
        out=tmp_path / "out",
        recipes=("IQ4_XS",),
        base=finished.set_dir / f"{STEM}-bf16.gguf",
        imatrix=finished.set_dir / f"{STEM}-imatrix.gguf",
        proof=False,
    )
    report = factory.run(options)
    assert manifest.load(report.set_dir).kernels == checked.facts
    for name in BROKEN:
        assert Done("kernels", f"{name} by ggml", False, checked.facts.off[name], 0.0) in report.done
    name = f"{STEM}-IQ4_XS.gguf"
    assert (report.set_dir / name).read_bytes() == (finished.set_dir / name).read_bytes()
    assert proof.prove_set(report.set_dir) == ["IQ4_XS"]
    # Had the check not looked, verify would have found it.
    (result,) = (own_cache / "kernel-checks").glob("*.json")
    blind = {**json.loads(result.read_text()), "off": {}, "types": [kind.name for kind in KERNEL_TYPES]}
    result.write_text(json.dumps(blind))
    (report.set_dir / name).unlink()
    report = factory.run(options)
    with pytest.raises(VerificationError) as caught:
        proof.prove_set(report.set_dir)
    assert re.search(
        r"is not what llama-quantize of the same build writes: the first tensor that differs", str(caught.value)
    )


# --- make proof PART=kernels -------------------------------------------------------------------------------------


@pytest.mark.proof
@pytest.mark.parametrize("release", llama_cpp.PYPI_SHA256)
def test_campaign_of_the_kernels(release: str, made: KernelBuild, isas: list[str]) -> None:
    """100 M elements of every type by every instruction set, fuzzed, against every pinned release of llama.cpp.

    SEED=2 in the environment runs other ones.
    """
    seed = int(os.environ.get("SEED", "1"))
    build = llama_cpp.build(f"pypi:{release}")
    tally = kernel_fuzz.campaign(
        build.bin_dir,
        made.library,
        names=[kind.name for kind in KERNEL_TYPES],
        isas=isas,
        elements=100e6,
        seed=seed,
        jobs=os.cpu_count() or 1,
    )
    print(f"\nkernels: seed {seed}, {made.compiler}, {build.source}", *tally.lines(), sep="\n")
    assert tally.found == []
    assert min(tally.elements[kind.name, isa] for kind in KERNEL_TYPES for isa in isas) >= 100e6


@pytest.mark.proof
def test_kernels_on_real_weights(build: Build, made: KernelBuild, isas: list[str], tmp_path: Path) -> None:
    """Gemma 3 270M with its own imatrix, 20 M elements of every type; token_embd without one, as llama.cpp does it."""
    report = factory.run(Options("demo", out=tmp_path / "out", chunks=20, until="imatrix"))
    (base,) = (tmp_path / "out" / ".work").glob("*/*-bf16.gguf")
    (imatrix,) = report.set_dir.glob("*-imatrix.gguf")
    with fanout.local_executor(os.cpu_count() or 1, tmp_path) as pool:
        one = partial(kernel_fuzz.real_weights, build.bin_dir, made.library, base, imatrix, isas=isas, elements=20e6)
        found = [pool.submit(one, name=kind.name) for kind in KERNEL_TYPES]
        tally = kernel_fuzz.Tally()
        for part in found:
            tally.add(part.result())
    print("\nkernels on real weights:", *tally.lines(), sep="\n")
    assert tally.found == []
    assert min(tally.elements[kind.name, isa] for kind in KERNEL_TYPES for isa in isas) >= 20e6
