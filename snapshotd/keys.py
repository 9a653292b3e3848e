"""A node's keys, and the TLS contexts that are made of them.

Each daemon draws its own: a Curve25519 pair for its messages, a self-signed certificate for its byte streams. Nobody
signs anything: others are told the public parts (`wire.Badge`) by whoever they believe already, and pin exactly those.
Private keys live in memory and in the daemon's own directory on tmpfs, mode 0600, as long as the node's identity.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import ssl
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from snapshotd.wire import Badge

_SEAL_BYTES, _CURVE_BYTES = 4, 32
_EPOCH, _FOR_EVER = datetime.datetime(2000, 1, 1), datetime.datetime(9999, 12, 31, 23, 59, 59)


class Keys(msgspec.Struct, frozen=True):
    """Both halves of both pairs. `pem` has the certificate and its private key."""

    badge: Badge
    curve_secret: bytes
    pem: bytes

    @classmethod
    def draw(cls, name: str) -> Keys:
        """New ones. `name` stands in the certificate, for people who look at it; nothing is believed because of it."""
        from cryptography import x509  # takes time and memory, and is needed once in a node's life
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec, x25519
        from cryptography.x509.oid import NameOID

        curve, key = x25519.X25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            # It is believed because it was told, for as long as it is; clocks of nodes differ.
            .not_valid_before(_EPOCH)
            .not_valid_after(_FOR_EVER)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        encoding = serialization.Encoding
        private = key.private_bytes(encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return cls(
            Badge(curve.public_key().public_bytes_raw(), certificate.public_bytes(encoding.DER)),
            curve.private_bytes_raw(),
            certificate.public_bytes(encoding.PEM) + private,
        )

    def packed(self) -> bytes:
        """What `unpacked` reads again."""
        return sealed(msgspec.msgpack.encode(self))

    @classmethod
    def unpacked(cls, data: bytes) -> Keys | None:
        """None where these are no keys, or not any more: whoever reads them draws new ones."""
        body = data[_SEAL_BYTES:]
        if data != sealed(body):
            return None
        try:
            found = msgspec.msgpack.decode(body, type=cls)
            _context(ssl.PROTOCOL_TLS_SERVER, found.pem)
            pin(found.pem, found.badge.certificate)
        except (msgspec.DecodeError, UnicodeDecodeError, ssl.SSLError):
            return None
        return found if len(found.curve_secret) == _CURVE_BYTES else None


def sealed(body: bytes) -> bytes:
    """With a checksum before it: a file on tmpfs is memory, in which bits flip."""
    return zlib.crc32(body).to_bytes(_SEAL_BYTES, "little") + body


class Pin(NamedTuple):
    """How a stream is opened to one node and to no other: it must show this certificate."""

    context: ssl.SSLContext
    certificate: bytes


def pin(pem: bytes, certificate: bytes) -> Pin:
    """For a reader with the key `pem`, to the node of that certificate. ssl.SSLError for one that is none."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, pem)
    context.load_verify_locations(cadata=certificate)
    return Pin(context, certificate)


def serving(pem: bytes, believed: Iterable[bytes]) -> ssl.SSLContext:
    """For a server with the key `pem`: who has none of these certificates is turned away.

    What is none, whoever said that it was one, keeps nobody else out."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, pem)
    context.num_tickets = 0  # nobody resumes, and an idle stream stays silent
    for certificate in believed:
        with contextlib.suppress(ssl.SSLError):
            context.load_verify_locations(cadata=certificate)
    return context


def _context(side: int, pem: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # nodes have no names that anybody vouches for; their certificates are pinned
    context.verify_mode = ssl.CERT_REQUIRED
    fd = os.memfd_create("snapshotd-key", os.MFD_CLOEXEC)  # `ssl` takes files only, and a disk must not see it
    try:
        os.write(fd, pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}", password="")  # without one, `ssl` might ask a terminal for it
    finally:
        os.close(fd)
    return context
