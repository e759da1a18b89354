"""`gemma-gguf.toml`: what may stand in it, which file goes before which, and that flags win."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from gemma_gguf import cli, factory, gguf_io, manifest, planning, proof, recipes, settings
from gemma_gguf.card import THEMES
from gemma_gguf.errors import BadInputError
from gemma_gguf.recipes import Recipe
from gemma_gguf.session import CardOptions, Options, Report
from gemma_gguf.settings import FILE_NAME, CustomRecipe, Settings

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def user_file(here: Path) -> Path:
    return here.parent / "config" / FILE_NAME


def call(*argv: str) -> Result:
    return CliRunner(catch_exceptions=False).invoke(cli.main, list(argv), prog_name="gemma-gguf")


def refused(text: str, here: Path) -> list[str]:
    """The lines of the error that a file gives."""
    (here / FILE_NAME).write_text(text)
    with pytest.raises(BadInputError) as caught:
        settings.load()
    assert caught.value.next_step == settings.NEXT_STEP
    return caught.value.what.splitlines()


# --- what may stand in a file -------------------------------------------------------------------------------------

EVERYTHING = """
namespace = "me"
naming = "model"
quantized_by = "Me & Co"
out = "sets"
recipes = ["small", "Q4_K_DOWN6"]
llama_cpp = "git:b9999"
backend = "vulkan"
cmake_args = ["-DA=1", "-DB=2"]
calibration = "mine.txt"
chunks = 7
engine = "llama-quantize"
kernels = "ggml"
jobs = 3
max_memory = "1.5GB"
scheduler = "tcp://host:8786"
disk_budget = 7000
proof = false
threads = 5
gpu_layers = 9
evaluate = false
eval_chunks = 4
eval_disk_budget = "1GB"
split_max_size = "20GB"
bench = ["Q4_0", "Q6_K"]
theme = "classic"
languages = ["ja"]
templates = "own"

[recipe_sets]
small = ["Q4_K_M", "q6_k"]

[[custom_recipes]]
name = "Q4_K_DOWN6"
ftype = "Q4_K_M"
tensor_types = ["ffn_down=q6_k"]
token_embedding_type = "q8_0"
"""
OWN = Recipe(
    "Q4_K_DOWN6",
    "Q4_K_M",
    "Q4_K_M with ffn_down=q6_k, embedding at q8_0",
    ("--tensor-type", "ffn_down=q6_k", "--token-embedding-type", "q8_0"),
)
OPTIONS = Options(
    model="google/gemma-3-4b-it",
    out=Path("sets"),
    recipes=("Q4_K_M", "q6_k", "Q4_K_DOWN6"),
    llama_cpp="git:b9999",
    backend="vulkan",
    cmake_args=("-DA=1", "-DB=2"),
    calibration="mine.txt",
    chunks=7,
    threads=5,
    gpu_layers=9,
    engine="llama-quantize",
    kernels="ggml",
    jobs=3,
    scheduler="tcp://host:8786",
    max_memory=1_500_000_000,
    disk_budget=7000,
    split_max_size=20_000_000_000,
    proof=False,
    evaluate=False,
    eval_chunks=4,
    eval_disk_budget=1_000_000_000,
    bench=("Q4_0", "Q6_K"),
    templates=Path("own"),
    card=CardOptions(theme="classic", languages=("ja",), quantized_by="Me & Co", namespace="me"),
    naming="model",
    custom=(OWN,),
)


@pytest.fixture
def everything(here: Path) -> Path:
    """A working directory whose file sets every key."""
    (here / "own").mkdir()
    (here / "mine.txt").write_text("text")
    (here / FILE_NAME).write_text(EVERYTHING)
    return here


@pytest.fixture
def options_of_run(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """What `run` was called with; it does nothing."""
    seen: list[Options] = []

    def run(options: Options, **_: Any) -> Report:
        seen.append(options)
        raise BadInputError("seen")

    monkeypatch.setattr(factory, "run", run)
    return seen


def test_every_key_reaches_a_run(everything: Path, options_of_run: list[Options]) -> None:
    assert set(settings.load().origins) == set(settings.KEYS)
    assert call("run", OPTIONS.model).stderr.startswith("error: seen")
    assert options_of_run == [OPTIONS]


def test_flags_go_before_files(everything: Path, options_of_run: list[Options]) -> None:
    call(
        "run", OPTIONS.model, "--jobs", "1", "--recipes", "Q8_0,small", "--proof", "--theme", "modern", "--cmake-arg=x"
    )
    assert options_of_run == [
        replace(
            OPTIONS,
            jobs=1,
            recipes=("Q8_0", "Q4_K_M", "q6_k"),
            proof=True,
            cmake_args=("x",),
            card=replace(OPTIONS.card, theme="modern"),
        )
    ]


def test_every_key_but_the_tables_is_an_option(everything: Path) -> None:
    """What is set is a default of `run`: no key is passed over because its option is called something else."""
    parameters = {parameter.name for parameter in cli.main.commands["run"].params}
    assert set(settings.defaults(settings.load().settings)) <= parameters
    assert set(settings.KEYS) - {"recipe_sets", "custom_recipes"} == {
        key for key in settings.KEYS if settings.PARAMETERS.get(key, key) in parameters
    }


def test_help_shows_what_is_set(everything: Path) -> None:
    assert re.search(
        r"--engine \[fanout\|llama-quantize\]\s.*?\[default: llama-quantize\]", call("run", "-h").stdout, re.S
    )


def test_every_key_is_documented() -> None:
    table = README.partition("## What you set once")[2].partition("## What you get")[0]
    for key in (*settings.KEYS, *CustomRecipe.model_fields):
        assert re.search(rf"\b{key}\b", table), key
    for key in ("model", "name", "imatrix", "base", "reference", "repo"):
        assert re.search(rf"\b{key}\b", table), key


def test_the_readmes_example_can_be_read(here: Path) -> None:
    (here / FILE_NAME).write_text(re.findall(r"```toml\n(.*?)```", README, re.S)[0])
    read = settings.load().settings
    assert read.recipe_names() == (*recipes.DEFAULT_NAMES, "Q4_K_DOWN6")
    (own,) = read.custom
    assert own.flags == ("--tensor-type", "ffn_down=q6_k", "--token-embedding-type", "q8_0")


# --- what may not -------------------------------------------------------------------------------------------------

RECIPE = '[[custom_recipes]]\nname = "MINE"\nftype = "Q4_K_M"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("namespce = 'me'", "namespce: unknown key; nearest: namespace"),
        ("quantized-by = 'me'", "quantized-by: unknown key; nearest: quantized_by"),
        ("token = 'hf_x'", "token: unknown key"),
        ("namespace = 'a/b'", "namespace: string should match pattern"),
        ("naming = 'org'", "naming: 'org' is unknown; nearest: org_model"),
        ("theme = 'moder'", "theme: 'moder' is unknown; nearest: modern"),
        ("languages = ['de']", "languages[1]: 'de' is unknown; "),
        ("backend = 'opencl'", "backend: 'opencl' is unknown"),
        ("llama_cpp = 'zip:a'", "llama_cpp: 'zip:a' is no llama.cpp source. Use pypi:"),
        ("jobs = 0", "jobs: input should be greater than or equal to 1"),
        ("jobs = true", "jobs: input should be a valid integer"),
        ("proof = 'no'", "proof: input should be a valid boolean"),
        ("disk_budget = '200gb'", "disk_budget: '200gb' is no size; write for example 200GB"),
        ("disk_budget = -1", "disk_budget: -1 is no size; write for example 200GB"),
        ("templates = 'nowhere'", "templates: there is no directory nowhere"),
        ("recipes = []", "recipes: list should have at least 1 item after validation, not 0"),
        ("recipes = 'Q4_0'", "recipes: input should be a valid list"),
        ("recipes = ['Q4_K_N']", "recipes: unknown recipe 'Q4_K_N'. Nearest: Q4_K_S, Q4_K_M, Q4_K_L."),
        ("[recipe_sets]\ns = ['Q4_K_N']", "recipe_sets.s: unknown recipe 'Q4_K_N'. Nearest: Q4_K_S, Q4_K_M, Q4_K_L."),
        ("[recipe_sets]\nq4_0 = ['Q4_0']", "recipe_sets.q4_0: the name is taken"),
        ("[recipe_sets]\nall = ['Q4_0']", "recipe_sets.all: the name is taken"),
        ("[recipe_sets]\nQ = ['Q4_0']", "recipe_sets.Q: string should match pattern"),
        (RECIPE + "tensor_typs = []", "custom_recipes[1].tensor_typs: unknown key; nearest: tensor_types"),
        ('[[custom_recipes]]\nname = "A"', "custom_recipes[1].ftype: field required"),
        ('[[custom_recipes]]\nname = "A-B"\nftype = "Q4_0"', "custom_recipes[1].name: string should match pattern"),
        (
            '[[custom_recipes]]\nname = "A"\nftype = "Q4_K_N"',
            "custom_recipes[1].ftype: 'Q4_K_N' is unknown; nearest: Q4_K_",
        ),
        ('[[custom_recipes]]\nname = "A"\nftype = "COPY"', "custom_recipes[1].ftype: 'COPY' is unknown"),
        (RECIPE + RECIPE, "custom_recipes: two recipes are called MINE"),
        (RECIPE + "tensor_types = ['ffn_down']", "custom_recipes[1].tensor_types[1]: 'ffn_down' is not PATTERN=TYPE"),
        (RECIPE + "tensor_types = ['a b=q6_k']", "custom_recipes[1].tensor_types[1]: 'a b=q6_k' is not PATTERN=TYPE"),
        (RECIPE + "tensor_types = ['((=q6_k']", "custom_recipes[1].tensor_types[1]: '((' is no regular expression"),
        (
            RECIPE + "tensor_types = ['ffn_up=q6k']",
            "custom_recipes[1].tensor_types[1]: 'q6k' is no ggml type for weights; nearest: q6_k",
        ),
        (
            RECIPE + "output_tensor_type = 'i8'",
            "custom_recipes[1].output_tensor_type: 'i8' is no ggml type for weights",
        ),
        (RECIPE.replace("MINE", "Q4_K_M"), "custom_recipes.Q4_K_M: llama-server would take it for Q4_K_M"),
        (RECIPE.replace("MINE", "MY_q4_k_m"), "custom_recipes.MY_q4_k_m: llama-server would take it for Q4_K_M"),
        (RECIPE.replace("MINE", "K_M"), "custom_recipes.K_M: llama-server would take it for Q5_K_M, or"),
        (RECIPE.replace("MINE", "OF"), "custom_recipes.OF: llama-server would take any shards for it"),
        (
            RECIPE.replace("MINE", "mtp_Q"),
            "custom_recipes.mtp_Q: llama-server passes over files with mtp in their names",
        ),
        (
            RECIPE + "token_embedding_type = 'iq2_xs'",
            "custom_recipes.MINE: token_embd.weight cannot have iq2_xs, which needs an imatrix",
        ),
        (
            RECIPE + "tensor_types = ['per_layer=IQ1_S']",
            "custom_recipes.MINE: per_layer_token_embd.weight cannot have iq1_s, which needs an imatrix",
        ),
        ("a = ", "is not readable TOML: Invalid value"),
    ],
    ids=lambda value: value.replace("\n", " ")[:50],
)
def test_what_cannot_be_set(text: str, said: str, here: Path) -> None:
    lines = refused(text, here)
    assert lines[0].startswith(FILE_NAME)
    assert any(said in line for line in lines), lines


def test_an_earlier_pattern_goes_before_a_later_one(here: Path) -> None:
    """As in llama.cpp: so this embedding keeps q6_k."""
    (here / FILE_NAME).write_text(RECIPE + "tensor_types = ['TOKEN_embd=q6_k', 'embd=iq2_xs']\n")
    (own,) = settings.load().settings.custom
    assert settings.type_of(own, "token_embd.weight") == "Q6_K"


def test_all_problems_of_a_file_are_one_error(here: Path) -> None:
    lines = refused("namespce = 'me'\njobs = 0\n" + RECIPE + "tensor_typs = []", here)
    assert lines[0] == f"{FILE_NAME} has 3 problems:"
    assert {line.split(":")[0].strip() for line in lines[1:]} == {"namespce", "jobs", "custom_recipes[1].tensor_typs"}


def test_an_error_of_settings_is_a_document_too(here: Path) -> None:
    (here / FILE_NAME).write_text("jobs = 0")
    done = call("recipes", "--json")
    assert (done.exit_code, json.loads(done.stdout)["error"]) == (
        1,
        f"{FILE_NAME}: jobs: input should be greater than or equal to 1",
    )


def test_a_file_that_is_too_large_or_not_utf8(here: Path) -> None:
    (here / FILE_NAME).write_bytes(b"#" * (settings.MAX_BYTES + 1))
    with pytest.raises(BadInputError, match="more than the 1,000,000 bytes"):
        settings.load()
    (here / FILE_NAME).write_bytes(b'quantized_by = "\xff"')
    with pytest.raises(BadInputError, match="is not readable TOML: 'utf-8' codec"):
        settings.load()


# --- two files ----------------------------------------------------------------------------------------------------


def test_the_working_directory_goes_before_the_user(here: Path) -> None:
    own = '[[custom_recipes]]\nname = "{}"\nftype = "{}"\n'
    user_file(here).write_text(
        "jobs = 1\nthreads = 2\nrecipes = ['a']\n[recipe_sets]\na = ['Q4_0']\nb = ['Q8_0']\n"
        + own.format("OWN1", "Q4_0")
        + own.format("OWN2", "Q4_0")
    )
    (here / FILE_NAME).write_text("jobs = 3\n[recipe_sets]\na = ['OWN2']\n" + own.format("OWN2", "Q8_0"))
    loaded = settings.load()
    both = loaded.settings
    assert (both.jobs, both.threads, both.recipe_sets) == (3, 2, {"a": ["OWN2"], "b": ["Q8_0"]})
    assert [(recipe.name, recipe.ftype) for recipe in both.custom] == [("OWN1", "Q4_0"), ("OWN2", "Q8_0")]
    assert both.recipe_names() == ("OWN2",)
    assert loaded.origins["threads"] == loaded.origins["recipes"] == user_file(here)
    assert loaded.origins["jobs"] == loaded.origins["recipe_sets"] == Path(FILE_NAME)


def test_paths_are_meant_beside_their_file(here: Path) -> None:
    config = user_file(here).parent
    (config / "cards").mkdir()
    (config / "text.txt").write_text("text")
    user_file(here).write_text("out = 'o'\ncalibration = 'text.txt'\ntemplates = 'cards'\nllama_cpp = 'dir:../l'")
    found = settings.load().settings
    assert (found.out, found.calibration, found.templates, found.llama_cpp) == (
        str(config / "o"),
        str(config / "text.txt"),
        str(config / "cards"),
        f"dir:{config}/../l",
    )


@pytest.mark.parametrize("name", ["default", "technical", "no-such-set"])
def test_the_name_of_a_calibration_set_stays_as_it_is(name: str, here: Path) -> None:
    user_file(here).write_text(f"calibration = '{name}'")
    assert settings.load().settings.calibration == name


def test_without_files_nothing_is_set(here: Path) -> None:
    loaded = settings.load()
    assert (loaded.settings, loaded.origins, settings.defaults(loaded.settings)) == (Settings(), {}, {})
    assert loaded.settings.recipe_names() == recipes.DEFAULT_NAMES


def test_settings_shows_what_is_set_and_where(here: Path) -> None:
    user_file(here).write_text("theme = 'classic'\njobs = 9")
    (here / FILE_NAME).write_text("jobs = 2")
    done = call("settings", "--json")
    assert json.loads(done.stdout) == {
        "settings": {
            "theme": {"value": "classic", "file": str(user_file(here))},
            "jobs": {"value": 2, "file": FILE_NAME},
        },
        "files": [{"file": str(user_file(here)), "read": True}, {"file": FILE_NAME, "read": True}],
    }
    assert re.search(rf"^jobs +2 +{FILE_NAME} *$", done.stderr, re.MULTILINE)


def test_recipes_lists_those_of_the_user(here: Path) -> None:
    (here / FILE_NAME).write_text(RECIPE + "tensor_types = ['ffn_up=q6_k']")
    rows = json.loads(call("recipes", "--json").stdout)["recipes"]
    assert rows[-1] == {
        "name": "MINE",
        "ftype": "--tensor-type ffn_up=q6_k Q4_K_M",
        "made": "custom",
        "about": "Q4_K_M with ffn_up=q6_k",
    }


# --- what follows from them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "recorded", "expected"),
    [
        (CardOptions(), None, None),
        (CardOptions(namespace="me"), None, "me/org_model-GGUF"),
        (CardOptions(namespace="me", repo="you/it"), None, "you/it"),
        (CardOptions(namespace="me"), "you/it", "you/it"),
        (CardOptions(repo="me/it"), "you/it", "me/it"),
    ],
)
def test_the_namespace_gives_a_repository_where_there_is_none(
    chosen: CardOptions, recorded: str | None, expected: str | None
) -> None:
    before = manifest.DEFAULT_CARD.model_copy(update={"repo": recorded})
    assert chosen.chosen(before, "org_model").repo == expected


def test_choices_of_the_options_are_those_of_the_settings() -> None:
    options = {p.name: p.type for p in cli.main.commands["run"].params}
    for name in ("naming", "engine", "kernels", "backend", "theme"):
        kind = options[name]
        assert isinstance(kind, click.Choice)
        for choice in kind.choices:
            assert Settings.model_validate({name: choice}) != Settings()
    assert THEMES == ("modern", "classic")


# --- recipes of the user's own, on a real build -------------------------------------------------------------------

OWN_STEM = "test_tiny-vision"


def custom(name: str, ftype: str, *tensor_types: str, **given: str) -> Recipe:
    return CustomRecipe.model_validate(
        {"name": name, "ftype": ftype, "tensor_types": [*tensor_types], **given}
    ).recipe()


@pytest.fixture
def own_options(finished: Report, set_options: Options, tmp_path: Path) -> Options:
    """A set of two built-in rows and two of the user's own, from the finished set's base and imatrix.

    Between them: a type for some tensors, one that no mix has, two that are no quants, a regular expression of
    llama.cpp's, an embedding of another type.
    """
    return replace(
        set_options,
        out=tmp_path / "out",
        base=finished.set_dir / f"{OWN_STEM}-bf16.gguf",
        imatrix=finished.set_dir / f"{OWN_STEM}-imatrix.gguf",
        recipes=("Q4_K_M", "IQ2_OWN", "Q4_K_DOWN6"),
        custom=(
            custom(
                "Q4_K_DOWN6", "Q4_K_M", "ffn_down=q6_k", "attn_v=f16", token_embedding_type="Q8_0", about="Mine | *"
            ),
            custom("IQ2_OWN", "IQ2_XS", r"BLK\.[02]\.attn_(q|k)=iq4_nl", "ffn_gate=bf16"),
            custom("NOT_ASKED", "Q4_0", "ffn_down=q8_0"),
        ),
    )


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.ggml_type.name for tensor in gguf_io.read_header(path).tensors}


def test_custom_recipes_go_through_plan_engine_proof_and_card(own_options: Options, finished: Report) -> None:
    planned = planning.plan_set(own_options)
    report = factory.run(own_options)
    made = manifest.load(report.set_dir)
    sizes = {entry.recipe: entry.n_bytes for entry in made.files if entry.recipe}
    assert list(sizes) != []
    assert {row.recipe: row.n_bytes for row in planned.files} == sizes
    assert made.recipes == ["Q4_K_M", "Q4_K_DOWN6", "IQ2_OWN"]
    assert [own.name for own in made.custom_recipes] == ["Q4_K_DOWN6", "IQ2_OWN"]

    parent = types_of(finished.set_dir / f"{OWN_STEM}-Q4_K_M.gguf")
    down6 = types_of(report.set_dir / f"{OWN_STEM}-Q4_K_DOWN6.gguf")
    changed = {name: kind for name, kind in down6.items() if parent[name] != kind}
    every = {
        f"blk.{layer}.{name}.weight": kind
        for layer in range(3)
        for name, kind in (("ffn_down", "Q6_K"), ("attn_v", "F16"))
    }
    same = {name for name, kind in every.items() if parent[name] == kind}  # Q4_K_M has some at Q6_K already
    assert changed == {name: kind for name, kind in every.items() if name not in same} | {"token_embd.weight": "Q8_0"}
    iq2 = types_of(report.set_dir / f"{OWN_STEM}-IQ2_OWN.gguf")
    assert [iq2[f"blk.{layer}.attn_q.weight"] for layer in range(3)] == ["IQ4_NL", "IQ2_XS", "IQ4_NL"]
    assert {iq2[f"blk.{layer}.ffn_gate.weight"] for layer in range(3)} == {"BF16"}

    # llama-quantize, with the same flags, makes the same bytes.
    assert sorted(proof.prove_set(report.set_dir)) == ["IQ2_OWN", "Q4_K_DOWN6", "Q4_K_M"]
    entry = made.file(f"{OWN_STEM}-Q4_K_DOWN6.gguf")
    assert entry is not None
    assert "--tensor-type ffn_down=q6_k --tensor-type attn_v=f16 --token-embedding-type Q8_0" in " ".join(entry.argv)

    card = (report.set_dir / "README.md").read_text()
    assert r"Mine \| \*." in card
    assert "IQ2_XS with BLK" in card
    (block,) = re.findall(r"```toml\n(.*?)```", card, re.S)
    assert "--recipes Q4_K_M,IQ2_OWN,Q4_K_DOWN6" in card
    read = Settings.model_validate(tomllib.loads(block))
    assert read.custom == own_options.custom[:2]

    # A definition that changed makes its file again, and no other one.
    again = replace(own_options, custom=(custom("Q4_K_DOWN6", "Q4_K_M", "ffn_down=q5_k"), *own_options.custom[1:]))
    done = factory.run(again).done
    assert [what.name for what in done if what.made and what.stage == "quantize"] == [entry.name]
    assert types_of(report.set_dir / entry.name)["blk.0.ffn_down.weight"] == "Q5_K"

    # Not asked for any more, they stay as long as they fit the base and imatrix: nothing else knows how they were made.
    factory.run(replace(own_options, recipes=("Q4_K_M",), custom=()))
    kept = manifest.load(report.set_dir)
    assert {entry.recipe for entry in kept.files if entry.recipe} == {"Q4_K_M", "Q4_K_DOWN6", "IQ2_OWN"}
    assert kept.custom_recipes == []
    assert sorted(proof.prove_set(report.set_dir)) == ["IQ2_OWN", "Q4_K_DOWN6", "Q4_K_M"]


def test_types_of_an_embedding_are_those_of_llama_quantize(own_options: Options) -> None:
    """What is refused beforehand is what llama.cpp would do: the same pattern, or option, wins."""
    patterns = ("ToKen=q6_k", "token_embd=q8_0")
    own = (
        custom("BY_PATTERN", "Q4_0", *patterns),
        custom("BY_OPTION", "Q4_0", *patterns, token_embedding_type="q5_k"),
        custom("BY_NEITHER", "Q4_0", "per_layer=q8_0"),
    )
    names = tuple(recipe.name for recipe in own)
    report = factory.run(replace(own_options, recipes=names, custom=own, engine="llama-quantize", until="quantize"))
    told = [settings.type_of(recipe, "token_embd.weight") for recipe in own]
    assert told == ["Q6_K", "Q5_K", None]
    made = [types_of(report.set_dir / f"{OWN_STEM}-{name}.gguf")["token_embd.weight"] for name in names]
    assert made[:2] == told[:2]
    assert [settings.type_of(recipe, "per_layer_token_embd.weight") for recipe in own] == ["Q6_K", "Q6_K", "Q8_0"]
    assert settings.type_of(custom("A", "Q4_0", token_embedding_type="q5_k"), "per_layer_token_embd.weight") == "Q5_K"


def test_the_stem_without_the_organisation(own_options: Options) -> None:
    """One place decides how files begin: directory, quants, imatrix, projectors, card and its links follow."""
    report = factory.run(replace(own_options, recipes=("Q4_0",), naming="model", proof=False))
    assert report.set_dir.name == "tiny-vision-GGUF"
    made = manifest.load(report.set_dir)
    names = {entry.name for entry in made.files}
    assert made.stem == "tiny-vision"
    assert names == {"tiny-vision-Q4_0.gguf", "tiny-vision-imatrix.gguf"}
    card = (report.set_dir / "README.md").read_text()
    assert "--naming model" in card
    assert "](./tiny-vision-Q4_0.gguf)" in card
    assert "test_tiny-vision" not in card
    for path in report.set_dir.glob("*.gguf"):
        assert b"test_tiny-vision" not in path.read_bytes()
