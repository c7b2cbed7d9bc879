"""Named entries that plugins contribute."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from ezhoi_diffusion.errors import EzhoiDiffusionError

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class RegistryError(EzhoiDiffusionError):
    """A name was registered twice, or asked for and never registered."""


class Register(Protocol[T_contra]):
    """The function that a `register_*` hook receives: register(name, entry)."""

    def __call__(self, name: str, entry: T_contra) -> None:
        """Contribute `entry` under `name`."""


class Registry(Generic[T]):
    """Entries of one kind by name. Every use makes its own: there is no global registry."""

    def __init__(self, kind: str, entries: dict[str, T]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def register(self, name: str, entry: T) -> None:
        """Add `entry`. Raises RegistryError where the name is taken."""
        if name in self._entries:
            raise RegistryError(f"{self.kind} {name!r} is registered already: choose another name")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        """Return the entry. Raises RegistryError, which lists the known names, where there is none."""
        if name not in self._entries:
            known = ", ".join(self.names())
            raise RegistryError(
                f"unknown {self.kind} {name!r}: known are {known}. Is the plugin that provides it installed?"
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)
