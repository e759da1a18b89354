"""What a build, or a corrected checkpoint, changes in a finished set, found out without making it again.

Consumes a `Run` of a finished set under a build, produces `Seen`: a decision for every file, and what carrying it out
needs. llama-quantize is asked for its plans, quantisers are compared by their hashes, sampled rows of these very files
are quantised again, headers are compared with those that would be written; the converter's files are compared, and
where those or the checkpoint's differ the checkpoint is converted once more and compared with what the set has.
Nothing in the set's directory changes.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES

from gemma_gguf import (
    convert,
    fanout,
    gguf_io,
    imatrix,
    llama_cpp,
    manifest,
    planning,
    quantisers,
    quantize,
    session,
    shards,
    source,
    stale,
    tasks,
)
from gemma_gguf.errors import BadInputError, GemmaGGUFError, MissingToolError, ToolFailedError
from gemma_gguf.files import sha256_bytes, sha256_file, sha256_json, write_atomic
from gemma_gguf.gguf_io import Header
from gemma_gguf.llama_cpp import Build
from gemma_gguf.manifest import ConverterFacts, FileDecision, FileEntry
from gemma_gguf.plan import FilePlan
from gemma_gguf.recipes import Recipe
from gemma_gguf.session import CHECKPOINT, WORK, Run

ROWS_PER_EXPERT = 3
EXPERTS = 3  # of a tensor whose rows are sampled
COMPARED_BYTES = 1 << 26  # of two bases at a time


@dataclass
class Shared:
    """What the sets of one refresh share: the workers that quantise rows, and plans, by what they follow from."""

    workers: fanout.Workers
    plans: dict[str, FilePlan] = field(default_factory=dict)


@dataclass
class Seen:
    """What was found out about a set, and what carrying it out needs.

    Files have the names they had: another number of shards gives a file another.
    """

    decisions: dict[str, FileDecision]
    rows: dict[str, str]  # {file name: recipe} of the model files
    checkpoint: source.Source | None = None
    converted: dict[str, convert.Converted] = field(default_factory=dict)  # again, by final name
    converted_by: ConverterFacts | None = None  # when the checkpoint was converted again, whatever came of it
    base: Path | None = None  # as the build converts it
    outputs: dict[str, fanout.Output] = field(default_factory=dict)  # as the build would write them, by file name
    recipes: dict[str, Recipe] = field(default_factory=dict)  # by file name


def look(state: Run, scratch: Path, shared: Shared, *, model: str | None, new_imatrix: bool) -> Seen:
    """Decide about every file of the set.

    `model` names its checkpoint where it is not found by itself; `scratch` is for files that are only compared. What is
    `shared` is that of other sets and this build.
    """
    checkpoint, why_not = _checkpoint(state, model)
    seen = Seen({}, {entry.name: entry.recipe for entry in state.manifest.files if entry.recipe}, checkpoint)
    conversion = _conversion(state, seen, why_not, scratch)
    base_file = convert.base_name(state.stem)
    quants: list[FileEntry] = []
    for entry in state.manifest.files:
        problem = problem_with(state, entry)
        is_base = entry.kind == "model" and entry.as_recipe().is_base
        final = base_file if is_base else entry.name
        if final in seen.converted and problem is not None:  # there was nothing to compare it with
            seen.decisions[entry.name] = stale.remake(problem)
        elif entry.kind == "mmproj" or (is_base and problem is None):
            seen.decisions[entry.name] = stale.decide_converted(final, conversion)
        elif problem is not None and (entry.remote or entry.kind == "imatrix" or conversion.missing is not None):
            seen.decisions[entry.name] = stale.unknown("; ".join(filter(None, (problem, conversion.missing))))
        elif problem is not None:
            seen.decisions[entry.name] = stale.remake(problem)
        elif entry.kind == "imatrix":
            kept = "kept; --new-imatrix computes another"
            new = stale.remake("asked for with --new-imatrix")
            seen.decisions[entry.name] = new if new_imatrix else stale.unchanged(kept)
        elif new_imatrix:
            seen.decisions[entry.name] = stale.remake("a new imatrix was asked for")
        else:
            quants.append(entry)
    if conversion.missing is not None:
        for entry in quants:
            seen.decisions[entry.name] = stale.unknown(conversion.missing)
    elif quants:
        base = conversion.outputs[base_file] if conversion.outputs is not None else stale.Converted()
        _look_at_quants(state, seen, quants, set(base.tensors), shared)
    seen.decisions = {entry.name: seen.decisions[entry.name] for entry in state.manifest.files}
    _take_up(state, seen)
    return seen


def _take_up(state: Run, seen: Seen) -> None:
    """What an interrupted refresh to this build had decided to change stays decided: some of it may be done."""
    earlier = state.manifest.begun_refresh(state.build.key)
    if earlier is not None:
        for name, decision in earlier.files.items():
            now, entry = seen.decisions.get(name), state.manifest.file(name)
            if now is None or entry is None or decision.outcome not in ("keys", "remake"):
                continue
            if now.outcome != "remake" or entry.kind == "mmproj":
                seen.decisions[name] = decision


def problem_with(state: Run, entry: FileEntry) -> str | None:
    """Why a file, or a folder of shards, must be made again whatever the build; None when it is the recorded one."""
    if entry.remote is not None and not entry.is_there(state.set_dir):
        return f"the file is in {entry.remote.repo}, not on this disk"
    if not entry.is_there(state.set_dir):
        return "a shard is missing" if entry.shards else "the file is missing"
    if not session.is_whole(state.memory, state.set_dir, entry):
        return f"{'a shard' if entry.shards else 'the file'} is not the one that {manifest.FILE_NAME} names"
    if entry.kind == "model" and not session.is_cut_at(state.set_dir, entry, state.options.split_max_size):
        return "it is cut at another split limit than the set's"
    return None


def _checkpoint(state: Run, model: str | None) -> tuple[source.Source | None, str]:
    """(the checkpoint, or None, and why it is not at hand). Nothing is downloaded unless --model names it."""
    facts = state.manifest.model
    named = f"{facts.org}/{facts.model}"
    if model is not None:
        # What its files are called was settled when the set was made.
        name = source.told_apart(model, named if Path(model).is_dir() else None)
        if (name.org, name.model) != (facts.org, facts.model):
            raise BadInputError(
                f"{model} is another model than {named}",
                next_step=f"Name the checkpoint of {named} with --model.",
            )
        return _as_asked(state, source.fetch(name, state.work, state.memory, state.progress)), ""
    name = source.ModelName(facts.origin, facts.org, facts.model, revision=facts.revision)
    if facts.origin == "local":
        try:
            place = Path(json.loads((state.work / CHECKPOINT).read_text())["path"])
        except (OSError, ValueError, KeyError, TypeError):
            return None, "where it lies is not known here; --model names it"
        if not place.is_dir():
            return None, "its directory is gone; --model names another"
        name = replace(name, location=place)
    try:
        return _as_asked(state, source.fetch(name, state.work, state.memory, state.progress, download=False)), ""
    except GemmaGGUFError as error:
        return None, error.what


def _as_asked(state: Run, found: source.Source) -> source.Source:
    """Of a set without projectors the checkpoint counts as one that reads, as in a run with --no-mmproj."""
    return found if state.options.mmproj else source.reading(found)


def _conversion(state: Run, seen: Seen, why_not: str, scratch: Path) -> stale.Conversion:
    """Whether the build converts the checkpoint to the same files; sets `seen.base`, and `seen.converted`."""
    seen.base = _whole_base(state)
    stage = state.manifest.stages.get("convert")
    if seen.base is not None and stage is not None and not stage.argv:
        return stale.Conversion(same="its base was given, not converted")
    reasons = _why_convert(state, seen)
    if not reasons:
        used = state.manifest.converter
        assert used is not None
        how = "converted by this build" if used.build == state.build.key else "same converter"
        same = f"{how}: the {len(used.files)} files of it that were imported"
        return stale.Conversion(same=same + (", and the checkpoint's" if seen.checkpoint is not None else ""))
    because = " and ".join(reasons)
    if seen.checkpoint is None:
        return stale.Conversion(missing=f"{because}, and the checkpoint is not at hand: {why_not}")
    try:
        made = convert.convert(seen.checkpoint, state.build, scratch, log=state.log, progress=state.progress)
    except MissingToolError as error:
        return stale.Conversion(missing=f"{because}, and it cannot be converted again: {error.what}")
    seen.converted_by = convert.converter_facts(state.build, made)
    base, base_sha = seen.base, stage.outputs.get(f"{WORK}/{state.base.name}") if stage is not None else None
    outputs: dict[str, stale.Converted] = {}
    for one in made:
        state.progress("comparing what was converted", len(outputs), len(made), "files")
        is_base = one is made[0]
        entry = state.manifest.file(one.final_name)
        whole = entry is not None and problem_with(state, entry) is None
        there = base if is_base else state.set_dir / one.final_name if whole else None
        if there is not None:
            found = compare_files(gguf_io.read_header(there), one.header)
        elif is_base and sha256_file(one.partial) == base_sha:
            found = stale.Converted()
        else:  # there is nothing to compare it with
            found = stale.Converted(tensors=tuple(one.header.by_name))
        outputs[one.final_name] = found
        if found.tensors or found.keys or there is None:
            seen.converted[one.final_name] = one
            seen.base = one.partial if is_base else seen.base
    return stale.Conversion(because=because, outputs=outputs)


def _why_convert(state: Run, seen: Seen) -> list[str]:
    """Why it is not clear that the checkpoint converts to what the set has."""
    reasons = [] if seen.base is not None else ["there is no whole base"]
    if seen.checkpoint is not None:
        old = state.manifest.model.files
        new = seen.checkpoint.files
        if other := sorted(name for name in {*old, *new} if old.get(name) != new.get(name)):
            reasons.append(f"the checkpoint's files changed ({stale.some(other)})")
    for entry in state.manifest.files:
        if entry.kind == "mmproj" and (problem := problem_with(state, entry)) is not None:
            reasons.append(f"{problem}: {entry.name}")
    used = state.manifest.converter
    if used is None:
        reasons.append("which files of the converter made the base was not recorded")
    elif other := _other_files(used, state.build):
        reasons.append(f"files of the converter changed ({stale.some(other)})")
    return reasons


def _whole_base(state: Run) -> Path | None:
    """The base, or the bf16 row, which is the same file, if it is the recorded one; of shards it is put together."""
    stage = state.manifest.stages.get("convert")
    recorded = stage.outputs.get(f"{WORK}/{state.base.name}") if stage is not None else None
    row = state.manifest.made("bf16")
    if row is not None and row.sha256 == recorded and session.is_whole(state.memory, state.set_dir, row):
        session.join_base(state.set_dir, state.manifest, state.base)
    for path in session.base_places(state.set_dir, state.work, state.stem):
        if path.is_file() and state.memory.sha256(path) == recorded:
            return path
    return None


def _other_files(used: ConverterFacts, build: Build) -> list[str]:
    """Files of the converter that made a base which this build's converter has otherwise, or not at all."""
    root = build.converter.parent
    return [
        name for name, sha256 in used.files.items() if not (root / name).is_file() or sha256_file(root / name) != sha256
    ]


def compare_files(old: Header, new: Header) -> stale.Converted:
    """Which tensors of two GGUF files differ in place, shape, type or data, and which keys."""
    tensors: list[str] = []
    for index, tensor in enumerate(new.tensors):
        there = old.tensors[index] if index < len(old.tensors) else None
        row = (tensor.name, tensor.shape, tensor.ggml_type)
        placed = there is not None and (there.name, there.shape, there.ggml_type) == row
        if not placed or not _same_data(old, new, tensor.name):
            tensors.append(tensor.name)
    tensors += [tensor.name for tensor in old.tensors if tensor.name not in new.by_name]
    return stale.Converted(tuple(tensors), gguf_io.differing_keys(old.written_again, new.written_again))


def _same_data(old: Header, new: Header, name: str) -> bool:
    one, other = old.by_name[name], new.by_name[name]
    n_rows = one.n_elements // one.shape[0]
    step = max(1, COMPARED_BYTES // max(1, one.n_bytes // n_rows))
    return all(np.array_equal(old.read(one, row, step), new.read(other, row, step)) for row in range(0, n_rows, step))


# --- looking at quants ---------------------------------------------------------------------------------------------


def _look_at_quants(state: Run, seen: Seen, entries: Sequence[FileEntry], changed: set[str], shared: Shared) -> None:
    """Decide about quants by the plans of the build's llama-quantize, its quantisers, sampled rows and headers."""
    assert seen.base is not None
    given = state.set_dir / imatrix.file_name(state.stem)
    base = gguf_io.read_header(seen.base)
    for entry in entries:
        asked = state.manifest.row(str(entry.recipe)) or entry.as_recipe()
        if asked.ftype in state.offered:
            (seen.recipes[entry.name],) = session.fitted(state, [asked], base)
        else:
            seen.decisions[entry.name] = stale.unknown(f"this build's llama-quantize does not offer {asked.ftype}")
    entries = [entry for entry in entries if entry.name in seen.recipes]
    if not given.is_file():
        for entry in entries:
            seen.decisions[entry.name] = stale.unknown("the imatrix that llama-quantize needs to plan is missing")
        return
    made = [seen.recipes[entry.name] for entry in entries]
    imatrix_header = gguf_io.read_header(given)
    plans = _plans(state, made, base, imatrix_header, shared.plans)
    expected = planning.outputs_of(state, base, made, plans, given)
    held = {entry.name: shards.read([state.set_dir / part.name for part in entry.parts]) for entry in entries}
    retyped = {entry.name: _retyped(plans[str(entry.recipe)], shards.joined(held[entry.name])) for entry in entries}
    seen.outputs = dict(zip((entry.name for entry in entries), expected, strict=True))
    planned_alike = [name for name, tensors in retyped.items() if not tensors]
    rows = _sample(
        state,
        base,
        planned_alike,
        outputs=seen.outputs,
        held=held,
        changed=changed,
        given=given,
        workers=shared.workers,
    )
    numbers = quantize.ftype_numbers(state.build, state.log)
    types = {name: _quantised_types(output.plan) for name, output in seen.outputs.items()}
    others = {e.name: e.build for e in entries if not state.manifest.is_of_build(e, state.build.key)}
    hashes = _quantiser_hashes(state, types, others)
    for entry in entries:
        recipe, output = seen.recipes[entry.name], seen.outputs[entry.name]
        new = hashes.get(state.build.key, {})
        old = hashes[others[entry.name]] if entry.name in others else new
        mine = sorted(types[entry.name]) if entry.name in others else []
        keys: tuple[str, ...] = ()
        if not has_heads(held[entry.name], output):
            values = fanout.quantize_keys(numbers[recipe.ftype], given.name, imatrix_header)
            wanted = gguf_io.derived_keys(base, values, shards.KEYS)
            keys = gguf_io.differing_keys(_own_keys(held[entry.name][0]), wanted) or tuple(wanted)
        differing, n_rows = rows.get(entry.name, ((), 0))
        seen.decisions[entry.name] = stale.decide_quant(
            stale.Quant(
                retyped=retyped[entry.name],
                source=tuple(tensor.name for tensor in output.plan.tensors if tensor.name in changed),
                types=types[entry.name],
                other_types=tuple(name for name in mine if name in old and old[name] != new[name]),
                unhashed=tuple(name for name in mine if name not in old),
                rows=differing,
                n_rows=n_rows,
                keys=keys,
            )
        )


def _plans(
    state: Run, made: Sequence[Recipe], base: Header, given: Header, known: dict[str, FilePlan]
) -> dict[str, FilePlan]:
    """What this build's llama-quantize would write for each recipe; asked once for all models of one shape."""
    shape = shape_of(base, given)
    keys = {row.name: sha256_json([shape, row.name, row.ftype, list(row.flags), row.static]) for row in made}
    missing = [recipe for recipe in made if keys[recipe.name] not in known]
    known |= {keys[name]: asked for name, asked in planning.plans_for(state, missing, base, given.path).items()}
    return {name: known[key] for name, key in keys.items()}


def shape_of(base: Header, given: Header) -> list[object]:
    """Everything of a base and its imatrix that types are chosen by: tensors, and keys of the architecture.

    Not the weights, nor the tokenizer and what describes a model: llama-quantize reads neither to plan.
    """
    keys = [name for name in base.keys if not name.startswith(("general.", "tokenizer."))]
    return [
        base.get("general.architecture"),
        [[name, base.get(name)] for name in keys],
        [[tensor.name, tensor.shape, tensor.ggml_type.name] for tensor in base.tensors],
        [[tensor.name, tensor.shape] for tensor in given.tensors],
    ]


def _retyped(asked: FilePlan, held: Header) -> tuple[str, ...]:
    """Tensors that the plan gives another type or place than the file has."""
    places = {tensor.name: (index, tensor.ggml_type) for index, tensor in enumerate(held.tensors)}
    wanted = [t.name for index, t in enumerate(asked.tensors) if places.get(t.name) != (index, t.target)]
    planned = {tensor.name for tensor in asked.tensors}
    return (*wanted, *(name for name in places if name not in planned))


def _quantised_types(asked: FilePlan) -> dict[str, list[str]]:
    """{ggml type: tensors} of what a quantiser computes; floats are copied or rounded."""
    types: dict[str, list[str]] = {}
    for tensor in asked.tensors:
        if tensor.is_quantized and GGML_QUANT_SIZES[tensor.target][0] > 1:
            types.setdefault(tensor.target.name, []).append(tensor.name)
    return types


def _quantiser_hashes(
    state: Run, types: Mapping[str, Iterable[str]], builds: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """{key of a build: {type: hash}} of this build, and of those that made files, by name in `builds`, as far as that
    is recorded or they can still be asked. `types` are those of each file; every build is asked once."""
    wanted: dict[str, set[str]] = {}
    for name, key in builds.items():
        for one in (key, state.build.key):
            wanted.setdefault(one, set()).update(types[name])
    found: dict[str, dict[str, str]] = {}
    for key, names in wanted.items():
        known = state.manifest.quantisers.get(key, {}) | quantisers.recorded(key)
        made_by = state.build if key == state.build.key else llama_cpp.find_build(key)
        if made_by is state.build or (names - set(known) and made_by is not None):
            known = quantisers.hashes(made_by, sorted(names), state.progress)
        found[key] = known
    return found


def has_heads(held: Sequence[Header], output: fanout.Output) -> bool:
    """Whether a file, or each of its shards, begins with just the bytes that the build would write."""
    wanted = [header.data for _, header in output.parts]
    return len(held) == len(wanted) and all(map(is_head, held, wanted))


def _own_keys(first: Header) -> dict[str, bytes]:
    """The keys of a file, or of a first shard without those that tell of the cut."""
    return {name: data for name, data in first.written_again.items() if name not in shards.KEYS}


def is_head(held: Header, expected: bytes) -> bool:
    with held.path.open("rb") as file:
        return held.data_start == len(expected) and file.read(len(expected)) == expected


def sampled_rows(n_rows: int, rows_per_expert: int) -> tuple[int, ...]:
    """First, middle and last row of the first, the middle and the last expert; a dense tensor is one expert."""
    n_experts = max(1, n_rows // rows_per_expert)
    chosen = sorted({expert * (n_experts - 1) // max(1, EXPERTS - 1) for expert in range(EXPERTS)})
    inside = sorted({row * (rows_per_expert - 1) // (ROWS_PER_EXPERT - 1) for row in range(ROWS_PER_EXPERT)})
    return tuple(expert * rows_per_expert + row for expert in chosen for row in inside)


def _in_place(output: fanout.Output, held: Sequence[Header]) -> fanout.Output:
    """Where the tensors of a finished file, or of its shards, are: for a job that only reads."""
    parts = [gguf_io.NewHeader(b"", tuple(t.offset for t in part.tensors), part.file_size) for part in held]
    if len(parts) == 1:
        return replace(output, partial=held[0].path, header=parts[0], shards=())
    return replace(output, partial=held[0].path.parent, shards=tuple(parts))


def _sample(
    state: Run,
    base: Header,
    names: Sequence[str],
    *,
    outputs: Mapping[str, fanout.Output],
    held: Mapping[str, Sequence[Header]],
    changed: set[str],
    given: Path,
    workers: fanout.Workers,
) -> dict[str, tuple[tuple[str, ...], int]]:
    """{file: (tensors of which a sampled row comes out otherwise, rows compared)}, by worker processes of the build.

    Each (tensor, row, type) is quantised once for all files that hold it, from the base and with the set's imatrix.
    """
    if not names:
        return {}
    as_they_are = [_in_place(outputs[name], held[name]) for name in names]
    job = fanout.build_job(
        base,
        as_they_are,
        imatrix=given,
        bin_dir=state.build.bin_dir,
        inputs="",
        phase_of=dict.fromkeys((output.recipe for output in as_they_are), 0),
    )
    tensors = job["tensors"]
    job_path = workers.directory / "rows.json"
    name_of = {outputs[name].recipe: name for name in names}
    text = json.dumps({**job, "tasks": []})
    write_atomic(job_path, text, durable=False)
    differing: dict[str, list[str]] = {name: [] for name in names}
    n_rows = dict.fromkeys(names, 0)
    answers: list[Future[tasks.RowsChecked]] = []
    try:
        pool = workers.pool()
        for index, tensor in enumerate(tensors):
            if tensor["name"] not in changed:
                rows = sampled_rows(tensor["rows"], tensor["rows_per_expert"])
                answers.append(pool.submit(tasks.check_rows, str(job_path), sha256_bytes(text.encode()), index, rows))
                for name in names:
                    n_rows[name] += len(rows)
        for done, answer in enumerate(answers):
            state.progress("quantising sampled rows again", done, len(answers), "tensors")
            found = answer.result()
            for output in found.differing:
                differing[name_of[job["recipes"][output]]].append(tensors[found.tensor]["name"])
    except BrokenProcessPool as error:
        workers.end()
        crashed = tasks.clear_slots(workers.directory)
        at = f" at {crashed[0]}" if crashed else ""
        raise ToolFailedError(f"a worker process of {state.build.source} died{at}", log=state.log.path) from error
    finally:
        for answer in answers:
            answer.cancel()
    return {name: (tuple(differing[name]), n_rows[name]) for name in names}
