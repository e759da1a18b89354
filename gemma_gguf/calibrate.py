"""Calibration texts compared by what they are for: low-bit files on text that none of them holds.

Consumes a `Run` whose base is there, names of calibration sets, recipes and numbers of chunks; produces a `Comparison`:
for every set and number of chunks, and for no imatrix at all, the KL divergence of each recipe from the base. All files
read the same tokens, so two sets are compared by the differences chunk by chunk: most of what a single figure is
uncertain by is the text, and that is the same for both. Errors are over chunks, as tokens of one chunk are not
independent.

Sets have different lengths, and more text is an advantage of its own. So every set is also cut where another one asked
for ends, and sets are compared at equal numbers of chunks alone.

Nothing is measured twice: imatrices and figures are kept below the work directory, the quants are not.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_gguf import (
    calibration,
    evaluate,
    evidence,
    fanout,
    gemma,
    gguf_io,
    imatrix,
    llama_cpp,
    plan,
    quantize,
    recipes,
)
from gemma_gguf.calibration import Text
from gemma_gguf.errors import BadInputError
from gemma_gguf.evaluate import Against, Material
from gemma_gguf.files import make_directory, sha256_json, write_atomic
from gemma_gguf.manifest import Quality
from gemma_gguf.recipes import Recipe
from gemma_gguf.session import Done, Run, kernels_for, speeds_for

DEFAULT_SETS = ("default", "prose")
DEFAULT_RECIPES = ("IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "Q3_K_M")
DEFAULT_CHUNKS = (16, 32, 64)
NONE = "none"  # what the rows without an imatrix are called
ERRORS = 2.0  # standard errors from which on a difference is shown


@dataclass(frozen=True)
class Asked:
    """What is to be compared. The first set is the one that others are compared with."""

    sets: tuple[str, ...] = DEFAULT_SETS
    recipes: tuple[str, ...] = DEFAULT_RECIPES
    chunks: tuple[int, ...] = DEFAULT_CHUNKS  # of the curve
    whole: bool = True  # and all of each set, and where the others end
    held_out: Path | None = None  # a text of the user's instead of ours
    eval_chunks: int | None = None


# --- figures ------------------------------------------------------------------------------------------------------

Chunks = tuple[tuple[int, float], ...]  # (scored tokens, sum of their divergences) of every chunk


@dataclass(frozen=True)
class Mean:
    """A mean over tokens and its standard error over chunks (None for a single chunk)."""

    value: float
    se: float | None

    @property
    def is_shown(self) -> bool:
        return self.se is not None and abs(self.value) > ERRORS * self.se

    def document(self) -> dict[str, float | None]:
        return {"value": self.value, "se": self.se}


def mean_of(chunks: Sequence[tuple[int, float]]) -> Mean:
    """The mean per token of sums per chunk.

    A ratio of two sums over chunks, with the linearised error of such a ratio (Cochran, Sampling Techniques, 2.11).
    """
    n_tokens, n = sum(count for count, _ in chunks), len(chunks)
    value = sum(total for _, total in chunks) / n_tokens
    if n < 2:
        return Mean(value, None)
    spread = sum((total - value * count) ** 2 for count, total in chunks)
    return Mean(value, math.sqrt(spread * n / (n - 1)) / n_tokens)


def difference_of(mine: Chunks, theirs: Chunks) -> Mean:
    """By how much the divergence of one file is above another's, on the same tokens."""
    return mean_of([(count, a - b) for (count, a), (_, b) in zip(mine, theirs, strict=True)])


@dataclass(frozen=True)
class Row:
    """One file: what it was calibrated on, how it was measured. `n_chunks` is 0 without an imatrix."""

    set_name: str
    n_chunks: int
    recipe: str
    n_bytes: int
    chunks: Chunks
    quality: Quality

    @property
    def kld(self) -> Mean:
        return mean_of(self.chunks)


@dataclass(frozen=True)
class Comparison:
    """Everything that was measured, sets in the order they were asked for, chunks ascending."""

    model: str
    text: str
    mode: str
    n_tokens: int
    eval_chunks: int
    sets: Mapping[str, int]  # set -> chunks it has
    rows: tuple[Row, ...]
    refused: tuple[str, ...]  # recipes that llama.cpp does not make without an imatrix
    is_dequantised: bool

    def find(self, set_name: str, n_chunks: int, recipe: str) -> Row | None:
        wanted = (set_name, n_chunks, recipe)
        return next((row for row in self.rows if (row.set_name, row.n_chunks, row.recipe) == wanted), None)

    def against_none(self, row: Row) -> Mean | None:
        other = self.find(NONE, 0, row.recipe)
        return difference_of(row.chunks, other.chunks) if other is not None and row.set_name != NONE else None

    def against_first(self, row: Row) -> Mean | None:
        """Against the first set at the same number of chunks."""
        first = next(iter(self.sets))
        other = self.find(first, row.n_chunks, row.recipe)
        return difference_of(row.chunks, other.chunks) if other is not None and row.set_name != first else None

    def document(self) -> dict[str, Any]:
        """What `--json` prints."""
        rows = []
        for row in self.rows:
            compared = {"against_none": self.against_none(row), "against_first": self.against_first(row)}
            rows.append(
                {
                    "set": row.set_name,
                    "chunks": row.n_chunks,
                    "recipe": row.recipe,
                    "n_bytes": row.n_bytes,
                    "kld": row.kld.document(),
                    "ppl_ratio": row.quality.ppl_ratio.model_dump(),
                    "same_top_p": row.quality.same_top_p.model_dump(),
                    **{name: None if mean is None else mean.document() for name, mean in compared.items()},
                }
            )
        return {
            "model": self.model,
            "text": self.text,
            "mode": self.mode,
            "n_tokens": self.n_tokens,
            "eval_chunks": self.eval_chunks,
            "sets": dict(self.sets),
            "not_without_imatrix": list(self.refused),
            "base_is_dequantised": self.is_dequantised,
            "rows": rows,
        }


def columns(comparison: Comparison) -> tuple[str, ...]:
    first = next(iter(comparison.sets))
    return ("Recipe", "Set", "Chunks", "KLD", "minus none's", f"minus {first}'s at as many chunks")


def cells(comparison: Comparison) -> list[tuple[str, ...]]:
    """The table: a recipe's rows together, no imatrix first. Differences below zero are better; * are shown."""
    order = {name: place for place, name in enumerate((NONE, *comparison.sets))}
    recipe_order = list(dict.fromkeys(row.recipe for row in comparison.rows))
    ordered = sorted(comparison.rows, key=lambda r: (recipe_order.index(r.recipe), order[r.set_name], r.n_chunks))
    return [
        (
            row.recipe,
            row.set_name,
            str(row.n_chunks or ""),
            _number(row.kld, signed=False),
            _number(comparison.against_none(row)),
            _number(comparison.against_first(row)),
        )
        for row in ordered
    ]


def _number(mean: Mean | None, *, signed: bool = True) -> str:
    if mean is None:
        return ""
    value = f"{mean.value:+.5f}" if signed else f"{mean.value:.5f}"
    error = "?" if mean.se is None else f"{mean.se:.5f}"
    return f"{value} ± {error}{' *' if signed and mean.is_shown else ''}"


def markdown(comparison: Comparison) -> str:
    """The table for `calibration/README.md`, with what it was measured on."""
    lengths = ", ".join(f"{name} {n}" for name, n in comparison.sets.items())
    lines = [
        f"{comparison.model}, {comparison.text} text ({comparison.mode}), {comparison.n_tokens:,} tokens scored in "
        f"{comparison.eval_chunks} chunks; chunks of 512 tokens in each set: {lengths}. KL divergence from the "
        "BF16 base in nats per token, ± standard error over chunks; * marks differences beyond two of them.",
        "",
        "| " + " | ".join(columns(comparison)) + " |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *("| " + " | ".join(row) + " |" for row in cells(comparison)),
    ]
    if comparison.refused:
        lines += ["", f"llama.cpp does not make {', '.join(comparison.refused)} without an imatrix."]
    return "\n".join(lines) + "\n"


# --- what is to be done --------------------------------------------------------------------------------------------


def load_set(name: str, mix: Text | None = None) -> Text:
    """A calibration set: what `--calibration` takes, or one kind of the mix's documents (`prose`).

    `mix` is the default one as this model reads it, its conversations in the model's own turns.
    """
    if name == "default" and mix is not None:
        return mix
    if name in calibration.kinds():
        return calibration.of_kind(name)
    return calibration.load(name, llama_cpp.cache_dir() / "calibration")


def cuts_of(lengths: Mapping[str, int], asked: Sequence[int], whole: bool) -> dict[str, list[int]]:
    """{set: the numbers of chunks it is used with}: those asked for and, with `whole`, all of it and the lengths of the
    others.

    A cut that leaves one or two chunks to the end of a set is left out, as llama-imatrix does not start with so few;
    a set that is too short for any is used whole.
    """
    wanted = {*asked, *(lengths.values() if whole else ())}
    cuts = {name: sorted(cut for cut in wanted if 0 < cut < length - 2) for name, length in lengths.items()}
    return {
        name: [*found, lengths[name]] if whole or lengths[name] in wanted or not found else found
        for name, found in cuts.items()
    }


def compare_sets(state: Run, asked: Asked, mix: Text) -> Comparison:
    """Measure what was not measured before. Raises `BadInputError` for a set, text or recipe that cannot be used."""
    if state.source.facts.gguf_arch in gemma.WITHOUT_LOGITS:
        raise BadInputError(
            f"{state.source.name.model} gives embeddings; calibration texts are compared by KL divergence, of logits",
            next_step="Give a model that writes text.",
        )
    if state.build.bindings is None:
        raise BadInputError(
            f"{state.build.source} has no bindings, so quality cannot be measured with it",
            next_step="Use a build with bindings: --llama-cpp pypi:<version>.",
        )
    loaded = [load_set(name, mix) for name in dict.fromkeys(asked.sets)]
    texts = {text.name: text for text in loaded}
    if len(texts) < len(loaded):
        raise BadInputError("two of the sets have one name", next_step="Give the files different names.")
    wanted = recipes.select(asked.recipes, state.offered)
    if any(recipe.is_base for recipe in wanted):
        raise BadInputError("the base is what recipes are compared with", next_step="Leave bf16 out of --recipes.")
    place = state.work / "calibrate"
    make_directory(place)
    material = evidence.material_for(state.manifest, state.base)
    if asked.held_out is not None:
        material = evaluate.plain_material(calibration.from_file(asked.held_out))
    lengths = {name: _length(state, place, text) for name, text in texts.items()}
    cuts = cuts_of(lengths, asked.chunks, asked.whole)
    found: list[Row] = []
    with _measurer(state, place, material, asked.eval_chunks) as (against, measure):
        job = _Job(state, place, against, measure)
        without = tuple(recipe for recipe in wanted if recipe.ftype not in recipes.NEED_IMATRIX)
        found += _group(job, NONE, 0, None, without)
        for name, text in texts.items():
            made = _imatrices(state, place, text, cuts[name])
            for cut, file in made.items():
                found += _group(job, name, cut, file, wanted)
    n_tokens = found[0].quality.n_tokens if found else 0
    return Comparison(
        model=f"{state.source.name.org}/{state.source.name.model}",
        text=material.name,
        mode=material.mode,
        n_tokens=n_tokens,
        eval_chunks=against.n_chunks,
        sets=lengths,
        rows=tuple(found),
        refused=tuple(recipe.name for recipe in wanted if recipe not in without),
        is_dequantised=state.manifest.model.base_is_dequantised,
    )


def _length(state: Run, place: Path, text: Text) -> int:
    """Chunks of 512 tokens in a calibration text."""
    path = place / text.file_name
    write_atomic(path, text.data)
    answer = llama_cpp.ask_bindings(state.build, "tokens", state.base, path, state.log)
    n_chunks = int(answer["n_tokens"]) // imatrix.CHUNK_TOKENS
    if n_chunks < 3:
        raise BadInputError(
            f"the calibration set {text.name} has only {answer['n_tokens']} tokens",
            next_step=f"Give at least {3 * imatrix.CHUNK_TOKENS} tokens.",
        )
    return n_chunks


def _imatrices(state: Run, place: Path, text: Text, cuts: Sequence[int]) -> dict[int, Path]:
    """{chunks: imatrix of the first so many chunks of a text}; computed once, as each goes on from the one before."""
    options = state.options
    identity = ["calibrate", state.memory.sha256(state.base), text.sha256, cuts, options.gpu_layers, state.build.key]
    directory = place / f"imatrix-{text.name}-{sha256_json(identity)[:16]}"

    def argv_of(first: int, count: int | None, continue_from: str | None, out: str) -> list[str]:
        return imatrix.imatrix_argv(
            state.build,
            f"../{state.base.name}",
            text.file_name,
            out,
            first_chunk=first,
            chunks=count,
            continue_from=continue_from,
            threads=options.threads,
            gpu_layers=options.gpu_layers,
        )

    write_atomic(place / text.file_name, text.data)  # once more: files of two directories can have one name
    imatrix.compute(
        argv_of,
        n_chunks=cuts[-1],
        directory=directory,
        cwd=place,
        log=state.log,
        progress=lambda label, done, total, unit="": state.progress(f"{label} of {text.name}", done, total, unit),
        cuts=cuts,
    )
    return {cut: imatrix.part_at(directory, cuts[-1], cut, cuts) for cut in cuts}


# --- making and measuring ------------------------------------------------------------------------------------------

Measure = Callable[[Path], tuple[Quality, Chunks]]


@dataclass(frozen=True)
class _Job:
    """What every group of files has in common."""

    state: Run
    place: Path
    against: Against
    measure: Measure


@contextlib.contextmanager
def _measurer(state: Run, place: Path, material: Material, chunks: int | None) -> Iterator[tuple[Against, "Measure"]]:
    """(what files are measured against, a function that measures one); the base reads the text when first needed."""
    n_available, n_vocab = evaluate.count_chunks(state.build, state.base, material, place, state.log)
    against = Against(
        build=state.build,
        base=state.base,
        base_sha256=state.memory.sha256(state.base),
        material=material,
        n_chunks=min(chunks or evaluate.DEFAULT_CHUNKS[material.mode], n_available),
        threads=evaluate.threads_or_default(state.options.threads),
        gpu_layers=state.options.gpu_layers,
    )
    seen: list[Chunks] = []
    comparing = evaluate.comparing(
        against,
        directory=place / "evaluate",
        n_vocab=n_vocab,
        disk_budget=state.options.eval_disk_budget,
        log=state.log,
        progress=state.progress,
        note=lambda found: seen.append(tuple(found)),
    )
    with comparing as quality_of:

        def measure(file: Path) -> tuple[Quality, Chunks]:
            quality = quality_of(file)
            return quality, seen.pop()

        yield against, measure


def _group(job: _Job, set_name: str, n_chunks: int, file: Path | None, wanted: Sequence[Recipe]) -> list[Row]:
    """The rows of one imatrix, or of none: from the last time where nothing changed, else made, measured, deleted."""
    keys = {recipe.name: _key(job, file, recipe) for recipe in wanted}
    missing = [recipe for recipe in wanted if _read(job.place, keys[recipe.name]) is None]
    title = f"{set_name} {n_chunks}" if file is not None else NONE
    if missing:
        for name, made in _quantised(job, file, missing).items():
            quality, chunks = job.measure(made)
            _write(job.place, keys[name], made.stat().st_size, quality, chunks)
            made.unlink()
    rows = []
    for recipe in wanted:
        known = _read(job.place, keys[recipe.name])
        assert known is not None
        n_bytes, quality, chunks = known
        row = Row(set_name, n_chunks, recipe.name, n_bytes, chunks, quality)
        again = recipe not in missing
        why = f"{'measured before: ' if again else ''}KLD {_number(row.kld, signed=False)}"
        job.state.did(Done("evaluate", f"{recipe.name}, {title}", not again, why, 0.0))
        rows.append(row)
    return rows


def _key(job: _Job, file: Path | None, recipe: Recipe) -> str:
    """Hash of everything that a figure depends on."""
    against = job.against
    calibrated = None if file is None else job.state.memory.sha256(file)
    text = [against.material.sha256, against.material.mode, against.n_chunks]
    made = [against.base_sha256, calibrated, recipe.ftype, list(recipe.flags), against.build.key]
    return sha256_json(["calibrate", made, text])


def _read(place: Path, key: str) -> tuple[int, Quality, Chunks] | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads((place / "figures" / f"{key}.json").read_text())
        chunks = tuple((int(count), float(total)) for count, total in kept["chunks"])
        return int(kept["n_bytes"]), Quality.model_validate(kept["quality"]), chunks
    return None


def _write(place: Path, key: str, n_bytes: int, quality: Quality, chunks: Chunks) -> None:
    document = {"n_bytes": n_bytes, "quality": quality.model_dump(mode="json"), "chunks": chunks}
    write_atomic(place / "figures" / f"{key}.json", json.dumps(document))


def _quantised(job: _Job, file: Path | None, wanted: Sequence[Recipe]) -> dict[str, Path]:
    """{recipe: file}, all made by one fan-out, with an imatrix or without."""
    state, place = job.state, job.place / "files"
    shutil.rmtree(place, ignore_errors=True)
    make_directory(place)
    header = gguf_io.read_header(state.base)
    given = None if file is None else file.relative_to(job.place).as_posix()
    numbers = quantize.ftype_numbers(state.build, state.log)
    plans: dict[str, plan.FilePlan] = {}
    outputs = []
    for recipe in wanted:
        asked = quantize.plan_recipe(
            state.build,
            recipe,
            f"../{state.base.name}",
            imatrix=given,
            n_tensors=len(header.tensors),
            cwd=job.place,
            log=state.log,
        )
        plans[recipe.name] = asked
        keys = fanout.quantize_keys(
            numbers[recipe.ftype],
            None if file is None else file.name,
            None if file is None else gguf_io.read_header(file),
        )
        # No final name: whatever an interrupted run left here goes first.
        outputs.append(
            fanout.Output(recipe.name, place / f"{recipe.name}.gguf", fanout.new_header(header, asked, keys), asked)
        )
    using = kernels_for(state)
    speeds = speeds_for(state, list(plans.values()), using)
    jobs = fanout.workers_for(state.options.jobs, state.options.max_memory)
    content = fanout.build_job(
        header,
        outputs,
        imatrix=file,
        bin_dir=state.build.bin_dir,
        inputs=sha256_json([job.against.base_sha256, given, state.build.key]),
        kernels=using.kernels,
        phase_of=plan.phases(list(plans.values()), speeds),
    )
    job_path, done, skip = fanout.prepare(content, place / "fanout", outputs)
    fanout.run(
        job_path,
        done,
        skip,
        executor=lambda: fanout.local_executor(jobs, place / "fanout"),
        jobs=jobs,
        costs=fanout.task_costs(fanout.load_job(job_path), speeds),
        on_output=lambda _: None,
        progress=state.progress,
    )
    shutil.rmtree(place / "fanout")
    return {output.recipe: output.partial for output in outputs}
