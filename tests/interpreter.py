"""Triton's interpreter for tests without a GPU, with two faults of Triton 3.6 fixed. Import before any kernel file.

With FASTSAM_RWKV_EMULATE=90 in the environment, kernels are compiled for sm_90 instead, and the compiled code runs in
`tests/ptx/emulator.py`.
"""

import os

import numpy as np
import torch

EMULATED_ARCH = int(os.environ.get("FASTSAM_RWKV_EMULATE", "0"))

if EMULATED_ARCH and os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("FASTSAM_RWKV_EMULATE compiles kernels, which TRITON_INTERPRET=1 prevents: unset one of them")
if not torch.cuda.is_available() and not EMULATED_ARCH:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any @triton.jit is decorated

try:
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:
    pass
else:
    _patch, _dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def _patch_with_index(tensor, scope):
        """Replace int() of an array of one element, which NumPy 2.4 refuses."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def _as_float(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def _dot_of_bfloat16(self, a, b, *args):
        """Convert bfloat16 to float32 first, because the original multiplies the bits as integers."""
        return _dot(self, _as_float(a), _as_float(b), *args)

    interpreter._patch_lang_tensor = _patch_with_index
    interpreter.InterpreterBuilder.create_dot = _dot_of_bfloat16
