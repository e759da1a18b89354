"""One whole manifest with values as a real run records them, for tests that need a set but no files."""

from typing import Literal

from gemma_gguf import pictures
from gemma_gguf.files import sha256_bytes
from gemma_gguf.manifest import (
    DEFAULT_CARD,
    DEFAULT_GATES,
    BuildFacts,
    CacheGroup,
    CalibrationFacts,
    Checks,
    ContextFacts,
    ContextMemory,
    ConverterFacts,
    Coverage,
    Evidence,
    Failed,
    FileEntry,
    GridFit,
    ImatrixFacts,
    KernelFacts,
    Manifest,
    Measured,
    ModelFacts,
    ParityFacts,
    Picture,
    PromptExample,
    PromptFacts,
    QatFacts,
    Quality,
    Sampling,
    Speed,
    StageRecord,
    Support,
)

STEM = "google_gemma-3-4b-it"
IMATRIX = f"{STEM}-imatrix.gguf"
BUILD = "4dada9721042065495c5"
COMMIT = "093f9f388b31de276ce2de164bdc2081324b9767"
FRONT_MATTER = {
    "license": "gemma",
    "library_name": "transformers",
    "pipeline_tag": "image-text-to-text",
    "tags": ["gemma3", "conversational"],
    "language": ["en"],
    "extra_gated_heading": "Access Gemma on Hugging Face",
    "extra_gated_prompt": "To access Gemma on Hugging Face, you’re required to agree to Google’s usage license.",
    "extra_gated_button_content": "Acknowledge license",
    "base_model": "google/gemma-3-4b-pt",
}


def sha(name: str) -> str:
    """A sha256 that is always the same for one name."""
    return sha256_bytes(name.encode())


def model_entry(
    recipe: str,
    ftype: str,
    about: str,
    *,
    n_bytes: int,
    bpw: float,
    types: dict[str, int],
    parent: str | None = None,
    differs: list[str] | None = None,
    flags: tuple[str, ...] = (),
) -> FileEntry:
    """A model file as llama-quantize made it; the bf16 row is the converter's."""
    name = f"{STEM}-{recipe}.gguf"
    is_base = recipe == "bf16"
    base, out = f"../.work/{STEM}/{STEM}-bf16.gguf", f"../.work/{STEM}/{STEM}-{recipe}.partial.gguf"
    return FileEntry(
        name=name,
        kind="model",
        recipe=recipe,
        about=about,
        ftype=ftype,
        flags=list(flags),
        static=False,
        state="local",
        remote=None,
        n_bytes=n_bytes,
        sha256=sha(name),
        shards=[],
        bpw=bpw,
        types=types,
        fallbacks={},
        parent=parent,
        differs=differs or [],
        argv=[] if is_base else ["llama-quantize", "--imatrix", IMATRIX, *flags, base, out, ftype, "2"],
        engine="convert" if is_base else "llama-quantize",
        seconds=0.0 if is_base else 141.27,
        key=sha(f"key of {name}"),
        build=BUILD,
        checks=Checks(layout_sha256=sha(f"layout of {name}"), sampled_rows=887, load="bindings"),
    )


def example() -> Manifest:
    """The set of google/gemma-3-4b-it with six models, one projector and the imatrix, in the order they were made."""
    large = ("--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0")
    mmproj = FileEntry(
        name=f"mmproj-{STEM}-f16.gguf",
        kind="mmproj",
        recipe=None,
        about=None,
        ftype=None,
        flags=[],
        static=False,
        state="local",
        remote=None,
        n_bytes=851251104,
        sha256=sha("mmproj"),
        shards=[],
        bpw=None,
        types={"F32": 276, "F16": 163},
        fallbacks={},
        parent=None,
        differs=[],
        argv=["python", "convert_hf_to_gguf.py", "--mmproj", "--outtype", "f16"],
        engine="convert",
        seconds=9.81,
        key=sha("key of convert"),
        build=BUILD,
        checks=Checks(layout_sha256=sha("layout of mmproj"), sampled_rows=877, load="bindings"),
    )
    imatrix = FileEntry(
        name=IMATRIX,
        kind="imatrix",
        recipe=None,
        about=None,
        ftype=None,
        flags=[],
        static=False,
        state="local",
        remote=None,
        n_bytes=3567456,
        sha256=sha("imatrix"),
        shards=[],
        bpw=None,
        types={"F32": 476},
        fallbacks={},
        parent=None,
        differs=[],
        argv=["llama-imatrix", "-m", f"{STEM}-bf16.gguf", "-f", "calibration-default.txt"],
        engine="llama-imatrix",
        seconds=1733.4,
        key=sha("key of imatrix"),
        build=BUILD,
        checks=None,
    )
    models = [
        model_entry(
            "bf16",
            "BF16",
            "Full BF16 weights, as converted",
            n_bytes=7767474144,
            bpw=16.0067,
            types={"BF16": 239, "F32": 205},
        ),
        model_entry(
            "Q8_0",
            "Q8_0",
            "8 bits, one scale per 32 weights",
            n_bytes=4130226144,
            bpw=8.5051,
            types={"Q8_0": 239, "F32": 205},
        ),
        model_entry(
            "Q4_K_L",
            "Q4_K_M",
            "Q4_K_M with embedding and output at Q8_0",
            n_bytes=2669357024,
            bpw=5.4945,
            types={"F32": 205, "Q4_K": 204, "Q6_K": 34, "Q8_0": 1},
            parent="Q4_K_M",
            differs=["token_embd.weight"],
            flags=large,
        ),
        model_entry(
            "Q4_K_M",
            "Q4_K_M",
            "K-quant mix, 4 bits with some tensors at 6",
            n_bytes=2489894976,
            bpw=5.1243,
            types={"F32": 205, "Q4_K": 204, "Q6_K": 35},
        ),
        model_entry(
            "Q4_0",
            "Q4_0",
            "4 bits, one scale per 32 weights; repacked online for ARM and AVX",
            n_bytes=2363344256,
            bpw=4.8636,
            types={"Q4_0": 234, "F32": 205, "Q4_1": 4, "Q6_K": 1},
        ),
        model_entry(
            "IQ2_XS",
            "IQ2_XS",
            "I-quant, 2.31 bits",
            n_bytes=1322841984,
            bpw=2.7185,
            types={"F32": 205, "IQ2_XS": 200, "Q2_K": 38, "Q5_K": 1},
        ),
    ]
    made = Manifest(
        schema_version=4,
        tool_version="0.1.0",
        stem=STEM,
        model=ModelFacts(
            org="google",
            model="gemma-3-4b-it",
            origin="hub",
            repo="google/gemma-3-4b-it",
            revision=COMMIT,
            files={
                name: sha(name)
                for name in (
                    "config.json",
                    "model-00001-of-00002.safetensors",
                    "model-00002-of-00002.safetensors",
                    "model.safetensors.index.json",
                    "tokenizer.model",
                )
            },
            architecture="Gemma3ForConditionalGeneration",
            family="Gemma 3",
            gguf_arch="gemma3",
            n_parameters=4300079472,
            vision=True,
            left_out=[],
            audio=False,
            qat=False,
            license="gemma",
            chat_template="{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}",
            sampling=Sampling(
                do_sample=True, temperature=None, top_k=64, top_p=0.95, min_p=None, repetition_penalty=None
            ),
            support=Support(pull_request=12343, merged="2025-03-12", release="b4875"),
            embedding=None,
            front_matter=dict(FRONT_MATTER),
            base_is_dequantised=False,
        ),
        llama_cpp=BuildFacts(
            source="pypi:0.3.36",
            source_sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
            version="0.5.0-dev",
            build_number=0,
            commit="0c1e57098",
            backend="cpu",
            compiler="c++ (Debian 12.2.0-14+deb12u1) 12.2.0",
            cmake_args=["-DCMAKE_BUILD_TYPE=Release", "-DGGML_METAL=OFF"],
            key=BUILD,
        ),
        kernels=KernelFacts(
            version=1,
            source_sha256=sha("kernels"),
            isa="avx2",
            types=["Q4_K", "Q6_K"],
            off={"IQ4_NL": "12 of 3456 bytes are not ggml's (ordinary weights)"},
            why_none=None,
        ),
        converter=ConverterFacts(
            build=BUILD,
            files={
                name: sha(name) for name in ("convert_hf_to_gguf.py", "conversion/gemma.py", "gguf-py/gguf/vocab.py")
            },
        ),
        quantisers={BUILD: {kind: sha(f"rows of {kind}") for kind in ("Q8_0", "Q4_K", "Q6_K")}},
        refresh=None,
        calibration=CalibrationFacts(
            name="default", source="texts of this repository", n_bytes=262144, sha256=sha("calibration")
        ),
        imatrix=ImatrixFacts(
            n_chunks=146,
            chunk_size=512,
            n_entries=238,
            datasets=["calibration-default.txt"],
            coverage=coverage(),
        ),
        stages={
            "convert": StageRecord(
                key=sha("key of convert"),
                argv=[["python", "convert_hf_to_gguf.py", "--outtype", "bf16"], mmproj.argv],
                seconds=38.2,
                outputs={f".work/{STEM}-bf16.gguf": models[0].sha256, mmproj.name: mmproj.sha256},
            ),
            "imatrix": StageRecord(
                key=imatrix.key, argv=[imatrix.argv], seconds=imatrix.seconds, outputs={IMATRIX: imatrix.sha256}
            ),
        },
        recipes=["bf16", "Q8_0", "Q4_K_L", "Q4_K_M", "Q4_0", "IQ2_XS"],
        custom_recipes=[],
        split_max_size=50_000_000_000,
        files=[mmproj, imatrix, *models],
        card=DEFAULT_CARD.model_copy(update={"repo": "someone/google_gemma-3-4b-it-GGUF"}),
        qat=None,
        pins={},
        gates=DEFAULT_GATES,
        evidence={model.sha256: evidence(model.bpw or 0.0, models[0].sha256) for model in models},
        context=context(),
        prompts=PromptFacts(
            template_sha256=sha("template"),
            examples=[
                PromptExample(
                    kind="plain",
                    text="<bos><start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n",
                ),
                PromptExample(
                    kind="system",
                    text="<bos><start_of_turn>user\n{system_prompt}\n\n{prompt}<end_of_turn>\n<start_of_turn>model\n",
                ),
            ],
            problem=None,
        ),
        pictures={},
        parity=parity(),
    )
    return made.model_copy(update={"pictures": drawn(made)})


def parity() -> ParityFacts:
    """Gemma 3 4B against its checkpoint: everything the same."""
    return ParityFacts(
        probe_sha256=sha("probe"),
        reference="transformers 5.23.0, tokenizers 0.23.1",
        asked="bindings",
        build=BUILD,
        n_texts=14090,
        n_tokens=331204,
        n_vocab=262145,
        n_added=6415,
        n_conversations=9,
        left_out={"a tool": "the template has no place for 'look_up'"},
        added_bos=False,
        problem=None,
        differences=[],
    )


def drawn(made: Manifest) -> dict[str, Picture]:
    """What is recorded of a manifest's pictures when they were drawn."""
    return {
        name: Picture(
            data_sha256=pictures.data_hash(data), svg_sha256=sha(f"{name}.svg"), png_sha256=sha(f"{name}.png")
        )
        for name, data in pictures.all_data(made).items()
    }


def context() -> ContextFacts:
    """Gemma 3 4B: every sixth of 34 layers sees the whole context; what llama.cpp said of its base."""
    measured = ((4096, 544.0, 39.5), (8192, 682.0, 43.5), (32768, 1162.0, 67.5), (131072, 3082.0, 163.5))
    mib = 1 << 20
    return ContextFacts(
        n_ctx_train=131072,
        n_embd=2560,
        n_ff=10240,
        q_width=2048,
        n_embd_per_layer=0,
        n_vocab=262208,
        window=1024,
        cache=[
            CacheGroup(n_layers=5, windowed=False, k_width=1024, v_width=1024),
            CacheGroup(n_layers=29, windowed=True, k_width=1024, v_width=1024),
        ],
        measured=[
            ContextMemory(
                n_ctx=n_ctx, cache_bytes=int(cache * mib), compute_bytes=int(compute * mib), output_bytes=4 * mib
            )
            for n_ctx, cache, compute in measured
        ],
        build=BUILD,
    )


def coverage() -> list[Coverage]:
    """Two kinds of weight of 34 layers that saw all of the text."""
    n = 34
    return [
        Coverage(
            kind=kind,
            layers=list(range(n)),
            n_experts=1,
            tokens_min=[74752] * n,
            tokens_median=[74752] * n,
            tokens_max=[74752] * n,
            unseen=[0] * n,
            active=[1.0] * n,
            evenness=[round(least + 0.4 * layer / n, 4) for layer in range(n)],
        )
        for kind, least in (("attn_q", 0.5), ("ffn_down", 0.45))
    ]


def qat(verdict: Literal["ggml", "free", "near", "none"] = "ggml") -> QatFacts:
    """What is recorded of a checkpoint that was trained for Q4_0, with two kinds of weight."""
    grid = [
        GridFit(
            kind=kind,
            n_tensors=34,
            n_blocks=69632,
            residual=residual,
            residual_ggml=residual_ggml,
            residual_none=0.08,
            fits=fits,
            fits_ggml=fits if verdict == "ggml" else 0.0,
        )
        for kind, residual, residual_ggml, fits in (("attn_q", 0.0014, 0.0017, 1.0), ("ffn_down", 0.002, 0.003, 0.98))
    ]
    return QatFacts(said_by="checkpoint", embedding="Q6_K", verdict=verdict, grid=grid)


def failed() -> Evidence:
    """Of a file whose logits are NaN."""
    quality = evidence(5.0, sha(f"{STEM}-bf16.gguf")).quality
    assert quality is not None
    how = {name: getattr(quality, name) for name in Failed.model_fields if name != "why"}
    return Evidence(quality=None, failed=Failed(**how, why="its logits hold NaN or Inf"), similarity=None, speed=None)


def evidence(bpw: float, base_sha256: str) -> Evidence:
    """What might have been measured of a file with so many bits per weight: the fewer, the farther from the base."""
    away = 0.0 if bpw >= 16 else 2.0**-bpw
    return Evidence(
        quality=Quality(
            base_sha256=base_sha256,
            text="heldout",
            text_sha256=sha("heldout"),
            mode="chat",
            chunk_size=512,
            n_chunks=40,
            n_tokens=10240,
            ppl=Measured(value=9.5 * (1 + away), se=0.21),
            ppl_ratio=Measured(value=1 + away, se=0.1 * away),
            kld=Measured(value=away, se=0.02 * away),
            kld_median=0.3 * away,
            kld_p99=12 * away,
            kld_p999=40 * away,
            delta_p_rms=Measured(value=0.5 * away, se=0.01 * away),
            same_top_p=Measured(value=1 - away, se=0.003),
            build=BUILD,
        ),
        similarity=None,
        failed=None,
        speed=Speed(
            build=BUILD,
            cpu="AMD EPYC",
            backend="cpu",
            threads=2,
            n_prompt=512,
            n_generate=64,
            prompt_per_second=Measured(value=30.5, se=0.4),
            generate_per_second=Measured(value=60 / bpw, se=0.1),
            peak_memory_bytes=3_100_000_000,
        ),
    )
