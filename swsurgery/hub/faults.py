"""Convert errors of huggingface_hub and of the network to a HubError of one line.

The words of the server are not repeated, because a hostile server could put the token that it received into them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Iterator

from swsurgery.errors import HubError, HubUnreachable, SwsurgeryError

TOKEN = re.compile(r"hf_[A-Za-z0-9_]{6,}")
"""Pattern of a token of the Hub."""

_STATUS = {
    401: ("the Hub requires you to log in", "run hf auth login, or set HF_TOKEN"),
    403: ("the Hub refuses access", "check the permissions of your token"),
    404: ("not found on the Hub", "check the name; to read a private or gated repository, run hf auth login"),
    409: ("the Hub reports a conflict with what exists", "run the same command again"),
    412: ("somebody else committed meanwhile", "run the same command again"),
    429: ("the Hub limits the rate of requests", "wait a few minutes, then run the same command again"),
}


def redact(text: str) -> str:
    """Replace everything in `text` that looks like a token."""
    return TOKEN.sub("hf_***", text)


def list_transport_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that the transport raises if a connection ends in the middle of an answer."""
    from swsurgery.hub.guard import BROKEN_OFF

    return BROKEN_OFF


_STATUS_LINE = re.compile(r"HTTP Error \d{3} thrown while requesting [A-Z]+(?= )")
_FIXED = re.compile(r"(Retrying in|Rate limited\. Waiting) [0-9.]+s( before retry)? \[Retry \d+/\d+\]\.")


class _NoServersWords(logging.Filter):
    """Reduce log records of huggingface_hub to texts that a server cannot choose: HTTP status and waiting time."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Shorten the record to its recognised part. Returns False, which drops it, if no part is recognised."""
        text = record.getMessage()
        found = _FIXED.fullmatch(text) or _STATUS_LINE.match(text)
        if found is not None:
            record.msg, record.args = found[0], ()
        return found is not None


@functools.cache
def _mute_library() -> None:
    """Stop huggingface_hub from logging the words of a server, whichever handlers its loggers have."""
    from swsurgery.hub.guard import LOGGERS

    only = _NoServersWords()
    for name in LOGGERS:
        logging.getLogger(name).addFilter(only)


@contextlib.contextmanager
def convert_errors(where: object) -> Iterator[None]:
    """Convert errors that huggingface_hub raises during the block to a HubError about `where`."""
    from huggingface_hub import errors, get_session

    from swsurgery.hub.guard import Refused, guard_requests

    _mute_library()
    try:
        with guard_requests():
            yield
    except SwsurgeryError:
        raise
    except Refused as error:
        raise HubError(error.what, where, error.remedy) from None
    except errors.GatedRepoError:
        remedy = "accept the terms on its page, and run hf auth login"
        raise HubError("the repository is gated", where, remedy) from None
    except errors.RevisionNotFoundError:
        raise HubError("the repository has no such revision", where) from None
    except errors.RepositoryNotFoundError:
        raise HubError(*_describe_status(404, where)) from None
    except errors.OfflineModeIsEnabled:
        raise HubUnreachable("the offline mode is on", where, "unset HF_HUB_OFFLINE") from None
    except errors.RemoteEntryNotFoundError:
        raise HubError("there is no such file or folder on the Hub", where) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        raise HubError(*_describe_status(status, where)) from None
    except errors.LocalEntryNotFoundError:
        what = "the repository is neither in the local Hugging Face cache nor available from the Hub"
        raise HubError(what, where, "check the network connection and the name") from None
    except (errors.HFValidationError, errors.HfUriError, errors.LocalTokenNotFoundError) as error:
        raise HubError(redact(str(error).splitlines()[0]), where) from None
    except errors.OIDCError:
        what = "HF_OIDC_RESOURCE is set, but this job has no identity to exchange"
        raise HubError(what, where, "give the job the permission id-token: write") from None
    except errors.EntryNotFoundError:
        raise HubError("there is no such file on the Hub", where) from None
    except OSError as error:
        raise HubError(f"cannot be reached or written ({type(error).__name__})", where) from None
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError, UnboundLocalError):
        # huggingface_hub reads documents of the Hub without validating them.
        raise HubError("the Hub's answer is not valid", where, "check that HF_ENDPOINT names the right Hub") from None
    except Exception as error:
        # Exceptions of the transport are recognised by their package, the HTTP library that huggingface_hub uses.
        if type(error).__module__.split(".")[0] != type(get_session()).__module__.split(".")[0]:
            raise
        what = f"the connection to the Hub failed ({type(error).__name__})"
        remedy = "check the network, the proxy and HF_ENDPOINT, then run the same command again"
        raise HubUnreachable(what, where, remedy) from None


def _describe_status(status: int, where: object) -> tuple[str, object, str]:
    """Return the three arguments of a HubError that describe an HTTP status."""
    other = ("the Hub failed", "run the same command again") if status >= 500 else ("the Hub refused", "")
    what, remedy = _STATUS.get(status, other)
    return f"{what} (HTTP {status})", where, remedy
