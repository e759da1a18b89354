"""A worker process of one build: the only place that imports `llama_cpp`.

Run as `python -m gemma_gguf.bindings check|tokens MODEL TEXT` or `contexts MODEL JSON`, with the paths of a build in
the environment (`llama_cpp.python_env`); prints one JSON object. It is a process of its own because an abort inside
ggml must not take the run with it, and because two builds can serve one run.
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


def contexts(model: str, request: str) -> dict[str, object]:
    """What llama.cpp writes while it makes contexts, by their length.

    `request` is JSON: `lengths` in tokens, `slots` that share the cache, `ubatch` tokens computed at once. Nothing is
    read but the header and nothing allocated: llama.cpp simulates that, as it does to fit a model to a machine. As in
    llama-server, there is room for the logits of one token of each slot.
    """
    import llama_cpp  # noqa: PLC0415

    asked = json.loads(request)
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
    for length in asked["lengths"]:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = length, 2048, asked["ubatch"]
        params.n_seq_max = params.n_outputs_max = asked["slots"]
        params.kv_unified, params.swa_full = True, False
        lines.clear()
        made = llama_cpp.llama_init_from_model(loaded, params)
        if not made:
            raise SystemExit("".join(lines[-20:]))
        logs[str(length)] = "".join(lines)
        llama_cpp.llama_free(made)
    llama_cpp.llama_model_free(loaded)
    return {"logs": logs}


COMMANDS = {"check": check, "tokens": tokens, "contexts": contexts}

if __name__ == "__main__":
    command, model_path, argument = sys.argv[1:]
    print(json.dumps(COMMANDS[command](model_path, argument)))
