"""The coverage gate: what an imatrix lacks for which recipe, what is said of it, and what `--pin-uncovered` makes."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf.constants import GGMLQuantizationType as T

from gemma_gguf import cli, coverage, factory, gguf_io, imatrix, manifest, proof, recipes
from gemma_gguf.coverage import Gap
from gemma_gguf.errors import ToolFailedError, VerificationError
from gemma_gguf.gguf_io import Header
from gemma_gguf.imatrix import Entry, Imatrix
from gemma_gguf.libggml import Ggml
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.plan import FilePlan, PlannedTensor
from gemma_gguf.quantize import quantize_argv, run_llama_quantize
from gemma_gguf.session import Options, Report
from tests import examples
from tests.test_imatrix import BASE, DOWN, EXPERTS, METADATA, Q, _write

STEM = "test_tiny-vision"


@pytest.fixture
def base(tmp_path: Path) -> Header:
    tensors = {name: np.zeros(shape, dtype=np.float16) for name, shape in BASE.items()}
    return gguf_io.read_header(_write(tmp_path / "base.gguf", {"general.type": "model"}, tensors))


def planned(base: Header, *kinds: T, static: bool = False) -> FilePlan:
    """Q, DOWN and EXPERTS at these types, the rest copied."""
    targets = dict(zip((Q, DOWN, EXPERTS), kinds, strict=True))
    rows = [
        PlannedTensor(t.name, t.shape, T.F16, targets.get(t.name, T.F16), targets.get(t.name, T.F16))
        for t in base.tensors
    ]
    return FilePlan("x", tuple(rows), static=static)


def made(**changed: Entry | None) -> Imatrix:
    """An imatrix that covers everything, but for what is changed: q, down, experts."""
    entries: dict[str, Entry | None] = {
        "q": Entry(np.ones((1, 32), np.float32), np.array([4096], np.float32)),
        "down": Entry(np.ones((1, 64), np.float32), np.array([4096], np.float32)),
        "experts": Entry(np.ones((4, 32), np.float32), np.full(4, 2048, np.float32)),
    }
    names = {"q": Q, "down": DOWN, "experts": EXPERTS}
    given = {names[name]: entry for name, entry in {**entries, **changed}.items() if entry is not None}
    return Imatrix(Path("somewhere/made-imatrix.gguf"), 8, 512, ("text",), given)


def experts(*counts: float) -> Entry:
    return Entry(np.ones((len(counts), 32), np.float32), np.array(counts, np.float32))


def with_value(entry: Entry, where: str, value: float) -> Entry:
    array = getattr(entry, where).copy()
    array.reshape(-1)[-1] = value
    return replace(entry, **{where: array})


GOOD = made().entries


# --- what is missing ----------------------------------------------------------------------------------------------


def test_a_whole_imatrix_has_no_gaps(base: Header) -> None:
    assert coverage.gaps(made(), base, {"Q4_K_M": planned(base, T.Q4_K, T.Q6_K, T.Q4_K)}) == []


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        pytest.param(None, "is not in it", id="removed"),
        pytest.param(with_value(GOOD[DOWN], "counts", 0), "saw no token", id="no token"),
        pytest.param(with_value(GOOD[DOWN], "sums", np.nan), "has NaN or Inf", id="NaN sum"),
        pytest.param(with_value(GOOD[DOWN], "sums", np.inf), "has NaN or Inf", id="Inf sum"),
        pytest.param(with_value(GOOD[DOWN], "sums", -np.inf), "has NaN or Inf", id="-Inf sum"),
        pytest.param(with_value(GOOD[DOWN], "counts", np.nan), "has NaN or Inf", id="NaN count"),
    ],
)
def test_a_tensor_without_data(base: Header, entry: Entry | None, what: str) -> None:
    """It counts for the recipes that use it: not for Q8_0, whose quantiser ignores it, not for what is copied."""
    plans = {
        "Q8_0": planned(base, T.Q8_0, T.Q8_0, T.Q8_0),
        "Q4_K_M": planned(base, T.Q4_K, T.Q6_K, T.Q4_K),
        "IQ2_XS": planned(base, T.IQ2_XS, T.Q2_K, T.IQ2_XS),
        "copied": planned(base, T.Q4_K, T.F16, T.Q4_K),
        "static": planned(base, T.Q4_0, T.Q4_0, T.Q4_0, static=True),
    }
    found = coverage.gaps(made(down=entry), base, plans)
    assert found == [Gap(DOWN, what, ("Q4_K_M", "IQ2_XS"))]


@pytest.mark.parametrize(
    ("counts", "gap"),
    [
        pytest.param([100.0] * 4, None, id="all seen"),
        pytest.param([4000.0, 4000.0, 4000.0, 0.0], "1 of 4", id="one of four: more than 5 %"),
        pytest.param([64.0] * 19 + [0.0], None, id="one of twenty, of 1,216: below 1 %"),
        pytest.param([15.0] * 19 + [0.0], "1 of 20", id="one of twenty, of 285: may be chosen in 1.05 %"),
        pytest.param([600.0] * 122 + [0.0] * 6, None, id="six of 128"),
        pytest.param([600.0] * 121 + [0.0] * 7, "7 of 128", id="seven of 128: more than 5 %"),
    ],
)
def test_experts_that_no_token_reached(tmp_path: Path, counts: list[float], gap: str | None) -> None:
    tensors = {EXPERTS: np.zeros((len(counts), 16, 32), np.float16)}
    base = gguf_io.read_header(_write(tmp_path / "base.gguf", {"general.type": "model"}, tensors))
    rows = (PlannedTensor(EXPERTS, (32, 16, len(counts)), T.F16, T.Q4_K, T.Q4_K),)
    found = coverage.gaps(made(experts=experts(*counts)), base, {"Q4_K_M": FilePlan("Q4_K_M", rows)})
    expected = [] if gap is None else [f"has {gap} experts that no token reached"]
    assert [each.what for each in found] == expected


@pytest.mark.parametrize(("kind", "needs"), [(T.Q4_K, False), (T.IQ3_S, False), (T.IQ2_XS, True), (T.IQ3_XXS, True)])
def test_what_llama_cpp_never_reads_needs_data_only_where_it_cannot_be_made_without(
    base: Header, kind: T, needs: bool
) -> None:
    plans = {"recipe": planned(base, kind, T.Q4_K, T.Q4_K)}
    found = coverage.gaps(made(q=None), base, plans, unread=frozenset({Q}))
    assert [gap.tensor for gap in found] == ([Q] if needs else [])


# --- what is said -------------------------------------------------------------------------------------------------


def test_the_error_names_tensors_recipes_and_choices() -> None:
    tensors = [f"blk.{n}.ffn_down.weight" for n in range(14)]
    found = [Gap(name, "is not in it", ("Q4_K_M", "IQ2_XS")) for name in tensors]
    found.append(Gap("blk.0.attn_q.weight", "saw no token", ("IQ2_XS",)))
    wanted = ["bf16", "Q8_0", "Q4_K_M", "IQ2_XS"]
    error = coverage.refusal(Path("out/m-imatrix.gguf"), found, wanted, given=False, pin=None)
    assert error.what == (
        "m-imatrix.gguf lacks data of 15 tensors for 2 of 4 recipes:\n"
        f"  {', '.join(tensors[:12])} and 2 more: is not in it; used by Q4_K_M, IQ2_XS\n"
        "  blk.0.attn_q.weight: saw no token; used by IQ2_XS"
    )
    assert error.next_step == (
        "one of these:\n"
        "  more calibration text (--calibration, --chunks)\n"
        "  raise these tensors in these recipes to a type that is safe without: --pin-uncovered Q6_K\n"
        "  leave these recipes out: --recipes bf16,Q8_0"
    )


def test_the_error_for_an_imatrix_that_was_given_and_a_type_that_is_too_small() -> None:
    found = [Gap(Q, "has NaN or Inf", ("IQ2_XS",))]
    error = coverage.refusal(Path("m-imatrix.gguf"), found, ["IQ2_XS"], given=True, pin="Q4_K")
    assert error.what == (
        f"m-imatrix.gguf lacks data of 1 tensor for 1 of 1 recipes:\n  {Q}: has NaN or Inf; used by IQ2_XS"
    )
    assert error.next_step == "one of these:\n  another imatrix, or none: one is computed\n  every recipe is affected"


# --- what is raised -----------------------------------------------------------------------------------------------


def test_a_tensor_is_raised_where_it_would_have_fewer_bits(base: Header) -> None:
    plans = {"Q8_0": planned(base, T.Q8_0, T.Q8_0, T.Q8_0), "Q6_K": planned(base, T.Q6_K, T.Q6_K, T.Q6_K)}
    plans |= {"IQ2_XS": planned(base, T.IQ2_XS, T.Q2_K, T.IQ2_XS)}
    found = coverage.gaps(made(down=None), base, plans)
    assert [gap.recipes for gap in found] == [("Q6_K", "IQ2_XS")]
    assert coverage.pins(found, plans, T.Q6_K) == {"IQ2_XS": {DOWN: "Q6_K"}}
    assert coverage.pins(found, plans, T.Q8_0) == {"Q6_K": {DOWN: "Q8_0"}, "IQ2_XS": {DOWN: "Q8_0"}}
    after = {**plans, "IQ2_XS": planned(base, T.IQ2_XS, T.Q6_K, T.IQ2_XS)}
    assert coverage.gaps(made(down=None), base, after, safe=T.Q6_K) == []
    assert [gap.recipes for gap in coverage.gaps(made(down=None), base, after, safe=T.Q8_0)] == [("Q6_K", "IQ2_XS")]


def test_a_raised_tensor_is_named_by_a_pattern_that_matches_it_alone() -> None:
    recipe = coverage.pinned(recipes.TABLE["Q4_K_L"], {"blk.1.ffn_down.weight": "Q6_K"})
    assert recipe.flags == ("--tensor-type", r"^blk\.1\.ffn_down\.weight$=q6_k", *recipes.EMBED_OUTPUT_Q8)
    assert coverage.pinned(recipes.TABLE["Q4_K_L"], {}) is recipes.TABLE["Q4_K_L"]


# --- ggml and llama-quantize are the oracles -----------------------------------------------------------------------


def test_types_that_ignore_an_imatrix_are_those_that_ggml_makes_the_same_with_and_without(build: Build) -> None:
    ggml, rng = Ggml(build.bin_dir), np.random.default_rng(0)
    rows = rng.normal(0, 0.02, (8, 256)).astype(np.float32)
    weights = (rng.random(256) ** 6 + 1e-4).astype(np.float32)
    not_weights = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}  # ggml quantises no weights to these
    for kind in (kind for kind in T if kind.name not in not_weights):
        ignores = not ggml.requires_imatrix(kind) and np.array_equal(
            ggml.quantize(rows, kind, weights), ggml.quantize(rows, kind, None)
        )
        assert ignores == (kind in coverage.IGNORE_IMATRIX), kind.name


@pytest.mark.parametrize("kind", ["iq1_m", "iq2_xs", "iq3_xxs", "iq3_s", "q2_k"])
def test_types_that_llama_quantize_makes_of_no_tensor_without_data(
    build: Build, finished: Report, log: RunLog, tmp_path: Path, kind: str
) -> None:
    recipe = coverage.pinned(recipes.TABLE["Q8_0"], {"blk.1.ffn_up.weight": kind})
    without("blk.1.ffn_up.weight")(finished.set_dir / f"{STEM}-imatrix.gguf", tmp_path)
    shutil.copy(finished.set_dir / f"{STEM}-bf16.gguf", tmp_path / "base.gguf")
    argv = quantize_argv(build, recipe, "base.gguf", "out.gguf", imatrix="damaged.gguf", threads=1)
    if T[kind.upper()] in coverage.REQUIRE_IMATRIX:
        with pytest.raises(ToolFailedError, match="Missing importance matrix"):
            run_llama_quantize(argv, "x", cwd=tmp_path, log=log)
    else:
        run_llama_quantize(argv, "x", cwd=tmp_path, log=log)


# --- a run --------------------------------------------------------------------------------------------------------

Damage = Callable[[Path, Path], Path]
DAMAGED = "blk.1.ffn_down.weight"


def without(name: str) -> Damage:
    def damage(path: Path, directory: Path) -> Path:
        header = gguf_io.read_header(path)
        tensors = {t.name: header.read(t).view(np.float32) for t in header.tensors if not t.name.startswith(f"{name}.")}
        return _write(directory / "damaged.gguf", METADATA, tensors)

    return damage


def nan_in(name: str) -> Damage:
    def damage(path: Path, directory: Path) -> Path:
        copied = Path(shutil.copy(path, directory / "damaged.gguf"))
        tensor = gguf_io.read_header(copied).by_name[f"{name}.in_sum2"]
        with copied.open("r+b") as file:
            file.seek(tensor.offset)
            file.write(np.float32(np.nan).tobytes())
        return copied

    return damage


@pytest.fixture
def again(finished: Report, set_options: Options, tmp_path: Path) -> Options:
    return replace(
        set_options,
        out=tmp_path / "again",
        base=finished.set_dir / f"{STEM}-bf16.gguf",
        recipes=("Q8_0", "Q6_K", "IQ2_XS"),
        proof=True,
    )


@pytest.mark.parametrize(
    "case",
    [
        pytest.param((without(DAMAGED), "is not in it"), id="removed"),
        pytest.param((nan_in(DAMAGED), "has NaN or Inf"), id="NaN"),
    ],
)
def test_a_damaged_imatrix_is_refused_before_any_quant(
    finished: Report, again: Options, tmp_path: Path, case: tuple[Damage, str]
) -> None:
    damage, what = case
    damaged = damage(finished.set_dir / f"{STEM}-imatrix.gguf", tmp_path)
    with pytest.raises(VerificationError) as caught:
        factory.run(replace(again, imatrix=damaged))
    assert caught.value.what == (
        f"{STEM}-imatrix.gguf lacks data of 1 tensor for 2 of 3 recipes:\n  {DAMAGED}: {what}; used by Q6_K, IQ2_XS"
    )
    assert caught.value.next_step == (
        "one of these:\n"
        "  another imatrix, or none: one is computed\n"
        "  raise these tensors in these recipes to a type that is safe without: --pin-uncovered Q6_K\n"
        "  leave these recipes out: --recipes Q8_0"
    )
    assert [path.name for path in (again.out / f"{STEM}-GGUF").glob("*.gguf")] == [f"{STEM}-imatrix.gguf"]
    assert f"{DAMAGED} {what}; used by Q6_K, IQ2_XS" in (caught.value.log or Path()).read_text()


def test_pinned_tensors_are_raised_recorded_shown_and_proven(finished: Report, again: Options, tmp_path: Path) -> None:
    """NaN reaches no file: the set's imatrix is without it, and the tensor at Q8_0. llama-quantize makes the same."""
    damaged = nan_in(DAMAGED)(finished.set_dir / f"{STEM}-imatrix.gguf", tmp_path)
    report = factory.run(replace(again, imatrix=damaged, pin_uncovered="Q8_0"))
    facts = manifest.load(report.set_dir)
    own = imatrix.read(report.set_dir / f"{STEM}-imatrix.gguf")
    assert set(imatrix.read(damaged).entries) - set(own.entries) == {DAMAGED}
    taken_out = f"NaN or Inf in {DAMAGED}: taken out, llama-quantize refuses a file with any"
    assert ("1 of 21 tensors", taken_out) in [(done.name, done.why) for done in report.done]
    assert facts.pins == {"Q6_K": {DAMAGED: "Q8_0"}, "IQ2_XS": {DAMAGED: "Q8_0"}}
    for recipe, others in (("Q6_K", "Q6_K"), ("IQ2_XS", "IQ2_XS")):
        header = gguf_io.read_header(report.set_dir / f"{STEM}-{recipe}.gguf")
        assert header.by_name[DAMAGED].ggml_type.name == "Q8_0"
        assert header.by_name["blk.2.ffn_down.weight"].ggml_type.name == others
    assert sorted(proof.prove_set(report.set_dir)) == ["IQ2_XS", "Q6_K", "Q8_0"]
    said = [done for done in report.done if done.stage == "coverage"]
    assert [(done.name, done.why) for done in said] == [
        ("Q6_K", f"without data, raised to Q8_0: {DAMAGED}"),
        ("IQ2_XS", f"without data, raised to Q8_0: {DAMAGED}"),
    ]
    text = (report.set_dir / "README.md").read_text()
    assert "--pin-uncovered Q8_0" in text
    assert f"Q8_0: {DAMAGED}" in text


def test_llama_quantize_refuses_a_file_with_nan(build: Build, finished: Report, log: RunLog, tmp_path: Path) -> None:
    """Why such data is taken out: even a recipe that uses no imatrix is not planned with it."""
    nan_in(DAMAGED)(finished.set_dir / f"{STEM}-imatrix.gguf", tmp_path)
    shutil.copy(finished.set_dir / f"{STEM}-bf16.gguf", tmp_path / "base.gguf")
    argv = quantize_argv(build, recipes.TABLE["Q8_0"], "base.gguf", None, imatrix="damaged.gguf", threads=1)
    with pytest.raises(ToolFailedError, match="imatrix contains non-finite value nan"):
        run_llama_quantize(argv, "x", cwd=tmp_path, log=log)


def test_what_is_written_is_what_was_read(finished: Report, tmp_path: Path) -> None:
    made = imatrix.read(finished.set_dir / f"{STEM}-imatrix.gguf")
    imatrix.write(made, tmp_path / "again.gguf")
    again = imatrix.read(tmp_path / "again.gguf")
    assert (again.n_chunks, again.chunk_size, again.datasets) == (made.n_chunks, made.chunk_size, made.datasets)
    assert list(again.entries) == list(made.entries)
    for name, entry in made.entries.items():
        np.testing.assert_array_equal(again.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(again.entries[name].counts, entry.counts)


# --- the summary by layer -------------------------------------------------------------------------------------------


def test_layers_are_summed_up_over_their_kinds_of_weight() -> None:
    rows = coverage.layer_rows(examples.coverage())
    assert len(rows) == 34
    assert rows[0] == ("0", "2", "74,752", "0", "100.0%", "0.450 - 0.500")
    assert len(coverage.COLUMNS) == len(rows[0])
    assert coverage.layer_rows([]) == []


def test_experts_that_are_let_pass_are_named() -> None:
    rows = [row.model_copy(update={"n_experts": 128}) for row in examples.coverage()]
    assert coverage.unseen_experts(rows) == []
    rows[1] = rows[1].model_copy(update={"unseen": [0, 3, *[0] * 31, 1]})
    assert coverage.unseen_experts(rows) == ["3 of 128 in blk.1.ffn_down", "1 of 128 in blk.33.ffn_down"]
    assert coverage.listed([str(n) for n in range(14)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more"


def test_the_command_prints_what_every_layer_saw(finished: Report, again: Options) -> None:
    given = ["--base", str(again.base), "--imatrix", str(finished.set_dir / f"{STEM}-imatrix.gguf")]
    argv = ["imatrix", again.model, "--name", "test/tiny-vision", "--out", str(again.out), "--recipes", "Q6_K", *given]
    done = CliRunner(catch_exceptions=False).invoke(cli.main, argv)
    assert done.exit_code == 0, done.stderr
    lines = [line.split() for line in done.stderr.splitlines()]
    assert ["Layer", "Tensors", "Tokens", "Experts", "without", "Active", "columns", "Evenness"] in lines
    rows = [line for line in lines if line[1:4] == ["7", "4,096", "0"]]
    assert [row[0] for row in rows] == ["0", "1", "2"]


def test_the_imatrix_of_a_finished_set_is_whole(finished: Report) -> None:
    made = imatrix.read(finished.set_dir / f"{STEM}-imatrix.gguf")
    base = gguf_io.read_header(finished.set_dir / f"{STEM}-bf16.gguf")
    rows = [PlannedTensor(t.name, t.shape, t.ggml_type, T.IQ2_XS, T.IQ2_XS) for t in base.tensors if len(t.shape) > 1]
    assert coverage.gaps(made, base, {"all": FilePlan("all", tuple(rows))}) == []
