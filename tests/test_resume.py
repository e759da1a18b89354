"""`kill -9` at any moment of any stage, then the same command: the same bytes as an undisturbed run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gemma_gguf import manifest
from gemma_gguf.files import sha256_bytes
from gemma_gguf.llama_cpp import Build

STEM = "test_tiny-text"


def start(checkpoint: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "gemma_gguf",
        "run",
        str(checkpoint),
        "--name",
        "test/tiny-text",
        "--out",
        str(out),
    ]
    command += ["--recipes", "bf16,Q8_0,Q4_K_M,Q4_0", "--chunks", "40", "--jobs", "2", "--no-evaluate"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def contents(out: Path) -> dict[str, str]:
    """Hash of every file that must be the same each time; the manifest holds times, so its card is compared instead."""
    set_dir = out / f"{STEM}-GGUF"
    files = [path for path in set_dir.rglob("*") if path.is_file() and path.name != "quantset.json"]
    return {path.relative_to(set_dir).as_posix(): sha256_bytes(path.read_bytes()) for path in files}


def campaign(checkpoint: Path, out: Path, kills: int, seed: int) -> None:
    """Kill the driver or one of its descendants until `kills` have hit; compare every set that is finished."""
    rng = random.Random(seed)
    begun = time.monotonic()
    assert start(checkpoint, out / "undisturbed").wait() == 0
    whole = time.monotonic() - begun
    expected = contents(out / "undisturbed")
    assert len(expected) == 8  # four quants, the imatrix, the card and its picture of the imatrix as PNG and SVG
    hit = finished = 0
    stages: dict[str, int] = {}
    while hit < kills:
        driver = start(checkpoint, out / "disturbed")
        time.sleep(rng.uniform(0.2, whole))
        if driver.poll() is None:
            family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
            target = family[0] if rng.random() < 0.5 else rng.choice(family)
            logs = sorted((out / "disturbed" / ".work" / STEM / "logs").glob("*.log"))
            words = [
                line for log in logs[-1:] for line in log.read_text(errors="replace").splitlines() if "## " in line
            ]
            stage = next(
                (t for t in ("llama-quantize", "llama-imatrix", "convert_hf", "bindings") if words and t in words[-1]),
                "other",
            )
            try:
                os.kill(target.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            hit += 1
            stages[stage] = stages.get(stage, 0) + 1
        if driver.wait(timeout=300) == 0:
            assert contents(out / "disturbed") == expected, f"seed {seed}, after {hit} kills"
            finished += 1
            shutil.rmtree(out / "disturbed")
    assert start(checkpoint, out / "disturbed").wait() == 0
    assert contents(out / "disturbed") == expected, f"seed {seed}, after {hit} kills"
    set_dir = out / "disturbed" / f"{STEM}-GGUF"
    for entry in manifest.load(set_dir).files:
        assert sha256_bytes((set_dir / entry.name).read_bytes()) == entry.sha256
    print(f"\n{hit} kills (seed {seed}, near {stages}), {finished + 1} finished sets, all with the undisturbed bytes")


def test_a_few_kills_in_any_stage(build: Build, text_checkpoint: Path, tmp_path: Path) -> None:
    assert build.key
    campaign(text_checkpoint, tmp_path, kills=3, seed=random.SystemRandom().randrange(10**6))


@pytest.mark.proof
def test_hundred_kills_in_any_stage(build: Build, text_checkpoint: Path, tmp_path: Path) -> None:
    assert build.key
    campaign(text_checkpoint, tmp_path, kills=100, seed=random.SystemRandom().randrange(10**6))
