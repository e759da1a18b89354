"""The quants of a set: which are to be made, by which engine, in which waves; verified, named and recorded.

Consumes a `Run` whose base and imatrix are there; produces files under their final names and their entries in the
manifest, one at a time as they are finished. What is recorded with the same inputs, recipe and build is kept.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES

from gemma_gguf import (
    fanout,
    gguf_io,
    imatrix,
    llama_cpp,
    plan,
    planning,
    proof,
    quantisers,
    quantize,
    recipes,
    shards,
    verify,
)
from gemma_gguf.files import (
    PARTIAL,
    link_or_copy,
    make_directory,
    partial_folder,
    partial_path,
    replace_durably,
    replace_folder_durably,
    sha256_json,
)
from gemma_gguf.kernel_check import Checked
from gemma_gguf.manifest import FileEntry
from gemma_gguf.plan import FilePlan
from gemma_gguf.recipes import Recipe
from gemma_gguf.session import (
    Done,
    Run,
    file_name,
    fitted,
    is_cut_at,
    is_whole,
    kernels_for,
    new_entry,
    plan_recipe,
    probe_text,
    removed_when_bad,
    select_recipes,
    speeds_for,
    wanted_recipes,
)


def make_quants(state: Run, take_away: Callable[[Run, Sequence[Path]], None]) -> None:
    """Make what is missing of the wanted quants; `take_away` gets the finished files of every wave.

    Raises `GemmaGGUFError` subclasses; files that were finished by then are named and recorded.
    """
    proof.remove_leftovers(state.work)
    header = gguf_io.read_header(state.base)
    base_sha = state.memory.sha256(state.base)
    imatrix_sha = state.memory.sha256(state.set_dir / imatrix.file_name(state.stem))
    wanted = fitted(state, wanted_recipes(state), header)
    todo: list[tuple[Recipe, str, str]] = []
    kept: list[Path] = []
    for recipe in wanted:
        key = quant_key(state, recipe, base_sha, imatrix_sha)
        entry = state.manifest.made(recipe.name)
        if (reason := _why_made(state, entry, key)) is not None:
            todo.append((recipe, key, reason))
        elif entry is not None:
            place = f"in {entry.remote.repo}" if entry.remote is not None else "whole"
            why = f"inputs, recipe and build unchanged, file {place}"
            state.did(Done("quantize", entry.name, False, why, 0.0, entry.n_bytes))
            kept += [] if recipe.is_base or entry.remote is not None else [state.set_dir / entry.name]
    _drop_stale(state, base_sha, imatrix_sha, {recipe.name for recipe in wanted})
    plans: dict[str, FilePlan] = {}
    asked = select_recipes(state, [recipe.parent for recipe, _, _ in todo if recipe.parent])
    parents = set(fitted(state, asked, header))
    to_plan = {*(recipe for recipe, _, _ in todo if not recipe.is_base), *parents}
    for done, recipe in enumerate(sorted(to_plan, key=lambda recipe: recipe.name)):
        state.progress("planning", done, len(to_plan), "recipes")
        plans[recipe.name] = plan_recipe(state, recipe, header, with_imatrix=True)
    made = [Todo(recipe, key, reason, plans) for recipe, key, reason in todo if not recipe.is_base]
    final_imatrix = state.set_dir / imatrix.file_name(state.stem)
    outputs = planning.outputs_of(state, header, [item.recipe for item in made], plans, final_imatrix)
    if state.take_away is None:
        planning.refuse_what_does_not_fit(
            state, outputs, planning.cut_bytes(state, header, [recipe for recipe, _, _ in todo])
        )
    for recipe, key, reason in todo:
        if recipe.is_base:
            _make_base_row(state, header, recipe, key, reason)
    if state.options.proves and (not made or (kept and state.take_away is not None)):
        proof.prove_run(state, again=False)
    if kept:
        # An earlier run ended before these were taken away, and there may be no room for more beside them.
        take_away(state, kept)
    if made:
        _hash_quantisers(state, [item.plan for item in made])
        changes = [[r.name, list(r.flags), r.static] for r in wanted if r != recipes.TABLE.get(r.name)]
        inputs = sha256_json([base_sha, imatrix_sha, state.build.key, changes])
        for finished in _make(state, header, made, outputs, inputs):
            take_away(state, finished)


def _hash_quantisers(state: Run, plans: Sequence[FilePlan]) -> None:
    """Record what this build's quantisers make of fixed rows: a later build is compared with it."""
    used = {t.target for asked in plans for t in asked.tensors if t.is_quantized and GGML_QUANT_SIZES[t.target][0] > 1}
    known = quantisers.hashes(state.build, [kind.name for kind in used], state.progress)
    mine = {kind.name: known[kind.name] for kind in used}
    every = state.manifest.quantisers
    mine = dict(sorted({**every.get(state.build.key, {}), **mine}.items()))
    state.record(state.manifest.model_copy(update={"quantisers": {**every, state.build.key: mine}}))


def _why_made(state: Run, entry: FileEntry | None, key: str) -> str | None:
    """Why a quant is to be made; None when what the set has is right."""
    if entry is None:
        return "not made yet"
    if entry.key != key:
        return "changed inputs, recipe or build"
    if entry.remote is not None:
        return None
    if not is_whole(state.memory, state.set_dir, entry):
        return "file missing or changed"
    return None if is_cut_at(state.set_dir, entry, state.options.split_max_size) else "another split limit"


def quant_key(state: Run, recipe: Recipe, base_sha: str, imatrix_sha: str) -> str:
    """Hash of everything a quant's bytes depend on."""
    used = "static" if recipe.static else imatrix_sha
    return sha256_json(["quantize", base_sha, used, recipe.ftype, list(recipe.flags), state.build.key])


def _drop_stale(state: Run, base_sha: str, imatrix_sha: str, wanted: set[str]) -> None:
    """Quants of an earlier run, of another base, imatrix or build, are no part of the set that this run describes.

    They stay on the disk, and `verify` names them, until they are made again or deleted.
    """
    kept: list[FileEntry] = []
    for entry in state.manifest.files:
        stale = entry.kind == "model" and entry.recipe not in wanted
        # A static file is one of a QAT set alone.
        of_this_kind = entry.static == (entry.ftype == "Q4_0" and state.manifest.qat is not None)
        if stale and not (of_this_kind and entry.key == quant_key(state, entry.as_recipe(), base_sha, imatrix_sha)):
            why = "made from another base, imatrix or build: left out of the set"
            state.did(Done("quantize", entry.name, False, why, 0.0))
        else:
            kept.append(entry)
    if len(kept) < len(state.manifest.files):
        state.record(state.manifest.model_copy(update={"files": kept}))


@dataclass(frozen=True)
class Todo:
    """One quant to be made: its recipe, its key, why it is made, and the plans of all recipes."""

    recipe: Recipe
    key: str
    why: str
    plans: Mapping[str, FilePlan]

    @property
    def plan(self) -> FilePlan:
        return self.plans[self.recipe.name]


def _make(
    state: Run, header: gguf_io.Header, made: Sequence[Todo], listed: Sequence[fanout.Output], inputs: str
) -> Iterator[list[Path]]:
    """All quants, at once or in the waves in which someone takes them away; yields the files of each."""
    outputs = {output.recipe: output for output in listed}
    using = _kernels(state) if state.options.engine == "fanout" else None
    speeds = speeds_for(state, [item.plan for item in made], using)
    waves = [list(outputs)] if state.take_away is None else _waves(state, outputs, speeds, inputs)
    proves = planning.will_prove(state)
    to_prove = recipes.for_proof({name: outputs[name].n_bytes for name in waves[0]})
    for wave in waves:
        items = [item for item in made if item.recipe.name in wave]
        if state.options.engine == "fanout":
            parts = [outputs[item.recipe.name] for item in items]
            _fan_out(state, header, items, parts, inputs=inputs, using=using, speeds=speeds)
        else:
            for item in items:
                _loop_once(state, item, outputs[item.recipe.name])
        if proves and to_prove in wave:
            proof.prove_run(state, again=True)
        entries = [entry for item in items if (entry := state.manifest.made(item.recipe.name)) is not None]
        yield [state.set_dir / entry.name for entry in entries]


def _waves(
    state: Run, outputs: Mapping[str, fanout.Output], speeds: Mapping[str, float], inputs: str
) -> list[list[str]]:
    """The recipes in waves that fit. The first holds what proves the rest: what is taken away was proven before.

    What an interrupted run had begun comes first where it fits: its partial files lie there, and take room.
    """
    waves = planning.waves_for(state, list(outputs.values()), speeds)
    earlier = fanout.interrupted(state.work / "fanout", inputs)
    begun = [name for name in outputs if name in earlier]
    if begun and len(planning.waves_for(state, [outputs[name] for name in begun], speeds)) == 1:
        rest = [[name for name in wave if name not in begun] for wave in waves]
        return [begun, *filter(None, rest)]
    to_prove = recipes.for_proof({name: output.n_bytes for name, output in outputs.items()})
    return sorted(waves, key=lambda wave: to_prove not in wave)


def _kernels(state: Run) -> Checked:
    """What may quantise in ggml's place, said and recorded."""
    using = kernels_for(state)
    for name, why in using.facts.off.items():
        state.did(Done("kernels", f"{name} by ggml", False, why, 0.0))
    state.record(state.manifest.model_copy(update={"kernels": using.facts}))
    return using


def _make_base_row(state: Run, header: gguf_io.Header, recipe: Recipe, key: str, why: str) -> None:
    """The bf16 row is the converter's output as it is: a link to it, or ranges of it where that is over the limit."""
    started = time.monotonic()
    final = state.set_dir / file_name(state, recipe)
    cut = planning.base_shards(state, header)
    path, argv = state.base, []
    if cut:
        path = partial_folder(final.with_suffix(""), state.work)
        shutil.rmtree(path, ignore_errors=True)  # of a run that was killed
        targets = [path / shards.name(final.stem, number, len(cut)) for number in range(len(cut))]
        state.progress(f"cutting {recipe.name}", 0, 1, "files")
        shards.cut(header, cut, targets)
        argv = quantize.split_argv(state.build, state.base.name, final.stem, state.options.split_max_size)
    with removed_when_bad(path) if cut else contextlib.nullcontext():
        checks = verify.check_file(path, None, build=state.build, text=probe_text(state), log=state.log)
    if not cut:
        link_or_copy(path, final)
    entry = new_entry(
        state,
        path if cut else final,
        kind="model",
        recipe=recipe,
        key=key,
        argv=argv,
        seconds=time.monotonic() - started if cut else 0.0,
        checks=checks,
        engine="convert",
    )
    _name_and_record(state, entry, path if cut else None)
    state.did(Done("quantize", entry.name, True, why, time.monotonic() - started, entry.n_bytes))


def _name_and_record(state: Run, entry: FileEntry, partial: Path | None) -> None:
    """Give a verified partial file, or folder of shards, its name; record it, and delete what it takes the place of.

    `partial` None: it has its name.
    """
    older = state.manifest.made(str(entry.recipe))
    final = (state.set_dir / entry.name).parent if entry.shards else state.set_dir / entry.name
    if partial is not None:
        (replace_folder_durably if entry.shards else replace_durably)(partial, final)
        state.memory.moved(partial, final)
    state.record(state.manifest.with_file(entry))
    if older is not None and bool(older.shards) != bool(entry.shards):  # else it had the same name
        older.remove(state.set_dir)


def _loop_once(state: Run, item: Todo, output: fanout.Output) -> None:
    """Make one file with llama-quantize, and cut it with llama-gguf-split where it is over the limit."""
    partial = partial_path(state.set_dir / file_name(state, item.recipe), state.work)
    argv = proof.reference_argv(state.build, state.stem, item.recipe, partial, state.options.threads)
    run = quantize.run_llama_quantize(
        argv, f"quantising {item.recipe.name}", cwd=state.set_dir, log=state.log, progress=state.progress
    )
    if output.shards:
        output.remove()
        make_directory(output.partial)
        prefix = str(output.partial / output.partial.name.removesuffix(PARTIAL))
        limit = state.options.split_max_size
        llama_cpp.run_tool(quantize.split_argv(state.build, str(partial), prefix, limit), log=state.log)
        partial.unlink()
    accept(state, item, output.partial, argv, run.seconds)


def accept(
    state: Run, item: Todo, partial: Path, argv: Sequence[str], seconds: float, *, stage: str = "quantize"
) -> None:
    """Verify a finished partial file, or folder of shards, give it its name, and record it."""
    started = time.monotonic()
    with removed_when_bad(partial):
        checks = verify.check_file(partial, item.plan, build=state.build, text=probe_text(state), log=state.log)
    entry = new_entry(
        state, partial, kind="model", recipe=item.recipe, key=item.key, argv=argv, seconds=seconds, checks=checks
    ).model_copy(
        update={
            **({} if partial.is_dir() else {"name": file_name(state, item.recipe)}),
            "fallbacks": item.plan.fallbacks,
            "differs": item.plan.differs_from(item.plans[item.recipe.parent]) if item.recipe.parent else [],
        }
    )
    _name_and_record(state, entry, partial)
    took = seconds + time.monotonic() - started
    state.did(Done(stage, entry.name, True, item.why, took, entry.n_bytes))


def _fan_out(
    state: Run,
    header: gguf_io.Header,
    made: Sequence[Todo],
    outputs: Sequence[fanout.Output],
    *,
    inputs: str,
    using: Checked | None,
    speeds: Mapping[str, float],
) -> None:
    """Make files together; each is verified and named as soon as its bytes are whole."""
    started = time.monotonic()
    options = state.options
    job_dir = state.work / "fanout"
    if options.scheduler is None:
        jobs = fanout.workers_for(options.jobs, options.max_memory)
    else:
        jobs = fanout.dask_workers(options.scheduler)
    job = fanout.build_job(
        header,
        outputs,
        imatrix=state.set_dir / imatrix.file_name(state.stem),
        bin_dir=state.build.bin_dir,
        inputs=inputs,
        kernels=using.kernels if using else None,
        phase_of=plan.phases([item.plan for item in made], speeds),
        shared=options.scheduler is not None,
    )
    job_path, done, skip = fanout.prepare(job, job_dir, outputs)
    if done:
        state.log.note(f"fan-out: {len(done)} of {len(job['tasks'])} tasks were done by an earlier run")
    by_recipe = {item.recipe.name: (item, output.partial) for item, output in zip(made, outputs, strict=True)}

    def accept_output(recipe: str) -> None:
        item, partial = by_recipe[recipe]
        whole = partial_path(state.set_dir / file_name(state, item.recipe), state.work)
        argv = proof.reference_argv(state.build, state.stem, item.recipe, whole, options.threads)
        accept(state, item, partial, argv, time.monotonic() - started)

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
        on_output=accept_output,
        on_stop=lambda: llama_cpp.end_leftovers(state.log),
        progress=state.progress,
    )
    shutil.rmtree(job_dir)
    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in figures.part_seconds.items())
    state.log.note(
        f"fan-out: {figures.tasks} tasks, {figures.cpu_seconds:.1f} CPU s ({parts}), "
        f"{figures.read_bytes} bytes read, {figures.written_bytes} written"
    )
