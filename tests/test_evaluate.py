"""Quality and speed: statistics against plain float64, figures against llama-perplexity, and what is kept of them."""

import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gemma_gguf import calibration, evaluate, evidence, factory, gguf_io, llama_cpp, manifest, scoring
from gemma_gguf.calibration import Text
from gemma_gguf.errors import BadInputError, ToolFailedError, VerificationError
from gemma_gguf.evaluate import Against, Material
from gemma_gguf.evidence import Measuring
from gemma_gguf.files import sha256_bytes
from gemma_gguf.llama_cpp import Build, RunLog, run_tool
from gemma_gguf.manifest import Failed, FileEntry, Quality
from gemma_gguf.session import Done, Options, Report
from tests import examples
from tests.checkpoints import CHAT_TEMPLATE

STEM = "test_tiny-vision"
SHA = "0" * 64


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


# --- statistics --------------------------------------------------------------------------------------------------


def logits_of(seed: int, rows: int, n_vocab: int, spread: float = 4.0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, spread, (rows, n_vocab)).astype(np.float32)


@pytest.mark.parametrize(
    ("rows", "n_vocab", "noise"),
    [(7, 300_000, 0.3), (600, 1000, 0.05), (50, 20_000, 3.0), (1, 2, 0.5)],
    ids=["row-by-row", "blocks", "far-away", "smallest"],
)
def test_scores_are_those_of_plain_float64(rows: int, n_vocab: int, noise: float, pool: Executor) -> None:
    base = logits_of(1, rows, n_vocab)
    quant = base + logits_of(2, rows, n_vocab, noise)
    targets = np.random.default_rng(3).integers(0, n_vocab, rows).astype(np.int32)
    tokens = scoring.score(quant, targets, *scoring.encode_base(base, targets, pool), pool)

    def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        wide = logits.astype(np.float64)
        log_p: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
        return log_p

    log_p, log_q = log_softmax(base), log_softmax(quant)
    every = np.arange(rows)
    np.testing.assert_allclose(tokens["nll"], -log_q[every, targets], atol=5e-6)
    np.testing.assert_allclose(tokens["nll_base"], -log_p[every, targets], atol=5e-6)
    kld = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    # A step of the 16 bits is 6e-4 nats here; what it does to one token's divergence grows with the divergence.
    np.testing.assert_allclose(tokens["kld"], kld, rtol=1e-3, atol=1e-5)
    assert tokens["kld"].mean() == pytest.approx(kld.mean(), rel=2e-4, abs=1e-6)
    assert (tokens["same_top"] == (log_p.argmax(axis=1) == log_q.argmax(axis=1))).all()


def test_base_against_itself_is_the_noise_of_16_bits(pool: Executor) -> None:
    base = logits_of(1, 64, 50_000)
    targets = np.zeros(64, np.int32)
    records, codes = scoring.encode_base(base, targets, pool)
    tokens = scoring.score(base, targets, records, codes, pool)
    assert (tokens["nll"] == tokens["nll_base"]).all()
    assert tokens["same_top"].all()
    assert tokens["kld"].min() > -1e-6
    assert tokens["kld"].max() < 1e-6
    assert scoring.base_bytes(64, 50_000) == records.nbytes + codes.nbytes
    # The same row with all tokens equally likely: nothing to divide by.
    flat = np.zeros((2, 100), np.float32)
    tokens = scoring.score(flat, targets[:2], *scoring.encode_base(flat, targets[:2], pool), pool)
    assert tokens["kld"] == pytest.approx([0, 0], abs=1e-6)


def test_number_of_threads_changes_nothing(pool: Executor) -> None:
    base, quant = logits_of(1, 300, 5000), logits_of(2, 300, 5000)
    targets = np.arange(300, dtype=np.int32)
    with ThreadPoolExecutor(1) as one:
        alone = scoring.score(quant, targets, *scoring.encode_base(base, targets, one), one)
    assert (scoring.score(quant, targets, *scoring.encode_base(base, targets, pool), pool) == alone).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_logits_that_are_not_finite_are_refused(bad: float, pool: Executor) -> None:
    good, broken = logits_of(1, 4, 100), logits_of(1, 4, 100)
    broken[2, 7] = bad
    targets = np.full(4, 7, np.int32)
    with pytest.raises(scoring.NotMeasurableError, match="base's logits hold NaN or Inf"):
        scoring.encode_base(broken, targets, pool)
    tokens = scoring.score(broken, targets, *scoring.encode_base(good, targets, pool), pool)
    with pytest.raises(scoring.NotMeasurableError, match="its logits hold NaN or Inf"):
        scoring.summary(tokens)


def tokens_of(seed: int, count: int) -> scoring.Records:
    rng = np.random.default_rng(seed)
    tokens = np.empty(count, scoring.TOKEN)
    tokens["nll_base"] = rng.gamma(2, 1.5, count)
    tokens["nll"] = np.abs(tokens["nll_base"] + rng.normal(0.02, 0.2, count))
    tokens["kld"] = rng.gamma(0.5, 0.1, count)
    tokens["same_top"] = rng.random(count) < 0.9
    return tokens


def test_summary_has_the_formulas_of_llama_perplexity() -> None:
    """`kl_divergence` in tools/perplexity/perplexity.cpp, sums and all."""
    tokens = tokens_of(5, 2000)
    n = len(tokens)
    nll, base, kld = (tokens[name].tolist() for name in ("nll", "nll_base", "kld"))

    def mean_and_uncertainty(total: float, total2: float) -> tuple[float, float]:
        f = total / n
        return f, ((total2 / n - f * f) / (n - 1)) ** 0.5

    log_ppl = mean_and_uncertainty(sum(nll), sum(x * x for x in nll))
    log_base = mean_and_uncertainty(sum(base), sum(x * x for x in base))
    products = sum(x * y for x, y in zip(nll, base, strict=True))
    covariance = (products / n - (sum(nll) / n) * (sum(base) / n)) / (n - 1)
    ratio = np.exp(log_ppl[0] - log_base[0])
    ratio_se = ratio * (log_ppl[1] ** 2 + log_base[1] ** 2 - 2 * covariance) ** 0.5
    change2 = [(np.exp(-x) - np.exp(-y)) ** 2 for x, y in zip(nll, base, strict=True)]
    mse = mean_and_uncertainty(sum(change2), sum(x * x for x in change2))
    same = sum(tokens["same_top"].tolist()) / n

    found = scoring.summary(tokens)
    expected = {
        "ppl": (np.exp(log_ppl[0]), np.exp(log_ppl[0]) * log_ppl[1]),
        "ppl_ratio": (ratio, ratio_se),
        "kld": mean_and_uncertainty(sum(kld), sum(x * x for x in kld)),
        "delta_p_rms": (mse[0] ** 0.5, 0.5 / mse[0] ** 0.5 * mse[1]),
        "same_top_p": (same, (same * (1 - same) / (n - 1)) ** 0.5),
    }
    for name, (value, se) in expected.items():
        assert found[name]["value"] == pytest.approx(value, rel=1e-9), name
        assert found[name]["se"] == pytest.approx(se, rel=1e-6), name
    ordered = sorted(kld)
    assert found["kld_median"] == pytest.approx((ordered[999] + ordered[1000]) / 2)
    at = 0.99 * (n - 1)
    low = int(at)
    assert found["kld_p99"] == pytest.approx(ordered[low] + (at - low) * (ordered[low + 1] - ordered[low]))


@pytest.mark.parametrize(("count", "shown"), [(9_999, False), (10_000, True)])
def test_the_rarest_quantile_needs_ten_thousand_tokens(count: int, shown: bool) -> None:
    tokens = tokens_of(6, count)
    assert scoring.summary(tokens)["kld_p999"] == (np.quantile(tokens["kld"], 0.999) if shown else None)


def test_summaries_of_few_tokens() -> None:
    one = scoring.summary(tokens_of(7, 1))
    assert {
        name: one[name]["se"] for name in ("ppl", "ppl_ratio", "kld", "delta_p_rms", "same_top_p")
    } == dict.fromkeys(("ppl", "ppl_ratio", "kld", "delta_p_rms", "same_top_p"))
    with pytest.raises(scoring.NotMeasurableError, match="no token"):
        scoring.summary(tokens_of(7, 0))


# --- against llama-perplexity ------------------------------------------------------------------------------------


def against(build: Build, base: Path, material: Material, n_chunks: int) -> Against:
    return Against(build, base, SHA, material, n_chunks, threads=2, gpu_layers=0)


def printed(name: str, log: str) -> tuple[float, float | None]:
    """A figure and its error from llama-perplexity's report."""
    match = re.search(rf"^{re.escape(name)} *: *([-\d.]+) *(?:± *([-\d.]+))?", log, re.MULTILINE)
    assert match, name
    return float(match[1]), float(match[2]) if match[2] else None


def output_with(last: str, argv: Sequence[str | Path], log: RunLog) -> str:
    """What a tool prints, whole: llama.cpp writes from a thread that it does not wait for when it ends
    (common/log.cpp), so that on a busy machine the end can be missing.
    """
    for _ in range(20):
        if last in (output := run_tool(argv, log=log).output):
            return output
    raise AssertionError(f"{argv[0]} never printed {last!r}")


def test_figures_are_those_of_llama_perplexity(build: Build, finished: Report, log: RunLog, tmp_path: Path) -> None:
    """The same build, files, text and chunks; `finished` is a test model, so divergences are between 0.01 and 0.3."""
    text = tmp_path / "text.txt"
    text.write_bytes(calibration.held_out().data[:6000])
    base = finished.set_dir / f"{STEM}-bf16.gguf"
    kept = tmp_path / "theirs"
    perplexity: list[str | Path] = [build.tool("llama-perplexity"), "-c", "512", "-b", "512", "-t", "2"]
    first = [*perplexity, "-m", base, "-f", text, "--chunks", "3", "--kl-divergence-base", kept]
    final = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", output_with("Final estimate", first, log))
    material = evaluate.plain_material(Text("t", "t", text.read_bytes()))
    compared = []
    with evaluate.comparing(
        against(build, base, material, 3), directory=tmp_path / "w", n_vocab=500, log=log
    ) as measure:
        floor = measure(base)
        for recipe in ("Q4_0", "IQ2_XXS"):
            file = finished.set_dir / f"{STEM}-{recipe}.gguf"
            argv = [*perplexity, "-m", file, "--kl-divergence-base", kept, "--kl-divergence"]
            compared.append((measure(file), output_with("Same top p:", argv, log)))
    assert final
    assert floor.ppl.value == pytest.approx(float(final[1]), rel=1e-5)
    assert floor.ppl.se == pytest.approx(float(final[2]), rel=1e-4)
    assert floor.n_tokens == 3 * 255
    assert 0 <= floor.kld.value < 1e-6
    assert floor.same_top_p.value == floor.ppl_ratio.value == 1.0
    for ours, theirs_log in compared:
        measured = {
            "Mean PPL(Q)": (ours.ppl.value, ours.ppl.se),
            "Mean PPL(Q)/PPL(base)": (ours.ppl_ratio.value, ours.ppl_ratio.se),
            "Mean    KLD": (ours.kld.value, ours.kld.se),
            "Median  KLD": (ours.kld_median, None),
            "99.0%   KLD": (ours.kld_p99, None),
            "RMS Δp    ": (100 * ours.delta_p_rms.value, 100 * (ours.delta_p_rms.se or 0)),
            "Same top p": (100 * ours.same_top_p.value, 100 * (ours.same_top_p.se or 0)),
        }
        assert ours.kld.value > 0.01  # else nothing was compared
        for name, (value, se) in measured.items():
            expected, expected_se = printed(name, theirs_log)
            # Ten times closer than what is promised; they print 3 or 6 digits.
            decimals = 6e-4 if name in ("RMS Δp    ", "Same top p") else 1e-5
            assert value == pytest.approx(expected, rel=5e-4, abs=decimals), name
            if expected_se is not None:
                assert se == pytest.approx(expected_se, rel=5e-3, abs=decimals), name


def test_streaming_gives_the_same_figures_and_no_file_stays(
    build: Build, finished: Report, log: RunLog, tmp_path: Path
) -> None:
    base, file = (finished.set_dir / f"{STEM}-{name}.gguf" for name in ("bf16", "Q2_K"))
    material = evaluate.plain_material(Text("t", "t", calibration.held_out().data[:4000]))
    found: list[Quality] = []
    directory = tmp_path / "w"
    for budget in (evaluate.DISK_BUDGET, 0):
        with evaluate.comparing(
            against(build, base, material, 2), directory=directory, n_vocab=500, disk_budget=budget, log=log
        ) as measure:
            found.append(measure(file))
            assert {path.name for path in directory.iterdir()} == {"text", *(["base.logits"] if budget else [])}
        assert not directory.exists()
    assert found[0] == found[1]
    assert found[0].n_tokens == 510


def test_a_file_that_gives_no_numbers_is_named_and_no_logits_stay(
    build: Build, finished: Report, log: RunLog, tmp_path: Path
) -> None:
    # Not a quant: ggml rounds activations to 8 bits for those, and NaN with them, to some number.
    file = Path(shutil.copy(finished.set_dir / f"{STEM}-bf16.gguf", tmp_path / "broken.gguf"))
    tensor = gguf_io.read_header(file).by_name["output_norm.weight"]
    data = bytearray(file.read_bytes())
    data[tensor.offset : tensor.offset + 4] = b"\x00\x00\xc0\x7f"
    file.write_bytes(data)
    material = evaluate.plain_material(Text("t", "t", calibration.held_out().data[:2000]))
    base = finished.set_dir / f"{STEM}-bf16.gguf"
    directory = tmp_path / "w"
    directory.mkdir()
    (directory / "base.logits").write_bytes(b"left by a run that was killed")
    with (
        pytest.raises(VerificationError, match=r"broken\.gguf cannot be measured: its logits hold NaN or Inf"),
        evaluate.comparing(against(build, base, material, 1), directory=directory, n_vocab=500, log=log) as measure,
    ):
        measure(file)
    assert not directory.exists()


# --- conversations -----------------------------------------------------------------------------------------------

TALK = [
    [
        {"role": "user", "content": "Say <b>one</b> thing."},
        {"role": "assistant", "content": "One thing."},
        {"role": "user", "content": "And more?"},
        {"role": "assistant", "content": "No: that\nwas it."},
    ],
    [{"role": "user", "content": "long " * 200}, {"role": "assistant", "content": "Too late to be read."}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ("word " * 300).strip()}],
]


def test_conversations_are_cut_into_who_says_what() -> None:
    made = evaluate.chat_material("t", TALK, CHAT_TEMPLATE, bos_token="<bos>", eos_token="<eos>")
    assert (made.mode, made.n_conversations) == ("chat", 3)
    pieces = json.loads(made.data)
    assert pieces[0] == [
        ["<bos><start_of_turn>user\nSay <b>one</b> thing.<end_of_turn>\n<start_of_turn>model\n", False],
        ["One thing.", True],
        ["<end_of_turn>\n<start_of_turn>user\nAnd more?<end_of_turn>\n<start_of_turn>model\n", False],
        ["No: that\nwas it.", True],
        ["<end_of_turn>\n", False],
    ]


def test_a_template_that_changes_what_is_said_is_refused() -> None:
    shouting = CHAT_TEMPLATE.replace("| trim", "| upper")
    with pytest.raises(BadInputError, match="changes what the model says"):
        evaluate.chat_material("t", TALK, shouting, bos_token="<bos>", eos_token="<eos>")
    # Where only some conversations are touched, the others are read.
    some = CHAT_TEMPLATE.replace("| trim", "| replace('late', 'early')")
    assert evaluate.chat_material("t", TALK, some, bos_token="", eos_token="").n_conversations == 2


CHUNKS = """
import json, sys
import llama_cpp
from gemma_gguf import bindings
settings = {"mode": "chat", "n_chunks": 3, "chunk_size": 512, "threads": 1, "gpu_layers": 0}
llama = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
with bindings._loaded(sys.argv[1], settings) as forward:
    for chunk in forward.chunks(sys.argv[2]):
        tokens, scored = chunk.tokens.tolist(), chunk.scored.tolist()
        text = llama.detokenize([tokens[i] for i in scored], special=True).decode()
        shape = forward.logits(chunk).shape
        print(json.dumps({"tokens": tokens, "scored": scored, "text": text, "rows": shape[0]}))
"""


def test_only_what_the_model_says_is_scored_with_special_tokens_parsed(
    build: Build, finished: Report, log: RunLog, tmp_path: Path
) -> None:
    base = finished.set_dir / f"{STEM}-bf16.gguf"
    text = tmp_path / "talk.json"
    # The template brings the BOS already.
    text.write_bytes(evaluate.chat_material("t", TALK, CHAT_TEMPLATE, bos_token="<bos>", eos_token="<eos>").data)
    env = llama_cpp.python_env(build)
    env["PYTHONPATH"] += f":{Path(evaluate.__file__).parents[1]}"
    output = run_tool([sys.executable, "-W", "ignore", "-c", CHUNKS, base, text], log=log, env=env).output
    first, last = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
    bos, start_of_turn, end_of_turn = 2, 4, 5  # places in `checkpoints.SPECIAL`
    assert first["tokens"][:2] == [bos, start_of_turn]
    assert first["tokens"].count(bos) == 1
    assert first["tokens"].count(start_of_turn) == 4
    assert first["text"] == "One thing.<end_of_turn>No: that\nwas it.<end_of_turn>"
    # The second conversation comes to the model's turn after 512 tokens: nothing of it is scored. The third is cut.
    assert last["text"].startswith("word word ")
    assert len(last["tokens"]) == 512
    assert last["scored"][-1] == 511
    assert end_of_turn not in [last["tokens"][i] for i in last["scored"]]
    for chunk in (first, last):
        assert chunk["rows"] == len(chunk["scored"])
        assert chunk["scored"] == sorted(set(chunk["scored"]))


def test_held_out_documents_become_conversations() -> None:
    talks = calibration.held_out_conversations()
    assert len(talks) > 50
    for talk in talks:
        assert [message["role"] for message in talk] == ["user", "assistant"] * (len(talk) // 2)
        assert all(message["content"] == message["content"].strip() != "" for message in talk)
        assert not any("_of_turn>" in message["content"] for message in talk)
    # Nothing of a document is lost between the one who opens and the one who goes on.
    whole = calibration.held_out().data.decode()
    squeezed = "".join(whole.split())
    opened = [talk for talk in talks if talk[0]["content"].startswith(calibration.CONTINUE)]
    assert 0 < len(opened) < len(talks)
    for talk in opened:
        opening = talk[0]["content"].removeprefix(calibration.CONTINUE)
        assert "".join((opening + talk[1]["content"]).split()) in squeezed


# --- a set: what is measured, what is kept -----------------------------------------------------------------------


@pytest.fixture
def few(finished: Report, tmp_path: Path) -> Path:
    """A set of four files, with its base in the work directory."""
    directory = tmp_path / finished.set_dir.name
    directory.mkdir()
    facts = manifest.load(finished.set_dir)
    kept = [entry for entry in facts.files if entry.recipe in ("bf16", "Q8_0", "Q4_0", "IQ2_XXS")]
    for entry in kept:
        shutil.copy(finished.set_dir / entry.name, directory)
    manifest.save(facts.model_copy(update={"files": kept, "evidence": {}}), directory)
    return directory


class Killed(BaseException):
    """Nothing catches it, as nothing catches `kill -9`."""


def measured(directory: Path, how: Measuring, stop_after: int | None = None) -> list[str]:
    """Evaluate a set; the names of what was measured, not kept. Stops as if killed after so many."""
    made: list[str] = []

    def say(done: Done) -> None:
        if done.made:
            made.append(done.name.removeprefix(f"{STEM}-"))
        if stop_after is not None and len(made) == stop_after:
            raise Killed

    evidence.evaluate_set(directory, how, say=say)
    return made


def test_evidence_is_kept_by_sha256_and_taken_up_again(build: Build, few: Path) -> None:
    assert build.key
    work = few.parent / ".work" / STEM
    how = Measuring(chunks=1, bench=("none",))
    with pytest.raises(Killed):
        measured(few, how, stop_after=2)
    first = manifest.load(few)
    assert len(first.evidence) == 2
    assert not (work / "evaluate").exists()
    (work / "evaluate").mkdir()
    (work / "evaluate" / "base.logits").write_bytes(b"left by a run that was killed")

    assert measured(few, how) == ["Q4_0.gguf", "IQ2_XXS.gguf"]
    assert not (work / "evaluate").exists()
    facts = manifest.load(few)
    by_recipe = {str(entry.recipe): entry for entry in facts.files}
    assert set(facts.evidence) == {entry.sha256 for entry in facts.files}
    assert all(facts.evidence[sha256] == first.evidence[sha256] for sha256 in first.evidence)
    qualities = {name: facts.evidence[entry.sha256].quality for name, entry in by_recipe.items()}
    for quality in qualities.values():
        assert quality is not None
        assert (quality.base_sha256, quality.mode, quality.n_chunks) == (by_recipe["bf16"].sha256, "chat", 1)
        assert quality.build == build.key
    klds = [quality.kld.value for name in ("bf16", "Q8_0", "Q4_0", "IQ2_XXS") if (quality := qualities[name])]
    assert klds == sorted(klds)
    assert klds[0] < 1e-6 < klds[1] < 0.001 < klds[2]
    record = facts.stages["evaluate"]
    assert record.argv == [["gemma-gguf", "evaluate", few.name, "--eval-chunks", "1", "--bench", "none"]]

    # Nothing to do: not a byte of the manifest changes.
    before = (few / manifest.FILE_NAME).read_bytes()
    assert measured(few, how) == []
    assert (few / manifest.FILE_NAME).read_bytes() == before

    # Speed beside quality; Q4_0 is measured with whatever is asked for.
    assert measured(few, replace(how, bench=("IQ2_XXS",))) == ["IQ2_XXS.gguf", "Q4_0.gguf"]
    assert measured(few, replace(how, bench=("IQ2_XXS",))) == []
    facts = manifest.load(few)
    assert {name for name, entry in by_recipe.items() if facts.evidence[entry.sha256].speed} == {"IQ2_XXS", "Q4_0"}
    speed = facts.evidence[by_recipe["Q4_0"].sha256].speed
    assert speed is not None
    assert (speed.build, speed.backend, speed.n_prompt, speed.n_generate) == (build.key, "cpu", 512, 64)
    assert all(rate is not None and rate.value > 0 for rate in (speed.prompt_per_second, speed.generate_per_second))
    assert speed.prompt_per_second.se is not None
    assert speed.peak_memory_bytes is not None
    assert speed.peak_memory_bytes > by_recipe["Q4_0"].n_bytes
    assert facts.evidence[by_recipe["Q4_0"].sha256].quality == qualities["Q4_0"]

    # A changed file has no old numbers, and one that is the same as another shares them without being measured.
    old = by_recipe["Q4_0"]
    shutil.copy(few / by_recipe["Q8_0"].name, few / old.name)
    with pytest.raises(VerificationError, match=r"Q4_0\.gguf is not the file that quantset\.json names"):
        measured(few, how)
    same = old.model_copy(update={"sha256": by_recipe["Q8_0"].sha256, "n_bytes": by_recipe["Q8_0"].n_bytes})
    manifest.save(facts.with_file(same), few)
    assert measured(few, how) == []
    facts = manifest.load(few)
    assert old.sha256 not in facts.evidence
    assert facts.evidence[same.sha256].quality == qualities["Q8_0"]


def test_a_quant_stands_in_for_the_base(build: Build, few: Path) -> None:
    assert build.key
    (few / f"{STEM}-bf16.gguf").unlink()
    facts = manifest.load(few)
    kept = [entry for entry in facts.files if entry.recipe in ("Q8_0", "Q4_0")]
    manifest.save(facts.model_copy(update={"files": kept}), few)
    how = Measuring(chunks=1, bench=("none",), threads=1)
    with pytest.raises(BadInputError, match="no base to compare with") as caught:
        measured(few, how)
    assert "--from Q8_0" in (caught.value.next_step or "")
    with pytest.raises(BadInputError, match="no Q6_K to compare with"):
        measured(few, replace(how, reference="Q6_K"))
    assert measured(few, replace(how, reference="q8_0")) == ["Q8_0.gguf", "Q4_0.gguf"]
    facts = manifest.load(few)
    by_recipe = {entry.recipe: entry.sha256 for entry in facts.files}
    for found in facts.evidence.values():
        assert found.quality is not None
        assert found.quality.base_sha256 == by_recipe["Q8_0"]
    assert facts.stages["evaluate"].argv[0][-4:] == ["--from", "q8_0", "--threads", "1"]


def test_a_text_that_is_too_short(build: Build, finished: Report, log: RunLog, tmp_path: Path) -> None:
    material = evaluate.plain_material(Text("t", "t", b"A few words."))
    base = finished.set_dir / f"{STEM}-bf16.gguf"
    with pytest.raises(BadInputError, match=r"the text t has only \d+ tokens, no chunk of 512"):
        evaluate.count_chunks(build, base, material, tmp_path, log)


CHANGED: dict[str, dict[str, Any]] = {
    "base": {"base_sha256": "1" * 64},
    "text": {"text_sha256": "1" * 64},
    "mode": {"mode": "plain"},
    "chunks": {"n_chunks": 41},
    "chunk-size": {"chunk_size": 1024},
    "build": {"build": "another"},
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_quality_counts_only_for_what_it_was_measured_with(change: dict[str, Any]) -> None:
    quality = examples.evidence(4.0, "2" * 64).quality
    assert quality is not None
    material = Material("heldout", "chat", b"text", 100)
    build = Build(Path(), quality.build, "", "", "", 0, "", "cpu", "", (), "", 0.0)
    wanted = Against(build, Path(), "2" * 64, material, quality.n_chunks, threads=1, gpu_layers=0)
    known = quality.model_copy(update={"text": "heldout", "text_sha256": material.sha256})
    failed = Failed(**wanted.facts, why="logits of chunk 3")
    assert wanted.current(None) is None
    for found in (known, failed):
        assert wanted.current(found) == found
        assert wanted.current(found.model_copy(update=change)) is None


# --- speed -------------------------------------------------------------------------------------------------------


def rows(*names: str) -> list[FileEntry]:
    entry = next(entry for entry in examples.example().files if entry.kind == "model")
    return [entry.model_copy(update={"recipe": name, "sha256": sha256_bytes(name.encode())}) for name in names]


ALL = ("bf16", "Q8_0", "Q6_K_L", "Q4_K_M", "Q4_0", "IQ2_M")
CHOICES: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None, tuple[str, ...]]] = {
    "default": (ALL, None, ("Q8_0", "Q4_K_M", "Q4_0")),
    "all": (ALL, ("all",), ALL),
    "none": (ALL, ("none",), ()),
    "named": (ALL, ("iq2_m", "Q4_0"), ("IQ2_M", "Q4_0")),
    "reference-is-added": (ALL, ("IQ2_M",), ("IQ2_M", "Q4_0")),
    "no-reference-there": (("Q8_0", "IQ2_M"), ("IQ2_M",), ("IQ2_M",)),
    "twice": (ALL, ("Q8_0", "q8_0"), ("Q8_0", "Q4_0")),
}


@pytest.mark.parametrize(("there", "wanted", "chosen"), CHOICES.values(), ids=CHOICES)
def test_which_files_are_benchmarked(
    there: tuple[str, ...], wanted: tuple[str, ...] | None, chosen: tuple[str, ...]
) -> None:
    assert tuple(entry.recipe for entry in evaluate.bench_choice(rows(*there), wanted)) == chosen


def test_a_recipe_that_is_not_there_cannot_be_benchmarked() -> None:
    with pytest.raises(BadInputError, match="no Q5_K_M to measure the speed of") as caught:
        evaluate.bench_choice(rows("Q8_0", "Q4_0"), ("Q5_K_M",))
    assert "Q8_0, Q4_0, all, none" in (caught.value.next_step or "")


def test_bench_argv() -> None:
    build = Build(Path("/build"), "key", "", "", "", 0, "", "cpu", "", (), "", 0.0)
    argv = evaluate.bench_argv(build, Path("m.gguf"), threads=3, gpu_layers=5)
    assert argv[0] == "/build/bin/llama-bench"
    assert argv[1:] == [
        "-m",
        "m.gguf",
        "-p",
        "512",
        "-n",
        "64",
        "-r",
        "1",
        "-t",
        "3",
        "-ngl",
        "5",
        "-o",
        "jsonl",
        "--progress",
    ]


def test_bench_log_is_read_among_other_lines() -> None:
    text = (
        "warning: asserts enabled\n"
        '{"n_prompt": 512, "n_gen": 0, "samples_ts": [ 101.5, 99.5 ]}\n'
        "noise {not json}\n"
        '{"n_prompt": 0, "n_gen": 64, "samples_ts": [ 12.25 ]}\n'
    )
    assert evaluate.parse_bench_log(text) == ([101.5, 99.5], [12.25])
    with pytest.raises(ToolFailedError, match="did not say how fast"):
        evaluate.parse_bench_log("error: failed to load model\n")


# --- in a run ----------------------------------------------------------------------------------------------------


def test_run_evaluates_and_keeps(build: Build, finished: Report, set_options: Options, tmp_path: Path) -> None:
    """With `--from`: the imatrix is computed with a Q8_0 of the base, and files are compared with the set's Q8_0."""
    options = replace(
        set_options,
        out=tmp_path / "out",
        base=finished.set_dir / f"{STEM}-bf16.gguf",
        recipes=("Q8_0", "Q4_0"),
        proof=False,
        evaluate=True,
        eval_chunks=1,
        bench=("none",),
        reference="Q8_0",
    )
    report = factory.run(options)
    assert build.key
    facts = manifest.load(report.set_dir)
    by_recipe = {entry.recipe: entry.sha256 for entry in facts.files}
    assert set(facts.evidence) == {by_recipe["Q8_0"], by_recipe["Q4_0"]}
    assert all(found.quality and found.quality.base_sha256 == by_recipe["Q8_0"] for found in facts.evidence.values())
    [argv] = facts.stages["imatrix"].argv
    assert re.fullmatch(r"imatrix-from-Q8_0-\w+-\w+\.gguf", argv[argv.index("-m") + 1])
    work = report.set_dir.parent / ".work" / STEM
    assert not list(work.glob("imatrix-from-*"))
    assert not (work / "evaluate").exists()
    ours, theirs = (path / f"{STEM}-imatrix.gguf" for path in (report.set_dir, finished.set_dir))
    assert ours.read_bytes() != theirs.read_bytes()
    again = factory.run(options)
    assert {done.name for done in again.done if done.made} == set()
    with pytest.raises(BadInputError, match="--from Q6_K needs Q6_K in the set"):
        factory.run(replace(options, reference="Q6_K"))
