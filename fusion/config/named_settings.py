"""Groups in which a name selects an entry of a table: `composition=NAME`, `method=NAME`.

The settings of all names are fields of one class, so a key has one type and one default whatever the name is. Each
entry of the table lists the settings that apply to it; the others must keep their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from fusion.config.fields import Settings, as_stored, default_of
from fusion.errors import UserError
from fusion.text import override


@dataclass
class NamedSettings(Settings):
    """Class attributes:
    table: the entry of each name, with its own `settings`; the first name is the default.
    common: settings that apply to every name.
    first: settings that every manifest has, see `as_stored`.
    """

    if TYPE_CHECKING:  # annotations at run time would make settings of them
        table: ClassVar[Mapping[str, Any]]
        common: ClassVar[tuple[str, ...]]
        first: ClassVar[tuple[str, ...]]
        name: str

    def __post_init__(self) -> None:
        if self.name not in self.table:
            names = ", ".join(self.table)
            raise UserError(f"{override(self.group, self.name)}: expected one of {names}")
        super().__post_init__()
        applicable = (*self.common, *self.table[self.name].settings)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in applicable and value != default_of(f):
                names = " or ".join(name for name, entry in self.table.items() if f.name in entry.settings)
                raise UserError(
                    f"{override(f'{self.group}.{f.name}', value)}: {self.group}={self.name} has no such setting; "
                    f"leave it out, or use {self.group}={names}"
                )

    @property
    def is_default(self) -> bool:
        """Whether the name is the one that counts where none is given."""
        return self.name == next(iter(self.table))

    def as_stored(self) -> dict[str, Any]:
        return as_stored(self, self.first)
