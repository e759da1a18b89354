"""One repository of the Hub as a place to write to: the only room that calls the Hub's writing functions.

Consumes a repository's name and the user's token, which huggingface_hub finds in its usual places; produces listings,
commits and settings. Bytes go the client's own way: over Xet, or over LFS where `HF_HUB_DISABLE_XET` is set.

Errors of the client become ours in one place, `_trouble`: what passes (`PassingError`) is tried again by the caller,
who looks first what has arrived; everything else is told to the user. What the client says while it works goes to the
log, without secrets and without the queries of addresses, which can be signed.
"""

import contextlib
import io
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gemma_gguf
from gemma_gguf.errors import BadInputError, GemmaGGUFError, VerificationError
from gemma_gguf.publish import Listing, RemoteFile

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

MAIN = "main"
# The request came too early, too often, or the Hub has a bad moment; 412: somebody else committed in between.
PASSING_STATUS = frozenset({408, 409, 412, 423, 425, 429, 500, 502, 503, 504})

Progress = Callable[[int], None]  # called with the bytes of a file that were read so far


class PassingError(GemmaGGUFError):
    """Something that may be over when it is tried again, after `seconds` if the Hub said so."""

    def __init__(self, what: str, seconds: float | None = None) -> None:
        super().__init__(what, next_step="Run the same command again: what has arrived is not sent again.")
        self.seconds = seconds


@dataclass(frozen=True)
class Addition:
    """A file to be committed: `content` is a path, or the bytes themselves; `sha256` is what must arrive."""

    name: str
    content: Path | bytes
    sha256: str


class Repository:
    """A model repository. `endpoint` and `token` are the client's own when they are not given."""

    def __init__(self, name: str, *, endpoint: str | None = None, token: str | None = None) -> None:
        from huggingface_hub import HfApi  # noqa: PLC0415 - slow to import, and only the hub needs it

        self.name = name
        self._api = HfApi(
            endpoint, token, library_name="gemma-gguf", library_version=gemma_gguf.__version__, user_agent=None
        )

    @property
    def endpoint(self) -> str:
        return str(self._api.endpoint)

    @property
    def address(self) -> str:
        return f"{self.endpoint}/{self.name}"

    def account(self) -> dict[str, Any]:
        """What the Hub says of the token's account."""
        with self._errors():
            return dict(self._api.whoami())

    def listing(self) -> Listing:
        """All files at the newest commit of the main branch; an empty `Listing` when there is no such repository."""
        from huggingface_hub import RepoFile, errors  # noqa: PLC0415

        with self._errors():
            try:
                info = self._api.model_info(self.name, revision=MAIN)
            except errors.RepositoryNotFoundError as error:
                # Strangers get the same answer for what is private; without a token nothing can be said.
                if isinstance(error, errors.GatedRepoError) or _status(error) == 401:
                    raise
                return Listing()
            found = {
                item.path: RemoteFile(item.size, item.blob_id, item.lfs.sha256 if item.lfs else None)
                for item in self._api.list_repo_tree(self.name, recursive=True, revision=info.sha)
                if isinstance(item, RepoFile)
            }
            return Listing(commit=info.sha, private=bool(info.private), files=found)

    def create(self) -> None:
        """Have the repository; a new one is private."""
        with self._errors():
            self._api.create_repo(self.name, private=True, exist_ok=True)

    def make_public(self) -> None:
        with self._errors():
            self._api.update_repo_settings(self.name, private=False)

    def check_card(self, text: str) -> None:
        """Ask the Hub whether it accepts the front matter of a README.md. Raises `BadInputError` when it does not."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]  # noqa: PLC0415

        # The client asks the same again when it commits; after hours of sending weights is too late to learn it.
        with self._errors():
            headers = build_hf_headers(token=self._api.token)
            asked = {"content": text, "repoType": "model"}
            answer = get_session().post(f"{self.endpoint}/api/validate-yaml", json=asked, headers=headers)
            if answer.status_code == 400:
                found = "; ".join(str(error.get("message")) for error in answer.json().get("errors", ()))
                raise BadInputError(
                    f"the Hub does not accept the front matter of README.md: {found}",
                    next_step="Render the card again with: gemma-gguf card DIR",
                )
            hf_raise_for_status(answer)

    def commit(
        self,
        additions: Sequence[Addition],
        deletions: Sequence[str],
        message: str,
        *,
        parent: str | None,
        progress: Progress = lambda _: None,
    ) -> str:
        """Send files and commit them together on top of `parent`; returns the commit.

        Raises `VerificationError` when a file changed while it was sent, `PassingError` also when the repository has a
        newer commit than `parent`.
        """
        from huggingface_hub import CommitOperationDelete  # noqa: PLC0415

        with self._errors():
            adds = [_operation(addition, progress) for addition in additions]
            self._api.preupload_lfs_files(self.name, adds, revision=MAIN, free_memory=False, num_threads=1)
            for operation, addition in zip(adds, additions, strict=True):
                # Hashed while it was read: what was sent is what was looked at, or nothing is committed.
                if operation.upload_info.sha256.hex() != addition.sha256:
                    raise VerificationError(
                        f"{addition.name} changed while it was sent",
                        next_step="Make it again with: gemma-gguf run MODEL",
                    )
            deletes = [CommitOperationDelete(name, is_folder=False) for name in deletions]
            done = self._api.create_commit(
                self.name, [*adds, *deletes], commit_message=message, revision=MAIN, parent_commit=parent
            )
            return str(done.oid)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import httpx2  # noqa: PLC0415

        try:
            yield
        except GemmaGGUFError:
            raise
        except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
            raise _trouble(error, self.name, self.endpoint) from error


def uses_xet() -> bool:
    """Whether the client sends large files over Xet, of which only itself knows how far it is; LFS tells us."""
    from huggingface_hub.utils import _runtime  # noqa: PLC0415

    return bool(_runtime.is_xet_available())


def client_shows() -> bool:
    """Whether the client shows its own bars: where somebody watches an upload over Xet."""
    return uses_xet() and sys.stderr.isatty()


def _operation(addition: Addition, progress: Progress) -> "CommitOperationAdd":
    """The client's own operation, which tells how far it has read; the LFS path asks it for a file."""
    from huggingface_hub import CommitOperationAdd  # noqa: PLC0415

    class _Told(CommitOperationAdd):
        @contextlib.contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[Any]:
            if not (with_tqdm and isinstance(self.path_or_fileobj, str)):
                with super().as_file() as file:
                    yield file
                return
            with _Counting(Path(self.path_or_fileobj), progress) as file:
                yield file

    return _Told(addition.name, addition.content)


class _Counting(io.BufferedReader):
    """A file that tells how far it was read."""

    def __init__(self, path: Path, progress: Progress) -> None:
        super().__init__(io.FileIO(path))
        self._progress = progress

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._progress(self.tell())
        return data


@contextlib.contextmanager
def client_says(note: Callable[[str], None]) -> Iterator[None]:
    """What the client's loggers say goes to `note` and nowhere else.

    Its own bars stay where somebody watches an upload over Xet: there nobody else knows how many bytes went.
    """

    class _Noted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(f"hub: {without_queries(record.getMessage())}")

    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # noqa: PLC0415
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from huggingface_hub.utils import logging as client  # noqa: PLC0415

    logger = client.get_logger("huggingface_hub")
    before, handler = list(logger.handlers), _Noted()
    hides = not client_shows() and not are_progress_bars_disabled()
    try:
        logger.handlers[:] = [handler]
        if hides:
            disable_progress_bars()
        yield
    finally:
        logger.handlers[:] = before
        if hides:
            enable_progress_bars()


def without_queries(text: str) -> str:
    """A text whose addresses end before their query: there storage addresses are signed."""
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1?...", text)


# --- errors --------------------------------------------------------------------------------------------------------


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _trouble(error: Exception, repo: str, endpoint: str) -> GemmaGGUFError:
    """An error of the client as ours, with what to do about it."""
    import httpx2  # noqa: PLC0415
    from huggingface_hub import errors  # noqa: PLC0415

    for cause in _chain(error):
        if (status := _status(cause)) is not None:
            return _refused(status, error, cause, repo, endpoint)
        if isinstance(cause, errors.LocalTokenNotFoundError):
            return BadInputError("there is no token of the Hub", next_step="hf auth login")
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return BadInputError("HF_HUB_OFFLINE is set", next_step="Unset it to publish.")
        if isinstance(cause, httpx2.TransportError):
            return PassingError(f"the connection to the Hub broke ({reason(cause)})")
    if isinstance(error, OSError) and error.errno is not None:
        return GemmaGGUFError(f"cannot read what is to be sent: {error}")
    # Of the client's own making, or of Xet's: tried again, and told when that does not help.
    return PassingError(f"the Hub's client failed: {reason(error.__cause__ or error)}")


def _refused(status: int, error: BaseException, cause: BaseException, repo: str, endpoint: str) -> GemmaGGUFError:
    """What an answer with this status means; `cause` holds the answer."""
    response: Any = getattr(cause, "response", None)
    says = reason(cause if getattr(cause, "server_message", None) else error)
    if status in PASSING_STATUS:
        return PassingError(f"the Hub answered {status} ({says})", retry_after(response.headers))
    elsewhere = not str(response.request.url).startswith(endpoint)
    if status == 403 and elsewhere:
        return PassingError("the storage refused an address that was signed too long ago")
    login = "Make a token with write access at huggingface.co/settings/tokens, then: hf auth login"
    table: Mapping[int, tuple[str, str | None]] = {
        400: (f"the Hub does not accept it: {says}", None),
        401: (f"the Hub does not accept the token ({says})", login),
        403: (f"this token may not write to {repo} ({says})", login),
        404: (f"there is no {repo} on the Hub, or this token cannot see it", login),
        413: (f"the Hub finds it too large: {says}", None),
    }
    what, next_step = table.get(status, (f"the Hub answered {status}: {says}", None))
    return BadInputError(what, next_step=next_step)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that an answer asks to wait; None when it does not say."""
    value = headers.get("retry-after", "")
    return float(value) if re.fullmatch(r"\d{1,5}", value) else None


def reason(error: BaseException) -> str:
    """What an error says, on one line, without the queries of addresses; its type when it says nothing."""
    told = getattr(error, "server_message", None) or str(error).strip()
    return without_queries(" ".join(str(told).split()))[:300] if told else type(error).__name__
