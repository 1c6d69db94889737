"""The version of this package, and the versions that a result depends on. It imports nothing of the package."""

__version__ = "0.1.0"


def versions(*packages: str) -> dict[str, str]:
    """The version of this package and of others, by name, as files record them."""
    from importlib.metadata import version  # takes longer than all that --help imports

    return {"mergekit_lfm": __version__, **{name: version(name) for name in packages}}
