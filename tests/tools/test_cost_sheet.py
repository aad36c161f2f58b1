import pytest
import torch

from benchmarks.kernels.cost_sheet import asked, main, sheet
from fastsam_rwkv.triton_kernels.launch_config import default_settings


@pytest.mark.parametrize(("variant", "gmacs"), [("tiny", 26.7), ("small", 106)])
def test_operations_of_the_backbone(variant, gmacs):
    """The published cost of the backbone is the sum without neck and decoder."""
    rows = sheet(variant, 1024, 1)
    assert rows["bi_wkv"]["calls"] == rows["projections (cuBLAS)"]["calls"] == 14
    assert rows["norm_shift_mix"]["calls"] == 28 and rows["fused_linear"]["calls"] == 28
    operations = sum(row["flops"] for name, row in rows.items() if name not in ("bi_wkv", "conv_norm", "upscale"))
    assert operations / 2e9 == pytest.approx(gmacs, rel=0.02)  # the patch step, 1-2 %, is in conv_norm
    for row in rows.values():
        assert 0 < row["must"] <= row["asked"] and row["floor_us"] > 0


def test_bytes_that_the_scan_loads_and_stores():
    """Test forms that the memory report's test does not count."""
    settings = default_settings() | {"bi_wkv": {"SEGMENTS": 2, "LENGTH": 2, "BLOCK_N": 4}}
    k = torch.empty(1, 16, 3, dtype=torch.float16)
    w = torch.empty(3)
    # k and v twice, y once; 4 tiles, each a group: 4 states of 6 written, and 3 of 4 read by each of 4 tiles
    assert asked("bi_wkv", (w, w, k, k, None), k, settings) == 2 * 48 * 5 + 24 * 3 * 4 + 12 * 3 * 16
    settings["bi_wkv"]["BLOCK_N"] = 2  # two groups of two tiles, whose states are written and read too
    assert asked("bi_wkv", (w, w, k, k, None), k, settings) == 2 * 48 * 5 + 24 * 3 * (2 + 4) + 12 * 3 * 4 * (2 + 2)


def test_command_line(capsys):
    main(["--variant", "tiny", "--image-size", "128"])
    text = capsys.readouterr().out
    assert "tiny, 128 x 128" in text and "| **all** | 114 |" in text
