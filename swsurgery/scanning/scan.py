"""Run the command `scan` from beginning to end.

    open_checkpoint      the checkpoint's headers                            checkpoint/opening.py
    refuse_files         errors about files that cannot be written           scan_files.py
    find_candidates      the scan, with the effects of zeroing               find_candidates.py
        scan_activations     scalars that make persistent super activations  by_activations.py
        scan_weights         scalars that may make one, by weights alone     by_weights.py
        scan_experts         experts with extreme outputs                    experts.py
        confirm_scalars      effects of zeroing scalars                      confirm.py
        confirm_parts        effects of zeroing what creates activations     confirm_parts.py
        confirm_experts      effects of zeroing super experts                confirm_experts.py
    write_files          the manifest, the figure and the entry for lookup   scan_files.py

Output files that cannot be written are refused before the model runs. Files are written after the model has run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from swsurgery.checkpoint.opening import held, open_checkpoint
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.errors import Interrupted, SwsurgeryError
from swsurgery.hub import download_checkpoint, parse_location
from swsurgery.model import Placement
from swsurgery.model.protocol import BosChoice, ProtocolName, choose_protocol
from swsurgery.model.run_arguments import refuse_bad_prompts
from swsurgery.progress import Reporter, require_reporter
from swsurgery.scanning.find_candidates import find_candidates
from swsurgery.scanning.report import Method, Scan
from swsurgery.scanning.run_options import RunOptions
from swsurgery.scanning.scan_files import ManifestOp, ScanFiles, refuse_files, write_files
from swsurgery.storage.arguments import (
    require_choice,
    require_location,
    require_number,
    require_path,
    require_strings,
    require_type,
)


def scan(
    checkpoint: str | Path,
    *,
    method: Method = "activations",
    prompts: Sequence[str] | None = None,
    confirm: bool = False,
    manifest: str | Path | None = None,
    op: ManifestOp = "zero",
    factor: float | None = None,
    plot: str | Path | None = None,
    register: str | None = None,
    command: str = "swsurgery scan",
    weights: Weights | None = None,
    variant: str | None = None,
    text: str | None = None,
    protocol: ProtocolName = "default",
    windows: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    bos: BosChoice | None = None,
    score_first: bool | None = None,
    device: str = "auto",
    placement: Placement = "auto",
    reporter: Reporter | None = None,
) -> Scan:
    """Find the super weights of a checkpoint (arXiv:2411.07191), and write the requested files.

    `checkpoint` is a directory or `hf://ORG/NAME[@REV][/sub]`, which is downloaded. The method "activations" runs the
    model on `prompts` and finds the scalars that make persistent super activations. The method "weights" reads the
    weights and runs no model. The method "experts" runs the model on `prompts` and finds the super experts of a mixture
    of experts (arXiv:2507.23279); the result is then an ExpertScan. With `confirm`, the effect of zeroing each
    candidate is measured on `text` (None: the protocol's text). `protocol` and its options, `device` and `placement`
    have the meaning that they have in `check`. If the directory contains several sets of weights and no record names
    one of them, `weights` and `variant` choose the set.

    `manifest` is the path of a new manifest that applies `op` (with `factor`) to what was found: super weights, or
    super experts, and the parts that create an activation. What was not tested is marked as not confirmed. `plot` is
    the path of a figure and ends in .png, .svg or .pdf. `register` is the model name under which `lookup` will find the
    result. The stored entry cites `command` as its source. Files that cannot be written are refused before the scan.

    Raises TypeError, HubError, CheckpointError, ArchitectureError, ManifestError, LookupFailed, ModelError,
    TargetError. If a file cannot be written after the scan, the error's attribute `result` is the Scan.
    """
    reporter = require_reporter(reporter)
    require_choice("method", method, get_args(Method))
    require_choice("op", op, get_args(ManifestOp))
    require_strings("prompts", prompts)
    refuse_bad_prompts(prompts)
    require_type("confirm", confirm, bool)
    require_type("register", register, str, optional=True)
    files = ScanFiles(
        None if manifest is None else require_path("manifest", manifest),
        op,
        None if factor is None else require_number("factor", factor),
        None if plot is None else require_path("plot", plot),
        register,
        command,
    )
    chosen = choose_protocol(protocol, windows=windows, window=window, stride=stride, bos=bos, score_first=score_first)
    options = RunOptions(device, placement, text, chosen)
    with held(download_checkpoint(parse_location(require_location("checkpoint", checkpoint)))) as entered:
        opened = open_checkpoint(entered, weights, variant)
        refuse_files(files, opened, method)
        found = find_candidates(opened, method, prompts, confirm, options, reporter)
    # The directory is released before the files are written, because one of them may be in it.
    try:
        write_files(found, opened, files, reporter)
    except (SwsurgeryError, Interrupted) as error:
        error.result = found
        raise
    return found
