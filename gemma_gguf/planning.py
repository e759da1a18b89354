"""What making a set takes, before it is made: sizes, time, disk.

Consumes `Options` and what exists of a set (base and imatrix, the base alone, or only the checkpoint), produces a
`SetPlan` for people and scripts. Every number comes from llama-quantize's own dry run, or is marked as an estimate.
"""

import contextlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma_gguf import (
    doctor,
    fanout,
    gguf_io,
    imatrix,
    plan,
    proof,
    quantize,
    recipes,
    shards,
    source,
    survey,
)
from gemma_gguf.errors import BadInputError
from gemma_gguf.files import copy
from gemma_gguf.plan import FilePlan
from gemma_gguf.progress import Progress, silent
from gemma_gguf.recipes import Recipe
from gemma_gguf.session import (
    Options,
    Run,
    base_places,
    calibration_text,
    check_given,
    file_name,
    fitted,
    is_made,
    kernels_for,
    known_recipes,
    model_name,
    open_run,
    places,
    room_for,
    speeds_for,
    wanted_recipes,
)


@dataclass(frozen=True)
class PlannedFile:
    """One row of a plan: a file, or a folder of `shards`.

    `cpu_seconds` is what llama-quantize would take for it, None while nothing is known.
    """

    recipe: str
    n_bytes: int
    bpw: float
    cpu_seconds: float | None
    types: dict[str, int]
    fallbacks: dict[str, int]
    shards: int  # 0: one file


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
    check_given(options)
    name = model_name(options)
    jobs = fanout.workers_for(options.jobs, options.max_memory)
    set_dir, work = places(options.out, name)
    bases = base_places(set_dir, work, name.stem)
    if name.origin == "hub" and options.base is None and not any(path.exists() for path in bases):
        # Nothing is downloaded or built for an estimate.
        n_parameters = source.count_hub_parameters(name)
        return _estimate(set_dir, known_recipes(options.recipes, options.custom), n_parameters, jobs, options)
    with open_run(options, name, progress, lambda _: None) as state:
        wanted = wanted_recipes(state)
        base = next((path for path in (options.base, *bases) if path is not None and path.exists()), None)
        if base is None:
            return _estimate(set_dir, wanted, state.source.facts.n_parameters, jobs, options)
        header = gguf_io.read_header(base)
        known = options.imatrix or state.set_dir / imatrix.file_name(state.stem)
        real = known if known.exists() else None
        with _imatrix_to_plan_with(state, header, real) as given:
            return _exact_plan(state, wanted, header, given, jobs, from_placeholder=real is None)


@contextlib.contextmanager
def _imatrix_to_plan_with(state: Run, header: gguf_io.Header, real: Path | None) -> Iterator[Path]:
    """A copy of the imatrix, or one of ones where there is none yet, for as long as llama-quantize is asked.

    It has the final bare name, which llama-quantize copies into a key.
    """
    with tempfile.TemporaryDirectory(dir=state.work) as scratch:
        given = Path(scratch, imatrix.file_name(state.stem))
        if real is not None:
            copy(real, given)
        else:
            imatrix.write_placeholder(given, header, calibration_text(state.options).file_name)
        yield given


def _exact_plan(
    state: Run, wanted: Sequence[Recipe], header: gguf_io.Header, given: Path, jobs: int, *, from_placeholder: bool
) -> SetPlan:
    made = fitted(state, [recipe for recipe in wanted if not recipe.is_base], header)
    plans = plans_for(state, made, header, given)
    outputs = outputs_of(state, header, made, plans, given)
    rows: list[PlannedFile] = []
    # What a loop over llama-quantize would take is computed with ggml's speeds, what the fan-out takes with its own.
    ggml = speeds_for(state, list(plans.values())) if plans else {}
    speeds = speeds_for(state, list(plans.values()), kernels_for(state)) if plans else {}
    if any(recipe.is_base for recipe in wanted):
        cut = base_shards(state, header)
        n_bytes = sum(shard.file_size for shard in cut) or header.file_size
        bits = round(header.bits_per_weight, 4)
        rows.append(PlannedFile("bf16", n_bytes, bits, 0.0, header.type_histogram(), {}, len(cut)))
    for output in outputs:
        n_elements = sum(t.n_elements for t in output.plan.tensors)
        rows.append(
            PlannedFile(
                recipe=output.recipe,
                n_bytes=output.n_bytes,
                bpw=round(8 * sum(t.n_bytes for t in output.plan.tensors) / n_elements, 4),
                cpu_seconds=round(plan.work_of([output.plan]).seconds(ggml)[0], 1),
                types=dict(Counter(t.target.name for t in output.plan.tensors).most_common()),
                fallbacks=output.plan.fallbacks,
                shards=len(output.shards),
            )
        )
    sizes = {output.recipe: output.n_bytes for output in outputs}
    budget = room_for(state, outputs)
    work = plan.work_of(plans.values())
    asked_seconds, distinct_seconds = work.seconds(ggml)[0], work.seconds(speeds)[1]
    try:
        groups = waves_for(state, outputs, speeds)
    except BadInputError:
        groups = []  # one file alone is too large
    return SetPlan(
        set_dir=state.set_dir,
        basis="base, and an imatrix to come" if from_placeholder else "base and imatrix",
        exact=True,
        files=tuple(rows),
        jobs=jobs,
        asked_seconds=round(asked_seconds, 1),
        distinct_seconds=round(distinct_seconds, 1),
        peak_bytes=sum(sizes.values()) + _proof_bytes(state, outputs) + cut_bytes(state, header, _missing(state)),
        budget_bytes=budget,
        waves=tuple(map(tuple, groups)),
    )


def plans_for(state: Run, made: Sequence[Recipe], header: gguf_io.Header, given: Path) -> dict[str, FilePlan]:
    """What llama-quantize would write for each recipe with the imatrix `given`."""
    plans: dict[str, FilePlan] = {}
    for done, recipe in enumerate(made):
        state.progress("planning", done, len(made), "recipes")
        plans[recipe.name] = quantize.plan_recipe(
            state.build,
            recipe,
            str(header.path.resolve()),
            imatrix=given.name,
            n_tensors=len(header.tensors),
            cwd=given.parent,
            log=state.log,
        )
    return plans


def outputs_of(
    state: Run, header: gguf_io.Header, made: Sequence[Recipe], plans: Mapping[str, FilePlan], given: Path
) -> list[fanout.Output]:
    """The files of these recipes as they will be: their headers, and so their sizes, are known from the plans."""
    if not made:
        return []
    numbers = quantize.ftype_numbers(state.build, state.log)
    imatrix_header = gguf_io.read_header(given)
    outputs = []
    for recipe in made:
        with_it = (None, None) if recipe.static else (given.name, imatrix_header)
        keys = fanout.quantize_keys(numbers[recipe.ftype], *with_it)
        final = state.set_dir / file_name(state, recipe)
        limit = state.options.split_max_size
        outputs.append(fanout.new_output(header, plans[recipe.name], keys, final, work=state.work, limit=limit))
    return outputs


def base_shards(state: Run, header: gguf_io.Header) -> list[gguf_io.NewHeader]:
    """The shards that the bf16 row is cut into, none where it is one file and so a link to the base."""
    return shards.of_whole(header, state.options.split_max_size)


def cut_bytes(state: Run, header: gguf_io.Header, made: Sequence[Recipe]) -> int:
    """What the bf16 row takes beside the base, if it is among the files to be made."""
    return sum(shard.file_size for shard in base_shards(state, header)) if any(r.is_base for r in made) else 0


def _missing(state: Run) -> list[Recipe]:
    return [recipe for recipe in wanted_recipes(state) if not is_made(state.manifest, state.set_dir, recipe)]


def _estimate(set_dir: Path, wanted: Sequence[Recipe], n_parameters: int, jobs: int, options: Options) -> SetPlan:
    """What can be said before there is a base: bits per weight of the type each recipe is named after."""
    rows = []
    for recipe in wanted:
        bits = plan.nominal_bits(recipe.ftype)
        n_bytes = int(n_parameters * bits / 8)
        n_shards = -(-n_bytes // options.split_max_size)
        rows.append(PlannedFile(recipe.name, n_bytes, bits, None, {}, {}, n_shards if n_shards > 1 else 0))
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
        budget_bytes=free if options.disk_budget is None else min(free, options.disk_budget),
        waves=(),
    )


def _proof_bytes(state: Run, outputs: Sequence[fanout.Output]) -> int:
    """What the file takes that is made twice to prove the rest, beside all of `outputs`: whole, and cut if it is."""
    if not will_prove(state) or not outputs:
        return 0
    proven = recipes.for_proof({output.recipe: output.n_bytes for output in outputs})
    (output,) = (output for output in outputs if output.recipe == proven)
    return output.header.file_size + (output.n_bytes if output.shards else 0)


def will_prove(state: Run) -> bool:
    """Whether this run makes a file twice. Not where it only goes on with waves of which an earlier one was proven:
    the file that was to be made twice is gone, and a larger one in its place might not fit any more."""
    return state.options.proves and not (state.take_away is not None and proof.is_proven(state))


def waves_for(state: Run, outputs: Sequence[fanout.Output], speeds: Mapping[str, float]) -> list[list[str]]:
    """The recipes in groups that fit the disk, or the budget, each beside the file that is made twice for the proof.

    Raises `BadInputError` when a single file does not fit.
    """
    sizes = {output.recipe: output.n_bytes for output in outputs}
    budget = room_for(state, outputs) - _proof_bytes(state, outputs)
    if sum(sizes.values()) <= budget:
        return [list(sizes)]
    return plan.waves([output.plan for output in outputs], sizes, speeds, budget)


def refuse_before_imatrix(state: Run) -> None:
    """Refuse a set that does not fit before the hours of its imatrix.

    The first look knows sizes within a factor; here the base is there, and where the most that the set can take does
    not fit, llama-quantize is asked for the exact sizes, with an imatrix of ones under the final names.
    """
    final = state.set_dir / imatrix.file_name(state.stem)
    if final.exists() or state.take_away is not None:
        return
    missing = _missing(state)
    made = [recipe for recipe in missing if not recipe.is_base]
    if not made:
        return
    header = gguf_io.read_header(state.base)
    made = list(fitted(state, made, header))
    most = [doctor.quant_bytes(recipe, survey.model_of(header))[1] for recipe in made]
    beside = cut_bytes(state, header, missing)
    if sum(most) + 2 * max(most) + beside <= room_for(state, []):
        return
    with _imatrix_to_plan_with(state, header, state.options.imatrix) as given:
        plans = plans_for(state, made, header, given)
        refuse_what_does_not_fit(state, outputs_of(state, header, made, plans, given), beside)


def refuse_what_does_not_fit(state: Run, outputs: Sequence[fanout.Output], beside: int = 0) -> None:
    """The whole set must fit the disk, or the budget, before any work starts; `beside` are bytes of other new files."""
    sizes = {output.recipe: output.n_bytes for output in outputs}
    budget = room_for(state, outputs)
    spare = _proof_bytes(state, outputs) + beside
    total = sum(sizes.values()) + spare
    if total > budget:
        fit = plan.that_fit(sizes, budget - spare)
        raise BadInputError(
            f"the set needs {total:,} bytes, {budget:,} are there: {total - budget:,} are missing",
            next_step=f"Make room, or make fewer: --recipes {','.join(fit)}" if fit else "Make room.",
        )
