"""Complete words of a command line in bash, zsh and fish, as typer's option --install-completion sets up.

A shell completes file names if a function here returns nothing. So manifests and checkpoints need no function, and a
path can be completed where the name of a model can be given too. Must not import torch or read a checkpoint: a shell
waits for the answer.
"""

from __future__ import annotations


def complete_model(incomplete: str) -> list[str]:
    """Return the short names of known models that begin with `incomplete`, or the repository ids if no name does."""
    from swsurgery.known.names import list_model_names

    names = [name for name in list_model_names() if name.startswith(incomplete)]
    return [name for name in names if "/" not in name] or names


def complete_status(incomplete: str) -> list[str]:
    """Return the statuses of known super weights that begin with `incomplete`."""
    from swsurgery.known import STATUSES

    return [status for status in STATUSES if status.startswith(incomplete)]


def complete_device(incomplete: str) -> list[str]:
    """Return the kinds of devices that begin with `incomplete`."""
    return [device for device in ("auto", "cpu", "cuda") if device.startswith(incomplete)]


def complete_document(incomplete: str) -> list[str]:
    """Return the names of documents that `schema --output` takes and that begin with `incomplete`."""
    from swsurgery.cli.documents.schemas import DOCUMENTS

    return [name for name in DOCUMENTS if name.startswith(incomplete)]
