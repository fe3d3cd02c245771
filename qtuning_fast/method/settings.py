"""Settings declared once: a dataclass's fields carry their help and their limits beside their default.

The checks, the options of the command line, the docstring and the table in docs/recipes/lifelong.md derive from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from inspect import cleandoc
from typing import Any, TypeVar, get_type_hints

Default = TypeVar("Default")
Settings = TypeVar("Settings")

ALWAYS_WRITTEN: Any = object()  # as `absent` of a setting: a file without it means the default


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass of settings.

    Args:
        name: of the field.
        kind: its type.
        default: its default.
        help: one line, as `--help` shows it.
        more: further sentences, for readers of Python and of the docs.
        least: the least value of an integer.
        choices: all values that it can have; empty where it has no such list.
        absent: what a file without the setting means, since it was written before the setting was there. A file does
            not have a setting with this value, so that earlier versions can read it.
    """

    name: str
    kind: Any
    default: Any
    help: str
    more: str
    least: int
    choices: tuple[str | None, ...]
    absent: Any

    def check(self, value: object) -> None:
        """Refuse a value of the wrong type or out of range.

        Raises:
            TypeError, ValueError: the message names the setting, the value and what it must be.
        """
        if self.choices and value not in self.choices:
            raise ValueError(f"{self.name} is {value!r}; it must be one of {', '.join(map(repr, self.choices))}")
        if self.kind is bool and not isinstance(value, bool):
            raise TypeError(f"{self.name} is {value!r}; it must be True or False")
        if self.kind is int or (self.kind == int | None and value is not None):
            check_integer(self.name, value, self.least)
        if self.kind is float or (self.kind == float | None and value is not None):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{self.name} is {value!r}; it must be a number")
            if not 0 <= value < float("inf"):
                raise ValueError(f"{self.name} is {value}; it must be finite and not negative")


def setting(
    default: Default,
    help: str,
    more: str = "",
    *,
    least: int = 1,
    choices: Sequence[str | None] = (),
    absent: Any = ALWAYS_WRITTEN,
) -> Default:
    """Declare a field of a dataclass of settings; see `Setting`. `{choices}` in `help` becomes their list."""
    metadata = {"help": help.format(choices=_listed(choices)), "more": more, "least": least, "choices": tuple(choices)}
    return field(default=default, metadata=metadata | {"absent": absent})


def settings_of(dataclass_type: type) -> Iterator[Setting]:
    """The settings of a dataclass, in order."""
    kinds = get_type_hints(dataclass_type)
    for each in fields(dataclass_type):
        yield Setting(each.name, kinds[each.name], each.default, **each.metadata)


def check_settings(settings: Any) -> None:
    """Check every setting of a dataclass's instance; raises what `Setting.check` raises."""
    for each in settings_of(type(settings)):
        each.check(getattr(settings, each.name))


def to_file(settings: Any) -> dict[str, Any]:
    """Return the settings as plain JSON values, without those whose value is what their absence means."""
    values = {each: getattr(settings, each.name) for each in settings_of(type(settings))}
    return {
        each.name: list(value) if isinstance(value, tuple) else value
        for each, value in values.items()
        if each.absent is ALWAYS_WRITTEN or value != each.absent
    }


def in_full(dataclass_type: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `to_file` wrote with what is absent from it."""
    absent = {each.name: each.absent for each in settings_of(dataclass_type) if each.absent is not ALWAYS_WRITTEN}
    return absent | dict(values)


def from_file(dataclass_type: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Return the settings that `to_file` wrote, here or in an earlier version.

    Raises:
        TypeError, ValueError: a setting is unknown or wrong; the message names it.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"the {dataclass_type.__name__} in a file is a {type(values).__name__}; it must be a dict")
    known = {each.name: each for each in settings_of(dataclass_type)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown fields in the {dataclass_type.__name__}: {', '.join(unknown)}")
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return dataclass_type(**in_full(dataclass_type, lists))


def check_integer(name: str, value: object, least: int) -> None:
    """Raise a `TypeError` if a value is not an integer, and a `ValueError` if it is below `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be an integer")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def documented(dataclass_type: type[Settings]) -> type[Settings]:
    """Append the settings to the dataclass's docstring, for `help()`."""
    lines = [f"    {each.name}: {' '.join((each.help, each.more)).strip()}" for each in settings_of(dataclass_type)]
    dataclass_type.__doc__ = "\n".join([cleandoc(dataclass_type.__doc__ or ""), "", "Args:", *lines])
    return dataclass_type


def _listed(choices: Sequence[str | None]) -> str:
    """The choices as a user types them: `a, b or none`."""
    *most, last = [each or "none" for each in choices] or [""]
    return f"{', '.join(most)} or {last}" if most else last
