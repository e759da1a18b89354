"""Logits of a base and of a quant -> numbers per token -> statistics. Pure numpy; needs neither a model nor a disk.

Consumes float32 logits of shape (rows, n_vocab) and the tokens that really came next; produces, per token, both
negative log-likelihoods, the Kullback-Leibler divergence of the quant's distribution from the base's and whether their
most probable tokens agree, and from those the figures of `manifest.Quality`. All logarithms are natural.

The base's distributions are kept in 16 bits: log-probabilities on 65,536 even steps between the row's smallest and
largest. When read they are made to sum to one again, so no divergence is negative and a model measured against itself
gives some 1e-8 nats. llama-perplexity (llama.cpp, tools/perplexity) keeps them the same way, but cuts them 16 nats
below the largest and does not normalise; on the demo model that moves its mean divergence by 0.05 % or less. The next
token's likelihood and the most probable token are kept exactly.

Rows are worked on in blocks that stay in the processor's cache, by threads, which numpy lets run side by side. BLAS is
not used, so the figures do not depend on the number of threads.
"""

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]
Codes = npt.NDArray[np.uint16]
Records = npt.NDArray[Any]  # structured

STEPS = 65535
BLOCK_ELEMENTS = 1 << 18  # one row of Gemma's vocabulary, 1 MB
MIN_TOKENS_P999 = 10_000  # with fewer, less than ten values lie above the 99.9 % quantile

# What is kept of each row of the base beside its codes: log-probability = code * scale + floor.
BASE_ROW = np.dtype([("scale", "<f4"), ("floor", "<f4"), ("nll", "<f8"), ("top", "<i4")])
TOKEN = np.dtype([("nll", "<f8"), ("nll_base", "<f8"), ("kld", "<f8"), ("same_top", "?")])


class NotMeasurableError(ValueError):
    """These logits give no figures."""


def base_bytes(n_rows: int, n_vocab: int) -> int:
    """What `n_rows` rows of a base take on the disk."""
    return n_rows * (BASE_ROW.itemsize + 2 * n_vocab)


def encode_base(logits: Floats, targets: Tokens, pool: Executor) -> tuple[Records, Codes]:
    """(records of type `BASE_ROW`, codes of shape (rows, n_vocab)) of a base's logits.

    `targets` are the tokens that came next, one per row. Raises `NotMeasurableError` when a logit is not finite.
    """
    records, codes = np.empty(len(logits), BASE_ROW), np.empty(logits.shape, np.uint16)

    def encode(rows: slice) -> None:
        log_p, nll, top = _log_softmax(logits[rows], targets[rows])
        floor = log_p.min(axis=1)
        scale = (log_p.max(axis=1) - floor) / np.float32(STEPS)
        if not np.isfinite(scale).all():
            raise NotMeasurableError("the base's logits hold NaN or Inf")
        log_p -= floor[:, None]
        log_p /= np.where(scale > 0, scale, np.float32(1))[:, None]
        np.rint(log_p, out=log_p)
        codes[rows] = log_p
        block = records[rows]
        block["scale"], block["floor"], block["nll"], block["top"] = scale, floor, nll, top

    _by_blocks(logits, encode, pool)
    return records, codes


def score(logits: Floats, targets: Tokens, base: Records, codes: Codes, pool: Executor) -> Records:
    """Records of type `TOKEN`, one per row: what a quant's logits make of the same text as the base's."""
    tokens = np.empty(len(logits), TOKEN)

    def compare(rows: slice) -> None:
        log_q, nll, top = _log_softmax(logits[rows], targets[rows])
        kept = base[rows]
        log_p = np.multiply(codes[rows], kept["scale"][:, None], dtype=np.float32)
        log_p += kept["floor"][:, None]
        p = np.exp(log_p)
        total = p.sum(axis=1)
        log_p -= log_q
        log_p *= p
        block = tokens[rows]
        block["kld"] = log_p.sum(axis=1) / total - np.log(total)
        block["nll"], block["nll_base"], block["same_top"] = nll, kept["nll"], top == kept["top"]

    _by_blocks(logits, compare, pool)
    return tokens


def _log_softmax(logits: Floats, targets: Tokens) -> tuple[Floats, npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """(log-probabilities, negative log-likelihood of the targets, most probable tokens) of one block."""
    every = np.arange(len(logits))
    top = logits.argmax(axis=1)
    log_p = logits - logits[every, top][:, None]
    log_sum = np.log(np.exp(log_p).sum(axis=1))
    nll = log_sum.astype(np.float64) - log_p[every, targets]
    log_p -= log_sum[:, None]
    return log_p, nll, top


def _by_blocks(logits: Floats, work: Callable[[slice], None], pool: Executor) -> None:
    step = max(1, BLOCK_ELEMENTS // logits.shape[1])
    for _ in pool.map(work, (slice(start, start + step) for start in range(0, len(logits), step))):
        pass


# --- statistics --------------------------------------------------------------------------------------------------


def summary(tokens: Records) -> dict[str, Any]:
    """The figures of `manifest.Quality` from records of type `TOKEN`, each mean with its standard error.

    Formulas are llama-perplexity's: tokens count as independent, the error of exp(mean) is exp(mean) times the mean's,
    the ratio's is that of the paired differences, a share's is binomial. Raises `NotMeasurableError` for no tokens, or
    when a number is not finite.
    """
    if len(tokens) == 0:
        raise NotMeasurableError("no token was scored")
    nll, kld = tokens["nll"], tokens["kld"]
    if not (np.isfinite(nll).all() and np.isfinite(kld).all()):
        raise NotMeasurableError("its logits hold NaN or Inf")
    change = np.exp(-nll) - np.exp(-tokens["nll_base"])
    square, square_se = mean_and_error(change**2)
    rms = square**0.5
    same = float(tokens["same_top"].mean())
    same_se = (same * (1 - same) / (len(tokens) - 1)) ** 0.5 if len(tokens) > 1 else None
    quantiles = np.quantile(kld, (0.5, 0.99, 0.999))
    ppl, ratio = _exp_of_mean(nll), _exp_of_mean(nll - tokens["nll_base"])
    if not np.isfinite([ppl[0], ratio[0]]).all():
        raise NotMeasurableError(f"its perplexity is beyond any number (exp of {nll.mean():.4g})")
    return {
        "n_tokens": len(tokens),
        "ppl": _measured(*ppl),
        "ppl_ratio": _measured(*ratio),
        "kld": _measured(*mean_and_error(kld)),
        "kld_median": float(quantiles[0]),
        "kld_p99": float(quantiles[1]),
        "kld_p999": float(quantiles[2]) if len(tokens) >= MIN_TOKENS_P999 else None,
        "delta_p_rms": _measured(rms, None if square_se is None else square_se / (2 * rms) if rms else 0.0),
        "same_top_p": _measured(same, same_se),
    }


def mean_and_error(values: npt.NDArray[np.float64]) -> tuple[float, float | None]:
    """(mean, its standard error)."""
    error = float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None
    return float(values.mean()), error


def _exp_of_mean(values: npt.NDArray[np.float64]) -> tuple[float, float | None]:
    mean, error = mean_and_error(values)
    with np.errstate(over="ignore"):
        value = float(np.exp(mean))
    return value, None if error is None else value * error


def _measured(value: float, se: float | None) -> dict[str, float | None]:
    return {"value": value, "se": se}
