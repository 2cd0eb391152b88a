"""Signatures: every file counts, every kind of key is told apart, and no key is shown."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr
from support.keys import KeyPair, make_key

from components.errors import ConfigError
from components.register.provenance import DOWNLOADED, SIGNATURE
from components.register.signing import sign_folder, trusted_key, verify_folder
from components.settings import Settings, load_settings

KEY, OTHER = make_key(), make_key()


def settings(signing_key: str = "", trusted_signer: str = "") -> Settings:
    return load_settings(
        signing_key=SecretStr(signing_key), trusted_signer=trusted_signer, _env_file=None
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A signed folder."""
    folder = tmp_path / "version"
    (folder / "code").mkdir(parents=True)
    for name in ("model.onnx", "code/rows.py", "MLmodel"):
        (folder / name).write_text(name)
    assert sign_folder(folder, SecretStr(KEY.private)) == folder / SIGNATURE
    return folder


def test_what_was_signed_is_accepted_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    assert verify_folder(folder, KEY.public) == []
    (folder / DOWNLOADED).write_text("MLflow's own")
    assert verify_folder(folder.rename(tmp_path / "elsewhere"), KEY.public) == []


def add(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")

    return change


def resign(folder: Path) -> None:
    sign_folder(folder, SecretStr(OTHER.private))


def forge(folder: Path) -> None:
    """A statement over the changed files, with the old signature."""
    import base64
    import json

    (folder / "model.onnx").write_text("other")
    bundle = json.loads((folder / SIGNATURE).read_text())
    sign_folder(folder, SecretStr(OTHER.private))
    forged = json.loads((folder / SIGNATURE).read_text())
    bundle["dsseEnvelope"]["payload"] = forged["dsseEnvelope"]["payload"]
    assert base64.b64decode(bundle["dsseEnvelope"]["payload"])
    (folder / SIGNATURE).write_text(json.dumps(bundle))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing signature": (lambda f: (f / SIGNATURE).unlink(), "assay.sig is missing"),
    "altered file": (add("model.onnx"), "Hash mismatch for 'model.onnx'"),
    "added file": (add("code/more.py"), "Extra files .*code/more.py"),
    "added git file": (add(".gitattributes"), "Extra files .*gitattributes"),
    "added below": (add(f"code/{DOWNLOADED}"), "Extra files .*code/registered_model_meta"),
    "removed file": (lambda f: (f / "MLmodel").unlink(), "Missing files .*MLmodel"),
    "link": (lambda f: (f / "link").symlink_to("MLmodel"), "symlink"),
    "other key": (resign, "Key mismatch"),
    "forged statement": (forge, "altered, or made with another key"),
    "no signature": (lambda f: (f / SIGNATURE).write_text("{}"), "by the trusted key; "),
    "no text": (lambda f: (f / SIGNATURE).write_bytes(b"\xff\0"), "by the trusted key; "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_differs_from_what_was_signed_is_refused(folder: Path, fault: str) -> None:
    import re

    change, message = FAULTS[fault]
    change(folder)
    (failure,) = verify_folder(folder, KEY.public)
    assert re.search(message, failure), failure


def test_a_signature_of_another_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.onnx").write_text("another")
    sign_folder(other, SecretStr(KEY.private)).replace(folder / SIGNATURE)
    (failure,) = verify_folder(folder, KEY.public)
    assert "Extra files" in failure
    assert "Hash mismatch for 'model.onnx'" in failure


def test_the_public_tool_accepts_the_signature(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_text(KEY.public)
    tool = Path(sys.executable).with_name("model_signing")
    command = [tool, "verify", "key", folder, "--signature", folder / SIGNATURE]
    done = subprocess.run(
        [*command, "--public_key", tmp_path / "key.pub"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_every_curve_of_the_format_can_sign(folder: Path, curve: ec.EllipticCurve) -> None:
    pair = make_key(curve)
    sign_folder(folder, SecretStr(pair.private))
    assert verify_folder(folder, pair.public) == []


@pytest.mark.parametrize(
    "lose",
    [str, str.strip, lambda pem: pem.replace("\n", "\\n"), lambda pem: pem.replace("\n", " ")],
)
def test_a_key_may_have_lost_its_line_breaks(folder: Path, lose: Callable[[str], str]) -> None:
    assert trusted_key(settings(lose(KEY.private))) == KEY.public
    assert trusted_key(settings(trusted_signer=lose(KEY.public))) == KEY.public
    sign_folder(folder, SecretStr(lose(KEY.private)))


def test_a_key_may_be_a_file(folder: Path, tmp_path: Path) -> None:
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_text(KEY.private)
    public.write_text(OTHER.public)
    sign_folder(folder, SecretStr(str(private)))
    assert trusted_key(settings(str(private))) == KEY.public
    assert trusted_key(settings(str(private), str(public))) == OTHER.public, "it outranks ours"


def test_without_a_key_nobody_is_trusted() -> None:
    assert trusted_key(settings()) == ""


BODY = "".join(KEY.private.splitlines()[1:-1])
BAD = {
    "broken": KEY.private.replace(BODY[10:20], ""),
    "encrypted": make_key(password=b"word").private,
    "public": KEY.public,
    "two": KEY.private + OTHER.private,
    "curve": make_key(ec.SECP256K1()).private,
    "no file": "/nowhere/key.pem",
    "body alone": BODY,
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_key_is_refused_without_being_shown(folder: Path, kind: str) -> None:
    given = settings(BAD[kind])
    for use in (lambda: sign_folder(folder, given.signing_key), lambda: trusted_key(given)):
        with pytest.raises(ConfigError, match="ASSAY_SIGNING_KEY must be") as raised:
            use()
        assert raised.value.__cause__ is None
        assert raised.value.__context__ is None, "a traceback would show it"
        assert BODY[30:60] not in str(raised.value)
        assert "/nowhere" not in str(raised.value)


@pytest.mark.parametrize("given", [KEY.private, "/nowhere/key.pub", "text"])
def test_what_is_no_public_key_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="ASSAY_TRUSTED_SIGNER must be") as raised:
        trusted_key(settings(trusted_signer=given))
    assert BODY[30:60] not in str(raised.value)


def test_a_key_lies_on_disk_only_while_it_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_signing._signing import sign_ec_key

    seen: list[tuple[int, int]] = []
    real = sign_ec_key.Signer

    def spy(path: Path, password: object) -> object:
        seen.append((path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777))
        return real(path, password)

    monkeypatch.setattr(sign_ec_key, "Signer", spy)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    old = os.umask(0)
    try:
        sign_folder(folder, SecretStr(KEY.private))
    finally:
        os.umask(old)
    assert seen == [(0o600, 0o700)]
    assert list((tmp_path / "temporary").iterdir()) == []
    assert b"PRIVATE" not in b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_two_keys_differ() -> None:
    assert isinstance(KEY, KeyPair)
    assert KEY != OTHER
