"""Build day: what a newer llama.cpp, or a corrected checkpoint, changes in sets that are made; and changing just that.

Consumes finished sets and a build, produces a decision with its reason for every file (`stale.py` judges), the cards
that tell of it and, when asked, the changes themselves: headers rewritten around tensor data that is copied as it is,
recipes made again through the fan-out, everything else left alone. `differences.py` finds out, without making anything
again, what there is to decide.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_gguf import (
    card,
    factory,
    fanout,
    gguf_io,
    imatrix,
    llama_cpp,
    manifest,
    production,
    proof,
    recipes,
    session,
    shards,
    stale,
)
from gemma_gguf.differences import Seen, Shared, has_heads, look, problem_with
from gemma_gguf.errors import BadInputError, GemmaGGUFError, VerificationError
from gemma_gguf.files import (
    link_or_copy,
    make_directory,
    partial_path,
    scratch,
    sha256_json,
    write_from,
)
from gemma_gguf.llama_cpp import Build
from gemma_gguf.manifest import Evidence, FileDecision, FileEntry, RefreshFacts, argument
from gemma_gguf.pictures import Drawn
from gemma_gguf.progress import Progress, silent
from gemma_gguf.session import WORK, Done, Options, Run


@dataclass(frozen=True)
class Asked:
    """What a refresh was asked for."""

    llama_cpp: str = llama_cpp.DEFAULT_SPEC
    backend: str = "cpu"
    cmake_args: tuple[str, ...] = ()
    apply: bool = False
    new_imatrix: bool = False
    model: str | None = None  # the checkpoint, where it is not found by itself
    evaluate: bool = True
    proof: bool = True
    jobs: int | None = None
    threads: int | None = None
    rehash: bool = False
    wait: bool = False
    templates: Path | None = None


@dataclass(frozen=True)
class Refreshed:
    """What became of one set. `error` is why it could not be looked at, or not be changed."""

    set_dir: Path
    decisions: Mapping[str, FileDecision]
    applied: bool
    seconds: float
    error: GemmaGGUFError | None = None

    def document(self) -> dict[str, Any]:
        """As JSON."""
        error = self.error
        return {
            "set_dir": str(self.set_dir),
            "counts": stale.counts(self.decisions.values()),
            "files": {name: decision.model_dump(mode="json") for name, decision in self.decisions.items()},
            "applied": self.applied,
            "seconds": round(self.seconds, 1),
            "error": None if error is None else {"error": error.what, "next_step": error.next_step},
        }


def refresh_sets(
    set_dirs: Sequence[Path],
    asked: Asked,
    *,
    progress: Progress = silent,
    say: Callable[[Done], None] = lambda _: None,
    ended: Callable[[Refreshed], None] = lambda _: None,
) -> list[Refreshed]:
    """Compare sets with a build and render their cards; with `asked.apply` carry out what was decided.

    A set that fails does not keep the others from their turn. Raises only what concerns all of them: no build, or a
    checkpoint named for several sets.
    """
    if asked.model is not None and len(set_dirs) > 1:
        raise BadInputError("--model names the checkpoint of one set", next_step="Refresh that set alone.")
    build = llama_cpp.build(
        asked.llama_cpp,
        backend=asked.backend,
        extra_cmake_args=asked.cmake_args,
        wait=asked.wait,
        progress=progress,
    )
    renderer = card.Renderer(asked.templates)
    drawn: dict[str, Drawn] = {}
    results = []
    jobs = fanout.workers_for(asked.jobs, fanout.MAX_MEMORY)
    with tempfile.TemporaryDirectory() as place, fanout.workers_in(Path(place), jobs) as workers:
        shared = Shared(workers)
        for set_dir in set_dirs:
            results.append(_refresh_one(set_dir, build, asked, shared, progress=progress, say=say))
            try:
                if (set_dir / manifest.FILE_NAME).is_file():
                    factory.write_card(set_dir, renderer, drawn=drawn)
            except GemmaGGUFError as error:
                results[-1] = replace(results[-1], error=results[-1].error or error)
            ended(results[-1])
    return results


def _refresh_one(
    set_dir: Path,
    build: Build,
    asked: Asked,
    shared: Shared,
    *,
    progress: Progress,
    say: Callable[[Done], None],
) -> Refreshed:
    started = time.monotonic()
    decisions: Mapping[str, FileDecision] = {}
    applied, problem = False, None
    try:
        options = _options(set_dir, asked)
        with (
            session.open_set(set_dir, options, build, progress=progress, say=say) as state,
            scratch(state.work / "refresh") as place,
        ):
            seen = look(state, place, shared, model=asked.model, new_imatrix=asked.new_imatrix)
            decisions = seen.decisions
            if not asked.apply:
                _record(state, seen, "checked")
            else:
                shared.workers.end()  # the fan-out has its own
                _carry_out(state, seen)
                applied = True
    except GemmaGGUFError as error:
        problem = error
    return Refreshed(set_dir, decisions, applied, time.monotonic() - started, problem)


def _options(set_dir: Path, asked: Asked) -> Options:
    """A run's options that make what is in the set, as far as the set remembers them."""
    facts = manifest.load(set_dir)
    computed = facts.stages.get("imatrix")
    argv = computed.argv[0] if computed is not None and computed.argv else []
    every = facts.evidence.values()
    depths = [found.quality.n_chunks for found in every if found.quality is not None]
    depths += [found.similarity.n_lines for found in every if found.similarity is not None]
    measured = facts.stages.get("evaluate")
    words = measured.argv[0] if measured is not None and measured.argv else []
    bench = argument(words, "--bench")
    made = [entry.as_recipe() for entry in facts.files if entry.kind == "model"]
    return Options(
        model="",
        out=set_dir.resolve().parent,
        recipes=tuple(recipe.name for recipe in made),
        custom=tuple(recipe for recipe in made if recipe.name not in recipes.TABLE),
        llama_cpp=asked.llama_cpp,
        backend=asked.backend,
        cmake_args=asked.cmake_args,
        calibration=facts.calibration.name if facts.calibration else "default",
        chunks=_number(argument(argv, "--chunks")),
        threads=asked.threads,
        gpu_layers=_number(argument(argv, "-ngl")) or 0,
        jobs=asked.jobs,
        proof=asked.proof,
        # A set that nobody measured is not measured now, either.
        evaluate=asked.evaluate and bool(facts.evidence),
        eval_chunks=max(depths, default=None),
        bench=tuple(bench.split(",")) if bench else None,
        mmproj=not facts.model.left_out,
        allow_mismatch=facts.parity is not None and bool(facts.parity.differences or facts.parity.problem),
        split_max_size=facts.split_max_size,
        reference=argument(words, "--from") or _imatrix_reference(argv),
        rehash=asked.rehash,
        wait=asked.wait,
    )


def _imatrix_reference(argv: Sequence[str]) -> str | None:
    """The recipe that an imatrix was computed with in the place of the base, from llama-imatrix's command line."""
    model = Path(argument(argv, "-m") or "").name
    return model.removeprefix("imatrix-from-").split("-")[0] if model.startswith("imatrix-from-") else None


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


# --- doing ---------------------------------------------------------------------------------------------------------


def _record(state: Run, seen: Seen, how: Any) -> None:
    """Write the decisions into the manifest, each with the hash of the file it now speaks of."""
    earlier = state.manifest.begun_refresh(state.build.key)
    before = earlier.before if earlier is not None else state.manifest.llama_cpp
    builds = {
        measured.build
        for found in state.manifest.evidence.values()
        for measured in (found.quality, found.similarity, found.failed, found.speed)
        if measured is not None
    }
    decisions: dict[str, FileDecision] = {}
    for name, decision in seen.decisions.items():
        entry = state.manifest.made(seen.rows[name]) if name in seen.rows else state.manifest.file(name)
        if entry is not None:
            decisions[entry.name] = decision.model_copy(update={"sha256": entry.sha256})
    facts = RefreshFacts(
        before=before,
        build=session.build_facts(state.build),
        state=how,
        files=decisions,
        evidence_builds=sorted(builds - {state.build.key}),
    )
    new: dict[str, Any] = {"refresh": facts}
    if how != "checked":
        new["llama_cpp"] = facts.build
    state.record(state.manifest.model_copy(update=new))


def _carry_out(state: Run, seen: Seen) -> None:
    """Do what was decided. What is done is recorded file by file, so a killed refresh goes on there.

    Raises `BadInputError` when something could not be decided: then nothing is changed.
    """
    undecided = {name: decision for name, decision in seen.decisions.items() if decision.outcome == "unknown"}
    if undecided:
        _record(state, seen, "checked")
        name, decision = next(iter(undecided.items()))
        raise BadInputError(
            f"{state.set_dir} is left as it is: of {len(undecided)} files it is not known whether they change, first "
            f"{name}: {decision.why}",
            next_step="Supply what is missing (--model names the checkpoint), or make it anew: gemma-gguf run MODEL",
        )
    _prove(state, seen)
    if seen.checkpoint is not None and seen.base is not None:  # without it, what the set records of it stays
        factory.compare_with_checkpoint(state, seen.checkpoint, seen.base)
    old_key = state.manifest.llama_cpp.key
    old_base = _base_sha(state)
    earlier = state.manifest.begun_refresh(state.build.key)
    old_shas = {entry.name: entry.sha256 for entry in state.manifest.files}
    old_shards = {entry.name: entry.shards for entry in state.manifest.files}
    if earlier is not None:  # what is done by now has another hash
        old_shas |= {name: found.sha256 for name, found in earlier.files.items() if found.sha256 is not None}
    _record(state, seen, "applying")
    _install_converted(state, seen)
    computed = seen.decisions.get(imatrix.file_name(state.stem))
    new_imatrix = computed is not None and computed.outcome == "remake"
    if not new_imatrix:
        _keep_imatrix(state, old_base, old_key)
    _settle_quants(state, seen)
    factory.remake(state, new_imatrix=new_imatrix)
    for name, decision in seen.decisions.items():
        entry = state.manifest.file(name)
        if entry is None or [part.n_bytes for part in entry.shards] != [part.n_bytes for part in old_shards[name]]:
            continue  # cut otherwise
        if decision.outcome == "remake" and entry.sha256 == old_shas.get(name):
            seen.decisions[name] = stale.unchanged(f"made again, as {decision.why}; every byte is the same")
    _record(state, seen, "applied")


def _base_sha(state: Run) -> str:
    return state.manifest.stages["convert"].outputs[f"{WORK}/{state.base.name}"]


def _prove(state: Run, seen: Seen) -> None:
    """Before anything changes: one file that is kept, or gets another header, is made by the build's llama-quantize.

    Raises `VerificationError` when its bytes are not those: then what was found out is worth nothing.
    """
    kept = {
        name: output
        for name, output in seen.outputs.items()
        if seen.decisions[name].outcome in ("unchanged", "keys") and _problem_free(state, name)
    }
    if not state.options.proof or not kept or seen.base is None:
        return
    by_recipe = {output.recipe: name for name, output in kept.items()}
    sizes = {output.recipe: output.n_bytes for output in kept.values()}
    name = by_recipe[recipes.for_proof(sizes)]
    held = _held(state, name)
    made = [part.path for part in held]
    if seen.decisions[name].outcome == "keys" and not has_heads(held, kept[name]):
        made = _rewritten(kept[name], held)
    started = time.monotonic()
    proof.compare_with_reference(
        state.build,
        state.set_dir,
        state.stem,
        made,
        seen.recipes[name],
        limit=state.options.split_max_size,
        base=seen.base,
        log=state.log,
        progress=state.progress,
    )
    took = time.monotonic() - started
    state.did(Done("proof", name, False, f"byte-identical to llama-quantize's, {took:.1f} s", took))


def _problem_free(state: Run, name: str) -> bool:
    entry = state.manifest.file(name)
    return entry is not None and problem_with(state, entry) is None


def _held(state: Run, name: str) -> list[gguf_io.Header]:
    """The headers of a file of the set, or of all its shards."""
    entry = state.manifest.file(name)
    return shards.read([state.set_dir / part.name for part in entry.parts]) if entry is not None else []


def _rewritten(output: fanout.Output, held: Sequence[gguf_io.Header]) -> list[Path]:
    """The file under its partial name, or all its shards: headers that the build would write, the tensor data it has.

    Nothing is linked, though most shards stay as they are: a partial file is one that later runs may write into.
    """
    output.remove()
    for old, (path, header) in zip(held, output.parts, strict=True):
        n_bytes = old.file_size - old.data_start
        if len(header.data) + n_bytes != header.file_size:
            raise VerificationError(f"{old.path} has {n_bytes} bytes of tensor data, other than planned")
        make_directory(path.parent)
        write_from(path, header.data, old.path, old.data_start, n_bytes)
    return [path for path, _ in output.parts]


def _install_converted(state: Run, seen: Seen) -> None:
    """The base and the projectors that the build converts otherwise, under their names; and what made them.

    The manifest says so at once, when all are there: a refresh that is killed before converts them again.
    """
    facts = state.manifest
    if seen.checkpoint is not None:
        state.source = replace(seen.checkpoint, name=state.source.name)
        facts = facts.model_copy(update={"model": seen.checkpoint.facts})
    old = facts.stages["convert"]
    key = factory.convert_key(state) if old.argv else old.key
    outputs = dict(old.outputs)
    if not state.base.exists() and seen.base is not None and state.base.name not in seen.converted:
        link_or_copy(seen.base, state.base)
    for name, one in seen.converted.items():
        place, digest, entry = factory.accept_converted(state, one, key, is_base=name == state.base.name)
        outputs[place] = digest
        if entry is not None:
            facts = facts.with_file(entry)
        state.did(Done("refresh", name, True, "converted again", one.seconds, one.header.file_size))
    used = facts.converter
    if seen.converted_by is not None:
        used = seen.converted_by
    elif used is not None:  # the same files
        used = used.model_copy(update={"build": state.build.key})
    files = [e.model_copy(update={"key": key}) if e.kind == "mmproj" else e for e in facts.files]
    facts = facts.model_copy(update={"converter": used, "files": files})
    state.record(facts.with_stage("convert", old.model_copy(update={"key": key, "outputs": outputs})))


def _keep_imatrix(state: Run, old_base: str, old_key: str) -> None:
    """Have the imatrix count as that of this base and build: a run with the same text then computes none.

    Its key is taken apart and put together again; where that does not give the recorded one, it is left alone.
    """
    record = state.manifest.stages.get("imatrix")
    entry = state.manifest.file(imatrix.file_name(state.stem))
    if record is None or entry is None:
        return
    facts, argv = state.manifest.calibration, record.argv[0] if record.argv else None

    def key_of(base: str, build: str) -> str:
        if argv is None or facts is None:
            return sha256_json(["imatrix", base, entry.sha256])
        reference = _imatrix_reference(argv)
        chunks, layers = _number(argument(argv, "--chunks")), _number(argument(argv, "-ngl")) or 0
        identity = ["imatrix", base, facts.sha256, argument(argv, "-f"), chunks, layers, build]
        return sha256_json([*identity, reference] if reference else identity)

    if record.key in {key_of(old_base, build) for build in (old_key, entry.build)}:
        key = key_of(_base_sha(state), state.build.key)
        new = state.manifest.with_stage("imatrix", record.model_copy(update={"key": key}))
        state.record(new.with_file(entry.model_copy(update={"key": key})))
    elif record.key != key_of(_base_sha(state), state.build.key):
        state.log.note("the imatrix is kept, but a run will compute it again: its key is not of this version")


def _settle_quants(state: Run, seen: Seen) -> None:
    """Unchanged files count as this build's from now on, others get their new header; the rest is left to be made."""
    base_sha = _base_sha(state)
    imatrix_sha = state.memory.sha256(state.set_dir / imatrix.file_name(state.stem))
    plans = {output.recipe: output.plan for output in seen.outputs.values()}
    for entry in list(state.manifest.files):
        outcome = seen.decisions[entry.name].outcome
        if entry.kind != "model" or outcome not in ("unchanged", "keys"):
            continue
        if entry.as_recipe().is_base:
            if outcome == "unchanged":  # else it is linked to the new base with what is made
                key = production.quant_key(state, recipes.TABLE[str(entry.recipe)], base_sha, imatrix_sha)
                state.record(state.manifest.with_file(entry.model_copy(update={"key": key})))
            continue
        recipe, output = seen.recipes[entry.name], seen.outputs[entry.name]
        key = production.quant_key(state, recipe, base_sha, imatrix_sha)
        if entry.key == key:
            continue
        held = _held(state, entry.name)
        if outcome == "unchanged" or has_heads(held, output):
            state.record(state.manifest.with_file(entry.model_copy(update={"key": key})))
            state.did(Done("refresh", entry.name, False, seen.decisions[entry.name].why, 0.0, entry.n_bytes))
            continue
        started = time.monotonic()
        _rewritten(output, held)
        whole = partial_path(state.set_dir / session.file_name(state, recipe), state.work)
        argv = proof.reference_argv(state.build, state.stem, recipe, whole, state.options.threads)
        n_bytes = sum(part.file_size - part.data_start for part in held)
        # A parent that is not in the set was not asked for its plan; what differs from it is known.
        known = {**plans, recipe.parent: plans.get(recipe.parent, output.plan)} if recipe.parent else plans
        item = production.Todo(recipe, key, seen.decisions[entry.name].why, known)
        production.accept(state, item, output.partial, argv, time.monotonic() - started, stage="refresh")
        state.log.note(f"refresh: {entry.name}: new header, {n_bytes} bytes of tensor data copied, none quantised")
        now = state.manifest.file(entry.name)
        assert now is not None
        state.record(state.manifest.with_file(now.model_copy(update={"differs": entry.differs})))
        _keep_speed(state, entry)


def _keep_speed(state: Run, old: FileEntry) -> None:
    """The same tensors run as fast under another header; their quality is measured anew, as a text may be read
    otherwise now."""
    measured, now = state.manifest.evidence.get(old.sha256), state.manifest.file(old.name)
    if measured is not None and measured.speed is not None and now is not None:
        kept = {
            **state.manifest.evidence,
            now.sha256: Evidence(quality=None, failed=None, similarity=None, speed=measured.speed),
        }
        state.record(state.manifest.model_copy(update={"evidence": kept}))
