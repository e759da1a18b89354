"""Files over the split limit: every shard is llama-gguf-split's, byte for byte, and a set with shards is a set."""

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gguf.constants import GGMLQuantizationType
from huggingface_hub import constants

from gemma_gguf import (
    card,
    evidence,
    factory,
    fanout,
    gates,
    gguf_io,
    manifest,
    names,
    planning,
    proof,
    refresh,
    shards,
    table,
)
from gemma_gguf.cli import main
from gemma_gguf.errors import BadInputError, GemmaGGUFError
from gemma_gguf.files import preallocate, replace_folder_durably, sha256_file, write_at
from gemma_gguf.llama_cpp import Build
from gemma_gguf.manifest import FileDecision, FileEntry, Manifest, Shard
from gemma_gguf.session import Done, Options, PublishOptions
from tests import hub
from tests.examples import STEM, example, sha
from tests.test_refresh import fix_template

MB = shards.MEGABYTE
LIMIT = 1 * MB
NAME = "test_tiny-text"
CUT = ("bf16", "Q8_0", "Q4_K_M")  # over the limit; IQ2_XS is not
F32 = GGMLQuantizationType.F32


# --- where it is cut ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        pytest.param([10, 10], 64, [2], id="all-in-one"),
        pytest.param([10, 10], 63, [1, 1], id="padding-counts"),
        pytest.param([32, 32, 32], 64, [2, 1], id="full-shard"),
        pytest.param([32, 320, 32], 64, [1, 1, 1], id="larger-than-the-limit-is-alone"),
        pytest.param([32, 320], 64, [1, 1], id="larger-than-the-limit-at-the-end"),
        pytest.param([32, 32, 320, 320, 32, 32], 64, [2, 1, 1, 2], id="two-large-ones"),
        pytest.param([500], 512, [1], id="one-tensor"),
    ],
)
def test_counts(sizes: list[int], limit: int, expected: list[int]) -> None:
    assert shards.counts(sizes, limit) == expected


def test_first_tensor_over_the_limit_is_refused_as_the_tool_does() -> None:
    with pytest.raises(BadInputError, match="the first tensor alone takes 320 bytes, more than the 64") as caught:
        shards.counts([320, 32], 64)
    assert caught.value.next_step == "Raise --split-max-size."


@pytest.mark.parametrize(
    ("cut", "recorded", "expected"),
    [
        pytest.param([[1, 1], [1]], 2 * MB, 2 * MB, id="recorded"),
        pytest.param([[1, 1], [1]], 50 * MB, 2 * MB, id="of-an-earlier-run"),
        pytest.param([[1], [9], [2, 3], [4]], 50 * MB, 5 * MB, id="one-is-larger-than-the-limit"),
        pytest.param([[2], [9]], MB, 2 * MB, id="recorded-is-below-the-first"),
    ],
)
def test_limit_that_shards_were_cut_at(cut: list[list[int]], recorded: int, expected: int, tmp_path: Path) -> None:
    """Sizes of tensors in megabytes; what is found cuts just so."""
    rows = [
        (f"t{shard}.{n}", (size * MB,), GGMLQuantizationType.I8)
        for shard, own in enumerate(cut)
        for n, size in enumerate(own)
    ]
    parts, at = [], 0
    for number, own in enumerate(cut):
        header = gguf_io.header_of([], rows[at : at + len(own)])
        path = tmp_path / f"{number}.gguf"
        preallocate(path, header.file_size)
        write_at(path, header.data, 0)
        parts.append(gguf_io.read_header(path))
        at += len(own)
    assert shards.limit_of(parts, recorded) == expected
    assert shards.is_cut_at(parts, expected)


def test_names() -> None:
    assert shards.name("a-Q8_0", 0, 12) == "a-Q8_0-00001-of-00012.gguf"


def test_folder_gets_its_name_at_once(tmp_path: Path) -> None:
    """The new folder takes the place of the old one; no file of the old one stays."""
    new, old = tmp_path / "a.partial", tmp_path / "set" / "a"
    for folder, files in ((new, ["1", "2"]), (old, ["1", "2", "3"])):
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).write_text(str(folder))
    replace_folder_durably(new, old)
    assert [(path.name, path.read_text()) for path in sorted(old.iterdir())] == [("1", str(new)), ("2", str(new))]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# --- a set with shards ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A finished set of one file and three folders of shards, and the same recipes whole."""

    options: Options
    set_dir: Path
    said: list[Done]

    @property
    def facts(self) -> Manifest:
        return manifest.load(self.set_dir)

    def entry(self, recipe: str) -> FileEntry:
        entry = self.facts.made(recipe)
        assert entry is not None
        return entry

    @property
    def work(self) -> Path:
        return self.options.out / ".work" / NAME


@pytest.fixture(scope="module")
def made(build: Build, text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    assert build.key
    options = Options(
        str(text_checkpoint),
        name=NAME.replace("_", "/"),
        out=tmp_path_factory.mktemp("shards"),
        chunks=8,
        recipes=(*CUT, "IQ2_XS"),
        split_max_size=LIMIT,
        eval_chunks=2,
        bench=("Q8_0",),
        kernels="ggml",
    )
    said: list[Done] = []
    return Made(options, factory.run(options, say=said.append).set_dir, said)


def quantised(build: Build, made: Made, recipe: str, directory: Path) -> Path:
    """The whole file of a recipe: the base, or what llama-quantize writes in the work directory of the set."""
    if recipe == "bf16":
        return made.work / f"{NAME}-bf16.gguf"
    argv = list(made.entry(recipe).argv)
    out = directory / f"{NAME}-{recipe}.gguf"
    argv = [
        str(build.tool(argv[0])),
        *(str(out) if word.endswith(f"{recipe}.partial.gguf") else word for word in argv[1:]),
    ]
    subprocess.run(argv, cwd=made.set_dir, check=True, capture_output=True)
    return out


@pytest.mark.parametrize("recipe", CUT)
def test_every_shard_is_the_tools(build: Build, made: Made, recipe: str, tmp_path: Path) -> None:
    """The oracle is asked here: llama-quantize, then llama-gguf-split, none of our code between."""
    whole = quantised(build, made, recipe, tmp_path)
    prefix = tmp_path / "cut" / f"{NAME}-{recipe}"
    prefix.parent.mkdir()
    tool = [str(word) for word in (build.tool("llama-gguf-split"), "--split", "--split-max-size", "1M", whole, prefix)]
    subprocess.run(tool, check=True, capture_output=True)
    entry = made.entry(recipe)
    reference = {f"{NAME}-{recipe}/{path.name}": sha256_file(path) for path in prefix.parent.iterdir()}
    assert len(reference) > 1
    assert {shard.name: shard.sha256 for shard in entry.shards} == reference
    assert {
        path.relative_to(made.set_dir).as_posix(): sha256_file(path)
        for path in (made.set_dir / f"{NAME}-{recipe}").iterdir()
    } == reference
    assert entry.sha256 == sha256_file(whole), "a model has one hash, whole or in shards"
    parts = shards.read([made.set_dir / shard.name for shard in entry.shards])
    shards.join(parts, tmp_path / "joined.gguf")
    assert sha256_file(tmp_path / "joined.gguf") == entry.sha256
    assert entry.n_bytes == sum((made.set_dir / shard.name).stat().st_size for shard in entry.shards)


def test_a_set_with_shards_is_whole(made: Made) -> None:
    facts = made.facts
    assert [bool(made.entry(recipe).shards) for recipe in (*CUT, "IQ2_XS")] == [True, True, True, False]
    assert all(entry.checks and entry.checks.load == "bindings" for entry in facts.files if entry.kind == "model")
    assert [result.problem for result in proof.verify_set(made.set_dir)] == [None] * 5
    assert sorted(path.name for path in made.work.rglob("*.gguf")) == [f"{NAME}-bf16.gguf"]
    assert not list(made.set_dir.rglob("*.partial*"))


def test_shards_are_measured_like_files(made: Made) -> None:
    """Quality of every file and of the base once; the bf16 row in shards is the base, and not measured again."""
    facts = made.facts
    assert sorted(gates.qualities(facts)) == sorted(entry.name for entry in facts.files if entry.kind == "model")
    assert made.entry("bf16").sha256 == gates.base_sha256(facts)
    speed = facts.evidence[made.entry("Q8_0").sha256].speed
    assert speed is not None
    assert speed.prompt_per_second.value > 0


def test_card_links_the_folder_and_names_the_first_shard(made: Made) -> None:
    entry = made.entry("Q8_0")
    folder = f"{NAME}-Q8_0"
    text = card.render(made.facts)
    assert f"| [{folder}](./{folder}) | Q8_0 | {table.gigabytes(entry.n_bytes)} | true |" in text
    assert f"| [{NAME}-IQ2_XS.gguf](./{NAME}-IQ2_XS.gguf) | IQ2_XS |" in text
    assert f'--include "{folder}/*"' in text or f'--include "{NAME}-bf16/*"' in text
    assert "--split-max-size 1MB" in text
    published = made.facts.model_copy(update={"card": made.facts.card.model_copy(update={"repo": "me/x"})})
    assert f"| [{folder}](https://huggingface.co/me/x/tree/main/{folder}) |" in card.render(published)


def test_listing_of_the_set_can_be_picked_from(made: Made) -> None:
    listed = sorted(path.relative_to(made.set_dir).as_posix() for path in made.set_dir.rglob("*.*"))
    assert names.ambiguous_tags(listed) == {}
    found = names.picked(listed, "Q8_0")
    assert found is not None
    assert (found.model, list(found.files)) == (
        made.entry("Q8_0").name,
        [shard.name for shard in made.entry("Q8_0").shards],
    )


def ask(port: int, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_the_real_server_loads_shards_from_a_hub(build: Build, made: Made, tmp_path: Path) -> None:
    """`llama-server -hf REPO:Q8_0` downloads every shard, loads the model and answers."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with hub.serving() as there:
        there.repo("test/tiny-GGUF").commit(made.set_dir, "main")
        argv = [str(build.tool("llama-server")), "-hf", "test/tiny-GGUF:q8_0", "-c", "64", "-t", "1"]
        argv += ["--host", "127.0.0.1", "--port", str(port)]
        environment = {**there.environment(tmp_path / "home"), "LLAMA_CACHE": str(tmp_path / "cache")}
        with (tmp_path / "log").open("wb") as log:
            server = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 300
            status = 0
            while status != 200 and server.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
                with contextlib.suppress(OSError):
                    status, _ = ask(port, "GET", "/health")
            assert status == 200, (tmp_path / "log").read_text()
            answer = json.loads(ask(port, "POST", "/completion", json.dumps({"prompt": "The", "n_predict": 2}))[1])
            assert answer["tokens_predicted"] == 2
            assert answer["model"] == "test/tiny-GGUF:q8_0"
        finally:
            server.kill()
            server.wait()
        got = {path.rpartition("/")[2] for r in there.requests if "/large/" in (path := r.path)}
    assert got == {Path(shard.name).name for shard in made.entry("Q8_0").shards}


def test_sizes_of_a_plan_are_those_of_the_files(made: Made) -> None:
    planned = planning.plan_set(made.options)
    assert {row.recipe: (row.n_bytes, row.shards) for row in planned.files} == {
        str(entry.recipe): (entry.n_bytes, len(entry.shards)) for entry in made.facts.files if entry.kind == "model"
    }


def copied(made: Made, directory: Path) -> Made:
    shutil.copytree(made.options.out, directory / "out")
    options = replace(made.options, out=directory / "out", evaluate=False, proof=False)
    return Made(options, directory / "out" / made.set_dir.name, [])


def again(made: Made, **changes: Any) -> dict[str, str]:
    """{recipe: why it was made} of one more run of the set."""
    said: list[Done] = []
    factory.run(replace(made.options, until="quantize", **changes), say=said.append)
    made_now = {done.name: done.why for done in said if done.stage == "quantize" and done.made}
    return {str(entry.recipe): made_now[entry.name] for entry in made.facts.files if entry.name in made_now}


def test_damage_is_found_and_mended(made: Made, tmp_path: Path) -> None:
    """A changed byte, a missing shard and a shard of another set; the same run makes again what is bad, no other."""
    bad = copied(made, tmp_path)
    first, second = (bad.set_dir / shard.name for shard in bad.entry("Q8_0").shards[:2])
    data = bytearray(second.read_bytes())
    data[-100] ^= 1
    second.write_bytes(data)
    (bad.set_dir / bad.entry("Q4_K_M").shards[1].name).unlink()
    problems = {result.name: result.problem for result in proof.verify_set(bad.set_dir) if result.problem}
    assert problems == {
        bad.entry("Q8_0").name: f"the sha256 of {bad.entry('Q8_0').shards[1].name} is not the recorded one",
        bad.entry("Q4_K_M").name: f"missing: {bad.entry('Q4_K_M').shards[1].name}",
    }
    first.write_bytes((bad.set_dir / bad.entry("bf16").name).read_bytes())
    assert any(f"{first} says" in str(result.problem) for result in proof.verify_set(bad.set_dir))
    (bad.work / f"{NAME}-bf16.gguf").unlink()  # the base comes back from its shards
    assert again(bad) == {"Q8_0": "file missing or changed", "Q4_K_M": "not made yet"}
    assert {entry.name: entry.sha256 for entry in bad.facts.files} == {
        entry.name: entry.sha256 for entry in made.facts.files
    }
    assert [result.problem for result in proof.verify_set(bad.set_dir)] == [None] * 5


def test_another_limit_makes_what_it_changes(made: Made, tmp_path: Path) -> None:
    """Whole again, with the same hash; no file of the other form is left."""
    other = copied(made, tmp_path)
    assert again(other, split_max_size=3 * MB, engine="llama-quantize") == {
        "bf16": "another split limit",
        "Q8_0": "another split limit",
        "Q4_K_M": "another split limit",
    }
    facts = other.facts
    assert {e.recipe: len(e.shards) for e in facts.files if e.recipe} == {
        "bf16": 2,
        "Q8_0": 0,
        "Q4_K_M": 0,
        "IQ2_XS": 0,
    }
    assert {e.recipe: e.sha256 for e in facts.files} == {e.recipe: e.sha256 for e in made.facts.files}
    assert [result.problem for result in proof.verify_set(other.set_dir)] == [None] * 5
    assert again(other, engine="llama-quantize") == dict.fromkeys(CUT, "another split limit")
    assert {e.name: [s.sha256 for s in e.shards] for e in other.facts.files} == {
        e.name: [s.sha256 for s in e.shards] for e in made.facts.files
    }
    # What is not asked for stays as it was cut, and is proven so.
    assert again(other, recipes=("IQ2_XS",), split_max_size=2 * MB) == {}
    assert other.facts.split_max_size == 2 * MB
    assert sorted(proof.prove_set(other.set_dir)) == sorted((*CUT, "IQ2_XS"))


def test_disk_that_holds_the_whole_files_but_not_the_cut_base(made: Made, tmp_path: Path) -> None:
    """The shards of the bf16 row are new bytes, unlike a link to the base: they are counted before any work."""
    fresh = copied(made, tmp_path)
    shutil.rmtree(fresh.set_dir)
    needed = sum(made.entry(recipe).n_bytes for recipe in (*CUT, "IQ2_XS"))
    with pytest.raises(BadInputError, match=r"needs [\d,]+ bytes"):
        again(fresh, disk_budget=needed - 1, imatrix=made.set_dir / f"{NAME}-imatrix.gguf")
    assert not list(fresh.set_dir.rglob("*00001-of*"))


def test_killed_run_goes_on_and_ends_with_the_same_shards(made: Made, tmp_path: Path) -> None:
    """Killed when the first folder of the fan-out has its name; no folder is ever there in part."""
    options = made.options
    command = [sys.executable, "-m", "gemma_gguf", "quantize", options.model, "--name", str(options.name)]
    command += ["--out", str(tmp_path / "out"), "--recipes", ",".join((*CUT, "IQ2_XS")), "--no-proof", "--jobs", "1"]
    command += ["--base", str(made.work / f"{NAME}-bf16.gguf"), "--imatrix", str(made.set_dir / f"{NAME}-imatrix.gguf")]
    command += ["--split-max-size", "1MB", "--kernels", "ggml", "--json"]
    set_dir = tmp_path / "out" / made.set_dir.name
    wanted = {entry.name: entry for entry in made.facts.files if entry.kind == "model"}

    def look() -> None:
        for recipe in CUT:
            there = [path.name for path in (set_dir / f"{NAME}-{recipe}").glob("*")]
            own = [Path(shard.name).name for shard in made.entry(recipe).shards]
            assert sorted(there) in ([], own)

    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while driver.poll() is None:
        look()
        if (set_dir / f"{NAME}-Q8_0").is_dir():
            driver.kill()
            break
    said = driver.communicate(timeout=60)[1]
    assert driver.returncode in (-9, 0), said
    look()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    now = {entry.name: entry for entry in manifest.load(set_dir).files if entry.kind == "model"}
    assert {name: entry.shards for name, entry in now.items()} == {name: e.shards for name, e in wanted.items()}
    assert {name: entry.sha256 for name, entry in now.items()} == {name: e.sha256 for name, e in wanted.items()}


def test_tensor_too_large_for_the_first_shard_is_said_before_work(made: Made, tmp_path: Path) -> None:
    header = gguf_io.header_of([], [("a", (1 << 20,), F32), ("b", (8,), F32)])
    (tmp_path / "m.gguf").write_bytes(header.data + bytes(header.file_size - len(header.data)))
    with pytest.raises(GemmaGGUFError, match="the first tensor alone takes 4,194,304 bytes"):
        shards.of_whole(gguf_io.read_header(tmp_path / "m.gguf"), MB)
    assert shards.of_whole(gguf_io.read_header(tmp_path / "m.gguf"), 5 * MB) == []


# --- measured, sent, and on build day ---------------------------------------------------------------------------------


def test_the_same_model_whole_has_the_same_figures(made: Made, tmp_path: Path) -> None:
    """llama.cpp reads the shards as it reads the whole file: perplexity and divergence are equal to the last digit."""
    whole = copied(made, tmp_path)
    assert set(again(whole, split_max_size=shards.DEFAULT_LIMIT)) == set(CUT)
    assert [len(entry.shards) for entry in whole.facts.files] == [0] * 5
    measured = made.facts.evidence
    bare = {sha256: found.model_copy(update={"quality": None}) for sha256, found in measured.items()}
    manifest.save(whole.facts.model_copy(update={"evidence": bare}), whole.set_dir)
    facts = evidence.evaluate_set(whole.set_dir, evidence.Measuring(chunks=2, bench=("none",)))
    assert len(facts.evidence) == len(CUT) + 1
    for sha256, found in facts.evidence.items():
        assert found.quality is not None
        assert found.quality == measured[sha256].quality


STREAMED = ("Q8_0", "Q4_K_M", "IQ2_XS")
REPO, TOKEN = "test/streamed-GGUF", "hf_" + "w" * 30


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
def test_shards_are_sent_as_one_commit_and_then_taken_away(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waves, the second commit refused: what is not committed as a whole stays here as a whole, and is sent later."""
    base, given = made.work / f"{NAME}-bf16.gguf", made.set_dir / f"{NAME}-imatrix.gguf"
    options = replace(
        made.options,
        out=tmp_path / "out",
        base=base,
        imatrix=given,
        recipes=STREAMED,
        evaluate=False,
        proof=False,
        publish=PublishOptions(repo=REPO, stream=True),
    )
    set_dir = tmp_path / "out" / made.set_dir.name
    own = {recipe: [shard.name for shard in made.entry(recipe).parts] for recipe in STREAMED}
    count = iter(range(100))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub.serving() as there:
        there.open_for_writing(tmp_path / "store", **{TOKEN: "test"})
        monkeypatch.setattr(constants, "ENDPOINT", there.url)
        there.faults = lambda _, path: (
            hub.Fault("status", 403) if path.endswith("/commit/main") and next(count) == 1 else None
        )
        with pytest.raises(BadInputError, match="this token may not write"):
            factory.run(options)
        repo = there.uploaded(REPO)
        (sent,) = [recipe for recipe in STREAMED if not any((set_dir / name).exists() for name in own[recipe])]
        assert [list(commit.files) for commit in repo.history] == [own[sent]]
        for recipe in STREAMED:
            entry = manifest.load(set_dir).made(recipe)
            assert entry is not None
            assert entry.state == ("remote" if recipe == sent else "local")
            assert entry.is_there(set_dir) == (recipe != sent)
        factory.run(options)
        facts = manifest.load(set_dir)
        assert {entry.recipe for entry in facts.files if entry.state == "remote"} == set(STREAMED)
        assert not [path for path in set_dir.iterdir() if path.is_dir() and path.name != "assets"]
        groups = [sorted(commit.files) for commit in repo.history]
        assert [sorted(own[recipe]) for recipe in STREAMED if sorted(own[recipe]) not in groups] == []
        last = repo.commits[repo.refs["main"]]
        for recipe in STREAMED:
            assert {part.name: sha256_file(last / part.name) for part in made.entry(recipe).parts} == {
                part.name: part.sha256 for part in made.entry(recipe).parts
            }
        said: list[Done] = []
        factory.run(options, say=said.append)
        assert [done.name for done in said if done.made and done.stage in ("quantize", "publish")] == []


def refreshed(set_dir: Path, **asked: Any) -> dict[str, FileDecision]:
    """{recipe, or name of another file: what a refresh with this build decided}"""
    facts = manifest.load(set_dir)
    (result,) = refresh.refresh_sets([set_dir], refresh.Asked(evaluate=False, **asked))
    assert result.error is None, result.error
    now = manifest.load(set_dir)
    assert now.refresh is not None
    assert set(now.refresh.files) == {entry.name for entry in now.files}
    assert {name: found.sha256 for name, found in now.refresh.files.items()} == {e.name: e.sha256 for e in now.files}
    return {entry.recipe or entry.name: result.decisions[entry.name] for entry in facts.files}


def test_a_corrected_template_changes_the_first_shards_alone(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Build day takes a folder for one file: nothing is quantised, and llama-quantize and llama-gguf-split agree."""
    day = copied(made, tmp_path)
    checkpoint = shutil.copytree(made.options.model, tmp_path / "model")
    (day.work / "checkpoint.json").write_text(json.dumps({"path": str(checkpoint)}))
    (day.work / f"{NAME}-bf16.gguf").unlink()  # it is in the shards of the bf16 row
    models = (*CUT, "IQ2_XS")
    assert {found.outcome for found in refreshed(day.set_dir).values()} == {"unchanged"}
    fix_template(checkpoint)
    monkeypatch.setattr(fanout, "prepare", None)  # a fan-out cannot start
    found = refreshed(day.set_dir, apply=True)
    assert {recipe: found[recipe].outcome for recipe in models} == dict.fromkeys(models, "keys")
    assert {tuple(found[recipe].keys) for recipe in models} == {("tokenizer.chat_template",)}
    for recipe in CUT:
        pairs = list(zip(made.entry(recipe).shards, day.entry(recipe).shards, strict=True))
        assert [old.name for old, new in pairs if old.sha256 != new.sha256] == [made.entry(recipe).name]
    assert [result.problem for result in proof.verify_set(day.set_dir)] == [None] * 5
    assert sorted(proof.prove_set(day.set_dir)) == sorted(models)
    assert not list(day.work.rglob("*.partial*"))
    assert again(day, model=str(checkpoint)) == {}


def test_build_day_finds_what_is_wrong_with_shards(made: Made, tmp_path: Path) -> None:
    """A sampled row in the second shard, a missing shard, another limit: each is said, made again, and recorded."""
    bad = copied(made, tmp_path)
    facts = bad.facts
    entry = bad.entry("Q8_0")
    path = bad.set_dir / entry.shards[1].name
    first = next(tensor for tensor in gguf_io.read_header(path).tensors if tensor.ggml_type.name == "Q8_0")
    data = bytearray(path.read_bytes())
    data[first.offset + 2] ^= 1  # in the first row, which is sampled
    path.write_bytes(data)
    whole, own = shards.hashes(shards.read([bad.set_dir / shard.name for shard in entry.shards]))
    cut = [shard.model_copy(update={"sha256": one}) for shard, one in zip(entry.shards, own, strict=True)]
    changed = entry.model_copy(update={"sha256": whole, "shards": cut, "build": "0" * 20})
    recorded = {"0" * 20: facts.quantisers[facts.llama_cpp.key]}
    manifest.save(facts.with_file(changed).model_copy(update={"quantisers": recorded}), bad.set_dir)
    (bad.set_dir / bad.entry("Q4_K_M").shards[-1].name).unlink()
    found = refreshed(bad.set_dir)
    assert {name: decision.why for name, decision in found.items() if decision.outcome != "unchanged"} == {
        "Q8_0": f"1 tensor of which a sampled row comes out otherwise: {first.name}",
        "Q4_K_M": "a shard is missing",
    }
    manifest.save(bad.facts.model_copy(update={"split_max_size": 3 * MB}), bad.set_dir)
    found = refreshed(bad.set_dir, apply=True)
    assert (found["Q8_0"].outcome, found["Q8_0"].why) == ("remake", "it is cut at another split limit than the set's")
    assert {e.recipe: (e.sha256, len(e.shards)) for e in bad.facts.files if e.recipe} == {
        recipe: (made.entry(recipe).sha256, 2 if recipe == "bf16" else 0) for recipe in (*CUT, "IQ2_XS")
    }
    assert [result.problem for result in proof.verify_set(bad.set_dir)] == [None] * 5


# --- the manifest ---------------------------------------------------------------------------------------------------


def in_shards(entry: FileEntry, count: int = 2) -> FileEntry:
    folder = entry.name.removesuffix(".gguf")
    sizes = [entry.n_bytes // count] * (count - 1)
    sizes.append(entry.n_bytes - sum(sizes))
    cut = [
        Shard(name=f"{folder}/{shards.name(folder, number, count)}", n_bytes=n_bytes, sha256=sha(f"{folder} {number}"))
        for number, n_bytes in enumerate(sizes)
    ]
    return entry.model_copy(update={"name": cut[0].name, "shards": cut})


def test_a_recipe_has_one_file_whatever_its_form() -> None:
    facts = example()
    whole = facts.made("Q8_0")
    assert whole is not None
    cut = facts.with_file(in_shards(whole))
    assert cut.made("Q8_0") == in_shards(whole)
    assert len(cut.files) == len(facts.files)
    assert cut.with_file(whole).made("Q8_0") == whole
    assert [part.name for part in whole.parts] == [f"{STEM}-Q8_0.gguf"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda raw: raw["shards"].pop(), id="one-shard"),
        pytest.param(lambda raw: raw.update(n_bytes=raw["n_bytes"] + 1), id="bytes"),
        pytest.param(lambda raw: raw.update(name=raw["shards"][1]["name"]), id="not-the-first"),
        pytest.param(lambda raw: raw["shards"][1].update(name="other/x.gguf"), id="another-folder"),
        pytest.param(lambda raw: raw["shards"][1].update(name="../x.gguf"), id="out-of-the-set"),
        pytest.param(lambda raw: raw["shards"][0].pop("sha256"), id="no-hash"),
    ],
)
def test_shards_that_are_refused(tmp_path: Path, change: Any) -> None:
    facts = example()
    whole = facts.made("Q8_0")
    assert whole is not None
    manifest.save(facts.with_file(in_shards(whole)), tmp_path)
    raw = json.loads((tmp_path / "quantset.json").read_text())
    assert manifest.load(tmp_path).made("Q8_0") == in_shards(whole)
    change(next(entry for entry in raw["files"] if entry["recipe"] == "Q8_0"))
    (tmp_path / "quantset.json").write_text(json.dumps(raw))
    with pytest.raises(BadInputError, match="is damaged at files"):
        manifest.load(tmp_path)


def test_older_manifests_have_single_files(tmp_path: Path) -> None:
    manifest.save(example(), tmp_path)
    raw = json.loads((tmp_path / "quantset.json").read_text())
    raw["schema_version"] = 2
    del raw["split_max_size"], raw["kernels"]
    for entry in raw["files"]:
        del entry["shards"]
    (tmp_path / "quantset.json").write_text(json.dumps(raw))
    facts = manifest.load(tmp_path)
    assert (facts.split_max_size, {len(entry.shards) for entry in facts.files}) == (50_000_000_000, {0})


@pytest.mark.parametrize("size", ["1", "999999", "1500000", "0GB"])
def test_limit_is_of_whole_megabytes(size: str) -> None:
    done = CliRunner().invoke(main, ["plan", "demo", "--split-max-size", size])
    assert done.exit_code == 2
    assert "not whole megabytes, which llama-gguf-split takes" in done.output
