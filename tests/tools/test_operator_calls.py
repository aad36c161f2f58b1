"""The recorded operator calls of a model, and their dense parts."""

import torch

from benchmarks.kernels.operator_calls import REFERENCES, dense_pieces, recorded_calls


def test_calls_name_optional_tensors():
    """Distinguish calls with and without an optional tensor."""
    calls = recorded_calls("small", 1024, 1, torch.device("meta"), prompts=1)
    found = [call[:2] for call in calls]
    refined = sorted(shapes for name, shapes in found if name == "conv_norm" and "256x256x64-32-1" in shapes)
    assert [shapes.partition("+")[2] for shapes in refined] == ["bias", "bias+residual"]
    seen = {name: shapes for name, shapes in found if shapes.endswith("+seen")}
    assert set(seen) == {"attention"}  # padded prompts are masked out, as in a graph


@torch.no_grad()
def test_dense_pieces_compute_the_operator():
    """Compare with the whole operator, in calls that do nothing else."""
    x, g = torch.randn(2, 6, 10, 8), torch.Generator().manual_seed(0)
    weight, kernel, scale = (torch.randn(shape, generator=g) for shape in ((12, 8), (12, 8, 3, 3), (12,)))
    residual, plain = torch.randn(2, 6, 10, 12), [None] * 6
    for name, args in (
        ("fused_linear", (x, weight)),
        ("fused_linear", (x, weight, False, None, None, torch.ones(12), residual)),
        ("conv_norm", (x, kernel, scale, *plain, 1, False, 1e-6)),
        ("conv_norm", (x, kernel, scale, *plain, 2, False, 1e-6)),
        ("conv_norm", (x, weight[..., None, None], None, *plain, 1, False, 1e-6)),
    ):
        (got,), want = dense_pieces(name, args)(), REFERENCES[name](*args)
        if name == "fused_linear" and args[-1] is residual:
            want = want - residual  # the dense part ends before it
        got = got.permute(0, 2, 3, 1) if got.ndim == 4 and got.shape != want.shape else got
        torch.testing.assert_close(got.reshape(want.shape), want)
    counts = {}
    for name, _, args, _ in recorded_calls("tiny", 64, 1, torch.device("cpu"), prompts=1):
        pieces = dense_pieces(name, args)
        found = pieces() if pieces else []
        assert all(piece.numel() == REFERENCES[name](*args).numel() for piece in found), name
        counts.setdefault(name, set()).add(len(found))
    assert counts == {
        "stem": {1}, "mbconv": {0}, "norm_shift_mix": {0}, "bi_wkv": {0}, "fused_linear": {1, 2}, "conv_norm": {1},
        "upscale": {1}, "attention": {0},
    }  # fmt: skip
