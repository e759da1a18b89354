"""MODEL -> a local checkpoint, and what is true of it.

Consumes what the user typed: `demo`, a directory, or a hub id with an optional `@revision`. Produces a `Source`: a
directory, the hash of every file that conversion needs, and the facts of the model, read from those files. Nothing
of a model repository is ever executed: Python files are neither downloaded nor staged, `auto_map` and pickled
weights are refused with the reason.
"""

import contextlib
import fnmatch
import glob
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from gemma_gguf import demo, embedding, gemma, names, qat, vocabulary
from gemma_gguf.errors import BadInputError, GemmaGGUFError
from gemma_gguf.files import HashMemory, is_dir
from gemma_gguf.manifest import EmbeddingFacts, ModelFacts, Sampling
from gemma_gguf.progress import Progress, silent

# What conversion can need, as patterns of huggingface_hub; everything else stays where it is.
NEEDED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "README.md",
    # EmbeddingGemma: the dense layers of sentence-transformers
    "modules.json",
    "config_sentence_transformers.json",
    "[0-9]_*/config.json",
    "[0-9]_*/model.safetensors",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What is read of somebody else's files, in bytes; Gemma's largest are named beside each.
MAX_SAFETENSORS_HEADER = 16_000_000  # 0.2 MB in a shard of 27B
MAX_JSON = 16_000_000  # tokenizer_config.json: 1.2 MB
MAX_TOKENIZER = 256_000_000  # tokenizer.json: 33 MB; it is the converter that reads it
MAX_TOKENIZER_READ = 64_000_000  # where it is read here, as there is no tokenizer.model
MAX_TEMPLATE = 1_000_000  # 20 kB
MAX_FRONT_MATTER = 1_000_000  # characters
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
NAMINGS = ("org_model", "model")  # how files of a set begin: with `<org>_<model>`, or the model's name alone
OUTPUT, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class ModelName:
    """What the user typed, understood: `origin` is `demo`, `local` or `hub`."""

    origin: str
    org: str
    model: str
    location: Path | None = None  # of a local directory
    revision: str | None = None
    naming: str = NAMINGS[0]
    called: str | None = None  # ORG/MODEL that files are named by, where it is not the model's own

    @property
    def stem(self) -> str:
        """How files of the set begin, by the naming style: see `names.stem`."""
        org, _, model = (self.called or f"{self.org}/{self.model}").partition("/")
        return names.strip(model) if self.naming == "model" else names.stem(org, model)


@dataclass(frozen=True)
class Source:
    """A checkpoint on this disk and its facts. `files` are relative POSIX paths, only those that are needed."""

    name: ModelName
    path: Path
    facts: ModelFacts

    @property
    def files(self) -> Mapping[str, str]:
        return self.facts.files


def understand(model: str, name: str | None = None, naming: str = NAMINGS[0], tags: Iterable[str] = ()) -> ModelName:
    """What a run makes a set of, as `told_apart`; `tags` are the names of recipes beside the table's.

    Raises `BadInputError` for what is no model, or for a name that would make files that nobody can pick.
    """
    found = told_apart(model, name, naming)
    names.check_stem(found.stem, (*names.KNOWN_TAGS, *tags))
    return found


def told_apart(model: str, name: str | None = None, naming: str = NAMINGS[0]) -> ModelName:
    """A demo, a directory or a hub id; `name` is `ORG/MODEL` for a directory, or for the files of a hub id, `naming`
    one of `NAMINGS`. Raises `BadInputError` when MODEL is none of the three."""
    if name is not None and not re.fullmatch(rf"{NAME.pattern}/{NAME.pattern}", name):
        raise BadInputError(f"--name {name!r} is not ORG/MODEL", next_step="For example: --name my-org/my-gemma")
    if model == "demo":
        return ModelName("demo", demo.ORG, demo.MODEL, naming=naming)
    path = Path(model).expanduser()
    if model and is_dir(path):
        path = path.resolve()
        org, _, short = (name or f"local/{path.name}").partition("/")
        if not NAME.fullmatch(short):
            raise BadInputError(
                f"the directory name {short!r} cannot name files", next_step="Give the model a name: --name ORG/MODEL"
            )
        return ModelName("local", org, short, path, naming=naming)
    repo, _, revision = model.partition("@")
    if not re.fullmatch(rf"{NAME.pattern}/{NAME.pattern}", repo) or not is_hub_id(repo):
        raise BadInputError(
            f"there is no model {model!r}: no such directory, and not a hub id",
            next_step="Give demo, a checkpoint's directory, or a hub id such as google/gemma-3-4b-it.",
        )
    org, _, short = repo.partition("/")
    return ModelName("hub", org, short, revision=revision or None, naming=naming, called=name)


def is_hub_id(repo: str) -> bool:
    """Whether the Hub allows this id: no `--` or `..`, no `.git`, nothing but letters and digits at the ends."""
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415 - slow to import
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # noqa: PLC0415

    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return True


def fetch(
    name: ModelName,
    work: Path,
    memory: HashMemory,
    progress: Progress = silent,
    *,
    download: bool = True,
    projectors: bool = False,
) -> Source:
    """Have the checkpoint on this disk and read its facts. `work` is where the demo is rebuilt.

    Without `download` a hub model must be in the hub's cache already. With `projectors` it must hold what they need.
    """
    if name.origin == "hub":
        path, commit = _download(name) if download else _downloaded(name)
    elif name.origin == "demo":
        path, commit = _demo(work / "demo", progress), None
    else:
        assert name.location is not None
        path, commit = name.location, None
    found = examine(path, projectors=projectors)
    files, family = found.files, found.family
    _refuse_lost_output(path, found)
    vision, audio = gemma.modalities(found.architecture, found.config, found.tensors)
    card = _front_matter(path / "README.md")
    hashes = {}
    for done, file in enumerate(files):
        progress("hashing the checkpoint", done, len(files), "files")
        hashes[file] = memory.sha256(path / file)
    named = name.origin != "local" or name.org != "local"
    facts = ModelFacts(
        org=name.org,
        model=name.model,
        origin=name.origin,  # type: ignore[arg-type]
        repo=f"{name.org}/{name.model}" if named else None,
        revision=commit,
        files=hashes,
        architecture=found.architecture,
        family=family.name,
        gguf_arch=family.gguf_arch,
        n_parameters=sum(found.tensors.values()),
        vision=vision,
        audio=audio,
        left_out=[],
        qat=qat.is_said(name.model, card),
        license=card.get("license") if isinstance(card.get("license"), str) else None,
        chat_template=_chat_template(path),
        sampling=_sampling(path),
        support=family.support,
        embedding=found.embedding,
        front_matter=card,
        base_is_dequantised=name.origin == "demo",
    )
    return Source(name, path, facts)


def reading(found: Source) -> Source:
    """The checkpoint without what it sees and hears, as --no-mmproj asks: its set has no projectors."""
    facts = found.facts
    left_out = [sense for sense, has in (("vision", facts.vision), ("audio", facts.audio)) if has]
    changed = {"vision": False, "audio": False, "left_out": left_out}
    return replace(found, facts=facts.model_copy(update=changed))


@dataclass(frozen=True)
class Examined:
    """A checkpoint that can be converted, by everything that can be told without reading its weights."""

    files: tuple[str, ...]  # relative POSIX paths of those that are needed
    config: Mapping[str, Any]
    architecture: str
    family: gemma.Family
    tensors: Mapping[str, int]  # number of elements of each
    embedding: EmbeddingFacts | None  # of a model that gives embeddings


def examine(path: Path, *, projectors: bool = False) -> Examined:
    """Look at a checkpoint on this disk. Raises `BadInputError` with the first reason why it cannot be used;
    with `projectors` also when it sees, but no projector can be made of it.
    """
    files = _needed_files(path)
    _refuse_links(path, files)
    _refuse_unusable(path)
    _refuse_code(path, files)
    config = _json(path / "config.json")
    architecture, family = _architecture(path, config)
    _refuse_without_vocabulary(path, family, files)
    _refuse_other_vocabulary(path, family, files)
    said = _embedding(path) if family.gguf_arch in gemma.WITHOUT_LOGITS else None
    weights = [file for file in files if said is not None or "/" not in file]
    tensors = _tensor_shapes(path, weights)
    if projectors and gemma.modalities(architecture, config, tensors)[0]:
        _refuse_without_projector(path, family.architectures[architecture].vision, tensors)
    return Examined(tuple(files), config, architecture, family, tensors, said)


def _embedding(path: Path) -> EmbeddingFacts:
    """What the sentence-transformers files say, each dense layer that they name being there."""
    modules, described = path / "modules.json", path / "config_sentence_transformers.json"
    said = embedding.facts(
        _json_value(modules) if modules.is_file() else None, _json(described) if described.is_file() else {}
    )
    for dense in said.dense:
        for file in ("config.json", "model.safetensors"):
            if not re.fullmatch(r"[0-9]_[A-Za-z]{1,40}", dense) or not (path / dense / file).is_file():
                raise BadInputError(
                    f"{path} lacks {dense[:80]}/{file}, which modules.json names: without it the embeddings are others",
                    next_step="Download the whole repository again.",
                )
    return said


def _demo(directory: Path, progress: Progress) -> Path:
    checkpoint = directory / demo.MODEL
    if not (checkpoint / "config.json").is_file():
        packaged = demo.packaged_gguf(directory)
        demo.rebuild_checkpoint(packaged, checkpoint, progress)
        packaged.unlink()
    return checkpoint


def _download(name: ModelName) -> tuple[Path, str]:
    """(snapshot directory, commit) of a hub model; only what conversion needs is downloaded.

    Its configuration comes first, so that a model that is refused for it costs no gigabytes.
    """
    repo = f"{name.org}/{name.model}"
    with _hub_errors(repo, name.revision):
        commit, sizes = _listing(repo, name.revision)
        _configuration(repo, commit, sizes)
        return _snapshot(repo, commit, [file for file in sizes if _is_needed(file)]), commit


def _downloaded(name: ModelName) -> tuple[Path, str]:
    """(snapshot directory, commit) of a hub model that was downloaded before."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import, and only the hub needs it

    repo = f"{name.org}/{name.model}"
    with _hub_errors(repo, name.revision):
        path = Path(snapshot_download(repo, revision=name.revision, local_files_only=True))
    return path, path.name


def _snapshot(repo: str, commit: str, files: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import, and only the hub needs it

    return Path(snapshot_download(repo, revision=commit, allow_patterns=[glob.escape(file) for file in files]))


def _configuration(repo: str, commit: str, sizes: Mapping[str, int]) -> Mapping[str, Any]:
    """`config.json` of a hub model, after the small JSON files that came with it were found harmless."""
    if "config.json" not in sizes:
        raise BadInputError(f"{repo} has no config.json: it is not a Hugging Face checkpoint")
    small = [file for file in sizes if _is_needed(file) and file.endswith(".json") and file not in TOKENIZERS]
    for file in small:
        if sizes[file] > MAX_JSON:
            raise BadInputError(f"{repo}/{file} has {sizes[file]:,} bytes, more than the {MAX_JSON:,} that are read")
    path = _snapshot(repo, commit, small)
    _refuse_code(path, small)
    config = _json(path / "config.json")
    _, family = _architecture(path, config)
    if not any(name in sizes for name in TOKENIZERS):
        raise BadInputError(f"{repo} has no tokenizer (tokenizer.model or tokenizer.json)")
    _refuse_without_vocabulary(repo, family, sizes)
    return config


@dataclass(frozen=True)
class Preview:
    """What can be told of a model before anything large is done: numbers of weights, bytes still to be downloaded."""

    n_parameters: int
    n_embedding: int  # 0 when it cannot be told
    n_projector: int
    download: int
    n_vocab: int = 0  # 0 when it cannot be told, or when the model has no logits


def preview(name: ModelName, work: Path, *, projectors: bool = False) -> Preview:
    """Look at a model without downloading its weights; raises what `fetch` would raise for it."""
    if name.origin == "hub":
        return _hub_preview(name)
    path = name.location if name.location is not None else work / "demo" / demo.MODEL
    if name.origin == "demo" and not (path / "config.json").is_file():
        return Preview(demo.N_PARAMETERS, demo.N_EMBEDDING, 0, 0, demo.N_VOCAB)
    found = examine(path, projectors=projectors)
    return _counts(found.tensors, _n_vocab(found.config, found.family))


def _text_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    """(tokens, columns) of the embedding, each 0 when the configuration does not say."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    shape = [text.get(key) for key in ("vocab_size", "hidden_size")] if isinstance(text, dict) else []
    vocab, hidden = (n if type(n) is int and 0 < n < 2**31 else 0 for n in shape or (0, 0))
    return vocab, hidden


def _n_vocab(config: Mapping[str, Any], family: gemma.Family) -> int:
    return 0 if family.gguf_arch in gemma.WITHOUT_LOGITS else _text_shape(config)[0]


def _counts(tensors: Mapping[str, int], n_vocab: int) -> Preview:
    projector = sum(n for name, n in tensors.items() if re.search(r"(vision|audio|multi_modal|mm_|embed_(v|a))", name))
    embedding = sum(n for name, n in tensors.items() if re.search(r"(^|\.)embed_tokens(_per_layer)?\.weight$", name))
    return Preview(sum(tensors.values()), embedding, projector, 0, n_vocab)


def _hub_preview(name: ModelName) -> Preview:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415

    repo = f"{name.org}/{name.model}"
    with _hub_errors(repo, name.revision):
        commit, sizes = _listing(repo, name.revision)
        config = _configuration(repo, commit, sizes)
    missing = sum(
        size
        for file, size in sizes.items()
        if _is_needed(file) and not isinstance(try_to_load_from_cache(repo, file, revision=commit), str)
    )
    weights = sum(size for file, size in sizes.items() if _is_needed(file) and file.endswith(".safetensors"))
    embedding = math.prod(_text_shape(config))
    n_parameters = weights // 2  # 16 bits each, as all of Google's
    _, family = _architecture(Path(repo), config)
    return Preview(n_parameters, min(embedding, n_parameters), 0, missing, _n_vocab(config, family))


def count_hub_parameters(name: ModelName) -> int:
    """Parameters of a hub model, from the headers of its weight files; nothing is downloaded but those."""
    from huggingface_hub import HfApi  # noqa: PLC0415

    repo = f"{name.org}/{name.model}"
    with _hub_errors(repo, name.revision):
        commit, _ = _listing(repo, name.revision)
        return sum(HfApi().get_safetensors_metadata(repo, revision=commit).parameter_count.values())


def _listing(repo: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """(commit, {file: bytes}) of a repository that can be converted; an adapter or pickles alone are refused."""
    from huggingface_hub import HfApi  # noqa: PLC0415

    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    names = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    if "adapter_config.json" in names:
        raise _adapter(repo)
    if not any(file.endswith(".safetensors") for file in names) and any(_is_pickle(file) for file in names):
        raise _pickled(repo)
    return str(info.sha), names


@contextlib.contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """The errors of the hub's client as ours, each with what to do about it."""
    import httpx2  # noqa: PLC0415
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        yield
    except errors.GatedRepoError as error:
        raise GemmaGGUFError(
            f"{repo} is gated and this account has no access to it",
            next_step=f"Accept the terms on https://huggingface.co/{repo}, then run: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BadInputError(f"{repo} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise BadInputError(
            f"there is no model {repo} on the hub, or it is private",
            next_step="Check the name; for a private model run: hf auth login",
        ) from error
    except errors.NotASafetensorsRepoError as error:
        raise BadInputError(f"{repo} has no *.safetensors files") from error
    except (httpx2.HTTPError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GemmaGGUFError(
            f"cannot reach the hub for {repo}: {reason}",
            next_step="Check the network (HF_ENDPOINT names another server), or give a local directory.",
        ) from error


def _is_needed(file: str) -> bool:
    """Whether conversion can need a file of a repository; a pattern's `*` does not reach into directories."""
    return any(fnmatch.fnmatch(file, p) and file.count("/") == p.count("/") for p in NEEDED)


def _adapter(where: object, base: str | None = None) -> BadInputError:
    """An adapter's refusal: how to merge it. `base` is what its configuration calls its base model."""
    merge = (
        "from peft import AutoPeftModelForCausalLM as Adapter; "
        f"Adapter.from_pretrained({str(where)!r}, dtype='auto').merge_and_unload().save_pretrained('MERGED')"
    )
    named = base if base and re.fullmatch(r"[\w./~ -]{1,300}", base) else "BASE"
    # A merged model is saved without a tokenizer; the base's own files are whole.
    files = (
        f"hf download {named} --include 'tokenizer*' --local-dir MERGED"
        if re.fullmatch(rf"{NAME.pattern}/{NAME.pattern}", named)
        else f"cp {shlex.quote(named)}/tokenizer* MERGED/"
    )
    return BadInputError(
        f"{where} is a LoRA adapter, not a model",
        next_step=f'Merge it into its base model, then give MERGED:\npip install peft\npython -c "{merge}"\n{files}',
    )


def _draft(where: object, architecture: str, prefix: str) -> BadInputError:
    target = " --target-model-dir DIRECTORY_OF_THAT_MODEL" if prefix == "dspark" else ""
    return BadInputError(
        f"{where} holds a {architecture}, a draft for speculative decoding: it runs beside the model it was trained "
        "for and not alone, so no imatrix and no measurement can be made of it",
        next_step="Make the set of that model. The draft needs only llama.cpp's converter, and a name by which "
        f"llama-server takes it for a draft:\nconvert_hf_to_gguf.py {shlex.quote(str(where))} --outtype q8_0 "
        f"--outfile {prefix}-NAME-Q8_0.gguf{target}",
    )


def _is_pickle(name: str) -> bool:
    return PurePosixPath(name).suffix in PICKLES and PurePosixPath(name).name not in {"training_args.bin"}


def _pickled(where: object) -> BadInputError:
    return BadInputError(
        f"{where} has its weights only as pickles, which can run code when they are loaded",
        next_step="Use a revision with safetensors, or load and save it with transformers: that writes safetensors.",
    )


def _refuse_unusable(path: Path) -> None:
    if (path / "adapter_config.json").is_file():
        base = _json(path / "adapter_config.json").get("base_model_name_or_path")
        raise _adapter(path, base if isinstance(base, str) else None)
    if not (path / "config.json").is_file():
        raise BadInputError(f"{path} has no config.json: it is not a Hugging Face checkpoint")
    weights = [file.name for file in path.iterdir() if file.is_file()]
    if not any(file.endswith(".safetensors") for file in weights):
        if any(_is_pickle(file) for file in weights):
            raise _pickled(path)
        raise BadInputError(f"{path} has no *.safetensors files", next_step="Download the weights, too.")
    for dense in sorted(path.glob("[0-9]_*")) if (path / "modules.json").is_file() else ():  # of EmbeddingGemma
        names = [file.name for file in dense.iterdir()] if dense.is_dir() else []
        if "model.safetensors" not in names and any(map(_is_pickle, names)):
            raise _pickled(dense)
    if not any((path / file).is_file() for file in ("tokenizer.model", "tokenizer.json")):
        raise BadInputError(f"{path} has no tokenizer (tokenizer.model or tokenizer.json)")


def _refuse_links(path: Path, files: Iterable[str]) -> None:
    """A file of a checkpoint lies in its directory; a link out of it would read, and publish, a file of this machine.

    The one layout with links that is known is the hub's cache: `snapshots/<commit>/<file>` -> `blobs/<hash>`.
    """
    root = path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    for file in files:
        place = (path / file).resolve()
        if not place.is_relative_to(root) and place.parent != blobs:
            raise BadInputError(
                f"{path / file} is a link out of the checkpoint, to {place}",
                next_step="Copy the file into the directory if it belongs there.",
            )
        limit = MAX_TOKENIZER if PurePosixPath(file).name in TOKENIZERS else MAX_JSON if file.endswith(".json") else 0
        if limit and (size := place.stat().st_size) > limit:
            raise BadInputError(
                f"{path / file} has {size:,} bytes, more than the {limit:,} that are read",
                next_step="Download it again; no Gemma has one that large.",
            )


def _refuse_code(path: Path, files: Iterable[str]) -> None:
    """Refuse whatever would make a library import code of the model: `auto_map`, and modules that are no library's."""

    def refused(file: str, how: str) -> BadInputError:
        return BadInputError(
            f"{path / file} asks to run the model's own code ({how}); code of a model is never executed here",
            next_step="Use the original Gemma checkpoint; Gemma needs no code of its own.",
        )

    for file in files:
        if not file.endswith(".json") or file.endswith(".index.json") or PurePosixPath(file).name in TOKENIZERS:
            continue
        if file == "modules.json":
            kinds = [module.get("type") for module in _json_value(path / file) if isinstance(module, dict)]
            if own := [kind for kind in kinds if not str(kind).startswith("sentence_transformers.")]:
                raise refused(file, f"the module {str(own[0])[:80]!r}")
            continue
        content = _json(path / file)
        parts = [content, *(part for part in content.values() if isinstance(part, dict))]
        if any("auto_map" in part for part in parts):
            raise refused(file, "auto_map")


def _json_value(path: Path, limit: int = MAX_JSON) -> Any:
    """The content of a JSON file of bounded size, refused when it could not be written again."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise BadInputError(f"{path} has more than the {limit:,} bytes that are read")  # it may have grown just now
        value = json.loads(data.decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is not readable JSON: {error}", next_step="Download it again.") from error
    return value


def _json(path: Path) -> dict[str, Any]:
    value = _json_value(path)
    if not isinstance(value, dict):
        raise BadInputError(f"{path} is not a JSON object", next_step="Download it again.")
    return value


def _architecture(path: Path, config: Mapping[str, Any]) -> tuple[str, gemma.Family]:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise BadInputError(f"{path / 'config.json'} names no architecture")
    family = gemma.family_of(names[0])
    if (prefix := gemma.DRAFTS.get(names[0])) is not None:
        raise _draft(path, names[0], prefix)
    if family is None:
        known = ", ".join(a for f in gemma.FAMILIES for a in f.architectures)
        raise BadInputError(
            f"{path} holds a {names[0][:80]}, which is not a Gemma architecture", next_step=f"Known are: {known}."
        )
    return names[0], family


def _refuse_without_vocabulary(where: object, family: gemma.Family, files: Iterable[str]) -> None:
    """The converter reads the vocabulary of some generations from one file alone. Where that is tokenizer.model, it can
    be made of a tokenizer.json (`vocabulary`): that is all of it that transformers 5 saves.
    """
    there = {*files} & {*TOKENIZERS}
    if family.vocabulary is not None and not there & {family.vocabulary, *_stands_for(family.vocabulary)}:
        raise _no_vocabulary(where, family, family.vocabulary)


def _stands_for(file: str) -> set[str]:
    return {"tokenizer.json"} if file == "tokenizer.model" else set()


def _no_vocabulary(where: object, family: gemma.Family, file: str) -> BadInputError:
    return BadInputError(
        f"{where} has no {file}, from which llama.cpp's converter reads {family.name}'s vocabulary",
        next_step=f"Copy {file} and tokenizer_config.json from the model that it was tuned from, "
        "unless tokens were added to it.",
    )


def _refuse_other_vocabulary(path: Path, family: gemma.Family, files: Iterable[str]) -> None:
    """A tokenizer.json of which no tokenizer.model can be made, where the converter needs one."""
    if family.vocabulary != "tokenizer.model" or family.vocabulary in files:
        return
    if vocabulary.pieces_of(tokenizer_json(path)) is None:
        raise _no_vocabulary(path, family, family.vocabulary)


def tokenizer_json(path: Path) -> dict[str, Any]:
    """The `tokenizer.json` of a checkpoint."""
    value = _json_value(path / "tokenizer.json", MAX_TOKENIZER_READ)
    return value if isinstance(value, dict) else {}


def _refuse_without_projector(path: Path, projector: str | None, tensors: Iterable[str]) -> None:
    """What the converter needs to make a projector, which it would miss only after it has written the base: how
    pictures are scaled, and tensors with the names of Google's files.
    """
    no_mmproj = "make the set without projectors: --no-mmproj"
    if projector in gemma.SCALED_BY_PROCESSOR and not {"image_mean", "image_std"} <= _picture_settings(path).keys():
        raise BadInputError(
            f"{path} sees, but neither preprocessor_config.json nor processor_config.json says how it scales pictures "
            "(image_mean, image_std)",
            next_step="Copy whichever there is of them from the model that it was tuned from (transformers saves it "
            f"with the processor: processor.save_pretrained), or {no_mmproj}",
        )
    root = gemma.TOWERS.get(str(projector))
    if root is not None and not any(name.startswith(root) for name in tensors):
        seen = next(name for name in tensors if gemma.is_vision(name) and "vision" in name)
        raise BadInputError(
            f"{path} names what it sees with otherwise than Google's files ({seen[:80]}, not {root}...), and "
            "llama.cpp's converter does not know these names",
            next_step="Save it with the names of the model that it was tuned from, then copy tokenizer and processor "
            f"files beside it:\n{_RENAMING.format(path=str(path))}\nOr {no_mmproj}",
        )


# A model that was loaded from Google's files is saved with their names; one that was never is saved with the code's.
_RENAMING = (
    "python -c \"from transformers import AutoModelForImageTextToText as M; m = M.from_pretrained('ORIGINAL', "
    "dtype='auto'); m.load_state_dict(M.from_pretrained({path!r}, dtype='auto').state_dict()); "
    "m.save_pretrained('RENAMED')\""
)


def _picture_settings(path: Path) -> dict[str, Any]:
    """What both files say of pictures; transformers 5 keeps it inside of `processor_config.json`."""
    said: dict[str, Any] = {}
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (path / file).is_file():
            found = _json(path / file)
            inner = found.get("image_processor")
            said |= found | (inner if isinstance(inner, dict) else {})
    return said


def _refuse_lost_output(path: Path, found: Examined) -> None:
    """The converter leaves out the output matrix of some generations, as llama.cpp takes their embeddings for it.

    That is right where both are the same, as in all of Google's; of a fine-tune that untied them it would be lost
    silently.
    """
    if found.family.own_output or OUTPUT not in found.tensors:
        return
    places = {name: place for file in found.files for name, place in _tensor_places(path / file).items()}
    if EMBEDDINGS not in places or not _same_bytes(places[OUTPUT], places[EMBEDDINGS]):
        raise BadInputError(
            f"{path} has an output matrix ({OUTPUT}) that differs from its embeddings; llama.cpp's "
            f"{found.family.gguf_arch} has no place for it and would compute with the embeddings",
            next_step="Tune it again with tie_word_embeddings, or ask its author: no GGUF of it can work.",
        )


Place = tuple[Path, int, int]  # file, first byte, number of bytes


def _tensor_places(path: Path) -> dict[str, Place]:
    """{tensor: where its bytes are} of a safetensors file that was found whole."""
    length, rows = _tensor_rows(path)
    ranges = {name: row["data_offsets"] for name, row in rows.items()}
    return {name: (path, 8 + length + start, end - start) for name, (start, end) in ranges.items()}


def _tensor_rows(path: Path) -> tuple[int, dict[str, Any]]:
    """(length of the header, its rows) of a safetensors file that was found whole; nothing of other files."""
    if path.suffix != ".safetensors":
        return 0, {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return length, {name: row for name, row in header.items() if name != "__metadata__"}


def weight_shapes(found: Source) -> dict[str, tuple[int, ...]]:
    """{tensor: its shape} of a checkpoint's own weight files."""
    files = [found.path / file for file in found.files if "/" not in file]
    return {name: tuple(row["shape"]) for file in files for name, row in _tensor_rows(file)[1].items()}


def _same_bytes(one: Place, other: Place, step: int = 1 << 24) -> bool:
    if one[2] != other[2]:
        return False
    with one[0].open("rb") as first, other[0].open("rb") as second:
        first.seek(one[1])
        second.seek(other[1])
        counts = [min(step, one[2] - done) for done in range(0, one[2], step)]
        return all(first.read(count) == second.read(count) for count in counts)


def _needed_files(path: Path) -> list[str]:
    found = {file for pattern in NEEDED for file in path.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(path).as_posix() for file in found)


def _tensor_shapes(path: Path, files: list[str]) -> dict[str, int]:
    """{tensor: number of elements} over all shards; checks that every shard of the index is there and whole."""
    sizes: dict[str, int] = {}
    for file in files:
        if file.endswith(".safetensors"):
            # Each dense layer is called `linear.weight`.
            place = f"{PurePosixPath(file).parent}/" if "/" in file else ""
            sizes.update({place + name: n for name, n in read_safetensors_header(path / file).items()})
    for index in (file for file in files if file.endswith(".safetensors.index.json")):
        weight_map = _json(path / index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise BadInputError(f"{path / index} has no weight_map")
        for shard in map(str, weight_map.values()):
            if ".." in PurePosixPath(shard).parts or "\\" in shard or PurePosixPath(shard).is_absolute():
                raise BadInputError(
                    f"{path / index} names {shard[:200]!r}, a path out of the checkpoint",
                    next_step="Do not use this checkpoint: a whole one names files beside the index.",
                )
        missing = sorted({str(shard) for shard in weight_map.values()} - set(files))
        if missing:
            raise BadInputError(
                f"{path} lacks {len(missing)} of its weight files, first {missing[0]}", next_step="Download them again."
            )
        lost = sorted(set(weight_map) - set(sizes))
        if lost:
            raise BadInputError(f"no weight file of {path} holds {lost[0]}, which {index} names")
    return sizes


def read_safetensors_header(path: Path) -> dict[str, int]:
    """{tensor: number of elements} of one file, checked against its length.

    Raises `BadInputError` when the header lies about itself or the data is cut.
    Format: https://github.com/huggingface/safetensors#format
    """
    size = path.stat().st_size

    def broken(why: str) -> BadInputError:
        return BadInputError(f"{path} is not a whole safetensors file: {why}", next_step="Download it again.")

    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise broken(f"its header claims {length} bytes in a file of {size}")
        if length > MAX_SAFETENSORS_HEADER:
            raise broken(f"its header claims {length:,} bytes, more than the {MAX_SAFETENSORS_HEADER:,} that are read")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise broken(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise broken("its header is not a JSON object")
    sizes: dict[str, int] = {}
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        try:
            shape, (start, end) = tensor["shape"], tensor["data_offsets"]
            elements = (
                math.prod(shape)
                if len(shape) <= 8 and all(type(dim) is int and 0 <= dim < 2**63 for dim in shape)
                else None
            )
        except (KeyError, TypeError, ValueError) as error:
            raise broken(f"tensor {name!r} has no shape and offsets") from error
        if not (
            isinstance(elements, int)
            and isinstance(start, int)
            and isinstance(end, int)
            and 0 <= start <= end
            and elements <= 2 * (end - start)
        ):
            raise broken(f"tensor {name!r} has impossible numbers")
        if 8 + length + end > size:
            raise broken(f"tensor {name!r} ends {8 + length + end - size} bytes past the end")
        sizes[name] = elements
    return sizes


def _front_matter(readme: Path) -> dict[str, Any]:
    """The YAML block at the top of a model card; an unreadable one counts as none."""
    if not readme.is_file():
        return {}
    with readme.open(encoding="utf-8", errors="replace") as file:
        match = re.match(r"---\r?\n(.*?)\r?\n---", file.read(MAX_FRONT_MATTER), re.DOTALL)
    if match is None:
        return {}
    try:
        value = yaml.load(match[1], Loader=_LoaderWithoutAliases)
        # Dates and the like become text: the manifest is JSON.
        if not isinstance(value, dict):
            return {}
        text = json.dumps(value, default=str, ensure_ascii=False, allow_nan=False)
        if _depth(value) > 50:
            return {}
        return dict(json.loads(text.encode("utf-8", errors="replace")))
    except (yaml.YAMLError, RecursionError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        return {}


class _LoaderWithoutAliases(yaml.SafeLoader):
    """YAML whose aliases are an error: a few nested ones make gigabytes of a few hundred bytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read here")
        return super().compose_node(parent, index)


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return 1 + max(map(_depth, inner), default=0)


def _chat_template(path: Path) -> str | None:
    """The checkpoint's chat template, from the places where transformers looks, in its order."""
    jinja = path / "chat_template.jinja"
    if jinja.is_file():
        try:
            with jinja.open(encoding="utf-8") as text:
                written = text.read(MAX_TEMPLATE + 1)
        except UnicodeDecodeError as error:
            raise BadInputError(f"{jinja} is not text: {error}", next_step="Download it again.") from error
        return _bounded_template(written, jinja)
    for file in ("chat_template.json", "tokenizer_config.json"):
        if (path / file).is_file():
            template = _json(path / file).get("chat_template")
            if isinstance(template, list):
                named = {
                    t.get("name"): t.get("template")
                    for t in template
                    if isinstance(t, dict) and isinstance(t.get("name"), str)
                }
                template = named.get("default")
            if isinstance(template, str):
                return _bounded_template(template, path / file)
    return None


def _bounded_template(template: str, where: Path) -> str:
    if len(template) > MAX_TEMPLATE:
        raise BadInputError(
            f"the chat template in {where} has more than the {MAX_TEMPLATE:,} characters that are read",
            next_step="Download it again; no Gemma has one that long.",
        )
    return template


def _sampling(path: Path) -> Sampling:
    """What generation_config.json recommends; a value that cannot be one is not passed on."""
    file = path / "generation_config.json"
    stated = _json(file) if file.is_file() else {}

    def number(key: str) -> float | None:
        value = stated.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e6:
            return None
        return float(value)

    top_k, do_sample = stated.get("top_k"), stated.get("do_sample")
    return Sampling(
        do_sample=do_sample if isinstance(do_sample, bool) else None,
        temperature=number("temperature"),
        top_k=top_k if type(top_k) is int and 0 <= top_k < 2**31 else None,
        top_p=number("top_p"),
        min_p=number("min_p"),
        repetition_penalty=number("repetition_penalty"),
    )
