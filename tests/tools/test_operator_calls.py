"""The recorded operator calls of a model, and their dense parts."""

import torch

from benchmarks.kernels.operator_calls import REFERENCES, dense_pieces, recorded_calls


def test_calls_name_optional_tensors():
    """Distinguish calls with and without an optional tensor."""
    calls = recorded_calls("small", 1024, 1, torch.device("meta"), prompts=1)
    found = [call[:2] for call in calls]
    projected = {shapes.partition("+")[2] for name, shapes in found if name == "conv_norm" and "-256-1" in shapes}
    assert {"bias+norm", "bias+add+norm"} <= projected  # of attention without and with an addition
    seen = {name: shapes for name, shapes in found if shapes.endswith("+seen")}
    assert set(seen) == {"attention"}  # padded prompts are masked out, as in a graph


@torch.inference_mode()
def test_dense_pieces_compute_the_operator():
    """Compare with a convolution that does nothing else, and count the pieces of all operators."""
    x, kernel, bias = torch.randn(2, 6, 10, 8), torch.randn(12, 8, 3, 3), torch.randn(12)
    args = (x, kernel, bias, *[None] * 5, 2, False, 1e-6)
    (got,) = dense_pieces("conv_norm", args)()
    torch.testing.assert_close(got.permute(0, 2, 3, 1), REFERENCES["conv_norm"](*args))
    counts = {}
    for name, _, args, _ in recorded_calls("tiny", 64, 1, torch.device("cpu"), prompts=1):
        pieces = dense_pieces(name, args)
        counts.setdefault(name, set()).add(len(pieces()) if pieces else 0)
    assert counts == {
        "stem": {2}, "mbconv": {3, 4}, "norm_shift_mix": {0}, "bi_wkv": {0}, "fused_linear": {1}, "gated_key": {2},
        "conv_norm": {1}, "upscale": {1}, "attention": {0}, "linears": {1, 2, 3}, "mask_product": {0},
        "prompt_tokens": {0},
    }  # fmt: skip
