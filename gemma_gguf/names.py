"""File names as an interface: which file of a repository llama.cpp takes for a tag.

`llama-server -hf REPO:TAG`, and every other program over llama.cpp's common code, searches the listing of a repository
for `TAG[.-]`, in any case and anywhere in a path, and takes the first model that matches. So a name that holds a tag
by chance makes every file answer to it. Consumes names, produces what llama.cpp would pick of them; a test asks the
real llama-server. Source: `common_download_get_hf_plan` in llama.cpp's common/download.cpp.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gguf.constants import LlamaFileType

from gemma_gguf import recipes
from gemma_gguf.errors import BadInputError

# What a `-hf REPO` without a tag looks for, in this order, before it takes the first model of the listing.
DEFAULT_TAGS = ("Q4_K_M", "Q8_0")
# A file with one of these in its name is no model to llama.cpp. Upper case is another name to it.
NO_MODEL = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
# Names of types that people ask for: every ftype of llama.cpp, and every row a set can have.
KNOWN_TAGS = tuple(
    dict.fromkeys(
        [
            "F32",
            *(name for f in LlamaFileType if (name := f.name.removeprefix("MOSTLY_")) not in {"ALL_F32", "GUESSED"}),
            *recipes.TABLE,
        ]
    )
)
# Google's checkpoints that were trained for Q4_0 carry its name while they hold BF16.
UNQUANTIZED = re.compile(r"-q4_0-unquantized", re.IGNORECASE)
_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})")
_TAG = re.compile(r"[-.]([A-Za-z0-9_]+)$")


def strip(model: str) -> str:
    """A model's name without `-q4_0-unquantized`, which every file of the set would carry and answer to."""
    return UNQUANTIZED.sub("", model)


def stem(org: str, model: str) -> str:
    """How the files of a set begin: `<org>_<model>`."""
    return f"{org}_{strip(model)}"


def check_stem(stem: str, tags: Iterable[str] = KNOWN_TAGS) -> None:
    """Raise `BadInputError` for a stem with which every file of a set would answer to one tag, or none to any."""
    held = [tag for tag in tags if _matches(f"{stem}-", tag)]
    next_step = "Give the files another name: --name ORG/MODEL"
    if held:
        longest = max(held, key=len)
        if longest not in KNOWN_TAGS:
            next_step += ", or the recipe."
        raise BadInputError(
            f"files named {stem}-... would all answer to llama-server -hf REPO:{longest}", next_step=next_step
        )
    for word in NO_MODEL:
        if word in f"{stem}-":
            raise BadInputError(
                f"llama-server -hf takes no file with {word!r} in its name for a model, and {stem} holds it",
                next_step=next_step,
            )


def unfit_tag(tag: str) -> str | None:
    """Why no recipe can be called so, whatever the files of its set are called; None when one can."""
    word = next((word.rstrip("-") for word in NO_MODEL if word.rstrip("-") in tag.lower()), None)
    if word is not None:
        return f"llama-server passes over files with {word} in their names"
    if tag.isdecimal() or "of".endswith(tag.lower()):
        return "llama-server would take any shards for it, whose names end in numbers: -00001-of-00002"
    return None


@dataclass(frozen=True)
class Picked:
    """What llama.cpp downloads for a tag: the file that it opens, all shards of it, and the projector."""

    model: str
    files: tuple[str, ...]
    mmproj: str | None


def picked(files: Sequence[str], tag: str | None) -> Picked | None:
    """What `-hf REPO:TAG` (`tag` None: `-hf REPO`) takes of a repository's files in the order of its listing.

    `tag` is of letters, digits and underscores. None when nothing matches: llama.cpp then ends with an error.
    """
    models = [file for file in files if is_model(file) and _shard(file)[1] == 1]
    found = next(
        (file for wanted in ([tag] if tag else DEFAULT_TAGS) for file in models if _matches(file, wanted)), None
    )
    if found is None and tag is None:
        found = next(iter(models), None)
    if found is None:
        return None
    prefix, _, count = _shard(found)
    parts = [found] if count <= 1 else [f for f in files if f.endswith(".gguf") and _shard(f)[::2] == (prefix, count)]
    return Picked(found, tuple(parts), _projector(files, found))


def is_model(file: str) -> bool:
    """Whether llama.cpp counts a path of a repository among its models."""
    return file.endswith(".gguf") and not any(word in file.rpartition("/")[2] for word in NO_MODEL)


def ambiguous_tags(files: Sequence[str]) -> dict[str, list[str]]:
    """{tag: the models that answer to it}, of every tag that a model of the repository is named by and another model
    answers to, too: which one is taken would depend on the order of the listing. A set of shards is one model."""
    models = [file for file in files if is_model(file) and _shard(file)[1] == 1]
    tags = dict.fromkeys(tag for file in models if (tag := tag_of(file)))
    answers = {tag: [file for file in models if _matches(file, tag)] for tag in tags}
    return {tag: found for tag, found in answers.items() if len(found) > 1}


def tag_of(file: str) -> str:
    """The tag that llama.cpp reads from a file's name, in upper case; "" where there is none."""
    match = _TAG.search(_shard(file)[0])
    return match[1].upper() if match else ""


def _matches(path: str, tag: str) -> bool:
    return re.search(rf"{re.escape(tag)}[.-]", path, re.IGNORECASE) is not None


def _shard(path: str) -> tuple[str, int, int]:
    """(path without number and ending, number of the shard, number of shards); a whole file is 1 of 1."""
    whole = path.removesuffix(".gguf")
    match = _SHARD.fullmatch(whole)
    return (match[1], int(match[2]), int(match[3])) if match else (whole, 1, 1)


def _projector(files: Sequence[str], model: str) -> str | None:
    """The projector that goes with a model: of the deepest folder on its way, then of the nearest number of bits;
    the first in the listing wins a draw."""
    folders = model.split("/")[:-1]
    found = []
    for place, file in enumerate(files):
        own = file.split("/")[:-1]
        if file.endswith(".gguf") and "mmproj" in file and folders[: len(own)] == own:
            found.append((-len(own), abs(_bits(file) - _bits(model)), place, file))
    return min(found)[-1] if found else None


def _bits(file: str) -> int:
    digits = "".join(
        itertools.takewhile(str.isdigit, itertools.dropwhile(lambda character: not character.isdigit(), tag_of(file)))
    )
    return int(digits or 0)
