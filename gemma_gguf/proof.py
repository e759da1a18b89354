"""Proof that a set is what it says: its files against their manifest, and against llama-quantize's.

Consumes a finished set, produces verdicts; raises `VerificationError` for the first file whose bytes are not those the
reference engine makes.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_gguf import (
    convert,
    imatrix,
    llama_cpp,
    manifest,
    plan,
    quantize,
    recipes,
    shards,
    verify,
)
from gemma_gguf.errors import BadInputError, VerificationError
from gemma_gguf.files import (
    PARTIAL,
    make_directory,
    sha256_json,
)
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.manifest import FileEntry, StageRecord
from gemma_gguf.progress import Progress, silent
from gemma_gguf.recipes import Recipe
from gemma_gguf.session import (
    WORK,
    Done,
    Run,
    open_work,
    restore_base,
)

REFERENCE = "reference"  # begins the name of llama-quantize's file


def reference_argv(
    build: Build, stem: str, recipe: Recipe, out: Path, threads: int | None, *, base: Path | None = None
) -> list[str]:
    """The command line that makes a file of a set with llama-quantize, run in the set's directory.

    The base lies in the work directory, unless another is given; no key of the file holds its name.
    """
    return quantize.quantize_argv(
        build,
        recipe,
        str(base.resolve()) if base is not None else f"../{WORK}/{stem}/{convert.base_name(stem)}",
        f"../{WORK}/{stem}/{out.name}",
        imatrix=imatrix.file_name(stem),
        threads=threads,
    )


def is_proven(state: Run) -> bool:
    """Whether an earlier run of this build proved files of the set as it is; they may be published by now."""
    record = state.manifest.stages.get("proof")
    made = (entry for entry in state.manifest.files if entry.engine == "fanout")
    known = {entry.name: entry.sha256 for entry in made if state.manifest.is_of_build(entry, state.build.key)}
    return record is not None and record.outputs.items() <= known.items()


def remove_leftovers(work: Path) -> None:
    """Remove what a proof that was killed had made."""
    for left in work.glob(f"{REFERENCE}-*{PARTIAL}*"):
        if left.is_dir():  # what llama-gguf-split cut of it
            shutil.rmtree(left)
        else:
            left.unlink()


def prove_run(state: Run, *, again: bool) -> None:
    """Make one file of the fan-out once more with llama-quantize: it must be the same, byte for byte.

    Done when files were made, or when an earlier run ended before its proof. After a mismatch the fan-out's files are
    taken out of the set: none of them can be trusted.
    """
    engines = [entry for entry in state.manifest.files if entry.engine == "fanout"]
    made = {str(entry.recipe): entry for entry in engines if entry.is_there(state.set_dir)}
    if not made:
        return
    if not again and is_proven(state):
        return
    entry = made[recipes.for_proof({name: entry.n_bytes for name, entry in made.items()})]
    started = time.monotonic()
    try:
        compare_with_reference(
            state.build,
            state.set_dir,
            state.stem,
            [state.set_dir / part.name for part in entry.parts],
            entry.as_recipe(),
            limit=state.manifest.split_max_size,
            log=state.log,
            progress=state.progress,
        )
    except VerificationError:
        for bad in made.values():
            bad.remove(state.set_dir)
        state.record(
            state.manifest.model_copy(update={"files": [f for f in state.manifest.files if f.engine != "fanout"]})
        )
        raise
    took = time.monotonic() - started
    outputs = {entry.name: entry.sha256}
    proof = StageRecord(key=sha256_json(["proof", outputs]), argv=[entry.argv], seconds=round(took, 2), outputs=outputs)
    state.record(state.manifest.with_stage("proof", proof))
    state.did(Done("proof", entry.name, False, f"byte-identical to llama-quantize's, {took:.1f} s", took))


def compare_with_reference(
    build: Build,
    set_dir: Path,
    stem: str,
    made: Sequence[Path],
    recipe: Recipe,
    *,
    limit: int,
    base: Path | None = None,
    log: RunLog,
    progress: Progress,
) -> None:
    """Raise `VerificationError` naming the first differing tensor unless llama-quantize makes the same file as `made`.

    `made` is one path, or those of all shards in their order: these are compared with what llama-gguf-split cuts of
    llama-quantize's file, those of the bf16 row with what it cuts of the base. `limit` is the set's split limit; shards
    of an earlier run with another are cut as they are.
    """
    work = set_dir.parent / WORK / stem
    reference = work / f"{REFERENCE}-{recipe.name}{PARTIAL}.gguf"
    cut = work / f"{REFERENCE}-{recipe.name}{PARTIAL}"
    try:
        if recipe.is_base:
            reference = base or work / convert.base_name(stem)
        else:
            argv = reference_argv(build, stem, recipe, reference, None, base=base)
            quantize.run_llama_quantize(argv, f"proving {recipe.name}", cwd=set_dir, log=log, progress=progress)
        if len(made) == 1:
            verify.compare(made[0], reference)
            return
        make_directory(cut)
        prefix = str(cut / f"{stem}-{recipe.name}")
        cut_at = shards.limit_of(shards.read(made), limit)
        llama_cpp.run_tool(quantize.split_argv(build, str(reference), prefix, cut_at), log=log)
        theirs, ours = sorted(path.name for path in cut.iterdir()), [path.name for path in made]
        if theirs != ours:
            raise VerificationError(
                f"{made[0]} is one of {len(ours)} shards; llama-gguf-split makes {len(theirs)}: {', '.join(theirs)}",
                next_step="Make the set again with the same --split-max-size, and report this: it should never happen.",
            )
        for shard in made:
            verify.compare(shard, cut / shard.name)
    finally:
        shutil.rmtree(cut, ignore_errors=True)
        if not recipe.is_base:
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
    # The bf16 row is the base itself; where it was cut, the cuts are compared.
    models = [entry for entry in facts.files if entry.recipe and (entry.engine != "convert" or entry.shards)]
    made = sorted((entry for entry in models if entry.is_there(set_dir)), key=lambda entry: entry.n_bytes)
    work = set_dir.parent / WORK / facts.stem
    base = work / convert.base_name(facts.stem)
    restore_base(set_dir, facts, base)
    if not made or not base.exists():
        raise BadInputError(
            f"{set_dir} has no {'base' if made else 'quants'} to compare with llama-quantize's",
            next_step="Make the set with: gemma-gguf run MODEL",
        )
    build = llama_cpp.build(spec, backend=backend, extra_cmake_args=cmake_args, wait=wait, progress=progress)
    if (other := next((e for e in made if not facts.is_of_build(e, build.key)), None)) is not None:
        raise BadInputError(
            f"{other.name} was not made by this build of {build.source}",
            next_step="Name the build the set was made with: --llama-cpp, --backend.",
        )
    compared: list[str] = []
    with open_work(work, "proof", wait=wait) as log:
        count = min(sample or len(made), len(made))
        for entry in (made[i * len(made) // count] for i in range(count)):
            begun = time.monotonic()
            compare_with_reference(
                build,
                set_dir,
                facts.stem,
                [set_dir / part.name for part in entry.parts],
                entry.as_recipe(),
                limit=facts.split_max_size,
                log=log,
                progress=progress,
            )
            took = time.monotonic() - begun
            say(Done("proof", entry.name, False, f"byte-identical to llama-quantize's, {took:.1f} s", took))
            compared.append(str(entry.recipe))
    return compared


@dataclass(frozen=True)
class Verified:
    """The outcome for one file of a set: `problem` is None when it is what the manifest says.

    `place` is where a published file is that was not looked at, as it is not on this disk.
    """

    name: str
    problem: str | None
    place: str | None = None


def verify_set(set_dir: Path, *, progress: Progress = silent) -> list[Verified]:
    """Read every file of a set again and compare it with its manifest: sha256, layout, keys, sampled rows.

    Every file is looked at, whatever is wrong with the others; a file the manifest does not name is a problem, too.
    """
    facts = manifest.load(set_dir)
    results: list[Verified] = []
    for done, entry in enumerate(facts.files):
        progress(f"verifying {entry.name}", done, len(facts.files), "files")
        if entry.remote is not None and not entry.is_there(set_dir):
            results.append(Verified(entry.name, None, f"{entry.remote.repo}, commit {entry.remote.commit[:9]}"))
            continue
        results.append(Verified(entry.name, _problem(set_dir, entry)))
    named = {part.name for entry in facts.files for part in entry.parts}
    for path in sorted(set_dir.rglob("*.gguf")):
        name = path.relative_to(set_dir).as_posix()
        if name not in named:
            results.append(Verified(name, "not in quantset.json"))
    return results


def _problem(set_dir: Path, entry: FileEntry) -> str | None:
    missing = [part.name for part in entry.parts if not (set_dir / part.name).is_file()]
    if missing:
        return f"missing: {', '.join(missing)}" if entry.shards else "missing"
    try:
        parts = shards.read([set_dir / part.name for part in entry.parts])
        verify.check_bytes(parts)
        tensors = shards.joined(parts).tensors
        if entry.checks is not None and plan.layout_of(tensors) != entry.checks.layout_sha256:
            return "its tensors are not the recorded ones"
    except (BadInputError, VerificationError) as error:
        return error.what
    # Read now, whatever is remembered: this command exists to look at the bytes.
    whole, own = shards.hashes(parts)
    for part, digest in zip(entry.parts, own, strict=True):
        if digest != part.sha256:
            return f"the sha256 of {part.name} is not the recorded one" if entry.shards else _OTHER_SHA256
    return None if whole == entry.sha256 else _OTHER_SHA256


_OTHER_SHA256 = "its sha256 is not the recorded one"
