"""One run of the factory: what was asked for, where it works, with what, and what it knows by now.

Consumes `Options`, produces a `Run`: the build, the checkpoint, the lock on the set, the log and the manifest. It is
what planning, proving and the order of the stages have in common; it runs no stage.
"""

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import gemma_gguf
from gemma_gguf import (
    calibration,
    card,
    convert,
    coverage,
    embedding,
    fanout,
    gates,
    gemma,
    gguf_io,
    imatrix,
    kernel_check,
    llama_cpp,
    manifest,
    plan,
    qat,
    quantize,
    recipes,
    shards,
    source,
    tasks,
)
from gemma_gguf.errors import BadInputError, GemmaGGUFError, VerificationError
from gemma_gguf.evaluate import DISK_BUDGET as EVAL_DISK_BUDGET
from gemma_gguf.files import (
    PARTIAL,
    HashMemory,
    link_or_copy,
    locked,
    make_directory,
    partial_path,
    replace_durably,
    sha256_json,
    write_atomic,
)
from gemma_gguf.kernel_check import Checked
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.manifest import BuildFacts, CardChoices, CustomRecipe, FileEntry, Manifest, RemotePlace, Shard
from gemma_gguf.plan import FilePlan
from gemma_gguf.progress import Progress
from gemma_gguf.recipes import Recipe

WORK = ".work"
ENGINES = ("fanout", "llama-quantize")
CHECKPOINT = "checkpoint.json"  # in a set's work directory: where its local checkpoint was
STAGES = ("convert", "imatrix", "quantize", "evaluate", "card")


@dataclass(frozen=True)
class CardOptions:
    """What a maintainer chose for the card now; `None` keeps what the set records, at first the defaults."""

    theme: str | None = None
    languages: tuple[str, ...] | None = None
    quantized_by: str | None = None
    repo: str | None = None  # where the set is, or will be, on the Hub
    namespace: str | None = None  # whose it is there; gives `repo` where nothing else does

    def chosen(self, recorded: CardChoices, stem: str) -> CardChoices:
        """The choices of now over the recorded ones. Raises `BadInputError` for what cannot be chosen."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        namespace = given.pop("namespace", None)
        if namespace is not None and (given.get("repo") or recorded.repo) is None:
            given["repo"] = f"{namespace}/{stem}-GGUF"
        if "languages" in given:
            given["languages"] = list(card.card_files(given["languages"]))
        try:
            return CardChoices.model_validate({**recorded.model_dump(), **given})
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInputError(
                f"{first['loc'][0]} {first['input']!r} cannot be used for the card: {first['msg']}",
                next_step="Themes are modern and classic; a repository is NAMESPACE/NAME.",
            ) from error


@dataclass(frozen=True)
class PublishOptions:
    """How a set goes to the Hub. Without `repo` it is the one that its card names, or `<org>_<model>-GGUF` of
    `namespace`, or of the token's own account."""

    repo: str | None = None
    namespace: str | None = None
    public: bool = False  # in the end; until then a new repository is private
    prune: bool = False  # delete what the set does not name
    allow_demo: bool = False
    stream: bool = False  # a run sends its quants wave by wave and deletes them here


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
    mmproj: bool = True  # make projectors of a model that sees or hears
    engine: str = "fanout"
    kernels: str = "auto"  # or "ggml"
    jobs: int | None = None
    scheduler: str | None = None  # address of a Dask scheduler
    max_memory: int = fanout.MAX_MEMORY  # bytes, of all fan-out workers together
    disk_budget: int | None = None  # bytes
    allow_mismatch: bool = False  # go on though tokenizer or chat template are not the checkpoint's
    split_max_size: int = shards.DEFAULT_LIMIT  # bytes of tensors in one file, whole megabytes
    proof: bool = True  # make one small recipe with llama-quantize, too, and compare
    evaluate: bool = True
    eval_chunks: int | None = None
    eval_disk_budget: int = EVAL_DISK_BUDGET  # bytes of base distributions
    bench: tuple[str, ...] | None = None  # recipes whose speed is measured, `("all",)` or `("none",)`
    reference: str | None = None  # a recipe that stands in for a base too large to run
    bounds: gates.Bounds = gates.AS_RECORDED  # of the quality gate
    qat: bool | None = None  # whether the checkpoint was trained for Q4_0; None: what its own files say
    qat_embedding: str | None = None
    pin_uncovered: str | None = None  # type for tensors without imatrix data
    until: str = "card"
    rehash: bool = False
    wait: bool = False
    templates: Path | None = None
    card: CardOptions = CardOptions()
    naming: str = source.NAMINGS[0]  # how files of the set begin
    custom: tuple[Recipe, ...] = ()  # recipes of the user's own; those that `recipes` names are made
    publish: PublishOptions | None = None  # send the set to the Hub in the end, or wave by wave

    @property
    def proves(self) -> bool:
        """Whether one file is made twice: llama-quantize's own need no proof."""
        return self.proof and self.engine == "fanout"


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
class Run:
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
    take_away: Callable[[Path], RemotePlace | None] | None
    manifest: Manifest
    plans: dict[str, FilePlan] = field(default_factory=dict)  # by what was asked: a dry run reads the whole header

    @property
    def stem(self) -> str:
        return self.source.name.stem

    @property
    def base(self) -> Path:
        return self.work / convert.base_name(self.stem)

    @functools.cached_property
    def offered(self) -> dict[str, str]:
        """{ftype: description} of what this run's llama-quantize can make."""
        return quantize.offered_ftypes(self.build, self.log)

    def did(self, done: Done) -> None:
        self.report.done.append(done)
        self.say(done)

    def record(self, new: Manifest) -> None:
        self.manifest = gates.recorded(new)
        manifest.save(self.manifest, self.set_dir)


def known_recipes(names: Iterable[str], custom: Iterable[Recipe] = ()) -> tuple[Recipe, ...]:
    """The recipes called `names`, before there is a build to say what it offers: of what any llama.cpp may offer."""
    known = [*quantize.KNOWN_FTYPES, *(recipe.ftype for recipe in recipes.TABLE.values())]
    return recipes.select(names, dict.fromkeys(known, ""), custom)


def calibration_text(options: Options) -> calibration.Text:
    """The text behind the imatrix, fetched or from the cache."""
    return calibration.load(options.calibration, llama_cpp.cache_dir() / "calibration")


def model_name(options: Options) -> source.ModelName:
    """What the run makes a set of. Raises `BadInputError` for what is no model, and for names of files that all answer
    to one of its recipes, the user's own included."""
    asked = {name.upper() for name in options.recipes}
    tags = [recipe.name for recipe in options.custom if recipe.name.upper() in asked]
    return source.understand(options.model, options.name, options.naming, tags)


def places(out: Path, name: source.ModelName) -> tuple[Path, Path]:
    """(directory of the set, work directory) of a model."""
    out = out.resolve()
    return out / f"{name.stem}-GGUF", out / WORK / name.stem


def set_of(which: str, name: str | None, naming: str, out: Path) -> Path:
    """The directory of a set that was named itself, or by its model."""
    if (Path(which) / manifest.FILE_NAME).is_file():
        return Path(which)
    try:
        set_dir, _ = places(out, source.understand(which, name, naming))
    except BadInputError:
        set_dir = Path(which)
    return set_dir


def base_places(set_dir: Path, work: Path, stem: str) -> tuple[Path, Path]:
    """Where the base of a set can be: the work directory, which may be deleted, and the bf16 row, the same file."""
    return work / convert.base_name(stem), set_dir / convert.base_name(stem)


def restore_base(set_dir: Path, facts: Manifest, base: Path) -> None:
    """Have the base again where it is gone: the bf16 row of the set is the same file, whole or in shards."""
    row = set_dir / base.name
    if not base.exists() and row.exists():
        link_or_copy(row, base)
    else:
        join_base(set_dir, facts, base)


def join_base(set_dir: Path, facts: Manifest, base: Path) -> None:
    """Have the base again where it is gone and the bf16 row is there in shards."""
    row = facts.made("bf16")
    if base.exists() or row is None or not row.shards or not row.is_there(set_dir):
        return
    partial = partial_path(base)
    make_directory(base.parent)
    shards.join(shards.read([set_dir / part.name for part in row.parts]), partial)
    replace_durably(partial, base)


def is_made(known: Manifest | None, set_dir: Path, recipe: Recipe) -> bool:
    """Whether a file is named and there, or published: if it must be made again, the new one takes its place in the
    end."""
    entry = None if known is None else known.made(recipe.name)
    return entry is not None and (entry.state == "remote" or entry.is_there(set_dir))


def is_whole(memory: HashMemory, set_dir: Path, entry: FileEntry) -> bool:
    """Whether the bytes of a file, or of all its shards, are those that the manifest names."""
    return entry.is_there(set_dir) and all(memory.sha256(set_dir / part.name) == part.sha256 for part in entry.parts)


def is_cut_at(set_dir: Path, entry: FileEntry, limit: int) -> bool:
    """Whether a file that is there is whole, or in shards, as this split limit wants it."""
    if not entry.shards and entry.n_bytes <= limit:
        return True
    return shards.is_cut_at([gguf_io.read_header(set_dir / part.name) for part in entry.parts], limit)


def check_given(options: Options) -> None:
    """What the user names must be there, before anything is built or downloaded."""
    for _, check in given_checks(options):
        check()


def given_checks(options: Options) -> list[tuple[str, Callable[[], object]]]:
    """(subject, function that raises when what the user named cannot be used), of everything the user named."""
    checks: list[tuple[str, Callable[[], object]]] = []
    if options.base is not None:
        checks.append(("--base", functools.partial(_given_base, options.base)))
    if options.imatrix is not None:
        checks.append(("--imatrix", functools.partial(_given_imatrix, options.imatrix)))
    if options.imatrix is None and options.until != "convert":
        checks.append(("calibration", functools.partial(calibration_text, options)))
    if options.reference is not None:
        checks.append(("--from", functools.partial(_given_reference, options)))
    if options.publish is not None:
        checks.append(("--publish", functools.partial(_given_publish, options, options.publish)))
    if options.scheduler is not None:
        checks.append(("--scheduler", functools.partial(fanout.dask_workers, options.scheduler)))  # it answers
    return checks


def _given_base(path: Path) -> None:
    if not path.is_file():
        raise BadInputError(f"there is no file {path}", next_step="Give --base the path of a GGUF file.")
    quantized = set(gguf_io.read_header(path).type_histogram()) - {"F32", "F16", "BF16"}
    if quantized:
        raise BadInputError(
            f"{path} is quantised already ({', '.join(sorted(quantized))}); quants of quants are not made here",
            next_step="Give a BF16, F16 or F32 file.",
        )


def _given_imatrix(path: Path) -> None:
    if not path.is_file():
        raise BadInputError(f"there is no file {path}", next_step="Give --imatrix the path of a GGUF file.")
    imatrix.read(path)


def _given_publish(options: Options, how: PublishOptions) -> None:
    if how.stream and options.reference is not None:
        raise BadInputError(
            "--from compares all files with one of the set, --stream deletes that one after its wave",
            next_step="Leave one of them out.",
        )
    if options.model == "demo" and not how.allow_demo:
        raise BadInputError(
            "the demo's weights were rebuilt from a quant; a set of it proves the factory, nothing else",
            next_step="Publish a set of original weights, or add --allow-demo.",
        )


def _given_reference(options: Options) -> None:
    (reference,) = known_recipes([str(options.reference)], options.custom)
    evaluates = options.evaluate and options.until in ("evaluate", "card")
    if evaluates and reference.name.upper() not in {name.upper() for name in options.recipes}:
        raise BadInputError(
            f"--from {reference.name} needs {reference.name} in the set: the other files are compared with it",
            next_step="Add it to --recipes, or leave the evaluation out with --no-evaluate.",
        )


@contextlib.contextmanager
def open_run(
    options: Options,
    name: source.ModelName,
    progress: Progress,
    say: Callable[[Done], None],
    take_away: Callable[[Path], RemotePlace | None] | None = None,
) -> Iterator[Run]:
    """Build, checkpoint, lock, log and manifest: what every stage needs."""
    started = time.monotonic()
    build = llama_cpp.build(
        options.llama_cpp,
        backend=options.backend,
        extra_cmake_args=options.cmake_args,
        wait=options.wait,
        progress=progress,
    )
    set_dir, work = places(options.out, name)
    with open_work(work, wait=options.wait) as log:
        memory = HashMemory(work / "hashes.json", rehash=options.rehash)
        found = source.fetch(name, work, memory, progress, projectors=options.mmproj)
        if not options.mmproj:
            found = source.reading(found)
        if name.location is not None:  # `refresh` looks for the checkpoint there; a manifest names no place
            write_atomic(work / CHECKPOINT, json.dumps({"path": str(name.location)}) + "\n")
        state = Run(
            options=options,
            build=build,
            source=found,
            set_dir=set_dir,
            work=work,
            log=log,
            memory=memory,
            report=Report(set_dir, log.path, options.engine),
            progress=progress,
            say=say,
            take_away=take_away,
            manifest=_manifest(set_dir, name, build, found, options),
        )
        set_dir.mkdir(parents=True, exist_ok=True)
        took = time.monotonic() - started
        state.did(Done("build", f"llama.cpp {build.version} ({build.commit[:9]})", False, f"ready, {took:.0f} s", took))
        with told(log, memory):
            yield state


@contextlib.contextmanager
def open_set(
    set_dir: Path, options: Options, build: Build, *, progress: Progress, say: Callable[[Done], None]
) -> Iterator[Run]:
    """A finished set under a build, with neither its checkpoint nor its build's facts taken over: for `refresh`.

    The checkpoint's facts are the manifest's own.
    """
    facts = manifest.load(set_dir)
    set_dir, work = set_dir.resolve(), set_dir.resolve().parent / WORK / facts.stem
    with open_work(work, "refresh", wait=options.wait) as log:
        memory = HashMemory(work / "hashes.json", rehash=options.rehash)
        facts = manifest.load(set_dir)  # as it is now that nobody else can change it
        model = facts.model
        # Whatever the files were named by (--name, --naming), they begin as they do.
        called = f"{model.org}/{facts.stem}"
        name = source.ModelName(
            model.origin, model.org, model.model, revision=model.revision, naming="model", called=called
        )
        with told(log, memory):
            yield Run(
                options=options,
                build=build,
                source=source.Source(name, work, facts.model),
                set_dir=set_dir,
                work=work,
                log=log,
                memory=memory,
                report=Report(set_dir, log.path, options.engine),
                progress=progress,
                say=say,
                take_away=None,
                manifest=facts,
            )


@contextlib.contextmanager
def told(log: RunLog, memory: HashMemory) -> Iterator[None]:
    """The log says how the block ends, an error names its log, and the hashes that were computed are kept."""
    try:
        yield
    except GemmaGGUFError as error:
        log.note(f"ended: {error.what}")
        error.log = error.log or log.path
        raise
    finally:
        memory.save()


@contextlib.contextmanager
def open_work(work: Path, what: str = "", *, wait: bool) -> Iterator[RunLog]:
    """Hold the work directory of a set, which is named after its stem, with a log of its own; `what` ends its name.

    Children that a killed run left there are ended: they would go on writing.
    """
    path = work / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}{what and f'-{what}'}.log"
    with locked(work, f"the set {work.name}", wait=wait), contextlib.closing(RunLog(path)) as log:
        llama_cpp.end_leftovers(log)
        yield log


def _manifest(set_dir: Path, name: source.ModelName, build: Build, found: source.Source, options: Options) -> Manifest:
    """The set's manifest with this run's facts, files and stages of earlier runs kept."""
    facts: dict[str, Any] = {
        "tool_version": gemma_gguf.__version__,
        "stem": name.stem,
        "llama_cpp": build_facts(build),
    }
    wanted = known_recipes(options.recipes, options.custom)
    asked = [recipe.name for recipe in wanted]
    own = [
        CustomRecipe(name=recipe.name, ftype=recipe.ftype, about=recipe.about, flags=list(recipe.flags))
        for recipe in wanted
        if recipe in options.custom
    ]

    def qat_facts(old: manifest.QatFacts | None) -> manifest.QatFacts | None:
        return qat.facts_for(found.facts.qat, options.qat, options.qat_embedding, old)

    facts["model"] = found.facts.model_copy(update={"qat": qat_facts(None) is not None})
    if (set_dir / manifest.FILE_NAME).exists():
        old = manifest.load(set_dir)
        # A manifest never names a local file that is not there.
        facts["card"] = options.card.chosen(old.card, name.stem)
        # A comparison with another build tells of a set that this run changes.
        if old.refresh is not None and (old.refresh.state != "applied" or old.refresh.build.key != build.key):
            facts["refresh"] = None
        facts["gates"] = options.bounds.chosen(old.gates)
        facts["qat"] = qat_facts(old.qat)
        if options.until not in {"convert", "imatrix"}:  # these were not asked for any recipe
            facts |= {"recipes": asked, "custom_recipes": own, "split_max_size": options.split_max_size}
        kept = [entry for entry in old.files if entry.remote or entry.is_there(set_dir)]
        return old.model_copy(update={**facts, "files": kept})
    return Manifest(
        schema_version=manifest.SCHEMA_VERSION,
        kernels=None,
        converter=None,
        quantisers={},
        refresh=None,
        calibration=None,
        imatrix=None,
        stages={},
        recipes=asked,
        custom_recipes=own,
        split_max_size=options.split_max_size,
        files=[],
        card=options.card.chosen(manifest.DEFAULT_CARD, name.stem),
        qat=qat_facts(None),
        pins={},
        gates=options.bounds.chosen(manifest.DEFAULT_GATES),
        evidence={},
        context=None,
        prompts=None,
        pictures={},
        parity=None,
        **facts,
    )


def build_facts(build: Build) -> BuildFacts:
    """What a manifest says of a build."""
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


def stage_is_done(state: Run, stage: str, key: str) -> str | None:
    """None when the stage must run, else why it need not: its key and its outputs are those of the manifest."""
    record = state.manifest.stages.get(stage)
    if record is None or record.key != key:
        return None
    for name, digest in record.outputs.items():
        path = _place(state, name)
        if not path.is_file() or state.memory.sha256(path) != digest:
            return None
    return "inputs, arguments and build unchanged, outputs whole"


def _place(state: Run, name: str) -> Path:
    inside = name.removeprefix(f"{WORK}/")
    return state.work / inside if inside != name else state.set_dir / name


def why_again(state: Run, stage: str, key: str) -> str:
    record = state.manifest.stages.get(stage)
    if record is None:
        return "not made yet"
    return "inputs, arguments or build changed" if record.key != key else "an output is missing or changed"


@contextlib.contextmanager
def removed_when_bad(path: Path) -> Iterator[None]:
    """A file, or a folder of shards, that fails its checks is not left behind."""
    try:
        yield
    except VerificationError:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        raise


def probe_text(state: Run) -> Path:
    """The held-out text as a file: what a model reads when it is checked that it loads."""
    path = state.work / "heldout.txt"
    if not path.exists():
        write_atomic(path, calibration.held_out().data)
    return path


def wanted_recipes(state: Run) -> tuple[Recipe, ...]:
    return select_recipes(state, state.options.recipes)


def select_recipes(state: Run, names: Iterable[str]) -> tuple[Recipe, ...]:
    """The recipes called `names`, as they are made for this model by this build."""
    arch = state.source.facts.gguf_arch
    chosen = recipes.select(names, state.offered, state.options.custom)
    return tuple(embedding.fitted(qat.applied(recipe, state.manifest.qat), arch) for recipe in chosen)


def fitted(state: Run, wanted: Iterable[Recipe], header: gguf_io.Header) -> tuple[Recipe, ...]:
    """Recipes as this base and its imatrix need them; see `recipes.fitted` and `coverage.pinned`.

    What a parent makes of a tensor llama-quantize says.
    """
    unread = gemma.unread_layers(header)
    has_per_layer = gemma.PER_LAYER_EMBEDDING in header.by_name

    def per_layer_type(recipe: Recipe) -> str | None:
        like = "Q4_0" if recipe.static else recipe.parent
        if like is None or not has_per_layer:
            return None
        parent = quantize.plan_recipe(
            state.build,
            recipes.TABLE[like],
            str(header.path.resolve()),
            imatrix=None,
            n_tensors=len(header.tensors),
            cwd=state.work,
            log=state.log,
        )
        return str(parent.types[gemma.PER_LAYER_EMBEDDING].name)

    made = [recipes.fitted(recipe, unread, per_layer_type(recipe)) for recipe in wanted]
    return tuple(coverage.pinned(recipe, state.manifest.pins.get(recipe.name, {})) for recipe in made)


def plan_recipe(state: Run, recipe: Recipe, header: gguf_io.Header, *, with_imatrix: bool) -> FilePlan:
    """What llama-quantize would make of a recipe with the set's imatrix, or without; asked once."""
    used = state.set_dir / imatrix.file_name(state.stem) if with_imatrix and not recipe.static else None
    digests = [state.memory.sha256(path) for path in (state.base, used) if path is not None]
    key = sha256_json([recipe.name, recipe.ftype, list(recipe.flags), recipe.static, digests])
    if key not in state.plans:
        state.plans[key] = quantize.plan_recipe(
            state.build,
            recipe,
            f"../{WORK}/{state.stem}/{state.base.name}",
            imatrix=used.name if used else None,
            n_tensors=len(header.tensors),
            cwd=state.set_dir,
            log=state.log,
        )
    return state.plans[key]


def file_name(state: Run, recipe: Recipe) -> str:
    return f"{state.stem}-{recipe.name}.gguf"


def new_entry(
    state: Run,
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
    """The entry of a file, or of a folder of shards, that is still under its partial name; `path` names it."""
    if not path.is_dir():
        header, cut, digest = gguf_io.read_header(path), [], state.memory.sha256(path)
    else:
        parts = shards.read(sorted(path.iterdir()))
        digest, own = shards.hashes(parts)
        for part, one in zip(parts, own, strict=True):
            state.memory.remember(part.path, one)
        folder = path.name.removesuffix(PARTIAL)
        cut = [
            Shard(name=f"{folder}/{part.path.name}", n_bytes=part.file_size, sha256=one)
            for part, one in zip(parts, own, strict=True)
        ]
        header = shards.joined(parts)
    return FileEntry(
        name=cut[0].name if cut else path.name,
        kind=kind,
        recipe=recipe.name if recipe else None,
        about=recipe.about if recipe else None,
        ftype=recipe.ftype if recipe else None,
        flags=list(recipe.flags) if recipe else [],
        static=recipe.static if recipe else False,
        state="local",
        remote=None,
        n_bytes=header.file_size,
        sha256=digest,
        shards=cut,
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


def kernels_for(state: Run) -> Checked:
    """The kernels that this run's workers may use: compiled and compared with ggml now, or before."""
    return kernel_check.ready(
        state.build,
        state.options.kernels,
        jobs=fanout.workers_for(state.options.jobs, state.options.max_memory),
        log=state.log,
        progress=state.progress,
    )


def speeds_for(state: Run, plans: Sequence[FilePlan], using: Checked | None = None) -> dict[str, float]:
    """Elements per second and core of every type these plans need, by ggml or `using` kernels; measured once per
    build, kernels and machine."""
    implementation = "-".join(filter(None, (state.build.key, using.key if using else "")))
    path = llama_cpp.cache_dir() / "speeds" / f"{implementation}.json"
    known: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text())
    missing = sorted(set(plan.work_of(plans).distinct) - set(known))
    if missing:
        state.progress("measuring the quantisers' speed", 0, len(missing), "types")
        kernels = using.kernels if using else None
        what, bin_dir = "measures the quantisers' speed", str(state.build.bin_dir)
        known |= fanout.in_a_worker(state.work, what, tasks.measure_speeds, bin_dir, missing, kernels=kernels)
        write_atomic(path, json.dumps(known, indent=1, sort_keys=True))
    return known


def room_for(state: Run, outputs: Sequence[fanout.Output]) -> int:
    """Bytes that new files may take: free space and what partial files hold already, or less if the user said so."""
    parts = [path for output in outputs for path, _ in output.parts]
    held = sum(path.stat().st_blocks * 512 for path in parts if path.exists())
    free = shutil.disk_usage(state.work).free + held
    return free if state.options.disk_budget is None else min(free, state.options.disk_budget)
