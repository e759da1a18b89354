"""`quantset.json` survives a round trip byte for byte, and anything that is not one is refused by the field's name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from gemma_gguf import manifest, recipes
from gemma_gguf.errors import BadInputError
from gemma_gguf.manifest import (
    FILE_NAME,
    BuildFacts,
    CacheGroup,
    CalibrationFacts,
    CardChoices,
    Checks,
    ContextFacts,
    ContextMemory,
    Coverage,
    CustomRecipe,
    EmbeddingFacts,
    Evidence,
    Failed,
    FileEntry,
    GateFacts,
    GridFit,
    ImatrixFacts,
    KernelFacts,
    Manifest,
    Measured,
    ModelFacts,
    Picture,
    PromptExample,
    PromptFacts,
    QatFacts,
    Quality,
    RefreshFacts,
    RemotePlace,
    Sampling,
    Speed,
    StageRecord,
    Support,
)
from gemma_gguf.recipes import TABLE, Recipe
from tests.examples import STEM, example, failed, qat, sha

REPAIR = "Restore it, or delete it and run the same command again: the set is made anew."
# Where each model stands in the example's JSON; fields are tried out in all of them.
PLACES: tuple[tuple[type[BaseModel], tuple[str | int, ...]], ...] = (
    (Manifest, ()),
    (ModelFacts, ("model",)),
    (BuildFacts, ("llama_cpp",)),
    (KernelFacts, ("kernels",)),
    (CalibrationFacts, ("calibration",)),
    (ImatrixFacts, ("imatrix",)),
    (StageRecord, ("stages", "convert")),
    (FileEntry, ("files", 3)),
    (Checks, ("files", 3, "checks")),
    (Evidence, ("evidence", sha(f"{STEM}-Q4_K_M.gguf"))),
    (Quality, ("evidence", sha(f"{STEM}-Q4_K_M.gguf"), "quality")),
    (Measured, ("evidence", sha(f"{STEM}-Q4_K_M.gguf"), "quality", "kld")),
    (Failed, ("evidence", sha("a broken file"), "failed")),
    (Speed, ("evidence", sha(f"{STEM}-Q4_K_M.gguf"), "speed")),
    (Coverage, ("imatrix", "coverage", 0)),
    (QatFacts, ("qat",)),
    (GridFit, ("qat", "grid", 0)),
    (GateFacts, ("gates",)),
    (ContextFacts, ("context",)),
    (CacheGroup, ("context", "cache", 1)),
    (ContextMemory, ("context", "measured", 0)),
    (PromptFacts, ("prompts",)),
    (PromptExample, ("prompts", "examples", 0)),
    (Picture, ("pictures", "quality")),
    (Sampling, ("model", "sampling")),
    (Support, ("model", "support")),
    (CardChoices, ("card",)),
)


def _dotted(place: tuple[str | int, ...], field: str) -> str:
    return ".".join(map(str, (*place, field)))


FIELDS = [
    pytest.param(place, field, id=_dotted(place, field)) for model, place in PLACES for field in model.model_fields
]


def _raw() -> dict[str, Any]:
    evidence = {**example().evidence, sha("a broken file"): failed()}
    raw = json.loads(example().model_copy(update={"qat": qat(), "evidence": evidence}).model_dump_json())
    assert isinstance(raw, dict)
    return raw


def _at(raw: Any, place: tuple[str | int, ...]) -> Any:
    for step in place:
        raw = raw[step]
    return raw


def _load(directory: Path, content: Any) -> Manifest:
    """Write bytes, text or a value as JSON, and read it as a manifest."""
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    (directory / FILE_NAME).write_bytes(content.encode() if isinstance(content, str) else content)
    return manifest.load(directory)


def _refused(directory: Path, content: Any) -> BadInputError:
    with pytest.raises(BadInputError) as caught:
        _load(directory, content)
    assert str(directory / FILE_NAME) in caught.value.what
    return caught.value


def test_round_trip(tmp_path: Path) -> None:
    manifest.save(example(), tmp_path)
    assert manifest.load(tmp_path) == example()


def test_saving_what_was_loaded_changes_no_byte(tmp_path: Path) -> None:
    manifest.save(example(), tmp_path)
    path = tmp_path / FILE_NAME
    first = path.read_bytes()
    manifest.save(manifest.load(tmp_path), tmp_path)
    assert path.read_bytes() == first
    assert first.startswith(b'{\n "schema_version": 4,\n "tool_version": "0.1.0",\n')
    assert first.endswith(b"\n}\n")
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]


def test_front_matter_of_any_shape_survives(tmp_path: Path) -> None:
    facts = example().model
    front_matter = {"a": [1, 2.5, None, True, {"b": ["ü", "\u2028", "<&>", ""]}], "no": "no", "n": 10**20, "": {}}
    made = example().model_copy(update={"model": facts.model_copy(update={"front_matter": front_matter})})
    manifest.save(made, tmp_path)
    assert manifest.load(tmp_path).model.front_matter == front_matter


def test_optional_facts_may_be_none_but_not_missing(tmp_path: Path) -> None:
    """`null` says that something is known to be absent."""
    raw = _raw()
    raw["calibration"] = raw["imatrix"] = raw["context"] = raw["prompts"] = None
    for field in ("repo", "revision", "license", "chat_template"):
        raw["model"][field] = None
    for field in ("recipe", "about", "bpw", "parent", "checks"):
        raw["files"][3][field] = None
    loaded = _load(tmp_path, raw)
    assert json.loads(loaded.model_dump_json()) == raw


def test_a_manifest_from_before_the_kernels_is_read(tmp_path: Path) -> None:
    raw = json.loads(example().model_dump_json())
    raw["schema_version"] = 2
    for entry in raw["files"]:
        del entry["remote"]
    for field in ("kernels", "qat", "pins", "gates"):
        del raw[field]
    for found in raw["evidence"].values():
        del found["failed"]
    assert _load(tmp_path, raw) == example().model_copy(update={"kernels": None})


def test_a_manifest_from_before_custom_recipes_is_read(tmp_path: Path) -> None:
    """The name alone said how a file was made; one of a type that our table does not have was made of just that."""
    raw = json.loads(example().model_dump_json())
    raw["schema_version"] = 2
    del raw["custom_recipes"]
    for entry in raw["files"]:
        del entry["ftype"], entry["flags"]
    assert _load(tmp_path, raw) == example()
    raw["files"][0] |= {"recipe": "Q9_0", "kind": "model"}
    assert (_load(tmp_path, raw).files[0].ftype, _load(tmp_path, raw).files[0].flags) == ("Q9_0", [])


@pytest.mark.parametrize("name", ["Q4_K_M", "Q4_K_L", "bf16"])
def test_a_file_knows_its_recipe(name: str) -> None:
    (entry,) = (entry for entry in example().files if entry.recipe == name)
    assert entry.as_recipe() == recipes.TABLE[name]


def test_a_custom_recipe_is_read_back(tmp_path: Path) -> None:
    raw = _raw()
    raw["custom_recipes"] = [{"name": "MINE", "ftype": "Q4_0", "about": "Mine", "flags": ["--tensor-type", "a=q8_0"]}]
    assert json.loads(_load(tmp_path, raw).model_dump_json()) == raw
    raw["custom_recipes"][0]["name"] = "../MINE"
    assert "is damaged at custom_recipes.0.name" in _refused(tmp_path, raw).what


@pytest.mark.parametrize(("place", "field"), FIELDS)
def test_every_field_is_required(tmp_path: Path, place: tuple[str | int, ...], field: str) -> None:
    raw = _raw()
    del _at(raw, place)[field]
    error = _refused(tmp_path, raw)
    assert error.what == f"{tmp_path / FILE_NAME} is damaged at {_dotted(place, field)}: Field required"
    assert error.next_step == REPAIR


@pytest.mark.parametrize("place", [pytest.param(place, id=model.__name__) for model, place in PLACES])
def test_unknown_fields_are_refused(tmp_path: Path, place: tuple[str | int, ...]) -> None:
    raw = _raw()
    _at(raw, place)["colour"] = "red"
    error = _refused(tmp_path, raw)
    where = _dotted(place, "colour")
    assert error.what == f"{tmp_path / FILE_NAME} is damaged at {where}: Extra inputs are not permitted"


@pytest.mark.parametrize(
    ("place", "field", "value", "why"),
    [
        pytest.param((), "tool_version", 1, "Input should be a valid string", id="number for text"),
        pytest.param((), "stem", None, "Input should be a valid string", id="null for text"),
        pytest.param((), "files", {}, "Input should be a valid list", id="object for list"),
        pytest.param((), "stages", [], "Input should be a valid dictionary", id="list for object"),
        pytest.param(("model",), "vision", 1, "Input should be a valid boolean", id="number for truth value"),
        pytest.param(("model",), "vision", "true", "Input should be a valid boolean", id="text for truth value"),
        pytest.param(("model",), "n_parameters", "4300079472", "Input should be a valid integer", id="text for number"),
        pytest.param(("model",), "n_parameters", 4e9, "Input should be a valid integer", id="float for integer"),
        pytest.param(("model",), "n_parameters", True, "Input should be a valid integer", id="truth value for integer"),
        pytest.param(("model",), "origin", "moon", "Input should be 'demo', 'local' or 'hub'", id="unknown origin"),
        pytest.param(("files", 3), "bpw", "8.5", "Input should be a valid number", id="text for float"),
        pytest.param(("files", 3), "kind", "lora", "Input should be 'model', 'mmproj' or 'imatrix'", id="unknown kind"),
        pytest.param(("files", 3), "state", "hub", "Input should be 'local' or 'remote'", id="unknown state"),
        pytest.param(("files", 3), "n_bytes", None, "Input should be a valid integer", id="null for size"),
        pytest.param(("files", 3), "argv", "llama-quantize", "Input should be a valid list", id="text for list"),
    ],
)
def test_wrong_types_are_refused(
    tmp_path: Path, place: tuple[str | int, ...], field: str, value: object, why: str
) -> None:
    """Nothing is converted: a number in quotes is a damaged file."""
    raw = _raw()
    _at(raw, place)[field] = value
    assert _refused(tmp_path, raw).what == f"{tmp_path / FILE_NAME} is damaged at {_dotted(place, field)}: {why}"


REMOTE = {"repo": "me/set-GGUF", "commit": "0a" * 20}


def test_a_published_file_says_where_it_is(tmp_path: Path) -> None:
    raw = _raw()
    raw["files"][3] |= {"state": "remote", "remote": REMOTE}
    entry = _load(tmp_path, raw).files[3]
    assert (entry.state, entry.remote) == ("remote", RemotePlace(repo="me/set-GGUF", commit="0a" * 20))


@pytest.mark.parametrize(
    ("changes", "where", "why"),
    [
        ({"state": "remote"}, "files.3", "remote files, and no others, should have a repository and a commit"),
        ({"remote": REMOTE}, "files.3", "remote files, and no others, should have a repository and a commit"),
        ({"remote": {"repo": "me/set"}}, "files.3.remote.commit", "Field required"),
        ({"remote": {**REMOTE, "colour": "red"}}, "files.3.remote.colour", "Extra inputs are not permitted"),
        (
            {"remote": {**REMOTE, "repo": "../me"}},
            "files.3.remote.repo",
            "String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$'",
        ),
        (
            {"remote": {**REMOTE, "commit": "main"}},
            "files.3.remote.commit",
            "String should match pattern '^[0-9a-f]{40}$'",
        ),
    ],
    ids=["no place", "local with a place", "no commit", "unknown field", "no repository", "no hash"],
)
def test_half_a_place_is_refused(changes: dict[str, Any], where: str, why: str, tmp_path: Path) -> None:
    raw = _raw()
    raw["files"][3] |= changes
    assert _refused(tmp_path, raw).what == f"{tmp_path / FILE_NAME} is damaged at {where}: {why}"


BAD_SHA256 = [
    pytest.param("", id="empty"),
    pytest.param("0" * 63, id="63 digits"),
    pytest.param("0" * 65, id="65 digits"),
    pytest.param("A" * 64, id="capitals"),
    pytest.param("g" * 64, id="not hexadecimal"),
    pytest.param("0" * 64 + "\n", id="line end"),
    pytest.param("sha256:" + "0" * 57, id="prefix"),
    pytest.param("٠" * 64, id="digits of another script"),
]


@pytest.mark.parametrize("value", BAD_SHA256)
@pytest.mark.parametrize(
    ("place", "field"),
    [
        pytest.param(("files", 3), "sha256", id="file"),
        pytest.param(("files", 3), "key", id="key"),
        pytest.param(("files", 3, "checks"), "layout_sha256", id="layout"),
        pytest.param(("calibration",), "sha256", id="calibration"),
        pytest.param(("model", "files"), "config.json", id="checkpoint"),
        pytest.param(("stages", "convert"), "key", id="stage"),
        pytest.param(("stages", "convert", "outputs"), "mmproj.gguf", id="stage output"),
    ],
)
def test_wrong_hashes_are_refused(tmp_path: Path, place: tuple[str | int, ...], field: str, value: str) -> None:
    raw = _raw()
    _at(raw, place)[field] = value
    assert f" is damaged at {_dotted(place, field)}: String should match pattern" in _refused(tmp_path, raw).what


@pytest.mark.parametrize("name", ["a.gguf", "folder/a-00001-of-00002.gguf", "a..b+c.gguf", "é.gguf", "x" * 255])
def test_names_of_files(tmp_path: Path, name: str) -> None:
    raw = _raw()
    raw["files"][3]["name"] = name
    assert _load(tmp_path, raw).files[3].name == name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("", id="empty"),
        pytest.param("..", id="parent"),
        pytest.param(".", id="here"),
        pytest.param("../a.gguf", id="out of the set"),
        pytest.param("a/../b.gguf", id="out and in"),
        pytest.param("a/..", id="the set itself"),
        pytest.param("/etc/passwd", id="absolute"),
        pytest.param("a/b/c.gguf", id="three components"),
        pytest.param("a//b.gguf", id="empty component"),
        pytest.param("a/", id="folder"),
        pytest.param(".work/a.gguf", id="hidden folder"),
        pytest.param("a/.hidden", id="hidden file"),
        pytest.param("C:\\a.gguf", id="drive"),
        pytest.param("a\\b.gguf", id="backslash"),
        pytest.param("~/a.gguf", id="home"),
        pytest.param("-rf", id="option"),
        pytest.param("a b.gguf", id="space"),
        pytest.param("a.gguf\n", id="line end"),
        pytest.param("a\0.gguf", id="NUL"),
        pytest.param("a](x)|<b>.gguf", id="Markdown"),
    ],
)
def test_names_that_are_no_file_of_the_set(tmp_path: Path, name: str) -> None:
    raw = _raw()
    raw["files"][3]["name"] = name
    assert " is damaged at files.3.name: String should match pattern" in _refused(tmp_path, raw).what


def test_a_name_of_256_letters(tmp_path: Path) -> None:
    raw = _raw()
    raw["files"][3]["name"] = "x" * 256
    assert _refused(tmp_path, raw).what.endswith(
        " is damaged at files.3.name: String should have at most 255 characters"
    )


@pytest.mark.parametrize("version", [5, 6, 10**30])
def test_a_newer_schema_is_refused_before_its_fields_are_looked_at(tmp_path: Path, version: int) -> None:
    error = _refused(tmp_path, {"schema_version": version, "something": "new"})
    path = tmp_path / FILE_NAME
    assert error.what == f"{path} has schema version {version}, this gemma-gguf reads up to 4"
    assert error.next_step == "pip install --upgrade gemma-gguf"


def test_a_manifest_of_schema_1_is_read_as_one_without_evidence(tmp_path: Path) -> None:
    raw = _raw()
    raw["schema_version"] = 1
    del raw["evidence"], raw["context"], raw["prompts"], raw["pictures"], raw["imatrix"]["coverage"]
    (tmp_path / FILE_NAME).write_text(json.dumps(raw))
    loaded = manifest.load(tmp_path)
    assert loaded.imatrix is not None
    assert (loaded.evidence, loaded.pictures, loaded.imatrix.coverage) == ({}, {}, [])
    assert (loaded.context, loaded.prompts) == (None, None)
    assert (loaded.files, loaded.stages) == (example().files, example().stages)


def test_a_manifest_of_schema_1_knows_no_sampling_and_chose_no_card(tmp_path: Path) -> None:
    """What it made is what it was asked for; what it did not record is not known, rather than absent."""
    raw = _raw()
    raw["schema_version"] = 1
    for field in ("evidence", "context", "prompts", "pictures", "recipes", "card"):
        del raw[field]
    del raw["imatrix"]["coverage"], raw["model"]["sampling"], raw["model"]["support"]
    loaded = _load(tmp_path, raw)
    assert (loaded.model.sampling, loaded.model.support) == (None, None)
    assert loaded.card == manifest.DEFAULT_CARD
    assert loaded.recipes == ["bf16", "Q8_0", "Q4_K_L", "Q4_K_M", "Q4_0", "IQ2_XS"]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("arch", "known"), [("gemma3", False), ("gemma-embedding", True)])
def test_a_manifest_before_schema_3_measured_no_embeddings(
    tmp_path: Path, version: int, arch: str, known: bool
) -> None:
    """A set of such a model was made without prompts and dense layers, and says so."""
    raw = json.loads(example().model_dump_json())
    raw["schema_version"] = version
    raw["model"]["gguf_arch"] = arch
    del raw["model"]["embedding"]
    for found in raw["evidence"].values():
        del found["similarity"]
    loaded = _load(tmp_path, raw)
    bare = EmbeddingFacts(prompts={}, similarity=None, dense=[])
    assert loaded.model.embedding == (bare if known else None)
    if version == 2:
        assert {found.similarity for found in loaded.evidence.values()} == {None}
        assert all(found.quality is not None for found in loaded.evidence.values())


@pytest.mark.parametrize("version", [2, 3])
def test_a_manifest_before_schema_4_held_nothing_back(tmp_path: Path, version: int) -> None:
    """No gates, no shards, and every file was made with the set's imatrix."""
    raw = json.loads(example().model_dump_json())
    raw["schema_version"] = version
    for field in ("split_max_size", "qat", "pins", "parity", "gates"):
        del raw[field]
    for entry in raw["files"]:
        del entry["static"], entry["shards"]
    for found in raw["evidence"].values():
        del found["failed"]
    del raw["model"]["left_out"]
    bare: dict[str, Any] = {
        "split_max_size": 50_000_000_000,
        "qat": None,
        "pins": {},
        "parity": None,
        "gates": manifest.DEFAULT_GATES,
    }
    assert _load(tmp_path, raw) == example().model_copy(update=bare)


@pytest.mark.parametrize("broken", [{"model": 5}, {"files": "x"}, {"files": [5]}, {"files": [{"recipe": 5}]}], ids=str)
def test_a_damaged_manifest_of_schema_1_is_refused_like_any_other(tmp_path: Path, broken: dict[str, Any]) -> None:
    raw = {**_raw(), "schema_version": 1, **broken}
    assert "is damaged at " in _refused(tmp_path, raw).what


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("theme", "baroque"),
        ("languages", ["../ja"]),
        ("repo", "someone"),
        ("repo", "a/b; rm -rf ~"),
        ("repo", "a/../b"),
        ("repo", "`a`/b"),
    ],
)
def test_choices_for_the_card_are_checked(tmp_path: Path, field: str, value: object) -> None:
    """They stand in commands that a reader copies."""
    raw = _raw()
    raw["card"][field] = value
    assert f"is damaged at card.{field}" in _refused(tmp_path, raw).what


@pytest.mark.parametrize("field", ["tokens_min", "tokens_median", "tokens_max", "unseen", "active", "evenness"])
def test_coverage_has_one_number_per_layer(tmp_path: Path, field: str) -> None:
    raw = _raw()
    raw["imatrix"]["coverage"][0][field].pop()
    error = _refused(tmp_path, raw)
    assert error.what.endswith("at imatrix.coverage.0: every list should have one number per layer")


@pytest.mark.parametrize("version", [0, -1, "1", "2", None, [1], 1.0, 2.5, True], ids=repr)
def test_a_schema_version_that_is_none(tmp_path: Path, version: object) -> None:
    raw = _raw()
    raw["schema_version"] = version
    error = _refused(tmp_path, raw)
    assert error.what == f"{tmp_path / FILE_NAME} is damaged at schema_version: Input should be 1 to 4"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="cut"),
        pytest.param("schema_version: 1", id="YAML"),
        pytest.param(b'{"schema_version": "\xff"}', id="not UTF-8"),
        pytest.param("[" * 100_000, id="too deep"),
        pytest.param('{"schema_version": ' + "1" * 5000 + "}", id="a number too long"),
        pytest.param(b"\0" * 100, id="zeros"),
    ],
)
def test_not_json(tmp_path: Path, content: str | bytes) -> None:
    error = _refused(tmp_path, content)
    assert error.what.startswith(f"{tmp_path / FILE_NAME} is not readable JSON: ")
    assert error.next_step == REPAIR


def test_a_manifest_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / FILE_NAME).open("wb") as opened:
        opened.truncate(10**12)  # a hole
    with pytest.raises(BadInputError) as caught:
        manifest.load(tmp_path)
    assert caught.value.what == f"{tmp_path / FILE_NAME} has more than the 16,000,000 bytes that are read"
    assert "Restore it" in (caught.value.next_step or "")


def test_cut_anywhere_it_is_refused(tmp_path: Path) -> None:
    whole = example().model_dump_json(indent=1).encode()
    for at in range(0, len(whole), 97):
        assert _refused(tmp_path, whole[:at]).next_step == REPAIR


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
@pytest.mark.parametrize("field", ["bpw", "seconds"])
def test_numbers_that_json_does_not_have(tmp_path: Path, field: str, number: str) -> None:
    """They would be saved as null: a card or a run could not read the manifest again."""
    raw = _raw()
    raw["files"][3][field] = 12345.678
    text = json.dumps(raw)
    assert text.count("12345.678") == 1
    _refused(tmp_path, text.replace("12345.678", number))


def test_text_that_is_not_unicode(tmp_path: Path) -> None:
    """Half a surrogate pair can be written in JSON but not in UTF-8: it would be read and never saved again."""
    raw = _raw()
    raw["model"]["front_matter"] = {"license_name": "\ud800"}
    _refused(tmp_path, raw)


@pytest.mark.parametrize("content", ["[]", "1", '"quantset"', "null", "[{}]"])
def test_not_an_object(tmp_path: Path, content: str) -> None:
    error = _refused(tmp_path, content)
    assert error.what.startswith(f"{tmp_path / FILE_NAME} is damaged at the document: Input should be ")
    assert error.next_step == REPAIR


@pytest.mark.parametrize("prepare", [lambda _: None, Path.mkdir], ids=["nothing", "a directory"])
def test_missing(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    prepare(tmp_path / FILE_NAME)
    with pytest.raises(BadInputError) as caught:
        manifest.load(tmp_path)
    assert caught.value.what == f"{tmp_path} has no quantset.json: it is not a quant set"
    assert caught.value.next_step == "Make one with: gemma-gguf run MODEL"


def test_file_finds_by_name() -> None:
    made = example()
    assert made.file("google_gemma-3-4b-it-Q4_K_M.gguf") is made.files[5]
    assert made.file("google_gemma-3-4b-it-Q4_K_M") is None


def test_with_file_replaces_the_one_of_that_name() -> None:
    before = example()
    old = before.files[3]
    new = old.model_copy(update={"n_bytes": 1, "sha256": sha("new")})
    after = before.with_file(new)
    assert after.file(old.name) is new
    assert after.files == [*before.files[:3], *before.files[4:], new]
    assert before == example()


def test_with_file_adds_one_of_another_recipe() -> None:
    before = example()
    new = before.files[3].model_copy(update={"name": "other.gguf", "recipe": "Q3_K_M"})
    assert before.with_file(new).files == [*before.files, new]


def test_a_row_is_the_tables_or_the_sets_own() -> None:
    own = CustomRecipe(name="MINE", ftype="Q4_K_M", about="mine", flags=["--tensor-type", "ffn_down=q6_k"])
    same = own.model_copy(update={"name": "Q8_0"})
    made = example().model_copy(update={"custom_recipes": [own, same]})
    assert made.row("MINE") == Recipe("MINE", "Q4_K_M", "mine", ("--tensor-type", "ffn_down=q6_k"))
    assert made.row("Q8_0") == TABLE["Q8_0"]
    assert made.row("Q9_0") is None


@pytest.mark.parametrize(
    ("state", "other_build", "begun"), [("applying", "", True), ("applying", "x", False), ("applied", "", False)]
)
def test_a_refresh_was_begun_if_it_did_not_end(state: str, other_build: str, begun: bool) -> None:
    made = example()
    done = RefreshFacts(
        before=made.llama_cpp,
        build=made.llama_cpp,
        state=state,  # type: ignore[arg-type]
        files={},
        evidence_builds=[],
    )
    made = made.model_copy(update={"refresh": done})
    assert made.begun_refresh(made.llama_cpp.key + other_build) == (done if begun else None)
    assert example().begun_refresh(made.llama_cpp.key) is None


def test_with_stage_replaces_and_adds() -> None:
    before = example()
    record = StageRecord(key=sha("other"), argv=[["tool"]], seconds=1.5, outputs={"a": sha("a")})
    after = before.with_stage("convert", record)
    assert after.stages == {"convert": record, "imatrix": before.stages["imatrix"]}
    assert list(after.with_stage("later", record).stages) == ["convert", "imatrix", "later"]
    assert before == example()


def test_facts_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        example().files[0].n_bytes = 0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("option", "value"), [("-m", "a.gguf"), ("--chunks", "4"), ("-ngl", None), ("--last", None)], ids=str
)
def test_an_argument_of_a_recorded_command_line(option: str, value: str | None) -> None:
    """An option without anything after it gives nothing."""
    assert manifest.argument(["llama-imatrix", "-m", "a.gguf", "--chunks", "4", "--last"], option) == value
