"""Keys that sign versions in tests."""

from typing import NamedTuple

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


class KeyPair(NamedTuple):
    """A private key and its public half, as PEM."""

    private: str
    public: str


def make_key(curve: ec.EllipticCurve | None = None, password: bytes | None = None) -> KeyPair:
    """A new key, by default on P-256 and not encrypted."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    hide = serialization.BestAvailableEncryption(password) if password else None
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        hide or serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return KeyPair(private.decode(), public.decode())
