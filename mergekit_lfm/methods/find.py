"""Find the methods that the files of a package declare, and those of other packages."""

from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Protocol, TypeVar

from mergekit_lfm.errors import PlanError, reason


class _Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=_Named)

# The errors that the code of another package may raise while it is imported.
BROKEN: tuple[type[Exception], ...] = (ImportError, AttributeError, ArithmeticError, AssertionError, LookupError)
BROKEN += (NameError, OSError, RuntimeError, SyntaxError, TypeError, ValueError)


def find_methods(package: str, kind: type[N]) -> Mapping[str, N]:
    """The methods of this kind that the files of a package declare in their tuples `METHODS`, by name."""
    modules = [import_module(f"{package}.{module.name}") for module in iter_modules(import_module(package).__path__)]
    found: dict[str, N] = {}
    for method in (m for module in modules for m in getattr(module, "METHODS", ()) if isinstance(m, kind)):
        if method.name in found:
            raise RuntimeError(f"two methods of {package} are called {method.name}")
        found[method.name] = method
    return MappingProxyType(dict(sorted(found.items())))


def with_others(own: Mapping[str, N], kind: type[N], points: Iterable[EntryPoint]) -> Mapping[str, N]:
    """These methods and those of other packages, whose entry points name modules with a tuple `METHODS`.

    Raises PlanError for a module that cannot be imported or has no such tuple, and for a name that is taken.
    """
    found = dict(own)
    for point in sorted(points, key=lambda point: point.value):
        place = f"{point.value} of the package {point.dist.name if point.dist else point.name}"
        try:
            methods = tuple(point.load().METHODS)
        except BROKEN as error:
            raise PlanError(f"{place} cannot be read for methods: {reason(error)}; repair or uninstall it") from None
        for method in methods:
            if not isinstance(method, kind):
                raise PlanError(f"{place} has {method!r} among its METHODS, expected only a {kind.__name__}")
            if method.name in found:
                raise PlanError(f"{place} has a method {method.name!r}, and there is one of this name; rename it")
            found[method.name] = method
    return MappingProxyType(dict(sorted(found.items())))
