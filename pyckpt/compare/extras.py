"""A clear error when an optional dependency is missing."""

from __future__ import annotations

from importlib.util import find_spec


def require(what: str, module: str) -> None:
    """Raise RuntimeError naming ``module`` and the pip extra that has it, when it is not installed."""
    if find_spec(module) is None:
        raise RuntimeError(f"{what} needs {module}: pip install 'pyckpt[train]'")
