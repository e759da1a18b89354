"""gemma-gguf: from a Gemma checkpoint to a verified, documented set of GGUF quants, with llama.cpp."""

__version__ = "0.1.0"
