"""EmbeddingGemma: converted with its dense layers, quantised, measured by its embeddings, and run as its card says."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemma_gguf import (
    card,
    embedding,
    evaluate,
    evidence,
    factory,
    gates,
    gguf_io,
    llama_cpp,
    manifest,
    memory,
    pictures,
    proof,
    publish,
    recipes,
    source,
)
from gemma_gguf.embedding import Vectors
from gemma_gguf.errors import BadInputError, NoFiguresError, ToolFailedError, VerificationError
from gemma_gguf.evidence import Measuring
from gemma_gguf.files import sha256_file
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.manifest import EmbeddingFacts, Manifest
from gemma_gguf.publish import Candidate, Finding, LocalFile
from gemma_gguf.session import Options, Report
from tests.embedding_gemma import DENSE, MODULES, PROMPTS, write_embedding_gemma
from tests.test_card_commands import ask, blocks, lines, running

RECIPES = ("bf16", "Q8_0", "Q4_K_L", "Q4_K_M", "Q4_0", "IQ2_XS")
LINES = 40
STEM = "google_tiny-embedding"
SAID = EmbeddingFacts(prompts=dict(PROMPTS), similarity="cosine", dense=["2_Dense", "3_Dense"])


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embedding_gemma(tmp_path_factory.mktemp("checkpoints") / "tiny-embedding")


def options(checkpoint: Path, out: Path, wanted: tuple[str, ...] = RECIPES) -> Options:
    return Options(
        str(checkpoint),
        name="google/tiny-embedding",
        out=out,
        recipes=wanted,
        chunks=6,
        eval_chunks=LINES,
        bench=("Q4_0",),
        threads=1,
    )


@pytest.fixture(scope="module")
def made(build: Build, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A set of the small EmbeddingGemma, measured, with its card."""
    return factory.run(options(checkpoint, tmp_path_factory.mktemp("out")))


@pytest.fixture(scope="module")
def facts(made: Report) -> Manifest:
    return manifest.load(made.set_dir)


# --- what is decided ----------------------------------------------------------------------------------------------


def test_what_the_files_say() -> None:
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in MODULES]
    described = {"prompts": {**PROMPTS, "odd": 3, "long": "x" * 1001}, "similarity_fn_name": "cosine"}
    assert embedding.facts(modules, described) == SAID
    assert embedding.facts(modules[:2], {}) == EmbeddingFacts(prompts={}, similarity=None, dense=[])


@pytest.mark.parametrize(
    "modules", [None, {}, [], [3], [{"path": "", "type": "sentence_transformers.models.Transformer"}]]
)
def test_a_model_without_pooling_is_refused(modules: object) -> None:
    with pytest.raises(BadInputError, match="names its pooling"):
        embedding.facts(modules, {})


@pytest.mark.parametrize("gone", ["modules.json", "2_Dense/model.safetensors", "3_Dense/config.json"])
def test_a_checkpoint_that_lacks_a_module_is_refused(gone: str, checkpoint: Path, tmp_path: Path) -> None:
    """The converter would leave the layer out without a word, and every vector would be another."""
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / gone).unlink()
    with pytest.raises(BadInputError, match=r"pooling|lacks [23]_Dense") as caught:
        source.examine(broken)
    assert "Download the whole repository" in str(caught.value.next_step)


def test_a_module_out_of_the_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    text = (broken / "modules.json").read_text()
    (broken / "modules.json").write_text(text.replace('"2_Dense"', '"../2_Dense"'))
    with pytest.raises(BadInputError, match="lacks"):
        source.examine(broken)


def test_dense_layers_count_as_parameters(checkpoint: Path) -> None:
    tensors = source.examine(checkpoint).tensors
    assert tensors["2_Dense/linear.weight"] == tensors["3_Dense/linear.weight"] == 256 * DENSE


def test_recipes_keep_the_dense_layers_at_8_bits() -> None:
    pins = ("--tensor-type", "dense_2=q8_0", "--tensor-type", "dense_3=q8_0")
    large = recipes.TABLE["Q4_K_L"]
    assert embedding.fitted(large, "gemma-embedding").flags == (*recipes.EMBED_OUTPUT_Q8, *pins)
    assert embedding.fitted(recipes.TABLE["bf16"], "gemma-embedding").flags == ()
    assert embedding.fitted(large, "gemma3") is large


def test_lines_are_spread_over_the_text_and_none_comes_twice() -> None:
    text = "\n".join(
        [f"line number {number:03d} of many" for number in range(100)] + ["short", "line number 000 of many"]
    )
    found = embedding.lines_of("t", text.encode(), SAID, 4)
    assert found.texts == tuple(f"line number {number:03d} of many" for number in (0, 25, 50, 75))
    assert json.loads(found.data)[1] == "title: none | text: line number 025 of many"
    assert len(embedding.lines_of("t", text.encode(), SAID, 1000).texts) == 100


def test_similarity_is_what_it_says() -> None:
    """Against the definitions, computed line by line."""
    chance = np.random.default_rng(3)
    base = chance.normal(size=(9, 5)).astype(np.float32)
    mine = (base + 0.5 * chance.normal(size=(9, 5))).astype(np.float32)

    def cosine(a: Vectors, b: Vectors) -> float:
        return (
            float(sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)))
            / math.dist(a, 0 * a)
            / math.dist(b, 0 * b)
        )

    def nearest(rows: Vectors, number: int) -> int:
        return max(
            (other for other in range(9) if other != number), key=lambda other: cosine(rows[number], rows[other])
        )

    found = embedding.similarity(base, 3 * mine)  # lengths do not matter
    cosines = [cosine(a, b) for a, b in zip(base, mine, strict=True)]
    same = sum(nearest(base, number) == nearest(mine, number) for number in range(9)) / 9
    assert found["n_lines"] == 9
    assert found["n_embd"] == 5
    assert found["cosine"]["value"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found["cosine"]["se"] == pytest.approx(np.std(cosines, ddof=1) / 3, abs=1e-6)
    assert found["cosine_min"] == pytest.approx(min(cosines), abs=1e-6)
    assert found["same_nearest"]["value"] == pytest.approx(same)
    assert 0 < same < 1


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda v: v[:-1], "shape"),
        (lambda v: v[:, :-1], "shape"),
        (lambda v: np.where(v == v[1, 1], np.nan, v), "NaN or Inf"),
        (lambda v: np.where(v == v[1, 1], np.inf, v), "NaN or Inf"),
        (lambda v: v * np.arange(4)[:, None], "no direction"),
    ],
    ids=["fewer", "narrower", "nan", "inf", "zero"],
)
def test_vectors_that_cannot_be_compared_are_refused(spoil: Callable[[Vectors], Vectors], why: str) -> None:
    base = np.random.default_rng(3).normal(size=(4, 5)).astype(np.float32)
    with pytest.raises(VerificationError, match=why):
        embedding.similarity(base, spoil(base))


# --- the real build ------------------------------------------------------------------------------------------------


def test_the_set_is_whole(made: Report, facts: Manifest) -> None:
    assert facts.model.embedding == SAID
    assert facts.model.family == "EmbeddingGemma"
    models = {str(entry.recipe): entry for entry in facts.files if entry.kind == "model"}
    assert set(models) == set(RECIPES)
    for name, entry in models.items():
        assert entry.checks is not None
        assert entry.checks.load == "bindings"
        header = gguf_io.read_header(made.set_dir / entry.name)
        kept = "BF16" if name == "bf16" else "Q8_0"
        assert {header.by_name[f"dense_{number}.weight"].ggml_type.name for number in (2, 3)} == {kept}
        assert header.get("gemma-embedding.pooling_type") == 1  # mean
        assert header.get("tokenizer.ggml.add_eos_token") is True  # switched off for llama-imatrix alone
    assert facts.imatrix is not None
    assert facts.imatrix.n_entries == 6 * 7  # the matrices of six layers, not those after the pooling
    assert "--no-ppl" in facts.stages["imatrix"].argv[0]
    assert "--sentence-transformers-dense-modules" in facts.stages["convert"].argv[0]
    proof = [done for done in made.done if done.stage == "proof"]
    assert [done.why.partition(",")[0] for done in proof] == ["byte-identical to llama-quantize's"]


def test_low_bit_files_are_llama_quantizes(made: Report) -> None:
    """With the layers after the pooling pinned: without that llama-quantize makes none of few bits."""
    assert proof.prove_set(made.set_dir, sample=2) == ["IQ2_XS", "Q4_K_M"]


def test_llama_bench_reads_and_pools(build: Build, tmp_path: Path) -> None:
    argv = evaluate.bench_argv(build, tmp_path / "m.gguf", threads=3, gpu_layers=0, n_generate=0)
    assert argv[3:9] == ["-p", "512", "-n", "0", "-embd", "1"]
    row = '{"n_gen": 0, "n_prompt": 512, "samples_ts": [31.5]}'
    assert evaluate.parse_bench_log(row, 0) == ([31.5], [])
    with pytest.raises(ToolFailedError):
        evaluate.parse_bench_log(row)  # of a model that generates the other half is missing


def test_files_are_measured_by_their_embeddings(facts: Manifest) -> None:
    close = gates.closeness(facts)
    by_recipe = {str(entry.recipe): close[entry.name] for entry in facts.files if entry.kind == "model"}
    found = {name: figures for name, figures in by_recipe.items() if isinstance(figures, manifest.Similarity)}
    assert set(found) == set(RECIPES)
    assert all(facts.evidence[entry.sha256].quality is None for entry in facts.files if entry.kind == "model")
    assert {figures.n_lines for figures in found.values()} == {LINES}
    assert {figures.prompt for figures in found.values()} == {"title: none | text: "}
    assert found["bf16"].cosine.value == pytest.approx(1, abs=1e-6)
    assert found["bf16"].same_nearest.value == 1
    values = [found[name].cosine.value for name in ("bf16", "Q8_0", "Q4_K_M", "IQ2_XS")]
    assert values == sorted(values, reverse=True)
    assert values[1] > 0.999
    assert values[-1] < values[1] - 0.01  # else nothing was compared
    assert all(figures.cosine_min <= figures.cosine.value for figures in found.values())


NAN_SCALE = {"Q8_0": b"\x00\x7e", "BF16": b"\xc0\x7f"}  # where a block of Q8_0, and a weight of BF16, begins


def with_nan(made: Report, facts: Manifest, recipe: str, directory: Path) -> Path:
    """A copy of three files of the set, unmeasured, NaN in a matrix of the first layer of one of them.

    In one whose output is not quantised next: ggml's Q8_0 makes numbers of NaN, and the vectors are finite, if wrong.
    """
    copied = directory / made.set_dir.name
    copied.mkdir()
    kept = []
    for entry in facts.files:
        if entry.recipe not in ("bf16", "Q8_0", "Q4_K_M"):
            continue
        path = Path(shutil.copy(made.set_dir / entry.name, copied))
        if entry.recipe == recipe:
            tensor = gguf_io.read_header(path).by_name["blk.0.ffn_down.weight"]
            with path.open("r+b") as file:
                file.seek(tensor.offset)
                file.write(NAN_SCALE[tensor.ggml_type.name])
        kept.append(entry.model_copy(update={"sha256": sha256_file(path)}))
    manifest.save(facts.model_copy(update={"files": kept, "evidence": {}}), copied)
    return copied


def test_an_evaluation_notes_a_file_without_finite_embeddings_and_goes_on(
    made: Report, facts: Manifest, tmp_path: Path
) -> None:
    """It is marked, the others are measured, and the set is not published while it is in it."""
    how = Measuring(chunks=LINES, bench=("none",), threads=1)
    measured = evidence.evaluate_set(with_nan(made, facts, "Q8_0", tmp_path), how)
    entries = {str(entry.recipe): entry for entry in measured.files}
    found = measured.evidence[entries["Q8_0"].sha256]
    assert (found.quality, found.similarity) == (None, None)
    assert found.failed is not None
    assert (found.failed.mode, found.failed.n_chunks) == ("embedding", LINES)
    assert found.failed.why == "embeddings hold NaN or Inf, or have no direction"
    assert sorted(gates.closeness(measured)) == sorted(entries[name].name for name in ("bf16", "Q4_K_M"))
    why = f"gives no finite figures: {found.failed.why}"
    assert measured.gates.held == {entries["Q8_0"].name: why}
    assert "⛔ Broken: it gives no finite figures." in card.render(measured).replace("\u00a0", " ")

    local = {entry.name: LocalFile(entry.n_bytes, entry.sha256) for entry in measured.files}
    refused = publish.refusals(Candidate(measured, local, {}, publish.Listing(), "me/m"), publish.GATES_OF_FILES)
    assert [finding.what for finding in refused] == [f"{entries['Q8_0'].name}: {why}"]
    assert all(isinstance(finding, Finding) and finding.next_step for finding in refused)


def test_a_base_without_finite_embeddings_stops_the_evaluation(made: Report, facts: Manifest, tmp_path: Path) -> None:
    broken = with_nan(made, facts, "bf16", tmp_path)
    with pytest.raises(NoFiguresError, match=r"bf16\.gguf"):
        evidence.evaluate_set(broken, Measuring(chunks=LINES, bench=("none",), threads=1))
    assert manifest.load(broken).evidence == {}


def test_speed_is_that_of_reading(facts: Manifest) -> None:
    (speed,) = [found.speed for found in facts.evidence.values() if found.speed is not None]
    assert speed.generate_per_second is None
    assert speed.n_generate == 0
    assert speed.prompt_per_second.value > 0


def test_what_is_known_is_not_measured_again(made: Report, checkpoint: Path) -> None:
    again = factory.run(options(checkpoint, made.set_dir.parent))
    assert [done.name for done in again.done if done.made] == []
    assert [done.why for done in again.done if done.stage == "evaluate" and "cosine" in done.why]


def test_no_cache_is_counted(facts: Manifest) -> None:
    """A text is read whole, in both directions: llama.cpp keeps no keys and values of it."""
    assert facts.context is not None
    assert facts.context.cache == []
    (said,) = facts.context.measured
    assert (said.n_ctx, said.cache_bytes) == (2048, 0)
    assert said.compute_bytes > 0
    assert memory.context_bytes(facts.context, 2048) == (said.compute_bytes + said.output_bytes, True)


REFERENCE = """
import json, sys
import numpy as np, torch
from safetensors.torch import load_file
from transformers import AutoModel
checkpoint, ids, out = sys.argv[1:]
model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
dense = [load_file(f"{checkpoint}/{name}/model.safetensors")["linear.weight"] for name in ("2_Dense", "3_Dense")]
with torch.inference_mode():
    states = [model(torch.tensor([row])).last_hidden_state[0] for row in json.loads(ids)]
    rows = [state.mean(0) @ dense[0].T @ dense[1].T for state in states]
np.stack([row.numpy() for row in rows]).astype(np.float32).tofile(out)
"""


def test_the_base_gives_the_vectors_of_the_checkpoint(
    made: Report, checkpoint: Path, build: Build, tmp_path: Path, log: RunLog
) -> None:
    """transformers and the definition of the modules against llama.cpp: both directions, pooling, dense layers."""
    texts = ["a hat", "the thing in the water is an hour old", "on and on " * 30]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    base = made.set_dir / f"{STEM}-bf16.gguf"
    settings = {"out": str(tmp_path / "ours")}
    answer = llama_cpp.ask_bindings(build, "embed", base, tmp_path / "texts.json", log, settings=settings)
    assert answer == {"n_texts": 3, "n_embd": 256, "all_finite": True, "varied": True}
    ids = [tokenized(build, base, text) for text in texts]
    assert [(row[0], row[-1]) for row in ids] == [(2, 1)] * 3  # BOS and EOS
    argv = [sys.executable, "-W", "ignore", "-c", REFERENCE, str(checkpoint), json.dumps(ids), str(tmp_path / "theirs")]
    subprocess.run(argv, check=True, capture_output=True)
    ours, theirs = (np.fromfile(tmp_path / name, np.float32).reshape(3, 256) for name in ("ours", "theirs"))
    found = embedding.similarity(theirs, ours)
    assert found["cosine_min"] > 0.9999  # the base's dense layers are BF16


def tokenized(build: Build, model: Path, text: str) -> list[int]:
    code = (
        "import json, sys, llama_cpp; llama = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False); "
        "print(json.dumps(llama.tokenize(sys.argv[2].encode(), add_bos=True, special=False)))"
    )
    env = {**llama_cpp.python_env(build)}
    argv = [sys.executable, "-W", "ignore", "-c", code, str(model), text]
    done = subprocess.run(argv, env=env, check=True, capture_output=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", ["bf16", "Q8_0"])
def test_a_base_that_lost_a_dense_layer_is_refused(name: str, made: Report) -> None:
    header = gguf_io.read_header(made.set_dir / f"{STEM}-{name}.gguf")
    embedding.check_base(header, SAID)
    with pytest.raises(VerificationError, match="holds 2 of the 1 dense layers"):
        embedding.check_base(header, SAID.model_copy(update={"dense": ["2_Dense"]}))


# --- the card ------------------------------------------------------------------------------------------------------


def test_the_card_tells_of_embeddings(facts: Manifest) -> None:
    page = card.render(facts)
    assert "| Filename | Quant | Size | Split | bpw | Cosine ± se | Least | Same nearest | " in page
    assert "| query | `task: search result \\| query: ` |\n| document | `title: none \\| text: ` |\n" in page
    assert "llama-server -hf YOUR_NAMESPACE/google_tiny-embedding-GGUF:Q4_K_M --embeddings -b 2048 -ub 2048\n" in page
    assert "Measured on 40 lines (vectors of 256 numbers)" in page
    assert "pipeline_tag: sentence-similarity\n" in page
    for word in ("KLD", "perplexity", "PPL", "chat template", "continues text", "length of the context", "tg64"):
        assert word not in page, word
    assert re.search(
        r"\| \[google_tiny-embedding-Q8_0\.gguf\]\(\S+\) \| Q8_0 \| \S+ \| false \| \S+ \| 0\.999\d+ ±", page
    )


@pytest.mark.parametrize("theme", ["modern", "classic"])
@pytest.mark.parametrize("tag", list(card.LANGUAGES))
def test_it_is_whole_in_every_theme_and_language(theme: str, tag: str, facts: Manifest) -> None:
    chosen = facts.card.model_copy(update={"theme": theme, "languages": list(card.LANGUAGES)})
    page = card.render(facts.model_copy(update={"card": chosen}), language=tag)
    assert page.count("0.99") >= 1
    assert not re.search(r"[^\n|]\n#|\| \n|\n{4}", page.partition("\n---\n")[2])


def test_pictures_show_the_distance_of_embeddings(facts: Manifest) -> None:
    data = pictures.all_data(facts)
    assert set(data) == {"quality", "speed", "coverage"}
    points = {point["label"]: point["kld"] for point in data["quality"]["points"]}
    assert points["IQ2_XS"] > points["Q4_K_M"] > points["Q8_0"] > 0
    drawn = pictures.draw("quality", data["quality"])
    assert drawn.png.startswith(b"\x89PNG")
    pictures.draw("speed", data["speed"])
    assert set(facts.pictures) == set(data)


def test_which_file_is_chosen_by_cosine(facts: Manifest) -> None:
    choices = memory.choices(facts)
    assert choices is not None
    assert choices.by_kld
    best = min(
        (entry for entry in facts.files if entry.kind == "model" and entry.recipe != "bf16"),
        key=lambda entry: gates.distance(gates.closeness(facts)[entry.name]).value,
    )
    assert choices.rows[-1].cells[0].entry == best


def test_the_server_of_the_card_answers(facts: Manifest, made: Report, build: Build, tmp_path: Path) -> None:
    """Also for a text of more tokens than llama-server reads at once by itself."""
    page = card.render(facts)
    (argv,) = [argv for argv in lines(page, "llama-server") if argv[1] == "-m"]
    (tmp_path / argv[2]).symlink_to(made.set_dir / argv[2])
    env = {"PATH": f"{build.bin_dir}", "HOME": str(tmp_path)}
    (question,) = lines(page, "curl")
    with running(argv, tmp_path, env) as address:
        answered = ask(address, question)
        long = ask(address, question, input="on and on " * 150)
    vector = answered["data"][0]["embedding"]
    assert len(vector) == 256
    assert math.hypot(*vector) == pytest.approx(1, abs=1e-4)
    assert long["usage"]["prompt_tokens"] > 512
    assert json.loads(question[-1])["input"] == "task: search result | query: Which planet is the largest?"


def test_the_python_of_the_card_answers(facts: Manifest, made: Report, build: Build, tmp_path: Path) -> None:
    (code,) = blocks(card.render(facts), "python")
    name = next(entry.name for entry in facts.files if entry.recipe == "Q4_K_M")
    (tmp_path / name).symlink_to(made.set_dir / name)
    local = re.sub(r"hf_hub_download\(\"[^\"]+\", (\"[^\"]+\")\)", r"\1", code).replace(
        "from huggingface_hub import hf_hub_download\n", ""
    )
    assert local.count(name) == 1
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", local],
        cwd=tmp_path,
        env=llama_cpp.python_env(build),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    assert -1 <= float(done.stdout.splitlines()[-1]) <= 1


@pytest.mark.proof
def test_embedding_all_recipes(checkpoint: Path, build: Build, tmp_path: Path) -> None:
    """Every recipe, the low-bit ones included, loads and is measured."""
    report = factory.run(options(checkpoint, tmp_path, tuple(recipes.TABLE)))
    facts = manifest.load(report.set_dir)
    assert len(gates.closeness(facts)) == len(recipes.TABLE)
