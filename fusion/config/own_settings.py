"""Groups of settings in which a name selects the class that counts: `composition=NAME`, `method=NAME`.

Each name has a settings class with its own fields, defaults and checks. Hydra, YAML files and manifests hold the fields
of all classes in one flat group, so a key has one type and one default whatever the name is. `FlatGroup` refuses a
setting that the chosen class does not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from inspect import get_annotations
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from fusion.config.checks import as_stored, default_of, one_of
from fusion.errors import UserError
from fusion.text import override


@dataclass
class Settings:
    """Settings of one name of a group. A subclass that adds fields may word its own refusal of them."""

    # To a name without the field; {setting} is the override, {others} are the names that have the field.
    refusal: ClassVar[str] = (
        "{setting}: {group}={name} has no such setting; leave it out, or say {group}={others}"
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: names the override.
        """


class FlatGroup:
    """Base of a flat group: `name`, and the fields of all settings classes of the group."""

    if TYPE_CHECKING:  # `flat_group` sets them; annotations at run time would count as settings
        group: str  # its key in a command's config
        classes: Mapping[str, type[Settings]]
        default: str
        first: tuple[str, ...]  # fields that every manifest has
        name: str

    def __post_init__(self) -> None:
        one_of(self.group, self.name, tuple(self.classes))
        own = {f.name for f in fields(self.classes[self.name])}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if f.name != "name" and f.name not in own and value != default_of(f):
                raise UserError(self._refusal(f.name, value))
        self.settings  # noqa: B018  checks the values

    def _refusal(self, key: str, value: Any) -> str:
        having = {name: cls for name, cls in self.classes.items() if key in {f.name for f in fields(cls)}}
        first = next(iter(having.values()))
        defining: Any = next(cls for cls in first.__mro__ if key in get_annotations(cls))
        return defining.refusal.format(
            setting=override(f"{self.group}.{key}", value),
            group=self.group,
            name=self.name,
            others=" or ".join(having),
        )

    @property
    def settings(self) -> Any:
        """The chosen class's settings."""
        return self.values_for(self.classes[self.name])

    def values_for(self, cls: type[Settings]) -> Settings:
        """An object of one of the classes, its values checked."""
        return cls(**{f.name: getattr(self, f.name) for f in fields(cls)})

    @property
    def is_default(self) -> bool:
        """Whether the name is the one that counts where none is given."""
        return self.name == self.default

    def as_stored(self) -> dict[str, Any]:
        """As a manifest has it: every setting of the first release, later ones only where they are not the default.

        So an artifact that uses no later setting has the same hash in every version.
        """
        return as_stored(self, tuple(f.name for f in fields(self) if f.name not in self.first))  # type: ignore[arg-type]


def flat_group(
    group: str, classes: Mapping[str, type[Settings]], first: Sequence[str], later: Sequence[str] = ()
) -> Any:
    """A dataclass with `name` (by default the first one) and the fields of all `classes`.

    Args:
        first: fields that every manifest has, in their order there.
        later: fields that a manifest has only where they are not the default; any others follow these.

    Raises:
        TypeError: two classes have a field of one name with different types or defaults.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for cls in classes.values():
        for name, kind, default in _fields(cls):
            if found.setdefault(name, (kind, default)) != (kind, default):
                raise TypeError(f"{group}.{name}: {cls.__name__} gives it another type or default")
    order = [name for name in (*first, *later) if name in found]
    order += [name for name in found if name not in order]

    def made(default: Any) -> Any:
        return field(default_factory=default.copy) if isinstance(default, list) else field(default=default)

    default = next(iter(classes))
    return make_dataclass(
        f"Flat{group.capitalize()}",
        [("name", str, made(default)), *((name, found[name][0], made(found[name][1])) for name in order)],
        bases=(FlatGroup,),
        namespace={
            "group": group,
            "classes": classes,
            "default": default,
            "first": tuple(first),
        },
    )


def _fields(cls: type[Settings]) -> Iterator[tuple[str, Any, Any]]:
    """Name, type and default of each field."""
    types = get_type_hints(cls)
    for f in fields(cls):
        yield f.name, types[f.name], default_of(f)
