"""Files over the split limit: where llama-gguf-split of llama.cpp cuts, and the headers it writes.

Consumes the keys and tensors of a whole file, or its shards; produces the shards' headers, or hashes. The tensor data
of a whole file is that of its shards one after the other, each tensor padded to ggml's alignment, so both forms of a
file have one identity: the SHA-256 of the whole one. Source: `split_strategy` in tools/gguf-split/gguf-split.cpp; a
test compares every byte with that tool's.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from gemma_gguf import gguf_io
from gemma_gguf.errors import BadInputError
from gemma_gguf.files import sha256_file, write_stream
from gemma_gguf.gguf_io import Header, NewHeader, n_bytes_of, padded

MEGABYTE = 1_000_000  # llama-gguf-split takes whole ones
DEFAULT_LIMIT = 50_000 * MEGABYTE  # what plain downloads from the Hub end at
KEYS = ("split.no", "split.tensors.count", "split.count")
STEP = 1 << 24  # bytes read together

TensorRow = tuple[str, tuple[int, ...], GGMLQuantizationType]


def wrong_limit(limit: int) -> str | None:
    """Why a limit in bytes cannot be used, or None."""
    if limit < MEGABYTE or limit % MEGABYTE:
        return f"{limit:,} bytes are not whole megabytes, which llama-gguf-split takes"
    return None


def name(prefix: str, number: int, count: int) -> str:
    """What llama.cpp calls shard `number` (from 0) of `count`: `llama_split_path` in src/llama.cpp."""
    return f"{prefix}-{number + 1:05d}-of-{count:05d}.gguf"


def counts(sizes: Sequence[int], limit: int) -> list[int]:
    """How many tensors each shard holds, given the bytes of all tensors in their order; one number: no cut.

    Tensors are taken in order while their padded bytes stay within `limit`; headers do not count, so a shard can be
    larger by its own. A tensor larger than the limit is alone in a shard. Raises `BadInputError` when that is the
    first one: llama-gguf-split then fails, as its first shard would be empty.
    """
    if sum(map(padded, sizes)) <= limit:
        return [len(sizes)]
    if padded(sizes[0]) > limit:
        raise BadInputError(
            f"the first tensor alone takes {sizes[0]:,} bytes, more than the {limit:,} that a shard may hold",
            next_step="Raise --split-max-size.",
        )
    found = [0]
    held = 0
    for size in map(padded, sizes):
        if held + size > limit:
            found.append(0)
            held = 0
        found[-1] += 1
        held += size
    return found


def headers(keys: Collection[bytes], tensors: Sequence[TensorRow], limit: int) -> list[NewHeader]:
    """The headers of the shards of a file of these keys and tensors, or the one of the whole file.

    All keys stand in the first shard, and each ends with its number, the number of all tensors and that of all shards:
    in this order, because the tool sets the last again when it knows it.
    """
    sizes = [_n_bytes(row) for row in tensors]
    cut = counts(sizes, limit)
    if len(cut) == 1:
        return [gguf_io.header_of(keys, tensors)]
    made, first = [], 0
    for number, count in enumerate(cut):
        own = [
            gguf_io.integer_key("split.no", GGUFValueType.UINT16, number),
            gguf_io.integer_key("split.tensors.count", GGUFValueType.INT32, len(tensors)),
            gguf_io.integer_key("split.count", GGUFValueType.UINT16, len(cut)),
        ]
        made.append(gguf_io.header_of([*(keys if number == 0 else ()), *own], tensors[first : first + count]))
        first += count
    return made


def _n_bytes(row: TensorRow) -> int:
    _, shape, ggml_type = row
    n_elements = 1
    for length in shape:
        n_elements *= length
    return n_bytes_of(ggml_type, n_elements)


def of_whole(whole: Header, limit: int) -> list[NewHeader]:
    """The headers of the shards that a whole file is cut into; none where it is within the limit.

    Raises `BadInputError` for a foreign alignment.
    """
    rows = rows_of(whole)
    if sum(padded(_n_bytes(row)) for row in rows) <= limit:
        return []
    if whole.alignment != GGUF_DEFAULT_ALIGNMENT:
        raise BadInputError(
            f"{whole.path} has an alignment of {whole.alignment} bytes, which is not cut into shards here",
            next_step="Raise --split-max-size.",
        )
    return headers(gguf_io.derived_keys(whole, [], KEYS).values(), rows, limit)


def rows_of(*parts: Header) -> list[TensorRow]:
    """(name, shape, type) of the tensors of a file, or of its shards together; shapes as ggml writes them."""
    return [(tensor.name, _trimmed(tensor.shape), tensor.ggml_type) for part in parts for tensor in part.tensors]


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def is_cut_at(parts: Sequence[Header], limit: int) -> bool:
    """Whether a file, or its shards, hold what they would with this limit."""
    sizes = [tensor.n_bytes for part in parts for tensor in part.tensors]
    if padded(sizes[0]) > limit:
        return False  # nothing can be cut there, so this is not
    return counts(sizes, limit) == [len(part.tensors) for part in parts]


def limit_of(parts: Sequence[Header], recorded: int) -> int:
    """The limit that shards were cut at: `recorded` if it cuts so, else the least that does, in whole megabytes.

    A set can hold files of an earlier run with another limit.
    """
    if is_cut_at(parts, recorded):
        return recorded
    held = [sum(padded(tensor.n_bytes) for tensor in part.tensors) for part in parts if len(part.tensors) > 1]
    # A tensor alone in its shard may be larger than the limit, unless it is the first.
    least = max([padded(parts[0].tensors[0].n_bytes), *held])
    return -(-least // MEGABYTE) * MEGABYTE


def read(paths: Sequence[Path]) -> list[Header]:
    """The headers of a whole file, or of all shards of one in their order.

    Raises `BadInputError` when the shards do not belong together.
    """
    parts = [gguf_io.read_header(path) for path in paths]
    if len(parts) == 1:
        return parts
    for number, part in enumerate(parts):
        says = tuple(part.get(key) for key in KEYS)
        wanted = (number, sum(len(other.tensors) for other in parts), len(parts))
        if says != wanted:
            raise BadInputError(
                f"{part.path} says it is shard {says[0]} of {says[2]} with {says[1]} tensors in all; "
                f"{wanted[0]} of {wanted[2]} with {wanted[1]} was expected"
            )
    return parts


def joined(parts: Sequence[Header]) -> Header:
    """What a set of shards says of itself together: keys of the first, tensors of all, bytes of all.

    For counting only: each tensor lies where its own shard says.
    """
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    return replace(parts[0], tensors=tensors, file_size=sum(part.file_size for part in parts))


def hashes(parts: Sequence[Header]) -> tuple[str, list[str]]:
    """(SHA-256 of the whole file that these shards are, SHA-256 of each shard), in one reading.

    Of a whole file both are its own.
    """
    if len(parts) == 1:
        digest_of_all = sha256_file(parts[0].path)
        return digest_of_all, [digest_of_all]
    whole = hashlib.sha256(_whole_header(parts).data)
    own: list[str] = []
    for part in parts:
        digest = hashlib.sha256()
        for at, piece in _pieces(part.path):
            digest.update(piece)
            data = piece[max(0, part.data_start - at) :]
            whole.update(data)
        own.append(digest.hexdigest())
    return whole.hexdigest(), own


def join(parts: Sequence[Header], target: Path) -> None:
    """Write the whole file that these shards are."""

    def pieces() -> Iterator[bytes]:
        yield _whole_header(parts).data
        for part in parts:
            for at, piece in _pieces(part.path):
                yield piece[max(0, part.data_start - at) :]

    write_stream(target, pieces())


def cut(whole: Header, shard_headers: Sequence[NewHeader], targets: Sequence[Path]) -> None:
    """Write the shards of a whole file: their headers, then ranges of its tensor data."""
    at = whole.data_start
    for header, target in zip(shard_headers, targets, strict=True):
        end = at + header.file_size - len(header.data)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_stream(target, _shard_pieces(whole.path, header, at, end))
        at = end


def _shard_pieces(path: Path, header: NewHeader, start: int, end: int) -> Iterator[bytes]:
    yield header.data
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            piece = file.read(min(STEP, end - start))
            if not piece:
                raise BadInputError(f"{path} ends at byte {start}, inside its tensor data")
            start += len(piece)
            yield piece


def _pieces(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        at = 0
        while piece := file.read(STEP):
            yield at, piece
            at += len(piece)


def _whole_header(parts: Sequence[Header]) -> NewHeader:
    return gguf_io.header_of(gguf_io.derived_keys(parts[0], [], KEYS).values(), rows_of(*parts))
