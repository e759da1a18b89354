"""The order of the stages: the only file that knows it.

Consumes `Options`, produces a quant set: a directory that is exactly what the Hub repository will hold, and a
`Report` of what was done or why it was not. A stage is skipped when the hash of its inputs, arguments and tool build
is the one the manifest holds and its outputs are there and whole. Stages never call each other; they get values from
here and return values to here.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

from gguf.constants import GGMLQuantizationType

from gemma_gguf import (
    calibrate,
    calibration,
    card,
    chat,
    convert,
    coverage,
    embedding,
    evidence,
    gemma,
    gguf_io,
    imatrix,
    llama_cpp,
    manifest,
    memory,
    parity,
    pictures,
    plan,
    planning,
    production,
    prompts,
    publishing,
    qat,
    quantize,
    recipes,
    source,
    survey,
    verify,
)
from gemma_gguf.errors import BadInputError, KilledError, MissingToolError, ToolFailedError, VerificationError
from gemma_gguf.files import (
    copy,
    link_or_copy,
    partial_path,
    replace_durably,
    sha256_bytes,
    sha256_file,
    sha256_json,
    write_atomic,
)
from gemma_gguf.manifest import (
    CalibrationFacts,
    ContextMemory,
    FileEntry,
    ImatrixFacts,
    Manifest,
    Picture,
    RemotePlace,
    StageRecord,
)
from gemma_gguf.progress import Progress, silent
from gemma_gguf.session import (
    WORK,
    CardOptions,
    Done,
    Options,
    PublishOptions,
    Report,
    Run,
    calibration_text,
    fitted,
    model_name,
    new_entry,
    open_run,
    plan_recipe,
    probe_text,
    removed_when_bad,
    restore_base,
    select_recipes,
    stage_is_done,
    wanted_recipes,
    why_again,
)


def run(
    options: Options,
    *,
    progress: Progress = silent,
    say: Callable[[Done], None] = lambda _: None,
    take_away: Callable[[Path], RemotePlace | None] | None = None,
) -> Report:
    """Make a quant set, or what is missing of it, up to the stage `options.until`.

    `say` is called with everything that was done or skipped, as it happens. With `take_away`, a set that does not fit
    the disk or the budget is made in waves: it is called with every finished quant, and moves it elsewhere. What it
    says is in a repository is recorded so and deleted here. `options.publish` sends the set to the Hub in the end, or
    with `stream` is such a `take_away` itself.

    Raises `GemmaGGUFError` subclasses; what was finished by then stays, and the same call goes on from there.
    """
    started = time.monotonic()
    streams = options.publish is not None and options.publish.stream
    warnings = survey.refuse_what_cannot_work(options, in_waves=take_away is not None or streams)
    name = model_name(options)
    stages = {
        "convert": _convert_and_describe,
        "imatrix": _imatrix,
        "quantize": _quantize,
        "evaluate": _evaluate,
        "card": _card,
    }
    with open_run(options, name, progress, say, take_away) as state, publishing.joined(state) as upload:
        for warning in warnings:
            state.log.note(f"{warning.name}: {warning.what}")
        for stage, function in stages.items():
            if stage == "imatrix" and options.until in ("quantize", "evaluate", "card"):
                planning.refuse_before_imatrix(state)
            function(state)
            if stage == options.until:
                break
        if upload is not None:
            upload.send(upload.look(state.manifest, rehash=True))
        state.report.seconds = time.monotonic() - started
        return state.report


def remake(state: Run, *, new_imatrix: bool) -> None:
    """What a refresh left to be made of a finished set, in the order of a run; what is recorded as done is kept."""
    _describe(state)
    if new_imatrix:
        stages = {name: record for name, record in state.manifest.stages.items() if name != "imatrix"}
        state.record(state.manifest.model_copy(update={"stages": stages}))
        _imatrix(state)
    _quantize(state)
    if state.options.evaluate:
        _evaluate(state)


def calibrate_sets(
    options: Options,
    asked: calibrate.Asked,
    *,
    progress: Progress = silent,
    say: Callable[[Done], None] = lambda _: None,
) -> calibrate.Comparison:
    """Compare calibration sets on a model, converting it first if needed; what was measured before is kept."""
    survey.refuse_what_cannot_work(options)
    name = source.understand(options.model, options.name)
    with open_run(options, name, progress, say) as state:
        _convert(state)
        compare_with_checkpoint(state, state.source, state.base)
        return calibrate.compare_sets(state, asked, _calibration_text(state, gguf_io.read_header(state.base)))


# --- convert -----------------------------------------------------------------------------------------------------


def _convert_and_describe(state: Run) -> None:
    _convert(state)
    compare_with_checkpoint(state, state.source, state.base)
    _describe(state)
    _fit_grid(state)


def _convert(state: Run) -> None:
    """The base into the work directory, projectors into the set."""
    options = state.options
    if options.base is not None:
        _given_base(state, options.base)
        return
    key = convert_key(state)
    record = state.manifest.stages.get("convert")
    if record is not None and record.key == key:  # the work directory can be deleted at any time
        restore_base(state.set_dir, state.manifest, state.base)
    if (why := stage_is_done(state, "convert", key)) is not None:
        state.did(Done("convert", "base", False, why, 0.0, state.base.stat().st_size))
        return
    why = why_again(state, "convert", key)
    started = time.monotonic()
    made = convert.convert(state.source, state.build, state.work, log=state.log, progress=state.progress)
    outputs: dict[str, str] = {}
    new = state.manifest
    for output in made:
        place, digest, entry = accept_converted(state, output, key, is_base=output is made[0])
        outputs[place] = digest
        if entry is not None:
            new = new.with_file(entry)
        state.did(Done("convert", output.final_name, True, why, output.seconds, output.header.file_size))
    argv = [list(output.argv) for output in made]
    seconds = round(time.monotonic() - started, 2)
    new = new.model_copy(update={"converter": convert.converter_facts(state.build, made)})
    state.record(new.with_stage("convert", StageRecord(key=key, argv=argv, seconds=seconds, outputs=outputs)))


def accept_converted(
    state: Run, output: convert.Converted, key: str, *, is_base: bool
) -> tuple[str, str, FileEntry | None]:
    """Verify one output of the converter and give it its name: (what a stage records it by, hash, a projector's entry).

    The base comes first: projectors are loaded beside it.
    """
    with removed_when_bad(output.partial):
        verify.check_finite(output.header)
        text = probe_text(state) if is_base else None
        checks = verify.check_file(output.partial, None, build=state.build, text=text, log=state.log)
        if not is_base:
            load = verify.check_projector(output.partial, state.base, build=state.build, log=state.log)
            checks = checks.model_copy(update={"load": load})
    final = state.base if is_base else state.set_dir / output.final_name
    replace_durably(output.partial, final)
    digest = state.memory.sha256(final)
    if is_base:
        return f"{WORK}/{final.name}", digest, None
    seconds, argv = output.seconds, output.argv
    entry = new_entry(state, final, kind="mmproj", recipe=None, key=key, argv=argv, seconds=seconds, checks=checks)
    return final.name, digest, entry


def convert_key(state: Run) -> str:
    """Hash of everything a conversion depends on."""
    identity = ["convert", dict(state.source.files), state.source.name.model, state.build.key]
    return sha256_json([*identity, "no mmproj"] if state.source.facts.left_out else identity)


def _given_base(state: Run, base: Path) -> None:
    """Use the user's own base: a GGUF in BF16, F16 or F32 of the model's architecture."""
    header = gguf_io.read_header(base)
    arch = header.get("general.architecture")
    if arch != state.source.facts.gguf_arch:
        raise BadInputError(
            f"{base} is a {arch} model, {state.options.model} is {state.source.facts.gguf_arch}",
            next_step="Give the base of this very model, or leave --base out.",
        )
    verify.check_finite(header)
    if state.source.facts.embedding is not None:
        embedding.check_base(header, state.source.facts.embedding)
    verify.check_file(base, None, build=state.build, text=probe_text(state), log=state.log)
    key = sha256_json(["base", state.memory.sha256(base)])
    if stage_is_done(state, "convert", key) is None:
        link_or_copy(base.resolve(), state.base)
        outputs = {f"{WORK}/{state.base.name}": state.memory.sha256(state.base)}
        state.record(state.manifest.with_stage("convert", StageRecord(key=key, argv=[], seconds=0.0, outputs=outputs)))
    state.did(Done("convert", state.base.name, False, "given with --base", 0.0, base.stat().st_size))


def compare_with_checkpoint(state: Run, checkpoint: source.Source, base: Path) -> None:
    """Tokenizer and chat template of a base must be the checkpoint's, or the user must want it all the same."""
    texts = calibration.part_documents("mix")
    key = parity.key(state.memory.sha256(base), checkpoint, state.build, texts)
    known, allowed = state.manifest.parity, state.options.allow_mismatch
    what = "tokenizer and chat template"
    done = stage_is_done(state, "parity", key) is not None and known is not None
    if done and known is not None and (allowed or not (known.differences or known.problem)):
        state.did(Done("parity", what, False, f"compared before: {parity.shown(known)}", 0.0))
        return
    started = time.monotonic()
    state.progress("comparing the tokenizer with the checkpoint's", 0, 1, "models")
    try:
        facts = parity.compare(
            checkpoint,
            base,
            gguf_io.read_header(base),
            state.build,
            texts=texts,
            work=state.work,
            log=state.log,
        )
        if not allowed:
            parity.refuse(facts, state.log)
    except (MissingToolError, ToolFailedError) as error:
        if not allowed or isinstance(error, KilledError):
            raise
        facts = parity.not_compared(state.build, error.what, texts)
    seconds = round(time.monotonic() - started, 2)
    new = state.manifest.model_copy(update={"parity": facts})
    state.record(new.with_stage("parity", StageRecord(key=key, argv=[], seconds=seconds, outputs={})))
    state.did(Done("parity", what, True, parity.shown(facts), seconds))


def _describe(state: Run) -> None:
    """Into the manifest what cards tell of a model and only its base knows: memory of a context, and prompts."""
    template = state.source.facts.chat_template
    key = sha256_json(["describe", 1, state.memory.sha256(state.base), template, state.build.key])
    if stage_is_done(state, "describe", key) is not None:
        return
    started = time.monotonic()
    state.progress("asking what a context takes", 0, 1, "models")
    header = gguf_io.read_header(state.base)
    new = state.manifest.model_copy(
        update={
            "context": memory.context_facts(header, _measured_contexts(state, header), state.build.key),
            "prompts": None if template is None else prompts.prompt_facts(template, _renderer(header)),
        }
    )
    seconds = round(time.monotonic() - started, 2)
    state.record(new.with_stage("describe", StageRecord(key=key, argv=[], seconds=seconds, outputs={})))


def _fit_grid(state: Run) -> None:
    """Of a QAT checkpoint: how its weights lie on the grid of Q4_0. Ordinary weights under such a name are refused."""
    facts = state.manifest.qat
    if facts is None:
        state.record(state.manifest)  # an earlier run may have taken it for one
        return
    key = sha256_json(["qat", 1, state.memory.sha256(state.base), state.build.key])
    why = None if facts.verdict is None else stage_is_done(state, "qat", key)
    if why is None:
        started = time.monotonic()
        header = gguf_io.read_header(state.base)
        (q4_0,) = recipes.select(["Q4_0"], state.offered)
        asked = plan_recipe(state, q4_0, header, with_imatrix=False)
        grid = qat.measure(header, asked, state.progress)
        facts = facts.model_copy(update={"grid": grid, "verdict": qat.verdict(grid)})
        seconds = round(time.monotonic() - started, 2)
        record = StageRecord(key=key, argv=[], seconds=seconds, outputs={})
        state.record(state.manifest.model_copy(update={"qat": facts}).with_stage("qat", record))
    state.did(Done("qat", "Q4_0 grid", False, qat.summary(facts), 0.0))
    qat.refuse_ordinary_weights(state.source.name.model, facts)


def _measured_contexts(state: Run, header: gguf_io.Header) -> list[ContextMemory]:
    """What llama.cpp says of contexts of the base; nothing where it cannot be asked, and cards say so."""
    if state.build.bindings is None:
        return []
    lengths = memory.contexts_of(memory.context_facts(header, [], "").n_ctx_train)
    embeds = state.source.facts.embedding is not None
    # A text that is read in both directions must be in one batch.
    ubatch = max(lengths) if embeds else memory.UBATCH
    asked = {"lengths": lengths, "slots": memory.SLOTS, "ubatch": ubatch, "embeddings": embeds}
    try:
        logs = llama_cpp.ask_bindings(state.build, "contexts", state.base, None, state.log, settings=asked)["logs"]
        return [memory.parse_context_log(n_ctx, logs[str(n_ctx)]) for n_ctx in lengths]
    except KilledError:
        raise  # it could be asked, and the same command asks again
    except ToolFailedError as error:
        state.log.note(f"what contexts take is estimated: {error.what}")
        return []


def _renderer(header: gguf_io.Header) -> prompts.Render:
    """The sandboxed renderer with the texts of the model's own first and last token."""
    bos, eos = header.token_texts("bos", "eos")

    def render(template: str, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> str:
        return chat.render(template, messages, tools=tools, bos_token=bos, eos_token=eos, now=prompts.NOW)

    return render


# --- imatrix -----------------------------------------------------------------------------------------------------


def _imatrix(state: Run) -> None:
    _cover(state, _have_imatrix(state))


def _cover(state: Run, made: imatrix.Imatrix) -> None:
    """Every wanted recipe gets the data it uses, or tensors are raised as asked, or the run ends here.

    `made` may hold NaN or Inf; the set's file does not.
    """
    path = state.set_dir / imatrix.file_name(state.stem)
    header = gguf_io.read_header(state.base)
    # What is raised is decided anew, but for recipes that are not asked for now.
    names = {recipe.name for recipe in wanted_recipes(state)}
    kept = {recipe: tensors for recipe, tensors in state.manifest.pins.items() if recipe not in names}
    state.manifest = state.manifest.model_copy(update={"pins": kept})
    unread, pin = frozenset(gemma.unread_tensors(header)), state.options.pin_uncovered
    safe = GGMLQuantizationType[pin] if pin else None
    plans = {recipe.name: planned for recipe, planned in _plans_of(state, header)}
    found = coverage.gaps(made, header, plans, unread=unread)
    pins: dict[str, dict[str, str]] = {}
    if found and safe is not None:
        pins = coverage.pins(found, plans, safe)
        state.manifest = state.manifest.model_copy(update={"pins": {**kept, **pins}})
        plans = {recipe.name: planned for recipe, planned in _plans_of(state, header)}
        found = coverage.gaps(made, header, plans, unread=unread, safe=safe)
    for gap in found:
        state.log.note(f"{path.name}: {gap.tensor} {gap.what}; used by {', '.join(gap.recipes)}")
    if found:
        wanted = [recipe.name for recipe in wanted_recipes(state)]
        given = state.options.imatrix is not None
        raise coverage.refusal(path, found, wanted, given=given, pin=pin)
    state.record(state.manifest)
    for recipe, tensors in pins.items():
        state.did(Done("coverage", recipe, False, f"without data, raised to {pin}: {', '.join(sorted(tensors))}", 0.0))
    unseen = coverage.unseen_experts(state.manifest.imatrix.coverage if state.manifest.imatrix else [])
    if unseen:
        why = f"no token reached {coverage.listed(unseen)}: their columns count the same"
        state.did(Done("coverage", "experts", False, why, 0.0))


def _plans_of(state: Run, header: gguf_io.Header) -> Iterator[tuple[recipes.Recipe, plan.FilePlan]]:
    """What llama-quantize would make of every wanted recipe with the imatrix."""
    wanted = [recipe for recipe in fitted(state, wanted_recipes(state), header) if not recipe.is_base]
    for done, recipe in enumerate(wanted):
        state.progress("planning", done, len(wanted), "recipes")
        yield recipe, plan_recipe(state, recipe, header, with_imatrix=True)


def _have_imatrix(state: Run) -> imatrix.Imatrix:
    """The imatrix in the set, computed or given; as it was read, with what was taken out of the set's file."""
    options = state.options
    final = state.set_dir / imatrix.file_name(state.stem)
    base_sha = state.memory.sha256(state.base)
    header = gguf_io.read_header(state.base)
    if options.imatrix is not None:
        return _given_imatrix(state, options.imatrix, final, header=header, base_sha=base_sha)
    text = _calibration_text(state, header)
    # The number of threads changes no byte of the result, but who gives it wants it recorded, not recomputed.
    identity = ["imatrix", base_sha, text.sha256, text.file_name, options.chunks, options.gpu_layers, state.build.key]
    key = sha256_json([*identity, options.reference] if options.reference else identity)
    if (why := stage_is_done(state, "imatrix", key)) is not None:
        _add_coverage(state, final)
        state.did(Done("imatrix", final.name, False, why, 0.0, final.stat().st_size))
        return imatrix.read(final)
    why = why_again(state, "imatrix", key)
    text_path = state.work / text.file_name
    write_atomic(text_path, text.data)
    n_chunks: int | None = None
    if state.build.bindings is not None:
        # llama-imatrix adds no EOS, whatever the tokenizer wants.
        answer = llama_cpp.ask_bindings(
            state.build, "tokens", state.base, text_path, state.log, settings={"add_eos": False}
        )
        n_chunks = int(answer["n_tokens"]) // imatrix.CHUNK_TOKENS
        if n_chunks < 2:
            raise BadInputError(
                f"the calibration text {text.name} has only {answer['n_tokens']} tokens",
                next_step=f"Give at least {2 * imatrix.CHUNK_TOKENS} tokens; some 100 kB of text are usual.",
            )
        n_chunks = min(n_chunks, options.chunks or n_chunks)

    model, made_for_this = _imatrix_model(state)

    def argv_of(first: int, count: int | None, continue_from: str | None, out: str) -> list[str]:
        return imatrix.imatrix_argv(
            state.build,
            model.name,
            text.file_name,
            out,
            first_chunk=first,
            chunks=options.chunks if count is None else count,
            continue_from=continue_from,
            threads=options.threads,
            gpu_layers=options.gpu_layers,
            flags=embedding.imatrix_flags(state.source.facts.gguf_arch),
        )

    parts = state.work / f"imatrix-{key[:16]}"
    computed, seen, seconds = imatrix.compute(
        argv_of, n_chunks=n_chunks, directory=parts, cwd=state.work, log=state.log, progress=state.progress
    )
    try:
        made = imatrix.read(computed)
        imatrix.check(made, header, n_chunks=n_chunks or seen)
        clean = _finite(state, made)
    except (BadInputError, VerificationError):
        shutil.rmtree(parts)  # so that the same command computes it again
        raise
    if clean is not made:
        imatrix.write(clean, partial_path(final, state.work))
        computed = partial_path(final, state.work)
    replace_durably(computed, final)
    shutil.rmtree(parts)
    if made_for_this:
        model.unlink()
    facts = CalibrationFacts(name=text.name, source=text.source, n_bytes=len(text.data), sha256=text.sha256)
    argv = argv_of(0, options.chunks, None, final.name)
    _record_imatrix(state, final, clean, key=key, argv=argv, seconds=seconds, text=facts)
    state.did(Done("imatrix", final.name, True, why, seconds, final.stat().st_size))
    return made


def _finite(state: Run, made: imatrix.Imatrix) -> imatrix.Imatrix:
    """The imatrix without the tensors that hold NaN or Inf; the same one when there are none. Nothing is silent."""
    clean = imatrix.finite(made)
    broken = sorted(set(made.entries) - set(clean.entries))
    if not broken:
        return made
    if not clean.entries:
        next_step = "Compute it again, with another calibration text."
        raise VerificationError(f"{made.path} holds NaN or Inf for every tensor", next_step=next_step)
    why = f"NaN or Inf in {coverage.listed(broken)}: taken out, llama-quantize refuses a file with any"
    state.did(Done("imatrix", f"{len(broken)} of {len(made.entries)} tensors", False, why, 0.0))
    return clean


def _calibration_text(state: Run, header: gguf_io.Header) -> calibration.Text:
    """The text behind the imatrix; conversations of the mix are in the model's own turns.

    Its chat template says how they are written, else its family does. A template that cannot write them costs no run:
    the text's source, which is recorded, says in what turns they are.
    """
    if state.options.calibration != "default":
        return calibration_text(state.options)
    family = gemma.by_gguf_arch(state.source.facts.gguf_arch)
    template = state.source.facts.chat_template
    if template is not None:
        bos, eos = header.token_texts("bos", "eos")

        def render(conversations: Sequence[calibration.Conversation]) -> list[str]:
            texts = chat.render_many(
                template, conversations, add_generation_prompt=False, bos_token=bos, eos_token=eos, now=prompts.NOW
            )
            return [text.removeprefix(bos) for text in texts]  # llama-imatrix begins every chunk with it

        try:
            return calibration.in_turns("mix", render, "conversations in the turns of the chat template")
        except BadInputError as error:
            state.log.note(f"calibration: {error.what}; conversations are in the turns of {state.source.facts.family}")
    turns = family.turns if family is not None else None
    return calibration.in_turns(
        "mix",
        lambda conversations: calibration.turns_of(turns, conversations),
        f"conversations in the turns of {state.source.facts.family}" if turns else "conversations as paragraphs",
    )


def _imatrix_model(state: Run) -> tuple[Path, bool]:
    """(the model that reads the calibration text, whether it was made for that): the base, or with `--from` a quant.

    The quant is made without an imatrix, as there is none yet, and kept while the imatrix is computed: a killed run
    goes on with it.
    """
    if state.options.reference is None:
        return state.base, False
    (recipe,) = select_recipes(state, [state.options.reference])
    if recipe.is_base:
        return state.base, False
    model = state.work / f"imatrix-from-{recipe.name}-{state.memory.sha256(state.base)[:16]}-{state.build.key}.gguf"
    if not model.exists():
        partial = partial_path(model)
        argv = quantize.quantize_argv(
            state.build, recipe, state.base.name, partial.name, imatrix=None, threads=state.options.threads
        )
        quantize.run_llama_quantize(
            argv, f"making {recipe.name} for the imatrix", cwd=state.work, log=state.log, progress=state.progress
        )
        replace_durably(partial, model)
    return model, True


def _given_imatrix(state: Run, given: Path, final: Path, *, header: gguf_io.Header, base_sha: str) -> imatrix.Imatrix:
    """Use the user's own imatrix after the same checks; as it was read."""
    made = imatrix.read(given)
    imatrix.check(made, header)
    clean = _finite(state, made)
    key = sha256_json(["imatrix", base_sha, state.memory.sha256(given)])
    if stage_is_done(state, "imatrix", key) is None:
        partial = partial_path(final, state.work)
        # The name of the text ends in a key of every file: without the directories of the machine it was made on.
        datasets = [PureWindowsPath(name).name if "\\" in name else Path(name).name for name in made.datasets]
        clean = replace(clean, datasets=tuple(datasets))
        if set(clean.entries) != set(made.entries):
            imatrix.write(clean, partial)
        elif datasets == list(made.datasets):
            copy(given, partial)
        else:
            renamed = {"imatrix.datasets": gguf_io.strings_value(datasets)}
            gguf_io.write_with_values(gguf_io.read_header(given), partial, renamed)
        replace_durably(partial, final)
        _record_imatrix(state, final, clean, key=key, argv=[], seconds=0.0, text=None)
    else:
        _add_coverage(state, final)
    state.did(Done("imatrix", final.name, False, "given with --imatrix", 0.0, final.stat().st_size))
    return made


def _add_coverage(state: Run, final: Path) -> None:
    """What an imatrix saw, into a manifest of a version that did not record it."""
    facts = state.manifest.imatrix
    if facts is not None and not facts.coverage:
        complete = facts.model_copy(update={"coverage": imatrix.coverage(imatrix.read(final))})
        state.record(state.manifest.model_copy(update={"imatrix": complete}))


def _record_imatrix(
    state: Run,
    final: Path,
    made: imatrix.Imatrix,
    *,
    key: str,
    argv: Sequence[str],
    seconds: float,
    text: CalibrationFacts | None,
) -> None:
    entry = new_entry(state, final, kind="imatrix", recipe=None, key=key, argv=argv, seconds=seconds, checks=None)
    new = state.manifest.with_file(entry)
    new = new.model_copy(
        update={
            "calibration": text,
            "imatrix": ImatrixFacts(
                n_chunks=made.n_chunks,
                chunk_size=made.chunk_size,
                n_entries=len(made.entries),
                datasets=list(made.datasets),
                coverage=imatrix.coverage(made),
            ),
        }
    )
    stage = StageRecord(
        key=key, argv=[entry.argv] if argv else [], seconds=round(seconds, 2), outputs={final.name: entry.sha256}
    )
    state.record(new.with_stage("imatrix", stage))


# --- quantize -----------------------------------------------------------------------------------------------------


def _quantize(state: Run) -> None:
    production.make_quants(state, _take_away)


def _take_away(state: Run, finished: Sequence[Path]) -> None:
    """The finished files of a wave, once they are measured: afterwards they are not there any more."""
    if state.take_away is None:
        return
    if state.options.until in ("evaluate", "card"):
        _evaluate(state)
    for path in finished:  # of shards the first
        place = state.take_away(path)
        entry = state.manifest.file(path.relative_to(state.set_dir).as_posix())
        if place is not None and entry is not None:
            # Recorded first: a file that is in neither place would be made again.
            state.record(state.manifest.with_file(entry.model_copy(update={"state": "remote", "remote": place})))
            entry.remove(state.set_dir)


# --- evaluate -----------------------------------------------------------------------------------------------------


def _evaluate(state: Run) -> None:
    """Quality and speed of what is in the set by now."""
    if state.options.evaluate:
        evidence.evaluate_run(state)
    else:
        state.did(Done("evaluate", "quality and speed", False, "left out with --no-evaluate", 0.0))


# --- card ---------------------------------------------------------------------------------------------------------


def _card(state: Run) -> None:
    started = time.monotonic()
    manifest.save(state.manifest, state.set_dir)
    made = write_card(state.set_dir, card.Renderer(state.options.templates))
    state.manifest = manifest.load(state.set_dir)
    why = "rendered from quantset.json" if made else "quantset.json unchanged"
    state.did(Done("card", "README.md", made, why, time.monotonic() - started))


def write_card(
    set_dir: Path,
    renderer: card.Renderer,
    chosen: CardOptions | None = None,
    drawn: dict[str, pictures.Drawn] | None = None,
) -> bool:
    """Render README.md of a set, its translations and pictures from its manifest; False when they were just that.

    What is chosen now is recorded first, so that the next rendering needs no options. Cards in languages that are no
    longer chosen are deleted: they would tell of an older state. `drawn` holds pictures by the hash of their data:
    sets that show the same share the work.
    """
    recorded = manifest.load(set_dir)
    choices = (chosen or CardOptions()).chosen(recorded.card, recorded.stem)
    now = _draw_pictures(set_dir, recorded, {} if drawn is None else drawn)
    facts = recorded.model_copy(update={"card": choices, "pictures": now})
    changed = facts != recorded
    if changed:
        manifest.save(facts, set_dir)
    files = card.card_files(tuple(choices.languages))
    for language, name in files.items():
        text, path = renderer.render(facts, language), set_dir / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomic(path, text)
            changed = True
    for name in set(card.card_files(tuple(card.LANGUAGES)).values()) - set(files.values()):
        if (set_dir / name).is_file():
            (set_dir / name).unlink()
            changed = True
    return changed


def _draw_pictures(set_dir: Path, facts: Manifest, drawn: dict[str, pictures.Drawn]) -> dict[str, Picture]:
    """Have under `assets/` the pictures of what the manifest holds, and none that shows something else.

    Nothing is drawn, and matplotlib not imported, while the data is that of the pictures and they are whole.
    """
    kept: dict[str, Picture] = {}
    for name, data in pictures.all_data(facts).items():
        digest = pictures.data_hash(data)
        old = facts.pictures.get(name)
        svg, png = (set_dir / pictures.FOLDER / f"{name}.{kind}" for kind in ("svg", "png"))
        if old is not None and old.data_sha256 == digest and _is(svg, old.svg_sha256) and _is(png, old.png_sha256):
            kept[name] = old
        elif pictures.can_draw():
            made = drawn[digest] if digest in drawn else pictures.draw(name, data)
            drawn[digest] = made
            write_atomic(svg, made.svg)
            write_atomic(png, made.png)
            kept[name] = Picture(
                data_sha256=digest, svg_sha256=sha256_bytes(made.svg), png_sha256=sha256_bytes(made.png)
            )
    for name in pictures.NAMES:
        if name not in kept:  # its evidence is gone, or it would show other data
            for kind in ("svg", "png"):
                (set_dir / pictures.FOLDER / f"{name}.{kind}").unlink(missing_ok=True)
    return kept


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_file(path) == digest


# --- publish ------------------------------------------------------------------------------------------------------


def publish_set(
    set_dir: Path,
    how: PublishOptions,
    *,
    send: bool,
    wait: bool = False,
    progress: Progress = silent,
    say: Callable[[Done], None] = lambda _: None,
    show: Callable[[publishing.Look], None] = lambda _: None,
) -> publishing.Look:
    """Compare a finished set with its repository, and with `send` make the repository what the set is.

    A card that names another repository, or none, is rendered again for this one first. `show` gets what was found
    before anything is sent. Raises `GemmaGGUFError` subclasses for what forbids sending.
    """
    with publishing.opened(set_dir, how, wait=wait, progress=progress, say=say) as upload:
        facts = manifest.load(upload.set_dir)
        if facts.card.repo != upload.repo:
            write_card(upload.set_dir, card.Renderer(), CardOptions(repo=upload.repo))
            facts = manifest.load(upload.set_dir)
        seen = upload.look(facts, rehash=send)
        show(seen)
        if send:
            upload.send(seen)
        return seen
