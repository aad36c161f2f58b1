"""Embeddings as values: moved, saved, loaded, and set in a predictor."""

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import small_model

from fastsam_rwkv import CheckpointError, ImageEmbedding, Predictor, PromptError
from fastsam_rwkv.modeling.rwkv_sam import RWKVSAM

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
BOX = [10, 8, 70, 50]


@pytest.fixture
def predictor():
    predictor = Predictor(small_model())
    predictor.set_image(IMAGE)
    return predictor


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_saved_embedding_answers_as_the_image_does(predictor, tmp_path):
    want = predictor.predict(box=BOX)
    predictor.embedding.save(tmp_path / "photo.safetensors")
    other = Predictor(copy.deepcopy(predictor.model))
    other.set_embedding(ImageEmbedding.load(tmp_path / "photo.safetensors"))
    assert other.is_image_set and same(other.predict(box=BOX), want)
    with pytest.raises(PromptError, match="zoom needs the image, .* pass zoom='never' or set_image"):
        other.predict(box=[40, 30, 46, 36], zoom="always")
    other.set_image(IMAGE)
    other.predict(box=[40, 30, 46, 36], zoom="always")


def test_to_moves_and_casts_every_map(predictor, tmp_path):
    half = predictor.embedding.to(torch.bfloat16)
    assert {half.image_embed.dtype, half.image_pe.dtype, half.high_res_feats.dtype} == {torch.bfloat16}
    assert half.original_size == (60, 90) and half.to("meta").image_embed.device.type == "meta"
    half.save(tmp_path / "half.safetensors")
    loaded = ImageEmbedding.load(tmp_path / "half.safetensors")
    assert loaded.image_embed.dtype == torch.bfloat16 and torch.equal(loaded.image_embed, half.image_embed)
    before = predictor.predict(box=BOX)
    predictor.set_embedding(loaded)  # is cast to the model's dtype
    assert np.abs(predictor.predict(box=BOX).scores - before.scores).max() < 0.05


def test_models_of_several_dtypes_share_embeddings(predictor):
    rough = Predictor(copy.deepcopy(predictor.model).to(torch.bfloat16))
    rough.set_embedding(predictor.embedding)
    assert np.abs(rough.predict(box=BOX).scores - predictor.predict(box=BOX).scores).max() < 0.05
    rough.set_image(IMAGE)
    predictor.set_embedding(rough.embedding)
    assert predictor.predict(box=BOX).masks.shape == (3, 60, 90)


def test_images_of_a_batch_are_saved_apart(tmp_path):
    model = small_model()
    with torch.no_grad():
        batch = model.encode_image(torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)))
    batch.save(tmp_path / "batch.safetensors")
    loaded = ImageEmbedding.load(tmp_path / "batch.safetensors")
    assert len(loaded) == 2 and torch.equal(loaded.high_res_feats, batch.high_res_feats)
    loaded[1].save(tmp_path / "one.safetensors")
    assert torch.equal(ImageEmbedding.load(tmp_path / "one.safetensors").image_embed, batch.image_embed[1:])


def test_embeddings_a_predictor_refuses(predictor):
    embedding, want = predictor.embedding, predictor.predict(box=BOX)
    twice = replace(
        embedding,
        image_embed=embedding.image_embed.repeat(2, 1, 1, 1),
        high_res_feats=embedding.high_res_feats.repeat(2, 1, 1, 1),
    )
    with torch.no_grad():
        wide = predictor.model.encode_image(torch.randn(1, 3, 96, 64))
    for wrong, message in (
        (twice, "holds 2 images; pass one of them"),
        (replace(embedding, original_size=None), "does not name its image's size"),
        (replace(wide, original_size=(60, 90)), "an input of 96x64 pixels; this model's has 128 a side"),
        (replace(embedding, fingerprint="0" * 64), "by a model with other weights"),
        (replace(embedding, image_pe=embedding.image_pe[1:]), "maps of an input of 128x128 cannot be"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor.set_embedding(wrong)
    with pytest.raises(TypeError, match="must be an ImageEmbedding, got 'photo"):
        predictor.set_embedding("photo.safetensors")
    assert same(predictor.predict(box=BOX), want)  # what was set before is still set
    predictor.set_embedding(replace(embedding, fingerprint=None))
    assert same(predictor.predict(box=BOX), want)


def test_changed_weights_are_noticed(predictor):
    embedding = predictor.embedding
    with torch.no_grad():
        predictor.model.neck.requires_grad_(False)
        next(predictor.model.neck.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="other weights; set the image again"):
        predictor.set_embedding(embedding)


def test_the_digest_is_of_the_weights_not_of_wrappers(predictor):
    digest = predictor.embedding.fingerprint
    predictor.model.neck = torch.nn.DataParallel(predictor.model.neck)
    assert predictor.embedding.fingerprint == digest


def damaged(file, **changes):
    """Rewrite a saved embedding with other tensors, or other fields of its description."""
    tensors = load_file(file)
    about = {"input_size": [128, 128], "original_size": [60, 90], "fingerprint": None}
    metadata = {"fastsam_rwkv": "fastsam_rwkv.ImageEmbedding 1", "embedding": json.dumps(about)}
    for name, value in changes.items():
        if name == "metadata":
            metadata = value
        elif name in about:
            metadata["embedding"] = json.dumps({**about, name: value})
        else:
            tensors = {**{k: v for k, v in tensors.items() if k != name}, **({} if value is None else {name: value})}
    save_file(tensors, file, metadata)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metadata": {"format": "pt"}}, "not written by `ImageEmbedding.save` of this release"),
        ({"image_pe": None}, "not written by"),
        ({"more": torch.zeros(1)}, "not written by"),
        ({"image_embed": torch.zeros(1, 8, 7, 256)}, "maps of an input of 128x128 cannot be"),
        ({"image_embed": torch.zeros(0, 8, 8, 256)}, "maps of an input of 128x128 cannot be"),
        ({"high_res_feats": torch.zeros(1, 32, 32, 63)}, "maps of an input of 128x128 cannot be"),
        ({"image_embed": torch.zeros(())}, "maps of an input of 128x128 cannot be"),
        ({"image_embed": torch.full((1, 8, 8, 256), torch.nan)}, "holds NaN or infinite values in image_embed"),
        ({"image_embed": torch.zeros((1, 8, 8, 256), dtype=torch.int32)}, "not float64, float32"),
        ({"original_size": [60]}, "not enough values"),
        ({"original_size": [60, 1e9]}, "a side cannot be 1000000000.0"),
        ({"original_size": [60, 1 << 40]}, "a side cannot be 1099511627776"),
        ({"original_size": [0, 90]}, "a side cannot be 0"),
        ({"original_size": 7}, "cannot unpack"),
        ({"input_size": [95, 128]}, "maps of an input of 95x128 cannot be"),
        ({"metadata": {"fastsam_rwkv": "fastsam_rwkv.ImageEmbedding 1", "embedding": "[" * 100_000}}, "recursion"),
        ({"metadata": {"fastsam_rwkv": "fastsam_rwkv.ImageEmbedding 1", "embedding": "[1]"}}, "holds no image"),
        ({"metadata": {"fastsam_rwkv": "fastsam_rwkv.ImageEmbedding 1"}}, "holds no image embedding: 'embedding'"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_files_that_hold_no_embedding(changes, message, predictor, tmp_path):
    file = tmp_path / "photo.safetensors"
    predictor.embedding.save(file)
    damaged(file, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        ImageEmbedding.load(file)
    assert len(str(error.value)) < 500


def test_a_cut_file_and_no_file(predictor, tmp_path):
    file = tmp_path / "photo.safetensors"
    predictor.embedding.save(file)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cut off"):
        ImageEmbedding.load(file)
    with pytest.raises(FileNotFoundError):
        ImageEmbedding.load(tmp_path / "none.safetensors")


def test_no_image_no_embedding():
    with pytest.raises(RuntimeError, match="an image must be set"):
        _ = Predictor(small_model()).embedding


def test_the_bundled_model_is_loaded_once_from_many_threads(monkeypatch):
    loads, together = [], threading.Barrier(8)

    def load():
        loads.append(1)
        threading.Event().wait(0.1)
        return small_model()

    monkeypatch.setattr(RWKVSAM, "from_pretrained", load)
    predictor = Predictor()

    def model(_):
        together.wait(10)
        return predictor.model

    with ThreadPoolExecutor(8) as pool:
        assert len(set(map(id, pool.map(model, range(8))))) == 1
    assert len(loads) == 1
