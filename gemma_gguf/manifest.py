"""`quantset.json`: what a quant set is, how it was made and from what. The card is rendered from it and nothing else.

Consumes and produces JSON through strict models: an unknown or missing field is an error that names it, a newer
schema is refused rather than half understood. Written atomically after every finished file, so it never names a file
that is not there and whole. All sizes are bytes, all times seconds, all hashes SHA-256 in hexadecimal; paths are
relative to the set's directory. `README.md` describes the fields for readers.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, PydanticSerializationError

from gemma_gguf.errors import BadInputError
from gemma_gguf.files import write_atomic
from gemma_gguf.recipes import TABLE, Recipe

SCHEMA_VERSION: Final = 4
FILE_NAME = "quantset.json"
MAX_BYTES = 16_000_000  # of the whole document; that of the demo's 27 files has 34 kB

Count = Annotated[int, Field(ge=-(2**63), lt=2**63)]
RecipeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,60}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
HubId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
# A file of the set, never a path out of it: one component, or two for a folder of shards.
SetPath = Annotated[str, Field(pattern=r"^[\w][\w.+-]*(/[\w][\w.+-]*)?$", max_length=255)]


def _whole_number(value: object) -> object:
    """JSON's true and 1.0 equal 1 in Python; a schema version is neither."""
    if type(value) is not int or not 1 <= value <= SCHEMA_VERSION:
        raise PydanticCustomError("schema_version", f"Input should be 1 to {SCHEMA_VERSION}")
    return value


def _pairs(flags: list[str]) -> list[str]:
    if len(flags) % 2 or not all(option.startswith("--") for option in flags[::2]):
        raise PydanticCustomError("flags", "should be options of llama-quantize, each with its value")
    return flags


Flags = Annotated[list[str], AfterValidator(_pairs)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Sampling(_Model):
    """How the checkpoint's generation_config.json says to sample; `None` where it does not say."""

    do_sample: bool | None
    temperature: float | None
    top_k: Count | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None


class Support(_Model):
    """Since when llama.cpp loads an architecture. `release` is None where no source names the first one."""

    pull_request: Count
    merged: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    release: Annotated[str, Field(pattern=r"^b\d{1,6}$")] | None


class EmbeddingFacts(_Model):
    """What sentence-transformers files say of a model that gives embeddings instead of logits."""

    prompts: dict[str, str]  # name -> what stands before a text: `query`, `document`, tasks
    similarity: str | None  # how vectors are compared: `cosine`
    dense: list[str]  # directories of the layers after the pooling


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
    left_out: list[Literal["vision", "audio"]]  # the checkpoint has them, --no-mmproj made a set that reads
    qat: bool
    license: str | None
    chat_template: str | None
    sampling: Sampling | None  # None: of schema 1, which did not record it
    support: Support | None
    embedding: EmbeddingFacts | None  # None: a model that has logits
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


class ConverterFacts(_Model):
    """The files of llama.cpp's converter that made the base and the projectors, as far as they were imported."""

    build: str  # key of the llama.cpp build they are of
    files: dict[str, Sha256]  # relative to the converter's directory


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
    coverage: list["Coverage"]  # empty: of schema 1, which did not record it


class Coverage(_Model):
    """What the imatrix saw of one kind of weight. Each list has one number for every layer in `layers`.

    A tensor of several experts counts the tokens that each of them was given.
    """

    kind: Annotated[str, Field(pattern=r"^[\w.]{1,60}$")]  # `ffn_down_exps`
    layers: list[Count]
    n_experts: Count
    tokens_min: list[Count]  # of the expert that saw the fewest
    tokens_median: list[Count]
    tokens_max: list[Count]
    unseen: list[Count]  # experts without any data
    active: list[float]  # share of columns whose mean squared activation is above 1e-5
    evenness: list[float]  # entropy of the columns' importance over its maximum: 1 when all count the same

    @model_validator(mode="after")
    def _one_number_per_layer(self) -> "Coverage":
        lists = (self.tokens_min, self.tokens_median, self.tokens_max, self.unseen, self.active, self.evenness)
        if any(len(numbers) != len(self.layers) for numbers in lists):
            raise PydanticCustomError("per_layer", "every list should have one number per layer")
        return self


class Checks(_Model):
    """What was verified before the file got its name."""

    layout_sha256: Sha256  # over tensor names, shapes and types in file order
    sampled_rows: Count  # dequantised and found finite
    # How it was loaded in llama.cpp and gave finite logits or embeddings: `bindings`, or a tool of the build.
    load: str | None


class RemotePlace(_Model):
    """Where a file is that is not on this disk: a repository of the Hub, and a commit that holds it."""

    repo: HubId
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class Shard(_Model):
    """One of the files that a large file is cut into, by llama.cpp's names."""

    name: SetPath
    n_bytes: Count
    sha256: Sha256


class FileEntry(_Model):
    """One file of the set, or a folder of shards: then `name` is that of the first, which llama.cpp is given."""

    name: SetPath
    kind: Literal["model", "mmproj", "imatrix"]
    recipe: RecipeName | None
    about: str | None  # what the recipe is
    ftype: str | None  # what llama-quantize was told, beside `flags`
    flags: Flags
    static: bool  # made without the set's imatrix
    state: Literal["local", "remote"]  # `local` files are there and whole, `remote` ones need not be on this disk
    remote: RemotePlace | None  # of `remote` files
    n_bytes: Count  # of all shards
    sha256: Sha256  # of shards that of the whole file they were cut from: one model has one hash, whatever its form
    shards: list[Shard]  # empty: one file
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

    @model_validator(mode="after")
    def _is_somewhere(self) -> "FileEntry":
        if (self.state == "remote") != (self.remote is not None):
            raise PydanticCustomError("place", "remote files, and no others, should have a repository and a commit")
        return self

    @model_validator(mode="after")
    def _shards_are_its_own(self) -> "FileEntry":
        folders = {shard.name.rpartition("/")[0] for shard in self.shards}
        if self.shards and (
            len(self.shards) < 2
            or folders != {self.name.rpartition("/")[0]}
            or self.shards[0].name != self.name
            or sum(shard.n_bytes for shard in self.shards) != self.n_bytes
        ):
            raise PydanticCustomError("shards", "shards should be two or more of one folder, with these bytes together")
        return self

    @property
    def parts(self) -> list[Shard]:
        """What is on the disk: the shards, or the file itself."""
        return self.shards or [Shard(name=self.name, n_bytes=self.n_bytes, sha256=self.sha256)]

    def is_there(self, set_dir: Path) -> bool:
        """Whether all of it is in the set's directory; what it holds is not looked at."""
        return all((set_dir / part.name).is_file() for part in self.parts)

    def remove(self, set_dir: Path) -> None:
        """Delete it from the set's directory, its folder too."""
        for part in self.parts:
            (set_dir / part.name).unlink(missing_ok=True)
        if self.shards:
            with contextlib.suppress(OSError):  # somebody put a file of his own there
                (set_dir / self.name).parent.rmdir()

    def as_recipe(self) -> Recipe:
        """How a model file was made, whatever the table or the user's settings say by now."""
        return Recipe(
            name=str(self.recipe),
            ftype=str(self.ftype),
            flags=tuple(self.flags),
            parent=self.parent,
            about=self.about or "",
            static=self.static,
        )


class CustomRecipe(_Model):
    """A recipe of the user's own that a set was asked for."""

    name: RecipeName
    ftype: str
    about: str
    flags: Flags

    def as_recipe(self) -> Recipe:
        return Recipe(self.name, self.ftype, self.about, tuple(self.flags))


class Measured(_Model):
    """A measured number with its standard error; `se` is None where one cannot be given."""

    value: Annotated[float, Field(gt=-1e100, lt=1e100)]  # far from what a float holds: a card multiplies by 100
    se: Annotated[float, Field(ge=0, lt=1e100)] | None


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


class Similarity(_Model):
    """How close one file's embeddings are to the base's, on lines of a text that calibration never saw.

    The base's own `Similarity`, against itself, is the noise floor of the rest.
    """

    base_sha256: Sha256
    text: str
    text_sha256: Sha256  # of the chosen lines with their prompts
    prompt: str  # what stood before each line
    n_lines: Count
    n_embd: Count
    cosine: Measured  # mean over the lines
    cosine_min: float
    same_nearest: Measured  # share of lines whose most similar other line is the same, 0 to 1
    build: str  # key of the llama.cpp build that measured


class Speed(_Model):
    """How fast one file runs on the machine that made the set, by llama-bench, and what it takes."""

    build: str
    cpu: str
    backend: str
    threads: Count
    n_prompt: Count
    n_generate: Count  # 0 for a model that generates nothing
    prompt_per_second: Measured  # tokens
    generate_per_second: Measured | None
    peak_memory_bytes: Count | None  # resident, while loaded


class Failed(_Model):
    """Why a file gave no figures, and what was tried: as in `Quality`, or of a model that gives embeddings."""

    base_sha256: Sha256
    text: str
    text_sha256: Sha256
    mode: Literal["plain", "chat", "embedding"]
    chunk_size: Count | None  # tokens; embeddings are of lines
    n_chunks: Count
    build: str
    why: str


class Evidence(_Model):
    """What was measured of the bytes with one sha256."""

    quality: Quality | None
    similarity: Similarity | None  # in the place of quality for a model that gives embeddings
    failed: Failed | None  # in the place of both: the file's logits or embeddings are not finite
    speed: Speed | None


class GateFacts(_Model):
    """The bounds of the quality gate that were chosen for this set, and what they hold back: see `gates.py`."""

    max_kld: Annotated[float, Field(gt=0)]  # nats, of any file
    max_kld_ratio: Annotated[float, Field(ge=1)]  # times the KLD of a smaller file ...
    errors: Annotated[float, Field(ge=0)]  # ... by more than so many standard errors of the difference
    held: dict[SetPath, str]  # file -> why; what reads this document without gemma-gguf finds it here


DEFAULT_GATES = GateFacts(max_kld=1.0, max_kld_ratio=2.0, errors=3.0, held={})


class GridFit(_Model):
    """How the weights of one kind lie on the grid of a block type: 32 weights share a scale, levels are -8 to 7.

    Residuals are root mean square, relative to the weights'. A block fits when some scale gives back all of its
    weights to the precision of BF16.
    """

    kind: Annotated[str, Field(pattern=r"^[\w.]{1,60}$")]  # `ffn_down`
    n_tensors: Count
    n_blocks: Count  # looked at
    residual: float  # each block with its best scale
    residual_ggml: float  # with ggml's: the largest weight over -8
    residual_none: float  # what the best scales leave of the same weights when any grid in them is blurred
    fits: float  # share of the blocks, 0 to 1
    fits_ggml: float  # the same with the levels that ggml chooses


class QatFacts(_Model):
    """What is special about the set of a checkpoint that was trained for Q4_0."""

    said_by: Literal["checkpoint", "--qat"]
    embedding: Literal["Q6_K", "Q8_0"]  # of the Q4_0 file
    verdict: Literal["ggml", "free", "near", "none"] | None  # what the weights lie on: see `qat.verdict`; None: not yet
    grid: list[GridFit]


class CacheGroup(_Model):
    """Layers whose keys and values take the same room in the cache."""

    n_layers: Count
    windowed: bool  # keeps the last tokens alone, not the whole context
    k_width: Count  # elements per token and layer
    v_width: Count


class ContextMemory(_Model):
    """What llama.cpp said one context takes beside the weights, in bytes."""

    n_ctx: Count
    cache_bytes: Count
    compute_bytes: Count
    output_bytes: Count


class ContextFacts(_Model):
    """What a context of the model takes in memory: the base's own numbers, and what llama.cpp made of them."""

    n_ctx_train: Count
    n_embd: Count
    n_ff: Count  # the widest layer's, all experts of one token together
    q_width: Count  # elements of all queries of one token, in the widest layer
    n_embd_per_layer: Count  # of all layers together; 0 for models without such embeddings
    n_vocab: Count
    window: Count  # tokens; 0 when no layer is windowed
    cache: list[CacheGroup]
    measured: list[ContextMemory]  # empty when the build could not be asked
    build: str  # key of the llama.cpp build that was asked


class PromptExample(_Model):
    """A prompt as the model's own chat template writes it."""

    kind: Literal["plain", "system", "tools"]
    text: str


class PromptFacts(_Model):
    """What the chat template does with a conversation; `problem` says why it could not be rendered."""

    template_sha256: Sha256
    examples: list[PromptExample]
    problem: str | None


class ParityDifference(_Model):
    """One difference between what the base makes of a text and what the checkpoint's own tokenizer or template does."""

    kind: Literal["tokens", "vocabulary", "bos", "template"]
    where: str  # which text, conversation or token
    position: Count | None  # of the first differing token, or character of a prompt
    what: str


class ParityFacts(_Model):
    """Tokenizer and chat template of the base in llama.cpp against the checkpoint's in transformers."""

    probe_sha256: Sha256  # of everything that was asked
    reference: str  # "transformers 5.23.1, tokenizers 0.23.0"
    asked: Literal["bindings", "llama-server"]  # who told llama.cpp's ids
    build: str  # key of the llama.cpp build
    n_texts: Count
    n_tokens: Count  # compared one by one
    n_vocab: Count  # tokens whose text was compared
    n_added: Count  # added tokens, each read in a text of its own
    n_conversations: Count  # rendered by llama-server and by transformers
    left_out: dict[str, str]  # conversation or token -> why it was not compared
    added_bos: bool  # llama.cpp puts <bos> before a text where the checkpoint's tokenizer leaves that to the template
    problem: str | None  # why nothing could be compared; only with --allow-mismatch
    differences: list[ParityDifference]  # only with --allow-mismatch


class Picture(_Model):
    """A picture of the card, drawn from the data with this hash: `assets/<name>.svg` and `.png`."""

    data_sha256: Sha256
    svg_sha256: Sha256
    png_sha256: Sha256


class StageRecord(_Model):
    """A stage that was done: the hash of what it depends on, what was run, how long it took."""

    key: Sha256
    argv: list[list[str]]
    seconds: float
    outputs: dict[str, Sha256]  # file -> hash; files of the work directory are named `.work/...`


class FileDecision(_Model):
    """What a newer llama.cpp, or a corrected checkpoint, means for one file, and how that is known.

    `unchanged`: the same bytes; `keys`: the same tensors under another header; `remake`: other tensors; `unknown`:
    `why` says what is missing to decide.
    """

    outcome: Literal["unchanged", "keys", "remake", "unknown"]
    why: str
    tensors: list[str]  # that change; all of them when it is empty and the file is to be made again
    keys: list[str]  # of the header, that change
    sha256: Sha256 | None  # of the file this speaks of; None before it is recorded


class RefreshFacts(_Model):
    """The last comparison of the set with a llama.cpp build: `files` by name, and whether it was carried out."""

    before: BuildFacts  # the build of the set when it was compared
    build: BuildFacts  # what it was compared with
    state: Literal["checked", "applying", "applied"]
    files: dict[SetPath, FileDecision]
    evidence_builds: list[str]  # keys of builds whose measurements of unchanged files were kept


def argument(argv: Sequence[str], option: str) -> str | None:
    """What stands after an option in a recorded command line; None where it was not given."""
    return argv[argv.index(option) + 1] if option in argv[:-1] else None


class CardChoices(_Model):
    """What the maintainer chose for the card; kept, so that rendering it again asks for nothing."""

    theme: Literal["modern", "classic"]
    languages: list[Annotated[str, Field(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")]]  # README.md is English
    quantized_by: str
    repo: HubId | None  # None: not published


DEFAULT_CARD = CardChoices(theme="modern", languages=["en"], quantized_by="gemma-gguf", repo=None)


class Manifest(_Model):
    """The whole of `quantset.json`."""

    schema_version: Annotated[Literal[4], BeforeValidator(_whole_number)]
    tool_version: str
    stem: str
    model: ModelFacts
    llama_cpp: BuildFacts
    kernels: KernelFacts | None  # of the fan-out engine; None: not run yet, or of a version that did not record it
    converter: ConverterFacts | None  # None: of schema 2, which did not record it, not converted yet, or a given base
    # By key of a build: hash of what its ggml makes of fixed rows, by type; of every build that quantised files here.
    quantisers: dict[str, dict[str, Sha256]]
    refresh: RefreshFacts | None  # None: not compared with another build since the last run with another
    calibration: CalibrationFacts | None
    imatrix: ImatrixFacts | None
    stages: dict[str, StageRecord]
    recipes: list[RecipeName]  # what the last run was asked for: a row without a file is not made yet
    custom_recipes: list[CustomRecipe]  # those of `recipes` that are no rows of the package's table
    split_max_size: Count  # bytes of tensors that one file may hold; a file with more is a folder of shards
    files: list[FileEntry]
    card: CardChoices
    qat: QatFacts | None  # None: an ordinary model
    pins: dict[RecipeName, dict[str, str]]  # recipe -> tensor -> type it was raised to, for want of imatrix data
    gates: GateFacts
    evidence: dict[Sha256, Evidence]  # by a file's sha256: a changed file never keeps old numbers
    context: ContextFacts | None  # None: of schema 1, which did not record it, or not converted yet
    prompts: PromptFacts | None  # the same, or a model without a chat template
    pictures: dict[Annotated[str, Field(pattern=r"^[a-z]{1,40}$")], Picture]
    parity: ParityFacts | None  # None: of an older version, or not converted yet

    def file(self, name: str) -> FileEntry | None:
        return next((entry for entry in self.files if entry.name == name), None)

    def made(self, recipe: str) -> FileEntry | None:
        """The file of a recipe, in whatever form."""
        return next((entry for entry in self.files if entry.kind == "model" and entry.recipe == recipe), None)

    def row(self, recipe: str) -> Recipe | None:
        """The recipe of this name as it is asked for: a row of the table, or one of the set's own."""
        own = {row.name: row for row in self.custom_recipes}
        return TABLE.get(recipe) or (own[recipe].as_recipe() if recipe in own else None)

    def with_file(self, entry: FileEntry) -> "Manifest":
        """A copy that holds `entry` in the place of any older one of that name, or of that recipe."""

        def is_older(other: FileEntry) -> bool:
            return other.name == entry.name or (entry.kind == other.kind == "model" and other.recipe == entry.recipe)

        return self.model_copy(update={"files": [*(f for f in self.files if not is_older(f)), entry]})

    def begun_refresh(self, key: str) -> RefreshFacts | None:
        """The refresh to the build with this key that was interrupted, if there is one."""
        begun = self.refresh is not None and self.refresh.state == "applying" and self.refresh.build.key == key
        return self.refresh if begun else None

    def is_of_build(self, entry: FileEntry, key: str) -> bool:
        """Whether a build made this file, or was found to make just these bytes."""
        if entry.build == key:
            return True
        done = self.refresh
        if done is None or done.state != "applied" or done.build.key != key or entry.name not in done.files:
            return False
        found = done.files[entry.name]
        return found.outcome == "unchanged" and found.sha256 == entry.sha256

    def evidence_builds(self, key: str) -> frozenset[str]:
        """Builds whose measurements count as those of the build with this key: a refresh to it kept them."""
        done = self.refresh
        kept = done is not None and done.state != "checked" and done.build.key == key
        return frozenset(done.evidence_builds) if kept and done is not None else frozenset()

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
        loaded = Manifest.model_validate(_upgraded(raw, version) if type(version) is int else raw)
        loaded.model_dump_json()  # what cannot be written again must not be read
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise BadInputError(f"{path} is damaged at {where}: {first['msg']}", next_step=repair) from error
    except PydanticSerializationError as error:
        raise BadInputError(f"{path} is damaged: {error}", next_step=repair) from error
    return loaded


def _upgraded(raw: dict[str, Any], version: int) -> dict[str, Any]:
    """A document of an older schema with what newer ones added; what is wrong with it is left for the models to say."""
    if version == 1:
        raw = _with_schema_2(raw)
    if version in {1, 2}:
        raw = _with_schema_3(raw)
    if version in {1, 2, 3}:
        raw = {**_with_schema_4(raw), "schema_version": SCHEMA_VERSION}
    return raw


def _with_schema_2(raw: dict[str, Any]) -> dict[str, Any]:
    model, files, imatrix = raw.get("model"), raw.get("files"), raw.get("imatrix")
    made = [entry.get("recipe") for entry in files if isinstance(entry, dict)] if isinstance(files, list) else []
    return {
        **raw,
        "model": {**model, "sampling": None, "support": None} if isinstance(model, dict) else model,
        "imatrix": {**imatrix, "coverage": []} if isinstance(imatrix, dict) else imatrix,
        "recipes": [name for name in made if isinstance(name, str)],
        "card": DEFAULT_CARD.model_dump(),
        "evidence": {},
        "context": None,
        "prompts": None,
        "pictures": {},
    }


def _with_schema_3(raw: dict[str, Any]) -> dict[str, Any]:
    # Before, no prompts of a model that embeds were recorded, and its base lacks the dense layers.
    bare: dict[str, Any] = {"prompts": {}, "similarity": None, "dense": []}
    model = raw.get("model")
    embeds = isinstance(model, dict) and model.get("gguf_arch") == "gemma-embedding"
    raw = _with_fields(raw, model={"embedding": bare if embeds else None}, evidence={"similarity": None})
    files = raw.get("files")
    if isinstance(files, list):
        raw = {**raw, "files": [_with_recipe(entry) if isinstance(entry, dict) else entry for entry in files]}
    added: dict[str, Any] = {
        "kernels": None,
        "converter": None,
        "quantisers": {},
        "refresh": None,
        "custom_recipes": [],
    }
    return {**added, **raw}


def _with_recipe(entry: dict[str, Any]) -> dict[str, Any]:
    """Before there were custom recipes, the name alone said how a file was made; nothing was published."""
    name = entry.get("recipe")
    row = TABLE.get(name) if isinstance(name, str) else None
    return {"ftype": row.ftype if row else name, "flags": list(row.flags) if row else [], "remote": None, **entry}


def _with_schema_4(raw: dict[str, Any]) -> dict[str, Any]:
    """Before, every file was one file made with the set's imatrix, and nothing was held back."""
    raw = _with_fields(raw, model={"left_out": []}, evidence={"failed": None}, files={"static": False, "shards": []})
    added: dict[str, Any] = {
        "split_max_size": 50_000_000_000,
        "qat": None,
        "pins": {},
        "parity": None,
        "gates": DEFAULT_GATES.model_dump(),
    }
    return {**added, **raw}


def _with_fields(raw: dict[str, Any], **added: dict[str, Any]) -> dict[str, Any]:
    """The document with fields added to parts of it: to `model`, and to every one of `evidence` and `files`."""

    def completed(part: object, fields: dict[str, Any]) -> object:
        return {**fields, **part} if isinstance(part, dict) else part

    new = dict(raw)
    for name, fields in added.items():
        part = raw.get(name)
        if isinstance(part, list):
            new[name] = [completed(one, fields) for one in part]
        elif isinstance(part, dict):
            whole = name == "model"
            new[name] = completed(part, fields) if whole else {k: completed(one, fields) for k, one in part.items()}
    return new


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def save(manifest: Manifest, directory: Path) -> None:
    """Write the manifest of a set, whole or not at all."""
    write_atomic(directory / FILE_NAME, manifest.model_dump_json(indent=1) + "\n")
