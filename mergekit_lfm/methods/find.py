"""Find the methods that the files of a package declare."""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Protocol, TypeVar


class _Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=_Named)


def find_methods(package: str, kind: type[N]) -> Mapping[str, N]:
    """The methods of this kind that the files of a package declare in their tuples `METHODS`, by name."""
    modules = [import_module(f"{package}.{module.name}") for module in iter_modules(import_module(package).__path__)]
    found: dict[str, N] = {}
    for method in (m for module in modules for m in getattr(module, "METHODS", ()) if isinstance(m, kind)):
        if method.name in found:
            raise RuntimeError(f"two methods of {package} are called {method.name}")
        found[method.name] = method
    return MappingProxyType(dict(sorted(found.items())))
