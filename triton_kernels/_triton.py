"""What every kernel file needs: `triton` and `tl`, and `register` to make an operator of a kernel and its reference."""

from __future__ import annotations

from collections.abc import Callable
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


def register(name: str, reference: Function, launcher: Function, fake: Function, flops: Function | None = None) -> Any:
    """Make the operator `fastsam_rwkv::name`: the kernel on CUDA, the reference on any other device.

    `flops` tells PyTorch's FlopCounterMode the operations of a call, from the shapes of its tensors.

    The schema comes from the reference's annotations. Gradients are those of the reference, which runs once more for
    them: the kernels are for inference, and training keeps no intermediate tensors of an operator.
    """
    op = torch.library.custom_op(f"fastsam_rwkv::{name}", reference, mutates_args=())
    op.register_fake(fake)
    if HAS_TRITON:
        op.register_kernel("cuda")(launcher)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
        ctx.others = [value for value in inputs if not isinstance(value, torch.Tensor)]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, torch.Tensor)))

    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        inputs = [
            next(tensors).detach().requires_grad_(needed) if is_tensor else next(others)
            for is_tensor, needed in zip(ctx.is_tensor, ctx.needs_input_grad, strict=True)
        ]
        wanted = [value for value, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
        with torch.enable_grad():
            output = reference(*inputs)
        found = iter(torch.autograd.grad(output, wanted, grads, allow_unused=True))
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)

    op.register_autograd(backward, setup_context=setup_context)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.fastsam_rwkv, name))(flops)
    return op
