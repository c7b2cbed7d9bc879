"""Names for things that plugins may contribute."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from ezhoi_diffusion.errors import EzhoiDiffusionError

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class RegistryError(EzhoiDiffusionError):
    """A name was registered twice, or asked for and never registered."""


class Register(Protocol[T_contra]):
    """What a `register_*` hook is handed: call it as register(name, entry)."""

    def __call__(self, name: str, entry: T_contra) -> None:
        """Contribute `entry` under `name`."""


class Registry(Generic[T]):
    """Things of one kind by name. Made afresh for every use and handed on: nothing global changes."""

    def __init__(self, kind: str, entries: dict[str, T]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def register(self, name: str, entry: T) -> None:
        """Contribute `entry`. Raises RegistryError where the name is taken."""
        if name in self._entries:
            raise RegistryError(f"{self.kind} {name!r} is registered already: choose another name")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        """The entry. Raises RegistryError, which lists the known names, where there is none."""
        if name not in self._entries:
            known = ", ".join(self.names())
            raise RegistryError(
                f"unknown {self.kind} {name!r}: known are {known} (is the plugin that brings it installed?)"
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)
