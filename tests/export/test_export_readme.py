"""Test of the client in export/README.md."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fastsam_rwkv.export import OnnxPredictor

README = Path(__file__).parents[2] / "export" / "README.md"


def test_client_without_the_package_matches_onnx_predictor(exports, tmp_path):
    (client,) = (block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "sys.argv" in block)
    assert len(client.splitlines()) <= 30 and "fastsam_rwkv" not in client
    y, x = np.mgrid[:200, :300]  # larger than the model input: Pillow smooths if the last resize shrinks
    image = np.stack([x % 256, y, (x + y) % 256], -1).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.png")
    exports.copy("fp32", tmp_path / "out")
    (tmp_path / "client.py").write_text(client)
    command = [sys.executable, "client.py", "out", "photo.png", "20", "30", "200", "150"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    predictor = OnnxPredictor(tmp_path / "out")
    predictor.set_image(image)
    masks, iou_predictions, _ = predictor.predict(box=[20, 30, 200, 150], multimask_output=False)
    assert result.stdout.startswith(f"predicted IoU {iou_predictions[0]:.3f}, ")
    got = np.asarray(Image.open(tmp_path / "mask.png"))
    assert 0.02 < masks.mean() < 0.98 and (got == masks[0]).mean() > 0.995
