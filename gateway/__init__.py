"""Xenios: a plugin-based LLM gateway. What stands here is what plugins may import, and is kept stable."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway._version import __version__ as __version__
    from gateway.surface import *  # noqa: F403 - the names are those of its `__all__`


def __getattr__(name: str) -> Any:
    """A name of `surface.py`: the command line's help would take a second if it loaded all that stands behind them."""
    if name == "__version__":
        from gateway._version import __version__  # noqa: PLC0415 - it asks the installed packages

        return __version__
    if name != "__all__" and (name.startswith("_") or find_spec(f"gateway.{name}") is not None):
        raise AttributeError(f"module 'gateway' has no attribute {name!r}")  # a module, which `import` loads
    from gateway import surface  # noqa: PLC0415 - see above

    found = [*surface.__all__, "__version__"] if name == "__all__" else getattr(surface, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
