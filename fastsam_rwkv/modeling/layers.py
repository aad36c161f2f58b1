"""Building blocks on channels-last maps `[B, H, W, C]`. Tokens `[B, H*W, C]` are views of the same memory.

Fused operators read the parameters of modules that are `plain`. Other modules are called one by one: adapters,
quantized, compiled and parametrized ones, and those with hooks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils.module_tracker import ModuleTracker

from ..config import PIXEL_MEAN, PIXEL_STD
from ..triton_kernels.attention import attention
from ..triton_kernels.bi_wkv import bi_wkv
from ..triton_kernels.conv_norm import conv_norm
from ..triton_kernels.fused_linear import fused_linear, gated_key
from ..triton_kernels.linears import linears
from ..triton_kernels.mbconv import mbconv
from ..triton_kernels.norm_shift_mix import norm_shift_mix, q_shift
from ..triton_kernels.stem import stem, without_padding
from ..triton_kernels.upscale import upscale
from .pixels import normalize, pad

LN_EPS = 1e-6


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` on `[B, H, W, C]`. The permuted views have PyTorch's channels_last layout and copy nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Upscale2x(nn.Module):
    """Transposed convolution 2x2 with stride 2.

    It maps `[B, H, W, C]` to `[B, 2H, 2W, out]`. The weight is `[2 * 2 * out, C]`, rows in the order (y, x, out).
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4 * out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear does
        self.out_bias = nn.Parameter(torch.zeros(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        y = F.linear(x, self.weight, self.out_bias.repeat(4)).view(B, H, W, 2, 2, -1)
        return y.permute(0, 1, 3, 2, 4, 5).reshape(B, 2 * H, 2 * W, -1)


PLAIN = frozenset({nn.Linear, nn.LayerNorm, nn.GELU, nn.Identity, nn.Sequential, Conv2d, Upscale2x})


def plain(*modules: Any, kinds: Collection[type[nn.Module]] = PLAIN) -> bool:
    """True if calling the modules would do what their class, one of `kinds`, and parameters say, and nothing else.

    Subclasses, parametrized modules, and modules with hooks or a `forward` of their own are not plain. Nor are modules
    whose parameters are tensor subclasses around other tensors, such as torchao's and DTensor.
    """
    for m in modules:
        if m is not None and (
            type(m) not in kinds
            or m._forward_hooks
            or m._forward_pre_hooks
            or m._backward_hooks
            or m._backward_pre_hooks
            or "forward" in m.__dict__
            or any(hasattr(p, "__tensor_flatten__") for p in m._parameters.values())
        ):
            return False
    return not has_global_hooks()


def on_gpu(t: Tensor) -> bool:
    """True on CUDA, where bytes and launches cost most; elsewhere operations do."""
    return t.is_cuda


def has_global_hooks() -> bool:
    """True if hooks are registered for all modules, other than those of `FlopCounterMode`."""
    forward, before = nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks
    if not (forward or before or nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks):
        return False
    others = [hook for hooks in (forward, before) for hook in hooks.values()]
    counting = all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in others)
    return not counting or bool(nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks)


def affine(*modules: nn.Module | None) -> list[Any]:
    """Return weight and bias of each module, None for a parameter or module that is missing."""
    return [getattr(module, name, None) for module in modules for name in ("weight", "bias")]


def fused_conv(
    x: Tensor,
    conv: Any,
    *,
    in_norm: Any = None,
    add: Tensor | None = None,
    norm: Any = None,
    gelu: Any = None,
) -> Tensor:
    """Return gelu(norm(conv(in_norm(x)) + add)), in one operation if the modules are plain.

    `conv` is a Conv2d, or a Linear, which acts as a 1x1 convolution. The norms are LayerNorms with the same epsilon.
    `gelu` is an exact `nn.GELU`.
    """
    if not plain(conv, in_norm, norm, gelu):
        y = conv(x if in_norm is None else in_norm(x))
        y = y if add is None else y + add
        y = y if norm is None else norm(y)
        return y if gelu is None else gelu(y)
    linear = isinstance(conv, nn.Linear)
    weight, stride = (conv.weight[:, :, None, None], 1) if linear else (conv.weight, conv.stride[0])
    eps = next((n.eps for n in (norm, in_norm) if n is not None), LN_EPS)
    return conv_norm(x, weight, conv.bias, *affine(in_norm), add, *affine(norm), stride, gelu is not None, eps)


def fused_upscale(x: Tensor, conv: Any, norm: Any, gelu: Any) -> Tensor:
    """Return gelu(norm(conv(x))) in one operation if the modules are plain. `norm` may be None."""
    if not plain(conv, norm, gelu):
        y = conv(x)
        return gelu(y if norm is None else norm(y))
    return upscale(x, conv.weight, conv.out_bias, *affine(norm), LN_EPS if norm is None else norm.eps)


def shift_mix(x: Tensor, norm: Any, mix: Tensor) -> Tensor:
    """Return norm(x) mixed with its neighbors, `[J, B, H, W, C]`, in one operation if the norm is plain."""
    if plain(norm):
        return norm_shift_mix(x, norm.weight, norm.bias, mix, norm.eps)
    n = norm(x)
    return torch.lerp(q_shift(n), n, mix[:, None, None, None])


def _without_bias(*linears: Any) -> bool:
    """True if the linear layers are plain and have no bias, as `fused_linear` computes them."""
    return plain(*linears) and all(linear.bias is None for linear in linears)


def merged_linears(
    x: Tensor, modules: Sequence[nn.Module], add: Tensor | None = None, added: int = 0, relu: bool = False
) -> list[Tensor]:
    """Apply up to four plain linear layers of one shape in one operation.

    Args:
        x: `[N, T, K]`.
        modules: Linear layers with biases.
        add: `[T, K]` or `[N, T, K]` to add to x for the first `added` layers.
        added: Number of those layers.
        relu: Apply ReLU.

    Returns:
        `[N, T, out]` of each layer.
    """
    rows = None if add is None else add.flatten(0, -2)
    y = linears(x.flatten(0, 1)[None], rows, added, relu, *affine(*modules))
    return list(y.unflatten(1, x.shape[:2]).unbind())


class MLP(nn.Module):
    """Linear layers with ReLU between them, for widths `dims`."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Attention(nn.Module):
    """Multi-head attention whose inner width may be smaller than the width of its input.

    Between few tokens and the many positions of a map of their own, projections of the map cost most. They can be
    absorbed into the tokens' side, because products are associative: a token's query times W_k is compared with the map
    itself, and the softmax's mean of the map is projected afterwards.
    """

    def __init__(self, dim: int, inner_dim: int, num_heads: int = 8) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner_dim) for _ in range(3))
        self.out_proj = nn.Linear(inner_dim, dim)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seen: Tensor | None,
        residual: Tensor | None,
        norm: nn.LayerNorm,
        map_side: Literal["none", "queries", "keys"] = "none",
        shared: bool = False,
    ) -> Tensor:
        """Return norm(residual + attention), `[N, T, dim]`.

        Args:
            q: Queries `[N, T, dim]`. N may be 1 if all prompts share the image; so may it for k and v.
            k: Keys `[N, S, dim]`.
            v: Values `[N, S, dim]`.
            seen: `[N, S]` bool, False for keys to ignore; None to use all.
            residual: `[N, T, dim]`; None for zero.
            norm: LayerNorm of the sum.
            map_side: Which side is a map; the other is a few tokens.
            shared: The map is the same for all prompts, so that it is projected once.
        """
        if map_side == "queries" and self._absorbs(k):
            return norm(self._map_to_tokens(q, k, v, seen, residual, shared))
        if map_side == "keys" and not shared and self._absorbs(q):
            y = self._tokens_to_map(q, k, v)
            return norm(y if residual is None else residual + y)
        return self.attend(self.q_proj(q), self.k_proj(k), self.v_proj(v), seen, residual, norm)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, residual: Tensor | None, norm: nn.LayerNorm
    ) -> Tensor:
        """Return norm(residual + attention), `[N, T, dim]`, of projected queries, keys and values."""
        y = attention(q, k, v, seen, self.num_heads)
        add = None if residual is None else residual[:, :, None]
        return fused_conv(y[:, :, None], self.out_proj, add=add, norm=norm)[:, :, 0]

    def _tokens_to_map(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shares = self._scores(self.q_proj(q), self.k_proj, k).softmax(-1)
        mean = (shares @ v).unflatten(1, (self.num_heads, -1))  # [N, heads, T, dim]
        y = self._by_head(mean.transpose(1, 2), self.v_proj.weight.unflatten(0, (self.num_heads, -1)).transpose(1, 2))
        return self.out_proj(y.transpose(1, 2).flatten(2) + self.v_proj.bias)

    def _map_to_tokens(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, residual: Tensor | None, shared: bool
    ) -> Tensor:
        keys = self.k_proj(k)
        if shared:
            queries, keys = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (self.q_proj(q), keys))
            scores = keys @ (queries * keys.shape[-1] ** -0.5).transpose(2, 3)  # [N, heads, T, S]
        else:
            scores = self._scores(keys, self.q_proj, q).unflatten(1, (self.num_heads, -1))
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None, :, None], -torch.inf)
        shares = scores.softmax(2).flatten(1, 2).transpose(1, 2)  # over the tokens of each head
        values = self._absorbed(self.v_proj(v), self.out_proj.weight.t())
        values = values + self.out_proj.bias / self.num_heads  # each head's shares sum to one
        return shares @ values if residual is None else torch.baddbmm(residual, shares, values)

    def _absorbs(self, tokens: Tensor) -> bool:
        """True if absorbed projections cost less. On CUDA the fused operators read and write less."""
        if on_gpu(tokens) or not plain(self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            return False
        # a condition on the number of tokens would fix it while tracing
        return torch.compiler.is_compiling() or self.num_heads * tokens.shape[1] <= self.k_proj.out_features

    def _by_head(self, x: Tensor, weights: Tensor) -> Tensor:
        """Multiply heads of tokens `[N, T, heads, a]` by a weight for each, `[heads, a, b]`: `[N, heads, T, b]`.

        One batched product over the heads: OpenCV multiplies wrongly by a constant that repeats over N.
        """
        y = torch.bmm(x.permute(2, 0, 1, 3).flatten(1, 2), weights)
        return y.unflatten(1, x.shape[:2]).transpose(0, 1)

    def _absorbed(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply heads of tokens `[N, T, heads * d]` by their rows of `[heads * d, b]`: `[N, heads * T, b]`."""
        weights = weight.unflatten(0, (self.num_heads, -1))
        return self._by_head(x.unflatten(2, (self.num_heads, -1)), weights).flatten(1, 2)

    def _scores(self, x: Tensor, linear: nn.Linear, maps: Tensor) -> Tensor:
        """Products of each head of tokens with `linear(maps)`, `[N, heads * T, S]`, without the latter."""
        x = x * (linear.out_features // self.num_heads) ** -0.5
        bias = self._absorbed(x, linear.bias[:, None])
        return torch.baddbmm(bias, self._absorbed(x, linear.weight), maps.transpose(1, 2))


class Stem(nn.Module):
    """Stem: conv 3x3 s2, LayerNorm, GELU, conv 3x3."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim, LN_EPS)
        self.conv2 = Conv2d(dim, dim, 3, padding=1)

    def forward(self, pixels: Tensor, H: int, W: int, size: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Map pixels `[B, h, w, 3]`, uint8 or normalized, to `[B, H/2, W/2, dim]`; zero-padded to H x W.

        `size` `[2]` int32 is the part of the pixels that is not padding; None for all. A bias `[dim]` that is yet to be
        added is returned beside the map, or None.
        """
        if not plain(self.conv1, self.norm, self.conv2):
            x = pad(normalize(pixels).to(next(self.parameters()).dtype), (H, W))
            x = x if size is None else without_padding(x, size)
            return self.conv2(F.gelu(self.norm(self.conv1(x)))), None
        *tensors, bias = affine(self.conv1, self.norm, self.conv2)
        late = on_gpu(pixels)  # a convolution without a bias is cuDNN's alone
        x = stem(pixels, PIXEL_MEAN, PIXEL_STD, *tensors, None if late else bias, H, W, self.norm.eps, size)
        return x, bias if late else None


class MBConv(nn.Module):
    """Inverted bottleneck after a LayerNorm. With stride 2 the shortcut is average-pooled."""

    def __init__(self, in_dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * out_dim
        self.stride = stride
        self.norm = nn.LayerNorm(in_dim, LN_EPS)
        self.expand = nn.Linear(in_dim, hidden)
        self.depthwise = Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden)
        self.project = nn.Linear(hidden, out_dim)
        self.shortcut = nn.Linear(in_dim, out_dim) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, in_bias: Tensor | None = None) -> Tensor:
        """Map `[B, H, W, in_dim]`, plus a bias `[in_dim]` if given, to `[B, H/stride, W/stride, out_dim]`."""
        if not plain(self.norm, self.expand, self.depthwise, self.project, self.shortcut):
            x = x if in_bias is None else x + in_bias
            y = F.gelu(self.depthwise(F.gelu(self.expand(self.norm(x)))))
            if self.stride == 2:
                x = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, 2, padding=1, count_include_pad=False).permute(0, 2, 3, 1)
            return self.project(y) + self.shortcut(x)
        tensors = affine(self.norm, self.expand, self.depthwise, self.project, self.shortcut)
        return mbconv(x, *tensors, self.stride, self.norm.eps, in_bias)


class SpatialMix(nn.Module):
    """Token mixing: Q-shift, projections, gated bidirectional WKV.

    Key, value and receptance, in this order, share one parameter for their mixes and one for their projections, so
    that each is one launch.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((3, dim), 0.5))
        self.decay = nn.Parameter(torch.linspace(0, 20, dim))  # over the whole sequence
        self.first = nn.Parameter(torch.zeros(dim))
        self.projections = nn.Parameter(torch.empty(3, dim, dim).uniform_(-(dim**-0.5), dim**-0.5))  # [3, out, in]
        self.output = nn.Linear(dim, dim, bias=False)
        self._bound: tuple[Any, float | None] = (None, None)  # what it was read from, and the bound

    def scan_bound(self) -> float | None:
        """Return a power of two that no decay and bonus exceeds in size, or None if they cannot be read now.

        They are read again when PyTorch counts a change of them, which changes through `.data` evade. Compiled code
        keeps the bound of its compilation.
        """
        own = (self._parameters.get("decay"), self._parameters.get("first"))
        parameters = [p for p in own if type(p) is nn.Parameter and not p.is_meta]
        if len(parameters) < len(own):  # computed by others
            return None
        read = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
        if read != self._bound[0]:
            if parameters[0].is_cuda and torch.cuda.is_current_stream_capturing():
                return None
            largest = max(p.detach().abs().max().item() for p in parameters)
            self._bound = read, 2.0 ** math.frexp(largest)[1] if math.isfinite(largest) else largest
        return self._bound[1]

    # as `torch.compiler.assume_constant_result` marks it, which would import TorchDynamo here
    scan_bound._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, norm: nn.LayerNorm, scale: Tensor) -> Tensor:
        """Return x + scale * SpatialMix(norm(x)) for x `[B, H, W, C]`."""
        B, H, W, C = x.shape
        T = H * W
        mixed = shift_mix(x, norm, self.mix)
        k, v, r = torch.bmm(mixed.view(3, B * T, C), self.projections.transpose(1, 2)).view(3, B, T, C)
        y = bi_wkv(self.decay, self.first, k, v, r, None, self.scan_bound()).view(B, H, W, C)
        if not _without_bias(self.output):
            return torch.addcmul(x, scale, self.output(y))
        return fused_linear(y, self.output.weight, None, scale, x)


class ChannelMix(nn.Module):
    """Gated MLP with squared ReLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((2, dim), 0.5))  # key, receptance
        self.key = nn.Linear(dim, 2 * dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor, norm: nn.LayerNorm, scale: Tensor) -> Tensor:
        """Return x + scale * ChannelMix(norm(x)) for x `[B, H, W, C]`."""
        mixed = shift_mix(x, norm, self.mix)
        if not _without_bias(self.key, self.receptance, self.value):
            to_k, to_r = mixed
            gated = torch.sigmoid(self.receptance(to_r)) * self.value(F.relu(self.key(to_k)).square())
            return torch.addcmul(x, scale, gated)
        k, r = gated_key(mixed, self.key.weight, self.receptance.weight)
        return fused_linear(k, self.value.weight, r, scale, x)


class RWKVLayer(nn.Module):
    """Pre-norm residual layer with layer scale: spatial mix, then channel mix."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, LN_EPS), nn.LayerNorm(dim, LN_EPS)
        self.spatial_mix, self.channel_mix = SpatialMix(dim), ChannelMix(dim)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), 0.1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.spatial_mix(x, self.norm1, self.scale1)
        return self.channel_mix(x, self.norm2, self.scale2)
