"""Certificates and keys for one machine, as a trial and the server's own link need them.

Each function writes into a folder that its owner alone may read.
"""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509 import (
    BasicConstraints,
    CertificateBuilder,
    DNSName,
    IPAddress,
    Name,
    NameAttribute,
    NameOID,
    SubjectAlternativeName,
    random_serial_number,
)


def write_certificate(folder: Path, host: str = "127.0.0.1") -> tuple[Path, Path]:
    """Write a server's certificate for an IP address and this machine, and its private key.

    The certificate is signed by itself, so it is also the root certificate that clients trust. It
    is valid for ten years, because a server runs for long.
    """
    key, now = ec.generate_private_key(ec.SECP384R1()), datetime.now(UTC)
    name = Name([NameAttribute(NameOID.COMMON_NAME, "localhost")])
    # Clients compare the address with these names, not with the common name.
    hosts = SubjectAlternativeName([DNSName("localhost"), IPAddress(ip_address(host))])
    certificate = (
        CertificateBuilder(name, name, key.public_key(), random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=3650))
        .add_extension(BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(hosts, critical=False)
        .sign(key, SHA384())
    )
    path = folder / "server.pem"
    path.write_bytes(certificate.public_bytes(Encoding.PEM))
    return path, _write_private(folder / "server.key", key, PrivateFormat.PKCS8)


def write_node_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Write a SuperNode's private and public key, as ``ssh-keygen -t ecdsa -b 384`` does."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = folder / f"{name}.pub"
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return _write_private(folder / f"{name}.key", key, PrivateFormat.OpenSSH), public


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> Path:
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))
    return path
