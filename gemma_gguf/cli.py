"""The command line: parse, call `factory`, show. The one place where errors become text and exit codes.

Exit code 0: done. 1: something the user can mend, with one clear error. 2: wrong usage. 130: stopped by Ctrl-C.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

import gemma_gguf
from gemma_gguf import (
    batch,
    calibrate,
    calibration,
    card,
    coverage,
    demo,
    embedding,
    evaluate,
    evidence,
    factory,
    fanout,
    gates,
    kernel_check,
    llama_cpp,
    manifest,
    planning,
    proof,
    qat,
    recipes,
    refresh,
    session,
    settings,
    shards,
    source,
    survey,
)
from gemma_gguf.console import Console
from gemma_gguf.doctor import judge
from gemma_gguf.errors import GemmaGGUFError, VerificationError
from gemma_gguf.files import write_atomic
from gemma_gguf.pictures import Drawn
from gemma_gguf.session import ENGINES, CardOptions, Done, Options, PublishOptions

_SETTINGS = "gemma_gguf.settings"  # where a context keeps them
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Group(click.Group):
    """Turns errors of any command into text, in one place."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            self._use_settings(ctx)
            return super().invoke(ctx)
        except GemmaGGUFError as error:
            _console(ctx).error(error)
            sys.exit(1)
        except KeyboardInterrupt:
            _console(ctx).interrupted()
            sys.exit(130)

    def _use_settings(self, ctx: click.Context) -> None:
        """The files' settings become the options' defaults, so that flags win."""
        ctx.obj = Console(as_json="--json" in ctx.args)  # the command's own option comes after this
        loaded = settings.load()
        ctx.meta[_SETTINGS] = loaded
        ctx.default_map = dict.fromkeys(self.commands, settings.defaults(loaded.settings))


class _Size(click.ParamType[int]):
    """A number of bytes, with an optional decimal unit: 200GB, 1.5TB, 7000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return settings.parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _loaded() -> settings.Loaded:
    """The settings of the command that is running."""
    loaded: settings.Loaded = click.get_current_context().meta[_SETTINGS]
    return loaded


def _whole_megabytes(ctx: click.Context, param: click.Parameter, value: int) -> int:
    if (reason := shards.wrong_limit(value)) is not None:
        raise click.BadParameter(reason, ctx, param)
    return value


def _console(ctx: click.Context) -> Console:
    console = ctx.find_object(Console)
    return console if console is not None else Console()


def _with_options(*options: Decorator) -> Decorator:
    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def _set_json(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    # On the root context: errors are shown after the command's own context has gone.
    ctx.find_root().obj = Console(as_json=value)


_json = click.option(
    "--json", is_flag=True, callback=_set_json, expose_value=False, help="Print one JSON document on stdout."
)
_wait = click.option("--wait", is_flag=True, help="Wait for another run instead of refusing.")
_build_options = _with_options(
    click.option(
        "--llama-cpp",
        "llama_cpp_spec",
        default=llama_cpp.DEFAULT_SPEC,
        show_default=True,
        metavar="SOURCE",
        help="pypi:<llama-cpp-python version>, git:<tag or commit> or dir:<path>.",
    ),
    click.option(
        "--backend", type=click.Choice(list(llama_cpp.BACKENDS)), default="cpu", show_default=True, help="ggml backend."
    ),
    click.option("--cmake-arg", "cmake_args", multiple=True, metavar="ARG", help="Added to CMake's arguments."),
    _wait,
)
_threads = click.option("--threads", type=click.IntRange(1), help="Threads of llama.cpp's tools (default: all cores).")
_gpu_layers = click.option(
    "--gpu-layers",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Layers on the GPU for the imatrix and the evaluation.",
)
_reference = click.option(
    "--from",
    "reference",
    metavar="RECIPE",
    help="Compute the imatrix with this quant of the base and compare with it, where the base is too large: Q8_0.",
)
_evaluation_options = _with_options(
    click.option(
        "--eval-chunks",
        type=click.IntRange(1),
        help=f"Measure quality on N chunks of {evaluate.CHUNK_TOKENS} tokens, on N conversations, or on N lines of "
        f"a model that gives embeddings (default: {evaluate.DEFAULT_CHUNKS['plain']}, "
        f"{evaluate.DEFAULT_CHUNKS['chat']}, {embedding.DEFAULT_LINES}).",
        metavar="N",
    ),
    click.option(
        "--eval-disk-budget",
        type=_Size(),
        default=evaluate.DISK_BUDGET,
        show_default="8GB",
        metavar="SIZE",
        help="Keep the base's distributions on the disk while they take no more than this; else compute them again "
        "for every file.",
    ),
    click.option(
        "--bench",
        metavar="all|none|A,B,...",
        help=f"Recipes whose speed is measured (default: {', '.join(evaluate.BENCH_DEFAULT)}).",
    ),
    click.option(
        "--max-kld",
        type=click.FloatRange(0, min_open=True),
        metavar="NATS",
        help=f"Hold back files whose KL divergence is above this (at first: {manifest.DEFAULT_GATES.max_kld:g}).",
    ),
    click.option(
        "--max-kld-ratio",
        type=click.FloatRange(1),
        metavar="TIMES",
        help="Hold back files whose KL divergence is above so many times that of a smaller one "
        f"(at first: {manifest.DEFAULT_GATES.max_kld_ratio:g}).",
    ),
    click.option(
        "--max-kld-errors",
        type=click.FloatRange(0),
        metavar="N",
        help=f"... by more than N standard errors (at first: {manifest.DEFAULT_GATES.errors:g}).",
    ),
)
_set_options = _with_options(
    click.option(
        "--name",
        metavar="ORG/MODEL",
        help="What the files are named by: of a local checkpoint, or instead of a hub id.",
    ),
    click.option(
        "--out",
        type=click.Path(path_type=Path, file_okay=False),
        default=Path("out"),
        show_default=True,
        help="Where sets go.",
    ),
    click.option(
        "--naming",
        type=click.Choice(source.NAMINGS),
        default=source.NAMINGS[0],
        show_default=True,
        help="How files begin: with <org>_<model>, or with the model's name alone.",
    ),
    click.option(
        "--recipes",
        "recipe_names",
        metavar="A,B,...",
        help="Rows, or sets of rows, to make (default: all 27; see `recipes`).",
    ),
    click.option(
        "--calibration",
        "calibration_name",
        default="default",
        show_default=True,
        metavar="NAME|FILE",
        help=f"Calibration text: default, {', '.join(calibration.PUBLIC_SETS)}, or a file.",
    ),
    click.option("--chunks", type=click.IntRange(1), help="Use only the first N chunks of it (default: all)."),
    click.option("--imatrix", type=click.Path(path_type=Path, dir_okay=False), help="Use this imatrix; compute none."),
    click.option(
        "--pin-uncovered",
        type=click.Choice(coverage.PIN_TYPES, case_sensitive=False),
        help="Raise tensors for which the imatrix has no data to this type, in the recipes that would use it.",
    ),
    click.option(
        "--qat/--no-qat",
        default=None,
        help="The checkpoint was trained for Q4_0, or was not (default: as its name and card say).",
    ),
    click.option(
        "--qat-embedding",
        type=click.Choice(qat.EMBEDDINGS, case_sensitive=False),
        help="Type of the embedding in the Q4_0 file of a QAT checkpoint (at first: Q6_K).",
    ),
    click.option(
        "--base",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Use this BF16, F16 or F32 GGUF; convert nothing.",
    ),
    click.option(
        "--mmproj/--no-mmproj", default=True, show_default=True, help="Make projectors of a model that sees or hears."
    ),
    _threads,
    _gpu_layers,
    _reference,
    click.option(
        "--engine",
        type=click.Choice(ENGINES),
        default="fanout",
        show_default=True,
        help="What quantises: all files at once, or llama-quantize once per recipe; the bytes are the same.",
    ),
    click.option(
        "--kernels",
        type=click.Choice(kernel_check.CHOICES),
        default="auto",
        show_default=True,
        help="What quantises in the fan-out: the package's kernels where they fit, or ggml alone; the same bytes.",
    ),
    click.option("--jobs", type=click.IntRange(1), help="Worker processes of the fan-out engine (default: all cores)."),
    click.option(
        "--max-memory",
        type=_Size(),
        default=fanout.MAX_MEMORY,
        show_default="3GB",
        metavar="SIZE",
        help="Memory of all worker processes together; limits their number.",
    ),
    click.option(
        "--scheduler", metavar="ADDRESS", help="Fan out over this Dask cluster, which shares the file system."
    ),
    click.option(
        "--disk-budget", type=_Size(), metavar="SIZE", help="Use no more than this for new files, e.g. 200GB."
    ),
    click.option(
        "--split-max-size",
        type=_Size(),
        callback=_whole_megabytes,
        default=shards.DEFAULT_LIMIT,
        show_default="50GB",
        metavar="SIZE",
        help="A file with more bytes of tensors becomes a folder of shards of at most this, as llama-gguf-split cuts.",
    ),
    click.option(
        "--proof/--no-proof",
        default=True,
        show_default=True,
        help="Make one small recipe with llama-quantize, too, and compare sha256.",
    ),
    click.option(
        "--allow-mismatch",
        is_flag=True,
        help="Go on where tokenizer or chat template of the GGUF are not the checkpoint's, and say so on the card.",
    ),
    click.option("--rehash", is_flag=True, help="Read every file again instead of trusting size, time and inode."),
    _build_options,
    _json,
)
_run_options = _with_options(click.argument("model"), _set_options)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(gemma_gguf.__version__, prog_name="gemma-gguf")
def main() -> None:
    """From a Gemma checkpoint to a verified set of GGUF quants, with llama.cpp."""


@main.command()
@_build_options
@_json
@click.pass_context
def build(ctx: click.Context, llama_cpp_spec: str, backend: str, cmake_args: tuple[str, ...], wait: bool) -> None:
    """Build llama.cpp and the quantisation kernels, or find them in the cache.

    \b
    gemma-gguf build --llama-cpp git:b9999 --backend cuda
    """
    console = _console(ctx)
    made = llama_cpp.build(
        llama_cpp_spec, backend=backend, extra_cmake_args=cmake_args, wait=wait, progress=console.progress
    )
    console.say(f"llama.cpp {made.version}, commit {made.commit[:9]}, {made.backend}: {made.bin_dir}")
    kernels, why = kernel_check.compiled(console.progress)
    console.say(f"kernels: {kernels.library}" if kernels else f"kernels: {why}; ggml quantises")
    console.document({**made.facts(), "kernels": str(kernels.library) if kernels else None})


def _names(text: str | None) -> tuple[str, ...]:
    """What stands between the commas."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _bench(text: str | None) -> tuple[str, ...] | None:
    """None for the default, else names; `all` and `none` stand alone."""
    names = tuple(name.lower() if name.lower() in ("all", "none") else name for name in _names(text))
    if len(names) > 1 and not {"all", "none"}.isdisjoint(names):
        raise click.BadParameter("all and none stand alone", param_hint="--bench")
    return names or None


def _bounds(given: Mapping[str, Any]) -> gates.Bounds:
    return gates.Bounds(given.get("max_kld"), given.get("max_kld_ratio"), given.get("max_kld_errors"))


def _options(given: Mapping[str, Any], until: str) -> Options:
    """What the command line gave, as the factory takes it."""
    configured = _loaded().settings
    names = recipes.expand(_names(given["recipe_names"]), configured.recipe_sets)
    return Options(
        model=given["model"] or "",
        name=given["name"],
        out=given["out"],
        recipes=names or recipes.DEFAULT_NAMES,
        llama_cpp=given["llama_cpp_spec"],
        backend=given["backend"],
        cmake_args=given["cmake_args"],
        calibration=given["calibration_name"],
        chunks=given["chunks"],
        threads=given["threads"],
        gpu_layers=given["gpu_layers"],
        imatrix=given["imatrix"],
        base=given["base"],
        mmproj=given["mmproj"],
        engine=given["engine"],
        kernels=given["kernels"],
        jobs=given["jobs"],
        max_memory=given["max_memory"],
        scheduler=given["scheduler"],
        disk_budget=given["disk_budget"],
        allow_mismatch=given["allow_mismatch"],
        split_max_size=given["split_max_size"],
        proof=given["proof"],
        evaluate=given.get("evaluate", True),
        eval_chunks=given.get("eval_chunks"),
        eval_disk_budget=given.get("eval_disk_budget", evaluate.DISK_BUDGET),
        bench=_bench(given.get("bench")),
        reference=given["reference"],
        bounds=_bounds(given),
        qat=given["qat"],
        qat_embedding=given["qat_embedding"],
        pin_uncovered=given["pin_uncovered"],
        until=until,
        rehash=given["rehash"],
        wait=given["wait"],
        templates=given.get("templates"),
        card=_chosen(given),
        naming=given["naming"],
        custom=configured.custom,
        publish=_publish_options(given) if given.get("publish") else None,
    )


def _run(ctx: click.Context, /, until: str, **given: Any) -> None:
    console = _console(ctx)
    options = _options(given, until)
    if options.model == "demo":
        console.say(demo.TERMS)
    report = factory.run(options, progress=console.progress, say=console.did)
    console.report(report)
    facts = manifest.load(report.set_dir)
    if until == "imatrix" and facts.imatrix is not None:
        console.table(coverage.COLUMNS, coverage.layer_rows(facts.imatrix.coverage), right=range(6))
    console.document(
        {
            "set_dir": str(report.set_dir),
            "log": str(report.log),
            "seconds": round(report.seconds, 1),
            "done": [vars(done) for done in report.done],
            "manifest": facts.model_dump(mode="json"),
        }
    )


def _tags(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else _names(value)


_card_options = _with_options(
    click.option("--theme", type=click.Choice(card.THEMES), help="Layout of the card (at first: modern)."),
    click.option(
        "--lang",
        "languages",
        callback=_tags,
        metavar="TAG,...",
        help=f"Languages of the card, of {','.join(card.LANGUAGES)}; README.md is English (at first: en).",
    ),
    click.option("--quantized-by", metavar="NAME", help="Who makes the set, for the card (at first: gemma-gguf)."),
    click.option("--repo", metavar="NAMESPACE/NAME", help="Where the set is on the Hub, for the card's commands."),
    click.option("--namespace", metavar="NAME", help="Whose it is there: gives --repo where none is recorded."),
    click.option(
        "--templates",
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        help="Directory whose templates override the card's, file by file.",
    ),
)


def _chosen(given: Mapping[str, Any]) -> CardOptions:
    return CardOptions(
        **{name: given.get(name) for name in ("theme", "languages", "quantized_by", "repo", "namespace")}
    )


_publish_options_of_both = _with_options(
    click.option("--public", is_flag=True, help="Make the repository public in the end; until then it is private."),
    click.option("--prune", is_flag=True, help="Delete what the repository has and the set does not name."),
    click.option("--allow-demo", is_flag=True, help="Publish also a set of the demo model."),
)


def _publish_options(given: Mapping[str, Any]) -> PublishOptions:
    names = ("repo", "namespace", "public", "prune", "allow_demo", "stream")
    return PublishOptions(**{name: given[name] for name in names if name in given})


@main.command()
@_run_options
@click.option("--publish", is_flag=True, help="Send the set to the Hub in the end.")
@click.option(
    "--stream",
    is_flag=True,
    help="With --publish: make, verify, measure, send and delete quants in waves that fit the disk or --disk-budget.",
)
@_publish_options_of_both
@click.option(
    "--evaluate/--no-evaluate", default=True, show_default=True, help="Measure quality and speed before the card."
)
@_evaluation_options
@_card_options
@click.pass_context
def run(ctx: click.Context, /, **given: Any) -> None:
    """Make the whole quant set of MODEL: demo, a checkpoint directory, or a hub id with an optional @revision.

    \b
    gemma-gguf run google/gemma-3-4b-it
    gemma-gguf run ./my-gemma --name me/my-gemma --recipes Q4_K_M,Q6_K
    gemma-gguf run google/gemma-3-27b-it --publish --stream --disk-budget 100GB
    """
    if not given["publish"] and any(given[name] for name in ("stream", "public", "prune", "allow_demo")):
        raise click.UsageError("--stream, --public, --prune and --allow-demo belong to --publish")
    _run(ctx, "card", **given)


@main.command()
@_run_options
@click.pass_context
def convert(ctx: click.Context, /, **given: Any) -> None:
    """Convert MODEL to its BF16 base and projectors, and stop there.

    \b
    gemma-gguf convert google/gemma-3-4b-it
    """
    _run(ctx, "convert", **given)


@main.command()
@_run_options
@click.pass_context
def imatrix(ctx: click.Context, /, **given: Any) -> None:
    """Compute the importance matrix of MODEL (converting first if needed), and stop there.

    \b
    gemma-gguf imatrix demo --calibration my-text.txt
    """
    _run(ctx, "imatrix", **given)


@main.command()
@_run_options
@click.pass_context
def quantize(ctx: click.Context, /, **given: Any) -> None:
    """Make the quants of MODEL (and what they need), without a card.

    \b
    gemma-gguf quantize demo --recipes Q4_0,IQ4_NL
    """
    _run(ctx, "quantize", **given)


@main.command(name="plan")
@_run_options
@click.pass_context
def plan_command(ctx: click.Context, /, **given: Any) -> None:
    """Show what making the set of MODEL takes: sizes, time, memory of the disk. Makes nothing.

    Sizes are exact once base and imatrix exist, exact up to the imatrix's own choices with the base alone, and
    estimates from the number of parameters before that.

    \b
    gemma-gguf plan google/gemma-3-4b-it --disk-budget 40GB
    """
    console = _console(ctx)
    planned = planning.plan_set(_options(given, "card"), progress=console.progress)
    console.plan(planned)
    console.document(planned.document())


@main.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--against",
    type=click.Choice(["llama-quantize"]),
    help="Make the quants once more with llama-quantize, and compare them byte for byte.",
)
@click.option("--sample", type=click.IntRange(1), help="With --against: only N recipes, spread over the sizes.")
@_build_options
@_json
@click.pass_context
def verify(ctx: click.Context, /, directory: Path, *, against: str | None, sample: int | None, **given: Any) -> None:
    """Read every file of the set in DIRECTORY again and compare it with its manifest.

    \b
    gemma-gguf verify out/google_gemma-3-270m-GGUF
    gemma-gguf verify out/google_gemma-3-270m-GGUF --against llama-quantize --sample 3
    """
    console = _console(ctx)
    results = proof.verify_set(directory, progress=console.progress)
    console.verified(results)
    bad = [result for result in results if result.problem is not None]
    if bad:
        first = bad[0]
        raise VerificationError(
            f"{len(bad)} of {len(results)} files are not what {manifest.FILE_NAME} says, "
            f"first {first.name}: {first.problem}",
            next_step="Delete them and run `gemma-gguf run` again: only what is missing is made.",
        )
    compared = (
        proof.prove_set(
            directory,
            given["llama_cpp_spec"],
            backend=given["backend"],
            cmake_args=given["cmake_args"],
            wait=given["wait"],
            sample=sample,
            progress=console.progress,
            say=console.did,
        )
        if against
        else []
    )
    console.document({"files": [vars(result) for result in results], "whole": True, "identical": compared})


@main.command(name="evaluate")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@_evaluation_options
@_reference
@_threads
@_gpu_layers
@_build_options
@_json
@click.pass_context
def evaluate_command(ctx: click.Context, /, directory: Path, **given: Any) -> None:
    """Measure quality and speed of the set in DIRECTORY; what was measured before is kept.

    Every file is compared with the base on text that no calibration saw: perplexity, KL divergence, token
    probabilities. `gemma-gguf card` shows the figures.

    \b
    gemma-gguf evaluate out/google_gemma-3-270m-GGUF --eval-chunks 40 --bench all
    """
    console = _console(ctx)
    done: list[Done] = []

    def say(what: Done) -> None:
        done.append(what)
        console.did(what)

    facts = evidence.evaluate_set(
        directory,
        evidence.Measuring(
            chunks=given["eval_chunks"],
            disk_budget=given["eval_disk_budget"],
            bench=_bench(given["bench"]),
            reference=given["reference"],
            threads=given["threads"],
            gpu_layers=given["gpu_layers"],
            bounds=_bounds(given),
        ),
        given["llama_cpp_spec"],
        backend=given["backend"],
        cmake_args=given["cmake_args"],
        wait=given["wait"],
        progress=console.progress,
        say=say,
    )
    if any(what.made for what in done):
        console.say(f"The card shows it after: gemma-gguf card {directory}")
    console.document(
        {
            "set_dir": str(directory),
            "done": [vars(what) for what in done],
            "evidence": facts.model_dump(mode="json")["evidence"],
        }
    )


@main.command()
@click.argument("which", metavar="DIRECTORY|MODEL")
@click.option("--yes", is_flag=True, help="Send it; without this the plan is shown and nothing is sent.")
@click.option(
    "--repo", metavar="NAMESPACE/NAME", help="Where to (default: where the card says, or <org>_<model>-GGUF)."
)
@click.option(
    "--namespace", metavar="NAME", help="Whose it is there, where no repository is recorded (default: yours)."
)
@_publish_options_of_both
@click.option("--name", metavar="ORG/MODEL", help="Name of a local checkpoint, when MODEL is one.")
@click.option(
    "--naming",
    type=click.Choice(source.NAMINGS),
    default=source.NAMINGS[0],
    show_default=True,
    help="How file names of the set of MODEL begin.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out"),
    show_default=True,
    help="Where the set of MODEL is.",
)
@_wait
@_json
@click.pass_context
def publish(ctx: click.Context, /, which: str, *, yes: bool, wait: bool, **given: Any) -> None:
    """Send a set to the Hub, or what of it is not there yet: shows the plan, and with --yes does it.

    Every file is read again first. Weights are committed one by one, the card last; a new repository is private until
    --public. What was interrupted goes on with the same command. The token is the one of `hf auth login`, or HF_TOKEN.

    \b
    gemma-gguf publish out/google_gemma-3-4b-it-GGUF
    gemma-gguf publish google/gemma-3-4b-it --namespace my-org --yes --public
    """
    console = _console(ctx)
    seen = factory.publish_set(
        session.set_of(which, given["name"], given["naming"], given["out"]),
        _publish_options(given),
        send=yes,
        wait=wait,
        progress=console.progress,
        say=console.did,
        show=console.upload,
    )
    console.document({"sent": yes, **seen.document()})
    if yes:
        console.say(f"Published: {seen.plan.repo}")
    elif seen.refusals:
        ctx.exit(1)
    elif not seen.plan.is_done:
        console.say("Nothing was sent. Send it with: --yes")


def _curve(ctx: click.Context, param: click.Parameter, value: str) -> tuple[tuple[int, ...], bool]:
    """Whole numbers above zero between commas, and whether `all` is among them."""
    names = _names(value)
    if not names or not all(re.fullmatch(r"[1-9][0-9]{0,6}|all", name) for name in names):
        raise click.BadParameter(f"{value!r} is no list of numbers; write for example 16,32,64,all")
    return tuple(int(name) for name in names if name != "all"), "all" in names


@main.command(name="calibrate")
@click.argument("model")
@click.option("--name", metavar="ORG/MODEL", help="Name of a local checkpoint.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out"),
    show_default=True,
    help="Where sets go; this works in .work below it.",
)
@click.option(
    "--sets",
    callback=_tags,
    default=",".join(calibrate.DEFAULT_SETS),
    show_default=True,
    metavar="A,B,...",
    help="Calibration texts: default, one kind of it (prose, code, lang, ...), "
    f"{', '.join(calibration.PUBLIC_SETS)}, or files. Others are compared with the first.",
)
@click.option(
    "--recipes",
    "recipe_names",
    callback=_tags,
    default=",".join(calibrate.DEFAULT_RECIPES),
    show_default=True,
    metavar="A,B,...",
    help="Rows that are made with each text, and where llama.cpp allows it with none.",
)
@click.option(
    "--chunks",
    "curve",
    callback=_curve,
    default=",".join([*map(str, calibrate.DEFAULT_CHUNKS), "all"]),
    show_default=True,
    metavar="N,M,...,all",
    help="Chunks of 512 tokens to use of each text: the curve. With `all` also where another text ends.",
)
@click.option(
    "--held-out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Measure on this plain text instead of ours; no set should hold any of it.",
)
@click.option(
    "--eval-chunks",
    type=click.IntRange(1),
    metavar="N",
    help="Measure on N chunks of it, or conversations "
    f"(default: {evaluate.DEFAULT_CHUNKS['plain']}, {evaluate.DEFAULT_CHUNKS['chat']}).",
)
@click.option(
    "--markdown", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the table here, too."
)
@_threads
@_gpu_layers
@click.option("--jobs", type=click.IntRange(1), help="Worker processes that quantise (default: all cores).")
@_build_options
@_json
@click.pass_context
def calibrate_command(ctx: click.Context, /, model: str, **given: Any) -> None:
    """Compare calibration texts: KL divergence of low-bit files of MODEL with each, and with none, by chunks used.

    What was measured before is kept; imatrices and figures lie in the work directory.

    \b
    gemma-gguf calibrate demo
    gemma-gguf calibrate ./my-gemma --sets default,prose,novel.txt --recipes IQ2_M,Q2_K --chunks 32,64
    """
    console = _console(ctx)
    options = Options(
        model=model,
        name=given["name"],
        out=given["out"],
        llama_cpp=given["llama_cpp_spec"],
        backend=given["backend"],
        cmake_args=given["cmake_args"],
        threads=given["threads"],
        gpu_layers=given["gpu_layers"],
        jobs=given["jobs"],
        until="convert",
        wait=given["wait"],
    )
    asked = calibrate.Asked(
        sets=given["sets"],
        recipes=given["recipe_names"],
        chunks=given["curve"][0],
        whole=given["curve"][1],
        held_out=given["held_out"],
        eval_chunks=given["eval_chunks"],
    )
    found = factory.calibrate_sets(options, asked, progress=console.progress, say=console.did)
    console.table(calibrate.columns(found), calibrate.cells(found), right=(2, 3, 4, 5))
    console.say("Below zero is better; * marks differences beyond two standard errors.")
    if found.is_dequantised:
        console.say("The weights of this base were quantised once before, so no text is better because of this table.")
    if given["markdown"] is not None:
        write_atomic(given["markdown"], calibrate.markdown(found))
    console.document(found.document())


@main.command(name="card")
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path, file_okay=False))
@_card_options
@_json
@click.pass_context
def card_command(ctx: click.Context, /, directories: tuple[Path, ...], **given: Any) -> None:
    """Render README.md of each set anew from its quantset.json, which remembers the options.

    \b
    gemma-gguf card out/*-GGUF
    gemma-gguf card out/*-GGUF --theme classic --lang en,ja,zh-Hant
    """
    console = _console(ctx)
    renderer = card.Renderer(given["templates"])
    drawn: dict[str, Drawn] = {}
    written = {str(path): factory.write_card(path, renderer, _chosen(given), drawn) for path in directories}
    for directory, made in written.items():
        console.say(f"{directory}: {'written' if made else 'unchanged'}")
    console.document({"cards": written})


@main.command(name="refresh")
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--apply", is_flag=True, help="Carry out what was decided: new headers, recipes made again, new cards.")
@click.option("--new-imatrix", is_flag=True, help="Compute the imatrix again, and so every quant; else it is kept.")
@click.option("--model", metavar="MODEL", help="The checkpoint of the set, where it is not found by itself.")
@click.option(
    "--evaluate/--no-evaluate",
    default=True,
    show_default=True,
    help="With --apply: measure changed files of a set that was measured.",
)
@click.option(
    "--proof/--no-proof",
    default=True,
    show_default=True,
    help="With --apply: make one file that is kept with llama-quantize, too, and compare.",
)
@click.option("--jobs", type=click.IntRange(1), help="Worker processes (default: all cores).")
@_threads
@click.option("--rehash", is_flag=True, help="Read every file again instead of trusting size, time and inode.")
@click.option(
    "--templates",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Directory whose templates override the card's, file by file.",
)
@_build_options
@_json
@click.pass_context
def refresh_command(ctx: click.Context, /, directories: tuple[Path, ...], **given: Any) -> None:
    """Say what a llama.cpp build, or a corrected checkpoint, changes in finished sets; cards are rendered anew.

    Every file is found unchanged, to need another header, to be made again, or unknown, with the reason. Nothing but
    the card changes without --apply.

    \b
    gemma-gguf refresh out/*-GGUF --llama-cpp pypi:0.3.36
    gemma-gguf refresh out/google_gemma-3-4b-it-GGUF --apply
    """
    console = _console(ctx)
    asked = refresh.Asked(
        llama_cpp=given["llama_cpp_spec"],
        **{name: given[name] for name in vars(refresh.Asked()) if name in given},
    )
    results = refresh.refresh_sets(
        directories, asked, progress=console.progress, say=console.did, ended=console.refreshed_one
    )
    console.refreshed(results)
    console.document({"sets": [result.document() for result in results]})
    if any(result.error is not None for result in results):
        ctx.exit(1)


@main.command()
@click.argument("model", required=False)
@_set_options
@click.pass_context
def doctor(ctx: click.Context, /, **given: Any) -> None:
    """Check everything that a run of MODEL needs, or without MODEL this machine; makes nothing.

    Exit code 1 when something would stop the run. A run checks the same at its start.

    \b
    gemma-gguf doctor
    gemma-gguf doctor google/gemma-3-4b-it --recipes Q4_K_M,Q6_K
    """
    console = _console(ctx)
    options = _options(given, "card")
    checks = judge(survey.look(options, thorough=True))
    console.checks(checks)
    failed = any(check.status == "fail" for check in checks)
    console.document({"ok": not failed, "checks": [check.document() for check in checks]})
    if failed:
        ctx.exit(1)


@main.command(name="recipes")
@_json
@click.pass_context
def recipes_command(ctx: click.Context) -> None:
    """List the rows a set can have, and what each is.

    \b
    gemma-gguf recipes
    """
    console = _console(ctx)
    rows = [
        (r.name, r.ftype, "default" if r in recipes.DEFAULT else "on request", r.about) for r in recipes.TABLE.values()
    ] + [(r.name, " ".join((*r.flags, r.ftype)), "custom", r.about) for r in _loaded().settings.custom]
    console.table(("Recipe", "ftype", "Made", "What it is"), rows)
    console.document({"recipes": [dict(zip(("name", "ftype", "made", "about"), row, strict=True)) for row in rows]})


@main.command(name="batch")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--check", is_flag=True, help="Look at the file and at every model; make nothing.")
@click.option("--rehash", is_flag=True, help="Read every file again instead of trusting size, time and inode.")
@_wait
@_json
@click.pass_context
def batch_command(ctx: click.Context, file: Path, *, check: bool, rehash: bool, wait: bool) -> None:
    """Make the sets of all models that FILE lists, one after the other; a failed one does not stop the others.

    FILE holds what gemma-gguf.toml may hold, and [[models]]. It is validated as a whole before anything is made. The
    same command goes on where it ended. Exit code 1 when a set is not complete.

    \b
    gemma-gguf batch models.toml
    gemma-gguf batch models.toml --check
    """
    console = _console(ctx)
    started = time.monotonic()
    items = [
        replace(item, options=replace(item.options, wait=wait, rehash=rehash))
        for item in batch.read(file, _loaded().settings)
    ]
    console.say(f"{file}: {len(items)} model{'s' if len(items) > 1 else ''}")
    problems = batch.look(items)
    console.batch_problems(items, problems)
    if check:
        console.document(batch.checked(file, items, problems))
        ctx.exit(1 if any(problems) else 0)

    def begin(number: int, item: batch.Item) -> None:
        console.say(f"\n[{number}/{len(items)}] {item.label}")
        if item.options.model == "demo":
            console.say(demo.TERMS)

    outcomes = batch.run(items, progress=console.progress, say=console.did, begin=begin, ended=console.outcome)
    took = time.monotonic() - started
    console.outcomes(outcomes, took)
    console.document(batch.document(file, outcomes, took))
    if not all(outcome.complete for outcome in outcomes):
        ctx.exit(1)


@main.command(name="settings")
@_json
@click.pass_context
def settings_command(ctx: click.Context) -> None:
    """Show what is set in gemma-gguf.toml, here or in the user's config directory, and in which of the two.

    \b
    gemma-gguf settings
    """
    console = _console(ctx)
    loaded = _loaded()
    told = loaded.settings.model_dump(mode="json", include=set(loaded.origins))
    rows = [(key, json.dumps(value, ensure_ascii=False), str(loaded.origins[key])) for key, value in told.items()]
    console.table(("Setting", "Value", "File"), rows)
    for path in loaded.looked_at:
        console.say(f"{'read' if path.is_file() else 'not there'}: {path}")
    console.document(
        {
            "settings": {key: {"value": value, "file": str(loaded.origins[key])} for key, value in told.items()},
            "files": [{"file": str(path), "read": path.is_file()} for path in loaded.looked_at],
        }
    )
