"""Checkpoint -> BF16 base GGUF, and `mmproj` for models that see or hear; through llama.cpp's own converter.

Consumes a `Source` and a `Build`, produces files in the work directory. The converter copies the directory's name
and the model card into keys, so it runs on a staged directory with a stable name that holds links to exactly the
needed files, and runs offline. What transformers 5 leaves out of a checkpoint that it saves is added there. It is the
only step that imports torch, in its own process.
"""

import importlib.util
import json
import math
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_gguf import embedding, gemma, gguf_io, vocabulary
from gemma_gguf.errors import BadInputError, MissingToolError, ToolFailedError, VerificationError
from gemma_gguf.files import partial_path, write_atomic
from gemma_gguf.gguf_io import Header
from gemma_gguf.llama_cpp import Build, RunLog, python_env, run_tool
from gemma_gguf.manifest import ConverterFacts
from gemma_gguf.progress import Progress, silent
from gemma_gguf.source import Source, tokenizer_json, weight_shapes

MMPROJ_TYPES = ("f16", "bf16", "f32")
# `model` is how the converter knows weight files where there is no index.
UNREAD_WEIGHTS, WEIGHT_INDEX = "model-unread-layers.safetensors", "model.safetensors.index.json"
MAX_UNREAD = 1 << 30  # bytes; E4B's 15 layers take 63 MB
CONVERTER_NEEDS = ("torch", "transformers", "sentencepiece", "safetensors")


@dataclass(frozen=True)
class Converted:
    """One output of the converter, still under a partial name. `files` are those of the converter that it used, with
    their SHA-256."""

    final_name: str
    partial: Path
    header: Header
    argv: tuple[str, ...]
    seconds: float
    files: Mapping[str, str]


def base_name(stem: str) -> str:
    """File name of the BF16 row, which is the base itself."""
    return f"{stem}-bf16.gguf"


def mmproj_name(stem: str, outtype: str) -> str:
    return f"mmproj-{stem}-{outtype}.gguf"


def output_names(source: Source) -> list[str]:
    """Final names of everything that conversion of this model makes, the base first."""
    stem = source.name.stem
    projectors = [mmproj_name(stem, t) for t in MMPROJ_TYPES] if source.facts.vision or source.facts.audio else []
    return [base_name(stem), *projectors]


def stage_checkpoint(source: Source, work: Path) -> Path:
    """A directory called like the model with links to the needed files, those of `completed`, and nothing else."""
    staged = work / "checkpoint" / source.name.model
    shutil.rmtree(staged.parent, ignore_errors=True)
    written = completed(source)
    for file in source.files:
        link = staged / file
        link.parent.mkdir(parents=True, exist_ok=True)
        if file not in written:
            link.symlink_to((source.path / file).resolve())
    for file, content in written.items():
        write_atomic(staged / file, content)
    return staged


def completed(source: Source) -> dict[str, bytes]:
    """Files with what Google's checkpoints say and transformers 5 does not save: {name: content}.

    The converter reads the vocabulary of Gemma 1 to 3n from tokenizer.model and the list of added tokens in
    tokenizer_config.json, and looks for a key in Gemma 4's configuration whether there are experts or not; llama.cpp
    wants weights of Gemma 3n that are never read.
    """
    family = gemma.by_gguf_arch(source.facts.gguf_arch)
    if family is not None and family.vocabulary != "tokenizer.json":
        return {**_completed_tokenizer(source), **_completed_layers(source, family.n_layers_with_cache)}
    config = json.loads((source.path / "config.json").read_bytes())
    text = config.get("text_config")
    if not isinstance(text, dict) or {"moe_intermediate_size", "expert_intermediate_size"} & text.keys():
        return {}
    text["moe_intermediate_size"] = None
    return {"config.json": json.dumps(config, indent=2).encode()}


def _completed_layers(source: Source, with_cache: int | None) -> dict[str, bytes]:
    """Zeros for the keys and values of the last layers of Gemma 3n, those from `with_cache` on.

    They take them of earlier layers, so transformers neither loads nor saves their own. llama.cpp does not read them
    either (`gemma.unread_layers`), but does not load a file without them.
    """
    if with_cache is None:
        return {}
    shapes = weight_shapes(source)
    lacking: dict[str, tuple[int, ...]] = {}
    for name in shapes:
        match = re.fullmatch(r"(.*\blayers\.)(\d+)(\.self_attn\.)q_proj\.weight", name)
        if match is None or int(match[2]) < with_cache:
            continue
        for part in ("k_proj", "v_proj", "k_norm"):
            own, first = (f"{match[1]}{layer}{match[3]}{part}.weight" for layer in (match[2], 0))
            if own not in shapes and first in shapes:
                lacking[own] = shapes[first]
    if not lacking:
        return {}
    if 2 * sum(map(math.prod, lacking.values())) > MAX_UNREAD:
        raise BadInputError(
            f"{source.path} lacks the keys and values of layers from {with_cache} on, more than any Gemma 3n has",
            next_step="Copy them from the model that it was tuned from.",
        )
    written = {UNREAD_WEIGHTS: _zeros(lacking)}
    if WEIGHT_INDEX in source.files:
        index = json.loads((source.path / WEIGHT_INDEX).read_bytes())
        index["weight_map"] |= dict.fromkeys(lacking, UNREAD_WEIGHTS)
        written[WEIGHT_INDEX] = json.dumps(index).encode()
    return written


def _zeros(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A safetensors file of BF16 zeros. Format: https://github.com/huggingface/safetensors#format"""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def _completed_tokenizer(source: Source) -> dict[str, bytes]:
    stated = source.path / "tokenizer_config.json"
    config = json.loads(stated.read_bytes()) if stated.name in source.files else {}
    whole = "tokenizer.model" in source.files and "added_tokens_decoder" in config
    if whole or "tokenizer.json" not in source.files:
        return {}
    tokenizer = tokenizer_json(source.path)
    written = {}
    if "tokenizer.model" not in source.files:
        pieces = vocabulary.pieces_of(tokenizer)
        if pieces is None:  # of another kind: the converter reads the file itself, if it can
            return {}
        written["tokenizer.model"] = vocabulary.sentencepiece_model(pieces)
    if "added_tokens_decoder" not in config and (added := vocabulary.added_tokens(tokenizer)):
        written[stated.name] = json.dumps({**config, "added_tokens_decoder": added}).encode()
    return written


def converter_argv(
    build: Build, staged: str, outtype: str, outfile: str, *, mmproj: bool, flags: Sequence[str] = ()
) -> list[str]:
    """The converter's command line; paths are relative to the work directory, so none of this machine's is kept.

    `converter.py` runs it and lists its files. -P: neither that file's directory nor the working one is searched.
    """
    kind = ["--mmproj"] if mmproj else [*flags]
    tracing = [sys.executable, "-P", str(Path(__file__).with_name("converter.py"))]
    return [*tracing, str(build.converter), staged, "--outtype", outtype, "--outfile", outfile, *kind]


def parse_converter_log(text: str) -> dict[str, str]:
    """{file of the converter: SHA-256}, from what `converter.py` printed last."""
    line = next((line for line in reversed(text.splitlines()) if line.startswith('{"converter_files": ')), None)
    if line is None:
        raise ToolFailedError("the converter ended without the list of its files")
    return dict(json.loads(line)["converter_files"])


def missing_packages() -> tuple[str, ...]:
    """What the converter imports and this Python does not have; nothing is imported to find out."""
    return tuple(name for name in CONVERTER_NEEDS if importlib.util.find_spec(name) is None)


def convert(source: Source, build: Build, work: Path, *, log: RunLog, progress: Progress = silent) -> list[Converted]:
    """Convert the checkpoint: the BF16 base and, for multimodal models, an mmproj in f16, bf16 and f32.

    Raises `MissingToolError` without the `convert` extra, `ToolFailedError` when the converter fails, and
    `VerificationError` when what it wrote is not what the checkpoint holds.
    """
    if missing := missing_packages():
        raise MissingToolError(
            f"the converter needs {', '.join(missing)}", next_step="pip install 'gemma-gguf[convert]'"
        )
    checkpoint = stage_checkpoint(source, work)
    if added := sorted(path.name for path in checkpoint.iterdir() if path.is_file() and not path.is_symlink()):
        log.note(f"written for the converter beside the checkpoint's own files: {', '.join(added)}")
    staged = checkpoint.relative_to(work).as_posix()
    stem = source.name.stem
    flags = embedding.converter_flags(source.facts.gguf_arch)
    base = _convert_one(
        build, work, staged, "bf16", base_name(stem), mmproj=False, flags=flags, log=log, progress=progress
    )
    if source.facts.embedding is not None:
        embedding.check_base(base.header, source.facts.embedding)
    made = [base]
    if len(output_names(source)) > 1:
        for outtype in MMPROJ_TYPES:
            name = mmproj_name(stem, outtype)
            try:
                made.append(_convert_one(build, work, staged, outtype, name, mmproj=True, log=log, progress=progress))
            except ToolFailedError as error:
                raise ToolFailedError(
                    f"llama.cpp's converter cannot make the projector of this model: {error.what}",
                    next_step="Try another llama.cpp with --llama-cpp, or make the set without projectors: --no-mmproj",
                    log=error.log,
                ) from error
        _check_projectors(source, base.header, made[1:])
    shutil.rmtree(work / "checkpoint")
    return made


def _convert_one(
    build: Build,
    work: Path,
    staged: str,
    outtype: str,
    name: str,
    *,
    mmproj: bool,
    flags: Sequence[str] = (),
    log: RunLog,
    progress: Progress,
) -> Converted:
    written = partial_path(work / name)
    written.unlink(missing_ok=True)

    def show(piece: str) -> None:
        if match := re.match(r"Writing: +(\d+)%", piece):
            progress(f"converting {name}", int(match[1]), 100, "%")

    argv = converter_argv(build, staged, outtype, written.name, mmproj=mmproj, flags=flags)
    done = run_tool(argv, log=log, cwd=work, env=python_env(build), on_piece=show)
    header = gguf_io.read_header(written)
    if not header.tensors:
        raise VerificationError(f"the converter wrote {name} without a single tensor", log=log.path)
    at = argv.index(str(build.converter))
    recorded = ("python", build.converter.name, *argv[at + 1 :])
    return Converted(name, written, header, recorded, done.seconds, parse_converter_log(done.output))


def converter_facts(build: Build, made: Sequence[Converted]) -> ConverterFacts:
    """The files of this build's converter that any of these outputs needed."""
    return ConverterFacts(build=build.key, files={name: sha for output in made for name, sha in output.files.items()})


def _check_projectors(source: Source, base: Header, projectors: Sequence[Converted]) -> None:
    """All three hold the same tensors, what the model sees and hears with, and about as many weights as the checkpoint
    has beyond its text model.
    """
    first = projectors[0].header
    for sense, expected in (("vision", source.facts.vision), ("audio", source.facts.audio)):
        if expected and not first.get(f"clip.has_{sense}_encoder"):
            raise VerificationError(f"{projectors[0].final_name} holds no {sense} encoder, the checkpoint has one")
    for other in projectors[1:]:
        if set(other.header.by_name) != set(first.by_name):
            raise VerificationError(f"{other.final_name} holds other tensors than {projectors[0].final_name}")
    beyond_text = source.facts.n_parameters - base.n_elements
    if first.n_elements < 0.5 * beyond_text:
        raise VerificationError(
            f"{projectors[0].final_name} holds {first.n_elements:,} weights in {len(first.tensors)} tensors, but the "
            f"checkpoint has {beyond_text:,} beyond its text model: the projector is not whole"
        )
