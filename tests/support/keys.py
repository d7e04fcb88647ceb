"""Write key pairs for tests of signatures."""

from __future__ import annotations

from pathlib import Path


def write_keys(folder: Path, name: str = "key", curve: str = "SECP256R1", password: bytes | None = None) -> Path:
    """Write a new private key `name`.pem and its public key `name`.pub; returns the path of the private key."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(getattr(ec, curve)())
    encryption = s.BestAvailableEncryption(password) if password else s.NoEncryption()
    private = folder / f"{name}.pem"
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, encryption))
    private.chmod(0o600)
    public = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return private
