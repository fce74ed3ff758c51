"""How the gateway listens: uvicorn's configuration, TLS, and the file descriptors that connections need.

Knows no route. What cannot be used is a sentence at the start, not an error of the first client's.
"""

from __future__ import annotations

import ipaddress
import logging
import resource
import ssl
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from gateway.bounded import Connections
from gateway.settings import PREFIX, Settings, SettingsError

log = logging.getLogger(__name__)

_OTHER_FILES = 256  # that the process has open beside connections


def configure(app: ASGIApp, settings: Settings, **options: Any) -> uvicorn.Config:
    """Raises SettingsError for TLS files that cannot be used."""
    check_tls(settings)
    protocol: Any = Connections(settings)  # uvicorn calls it, as it would the class of one
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # a client is who is connected; nobody is believed who says that it is another
        ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None,
        **options,
    )


def check_tls(settings: Settings) -> None:
    if not settings.tls_cert:
        return
    for name, path in (("TLS_CERT", settings.tls_cert), ("TLS_KEY", settings.tls_key)):
        try:
            if path:
                open(path, "rb").close()
        except OSError as error:
            raise SettingsError(f"{PREFIX}{name}: {path} cannot be read: {error.strerror}") from None

    def no_password() -> str:  # else OpenSSL asks for it at the terminal, and waits
        raise SettingsError(f"{PREFIX}TLS_KEY: the key is encrypted: give one without a password")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            settings.tls_cert, settings.tls_key or None, no_password
        )
    except ssl.SSLError as error:
        why = (
            "the key is not the certificate's" if error.reason == "KEY_VALUES_MISMATCH" else "not PEM, or no such pair"
        )
        pair = f"{settings.tls_cert} and {settings.tls_key}" if settings.tls_key else settings.tls_cert
        raise SettingsError(f"{PREFIX}TLS_CERT and {PREFIX}TLS_KEY: {pair} cannot be used: {why}") from None


def raise_file_limit(settings: Settings) -> None:
    """As many files as the connections need, where the system allows them; else it is said that there are fewer."""
    wanted = settings.max_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning(
            "%sMAX_CONNECTIONS = %d needs %d open files, and the system allows %d",
            PREFIX,
            settings.max_connections,
            wanted,
            allowed,
        )


def warn_if_open(settings: Settings, *, keys_required: bool) -> None:
    """An address that others reach, and no key."""
    try:
        private = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        private = settings.host == "localhost"
    if not private and not keys_required:
        log.warning("anyone who reaches %s may use it: set TRIPTYCH_API_KEYS_FILE", settings.url)
