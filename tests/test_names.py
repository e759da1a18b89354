"""File names as an interface: what we say llama.cpp picks of a repository is what the real llama-server picks."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_gguf import factory, names, planning, recipes, session, source
from gemma_gguf.errors import BadInputError
from gemma_gguf.llama_cpp import Build
from gemma_gguf.names import Picked
from gemma_gguf.recipes import Recipe
from gemma_gguf.session import Options
from tests import hub

STEM = "google_gemma-3-4b-it"
MODELS = [f"{STEM}-{name}.gguf" for name in recipes.TABLE]
PROJECTORS = [f"mmproj-{STEM}-{kind}.gguf" for kind in ("bf16", "f16", "f32")]
A_SET = sorted([*MODELS, *PROJECTORS, f"{STEM}-imatrix.gguf", f"mtp-{STEM}-Q8_0.gguf", "README.md", "quantset.json"])
SHARDS = [f"{STEM}-Q8_0/{STEM}-Q8_0-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
WITH_SHARDS = sorted([*SHARDS, *(file for file in A_SET if file != f"{STEM}-Q8_0.gguf")])
NOT_DEFAULT = [f"{STEM}-imatrix.gguf", f"{STEM}-Q6_K.gguf", f"{STEM}-Q8_0.gguf", f"mtp-{STEM}-Q8_0.gguf"]
NEITHER = [f"mmproj-{STEM}-f16.gguf", f"{STEM}-imatrix.gguf", f"{STEM}-IQ2_M.gguf", f"{STEM}-Q6_K.gguf"]


# --- what is expected, by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes.TABLE)
def test_every_row_of_a_set_is_picked_by_its_own_tag(name: str) -> None:
    for tag in (name, name.lower(), name.upper()):
        found = names.picked(A_SET, tag)
        assert found is not None
        assert (found.model, found.files) == (f"{STEM}-{name}.gguf", (f"{STEM}-{name}.gguf",))


@pytest.mark.parametrize(
    ("files", "tag", "expected"),
    [
        pytest.param(A_SET, "F16", f"{STEM}-bf16.gguf", id="f16-is-in-bf16"),
        pytest.param(A_SET, None, f"{STEM}-Q4_K_M.gguf", id="no-tag"),
        pytest.param(A_SET, "Q4_K", None, id="half-a-tag"),
        pytest.param(A_SET, "imatrix", None, id="imatrix-is-no-model"),
        pytest.param(NOT_DEFAULT, None, f"{STEM}-Q8_0.gguf", id="no-tag-no-q4_k_m"),
        pytest.param(NEITHER, None, f"{STEM}-IQ2_M.gguf", id="no-tag-takes-the-first-model"),
        pytest.param(["README.md", f"mmproj-{STEM}-f16.gguf"], None, None, id="no-model"),
        pytest.param(["a-q4_0-b-Q4_0.gguf", "a-q4_0-b-Q8_0.gguf"], "Q4_0", "a-q4_0-b-Q4_0.gguf", id="tag-in-stem"),
        pytest.param(["a-q8_0-b-Q4_0.gguf", "a-q8_0-b-Q8_0.gguf"], "Q8_0", "a-q8_0-b-Q4_0.gguf", id="wrong-file"),
    ],
)
def test_picked(files: list[str], tag: str | None, expected: str | None) -> None:
    found = names.picked(files, tag)
    assert (found and found.model) == expected


def test_shards_are_picked_together() -> None:
    projector = PROJECTORS[0]
    assert names.picked(WITH_SHARDS, "q8_0") == Picked(SHARDS[0], tuple(SHARDS), projector)
    assert names.picked(sorted(WITH_SHARDS, reverse=True), "Q8_0") == Picked(
        SHARDS[0], tuple(SHARDS[::-1]), PROJECTORS[1]
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(A_SET, {}, id="a-whole-set"),
        pytest.param(WITH_SHARDS, {}, id="shards-are-one-model"),
        pytest.param(["x-TQ1_0.gguf", "x-Q1_0.gguf"], {"Q1_0": ["x-TQ1_0.gguf", "x-Q1_0.gguf"]}, id="a-tag-in-another"),
        pytest.param(["x-bf16.gguf", "x-F16.gguf"], {"F16": ["x-bf16.gguf", "x-F16.gguf"]}, id="f16-beside-bf16"),
        pytest.param(
            ["a-q8_0-Q4_0.gguf", "a-q8_0-Q8_0.gguf"], {"Q8_0": ["a-q8_0-Q4_0.gguf", "a-q8_0-Q8_0.gguf"]}, id="stem"
        ),
    ],
)
def test_ambiguous_tags(files: list[str], expected: dict[str, list[str]]) -> None:
    assert names.ambiguous_tags(files) == expected


# --- stems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("org", "model", "expected"),
    [
        ("google", "gemma-3-4b-it", "google_gemma-3-4b-it"),
        ("google", "gemma-3-4b-it-qat-q4_0-unquantized", "google_gemma-3-4b-it-qat"),
        ("someone", "gemma-3-4b-it-qat-Q4_0-Unquantized-tuned", "someone_gemma-3-4b-it-qat-tuned"),
        ("google", "gemma-3-4b-it-qat-int4-unquantized", "google_gemma-3-4b-it-qat-int4-unquantized"),
    ],
)
def test_stem(org: str, model: str, expected: str) -> None:
    assert names.stem(org, model) == expected


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        pytest.param("a_gemma-Q8_0", "would all answer to llama-server -hf REPO:Q8_0", id="end"),
        pytest.param("a_q4_k_m-gemma", "would all answer to llama-server -hf REPO:Q4_K_M", id="other-case"),
        pytest.param("a_gemma-bf16", "would all answer to llama-server -hf REPO:BF16", id="longest"),
        pytest.param("a_my-imatrix-test", "takes no file with 'imatrix' in its name for a model", id="imatrix"),
        pytest.param("a_mtp", "takes no file with 'mtp-' in its name for a model", id="mtp"),
    ],
)
def test_stems_that_are_refused(stem: str, expected: str) -> None:
    with pytest.raises(BadInputError, match=expected) as caught:
        names.check_stem(stem)
    assert stem in caught.value.what
    assert caught.value.next_step == "Give the files another name: --name ORG/MODEL"


@pytest.mark.parametrize("stem", [STEM, "google_gemma-3n-E4B-it", "local_q4_0x", "a_gemma-2-2b-jpn-it", "a_IMATRIX"])
def test_stems_that_are_taken(stem: str) -> None:
    names.check_stem(stem)


def test_a_model_is_refused_by_its_name_and_taken_by_another(tmp_path: Path) -> None:
    (tmp_path / "gemma-Q8_0").mkdir()
    for model in (str(tmp_path / "gemma-Q8_0"), "someone/gemma-Q8_0"):
        with pytest.raises(BadInputError, match="REPO:Q8_0"):
            source.understand(model)
        assert source.understand(model, "me/gemma").stem == "me_gemma"
    name = source.understand("someone/gemma-Q8_0@abc", "me/gemma")
    assert (name.org, name.model, name.revision) == ("someone", "gemma-Q8_0", "abc")


@pytest.mark.parametrize(("recipes_asked", "refused"), [(("IT",), True), (("Q8_0", "it"), True), (("Q8_0",), False)])
def test_a_recipe_of_the_users_own_may_not_be_in_all_names(
    recipes_asked: tuple[str, ...], refused: bool, tmp_path: Path
) -> None:
    """As with the table's: every file of gemma-it would answer to IT. A recipe that is not made is in no name."""
    (tmp_path / "gemma-it").mkdir()
    own = Recipe("IT", "Q4_K_M", "mine")
    options = Options(str(tmp_path / "gemma-it"), recipes=recipes_asked, custom=(own,))
    if not refused:
        assert session.model_name(options).stem == "local_gemma-it"
        return
    for run in (session.model_name, planning.plan_set, factory.run):
        with pytest.raises(BadInputError, match=r"files named local_gemma-it-\S+ would all answer to .* REPO:IT"):
            run(replace(options, out=tmp_path / "out"))
    with pytest.raises(BadInputError) as caught:
        session.model_name(options)
    assert caught.value.next_step == "Give the files another name: --name ORG/MODEL, or the recipe."
    assert session.model_name(replace(options, name="me/gemma")).stem == "me_gemma"


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("MINE", None),
        ("Q4_my_2", None),
        ("imatrix_Q4", "passes over files with imatrix in their names"),
        ("eagle3", "passes over files with eagle3 in their names"),
        ("MTP", "passes over files with mtp in their names"),
        ("2", "would take any shards for it"),
        ("of", "would take any shards for it"),
    ],
)
def test_names_that_no_recipe_can_have(tag: str, expected: str | None) -> None:
    found = names.unfit_tag(tag)
    assert found is None if expected is None else expected in str(found)


# --- the real llama-server ------------------------------------------------------------------------------------------


class Server:
    """A llama-server that asks a Hub on this machine; what it downloads is what it picked."""

    def __init__(self, build: Build, there: hub.Hub, directory: Path) -> None:
        self.build, self.hub, self.directory = build, there, directory
        self.repos = 0

    def picks(self, files: list[str], tag: str | None) -> Picked | None:
        """What is downloaded for a tag from a repository of these files, none of which is a model: it then ends."""
        self.repos += 1
        name, place = f"org/r{self.repos}", self.directory / f"r{self.repos}"
        for file in files:
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            (place / file).write_bytes(file.encode())
        self.hub.repo(name).commit(place, "main")
        asked = f"{name}:{tag}" if tag is not None else name
        argv = [str(self.build.tool("llama-server")), "-hf", asked, "--host", "127.0.0.1", "--port", "0"]
        cache = {"LLAMA_CACHE": str(self.directory / "cache")}
        environment = {**self.hub.environment(self.directory / "home"), **cache}
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 1, done.stderr
        got = {match[1] for r in self.hub.requests if (match := re.match(rf"/large/models/{name}/\w+/(.+)", r.path))}
        loaded = re.search(r"failed to load model, '.*/snapshots/\w+/(.+)'", done.stderr)
        projectors = [file for file in got if "mmproj" in file]
        if loaded is None:
            assert not got
            return None
        assert len(projectors) < 2
        parts = tuple(file for file in files if file in got and file not in projectors)
        return Picked(loaded[1], parts, projectors[0] if projectors else None)


@pytest.fixture(scope="module")
def server(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with hub.serving() as there:
        yield Server(build, there, tmp_path_factory.mktemp("names"))


TAGS = [*recipes.TABLE, "F16", "q4_k_m", "Q4_K", "Q9_9", None]


@pytest.mark.parametrize("tag", TAGS, ids=str)
def test_the_real_server_picks_the_same_of_a_set(server: Server, tag: str | None) -> None:
    assert server.picks(A_SET, tag) == names.picked(A_SET, tag)


@pytest.mark.parametrize(
    ("files", "tag"),
    [
        pytest.param(WITH_SHARDS, "Q8_0", id="shards"),
        pytest.param(WITH_SHARDS, None, id="shards-no-tag"),
        pytest.param(WITH_SHARDS, "of", id="shards-answer-to-of"),
        pytest.param(WITH_SHARDS, "3", id="shards-answer-to-numbers"),
        pytest.param(NOT_DEFAULT, None, id="q8_0-is-the-second-default"),
        pytest.param(NEITHER, None, id="first-model"),
        pytest.param(["a-q8_0-b-Q4_0.gguf", "a-q8_0-b-Q8_0.gguf"], "Q8_0", id="tag-in-stem"),
        pytest.param(["x-BF16.gguf", "x-F16.gguf"], "F16", id="f16-beside-bf16"),
        pytest.param(["x-Q1_0.gguf", "x-TQ1_0.gguf"], "Q1_0", id="tag-in-another-tag"),
        pytest.param([f"{STEM}-Q4_K_M.gguf", *PROJECTORS[1:]], None, id="f16-projector"),
        pytest.param(["d/m-Q8_0.gguf", "d/mmproj-m-f32.gguf", "mmproj-m-f16.gguf"], "Q8_0", id="deepest-projector"),
        pytest.param(["d/m-Q8_0.gguf", "e/mmproj-m-f16.gguf"], "Q8_0", id="projector-of-another-folder"),
        pytest.param(["m-Q8_0.gguf", "MMPROJ-m-f16.gguf"], "F16", id="upper-case-is-another-name"),
        pytest.param(["my-imatrix-m-Q8_0.gguf", "eagle3-Q8_0.gguf", "dspark-m-Q8_0.gguf"], "Q8_0", id="no-models"),
    ],
)
def test_the_real_server_picks_the_same(server: Server, files: list[str], tag: str | None) -> None:
    listed = sorted(files)  # as the Hub on this machine lists them
    assert server.picks(listed, tag) == names.picked(listed, tag)
