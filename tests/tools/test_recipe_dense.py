"""Tests of the recipe's losses on every pixel."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "synthetic_shapes"))

from data import PADDING, UNKNOWN, Scenes, _regions, render_all  # noqa: E402  # recipes are no package
from dense import edge_loss, region_loss, shares  # noqa: E402  # recipes are no package
from train import Working, compact, initial_model, prepared  # noqa: E402  # recipes are no package


def two_regions():
    regions = torch.full((16, 24), 3, dtype=torch.uint8)
    regions[:, 10:] = 7
    regions[12:] = UNKNOWN
    return regions


def test_parts_of_an_object_are_one_region():
    layers = np.array([[0, 1, 2], [3, 4, 5]], np.uint8)
    scene = {"targets": [[1, 2], [1, 2, 3], [4], [0]], "objects": [1, 2], "stuff": [0]}
    assert _regions(layers, scene).tolist() == [[0, 1, 1], [1, 4, 5]]
    scene["objects"] = [0, 1]  # an object on another one
    assert _regions(layers, scene).tolist() == [[0, 1, 1], [1, 4, 5]]
    scene |= {"targets": [[2, 3], [1, 2, 3]], "unknown": [0]}
    assert _regions(layers, scene).tolist() == [[UNKNOWN, 1, 2], [2, 4, 5]]


def test_shares_are_of_squares_and_leave_out_what_is_small_or_unknown():
    regions = two_regions()
    regions[0, :3] = 9
    part = shares(regions)
    assert part.shape == (4, 6, 2)
    assert part[0].tolist() == [[13 / 16, 0], [1, 0], [0.5, 0.5], [0, 1], [0, 1], [0, 1]]
    assert part[3].abs().max() == 0


def test_region_loss_is_small_for_vectors_that_tell_regions_apart():
    part = shares(two_regions())
    apart = torch.stack([part[..., 0] - part[..., 1], 0.01 + 0 * part[..., 0]], -1)
    apart = torch.nn.functional.normalize(apart, dim=-1)
    alike = torch.tensor([1.0, 0.0]).expand(4, 6, 2)
    assert region_loss(alike, two_regions()).item() == pytest.approx(np.log(2), abs=1e-5)
    assert region_loss(apart, two_regions()).item() < 0.3
    assert region_loss(alike, torch.zeros(16, 24, dtype=torch.uint8)).item() == 0  # one region: nothing to tell


def test_edge_loss_is_small_for_the_edges_alone():
    regions = two_regions()
    edges = torch.full((1, 16, 24), -20.0)
    edges[:, :12, 9] = 20
    assert edge_loss(edges, regions[None]).item() < 1e-3
    for column, row in ((8, slice(0, 12)), (9, slice(0, 6))):
        wrong = torch.full((1, 16, 24), -20.0)
        wrong[:, row, column] = 20
        assert edge_loss(wrong, regions[None]).item() > 0.1
    anything = edges.clone()
    anything[:, 12:] = 20  # what is unknown does not count
    assert edge_loss(anything, regions[None]).item() < 1e-3


def test_regions_of_a_batch_fit_its_images_and_train_the_encoder(tmp_path):
    render_all(tmp_path, count=2, size=96, seed=1, workers=1)
    batch = Scenes(tmp_path, prompts=2, seed=3).batch(8, 4, (64, 64))
    padding = (batch.image == PADDING).all(-1)
    assert padding.any() and (batch.regions[padding] == UNKNOWN).all()
    assert (batch.regions == UNKNOWN).sum() == padding.sum()
    pixels, prompts, regions = prepared(compact(batch), torch.device("cpu"))
    assert regions.shape == (4, 16, 16) and torch.equal(regions, torch.from_numpy(batch.regions[:, 2::4, 2::4]))
    model = initial_model("tiny", 64)
    plain, dense = Working(model), Working(model, 0.5)
    with torch.no_grad():
        assert plain(pixels, prompts, regions, 0, 0.5)[2].tolist() == [0, 0]
        without, with_dense = plain(pixels, prompts, regions, 0, 0.5), dense(pixels, prompts, regions, 0, 0.5)
    assert with_dense[0].item() == pytest.approx((without[0] + 0.5 * with_dense[2].sum()).item(), rel=1e-5)
    sum(dense.dense(model.encode_image(pixels), regions)).backward()
    assert all(p.grad.norm() > 0 for p in (*model.neck.parameters(), *dense.dense.parameters()))
    assert sum(p.grad is not None and p.grad.norm() > 0 for p in model.backbone.parameters()) > 100
