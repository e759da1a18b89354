"""What stands in the way of a run: every verdict from facts alone, then the look around on this very machine."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from gemma_gguf import (
    convert,
    doctor,
    factory,
    gguf_io,
    kernel_check,
    llama_cpp,
    quantize,
    recipes,
    settings,
    source,
    survey,
)
from gemma_gguf.doctor import Account, Check, Facts, KernelState, Model, Need, Package, Refused, Room
from gemma_gguf.errors import BadInputError, DiskError, GemmaGGUFError, MissingToolError
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.session import Options, Report
from tests.hub import Reply, Request, serving
from tests.test_fanout import STEM
from tests.test_source import safetensors_bytes, write_small

GB = 1_000_000_000
OUT, CACHE, HUB = (
    Room(Path("/o/out"), Path("/o"), 1, 100 * GB, True),
    Room(Path("/c/cache"), Path("/c"), 2, 20 * GB, True),
    Room(Path("/c/hub"), Path("/c"), 2, 20 * GB, True),
)
ROOMS = {"out": OUT, "cache": CACHE, "hub cache": HUB}
Q4, Q6, IQ2 = (recipes.TABLE[name] for name in ("Q4_K_M", "Q6_K", "IQ2_XS"))


def verdicts(facts: Facts) -> list[tuple[str, str, str, str | None]]:
    return [(c.name, c.status, c.what, c.next_step) for c in doctor.judge(facts)]


def refused(check: str, what: str) -> Refused:
    return Refused(check, BadInputError(what, next_step="Mend it."))


JUDGED: Mapping[str, tuple[Facts, tuple[str, str, str, str | None]]] = {
    "python": (Facts(python="3.11.7 (/p)"), ("python", "ok", "3.11.7 (/p)", None)),
    "packages": (
        Facts(packages=(Package("numpy", ">=1.26", "2.0", True), Package("torch", "==2.13.0", None, False, "convert"))),
        ("packages", "ok", "1 as pyproject.toml pins them", None),
    ),
    "a package of another version": (
        Facts(packages=(Package("llama-cpp-python", "==0.3.36", "0.3.35", False),)),
        (
            "packages",
            "warn",
            "llama-cpp-python 0.3.35 (wanted: ==0.3.36)",
            "pip install --upgrade 'gemma-gguf'",
        ),
    ),
    "a converter's package of another version": (
        Facts(packages=(Package("torch", "==2.13.0", "2.9.0", False, "convert"),)),
        ("packages", "warn", "torch 2.9.0 (wanted: ==2.13.0)", "pip install --upgrade 'gemma-gguf[convert]'"),
    ),
    "no converter": (
        Facts(converter_lacks=("torch", "transformers")),
        ("converter", "fail", "the converter needs torch, transformers", "pip install 'gemma-gguf[convert]'"),
    ),
    "the converter": (
        Facts(packages=(Package("torch", "==2.13.0", "2.13.0", True, "convert"),), converter_lacks=()),
        ("converter", "ok", "torch 2.13.0", None),
    ),
    "no compiler": (
        Facts(tools={"cmake": "/b/cmake", "ninja": "/b/ninja"}),
        (
            "tools",
            "fail",
            "building llama.cpp needs a C++ compiler",
            "Install a compiler: apt install g++, dnf install gcc-c++, or xcode-select --install.",
        ),
    ),
    "no tool at all": (
        Facts(tools={"cmake": None, "ninja": None, "git": None}),
        (
            "tools",
            "fail",
            "building llama.cpp needs a C++ compiler, cmake, ninja, git",
            "Install a compiler: apt install g++, dnf install gcc-c++, or xcode-select --install. "
            "pip install 'gemma-gguf[build]' Install git, or use --llama-cpp pypi:<version>.",
        ),
    ),
    "tools": (
        Facts(tools={"cmake": "/b/cmake", "ninja": "/b/ninja"}, compiler="g++ 13"),
        ("tools", "ok", "g++ 13, cmake, ninja", None),
    ),
    "no tools needed": (Facts(built=True), ("tools", "ok", "llama.cpp is built already", None)),
    "backends": (
        Facts(backends={"cuda": "/b/nvcc", "hip": None}),
        ("backends", "ok", "cpu, cuda (/b/nvcc)", None),
    ),
    "a backend that is not here": (
        Facts(backends={"cuda": None}, backend="cuda"),
        (
            "backends",
            "fail",
            "--backend cuda needs nvcc, which is not installed",
            "Install nvcc, or use --backend cpu.",
        ),
    ),
    "kernels switched off": (
        Facts(kernels=KernelState(switched_off=True)),
        ("kernels", "ok", "switched off with --kernels ggml: ggml quantises, several times slower", None),
    ),
    "kernels that cannot be compiled": (
        Facts(kernels=KernelState(lacks=("a C++ compiler", "ninja"))),
        (
            "kernels",
            "warn",
            "compiling them needs a C++ compiler, ninja: ggml quantises, several times slower",
            "Install a C++ compiler, and: pip install 'gemma-gguf[build]'",
        ),
    ),
    "kernels not compiled yet": (
        Facts(kernels=KernelState()),
        ("kernels", "ok", "not compiled yet; the first run, or `gemma-gguf build`, does it", None),
    ),
    "kernels not compared yet": (
        Facts(kernels=KernelState(compiled=True, lacks=("ninja",))),
        ("kernels", "ok", "compiled; the first run compares them with this build's ggml", None),
    ),
    "kernels for another CPU": (
        Facts(kernels=KernelState(compiled=True, isa="none")),
        ("kernels", "ok", "compiled; none is for this CPU (AVX2 or AVX-512): ggml quantises", None),
    ),
    "kernels": (
        Facts(kernels=KernelState(compiled=True, isa="avx2", types=("Q4_K", "Q6_K"))),
        ("kernels", "ok", "avx2, 2 types: Q4_K, Q6_K", None),
    ),
    "a kernel that is off": (
        Facts(kernels=KernelState(compiled=True, isa="avx2", types=("Q4_K",), off={"Q6_K": "3 bytes differ"})),
        (
            "kernels",
            "warn",
            "avx2, 1 types: Q4_K. Switched off, ggml quantises: Q6_K: 3 bytes differ",
            "The files are the same, and take longer; after an update of gemma-gguf or the compiler look again.",
        ),
    ),
    "an evaluation that the budget does not allow": (
        Facts(eval_bytes=9 * GB, eval_disk_budget=8 * GB),
        (
            "evaluation",
            "warn",
            "the base's distributions take up to 9,000,000,000 bytes, --eval-disk-budget allows 8,000,000,000: "
            "the base may run again beside every file",
            "Allow more, or measure on less text: --eval-chunks N.",
        ),
    ),
    "something refused": (
        Facts(refused=(refused("model", "no such model"),)),
        ("model", "fail", "no such model", "Mend it."),
    ),
    "a model": (Facts(model=Model(4_300_079_472, 0, 0, 0)), ("model", "ok", "4,300,079,472 parameters", None)),
    "recipes": (Facts(wanted=(Q4, Q6)), ("recipes", "ok", "Q4_K_M, Q6_K", None)),
    "an imatrix": (
        Facts(makes_quants=True, imatrix="given: i.gguf", wanted=(IQ2,)),
        ("imatrix", "ok", "given: i.gguf", None),
    ),
    "no imatrix": (
        Facts(makes_quants=True, wanted=(Q4, IQ2)),
        (
            "imatrix",
            "fail",
            "no imatrix can be made or read, and IQ2_XS cannot be made without one",
            "Give --imatrix FILE or a calibration text that is there.",
        ),
    ),
    "no imatrix, for a reason that is said": (
        Facts(makes_quants=True, wanted=(IQ2,), refused=(refused("calibration", "gone"),)),
        (
            "imatrix",
            "warn",
            "no imatrix can be made or read, and IQ2_XS cannot be made without one",
            "Give --imatrix FILE or a calibration text that is there.",
        ),
    ),
    "disk": (
        Facts(rooms=ROOMS, needs=(Need("convert", "out", 8, 8), Need("quantize", "out", 20, 30))),
        (
            "disk",
            "ok",
            "28 to 38 bytes at the peak in /o/out (convert 8, quantize 20 to 30); 100,000,000,000 are free",
            None,
        ),
    ),
    "disk that may be too small": (
        Facts(rooms=ROOMS, needs=(Need("quantize", "out", 90 * GB, 101 * GB),)),
        (
            "disk",
            "warn",
            "90,000,000,000 to 101,000,000,000 bytes at the peak in /o/out (quantize 90,000,000,000 to "
            "101,000,000,000); 100,000,000,000 are free",
            "It may not fit; what is needed is known exactly before the imatrix is computed, and refused then.",
        ),
    ),
    "disk too small": (
        Facts(
            rooms=ROOMS,
            needs=(Need("convert", "out", 50 * GB, 50 * GB), Need("quantize", "out", 60 * GB, 70 * GB)),
            sizes={"Q4_K_M": 25 * GB, "Q6_K": 35 * GB},
        ),
        (
            "disk",
            "fail",
            "110,000,000,000 to 120,000,000,000 bytes at the peak in /o/out (convert 50,000,000,000, quantize "
            "60,000,000,000 to 70,000,000,000); 100,000,000,000 are free: 10,000,000,000 are missing",
            "Make room, choose another place with --out, or make fewer: --recipes Q4_K_M.",
        ),
    ),
    "a cache that is too small: two places on one disk count together": (
        Facts(rooms=ROOMS, needs=(Need("build", "cache", GB, GB), Need("download", "hub cache", 20 * GB, 20 * GB))),
        (
            "disk",
            "fail",
            "21,000,000,000 bytes at the peak in /c/cache, /c/hub (build 1,000,000,000, download 20,000,000,000); "
            "20,000,000,000 are free: 1,000,000,000 are missing",
            "Make room, choose another cache with GEMMA_GGUF_CACHE.",
        ),
    ),
    "a budget that is too small": (
        Facts(disk_budget=30 * GB, sizes={"Q4_K_M": 25 * GB, "Q6_K": 35 * GB}),
        (
            "disk budget",
            "fail",
            "the set needs at least 60,000,000,000 bytes, --disk-budget allows 30,000,000,000: 30,000,000,000 are "
            "missing",
            "Make fewer: --recipes Q4_K_M",
        ),
    ),
    "memory": (
        Facts(memory=(16 * GB, 8 * GB), base_bytes=GB, workers=2, worker_bytes=64_000_000),
        ("memory", "ok", "8,000,000,000 bytes available of 16,000,000,000", None),
    ),
    "weights beyond the memory": (
        Facts(memory=(16 * GB, 8 * GB), base_bytes=54 * GB),
        (
            "memory",
            "warn",
            "llama-imatrix works on 54,000,000,000 bytes of weights and 1,000,000,000 of its own, 8,000,000,000 are "
            "available: the weights will be read again and again",
            "Close other programs, or compute the imatrix on a larger machine: --imatrix FILE.",
        ),
    ),
    "no memory for logits": (
        Facts(memory=(GB // 2, GB // 4), base_bytes=GB),
        (
            "memory",
            "fail",
            "llama-imatrix needs about 1,000,000,000 bytes beside the weights, 500,000,000 are installed",
            "Use a machine with more memory, or --imatrix FILE.",
        ),
    ),
    "workers beyond the memory": (
        Facts(memory=(16 * GB, GB), workers=46, worker_bytes=64_000_000),
        (
            "memory",
            "warn",
            "46 workers take about 2,944,000,000 bytes, 1,000,000,000 are available",
            "Start fewer: --jobs N, or --max-memory SIZE.",
        ),
    ),
    "writing": (Facts(rooms={"out": OUT}), ("writing", "ok", "/o/out", None)),
    "no writing": (
        Facts(rooms={"out": replace(OUT, writable=False)}),
        ("writing", "fail", "cannot write in /o, where /o/out belongs", "Choose another place with --out."),
    ),
    "no writing into the cache": (
        Facts(rooms={"out": OUT, "cache": replace(CACHE, writable=False)}),
        (
            "writing",
            "fail",
            "cannot write in /c, where /c/cache belongs",
            "Choose another cache with GEMMA_GGUF_CACHE or HF_HOME.",
        ),
    ),
    "hub": (
        Facts(account=Account("https://hub", True, name="me", role="write")),
        ("hub", "ok", "https://hub answers, as me", None),
    ),
    "hub out of reach": (
        Facts(account=Account("https://hub", False, "no route")),
        (
            "hub",
            "warn",
            "https://hub cannot be reached (no route); only a MODEL on the hub and uploads need it",
            "Check the network; HF_ENDPOINT names another server.",
        ),
    ),
    "hub out of reach, and needed": (
        Facts(account=Account("https://hub", False, "no route"), hub_model=True),
        (
            "hub",
            "fail",
            "https://hub cannot be reached (no route)",
            "Check the network; HF_ENDPOINT names another server.",
        ),
    ),
    "a token that may write": (
        Facts(account=Account("https://hub", True, name="me", role="write")),
        ("publishing", "ok", "the token of me may write", None),
    ),
    "a token that may write to some": (
        Facts(account=Account("https://hub", True, name="me", role="fineGrained", writes_to=("me", "org"))),
        ("publishing", "ok", "the token of me may write to me, org", None),
    ),
    "a token that may read": (
        Facts(account=Account("https://hub", True, name="me", role="read")),
        (
            "publishing",
            "warn",
            "the token of me may only read (read): nothing can be published with it",
            "Make a token with write access at huggingface.co/settings/tokens, then: hf auth login",
        ),
    ),
    "no token": (
        Facts(account=Account("https://hub", True)),
        (
            "publishing",
            "warn",
            "no token: nothing can be published, and gated models cannot be read",
            "hf auth login",
        ),
    ),
}


@pytest.mark.parametrize(("facts", "verdict"), JUDGED.values(), ids=JUDGED)
def test_a_verdict(facts: Facts, verdict: tuple[str, str, str, str | None]) -> None:
    assert verdict in verdicts(facts)
    if verdict[1] == "fail":
        error = doctor.failures(doctor.judge(facts))
        assert error is not None
        assert (error.what, error.next_step) == verdict[2:]


def test_what_was_not_looked_at_is_not_judged() -> None:
    assert verdicts(Facts()) == []


def test_one_failure_is_the_error_itself_and_several_are_one_error() -> None:
    ok, bad = Check("a", "ok", "fine"), Check("disk", "fail", "full", "Make room.", DiskError)
    assert doctor.failures([ok]) is None
    assert type(doctor.failures([ok, bad])) is DiskError
    both = doctor.failures([bad, ok, Check("tools", "fail", "no cmake", None), Check("hub", "warn", "away")])
    assert both is not None
    assert both.what == "2 things stand in the way:\n  disk: full\n  tools: no cmake"
    assert both.next_step == "mend these first.\n  disk: Make room."


# --- what a run takes ---------------------------------------------------------------------------------------------

MODEL = Model(1_000_000_000, 300_000_000, 0, 2_000_000_000)


def needs(model: Model | None = MODEL, **given: Any) -> dict[str, tuple[str, int, int]]:
    asked: dict[str, Any] = {
        "built": True,
        "backend": "cpu",
        "has_base": False,
        "copied_base": 0,
        "makes": (Q4, Q6),
        "makes_imatrix": True,
        "held": 0,
        "proves": True,
    }
    return {need.stage: (need.place, need.low, need.high) for need in doctor.disk_needs(model, **{**asked, **given})}


def test_what_each_stage_adds() -> None:
    low = int((300e6 * 5.5 + 700e6 * 4.5) / 8), int(1e9 * 6.5625 / 8)
    high = int((300e6 * 8.5 + 700e6 * 4.5 * 1.4) / 8), int((300e6 * 8.5 + 700e6 * 6.5625 * 1.4) / 8)
    assert needs() == {
        "download": ("hub cache", 2 * GB, 2 * GB),
        "convert": ("out", 2 * GB, 2 * GB),
        "imatrix": ("out", 0, 40_000_000),
        "quantize": ("out", sum(low), sum(high)),
        "proof": ("out", min(low), max(high)),
    }


@pytest.mark.parametrize(
    ("given", "stages"),
    [
        pytest.param({"built": False}, {"build", "download", "convert", "imatrix", "quantize", "proof"}, id="build"),
        pytest.param({"has_base": True}, {"download", "imatrix", "quantize", "proof"}, id="base there"),
        pytest.param({"makes": ()}, {"download", "convert", "imatrix"}, id="quants there"),
        pytest.param({"makes_imatrix": False}, {"download", "convert", "quantize", "proof"}, id="imatrix there"),
        pytest.param({"proves": False}, {"download", "convert", "imatrix", "quantize"}, id="no proof"),
        pytest.param({"model": None, "built": False}, {"build"}, id="no model"),
        pytest.param({"model": None}, set(), id="nothing"),
        pytest.param(
            {"model": replace(MODEL, download=0, rebuilt=True)},
            {"demo checkpoint", "convert", "imatrix", "quantize", "proof"},
            id="demo",
        ),
    ],
)
def test_what_is_there_is_not_counted(given: dict[str, Any], stages: set[str]) -> None:
    assert set(needs(**given)) == stages


def test_sizes_of_stages() -> None:
    assert needs(built=False)["build"] == ("cache", GB, GB)
    assert needs(built=False, backend="cuda")["build"] == ("cache", 5 * GB, 5 * GB)
    vision = replace(MODEL, n_projector=400_000_000)
    assert needs(vision)["convert"] == ("out", 2 * 600_000_000 + 8 * 400_000_000, 2 * 600_000_000 + 8 * 400_000_000)
    assert needs(has_base=True, copied_base=7)["convert"] == ("out", 7, 7)
    whole, rest = needs()["quantize"], needs(held=1000)["quantize"]
    assert (whole[1] - rest[1], whole[2] - rest[2]) == (1000, 1000)
    assert needs(held=10**12)["quantize"] == ("out", 0, 0)


def test_the_evaluation_is_counted_where_it_is_kept() -> None:
    """It comes after the proof, whose file has gone by then, and never fills the disk."""
    assert needs(eval_bytes=5 * GB)["evaluate"] == ("out", 0, 5 * GB)
    quants, proof = Need("quantize", "out", 10 * GB, 20 * GB), Need("proof", "out", 1 * GB, 2 * GB)

    def told(n_evaluate: int) -> list[tuple[str, str, str, str | None]]:
        facts = Facts(
            needs=(quants, proof, Need("evaluate", "out", 0, n_evaluate)), rooms={"out": OUT}, eval_bytes=n_evaluate
        )
        facts = replace(facts, eval_disk_budget=n_evaluate)
        return [verdict for verdict in verdicts(facts) if verdict[0] != "writing"]

    assert told(5 * GB) == [
        (
            "disk",
            "ok",
            "11,000,000,000 to 25,000,000,000 bytes at the peak in /o/out (quantize 10,000,000,000 to 20,000,000,000, "
            "proof 1,000,000,000 to 2,000,000,000, evaluate 0 to 5,000,000,000); 100,000,000,000 are free",
            None,
        )
    ]
    assert told(1 * GB)[0][2].startswith("11,000,000,000 to 22,000,000,000 bytes at the peak")
    disk, evaluation = told(79_500_000_000)  # a reserve stays free
    assert disk[:2] == ("disk", "ok")
    assert disk[2].startswith("11,000,000,000 to 22,000,000,000 bytes at the peak")
    assert "evaluate" not in disk[2]
    assert evaluation == (
        "evaluation",
        "warn",
        "the base's distributions, up to 79,500,000,000 bytes, may not fit beside the set: "
        "then the base runs again beside every file",
        "Make room, or measure on less text: --eval-chunks N.",
    )


def test_overrides_count_in_what_a_file_takes() -> None:
    """A recipe of the user's own may be smaller than its ftype, and larger."""
    embedding = replace(Q6, name="A", flags=("--token-embedding-type", "q3_k"))
    assert doctor.quant_bytes(embedding, MODEL)[0] == int((300e6 * 3.4375 + 700e6 * 6.5625) / 8)
    assert doctor.quant_bytes(embedding, MODEL)[1] == doctor.quant_bytes(Q6, MODEL)[1]
    smaller = replace(Q6, name="B", flags=("--tensor-type", "ffn=q2_k"))
    assert doctor.quant_bytes(smaller, MODEL) == (int(1e9 * 2.625 / 8), doctor.quant_bytes(Q6, MODEL)[1])
    larger = replace(Q4, name="C", flags=("--tensor-type", "ffn=f32"))
    assert doctor.quant_bytes(larger, MODEL) == (doctor.quant_bytes(Q4, MODEL)[0], int(1e9 * 32 / 8))


def test_in_waves_the_largest_file_must_fit() -> None:
    facts = Facts(
        needs=(Need("quantize", "out", 30, 40), Need("convert", "out", 5, 5)), sizes={"Q4_K_M": 10, "Q6_K": 20}
    )
    waves = doctor.in_waves(facts)
    assert waves.needs == (Need("quantize", "out", 20, 20), Need("convert", "out", 5, 5))
    assert waves.sizes == {"Q6_K": 20}


def test_real_files_lie_between_the_least_and_the_most(finished: Report) -> None:
    """All 27 files of a real set against what was said of them with nothing but the model's numbers."""
    header = gguf_io.read_header(finished.set_dir / f"{STEM}-bf16.gguf")
    model = survey.model_of(header)
    keys = header.data_start  # vocabulary and other keys: as large as the tensors of so small a model
    for recipe in recipes.DEFAULT[1:]:  # the first is the base itself
        real = (finished.set_dir / f"{STEM}-{recipe.name}.gguf").stat().st_size - keys
        low, high = doctor.quant_bytes(recipe, model)
        assert 0.95 * low <= real <= high, recipe.name


def test_which_recipes_need_an_imatrix(build: Build, finished: Report, log: RunLog, tmp_path: Path) -> None:
    """Asked of llama-quantize: without an imatrix it warns of exactly the ftypes of our table."""
    need = set()
    base = finished.set_dir / f"{STEM}-bf16.gguf"
    for recipe in recipes.TABLE.values():
        if not recipe.is_base:
            argv = quantize.quantize_argv(build, recipe, str(base), None, imatrix=None)
            if "will require an imatrix" in llama_cpp.run_tool(argv, log=log, cwd=tmp_path).output:
                need.add(recipe.ftype)
    assert need == recipes.NEED_IMATRIX


def test_which_types_need_an_imatrix(build: Build, finished: Report, log: RunLog, tmp_path: Path) -> None:
    """The same of overrides: asked of llama-quantize for every type that a recipe may name."""
    need = set()
    base = finished.set_dir / f"{STEM}-bf16.gguf"
    for kind in settings.GGML_TYPES:
        recipe = recipes.Recipe("OWN", "Q8_0", "Mine", ("--tensor-type", f"ffn_up={kind.lower()}"))
        argv = quantize.quantize_argv(build, recipe, str(base), None, imatrix=None)
        if "will require an imatrix" in llama_cpp.run_tool(argv, log=log, cwd=tmp_path).output:
            need.add(kind)
    assert need == recipes.NEED_IMATRIX_TYPES


# --- the look around, on this machine -----------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def free_bytes(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**13, 0, n_bytes))


def test_facts_of_a_local_checkpoint(build: Build, text_checkpoint: Path, elsewhere: Path) -> None:
    facts = survey.look(Options(str(text_checkpoint), recipes=("Q4_K_M", "bf16")))
    assert facts.built
    assert facts.refused == ()
    assert facts.model is not None
    assert facts.model.n_embedding == 376 * 256
    assert [recipe.name for recipe in facts.wanted] == ["Q4_K_M", "bf16"]
    assert list(facts.sizes) == ["Q4_K_M"]
    assert {need.stage: need.high for need in facts.needs}.keys() == {
        *("convert", "imatrix", "quantize", "proof", "evaluate")
    }
    # 20 conversations of 512 tokens over 376 tokens of vocabulary, 16 bits each, and 20 bytes a row.
    assert facts.eval_bytes == facts.needs[-1].high == 20 * 512 * (2 * 376 + 20)
    assert facts.rooms["out"].path == elsewhere.resolve() / "out"
    assert facts.rooms["out"].existing == elsewhere.resolve()
    assert facts.memory == (psutil.virtual_memory().total, facts.memory[1] if facts.memory else 0)
    assert facts.converter_lacks == ()


def test_facts_of_a_finished_set(finished: Report, set_options: Options) -> None:
    facts = survey.look(set_options)
    assert (facts.needs, facts.sizes, facts.converter_lacks, facts.workers) == ((), {}, None, 0)


@pytest.mark.parametrize(
    ("given", "n_bytes"),
    [
        pytest.param({"eval_chunks": 3}, 3 * 512 * (2 * 376 + 20), id="depth"),
        pytest.param({"evaluate": False}, 0, id="none"),
        pytest.param({"until": "quantize"}, 0, id="ends before"),
        pytest.param({"llama_cpp": "git:b9999"}, 0, id="no bindings"),
    ],
)
def test_what_the_evaluation_of_a_run_keeps(
    given: dict[str, Any], n_bytes: int, text_checkpoint: Path, elsewhere: Path
) -> None:
    facts = survey.look(Options(str(text_checkpoint), recipes=("Q4_K_M",), **given))
    assert facts.eval_bytes == n_bytes
    assert ("evaluate" in {need.stage for need in facts.needs}) == (n_bytes > 0)
    over = survey.look(Options(str(text_checkpoint), recipes=("Q4_K_M",), eval_disk_budget=n_bytes - 1, **given))
    assert "evaluate" not in {need.stage for need in over.needs}


def test_the_kernels_of_this_machine(build: Build, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the cache has them, from nothing to a type that is off; looking compiles and compares nothing."""
    made = llama_cpp.build_kernels()

    def seen(**given: Any) -> KernelState | None:
        return survey.look(Options("", **given), thorough=True).kernels

    monkeypatch.setattr(survey, "_account", lambda: None)
    path, _ = kernel_check.remembered(build, made)
    results = {path: {"isa": "avx2", "types": ["Q4_0"], "off": {"Q6_K": "why"}}}
    monkeypatch.setattr(kernel_check, "remembered", lambda b, m: (path, results.get(path, {}) if b == build else {}))
    assert seen() == KernelState(compiled=True, isa="avx2", types=("Q4_0",), off={"Q6_K": "why"})
    results.clear()
    assert seen() == KernelState(compiled=True)
    assert seen(llama_cpp="git:b1") == KernelState(compiled=True)
    assert seen(kernels="ggml") == KernelState(switched_off=True)
    monkeypatch.setenv("GEMMA_GGUF_CACHE", str(elsewhere / "cache"))
    assert seen() == KernelState()
    monkeypatch.setattr(survey, "_program", lambda name: None)
    assert seen() == KernelState(lacks=("cmake", "ninja"))
    assert list(elsewhere.iterdir()) == []


def test_a_directory_with_the_set_of_another_model(
    finished: Report, set_options: Options, vision_checkpoint: Path, elsewhere: Path
) -> None:
    """Where files begin with the model's name alone, two organisations' models can meet in one place."""
    (elsewhere / "tiny-vision-GGUF").mkdir()
    shutil.copy(finished.set_dir / "quantset.json", elsewhere / "tiny-vision-GGUF")
    options = replace(set_options, out=elsewhere, naming="model")
    with pytest.raises(BadInputError) as caught:
        survey.refuse_what_cannot_work(replace(options, name="other/tiny-vision"))
    assert caught.value.what == (
        f"{elsewhere.resolve()}/tiny-vision-GGUF is the set of test/tiny-vision, not of other/tiny-vision"
    )
    survey.refuse_what_cannot_work(options)


def test_a_vision_models_projector_is_counted(build: Build, vision_checkpoint: Path, elsewhere: Path) -> None:
    facts = survey.look(Options(str(vision_checkpoint)))
    assert facts.model is not None
    assert facts.model.n_projector == sum(
        n
        for shard in vision_checkpoint.glob("*.safetensors")
        for name, n in source.read_safetensors_header(shard).items()
        if not name.startswith("language_model.")
    )


def test_a_base_on_another_file_system_counts_and_one_on_the_same_does_not(
    finished: Report, set_options: Options, elsewhere: Path
) -> None:
    base = finished.set_dir / f"{STEM}-bf16.gguf"
    facts = survey.look(replace(set_options, out=elsewhere / "out", base=base))
    assert "convert" not in {need.stage for need in facts.needs}
    there = survey.room(elsewhere)
    assert survey._copied(base, there) == 0
    assert survey._copied(base, replace(there, device=there.device + 1)) == base.stat().st_size


def test_everything_that_is_wrong_is_one_error(
    build: Build, text_checkpoint: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recipes, calibration text, base, manifest, disk: nothing is built, converted or made, and all of it is said."""
    free_bytes(monkeypatch, 1000)
    set_dir = elsewhere / "out" / "local_tiny-text-GGUF"
    set_dir.mkdir(parents=True)
    (set_dir / "quantset.json").write_text("{")
    options = Options(str(text_checkpoint), recipes=("Q4_K_MM", "Q6_K", "IQ9"), calibration="no-such-text")
    monkeypatch.setattr(llama_cpp, "build", "not to be called")
    with pytest.raises(GemmaGGUFError) as caught:
        factory.run(options)
    lines = caught.value.what.splitlines()
    assert lines[0] == "5 things stand in the way:"
    assert [line.partition(":")[0].strip() for line in lines[1:]] == [
        *("calibration", "recipes", "recipes", "manifest", "disk")
    ]
    assert "there is no calibration file or set called 'no-such-text'" in lines[1]
    assert lines[2:4] == ["  recipes: unknown recipe 'Q4_K_MM'", "  recipes: unknown recipe 'IQ9'"]
    assert "Nearest: Q4_K_M" in (caught.value.next_step or "")
    assert [path.name for path in elsewhere.rglob("*") if path.is_file()] == ["quantset.json"]


@pytest.mark.parametrize("engine", ["fanout", "llama-quantize"])
def test_a_disk_that_is_too_small_is_found_before_anything_is_made(
    engine: str, build: Build, text_checkpoint: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes(monkeypatch, 1_000_000)
    monkeypatch.setattr(llama_cpp, "build", "not to be called")
    with pytest.raises(DiskError, match=r"bytes at the peak in .*; 1,000,000 are free: [\d,]+ are missing"):
        factory.run(Options(str(text_checkpoint), engine=engine))
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("engine", ["fanout", "llama-quantize"])
def test_a_near_miss_is_refused_exactly_and_before_the_imatrix(
    engine: str, finished: Report, set_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte less than the set and, where there is a proof, its file take: the first look lets it pass, the second
    does not."""
    names = ("Q4_K_M", "Q6_K", "IQ2_XS")
    sizes = [(finished.set_dir / f"{STEM}-{name}.gguf").stat().st_size for name in names]
    needed = sum(sizes) + (sizes[1] if engine == "fanout" else 0)
    base = finished.set_dir / f"{STEM}-bf16.gguf"
    options = replace(set_options, out=tmp_path / "out", base=base, recipes=names, engine=engine)
    with pytest.raises(BadInputError) as caught:
        factory.run(replace(options, disk_budget=needed - 1))
    assert caught.value.what == (f"the set needs {needed:,} bytes, {needed - 1:,} are there: 1 are missing")
    made = {path.name for path in (tmp_path / "out").rglob("*.gguf")}
    assert made == {f"{STEM}-bf16.gguf"}  # in the work directory
    assert not (tmp_path / "out" / f"{STEM}-GGUF" / f"{STEM}-bf16.gguf").exists()


def test_a_directory_that_cannot_be_written(
    build: Build, text_checkpoint: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != elsewhere.resolve() and real(path, mode))
    with pytest.raises(GemmaGGUFError) as caught:
        factory.run(Options(str(text_checkpoint)))
    here = elsewhere.resolve()
    assert caught.value.what == f"cannot write in {here}, where {here}/out belongs"


def test_no_converter(
    text_checkpoint: Path, finished: Report, set_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torch: refused where a conversion is due, and no matter where the base is there."""
    monkeypatch.setattr(convert, "missing_packages", lambda: ("torch",))
    options = Options(str(text_checkpoint), out=tmp_path)
    with pytest.raises(MissingToolError) as caught:
        survey.refuse_what_cannot_work(options)
    assert (caught.value.what, caught.value.next_step) == (
        "the converter needs torch",
        "pip install 'gemma-gguf[convert]'",
    )
    survey.refuse_what_cannot_work(set_options)
    survey.refuse_what_cannot_work(replace(options, base=finished.set_dir / f"{STEM}-bf16.gguf"))


def test_warnings_stand_in_the_log(
    finished: Report, set_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()._replace(available=1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    options = replace(set_options, out=tmp_path, base=finished.set_dir / f"{STEM}-bf16.gguf", until="convert")
    assert survey.refuse_what_cannot_work(options) == ()
    warned = replace(options, until="card", imatrix=finished.set_dir / f"{STEM}-imatrix.gguf", recipes=("Q4_0",))
    (warning,) = survey.refuse_what_cannot_work(warned)
    assert warning.what.endswith(" bytes, 1 are available")
    report = factory.run(replace(warned, proof=False))
    assert f" memory: {warning.what}\n" in report.log.read_text()


# --- the hub ------------------------------------------------------------------------------------------------------

LOOK = """
import json, os, sys
from gemma_gguf import doctor, survey
from gemma_gguf.session import Options
for model, token in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    facts = survey.look(Options(model, recipes=("Q4_0",)), thorough=not model)
    checks = {check.name: check.document() for check in doctor.judge(facts)}
    print(json.dumps([checks, {need.stage: need.low for need in facts.needs}]))
"""
Looked = list[tuple[dict[str, dict[str, str]], dict[str, int]]]


def looked(environment: Mapping[str, str], cwd: Path, *asked: tuple[str, str | None]) -> Looked:
    """For each (model or "", token): the checks by name and the needs by stage, as another process sees them.

    The hub's client reads its address when it is imported.
    """
    env = {**environment, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, json.dumps(asked)], env=env, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def who(request: Request) -> Reply:
    """`/api/whoami-v2` for tokens whose names say what they may do."""
    if request.token == "hf_bad":
        return Reply(401, b'{"error": "Invalid username or password."}', {"Content-Type": "application/json"})
    fine = {"scoped": [{"entity": {"name": "org"}, "permissions": ["repo.content.read", "repo.write"]}]}
    token = {
        "hf_writer": {"role": "write"},
        "hf_reader": {"role": "read"},
        "hf_fine": {"role": "fineGrained", "fineGrained": fine},
    }[str(request.token)]
    answer = {"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token", "accessToken": token}}
    return Reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})


def test_a_hub_model_is_judged_before_its_weights_are_fetched(build: Build, tmp_path: Path) -> None:
    """By its listing and its configuration: what there is to download, its architecture, its code, access to it."""
    content = write_small(tmp_path / "content", text_config={"vocab_size": 1000, "hidden_size": 64})
    weights = content / "model.safetensors"
    weights.write_bytes(safetensors_bytes({"a": (1000, 1000)}))
    says = {
        "llama": "holds a LlamaForCausalLM, which is not a Gemma architecture",
        "code": "asks to run the model's own code (auto_map); code of a model is never executed here",
        "gated": "org/gated is gated and this account has no access to it",
        "nothing": "there is no model org/nothing on the hub, or it is private",
    }
    with serving() as hub:
        hub.repo("org/model").commit(content, "main")
        hub.repo("org/llama").commit(write_small(tmp_path / "llama", "LlamaForCausalLM"), "main")
        hub.repo("org/code").commit(write_small(tmp_path / "code", auto_map={"AutoModel": "evil.Model"}), "main")
        hub.repo("org/gated", gated=True).commit(content, "main")
        asked = [(f"org/{name}", None) for name in ("model", *says)]
        (checks, sizes), *others = looked(hub.environment(tmp_path / "home"), tmp_path, *asked)
        fetched = [r.path for r in hub.requests if r.method == "GET" and r.path.endswith(".safetensors")]
    assert fetched == []
    n_bytes = weights.stat().st_size
    assert checks["model"]["what"] == f"{n_bytes // 2:,} parameters"
    assert n_bytes <= sizes["download"] <= n_bytes + (content / "tokenizer.json").stat().st_size
    assert "hub" not in checks
    for (refused, _), what in zip(others, says.values(), strict=True):
        assert refused["model"]["status"] == "fail"
        assert refused["model"]["what"].endswith(what)


def test_what_a_token_may_do(build: Build, tmp_path: Path) -> None:
    expected = {
        "hf_writer": ("ok", "the token of me may write"),
        "hf_fine": ("ok", "the token of me may write to org"),
        "hf_reader": ("warn", "the token of me may only read (read): nothing can be published with it"),
        None: ("warn", "no token: nothing can be published, and gated models cannot be read"),
    }
    with serving() as hub:
        hub.pages["/api/whoami-v2"] = who
        asked = [("", token) for token in (*expected, "hf_bad")]
        *told, (bad, _) = looked(hub.environment(tmp_path / "home"), tmp_path, *asked)
        offline = {**hub.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        ((away, _),) = looked(offline, tmp_path, ("", None))
    for (checks, _), verdict in zip(told, expected.values(), strict=True):
        assert (checks["publishing"]["status"], checks["publishing"]["what"]) == verdict
    assert bad["publishing"]["what"].startswith("the hub does not accept the token (")
    assert "hf_bad" not in json.dumps(bad)
    assert away["hub"]["status"] == "warn"
    assert "HF_HUB_OFFLINE is set" in away["hub"]["what"]
