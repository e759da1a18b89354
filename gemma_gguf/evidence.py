"""What has been measured of a set, and what is still to be: the order of an evaluation.

Consumes a set with its manifest and a base, produces `Manifest.evidence`: quality and speed by a file's sha256, so
that rows which are the same file share one measurement, an unchanged file is never measured twice, and a changed one
never keeps old numbers. The manifest is written after every file; a killed evaluation goes on at the next one.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gemma_gguf import calibration, embedding, evaluate, gates, gemma, gguf_io, llama_cpp, manifest
from gemma_gguf.errors import BadInputError, NoFiguresError, VerificationError
from gemma_gguf.evaluate import Against, Material
from gemma_gguf.files import HashMemory, sha256_json
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.manifest import Evidence, Failed, FileEntry, Manifest, Quality, Similarity, Speed, StageRecord
from gemma_gguf.progress import Progress, silent
from gemma_gguf.session import WORK, Done, Run, base_places, is_whole, open_work

M = TypeVar("M", Quality, Similarity)
M_co = TypeVar("M_co", Quality, Similarity, covariant=True)


class _Against(Protocol[M_co]):
    """What the files of a set are compared with: `evaluate.Against`, `evaluate.Embedding`."""

    @property
    def base_sha256(self) -> str: ...

    @property
    def facts(self) -> dict[str, Any]: ...

    def current(self, found: Quality | Similarity | Failed | None) -> M_co | Failed | None: ...


NOTHING = Evidence(quality=None, failed=None, similarity=None, speed=None)


@dataclass(frozen=True)
class Measuring:
    """How a set is measured. `None` means the default that the command line's help names."""

    chunks: int | None = None
    disk_budget: int = evaluate.DISK_BUDGET  # bytes
    bench: tuple[str, ...] | None = None  # recipes, `("all",)` or `("none",)`
    reference: str | None = None  # a recipe that stands in for the base
    threads: int | None = None
    gpu_layers: int = 0
    bounds: gates.Bounds = gates.AS_RECORDED

    def argv(self) -> list[str]:
        """The options that say the same to `gemma-gguf evaluate`."""
        options: list[tuple[str, object]] = [
            ("--eval-chunks", self.chunks),
            ("--bench", ",".join(self.bench) if self.bench else None),
            ("--from", self.reference),
            ("--threads", self.threads),
            ("--gpu-layers", self.gpu_layers or None),
        ]
        return [word for name, value in options if value is not None for word in (name, str(value))]


@dataclass
class _Set:
    """A set while it is measured."""

    build: Build
    directory: Path
    work: Path
    manifest: Manifest
    memory: HashMemory
    log: RunLog
    progress: Progress
    say: Callable[[Done], None]
    whole: bool = True  # every file of the manifest must be there; not so while they are taken away, wave by wave

    def note(self, sha256: str, measured: Quality | Failed | Similarity | Speed) -> None:
        """Write down what was measured of the bytes with this hash; the rest of the evidence stays."""
        part = {Quality: "quality", Failed: "failed", Similarity: "similarity", Speed: "speed"}[type(measured)]
        # A file has figures of one kind, or a reason why it has none.
        cleared = {} if part == "speed" else {"quality": None, "similarity": None, "failed": None}
        new = self.manifest.evidence.get(sha256, NOTHING).model_copy(update={**cleared, part: measured})
        self.record(self.manifest.model_copy(update={"evidence": {**self.manifest.evidence, sha256: new}}))

    def record(self, new: Manifest) -> None:
        self.manifest = gates.recorded(new)
        manifest.save(self.manifest, self.directory)

    def known(self, sha256: str) -> Evidence:
        return self.manifest.evidence.get(sha256, NOTHING)

    def tried(self, sha256: str) -> Quality | Similarity | Failed | None:
        """How close these bytes are to a base, or why nobody can tell, as far as that is known."""
        known = self.known(sha256)
        return known.quality or known.similarity or known.failed


def evaluate_run(state: Run) -> None:
    """Measure what a run has made, as far as it was not measured before."""
    these = _Set(
        build=state.build,
        directory=state.set_dir,
        work=state.work,
        manifest=state.manifest,
        memory=state.memory,
        log=state.log,
        progress=state.progress,
        say=state.did,
        whole=state.take_away is None,
    )
    options = state.options
    how = Measuring(
        chunks=options.eval_chunks,
        disk_budget=options.eval_disk_budget,
        bench=options.bench,
        reference=options.reference,
        threads=options.threads,
        gpu_layers=options.gpu_layers,
        bounds=options.bounds,
    )
    try:
        _measure(these, how)
    finally:
        state.manifest = these.manifest


def evaluate_set(
    set_dir: Path,
    how: Measuring,
    spec: str = llama_cpp.DEFAULT_SPEC,
    *,
    backend: str = "cpu",
    cmake_args: Sequence[str] = (),
    wait: bool = False,
    progress: Progress = silent,
    say: Callable[[Done], None] = lambda _: None,
) -> Manifest:
    """Measure a finished set, as far as it was not measured before; its manifest, with the evidence.

    Raises `BadInputError` when the set has neither a base nor the `reference` that was asked for,
    `VerificationError` when a file is not the one its manifest names, or gives no figures.
    """
    set_dir = set_dir.resolve()
    facts = manifest.load(set_dir)
    build = llama_cpp.build(spec, backend=backend, extra_cmake_args=cmake_args, wait=wait, progress=progress)
    work = set_dir.parent / WORK / facts.stem
    with open_work(work, "evaluate", wait=wait) as log:
        memory = HashMemory(work / "hashes.json")
        these = _Set(build, set_dir, work, manifest.load(set_dir), memory, log, progress, say)
        try:
            _measure(these, how)
        finally:
            memory.save()
        return these.manifest


def _measure(these: _Set, how: Measuring) -> None:
    started = time.monotonic()
    chosen_bounds = how.bounds.chosen(these.manifest.gates)
    these.record(these.manifest.model_copy(update={"gates": chosen_bounds}))
    present = _present(these)
    base, base_sha256 = _base(these, present, how.reference)
    chosen = evaluate.bench_choice(present, how.bench)
    before = these.manifest.evidence
    if (reason := _no_quality(these)) is None:
        embeds = these.manifest.model.embedding is not None
        key = (_measure_similarity if embeds else _measure_quality)(these, present, base, base_sha256, how)
    else:
        these.say(Done("evaluate", "quality", False, reason, 0.0))
        key = sha256_json(["evaluate", reason])
    _measure_speed(these, chosen, how)
    # What no file of the set is any more would stay forever.
    named = {base_sha256, *(entry.sha256 for entry in these.manifest.files)}
    kept = {sha256: found for sha256, found in these.manifest.evidence.items() if sha256 in named}
    if kept != before:
        old = these.manifest.stages.get("evaluate")
        seconds = time.monotonic() - started + (old.seconds if old is not None and old.key == key else 0.0)
        argv = ["gemma-gguf", "evaluate", these.directory.name, *how.argv()]
        stage = StageRecord(key=key, argv=[argv], seconds=round(seconds, 2), outputs={})
        these.record(these.manifest.model_copy(update={"evidence": kept}).with_stage("evaluate", stage))
    for name, verdict in gates.verdicts(these.manifest).items():
        these.say(Done("gate", name, False, str(verdict), 0.0))


def _present(these: _Set) -> list[FileEntry]:
    """The model files that are there; all are what the manifest says. Published ones need not be there."""
    found: list[FileEntry] = []
    for entry in these.manifest.files:
        path = these.directory / entry.name
        must_be_there = these.whole and entry.state == "local"
        if entry.kind != "model" or not (must_be_there or entry.is_there(these.directory)):
            continue
        if not is_whole(these.memory, these.directory, entry):
            raise VerificationError(
                f"{path} is not the file that {manifest.FILE_NAME} names",
                next_step="Make it again with: gemma-gguf run MODEL",
            )
        found.append(entry)
    return found


def _names(entries: Sequence[FileEntry]) -> dict[str, str]:
    """{sha256: what to call the file}: rows that are the same file have one name."""
    names: dict[str, str] = {}
    for entry in entries:
        names[entry.sha256] = f"{names[entry.sha256]} = {entry.recipe}" if entry.sha256 in names else entry.name
    return names


def _base(these: _Set, present: Sequence[FileEntry], reference: str | None) -> tuple[Path, str]:
    """(what all files are compared with, its sha256): the base, or a quant that stands in for it."""
    if reference is not None:
        wanted = next((entry for entry in present if (entry.recipe or "").upper() == reference.upper()), None)
        if wanted is None:
            raise BadInputError(
                f"this set has no {reference} to compare with",
                next_step=f"Choose from: {', '.join(str(entry.recipe) for entry in present)}.",
            )
        return these.directory / wanted.name, wanted.sha256
    places = base_places(these.directory, these.work, these.manifest.stem)
    path = next((path for path in places if path.is_file()), None)
    cut = next((entry for entry in present if entry.recipe == "bf16" and entry.shards), None)
    if path is None and cut is not None:
        return these.directory / cut.name, cut.sha256
    if path is None:
        raise BadInputError(
            f"{these.directory} has no base to compare with",
            next_step="Name a quant to compare with, such as --from Q8_0, or make the base: gemma-gguf convert MODEL",
        )
    return path, these.memory.sha256(path)


def _no_quality(these: _Set) -> str | None:
    """Why no quality can be measured, or None."""
    if these.build.bindings is None:
        return f"{these.build.source} has no bindings; measure with: gemma-gguf evaluate DIR"
    return None


# --- quality -------------------------------------------------------------------------------------------------------


def material_for(facts: Manifest, base: Path) -> Material:
    """The held-out text as this model should read it: plain, or in turns where it has a chat template."""
    template = facts.model.chat_template
    if template is None:
        family = gemma.by_gguf_arch(facts.model.gguf_arch)
        turns = family.turns if family else None
        return evaluate.plain_material(
            calibration.in_turns("heldout", functools.partial(calibration.turns_of, turns), "in the family's turns")
        )
    bos, eos = gguf_io.read_header(base).token_texts("bos", "eos")
    return evaluate.chat_material(
        "heldout",
        calibration.held_out_conversations(),
        template,
        bos_token=bos,
        eos_token=eos,
    )


def _measure_quality(these: _Set, present: Sequence[FileEntry], base: Path, base_sha256: str, how: Measuring) -> str:
    """Measure the base against itself, then every file; returns the key of what all were measured with."""
    material = material_for(these.manifest, base)
    against = Against(
        build=these.build,
        base=base,
        base_sha256=base_sha256,
        material=material,
        n_chunks=how.chunks or evaluate.DEFAULT_CHUNKS[material.mode],
        threads=evaluate.threads_or_default(how.threads),
        gpu_layers=how.gpu_layers,
        other_builds=these.manifest.evidence_builds(these.build.key),
    )
    files = _compared(these, present, base, base_sha256)
    n_vocab = 0
    if not all(against.current(these.tried(sha256)) for sha256 in files):
        n_available, n_vocab = evaluate.count_chunks(these.build, base, material, these.work, these.log)
        against = replace(against, n_chunks=min(against.n_chunks, n_available))
    comparing = evaluate.comparing(
        against,
        directory=these.work / "evaluate",
        n_vocab=n_vocab,
        disk_budget=how.disk_budget,
        log=these.log,
        progress=these.progress,
    )
    _measure_each(these, files, against, comparing, what="text", shown=_shown)
    return sha256_json(["evaluate", base_sha256, material.sha256, material.mode, against.n_chunks, these.build.key])


def _measure_similarity(these: _Set, present: Sequence[FileEntry], base: Path, base_sha256: str, how: Measuring) -> str:
    """Embed lines with the base and every file; returns the key of what all were measured with."""
    said = these.manifest.model.embedding
    assert said is not None
    text = calibration.held_out()
    against = evaluate.Embedding(
        build=these.build,
        base=base,
        base_sha256=base_sha256,
        lines=embedding.lines_of(text.name, text.data, said, how.chunks),
        threads=evaluate.threads_or_default(how.threads),
        gpu_layers=how.gpu_layers,
        other_builds=these.manifest.evidence_builds(these.build.key),
    )
    files = _compared(these, present, base, base_sha256)
    embedding_files = evaluate.embedding_files(
        against, directory=these.work / "evaluate", log=these.log, progress=these.progress
    )
    _measure_each(these, files, against, embedding_files, what="lines", shown=_shown_similarity)
    return sha256_json(["evaluate", base_sha256, against.lines.sha256, these.build.key])


def _compared(these: _Set, present: Sequence[FileEntry], base: Path, base_sha256: str) -> dict[str, tuple[str, Path]]:
    """{sha256: (name, path)} of what is compared with the base: itself first, which gives the noise."""
    paths = {entry.sha256: these.directory / entry.name for entry in present} | {base_sha256: base}
    return {sha256: (name, paths[sha256]) for sha256, name in ({base_sha256: base.name} | _names(present)).items()}


def _measure_each(
    these: _Set,
    files: Mapping[str, tuple[str, Path]],
    against: _Against[M],
    opened: AbstractContextManager[Callable[[Path], M]],
    *,
    what: str,
    shown: Callable[[M], str],
) -> None:
    """Measure every file that was not measured `against` just this with what `opened` gives, entered if there is any.

    A file without finite figures is noted as such, unless it is the base: then nothing can be compared, and
    `NoFiguresError` goes on.
    """

    def says(found: M | Failed) -> str:
        return f"no finite figures: {found.why}" if isinstance(found, Failed) else shown(found)

    with contextlib.ExitStack() as stack:
        measure: Callable[[Path], M] | None = None
        for sha256, (name, path) in files.items():
            if (known := against.current(these.tried(sha256))) is not None:
                why = f"the same file, base, {what} and build: {says(known)}"
                these.say(Done("evaluate", name, False, why, 0.0))
                continue
            if measure is None:
                measure = stack.enter_context(opened)
            begun = time.monotonic()
            found: M | Failed
            try:
                found = measure(path)
            except NoFiguresError as error:
                if sha256 == against.base_sha256:
                    raise
                found = Failed(**against.facts, why=error.why)
            these.note(sha256, found)
            these.say(Done("evaluate", name, True, says(found), time.monotonic() - begun))


def _shown_similarity(found: Similarity) -> str:
    cosine, same = found.cosine, found.same_nearest
    return (
        f"cosine {cosine.value:.6f} ± {cosine.se or 0:.6f}, least {found.cosine_min:.4f}, "
        f"same nearest {100 * same.value:.2f} ± {100 * (same.se or 0):.2f} %"
    )


def _shown(quality: Quality) -> str:
    ppl, kld, same = quality.ppl, quality.kld, quality.same_top_p
    return (
        f"PPL {ppl.value:.4f} ± {ppl.se or 0:.4f}, KLD {kld.value:.6f} ± {kld.se or 0:.6f}, "
        f"same top {100 * same.value:.2f} ± {100 * (same.se or 0):.2f} %"
    )


# --- speed ---------------------------------------------------------------------------------------------------------


def _measure_speed(these: _Set, chosen: Sequence[FileEntry], how: Measuring) -> None:
    threads = evaluate.threads_or_default(how.threads)
    n_generate = evaluate.BENCH_GENERATE if these.manifest.model.embedding is None else 0
    names = _names(chosen)
    kept = these.manifest.evidence_builds(these.build.key)
    todo: list[FileEntry] = []
    for entry in {entry.sha256: entry for entry in chosen}.values():
        speed = these.known(entry.sha256).speed
        if speed is not None and evaluate.speed_is_current(speed, these.build, threads, kept, n_generate=n_generate):
            why = f"the same file, build and machine: {_shown_speed(speed)}"
            these.say(Done("evaluate", names[entry.sha256], False, why, 0.0))
        else:
            todo.append(entry)
    if not todo:
        return
    begun = time.monotonic()
    found = evaluate.bench(
        these.build,
        [these.directory / entry.name for entry in todo],
        threads=threads,
        gpu_layers=how.gpu_layers,
        n_generate=n_generate,
        log=these.log,
        progress=these.progress,
    )
    took = (time.monotonic() - begun) / len(todo)
    for entry, speed in zip(todo, found, strict=True):
        these.note(entry.sha256, speed)
        these.say(Done("evaluate", names[entry.sha256], True, _shown_speed(speed), took))


def _shown_speed(speed: Speed) -> str:
    prompt, generate = speed.prompt_per_second, speed.generate_per_second
    shown = f"pp{speed.n_prompt} {prompt.value:.1f} ± {prompt.se or 0:.1f} t/s"
    if generate is None:
        return shown
    return f"{shown}, tg{speed.n_generate} {generate.value:.1f} ± {generate.se or 0:.1f} t/s"
