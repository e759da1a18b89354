"""The whole factory on a small real checkpoint with the real llama.cpp build."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma_gguf import card, factory, gguf_io, imatrix, manifest, memory, planning, proof, recipes
from gemma_gguf.errors import BadInputError, VerificationError
from gemma_gguf.files import HashMemory
from gemma_gguf.session import Options, Report
from tests import sparse_models

STEM = "test_tiny-vision"


@pytest.fixture
def copied(finished: Report, tmp_path: Path) -> Path:
    """A copy of the finished set that a test may damage."""
    return Path(shutil.copytree(finished.set_dir, tmp_path / finished.set_dir.name))


@pytest.fixture
def again(finished: Report, set_options: Options, tmp_path: Path) -> Options:
    """Options for another output directory that starts from the finished set's base and imatrix."""
    return replace(
        set_options,
        out=tmp_path / "again",
        base=finished.set_dir / f"{STEM}-bf16.gguf",
        imatrix=finished.set_dir / f"{STEM}-imatrix.gguf",
        proof=False,
    )


def test_set_holds_exactly_what_the_hub_repo_will(finished: Report) -> None:
    expected = {f"{STEM}-{name}.gguf" for name in recipes.DEFAULT_NAMES}
    expected |= {f"mmproj-{STEM}-{kind}.gguf" for kind in ("f16", "bf16", "f32")}
    expected |= {f"{STEM}-imatrix.gguf", "README.md", "quantset.json", "assets"}
    assert {path.name for path in finished.set_dir.iterdir()} == expected
    assert len(recipes.DEFAULT_NAMES) == 27
    drawn = manifest.load(finished.set_dir).pictures
    assert {path.name for path in (finished.set_dir / "assets").iterdir()} == {
        f"{name}.{kind}" for name in drawn for kind in ("svg", "png")
    }
    assert "coverage" in drawn


def test_manifest_tells_the_truth_about_every_file(finished: Report) -> None:
    facts = manifest.load(finished.set_dir)
    hashes = HashMemory(finished.set_dir / "unused", rehash=True)
    for entry in facts.files:
        path = finished.set_dir / entry.name
        assert (entry.n_bytes, entry.sha256) == (path.stat().st_size, hashes.sha256(path)), entry.name
        assert entry.types == gguf_io.read_header(path).type_histogram()
        if entry.kind != "imatrix":
            assert entry.checks is not None
            assert entry.checks.load == "bindings"
    assert facts.imatrix is not None
    assert facts.imatrix.n_chunks == 8
    assert facts.imatrix.datasets == ["calibration-default.txt"]


def test_nothing_tells_of_this_machine(finished: Report, set_options: Options) -> None:
    """Neither manifest, card nor any key holds the output directory, the checkpoint's place, or a home."""
    for name in ("quantset.json", "README.md"):
        text = (finished.set_dir / name).read_text()
        for place in (set_options.out, Path(set_options.model).parent, Path.home(), Path.cwd()):
            assert str(place) not in text, (name, place)
    for path in finished.set_dir.glob("*.gguf"):
        for key, text in gguf_io.read_header(path).strings():
            assert not text.startswith("/"), (path.name, key)


def test_low_bit_types_are_really_used(finished: Report) -> None:
    for recipe, kind in (("Q4_K_M", "Q4_K"), ("IQ2_XS", "IQ2_XS"), ("IQ3_XXS", "IQ3_XXS"), ("Q2_K", "Q2_K")):
        header = gguf_io.read_header(finished.set_dir / f"{STEM}-{recipe}.gguf")
        assert header.type_histogram()[kind] > 0, recipe


def test_large_row_differs_in_the_embedding_alone(finished: Report) -> None:
    plain = gguf_io.read_header(finished.set_dir / f"{STEM}-Q4_K_M.gguf")
    large = gguf_io.read_header(finished.set_dir / f"{STEM}-Q4_K_L.gguf")
    differing = [
        a.name
        for a, b in zip(plain.tensors, large.tensors, strict=True)
        if a.ggml_type is not b.ggml_type or not np.array_equal(plain.read(a), large.read(b))
    ]
    assert differing == ["token_embd.weight"]
    assert large.by_name["token_embd.weight"].ggml_type.name == "Q8_0"
    entry = manifest.load(finished.set_dir).file(large.path.name)
    assert entry is not None
    assert (entry.parent, entry.differs) == ("Q4_K_M", ["token_embd.weight"])


def test_projectors_hold_the_tower_three_times(finished: Report) -> None:
    headers = {
        kind: gguf_io.read_header(finished.set_dir / f"mmproj-{STEM}-{kind}.gguf") for kind in ("f16", "bf16", "f32")
    }
    assert len({tuple(sorted(header.by_name)) for header in headers.values()}) == 1
    assert headers["f32"].file_size > headers["f16"].file_size
    assert all(header.n_elements > 90_000 for header in headers.values())


def test_second_run_keeps_everything_and_says_why(finished: Report, set_options: Options) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.set_dir.iterdir()}
    report = factory.run(set_options)
    assert [done.name for done in report.done if done.made] == []
    assert {done.why for done in report.done if done.stage == "quantize"} == {
        "inputs, recipe and build unchanged, file whole"
    }
    gguf_files = {path: mtime for path, mtime in before.items() if path.suffix == ".gguf"}
    assert {path: path.stat().st_mtime_ns for path in gguf_files} == gguf_files


def test_work_directory_can_be_deleted(finished: Report, set_options: Options, tmp_path: Path) -> None:
    """The bf16 row is the base, so nothing is converted again; a missing quant alone is made."""
    out = tmp_path / "out"
    shutil.copytree(finished.set_dir, out / finished.set_dir.name)
    (out / finished.set_dir.name / f"{STEM}-Q8_0.gguf").unlink()
    report = factory.run(replace(set_options, out=out, proof=False))
    assert [done.name for done in report.done if done.made and done.stage != "card"] == [f"{STEM}-Q8_0.gguf"]


def test_changed_file_is_made_again_with_the_same_bytes(finished: Report, again: Options) -> None:
    few = replace(again, recipes=("Q4_0", "Q8_0"))
    first = factory.run(few)
    path = first.set_dir / f"{STEM}-Q4_0.gguf"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    report = factory.run(few)
    made = {done.name: done.why for done in report.done if done.made and done.stage == "quantize"}
    assert made == {path.name: "file missing or changed"}
    assert path.read_bytes() == good == (finished.set_dir / path.name).read_bytes()


def test_unknown_recipe_is_refused_before_any_work(set_options: Options, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="unknown recipe 'Q4_K_X'") as caught:
        factory.run(replace(set_options, out=tmp_path / "out", recipes=("Q4_K_X",)))
    assert "Q4_K_M" in (caught.value.next_step or "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["convert", "imatrix"])
def test_stages_stop_where_asked(stage: str, again: Options) -> None:
    report = factory.run(replace(again, until=stage))
    assert not list(report.set_dir.glob("*Q4_K_M*"))
    assert (report.set_dir / f"{STEM}-imatrix.gguf").exists() == (stage == "imatrix")


def test_quantised_base_is_refused(finished: Report, again: Options) -> None:
    with pytest.raises(BadInputError, match="quantised already"):
        factory.run(replace(again, base=finished.set_dir / f"{STEM}-Q8_0.gguf"))


def test_imatrix_of_another_model_is_refused(finished: Report, again: Options, tmp_path: Path) -> None:
    """A name the base does not have is enough; the file is otherwise a good imatrix."""
    data = (finished.set_dir / f"{STEM}-imatrix.gguf").read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(data.replace(b"blk.0.attn_q.weight", b"blk.9.attn_q.weight"))
    assert "blk.9.attn_q.weight" in imatrix.read(other).entries
    with pytest.raises(VerificationError, match=r"of another model: blk\.9\.attn_q\.weight"):
        factory.run(replace(again, imatrix=other))
    assert not list((again.out / f"{STEM}-GGUF").glob("*.gguf"))


def test_verify_finds_what_is_wrong(copied: Path) -> None:
    assert {result.problem for result in proof.verify_set(copied)} == {None}
    flipped, cut, gone = (copied / f"{STEM}-{name}.gguf" for name in ("Q6_K", "Q3_K_S", "Q2_K"))
    data = bytearray(flipped.read_bytes())
    data[-100] ^= 0xFF
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-4096])
    gone.unlink()
    shutil.copy(copied / f"{STEM}-Q8_0.gguf", copied / "extra.gguf")
    problems = {result.name: result.problem for result in proof.verify_set(copied) if result.problem}
    assert set(problems) == {flipped.name, cut.name, gone.name, "extra.gguf"}
    assert "sha256" in (problems[flipped.name] or "")
    assert "past the end" in (problems[cut.name] or "")
    assert problems[gone.name] == "missing"
    assert problems["extra.gguf"] == "not in quantset.json"


@pytest.mark.parametrize("engine", ["fanout", "llama-quantize"])
def test_disk_budget_is_refused_before_work_with_what_would_fit(again: Options, engine: str) -> None:
    with pytest.raises(BadInputError, match="are missing") as caught:
        factory.run(replace(again, disk_budget=4_000_000, engine=engine))
    assert "--recipes IQ2_XXS,IQ2_XS" in (caught.value.next_step or "")
    assert not list((again.out / ".work" / STEM).glob("*Q4_K_M.partial*"))


def test_set_larger_than_the_disk_is_made_in_waves(finished: Report, again: Options, tmp_path: Path) -> None:
    """Whoever takes finished files away gets the same bytes, and never more than the budget lies on the disk."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    set_dir, work = again.out / f"{STEM}-GGUF", again.out / ".work" / STEM
    most = 0

    def take_away(path: Path) -> None:
        nonlocal most
        new = [*set_dir.glob(f"{STEM}-[QI]*.gguf"), *work.glob("*.partial.gguf")]
        most = max(most, sum(file.stat().st_size for file in new))
        path.rename(elsewhere / path.name)

    names = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
    options = replace(again, recipes=names, disk_budget=5_500_000, proof=True, until="quantize")
    report = factory.run(options, take_away=take_away)
    assert 0 < most <= 5_500_000
    assert [done.stage for done in report.done].count("proof") == 1
    for name in names:
        file = f"{STEM}-{name}.gguf"
        assert (elsewhere / file).read_bytes() == (finished.set_dir / file).read_bytes(), name
    assert most < sum(path.stat().st_size for path in elsewhere.iterdir())


def test_card_follows_the_manifest(copied: Path) -> None:
    """A number changed in quantset.json changes README.md; nothing else feeds it."""
    path = copied / "quantset.json"
    raw = json.loads(path.read_text())
    raw["imatrix"]["n_chunks"] = 4321
    path.write_text(json.dumps(raw))
    assert factory.write_card(copied, card.Renderer())
    assert "4321 chunks" in (copied / "README.md").read_text()
    assert not factory.write_card(copied, card.Renderer())


def test_a_run_records_what_only_the_base_knows(finished: Report) -> None:
    """What a context takes, as llama.cpp says; prompts of the model's own template; what the imatrix saw."""
    made = manifest.load(finished.set_dir)
    assert made.context is not None
    assert [said.n_ctx for said in made.context.measured] == [2048]
    (said,) = made.context.measured
    assert said.cache_bytes == memory.cache_bytes(made.context, 2048)
    assert made.prompts is not None
    assert {example.kind: example.text for example in made.prompts.examples} == {
        "plain": "<bos><start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n",
        "system": "<bos><start_of_turn>system\n{system_prompt}<end_of_turn>\n"
        "<start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n",
    }
    assert made.imatrix is not None
    n_tokens = made.imatrix.n_chunks * made.imatrix.chunk_size
    assert {row.kind for row in made.imatrix.coverage} == {
        *("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    for row in made.imatrix.coverage:
        assert (row.layers, row.tokens_min, row.unseen) == ([0, 1, 2], [n_tokens] * 3, [0] * 3)
        assert all(0 < value <= 1 for value in row.evenness)


def test_templates_get_the_first_and_last_token_of_the_files_own_keys(tmp_path: Path) -> None:
    header = gguf_io.read_header(sparse_models.write(tmp_path / "a.gguf", sparse_models.SHAPES["gemma-3-1b"]))
    render = factory._renderer(header)
    template = "{{ bos_token }}|{{ messages[0]['content'] }}|{{ eos_token }}"
    assert render(template, [{"role": "user", "content": "Hi"}], None) == "<bos>|Hi|<eos>"


@pytest.mark.parametrize("given", [False, True], ids=["imatrix computed", "imatrix given"])
def test_facts_that_an_older_version_did_not_record_are_added(set_options: Options, copied: Path, given: bool) -> None:
    """A set of schema 1 is completed by the next run, without converting or measuring anything anew."""
    options = replace(set_options, out=copied.parent, proof=False, recipes=("bf16",))
    if given:
        options = replace(options, imatrix=copied.rename(copied.with_name("before")) / f"{STEM}-imatrix.gguf")
        factory.run(options)
    whole = manifest.load(copied)
    raw = json.loads(whole.model_dump_json())
    raw["context"] = raw["prompts"] = None
    raw["imatrix"]["coverage"] = []
    del raw["stages"]["describe"]
    (copied / "quantset.json").write_text(json.dumps(raw))
    report = factory.run(options)
    assert [done.name for done in report.done if done.made and done.stage != "card"] == []
    now = manifest.load(copied)
    assert (now.context, now.prompts, now.imatrix) == (whole.context, whole.prompts, whole.imatrix)


# --- planning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_imatrix", [True, False], ids=["base-and-imatrix", "base-alone"])
def test_plan_is_exact_to_the_byte(finished: Report, again: Options, with_imatrix: bool) -> None:
    """Also before there is an imatrix: a placeholder of the final names stands in for it."""
    options = replace(again, imatrix=again.imatrix if with_imatrix else None)
    planned = planning.plan_set(options)
    assert planned.exact
    assert planned.basis == ("base and imatrix" if with_imatrix else "base, and an imatrix to come")
    sizes = {row.recipe: row.n_bytes for row in planned.files}
    facts = manifest.load(finished.set_dir)
    assert sizes == {entry.recipe: entry.n_bytes for entry in facts.files if entry.recipe}
    assert {row.recipe: row.types for row in planned.files} == {e.recipe: e.types for e in facts.files if e.recipe}
    assert planned.asked_seconds is not None
    assert planned.distinct_seconds is not None
    assert planned.asked_seconds > planned.distinct_seconds > 0
    assert planned.peak_bytes == sum(size for name, size in sizes.items() if name != "bf16")
    assert planned.fits
    assert len(planned.waves) == 1
    assert not list((again.out / f"{STEM}-GGUF").glob("*.gguf"))


def test_plan_shows_the_waves_of_a_small_budget(again: Options) -> None:
    planned = planning.plan_set(replace(again, disk_budget=6_000_000))
    assert not planned.fits
    assert len(planned.waves) > 1
    sizes = {row.recipe: row.n_bytes for row in planned.files}
    assert sorted(name for wave in planned.waves for name in wave) == sorted(set(sizes) - {"bf16"})
    assert all(sum(sizes[name] for name in wave) <= 6_000_000 for wave in planned.waves)


def test_plan_before_anything_exists_is_marked_as_an_estimate(set_options: Options, tmp_path: Path) -> None:
    planned = planning.plan_set(replace(set_options, out=tmp_path / "out"))
    assert (planned.exact, planned.basis, planned.distinct_seconds) == (False, "the number of parameters", None)
    sizes = {row.recipe: row.n_bytes for row in planned.files}
    assert sizes["bf16"] > sizes["Q8_0"] > sizes["Q4_K_M"] > sizes["IQ2_XXS"] > 0
