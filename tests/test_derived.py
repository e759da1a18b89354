"""What is derived from a model: adapters and drafts, which are refused with what helps, and fine-tunes and merges."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_gguf import card, gemma, gguf_io, llama_cpp, manifest, source
from gemma_gguf.errors import BadInputError
from gemma_gguf.llama_cpp import Build
from tests import checkpoints, examples
from tests.gemma4 import write_gemma4_moe

ADAPTER = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
for name, parameter in tuned.named_parameters():
    if "lora_" in name:
        torch.nn.init.normal_(parameter, std=0.5)
tuned.save_pretrained(sys.argv[2])
"""
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def refused(path: Path) -> BadInputError:
    with pytest.raises(BadInputError) as caught:
        source.examine(path)
    return caught.value


def weights(directory: Path, wanted: str) -> Any:
    """One tensor of a checkpoint as float32, by the library that reads them."""
    from safetensors import safe_open  # noqa: PLC0415

    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                if name == wanted:
                    return file.get_tensor(name).float().numpy()
    raise AssertionError(wanted)


# --- adapters ------------------------------------------------------------------------------------------------------


def test_the_commands_that_merge_an_adapter_work(text_checkpoint: Path, tmp_path: Path) -> None:
    """They are executed as they stand, but for the installation; the result is a checkpoint of the merged model."""
    adapter = tmp_path / "adapter"
    python = [sys.executable, "-W", "ignore"]
    subprocess.run([*python, "-c", ADAPTER, str(text_checkpoint), str(adapter)], check=True, capture_output=True)
    error = refused(adapter)
    assert error.what == f"{adapter} is a LoRA adapter, not a model"
    _, install, merge, files = str(error.next_step).split("\n")
    assert install == "pip install peft"
    program, *arguments = shlex.split(merge)
    assert program == "python"
    done = subprocess.run([*python, *arguments], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    subprocess.run(["sh", "-c", files], cwd=tmp_path, check=True)
    merged = tmp_path / "MERGED"
    assert source.examine(merged).architecture == "Gemma3ForCausalLM"
    assert (merged / "tokenizer.model").read_bytes() == (text_checkpoint / "tokenizer.model").read_bytes()
    low, high = (
        weights(adapter, f"base_model.model.{WEIGHT.removesuffix('.weight')}.lora_{part}.weight") for part in "AB"
    )
    settings = json.loads((adapter / "adapter_config.json").read_text())
    expected = weights(text_checkpoint, WEIGHT) + settings["lora_alpha"] / settings["r"] * high @ low
    np.testing.assert_allclose(weights(merged, WEIGHT), expected, rtol=0.02, atol=0.02)
    assert not np.allclose(weights(text_checkpoint, WEIGHT), expected, atol=0.1)


@pytest.mark.parametrize(
    ("base", "last"),
    [
        ("google/gemma-3-4b-it", "hf download google/gemma-3-4b-it --include 'tokenizer*' --local-dir MERGED"),
        ("../my models/base", "cp '../my models/base'/tokenizer* MERGED/"),
        (None, "cp BASE/tokenizer* MERGED/"),
        ("a; rm -rf x", "cp BASE/tokenizer* MERGED/"),
        (3, "cp BASE/tokenizer* MERGED/"),
    ],
    ids=["hub", "directory", "none", "hostile", "number"],
)
def test_where_the_tokenizer_comes_from(base: object, last: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    assert str(refused(tmp_path).next_step).split("\n")[-1] == last


# --- drafts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", gemma.DRAFTS)
def test_a_draft_is_refused_with_its_name(architecture: str, tmp_path: Path) -> None:
    draft = write_gemma4_moe(tmp_path / "draft", layers=2)
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    error = refused(draft)
    assert f"holds a {architecture}, a draft for speculative decoding" in error.what
    command = str(error.next_step).split("\n")[-1]
    assert f"--outfile {gemma.DRAFTS[architecture]}-NAME-Q8_0.gguf" in command
    assert ("--target-model-dir" in command) == (architecture == "Gemma4DSparkModel")


def test_the_converter_knows_every_draft_of_gemma(build: Build) -> None:
    """A new one in the pinned converter needs a row: as an unknown architecture it would be refused without help."""
    text = (build.root / "source" / "conversion" / "__init__.py").read_text()
    known = re.findall(r'"(Gemma\w*(?:Assistant|DSpark|Draft|Eagle|MTP)\w*)": "gemma"', text)
    assert set(known) == set(gemma.DRAFTS)
    options = (build.converter).read_text()
    assert '"--target-model-dir"' in options


def write_assistant(directory: Path) -> Path:
    """A draft as Google's: a Gemma 4 without experts, keys and values, between projections of its model's width."""
    import torch  # noqa: PLC0415 - slow
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    write_gemma4_moe(directory, layers=2)
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "backbone_hidden_size": 512,
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
    }
    (directory / "config.json").write_text(json.dumps(config))
    spare = re.compile(r"experts|router|layernorm_[12]|[kv]_(proj|norm)")
    kept: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        kept |= {name: tensor for name, tensor in load_file(path).items() if not spare.search(name)}
        path.unlink()
    hidden = config["hidden_size"]
    kept["pre_projection.weight"] = torch.ones(hidden, 2 * 512, dtype=torch.bfloat16)
    kept["post_projection.weight"] = torch.ones(512, hidden, dtype=torch.bfloat16)
    (directory / "model.safetensors.index.json").unlink()
    save_file(kept, directory / "model.safetensors")
    return directory


def test_the_command_for_a_draft_works(build: Build, tmp_path: Path) -> None:
    """The real converter writes an assistant by it, of an architecture that llama.cpp runs beside a model alone."""
    draft = write_assistant(tmp_path / "draft")
    program, *arguments = shlex.split(str(refused(draft).next_step).split("\n")[-1])
    assert program == build.converter.name
    argv = [sys.executable, "-W", "ignore", str(build.converter), *arguments]
    done = subprocess.run(
        argv, cwd=tmp_path, env={"PATH": "", **llama_cpp.python_env(build)}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    header = gguf_io.read_header(tmp_path / "mtp-NAME-Q8_0.gguf")
    assert header.get("general.architecture") == "gemma4-assistant"
    asked = subprocess.run(
        [build.tool("llama-bench"), "-m", "mtp-NAME-Q8_0.gguf", "-p", "8", "-n", "0", "-r", "1"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert asked.returncode != 0
    assert b"failed to create context" in asked.stderr  # it loads, but alone it gives nothing to measure


# --- fine-tunes and merges -------------------------------------------------------------------------------------------


def of(front_matter: dict[str, Any], repo: str | None = "someone/Gemma-Sonnets-4B") -> manifest.Manifest:
    made = examples.example()
    model = made.model.model_copy(update={"repo": repo, "front_matter": front_matter, "model": "Gemma-Sonnets-4B"})
    return made.model_copy(update={"model": model})


TUNED = {
    "license": "gemma",
    "base_model": "google/gemma-3-4b-it",
    "base_model_relation": "finetune",
    "tags": ["trl", "sft", "base_model:finetune:google/gemma-3-4b-it"],
    "pipeline_tag": "text-generation",
}


def test_a_set_is_of_the_fine_tune_not_of_its_base() -> None:
    page = card.render(of(TUNED))
    front = page.split("---\n")[1]
    assert "base_model: someone/Gemma-Sonnets-4B\n" in front
    assert "base_model_relation: quantized\n" in front
    assert "google/" not in front  # neither as a base nor in a tag
    assert "- trl\n- sft\n- gguf\n" in front
    assert "- Original model: [someone/Gemma-Sonnets-4B](https://huggingface.co/someone/Gemma-Sonnets-4B)" in page
    assert (
        "- The original model was made from: [google/gemma-3-4b-it](https://huggingface.co/google/gemma-3-4b-it)\n"
        in page
    )


def test_a_merge_names_all_its_parts() -> None:
    page = card.render(of({**TUNED, "base_model": ["a/one", "b/two", "a/one", "no id", 3, "someone/Gemma-Sonnets-4B"]}))
    assert "made from: [a/one](https://huggingface.co/a/one), [b/two](https://huggingface.co/b/two)\n" in page
    assert "no id" not in page


def test_a_local_fine_tune_without_a_name_claims_no_base() -> None:
    """Its files are quants of a model that is nowhere on the Hub: naming its base would be a lie."""
    page = card.render(of(TUNED, repo=None))
    assert "base_model" not in page.split("---\n")[1]
    assert "made from: [google/gemma-3-4b-it]" in page


def test_a_fine_tune_with_added_tokens_is_examined_like_its_base(tmp_path: Path) -> None:
    """What its own files say goes into the facts; its name decides nothing."""
    made = checkpoints.write_gemma3_text(tmp_path / "Sonnets-4B-v2")
    (made / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 384}))
    assert "added_tokens.json" in source.examine(made).files
    assert source.examine(made).family.name == "Gemma 3"
