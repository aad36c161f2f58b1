"""Registration of an operator: its kernel on CUDA, its reference in plain PyTorch everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from ._triton import HAS_TRITON, NO_KERNELS
from .launch_config import launch_config, stop_overlap

Function = Callable[..., Any]
MOST_IN_BATCH = 65535
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OF_ANY_DTYPE = ("w", "u", "coords", "frequencies")  # read as float32


def why_no_kernels() -> str:
    """Return why the references serve on CUDA too, such as Triton that is missing; empty if the kernels serve."""
    return " ".join(NO_KERNELS.split())[:200]


@dataclass(frozen=True)
class Operator:
    """A registered operator `fastsam_rwkv::name`. Call it as a function.

    Attributes:
        name: Name under `torch.ops.fastsam_rwkv`.
        reference: Oracle in plain PyTorch, with the documentation of the arguments.
        launcher: Launch of the kernels, with `config` as an optional keyword.
        fake: Output of a call for tracing, without values; a tensor or a tuple of tensors.
        flops: Operations of a call from the shapes of its tensors, or None.
        kernel: `torch.ops.fastsam_rwkv.<name>.default`, which has no derivatives.
    """

    name: str
    reference: Function
    launcher: Function
    fake: Function
    flops: Function | None
    kernel: Function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the kernel, or the reference if a derivative may be asked for."""
        function = self.reference if wants_derivative((*args, *kwargs.values())) else self.kernel
        return function(*args, **kwargs)


def register(
    name: str, reference: Function, launcher: Function, fake: Function, flops: Function | None = None
) -> Operator:
    """Register `fastsam_rwkv::name`: the launcher on CUDA, the reference on other devices.

    The schema comes from the reference's annotations. The kernel's outputs are contiguous.
    """

    @wraps(reference)
    def contiguous_reference(*args: Any, **kwargs: Any) -> Any:
        output = reference(*args, **kwargs)
        return output.contiguous() if isinstance(output, Tensor) else tuple(contiguous(*output))

    schema = torch.library.infer_schema(reference, mutates_args=())
    op = torch.library.custom_op(f"fastsam_rwkv::{name}", contiguous_reference, mutates_args=(), schema=schema)
    op.register_fake(fake)
    if HAS_TRITON:
        op.register_kernel("cuda")(checked(name, launcher))
    packet = getattr(torch.ops.fastsam_rwkv, name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    return Operator(name, reference, launcher, fake, flops, packet.default)


def wants_derivative(args: tuple[Any, ...]) -> bool:
    """True if a tensor requires a gradient in gradient mode, or carries a tangent of forward-mode AD."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    return (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)) or any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def in_forward_ad(tensor: Tensor) -> bool:
    """True inside `forward_ad.dual_level`, where `unpack_dual` returns a view instead of its argument."""
    return forward_ad.unpack_dual(tensor).primal is not tensor


def checked(name: str, launcher: Function) -> Function:
    """Wrap a launcher so that it refuses tensors of several dtypes or on several devices, which it would misread."""
    names = tuple(signature(launcher).parameters)

    @wraps(launcher)
    def launch(*args: Any, **kwargs: Any) -> Any:
        given = (*zip(names, args, strict=False), *kwargs.items())
        tensors = {name: a for name, a in given if isinstance(a, Tensor)}
        if len({t.device for t in tensors.values()}) > 1:
            where = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
            raise ValueError(f"{name} needs all its tensors on one device, got {where}")
        dtypes = {n: t.dtype for n, t in tensors.items() if t.is_floating_point() and n not in OF_ANY_DTYPE}
        if len(found := set(dtypes.values())) > 1 or not found <= set(DTYPES):
            what = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
            raise TypeError(f"the {name} kernel needs float32, float16 or bfloat16, the same for all, got {what}")
        try:
            return launcher(*args, **kwargs)
        except RuntimeError as error:  # Triton raises it for every launch that the driver refuses
            device = next(iter(tensors.values())).device
            config = launch_config(device)
            if "config" in kwargs or not config.overlaps or "Triton Error" not in str(error):
                raise
            result = launcher(*args, **kwargs, config=config.without_overlap())  # raises if overlap was not the reason
            stop_overlap(device, error)
            return result

    return launch


def check_batch(name: str, B: int) -> None:
    """Raise ValueError if the batch exceeds the second dimension of a CUDA grid."""
    if B > MOST_IN_BATCH:
        raise ValueError(f"the {name} kernel takes a batch of at most {MOST_IN_BATCH}, got {B}; split it")


def check_counts(name: str, **counts: int) -> None:
    """Raise ValueError if 32 bits cannot hold what the kernel counts in them, up to the end of the last block."""
    for what, count in counts.items():
        if count >= 1 << 31:
            what = what.replace("_", " ")
            raise ValueError(f"the {name} kernel counts {what} in 32 bits, got {count}; split the batch or the image")


def described(**tensors: Tensor | None) -> str:
    """List names and shapes of tensors for an error message."""
    return ", ".join(f"{name} {None if t is None else list(t.shape)}" for name, t in tensors.items())


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Return tensors as the kernels read them: contiguous, None for None."""
    return [None if t is None else t.contiguous() for t in tensors]


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: float32 without rounding to tf32, as in PyTorch by default."""
    return "ieee" if dtype == torch.float32 else "tf32"
