"""A clear error, before any work, when an optional dependency is missing."""

from __future__ import annotations

from importlib.util import find_spec


def require(what: str, *modules: str) -> None:
    """Raise RuntimeError naming those of `modules` that are not installed and the pip extra that has them."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise RuntimeError(f"{what} needs {', '.join(missing)}: pip install 'pyckpt[train]'")
