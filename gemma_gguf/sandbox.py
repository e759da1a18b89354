"""A worker process that renders one chat template and ends: the only place where text of a model repository is run.

Run as `python -m gemma_gguf.sandbox` by `chat.py`; reads one JSON request from stdin, prints one JSON answer. Jinja's
immutable sandbox keeps a template from Python's internals, but not from looping or from filling the memory. So the
process sets limits to itself before it reads the template: memory, computing time, no file, no further process. It is
started without the user's environment, so there is no token for a template to find should the sandbox leak.

It imports nothing but Jinja and the standard library: whatever it needs is there before the limits are.
"""

import contextlib
import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from types import FrameType, TracebackType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

KILL_SECONDS = 2  # of computing after the time limit: one call of C code cannot be interrupted, but killed
MESSAGE_CHARACTERS = 500


class TooLongError(BaseException):
    """The time is up. Not an `Exception`, so that nothing in Jinja can take it for an error of the template."""


class TooLargeError(BaseException):
    """The template writes more than it may."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the model's own tokens for training; for the text it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - the type Jinja declares

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """What templates do with `dict`, without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be the name of a value
        jinja2.utils.Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _refuse_underscore(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise(message: object) -> NoReturn:
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own would escape <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment(now: Callable[[], datetime] = datetime.now) -> ImmutableSandboxedEnvironment:
    """What chat templates are written for: transformers' environment, its names and its whitespace rules."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda layout: now().strftime(layout),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return made


def render_all(request: Mapping[str, Any]) -> list[str]:
    """Render every conversation of a request; raises what Jinja raises, `TooLongError` or `TooLargeError`."""
    now = request["now"]
    template = environment((lambda: datetime.fromisoformat(now)) if now else datetime.now).from_string(
        request["template"]
    )
    texts = []
    for messages in request["conversations"]:
        pieces: list[str] = []
        n_bytes = 0
        # Piece by piece, so that an endless output ends at the limit and not with the memory.
        for piece in template.generate(
            messages=messages,
            tools=request["tools"],
            documents=None,
            add_generation_prompt=request["add_generation_prompt"],
            bos_token=request["bos_token"],
            eos_token=request["eos_token"],
        ):
            n_bytes += len(piece.encode("utf-8", errors="surrogatepass"))
            if n_bytes > request["max_bytes"]:
                raise TooLargeError
            pieces.append(piece)
        texts.append("".join(pieces))
    return texts


def _line_of(error: BaseException) -> int | None:
    """The line of the template that raised: the innermost frame of its compiled code."""
    if isinstance(error, jinja2.exceptions.TemplateSyntaxError):
        return error.lineno
    line = None
    walked: TracebackType | None = error.__traceback__
    while walked is not None:
        scope = walked.tb_frame.f_globals
        if "__jinja_exception__" in scope:  # Jinja has put the template's own line here ...
            line = walked.tb_lineno
        elif "__jinja_template__" in scope:  # ... but not for our limits, which it lets pass
            line = scope["__jinja_template__"].get_corresponding_lineno(walked.tb_lineno)
        walked = walked.tb_next
    return line


def set_limits(seconds: float, n_bytes: int, *, used: float = 0.0) -> None:
    """Bound this process, which has computed for `used` seconds by now.

    What a system does not have it does not set; whoever started this process watches the clock in any case.
    """

    def up(_number: int, _frame: FrameType | None) -> NoReturn:
        raise TooLongError

    with contextlib.suppress(ImportError, AttributeError):
        import resource  # noqa: PLC0415 - not on every system

        whole = int(used + seconds) + 1 + KILL_SECONDS
        for name, limit in (
            ("RLIMIT_AS", (n_bytes, n_bytes)),
            ("RLIMIT_CPU", (whole, whole + 1)),  # ends by SIGXCPU, which cannot be taken for a kill from outside
            ("RLIMIT_FSIZE", (0, 0)),
            ("RLIMIT_NPROC", (0, 0)),
            ("RLIMIT_CORE", (0, 0)),
        ):
            with contextlib.suppress(ValueError, OSError, AttributeError):
                resource.setrlimit(getattr(resource, name), limit)
    with contextlib.suppress(AttributeError):
        signal.signal(signal.SIGPROF, up)
        signal.setitimer(signal.ITIMER_PROF, seconds)


def end_timer() -> None:
    """No `TooLongError` from here on: what is left is to say what was found."""
    with contextlib.suppress(AttributeError):
        signal.setitimer(signal.ITIMER_PROF, 0)


def answer(request: Mapping[str, Any]) -> dict[str, object]:
    """`{"texts": [...]}`, or `{"problem": kind, "line": number or null, "message": text}`."""
    try:
        texts = render_all(request)
        json.dumps(texts, ensure_ascii=False).encode("utf-8")  # a lone surrogate is no text
    except TooLongError as error:
        return {"problem": "time", "line": _line_of(error), "message": ""}
    except TooLargeError as error:
        return {"problem": "size", "line": _line_of(error), "message": ""}
    except MemoryError as error:
        return {"problem": "memory", "line": _line_of(error), "message": ""}
    except Exception as error:  # noqa: BLE001 - whatever a template can raise is the template's fault
        own = isinstance(error, jinja2.exceptions.TemplateError)
        message = str(error) if own else "".join(traceback.format_exception_only(error))
        return {"problem": "error", "line": _line_of(error), "message": message.strip()[:MESSAGE_CHARACTERS]}
    else:
        return {"texts": texts}


def main(argv: list[str]) -> None:
    """Answer the one request on stdin; `argv` holds seconds of computing and bytes of memory."""
    seconds, n_bytes = map(float, argv)
    request = json.load(sys.stdin)
    set_limits(seconds, int(n_bytes))
    said = answer(request)
    end_timer()
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
