"""A projector gets its name only after the real llama.cpp build saw through it; and the fallbacks of other builds."""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_gguf import convert, factory, gguf_io, manifest, verify
from gemma_gguf.convert import Converted
from gemma_gguf.errors import GemmaGGUFError, VerificationError
from gemma_gguf.llama_cpp import Build, RunLog
from gemma_gguf.session import Options, Report
from tests.embedding_gemma import write_embedding_gemma
from tests.test_card_commands import png

STEM = "test_tiny-vision"


@pytest.fixture
def without_bindings(build: Build, tmp_path: Path) -> Build:
    """The real build as one of `git:` or `dir:` would be."""
    root = tmp_path / "build"
    root.mkdir()
    for name in ("bin", "source"):
        (root / name).symlink_to(build.root / name)
    return replace(build, root=root)


def header_only(path: Path) -> None:
    """What was once published: a file of 1 kB."""
    path.write_bytes(path.read_bytes()[:1000])


def spoilt(name: str, word: bytes) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensor = gguf_io.read_header(path).by_name[name]
        data = bytearray(path.read_bytes())
        middle = tensor.offset + tensor.n_bytes // 2 // len(word) * len(word)
        data[middle : middle + len(word)] = word
        path.write_bytes(data)

    return spoil


def renamed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"v.blk.1.attn_q.weight", b"v.blk.1.attn_x.weight"))


def without_projection(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"mm.input_projection.weight", b"mm.input_projectiox.weight"))


BROKEN = {
    "1 kB": (header_only, "does not work in llama.cpp"),
    "NaN": (spoilt("mm.soft_emb_norm.weight", b"\x00\x00\xc0\x7f"), "its vision gives no finite numbers"),
    "a tensor missing": (renamed, "does not work in llama.cpp"),
    "no projection": (without_projection, "does not work in llama.cpp"),
}


@pytest.mark.parametrize("outtype", ["f16", "bf16", "f32"])
def test_projectors_work(outtype: str, finished: Report, build: Build, log: RunLog) -> None:
    base = finished.set_dir / f"{STEM}-bf16.gguf"
    made = finished.set_dir / f"mmproj-{STEM}-{outtype}.gguf"
    assert verify.check_projector(made, base, build=build, log=log) == "bindings"
    entry = manifest.load(finished.set_dir).file(made.name)
    assert entry is not None
    assert entry.checks is not None
    assert entry.checks.load == "bindings"


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_projector_is_found(how: str, finished: Report, build: Build, log: RunLog, tmp_path: Path) -> None:
    breaks, why = BROKEN[how]
    path = Path(shutil.copy(finished.set_dir / f"mmproj-{STEM}-f16.gguf", tmp_path))
    breaks(path)
    with pytest.raises(VerificationError, match=why):
        verify.check_projector(path, finished.set_dir / f"{STEM}-bf16.gguf", build=build, log=log)


def test_a_projector_of_another_model_is_found(
    finished: Report, build: Build, log: RunLog, tmp_path: Path, other_base: Path
) -> None:
    path = finished.set_dir / f"mmproj-{STEM}-f16.gguf"
    with pytest.raises(VerificationError, match=r"as the projector of other\.gguf"):
        verify.check_projector(path, other_base, build=build, log=log)


@pytest.fixture(scope="module")
def other_base(finished: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with another width in its header."""
    path = tmp_path_factory.mktemp("other") / "other.gguf"
    header = gguf_io.read_header(finished.set_dir / f"{STEM}-bf16.gguf")
    gguf_io.write_with_values(header, path, {"gemma3.embedding_length": (512).to_bytes(4, "little")})
    return path


@pytest.mark.parametrize("how", ["NaN", "no projection"])
def test_a_broken_projector_never_gets_a_name(
    how: str, set_options: Options, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter writes it whole, but wrong: three files are made, none of them is in the set."""
    assert build.key
    real = convert.convert

    def wrong(*args: object, **named: object) -> list[Converted]:
        made = real(*args, **named)  # type: ignore[arg-type]
        BROKEN[how][0](made[2].partial)
        return made

    monkeypatch.setattr(convert, "convert", wrong)
    with pytest.raises(GemmaGGUFError, match=r"hold NaN or Inf|does not work in llama\.cpp"):
        factory.run(replace(set_options, out=tmp_path, until="convert"))
    names = [path.name for path in tmp_path.rglob("mmproj-*")]
    assert f"mmproj-{STEM}-bf16.gguf" not in names
    assert not (tmp_path / f"{STEM}-GGUF" / manifest.FILE_NAME).exists()  # nothing was recorded


def test_a_build_without_bindings_asks_its_tool(
    finished: Report, without_bindings: Build, log: RunLog, tmp_path: Path
) -> None:
    base, made = finished.set_dir / f"{STEM}-bf16.gguf", finished.set_dir / f"mmproj-{STEM}-f16.gguf"
    path = Path(shutil.copy(made, tmp_path))
    assert verify.check_projector(path, base, build=without_bindings, log=log) == "llama-mtmd-cli"
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".log") == ["build", made.name]
    without_projection(path)
    with pytest.raises(VerificationError, match=r"does not work in llama\.cpp"):
        verify.check_projector(path, base, build=without_bindings, log=log)


def test_embeddings_are_checked_without_bindings(
    build: Build, without_bindings: Build, log: RunLog, tmp_path: Path
) -> None:
    checkpoint = write_embedding_gemma(tmp_path / "tiny")
    options = Options(str(checkpoint), name="test/tiny", out=tmp_path / "out", chunks=6, until="convert")
    factory.run(options)
    (path,) = (tmp_path / "out").rglob("*-bf16.gguf")
    text = next((tmp_path / "out").rglob("heldout.txt"))
    assert verify.check_embeds(path, text, build=without_bindings, log=log) == "llama-imatrix"
    spoilt("blk.3.attn_norm.weight", b"\x00\x00\xc0\x7f")(path)
    for asked in (build, without_bindings):
        with pytest.raises(VerificationError, match=r"not finite|does not load"):
            verify.check_embeds(path, text, build=asked, log=log)


def test_llama_mtmd_cli_describes_a_picture_with_every_projector(
    finished: Report, build: Build, tmp_path: Path
) -> None:
    (tmp_path / "p.png").write_bytes(png())
    for outtype in convert.MMPROJ_TYPES:
        argv: list[str | Path] = [
            build.tool("llama-mtmd-cli"),
            "-m",
            finished.set_dir / f"{STEM}-Q4_K_M.gguf",
            "--image",
            "p.png",
        ]
        argv += ["--mmproj", finished.set_dir / f"mmproj-{STEM}-{outtype}.gguf", "-p", "What?", "-n", "4", "-t", "1"]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, check=False, timeout=120)
        # Its log is not flushed when it ends. The exit code tells of a projector that is not one of the model (above),
        # not of NaN: for that the bindings look at every number (`test_projectors_work`).
        assert done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace")[-2000:]
