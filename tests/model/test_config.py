import pytest

from fastsam_rwkv import ModelConfig


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large"])
def test_round_trip(name):
    config = ModelConfig.from_name(name, image_size=512, num_multimask_outputs=3)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"image_size": 1000}, ValueError, "multiple of 64, got 1000"),
        ({"image_size": 0}, ValueError, "positive"),
        ({"num_multimask_outputs": 2}, ValueError, "got 2"),
        ({"depth": "14"}, TypeError, "'14'"),
        ({"depth": True}, TypeError, "True"),
        ({"depth": 60_000_000}, ValueError, "'depth' must be at most 256, got 60000000"),
        ({"embed_dim": 10**9}, ValueError, "'embed_dim' must be at most 8192"),
        ({"stage1_depth": 65}, ValueError, "'stage1_depth' must be at most 64, got 65"),
        ({"image_size": 16448}, ValueError, "'image_size' must be at most 16384, got 16448"),
        ({"stem_dim": 10**5000}, ValueError, "'stem_dim' must be at most 1024, got <int>"),
        ({"variant": "huge"}, ValueError, "'huge'"),
        ({"pred_iou_thresh": "0.5"}, TypeError, "'pred_iou_thresh' must be a number, got '0.5'"),
        ({"stability_score_thresh": float("nan")}, ValueError, "'stability_score_thresh' must be within 0..1, got nan"),
        ({"pred_iou_thresh": True}, TypeError, "must be a number, got True"),
        ({"windows": 3}, ValueError, "unknown config keys.*windows"),
        ({"format_version": 2}, ValueError, "format_version 2"),
        ({"format_version": None}, ValueError, "format_version None"),
    ],
)
def test_wrong_fields_are_named(change, error, message):
    with pytest.raises(error, match=message):
        ModelConfig.from_dict({**ModelConfig.from_name("tiny").to_dict(), **change})


def test_missing_keys_and_unknown_names():
    data = ModelConfig.from_name("tiny").to_dict()
    del data["stem_dim"]
    with pytest.raises(ValueError, match="lacks the keys.*stem_dim"):
        ModelConfig.from_dict(data)
    with pytest.raises(ValueError, match="'huge'.*tiny"):
        ModelConfig.from_name("huge")
