"""Triton's interpreter for tests of kernels without a GPU. Import this before any kernel file."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any @triton.jit is decorated

try:
    from triton.runtime import interpreter
except ImportError:
    pass
else:
    _patch = interpreter._patch_lang_tensor

    def _patch_with_index(tensor, scope):
        """Triton 3.6 takes int() of an array of one element, which NumPy 2.4 refuses."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_index
