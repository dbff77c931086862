from importlib import metadata

try:
    __version__ = metadata.version("xenios")
except metadata.PackageNotFoundError:  # pragma: no cover - run from a tree that is not installed
    __version__ = "0"
