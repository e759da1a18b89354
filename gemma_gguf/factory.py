"""The order of the stages: the only file that knows it.

Consumes `Options`, produces a quant set: a directory that is exactly what the Hub repository will hold, and a
`Report` of what was done or why it was not. A stage is skipped when the hash of its inputs, arguments and tool build
is the one the manifest holds and its outputs are there and whole. Stages never call each other; they get values from
here and return values to here.
"""

import contextlib
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import gemma_gguf
from gemma_gguf import (
    calibration,
    card,
    convert,
    fanout,
    gguf_io,
    imatrix,
    llama_cpp,
    manifest,
    plan,
    quantize,
    recipes,
    source,
    tasks,
    verify,
)
from gemma_gguf.errors import BadInputError, VerificationError
from gemma_gguf.files import (
    HashMemory,
    copy,
    link_or_copy,
    locked,
    partial_path,
    replace_durably,
    sha256_file,
    sha256_json,
    write_atomic,
)
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.manifest import BuildFacts, CalibrationFacts, FileEntry, ImatrixFacts, Manifest, StageRecord
from gemma_gguf.plan import FilePlan
from gemma_gguf.progress import Progress, silent
from gemma_gguf.recipes import Recipe

STAGES = ("convert", "imatrix", "quantize", "card")
WORK = ".work"


@dataclass(frozen=True)
class Options:
    """What a run was asked for. `None` means the default that the command line's help names."""

    model: str
    name: str | None = None
    out: Path = Path("out")
    recipes: tuple[str, ...] = recipes.DEFAULT_NAMES
    llama_cpp: str = llama_cpp.DEFAULT_SPEC
    backend: str = "cpu"
    cmake_args: tuple[str, ...] = ()
    calibration: str = "default"
    chunks: int | None = None
    threads: int | None = None
    gpu_layers: int = 0
    imatrix: Path | None = None
    base: Path | None = None
    engine: str = "fanout"
    jobs: int | None = None
    scheduler: str | None = None  # address of a Dask scheduler
    max_memory: int = fanout.MAX_MEMORY  # bytes, of all fan-out workers together
    disk_budget: int | None = None  # bytes
    proof: bool = True  # make one small recipe with llama-quantize, too, and compare
    until: str = "card"
    rehash: bool = False
    wait: bool = False
    templates: Path | None = None


@dataclass(frozen=True)
class Done:
    """One thing a run did or found done. `why` says why it was made, or why it was not."""

    stage: str
    name: str
    made: bool
    why: str
    seconds: float
    n_bytes: int | None = None


@dataclass
class Report:
    """What a run did, in order."""

    set_dir: Path
    log: Path
    engine: str
    done: list[Done] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class _Run:
    """The state of one run: where it works, with what, and what it knows by now."""

    options: Options
    build: Build
    source: source.Source
    set_dir: Path
    work: Path
    log: RunLog
    memory: HashMemory
    report: Report
    progress: Progress
    say: Callable[[Done], None]
    manifest: Manifest

    @property
    def stem(self) -> str:
        return self.source.name.stem

    @property
    def base(self) -> Path:
        return self.work / convert.base_name(self.stem)

    def did(self, done: Done) -> None:
        self.report.done.append(done)
        self.say(done)

    def record(self, new: Manifest) -> None:
        self.manifest = new
        manifest.save(new, self.set_dir)


def run(options: Options, *, progress: Progress = silent, say: Callable[[Done], None] = lambda _: None) -> Report:
    """Make a quant set, or what is missing of it, up to the stage `options.until`.

    `say` is called with everything that was done or skipped, as it happens. Raises `GemmaGGUFError` subclasses; what
    was finished by then stays, and the same call goes on from there.
    """
    started = time.monotonic()
    _check_given(options)
    name = source.understand(options.model, options.name)
    if options.until not in STAGES:
        raise BadInputError(f"unknown stage {options.until!r}", next_step=f"Choose one of: {', '.join(STAGES)}.")
    # Before anything is built: a name that no llama.cpp knows.
    recipes.select(
        options.recipes, dict.fromkeys([*quantize.KNOWN_FTYPES, *(r.ftype for r in recipes.TABLE.values())], "")
    )
    with _started(options, name, progress, say) as state:
        for stage, function in (("convert", _convert), ("imatrix", _imatrix), ("quantize", _quantize), ("card", _card)):
            function(state)
            if stage == options.until:
                break
        state.report.seconds = time.monotonic() - started
        return state.report


def _check_given(options: Options) -> None:
    """What the user names must be there, before anything is built or downloaded."""
    for option, path in (("--base", options.base), ("--imatrix", options.imatrix)):
        if path is not None and not path.is_file():
            raise BadInputError(f"there is no file {path}", next_step=f"Give {option} the path of a GGUF file.")
    if options.imatrix is None and options.until != "convert":
        calibration.load(options.calibration, llama_cpp.cache_dir() / "calibration")
    if options.scheduler is not None:
        fanout.dask_workers(options.scheduler)  # it answers


@contextlib.contextmanager
def _started(
    options: Options, name: source.ModelName, progress: Progress, say: Callable[[Done], None]
) -> Iterator[_Run]:
    """Build, checkpoint, lock, log and manifest: what every stage needs."""
    started = time.monotonic()
    build = llama_cpp.build(
        options.llama_cpp,
        backend=options.backend,
        extra_cmake_args=options.cmake_args,
        wait=options.wait,
        progress=progress,
    )
    out = options.out.resolve()
    set_dir, work = out / f"{name.stem}-GGUF", out / WORK / name.stem
    log_path = work / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}.log"
    with locked(work, f"the set {name.stem}", wait=options.wait), contextlib.closing(RunLog(log_path)) as log:
        llama_cpp.end_leftovers(log)
        memory = HashMemory(work / "hashes.json", rehash=options.rehash)
        found = source.fetch(name, work, memory, progress)
        state = _Run(
            options=options,
            build=build,
            source=found,
            set_dir=set_dir,
            work=work,
            log=log,
            memory=memory,
            report=Report(set_dir, log_path, options.engine),
            progress=progress,
            say=say,
            manifest=_manifest(set_dir, name, build, found),
        )
        set_dir.mkdir(parents=True, exist_ok=True)
        took = time.monotonic() - started
        state.did(Done("build", f"llama.cpp {build.version} ({build.commit[:9]})", False, f"ready, {took:.0f} s", took))
        try:
            yield state
        finally:
            memory.save()


def _manifest(set_dir: Path, name: source.ModelName, build: Build, found: source.Source) -> Manifest:
    """The set's manifest with this run's facts, files and stages of earlier runs kept."""
    facts = {
        "tool_version": gemma_gguf.__version__,
        "stem": name.stem,
        "model": found.facts,
        "llama_cpp": _build_facts(build),
    }
    if (set_dir / manifest.FILE_NAME).exists():
        old = manifest.load(set_dir)
        # A manifest never names a file that is not there.
        return old.model_copy(update={**facts, "files": [e for e in old.files if (set_dir / e.name).is_file()]})
    return Manifest(
        schema_version=manifest.SCHEMA_VERSION,
        calibration=None,
        imatrix=None,
        stages={},
        files=[],
        **facts,  # type: ignore[arg-type]
    )


def _build_facts(build: Build) -> BuildFacts:
    # A directory's path is this machine's business; its name and hash are what others can use.
    kind, _, place = build.source.partition(":")
    return BuildFacts(
        source=f"dir:{Path(place).name}" if kind == "dir" else build.source,
        source_sha256=build.source_sha256,
        version=build.version,
        build_number=build.build_number,
        commit=build.commit,
        backend=build.backend,
        compiler=build.compiler,
        cmake_args=[*build.cmake_args, llama_cpp.GGML_BASE_OPTIONS],
        key=build.key,
    )


def _stage_is_done(state: _Run, stage: str, key: str) -> str | None:
    """None when the stage must run, else why it need not: its key and its outputs are those of the manifest."""
    record = state.manifest.stages.get(stage)
    if record is None or record.key != key:
        return None
    for name, digest in record.outputs.items():
        path = _place(state, name)
        if not path.is_file() or state.memory.sha256(path) != digest:
            return None
    return "inputs, arguments and build unchanged, outputs whole"


def _place(state: _Run, name: str) -> Path:
    inside = name.removeprefix(f"{WORK}/")
    return state.work / inside if inside != name else state.set_dir / name


def _why_again(state: _Run, stage: str, key: str) -> str:
    record = state.manifest.stages.get(stage)
    if record is None:
        return "not made yet"
    return "inputs, arguments or build changed" if record.key != key else "an output is missing or changed"


@contextlib.contextmanager
def _partial_cleanup(path: Path) -> Iterator[None]:
    """A file that fails its checks is not left behind."""
    try:
        yield
    except VerificationError:
        path.unlink(missing_ok=True)
        raise


# --- convert -----------------------------------------------------------------------------------------------------


def _convert(state: _Run) -> None:
    """The base into the work directory, projectors into the set."""
    options = state.options
    if options.base is not None:
        _given_base(state, options.base)
        return
    key = sha256_json(["convert", dict(state.source.files), state.source.name.model, state.build.key])
    bf16_row = state.set_dir / convert.base_name(state.stem)
    record = state.manifest.stages.get("convert")
    # The work directory can be deleted at any time: the bf16 row is the same file.
    if not state.base.exists() and bf16_row.exists() and record is not None and record.key == key:
        link_or_copy(bf16_row, state.base)
    if (why := _stage_is_done(state, "convert", key)) is not None:
        state.did(Done("convert", "base", False, why, 0.0, state.base.stat().st_size))
        return
    why = _why_again(state, "convert", key)
    started = time.monotonic()
    made = convert.convert(state.source, state.build, state.work, log=state.log, progress=state.progress)
    outputs: dict[str, str] = {}
    new = state.manifest
    for output in made:
        with _partial_cleanup(output.partial):
            verify.check_finite(output.header)
            text = _probe_text(state) if output is made[0] else None
            checks = verify.check_file(output.partial, None, build=state.build, text=text, log=state.log)
        is_base = output is made[0]
        final = state.base if is_base else state.set_dir / output.final_name
        replace_durably(output.partial, final)
        digest = state.memory.sha256(final)
        outputs[f"{WORK}/{final.name}" if is_base else final.name] = digest
        if not is_base:
            new = new.with_file(
                _entry(
                    state,
                    final,
                    kind="mmproj",
                    recipe=None,
                    key=key,
                    argv=output.argv,
                    seconds=output.seconds,
                    checks=checks,
                )
            )
        state.did(Done("convert", output.final_name, True, why, output.seconds, final.stat().st_size))
    argv = [list(output.argv) for output in made]
    seconds = round(time.monotonic() - started, 2)
    state.record(new.with_stage("convert", StageRecord(key=key, argv=argv, seconds=seconds, outputs=outputs)))


def _given_base(state: _Run, base: Path) -> None:
    """Use the user's own base: a GGUF in BF16, F16 or F32 of the model's architecture."""
    header = gguf_io.read_header(base)
    arch = header.get("general.architecture")
    if arch != state.source.facts.gguf_arch:
        raise BadInputError(
            f"{base} is a {arch} model, {state.options.model} is {state.source.facts.gguf_arch}",
            next_step="Give the base of this very model, or leave --base out.",
        )
    quantized = set(header.type_histogram()) - {"F32", "F16", "BF16"}
    if quantized:
        raise BadInputError(
            f"{base} is quantised already ({', '.join(sorted(quantized))}); quants of quants are not made here",
            next_step="Give a BF16, F16 or F32 file.",
        )
    verify.check_finite(header)
    verify.check_file(base, None, build=state.build, text=_probe_text(state), log=state.log)
    key = sha256_json(["base", state.memory.sha256(base)])
    if _stage_is_done(state, "convert", key) is None:
        link_or_copy(base.resolve(), state.base)
        outputs = {f"{WORK}/{state.base.name}": state.memory.sha256(state.base)}
        state.record(state.manifest.with_stage("convert", StageRecord(key=key, argv=[], seconds=0.0, outputs=outputs)))
    state.did(Done("convert", state.base.name, False, "given with --base", 0.0, base.stat().st_size))


def _probe_text(state: _Run) -> Path:
    """The held-out text as a file: what a model reads when it is checked that it loads."""
    path = state.work / "heldout.txt"
    if not path.exists():
        write_atomic(path, calibration.held_out().data)
    return path


# --- imatrix -----------------------------------------------------------------------------------------------------


def _imatrix(state: _Run) -> None:
    options = state.options
    final = state.set_dir / imatrix.file_name(state.stem)
    base_sha = state.memory.sha256(state.base)
    header = gguf_io.read_header(state.base)
    needed = _needs_imatrix(state, header)
    if options.imatrix is not None:
        _given_imatrix(state, options.imatrix, final, header=header, needed=needed, base_sha=base_sha)
        return
    text = calibration.load(options.calibration, llama_cpp.cache_dir() / "calibration")
    # The number of threads changes no byte of the result, but who gives it wants it recorded, not recomputed.
    key = sha256_json(
        ["imatrix", base_sha, text.sha256, text.file_name, options.chunks, options.gpu_layers, state.build.key]
    )
    if (why := _stage_is_done(state, "imatrix", key)) is not None:
        state.did(Done("imatrix", final.name, False, why, 0.0, final.stat().st_size))
        return
    why = _why_again(state, "imatrix", key)
    text_path = state.work / text.file_name
    write_atomic(text_path, text.data)
    n_chunks: int | None = None
    if state.build.bindings is not None:
        answer = llama_cpp.ask_bindings(state.build, "tokens", state.base, text_path, state.log)
        n_chunks = int(answer["n_tokens"]) // imatrix.CHUNK_TOKENS
        if n_chunks < 2:
            raise BadInputError(
                f"the calibration text {text.name} has only {answer['n_tokens']} tokens",
                next_step=f"Give at least {2 * imatrix.CHUNK_TOKENS} tokens; some 100 kB of text are usual.",
            )
        n_chunks = min(n_chunks, options.chunks or n_chunks)

    def argv_of(first: int, count: int | None, continue_from: str | None, out: str) -> list[str]:
        return imatrix.imatrix_argv(
            state.build,
            state.base.name,
            text.file_name,
            out,
            first_chunk=first,
            chunks=options.chunks if count is None else count,
            continue_from=continue_from,
            threads=options.threads,
            gpu_layers=options.gpu_layers,
        )

    parts = state.work / f"imatrix-{key[:16]}"
    computed, seen, seconds = imatrix.compute(
        argv_of, n_chunks=n_chunks, directory=parts, cwd=state.work, log=state.log, progress=state.progress
    )
    try:
        made = imatrix.read(computed)
        imatrix.check(made, header, needed, n_chunks=n_chunks or seen)
    except (BadInputError, VerificationError):
        shutil.rmtree(parts)  # so that the same command computes it again
        raise
    replace_durably(computed, final)
    shutil.rmtree(parts)
    facts = CalibrationFacts(name=text.name, source=text.source, n_bytes=len(text.data), sha256=text.sha256)
    argv = argv_of(0, options.chunks, None, final.name)
    _record_imatrix(state, final, made, key=key, argv=argv, seconds=seconds, text=facts)
    state.did(Done("imatrix", final.name, True, why, seconds, final.stat().st_size))


def _given_imatrix(
    state: _Run, given: Path, final: Path, *, header: gguf_io.Header, needed: Sequence[str], base_sha: str
) -> None:
    """Use the user's own imatrix after the same checks."""
    made = imatrix.read(given)
    imatrix.check(made, header, needed)
    key = sha256_json(["imatrix", base_sha, state.memory.sha256(given)])
    if _stage_is_done(state, "imatrix", key) is None:
        partial = partial_path(final, state.work)
        # The name of the text ends in a key of every file: without the directories of the machine it was made on.
        datasets = [PureWindowsPath(name).name if "\\" in name else Path(name).name for name in made.datasets]
        if datasets == list(made.datasets):
            copy(given, partial)
        else:
            renamed = {"imatrix.datasets": gguf_io.strings_value(datasets)}
            gguf_io.write_with_values(gguf_io.read_header(given), partial, renamed)
        made = replace(made, datasets=tuple(datasets))
        replace_durably(partial, final)
        _record_imatrix(state, final, made, key=key, argv=[], seconds=0.0, text=None)
    state.did(Done("imatrix", final.name, False, "given with --imatrix", 0.0, final.stat().st_size))


def _record_imatrix(
    state: _Run,
    final: Path,
    made: imatrix.Imatrix,
    *,
    key: str,
    argv: Sequence[str],
    seconds: float,
    text: CalibrationFacts | None,
) -> None:
    entry = _entry(state, final, kind="imatrix", recipe=None, key=key, argv=argv, seconds=seconds, checks=None)
    new = state.manifest.with_file(entry)
    new = new.model_copy(
        update={
            "calibration": text,
            "imatrix": ImatrixFacts(
                n_chunks=made.n_chunks,
                chunk_size=made.chunk_size,
                n_entries=len(made.entries),
                datasets=list(made.datasets),
            ),
        }
    )
    stage = StageRecord(
        key=key, argv=[entry.argv] if argv else [], seconds=round(seconds, 2), outputs={final.name: entry.sha256}
    )
    state.record(new.with_stage("imatrix", stage))


def _needs_imatrix(state: _Run, header: gguf_io.Header) -> list[str]:
    """Tensors of the blocks that llama-quantize will quantise: all of them must have data.

    One recipe is asked for, without an imatrix: both change types, not which tensors are quantised. Embeddings and
    output are quantised without one by llama.cpp's own rule.
    """
    recipe = next((recipe for recipe in _wanted(state) if not recipe.is_base), None)
    if recipe is None:
        return []
    asked = _plan(state, recipe, header, with_imatrix=False)
    # The last layers of some Gemmas take keys and values from earlier ones; llama.cpp never reads their own.
    arch, counts = header.get("general.architecture"), {}
    for key in ("block_count", "attention.shared_kv_layers"):
        counts[key] = header.get(f"{arch}.{key}") or 0
    unused = {
        f"blk.{layer}.{name}.weight"
        for layer in range(counts["block_count"] - counts["attention.shared_kv_layers"], counts["block_count"])
        for name in ("attn_k", "attn_v")
    }
    quantised = [tensor.name for tensor in asked.tensors if tensor.is_quantized and tensor.name.startswith("blk.")]
    return [name for name in quantised if name not in unused]


# --- quantize ----------------------------------------------------------------------------------------------------


def _wanted(state: _Run) -> tuple[Recipe, ...]:
    return recipes.select(state.options.recipes, quantize.offered_ftypes(state.build, state.log))


def _plan(state: _Run, recipe: Recipe, header: gguf_io.Header, *, with_imatrix: bool) -> FilePlan:
    return quantize.plan_recipe(
        state.build,
        recipe,
        f"../{WORK}/{state.stem}/{state.base.name}",
        imatrix=imatrix.file_name(state.stem) if with_imatrix else None,
        n_tensors=len(header.tensors),
        cwd=state.set_dir,
        log=state.log,
    )


def _quantize(state: _Run) -> None:
    header = gguf_io.read_header(state.base)
    base_sha = state.memory.sha256(state.base)
    imatrix_sha = state.memory.sha256(state.set_dir / imatrix.file_name(state.stem))
    wanted = _wanted(state)
    todo: list[tuple[Recipe, str, str]] = []
    for recipe in wanted:
        name = _file_name(state, recipe)
        key = _quant_key(state, recipe, base_sha, imatrix_sha)
        entry = state.manifest.file(name)
        path = state.set_dir / name
        if entry is not None and entry.key == key and path.is_file() and state.memory.sha256(path) == entry.sha256:
            why = "inputs, recipe and build unchanged, file whole"
            state.did(Done("quantize", name, False, why, 0.0, entry.n_bytes))
        else:
            reason = "not made yet" if entry is None else "changed inputs, recipe or build"
            if entry is not None and entry.key == key:
                reason = "file missing or changed"
            todo.append((recipe, key, reason))
    _drop_stale(state, base_sha, imatrix_sha, {recipe.name for recipe in wanted})
    plans: dict[str, FilePlan] = {}
    parents = {recipes.TABLE[recipe.parent] for recipe, _, _ in todo if recipe.parent}
    to_plan = {*(recipe for recipe, _, _ in todo if not recipe.is_base), *parents}
    for done, recipe in enumerate(sorted(to_plan, key=lambda recipe: recipe.name)):
        state.progress("planning", done, len(to_plan), "recipes")
        plans[recipe.name] = _plan(state, recipe, header, with_imatrix=True)
    for recipe, key, reason in todo:
        if recipe.is_base:
            _link_base_row(state, recipe, key, reason)
    made = [_Todo(recipe, key, reason, plans) for recipe, key, reason in todo if not recipe.is_base]
    if made and state.options.engine == "fanout":
        inputs = sha256_json([base_sha, imatrix_sha, state.build.key])
        _fan_out(state, header, made, inputs, _speeds(state, [item.plan for item in made]))
    else:
        for item in made:
            _loop_once(state, item)
    if state.options.proof:
        _prove(state, again=bool(made))


def _quant_key(state: _Run, recipe: Recipe, base_sha: str, imatrix_sha: str) -> str:
    """Hash of everything a quant's bytes depend on."""
    return sha256_json(["quantize", base_sha, imatrix_sha, recipe.ftype, list(recipe.flags), state.build.key])


def _drop_stale(state: _Run, base_sha: str, imatrix_sha: str, wanted: set[str]) -> None:
    """Quants of an earlier run, of another base, imatrix or build, are no part of the set that this run describes.

    They stay on the disk, and `verify` names them, until they are made again or deleted.
    """
    kept: list[FileEntry] = []
    for entry in state.manifest.files:
        recipe = recipes.TABLE.get(entry.recipe or "")
        stale = recipe is not None and recipe.name not in wanted
        if stale and recipe is not None and entry.key != _quant_key(state, recipe, base_sha, imatrix_sha):
            why = "made from another base, imatrix or build: left out of the set"
            state.did(Done("quantize", entry.name, False, why, 0.0))
        else:
            kept.append(entry)
    if len(kept) < len(state.manifest.files):
        state.record(state.manifest.model_copy(update={"files": kept}))


@dataclass(frozen=True)
class _Todo:
    """One quant to be made: its recipe, its key, why it is made, and the plans of all recipes."""

    recipe: Recipe
    key: str
    why: str
    plans: Mapping[str, FilePlan]

    @property
    def plan(self) -> FilePlan:
        return self.plans[self.recipe.name]


def _file_name(state: _Run, recipe: Recipe) -> str:
    return f"{state.stem}-{recipe.name}.gguf"


def _link_base_row(state: _Run, recipe: Recipe, key: str, why: str) -> None:
    """The bf16 row is the converter's output as it is, so a link is enough."""
    started = time.monotonic()
    final = state.set_dir / _file_name(state, recipe)
    checks = verify.check_file(state.base, None, build=state.build, text=_probe_text(state), log=state.log)
    link_or_copy(state.base, final)
    entry = _entry(
        state, final, kind="model", recipe=recipe, key=key, argv=[], seconds=0.0, checks=checks, engine="convert"
    )
    state.record(state.manifest.with_file(entry))
    state.did(Done("quantize", final.name, True, why, time.monotonic() - started, entry.n_bytes))


def _reference_argv(build: Build, stem: str, recipe: Recipe, out: Path, threads: int | None) -> list[str]:
    """The command line that makes a file of a set with llama-quantize, run in the set's directory.

    The base lies in the work directory; it is named by a relative path, so no key tells of this machine.
    """
    return quantize.quantize_argv(
        build,
        recipe,
        f"../{WORK}/{stem}/{convert.base_name(stem)}",
        f"../{WORK}/{stem}/{out.name}",
        imatrix=imatrix.file_name(stem),
        threads=threads,
    )


def _loop_once(state: _Run, item: _Todo) -> None:
    """Make one file with llama-quantize."""
    partial = partial_path(state.set_dir / _file_name(state, item.recipe), state.work)
    argv = _reference_argv(state.build, state.stem, item.recipe, partial, state.options.threads)
    run = quantize.run_llama_quantize(
        argv, f"quantising {item.recipe.name}", cwd=state.set_dir, log=state.log, progress=state.progress
    )
    _accept(state, item, partial, argv, run.seconds)


def _accept(state: _Run, item: _Todo, partial: Path, argv: Sequence[str], seconds: float) -> None:
    """Verify a finished partial file, give it its name, and record it."""
    started = time.monotonic()
    final = state.set_dir / _file_name(state, item.recipe)
    with _partial_cleanup(partial):
        checks = verify.check_file(partial, item.plan, build=state.build, text=_probe_text(state), log=state.log)
    entry = _entry(
        state, partial, kind="model", recipe=item.recipe, key=item.key, argv=argv, seconds=seconds, checks=checks
    ).model_copy(
        update={
            "name": final.name,
            "fallbacks": item.plan.fallbacks,
            "differs": item.plan.differs_from(item.plans[item.recipe.parent]) if item.recipe.parent else [],
        }
    )
    replace_durably(partial, final)
    state.memory.moved(partial, final)
    state.record(state.manifest.with_file(entry))
    took = seconds + time.monotonic() - started
    state.did(Done("quantize", final.name, True, item.why, took, entry.n_bytes))


def _fan_out(
    state: _Run, header: gguf_io.Header, made: Sequence[_Todo], inputs: str, speeds: Mapping[str, float]
) -> None:
    """Make all files at once; each is verified and named as soon as its bytes are whole."""
    started = time.monotonic()
    options = state.options
    imatrix_path = state.set_dir / imatrix.file_name(state.stem)
    numbers = quantize.ftype_numbers(state.build, state.log)
    imatrix_header = gguf_io.read_header(imatrix_path)
    outputs = []
    for item in made:
        keys = fanout.quantize_keys(numbers[item.recipe.ftype], imatrix_path.name, imatrix_header)
        partial = partial_path(state.set_dir / _file_name(state, item.recipe), state.work)
        outputs.append(fanout.Output(item.recipe.name, partial, fanout.new_header(header, item.plan, keys), item.plan))
    _refuse_what_does_not_fit(state, outputs)
    job_dir = state.work / "fanout"
    if options.scheduler is None:
        jobs = fanout.workers_for(options.jobs, options.max_memory)
    else:
        jobs = fanout.dask_workers(options.scheduler)
    job = fanout.build_job(
        header,
        outputs,
        imatrix=imatrix_path,
        bin_dir=state.build.bin_dir,
        inputs=inputs,
        phase_of=plan.phases([item.plan for item in made], speeds),
        fsync_tasks=options.scheduler is not None,
    )
    job_path, done, skip = fanout.prepare(job, job_dir, outputs)
    if done:
        state.log.note(f"fan-out: {len(done)} of {len(job['tasks'])} tasks were done by an earlier run")
    by_recipe = {item.recipe.name: (item, output.partial) for item, output in zip(made, outputs, strict=True)}

    def accept(recipe: str) -> None:
        item, partial = by_recipe[recipe]
        argv = _reference_argv(state.build, state.stem, item.recipe, partial, options.threads)
        _accept(state, item, partial, argv, time.monotonic() - started)

    figures = fanout.run(
        job_path,
        done,
        skip,
        executor=(
            (lambda: fanout.local_executor(jobs, job_dir))
            if options.scheduler is None
            else lambda: fanout.dask_executor(str(options.scheduler))
        ),
        jobs=jobs,
        costs=fanout.task_costs(fanout.load_job(job_path), speeds),
        on_output=accept,
        progress=state.progress,
    )
    shutil.rmtree(job_dir)
    state.log.note(
        f"fan-out: {figures.tasks} tasks, {figures.cpu_seconds:.1f} CPU s of which {figures.quantize_seconds:.1f} in "
        f"ggml's quantisers, {figures.read_bytes} bytes read, {figures.written_bytes} written"
    )


def _refuse_what_does_not_fit(state: _Run, outputs: Sequence[fanout.Output]) -> None:
    """The whole set must fit the disk, or the budget, before any work starts."""
    sizes = {output.recipe: output.header.file_size for output in outputs}
    budget = _budget(state, outputs)
    total = sum(sizes.values())
    if total > budget:
        fit = plan.that_fit(sizes, budget)
        raise BadInputError(
            f"the set needs {total:,} bytes, {budget:,} are there: {total - budget:,} are missing",
            next_step=f"Make room, or make fewer: --recipes {','.join(fit)}" if fit else "Make room.",
        )


def _speeds(state: _Run, plans: Sequence[FilePlan]) -> dict[str, float]:
    """Elements per second and core of every type these plans need; measured once per build and machine."""
    path = llama_cpp.cache_dir() / "speeds" / f"{state.build.key}.json"
    known: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text())
    missing = sorted(set(plan.work_of(plans).distinct) - set(known))
    if missing:
        state.progress("measuring the quantisers' speed", 0, len(missing), "types")
        with fanout.local_executor(1, state.work) as pool:
            known |= pool.submit(tasks.measure_speeds, str(state.build.bin_dir), missing).result()
        tasks.clear_slots(state.work)
        write_atomic(path, json.dumps(known, indent=1, sort_keys=True))
    return known


# Cheap for llama-quantize, and each uses the imatrix, which Q8_0 does not: what the proof of a run takes first.
PROOF_FIRST = ("Q6_K", "Q4_0", "Q3_K_S", "Q6_K_L")


def _prove(state: _Run, *, again: bool) -> None:
    """Make one file of the fan-out once more with llama-quantize: it must be the same, byte for byte.

    Done when files were made, or when an earlier run ended before its proof. After a mismatch the fan-out's files are
    taken out of the set: none of them can be trusted.
    """
    made = {entry.recipe: entry for entry in state.manifest.files if entry.engine == "fanout"}
    if not made:
        return
    record = state.manifest.stages.get("proof")
    known = {entry.name: entry.sha256 for entry in made.values()}
    if not again and record is not None and record.outputs.items() <= known.items():
        return
    entry = next((made[name] for name in PROOF_FIRST if name in made), min(made.values(), key=lambda e: e.n_bytes))
    (recipe,) = recipes.select([str(entry.recipe)], quantize.offered_ftypes(state.build, state.log))
    started = time.monotonic()
    try:
        _compare_with_reference(state.build, state.set_dir, entry.name, recipe, log=state.log, progress=state.progress)
    except VerificationError:
        for bad in made.values():
            (state.set_dir / bad.name).unlink(missing_ok=True)
        state.record(
            state.manifest.model_copy(update={"files": [f for f in state.manifest.files if f.engine != "fanout"]})
        )
        raise
    took = time.monotonic() - started
    outputs = {entry.name: entry.sha256}
    proof = StageRecord(key=sha256_json(["proof", outputs]), argv=[entry.argv], seconds=round(took, 2), outputs=outputs)
    state.record(state.manifest.with_stage("proof", proof))
    state.did(Done("proof", entry.name, False, f"byte-identical to llama-quantize's, {took:.1f} s", took))


def _compare_with_reference(
    build: Build, set_dir: Path, name: str, recipe: Recipe, *, log: RunLog, progress: Progress
) -> None:
    """Raise `VerificationError` naming the first differing tensor unless llama-quantize makes the same file."""
    stem = name.removesuffix(f"-{recipe.name}.gguf")
    reference = set_dir.parent / WORK / stem / f"reference-{recipe.name}.partial.gguf"
    argv = _reference_argv(build, stem, recipe, reference, None)
    try:
        quantize.run_llama_quantize(argv, f"proving {recipe.name}", cwd=set_dir, log=log, progress=progress)
        verify.compare(set_dir / name, reference)
    finally:
        reference.unlink(missing_ok=True)


def prove_set(
    set_dir: Path,
    spec: str = llama_cpp.DEFAULT_SPEC,
    *,
    backend: str = "cpu",
    cmake_args: Sequence[str] = (),
    wait: bool = False,
    sample: int | None = None,
    progress: Progress = silent,
    say: Callable[[Done], None] = lambda _: None,
) -> list[str]:
    """Make files of a finished set once more with llama-quantize and compare them byte for byte.

    `spec` and `backend` name the build the set was made with; `sample` limits the comparison to that many recipes,
    spread over the sizes. Returns the recipes compared; raises `VerificationError` for the first file that differs.
    """
    set_dir = set_dir.resolve()
    facts = manifest.load(set_dir)
    made = sorted((e for e in facts.files if e.recipe and e.engine != "convert"), key=lambda entry: entry.n_bytes)
    work = set_dir.parent / WORK / facts.stem
    base = work / convert.base_name(facts.stem)
    if not base.exists() and (row := set_dir / base.name).exists():
        link_or_copy(row, base)
    if not made or not base.exists():
        raise BadInputError(
            f"{set_dir} has no {'base' if made else 'quants'} to compare with llama-quantize's",
            next_step="Make the set with: gemma-gguf run MODEL",
        )
    build = llama_cpp.build(spec, backend=backend, extra_cmake_args=cmake_args, wait=wait, progress=progress)
    if (other := next((e for e in made if e.build != build.key), None)) is not None:
        raise BadInputError(
            f"{other.name} was not made by this build of {build.source}",
            next_step="Name the build the set was made with: --llama-cpp, --backend.",
        )
    compared: list[str] = []
    log_path = work / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-proof.log"
    with locked(work, f"the set {facts.stem}", wait=wait), contextlib.closing(RunLog(log_path)) as log:
        count = min(sample or len(made), len(made))
        for entry in (made[i * len(made) // count] for i in range(count)):
            begun = time.monotonic()
            (recipe,) = recipes.select([str(entry.recipe)], quantize.offered_ftypes(build, log))
            _compare_with_reference(build, set_dir, entry.name, recipe, log=log, progress=progress)
            took = time.monotonic() - begun
            say(Done("proof", entry.name, False, f"byte-identical to llama-quantize's, {took:.1f} s", took))
            compared.append(recipe.name)
    return compared


def _entry(
    state: _Run,
    path: Path,
    *,
    kind: Any,
    recipe: Recipe | None,
    key: str,
    argv: Sequence[str],
    seconds: float,
    checks: manifest.Checks | None,
    engine: str | None = None,
) -> FileEntry:
    header = gguf_io.read_header(path)
    return FileEntry(
        name=path.name,
        kind=kind,
        recipe=recipe.name if recipe else None,
        about=recipe.about if recipe else None,
        state="local",
        n_bytes=header.file_size,
        sha256=state.memory.sha256(path),
        bpw=round(header.bits_per_weight, 4) if kind == "model" else None,
        types=header.type_histogram(),
        fallbacks={},
        parent=recipe.parent if recipe else None,
        differs=[],
        argv=[Path(argv[0]).name, *argv[1:]] if argv else [],
        engine=engine
        or {"model": state.options.engine, "mmproj": "convert", "imatrix": "llama-imatrix" if argv else "given"}[kind],
        seconds=round(seconds, 2),
        key=key,
        checks=checks,
        build=state.build.key,
    )


# --- planning ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedFile:
    """One row of a plan. `cpu_seconds` is what llama-quantize would take for it, None while nothing is known."""

    recipe: str
    n_bytes: int
    bpw: float
    cpu_seconds: float | None
    types: dict[str, int]
    fallbacks: dict[str, int]


@dataclass(frozen=True)
class SetPlan:
    """What making a set takes. `basis` says what sizes and times come from, `exact` whether sizes are to the byte.

    Seconds are of CPU: `asked` as a loop over llama-quantize needs them, `distinct` as the fan-out does; `wall` is the
    latter over the worker processes. `waves` are the groups in which the set fits the disk, or the budget.
    """

    set_dir: Path
    basis: str
    exact: bool
    files: tuple[PlannedFile, ...]
    jobs: int
    asked_seconds: float | None
    distinct_seconds: float | None
    peak_bytes: int
    budget_bytes: int
    waves: tuple[tuple[str, ...], ...]

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.budget_bytes

    @property
    def wall_seconds(self) -> float | None:
        return None if self.distinct_seconds is None else self.distinct_seconds / self.jobs

    def document(self) -> dict[str, object]:
        """The plan as JSON."""
        return {**asdict(self), "fits": self.fits, "wall_seconds": self.wall_seconds}


def plan_set(options: Options, *, progress: Progress = silent) -> SetPlan:
    """What making this set takes, by what exists: base and imatrix, the base alone, or only the checkpoint."""
    _check_given(options)
    name = source.understand(options.model, options.name)
    jobs = fanout.workers_for(options.jobs, options.max_memory)
    out = options.out.resolve()
    set_dir, work = out / f"{name.stem}-GGUF", out / WORK / name.stem
    bases = [work / convert.base_name(name.stem), set_dir / convert.base_name(name.stem)]
    if name.origin == "hub" and options.base is None and not any(path.exists() for path in bases):
        # Nothing is downloaded or built for an estimate.
        offered = dict.fromkeys(quantize.KNOWN_FTYPES, "")
        n_parameters = source.count_hub_parameters(name)
        return _estimate(set_dir, recipes.select(options.recipes, offered), n_parameters, jobs, options.disk_budget)
    with _started(options, name, progress, lambda _: None) as state:
        wanted = _wanted(state)
        base = next((path for path in (options.base, *bases) if path is not None and path.exists()), None)
        if base is None:
            return _estimate(set_dir, wanted, state.source.facts.n_parameters, jobs, options.disk_budget)
        header = gguf_io.read_header(base)
        real = options.imatrix or state.set_dir / imatrix.file_name(state.stem)
        with tempfile.TemporaryDirectory(dir=state.work) as scratch:
            # Under its final bare name, which llama-quantize copies into a key.
            given = Path(scratch, imatrix.file_name(state.stem))
            if real.exists():
                copy(real, given)
            else:
                text = calibration.load(options.calibration, llama_cpp.cache_dir() / "calibration")
                imatrix.write_placeholder(given, header, text.file_name)
            return _exact_plan(state, wanted, header, given, jobs, from_placeholder=not real.exists())


def _exact_plan(
    state: _Run, wanted: Sequence[Recipe], header: gguf_io.Header, given: Path, jobs: int, *, from_placeholder: bool
) -> SetPlan:
    numbers = quantize.ftype_numbers(state.build, state.log)
    imatrix_header = gguf_io.read_header(given)
    plans: dict[str, FilePlan] = {}
    outputs: list[fanout.Output] = []
    rows: list[PlannedFile] = []
    for done, recipe in enumerate(recipe for recipe in wanted if not recipe.is_base):
        state.progress("planning", done, len(wanted), "recipes")
        plans[recipe.name] = asked = quantize.plan_recipe(
            state.build,
            recipe,
            str(header.path.resolve()),
            imatrix=given.name,
            n_tensors=len(header.tensors),
            cwd=given.parent,
            log=state.log,
        )
        keys = fanout.quantize_keys(numbers[recipe.ftype], given.name, imatrix_header)
        partial = partial_path(state.set_dir / _file_name(state, recipe), state.work)
        outputs.append(fanout.Output(recipe.name, partial, fanout.new_header(header, asked, keys), asked))
    speeds = _speeds(state, list(plans.values())) if plans else {}
    if any(recipe.is_base for recipe in wanted):
        rows.append(
            PlannedFile("bf16", header.file_size, round(header.bits_per_weight, 4), 0.0, header.type_histogram(), {})
        )
    for output in outputs:
        n_elements = sum(t.n_elements for t in output.plan.tensors)
        rows.append(
            PlannedFile(
                recipe=output.recipe,
                n_bytes=output.header.file_size,
                bpw=round(8 * sum(t.n_bytes for t in output.plan.tensors) / n_elements, 4),
                cpu_seconds=round(plan.work_of([output.plan]).seconds(speeds)[0], 1),
                types=dict(Counter(t.target.name for t in output.plan.tensors).most_common()),
                fallbacks=output.plan.fallbacks,
            )
        )
    sizes = {output.recipe: output.header.file_size for output in outputs}
    budget = _budget(state, outputs)
    asked_seconds, distinct_seconds = plan.work_of(plans.values()).seconds(speeds)
    peak = sum(sizes.values())
    if peak <= budget:
        groups = [list(sizes)]
    elif max(sizes.values()) > budget:
        groups = []  # one file alone is too large
    else:
        groups = plan.waves(list(plans.values()), sizes, speeds, budget)
    return SetPlan(
        set_dir=state.set_dir,
        basis="base, and an imatrix to come" if from_placeholder else "base and imatrix",
        exact=True,
        files=tuple(rows),
        jobs=jobs,
        asked_seconds=round(asked_seconds, 1),
        distinct_seconds=round(distinct_seconds, 1),
        peak_bytes=peak,
        budget_bytes=budget,
        waves=tuple(map(tuple, groups)),
    )


def _estimate(
    set_dir: Path, wanted: Sequence[Recipe], n_parameters: int, jobs: int, disk_budget: int | None
) -> SetPlan:
    """What can be said before there is a base: bits per weight of the type each recipe is named after."""
    rows = []
    for recipe in wanted:
        bits = plan.nominal_bits(recipe.ftype)
        rows.append(PlannedFile(recipe.name, int(n_parameters * bits / 8), bits, None, {}, {}))
    existing = next(path for path in (set_dir, *set_dir.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    return SetPlan(
        set_dir=set_dir,
        basis="the number of parameters",
        exact=False,
        files=tuple(rows),
        jobs=jobs,
        asked_seconds=None,
        distinct_seconds=None,
        peak_bytes=sum(row.n_bytes for row in rows),
        budget_bytes=free if disk_budget is None else min(free, disk_budget),
        waves=(),
    )


def _budget(state: _Run, outputs: Sequence[fanout.Output]) -> int:
    """Bytes that new files may take: free space and what partial files hold already, or less if the user said so."""
    held = sum(output.partial.stat().st_blocks * 512 for output in outputs if output.partial.exists())
    free = shutil.disk_usage(state.work).free + held
    return free if state.options.disk_budget is None else min(free, state.options.disk_budget)


# --- card and checks of a finished set ---------------------------------------------------------------------------


def _card(state: _Run) -> None:
    started = time.monotonic()
    manifest.save(state.manifest, state.set_dir)
    made = write_card(state.set_dir, state.options.templates)
    why = "rendered from quantset.json" if made else "quantset.json unchanged"
    state.did(Done("card", "README.md", made, why, time.monotonic() - started))


def write_card(set_dir: Path, templates: Path | None = None) -> bool:
    """Render README.md of a set from its manifest; False when it already was just that."""
    text = card.render(manifest.load(set_dir), templates)
    path = set_dir / "README.md"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    write_atomic(path, text)
    return True


@dataclass(frozen=True)
class Verified:
    """The outcome for one file of a set: `problem` is None when it is what the manifest says."""

    name: str
    problem: str | None


def verify_set(set_dir: Path, *, progress: Progress = silent) -> list[Verified]:
    """Read every file of a set again and compare it with its manifest: sha256, layout, keys, sampled rows.

    Every file is looked at, whatever is wrong with the others; a file the manifest does not name is a problem, too.
    """
    facts = manifest.load(set_dir)
    results: list[Verified] = []
    for done, entry in enumerate(facts.files):
        progress(f"verifying {entry.name}", done, len(facts.files), "files")
        results.append(Verified(entry.name, _problem(set_dir / entry.name, entry)))
    named = {entry.name for entry in facts.files}
    for path in sorted(set_dir.rglob("*.gguf")):
        name = path.relative_to(set_dir).as_posix()
        if name not in named:
            results.append(Verified(name, "not in quantset.json"))
    return results


def _problem(path: Path, entry: FileEntry) -> str | None:
    if not path.is_file():
        return "missing"
    try:
        header = gguf_io.read_header(path)
        verify.check_size(header)
        verify.check_keys(header)
        verify.check_rows(header)
        if entry.checks is not None and plan.layout_of(header.tensors) != entry.checks.layout_sha256:
            return "its tensors are not the recorded ones"
    except (BadInputError, VerificationError) as error:
        return error.what
    # Read now, whatever is remembered: this command exists to look at the bytes.
    if sha256_file(path) != entry.sha256:
        return "its sha256 is not the recorded one"
    return None
