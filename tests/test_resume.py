"""`kill -9` at any moment of any stage, then the same command: the same bytes as an undisturbed run."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from gemma_gguf import manifest
from gemma_gguf.files import sha256_bytes
from gemma_gguf.llama_cpp import Build
from tests import hub

MODEL = "test/tiny-text"
STEM = "test_tiny-text"


def start(model: str, out: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A run from download to card; what it says is in `talk`, beside `out`."""
    command = [sys.executable, "-m", "gemma_gguf", "run", model, "--out", str(out), "--jobs", "2"]
    command += ["--recipes", "bf16,Q8_0,Q4_K_M,Q4_0", "--chunks", "40", "--eval-chunks", "1", "--bench", "none"]
    out.mkdir(exist_ok=True)
    with (out / "talk").open("wb") as talk:
        return subprocess.Popen(command, stdout=talk, stderr=talk, start_new_session=True, env=dict(environment))


def stage_of(talk: str) -> str:
    """What a run was doing, from the last line it wrote: `  evaluating X: 1/2 chunks`, `made  imatrix  X  9 s`."""
    lines = [line for line in talk.splitlines() if line.strip()]
    if not lines:
        return "start"
    words = lines[-1].split()
    return f"after {words[1]}" if words[0] in {"made", "kept", "same", "read", "skip"} and words[1:] else words[0]


def contents(out: Path) -> dict[str, str]:
    """Hash of every file that must be the same each time; the manifest holds times, so its card is compared instead."""
    set_dir = out / f"{STEM}-GGUF"
    files = [path for path in set_dir.rglob("*") if path.is_file() and path.name != "quantset.json"]
    return {path.relative_to(set_dir).as_posix(): sha256_bytes(path.read_bytes()) for path in files}


def campaign(checkpoint: Path, directory: Path, kills: int, seed: int) -> None:
    """Kill the driver or one of its descendants until `kills` have hit; compare every set that is finished.

    The checkpoint comes from a Hub on this machine that answers slowly, so that kills hit the download, too.
    """
    rng = random.Random(seed)
    with hub.serving() as served:
        served.repo(MODEL).commit(checkpoint, "main")
        answer = served.answer

        def slowly(request: hub.Request) -> hub.Reply:
            time.sleep(0.05)
            return answer(request)

        served.answer = slowly  # type: ignore[method-assign]

        def begin(out: Path) -> subprocess.Popen[bytes]:
            return start(MODEL, out, {**os.environ, **served.environment(out / "home")})

        begun = time.monotonic()
        assert begin(directory / "undisturbed").wait() == 0, (directory / "undisturbed" / "talk").read_text()
        whole = time.monotonic() - begun
        expected = contents(directory / "undisturbed")
        assert {name for name in expected if name.endswith(".gguf")} == {
            f"{STEM}-{name}.gguf" for name in ("bf16", "Q8_0", "Q4_K_M", "Q4_0", "imatrix")
        }
        assert "README.md" in expected
        hit = finished = 0
        stages: Counter[str] = Counter()
        out = directory / "disturbed"
        struck = "none"
        while hit < kills:
            driver = begin(out)
            time.sleep(rng.uniform(0.2, whole))
            if driver.poll() is None:
                family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
                target = family[0] if rng.random() < 0.5 else rng.choice(family)
                stage = stage_of((out / "talk").read_text(errors="replace"))
                struck = f"{stage}, process {target.pid}"
                with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):  # it ended by itself
                    struck = f"{stage}, {' '.join(target.cmdline())[-200:]}"
                    os.kill(target.pid, signal.SIGKILL)
                    hit += 1
                    stages[stage] += 1
            try:
                code = driver.wait(timeout=300)
            except subprocess.TimeoutExpired:
                left = [" ".join(p.cmdline())[-200:] for p in psutil.Process(driver.pid).children(recursive=True)]
                pytest.fail(
                    f"seed {seed}, kill {hit} ({struck}): no end; children {left}; {(out / 'talk').read_text()}"
                )
            if code == 0:
                assert contents(out) == expected, f"seed {seed}, after {hit} kills"
                finished += 1
                shutil.rmtree(out)
        assert begin(out).wait() == 0, (out / "talk").read_text()
        assert contents(out) == expected, f"seed {seed}, after {hit} kills"
    set_dir = out / f"{STEM}-GGUF"
    for entry in manifest.load(set_dir).files:
        assert sha256_bytes((set_dir / entry.name).read_bytes()) == entry.sha256
    print(f"\n{hit} kills (seed {seed}, {dict(stages.most_common())}), {finished + 1} sets, all identical")


def test_a_few_kills_in_any_stage(build: Build, text_checkpoint: Path, tmp_path: Path) -> None:
    assert build.key
    campaign(text_checkpoint, tmp_path, kills=3, seed=random.SystemRandom().randrange(10**6))


@pytest.mark.proof
def test_hundred_kills_in_any_stage(build: Build, text_checkpoint: Path, tmp_path: Path) -> None:
    assert build.key
    campaign(text_checkpoint, tmp_path, kills=100, seed=random.SystemRandom().randrange(10**6))


@pytest.mark.proof
def test_kills_while_llama_cpp_is_built(build: Build, tmp_path: Path) -> None:
    """`kill -9` while the source is fetched, configured and compiled; the same command makes the same build.

    Its libraries are not compared byte for byte: what a compiler writes holds the directory it ran in.
    """
    rng = random.Random(seed := random.SystemRandom().randrange(10**6))
    command = [sys.executable, "-m", "gemma_gguf", "build", "--json"]
    environment = {**os.environ, "GEMMA_GGUF_CACHE": str(tmp_path / "cache")}
    stages: Counter[str] = Counter()
    for number in range(5):
        with (tmp_path / "talk").open("wb") as talk:
            driver = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=talk, start_new_session=True, env=environment
            )
        time.sleep(rng.uniform(1, 25 * 3 ** min(number, 1)))
        family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
        stages[stage_of((tmp_path / "talk").read_text())] += 1
        os.kill((family[0] if number % 2 else rng.choice(family)).pid, signal.SIGKILL)
        driver.wait(timeout=600)
    done = subprocess.run(command, check=True, capture_output=True, env=environment)
    made = json.loads(done.stdout)
    assert (made["key"], made["commit"]) == (build.key, build.commit)
    version = subprocess.run([build.tool("llama-quantize"), "--help"], check=False, capture_output=True).stdout
    again = subprocess.run([Path(made["bin_dir"]) / "llama-quantize", "--help"], check=False, capture_output=True)
    assert again.stdout.replace(made["bin_dir"].encode(), str(build.bin_dir).encode()) == version
    print(f"\n{sum(stages.values())} kills (seed {seed}, {dict(stages)}) of the build")
