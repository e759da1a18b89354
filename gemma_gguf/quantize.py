"""The reference engine: one `llama-quantize` run per recipe (`--engine llama-quantize`).

Consumes the base, an imatrix and a recipe, produces the plan (through `--dry-run`) and the partial file. Every name
on the command line is bare or relative, because llama-quantize copies the imatrix's name into a key of the file.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

from gguf.constants import LlamaFileType

from gemma_gguf import shards
from gemma_gguf.llama_cpp import Build, RunLog, ToolRun, run_tool
from gemma_gguf.plan import FilePlan, parse_dry_run_log
from gemma_gguf.progress import Progress, silent
from gemma_gguf.recipes import Recipe, parse_quantize_help

# What the gguf package knows; a build may know fewer or more, and is asked when it is there.
KNOWN_FTYPES = tuple(ftype.name.removeprefix("MOSTLY_") for ftype in LlamaFileType)


def offered_ftypes(build: Build, log: RunLog) -> dict[str, str]:
    """{ftype: description} of what this build's llama-quantize can make."""
    # The usage ends with exit code 1, even when it was asked for.
    return parse_quantize_help(run_tool([build.tool("llama-quantize"), "--help"], log=log, ok_codes=(0, 1)).output)


def ftype_numbers(build: Build, log: RunLog) -> dict[str, int]:
    """{ftype: its number in the key general.file_type}, as this build's llama-quantize lists them."""
    text = run_tool([build.tool("llama-quantize"), "--help"], log=log, ok_codes=(0, 1)).output
    return {name: int(number) for number, name in re.findall(r"^ *(\d+) +or +([A-Z]\w+) *:", text, re.MULTILINE)}


def quantize_argv(
    build: Build,
    recipe: Recipe,
    base: str,
    out: str | None,
    *,
    imatrix: str | None,
    threads: int | None = None,
) -> list[str]:
    """The command line of llama-quantize; with `out=None` it only plans (`--dry-run`)."""
    argv = [str(build.tool("llama-quantize"))]
    argv += ["--dry-run"] if out is None else []
    argv += ["--imatrix", imatrix] if imatrix is not None and not recipe.static else []
    argv += [*recipe.flags, base]
    argv += [out] if out is not None else []
    return [*argv, recipe.ftype, str(threads or os.cpu_count() or 1)]


def plan_recipe(
    build: Build, recipe: Recipe, base: str, *, imatrix: str | None, n_tensors: int, cwd: Path, log: RunLog
) -> FilePlan:
    """What llama-quantize would write for this recipe, asked of it."""
    argv = quantize_argv(build, recipe, base, None, imatrix=imatrix)
    made = parse_dry_run_log(run_tool(argv, log=log, cwd=cwd).output, recipe.name, n_tensors)
    return replace(made, static=recipe.static)


def split_argv(build: Build, whole: str, prefix: str, limit: int) -> list[str]:
    """The command line of llama-gguf-split that cuts a file into shards `<prefix>-00001-of-...`; `limit` is in bytes,
    whole megabytes."""
    size = f"{limit // shards.MEGABYTE}M"
    return [str(build.tool("llama-gguf-split")), "--split", "--split-max-size", size, whole, prefix]


def run_llama_quantize(argv: list[str], label: str, *, cwd: Path, log: RunLog, progress: Progress = silent) -> ToolRun:
    """Run one llama-quantize, with progress per tensor."""

    def show(line: str) -> None:
        if match := re.match(r"\[ *(\d+)/ *(\d+)\]", line):
            progress(label, int(match[1]), int(match[2]), "tensors")

    return run_tool(argv, log=log, cwd=cwd, on_piece=show)
