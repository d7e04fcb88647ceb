"""What the library and the network raise -> one line of ours.

The server's own words are not passed on: a hostile one could put the token that it was sent into them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Iterator

from swsurgery.errors import HubError, SwsurgeryError

TOKEN = re.compile(r"hf_[A-Za-z0-9_]{6,}")
"""What a token of the Hub looks like."""

_STATUS = {
    401: ("the Hub asks who you are", "log in: hf auth login, or set HF_TOKEN"),
    403: ("the Hub does not allow it", "does your token have the right to?"),
    404: ("not found on the Hub", "is the name right? private and gated repositories need a token: hf auth login"),
    409: ("the Hub says that it conflicts with what is there", "run the same command again"),
    412: ("somebody else committed meanwhile", "run the same command again"),
    429: ("the Hub asks to go slower", "wait a few minutes, then run the same command again"),
}


def redacted(text: str) -> str:
    """`text` without anything that looks like a token."""
    return TOKEN.sub("hf_***", text)


def broken_off() -> tuple[type[Exception], ...]:
    """What the transport raises where a connection ends in the middle of an answer."""
    from swsurgery.hub.guard import BROKEN_OFF

    return BROKEN_OFF


_STATUS_LINE = re.compile(r"HTTP Error \d{3} thrown while requesting [A-Z]+(?= )")
_FIXED = re.compile(r"(Retrying in|Rate limited\. Waiting) [0-9.]+s( before retry)? \[Retry \d+/\d+\]\.")


class _NoServersWords(logging.Filter):
    """Of what the library logs, only what no server can word: a status, and how long it waits."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        found = _FIXED.fullmatch(text) or _STATUS_LINE.match(text)
        if found is not None:
            record.msg, record.args = found[0], ()
        return found is not None


@functools.cache
def _mute() -> None:
    """Have the library log nothing that a server said, wherever its log goes."""
    from swsurgery.hub.guard import LOGGERS

    only = _NoServersWords()
    for name in LOGGERS:
        logging.getLogger(name).addFilter(only)


@contextlib.contextmanager
def told(where: object) -> Iterator[None]:
    """Turn what the library raises within the block into a HubError about `where`."""
    from huggingface_hub import errors, get_session

    from swsurgery.hub.guard import Refused, guarded

    _mute()
    try:
        with guarded():
            yield
    except SwsurgeryError:
        raise
    except Refused as error:
        raise HubError(error.what, where, error.remedy) from None
    except errors.GatedRepoError:
        raise HubError("a gated repository", where, "accept its terms on its page, and log in: hf auth login") from None
    except errors.RevisionNotFoundError:
        raise HubError("no such revision", where) from None
    except errors.RepositoryNotFoundError:
        raise HubError(*_line(404, where)) from None
    except errors.OfflineModeIsEnabled:
        raise HubError("the offline mode is on", where, "unset HF_HUB_OFFLINE") from None
    except errors.RemoteEntryNotFoundError:
        raise HubError("no such file or folder on the Hub", where) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        raise HubError(*_line(status, where)) from None
    except errors.LocalEntryNotFoundError:
        what = "neither in the local Hugging Face cache nor to be had from the Hub"
        raise HubError(what, where, "is there a network? is the name right?") from None
    except (errors.HFValidationError, errors.HfUriError, errors.LocalTokenNotFoundError) as error:
        raise HubError(redacted(str(error).splitlines()[0]), where) from None
    except errors.OIDCError:
        what = "HF_OIDC_RESOURCE is set, and there is no identity to exchange"
        raise HubError(what, where, "the job needs the permission id-token: write") from None
    except errors.EntryNotFoundError:
        raise HubError("no such file on the Hub", where) from None
    except OSError as error:
        raise HubError(f"cannot be reached or written ({type(error).__name__})", where) from None
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError, UnboundLocalError):
        # The library reads the Hub's documents without checking them.
        raise HubError("the Hub's answer is not valid", where, "is this the right Hub?") from None
    except Exception as error:
        # The transport's exceptions are those of whichever HTTP library this version of huggingface_hub uses.
        if type(error).__module__.split(".")[0] != type(get_session()).__module__.split(".")[0]:
            raise
        what = f"the connection to the Hub failed ({type(error).__name__})"
        raise HubError(what, where, "run the same command again") from None


def _line(status: int, where: object) -> tuple[str, object, str]:
    other = ("the Hub failed", "run the same command again") if status >= 500 else ("the Hub refused", "")
    what, remedy = _STATUS.get(status, other)
    return f"{what} (HTTP {status})", where, remedy
