"""Sign whole checkpoints and verify signatures, in the format of OpenSSF Model Signing, with keys in files.

A signature proves who signed the files; the record proves what was changed in them. The library model-signing, which
the extra `sign` installs, makes and checks signatures. This module decides which files are covered and which keys are
accepted. It never follows a link or opens a connection, and must not depend on edits or bases.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swsurgery.checkpoint.listing import is_cache_snapshot
from swsurgery.checkpoint.opening import held, open_checkpoint
from swsurgery.checkpoint.weight_files import MAX_LISTED
from swsurgery.errors import AmbiguousWeights, CheckpointError, SwsurgeryError, TargetError
from swsurgery.hub import parse_directory
from swsurgery.progress import Progress, Reporter, Silent, require_reporter
from swsurgery.storage import filesystem
from swsurgery.storage.arguments import require_location, require_path, require_type
from swsurgery.storage.files import LocalFile, read_exactly
from swsurgery.storage.folder import Folder
from swsurgery.storage.names import SIGNATURE_NAME
from swsurgery.storage.result import Result
from swsurgery.storage.strict_json import parse_json, read_small
from swsurgery.verifying.findings import Finding

NOT_COVERED = (".git", ".github", ".gitattributes", ".gitignore", ".cache", SIGNATURE_NAME)
"""Top-level names that a signature does not cover: the files and folders of git and GitHub, the cache of a download,
and the signature itself."""


@dataclass(frozen=True, repr=False)
class Signed(Result):
    """Result of `sign`: the checkpoint, and the file that contains its signature."""

    checkpoint: Path
    signature: Path

    def to_json(self) -> dict[str, object]:
        """Return the document that `sign --json` prints."""
        return {"checkpoint": str(self.checkpoint), "signature": str(self.signature)}


def sign(
    checkpoint: str | Path,
    key: str | Path,
    signature: str | Path | None = None,
    *,
    replace: bool = False,
    reporter: Reporter | None = None,
) -> Signed:
    """Sign every file of a checkpoint with a private key (PEM; P-256, P-384 or P-521).

    `checkpoint` is a directory; a checkpoint on the Hub must be downloaded first. The signature, in the format of
    OpenSSF Model Signing, is written to the new file `signature`, by default model.sig in the checkpoint. With
    `replace`, a signature in this file is replaced, as it has to be after an edit in place.

    Raises TypeError, HubError, CheckpointError; TargetError if the file `signature` exists, unless it is a signature
    and `replace` is True; SwsurgeryError if the key
    cannot be used.
    """
    reporter = require_reporter(reporter)
    given = parse_directory(require_location("checkpoint", checkpoint))
    key = require_path("key", key)
    require_type("replace", replace, bool)
    target = None if signature is None else require_path("signature", signature)
    reporter.start(0, "", "hashing and signing")
    try:
        return Signed(given, _sign(given, key, target, replace))
    finally:
        reporter.close()


def _sign(root: Path, key: Path, signature: Path | None, replace: bool) -> Path:
    library = _load_library()
    root = Path(os.path.realpath(root))
    if os.path.isfile(root):
        raise CheckpointError("a signature covers all files of a directory", root, f"give {root.parent}")
    signature = root / SIGNATURE_NAME if signature is None else Path(os.path.abspath(signature))
    if faults := _find_links(root):
        raise CheckpointError.of(f"{fault} in {root}" for fault in faults)
    with held(root) as entered:
        try:
            checkpoint = open_checkpoint(entered, gguf=True)
        except AmbiguousWeights:  # both sets of weights are signed, so both must be valid
            open_checkpoint(entered, "index")
            checkpoint = open_checkpoint(entered, "single")
        if filesystem.is_there(signature):
            _refuse_replacing(signature, replace)
        with _open_key(key, private=True) as key_path:
            if Path(os.path.realpath(key)).is_relative_to(root):
                remedy = "move it out, so that it is not shared with the checkpoint"
                raise SwsurgeryError("the private key is inside the checkpoint", key, remedy)
            with _convert_key_errors(key, library):
                config = library.signing.Config().use_elliptic_key_signer(private_key=key_path)
        config.set_hashing_config(_Hashing.of(library, root, signature))
        with _make_memory_file(b"") as (fd, path):
            with _convert_os_errors(root):
                config.sign(root, path)
            checkpoint.refuse_changed()  # the library opens the files by their paths
            data = read_exactly(LocalFile(path, fd), os.fstat(fd).st_size, 0)
    temporary = signature.with_name(f".{signature.name}.partial")
    with filesystem.convert_os_errors(signature):
        filesystem.remove_file(temporary)  # left by a killed run
        filesystem.replace_file(signature, data, temporary)
        filesystem.sync_directory(signature.parent)
    return signature


def _refuse_replacing(signature: Path, replace: bool) -> None:
    """Raise TargetError if the existing file must not be replaced: without `replace`, or if it is not a signature."""
    if not replace:
        raise TargetError("the signature already exists", signature, "give --replace, or choose another --signature")
    try:
        _read_statement(read_small(LocalFile(signature), str(signature)), signature.name)
    except (SwsurgeryError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise TargetError("this file is not a signature", signature, "choose another --signature") from None


def verify_signature(
    root: Path | Folder, signature: Path, public_key: Path, progress: Progress | None = None
) -> list[Finding]:
    """Verify the signature of the checkpoint in `root` with `public_key` (PEM). `progress` may be None.

    Returns a finding for each file that was changed, added or removed after signing, and for each file that the
    signature does not cover. Raises CheckpointError if the checkpoint or the signature cannot be read, and
    SwsurgeryError if the key cannot be used.
    """
    progress = progress or Silent()
    with held(root):
        path = root.path if isinstance(root, Folder) else Path(os.path.realpath(root))
        progress.start(0, "", "verifying the signature")
        try:
            return _verify(path, Path(os.path.abspath(signature)), public_key)
        finally:
            progress.close()


def _verify(root: Path, signature: Path, public_key: Path) -> list[Finding]:
    """Verify the signature like `verify_signature`, for a directory that the caller keeps open and locked."""
    library = _load_library()
    if faults := _find_links(root):
        return [Finding("signature", fault) for fault in faults]
    raw = read_small(LocalFile(signature), str(signature))
    with _open_key(public_key, private=False) as path, _convert_key_errors(public_key, library):
        config = library.verifying.Config().use_elliptic_key_verifier(public_key=path)
    hashing = _Hashing.of(library, root, signature)
    config.set_hashing_config(hashing)
    refusals = (ValueError, KeyError, TypeError, IndexError, AttributeError, library.InvalidSignature)
    try:
        covered, left_out = _read_statement(raw, signature.name)
        with _make_memory_file(raw) as (_, path), _convert_os_errors(root), contextlib.redirect_stdout(io.StringIO()):
            config.verify(root, path)  # the library prints warnings about signatures in an older form to stdout
    except CheckpointError as error:
        return [Finding("signature", fault, signature.name) for fault in error.faults]
    except refusals as error:
        if hashing.found is None:  # the library checks the key before it hashes
            return [
                Finding("signature", "the signature was not made with this key, or was changed later", signature.name)
            ]
        return _compare_digests(covered, hashing.found) or [Finding("signature", str(error), signature.name)]
    allowed = {*NOT_COVERED, _make_relative(signature, root)}
    return [
        Finding("signature", "the signature does not cover this file", name)
        for name in left_out
        if name not in allowed and filesystem.is_there(root / name)
    ]


def _compare_digests(covered: dict[str, str], found: dict[str, str]) -> list[Finding]:
    findings = [Finding("signature", "the file was signed, but is missing", n) for n in covered.keys() - found]
    findings += [Finding("signature", "the file was added after signing", n) for n in found.keys() - covered]
    findings += [
        Finding("signature", f"the file's sha256 is {found[n]}, but the signed sha256 is {covered[n]}", n)
        for n in covered.keys() & found
        if covered[n] != found[n]
    ]
    return sorted(findings, key=lambda f: f.file or "")


def _read_statement(raw: bytes, name: str) -> tuple[dict[str, str], list[str]]:
    """Read the contents of a signature without checking it. Returns (file -> sha256, names that are not covered).

    Raises CheckpointError, and KeyError, TypeError and the like if the document has an unexpected form.
    """
    envelope = parse_json(raw, name)["dsseEnvelope"]
    predicate = parse_json(base64.b64decode(envelope["payload"], validate=True), name)["predicate"]
    how = predicate["serialization"]
    if (how["method"], how["hash_type"]) != ("files", "sha256"):
        raise CheckpointError("the signature does not list one sha256 for each file, the only form supported", name)
    resources = predicate["resources"]
    if len(resources) != len({r["name"] for r in resources}):
        raise CheckpointError("the signature lists a file twice", name)
    return {r["name"]: r["digest"] for r in resources}, [str(n) for n in how.get("ignore_paths", [])]


class _Hashing:
    """A hashing configuration for model-signing. It also stores the digests that the library computes.

    `found` maps the name of each file to its sha256. It is None until the library has hashed the files.
    """

    def __init__(self, config: Any):
        self._config = config
        self.found: dict[str, str] | None = None

    @classmethod
    def of(cls, library: _Library, root: Path, signature: Path) -> _Hashing:
        """Make the configuration that hashes each file of `root` with sha256, except those in NOT_COVERED."""
        names = [*NOT_COVERED, *filter(None, [_make_relative(signature, root)])]
        config = library.hashing.Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=False)
        return cls(config.set_ignored_paths(paths=sorted(set(names)), ignore_git_paths=False))

    def hash(self, model_path: Path, *, files_to_hash: Any = None) -> Any:
        manifest = self._config.hash(model_path, files_to_hash=files_to_hash)
        self.found = {r.identifier: r.digest.digest_hex for r in manifest.resource_descriptors()}
        return manifest

    def add_ignored_paths(self, *, model_path: Path, paths: list[str]) -> None:
        self._config.add_ignored_paths(model_path=model_path, paths=paths)


class _Library:
    """The parts of model-signing and cryptography that this module uses, imported when first needed."""

    def __init__(self) -> None:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from model_signing import hashing, signing, verifying

        self.hashing, self.signing, self.verifying = hashing, signing, verifying
        self.InvalidSignature, self.UnsupportedAlgorithm = InvalidSignature, UnsupportedAlgorithm


def _load_library() -> _Library:
    try:
        return _Library()
    except ImportError as error:
        raise SwsurgeryError("signatures need additional packages", error, "pip install 'swsurgery[sign]'") from None


@contextlib.contextmanager
def _open_key(path: Path, *, private: bool) -> Iterator[Path]:
    """Open the file of a key, check it, and yield a path to the open file.

    Because the library opens this path, it reads the same file that was checked.

    Raises SwsurgeryError if the file cannot be read or, for a private key, if other users can access it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SwsurgeryError(f"cannot read the key ({os.strerror(error.errno or 0)})", path) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SwsurgeryError("the key is not a regular file", path)
        _refuse_other_half(os.pread(fd, 4096, 0), path, private)
        if private and stat.S_IMODE(status.st_mode) & 0o077:
            raise SwsurgeryError("other users can read or write the private key", path, f"chmod 600 {path}")
        yield _open_file(fd)
    finally:
        os.close(fd)


def _refuse_other_half(beginning: bytes, path: Path, private: bool) -> None:
    """Raise SwsurgeryError if a PEM file contains a public key but a private one is needed, or the reverse."""
    if private and b"-----BEGIN PUBLIC KEY-----" in beginning:
        raise SwsurgeryError("this is a public key", path, "give the private key")
    if not private and b"PRIVATE KEY-----" in beginning:
        raise SwsurgeryError("this is a private key", path, "give the public key")


@contextlib.contextmanager
def _convert_key_errors(key: Path, library: _Library) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, AttributeError, library.UnsupportedAlgorithm):
        # An RSA key has no curve, and an encrypted key needs a password: both give the same error.
        remedy = "use a PEM file without a password, as docs/signing.md describes"
        raise SwsurgeryError("the key is not on the curve P-256, P-384 or P-521", key, remedy) from None


@contextlib.contextmanager
def _make_memory_file(data: bytes) -> Iterator[tuple[int, Path]]:
    """Make a file in memory that contains `data`, because the library accepts only paths. Yields (fd, path)."""
    fd = os.memfd_create("swsurgery", os.MFD_CLOEXEC)
    try:
        filesystem.write_all(fd, data)
        yield fd, _open_file(fd)
    finally:
        os.close(fd)


def _open_file(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}")


@contextlib.contextmanager
def _convert_os_errors(root: Path) -> Iterator[None]:
    """Convert an OSError of the `with` block to a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read ({os.strerror(error.errno or 0)})", error.filename or root) from error


def _find_links(root: Path) -> list[str]:
    """Return a message for each link and special file, at most MAX_LISTED. Neither can be signed.

    The content of a link or of a special file is not in the directory, so it can change after signing.

    Raises CheckpointError if the directory does not exist or cannot be looked up, or is a snapshot of the Hugging Face
    cache, which consists of links.
    """
    with _convert_os_errors(root):
        is_there = root.is_dir()
    if not is_there:
        raise CheckpointError("no such checkpoint", root)
    if is_cache_snapshot(root):
        what = "a snapshot of the Hugging Face cache consists of links, which cannot be signed"
        raise CheckpointError(what, root, "copy it first: cp -rL SNAPSHOT DIRECTORY")
    faults = []
    for entry in _list_covered(root, root):
        name = os.path.relpath(entry.path, root)
        if entry.is_symlink():
            faults.append(f"is a symbolic link: {name} (replace it with the file itself)")
        elif not entry.is_file(follow_symlinks=False):
            faults.append(f"is not a regular file: {name}")
    return sorted(faults)[:MAX_LISTED]


def _list_covered(folder: Path, root: Path) -> Iterator[os.DirEntry[str]]:
    """Yield every entry below `folder` that a signature covers, except directories."""
    for entry in os.scandir(folder):
        if folder == root and entry.name in NOT_COVERED:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _list_covered(Path(entry.path), root)
        else:
            yield entry


def _make_relative(path: Path, root: Path) -> str | None:
    """Return `path` relative to `root`, or None if it is outside `root`."""
    real = Path(os.path.realpath(path.parent), path.name)
    return str(real.relative_to(root)) if real.is_relative_to(root) else None
