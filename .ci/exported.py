"""Run an exported model without PyTorch: python .ci/exported.py FOLDER IMAGE."""

import sys

sys.path.insert(0, ".")
from fastsam_rwkv.export import OnnxPredictor

masks, scores, _ = OnnxPredictor(sys.argv[1]).predict_image(sys.argv[2], box=[318, 222, 408, 332])
assert masks.shape == (1, 400, 600) and masks[0].sum() > 1000, (masks.shape, masks.sum())
assert "torch" not in sys.modules
print(f"Python {sys.version.split()[0]}, no PyTorch: mask of {masks.sum()} pixels, predicted IoU {scores[0]:.2f}")
