"""What a server may be told: where it listens, how much it takes in, and who may ask."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtuning_fast.method.settings import check_settings, documented, setting, settings_of

MOST_TEXTS_TOGETHER = 1024
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@documented
@dataclass(frozen=True)
class ServingOptions:
    """Where a server listens, how much it takes in, and who may ask.

    Raises:
        TypeError, ValueError: an option has a wrong value; the message names the option.
    """

    host: str = setting("127.0.0.1", "Address to listen on; another than this machine's own needs a key.")
    port: int = setting(8000, "Port to listen on.")
    replicas: int = setting(1, "Processes that hold the model.", "A request goes to the one with least to do.")
    threads: int | None = setting(None, "CPU threads of a replica; default: all cores, shared among the replicas.")
    gpus: float | None = setting(None, "GPUs of a replica, or a share of one; default 1 if there is one.")
    batch: int = setting(32, "Texts in a batch at most, of any tasks.")
    queue: int = setting(256, "Requests that may wait; beyond that, 503.", least=0)
    timeout: float = setting(30.0, "Seconds until a request gets 504; a request may ask for less.")
    drain: float = setting(30.0, "Seconds that requests in flight have to finish after Ctrl-C or SIGTERM.")
    max_texts: int = setting(64, "Texts in a request at most.")
    max_characters: int = setting(20_000, "Characters of a text at most.")
    max_body_kb: int = setting(1024, "Size of a request's body at most, in KB.")
    max_adapter_mb: int = setting(16, "Size of an adapter that is sent at most, in MB, with its statistics.")
    max_tasks: int = setting(10_000, "Tasks at most, those of the run included.")
    device_mb: int = setting(512, "Room on the device for adapters, in MB.", "It bounds the tasks of one batch.")
    host_mb: int = setting(1024, "Room in the host's memory for adapters, in MB.", "Others are read when needed.")
    adapters: str | None = setting(
        None,
        "Folder for adapters that are added; default RUN/served.",
        "All replicas read and write it, so on a cluster it must be the same folder on every node.",
    )
    keys_file: str | None = setting(None, "File of keys, one a line; or set QTUNING_FAST_KEYS.")
    admin_keys_file: str | None = setting(None, "The same for administration; or set QTUNING_FAST_ADMIN_KEYS.")
    without_keys: bool = setting(False, "Let anyone who reaches --host ask, without a key.")
    metrics_port: int = setting(8081, "Port of the Prometheus metrics.")
    metrics_by_task: bool = setting(False, "Count texts by task, one series for each.")

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("port", "metrics_port"):
            if getattr(self, name) > 65_535:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 65535 at most")
        for name in ("timeout", "drain"):
            if not getattr(self, name):
                raise ValueError(f"{name} is 0; it must be positive")
        for name in ("batch", "max_texts"):
            if getattr(self, name) > MOST_TEXTS_TOGETHER:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {MOST_TEXTS_TOGETHER} at most")
        if self.device_mb < 2 * self.max_adapter_mb:  # a slot has the rows of one adapter and the classes of another
            raise ValueError(
                f"device_mb is {self.device_mb}; it must be twice max_adapter_mb at least, {2 * self.max_adapter_mb}"
            )
        if self.port == self.metrics_port:
            raise ValueError(f"metrics_port is {self.metrics_port}, and so is port; choose another")
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus is {self.gpus}; it must be a share of one GPU, or a whole number")
        if not self.host.strip():
            raise ValueError("host is empty; it must be an address or a name, such as 127.0.0.1")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def check_reachable(self, *, has_keys: bool) -> None:
        """Raise a ValueError if anyone on the network could ask without a key, and nobody said that this is meant."""
        if not (self.is_loopback or has_keys or self.without_keys):
            raise ValueError(
                f"host is {self.host!r}, which others reach, but there is no key: set QTUNING_FAST_KEYS or "
                "--keys-file, or pass --without-keys if anyone may ask"
            )

    @classmethod
    def from_words(cls, words: Mapping[str, str]) -> ServingOptions:
        """The options of `name=value` words, as `serve run` hands them over.

        Raises:
            TypeError, ValueError: an option is unknown or has a wrong value.
        """
        known = {each.name: each.kind for each in settings_of(cls)}
        unknown = sorted(set(words) - set(known))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no such option; there are {', '.join(known)}")
        return cls(**{name: _value(name, str(word), known[name]) for name, word in words.items()})


def _value(name: str, word: str, kind: Any) -> Any:
    """Return a word as a value of a setting's type."""
    if kind is bool:
        if word.lower() not in _WORDS:
            raise ValueError(f"{name} is {word!r}; it must be true or false")
        return _WORDS[word.lower()]
    for number in (int, float):
        if kind in (number, number | None):
            try:
                return number(word)
            except ValueError:
                raise ValueError(
                    f"{name} is {word!r}; it must be {'an integer' if number is int else 'a number'}"
                ) from None
    return word
