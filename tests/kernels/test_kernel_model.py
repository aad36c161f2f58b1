"""The whole model with kernels instead of operators: on a GPU, interpreted or emulated."""

import os
from functools import partial

import pytest
import torch
from golden import RUNS, check_every_stored_tensor, load_run, published_weights
from launch_configs import launch
from numerics import INTERPRETED, rel_rms

from benchmarks.kernels.operator_calls import OPERATORS, REFERENCES, operators_replaced
from fastsam_rwkv import RWKVSAM, convert_upstream
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")

# Few large tiles, because the interpreter's time is proportional to the number of operations
PROJECT = {"PIXELS": 2, "LINES": 4, "BLOCK_M": 256, "BLOCK_N": 64, "BLOCK_D": 64, "num_warps": 1, "num_stages": 1}
LARGE = {
    "bi_wkv": {"SEGMENTS": 2, "LENGTH": 8, "BLOCK_C": 256, "BLOCK_N": 4, "num_warps": 1},
    "mbconv_project.float32": PROJECT,
    "mbconv_halve.float32": PROJECT,
    "mbconv_expand.float32": {"BLOCK_M": 1024, "BLOCK_D": 64, "BLOCK_C": 64, "num_warps": 1, "num_stages": 1},
    "upscale.float32": {"BLOCK_M": 1024, "BLOCK_C": 64, "num_warps": 1, "num_stages": 1},
    "conv_norm.float32": {
        "BLOCK_M": 256,
        "BLOCK_N": 64,
        "BLOCK_C": 64,
        "WIDE_M": 64,
        "CACHED": 0,
        "num_warps": 1,
        "num_stages": 1,
    },
}


SLOW = "FASTSAM_RWKV_SLOW_TESTS"


def launchers(settings=None, changes=None):
    """Launch the kernels of every operator with these settings."""
    return {name: partial(launch, op, settings=settings, changes=changes) for name, op in OPERATORS.items()}


def model_with_published_weights(variant, device):
    config, weights = convert_upstream(published_weights(variant))
    model = RWKVSAM(config).eval()
    model.load_state_dict(weights)
    model.to(device).cuda_graphs = False
    return model


@torch.no_grad()
def test_golden_weights_through_the_kernels(device):
    """Compare with the references, which `test_golden.py` compares with the stored outputs."""
    model = model_with_published_weights("tiny", device)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    boxes = torch.tensor([[5.0, 9.0, 40.0, 60.0], [30.0, 2.0, 62.0, 33.0]], device=device)

    results, calls = [], dict.fromkeys(OPERATORS, 0)

    def counted(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    for functions in (REFERENCES, launchers(LARGE if INTERPRETED else {})):
        with operators_replaced({name: counted(name, function) for name, function in functions.items()}):
            embedding = model.encode_image(pixels)
            masks, iou = model.decode_masks(embedding, boxes=boxes)
        results.append([embedding.image_embed, embedding.high_res_feats, masks, iou])
    assert calls == {n: 2 * c for n, c in {
        "stem": 1, "mbconv": 6, "norm_shift_mix": 28, "bi_wkv": 14, "gated_key": 14, "fused_linear": 28,
        "conv_norm": 16, "upscale": 3, "attention": 7, "linears": 15, "prompt_tokens": 1, "mask_product": 1,
    }.items()}  # fmt: skip
    for want, got in zip(*results, strict=True):
        assert rel_rms(got, want) <= 1e-5


@pytest.mark.skipif(INTERPRETED, reason="compiled kernels need a GPU, or FASTSAM_RWKV_EMULATE=90")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", ["usual", "for large outputs"])
@torch.no_grad()
def test_compiled_in_half_precision(settings, dtype, device):
    """Kernels differ from float32 as little as eager PyTorch."""
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    corners = (
        torch.rand(64, 2, 2, generator=torch.Generator().manual_seed(1)) * 64
    )  # many: each gives one iou_prediction
    boxes = corners.sort(1).values.flatten(1).to(device)
    changes = {"large": 0, "sms": 1} if settings == "for large outputs" else {}

    def run(dtype, functions):
        model = model_with_published_weights("tiny", device).to(dtype)
        with operators_replaced(functions):
            embedding = model.encode_image(pixels.to(dtype))
            masks, iou = model.decode_masks(embedding, boxes=boxes)
        return [embedding.image_embed, embedding.high_res_feats, masks, iou]

    outputs = zip(
        run(torch.float32, REFERENCES), run(dtype, REFERENCES), run(dtype, launchers(changes=changes)), strict=True
    )
    for want, eager, got in outputs:
        assert rel_rms(got, want) <= 1.5 * rel_rms(eager, want)


@pytest.mark.skipif(
    not torch.cuda.is_available() and not os.environ.get(SLOW),
    reason=f"256x320 pixels take ten minutes in Triton's interpreter, 1024x1024 an hour: set {SLOW}=1 to run it",
)
@pytest.mark.parametrize("name", RUNS)
def test_stored_golden_outputs_through_the_kernels(name, device):
    run = load_run(name)
    with operators_replaced(launchers(LARGE if INTERPRETED else {})):
        check_every_stored_tensor(run, model_with_published_weights(str(run["variant"]), device))
