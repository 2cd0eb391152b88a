"""Signatures over a folder, by OpenSSF model signing with an elliptic-curve key; nothing is sent.

The signature is a Sigstore bundle over the sha256 of every file. Anyone can check it with the tool:
``model_signing verify key FOLDER --signature FOLDER/assay.sig --public_key KEY``.

Source: https://github.com/sigstore/model-transparency and its API, https://sigstore.github.io/model-transparency/
"""

import ast
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from components.errors import ConfigError
from components.register.provenance import DOWNLOADED, SIGNATURE
from components.settings import Settings

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_PEM = re.compile(r"-----BEGIN ([A-Z ]*(?:PUBLIC|PRIVATE) KEY)-----(.*?)-----END \1-----", re.S)
_MAKE = "Make one with: openssl ecparam -name prime256v1 -genkey -noout -out signing.pem"


def sign_folder(folder: Path, key: SecretStr) -> Path:
    """Sign every file of a folder, into ``assay.sig`` beside them.

    Args:
        folder: Complete; a signature that is there is replaced.
        key: An unencrypted private key on P-256, P-384 or P-521 as PEM, or the path of one.

    Raises:
        ConfigError: The key is no such key.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from model_signing import signing

    plain = _private_key(key).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with tempfile.TemporaryDirectory() as private:  # readable by this user alone
        file = Path(private) / "key"
        file.touch(mode=0o600)
        file.write_bytes(plain)
        config: Any = _any(signing).Config().use_elliptic_key_signer(private_key=file)
    config.set_hashing_config(_hashing()).sign(folder, folder / SIGNATURE)
    return folder / SIGNATURE


def verify_folder(folder: Path, public_key: str) -> list[str]:
    """Say how a folder differs from what was signed; empty if it does not.

    Args:
        folder: With ``assay.sig`` in it.
        public_key: PEM, as :func:`trusted_key` gives it.
    """
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    if not (folder / SIGNATURE).is_file():
        return [
            f"the version must be signed, as a key is configured; {SIGNATURE} is missing. Register "
            "the candidate again with ASSAY_SIGNING_KEY set"
        ]
    with tempfile.TemporaryDirectory() as private:
        file = Path(private) / "key.pub"
        file.write_text(public_key, encoding="ascii")
        config: Any = _any(verifying).Config().use_elliptic_key_verifier(public_key=file)
    try:
        config.set_hashing_config(_hashing()).verify(folder, folder / SIGNATURE)
    except InvalidSignature:
        what = "it was altered, or made with another key"
    except Exception as error:  # noqa: BLE001  whatever a forged signature provokes is a refusal
        what = _told(str(error)) or type(error).__name__
    else:
        return []
    return [
        f"the signature must be over these files, by the trusted key; {what}. Find out who changed "
        "the version, or set ASSAY_TRUSTED_SIGNER to the key that signed it"
    ]


def _told(text: str) -> str:
    """What the library says of a mismatch: a list as Python writes it, without its digests."""
    found = text.removeprefix("Signature mismatch: ")
    try:
        differences = ast.literal_eval(found)
    except (SyntaxError, ValueError):
        return " ".join(text.split())[:500]
    return "; ".join(str(each).partition(": Expected")[0] for each in differences)[:500]


def trusted_key(settings: Settings) -> str:
    """The public key that signatures must be by, as PEM; empty if no key is configured.

    Raises:
        ConfigError: A key is configured that is none.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_public_key,
    )

    if settings.trusted_signer:
        try:
            key = load_pem_public_key(_pem(settings.trusted_signer, "PUBLIC KEY"))
        except (ValueError, OSError, TypeError):
            key = None
        if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
            raise ConfigError(
                "ASSAY_TRUSTED_SIGNER must be a public key on P-256, P-384 or P-521 as PEM, or the "
                "path of one; it is not. Make one from the signing key with: openssl ec -in "
                "signing.pem -pubout -out signing.pub"
            )
    elif settings.signing_key.get_secret_value():
        key = _private_key(settings.signing_key).public_key()
    else:
        return ""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _private_key(key: SecretStr) -> "EllipticCurvePrivateKey":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        found = load_pem_private_key(_pem(key.get_secret_value(), "PRIVATE KEY"), None)
    except (ValueError, TypeError, OSError, UnsupportedAlgorithm):
        found = None
    if isinstance(found, EllipticCurvePrivateKey) and found.curve.name in _CURVES:
        return found
    raise ConfigError(
        "ASSAY_SIGNING_KEY must be an unencrypted private key on P-256, P-384 or P-521 as PEM, or "
        f"the path of one; it is not. {_MAKE}"
    )


def _pem(given: str, kind: str) -> bytes:
    """The one key in a text or file; a form field or a variable may have lost its line breaks."""
    text = given.replace("\\n", "\n")
    if "-----BEGIN" not in text:
        text = Path(given).expanduser().read_text(encoding="ascii")
    found = [(label, body) for label, body in _PEM.findall(text) if label.endswith(kind)]
    if len(found) != 1:
        raise ValueError(f"there must be one {kind}, there are {len(found)}")
    ((label, body),) = found
    lines = "\n".join(re.findall(".{1,64}", "".join(body.split())))
    return f"-----BEGIN {label}-----\n{lines}\n-----END {label}-----\n".encode("ascii")


def _hashing() -> Any:
    """Every file counts, also those that git would read, but for these two; links are refused."""
    from model_signing import hashing

    return (
        _any(hashing)
        .Config()
        .set_ignored_paths(paths=[SIGNATURE, DOWNLOADED], ignore_git_paths=False)
    )


def _any(module: Any) -> Any:
    """Its constructors have no types."""
    return module
