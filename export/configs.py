"""Configuration files with which labeling tools load a pair of graphs as a custom model."""

from __future__ import annotations

from pathlib import Path

from ..files import whole_file
from .manifest import DECODER, ENCODER, Manifest

# AnyLabeling tells SAM from SAM 2 by the decoder's inputs, X-AnyLabeling by the type
TYPES = {
    "config.yaml": {"sam": "segment_anything", "sam2": "segment_anything"},
    "x-anylabeling.yaml": {"sam": "segment_anything", "sam2": "segment_anything_2"},
}


def write_configs(folder: Path, manifest: Manifest) -> None:
    """Write the files of `TYPES` into `folder`.

    Raises:
        OSError: A file cannot be written.
    """
    for file, types in TYPES.items():
        lines = {
            "type": types[manifest.contract],
            "name": f"fastsam_rwkv-{manifest.weights_sha256[:8]}",
            "display_name": f"RWKV-SAM ({manifest.image_size} pixels)",
            "provider": "fastsam_rwkv",
            "encoder_model_path": ENCODER,
            "decoder_model_path": DECODER,
            "input_size": manifest.frame_size,
            "max_width": manifest.frame_size,
            "max_height": manifest.frame_size,
        }
        with whole_file(folder / file) as stream:
            stream.write("".join(f"{key}: {value}\n" for key, value in lines.items()).encode())
