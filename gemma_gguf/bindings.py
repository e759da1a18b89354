"""A worker process of one build: the only place that imports `llama_cpp`.

Run as `python -m gemma_gguf.bindings check|tokens MODEL TEXT`, with the paths of a build in the environment
(`llama_cpp.python_env`); prints one JSON object. It is a process of its own because an abort inside ggml must not
take the run with it, and because two builds can serve one run.
"""

import json
import sys
from pathlib import Path


def check(model: str, text: str, n_tokens: int = 32) -> dict[str, object]:
    """Load a model, read the first `n_tokens` of a text, and report whether every logit is finite."""
    import llama_cpp  # noqa: PLC0415 - exists only in a worker started with a build's paths
    import numpy as np  # noqa: PLC0415

    llama = llama_cpp.Llama(model, n_ctx=64, n_batch=64, logits_all=True, n_gpu_layers=0, verbose=False)
    tokens = llama.tokenize(Path(text).read_bytes()[:2000], special=True)[:n_tokens]
    llama.eval(tokens)
    logits = np.asarray(llama.scores[: len(tokens)])
    finite = np.isfinite(logits)
    return {
        "n_tokens": len(tokens),
        "n_vocab": int(logits.shape[1]),
        "all_finite": bool(finite.all()),
        "varied": bool(finite.all() and logits.std() > 0),
    }


def tokens(model: str, text: str) -> dict[str, object]:
    """Count the tokens of a text as llama-imatrix does: with BOS where the model wants it, special tokens parsed."""
    import llama_cpp  # noqa: PLC0415

    llama = llama_cpp.Llama(model, vocab_only=True, verbose=False)
    return {"n_tokens": len(llama.tokenize(Path(text).read_bytes(), add_bos=True, special=True))}


COMMANDS = {"check": check, "tokens": tokens}

if __name__ == "__main__":
    command, model_path, text_path = sys.argv[1:]
    print(json.dumps(COMMANDS[command](model_path, text_path)))
