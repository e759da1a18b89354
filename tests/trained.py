"""A small Gemma 3 trained from scratch on this machine: a model on which quants can be ranked.

The demo's weights lie on a quantisation grid and random weights carry no knowledge that could be lost, so neither
shows which recipe is better. Here transformers' own `Gemma3ForCausalLM` learns the text of `stories.py` for some
minutes, with a SentencePiece tokenizer of its own; all columns are divisible by 256, so every K- and I-quant applies
as it is. `checkpoint()` gives the directory that `gemma-gguf run DIR --name test/trained` takes; it is trained once
per version of these files, torch and transformers, and kept in the cache directory. By hand: `python -m tests.trained`.

What was tried (figures from 10,200 scored tokens, differences ± standard error over tokens):
- Norm weights that begin at one, as transformers sets them, hardly move in some minutes: all columns stay about as
  important as each other and an imatrix has little to tell. KLD of Q2_K / Q3_K_M without an imatrix minus with one:
  +0.00046 ± 0.00009 / +0.00002 ± 0.00002 (600 steps), +0.00099 ± 0.00030 / +0.00001 ± 0.00005 (1600 steps). In Gemma 3
  270M the logarithm of a layer's norm weights has a standard deviation of 1.0 to 1.2 (medians over 18 layers, norms
  before and after attention and feed-forward). With norms that begin spread (SPREAD) a model learns as fast or faster,
  and an imatrix tells: +0.00303 ± 0.00033 / +0.00047 ± 0.00005 (800 steps).
- More training makes a model more sensitive: KLD of Q4_K_M 0.00018 after 600 steps at rate 3e-3, 0.00042 after 1600 at
  5e-3. Weight decay would work against it and is off. These figures stay below those of large models, whose layers
  are ten times as many; paired differences show them all the same.
- A vocabulary of 1024 instead of 2048 and a feed-forward of 512 instead of 768 save a third of the time.
- bfloat16 halves the time on CPUs that multiply in it, and is many times slower on others: float32.

The same seed gives the same weights on one kind of CPU; another kind may round otherwise, so nothing that is tested
depends on the exact weights.
"""

import io
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_gguf import llama_cpp
from gemma_gguf.demo import to_bf16, write_bf16_safetensors
from gemma_gguf.files import locked, sha256_bytes, sha256_json
from tests import checkpoints, stories

NAME = "test/trained"
SEED = 20261122
VOCABULARY, HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 1024, 256, 512, 4, 4, 2, 64
TOKENS, BATCH, STEPS = 256, 4, 800  # tokens of a row, rows of a step
RATE, WARM_STEPS, COOLING = 5e-3, 50, 0.4  # peak learning rate; the last 40 % of the steps cool down to nothing
# Norm weights begin log-normal: the standard deviation of their logarithm, by the norm's name.
SPREAD = {
    "input_layernorm": 1.0,
    "post_attention_layernorm": 0.5,
    "pre_feedforward_layernorm": 1.0,
    "post_feedforward_layernorm": 0.5,
    "norm": 1.0,
}
# Reductions are split by thread, so their number is part of what the seed decides.
THREADS = 2
N_CHARACTERS = round(STEPS * BATCH * TOKENS * 3.4)  # of training text; a token of it is shorter

CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [gemma3, test]
---
# A test model

Trained from scratch by tests/trained.py on text made by tests/stories.py.
"""


def config() -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "torch_dtype": "bfloat16",
        **checkpoints.text_config(VOCABULARY, LAYERS, HIDDEN),
        "intermediate_size": FEED_FORWARD,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "query_pre_attn_scalar": HEAD_DIM,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }


def tokenizer_model() -> bytes:
    """tokenizer.model: byte-pair pieces of the training text, as Gemma's: no dummy prefix, digits one by one, bytes
    for every other letter. Line ends are no words to SentencePiece's trainer, so their pieces are added afterwards.
    """
    import sentencepiece  # noqa: PLC0415 - an extra, as torch is
    from sentencepiece import sentencepiece_model_pb2 as sp  # noqa: PLC0415

    line_ends = ("\n\n", "\n")
    written = io.BytesIO()
    lines = [line for line in stories.text("training", 1_000_000).split("\n") if line.isascii()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCABULARY - len(line_ends),
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        bos_piece="<bos>",
        eos_piece="<eos>",
        control_symbols=list(checkpoints.SPECIAL[4:]),
        num_threads=1,
        minloglevel=2,
    )
    model = sp.ModelProto.FromString(written.getvalue())
    for text in line_ends:
        model.pieces.add(piece=text, score=model.pieces[-1].score - 1)
    model.trainer_spec.vocab_size = len(model.pieces)
    return bytes(model.SerializeToString())


def rows(tokenizer: bytes) -> npt.NDArray[np.int64]:
    """Training text as (STEPS * BATCH, TOKENS) in a random order, each row beginning with <bos>."""
    import sentencepiece  # noqa: PLC0415

    n_rows = STEPS * BATCH
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    tokens = np.array(processor.encode(stories.text("training", N_CHARACTERS)), dtype=np.int64)
    cut: npt.NDArray[np.int64] = tokens[: n_rows * TOKENS].reshape(n_rows, TOKENS)
    cut = cut[np.random.default_rng(SEED).permutation(n_rows)]
    cut[:, 0] = processor.bos_id()
    return cut


def train(directory: Path) -> None:
    """Write the checkpoint: some minutes on two cores. Runs in a process of its own (see `checkpoint`)."""
    import torch  # noqa: PLC0415
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig  # noqa: PLC0415

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_model()
    data = torch.from_numpy(rows(tokenizer))
    model = Gemma3ForCausalLM(Gemma3TextConfig(**config()))
    with torch.no_grad():
        for name, values in model.named_parameters():
            if spread := SPREAD.get(name.split(".")[-2]):
                values.copy_(torch.exp(spread * torch.randn(values.shape)) - 1)  # Gemma's norms multiply by 1 + weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    started = time.monotonic()
    for step in range(STEPS):
        rate = RATE * min(1, (step + 1) / WARM_STEPS, (STEPS - step) / (COOLING * STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = data[step * BATCH : (step + 1) * BATCH]
        hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden).float()
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {step + 1} of {STEPS}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    tensors = {name: to_bf16(values.numpy()) for name, values in model.state_dict().items() if name != "lm_head.weight"}
    write_bf16_safetensors(directory / "model.safetensors", tensors)
    checkpoints.write_tokenizer_files(directory, tokenizer, chat_template=None)
    (directory / "README.md").write_text(CARD)
    (directory / "config.json").write_text(json.dumps(config(), indent=1))


def key() -> str:
    """What the weights depend on: the files that make them, and the versions of what trains."""
    sources = [Path(str(module.__file__)).read_bytes() for module in (sys.modules[__name__], stories, checkpoints)]
    tools = [version(package) for package in ("torch", "transformers", "sentencepiece")]
    return sha256_json([[sha256_bytes(data) for data in sources], tools])[:20]


def checkpoint() -> Path:
    """The directory of the trained checkpoint, from the cache or trained now, in a process of its own.

    torch and its settings (threads, determinism) do not belong into the process of the other tests.
    """
    final = llama_cpp.cache_dir() / "trained" / key() / "trained"
    with locked(final.parent, "the trained test model", wait=True):
        if not final.is_dir():
            partial = final.with_name("partial")
            environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
            command = [sys.executable, "-m", "tests.trained", str(partial)]
            subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, check=True)
            partial.rename(final)
    return final


if __name__ == "__main__":
    if sys.argv[1:]:
        train(Path(sys.argv[1]))
    else:
        print(checkpoint())
