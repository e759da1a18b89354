"""The command line: help, usage, errors and exit codes, JSON documents, Ctrl-C."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import gemma_gguf
from gemma_gguf import cli, llama_cpp, manifest, recipes, source, survey
from gemma_gguf.doctor import Account
from gemma_gguf.files import locked
from gemma_gguf.llama_cpp import Build
from tests.examples import example
from tests.hub import Hub, serving

REPO = Path(__file__).parents[1]
PROGRAM = Path(sys.executable).with_name("gemma-gguf")
COMMANDS = sorted(cli.main.commands)


def call(*argv: str | Path) -> Result:
    """The command line in this process; anything but an exit is a bug and keeps its traceback."""
    return CliRunner(catch_exceptions=False).invoke(cli.main, [str(word) for word in argv], prog_name="gemma-gguf")


def start(*argv: str | Path, **environment: str) -> "subprocess.Popen[str]":
    """The installed program; says `ready` on stdout when its imports are done and Ctrl-C is its own business."""
    # A shell ignores Ctrl-C in what it starts in the background, and whoever ignores a signal passes that on.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from gemma_gguf.cli import main; "
    code += "print('ready', flush=True); main(prog_name='gemma-gguf')"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)],
        cwd=REPO,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- help --------------------------------------------------------------------------------------------------------


def test_the_commands() -> None:
    expected = {"build", "run", "convert", "imatrix", "quantize", "verify", "card", "recipes"}
    assert expected <= set(COMMANDS)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command_with_what_it_does(flag: str) -> None:
    done = call(flag)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: gemma-gguf [OPTIONS] COMMAND [ARGS]...\n")
    listed = re.findall(r"^  ([a-z]+)  +(\S.*)$", done.stdout.partition("Commands:\n")[2], re.MULTILINE)
    assert [name for name, _ in listed] == COMMANDS
    for name, about in listed:
        first = (cli.main.commands[name].help or "").partition("\n")[0]
        assert first.startswith(about.removesuffix("...").rstrip(" .")), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example(name: str) -> None:
    done = call(name, "--help")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: gemma-gguf {name} ")
    examples = re.findall(rf"^  gemma-gguf {name}( .*)?$", done.stdout, re.MULTILINE)
    assert examples
    # What is shown can be typed: every option of every example is one of the command's.
    options = {option for parameter in cli.main.commands[name].params for option in parameter.opts}
    assert set(re.findall(r"(?<= )--[a-z-]+", " ".join(examples))) <= options


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name: str) -> None:
    options = [p for p in cli.main.commands[name].params if isinstance(p, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_the_readme_shows_every_command() -> None:
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if not re.search(rf"\bgemma-gguf {name}\b", readme)] == []


@pytest.mark.parametrize("argv", [[str(PROGRAM)], [sys.executable, "-m", "gemma_gguf"]], ids=["program", "module"])
def test_the_installed_program(argv: list[str]) -> None:
    done = subprocess.run([*argv, "--version"], cwd=REPO, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"gemma-gguf, version {gemma_gguf.__version__}\n", "")


# --- wrong usage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["make"], "No such command 'make'."),
        (["--verbose"], "No such option"),
        (["run"], "Missing argument 'MODEL'."),
        (["run", "demo", "more"], "Got unexpected extra argument (more)"),
        (["run", "demo", "--chunks", "0"], "Invalid value for '--chunks'"),
        (["run", "demo", "--threads", "many"], "Invalid value for '--threads'"),
        (["run", "demo", "--gpu-layers", "-1"], "Invalid value for '--gpu-layers'"),
        (["run", "demo", "--backend", "opencl"], "Invalid value for '--backend'"),
        (["run", "demo", "--engine", "magic"], "Invalid value for '--engine'"),
        (["run", "demo", "--templates", "/nowhere"], "Invalid value for '--templates'"),
        (["run", "demo", "--out", __file__], "Invalid value for '--out'"),
        (["run", "demo", "--base", "."], "Invalid value for '--base'"),
        (["convert", "demo", "--templates", "."], "No such option"),
        (["build", "demo"], "Got unexpected extra argument (demo)"),
        (["verify"], "Missing argument 'DIRECTORY'."),
        (["verify", __file__], "Invalid value for 'DIRECTORY'"),
        (["card"], "Missing argument 'DIRECTORIES...'."),
        (["recipes", "more"], "Got unexpected extra argument (more)"),
    ],
    ids=lambda value: " ".join(value).replace(__file__, "FILE") if isinstance(value, list) else "",
)
def test_wrong_usage(argv: list[str], said: str) -> None:
    done = call(*argv)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: gemma-gguf ")
    assert said in done.stderr


def test_no_command_shows_the_help() -> None:
    done = call()
    assert done.exit_code == 2
    assert done.stderr == call("--help").stdout


@pytest.mark.parametrize("size", ["10GiB", "much", "-1GB", "1e9", "", "5 G B", "200gb"])
def test_what_is_no_size(size: str) -> None:
    done = call("run", "demo", "--disk-budget", size)
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"{size!r} is no size; write for example 200GB" in done.stderr


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("7000000", 7_000_000),
        ("0", 0),
        ("1B", 1),
        ("10kB", 10_000),
        ("10k", 10_000),
        ("1.5MB", 1_500_000),
        ("200GB", 200_000_000_000),
        ("200 GB", 200_000_000_000),
        ("1.1TB", 1_100_000_000_000),
    ],
)
def test_sizes_are_decimal(text: str, n_bytes: int) -> None:
    [option] = [p for p in cli.main.commands["run"].params if p.name == "disk_budget"]
    assert option.type.convert(text, option, None) == n_bytes


# --- errors for the user -----------------------------------------------------------------------------------------

ERRORS = pytest.mark.parametrize(
    ("argv", "what", "next_step"),
    [
        (["plan", "no-such-model"], "there is no model 'no-such-model': no such directory, and not a hub id", "hub id"),
        (["run", "demo", "--name", "x"], "--name 'x' is not ORG/MODEL", "--name my-org/my-gemma"),
        (["build", "--llama-cpp", "zip:a"], "'zip:a' is no llama.cpp source", "pypi:"),
        (["build", "--llama-cpp", "dir:/nowhere"], "/nowhere is not a llama.cpp source tree", ""),
        (["verify", "/nowhere"], "/nowhere has no quantset.json: it is not a quant set", "gemma-gguf run MODEL"),
        (["card", "/nowhere"], "/nowhere has no quantset.json: it is not a quant set", "gemma-gguf run MODEL"),
        (["card", "[bold]\\"], "[bold]\\ has no quantset.json: it is not a quant set", "gemma-gguf run MODEL"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMMA_GGUF_CACHE", str(tmp_path / "cache"))
    return tmp_path


@ERRORS
def test_an_error_says_what_and_what_next(argv: list[str], what: str, next_step: str, elsewhere: Path) -> None:
    done = call(*argv)
    assert (done.exit_code, done.stdout) == (1, "")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Gemma is provided")]
    assert lines[0].startswith(f"error: {what}")
    assert len(lines) == (2 if next_step else 1)
    assert not next_step or re.fullmatch(rf"next:  .*{re.escape(next_step)}.*", lines[1])


@ERRORS
def test_an_error_as_one_document(argv: list[str], what: str, next_step: str, elsewhere: Path) -> None:
    done = call(*argv, "--json")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert list(document) == ["error", "next_step", "log"]
    assert document["error"].startswith(what)
    assert next_step in (document["next_step"] or "")
    assert document["log"] is None
    assert done.stderr == call(*argv).stderr


def test_an_error_of_a_tool_names_its_log(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    done = call("build", "--llama-cpp", "pypi:0.0.99", "--json")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert list(document) == ["error", "next_step", "log"]
    assert document["error"].startswith("cannot download the source of llama-cpp-python 0.0.99: ")
    [log] = (elsewhere / "cache" / "logs").iterdir()
    assert document["log"] == str(log)
    # For a person, the path is short.
    assert done.stderr.splitlines()[-1] == f"log:   cache/logs/{log.name}"


def test_a_directory_that_is_no_set_stays_as_it_is(elsewhere: Path) -> None:
    (elsewhere / "a").mkdir()
    (elsewhere / "a" / "README.md").write_text("mine")
    assert call("card", "a").exit_code == 1
    assert [(path.name, path.read_text()) for path in (elsewhere / "a").iterdir()] == [("README.md", "mine")]


def test_a_bug_keeps_its_traceback(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "build", "no function")
    with pytest.raises(TypeError, match="'str' object is not callable"):
        call("build")


def test_an_output_directory_that_cannot_be_made(build: Build, text_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = call("run", text_checkpoint, "--out", tmp_path / "file" / "out")
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.search(rf"^error: .*{re.escape(str(tmp_path / 'file'))}", done.stderr, re.MULTILINE)


# --- documents ---------------------------------------------------------------------------------------------------


def test_recipes_as_a_document() -> None:
    done = call("recipes", "--json")
    assert done.exit_code == 0
    document: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    assert list(document) == ["recipes"]
    rows = document["recipes"]
    assert [row["name"] for row in rows] == list(recipes.TABLE)
    assert [row["name"] for row in rows if row["made"] == "default"] == list(recipes.DEFAULT_NAMES)
    assert {row["made"] for row in rows} == {"default", "on request"}
    assert rows[0] == {
        "name": "bf16",
        "ftype": "BF16",
        "made": "default",
        "about": "Full BF16 weights, as converted",
    }
    assert next(row for row in rows if row["name"] == "Q4_K_L") == {
        "name": "Q4_K_L",
        "ftype": "Q4_K_M",
        "made": "default",
        "about": "Q4_K_M with embedding and output at Q8_0",
    }


def test_recipes_for_a_person() -> None:
    done = call("recipes")
    assert (done.exit_code, done.stdout) == (0, "")
    lines = done.stderr.splitlines()
    assert lines[0].split() == ["Recipe", "ftype", "Made", "What", "it", "is"]
    assert [line.split()[0] for line in lines[1:]] == list(recipes.TABLE)
    for line, recipe in zip(lines[1:], recipes.TABLE.values(), strict=True):
        assert line.rstrip().endswith(recipe.about)


def test_a_build_as_a_document(build: Build) -> None:
    done = call("build", "--json")
    assert done.exit_code == 0
    kernels = llama_cpp.build_kernels().library
    assert json.loads(done.stdout) == json.loads(json.dumps({**build.facts(), "kernels": str(kernels)}))
    assert done.stderr == (
        f"llama.cpp {build.version}, commit {build.commit[:9]}, cpu: {build.bin_dir}\nkernels: {kernels}\n"
    )


# --- doctor ------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, build: Build) -> Path:
    """An empty working directory, the build in its place, and a hub that is asked for nothing."""
    monkeypatch.delenv("GEMMA_GGUF_CACHE")
    account = Account("https://hub.example", True, name="me", role="write")
    monkeypatch.setattr(survey, "_account", lambda: account)
    return elsewhere


def test_the_doctor_of_a_machine(offline: Path) -> None:
    done = call("doctor")
    assert (done.exit_code, done.stdout) == (0, "")
    rows = [line.rstrip().split(maxsplit=2) for line in done.stderr.splitlines()]
    assert rows[0] == ["Check", "Verdict", "What"]
    assert [row[:2] for row in rows[1:]] == [
        [name, "ok"]
        for name in ("python", "packages", "tools", "backends", "kernels", "memory", "writing", "hub", "publishing")
    ]
    assert not (offline / "out").exists()


def test_the_doctor_of_a_run(offline: Path, text_checkpoint: Path) -> None:
    done = call("doctor", text_checkpoint, "--recipes", "Q4_K_M", "--json")
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["ok"] is True
    assert list(document["checks"][0]) == ["check", "status", "what", "next_step"]
    found = {check["check"]: check["what"] for check in document["checks"]}
    assert found["recipes"] == "Q4_K_M"
    assert found["model"] == "1,869,440 parameters"
    assert {"converter", "imatrix", "disk"} <= set(found)
    assert not (offline / "out").exists()


def test_the_doctor_says_everything_and_exits_with_1(offline: Path) -> None:
    done = call("doctor", "no-such-model", "--recipes", "Q4_K_M,Q9_K", "--calibration", "none", "--json")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert document["ok"] is False
    failed = [check["check"] for check in document["checks"] if check["status"] == "fail"]
    assert failed == ["calibration", "model", "recipes"]
    assert "next:  model: Give demo, a checkpoint's directory, or a hub id" in done.stderr
    assert "next:  recipes: " in done.stderr
    assert not (offline / "out").exists()


# --- the hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    content = tmp_path / "content"
    content.mkdir()
    (content / "config.json").write_text("{}")
    (content / "model.safetensors").write_bytes(b"x")
    with serving() as served:
        served.repo("org/gated", gated=True).commit(content, "main")
        yield served


def test_a_gated_model_says_where_to_ask(build: Build, hub: Hub, tmp_path: Path) -> None:
    command: list[str | Path] = [PROGRAM, "convert", "org/gated", "--out", tmp_path / "out", "--json"]
    done = subprocess.run(command, env=hub.environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    what = "org/gated is gated and this account has no access to it"
    next_step = "Accept the terms on https://huggingface.co/org/gated, then run: hf auth login"
    assert json.loads(done.stdout) == {"error": what, "next_step": next_step, "log": None}
    assert done.stderr.splitlines()[-2:] == [f"error: {what}", f"next:  {next_step}"]


def test_a_plan_of_a_hub_model_downloads_no_weights(text_checkpoint: Path, tmp_path: Path) -> None:
    """Sizes are estimated from the headers of the weight files, which are asked for by range."""
    with serving() as served:
        served.repo("org/model").commit(text_checkpoint, "main")
        command: list[str | Path] = [PROGRAM, "plan", "org/model", "--out", tmp_path / "out", "--json"]
        done = subprocess.run(command, env=served.environment(tmp_path), capture_output=True, text=True, check=True)
        sizes = {row["recipe"]: row["n_bytes"] for row in json.loads(done.stdout)["files"]}
        gets = [request for request in served.requests if request.method == "GET"]
        weights = [request for request in gets if request.path.endswith(".safetensors")]
    tensors = source.read_safetensors_header
    n_parameters = sum(sum(tensors(path).values()) for path in text_checkpoint.glob("*.safetensors"))
    assert sizes["bf16"] == 2 * n_parameters
    assert weights
    assert all("range" in request.headers for request in weights)
    assert not (tmp_path / "out").exists()


# --- two runs at a time, Ctrl-C ----------------------------------------------------------------------------------


def test_a_set_in_use_is_refused(build: Build, text_checkpoint: Path, tmp_path: Path) -> None:
    work = tmp_path / "out" / ".work" / "me_tiny"
    with locked(work, "the test"):
        with start("run", text_checkpoint, "--name", "me/tiny", "--out", tmp_path / "out", "--json") as child:
            stdout, stderr = child.communicate(timeout=60)
        assert child.returncode == 1
        document = json.loads(stdout.removeprefix("ready\n"))
    held_by = f"process {os.getpid()} on {socket.gethostname()}, since "
    assert document["error"].startswith(f"the set me_tiny is in use by {held_by}")
    assert document["error"].endswith(f": {work}")
    assert "--wait" in document["next_step"]
    assert f"error: {document['error']}\n" in stderr
    assert not (tmp_path / "out" / "me_tiny-GGUF").exists()


def test_ctrl_c_says_how_to_go_on(build: Build, text_checkpoint: Path, tmp_path: Path) -> None:
    work = tmp_path / "out" / ".work" / "me_tiny"
    with locked(work, "the test"):
        before = (work / ".lock.json").read_text()
        with start("run", text_checkpoint, "--name", "me/tiny", "--out", tmp_path / "out", "--wait") as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            time.sleep(2)  # it finds its build and comes to the lock
            assert child.poll() is None
            child.send_signal(signal.SIGINT)
            stdout, stderr = child.communicate(timeout=30)
        assert (child.returncode, stdout) == (130, "")
        assert stderr == "\nstopped; finished files stay. Run the same command again to go on.\n"
        assert (work / ".lock.json").read_text() == before  # still the holder's
    assert not (tmp_path / "out" / "me_tiny-GGUF").exists()


# --- cards -------------------------------------------------------------------------------------------------------


@pytest.fixture
def a_set(tmp_path: Path) -> Path:
    """A set that has its manifest and no card yet."""
    manifest.save(example(), tmp_path / "set")
    return tmp_path / "set"


def pages(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(directory.glob("README*"))}


def test_card_is_written_once(a_set: Path) -> None:
    assert json.loads(call("card", a_set, "--json").stdout) == {"cards": {str(a_set): True}}
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in a_set.iterdir() if path.is_file()}
    assert json.loads(call("card", a_set, "--json").stdout) == {"cards": {str(a_set): False}}
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in a_set.iterdir() if path.is_file()}
    assert after == before


def test_what_was_chosen_for_a_card_is_kept(a_set: Path) -> None:
    chosen = ("--theme", "classic", "--lang", "en,ja,zh-Hant", "--quantized-by", "me", "--repo", "me/my-set")
    assert call("card", a_set, *chosen).exit_code == 0
    made = pages(a_set)
    assert list(made) == ["README.ja.md", "README.md", "README.zh-Hant.md"]
    assert made["README.md"].partition("\n---\n")[2].startswith("# llama.cpp imatrix quantizations")
    assert "quantized_by: me\n" in made["README.md"]
    assert "llama-server -hf me/my-set:Q4_K_M" in made["README.ja.md"]
    assert manifest.load(a_set).card.model_dump() == {
        "theme": "classic",
        "languages": ["en", "ja", "zh-Hant"],
        "quantized_by": "me",
        "repo": "me/my-set",
    }
    assert json.loads(call("card", a_set, "--json").stdout) == {"cards": {str(a_set): False}}
    assert pages(a_set) == made


def test_a_language_that_is_no_longer_chosen_leaves_no_card_behind(a_set: Path) -> None:
    call("card", a_set, "--lang", "en,ja")
    (a_set / "README.fr.md").write_text("a card of somebody's own")
    assert json.loads(call("card", a_set, "--lang", "en", "--json").stdout) == {"cards": {str(a_set): True}}
    assert list(pages(a_set)) == ["README.fr.md", "README.md"]


@pytest.mark.parametrize(
    ("argv", "exit_code", "says"),
    [
        (["--theme", "baroque"], 2, "'baroque' is not one of 'modern', 'classic'"),
        (["--lang", "en,tlh"], 1, "there is no card in 'tlh'"),
        (["--repo", "nobody"], 1, "repo 'nobody' cannot be used for the card"),
        (["--templates", "/nowhere"], 2, "'/nowhere' does not exist"),
    ],
)
def test_what_cannot_be_chosen_for_a_card(a_set: Path, argv: list[str], exit_code: int, says: str) -> None:
    before = (a_set / manifest.FILE_NAME).read_bytes()
    result = call("card", a_set, *argv)
    assert (result.exit_code, says in result.stderr) == (exit_code, True)
    assert (a_set / manifest.FILE_NAME).read_bytes() == before
    assert pages(a_set) == {}


def test_templates_of_ones_own(a_set: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "credits.md.j2").write_text("\nThanks.\n")
    assert call("card", a_set, "--templates", own).exit_code == 0
    assert pages(a_set)["README.md"].endswith("\nThanks.\n")
    (own / "credits.md.j2").write_text("{{ model.colour }}")
    result = call("card", a_set, "--templates", own)
    assert result.exit_code == 1
    assert "credits.md.j2, line 1" in " ".join(result.stderr.split())
