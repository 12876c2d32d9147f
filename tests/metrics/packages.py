"""The published implementations, where they are installed: torchvision, lpips, pytorch-fid, clean-fid.

They are no dependency of the tests: torchvision's PyPI build belongs to torch's CUDA build only. To compare with them:

    pip install --no-deps --target=DIR torchvision==0.28.0 lpips==0.1.4 pytorch-fid==0.3.0 clean-fid==0.1.35
    PYTHONPATH=DIR python -m pytest -m 'slow or not slow' -n 0 tests/metrics
"""

import importlib

import pytest
import torch


def package(name: str):
    """The module of that name; skips the test where it cannot be imported."""
    _torchvision()
    return pytest.importorskip(name, exc_type=ImportError)


def _torchvision():
    """Imports torchvision, also where its compiled operators (not needed here) do not fit torch's build."""
    register = torch.library.register_fake

    def tolerant(op, *args, **kwargs):
        def decorate(function):
            try:
                return register(op, *args, **kwargs)(function)
            except RuntimeError:
                return function

        return decorate

    torch.library.register_fake = tolerant
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pytest.skip("torchvision is not installed; see tests/metrics/packages.py")
    finally:
        torch.library.register_fake = register
