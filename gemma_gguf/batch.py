"""Many models in one go: `gemma-gguf batch models.toml`.

Consumes a TOML file that lists models, with settings for all of them and for each, over those of `gemma-gguf.toml`.
The file is validated as a whole, and every model looked at, before anything is made; then each is one run of the
factory. A run that fails ends that model's set, not the batch. Nothing is remembered here: a run keeps what is done,
so the same command goes on where the last one ended.
"""

import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from gemma_gguf import calibration, doctor, factory, session, settings, source, survey
from gemma_gguf.doctor import Check, Facts
from gemma_gguf.errors import BadInputError, GemmaGGUFError
from gemma_gguf.files import is_dir
from gemma_gguf.manifest import HubId
from gemma_gguf.progress import Progress, silent
from gemma_gguf.session import CardOptions, Done, Options
from gemma_gguf.settings import FilePath, Settings

# What a run leaves on the disk, by the stages of `doctor.Need`; the rest is there for a while.
STAYS = frozenset({"build", "download", "demo checkpoint", "convert", "imatrix", "quantize"})
# Subjects of `session.given_checks` that the file itself answers for, and not the network.
OF_THE_FILE = frozenset({"--base", "--imatrix", "--from"})


# --- the file -----------------------------------------------------------------------------------------------------


def _model(value: str, info: ValidationInfo) -> str:
    """A directory is meant beside the file; a hub id and `demo` are what they are."""
    place = Path(settings.beside(value, info))
    if value != "demo" and (value.startswith((".", "/", "~")) or is_dir(place)):
        return str(place.resolve())
    return value


class Entry(Settings):
    """One model, and what is other for it than for the rest."""

    model: Annotated[str, Field(min_length=1), AfterValidator(_model)]
    name: HubId | None = None
    imatrix: FilePath | None = None
    base: FilePath | None = None
    reference: str | None = None
    repo: HubId | None = None


def _table(value: object) -> object:
    """A bare string is a model without anything of its own."""
    return {"model": value} if isinstance(value, str) else value


class File(Settings):
    """The whole file: settings for all models, and the models."""

    models: Annotated[list[Annotated[Entry, BeforeValidator(_table)]], Field(min_length=1)]


@dataclass(frozen=True)
class Item:
    """One model of a batch, as the factory takes it."""

    label: str
    options: Options


def read(path: Path, base: Settings) -> tuple[Item, ...]:
    """The models of a file, its settings over those of `base`.

    Raises one `BadInputError` with every problem that the file has by itself: its syntax, keys and values, recipes and
    texts that are not there, two models with one set. What a model is like is looked at by `look`.
    """
    found = settings.read(path, File)
    common = settings.joined(found, base, path)
    problems: list[str] = []
    items: list[Item] = []
    for number, entry in enumerate(found.models, start=1):
        own = entry.over(common)
        item = Item(_label(entry.model), options_of(entry, own))
        wrong = [*settings.conflicts(own), *_problems(item.options)]
        problems += [f"models[{number}] ({item.label}): {problem}" for problem in wrong]
        items.append(item)
    problems += _same_set(items)
    if problems:
        raise settings.refusal(path, problems)
    return tuple(items)


def _label(model: str) -> str:
    """A directory as it is seen from the working directory, where it lies below it."""
    below = Path(model).is_absolute() and Path(model).is_relative_to(Path.cwd())
    return str(Path(model).relative_to(Path.cwd())) if below else model


def options_of(entry: Entry, own: Settings) -> Options:
    """What a run of one model is asked for: `own` are its settings, over those of the file and of `gemma-gguf.toml`."""
    given = own.given()
    chosen = {key: given.pop(key) for key in ("theme", "languages", "quantized_by", "namespace") if key in given}
    if "languages" in chosen:
        chosen["languages"] = tuple(chosen["languages"])
    for key in ("out", "templates"):
        if key in given:
            given[key] = Path(given[key])
    for key in ("bench", "cmake_args"):
        if key in given:
            given[key] = tuple(given[key])
    for key in ("recipes", "recipe_sets", "custom_recipes"):
        given.pop(key, None)
    return Options(
        model=entry.model,
        name=entry.name,
        imatrix=Path(entry.imatrix) if entry.imatrix else None,
        base=Path(entry.base) if entry.base else None,
        reference=entry.reference,
        recipes=own.recipe_names(),
        custom=own.custom,
        card=CardOptions(**chosen, repo=entry.repo),
        **given,
    )


def _problems(options: Options) -> list[str]:
    """What the file says of one model and cannot be, whatever the model is."""
    problems: list[str] = []
    text = options.calibration
    if options.imatrix is None and text != "default" and text not in calibration.PUBLIC_SETS:
        problems += _tried("calibration", lambda: calibration.load(text, Path()))
    for subject, check in session.given_checks(options):
        if subject in OF_THE_FILE:
            problems += _tried(subject.removeprefix("--").replace("from", "reference"), check)
    return problems


def _tried(where: str, check: Callable[[], object]) -> list[str]:
    try:
        check()
    except GemmaGGUFError as error:
        return [" ".join(filter(None, (f"{where}: {error.what}.", error.next_step)))]
    return []


def _same_set(items: Sequence[Item]) -> list[str]:
    """Models whose files would have the same names in the same directory."""
    problems: list[str] = []
    seen: dict[Path, str] = {}
    for number, item in enumerate(items, start=1):
        place = set_dir(item.options)
        if place is None:
            continue
        if place in seen:
            problems.append(f"models[{number}] ({item.label}): {place.name} is the set of {seen[place]} already")
        seen.setdefault(place, f"models[{number}] ({item.label})")
    return problems


def set_dir(options: Options) -> Path | None:
    """Where the set of a model goes, or None for what is no model."""
    try:
        name = source.understand(options.model, options.name, options.naming)
    except BadInputError:
        return None
    return session.places(options.out, name)[0]


# --- a look at all of them ----------------------------------------------------------------------------------------


def look(items: Sequence[Item]) -> list[tuple[Check, ...]]:
    """What stands in the way of each model, before anything is made: the failures of its own look around.

    Room is counted for all together: a model that fits alone and not after those before it is told so.
    """
    found: list[tuple[Check, ...]] = []
    taken: dict[int, int] = {}  # bytes by device, of the models before that nothing stands in the way of
    built: set[tuple[str, str, tuple[str, ...]]] = set()
    for item in items:
        options = item.options
        facts = survey.look(options)
        checks = [check for check in doctor.judge(facts) if check.status == "fail"]
        build = (options.llama_cpp, options.backend, options.cmake_args)
        needs = needs_by_device(facts, built=build in built)
        if not checks:
            checks = list(_too_much(facts, needs, taken))
        if not checks:
            built.add(build)
            for device, (stays, _) in needs.items():
                taken[device] = taken.get(device, 0) + stays
        found.append(tuple(checks))
    return found


def needs_by_device(facts: Facts, *, built: bool) -> dict[int, tuple[int, int]]:
    """{file system: (bytes that stay, bytes at the peak)} of one run, at least; `built`: by a run before it."""
    needs: dict[int, tuple[int, int]] = {}
    for need in facts.needs:
        if need.place in facts.rooms and not (built and need.stage == "build"):
            device = facts.rooms[need.place].device
            stays, peak = needs.get(device, (0, 0))
            needs[device] = (stays + (need.low if need.stage in STAYS else 0), peak + need.low)
    return needs


def _too_much(facts: Facts, needs: Mapping[int, tuple[int, int]], taken: Mapping[int, int]) -> Iterable[Check]:
    for device, (_, peak) in needs.items():
        rooms = [room for room in facts.rooms.values() if room.device == device]
        free = min(room.free for room in rooms)
        before = taken.get(device, 0)
        if before and before + peak > free:
            yield Check(
                "disk",
                "fail",
                f"at least {peak:,} bytes in {', '.join(str(room.path) for room in rooms)} after the {before:,} of the "
                f"models before it; {free:,} are free: {before + peak - free:,} are missing",
                "Make room, or move sets away before it is their turn.",
            )


# --- the runs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How one model ended. `trace` is the traceback of a bug, which ends its model alone, too."""

    model: str
    set_dir: Path | None
    complete: bool
    seconds: float
    made: int = 0
    kept: int = 0
    n_bytes: int = 0
    error: str | None = None
    next_step: str | None = None
    log: Path | None = None
    trace: str | None = field(default=None, repr=False)

    def document(self) -> dict[str, Any]:
        return asdict(self)


def run(
    items: Sequence[Item],
    *,
    progress: Progress = silent,
    say: Callable[[Done], None] = lambda _: None,
    begin: Callable[[int, Item], None] = lambda _, __: None,
    ended: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """One run of the factory for every model, in the file's order, whatever became of those before.

    `begin(number, item)` and `ended(outcome)` are called around each. Only Ctrl-C ends the batch.
    """
    outcomes: list[Outcome] = []
    for number, item in enumerate(items, start=1):
        begin(number, item)
        outcome = _run_one(item, progress, say)
        ended(outcome)
        outcomes.append(outcome)
    return outcomes


def _run_one(item: Item, progress: Progress, say: Callable[[Done], None]) -> Outcome:
    started = time.monotonic()
    done: list[Done] = []

    def note(what: Done) -> None:
        done.append(what)
        say(what)

    problem: dict[str, Any] = {}
    try:
        factory.run(item.options, progress=progress, say=note)
    except GemmaGGUFError as error:
        problem = {"error": error.what, "next_step": error.next_step, "log": error.log}
    except Exception as error:  # noqa: BLE001 - a bug that one model brings out must not cost the night of the others
        problem = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    files = [what for what in done if what.n_bytes is not None]
    return Outcome(
        model=item.label,
        set_dir=set_dir(item.options),
        complete=not problem,
        seconds=round(time.monotonic() - started, 1),
        made=sum(what.made for what in files),
        kept=sum(not what.made for what in files),
        n_bytes=sum(what.n_bytes or 0 for what in files),
        **problem,
    )


def document(path: Path, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """The whole batch as JSON."""
    failed = [outcome.model for outcome in outcomes if not outcome.complete]
    return {
        "batch": str(path),
        "ok": not failed,
        "complete": len(outcomes) - len(failed),
        "failed": len(failed),
        "seconds": round(seconds, 1),
        "models": [outcome.document() for outcome in outcomes],
    }


def checked(path: Path, items: Sequence[Item], problems: Sequence[Sequence[Check]]) -> dict[str, Any]:
    """What a look at a batch found, as JSON."""
    return {
        "batch": str(path),
        "ok": not any(problems),
        "models": [
            {
                "model": item.label,
                "set_dir": set_dir(item.options),
                "recipes": list(item.options.recipes),
                "problems": [check.document() for check in checks],
            }
            for item, checks in zip(items, problems, strict=True)
        ],
    }
