"""Other distributions with our import names are noticed."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest

from hypergrad import _shadow


def test_a_namesake_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        return "0.1" if name == "bidora" else real(name)

    monkeypatch.setattr(_shadow, "version", version)
    with pytest.warns(UserWarning, match=r"'bidora' \(0\.1\).*pip uninstall bidora"):
        _shadow.warn_of_namesakes()


def test_alone_it_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _shadow.warn_of_namesakes()


def test_bidora_refuses_a_foreign_hypergrad(tmp_path: Path) -> None:
    (tmp_path / "hypergrad.py").write_text("")
    root = Path(__file__).parent.parent
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]\n"
        "try:\n    import bidora\nexcept ImportError as e:\n    print(e)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is another project's" in run.stdout, run.stderr
