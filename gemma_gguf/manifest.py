"""`quantset.json`: what a quant set is, how it was made and from what. The card is rendered from it and nothing else.

Consumes and produces JSON through strict models: an unknown or missing field is an error that names it, a newer
schema is refused rather than half understood. Written atomically after every finished file, so it never names a file
that is not there and whole. All sizes are bytes, all times seconds, all hashes SHA-256 in hexadecimal; paths are
relative to the set's directory. `README.md` describes the fields for readers.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, PydanticSerializationError

from gemma_gguf.errors import BadInputError
from gemma_gguf.files import write_atomic

SCHEMA_VERSION: Final = 2
FILE_NAME = "quantset.json"
MAX_BYTES = 16_000_000  # of the whole document; that of the demo's 27 files has 34 kB

Count = Annotated[int, Field(ge=-(2**63), lt=2**63)]
RecipeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,60}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A file of the set, never a path out of it: one component, or two for a folder of shards.
SetPath = Annotated[str, Field(pattern=r"^[\w][\w.+-]*(/[\w][\w.+-]*)?$", max_length=255)]


def _whole_number(value: object) -> object:
    """JSON's true and 1.0 equal 1 in Python; a schema version is neither."""
    if type(value) is not int or not 1 <= value <= SCHEMA_VERSION:
        raise PydanticCustomError("schema_version", f"Input should be 1 to {SCHEMA_VERSION}")
    return value


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelFacts(_Model):
    """The checkpoint, read from its own files."""

    org: str
    model: str
    origin: Literal["demo", "local", "hub"]
    repo: str | None  # hub id of the original model; None for a local directory without --name
    revision: str | None  # commit on the hub
    files: dict[str, Sha256]  # every file that was used
    architecture: str  # class name in config.json
    family: str
    gguf_arch: str
    n_parameters: Count
    vision: bool
    audio: bool
    qat: bool
    license: str | None
    chat_template: str | None
    front_matter: dict[str, Any]  # of the original card
    base_is_dequantised: bool


class BuildFacts(_Model):
    """The llama.cpp that made every file of the set."""

    source: str
    source_sha256: str
    version: str
    build_number: Count
    commit: str
    backend: str
    compiler: str
    cmake_args: list[str]
    key: str


class KernelFacts(_Model):
    """What quantised in ggml's place when the last fan-out ran; the bytes are the same with and without."""

    version: Count | None  # None when there was no library
    source_sha256: Sha256 | None
    isa: Literal["avx512", "avx2", "none"]
    types: list[str]  # approved: compared with this build's own ggml on this CPU
    off: dict[str, str]  # type -> why ggml did its work
    why_none: str | None


class CalibrationFacts(_Model):
    """The text behind the imatrix."""

    name: str
    source: str
    n_bytes: Count
    sha256: Sha256


class ImatrixFacts(_Model):
    """The importance matrix: how much text it saw, and which tensors it covers."""

    n_chunks: Count
    chunk_size: Count  # tokens
    n_entries: Count
    datasets: list[str]


class Checks(_Model):
    """What was verified before the file got its name."""

    layout_sha256: Sha256  # over tensor names, shapes and types in file order
    sampled_rows: Count  # dequantised and found finite
    load: str | None  # how it was loaded in llama.cpp and gave finite logits: `bindings`, `llama-perplexity`, or not


class FileEntry(_Model):
    """One file of the set."""

    name: SetPath
    kind: Literal["model", "mmproj", "imatrix"]
    recipe: RecipeName | None
    about: str | None  # what the recipe is
    state: Literal["local"]
    n_bytes: Count
    sha256: Sha256
    bpw: float | None  # bits per weight, as llama.cpp counts: tensor data alone
    types: dict[str, Count]  # ggml type -> number of tensors
    fallbacks: dict[str, Count]  # "Q4_K -> Q5_0" -> number of tensors whose columns did not allow the wanted type
    parent: RecipeName | None  # for `_L` rows
    differs: list[str]  # tensors that have another type than in the parent
    argv: list[str]
    engine: str
    seconds: float
    key: Sha256  # hash of everything this file depends on
    build: str  # key of the llama.cpp build that made it
    checks: Checks | None


class Measured(_Model):
    """A measured number with its standard error; `se` is None where one cannot be given."""

    value: float
    se: float | None


class Quality(_Model):
    """How close one file is to the base, on text that neither saw in calibration. Logarithms are natural.

    The base's own `Quality`, against itself, is the noise floor of the rest.
    """

    base_sha256: Sha256
    text: str
    text_sha256: Sha256
    mode: Literal["plain", "chat"]  # `chat`: the model's own turn format, special tokens parsed
    chunk_size: Count  # tokens
    n_chunks: Count
    n_tokens: Count  # scored
    ppl: Measured
    ppl_ratio: Measured  # file over base
    kld: Measured  # mean, nats
    kld_median: float
    kld_p99: float
    kld_p999: float | None  # of 10,000 scored tokens on
    delta_p_rms: Measured  # RMS of the change in the right token's probability, 0 to 1
    same_top_p: Measured  # share of tokens with the same most probable token, 0 to 1
    build: str  # key of the llama.cpp build that measured


class Speed(_Model):
    """How fast one file runs on the machine that made the set, by llama-bench, and what it takes."""

    build: str
    cpu: str
    backend: str
    threads: Count
    n_prompt: Count
    n_generate: Count
    prompt_per_second: Measured  # tokens
    generate_per_second: Measured
    peak_memory_bytes: Count | None  # resident, while loaded


class Evidence(_Model):
    """What was measured of the bytes with one sha256."""

    quality: Quality | None
    speed: Speed | None


class StageRecord(_Model):
    """A stage that was done: the hash of what it depends on, what was run, how long it took."""

    key: Sha256
    argv: list[list[str]]
    seconds: float
    outputs: dict[str, Sha256]  # file -> hash; files of the work directory are named `.work/...`


class Manifest(_Model):
    """The whole of `quantset.json`."""

    schema_version: Annotated[Literal[2], BeforeValidator(_whole_number)]
    tool_version: str
    stem: str
    model: ModelFacts
    llama_cpp: BuildFacts
    kernels: KernelFacts | None = None  # of the fan-out engine; older manifests do not say
    calibration: CalibrationFacts | None
    imatrix: ImatrixFacts | None
    stages: dict[str, StageRecord]
    files: list[FileEntry]
    evidence: dict[Sha256, Evidence]  # by a file's sha256: a changed file never keeps old numbers

    def file(self, name: str) -> FileEntry | None:
        return next((entry for entry in self.files if entry.name == name), None)

    def with_file(self, entry: FileEntry) -> "Manifest":
        """A copy that holds `entry` in the place of any older one of that name."""
        return self.model_copy(update={"files": [*(f for f in self.files if f.name != entry.name), entry]})

    def with_stage(self, name: str, record: StageRecord) -> "Manifest":
        return self.model_copy(update={"stages": {**self.stages, name: record}})


def load(directory: Path) -> Manifest:
    """Read the manifest of a set. Raises `BadInputError` when it is missing, damaged or of a newer schema."""
    path = directory / FILE_NAME
    if not path.is_file():
        raise BadInputError(
            f"{directory} has no {FILE_NAME}: it is not a quant set", next_step="Make one with: gemma-gguf run MODEL"
        )
    repair = "Restore it, or delete it and run the same command again: the set is made anew."
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise BadInputError(f"{path} has more than the {MAX_BYTES:,} bytes that are read", next_step=repair)
        raw = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
        # A lone surrogate or 1e999 could be read but not saved again.
        json.dumps(raw, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is not readable JSON: {error}", next_step=repair) from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BadInputError(
            f"{path} has schema version {version}, this gemma-gguf reads up to {SCHEMA_VERSION}",
            next_step="pip install --upgrade gemma-gguf",
        )
    try:
        loaded = Manifest.model_validate(_upgraded(raw) if type(version) is int and version == 1 else raw)
        loaded.model_dump_json()  # what cannot be written again must not be read
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise BadInputError(f"{path} is damaged at {where}: {first['msg']}", next_step=repair) from error
    except PydanticSerializationError as error:
        raise BadInputError(f"{path} is damaged: {error}", next_step=repair) from error
    return loaded


def _upgraded(raw: dict[str, Any]) -> dict[str, Any]:
    """A document of schema 1 with what schema 2 added."""
    return {**raw, "schema_version": SCHEMA_VERSION, "evidence": {}}


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def save(manifest: Manifest, directory: Path) -> None:
    """Write the manifest of a set, whole or not at all."""
    write_atomic(directory / FILE_NAME, manifest.model_dump_json(indent=1) + "\n")
