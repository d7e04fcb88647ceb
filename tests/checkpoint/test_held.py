"""Every function and command that reads a directory enters it once, and an edit in place that was cut off is undone."""

from __future__ import annotations

import contextlib
import inspect as inspect_module
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import FIRST, HEAD, SECOND, THIRD, down, sha256, tree, write_llama, write_manifest
from keys import write_keys

import swsurgery
from swsurgery.checkpoint import journal
from swsurgery.checkpoint.opening import held
from swsurgery.cli import COMMANDS as REGISTERED
from swsurgery.cli import main
from swsurgery.editing import in_place
from swsurgery.errors import SwsurgeryError, TargetError
from swsurgery.sharing import gate
from swsurgery.storage import filesystem
from swsurgery.storage.folder import Folder
from swsurgery.storage.names import JOURNAL, WORKING_FILES
from swsurgery.verifying import signature

PACKAGE = Path(swsurgery.__file__).parent


class Killed(BaseException):
    """Stands for SIGKILL."""


class Room:
    """`model`, which was patched once and whose second edit in place was cut off; and what a call may need beside it.

    `before` is what `model` contained before the second edit, and `recoveries` the directories that were recovered.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.model, self.out = folder, write_llama(folder / "model"), folder / "out"
        self.twin = write_llama(folder / "twin")
        swsurgery.apply(
            self.manifest("first", {"op": "zero", "layer": 1, "row": 2, "col": 3}), in_place=True, check="off"
        )
        self.before = tree(self.model)
        self.third = self.manifest("third", {"op": "zero", "layer": 1, "row": 1, "col": 1})
        with patch.context() as context, pytest.raises(Killed):
            context.setattr(in_place, "run_check", self._stop)
            context.setattr(journal, "_take_back", lambda *arguments: None)
            edit = {"op": "set", "tensor": HEAD, "index": [11, 5], "value": 1.0}
            swsurgery.apply(self.manifest("second", edit), in_place=True, check="off")
        assert (self.model / JOURNAL).exists() and tree(self.model)[THIRD] != self.before[THIRD]
        self.recoveries: list[Path] = []
        true = journal.recover

        def recover(directory: Folder, **more: bool) -> object:
            self.recoveries.append(directory.path)
            return true(directory, **more)

        patch.setattr(journal, "recover", recover)

    def manifest(self, name: str, edit: dict[str, object]) -> Path:
        pins = {shard: sha256(self.model / shard) for shard in (FIRST, SECOND, THIRD)}
        return write_manifest(self.folder / f"{name}.json", {"path": str(self.model), "sha256": pins}, edit)

    @staticmethod
    def _stop(*arguments: object) -> None:
        raise Killed


@pytest.fixture
def room(tmp_path, monkeypatch) -> Room:
    return Room(tmp_path, monkeypatch)


FUNCTIONS: dict[str, Callable[[Room], object]] = {
    "open_checkpoint": lambda room: swsurgery.open_checkpoint(room.model),
    "plan": lambda room: swsurgery.plan(room.third),
    "apply": lambda room: swsurgery.apply(room.third, output=room.out, check="off"),
    "revert": lambda room: swsurgery.revert(room.model, room.out),
    "revert in place": lambda room: swsurgery.revert(room.model),
    "check": lambda room: swsurgery.check(room.model),
    "verify": lambda room: swsurgery.verify(room.model),
    "preflight": lambda room: swsurgery.preflight(room.model),
    "verify, and it is its own base": lambda room: swsurgery.verify(room.model, base=room.model, finite=True),
    "verify, and it is the base": lambda room: swsurgery.verify(room.twin, base=room.model, finite=True),
    "verify, and it is the manifest's": lambda room: swsurgery.verify(room.twin, manifest=room.third, finite=True),
    "diff": lambda room: swsurgery.diff(room.twin, room.model),
    "inspect": lambda room: swsurgery.inspect(room.model),
    "inspect a scalar": lambda room: swsurgery.inspect(room.model, down(1), (2, 3)),
    "lookup": lambda room: swsurgery.lookup(room.model),
    "scan": lambda room: swsurgery.scan(room.model, method="weights"),
    "pin": lambda room: swsurgery.pin(room.third),
    "sweep": lambda room: swsurgery.sweep(room.third, [0.0, 1.0]),
    "compare": lambda room: swsurgery.compare([room.third]),
    "recipe": lambda room: swsurgery.recipe(room.model, "torchao"),
    "export": lambda room: swsurgery.export(room.model, room.out, format="sparse"),
    "export of a manifest": lambda room: swsurgery.export(room.third, room.out, format="sparse"),
    "publish": lambda room: gate.find_early(room.model),
}
"""Functions that leave the directory as it was before the edit that was cut off, or raise an error afterwards."""

NEED_TORCH: dict[str, Callable[[Room], object]] = {
    "load_patched": lambda room: swsurgery.load_patched(room.third, room.model),
    "patched_state_dict": lambda room: list(swsurgery.patched_state_dict(room.third, room.model)),
}

COMMANDS = (
    "verify {model}", "verify {model} --known", "verify {model} --finite", "preflight {model}",
    "verify {model} --base {model}", "verify {twin} --finite --base {model}", "verify {twin} --manifest {third}",
    "inspect {model}",
    "inspect {model} --tensor lm_head.weight --at 0,0", "lookup {model}", "diff {model} {model}", "diff {twin} {model}",
    "revert {model}", "revert {model} -o {out}", "apply {third} --dry-run", "apply {third} -o {out} --check off",
    "check {model}", "scan {model} --method weights", "scan {model}", "sweep {third} --factors 0,1",
    "compare {third}", "recipe {model} --for torchao",
    "export {model} --format sparse -o {out}", "export {third} --format sparse -o {out}", "pin {third}",
)  # fmt: skip


def assert_recovered_once(room: Room) -> None:
    assert room.recoveries == [room.model]
    assert tree(room.model) == room.before
    assert not any((room.model / name).exists() for name in WORKING_FILES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_recovers_once(room, name):
    with contextlib.suppress(SwsurgeryError):
        FUNCTIONS[name](room)
    assert_recovered_once(room)


@pytest.mark.parametrize("name", NEED_TORCH)
def test_a_function_that_loads_the_patched_model_recovers_once(room, name):
    with contextlib.suppress(SwsurgeryError):
        NEED_TORCH[name](room)
    assert_recovered_once(room)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_recovers_once(room, command, capsys):
    main([word.format(**vars(room)) for word in command.split()])
    assert "internal error" not in capsys.readouterr().err
    assert_recovered_once(room)


def test_an_edit_in_place_recovers_once_and_is_made(room):
    swsurgery.apply(room.third, in_place=True, check="off")
    assert room.recoveries == [room.model] and swsurgery.verify(room.model).ok
    swsurgery.revert(room.model)
    assert tree(room.model) == room.before


@pytest.mark.parametrize("options", [["--dry-run"], ["--yes", "--accept", "check-missing"], ["--patch", "--dry-run"]])
def test_publish_recovers_once(hub, room, options):
    assert main(["publish", str(room.model), "org/edited", *options]) == 0
    assert_recovered_once(room)


def test_signing_recovers_once(room, tmp_path):
    pytest.importorskip("model_signing")
    signature.sign(room.model, write_keys(tmp_path), tmp_path / "model.sig")
    assert_recovered_once(room)


def test_verifying_a_signature_recovers_once(room, tmp_path):
    pytest.importorskip("model_signing")
    with contextlib.suppress(SwsurgeryError):
        signature.verify_signature(room.model, room.third, tmp_path / "key.pub")
    assert_recovered_once(room)


def test_no_command_is_forgotten():
    tested = {command.split()[0] for command in COMMANDS} | {"publish", "sign"}
    named = set(REGISTERED)
    assert named - tested == {"lint", "schema"}, "these read no checkpoint"


def test_no_public_function_is_forgotten():
    tested = {*FUNCTIONS, *NEED_TORCH, "sign"}
    functions = {name for name in swsurgery.__all__ if inspect_module.isfunction(getattr(swsurgery, name))}
    assert functions - tested == {"lint", "load_manifest"}, "these are not given a directory"


def test_recovery_is_called_in_one_place():
    calls = [path.name for path in PACKAGE.rglob("*.py") for _ in range(path.read_text().count("journal.recover("))]
    assert calls == ["opening.py"]


def test_what_is_held_already_is_not_entered_again(room):
    with held(room.model) as entered, held(entered) as again:
        assert again is entered
    assert_recovered_once(room)


def test_a_directory_can_be_held_twice_and_not_edited_meanwhile(room):
    busy = pytest.raises(TargetError, match="another run is reading or editing this directory")
    with held(room.model), held(room.model), busy:
        swsurgery.revert(room.model)
    assert_recovered_once(room)


def test_an_edit_that_is_cut_off_before_the_lock_is_not_read(room, monkeypatch):
    """Between the recovery and the lock of a reader another run may begin an edit and be killed."""
    true = filesystem.lock_directory

    @contextlib.contextmanager
    def locked(folder: Folder, exclusive: bool) -> Iterator[None]:
        with true(folder, exclusive):
            if not exclusive:
                (room.model / JOURNAL).touch()
            yield

    monkeypatch.setattr(filesystem, "lock_directory", locked)
    with pytest.raises(TargetError, match="another edit in place was cut off just now"), held(room.model):
        pytest.fail("it was entered")
