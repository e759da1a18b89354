"""A worker process of one build: the only place that imports `llama_cpp`.

Run as `python -m gemma_gguf.bindings COMMAND MODEL TEXT SETTINGS`, with the paths of a build in the environment
(`llama_cpp.ask_bindings`); SETTINGS are JSON. Prints lines `progress DONE TOTAL` where there is something to wait for,
and last one JSON object. It is a process of its own because an abort inside ggml must not take the run with it, and
because two builds can serve one run.
"""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gemma_gguf import scoring
from gemma_gguf.files import write_stream

Settings = dict[str, Any]


def check(model: str, text: str, settings: Settings) -> dict[str, object]:
    """Load a model, read the first tokens of a text, and report whether every logit is finite."""
    import llama_cpp  # noqa: PLC0415 - exists only in a worker started with a build's paths

    llama = llama_cpp.Llama(model, n_ctx=64, n_batch=64, logits_all=True, n_gpu_layers=0, verbose=False)
    tokens = llama.tokenize(Path(text).read_bytes()[:2000], special=True)[: settings.get("n_tokens", 32)]
    llama.eval(tokens)
    logits = np.asarray(llama.scores[: len(tokens)])
    finite = np.isfinite(logits)
    return {
        "n_tokens": len(tokens),
        "n_vocab": int(logits.shape[1]),
        "all_finite": bool(finite.all()),
        "varied": bool(finite.all() and logits.std() > 0),
    }


def tokens(model: str, text: str, settings: Settings) -> dict[str, object]:
    """Count the tokens of a text, with BOS where the model wants it; `parse_special` as llama-imatrix does (default),
    or not, as llama-perplexity does. EOS counts where the model wants it, unless `add_eos` is false.
    """
    import llama_cpp  # noqa: PLC0415

    llama = llama_cpp.Llama(model, vocab_only=True, verbose=False)
    found = llama.tokenize(Path(text).read_bytes(), add_bos=True, special=settings.get("parse_special", True))
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    ends = llama_cpp.llama_vocab_get_add_eos(vocab) and not settings.get("add_eos", True)
    return {"n_tokens": len(found) - int(ends), "n_vocab": llama.n_vocab()}


def tokenize(model: str, text: str, settings: Settings) -> dict[str, object]:
    """Ids of many texts, and what llama.cpp makes of the vocabulary.

    `text` is a JSON file: rows of [text, add_special, parse_special]. The ids go to the file `ids` as int32, for each
    row their number and then they. Last come the tokens that llama.cpp takes for control tokens, which is not for every
    model what the file says: it mends types of tokens that it knows.
    """
    import llama_cpp  # noqa: PLC0415

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    llama_cpp.llama_backend_init()
    how = llama_cpp.llama_model_default_params()
    how.vocab_only = True
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), how)
    if not loaded:
        raise RuntimeError(f"llama.cpp cannot load {model}")
    vocab = llama_cpp.llama_model_get_vocab(loaded)

    n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)

    def rows() -> Iterator[list[int]]:
        for written, add_special, parse_special in json.loads(Path(text).read_bytes()):
            yield _token_ids(llama_cpp, vocab, written.encode(), add_special=add_special, parse_special=parse_special)
        yield [token for token in range(n_vocab) if llama_cpp.llama_vocab_is_control(vocab, token)]

    write_stream(Path(settings["ids"]), (np.array([len(row), *row], np.int32).tobytes() for row in rows()))
    return {"n_vocab": n_vocab}


def base_logits(model: str, text: str, settings: Settings) -> dict[str, object]:
    """Write the base's distribution at every scored token of a text to the file `logits`, chunk after chunk.

    Per chunk: the records (`scoring.BASE_ROW`), then the codes (uint16), row by row.
    """
    n_rows = 0

    def pieces() -> Iterator[bytes | memoryview]:
        nonlocal n_rows
        with ThreadPoolExecutor(settings["threads"]) as pool, _loaded(model, settings) as forward:
            chunks = forward.chunks(text)
            for done, chunk in enumerate(chunks):
                records, codes = scoring.encode_base(forward.logits(chunk), chunk.targets, pool)
                n_rows += len(records)
                yield records.tobytes()
                yield codes.data.cast("B")
                _say_progress(done + 1, len(chunks))

    write_stream(Path(settings["logits"]), pieces())
    return {"n_tokens": n_rows}


def score(model: str, text: str, settings: Settings) -> dict[str, object]:
    """The figures of `scoring.summary` for a model against a base, on one text.

    The base's distributions come from the file `logits` that `base_logits` wrote, or, with `base`, from that model,
    which then runs beside this one, chunk by chunk; the figures are the same. `by_chunk` has the scored tokens of each
    chunk and the sum of their divergences: two files are compared by it.
    """
    found = []
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(settings["threads"]))
        forward = stack.enter_context(_loaded(model, settings))
        chunks = forward.chunks(text)
        base: _Forward | BinaryIO
        if "base" in settings:
            base = stack.enter_context(_loaded(settings["base"], settings))
        else:
            base = stack.enter_context(Path(settings["logits"]).open("rb"))
        for done, chunk in enumerate(chunks):
            if isinstance(base, _Forward):
                records, codes = scoring.encode_base(base.logits(chunk), chunk.targets, pool)
            else:
                records, codes = _read_base(base, len(chunk.targets), forward.n_vocab)
            found.append(scoring.score(forward.logits(chunk), chunk.targets, records, codes, pool))
            _say_progress(done + 1, len(chunks))
    by_chunk = [[len(tokens), float(tokens["kld"].sum())] for tokens in found]
    return {**scoring.summary(np.concatenate(found) if found else np.empty(0, scoring.TOKEN)), "by_chunk": by_chunk}


def _read_base(file: BinaryIO, n_rows: int, n_vocab: int) -> tuple[scoring.Records, scoring.Codes]:
    records = np.fromfile(file, scoring.BASE_ROW, n_rows)
    codes = np.fromfile(file, np.uint16, n_rows * n_vocab)
    if len(records) != n_rows or len(codes) != n_rows * n_vocab:
        raise ValueError(f"{file.name} ends too early: it is not of this model and text")
    return records, codes.reshape(n_rows, n_vocab)


def _say_progress(done: int, total: int) -> None:
    print(f"progress {done} {total}", flush=True)


# --- forward passes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """Tokens that a model reads from the start, and which of them are scored: those at `scored`, never the first."""

    tokens: scoring.Tokens
    scored: scoring.Tokens  # positions

    @property
    def targets(self) -> scoring.Tokens:
        return self.tokens[self.scored]


class _Forward:
    """A loaded model with a context of one chunk."""

    def __init__(self, model: Any, context: Any, settings: Settings) -> None:
        import llama_cpp  # noqa: PLC0415

        self._llama = llama_cpp
        self._context = context
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self._settings = settings
        self._size = int(settings["chunk_size"])
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self._vocab))

    def chunks(self, text: str) -> list[_Chunk]:
        """The first `n_chunks` chunks of a text: of a plain one, or of conversations, as `mode` says."""
        data = Path(text).read_bytes()
        made = self._plain(data) if self._settings["mode"] == "plain" else self._conversations(data)
        return made[: self._settings["n_chunks"]]

    def _plain(self, data: bytes) -> list[_Chunk]:
        """Pieces of `chunk_size` tokens, scored in the second half, as llama-perplexity does it.

        Special tokens in the text are not parsed, and BOS stands in the place of each piece's first token where the
        model wants one (`perplexity` in llama.cpp's tools/perplexity/perplexity.cpp).
        """
        found = self._tokenize(data, add_special=True, parse_special=False)
        scored = np.arange(self._size // 2 + 1, self._size, dtype=np.int32)
        made = []
        for start in range(0, len(found) - self._size + 1, self._size):
            piece = np.array(found[start : start + self._size], np.int32)
            if self._llama.llama_vocab_get_add_bos(self._vocab):
                piece[0] = self._llama.llama_vocab_bos(self._vocab)
            made.append(_Chunk(piece, scored))
        return made

    def _conversations(self, data: bytes) -> list[_Chunk]:
        """One chunk per conversation, cut at `chunk_size` tokens; only what the model itself says is scored.

        `data` is JSON: for each conversation its pieces [text, whether the model says it]. Pieces become tokens one by
        one, as in a real conversation, and special tokens are parsed. The token that ends the model's turn is the
        first of the next piece; the model says it, too.
        """
        made = []
        bos = self._llama.llama_vocab_bos(self._vocab)
        for pieces in json.loads(data):
            tokens: list[int] = []
            scored: list[int] = []
            spoken = False
            for text, by_model in pieces:
                new = self._tokenize(text.encode(), add_special=False, parse_special=True)
                if not tokens and self._llama.llama_vocab_get_add_bos(self._vocab) and new[:1] != [bos]:
                    tokens.append(bos)
                if by_model:
                    scored += range(len(tokens), len(tokens) + len(new))
                elif spoken and new and self._llama.llama_vocab_is_eog(self._vocab, new[0]):
                    scored.append(len(tokens))
                spoken = by_model
                tokens += new
            kept = [position for position in scored if 0 < position < self._size]
            if kept:
                made.append(_Chunk(np.array(tokens[: kept[-1] + 1], np.int32), np.array(kept, np.int32)))
        return made

    def _tokenize(self, data: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        return _token_ids(self._llama, self._vocab, data, add_special=add_special, parse_special=parse_special)

    def logits(self, chunk: _Chunk) -> scoring.Floats:
        """The logits before each scored token, shape (scored, n_vocab): llama.cpp's own buffer, until the next call."""
        n_tokens = len(chunk.tokens)
        batch = self._llama.llama_batch_init(n_tokens, 0, 1)
        try:
            wanted = np.zeros(n_tokens, np.int8)
            wanted[chunk.scored - 1] = 1
            for position, token in enumerate(chunk.tokens.tolist()):
                batch.token[position] = token
                batch.pos[position] = position
                batch.n_seq_id[position] = 1
                batch.seq_id[position][0] = 0
                batch.logits[position] = int(wanted[position])
            batch.n_tokens = n_tokens
            self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
            code = self._llama.llama_decode(self._context, batch)
            if code != 0:
                raise RuntimeError(f"llama_decode ended with {code}")
        finally:
            self._llama.llama_batch_free(batch)
        pointer = self._llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(len(chunk.scored), self.n_vocab))


def _token_ids(llama_cpp: Any, vocab: Any, data: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
    room = len(data) + 8  # no token is shorter than a byte, but BOS and EOS may come in addition
    buffer = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), buffer, room, add_special, parse_special)
    if count < 0:
        raise ValueError(f"the text has {-count} tokens, more than its {len(data)} bytes")
    return list(buffer[:count])


# How llama.cpp reads header and vocabulary alone, allocating nothing; 0 is LLAMA_LOAD_MODE_NONE.
HEADER_ONLY: Settings = {"no_alloc": True, "load_mode": 0, "n_gpu_layers": 0}


def _model(path: str, **how: Any) -> Any:
    """A loaded model, with these of llama.cpp's `llama_model_params` other than the default."""
    import llama_cpp  # noqa: PLC0415

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    for name, value in how.items():
        setattr(params, name, value)
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    return model


@contextlib.contextmanager
def _loaded(path: str, settings: Settings) -> Iterator[_Forward]:
    """A model as llama.cpp's own tools load it, with a context of one chunk."""
    import llama_cpp  # noqa: PLC0415

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    model = _model(path, n_gpu_layers=settings["gpu_layers"])
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = settings["chunk_size"]
    params.swa_full = False  # as llama.cpp's tools have it
    params.n_threads = params.n_threads_batch = settings["threads"]
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp cannot make a context for {path}")
    try:
        yield _Forward(model, context, settings)
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def contexts(model: str, _text: str, settings: Settings) -> dict[str, object]:
    """What llama.cpp writes while it makes contexts, by their length.

    `settings`: `lengths` in tokens, `slots` that share the cache, `ubatch` tokens computed at once, `embeddings` for a
    model that gives those. Nothing is read but the header and nothing allocated: llama.cpp simulates that, as it does
    to fit a model to a machine. As in llama-server, there is room for the logits of one token of each slot.
    """
    import llama_cpp  # noqa: PLC0415

    lines: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(_level: int, text: bytes, _data: object) -> None:
        lines.append(text.decode("utf-8", errors="replace"))

    llama_cpp.llama_log_set(keep, None)
    try:
        loaded = _model(model, **HEADER_ONLY)
    except RuntimeError as error:
        raise SystemExit("".join(lines[-20:])) from error
    logs: dict[str, str] = {}
    for length in settings["lengths"]:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = length, 2048, settings["ubatch"]
        params.n_seq_max = settings["slots"]
        params.kv_unified, params.swa_full = True, False
        if settings.get("embeddings"):
            params.embeddings = True  # every token is an output
        else:
            params.n_outputs_max = settings["slots"]
        lines.clear()
        made = llama_cpp.llama_init_from_model(loaded, params)
        if not made:
            raise SystemExit("".join(lines[-20:]))
        logs[str(length)] = "".join(lines)
        llama_cpp.llama_free(made)
    llama_cpp.llama_model_free(loaded)
    return {"logs": logs}


# --- embeddings --------------------------------------------------------------------------------------------------

READ_TOKENS = 512  # at once; a longer text is cut
READ_TEXTS = 32  # at once


def embed(model: str, text: str, settings: Settings) -> dict[str, object]:
    """Embed texts, a JSON list of strings, with BOS and EOS as the model wants them and the pooling it names.

    Vectors go to the file `out` if there is one: float32, one row per text, of any length. `all_finite` and `varied`
    say whether every number is finite and the vectors differ.
    """
    texts = json.loads(Path(text).read_bytes())
    vectors = np.concatenate(list(_vectors(model, texts, settings)))
    if "out" in settings:
        write_stream(Path(settings["out"]), [vectors.tobytes()])
    finite = bool(np.isfinite(vectors).all())
    varied = finite and bool((vectors != vectors[0]).any() if len(vectors) > 1 else vectors.any())
    return {"n_texts": len(vectors), "n_embd": vectors.shape[1], "all_finite": finite, "varied": varied}


def _vectors(model: str, texts: list[str], settings: Settings) -> Iterator[scoring.Floats]:
    """The vectors of texts in the order given, in blocks of shape (texts read at once, width)."""
    import llama_cpp  # noqa: PLC0415

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    loaded = _model(model, n_gpu_layers=settings.get("gpu_layers", 0))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = READ_TOKENS  # a text that is read both ways must be in one batch
    params.n_seq_max, params.kv_unified, params.embeddings = READ_TEXTS, True, True
    params.n_threads = params.n_threads_batch = settings.get("threads", 1)
    context = llama_cpp.llama_init_from_model(loaded, params)
    if not context:
        raise RuntimeError(f"llama.cpp cannot make a context for {model}")
    if llama_cpp.llama_pooling_type(context) == llama_cpp.LLAMA_POOLING_TYPE_NONE:
        raise RuntimeError(f"{model} does not say how it pools")
    width = int(llama_cpp.llama_model_n_embd_out(loaded))
    vocab = llama_cpp.llama_model_get_vocab(loaded)
    tokenized = [
        _token_ids(llama_cpp, vocab, text.encode(), add_special=True, parse_special=False)[:READ_TOKENS]
        for text in texts
    ]
    done = 0
    while done < len(texts):
        end, n_tokens = done, 0
        while end < len(texts) and end - done < READ_TEXTS and n_tokens + len(tokenized[end]) <= READ_TOKENS:
            n_tokens += len(tokenized[end])
            end += 1
        batch = llama_cpp.llama_batch_init(n_tokens, 0, 1)
        place = 0
        for sequence, ids in enumerate(tokenized[done:end]):
            for position, token in enumerate(ids):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, sequence, 1
                place += 1
        batch.n_tokens = n_tokens
        code = llama_cpp.llama_encode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if code != 0:
            raise RuntimeError(f"llama_encode ended with {code}")
        rows = [llama_cpp.llama_get_embeddings_seq(context, sequence) for sequence in range(end - done)]
        yield np.array([np.ctypeslib.as_array(row, shape=(width,)) for row in rows])
        done = end
        _say_progress(done, len(texts))
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(loaded)


# --- projectors --------------------------------------------------------------------------------------------------

PICTURE_SIDE, SOUND_SECONDS = 64, 2


def perceive(model: str, _text: str, settings: Settings) -> dict[str, object]:
    """Load the projector `mmproj` beside its model, show it a picture and play it a sound, as far as it takes them.

    Answers {"vision": ..., "audio": ...}, each None where the projector has no such tower, else how many vectors it
    gave and whether all are finite and not all alike. Of the model only header and vocabulary are read.
    """
    import llama_cpp  # noqa: PLC0415
    from llama_cpp import mtmd_cpp  # noqa: PLC0415

    loaded = _model(model, **HEADER_ONLY)
    params = mtmd_cpp.mtmd_context_params_default()
    params.use_gpu, params.warmup, params.n_threads = False, False, settings.get("threads", 1)
    context = mtmd_cpp.mtmd_init_from_file(settings["mmproj"].encode(), loaded, params)
    if not context:
        raise RuntimeError(f"llama.cpp cannot load {settings['mmproj']} as the projector of {model}")
    width = int(llama_cpp.llama_model_n_embd_inp(loaded))
    chance = np.random.default_rng(0)
    answer: dict[str, object] = {"vision": None, "audio": None}
    if mtmd_cpp.mtmd_support_vision(context):
        pixels = np.ctypeslib.as_ctypes(chance.integers(0, 256, 3 * PICTURE_SIDE**2, np.uint8))
        bitmap = mtmd_cpp.mtmd_bitmap_init(PICTURE_SIDE, PICTURE_SIDE, pixels)
        answer["vision"] = _projected(mtmd_cpp, context, bitmap, width)
    if mtmd_cpp.mtmd_support_audio(context):
        n_samples = SOUND_SECONDS * int(mtmd_cpp.mtmd_get_audio_sample_rate(context))
        samples = np.ctypeslib.as_ctypes(chance.normal(0, 0.1, n_samples).astype(np.float32))
        bitmap = mtmd_cpp.mtmd_bitmap_init_from_audio(n_samples, samples)
        answer["audio"] = _projected(mtmd_cpp, context, bitmap, width)
    return answer


def _projected(mtmd_cpp: Any, context: Any, bitmap: Any, width: int) -> dict[str, object]:
    """What a projector makes of one picture or sound."""
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    marker = mtmd_cpp.mtmd_default_marker()
    text = mtmd_cpp.mtmd_input_text(text=marker, text_len=len(marker), add_special=True, parse_special=True)
    code = mtmd_cpp.mtmd_tokenize(context, chunks, text, (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap), 1)
    if code != 0:
        raise RuntimeError(f"mtmd_tokenize ended with {code}")
    found = []
    for number in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
        chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, number)
        if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
            continue
        code = mtmd_cpp.mtmd_encode_chunk(context, chunk)
        if code != 0:
            raise RuntimeError(f"mtmd_encode_chunk ended with {code}")
        shape = (int(mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)), width)
        found.append(np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(context), shape=shape).copy())
    vectors = np.concatenate(found)
    finite = bool(np.isfinite(vectors).all())
    return {"n_vectors": len(vectors), "all_finite": finite, "varied": finite and bool(vectors.std() > 0)}


COMMANDS = {
    "perceive": perceive,
    "check": check,
    "tokens": tokens,
    "tokenize": tokenize,
    "base_logits": base_logits,
    "score": score,
    "contexts": contexts,
    "embed": embed,
}

if __name__ == "__main__":
    command, model_path, text_path, given = sys.argv[1:]
    try:
        print(json.dumps(COMMANDS[command](model_path, text_path, json.loads(given))))
    except scoring.NotMeasurableError as error:
        print(json.dumps({"error": str(error)}))
