"""Whose keys open the gateway: from the environment and from files, known by their digests alone.

Knows no HTTP and enforces no limits: it says whose a key is and what its owner may. Without any configured, none is
asked for. No key, nor any part of one, is ever in a message, a repr or a log: a bad entry is told by its place. SHA-256
is enough for what `new_key` makes, of which there are 2^256; a password would need more.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gateway.ratelimit import MAX_LIMIT, UNLIMITED, Limits
from gateway.settings import SettingsError

log = logging.getLogger(__name__)

API_KEYS = "TRIPTYCH_API_KEYS"
API_KEYS_FILE = "TRIPTYCH_API_KEYS_FILE"
ADMIN_KEY = "TRIPTYCH_ADMIN_KEY"
ADMIN_KEY_FILE = "TRIPTYCH_ADMIN_KEY_FILE"
ADMIN = "admin"  # the name of the admin key that has no other
SHORTEST = 16
CHECK_S = 1.0  # a file is looked at so often at most
_MAX_FILE = 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
_LIMIT = re.compile(r"(rpm|concurrency)=([0-9]{1,10})")
_FORM = "NAME sha256:HEX [rpm=N] [concurrency=N], as `triptych key NAME` prints it"


@dataclass(frozen=True)
class Key:
    """Somebody who may ask."""

    name: str
    digest: bytes = field(repr=False)
    limits: Limits = UNLIMITED


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def new_key() -> str:
    return f"sk-{secrets.token_urlsafe(32)}"


def given_key(text: str) -> str:
    """One that somebody chose. Raises SettingsError if it is too easily guessed."""
    return _long_enough("stdin", text.strip())


def line_of(name: str, key: str, limits: Limits) -> str:
    """What a file holds for a key. Raises SettingsError for a name that no line can have."""
    if not _NAME.fullmatch(name):
        raise SettingsError("a key's name is 1 to 64 letters, digits, `_`, `.` and `-`")
    words = [name, f"sha256:{digest_of(key).hex()}"]
    words += [f"rpm={limits.requests_per_minute}"] if limits.requests_per_minute else []
    words += [f"concurrency={limits.concurrency}"] if limits.concurrency else []
    return " ".join(words)


class KeyFile:
    """A file of digests, read again when it has changed. One that went bad is reported, and what was read stays."""

    def __init__(self, variable: str, path: Path, limits: Limits, clock: Callable[[], float]) -> None:
        self._variable = variable
        self._path = path
        self._limits = limits
        self._clock = clock
        self._seen: tuple[int, ...] = ()
        self._checked = clock()
        self._keys: Sequence[Key] = ()
        self._read()
        if not self._keys:
            raise SettingsError(f"{variable}: {path} has no key; a line is {_FORM}")

    def keys(self) -> Sequence[Key]:
        now = self._clock()
        if now - self._checked >= CHECK_S:
            self._checked = now
            try:
                self._read()
            except SettingsError as error:
                log.warning("%s; the keys read before still hold", error)
        return self._keys

    def _read(self) -> None:
        try:
            found = self._path.stat()
            # A file replaced by another of the same size in the same instant still has another inode.
            seen = (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)
            if seen == self._seen:
                return
            self._seen = seen  # also of a file that cannot be used: it is reported once, not every second
            if found.st_size > _MAX_FILE:
                raise SettingsError(f"{self._variable}: {self._path} is larger than {_MAX_FILE} bytes")
            text = self._path.read_text("utf-8")
        except FileNotFoundError:
            self._lost("it does not exist")
        except OSError as error:
            self._lost(error.strerror or "it cannot be read")
        except UnicodeDecodeError:
            self._lost("it is not UTF-8")
        else:
            self._keys = self._parse(text)

    def _lost(self, why: str) -> None:
        if self._seen == (0,):
            return  # it was said
        if self._keys:
            self._seen = (0,)
        raise SettingsError(f"{self._variable}: {self._path} cannot be read: {why}")

    def _parse(self, text: str) -> Sequence[Key]:
        keys: dict[str, Key] = {}
        for number, line in enumerate(text.split("\n"), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            place = f"{self._variable}: line {number} of {self._path}"
            key = _key_of(words, self._limits)
            if key is None:
                raise SettingsError(f"{place} must be {_FORM}")
            if key.name in keys:
                raise SettingsError(f"{place} has the name of a line before it")
            keys[key.name] = key
        return tuple(keys.values())


def _key_of(words: Sequence[str], default: Limits) -> Key | None:
    name, *rest = words
    digest = _HASH.fullmatch(rest[0]) if rest else None
    if not digest or not _NAME.fullmatch(name):
        return None
    given: dict[str, int] = {}
    for word in rest[1:]:
        limit = _LIMIT.fullmatch(word)
        if not limit or limit[1] in given or int(limit[2]) > MAX_LIMIT:
            return None
        given[limit[1]] = int(limit[2])
    limits = Limits(given.get("rpm", default.requests_per_minute), given.get("concurrency", default.concurrency))
    return Key(name, bytes.fromhex(digest[1]), limits)


class Keys:
    """All that open the gateway, and those that administer it."""

    def __init__(
        self,
        fixed: Sequence[Key] = (),
        file: KeyFile | None = None,
        admin: Sequence[Key] = (),
        admin_file: KeyFile | None = None,
    ) -> None:
        self._fixed = tuple(fixed)
        self._file = file
        self._admin = tuple(admin)
        self._admin_file = admin_file

    @property
    def required(self) -> bool:
        """Whether a request needs one. An admin key alone does not close the gateway."""
        return bool(self._fixed) or self._file is not None

    def find(self, presented: str) -> Key | None:
        """Whose it is. The admin key opens whatever another does."""
        return _match(digest_of(presented), (*self._fixed, *self._of(self._file), *self._admins()))

    def is_admin(self, presented: str) -> bool:
        return _match(digest_of(presented), self._admins()) is not None

    def _admins(self) -> Sequence[Key]:
        return (*self._admin, *self._of(self._admin_file))

    @staticmethod
    def _of(file: KeyFile | None) -> Sequence[Key]:
        return file.keys() if file else ()

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] | None = None,
        limits: Limits = UNLIMITED,  # of a key that has none of its own
        clock: Callable[[], float] = time.monotonic,
    ) -> Keys:
        """From the variables that are set and not empty. Raises SettingsError, which names one of them."""
        environ = os.environ if environ is None else environ
        fixed = _from_list(environ[API_KEYS], limits) if environ.get(API_KEYS) else ()
        file = _file(API_KEYS_FILE, environ, limits, clock)
        admin = (
            [Key(ADMIN, digest_of(_long_enough(ADMIN_KEY, text.strip())))] if (text := environ.get(ADMIN_KEY)) else []
        )
        return cls(fixed, file, admin, _file(ADMIN_KEY_FILE, environ, UNLIMITED, clock))


def forget_secrets(environ: MutableMapping[str, str]) -> None:
    """So that no child process inherits a key."""
    for variable in (API_KEYS, ADMIN_KEY):
        environ.pop(variable, None)


def _match(digest: bytes, keys: Sequence[Key]) -> Key | None:
    """Compares with every one of them, each in constant time: how long it takes says nothing of which matched."""
    found = None
    for key in keys:
        if hmac.compare_digest(digest, key.digest):
            found = key
    return found


def _file(variable: str, environ: Mapping[str, str], limits: Limits, clock: Callable[[], float]) -> KeyFile | None:
    path = environ.get(variable)
    return KeyFile(variable, Path(path).expanduser(), limits, clock) if path else None


def _from_list(text: str, limits: Limits) -> Sequence[Key]:
    keys: dict[str, Key] = {}
    for number, entry in enumerate(filter(None, (part.strip() for part in text.split(","))), 1):
        name, colon, key = entry.partition(":")
        if not colon:
            name, key = f"key-{number}", entry
        if not _NAME.fullmatch(name):
            raise SettingsError(f"{API_KEYS}: entry {number}: a name is 1 to 64 letters, digits, `_`, `.` and `-`")
        if name in keys:
            raise SettingsError(f"{API_KEYS}: entry {number} has the name of one before it")
        keys[name] = Key(name, digest_of(_long_enough(f"{API_KEYS}: entry {number}", key)), limits)
    if not keys:
        raise SettingsError(f"{API_KEYS} has no key; it is a comma-separated list of KEY or NAME:KEY")
    return tuple(keys.values())


def _long_enough(place: str, key: str) -> str:
    if len(key) < SHORTEST or not re.fullmatch(r"[\x21-\x7e]+", key):
        raise SettingsError(
            f"{place}: a key is {SHORTEST} or more visible ASCII characters; `triptych key NAME` makes a good one"
        )
    return key
