"""Signatures: what is signed is found again, any change of any file is caught, and keys are handled with care.

Keys are made here with cryptography, and once with openssl, as the page on signing says.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import FIRST, THIRD, tree, write_llama, write_manifest
from keys import write_keys

import swsurgery
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.cli import main
from swsurgery.errors import CheckpointError, SwsurgeryError, TargetError
from swsurgery.progress import Silent
from swsurgery.verifying import signature as signature_module

ROOT = Path(__file__).parents[2]
SIGNATURE = "model.sig"


@pytest.fixture
def signed(tmp_path) -> Path:
    """A checkpoint with its signature inside; key.pem and key.pub lie beside it."""
    root = write_llama(tmp_path / "checkpoint")
    assert signature_module.sign(root, write_keys(tmp_path)).signature == root / SIGNATURE
    return root


def findings(root: Path, key: str = "key", signature: Path | None = None) -> list[tuple[str | None, str]]:
    found = signature_module.verify_signature(root, signature or root / SIGNATURE, root.parent / f"{key}.pub")
    assert {f.rule for f in found} <= {"signature"}
    return [(f.file, f.message) for f in found]


def test_what_was_signed_is_vouched_for(signed):
    assert findings(signed) == []
    assert sorted(p.name for p in signed.iterdir() if "sig" in p.name) == [SIGNATURE], "and nothing else was left"


def test_an_index_and_a_single_file_are_both_signed_and_both_sound(tmp_path):
    root = write_llama(tmp_path / "model")
    shutil.copy(root / FIRST, root / "model.safetensors")
    key = write_keys(tmp_path)
    assert main(["sign", str(root), "--key", str(key), "--quiet"]) == 0
    assert findings(root, str(tmp_path / "key")) == []
    for name in (FIRST, "model.safetensors"):
        (root / "model.sig").unlink(missing_ok=True)
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[:-1])
        assert main(["sign", str(root), "--key", str(key), "--quiet"]) == 2
        (root / name).write_bytes(whole)


def test_a_copy_elsewhere_under_another_name_is_vouched_for(signed, tmp_path):
    copy = shutil.copytree(signed, tmp_path / "copy")
    assert findings(copy) == []


def test_the_standard_tool_reads_our_signature_and_we_read_its(signed, tmp_path):
    from model_signing import signing as standard_signing
    from model_signing import verifying as standard_verifying

    config = standard_verifying.Config().use_elliptic_key_verifier(public_key=tmp_path / "key.pub")
    config.verify(signed, signed / SIGNATURE)
    theirs = tmp_path / "theirs.sig"
    (signed / SIGNATURE).unlink()
    standard_signing.Config().use_elliptic_key_signer(private_key=tmp_path / "key.pem").sign(signed, theirs)
    assert findings(signed, signature=theirs) == []


def flips(root: Path, count: int) -> list[tuple[str, int, int]]:
    """(file, offset, bit): places among all bytes of all signed files."""
    sizes = {n: (root / n).stat().st_size for n in names(root)}
    choose = random.Random(4)
    chosen = choose.choices(list(sizes), weights=list(sizes.values()), k=count)
    return [(n, choose.randrange(sizes[n]), choose.randrange(8)) for n in chosen]


def names(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.name != SIGNATURE)


def test_every_flipped_bit_is_caught_and_its_file_named(signed):
    """SWSURGERY_FLIPS asks for more of them."""
    count = int(os.environ.get("SWSURGERY_FLIPS", "40"))
    caught = 0
    for name, offset, bit in flips(signed, count):
        path = signed / name
        sound = path.read_bytes()
        damaged = bytearray(sound)
        damaged[offset] ^= 1 << bit
        path.write_bytes(damaged)
        caught += [file for file, _ in findings(signed)] == [name]
        path.write_bytes(sound)
    assert caught == count
    assert findings(signed) == []


def test_every_removed_file_is_caught(signed, tmp_path):
    for name in names(signed):
        os.rename(signed / name, tmp_path / "away")
        assert findings(signed) == [(name, "the file was signed, but is missing")]
        os.rename(tmp_path / "away", signed / name)
    assert findings(signed) == []


@pytest.mark.parametrize("name", ["extra.bin", ".hidden", "assets/more", "deep/er/still", "modeling_evil.py", "A"])
def test_every_added_file_is_caught(signed, name):
    (signed / name).parent.mkdir(parents=True, exist_ok=True)
    (signed / name).touch()
    assert findings(signed) == [(name, "the file was added after signing")]


def test_every_renamed_file_is_caught(signed):
    for name in names(signed):
        os.rename(signed / name, signed / "renamed")
        assert {file for file, _ in findings(signed)} == {name, "renamed"}
        os.rename(signed / "renamed", signed / name)


def test_two_files_that_changed_places_are_caught(signed):
    for old, new in ((FIRST, "away"), (THIRD, FIRST), ("away", THIRD)):
        os.rename(signed / old, signed / new)
    assert {file for file, _ in findings(signed)} == {FIRST, THIRD}


def test_a_file_replaced_by_a_link_to_itself_is_caught(signed, tmp_path):
    os.rename(signed / FIRST, tmp_path / FIRST)
    (signed / FIRST).symlink_to(tmp_path / FIRST)
    assert findings(signed) == [(None, f"is a symbolic link: {FIRST} (replace it with the file itself)")]


def test_a_named_pipe_is_caught_and_does_not_hang(signed):
    os.mkfifo(signed / "pipe")
    assert findings(signed) == [(None, "is not a regular file: pipe")]


def test_what_version_control_and_downloads_leave_is_not_covered(signed):
    for name in (".git/config", ".cache/huggingface/x", ".gitattributes"):
        (signed / name).parent.mkdir(parents=True, exist_ok=True)
        (signed / name).write_text("x")
    assert findings(signed) == []


def test_another_key_is_a_finding(signed, tmp_path):
    write_keys(tmp_path, "other")
    assert findings(signed, "other") == [(SIGNATURE, "the signature was not made with this key, or was changed later")]


def test_a_signature_of_another_checkpoint_is_a_finding(signed, tmp_path):
    other = write_llama(tmp_path / "other", config={"rope_theta": 7.0})
    assert [file for file, _ in findings(other, signature=signed / SIGNATURE)] == ["config.json"]


def changed(document: dict, path: str, value: object) -> dict:
    """A copy of a signature with one member replaced, or removed where `value` is None."""
    document = json.loads(json.dumps(document))
    *parents, last = path.split(".")
    node = document
    for key in parents:
        node = node[int(key) if isinstance(node, list) else key]
    if value is None:
        del node[last]
    else:
        node[int(last) if isinstance(node, list) else last] = value
    return document


def payload(document: dict) -> dict:
    return json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))


@pytest.mark.parametrize("path", ["mediaType", "verificationMaterial", "dsseEnvelope",
                                  "dsseEnvelope.payload", "dsseEnvelope.payloadType",
                                  "dsseEnvelope.signatures", "dsseEnvelope.signatures.0.sig"])  # fmt: skip
@pytest.mark.parametrize("value", [None, 7, "x", [], {}, "AAAA"], ids=str)
def test_a_damaged_signature_is_a_finding_without_a_traceback(signed, path, value):
    document = json.loads((signed / SIGNATURE).read_text())
    (signed / SIGNATURE).write_text(json.dumps(changed(document, path, value)))
    (found,) = findings(signed)
    assert found[0] == SIGNATURE


def test_the_older_form_without_the_key_s_hash_is_read_in_silence(signed, capsys):
    document = json.loads((signed / SIGNATURE).read_text())
    (signed / SIGNATURE).write_text(json.dumps(changed(document, "verificationMaterial.publicKey", {})))
    write_keys(signed.parent, "other")
    assert findings(signed) == [] and findings(signed, "other") != []
    assert capsys.readouterr() == ("", "")


def test_a_signature_with_any_changed_byte_is_a_finding_or_says_the_same(signed):
    sound = (signed / SIGNATURE).read_bytes()
    choose = random.Random(5)
    refused = 0
    for at in choose.sample(range(len(sound)), 60):
        damaged = bytearray(sound)
        damaged[at] ^= 1 << choose.randrange(8)
        (signed / SIGNATURE).write_bytes(damaged)
        refused += bool(findings(signed))
    assert refused >= 58, "the hint's name, and the spare bits of a base64 group, mean nothing"


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "7", '{"a": 1, "a": 2}', "[" * 100_000, "\x00" * 10])
def test_what_is_no_signature_is_a_finding(signed, text):
    (signed / SIGNATURE).write_text(text)
    (found,) = findings(signed)
    assert found[0] == SIGNATURE


def test_a_payload_that_was_edited_to_fit_is_a_finding(signed):
    """Who changes a file and its digest in the signature has no key to sign that with."""
    (signed / "tokenizer.json").write_text("{}")
    document = json.loads((signed / SIGNATURE).read_text())
    statement = payload(document)
    resources = statement["predicate"]["resources"]
    for r in resources:
        r["digest"] = hashlib.sha256((signed / r["name"]).read_bytes()).hexdigest()
    root = hashlib.sha256(b"".join(bytes.fromhex(r["digest"]) for r in resources)).hexdigest()
    statement["subject"][0]["digest"]["sha256"] = root
    text = base64.b64encode(json.dumps(statement, indent=2).encode()).decode()
    (signed / SIGNATURE).write_text(json.dumps(changed(document, "dsseEnvelope.payload", text)))
    assert findings(signed) == [(SIGNATURE, "the signature was not made with this key, or was changed later")]


def test_a_signer_who_left_a_file_out_is_told(signed, tmp_path):
    from model_signing import hashing
    from model_signing import signing as standard

    (signed / SIGNATURE).unlink()
    partial = hashing.Config().set_ignored_paths(paths=["config.json", "not-there"])
    config = standard.Config().use_elliptic_key_signer(private_key=tmp_path / "key.pem")
    config.set_hashing_config(partial).sign(signed, tmp_path / "partial.sig")
    assert findings(signed, signature=tmp_path / "partial.sig") == [
        ("config.json", "the signature does not cover this file")
    ]


def test_a_signature_of_another_form_is_named(signed, tmp_path):
    from model_signing import hashing
    from model_signing import signing as standard

    (signed / SIGNATURE).unlink()
    config = standard.Config().use_elliptic_key_signer(private_key=tmp_path / "key.pem")
    config.set_hashing_config(hashing.Config().use_shard_serialization()).sign(signed, tmp_path / "s.sig")
    ((file, message),) = findings(signed, signature=tmp_path / "s.sig")
    assert file == "s.sig" and "one sha256 for each file" in message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_private_key_that_others_can_touch_is_refused(tmp_path, mode):
    root, key = write_llama(tmp_path / "checkpoint"), write_keys(tmp_path)
    key.chmod(mode)
    with pytest.raises(SwsurgeryError, match="other users can read or write the private key.*chmod 600"):
        signature_module.sign(root, key)
    assert not (root / SIGNATURE).exists()


def test_a_private_key_in_the_checkpoint_is_refused(tmp_path):
    root = write_llama(tmp_path / "checkpoint")
    with pytest.raises(SwsurgeryError, match="is inside the checkpoint"):
        signature_module.sign(root, write_keys(root))
    assert not (root / SIGNATURE).exists()


@pytest.mark.parametrize("curve", ["SECP384R1", "SECP521R1"])
def test_larger_curves_work(tmp_path, curve):
    root = write_llama(tmp_path / "checkpoint")
    signature_module.sign(root, write_keys(tmp_path, curve=curve))
    assert findings(root) == []


def test_keys_that_cannot_be_used_are_one_line(tmp_path, signed):
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

    for name, key in (("rsa", rsa.generate_private_key(65537, 2048)), ("ed", ed25519.Ed25519PrivateKey.generate())):
        path = tmp_path / f"{name}.pem"
        path.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
        path.chmod(0o600)
    write_keys(tmp_path, "curve", "SECP256K1")
    write_keys(tmp_path, "locked", password=b"canary")
    (tmp_path / "text.pem").write_text("no key")
    (tmp_path / "text.pem").chmod(0o600)
    (tmp_path / "folder.pem").mkdir(mode=0o700)
    (signed / SIGNATURE).unlink()
    for name in ("rsa", "ed", "curve", "locked", "text", "folder", "absent"):
        with pytest.raises(SwsurgeryError) as caught:
            signature_module.sign(signed, tmp_path / f"{name}.pem")
        assert len(caught.value.faults) == 1 and f"{name}.pem" in caught.value.faults[0]
    with pytest.raises(SwsurgeryError, match="P-256"):
        signature_module.verify_signature(signed, tmp_path / "key.pub", tmp_path / "text.pem")
    assert not (signed / SIGNATURE).exists()


def test_a_signature_is_never_overwritten(signed, tmp_path):
    before = (signed / SIGNATURE).read_bytes()
    with pytest.raises(TargetError, match="the signature already exists"):
        signature_module.sign(signed, tmp_path / "key.pem")
    assert (signed / SIGNATURE).read_bytes() == before
    signature_module.sign(signed, tmp_path / "key.pem", tmp_path / "second.sig")
    assert findings(signed, signature=tmp_path / "second.sig") == []


def test_a_signature_is_replaced_on_request_after_an_edit(signed, tmp_path):
    shard = next(signed.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert findings(signed) != []
    assert main(["sign", str(signed), "--key", str(tmp_path / "key.pem"), "--replace"]) == 0
    assert findings(signed) == []


def test_only_a_signature_is_replaced(signed, tmp_path, capsys):
    for name, content in (("note.txt", b"text"), ("list.json", b"[]"), ("other.json", b'{"dsseEnvelope": 3}')):
        (tmp_path / name).write_bytes(content)
        words = ["sign", str(signed), "--key", str(tmp_path / "key.pem"), "--signature", str(tmp_path / name)]
        assert main([*words, "--replace"]) == 2
        assert "this file is not a signature" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == content


def test_a_signature_of_another_name_inside_does_not_cover_itself(tmp_path):
    root = write_llama(tmp_path / "checkpoint")
    signature_module.sign(root, write_keys(tmp_path), root / "assets" / "mine.sig")
    assert findings(root, signature=root / "assets" / "mine.sig") == []


def test_what_a_killed_run_left_is_cleaned_up(tmp_path):
    root = write_llama(tmp_path / "checkpoint")
    (root / f".{SIGNATURE}.partial").write_bytes(b"half")
    with pytest.raises(TargetError):
        signature_module.sign(root, write_keys(tmp_path), tmp_path / "no" / "folder.sig")
    (root / f".{SIGNATURE}.partial").unlink()
    (tmp_path / ".out.sig.partial").write_bytes(b"half")
    signature_module.sign(root, tmp_path / "key.pem", tmp_path / "out.sig")
    assert not (tmp_path / ".out.sig.partial").exists()
    assert findings(root, signature=tmp_path / "out.sig") == []


def test_links_and_caches_are_refused_with_the_remedy(tmp_path):
    root, key = write_llama(tmp_path / "checkpoint"), write_keys(tmp_path)
    (root / "link").symlink_to("config.json")
    with pytest.raises(CheckpointError, match=r"symbolic link: link \(replace it with the file itself\)"):
        signature_module.sign(root, key)
    repo = tmp_path / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    snapshot = write_llama(repo / "snapshots" / ("0" * 40))
    for run in (
        lambda: signature_module.sign(snapshot, key),
        lambda: findings(snapshot, signature=tmp_path / "key.pub"),
    ):
        with pytest.raises(CheckpointError, match="copy it first: cp -rL"):
            run()


def test_a_damaged_checkpoint_is_not_signed(tmp_path):
    root, key = write_llama(tmp_path / "checkpoint"), write_keys(tmp_path)
    os.truncate(root / FIRST, 20)
    with pytest.raises(CheckpointError, match="truncated"):
        signature_module.sign(root, key)
    assert not (root / SIGNATURE).exists()


def test_a_signature_is_no_part_of_the_checkpoint(signed):
    assert SIGNATURE == signature_module.SIGNATURE_NAME
    assert SIGNATURE not in [f.name for f in open_checkpoint(signed).files]


def test_the_command_signs(tmp_path, capsys):
    root, key = write_llama(tmp_path / "checkpoint"), write_keys(tmp_path)
    assert main(["sign", str(root), "--key", str(key), "--json", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "checkpoint": str(root),
        "signature": str(root / SIGNATURE),
        "schema": "swsurgery/sign/1",
    }
    assert printed.err == "" and findings(root) == []
    assert main(["sign", str(root), "--key", str(key), "--quiet"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_signing_and_verifying_are_named_while_they_run(tmp_path):
    class Named(Silent):
        def __init__(self):
            self.tasks: list[str] = []

        def start(self, total: int, unit: str, label: str) -> None:
            self.tasks.append(label)

        def close(self) -> None:
            self.tasks.append("end")

    root, key = write_llama(tmp_path / "checkpoint"), write_keys(tmp_path)
    signature_module.sign(root, key, reporter=(named := Named()))
    swsurgery.verify(root, signature=root / SIGNATURE, public_key=tmp_path / "key.pub", reporter=named)
    tasks = [task for task in named.tasks if "sign" in task]
    assert tasks == ["hashing and signing", "verifying the signature"] and named.tasks[-1] == "end"


def test_without_the_extra_the_remedy_is_one_line(tmp_path):
    root, key = write_llama(tmp_path / "checkpoint"), write_keys(tmp_path)
    code = (
        "import sys; sys.modules['model_signing'] = None\nfrom swsurgery.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "sign", str(root), "--key", str(key), "--quiet"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("(pip install 'swsurgery[sign]')\n") and len(done.stderr.splitlines()) == 1


def test_it_works_without_a_network(tmp_path):
    """In a network namespace of its own, which has no way out."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("unshare -n is not there or not allowed")
    root, key = write_llama(tmp_path / "checkpoint"), write_keys(tmp_path)
    alone = ["unshare", "-n", sys.executable]
    subprocess.run([*alone, "-m", "swsurgery", "sign", str(root), "--key", str(key)], check=True, capture_output=True)
    code = (
        "import sys, pathlib\nfrom swsurgery.verifying.signature import verify_signature\n"
        "print(verify_signature(*map(pathlib.Path, sys.argv[1:])))"
    )
    done = subprocess.run(
        [*alone, "-c", code, str(root), str(root / SIGNATURE), str(tmp_path / "key.pub")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "[]\n"


def test_the_page_s_commands_make_keys_that_work(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not there")
    page = (ROOT / "docs" / "signing.md").read_text()
    commands = [line for line in page.splitlines() if re.match(r"(umask \d+ && )?openssl ", line)]
    assert len(commands) == 2
    for command in commands:
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True)
    root = write_llama(tmp_path / "checkpoint")
    signature_module.sign(root, tmp_path / "key.pem")
    assert findings(root) == []


def test_the_undo_file_is_signed_and_the_signature_is_not_reverted(tmp_path):
    base = write_llama(tmp_path / "base")
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "zero", "layer": 1, "row": 2})
    root, undo = tmp_path / "checkpoint", tmp_path / "checkpoint" / "swsurgery-undo.safetensors"
    swsurgery.apply(manifest, output=root, check="off")
    signature_module.sign(root, write_keys(tmp_path))
    assert findings(root) == [] and swsurgery.verify(root).ok
    good = undo.read_bytes()
    undo.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    [(file, _)] = findings(root)
    assert file == undo.name
    undo.unlink()
    [(file, _)] = findings(root)
    assert file == undo.name
    undo.write_bytes(good)
    swsurgery.revert(root, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)
