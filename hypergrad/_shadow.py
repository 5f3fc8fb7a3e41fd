"""Other projects of the same import names, and how to notice them."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

__all__ = ["warn_of_namesakes"]

_NAMESAKES = ("hypergrad", "bidora")


def warn_of_namesakes() -> None:
    """Warn where a distribution is installed that writes into the same folders.

    Ours is `hypergrad-bidora`; the distributions `hypergrad` and `bidora` of PyPI are
    other projects with the same import names.
    """
    for name in _NAMESAKES:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        warnings.warn(
            f"the distribution {name!r} ({found}) is installed beside 'hypergrad-bidora': "
            f"it is another project with the import name {name!r}, and the files of the "
            f"two overwrite each other. Run: pip uninstall {name}, then pip install "
            "--force-reinstall --no-deps hypergrad-bidora.",
            UserWarning,
            stacklevel=3,
        )
