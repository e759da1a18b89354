"""The commands of a card, taken from the card and executed: llama.cpp and llama-cpp-python of the real build.

A set is published on the local Hub and its card rendered for that place. What stands in the code blocks is run as it
stands there, with the port, the number of tokens and the picture added. LM Studio and Ollama are not run: their lines
are compared letter by letter in `test_card.py`.
"""

import json
import os
import re
import shlex
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gemma_gguf import card, llama_cpp, manifest
from gemma_gguf.llama_cpp import Build
from gemma_gguf.manifest import Sampling
from gemma_gguf.session import Report
from tests.hub import Hub, serving

REPO = "test/tiny-vision-GGUF"
SAMPLING = Sampling(do_sample=True, temperature=1, top_k=64, top_p=0.95, min_p=0, repetition_penalty=1)
SECONDS = 120  # a busy machine


@pytest.fixture(scope="module")
def hub(finished: Report) -> Iterator[Hub]:
    """The finished set, published."""
    with serving() as hub:
        hub.repo(REPO).commit(finished.set_dir, "main")
        yield hub


@pytest.fixture(scope="module")
def page(finished: Report) -> str:
    """The card of the finished set for that place, with every setting a checkpoint can recommend."""
    facts = manifest.load(finished.set_dir)
    facts = facts.model_copy(
        update={
            "card": facts.card.model_copy(update={"repo": REPO}),
            "model": facts.model.model_copy(update={"sampling": SAMPLING}),
        }
    )
    return card.render(facts)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def lines(page: str, program: str) -> list[list[str]]:
    """The command lines of one program, in order, as a shell splits them."""
    found = [line for block in blocks(page, "sh") for line in block.splitlines() if line.startswith(f"{program} ")]
    assert found, program
    return [shlex.split(line) for line in found]


@pytest.fixture
def environment(hub: Hub, build: Build, tmp_path: Path) -> dict[str, str]:
    """Of a child that knows the local Hub alone and has the build's programs on its path."""
    home = hub.environment(tmp_path / "home")
    return {**home, "PATH": os.pathsep.join((str(build.bin_dir), home["PATH"]))}


@contextmanager
def running(argv: list[str], cwd: Path, env: dict[str, str]) -> Iterator[str]:
    """A llama-server by this command line and a free port; yields its address once it says it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = cwd / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen([*argv, "--port", str(port)], cwd=cwd, env=env, stdout=out, stderr=out)
    try:
        for _ in range(SECONDS * 5):
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                    if answer.status == 200:
                        break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(f"not ready: {log.read_text(errors='replace')[-3000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def ask(address: str, argv: list[str], **more: Any) -> dict[str, Any]:
    """What a `curl` line of the card asks, asked of this address with `more` in its body."""
    program, url, option, header, data, body = argv
    assert (program, option, data) == ("curl", "-H", "-d")
    name, value = header.split(": ")
    url = url.replace("http://127.0.0.1:8080", address)
    request = urllib.request.Request(url, json.dumps({**json.loads(body), **more}).encode(), {name: value})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return dict(json.load(answer))


@pytest.mark.parametrize("how", ["-hf", "-m"])
def test_llama_server_answers(  # noqa: PLR0917 - fixtures
    how: str, page: str, finished: Report, hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    """Straight from the Hub and with downloaded files: the model named on the card, with its projector."""
    (argv,) = [argv for argv in lines(page, "llama-server") if argv[1] == how]
    here = tmp_path if how == "-hf" else finished.set_dir
    seen = len(hub.requests)
    if how == "-m":
        environment = {**environment, "HF_ENDPOINT": "http://127.0.0.1:1"}  # nothing is downloaded
        for name in (argv[2], argv[4]):
            (tmp_path / name).symlink_to(here / name)
    with running(argv, tmp_path, environment) as address:
        with urllib.request.urlopen(f"{address}/props") as answer:
            props = json.load(answer)
        answered = ask(address, lines(page, "curl")[0], max_tokens=4)
    assert answered["usage"]["completion_tokens"] >= 1
    assert props["modalities"]["vision"] is True
    settings = props["default_generation_settings"]["params"]
    stated = {"temperature": 1, "top_k": 64, "top_p": 0.95, "min_p": 0, "repeat_penalty": 1}
    assert {name: pytest.approx(settings[name], abs=1e-6) for name in stated} == stated
    asked = [request.path for request in hub.requests[seen:] if request.path.startswith("/large/")]
    if how == "-hf":
        file = next(entry for entry in manifest.load(finished.set_dir).files if entry.recipe == "Q4_K_M").name
        assert any(path.endswith(f"/{file}") for path in asked)
        assert {path.rpartition("/")[2].partition("-")[0] for path in asked} == {"mmproj", "test_tiny"}
    else:
        assert asked == []


def test_llama_cpp_python_answers(
    page: str, hub: Hub, build: Build, environment: dict[str, str], tmp_path: Path
) -> None:
    """The Python of the card, with the bindings of the build."""
    (code,) = blocks(page, "python")
    paths = llama_cpp.python_env(build)
    env = {**environment, **paths, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    assert done.stdout.strip()  # the model has random weights: any text is an answer
    assert [request.path for request in hub.asked("/large/") if request.path.endswith("Q4_K_M.gguf")]


def test_a_base_model_completes(
    page: str, finished: Report, build: Build, environment: dict[str, str], tmp_path: Path
) -> None:
    """The lines of a card without a chat template."""
    facts = manifest.load(finished.set_dir)
    facts = facts.model_copy(
        update={
            "card": facts.card.model_copy(update={"repo": REPO}),
            "model": facts.model.model_copy(update={"chat_template": None}),
        }
    )
    base = card.render(facts)
    (code,) = blocks(base, "python")
    env = {**environment, **llama_cpp.python_env(build), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    (argv,) = [argv for argv in lines(base, "llama-server") if argv[1] == "-m"]
    for name in (argv[2], argv[4]):
        (tmp_path / name).symlink_to(finished.set_dir / name)
    with running(argv, tmp_path, environment) as address:
        answered = ask(address, lines(base, "curl")[0], n_predict=4)
    assert answered["tokens_predicted"] >= 1


def png(side: int = 16) -> bytes:
    """A red picture."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\xff\0\0" * side) * side)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_llama_mtmd_cli_looks_at_a_picture(
    page: str, finished: Report, environment: dict[str, str], tmp_path: Path
) -> None:
    (argv,) = lines(page, "llama-mtmd-cli")
    (tmp_path / "picture.png").write_bytes(png())
    for name in (argv[2], argv[4]):
        (tmp_path / name).symlink_to(finished.set_dir / name)
    for _ in range(5):  # its log is not flushed when it ends: on a busy machine the last lines can be missing
        done = subprocess.run(
            [*argv, "-n", "4"], cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=SECONDS
        )
        log = (done.stdout + done.stderr).decode(errors="replace")
        assert done.returncode == 0, log[-3000:]
        if "mtmd batch encoding done" in log:
            break
    assert "mtmd batch encoding done" in log, log[-3000:]


def test_hf_downloads_what_it_is_told(page: str, finished: Report, environment: dict[str, str], tmp_path: Path) -> None:
    (argv,) = lines(page, "hf")
    assert argv[:2] == ["hf", "download"]
    program = Path(sys.executable).with_name("hf")
    done = subprocess.run([program, *argv[1:]], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    (name,) = [path.name for path in tmp_path.glob("*.gguf")]
    assert (tmp_path / name).read_bytes() == (finished.set_dir / name).read_bytes()
