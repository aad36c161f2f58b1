import time
import tracemalloc
import zipfile

import pytest
import torch
from golden import published_weights
from safetensors.torch import save_file

from fastsam_rwkv import RWKVSAM, CheckpointError, ModelConfig, convert_upstream
from fastsam_rwkv.convert import convert_file


@pytest.fixture(scope="module")
def weights():
    return published_weights("tiny")


def with_three_masks(weights):
    """Return weights with the names of a model trained with SAM's 1 + 3 mask outputs."""
    weights = dict(weights)
    prefix = "mask_decoder.mask_decoder.output_hypernetworks_mlps."
    for name in [n for n in weights if n.startswith(prefix)]:
        for i in (1, 2, 3):
            weights[name.replace(f"{prefix}0.", f"{prefix}{i}.")] = weights[name] + i
    return weights


def test_variant_and_mask_count_come_from_the_shapes(weights):
    config, state_dict = convert_upstream(weights)
    assert config == ModelConfig.from_name("tiny")
    RWKVSAM(config).load_state_dict(state_dict, strict=True)
    config, state_dict = convert_upstream(with_three_masks(weights), image_size=512)
    assert config == ModelConfig.from_name("tiny", image_size=512, num_multimask_outputs=3)
    model = RWKVSAM(config)
    model.load_state_dict(state_dict, strict=True)
    assert torch.equal(model.mask_decoder.mask_tokens, weights["mask_decoder.mask_decoder.mask_tokens.weight"])


def test_wrappers_prefixes_and_formats_give_the_same_model(weights, tmp_path):
    prefixed = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"state_dict": prefixed, "optimizer": {"state": {0: torch.zeros(3)}, "lr": 0.1}}, tmp_path / "a.pth")
    save_file(weights, tmp_path / "b.safetensors")
    expected = convert_upstream(weights)[1]
    for file in ("a.pth", "b.safetensors"):
        assert convert_file(tmp_path / file, tmp_path / f"out_{file}").variant == "tiny"
        loaded = RWKVSAM.from_pretrained(tmp_path / f"out_{file}").state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_missing_unexpected_and_misshaped_names_are_listed(weights):
    broken = dict(weights)
    del broken["backbone.layers.3.attn.key.weight"]
    broken["backbone.extra.weight"] = torch.zeros(1)
    broken["neck.out_proj.1.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as error:
        convert_upstream(broken)
    for part in (
        "1 missing: backbone.layers.3.spatial_mix.key.weight",
        "backbone.extra.weight",
        "neck.out_proj.1.bias",
    ):
        assert part in str(error.value)


def test_an_unexpected_variant_is_refused(weights):
    with pytest.raises(CheckpointError, match="'small' was asked for.*'tiny'"):
        convert_upstream(weights, variant="small")


def test_other_models_are_refused():
    with pytest.raises(CheckpointError, match="not the published implementation's names"):
        convert_upstream({"image_encoder.pos_embed": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="not tensors.*'epoch'"):
        convert_upstream({"epoch": 3})


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        convert_file(tmp_path / "nothing.pth", tmp_path / "out")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(CheckpointError, match="broken.pth"):
        convert_file(tmp_path / "broken.pth", tmp_path / "out")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match="broken.safetensors"):
        convert_file(tmp_path / "broken.safetensors", tmp_path / "out")


@pytest.mark.parametrize("data", [b"hello world", b"<!DOCTYPE html>", b"version https://git-lfs", b""], ids=str)
def test_files_that_torch_did_not_write_are_refused(data, tmp_path):
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="a.pth' is not a PyTorch file.*download it again") as error:
        convert_file(tmp_path / "a.pth", tmp_path / "out")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("data", [b"\x80", b"\x80\x02garbage", b"\x80\x02e."], ids=str)
def test_truncated_pickles_are_refused(data, tmp_path):
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="a.pth' is (damaged|not a readable)") as error:
        convert_file(tmp_path / "a.pth", tmp_path / "out")
    assert "weights_only" not in str(error.value)


def without(weights, prefix):
    return {name: t for name, t in weights.items() if not name.startswith(prefix)}


def changed(weights, name, tensor):
    assert name in weights
    return weights | {name: tensor}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: without(w, "mask_decoder."), r"'mask_decoder\.mask_decoder\..*' is missing"),
        (lambda w: without(w, "backbone.layers."), r"'backbone\.layers\.\*' is missing"),
        (lambda w: {n: t for n, t in with_three_masks(w).items() if "mlps.2." not in n}, "num_multimask_outputs"),
        (lambda w: changed(w, "backbone.final_norm.weight", torch.tensor(1.0)), "final_norm.weight. has a single"),
        (lambda w: changed(w, "mask_decoder.mask_decoder.mask_tokens.weight", torch.tensor(1.0)), "mask_tokens"),
        (lambda w: changed(w, "mask_decoder.mix_feat_proj.0.weight", torch.ones(3)), "mix_feat_proj.0.weight"),
        (lambda w: changed(w, "backbone.final_norm.weight", torch.ones(192, dtype=torch.int32)), "final_norm.*int32"),
        (lambda w: changed(w, "backbone.final_norm.weight", torch.full((192,), float("nan"))), "NaN.*final_norm"),
        (lambda w: w | {"extra": torch.eye(3).to_sparse()}, "sparse.*extra"),
        (lambda w: w | {"bn.num_batches_tracked": torch.tensor(1)}, "unexpected: bn.num_batches_tracked"),
    ],
)
def test_incomplete_models_are_refused(weights, change, message, tmp_path):
    torch.save(change(dict(weights)), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        convert_file(tmp_path / "a.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_pickled_code_is_not_executed(tmp_path, capsys):
    torch.save({"state_dict": {}, "meta": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"\(print\).*Save its weights alone") as error:
        convert_file(tmp_path / "evil.pth", tmp_path / "out")
    assert "weights_only" not in str(error.value)
    assert "this must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("backbone.", "backbone._orig_mod.").replace("layers.3.", "layers.3.module."),
        lambda name: f"base_model.model.{name}".replace("attn.key.", "attn.key.base_layer."),
        lambda name: f"_fsdp_wrapped_module.{name}".replace(".attn.", "._checkpoint_wrapped_module.attn."),
    ],
)
def test_marks_of_wrappers_are_removed_wherever_they_stand(weights, rename):
    expected = convert_upstream(weights)[1]
    got = convert_upstream(
        {**{rename(name): tensor for name, tensor in weights.items()}, "n_averaged": torch.tensor(3)}
    )[1]
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_adapters_and_names_that_occur_twice_are_refused(weights):
    lora = {"base_model.model.backbone.layers.0.attn.key.lora_A.default.weight": torch.zeros(4, 192)}
    with pytest.raises(CheckpointError, match="not merged: .*lora_A.*merge_and_unload"):
        convert_upstream(weights | lora)
    with pytest.raises(CheckpointError, match="occur twice.*module.backbone.final_norm.weight"):
        convert_upstream(weights | {"module.backbone.final_norm.weight": torch.zeros(192)})


def many_layers(weights, count):
    layer = {name: t for name, t in weights.items() if name.startswith("backbone.layers.0.")}
    return weights | {n.replace("layers.0.", f"layers.{i}.", 1): t for i in range(count) for n, t in layer.items()}


def expanded(weights):
    """Return weights of a model of 8192 channels, which a few bytes stand for."""
    wide = {name: torch.zeros(1).expand(*(8192 if n == 192 else n for n in t.shape)) for name, t in weights.items()}
    return {name: wide[name] if 192 in t.shape else t for name, t in weights.items()}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: many_layers(w, 20_000), "the checkpoint holds .* tensors; the largest model has 10000"),
        (lambda w: many_layers(w, 300), "'depth' must be at most 256, got 300"),
        (lambda w: w | {f"extra.{i}": torch.zeros(1) for i in range(100_000)}, "holds .* tensors; the largest"),
        (lambda w: w | {f"extra.{i}": torch.zeros(1) for i in range(5_000)}, "5000 unexpected: extra.0, .* more$"),
        (lambda w: w | {"x" * 1_000_000: torch.zeros(1)}, "1 unexpected: xxx"),
        (lambda w: w | {"x" * 1_000_000: 3}, "not tensors: 'xxx"),
        (lambda w: changed(w, "backbone.final_norm.weight", torch.zeros(192).to_sparse()), "sparse"),
        (
            lambda w: changed(w, "backbone.final_norm.weight", torch.zeros(1).expand(10**9)),
            "'embed_dim' must be at most",
        ),
        (expanded, "show many more values"),
    ],
    ids=range(9),
)
def test_hostile_sizes_are_refused_at_once(weights, change, message):
    hostile = change(dict(weights))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as error:
        convert_upstream(hostile)
    assert time.perf_counter() - start < 10
    assert len(str(error.value)) < 500


def test_an_image_size_that_no_model_has_is_refused(weights):
    with pytest.raises(CheckpointError, match="multiple of 64, got 1000"):
        convert_upstream(weights, image_size=1000)


def repack(src, dst, changes):
    """Copy an archive with compression and other contents of some records."""
    with zipfile.ZipFile(src) as old, zipfile.ZipFile(dst, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.namelist():
            new.writestr(record, changes.get(record.rpartition("/")[2], old.read(record)))


@pytest.mark.parametrize("record", ["data.pkl", "0", "version"])
def test_archives_that_unpack_to_much_more_are_refused_before(record, tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pth")
    repack(tmp_path / "a.pth", tmp_path / "bomb.pth", {record: bytes(100 << 20)})
    assert (tmp_path / "bomb.pth").stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="bomb.pth' unpacks to .* records of 1048.* bytes"):
        convert_file(tmp_path / "bomb.pth", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


def test_a_compressed_archive_of_weights_is_read(weights, tmp_path):
    torch.save(weights, tmp_path / "a.pth")
    repack(tmp_path / "a.pth", tmp_path / "b.pth", {})
    assert convert_file(tmp_path / "b.pth", tmp_path / "out").variant == "tiny"


def test_archives_of_many_records_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "many.pth", "w") as archive:
        for i in range(100_001):
            archive.writestr(f"{i}", b"")
    with pytest.raises(CheckpointError, match="unpacks to 100001 records"):
        convert_file(tmp_path / "many.pth", tmp_path / "out")


def test_circles_of_links_and_unknown_users_are_os_errors(tmp_path):
    (tmp_path / "a.pth").symlink_to(tmp_path / "b.pth")
    (tmp_path / "b.pth").symlink_to(tmp_path / "a.pth")
    for src in (tmp_path / "a.pth", "~nobody-of-that-name/a.pth"):
        with pytest.raises(OSError, match="no checkpoint file"):
            convert_file(src, tmp_path / "out")
    with pytest.raises(OSError):
        convert_file(tmp_path / "a.pth", tmp_path / "a.pth")


def test_a_hostile_safetensors_file_is_refused_as_by_the_reader(tmp_path):
    (tmp_path / "a.safetensors").write_bytes((90 << 20).to_bytes(8, "little") + b" " * (90 << 20))
    with pytest.raises(CheckpointError, match="header of 94371840 bytes"):
        convert_file(tmp_path / "a.safetensors", tmp_path / "out")
