"""What rows say of a file follows from what was measured: comparisons in tables, at their edges."""

import gettext
from typing import Any

import pytest

from gemma_gguf import table
from gemma_gguf.manifest import Evidence, FileEntry, Manifest, Measured, Speed
from tests.examples import STEM, evidence, example, model_entry, sha

WORDS = gettext.NullTranslations()
BASE = sha(f"{STEM}-bf16.gguf")


def a_set(*files: tuple[str, float, float, float], **model: Any) -> Manifest:
    """A set of (recipe, GB, mean KLD, its standard error), measured on the same tokens."""
    entries, measured = [], {}
    for recipe, size, kld, se in files:
        parent = {"Q4_K_L": "Q4_K_M"}.get(recipe)
        entry = model_entry(recipe, recipe, "what it is", n_bytes=round(size * 1e9), bpw=size * 2, types={})
        entry = entry.model_copy(update={"parent": parent, "differs": ["token_embd.weight"] if parent else []})
        entries.append(entry)
        measured[entry.sha256] = with_kld(kld, se)
    made = example()
    return made.model_copy(
        update={
            "files": entries,
            "evidence": measured,
            "recipes": [entry.recipe for entry in entries],
            "model": made.model.model_copy(update=model),
        }
    )


def with_kld(kld: float, se: float | None, **changes: Any) -> Evidence:
    usual = evidence(5.0, BASE)
    assert usual.quality is not None
    quality = usual.quality.model_copy(update={"kld": Measured(value=kld, se=se), **changes})
    return usual.model_copy(update={"quality": quality})


def of(made: Manifest, recipe: str) -> FileEntry:
    return next(entry for entry in made.files if entry.recipe == recipe)


def about(made: Manifest, recipe: str) -> str:
    return next(row.about for row in table.download_rows(made, WORDS) if row.quant == recipe).replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("value", "se", "options", "shown"),
    [
        pytest.param(0.0286712, 0.000573, {}, "0.02867 ± 0.00057", id="two digits of the error"),
        pytest.param(1.5, 0.0999, {}, "1.500 ± 0.100", id="an error that rounds up"),
        pytest.param(12.0, 0.5, {}, "12.00 ± 0.50", id="an error below one"),
        pytest.param(12345.6, 789.0, {}, "12346 ± 789", id="an error above ten"),
        pytest.param(0.9284, 0.003, {"factor": 100, "unit": "%"}, "92.84 ± 0.30 %", id="a share"),
        pytest.param(0.0124, 0.001, {"factor": 100, "unit": "%", "signed": True}, "+1.24 ± 0.10 %", id="a change"),
        pytest.param(-0.0124, 0.001, {"factor": 100, "unit": "%", "signed": True}, "-1.24 ± 0.10 %", id="a fall"),
        pytest.param(1.23e-7, 4.5e-9, {}, "1.2e-07 ± 4e-09", id="noise"),
        pytest.param(-1.23e-7, 4.5e-9, {}, "-1.2e-07 ± 4e-09", id="noise below zero"),
        pytest.param(0.0, 0.0, {}, "0", id="nothing at all"),
        pytest.param(0.0123456, None, {}, "0.0123 ± ?", id="no error known"),
        pytest.param(0.5, None, {"unit": "%"}, "0.5 ± ? %", id="no error known of a share"),
    ],
)
def test_numbers_stand_with_their_error(value: float, se: float | None, options: dict[str, Any], shown: str) -> None:
    text = table.plus_minus(Measured(value=value, se=se), **options)
    assert text.replace("\u00a0", " ") == shown
    assert text.count(" ") == text.count(" ±")  # a column may break before the sign, and nowhere else


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [
        (0, "0.00MB"),
        (3_567_456, "3.57MB"),
        (10**7, "0.01GB"),
        (241_410_000, "0.24GB"),
        (2**30, "1.07GB"),
        (54_321 * 10**6, "54.32GB"),
    ],
)
def test_sizes_are_decimal(n_bytes: int, shown: str) -> None:
    assert table.gigabytes(n_bytes) == shown


# --- who beats whom ------------------------------------------------------------------------------------------------

# sqrt(0.003^2 + 0.004^2) = 0.005: two standard errors of this difference are 0.010.
SMALL, LARGE = ("Q4_0", 2.0, 0.050, 0.003), ("Q4_K_M", 2.5, 0.0601, 0.004)


def test_a_file_that_a_smaller_one_beats_beyond_two_standard_errors_is_marked() -> None:
    made = a_set(LARGE, SMALL)
    assert table.beaten_by(of(made, "Q4_K_M"), made) == of(made, "Q4_0")
    assert about(made, "Q4_K_M").endswith(
        "⚠ Beaten by Q4_0, which is 0.50GB smaller and lower in KLD by 0.0101 ± 0.0050."
    )
    assert table.beaten_by(of(made, "Q4_0"), made) is None
    assert about(made, "Q4_0").endswith("Nothing smaller is closer.")


@pytest.mark.parametrize(
    ("large", "small"),
    [
        pytest.param(("Q4_K_M", 2.5, 0.0599, 0.004), SMALL, id="within two standard errors"),
        pytest.param(("Q4_K_M", 2.0, 0.0701, 0.004), SMALL, id="of one size"),
        pytest.param(("Q4_K_M", 1.9, 0.0701, 0.004), SMALL, id="the worse one is the smaller"),
    ],
)
def test_a_file_is_not_marked_for_less(
    large: tuple[str, float, float, float], small: tuple[str, float, float, float]
) -> None:
    made = a_set(large, small)
    assert table.beaten_by(of(made, "Q4_K_M"), made) is None
    assert "Beaten" not in about(made, "Q4_K_M")


def test_within_two_standard_errors_nothing_is_claimed_either_way() -> None:
    """The larger file has a higher divergence by chance or not: neither beaten nor the best of its size."""
    made = a_set(("Q4_K_M", 2.5, 0.0599, 0.004), SMALL)
    told = about(made, "Q4_K_M")
    assert "Beaten" not in told
    assert "Nothing smaller" not in told


def test_the_closest_of_several_better_files_is_named() -> None:
    made = a_set(LARGE, SMALL, ("IQ4_XS", 1.9, 0.030, 0.001), ("Q3_K_L", 1.8, 0.031, 0.001))
    better = table.beaten_by(of(made, "Q4_K_M"), made)
    assert better is not None
    assert better.recipe == "IQ4_XS"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"text_sha256": sha("another text")}, id="another text"),
        pytest.param({"mode": "plain"}, id="another format"),
        pytest.param({"n_chunks": 41}, id="another depth"),
        pytest.param({"chunk_size": 256}, id="another chunk size"),
    ],
)
def test_what_was_measured_otherwise_is_not_compared(changes: dict[str, Any]) -> None:
    made = a_set(LARGE, SMALL)
    made.evidence[of(made, "Q4_0").sha256] = with_kld(0.01, 0.0001, **changes)
    assert table.beaten_by(of(made, "Q4_K_M"), made) is None


def test_what_has_no_error_is_not_compared() -> None:
    made = a_set(LARGE, SMALL)
    made.evidence[of(made, "Q4_0").sha256] = with_kld(0.01, None)
    assert table.beaten_by(of(made, "Q4_K_M"), made) is None


def test_nothing_is_ranked_on_a_base_that_was_quantised_before() -> None:
    made = a_set(LARGE, SMALL, base_is_dequantised=True)
    for recipe in ("Q4_K_M", "Q4_0"):
        assert table.beaten_by(of(made, recipe), made) is None
        assert not table.is_on_frontier(of(made, recipe), made)
        assert about(made, recipe).startswith("what it is. Δp 1.")
    assert table.pick(made) == of(made, "Q4_K_M")


# --- what larger tensors pay ---------------------------------------------------------------------------------------

PARENT = ("Q4_K_M", 2.5, 0.060, 0.003)


@pytest.mark.parametrize(
    ("kld", "told"),
    [
        pytest.param(0.049, "Pays 100.00MB for token_embd.weight and lowers KLD by 0.0110 ± 0.0050.", id="gains"),
        pytest.param(
            0.051,
            "Pays 100.00MB for token_embd.weight; a gain in KLD is not shown (0.0090 ± 0.0050).",
            id="gains too little",
        ),
        pytest.param(
            0.061,
            "Pays 100.00MB for token_embd.weight; a gain in KLD is not shown (-0.0010 ± 0.0050).",
            id="loses within the error",
        ),
        pytest.param(
            0.071,
            "Pays 100.00MB for token_embd.weight, and KLD is higher than Q4_K_M's (change +0.0110 ± 0.0050).",
            id="loses",
        ),
    ],
)
def test_a_large_row_says_what_it_pays_and_gains(kld: float, told: str) -> None:
    made = a_set(("Q4_K_L", 2.6, kld, 0.004), PARENT)
    assert told in about(made, "Q4_K_L")
    (row,) = table.large_rows(made)
    assert (row.quant, row.parent, row.tensors, row.cost) == ("Q4_K_L", "Q4_K_M", ("token_embd.weight",), "100.00MB")
    assert row.gain.replace("\u00a0", " ") == f"{0.060 - kld:.4f} ± 0.0050"


def test_a_large_row_on_a_grid_says_what_it_pays_alone() -> None:
    made = a_set(("Q4_K_L", 2.6, 0.01, 0.004), PARENT, base_is_dequantised=True)
    assert "Pays 100.00MB for token_embd.weight. Δp" in about(made, "Q4_K_L")
    assert [row.gain for row in table.large_rows(made)] == ["–"]


def test_a_large_row_without_its_parent_has_nothing_to_compare() -> None:
    made = a_set(("Q4_K_L", 2.6, 0.01, 0.004))
    assert about(made, "Q4_K_L").startswith("Q4_K_M with embedding and output at Q8_0. Δp")
    assert table.large_rows(made) == []


@pytest.mark.parametrize(
    ("fallbacks", "told"),
    [
        pytest.param(
            {"Q4_K -> Q5_0": 90, "Q6_K -> Q8_0": 18},
            "108 tensors have another type because their columns are not divisible by 256.",
            id="K-quants",
        ),
        pytest.param(
            {"IQ4_XS -> IQ4_NL": 1},
            "1 tensor has another type because its columns are not divisible by 256.",
            id="one tensor",
        ),
        pytest.param(
            {"Q4_0 -> F16": 2},
            "2 tensors have another type because their columns do not allow the usual one.",
            id="blocks of 32 have nothing to do with 256",
        ),
    ],
)
def test_fallbacks_are_told_in_the_row(fallbacks: dict[str, int], told: str) -> None:
    made = a_set(PARENT)
    made.files[0] = made.files[0].model_copy(update={"fallbacks": fallbacks})
    assert told in about(made, "Q4_K_M")


# --- order and choice ----------------------------------------------------------------------------------------------


def test_several_projectors_are_sorted_by_size_before_every_model() -> None:
    made = example()
    projector = next(entry for entry in made.files if entry.kind == "mmproj")
    sizes = {"f16": 2, "f32": 4}
    more = [projector.model_copy(update={"name": f"mmproj-m-{k}.gguf", "n_bytes": n}) for k, n in sizes.items()]
    made = a_set(("IQ2_XS", 1.3, 0.1, 0.01))
    made.files.extend(more)
    assert [row.quant for row in table.download_rows(made, WORDS)] == ["f32", "f16", "IQ2_XS"]


def test_files_of_one_size_stay_in_the_recipes_order() -> None:
    """Q6_K_L of a model whose embedding is Q8_0 already has the size of Q6_K."""
    made = a_set(*((recipe, 2.0, 0.1, 0.01) for recipe in ("TQ1_0", "IQ2_XS", "Q4_K_M", "Q4_K_L", "Q8_0")))
    rows = table.download_rows(made, WORDS)
    assert [row.quant for row in rows] == ["Q8_0", "Q4_K_L", "Q4_K_M", "IQ2_XS", "TQ1_0"]


@pytest.mark.parametrize(
    ("files", "picked"),
    [
        pytest.param([LARGE, ("Q8_0", 4.0, 0.001, 0.0001)], "Q4_K_M", id="the usual one"),
        pytest.param([LARGE, SMALL], "Q4_0", id="unless it is beaten"),
        pytest.param([("Q8_0", 4.0, 0.001, 0.0001), ("IQ4_XS", 2.1, 0.05, 0.001)], "IQ4_XS", id="5 bits at most"),
        pytest.param([("Q8_0", 4.0, 0.001, 0.0001), ("Q6_K", 3.2, 0.005, 0.001)], "Q6_K", id="the smallest"),
    ],
)
def test_the_file_for_those_who_do_not_want_to_choose(
    files: list[tuple[str, float, float, float]], picked: str
) -> None:
    made = a_set(*files)
    entry = table.pick(made)
    assert entry is not None
    assert entry.recipe == picked


def test_there_is_nothing_to_pick_from_nothing() -> None:
    assert table.pick(a_set()) is None


# --- speed ---------------------------------------------------------------------------------------------------------


def with_speed(made: Manifest, recipe: str, **changes: Any) -> None:
    entry = of(made, recipe)
    measured = made.evidence[entry.sha256]
    assert measured.speed is not None
    speed = Speed.model_validate({**measured.speed.model_dump(), **changes})
    made.evidence[entry.sha256] = measured.model_copy(update={"speed": speed})


def test_shares_are_against_q4_0_of_the_same_machine() -> None:
    made = a_set(("Q8_0", 4.0, 0.001, 0.0001), LARGE, SMALL)
    fast = {"prompt_per_second": {"value": 61.0, "se": 1.25}, "generate_per_second": {"value": 3.0, "se": None}}
    with_speed(made, "Q8_0", **fast, cpu="another", peak_memory_bytes=None)
    with_speed(made, "Q4_K_M", **fast)
    other, same = table.speed_tables(made)
    assert (other.cpu, other.has_shares) == ("another", False)
    assert [(row.quant, row.prompt_share, row.memory) for row in other.rows] == [("Q8_0", "–", "–")]
    assert (same.cpu, same.backend, same.threads, same.n_prompt, same.n_generate) == ("AMD EPYC", "cpu", 2, 512, 64)
    assert same.has_shares
    assert [(row.quant, row.prompt, row.prompt_share, row.generate) for row in same.rows] == [
        ("Q4_K_M", "61.00 ±\u00a01.25", "200%", "3.00 ±\u00a0?"),
        ("Q4_0", "30.50 ±\u00a00.40", "100%", "12.00 ±\u00a00.10"),
    ]


def test_files_without_a_speed_are_not_in_the_table() -> None:
    made = a_set(LARGE, SMALL)
    made.evidence[of(made, "Q4_0").sha256] = made.evidence[of(made, "Q4_0").sha256].model_copy(update={"speed": None})
    (speeds,) = table.speed_tables(made)
    assert [row.quant for row in speeds.rows] == ["Q4_K_M"]
    assert not speeds.has_shares
