"""Keys of an API: read from a file or the environment, kept as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path

from qtuning_fast.serving.options import ServingOptions

ASKING, ADMINISTRATION = "QTUNING_FAST_KEYS", "QTUNING_FAST_ADMIN_KEYS"
LEAST_CHARACTERS = 16


@dataclass(frozen=True)
class Keys:
    """The digests of keys. A key of administration asks questions, too.

    Attributes:
        asking: of the keys that may ask; with no key at all, anyone may.
        administration: of the keys that may add and remove adapters.
        anyone_administrates: whether that needs no key: on this machine alone, where there are no keys at all.
    """

    asking: tuple[bytes, ...] = ()
    administration: tuple[bytes, ...] = ()
    anyone_administrates: bool = False

    @classmethod
    def read(cls, options: ServingOptions) -> Keys:
        """Read the keys of these options and of the environment.

        Raises:
            OSError, ValueError: a file cannot be read or holds no key, a key is too short, or there is none but others
                reach the server.
        """
        asking = _digests(options.keys_file, "keys_file", ASKING)
        administration = _digests(options.admin_keys_file, "admin_keys_file", ADMINISTRATION)
        if asking and options.without_keys:
            raise ValueError("without_keys lets anyone ask, but there are keys; leave out one of them")
        if administration and not asking and not options.without_keys:
            asking = administration  # else a server with a key of administration would answer anyone
        keys = cls(asking, administration, options.is_loopback and not (asking or administration))
        options.check_reachable(has_keys=bool(asking))
        return keys

    def may_ask(self, authorization: str) -> bool:
        """Whether a request with this `Authorization` header may ask questions."""
        return not self.asking or _is_among(authorization, self.asking + self.administration)

    def may_administrate(self, authorization: str) -> bool:
        """Whether it may add and remove adapters."""
        return self.anyone_administrates or _is_among(authorization, self.administration)


def _digests(file: str | None, option: str, variable: str) -> tuple[bytes, ...]:
    """Return the digests of the keys in a file, or in an environment variable."""
    if file is not None:
        where, text = f"{option} {file}", Path(file).read_text()
        if not text.split():
            raise ValueError(f"{where} holds no key; write one a line")
    else:
        where, text = variable, os.environ.get(variable, "")
    keys = text.replace(",", " ").split()
    for place, key in enumerate(keys):
        if len(key) < LEAST_CHARACTERS or not key.isascii():
            raise ValueError(
                f"{where}: key {place + 1} must have {LEAST_CHARACTERS} ASCII characters at least; "
                "`python -c 'import secrets; print(secrets.token_urlsafe())'` makes one"
            )
    return tuple(_digest(key) for key in keys)


def _is_among(authorization: str, digests: tuple[bytes, ...]) -> bool:
    """Whether a header holds one of the keys; it takes as long whichever it is, and however much of it is right."""
    kind, _, key = authorization.partition(" ")
    given, found = _digest(key.strip()), False
    for digest in digests:
        found |= hmac.compare_digest(given, digest)
    return found and kind.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
