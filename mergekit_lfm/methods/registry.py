"""The registry of merge methods: every `METHODS` tuple of the files beside this one."""

from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType

from mergekit_lfm.methods.method import Method


def _collect() -> dict[str, Method]:
    package = __name__.rpartition(".")[0]
    modules = [import_module(f"{package}.{m.name}") for m in iter_modules(import_module(package).__path__)]
    found: dict[str, Method] = {}
    for method in (m for module in modules for m in getattr(module, "METHODS", ()) if isinstance(m, Method)):
        if method.name in found:
            raise RuntimeError(f"two merge methods are called {method.name}")
        found[method.name] = method
    return dict(sorted(found.items()))


METHODS = MappingProxyType(_collect())
