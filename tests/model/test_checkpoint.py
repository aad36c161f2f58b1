import json
import shutil
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import CONFIG, small_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune

from fastsam_rwkv import RWKVSAM, CheckpointError, ModelConfig, checkpoint, config


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
    of_transformers = ["modeling_rwkv_sam.py", "preprocessor_config.json"]
    files = ["README.md", "config.json", "model.safetensors", *of_transformers]
    assert sorted(p.name for p in folder.iterdir()) == sorted(files)


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
    with pytest.raises(FileNotFoundError, match="carries no default weights.*config.json.*name a model"):
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


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def in_parallel(model):
    model.neck = torch.nn.DataParallel(model.neck)
    model.mask_decoder.iou_head.layers[0] = torch.nn.DataParallel(model.mask_decoder.iou_head.layers[0])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: setattr(model, "backbone", torch.compile(model.backbone, backend="eager")),
        lambda model: setattr(
            model.backbone.layers, "1", torch.compile(torch.nn.DataParallel(model.backbone.layers[1]))
        ),
        in_parallel,
        lambda model: setattr(model, "neck", checkpoint_wrapper(model.neck)),
    ],
    ids=["compile", "compile a layer in parallel", "DataParallel", "activation checkpointing"],
)
def test_wrapped_parts_are_saved_under_their_plain_names(original, wrap, tmp_path):
    model = small_model()
    wrap(model)
    model.save_pretrained(tmp_path)
    assert same(RWKVSAM.from_pretrained(tmp_path).state_dict(), original.state_dict())


class WithAdapter(torch.nn.Module):
    """A linear layer with PEFT's names."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(256, 4, bias=False)})


def set_value(value):
    def change(model):
        with torch.no_grad():
            model.neck[1].weight[3] = value

    return change


def add_head(model):
    model.head = torch.nn.Linear(2, 2)


def overflow(model):
    set_value(1e6)(model)
    model.half()


def without_a_layer(model):
    del model.backbone.layers[1]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: setattr(m.neck, "0", WithAdapter(m.neck[0])), "not merged: .*lora_A.*merge_and_unload"),
        (lambda m: parametrizations.weight_norm(m.neck[0]), "parametrized tensors: neck.0.*remove_parametrizations"),
        (lambda m: parametrizations.spectral_norm(m.neck[0]), "parametrized tensors: neck.0.*remove_parametrizations"),
        (lambda m: torch.nn.utils.weight_norm(m.neck[0]), "weight normalization: neck.0.weight_g.*remove_weight_norm"),
        (lambda m: prune.l1_unstructured(m.neck[0], "weight", 0.3), "pruned .*neck.0.weight_orig.*prune.remove"),
        (add_head, "not what its config describes.*2 unexpected: head.bias, head.weight"),
        (without_a_layer, "15 missing: backbone.layers.1"),
        (set_value(float("nan")), "the model holds NaN or infinite values in neck.1.weight"),
        (set_value(float("inf")), "the model holds NaN or infinite values in neck.1.weight"),
        (overflow, "the model holds NaN or infinite values in neck.1.weight"),
        (lambda m: set_value(1e60)(m.double()), "values beyond torch.float32 in neck.1.weight"),
        (lambda m: m.to("meta"), "not a dense tensor with values.*meta"),
        (lambda m: m.register_buffer("steps", torch.tensor(3)), "1 unexpected: steps"),
        (lambda m: setattr(m, "config", replace(CONFIG, depth=3)), "15 missing: backbone.layers.2"),
    ],
)  # fmt: skip
def test_a_model_that_could_not_be_loaded_is_not_saved(folder, change, message):
    before, model = contents(folder), small_model()
    change(model)
    with pytest.raises(CheckpointError, match=message) as error:
        model.save_pretrained(folder)
    assert len(str(error.value)) < 500
    assert contents(folder) == before


def test_tensors_that_share_memory_are_saved(tmp_path):
    model = small_model()
    model.mask_decoder.mix_stage1.weight = model.mask_decoder.mix_stage2.weight
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(vector, model.parameters())  # views of one tensor
    model.save_pretrained(tmp_path)
    assert same(RWKVSAM.from_pretrained(tmp_path).state_dict(), model.state_dict())


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def write_header(file, header):
    """Write a safetensors file without tensors; `header` may be no JSON."""
    file.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    "header, message",
    [
        (b'{"a":' * 200_000, "not a safetensors file"),
        (b" " * (90 << 20), "header of 94371840 bytes"),
        (json.dumps({"x" * 1_000_000: EMPTY | {"shape": [1], "data_offsets": [0, 4]}}).encode(), "safetensors"),
        (json.dumps({f"{i}": EMPTY for i in range(50_000)}).encode(), "50000 tensors.*10000"),
        (json.dumps({"a": EMPTY | {"shape": [0] * 100_000}}).encode(), "unexpected: a$"),
        (json.dumps({"neck.0.weight": EMPTY | {"shape": [0] * 100_000}}).encode(), "1 mis-shaped: neck.0.weight"),
        (json.dumps({"n" * 1_000_000: EMPTY}).encode(), "unexpected: nnn"),
    ],
    ids=["deep", "90 MB", "long name", "many names", "long shape", "other shape", "long unexpected name"],
)  # fmt: skip
def test_hostile_headers_are_refused_at_once(folder, header, message):
    write_header(folder / "model.safetensors", header)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as error:
        RWKVSAM.from_pretrained(folder)
    assert time.perf_counter() - start < 5
    assert len(str(error.value)) < 500


def test_ten_thousand_unexpected_names_are_refused_at_once(folder):
    rewrite(folder, lambda tensors: tensors.update({f"extra.{i}" + "x" * 100: torch.zeros(1) for i in range(9_000)}))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="9000 unexpected: extra.0x.* and 899[0-9] more$") as error:
        RWKVSAM.from_pretrained(folder)
    assert time.perf_counter() - start < 5
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"variant": ' * 100_000,
        json.dumps({**CONFIG.to_dict(), "depth": 0}).replace('"depth": 0', '"depth": ' + "[" * 900 + "]" * 900),
        json.dumps({**CONFIG.to_dict(), "depth": 60_000_000}),
        json.dumps({**CONFIG.to_dict(), "embed_dim": 10**9}),
        json.dumps({**CONFIG.to_dict(), "stage2_dim": 10**4000}),
        json.dumps({**CONFIG.to_dict(), "depth": 0}).replace('"depth": 0', '"depth": ' + "9" * 10_000),
        json.dumps({**CONFIG.to_dict(), "image_size": 64 * 10**9}),
        json.dumps({**CONFIG.to_dict(), "depth": float("inf")}),
        json.dumps({**CONFIG.to_dict(), "variant": "x" * 900_000}),
        json.dumps({**CONFIG.to_dict(), **{f"key{i}": 0 for i in range(10_000)}}),
        json.dumps({**CONFIG.to_dict(), "format_version": "1" * 900_000}),
        " " * 2_000_000,
    ],
    ids=range(13),
)
def test_hostile_configs_are_refused_at_once(folder, text):
    (folder / "config.json").write_text(text)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="config.json: ") as error:
        RWKVSAM.from_pretrained(folder)
    assert time.perf_counter() - start < 2
    assert len(str(error.value)) < 500


def test_the_largest_config_is_built_at_once():
    start = time.perf_counter()
    with torch.device("meta"):
        model = RWKVSAM(ModelConfig("custom", **config._MOST))
    assert time.perf_counter() - start < 20
    assert len(model.state_dict()) < checkpoint.MOST_TENSORS / 1.5


@pytest.mark.parametrize(
    "flags, dtype", [("sse avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx512f", torch.float32)]
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(flags, dtype, folder, monkeypatch):
    monkeypatch.setattr(checkpoint.Path, "read_text", lambda self: f"flags : {flags} pni\n")
    assert RWKVSAM.from_pretrained(folder, dtype="auto").dtype == dtype


def test_auto_without_a_list_of_flags(folder, monkeypatch):
    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(checkpoint.Path, "read_text", missing)
    assert RWKVSAM.from_pretrained(folder, dtype="auto").dtype == torch.float32
    assert RWKVSAM.from_pretrained(folder, dtype="float16").dtype == torch.float16
    with pytest.raises(ValueError, match="dtype must be 'auto' or one of .*, got 'int8'"):
        RWKVSAM.from_pretrained(folder, dtype="int8")
