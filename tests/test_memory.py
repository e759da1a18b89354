"""Memory of a context, with llama.cpp as the oracle, and the file that is chosen for it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_gguf import card, convert, files, gguf_io, llama_cpp, memory, source
from gemma_gguf.errors import ToolFailedError
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.manifest import CacheGroup, ContextMemory, FileEntry, Manifest
from tests import checkpoints, gemma4, sparse_models
from tests.examples import STEM, context, evidence, example, model_entry

MIB = 1 << 20
LENGTHS = (2048, 4096, 8192, 32768, 131072)


def _said(build: Build, model: Path, log: RunLog, *, slots: int = memory.SLOTS) -> dict[int, ContextMemory]:
    """What llama.cpp reports for contexts of a model."""
    asked = {"lengths": LENGTHS, "slots": slots, "ubatch": memory.UBATCH}
    logs = llama_cpp.ask_bindings(build, "contexts", model, None, log, settings=asked)["logs"]
    return {n_ctx: memory.parse_context_log(n_ctx, logs[str(n_ctx)]) for n_ctx in LENGTHS}


# --- llama.cpp as the oracle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sparse_models.SHAPES)
def test_cache_is_what_llama_cpp_reports(build: Build, tmp_path: Path, log: RunLog, name: str) -> None:
    """Windows, patterns, shared layers, heads per layer and widths per kind of layer, at five lengths."""
    model = sparse_models.write(tmp_path / "model.gguf", sparse_models.SHAPES[name])
    facts = memory.context_facts(gguf_io.read_header(model), [], build.key)
    for slots in (1, memory.SLOTS):
        said = _said(build, model, log, slots=slots)
        assert {n: memory.cache_bytes(facts, n, slots=slots) for n in LENGTHS} == {
            n: m.cache_bytes for n, m in said.items()
        }
    for n_ctx, m in said.items():
        # An estimate that is not too low, and within the largest activations of a layer.
        estimate = memory.estimated_buffer_bytes(facts, n_ctx)
        assert m.compute_bytes + m.output_bytes <= estimate <= m.compute_bytes + m.output_bytes + 40 * MIB


def _convert(build: Build, directory: Path, tmp_path: Path, log: RunLog) -> Path:
    name = source.understand(str(directory))
    found = source.fetch(name, tmp_path / "work", files.HashMemory(tmp_path / "hashes.json"))
    (tmp_path / "work").mkdir(exist_ok=True)
    return convert.convert(found, build, tmp_path / "work", log=log)[0].partial


def test_cache_of_a_converted_gemma_3(build: Build, tmp_path: Path, log: RunLog) -> None:
    """Through the real converter, and a context that llama-bench really allocates and fills."""
    made = checkpoints.write_gemma3_text(tmp_path / "gemma3", layers=7)
    base = _convert(build, made, tmp_path, log)
    facts = memory.context_facts(gguf_io.read_header(base), [], build.key)
    width = checkpoints.KV_HEADS * checkpoints.HEAD_DIM
    assert (facts.n_ctx_train, facts.window, facts.n_vocab) == (2048, 512, len(checkpoints.sentencepiece_model()[1]))
    assert facts.cache == [
        CacheGroup(n_layers=1, windowed=False, k_width=width, v_width=width),
        CacheGroup(n_layers=6, windowed=True, k_width=width, v_width=width),
    ]
    said = _said(build, base, log)
    assert all(memory.cache_bytes(facts, n) == m.cache_bytes for n, m in said.items())
    argv: list[str | Path] = [
        build.tool("llama-bench"),
        "-m",
        base,
        "-p",
        "16",
        "-n",
        "0",
        "-d",
        "2032",
        "-r",
        "1",
        "-v",
    ]
    output = llama_cpp.run_tool(argv, log=log).output
    real = {float(size) for size in re.findall(r"KV buffer size = +([\d.]+) MiB", output)}
    assert round(sum(real) * MIB) == memory.cache_bytes(facts, 2048, slots=1)


def test_cache_of_a_converted_gemma_4(build: Build, tmp_path: Path, log: RunLog) -> None:
    """Wider heads, fewer of them and no values of their own in the layers that see everything."""
    base = _convert(build, gemma4.write_gemma4_moe(tmp_path / "gemma4", layers=6), tmp_path, log)
    facts = memory.context_facts(gguf_io.read_header(base), [], build.key)
    full = gemma4.FULL_HEAD_DIM * gemma4.FULL_KV_HEADS
    local = gemma4.SLIDING_HEAD_DIM * gemma4.SLIDING_KV_HEADS
    assert facts.cache == [
        CacheGroup(n_layers=2, windowed=False, k_width=full, v_width=full),
        CacheGroup(n_layers=4, windowed=True, k_width=local, v_width=local),
    ]
    assert facts.n_ff == gemma4.FEED_FORWARD + gemma4.TOP_K * gemma4.EXPERT_FEED_FORWARD
    said = _said(build, base, log)
    assert all(memory.cache_bytes(facts, n) == m.cache_bytes for n, m in said.items())


LOG = """llama_context:        CPU  output buffer size =     4.00 MiB
llama_kv_cache_iswa: creating non-SWA KV cache, size = 4096 cells
llama_kv_cache:        CPU KV buffer size =     0.00 MiB
llama_kv_cache: size =   12.00 MiB (  4096 cells,   3 layers,  4/1 seqs), K (f16):    6.00 MiB, V (f16):    6.00 MiB
llama_kv_cache: size =   37.50 MiB (  2560 cells,  15 layers,  4/1 seqs), K (f16):   18.75 MiB, V (f16):   18.75 MiB
sched_reserve:      CUDA0 compute buffer size =    20.25 MiB
sched_reserve:        CPU compute buffer size =     4.02 MiB
"""


def test_what_llama_cpp_writes_is_added_up() -> None:
    said = memory.parse_context_log(4096, LOG)
    assert said.cache_bytes == int(49.5 * MIB)
    assert said.compute_bytes == round(24.27 * MIB)
    assert said.output_bytes == 4 * MIB


def test_a_log_without_its_buffer_is_an_error() -> None:
    with pytest.raises(ToolFailedError, match="did not say what a context of 4096 tokens computes in"):
        memory.parse_context_log(4096, LOG.partition("sched_reserve")[0])


# --- which file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "lengths"),
    [
        pytest.param(131072, [4096, 8192, 32768, 131072], id="128k"),
        pytest.param(262144, [4096, 8192, 32768, 131072], id="256k"),
        pytest.param(32768, [4096, 8192, 32768], id="32k"),
        pytest.param(8192, [4096, 8192], id="8k"),
        pytest.param(2048, [2048], id="shorter than all"),
    ],
)
def test_contexts_are_those_the_model_was_trained_for(trained: int, lengths: list[int]) -> None:
    assert memory.contexts_of(trained) == lengths


def _table(made: Manifest) -> dict[int, list[str | None]]:
    chosen = memory.choices(made)
    assert chosen is not None
    return {row.memory: [cell.entry.recipe if cell.entry else None for cell in row.cells] for row in chosen.rows}


def _quants(*rows: tuple[str, float, float | None], projector: bool = False, **update: object) -> Manifest:
    """The example with other quants: (recipe, GiB, KLD)."""
    made = example()
    kept = [e for e in made.files if e.recipe == "bf16" or (projector and e.kind == "mmproj")]
    told = {kept[-1].sha256: evidence(16.0, kept[-1].sha256)}
    for recipe, gib, kld in rows:
        entry = model_entry(recipe, recipe, "", n_bytes=int(gib * memory.GIB), bpw=4.0, types={})
        kept.append(entry)
        if kld is not None:
            quality = told[kept[0].sha256].quality if not projector else evidence(4.0, "0" * 64).quality
            assert quality is not None
            quality = quality.model_copy(update={"kld": quality.kld.model_copy(update={"value": kld})})
            told[entry.sha256] = evidence(4.0, entry.sha256).model_copy(update={"quality": quality})
    return made.model_copy(update={"files": kept, "evidence": told, **update})


def _beside(n_ctx: int) -> float:
    """GiB of cache and buffers of the example's contexts."""
    return memory.context_bytes(context(), n_ctx)[0] / memory.GIB


def test_lowest_kld_that_fits_is_chosen() -> None:
    """A small file that is closer than a large one is chosen even where the large one fits."""
    made = _quants(("Q8_0", 4.0, 0.001), ("Q4_1", 2.6, 0.03), ("Q4_K_M", 2.5, 0.02), ("IQ2_XS", 1.3, 0.4))
    assert _table(made) == {
        4: ["Q4_K_M", "Q4_K_M", "IQ2_XS", None],
        6: ["Q8_0", "Q8_0", "Q8_0", "IQ2_XS"],
        8: ["Q8_0", "Q8_0", "Q8_0", "Q4_K_M" if 1.1 * (4.0 + _beside(131072)) > 8 else "Q8_0"],
        **({12: ["Q8_0"] * 4} if 1.1 * (4.0 + _beside(131072)) > 8 else {}),
    }


@pytest.mark.parametrize(
    ("gib", "fits"),
    [pytest.param(8 / 1.1 - 0.001, True, id="just fits"), pytest.param(8 / 1.1 + 0.001, False, id="just not")],
)
def test_fits_means_weights_projector_context_and_a_tenth(gib: float, fits: bool) -> None:
    made = _quants(("Q8_0", 1.0, 0.001), projector=True)
    projector = made.files[0]
    assert projector.kind == "mmproj"
    weights = int(gib * memory.GIB) - projector.n_bytes - memory.context_bytes(context(), 32768)[0]
    sized = [e.model_copy(update={"n_bytes": weights}) if e.recipe == "Q8_0" else e for e in made.files]
    assert (_table(made.model_copy(update={"files": sized}))[8][2] == "Q8_0") == fits


def test_without_measurements_the_largest_that_fits() -> None:
    made = _quants(("Q8_0", 4.0, None), ("Q4_K_M", 2.5, None), ("IQ2_XS", 1.3, None))
    chosen = memory.choices(made)
    assert chosen is not None
    assert not chosen.by_kld
    assert _table(made)[4] == ["Q4_K_M", "Q4_K_M", "IQ2_XS", None]


def test_a_base_that_was_quantised_before_ranks_nothing() -> None:
    """On such a base a smaller file may well measure better; that is no reason to take it."""
    made = _quants(("Q8_0", 4.0, 0.4), ("Q4_K_M", 2.5, 0.001))
    assert _table(made)[8][0] == "Q4_K_M"
    made = made.model_copy(update={"model": made.model.model_copy(update={"base_is_dequantised": True})})
    chosen = memory.choices(made)
    assert chosen is not None
    assert not chosen.by_kld
    assert _table(made)[8][0] == "Q8_0"


def test_what_was_measured_against_another_base_ranks_nothing() -> None:
    """As in the download table, which says of such a file that it is not measured."""
    made = _quants(("Q8_0", 4.0, 0.4), ("Q4_K_M", 2.5, 0.001))
    for sha256, told in made.evidence.items():
        assert told.quality is not None
        other = told.quality.model_copy(update={"base_sha256": "1" * 64})
        made.evidence[sha256] = told.model_copy(update={"quality": other})
    chosen = memory.choices(made)
    assert chosen is not None
    assert not chosen.by_kld
    assert _table(made)[8][0] == "Q8_0"


def test_without_an_f16_projector_the_smallest_is_counted() -> None:
    """The one that the card's commands name."""
    made = _quants(("Q8_0", 4.0, 0.001), projector=True)
    f16 = made.files[0]
    large, small = (
        f16.model_copy(update={"name": f16.name.replace("f16", kind), "n_bytes": n, "sha256": kind[1:] * 32})
        for kind, n in (("f32", 2 * f16.n_bytes), ("b16", f16.n_bytes - 1))
    )
    made = made.model_copy(update={"files": [large, small, *made.files[1:]]})
    chosen = memory.choices(made)
    assert chosen is not None
    assert chosen.projector == small == card.context(made)["mmproj"]


def test_what_was_not_measured_comes_after_what_was() -> None:
    made = _quants(("Q8_0", 4.0, None), ("Q4_K_M", 2.5, 0.02), ("IQ2_XS", 1.3, None))
    chosen = memory.choices(made)
    assert chosen is not None
    assert chosen.some_unmeasured
    assert _table(made) == {4: ["Q4_K_M", "Q4_K_M", "IQ2_XS", None], 6: ["Q4_K_M", "Q4_K_M", "Q4_K_M", "IQ2_XS"]} | {
        8: ["Q4_K_M"] * 4
    }


def test_of_the_same_bytes_the_parent_is_named() -> None:
    made = _quants(("Q4_K_M", 2.5, 0.02))
    twin = made.files[-1].model_copy(update={"recipe": "Q4_K_L", "parent": "Q4_K_M", "name": f"{STEM}-Q4_K_L.gguf"})
    for order in ([*made.files, twin], [made.files[0], twin, made.files[1]]):
        assert {name for row in _table(made.model_copy(update={"files": order})).values() for name in row} <= {
            "Q4_K_M",
            None,
        }


def test_the_unquantised_file_is_no_candidate_unless_alone() -> None:
    alone = _quants()
    assert [entry.recipe for entry in alone.files] == ["bf16"]
    assert _table(alone)[12][0] == "bf16"
    chosen = memory.choices(_quants(("Q8_0", 4.0, 0.001)))
    assert chosen is not None
    assert chosen.base is not None
    assert chosen.base_memory == 12
    assert 1.1 * (chosen.base.n_bytes / memory.GIB + _beside(131072)) <= 12


def test_rows_in_which_nothing_fits_or_nothing_changes_are_left_out() -> None:
    table = _table(_quants(("Q8_0", 30.0, 0.001)))
    assert list(table) == [48]
    assert table[48] == ["Q8_0"] * 4


def test_a_model_too_large_for_all_memories_has_no_rows() -> None:
    assert _table(_quants(("Q8_0", 300.0, 0.001))) == {}


def test_estimated_contexts_are_told_from_reported_ones() -> None:
    chosen = memory.choices(example())
    assert chosen is not None
    assert chosen.said
    estimated = memory.choices(_quants(("Q8_0", 4.0, 0.1), context=context().model_copy(update={"measured": []})))
    assert estimated is not None
    assert not estimated.said
    for n_ctx, n_bytes in estimated.context_bytes.items():
        assert chosen.context_bytes[n_ctx] <= n_bytes <= chosen.context_bytes[n_ctx] * 1.3


def test_a_set_that_recorded_nothing_has_no_table() -> None:
    assert memory.choices(example().model_copy(update={"context": None})) is None
    assert memory.choices(example().model_copy(update={"files": []})) is None


def test_entries_are_those_of_the_set() -> None:
    chosen = memory.choices(example())
    assert chosen is not None
    named = [cell.entry for row in chosen.rows for cell in row.cells if cell.entry]
    assert named
    assert all(isinstance(entry, FileEntry) and entry in example().files for entry in named)


# --- on the card ---------------------------------------------------------------------------------------------------


def _section(made: Manifest) -> str:
    text = card.render(made)
    return text.partition("## Which file should I choose?\n")[2].partition("\n## ")[0]


def test_card_shows_the_table_of_the_choices() -> None:
    """Every cell links the file that was chosen, in the order of contexts and memories."""
    chosen = memory.choices(example())
    assert chosen is not None
    lines = [line for line in _section(example()).splitlines() if line.startswith("| ") and " GB |" in line]
    assert [line.split(" |")[0] for line in lines] == [f"| {row.memory} GB" for row in chosen.rows]
    for line, row in zip(lines, chosen.rows, strict=True):
        assert [re.findall(r"\(\./(.*)\)", cell) for cell in line.split("|")[2:-1]] == [
            [cell.entry.name] if cell.entry else [] for cell in row.cells
        ]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        pytest.param(example, "The file with the lowest KL divergence of those that fit", id="measured"),
        pytest.param(
            lambda: example().model_copy(update={"evidence": {}}), "Quality was not measured for this set.", id="not"
        ),
        pytest.param(
            lambda: example().model_copy(
                update={"model": example().model.model_copy(update={"base_is_dequantised": True})}
            ),
            "was quantised before, so what was measured ranks no files.",
            id="base on a grid",
        ),
    ],
)
def test_card_says_by_what_was_chosen(made: Callable[[], Manifest], said: str) -> None:
    assert said in _section(made())


def test_card_says_where_the_figures_of_a_context_are_from() -> None:
    assert "llama.cpp itself" in _section(example())
    estimated = example().model_copy(update={"context": context().model_copy(update={"measured": []})})
    assert "the buffers estimated" in _section(estimated)
    assert "llama.cpp itself" not in _section(estimated)


def test_card_of_a_set_that_recorded_nothing_has_no_such_section() -> None:
    assert _section(example().model_copy(update={"context": None})) == ""
