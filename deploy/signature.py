"""Sign a bundle with Ed25519, and check who signed it.

What is signed is `manifest.json`, byte for byte, and that names every file by its SHA-256. `manifest.json.sig` holds
the 64 bytes of the signature, nothing else, so that OpenSSL can check it as well:

    openssl pkeyutl -verify -rawin -in manifest.json -sigfile manifest.json.sig -pubin -inkey public.pem
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.finish import check_files
from deploy.manifest import FILE_NAME, SIGNATURE_NAME, read_manifest
from profiles.errors import GpusqError

_EXTRA = "pip install 'gpusq[sign]'"
_MAKE_KEY = "openssl genpkey -algorithm ed25519 -out key.pem"
_MAKE_PUBLIC = "openssl pkey -in key.pem -pubout -out public.pem"


def sign(bundle: Path, key: Path) -> Path:
    """Sign `bundle` with the private key in the PEM file `key`; return the file of the signature.

    Raises:
        GpusqError: it is no bundle, a file in it was changed, `key` is no such key, or `cryptography` is missing.
    """
    check_files(bundle, read_manifest(bundle))
    private = _private_key(key)
    signature: bytes = private.sign((bundle / FILE_NAME).read_bytes())
    path = bundle / SIGNATURE_NAME
    half = path.with_name(f".{SIGNATURE_NAME}.new")
    half.write_bytes(signature)
    half.replace(path)
    return path


def check_signature(bundle: Path, public_key: Path) -> None:
    """Check that the owner of `public_key`, a PEM file, signed `bundle`.

    Raises:
        GpusqError: there is no signature, it is another's or of other bytes, or `public_key` is no such key.
    """
    public = _public_key(public_key)
    path = bundle / SIGNATURE_NAME
    if not path.is_file():
        raise GpusqError(f"{bundle} is not signed", hint="`gpusq sign BUNDLE --key key.pem` signs it")
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(path.read_bytes(), (bundle / FILE_NAME).read_bytes())
    except InvalidSignature:
        raise GpusqError(
            f"{bundle} was not signed by the key in {public_key}, or was changed since",
            hint="do not use it: get it again from its source",
        ) from None


def _private_key(path: Path) -> Any:
    ed25519, serialization = _cryptography()
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except TypeError:
        raise GpusqError(f"{path} is encrypted", hint="decrypt it: openssl pkey -in key.pem -out plain.pem") from None
    except ValueError:
        key = None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise GpusqError(f"{path} is no private Ed25519 key in PEM", hint=f"make one: {_MAKE_KEY}")
    return key


def _public_key(path: Path) -> Any:
    ed25519, serialization = _cryptography()
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except ValueError:
        key = None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise GpusqError(f"{path} is no public Ed25519 key in PEM", hint=f"make one: {_MAKE_PUBLIC}")
    return key


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise GpusqError("signatures need the package cryptography", hint=_EXTRA) from None
    return ed25519, serialization
