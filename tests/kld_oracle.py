"""KL divergence per token, the plain way: a second opinion on `evaluate`, and what paired comparisons are made of.

Run as `python -m tests.kld_oracle OUT TEXT N_CHUNKS BASE MODEL...` in a process of a build (`llama_cpp.python_env`).
Writes `OUT`, an .npz with one float64 array per model, in nats, called by the model's file name, of shape
(chunks, scored tokens), and, of the same shape, `came`, the scored tokens, and `nll`, what they cost the base. Chunks
are those of llama-perplexity: 512 tokens, the first of them BOS, the second half scored. Everything is computed in
float64 from the logits as they come; nothing is packed in 16 bits in between.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

CHUNK = 512
Array = npt.NDArray[np.float64]


def passes(model: str, text: bytes, n_chunks: int) -> Iterator[tuple[Array, list[int]]]:
    """Per chunk: (log-probabilities, shape (scored, n_vocab); the tokens that came)."""
    import llama_cpp  # noqa: PLC0415 - exists only in a worker started with a build's paths

    threads = os.cpu_count() or 1
    llama = llama_cpp.Llama(
        model,
        n_ctx=CHUNK,
        n_batch=CHUNK,
        n_ubatch=CHUNK,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,  # what llama.cpp's tools choose on a CPU, and so does `evaluate`
        swa_full=False,
        logits_all=True,
        verbose=False,
    )
    tokens = llama.tokenize(text, add_bos=True, special=False)
    for start in range(0, n_chunks * CHUNK, CHUNK):
        chunk = [llama.token_bos(), *tokens[start + 1 : start + CHUNK]]
        if len(chunk) < CHUNK:
            raise ValueError(f"the text has {len(tokens)} tokens, no {n_chunks} chunks")
        llama.reset()
        llama.eval(chunk)
        logits = np.array(llama.scores[CHUNK // 2 : CHUNK - 1], dtype=np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        yield logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), chunk[CHUNK // 2 + 1 :]
    llama.close()


def main(out: str, text: str, n_chunks: str, base: str, *models: str) -> None:
    """Write `out`; every model is compared with `base`."""
    data, n = Path(text).read_bytes(), int(n_chunks)
    log_p, came = zip(*passes(base, data, n), strict=True)
    nll = [-chunk[np.arange(len(tokens)), tokens] for chunk, tokens in zip(log_p, came, strict=True)]
    arrays = {"nll": np.stack(nll), "came": np.array(came)}
    for model in models:
        compared = zip(log_p, passes(model, data, n), strict=True)
        arrays[Path(model).name] = np.stack([(np.exp(p) * (p - q)).sum(axis=1) for p, (q, _) in compared])
    np.savez(out, **arrays)  # type: ignore[arg-type] # its stub takes names of options for arrays


if __name__ == "__main__":
    main(*sys.argv[1:])
