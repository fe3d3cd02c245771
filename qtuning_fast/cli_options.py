"""Settings as options of a command: each field of a dataclass of settings becomes one, read back as typer gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, Signature, signature
from typing import Annotated, Any

import typer

from qtuning_fast.method.settings import Setting, settings_of

_INDICES, _REPEATED = tuple[int, ...] | None, tuple[str, ...]  # types of settings that options spell differently


@dataclass(frozen=True)
class Options:
    """A dataclass of settings as options of a command.

    Args:
        settings: the dataclass.
        panel: the heading of its options in `--help`.
        left_out: settings without an option.
        defaults: for a setting whose default the command computes, its text in `--help`; the option defaults to None.
    """

    settings: type
    panel: str
    left_out: tuple[str, ...] = ()
    defaults: Mapping[str, str] = field(default_factory=dict)

    def parameters(self) -> Iterator[Parameter]:
        """Yield the options as function parameters, which typer reads."""
        for each in self._options():
            name, kind, default, text = each.name, each.kind, each.default, each.help
            flags: tuple[str, ...] = ()
            if name in self.defaults:
                kind, default, text = kind | None, None, f"{text.rstrip('.')}; {self.defaults[name]}."
            elif None in each.choices:
                kind, default = str, default or "none"
            elif kind == _INDICES:
                kind = str | None
            elif kind == _REPEATED:
                kind, default, flags = list[str] | None, None, (f"--{name.removesuffix('s').replace('_', '-')}",)
            option = typer.Option(*flags, help=text, rich_help_panel=self.panel)
            yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])

    def read(self, given: Mapping[str, Any], **more: Any) -> Any:
        """Build the settings from the values on the command line; raise what the dataclass raises.

        Args:
            given: the values by name.
            more: settings that have no option, or another value than on the command line.
        """
        return self.settings(**{each.name: _read(each, given[each.name]) for each in self._options()} | more)

    def _options(self) -> list[Setting]:
        return [each for each in settings_of(self.settings) if each.name not in self.left_out]


def _read(option: Setting, given: Any) -> Any:
    """Convert the value of an option to that of its setting."""
    if None in option.choices:
        return None if given == "none" else given
    if option.kind == _REPEATED:
        return tuple(given or ())
    if option.kind == _INDICES and given is not None:
        try:
            return tuple(int(index) for index in given.split(","))
        except ValueError:
            raise ValueError(f"{option.name} is {given!r}; it must be indices such as 0,1,2") from None
    return given


def with_options(*groups: Options) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add options for these settings to a command, which receives them as `**given`."""

    def extended(command: Any) -> Any:
        own = signature(command, eval_str=True).parameters.values()
        named = [each for each in own if each.kind is not Parameter.VAR_KEYWORD]
        added = [parameter for group in groups for parameter in group.parameters()]
        command.__signature__ = Signature([each.replace(kind=Parameter.KEYWORD_ONLY) for each in named] + added)
        return command

    return extended
