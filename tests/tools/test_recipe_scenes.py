"""Tests of generated scenes: same seed, same scene; well-formed at every size; full of usable targets."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "synthetic_shapes"))

from scenes import render_scene, target_masks  # noqa: E402  # recipes are no package

COUNT = 16


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(np.random.default_rng([3, i]), 128) for i in range(COUNT)]


def test_a_scene_depends_on_its_seed_alone(scenes):
    for i in reversed(range(COUNT)):  # another order: no state is carried from one scene to the next
        again = render_scene(np.random.default_rng([3, i]), 128)
        assert np.array_equal(again.image, scenes[i].image)
        assert np.array_equal(again.layers, scenes[i].layers)
        assert again.targets == scenes[i].targets
    assert len({scene.image.tobytes() for scene in scenes}) == COUNT


@pytest.mark.parametrize("size", [64, 256, 384, 512])
def test_shapes_and_dtypes(size):
    scene = render_scene(np.random.default_rng([4, size]), size)
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    assert scene.layers.shape == (size, size) and scene.layers.dtype == np.uint8
    masks = target_masks(scene)
    assert masks.dtype == bool and masks.shape[1:] == (size, size)


def test_every_visible_part_is_in_a_target(scenes):
    for scene in scenes:
        named = {part for target in scene.targets for part in target}
        assert set(np.unique(scene.layers).tolist()) <= named


def test_images_are_neither_flat_nor_clipped(scenes):
    for scene in scenes:
        assert scene.image.std() > 8
    assert np.mean([np.isin(scene.image, (0, 255)).mean() for scene in scenes]) < 0.05


def test_targets_are_distinct_in_range_and_of_all_sizes(scenes):
    areas = []
    for scene in scenes:
        masks = target_masks(scene, 0.01, 0.5)
        assert len({mask.tobytes() for mask in masks}) == len(masks)
        areas += masks.mean((1, 2)).tolist()
    areas = np.array(areas)
    assert areas.min() >= 0.01 and areas.max() <= 0.5
    assert len(areas) > 8 * COUNT and (areas > 0.1).mean() > 0.2 and (areas < 0.05).mean() > 0.2


def test_no_target_in_range_gives_an_empty_stack(scenes):
    assert target_masks(scenes[0], 0.99, 1.0).shape == (0, 128, 128)
