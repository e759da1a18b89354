"""What stands in the way of a run, judged before it starts.

Consumes `Facts` (gathered by `survey.py` from machine, packages, disks, model and hub), produces one `Check` per
subject. Nothing here looks at anything: the same facts give the same verdicts, so every verdict is a row of a test.
`warn` is what may hurt, `fail` what a run would die of. A run refuses at once, with all failures in one error;
`gemma-gguf doctor` shows everything.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from gemma_gguf import plan, shards
from gemma_gguf.errors import BadInputError, DiskError, GemmaGGUFError, MissingToolError
from gemma_gguf.evaluate import FREE_RESERVE
from gemma_gguf.recipes import Recipe

Status = Literal["ok", "warn", "fail"]

# What building llama.cpp takes at its peak: the unpacked source (0.3 GB), objects, the finished build. GPU back ends
# compile every kernel for several architectures.
BUILD_BYTES: Mapping[str, int] = {"cpu": 1_000_000_000, "metal": 1_000_000_000}
BUILD_BYTES_GPU = 5_000_000_000
DEMO_BYTES = 253_000_000 + 537_000_000  # the packaged file, joined, and the checkpoint rebuilt from it
PROJECTOR_BYTES = 8  # per weight of vision and audio towers: f16, bf16 and f32 together
# A file may have more bits per weight than the type its recipe is named after: mixes, and tensors that fall back.
MIXED = 1.4
# Gemma's embedding is its output, too, which llama-quantize keeps at Q5_K or more; Q8_0 is the most.
EMBEDDING_BITS = (5.5, 8.5)
IMATRIX_SHARE = 0.02  # of the base, all parts together; measured 0.2 % a part
# llama-imatrix beside the weights, which are mapped: logits of one chunk, 512 x 262,144 x 4 bytes, and its buffers.
IMATRIX_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Check:
    """One verdict. `what` says what was found, `next_step` what to type or change when it is not ok."""

    name: str
    status: Status
    what: str
    next_step: str | None = None
    error: type[GemmaGGUFError] = BadInputError  # what a run raises when this alone fails

    def document(self) -> dict[str, str | None]:
        return {"check": self.name, "status": self.status, "what": self.what, "next_step": self.next_step}


@dataclass(frozen=True)
class Package:
    """A package of `pyproject.toml`: the versions it may have, the one it has, and the extra it belongs to."""

    name: str
    wanted: str
    installed: str | None
    fits: bool
    extra: str | None = None


@dataclass(frozen=True)
class Need:
    """Bytes that a stage adds to a place: at least `low`, at most `high` as far as can be told."""

    stage: str
    place: str  # a key of `Facts.rooms`
    low: int
    high: int


@dataclass(frozen=True)
class Room:
    """A place where files go: its nearest existing directory, the file system it lies on, and what is free there."""

    path: Path
    existing: Path
    device: int
    free: int
    writable: bool


@dataclass(frozen=True)
class Model:
    """What is known of a model before it is converted. Bytes to download, numbers of weights."""

    n_parameters: int
    n_embedding: int  # 0 when not known
    n_projector: int
    download: int
    rebuilt: bool = False  # the demo, not yet rebuilt
    n_vocab: int = 0  # 0 when not known, or when the model has no logits


@dataclass(frozen=True)
class Account:
    """What the hub says: `reached` is False when nothing answers, `name` None without a token."""

    endpoint: str
    reached: bool
    problem: str | None = None
    name: str | None = None
    role: str | None = None  # read, write, fineGrained
    writes_to: tuple[str, ...] = ()  # namespaces that a fine-grained token may write to
    orgs: tuple[str, ...] | None = None  # organisations that the account may write to; None where the hub did not say


@dataclass(frozen=True)
class KernelState:
    """The kernels as they lie in the cache. `isa` is None before their first comparison with this build's ggml."""

    lacks: tuple[str, ...] = ()  # what compiling them needs and is not installed
    compiled: bool = False
    switched_off: bool = False  # by the user
    isa: str | None = None
    types: tuple[str, ...] = ()
    off: Mapping[str, str] = field(default_factory=dict)  # type -> why ggml does its work


@dataclass(frozen=True)
class Refused:
    """Something that was tried and refused with an error of its own."""

    check: str
    error: GemmaGGUFError


@dataclass(frozen=True)
class Facts:
    """Everything that is judged. A field that was not looked at is None or empty, and is not judged."""

    python: str = ""
    packages: tuple[Package, ...] = ()
    converter_lacks: tuple[str, ...] | None = None  # None: no conversion is due
    tools: Mapping[str, str | None] = field(default_factory=dict)  # name -> path; None: not installed
    compiler: str | None = None
    built: bool = False
    backend: str = "cpu"
    backends: Mapping[str, str | None] = field(default_factory=dict)  # backend -> its compiler, None: not here
    model: Model | None = None
    wanted: tuple[Recipe, ...] = ()
    imatrix: str | None = None  # where it comes from; None: no recipe can have one
    makes_quants: bool = False
    needs: tuple[Need, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)  # recipe -> bytes at least, of files still to be made
    disk_budget: int | None = None
    eval_bytes: int = 0  # of the base's distributions; 0 when none are computed
    eval_disk_budget: int = 0
    kernels: KernelState | None = None
    rooms: Mapping[str, Room] = field(default_factory=dict)
    memory: tuple[int, int] | None = None  # bytes: installed, available
    base_bytes: int = 0  # that llama-imatrix will map; 0 when it will not run
    workers: int = 0
    worker_bytes: int = 0
    account: Account | None = None
    hub_model: bool = False
    publishes_to: str | None = None  # repository or namespace that the run will write to; "" the account's own
    refused: tuple[Refused, ...] = ()


def judge(facts: Facts) -> tuple[Check, ...]:
    """All verdicts, in the order in which a run comes to them."""
    return (
        *_python(facts),
        *_tools(facts),
        *_backends(facts),
        *_kernels(facts),
        *_given(facts),
        *_imatrix(facts),
        *_disk(facts),
        *_memory(facts),
        *_writing(facts),
        *_hub(facts),
    )


def failures(checks: Iterable[Check]) -> GemmaGGUFError | None:
    """Everything that failed as one error; the error itself when it is one thing."""
    failed = [check for check in checks if check.status == "fail"]
    if not failed:
        return None
    if len(failed) == 1:
        return failed[0].error(failed[0].what, next_step=failed[0].next_step)
    listed = "\n".join(f"  {check.name}: {check.what}" for check in failed)
    steps = [f"  {check.name}: {check.next_step}" for check in failed if check.next_step]
    return GemmaGGUFError(
        f"{len(failed)} things stand in the way:\n{listed}", next_step="\n".join(["mend these first.", *steps])
    )


# --- what a run takes ---------------------------------------------------------------------------------------------


def quant_bytes(recipe: Recipe, model: Model) -> tuple[int, int]:
    """(least, most) bytes of a recipe's file, from the type it is named after and those that override it."""
    text = model.n_parameters - model.n_projector
    bits = plan.nominal_bits(recipe.ftype)
    least, most = EMBEDDING_BITS
    everywhere = [plan.nominal_bits(kind) for option, kind in recipe.overrides if option == "--tensor-type"]
    anywhere = [plan.nominal_bits(kind) for _, kind in recipe.overrides]
    low = model.n_embedding * min([max(bits, least), *anywhere]) + (text - model.n_embedding) * min([bits, *everywhere])
    embedding = model.n_embedding or text // 3
    mixed = max([min(16.0, bits * MIXED), *everywhere])
    high = embedding * max([bits, most, *anywhere]) + (text - embedding) * mixed
    return int(low / 8), int(high / 8)


def disk_needs(
    model: Model | None,
    *,
    built: bool,
    backend: str,
    has_base: bool,
    copied_base: int,
    makes: Sequence[Recipe],
    makes_imatrix: bool,
    held: int,
    proves: bool,
    eval_bytes: int = 0,
    cuts_base: bool = False,
    split_max_size: int = shards.DEFAULT_LIMIT,
) -> tuple[Need, ...]:
    """What each stage adds. `copied_base` are the bytes of a base given on another file system, `makes` the recipes
    whose files are not there yet, `held` the bytes that unfinished files have already, `eval_bytes` those of the base's
    distributions where they are kept. `cuts_base`: the bf16 row is still to be made, which is cut where the base is
    over the split limit, and so is what the proof compares with.
    """
    needs = []
    if not built:
        n = BUILD_BYTES.get(backend, BUILD_BYTES_GPU)
        needs.append(Need("build", "cache", n, n))
    if model is None:
        return tuple(needs)
    if model.download:
        needs.append(Need("download", "hub cache", model.download, model.download))
    if model.rebuilt:
        needs.append(Need("demo checkpoint", "out", DEMO_BYTES, DEMO_BYTES))
    base = 2 * (model.n_parameters - model.n_projector)
    convert = copied_base if has_base or copied_base else base + PROJECTOR_BYTES * model.n_projector
    if convert:
        needs.append(Need("convert", "out", convert, convert))
    if makes_imatrix:
        needs.append(Need("imatrix", "out", 0, int(IMATRIX_SHARE * base)))
    if cuts_base and base > split_max_size:
        needs.append(Need("bf16 shards", "out", base, base))
    sizes = [quant_bytes(recipe, model) for recipe in makes]
    if sizes:
        low, high = (max(0, sum(size) - held) for size in zip(*sizes, strict=True))
        needs.append(Need("quantize", "out", low, high))
        if proves:
            low, high = min(low for low, _ in sizes), max(high for _, high in sizes)
            low, high = (n * (2 if n > split_max_size else 1) for n in (low, high))
            needs.append(Need("proof", "out", low, high))
    if eval_bytes:
        needs.append(Need("evaluate", "out", 0, eval_bytes))
    return tuple(needs)


def in_waves(facts: Facts) -> Facts:
    """The same facts for a set whose finished quants are taken away: the largest file must fit, not all of them."""
    largest = max(facts.sizes.values(), default=0)
    needs = [
        replace(need, low=min(need.low, largest), high=min(need.low, largest)) if need.stage == "quantize" else need
        for need in facts.needs
    ]
    sizes = {name: n_bytes for name, n_bytes in facts.sizes.items() if n_bytes == largest}
    return replace(facts, needs=tuple(needs), sizes=dict([*sizes.items()][:1]))


# --- verdicts -----------------------------------------------------------------------------------------------------


def _python(facts: Facts) -> Iterable[Check]:
    if facts.python:
        yield Check("python", "ok", facts.python)
    if facts.packages:
        core = [package for package in facts.packages if not package.fits and package.extra is None]
        other = [package for package in facts.packages if not package.fits and package.installed and package.extra]
        if core or other:
            listed = ", ".join(f"{p.name} {p.installed or 'missing'} (wanted: {p.wanted})" for p in (*core, *other))
            extras = sorted({str(package.extra) for package in other})
            name = f"gemma-gguf[{','.join(extras)}]" if extras else "gemma-gguf"
            yield Check("packages", "warn", listed, f"pip install --upgrade '{name}'")
        else:
            yield Check(
                "packages", "ok", f"{sum(1 for p in facts.packages if p.installed)} as pyproject.toml pins them"
            )
    if facts.converter_lacks:
        yield Check(
            "converter",
            "fail",
            f"the converter needs {', '.join(facts.converter_lacks)}",
            "pip install 'gemma-gguf[convert]'",
            MissingToolError,
        )
    elif facts.packages and facts.converter_lacks is not None:
        versions = ", ".join(f"{p.name} {p.installed}" for p in facts.packages if p.extra == "convert" and p.installed)
        yield Check("converter", "ok", versions)


def _tools(facts: Facts) -> Iterable[Check]:
    if facts.built:
        yield Check("tools", "ok", "llama.cpp is built already")
        return
    if not facts.tools and facts.compiler is None:
        return
    missing = [name for name, path in facts.tools.items() if path is None]
    steps = []
    if facts.compiler is None:
        missing.insert(0, "a C++ compiler")
        steps.append("Install a compiler: apt install g++, dnf install gcc-c++, or xcode-select --install.")
    if {"cmake", "ninja"} & set(missing):
        steps.append("pip install 'gemma-gguf[build]'")
    if "git" in missing:
        steps.append("Install git, or use --llama-cpp pypi:<version>.")
    if missing:
        what = f"building llama.cpp needs {', '.join(missing)}"
        yield Check("tools", "fail", what, " ".join(steps), MissingToolError)
    else:
        yield Check("tools", "ok", ", ".join([str(facts.compiler), *facts.tools]))


def _backends(facts: Facts) -> Iterable[Check]:
    if not facts.backends:
        return
    here = [f"{name} ({path})" for name, path in facts.backends.items() if path is not None]
    wanted = facts.backends.get(facts.backend, "always")
    if wanted is None and not facts.built:
        yield Check(
            "backends",
            "fail",
            f"--backend {facts.backend} needs {BACKEND_TOOLS[facts.backend]}, which is not installed",
            f"Install {BACKEND_TOOLS[facts.backend]}, or use --backend cpu.",
            MissingToolError,
        )
    else:
        yield Check("backends", "ok", ", ".join(["cpu", *here]))


# What compiles for a backend; Metal's is part of Apple's system.
BACKEND_TOOLS: Mapping[str, str] = {
    "cuda": "nvcc",
    "hip": "hipcc",
    "vulkan": "glslc",
    "metal": "macOS",
    "sycl": "icpx",
}


def _kernels(facts: Facts) -> Iterable[Check]:
    state = facts.kernels
    if state is None:
        return
    if state.switched_off:
        yield Check("kernels", "ok", "switched off with --kernels ggml: ggml quantises, several times slower")
    elif not state.compiled and state.lacks:
        what = f"compiling them needs {', '.join(state.lacks)}: ggml quantises, several times slower"
        step = "Install a C++ compiler, and: pip install 'gemma-gguf[build]'"
        yield Check("kernels", "warn", what, step)
    elif not state.compiled:
        yield Check("kernels", "ok", "not compiled yet; the first run, or `gemma-gguf build`, does it")
    elif state.isa is None:
        yield Check("kernels", "ok", "compiled; the first run compares them with this build's ggml")
    elif not state.types and not state.off:
        yield Check("kernels", "ok", "compiled; none is for this CPU (AVX2 or AVX-512): ggml quantises")
    else:
        approved = f"{state.isa}, {len(state.types)} types: {', '.join(state.types)}" if state.types else state.isa
        if state.off:
            listed = "; ".join(f"{name}: {why}" for name, why in state.off.items())
            step = "The files are the same, and take longer; after an update of gemma-gguf or the compiler look again."
            yield Check("kernels", "warn", f"{approved}. Switched off, ggml quantises: {listed}", step)
        else:
            yield Check("kernels", "ok", approved)


def _given(facts: Facts) -> Iterable[Check]:
    """What was tried and refused, and the model when it was looked at and found good."""
    seen: set[str] = set()
    for refused in facts.refused:
        seen.add(refused.check)
        yield Check(refused.check, "fail", refused.error.what, refused.error.next_step, type(refused.error))
    if facts.model is not None and "model" not in seen:
        yield Check("model", "ok", f"{facts.model.n_parameters:,} parameters")
    if facts.wanted and "recipes" not in seen:
        yield Check("recipes", "ok", ", ".join(recipe.name for recipe in facts.wanted))


def _imatrix(facts: Facts) -> Iterable[Check]:
    if not facts.makes_quants:
        return
    if facts.imatrix is not None:
        yield Check("imatrix", "ok", facts.imatrix)
        return
    need = [recipe.name for recipe in facts.wanted if recipe.needs_imatrix]
    explained = {"calibration", "--imatrix"} & {refused.check for refused in facts.refused}
    if need:
        yield Check(
            "imatrix",
            "warn" if explained else "fail",  # said once is enough to stop a run
            f"no imatrix can be made or read, and {', '.join(need)} cannot be made without one",
            "Give --imatrix FILE or a calibration text that is there.",
        )


def _disk(facts: Facts) -> Iterable[Check]:
    """One verdict per file system, as places may share one."""
    by_device: dict[int, list[Need]] = {}
    for need in facts.needs:
        if need.place in facts.rooms:
            by_device.setdefault(facts.rooms[need.place].device, []).append(need)
    for device, all_needs in by_device.items():
        rooms = {name: room for name, room in facts.rooms.items() if room.device == device}
        places = {need.place for need in all_needs}
        where = ", ".join(sorted({str(rooms[name].path) for name in places}))
        free = min(room.free for room in rooms.values())
        needs, unkept = _with_or_without_evaluation(all_needs, free)
        low, high = sum(need.low for need in needs), _peak(needs)
        parts = ", ".join(f"{need.stage} {_about(need)}" for need in needs)
        what = f"{_range(low, high)} bytes at the peak in {where} ({parts}); {free:,} are free"
        if low > free:
            others = low - sum(facts.sizes.values()) if any(n.stage == "quantize" for n in needs) else low
            fit = plan.that_fit(facts.sizes, free - others) if facts.sizes else []
            fewer = f", or make fewer: --recipes {','.join(fit)}" if fit else ""
            elsewhere = " another place with --out" if "out" in places else " another cache with GEMMA_GGUF_CACHE"
            yield Check(
                "disk",
                "fail",
                f"{what}: {low - free:,} are missing",
                f"Make room, choose{elsewhere}{fewer}.",
                DiskError,
            )
        elif high > free:
            step = "It may not fit; what is needed is known exactly before the imatrix is computed, and refused then."
            yield Check("disk", "warn", what, step)
        else:
            yield Check("disk", "ok", what)
        if unkept and low <= free:
            yield Check(
                "evaluation",
                "warn",
                f"the base's distributions, up to {facts.eval_bytes:,} bytes, may not fit beside the set: "
                "then the base runs again beside every file",
                "Make room, or measure on less text: --eval-chunks N.",
            )
    if facts.eval_bytes > facts.eval_disk_budget:
        yield Check(
            "evaluation",
            "warn",
            f"the base's distributions take up to {facts.eval_bytes:,} bytes, --eval-disk-budget allows "
            f"{facts.eval_disk_budget:,}: the base may run again beside every file",
            "Allow more, or measure on less text: --eval-chunks N.",
        )
    total = sum(facts.sizes.values())
    if facts.disk_budget is not None and total > facts.disk_budget:
        fit = plan.that_fit(facts.sizes, facts.disk_budget)
        yield Check(
            "disk budget",
            "fail",
            f"the set needs at least {total:,} bytes, --disk-budget allows {facts.disk_budget:,}: "
            f"{total - facts.disk_budget:,} are missing",
            f"Make fewer: --recipes {','.join(fit)}" if fit else "Allow more.",
        )


def _peak(needs: Sequence[Need]) -> int:
    """Bytes at most; the file of the proof has gone when the evaluation begins."""
    high = {need.stage: need.high for need in needs}
    return sum(high.values()) - min(high.get("proof", 0), high.get("evaluate", 0))


def _with_or_without_evaluation(needs: Sequence[Need], free: int) -> tuple[list[Need], bool]:
    """(the needs that count, whether the base's distributions are left out): those are kept where there is room."""
    others = [need for need in needs if need.stage != "evaluate"]
    if len(others) == len(needs):
        return others, False
    kept = sum(need.high for need in needs if need.stage != "proof") + FREE_RESERVE <= free
    return (list(needs), False) if kept else (others, True)


def _about(need: Need) -> str:
    return _range(need.low, need.high)


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _memory(facts: Facts) -> Iterable[Check]:
    if facts.memory is None:
        return
    installed, available = facts.memory
    problems: list[tuple[Status, str, str]] = []
    if facts.base_bytes:
        if installed < IMATRIX_BYTES:
            problems.append(
                (
                    "fail",
                    f"llama-imatrix needs about {IMATRIX_BYTES:,} bytes beside the weights, "
                    f"{installed:,} are installed",
                    "Use a machine with more memory, or --imatrix FILE.",
                )
            )
        elif available < IMATRIX_BYTES + facts.base_bytes:
            problems.append(
                (
                    "warn",
                    f"llama-imatrix works on {facts.base_bytes:,} bytes of weights and {IMATRIX_BYTES:,} of its own, "
                    f"{available:,} are available: the weights will be read again and again",
                    "Close other programs, or compute the imatrix on a larger machine: --imatrix FILE.",
                )
            )
    workers = facts.workers * facts.worker_bytes
    if workers > available:
        problems.append(
            (
                "warn",
                f"{facts.workers} workers take about {workers:,} bytes, {available:,} are available",
                "Start fewer: --jobs N, or --max-memory SIZE.",
            )
        )
    for status, what, step in problems:
        yield Check("memory", status, what, step)
    if not problems:
        yield Check("memory", "ok", f"{available:,} bytes available of {installed:,}")


def _writing(facts: Facts) -> Iterable[Check]:
    closed = [room for room in facts.rooms.values() if not room.writable]
    for room in closed:
        is_out = room is facts.rooms.get("out")
        yield Check(
            "writing",
            "fail",
            f"cannot write in {room.existing}, where {room.path} belongs",
            "Choose another place with --out." if is_out else "Choose another cache with GEMMA_GGUF_CACHE or HF_HOME.",
            GemmaGGUFError,
        )
    if facts.rooms and not closed:
        yield Check("writing", "ok", ", ".join(sorted({str(room.path) for room in facts.rooms.values()})))


TOKEN_STEP = "Make a token with write access at huggingface.co/settings/tokens, then: hf auth login"


def cannot_write(account: Account, repo: str = "") -> str | None:
    """Why nothing can be published to a repository (or with "" to any) with this account's token; None when it can."""
    namespace = repo.partition("/")[0]
    if account.name is None:
        return account.problem or "no token: nothing can be published, and gated models cannot be read"
    if account.role == "fineGrained" and account.writes_to:
        if not repo or {repo, namespace} & set(account.writes_to):
            return None
        return f"the token of {account.name} may write to {', '.join(account.writes_to)}, not to {repo}"
    if account.role != "write":
        return f"the token of {account.name} may only read ({account.role}): nothing can be published with it"
    if repo and account.orgs is not None and namespace not in (account.name, *account.orgs):
        return f"{account.name} may not write to {namespace}: the account is no member of it, or may only read there"
    return None


def _hub(facts: Facts) -> Iterable[Check]:
    account = facts.account
    if account is None:
        return
    publishes = facts.publishes_to is not None
    if not account.reached:
        needed = "" if facts.hub_model or publishes else "; only a MODEL on the hub and uploads need it"
        yield Check(
            "hub",
            "fail" if facts.hub_model or publishes else "warn",
            f"{account.endpoint} cannot be reached ({account.problem}){needed}",
            "Check the network; HF_ENDPOINT names another server.",
            GemmaGGUFError,
        )
        return
    yield Check("hub", "ok", f"{account.endpoint} answers" + (f", as {account.name}" if account.name else ""))
    problem = cannot_write(account, facts.publishes_to or "")
    if problem is not None:
        step = "hf auth login" if account.name is None else TOKEN_STEP
        yield Check("publishing", "fail" if publishes else "warn", problem, step, BadInputError)
    elif account.role == "write":
        yield Check("publishing", "ok", f"the token of {account.name} may write")
    else:
        yield Check("publishing", "ok", f"the token of {account.name} may write to {', '.join(account.writes_to)}")
