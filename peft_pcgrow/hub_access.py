"""The Hub: what is a repository's name there, and what its errors mean. Beside the rooms: no model, no adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def check_repo(repo: str) -> None:
    """Raise ValueError unless a text can be a repository's name."""
    try:
        if not isinstance(repo, str) or not repo:
            raise HFValidationError("it is no text")
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is no repository of the Hub ({error}): give owner/name") from None


def is_on_hub(name: str | None) -> bool:
    """Whether a model's name leads to the Hub, as far as the name tells: not to a folder, nor to a path."""
    try:
        check_repo(name or "")
    except ValueError:
        return False
    return not Path(name or "").exists()


@contextmanager
def plain_errors(repo: str) -> Iterator[None]:
    """Inside, errors of the Hub say what to do.

    Raises:
        PermissionError: not logged in, or not allowed. FileNotFoundError: no such repository or revision.
        ConnectionError: the Hub is not reached, or broke off.
    """
    try:
        yield
    except Exception as error:
        if (plain := _plain(repo, error)) is None:
            raise
        raise plain from error


def fetched(repo: str, revision: str | None) -> Path:
    """A folder with what is in a repository of adapters, downloaded unless it is there already.

    Raises:
        ValueError: no name of a repository. Otherwise as `plain_errors`.
    """
    check_repo(repo)
    with plain_errors(repo):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=["*.json", "*.safetensors"]))


def _plain(repo: str, error: BaseException) -> OSError | None:
    """The same in plain words; None: it is not of the Hub, or plain already."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    said = next((each for each in chain if isinstance(each, HfHubHTTPError)), None)
    status = getattr(getattr(said, "response", None), "status_code", 0)
    # while files are uploaded errors come in a RuntimeError, and of an answer there the user knows nothing
    if isinstance(error, RuntimeError) or status >= 500 or any(map(_is_of_network, chain if said is None else ())):
        first = (str(chain[-1]).strip().splitlines() or [type(chain[-1]).__name__])[0]
        return ConnectionError(
            f"{constants.ENDPOINT} was not reached for {repo}, or broke off ({first}): try again, which sends or "
            "fetches only what is missing"
        )
    if isinstance(said, RevisionNotFoundError):
        return FileNotFoundError(f"{repo} has no such revision: give a branch, a tag, or a commit's hash")
    if status == 403:
        return PermissionError(
            f"this token may not do that with {repo}: give a repository of your own, or a token that may (`hf auth "
            "login`)"
        )
    if status == 401:
        return PermissionError(f"the Hub does not know this token, or {repo} is not there for it: {LOGIN}")
    return FileNotFoundError(f"the Hub has no {repo}, or does not show it: {LOGIN}") if status == 404 else None


def _is_of_network(error: BaseException) -> bool:
    # what carries requests is not the Hub's client itself, and has changed its name
    carriers = ("httpx", "httpcore", "requests", "urllib3", "hf_xet")
    return isinstance(error, (ConnectionError, TimeoutError, LocalEntryNotFoundError)) or type(
        error
    ).__module__.startswith(carriers)
