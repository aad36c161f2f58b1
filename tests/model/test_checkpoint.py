import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import CONFIG, small_model

from fastsam_rwkv import RWKVSAM, CheckpointError, checkpoint


@pytest.fixture(scope="module")
def original():
    return small_model()


@pytest.fixture
def folder(original, tmp_path):
    original.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    """Change the tensors of a saved model in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_round_trip_is_exact(original, folder):
    model = RWKVSAM.from_pretrained(folder)
    assert model.config == CONFIG
    assert same(model.state_dict(), original.state_dict())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    card = (folder / "README.md").read_text()
    front_matter = card.split("---\n")[1].splitlines()
    assert {"library_name: fastsam-rwkv", "pipeline_tag: mask-generation"} <= set(front_matter)
    assert not any(line.startswith("license:") for line in front_matter)  # whose weights they are, we cannot know
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_tilde_is_the_home_folder(original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    original.save_pretrained("~/model")
    assert (tmp_path / "model" / "config.json").is_file()
    assert same(RWKVSAM.from_pretrained("~/model").state_dict(), original.state_dict())


def test_a_loaded_model_does_not_change_with_its_file(original, folder):
    model = RWKVSAM.from_pretrained(folder)
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:  # as `cp` writes over a file
        stream.write(bytes(file.stat().st_size))
    assert same(model.state_dict(), original.state_dict())


def test_an_existing_card_is_kept(original, folder):
    (folder / "README.md").write_text("mine")
    original.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_half_precision_is_stored_and_widened(folder, tmp_path):
    small_model().half().save_pretrained(tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert stored["neck.0.weight"].dtype == torch.float16
    model = RWKVSAM.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.float32
    assert torch.equal(model.neck[0].weight, stored["neck.0.weight"].float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype(folder, dtype, original):
    model = RWKVSAM.from_pretrained(folder, dtype=dtype)
    assert model.dtype == dtype
    position = model.prompt_encoder.position.frequencies
    assert torch.equal(position, original.prompt_encoder.position.frequencies)  # never rounded


def test_single_file_with_its_config_inside_or_beside(folder, tmp_path, original):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "model.safetensors", alone / "weights.safetensors")
    assert RWKVSAM.from_pretrained(alone / "weights.safetensors").config == CONFIG
    tensors = load_file(alone / "weights.safetensors")
    save_file(tensors, alone / "weights.safetensors")  # without metadata
    with pytest.raises(CheckpointError, match="no config.*config.json beside it"):
        RWKVSAM.from_pretrained(alone / "weights.safetensors")
    shutil.copy(folder / "config.json", alone)
    assert same(RWKVSAM.from_pretrained(alone / "weights.safetensors").state_dict(), original.state_dict())


def test_metadata_takes_precedence_over_a_config_beside_a_single_file(folder):
    (folder / "config.json").write_text('{"somebody": "else"}')
    assert RWKVSAM.from_pretrained(folder / "model.safetensors").config == CONFIG
    with pytest.raises(CheckpointError, match="config.json: "):  # a folder is ours, with all its files
        RWKVSAM.from_pretrained(folder)


def test_strided_tensors_are_saved(tmp_path):
    model = small_model()
    weight = model.neck[0].weight
    model.neck[0].weight = torch.nn.Parameter(weight.detach().t().contiguous().t())
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(load_file(tmp_path / "model" / "model.safetensors")["neck.0.weight"], weight)


def test_a_buffer_that_no_checkpoint_sets_is_a_runtime_error(folder):
    class WithGrid(RWKVSAM):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("grid", torch.arange(3.0), persistent=False)

    with pytest.raises(RuntimeError, match="no checkpoint sets grid"):
        checkpoint.load_model(WithGrid, folder)


def test_names_that_do_not_fit_are_listed(folder):
    def change(tensors):
        del tensors["neck.0.weight"]
        tensors["neck.9.weight"] = torch.zeros(1)
        tensors["backbone.norm.bias"] = torch.zeros(7)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        RWKVSAM.from_pretrained(folder)
    for part in (
        "1 missing: neck.0.weight",
        "1 unexpected: neck.9.weight",
        "mis-shaped: backbone.norm.bias (here (7,), expected (36,))",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(folder, value):
    rewrite(folder, lambda tensors: tensors["neck.1.weight"].__setitem__(3, value))
    with pytest.raises(CheckpointError, match="NaN or infinite values in neck.1.weight"):
        RWKVSAM.from_pretrained(folder)


def test_float64_weights_become_float32(folder, original):
    rewrite(folder, lambda tensors: tensors.update({"neck.1.weight": tensors["neck.1.weight"].double()}))
    assert same(RWKVSAM.from_pretrained(folder).state_dict(), original.state_dict())


def test_weights_that_overflow_the_dtype_are_refused(folder):
    rewrite(folder, lambda tensors: tensors["neck.1.weight"].__setitem__(3, 1e6))
    RWKVSAM.from_pretrained(folder, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="beyond torch.float16 in neck.1.weight; torch.bfloat16"):
        RWKVSAM.from_pretrained(folder, dtype=torch.float16)


def test_integer_weights_are_refused(folder):
    rewrite(folder, lambda tensors: tensors.update({"neck.1.weight": torch.ones(256, dtype=torch.int64)}))
    with pytest.raises(CheckpointError, match=r"not float64, .* or bfloat16: neck.1.weight \(torch.int64\)"):
        RWKVSAM.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_weights(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="cut off or not a safetensors file.*fetch it again.*hf download --force"):
        RWKVSAM.from_pretrained(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "config.json: "),
        (b"\xff\xfe", "config.json: .*decode byte"),
        ("[1]", "expected a JSON object, got list"),
        (json.dumps({**CONFIG.to_dict(), "windows": 3}), "unknown config keys.*windows"),
        (json.dumps({**CONFIG.to_dict(), "format_version": 99}), "format_version 99"),
        (json.dumps({**CONFIG.to_dict(), "image_size": 100}), "multiple of 64, got 100"),
    ],
)
def test_invalid_configs_are_refused(folder, text, message):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=message):
        RWKVSAM.from_pretrained(folder)


def test_folders_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        RWKVSAM.from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin.*fastsam-rwkv convert"):
        RWKVSAM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="not a .safetensors file.*convert"):
        RWKVSAM.from_pretrained(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "source",
    ["./nothing", "/nothing/here", "nothing.safetensors", "runs/last.pth", "~nobody/x", "tiny", "a/b/c", "a--b/c", ""],
)
def test_paths_that_do_not_exist(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if source == "":
        (tmp_path / "model.safetensors").unlink(missing_ok=True)  # "" is the current folder
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        RWKVSAM.from_pretrained(source)


def test_missing_bundled_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path / "weights" / "tiny")
    with pytest.raises(FileNotFoundError, match="carries no default weights.*config.json.*from_pretrained"):
        RWKVSAM.from_pretrained()


def test_invalid_devices_and_dtypes_are_refused(folder):
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        RWKVSAM.from_pretrained(folder, device="gpu")
    with pytest.raises(ValueError, match="device 'meta' holds no weights"):
        RWKVSAM.from_pretrained(folder, device="meta")
    if not torch.xpu.is_available():
        with pytest.raises(ValueError, match="device 'xpu' cannot be used here.*device='cpu'"):
            RWKVSAM.from_pretrained(folder, device="xpu")
    with pytest.raises(ValueError, match="dtype.*torch.int8"):
        RWKVSAM.from_pretrained(folder, dtype=torch.int8)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA GPU"):
            RWKVSAM.from_pretrained(folder, device="cuda")


def test_a_folder_that_cannot_be_written(original, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write the model to.*you may write to"):
        original.save_pretrained(tmp_path / "file" / "model")


def test_a_save_that_fails_half_way_leaves_the_old_files(original, folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        original.save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
