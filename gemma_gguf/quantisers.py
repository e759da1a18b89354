"""What a build's ggml makes of fixed rows, as one hash per type: whether two builds quantise alike.

Consumes a build, produces {type: SHA-256}, remembered in the cache per build and machine, and in the manifest of every
set the build quantises. The rows come from a hash function and exact arithmetic, not from a library's random numbers,
so that the hash depends on nothing but ggml.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from gemma_gguf import fanout, llama_cpp
from gemma_gguf.files import make_directory, sha256_json, write_atomic
from gemma_gguf.libggml import Ggml
from gemma_gguf.llama_cpp import Build
from gemma_gguf.progress import Progress, silent

COLUMNS = 512  # two super-blocks, 16 blocks
ROWS = 8
VERSION = 1  # of the rows

Floats = npt.NDArray[np.float32]


def hashes(build: Build, types: Sequence[str], progress: Progress = silent) -> dict[str, str]:
    """{type: hash} of at least these types, from the cache or computed now in a worker process.

    Raises `ToolFailedError` when ggml ends the worker.
    """
    path = _cached(build.key)
    known = recorded(build.key)
    if missing := sorted(set(types) - set(known)):
        progress("hashing the quantisers", 0, len(missing), "types")
        make_directory(path.parent)
        what = f"quantises fixed rows with the ggml of {build.source}"
        known |= fanout.in_a_worker(path.parent, what, hash_types, str(build.bin_dir), missing)
        write_atomic(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return known


def recorded(build_key: str) -> dict[str, str]:
    """What this machine's cache holds of a build, which need not be there any more."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(_cached(build_key).read_text()))
    return {}


def _cached(build_key: str) -> Path:
    return llama_cpp.cache_dir() / "quantisers" / f"{sha256_json([build_key, VERSION])[:20]}.json"


def hash_types(bin_dir: str, names: Sequence[str]) -> dict[str, str]:
    """Runs in a worker: each type's bytes of all rows, with and, where ggml allows it, without an imatrix."""
    ggml = Ggml(Path(bin_dir))
    found: dict[str, str] = {}
    for name in names:
        kind = GGMLQuantizationType[name]
        digest = hashlib.sha256()
        for rows, weights in cases():
            if weights is not None or not ggml.requires_imatrix(kind):
                digest.update(ggml.quantize(rows, kind, weights).tobytes())
        found[name] = digest.hexdigest()
    return found


def cases() -> Iterator[tuple[Floats, Floats | None]]:
    """(rows of shape (ROWS, COLUMNS), imatrix row or None): what weights look like, at scales of powers of two."""
    rows = _bell("rows", ROWS * COLUMNS).reshape(ROWS, COLUMNS) / 32
    rows[1::4] *= np.exp2(_integers("scales", (ROWS // 4) * COLUMNS // 32, 16) - 10.0).repeat(32).reshape(-1, COLUMNS)
    rows[2::8, ::37] *= 64  # outliers
    rows[3::8, ::3] = 0
    rows[7, :] = 0
    importance = _bell("importance", COLUMNS) ** 2 + 1 / 1024
    yield rows.astype(np.float32), importance.astype(np.float32)
    yield rows.astype(np.float32), None


def _integers(seed: str, n: int, below: int) -> npt.NDArray[np.int64]:
    data = hashlib.shake_256(f"gemma-gguf {VERSION} {seed}".encode()).digest(4 * n)
    return np.frombuffer(data, dtype="<u4").astype(np.int64) % below


def _bell(seed: str, n: int) -> npt.NDArray[np.float64]:
    """About normal, of variance 1/3 and below 2: the sum of four whole numbers, exactly the same everywhere."""
    parts: npt.NDArray[np.int64] = _integers(seed, 4 * n, 1 << 16).reshape(4, n).sum(axis=0)
    return np.asarray((parts - 2 * (1 << 16)) / float(1 << 16), dtype=np.float64)
