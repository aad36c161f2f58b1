"""Registration of an operator: its kernel on CUDA, its reference in plain PyTorch everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from ._triton import HAS_TRITON

Function = Callable[..., Any]
MOST_IN_BATCH = 65535
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OF_ANY_DTYPE = ("w", "u")  # parameters of the scan, which it computes with in float32


def check_batch(op: str, B: int) -> None:
    """Raise a ValueError where a batch is larger than the second dimension of a CUDA grid may be."""
    if B > MOST_IN_BATCH:
        raise ValueError(f"the {op} kernel takes a batch of at most {MOST_IN_BATCH}, got {B}; split it")


def check_rows(op: str, M: int) -> None:
    """Raise a ValueError where rows are more than 32 bits can count, for kernels that do so."""
    if M >= 1 << 31:
        raise ValueError(f"the {op} kernel takes fewer than 2^31 pixels, got {M}; split the batch")


def checked(op: str, launcher: Function) -> Function:
    """A launcher that is not given what it would misread: tensors of several dtypes, or on several devices."""
    names = tuple(signature(launcher).parameters)

    @wraps(launcher)
    def launch(*args: Any, **kwargs: Any) -> Tensor:
        given = (*zip(names, args, strict=False), *kwargs.items())
        tensors = {name: a for name, a in given if isinstance(a, Tensor)}
        if len({t.device for t in tensors.values()}) > 1:
            where = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
            raise ValueError(f"{op} needs all its tensors on one device, got {where}")
        dtypes = {n: t.dtype for n, t in tensors.items() if t.is_floating_point() and n not in OF_ANY_DTYPE}
        if len(found := set(dtypes.values())) > 1 or not found <= set(DTYPES):
            what = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
            raise TypeError(f"the {op} kernel needs float32, float16 or bfloat16, the same for all, got {what}")
        return launcher(*args, **kwargs)

    return launch


def in_transform() -> bool:
    """Whether derivatives are being taken forwards, or one of torch.func's transforms is at work, in which tensors do
    not say whether they want a gradient. Under `torch.compile` both are guarded."""
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def wants_gradient(tensors: tuple[Any, ...]) -> bool:
    """Whether a derivative of a result may be asked for."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        return True
    return in_transform()


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` treats float32: as PyTorch does by default, without rounding to tf32; half precision as it is."""
    return "ieee" if dtype == torch.float32 else "tf32"


def register(
    name: str, reference: Function, launcher: Function, fake: Function, flops: Function | None = None
) -> Function:
    """Make the operator `fastsam_rwkv::name`: the kernel on CUDA, the reference on any other device.

    `flops` tells PyTorch's FlopCounterMode the operations of a call, from the shapes of its tensors.

    The schema comes from the reference's annotations. The operator has no gradient: where one is asked for, the
    function returned here calls the reference, which is plain PyTorch. What the operator returns is contiguous.
    """

    @wraps(reference)
    def contiguous(*args: Any, **kwargs: Any) -> Tensor:
        return reference(*args, **kwargs).contiguous()

    schema = torch.library.infer_schema(reference, mutates_args=())
    op = torch.library.custom_op(f"fastsam_rwkv::{name}", contiguous, mutates_args=(), schema=schema)
    op.register_fake(fake)
    if HAS_TRITON:
        op.register_kernel("cuda")(checked(name, launcher))
    if flops is not None:
        register_flop_formula(getattr(torch.ops.fastsam_rwkv, name))(flops)

    @wraps(reference)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return (reference if wants_gradient((*args, *kwargs.values())) else op)(*args, **kwargs)

    return call
