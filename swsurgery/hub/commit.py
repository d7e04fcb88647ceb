"""Create repositories, branches, commits, tags and pull requests on the Hub, and list them.

A commit is made with a `Draft`: first, large contents are uploaded, which readers cannot see yet; then one request
moves the branch or fails. This module handles paths and bytes, and does not interpret the contents.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from swsurgery.errors import HubError
from swsurgery.hub.faults import convert_errors
from swsurgery.hub.names import COMMIT
from swsurgery.hub.remote import RemoteTree, list_tree

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

MAIN = "main"
"""Name of the branch that every repository has."""

NOTHING_IGNORED = "# nothing is ignored\n"
"""The .gitignore that is sent with an upload. The repository's own one could make the Hub silently omit files."""


class Conflict(HubError):
    """The branch has moved since the plan was made."""


class CopyRefused(HubError):
    """The Hub refuses to copy the files `names` from another repository."""

    def __init__(self, names: Iterable[str], where: object):
        super().__init__("the Hub refuses to copy files from this repository", where)
        self.names = tuple(names)


@dataclass(frozen=True)
class Branch:
    """Where to commit: on top of `head`, the head of the branch, or the head of main if the branch does not exist yet.

    `tags` maps the name of each tag to its commit.
    """

    head: RemoteTree
    branch_is_there: bool
    tags: dict[str, str]


@dataclass(frozen=True)
class Copy:
    """A large file to copy: its new path, its path in the source repository, and its sha256."""

    name: str
    source: str
    sha256: str


@dataclass(frozen=True)
class Sent:
    """A commit that was made, and the number of its pull request (None for a commit to a branch)."""

    commit: str
    pull_request: int | None


def open_visible_tree(repo_id: str, revision: str | None = None) -> RemoteTree | None:
    """List a tree like `open_tree`, but return None if it is missing or hidden from this token. Raises HubError."""
    from huggingface_hub import errors

    with convert_errors(_format_uri(repo_id, revision)):
        try:
            return list_tree(repo_id, revision)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            return None
        except errors.HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                return None
            raise


def find_branch(repo_id: str, branch: str) -> Branch | None:
    """Return where to commit, or None if the repository is missing or hidden from this token. Raises HubError."""
    from huggingface_hub import HfApi, errors

    with convert_errors(_format_uri(repo_id)):
        try:
            refs = HfApi().list_repo_refs(repo_id)
        except errors.RepositoryNotFoundError:
            return None
        there = any(ref.name == branch for ref in refs.branches)
        head = list_tree(repo_id, branch if there else None)
    return Branch(head, there, {ref.name: ref.target_commit for ref in refs.tags})


def _format_uri(repo_id: str, revision: str | None = None) -> str:
    return f"hf://{repo_id}" + (f"@{revision}" if revision else "")


def get_endpoint() -> str:
    """Return the URL of the Hub, without a trailing slash."""
    from huggingface_hub import HfApi

    return HfApi().endpoint.rstrip("/")


@contextlib.contextmanager
def show_bars(bars: bool) -> Iterator[None]:
    """Show or hide the progress bars of huggingface_hub on stderr within the block."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library warns if an environment variable disables them already
        if not bars:
            disable_progress_bars()
        try:
            yield
        finally:
            if not hidden:
                enable_progress_bars()


def has_token(data: bytes) -> bool:
    """Return True if `data` contains the token that is sent with requests.

    Raises HubError if trusted publishing is configured but no token can be obtained.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import OIDCError

    with convert_errors("the token"):
        try:
            token = get_token()
        except OIDCError:
            remedy = "give the job the permission id-token: write, or set HF_OIDC_ID_TOKEN, or unset HF_OIDC_RESOURCE"
            raise HubError("HF_OIDC_RESOURCE is set, but this job has no identity to exchange", "", remedy) from None
    return token.encode() in data if token else False


def open_pull_requests(repo_id: str, title: str) -> list[int]:
    """Return the numbers of the open pull requests with this title, ignoring surrounding blanks. Raises HubError."""
    from huggingface_hub import HfApi

    with convert_errors(_format_uri(repo_id)):
        found = HfApi().get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open")
        return [each.num for each in found if each.title.strip() == title.strip()]


def is_private(repo_id: str) -> bool:
    """Return True if the repository is private now. Raises HubError."""
    from huggingface_hub import HfApi

    with convert_errors(_format_uri(repo_id)):
        return HfApi().repo_info(repo_id).private is True


def create_repository(repo_id: str, private: bool) -> None:
    """Create a repository. Does nothing if the repository exists. Raises HubError."""
    from huggingface_hub import HfApi

    with _explain_upload(_format_uri(repo_id)):
        HfApi().create_repo(repo_id, private=private, exist_ok=True)


def create_branch(repo_id: str, branch: str, commit: str) -> None:
    """Create a branch that starts at `commit`. Raises HubError."""
    from huggingface_hub import HfApi

    with _explain_upload(_format_uri(repo_id, branch)):
        HfApi().create_branch(repo_id, branch=branch, revision=commit)


def create_tag(repo_id: str, name: str, commit: str) -> None:
    """Create a tag for a commit. Does nothing if the tag exists. Raises HubError."""
    from huggingface_hub import HfApi

    with _explain_upload(_format_uri(repo_id, name)):
        HfApi().create_tag(repo_id, tag=name, revision=commit, exist_ok=True)


class Draft:
    """A commit that is being prepared on top of `parent`. If `create_pr` is True, it becomes a new pull request."""

    def __init__(self, repo_id: str, branch: str, parent: str, create_pr: bool):
        self._repo_id, self._branch, self._parent, self._create_pr = repo_id, branch, parent, create_pr
        self._additions: dict[str, CommitOperationAdd] = {}

    def add(self, contents: Mapping[str, Path | bytes]) -> dict[str, str]:
        """Add files to the commit, and upload each large file that the Hub does not have yet.

        `contents` maps paths in the repository to local files or bytes. Returns the sha256 of each file as it was read.
        Raises HubError.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        with _explain_upload(_format_uri(self._repo_id)):
            new = {name: CommitOperationAdd(name, content) for name, content in contents.items()}
            HfApi().preupload_lfs_files(
                self._repo_id,
                list(new.values()),
                revision=self._branch,
                create_pr=self._create_pr,
                free_memory=False,
                gitignore_content=NOTHING_IGNORED,
            )
            self._additions |= new
            return {name: addition.upload_info.sha256.hex() for name, addition in new.items()}

    def send(
        self,
        copies: Collection[Copy],
        source: RemoteTree | None,
        deletions: Collection[str],
        message: str,
        description: str,
    ) -> Sent:
        """Make the commit from the added contents, `copies` from `source`, and `deletions`.

        Raises CopyRefused (nothing was committed), Conflict, HubError.
        """
        from huggingface_hub import CommitOperationCopy, CommitOperationDelete, HfApi, errors

        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *(CommitOperationDelete(name, is_folder=False) for name in deletions),
            *self._additions.values(),
            *(CommitOperationCopy(c.source, c.name, source.commit, source.repo_id, "model") for c in copies if source),
        ]
        where = _format_uri(self._repo_id)
        with _explain_upload(where):
            try:
                done = HfApi().create_commit(
                    self._repo_id,
                    operations,
                    commit_message=message,
                    commit_description=description,
                    revision=None if self._create_pr else self._branch,
                    create_pr=self._create_pr,
                    parent_commit=self._parent,
                )
            except errors.FileDuplicationError as error:
                found_digests = set(re.findall(r"[0-9a-f]{64}", str(error)))
                raise CopyRefused(_select_names(copies, found_digests), source) from None
            except errors.HfHubHTTPError as error:
                status = error.response.status_code
                if "/lfs-files/duplicate" in str(error.response.url) and 400 <= status < 500 and status != 429:
                    raise CopyRefused(_select_names(copies), source) from None
                if status in (409, 412):
                    what = f"somebody else committed meanwhile (HTTP {status})"
                    raise Conflict(what, where, "run the same command again") from None
                raise
            number = int(done.pr_num) if self._create_pr and done.pr_num is not None else None
        if not COMMIT.fullmatch(done.oid):
            raise HubError("the Hub's answer names no commit", where, "run the same command again")
        return Sent(done.oid, number)


def _select_names(copies: Collection[Copy], digests: Collection[str] = ()) -> list[str]:
    """Return the names of the copies with one of these digests, or of all copies if no digest matches."""
    return [c.name for c in copies if c.sha256 in digests] or [c.name for c in copies]


@contextlib.contextmanager
def _explain_upload(where: object) -> Iterator[None]:
    """Convert errors of calls that write to the Hub to a HubError about `where`.

    huggingface_hub raises ValueError or KeyError for an invalid answer, and wraps errors of its threads in a
    RuntimeError. Its warnings repeat what the server wrote about the card, so they are not shown.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with convert_errors(where), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (HFValidationError, HfHubHTTPError):  # some of these, such as HTTP 400, are also a ValueError
            raise
        except RuntimeError as error:
            cause = error.__cause__
            if cause is None or isinstance(cause, (ValueError, KeyError)) and not isinstance(cause, HfHubHTTPError):
                raise HubError("the upload failed", where, "run the same command again") from None
            raise cause from None
        except (ValueError, KeyError) as error:
            if str(error).startswith("Invalid metadata in README.md"):
                raise HubError("the Hub rejects the card's metadata", where) from None
            if str(error).startswith("LFS batch API returned errors"):
                remedy = "check how much storage is left in this namespace"
                raise HubError("the Hub rejects a large file", where, remedy) from None
            raise HubError("the Hub's answer is not valid", where, "run the same command again") from None
