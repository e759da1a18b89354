"""The table of recipes is the reference repositories' list, and the real llama-quantize can make all of it."""

from dataclasses import replace

import pytest

from gemma_gguf.errors import BadInputError
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.quantize import ftype_numbers, offered_ftypes
from gemma_gguf.recipes import (
    DEFAULT,
    DEFAULT_NAMES,
    NOT_RECIPES,
    ON_REQUEST,
    TABLE,
    Recipe,
    expand,
    fitted,
    parse_quantize_help,
    select,
    types_of,
)

# The order of bartowski's tables, largest first.
BARTOWSKI = """
bf16 Q8_0 Q6_K_L Q6_K Q5_K_L Q5_K_M Q5_K_S Q4_K_L Q4_1 Q4_K_M Q4_K_S Q4_0 IQ4_NL IQ4_XS Q3_K_XL Q3_K_L Q3_K_M Q3_K_S
IQ3_M IQ3_XS IQ3_XXS Q2_K_L Q2_K IQ2_M IQ2_S IQ2_XS IQ2_XXS
"""
HELP = """\
usage: llama-quantize [--help] [--allow-requantize] [--dry-run] model-f32.gguf [model-quant.gguf] type [nthreads]

  --allow-requantize
                                      allow requantizing tensors that have already been quantized
                                      WARNING: this can severely reduce quality compared to quantizing
  --dry-run
                                      example: llama-quantize --dry-run model-f32.gguf Q4_K

note: --include-weights and --exclude-weights cannot be used together

-----------------------------------------------------------------------------
 allowed quantization types
-----------------------------------------------------------------------------

   2  or  Q4_0    :  4.34G, +0.4685 ppl @ Llama-3-8B
  38  or  MXFP4_MOE :  MXFP4 MoE
  28  or  IQ2_S   :  2.5  bpw quantization
  12  or  Q3_K    : alias for Q3_K_M
   0  or  F32     : 26.00G              @ 7B
          COPY    : only copy tensors, no quantizing
"""
OFFERED = {recipe.ftype: "" for recipe in TABLE.values()}


def _names(recipes: tuple[Recipe, ...]) -> list[str]:
    return [recipe.name for recipe in recipes]


def test_default_rows_are_the_27_of_the_reference_in_its_order() -> None:
    assert len(DEFAULT_NAMES) == 27
    assert list(DEFAULT_NAMES) == BARTOWSKI.split()
    assert _names(DEFAULT) == list(DEFAULT_NAMES)


def test_table_is_default_rows_then_those_on_request() -> None:
    assert list(TABLE) == [*BARTOWSKI.split(), *_names(ON_REQUEST)]
    assert len(TABLE) == len(DEFAULT) + len(ON_REQUEST)
    assert all(recipe.name == name for name, recipe in TABLE.items())


@pytest.mark.parametrize(
    ("name", "ftype"),
    [("Q6_K_L", "Q6_K"), ("Q5_K_L", "Q5_K_M"), ("Q4_K_L", "Q4_K_M"), ("Q3_K_XL", "Q3_K_L"), ("Q2_K_L", "Q2_K")],
)
def test_large_rows_keep_embedding_and_output_at_8_bits(name: str, ftype: str) -> None:
    recipe = TABLE[name]
    assert recipe.flags == ("--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0")
    assert (recipe.ftype, recipe.parent) == (ftype, ftype)
    assert recipe.about == f"{ftype} with embedding and output at Q8_0"


def test_all_other_rows_are_plain_ftypes() -> None:
    plain = [
        recipe for recipe in TABLE.values() if recipe.name not in {"Q6_K_L", "Q5_K_L", "Q4_K_L", "Q3_K_XL", "Q2_K_L"}
    ]
    assert [(recipe.flags, recipe.parent) for recipe in plain] == [((), None)] * len(plain)
    assert [recipe.ftype for recipe in plain] == [recipe.name.upper() for recipe in plain]


def test_only_bf16_is_the_base() -> None:
    assert [name for name, recipe in TABLE.items() if recipe.is_base] == ["bf16"]


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        pytest.param(["Q4_K_M"], ["Q4_K_M"], id="one"),
        pytest.param([], [], id="none"),
        pytest.param(["q4_k_m", "iq2_xxs", "BF16", "q6_k_l"], ["bf16", "Q6_K_L", "Q4_K_M", "IQ2_XXS"], id="any case"),
        pytest.param(["IQ2_XXS", "Q8_0", "bf16"], ["bf16", "Q8_0", "IQ2_XXS"], id="in the table's order"),
        pytest.param(["IQ3_S", "IQ2_XXS", "Q5_0"], ["IQ2_XXS", "IQ3_S", "Q5_0"], id="on request after the default"),
        pytest.param(["Q8_0", "Q4_0", "Q8_0"], ["Q8_0", "Q4_0"], id="twice"),
        pytest.param(["Q8_0", "q8_0"], ["Q8_0"], id="twice in another case"),
        pytest.param(reversed(BARTOWSKI.split()), BARTOWSKI.split(), id="all, backwards"),
    ],
)
def test_select(asked: list[str], got: list[str]) -> None:
    selected = select(asked, OFFERED)
    assert _names(selected) == got
    assert selected == tuple(TABLE[name] for name in got)


def test_select_before_a_build_is_asked() -> None:
    """With nothing known of a build, the names alone are checked."""
    assert _names(select(["q4_0", "Q8_0"], {})) == ["Q8_0", "Q4_0"]
    with pytest.raises(BadInputError):
        select(["Q4_9"], {})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        pytest.param("Q4_K_N", "Nearest: Q4_K_S, Q4_K_M, Q4_K_L.", id="one letter"),
        pytest.param("q8_1", "Nearest: Q8_0, Q5_1, Q4_1.", id="in small letters"),
        pytest.param("IQ2XXS", "Nearest: IQ2_XXS, IQ2_XS, IQ3_XXS.", id="without its underscore"),
    ],
)
def test_unknown_names_get_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(BadInputError) as caught:
        select(["Q8_0", name], OFFERED)
    assert caught.value.what == f"unknown recipe {name!r}"
    assert caught.value.next_step == nearest


MINE = Recipe("MINE", "Q4_K_M", "Mine", ("--tensor-type", "ffn_(up|down)=iq2_xs", "--output-tensor-type", "q8_0"))


def test_recipes_of_the_users_own_come_after_the_table() -> None:
    offered = {**OFFERED, "Q2_0": "new"}
    own = [MINE, replace(MINE, name="OTHER"), replace(MINE, name="NOT_ASKED")]
    assert _names(select(["q2_0", "other", "IQ1_S", "MINE", "Q8_0"], offered, own)) == [
        *("Q8_0", "IQ1_S", "MINE", "OTHER", "Q2_0")
    ]
    with pytest.raises(BadInputError) as caught:
        select(["MIN"], offered, own)
    assert caught.value.next_step == "Nearest: MINE."
    with pytest.raises(BadInputError, match=r"this llama.cpp build cannot make MINE: its .* does not offer Q4_K_M"):
        select(["MINE"], {"Q8_0": ""}, own)


def test_overrides_are_read_from_the_flags() -> None:
    assert MINE.overrides == (("--tensor-type", "IQ2_XS"), ("--output-tensor-type", "Q8_0"))
    assert TABLE["Q4_K_L"].overrides == (("--token-embedding-type", "Q8_0"), ("--output-tensor-type", "Q8_0"))
    assert TABLE["Q4_K_M"].overrides == ()


@pytest.mark.parametrize(
    ("recipe", "needs"),
    [
        (TABLE["Q4_K_M"], False),
        (TABLE["Q4_K_L"], False),
        (TABLE["IQ2_XS"], True),
        (MINE, True),
        (replace(MINE, flags=("--tensor-type", "ffn=iq4_xs")), False),
    ],
    ids=lambda value: value.name if isinstance(value, Recipe) else "",
)
def test_what_needs_an_imatrix(recipe: Recipe, needs: bool) -> None:
    assert recipe.needs_imatrix == needs


@pytest.mark.parametrize(
    ("names", "expanded"),
    [
        ([], ()),
        (["Q4_0", "Q8_0", "Q4_0"], ("Q4_0", "Q8_0")),
        (["default"], DEFAULT_NAMES),
        (["all"], tuple(TABLE)),
        (["mine", "Q6_K"], ("Q2_K", "Q4_0", "Q6_K")),
        (["IQ1_S", "more"], ("IQ1_S", *DEFAULT_NAMES, "MINE")),
        (["Default"], ("Default",)),  # no set, and so refused as a recipe
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_sets_of_recipes(names: list[str], expanded: tuple[str, ...]) -> None:
    assert expand(names, {"mine": ["Q2_K", "Q4_0"], "more": ["default", "MINE"]}) == expanded


@pytest.mark.parametrize("name", ["", "hello", "ÄÖÜ"])
def test_names_like_none_get_the_whole_list(name: str) -> None:
    with pytest.raises(BadInputError) as caught:
        select([name], {})
    assert caught.value.what == f"unknown recipe {name!r}"
    assert caught.value.next_step == f"Known: {', '.join(TABLE)}."


@pytest.mark.parametrize("name", ["F16", "F32", "COPY", "Q3_K", "Q4_K", "Q5_K"])
def test_ftypes_that_are_no_rows(name: str) -> None:
    """Not quants of a BF16 base, or another name for a row: refused although the build offers them."""
    assert name in NOT_RECIPES
    with pytest.raises(BadInputError) as caught:
        select([name], {**OFFERED, name: "something"})
    assert caught.value.what == f"unknown recipe {name!r}"


@pytest.mark.parametrize("name", ["IQ2_XXS", "Q4_K_L"])
def test_a_recipe_the_build_does_not_offer(name: str) -> None:
    ftype = TABLE[name].ftype
    offered = {known: "" for known in OFFERED if known != ftype}
    with pytest.raises(BadInputError) as caught:
        select(["Q8_0", name], offered)
    assert caught.value.what == (f"this llama.cpp build cannot make {name}: its llama-quantize does not offer {ftype}")
    assert caught.value.next_step == "Leave the recipe out, or use another build with --llama-cpp."


def test_an_ftype_that_only_the_build_knows() -> None:
    """A new quant can be made before it has a row; it comes after the table's rows, in the build's order."""
    offered = {"ZQ9_X": "9.99 bpw", "TQ1_0": "1.69 bpw ternarization", **OFFERED}
    assert select(["tq1_0", "IQ2_XXS", "ZQ9_X"], offered) == (
        TABLE["IQ2_XXS"],
        Recipe("ZQ9_X", "ZQ9_X", "9.99 bpw"),
        Recipe("TQ1_0", "TQ1_0", "1.69 bpw ternarization"),
    )


def test_what_the_build_says_of_a_row_does_not_change_it() -> None:
    assert select(["Q4_0"], {"Q4_0": "4.34G"}) == (TABLE["Q4_0"],)


def test_parse_quantize_help() -> None:
    assert parse_quantize_help(HELP) == {
        "Q4_0": "4.34G, +0.4685 ppl @ Llama-3-8B",
        "MXFP4_MOE": "MXFP4 MoE",
        "IQ2_S": "2.5 bpw quantization",
        "Q3_K": "alias for Q3_K_M",
        "F32": "26.00G @ 7B",
        "COPY": "only copy tensors, no quantizing",
    }


def test_parse_quantize_help_without_a_list() -> None:
    assert parse_quantize_help("usage: llama-quantize model-f32.gguf type\n") == {}


@pytest.fixture(scope="module")
def offered(build: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the real build's llama-quantize lists."""
    log = RunLog(tmp_path_factory.mktemp("offered") / "run.log")
    try:
        return offered_ftypes(build, log)
    finally:
        log.close()


@pytest.mark.parametrize("name", list(TABLE))
def test_the_real_build_offers_every_recipe(offered: dict[str, str], name: str) -> None:
    assert TABLE[name].ftype in offered
    assert select([name], offered) == (TABLE[name],)


def test_the_real_build_offers_ftypes_and_nothing_else(build: Build, log: RunLog) -> None:
    """No line of the usage text before the list is taken for an ftype; COPY alone has no number there."""
    offered = offered_ftypes(build, log)
    assert set(offered) == set(ftype_numbers(build, log)) | {"COPY"}
    assert set(OFFERED) | NOT_RECIPES <= set(offered)
    assert all(about and about == " ".join(about.split()) for about in offered.values())
    assert "llama-quantize --help" in log.path.read_text()


# --- recipes fitted to a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "unread", "per_layer", "added"),
    [
        ("IQ2_XXS", [], None, {}),
        ("IQ2_XXS", [20, 21], None, {r"blk\.(20|21)\.attn_[kv]": "Q2_K"}),
        ("IQ3_XXS", [3], "Q6_K", {r"blk\.(3)\.attn_[kv]": "Q2_K"}),
        ("Q2_K_S", [3], None, {r"blk\.(3)\.attn_[kv]": "Q3_K"}),
        ("Q4_K_M", [20, 21], "Q6_K", {}),
        ("Q4_K_L", [20, 21], "Q6_K", {"per_layer_token_embd": "Q6_K"}),
        ("Q4_K_L", [20, 21], None, {}),
    ],
    ids=["plain", "unread", "one-layer", "Q2_K_S", "no-need", "large", "large-plain"],
)
def test_a_recipe_is_fitted_to_a_model(
    name: str, unread: list[int], per_layer: str | None, added: dict[str, str]
) -> None:
    recipe = fitted(TABLE[name], unread, per_layer)
    assert types_of(recipe.flags) == added
    assert recipe.flags[2 * len(added) :] == TABLE[name].flags
    assert (recipe.name, recipe.ftype, recipe.parent) == (name, TABLE[name].ftype, TABLE[name].parent)


def test_a_fitted_recipe_of_the_users_own_keeps_its_options_behind() -> None:
    """llama-quantize takes the first pattern that a tensor's name holds."""
    own = Recipe("MINE", "Q4_K_M", "", ("--tensor-type", "attn_k=iq2_xs"))
    assert types_of(fitted(own, [5], "Q6_K").flags) == {r"blk\.(5)\.attn_[kv]": "Q2_K", "attn_k": "IQ2_XS"}
