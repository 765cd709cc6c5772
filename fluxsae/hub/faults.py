"""What can go wrong between here and the Hub: what is tried again, and what a person is told."""

import errno
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import huggingface_hub as hf
from huggingface_hub import errors as hf_errors

from fluxsae.errors import FluxSaeError

T = TypeVar("T")

_log = logging.getLogger(__name__)
_WAITS = (1.0, 3.0, 9.0)
_LONGEST_WAIT = 300.0
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ABSENT: tuple[type[Exception], ...] = (
    hf_errors.LocalEntryNotFoundError,
    hf_errors.OfflineModeIsEnabled,
    hf_errors.RevisionResolutionError,
)
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
_LOGIN = "log in with `hf auth login` or set HF_TOKEN"
_REMEDIES = {
    401: "it does not exist, is private, or the token is missing or no longer valid. Check the name, or " + _LOGIN,
    403: f"the token in use may not do this. Use one with the role write, of an account with the right to ({_LOGIN})",
    404: f"there is no such repository. Check the name; for a private one, {_LOGIN}",
    409: "it exists already, or another change is in progress. Try again in a moment",
    412: "somebody has pushed since the state that this push builds on. Nothing was changed. Pull the new state, "
    "compare, then push again",
    429: "the Hub limits the rate of requests. Start the same command again in some minutes; what arrived is kept",
}


def redact(text: str) -> str:
    """The text without access tokens."""
    return _TOKEN.sub("hf_***", text)


def ask_hub(
    action: str,
    repo_id: str,
    call: Callable[[], T],
    *,
    revision: str | None = None,
    again_after: tuple[int, ...] = _TRANSIENT,
) -> T:
    """What `call` gives, tried again while the Hub is busy, failing or out of reach for a moment.

    `action` says what is done, as in "download user/name". `again_after` are the statuses after which the call may be
    repeated: for one that is not idempotent, only those that say that nothing was done.

    Raises:
        FluxSaeError: the call failed for a reason that a user can mend.
    """
    waits = iter(_WAITS)
    while True:
        try:
            return call()
        except Exception as error:
            pause = max(next(waits, math.inf), _asked_wait(error))
            if pause > _LONGEST_WAIT or not _is_transient(error, again_after):
                explanation = _explanation(error, action, repo_id, revision)
                if explanation is None:
                    raise
                raise FluxSaeError(redact(explanation)) from error
            reason = _status(error) or type(error).__name__
        _log.warning("The Hub is busy or out of reach (%s); trying again in %.0f s", reason, pause)
        time.sleep(pause)


def _explanation(error: Exception, action: str, repo_id: str, revision: str | None) -> str | None:
    """What went wrong and what to do; None for faults of our own."""
    # an HTTP error is an OSError without a number of the system
    if any(isinstance(link, OSError) and link.errno in _DISK_FULL for link in _chain(error)):
        return (
            f"The disk is full: could not {action}. Free some space, or set HF_HOME to a larger disk, then start the "
            "same command again; complete files are kept."
        )
    refused = _http_error(error)
    if refused is not None:
        return _refusal(refused, action, repo_id, revision)
    if hf.is_offline_mode() or _is_network(error) or isinstance(error, _ABSENT):
        where = "HF_HUB_OFFLINE is set" if hf.is_offline_mode() else f"{hf.constants.ENDPOINT} cannot be reached"
        return (
            f"Could not {action}{f' at {revision}' if revision else ''}: {where}, and the cache at "
            f"{hf.constants.HF_HUB_CACHE} does not hold all of it. Go online and try again, or choose a revision that "
            "was downloaded before."
        )
    if isinstance(error, (ValueError, OSError)) and str(error):
        return f"Could not {action}: {str(error).strip().splitlines()[0]}"
    return None


def _refusal(error: hf_errors.HfHubHTTPError, action: str, repo_id: str, revision: str | None) -> str:
    """What the Hub's answer means here."""
    status, page = int(error.response.status_code), f"{hf.constants.ENDPOINT}/{repo_id}"
    if isinstance(error, hf_errors.GatedRepoError):
        return f"{repo_id} is gated. Open {page}, accept its terms, then {_LOGIN}, with the account that accepted them."
    if isinstance(error, hf_errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}. Its branches, tags and commits are listed on {page}."
    if isinstance(error, hf_errors.RemoteEntryNotFoundError):
        return f"Could not {action}: a file is not there. The files are listed on {page}."
    if status >= 500:
        remedy = "the Hub has an error of its own. Try again later; what arrived is kept, and no half state is left"
    else:
        remedy = _REMEDIES.get(status) or (getattr(error, "server_message", None) or str(error)).strip().splitlines()[0]
    wait = _asked_wait(error)
    return f"Could not {action} ({status}): {remedy}" + (f". It asked to wait {wait:.0f} seconds." if wait else ".")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _http_error(error: BaseException) -> hf_errors.HfHubHTTPError | None:
    """The Hub's answer that the error came from, if there was one."""
    answers = (link for link in _chain(error) if isinstance(link, hf_errors.HfHubHTTPError))
    return next((answer for answer in answers if answer.response is not None), None)


def _status(error: BaseException) -> int | None:
    found = _http_error(error)
    return None if found is None else int(found.response.status_code)


def _is_transient(error: BaseException, statuses: tuple[int, ...]) -> bool:
    status = _status(error)
    return _is_network(error) if status is None else status in statuses


def _is_network(error: BaseException) -> bool:
    """Whether the client's HTTP library failed to reach or to read the server."""
    return any(type(link).__module__.partition(".")[0].startswith("http") for link in _chain(error))


def _asked_wait(error: BaseException) -> float:
    """The seconds that the server asked for by `Retry-After`; 0 where it did not."""
    found = _http_error(error)
    header = found.response.headers.get("Retry-After", "") if found is not None else ""
    return float(header) if header.isdigit() else 0.0
