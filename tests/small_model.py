"""A model small enough to run anywhere in milliseconds, with every part of the real one."""

import torch

from fastsam_rwkv import RWKVSAM, ModelConfig

CONFIG = ModelConfig(
    "custom",
    stem_dim=8,
    stage1_dim=8,
    stage2_dim=16,
    embed_dim=36,  # quarters of 9: nothing that only works for powers of two
    depth=2,
    image_size=128,
    num_multimask_outputs=3,
)


def small_model(config: ModelConfig = CONFIG) -> RWKVSAM:
    torch.manual_seed(0)
    return RWKVSAM(config).eval()
