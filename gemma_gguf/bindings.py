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
    or not, as llama-perplexity does.
    """
    import llama_cpp  # noqa: PLC0415

    llama = llama_cpp.Llama(model, vocab_only=True, verbose=False)
    found = llama.tokenize(Path(text).read_bytes(), add_bos=True, special=settings.get("parse_special", True))
    return {"n_tokens": len(found), "n_vocab": llama.n_vocab()}


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
    which then runs beside this one, chunk by chunk; the figures are the same.
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
    return scoring.summary(np.concatenate(found))


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
        room = len(data) + 8  # no token is shorter than a byte, but BOS and EOS may come in addition
        buffer = (self._llama.llama_token * room)()
        count = self._llama.llama_tokenize(self._vocab, data, len(data), buffer, room, add_special, parse_special)
        if count < 0:
            raise ValueError(f"the text has {-count} tokens, more than its {len(data)} bytes")
        return list(buffer[:count])

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


@contextlib.contextmanager
def _loaded(path: str, settings: Settings) -> Iterator[_Forward]:
    """A model as llama.cpp's own tools load it, with a context of one chunk."""
    import llama_cpp  # noqa: PLC0415

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    llama_cpp.llama_backend_init()
    wanted = llama_cpp.llama_model_default_params()
    wanted.n_gpu_layers = settings["gpu_layers"]
    model = llama_cpp.llama_model_load_from_file(path.encode(), wanted)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
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

    `settings`: `lengths` in tokens, `slots` that share the cache, `ubatch` tokens computed at once. Nothing is
    read but the header and nothing allocated: llama.cpp simulates that, as it does to fit a model to a machine. As in
    llama-server, there is room for the logits of one token of each slot.
    """
    import llama_cpp  # noqa: PLC0415

    lines: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(_level: int, text: bytes, _data: object) -> None:
        lines.append(text.decode("utf-8", errors="replace"))

    llama_cpp.llama_log_set(keep, None)
    llama_cpp.llama_backend_init()
    how = llama_cpp.llama_model_default_params()
    how.no_alloc, how.load_mode, how.n_gpu_layers = True, 0, 0  # 0 is LLAMA_LOAD_MODE_NONE
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), how)
    if not loaded:
        raise SystemExit("".join(lines[-20:]))
    logs: dict[str, str] = {}
    for length in settings["lengths"]:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = length, 2048, settings["ubatch"]
        params.n_seq_max = params.n_outputs_max = settings["slots"]
        params.kv_unified, params.swa_full = True, False
        lines.clear()
        made = llama_cpp.llama_init_from_model(loaded, params)
        if not made:
            raise SystemExit("".join(lines[-20:]))
        logs[str(length)] = "".join(lines)
        llama_cpp.llama_free(made)
    llama_cpp.llama_model_free(loaded)
    return {"logs": logs}


COMMANDS = {"check": check, "tokens": tokens, "base_logits": base_logits, "score": score, "contexts": contexts}

if __name__ == "__main__":
    command, model_path, text_path, given = sys.argv[1:]
    try:
        print(json.dumps(COMMANDS[command](model_path, text_path, json.loads(given))))
    except scoring.NotMeasurableError as error:
        print(json.dumps({"error": str(error)}))
