"""What went wrong between this machine and the Hub, in the user's words, and what is worth another attempt."""

import time
from collections.abc import Callable
from typing import TypeVar

from tpshard.errors import HubError, LocalIOError, TpshardError

RETRY_WAITS = (0.5, 1.0, 2.0)  # seconds before the second, third and fourth attempt
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
NO_CONNECTION = {
    "ConnectError",
    "ConnectTimeout",
    "ConnectionError",
    "ProxyError",
    "UnsupportedProtocol",
    "MissingSchema",
    "InvalidURL",
}

T = TypeVar("T")


class UnreachableError(HubError):
    """The Hub gave no answer, so a complete snapshot in the cache may answer for it."""


class TransientError(UnreachableError):
    """The Hub gave no answer this time: worth another attempt."""


class NoRepositoryError(HubError):
    """The Hub has no repository of the name, or shows it to nobody without a login."""


def attempt(action: Callable[[], T], repo_id: str, revision: str | None) -> T:
    """What `action` returns, tried again while the Hub's failure may pass; its last failure as an error of ours."""
    for wait in (*RETRY_WAITS, None):
        try:
            return action()
        except TpshardError as error:
            if wait is None or not isinstance(error, TransientError):
                raise
        except Exception as error:
            meant = failure(error, repo_id, revision)
            if meant is None:
                raise
            if wait is None or not isinstance(meant, TransientError):
                raise meant from error
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def not_a_hub() -> HubError:
    """The error for an endpoint that answers with something else, such as a login page."""
    from huggingface_hub import constants

    return HubError(
        f"{constants.ENDPOINT} did not answer as a Hugging Face Hub does", hint="check HF_ENDPOINT and proxies"
    )


def failure(error: BaseException, repo_id: str, revision: str | None) -> TpshardError | None:
    """What an exception of huggingface_hub or of its HTTP library means to the user; None if it is not theirs.

    Classes are told by name, up the chain of bases, because the HTTP library differs between versions of
    huggingface_hub (requests, httpx, httpx2) and none of them is a dependency of ours.
    """
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    detail = " ".join(str(error).split())[:200]

    if "LocalEntryNotFoundError" in kinds and error.__cause__ is not None:
        return failure(error.__cause__, repo_id, revision)
    if "OfflineModeIsEnabled" in kinds:
        what = f"HF_HUB_OFFLINE is set, so the Hub is not asked for {repo_id}"
        return UnreachableError(what, hint=f"unset HF_HUB_OFFLINE, or download while online: hf download {repo_id}")
    if "GatedRepoError" in kinds:
        message = f"{repo_id} is gated, and this login has no access to it (HTTP {status})"
        return HubError(message, hint=f"ask for access at {endpoint}/{repo_id}, then {LOGIN}")
    if "RepositoryNotFoundError" in kinds:
        hint = f"check the spelling, for a path that it exists; for a private repository {LOGIN}"
        what = f"there is no repository {repo_id} at {endpoint}, or it is private (HTTP {status})"
        return NoRepositoryError(what, hint=hint)
    if "RevisionNotFoundError" in kinds:
        return HubError(
            f"{repo_id} has no revision {revision or 'main'}", hint="--revision takes a branch, a tag or a commit hash"
        )
    if "EntryNotFoundError" in kinds and status is not None:
        return HubError(f"a file of {repo_id} is not there any more: {detail}", hint="run the command again")
    if status == 401:
        return HubError(f"the Hub refused the token (HTTP 401) for {repo_id}", hint=LOGIN)
    if status == 403:
        return HubError(f"the Hub denied access to {repo_id} (HTTP 403): {detail}", hint=f"{LOGIN} with more rights")
    if status == 429:
        return TransientError("the Hub limits the rate of requests (HTTP 429)", hint=f"wait a few minutes, or {LOGIN}")
    if status is not None and (status >= 500 or status == 408):
        return TransientError(f"{endpoint} failed (HTTP {status}), also after retries", hint="try again later")
    if status is not None:
        return HubError(f"the Hub refused a request for {repo_id}: {detail}")
    return _network_failure(error, kinds, endpoint, detail)


def _network_failure(error: BaseException, kinds: set[str], endpoint: str, detail: str) -> TpshardError | None:
    """The failures without an HTTP status."""
    if kinds & {"LocalProtocolError", "InvalidHeader", "UnicodeEncodeError"}:  # the text may hold the token
        return HubError("the token cannot be sent: it has characters that HTTP forbids", hint=LOGIN)
    if kinds & {"TimeoutException", "Timeout"} and "ConnectTimeout" not in kinds:
        hint = "try again later; HF_HUB_DOWNLOAD_TIMEOUT sets how many seconds to wait"
        return TransientError(f"{endpoint} did not answer in time, also after retries", hint=hint)
    if kinds & NO_CONNECTION:
        hint = "check the network, proxies and HF_ENDPOINT"
        return UnreachableError(f"cannot connect to {endpoint}: {detail}", hint=hint)
    if kinds & {"NetworkError", "ProtocolError", "ChunkedEncodingError", "XetDownloadError"}:
        return TransientError(f"the connection to {endpoint} broke: {detail}", hint="run the command again")
    if kinds & {"JSONDecodeError", "FileMetadataError", "TooManyRedirects", "DecodingError", "ContentDecodingError"}:
        return not_a_hub()
    if isinstance(error, OSError) and error.errno is not None:
        return LocalIOError(f"cannot use the cache: {error.strerror}", path=error.filename)
    if "Consistency check failed" in detail:
        return TransientError(f"the Hub broke off while sending a file: {detail}", hint="run the command again")
    if isinstance(error, (OSError, RuntimeError, ValueError)):
        return HubError(f"huggingface_hub failed: {detail}")
    return None
