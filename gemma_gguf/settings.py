"""What a maintainer sets once: `gemma-gguf.toml` in the working directory, over the one in the user's config directory.

Consumes TOML, produces `Settings`: defaults for the options of every command, sets of recipes, and recipes of the
user's own. Flags win over files. Parsing is strict, and one error names every problem of a file: a misspelt key that
changes nothing would be found after hours, on the card. Paths are meant beside the file they are written in.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import platformdirs
from gguf.constants import GGMLQuantizationType
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from gemma_gguf import calibration, card, kernel_check, llama_cpp, names, quantize, recipes, shards, source
from gemma_gguf.errors import BadInputError, GemmaGGUFError
from gemma_gguf.recipes import Recipe
from gemma_gguf.session import ENGINES, known_recipes

FILE_NAME = "gemma-gguf.toml"
MAX_BYTES = 1_000_000  # of a file
NEXT_STEP = "README.md lists every setting; `gemma-gguf settings` shows those in use, and their file."
# Types that are no weights of a model, or of which ggml quantises nothing.
NO_WEIGHTS = frozenset({"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"})
GGML_TYPES = tuple(kind.name for kind in GGMLQuantizationType if kind.name not in NO_WEIGHTS)
FTYPES = tuple(sorted({*quantize.KNOWN_FTYPES, *(row.ftype for row in recipes.TABLE.values())} - recipes.NOT_RECIPES))
# ggml makes nothing of these without an imatrix, and there is none for the embedding.
NOT_FOR_EMBEDDINGS = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")

T = TypeVar("T")


# --- kinds of values ----------------------------------------------------------------------------------------------


def parse_size(value: object) -> int:
    """Bytes of a number with an optional decimal unit: 200GB, 1.5TB, 7000000. Raises `ValueError`."""
    if type(value) is int and value >= 0:
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kMGT]?)B?", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is no size; write for example 200GB")
    return int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " "))


def _size(value: object) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise PydanticCustomError("size", "{reason}", {"reason": str(error)}) from error


def _nearest(name: str, known: Iterable[str]) -> str:
    """`; nearest: a, b`, or all when nothing is near and they are few."""
    known = list(known)
    folded = {other.upper(): other for other in known}
    near = [folded[other] for other in difflib.get_close_matches(name.upper(), folded, n=3, cutoff=0.5)]
    if near:
        return f"; nearest: {', '.join(near)}"
    return f"; known: {', '.join(known)}" if len(known) <= 8 else ""


def _whole_megabytes(value: int) -> int:
    if (reason := shards.wrong_limit(value)) is not None:
        raise PydanticCustomError("megabytes", "{reason}", {"reason": reason})
    return value


def _one_of(known: Sequence[str]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in known:
            reason = f"{value!r} is unknown{_nearest(value, known)}"
            raise PydanticCustomError("choice", "{reason}", {"reason": reason})
        return value

    return AfterValidator(check)


def _checked(check: Callable[[str], object]) -> AfterValidator:
    """A value that `check` takes without an error of ours."""

    def validate(value: str) -> str:
        try:
            check(value)
        except GemmaGGUFError as error:
            reason = " ".join(filter(None, (f"{error.what}.", error.next_step)))
            raise PydanticCustomError("refused", "{reason}", {"reason": reason}) from error
        return value

    return AfterValidator(validate)


def beside(value: str, info: ValidationInfo) -> str:
    """A path as it is meant from the working directory; it was written as seen from the file it stands in."""
    directory = Path((info.context or {}).get("directory", "."))
    return str(directory / Path(value).expanduser())


def _calibration(value: str, info: ValidationInfo) -> str:
    if value == "default" or value in calibration.PUBLIC_SETS:
        return value
    path = Path(beside(value, info))
    # What is neither keeps its name: the error then shows the sets of nearly that name.
    return str(path) if path.is_file() or len(Path(value).parts) > 1 else value


def _llama_cpp(value: str, info: ValidationInfo) -> str:
    kind, _, place = value.partition(":")
    return f"dir:{beside(place, info)}" if kind == "dir" and place else value


def _directory(value: str) -> str:
    if not Path(value).is_dir():
        reason = f"there is no directory {value}"
        raise PydanticCustomError("directory", "{reason}", {"reason": reason})
    return value


def _ggml_type(name: str) -> str:
    if name.upper() not in GGML_TYPES:
        raise BadInputError(f"{name!r} is no ggml type for weights{_nearest(name, map(str.lower, GGML_TYPES))}")
    return name


def _tensor_type(value: str) -> None:
    """`PATTERN=TYPE`, as llama-quantize's --tensor-type takes it: a regular expression that is searched for."""
    pattern, equals, kind = value.partition("=")
    if not (pattern and equals and kind) or not re.fullmatch(r"[\x21-\x5f\x61-\x7e]+", value):
        raise BadInputError(f"{value!r} is not PATTERN=TYPE, for example ffn_down=q6_k")
    try:
        re.compile(pattern)
    except re.error as error:
        raise BadInputError(f"{pattern!r} is no regular expression ({error})") from error
    _ggml_type(kind)


Text = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
Size = Annotated[int, BeforeValidator(_size)]
Positive = Annotated[int, Field(ge=1)]
SetName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]
RecipeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,60}$")]
Names = Annotated[list[str], Field(min_length=1)]
FilePath = Annotated[str, Field(min_length=1), AfterValidator(beside)]
GgmlType = Annotated[str, _checked(_ggml_type)]
LlamaCpp = Annotated[str, AfterValidator(_llama_cpp), _checked(llama_cpp.SourceSpec.parse)]
Backend = Annotated[str, _one_of(tuple(llama_cpp.BACKENDS))]
Calibration = Annotated[str, Field(min_length=1), AfterValidator(_calibration)]
HubName = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"


# --- the file -----------------------------------------------------------------------------------------------------


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class CustomRecipe(_Model):
    """A recipe of the user's own: an ftype, and tensors that get another type."""

    name: RecipeName
    ftype: Annotated[str, _one_of(FTYPES)]
    tensor_types: list[Annotated[str, _checked(_tensor_type)]] = []
    token_embedding_type: GgmlType | None = None
    output_tensor_type: GgmlType | None = None
    about: Text | None = None

    def recipe(self) -> Recipe:
        """As a row like the built-in ones; its flags are llama-quantize's own."""
        flags: list[str] = []
        for value in self.tensor_types:
            flags += ["--tensor-type", value]
        told = list(self.tensor_types)
        for option, words, kind in (
            ("--token-embedding-type", "embedding at", self.token_embedding_type),
            ("--output-tensor-type", "output at", self.output_tensor_type),
        ):
            if kind is not None:
                flags += [option, kind]
                told.append(f"{words} {kind}")
        about = self.about or " with ".join(filter(None, (self.ftype, ", ".join(told))))
        return Recipe(self.name, self.ftype, about, tuple(flags))


class Settings(_Model):
    """Everything that can be set once. `None` leaves the command line's own default."""

    namespace: Annotated[str, Field(pattern=HubName)] | None = None
    naming: Annotated[str, _one_of(source.NAMINGS)] | None = None
    quantized_by: Text | None = None
    out: FilePath | None = None
    recipes: Names | None = None
    recipe_sets: dict[SetName, Names] = {}
    custom_recipes: list[CustomRecipe] = []
    llama_cpp: LlamaCpp | None = None
    backend: Backend | None = None
    cmake_args: list[Text] | None = None
    calibration: Calibration | None = None
    chunks: Positive | None = None
    engine: Annotated[str, _one_of(ENGINES)] | None = None
    kernels: Annotated[str, _one_of(kernel_check.CHOICES)] | None = None
    jobs: Positive | None = None
    max_memory: Size | None = None
    scheduler: Text | None = None
    disk_budget: Size | None = None
    split_max_size: Annotated[Size, AfterValidator(_whole_megabytes)] | None = None
    proof: bool | None = None
    threads: Positive | None = None
    gpu_layers: Annotated[int, Field(ge=0)] | None = None
    evaluate: bool | None = None
    eval_chunks: Positive | None = None
    eval_disk_budget: Size | None = None
    bench: Names | None = None
    theme: Annotated[str, _one_of(card.THEMES)] | None = None
    languages: list[Annotated[str, _one_of(tuple(card.LANGUAGES))]] | None = None
    templates: Annotated[FilePath, AfterValidator(_directory)] | None = None

    @field_validator("custom_recipes")
    @classmethod
    def _each_name_once(cls, value: list[CustomRecipe]) -> list[CustomRecipe]:
        names = [recipe.name for recipe in value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise PydanticCustomError("twice", "{reason}", {"reason": f"two recipes are called {', '.join(twice)}"})
        return value

    @property
    def custom(self) -> tuple[Recipe, ...]:
        """The user's own recipes."""
        return tuple(own.recipe() for own in self.custom_recipes)

    def recipe_names(self) -> tuple[str, ...]:
        """The recipes that are to be made, sets replaced by what they hold."""
        return recipes.expand(self.recipes or ["default"], self.recipe_sets)

    def given(self) -> dict[str, Any]:
        """{key: value} of what is set."""
        return {key: value for key in type(self).model_fields if (value := getattr(self, key)) not in (None, {}, [])}

    def over(self, base: "Settings") -> "Settings":
        """The settings of `base` with these in their place. Sets and recipes of one name are replaced, others added."""
        own = {recipe.name: recipe for recipe in (*base.custom_recipes, *self.custom_recipes)}
        both = {
            **base.given(),
            **self.given(),
            "recipe_sets": {**base.recipe_sets, **self.recipe_sets},
            "custom_recipes": list(own.values()),
        }
        # Each was validated with its file; a path must not be taken for one beside another.
        return Settings.model_construct(**{key: value for key, value in both.items() if key in KEYS})


KEYS = tuple(Settings.model_fields)
S = TypeVar("S", bound=BaseModel)


def read(path: Path, model: type[S]) -> S:
    """A TOML file as `model`. Raises one `BadInputError` with every problem of the file."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise BadInputError(f"{path} has more than the {MAX_BYTES:,} bytes that are read")
        raw = tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadInputError(f"{path} is not readable TOML: {error}", next_step=NEXT_STEP) from error
    try:
        return model.model_validate(raw, context={"directory": path.parent})
    except ValidationError as error:
        raise refusal(path, [_problem(model, problem) for problem in error.errors()]) from error


def refusal(path: Path, problems: Sequence[str]) -> BadInputError:
    """One error for all problems of a file."""
    if len(problems) == 1:
        return BadInputError(f"{path}: {problems[0]}", next_step=NEXT_STEP)
    listed = "\n".join(f"  {problem}" for problem in problems)
    return BadInputError(f"{path} has {len(problems)} problems:\n{listed}", next_step=NEXT_STEP)


def _problem(model: type[BaseModel], error: Any) -> str:
    """`where: what` of one problem; an unknown key with those of nearly that name."""
    place = [part for part in error["loc"] if not str(part).startswith(("function-", "[key]"))]
    where = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key{_nearest(str(place[-1]), _fields_at(model, place[:-1]))}"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _fields_at(model: type[BaseModel], place: Sequence[object]) -> Iterable[str]:
    """The keys that may stand where `place` leads to: at the top, or in a list of tables."""
    for part in place:
        if isinstance(part, str) and part in model.model_fields:
            inner = _table_of(model.model_fields[part].annotation)
            model = inner or model
    return model.model_fields


def _table_of(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as `list[Model]` or `list[Annotated[Model, ...]]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in getattr(annotation, "__args__", ()) if (found := _table_of(part))), None)


# --- finding and joining files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """The settings in use, where each key came from, and every file that was looked for."""

    settings: Settings
    origins: Mapping[str, Path]
    looked_at: tuple[Path, ...]  # the user's first, the working directory's last


def config_dir() -> Path:
    """The user's config directory of this package; `GEMMA_GGUF_CONFIG` overrides it."""
    override = os.environ.get("GEMMA_GGUF_CONFIG")
    return Path(override) if override else Path(platformdirs.user_config_dir("gemma-gguf"))


def load(directory: Path = Path()) -> Loaded:
    """The settings of the user, and over them those of `directory`.

    Raises `BadInputError` with every problem of the first file that has any.
    """
    looked_at = (config_dir() / FILE_NAME, directory / FILE_NAME)
    settings, origins = Settings(), dict[str, Path]()
    for path in looked_at:
        if path.is_file():
            found = read(path, Settings)
            settings = joined(found, settings, path)
            origins |= dict.fromkeys(found.given(), path)
    return Loaded(settings, origins, looked_at)


def joined(found: Settings, base: Settings, path: Path) -> Settings:
    """What a file says over `base`, after both were looked at together; `path` is named in the error."""
    both = found.over(base)
    if problems := conflicts(both):
        raise refusal(path, problems)
    return both


def conflicts(settings: Settings) -> list[str]:
    """What is wrong with settings that are each fine: names that clash, recipes that are not known."""
    problems: list[str] = []
    own = settings.custom
    for recipe in own:
        others = [*recipes.TABLE, *FTYPES, *(other.name for other in own if other is not recipe)]
        problems += [f"custom_recipes.{recipe.name}: {why}" for why in _unfit(recipe, others)]
    known = {name.upper() for name in (*recipes.TABLE, *FTYPES, *(recipe.name for recipe in own))}
    for name, rows in settings.recipe_sets.items():
        if name in recipes.SETS or name.upper() in known:
            problems.append(f"recipe_sets.{name}: the name is taken")
        problems += _unknown(f"recipe_sets.{name}", recipes.expand(rows, {}), own)
    rows = [name for name in settings.recipes or [] if name not in settings.recipe_sets]
    return problems + _unknown("recipes", recipes.expand(rows, {}), own)


def _unfit(recipe: Recipe, others: Iterable[str]) -> Iterable[str]:
    """Why a recipe cannot stand beside the others in a repository.

    llama-server's `-hf REPO:TAG` takes the first file with the tag before a dot or dash, in any case, so no name may
    end with another; `names` knows what else it does. Whether a name is in those of all files of a set, a run tells.
    """
    name = recipe.name.upper()
    clash = next((other for other in others if name.endswith(other.upper()) or other.upper().endswith(name)), None)
    if clash is not None:
        yield f"llama-server would take it for {clash}, or {clash} for it: no name may end with the other"
    if (why := names.unfit_tag(recipe.name)) is not None:
        yield why
    for tensor in EMBEDDINGS:
        kind = type_of(recipe, tensor)
        if kind in NOT_FOR_EMBEDDINGS:
            yield f"{tensor} cannot have {kind.lower()}, which needs an imatrix: the imatrix does not cover it"


def type_of(recipe: Recipe, tensor: str) -> str | None:
    """What type a recipe's flags give a tensor (llama.cpp, src/llama-quant.cpp, llama_tensor_get_type).

    The first pattern that is found in its name counts; --token-embedding-type goes before patterns for the one tensor,
    and after them for the per-layer embedding.
    """
    embedding = dict(recipe.overrides).get("--token-embedding-type")
    if tensor == EMBEDDINGS[0] and embedding is not None:
        return embedding
    for option, value in zip(recipe.flags[::2], recipe.flags[1::2], strict=True):
        pattern, _, kind = value.rpartition("=")
        if option == "--tensor-type" and re.search(pattern.lower(), tensor):
            return kind.upper()
    return embedding if tensor in EMBEDDINGS else None


def _unknown(where: str, names: Iterable[str], own: Sequence[Recipe]) -> list[str]:
    problems: list[str] = []
    for name in names:
        try:
            known_recipes([name], own)
        except BadInputError as error:
            problems.append(f"{where}: {error.what}. {error.next_step}")
    return problems


# --- as defaults of the command line ------------------------------------------------------------------------------

# Keys whose option has another name inside the program, and those that are written with commas on a command line.
PARAMETERS: Mapping[str, str] = {
    "recipes": "recipe_names",
    "llama_cpp": "llama_cpp_spec",
    "calibration": "calibration_name",
}
LISTED = frozenset({"recipes", "bench", "languages"})
NO_OPTIONS = frozenset({"recipe_sets", "custom_recipes"})


def defaults(settings: Settings) -> dict[str, Any]:
    """{name of an option's parameter: its default}, as click's `default_map` takes them."""
    return {
        PARAMETERS.get(key, key): ",".join(value) if key in LISTED else value
        for key, value in settings.given().items()
        if key not in NO_OPTIONS
    }
