"""What every kernel file needs: `triton` and `tl`, and `register` to make an operator of a kernel and its reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # macOS, Windows: kernel files can be imported all the same, and the reference serves
    HAS_TRITON = False

    class _Missing:
        constexpr = None

        def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
            return function

    triton = tl = _Missing()

Function = Callable[..., Any]


@triton.jit
def gelu(x):
    """The exact one."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` treats float32: as PyTorch does by default, without rounding to tf32; half precision as it is."""
    return "ieee" if dtype == torch.float32 else "tf32"


def register(
    name: str, reference: Function, launcher: Function, fake: Function, flops: Function | None = None
) -> Function:
    """Make the operator `fastsam_rwkv::name`: the kernel on CUDA, the reference on any other device.

    `flops` tells PyTorch's FlopCounterMode the operations of a call, from the shapes of its tensors.

    The schema comes from the reference's annotations. The operator has no gradient: where one is asked for, the
    function returned here calls the reference, which is plain PyTorch.
    """
    op = torch.library.custom_op(f"fastsam_rwkv::{name}", reference, mutates_args=())
    op.register_fake(fake)
    if HAS_TRITON:
        op.register_kernel("cuda")(launcher)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.fastsam_rwkv, name))(flops)

    @wraps(reference)
    def call(*args: Any) -> torch.Tensor:
        wants_gradient = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        return (reference if wants_gradient else op)(*args)

    return call
