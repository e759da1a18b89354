"""The demo: real Gemma weights, rebuilt into a checkpoint and converted back."""

import re
from pathlib import Path

import numpy as np
import pytest

from gemma_gguf import calibration, demo, factory, gguf_io, manifest
from gemma_gguf.errors import BadInputError
from gemma_gguf.llama_cpp import Build, RunLog, run_tool
from gemma_gguf.session import Options

CHUNKS = 6


def perplexity(build: Build, model: Path, text: Path, log: RunLog) -> float:
    argv: list[str | Path] = [
        build.tool("llama-perplexity"),
        "-m",
        model,
        "-f",
        text,
        "-c",
        "512",
        "-b",
        "512",
        "--chunks",
        str(CHUNKS),
    ]
    match = re.search(r"Final estimate: PPL = ([\d.]+)", run_tool(argv, log=log).output)
    assert match is not None
    return float(match[1])


def test_converted_base_is_as_good_as_the_packaged_file(build: Build, log: RunLog, tmp_path: Path) -> None:
    report = factory.run(Options("demo", out=tmp_path / "out", until="convert"))
    base = tmp_path / "out" / ".work" / "google_gemma-3-270m" / "google_gemma-3-270m-bf16.gguf"
    facts = manifest.load(report.set_dir).model
    assert (facts.family, facts.base_is_dequantised, facts.license, facts.vision) == ("Gemma 3", True, "gemma", False)
    text = tmp_path / "heldout.txt"
    text.write_bytes(calibration.held_out().data)
    packaged = demo.packaged_gguf(tmp_path)
    ours, theirs = perplexity(build, base, text, log), perplexity(build, packaged, text, log)
    assert ours == pytest.approx(theirs, rel=0.02)
    header, original = gguf_io.read_header(base), gguf_io.read_header(packaged)
    for key in ("tokens", "token_type", "scores"):
        assert header.get(f"tokenizer.ggml.{key}") == original.get(f"tokenizer.ggml.{key}"), key


def test_packaged_file_with_other_bytes_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "gemma-3-270m-q4_k_m.gguf"
    wrong.write_bytes(b"GGUF")
    with pytest.raises(BadInputError, match="sha256"):
        demo.packaged_gguf(tmp_path)
    assert not wrong.exists()


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        pytest.param(1.0, 0x3F80, id="exact"),
        pytest.param(1.00390625, 0x3F80, id="tie-to-even-down"),
        pytest.param(1.01171875, 0x3F82, id="tie-to-even-up"),
        pytest.param(-2.5, 0xC020, id="negative"),
        pytest.param(1.0041, 0x3F81, id="just-above-tie"),
    ],
)
def test_to_bf16_rounds_to_nearest_even(value: float, bits: int) -> None:
    assert demo.to_bf16(np.array([value], dtype=np.float32)).tolist() == [bits]
