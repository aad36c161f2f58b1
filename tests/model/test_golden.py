"""The published implementation's outputs, through `convert_upstream`, `save_pretrained` and `from_pretrained`."""

import pytest
import torch
from golden import RUNS, check_every_stored_tensor, load_run, published_weights

from fastsam_rwkv import RWKVSAM
from fastsam_rwkv.convert import convert_file


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    for variant in ("tiny", "small"):
        torch.save({"state_dict": published_weights(variant), "optimizer": {"step": 3}}, folder / f"{variant}.pth")
        assert convert_file(folder / f"{variant}.pth", folder / variant).variant == variant
    return {variant: RWKVSAM.from_pretrained(folder / variant) for variant in ("tiny", "small")}


@pytest.mark.parametrize("name", RUNS)
def test_every_stored_tensor(name, models):
    run = load_run(name)
    check_every_stored_tensor(run, models[str(run["variant"])])
