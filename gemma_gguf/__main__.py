"""`python -m gemma_gguf` is the command `gemma-gguf`."""

from gemma_gguf.cli import main

main()
