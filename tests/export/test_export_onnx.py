"""Tests of the ONNX export: agreement with PyTorch, files, and errors."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exports import FORMS, feeds_of, model_to_export
from PIL import Image
from small_model import CONFIG, small_model

from fastsam_rwkv import Predictor
from fastsam_rwkv.cli import main
from fastsam_rwkv.export import ExportError, Manifest, OnnxPredictor, adopt_onnx, check_onnx, export_onnx, translations
from fastsam_rwkv.export import onnx as exporter
from fastsam_rwkv.export.graphs import masks_to_size
from fastsam_rwkv.export.manifest import describe, make_stage
from fastsam_rwkv.export.translations import TRANSLATIONS
from fastsam_rwkv.predictor.frame import ImageFrame
from fastsam_rwkv.triton_kernels.bi_wkv import bi_wkv, bi_wkv_ref

FORM_NAMES = ["fp32", "fp16", "fixed"]


@pytest.fixture(scope="module")
def model():
    return model_to_export()


@pytest.fixture(scope="module")
def photo():
    y, x = np.mgrid[:90, :150]
    return np.stack([x + y, 2 * x % 256, 255 - 2 * y], -1).astype(np.uint8)


PROMPTS = {
    "click": {"point_coords": [[60, 40]], "point_labels": [1]},
    "box": {"box": [20, 10, 120, 80]},
    "clicks and box": {"point_coords": [[60, 40], [5, 5]], "point_labels": [1, 0], "box": [20, 10, 120, 80]},
    "padding": {"point_coords": [[60, 40], [0, 0]], "point_labels": [1, -1]},
    "many": {"point_coords": np.arange(70).reshape(7, 5, 2) * 1.2, "point_labels": np.tile([1, 0, 1, 0, -1], (7, 1))},
    "boxes": {"box": [[20, 10, 120, 80], [0, 0, 30, 30]]},
    "mask": {"mask_input": np.linspace(-9, 9, 32 * 32, dtype=np.float32).reshape(1, 32, 32)},
}


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("form", FORM_NAMES)
def test_onnx_predictor_matches_predictor(form, prompt, multimask, exports, model, photo):
    exported, reference = OnnxPredictor(exports[form]), Predictor(model)
    for predictor in (exported, reference):
        predictor.set_image(photo)
    if form == "fixed" and multimask:
        with pytest.raises(ValueError, match="this one has one mask"):
            exported.predict(**prompt, multimask_output=True)
        return
    got = exported.predict(**prompt, multimask_output=multimask, return_logits=True)
    want = reference.predict(**prompt, multimask_output=multimask, return_logits=True)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == np.float32
        np.testing.assert_allclose(g, w, atol=2e-2 if form == "fp16" else 1e-4)
    masks = exported.predict(**prompt, multimask_output=multimask)[0]
    assert masks.dtype == bool and (masks == (got[0] > 0)).all()
    embedding = exported.get_image_embedding()
    assert embedding.shape == (1, 256, 8, 8) == tuple(reference.get_image_embedding().shape)


def test_onnx_predictor_zooms_as_predictor_does(exports, model, photo):
    for prompt in ({"box": [[60, 20, 75, 30], [5, 5, 70, 60]]}, {"box": [60, 20, 75, 30], "zoom": "always"}):
        got = OnnxPredictor(exports["fp32"]).predict_image(photo, **prompt, return_logits=True)
        want = Predictor(model).predict_image(photo, **prompt, return_logits=True)
        assert (want.masks == -10).any()
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, atol=1e-4)


def test_onnx_predictor_has_the_interface_of_predictor(exports, photo):
    predictor = OnnxPredictor(exports["fp32"])
    assert predictor.providers == ["CPUExecutionProvider"] and not predictor.is_image_set
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(point_coords=[[1, 2]])
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.get_image_embedding()
    predictor.set_image(photo[..., ::-1], image_format="BGR")
    low = predictor.predict(point_coords=[[1, 2]])[2]
    predictor.set_image(photo)
    np.testing.assert_array_equal(low, predictor.predict(point_coords=[[1, 2]])[2])
    with pytest.warns(UserWarning, match="outside the image"):
        predictor.predict(point_coords=[[1, 200]])
    predictor.reset_image()
    assert not predictor.is_image_set
    public = {name for name in dir(Predictor) if not name.startswith("_")} - {"device", "model"}
    public -= {"embedding", "set_embedding"}  # of tensors; arrays are kept by pickling the predictor
    public -= {"transform", "predict_torch", "set_torch_image", "features", "original_size", "input_size"}  # likewise
    public -= {"from_pretrained"}  # the class takes the folder of an export
    assert public <= set(dir(OnnxPredictor))


def test_copies_of_an_onnx_predictor_keep_its_image(exports, photo):
    predictor = OnnxPredictor(exports["fp32"], providers="CPUExecutionProvider")
    predictor.set_image(photo)
    want = predictor.predict(box=[20, 10, 120, 80], return_logits=True)
    for copied in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        predictor.reset_image()  # copies do not share the image
        got = copied.predict(box=[20, 10, 120, 80], return_logits=True, zoom="never")
        np.testing.assert_array_equal(got.masks, want.masks)
        copied.predict(box=[20, 10, 30, 20], zoom="always")
        assert copied.providers == ["CPUExecutionProvider"]
        predictor.set_image(photo)
    configured = OnnxPredictor(exports["fp32"], session_options=onnxruntime.SessionOptions())
    with pytest.raises(TypeError, match="with session_options can be neither pickled nor copied"):
        copy.deepcopy(configured)


def test_all_providers_and_the_home_folder(exports, photo, monkeypatch):
    monkeypatch.setenv("HOME", str(exports["fp32"].parent))
    monkeypatch.setenv("USERPROFILE", str(exports["fp32"].parent))
    predictor = OnnxPredictor(f"~/{exports['fp32'].name}", providers=None)
    assert set(predictor.providers) <= set(onnxruntime.get_available_providers())
    assert predictor.predict_image(photo, box=[20, 10, 120, 80]).masks.shape == (1, 90, 150)
    assert Manifest.read(f"~/{exports['fp32'].name}").num_masks == predictor.manifest.num_masks


def test_onnx_predictor_runs_without_torch(exports):
    code = (
        "import sys; sys.modules['torch'] = None; import numpy as np; from fastsam_rwkv.export import OnnxPredictor; "
        f"p = OnnxPredictor({str(exports['fp32'])!r}); p.set_image(np.zeros((50, 80, 3), np.uint8)); "
        "print(p.predict(box=[5, 5, 40, 40])[0].shape)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "(3, 50, 80)", result.stderr


def test_encoder_of_a_batch_matches_encode_image(exports, model):
    pixels = torch.randn(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(exports["fp32"] / "encoder.onnx")
    maps = session.run(None, {"image": pixels.numpy()})
    with torch.inference_mode():
        embedding = model.encode_image(pixels)
    maps = [np.concatenate(maps[:2], 1), maps[2]]
    for got, want in zip(maps, (embedding.high_res_feats, embedding.image_embed), strict=True):
        np.testing.assert_allclose(got, want.permute(0, 3, 1, 2).numpy(), atol=2e-5)


def test_names_shapes_and_dtypes(exports):
    def described(values):
        rows = {}
        for value in values:
            tensor = value.type.tensor_type
            shape = [d.dim_param or d.dim_value for d in tensor.shape.dim]
            rows[value.name] = shape, onnx.TensorProto.DataType.Name(tensor.elem_type)
        return rows

    maps = {"high_res_feats_0": (32, 32), "high_res_feats_1": (32, 32), "image_embed": (256, 8)}
    for form, (image, precision, masks) in {
        "fp32": ((["batch", 3, 128, 128], "FLOAT"), "FLOAT", 4),
        "fp16": ((["batch", "height", "width", 3], "UINT8"), "FLOAT16", 4),
        "fixed": (([2, 3, 128, 128], "FLOAT"), "FLOAT", 1),
        "sam": ((["height", "width", 3], "UINT8"), "FLOAT", 1),
    }.items():
        encoder, decoder = (onnx.load(exports[form] / f"{name}.onnx") for name in ("encoder", "decoder"))
        onnx.checker.check_model(encoder, full_check=True)
        onnx.checker.check_model(decoder, full_check=True)
        assert [(o.domain, o.version) for o in encoder.opset_import] == [("", 20)]
        sam = form == "sam"
        n, low = {"fixed": 2, "sam": 1}.get(form, "batch"), 256 if sam else 32
        embedding = {"image_embeddings": (1280, 8)} if sam else maps
        assert described(encoder.graph.input) == {"input_image" if sam else "image": image}
        outputs = described(encoder.graph.output)
        assert outputs == {k: ([n, c, s, s], precision) for k, (c, s) in embedding.items()}
        assert list(outputs) == list(embedding)  # programs take them by position
        inputs = described(decoder.graph.input)
        assert inputs == {
            **{k: ([1, c, s, s], precision) for k, (c, s) in embedding.items()},
            "point_coords": (["num_prompts", "num_points", 2], "FLOAT"),
            "point_labels": (["num_prompts", "num_points"], "FLOAT"),
            "mask_input": (["num_prompts", 1, low, low], "FLOAT"),
            "has_mask_input": ([1], "FLOAT"),
            **({"orig_im_size": ([2], "FLOAT")} if sam else {}),
        }
        if not sam:
            assert list(inputs)[:3] == ["image_embed", "high_res_feats_0", "high_res_feats_1"]
        outputs = described(decoder.graph.output)
        assert outputs["low_res_masks"] == (["num_prompts", masks, low, low], "FLOAT")
        assert outputs["iou_predictions"] == (["num_prompts", masks], "FLOAT")
        assert list(outputs) == (["masks"] if sam else []) + (
            ["iou_predictions", "low_res_masks"] if sam else ["low_res_masks", "iou_predictions"]
        )
        assert Manifest.read(exports[form]).num_masks == masks
        assert {p.key: p.value for p in encoder.metadata_props}["image_size"] == "128"


def session_of(function, args, file, flips=False):
    """Translate a function of tensors to ONNX and return an ONNX Runtime session."""
    module = torch.nn.Module()
    module.forward = function
    with torch.no_grad():
        program = torch.export.export(module, args, strict=False)
        onnx_program = torch.onnx.export(
            program, (), opset_version=20, custom_translation_table=TRANSLATIONS, optimize=False, verbose=False
        )
    translations.optimize(onnx_program.model, flips=flips)
    onnx_program.save(str(file))
    return onnxruntime.InferenceSession(file)


def test_mask_resize_in_the_graph_matches_image_frame(tmp_path):
    """`translations.masks_to_size` restates `ImageFrame.of`; both must give the same sizes."""
    generator = np.random.default_rng(0)
    low = generator.standard_normal((1, 2, 32, 32), np.float32)
    args = torch.from_numpy(low), torch.tensor([96.0, 127.0])
    session = session_of(lambda low, size: masks_to_size(low, size, 128), args, tmp_path / "resize.onnx")
    sizes = [(90, 150), (150, 90), (128, 128), (127, 129), (2, 3), (2049, 1537)]
    sizes += [(5, 256), (13, 256), (256, 9), (27, 768), (1024, 36)]  # the resized side ends in .5 and rounds up
    sizes += [(1, 300), (3000, 7), (1, 256), (2, 1900)]  # the resized side is at least 1
    sizes += [tuple(int(side) for side in 2 ** generator.uniform(1, 10.5, 2)) for _ in range(40)]
    for size in sizes:
        names = [value.name for value in session.get_inputs()]
        (got,) = session.run(None, dict(zip(names, (low, np.array(size, np.float32)), strict=True)))
        want = ImageFrame.of(size, 128).masks_to_image(low)
        assert got.shape == want.shape == (1, 2, *size)
        np.testing.assert_allclose(got, want, atol=1e-3, err_msg=str(size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 2, 37, 1024])
def test_scan_in_the_graph_matches_float64(T, dtype, tmp_path):
    """Decays go up to the bound that the export allows; k has the spread that float16 resolves."""
    generator = torch.Generator().manual_seed(0)
    k, v, r = (s * torch.randn(2, T, 6, generator=generator, dtype=torch.float64) for s in (4, 1, 1))
    w, u = torch.ones(6, dtype=torch.float64), torch.linspace(-5, 5, 6, dtype=torch.float64) * T
    args = tuple(t.to(dtype) for t in (w, u, k, v, r))
    session = session_of(lambda w, u, k, v, r: bi_wkv(w, u, k, v, r, 1 / T), args, tmp_path / "scan.onnx")
    for decay in (0.0, 5.0, -20.0, 40.0, -40.0):
        args = (torch.full_like(args[0], decay), *args[1:])
        (got,) = session.run(None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)})
        want = bi_wkv_ref(*(t.double() for t in args), 1 / T).numpy()
        assert got.dtype == args[0].numpy().dtype
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error <= (1e-5 if dtype == torch.float32 else 6e-4), decay


# Attributes in the graphs, all of which TensorRT's parser must support
ATTRIBUTES = {
    "AveragePool": {"auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides"},
    "Cast": {"to", "saturate"},
    "Concat": {"axis"},
    "Conv": {"auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"},
    "ConvTranspose": {"auto_pad", "dilations", "group", "kernel_shape", "output_padding", "pads", "strides"},
    "CumSum": {"exclusive", "reverse"},
    "Gather": {"axis"},
    "Gelu": {"approximate"},
    "Gemm": {"alpha", "beta", "transA", "transB"},
    "LayerNormalization": {"axis", "epsilon", "stash_type"},
    "Pad": {"mode"},
    "ReduceMax": {"keepdims", "noop_with_empty_axes"},
    "Reshape": {"allowzero"},
    "Shape": {"start", "end"},
    "Softmax": {"axis"},
    "Transpose": {"perm"},
}
TYPES = {1: "FP32", 10: "FP16", 6: "INT32", 7: "INT64", 9: "BOOL", 2: "UINT8"}


@pytest.mark.parametrize("form", ["fp32", "fp16", "fixed"])
def test_tensorrt_parser_supports_every_node(form, exports):
    """Operators, dtypes and restrictions are in its published table. There is no loop, custom operator or float64."""
    table = json.loads(Path(__file__).with_name("tensorrt_operators.json").read_text())
    supported = table["operators"]
    for name in ("encoder", "decoder"):
        model = onnx.shape_inference.infer_shapes(onnx.load(exports[form] / f"{name}.onnx"), data_prop=True)
        graph = model.graph
        assert table["opset"][0] <= model.opset_import[0].version <= table["opset"][1] and not model.functions
        types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
        types |= {t.name: t.data_type for t in graph.initializer}
        constants = {t.name for t in graph.initializer}
        single = {v.name for v in graph.value_info if [d.dim_value for d in v.type.tensor_type.shape.dim] == [1]}
        for node in graph.node:
            assert node.domain == "" and node.op_type in supported, (node.domain, node.op_type)
            assert {a.name for a in node.attribute} <= ATTRIBUTES.get(node.op_type, set()), node
            assert not any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute)
            for tensor in (*filter(None, node.input), *node.output):
                assert types[tensor] in TYPES, (node, tensor, types[tensor])
            main = node.input[1 if node.op_type == "Where" else 0]
            assert TYPES[types[main]] in supported[node.op_type], node
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Squeeze" and len(node.input) == 1:
                assert node.input[0] in single, node
            elif node.op_type in ("CumSum", "ReduceMax", "Squeeze", "Unsqueeze"):  # axes
                assert node.input[1] in constants, node
            if node.op_type == "LayerNormalization":
                assert len(node.output) == 1 and types[node.input[0]] == 1, node  # float32 also in a float16 graph
            if node.op_type == "CumSum":
                assert types[node.input[0]] == 1 and attributes["exclusive"] == 1
            if node.op_type in ("Sin", "Cos", "Exp"):
                assert types[node.input[0]] == 1  # positions and the scan
            if node.op_type == "Pad":
                assert attributes.get("mode", b"constant") == b"constant"


def test_sums_between_flips_are_the_reversed_ones(tmp_path):
    args = tuple(torch.randn(*shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(
        [(6,), (6,), (2, 37, 6), (2, 37, 6), (2, 37, 6)]))  # fmt: skip
    results = []
    for flips in (False, True):
        session = session_of(lambda w, u, k, v, r: bi_wkv(w, u, k, v, r, 0.1), args, tmp_path / "scan.onnx", flips)
        nodes = [n for n in onnx.load(tmp_path / "scan.onnx").graph.node if n.op_type == "CumSum"]
        reverse = [
            onnx.helper.get_node_attr_value(n, "reverse")
            for n in nodes
            if any(a.name == "reverse" for a in n.attribute)
        ]
        assert len(nodes) == 2 and any(reverse) is not flips
        results += session.run(None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)})
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


def test_graphs_hold_no_local_paths(exports):
    root = str(Path(exporter.__file__).resolve().parents[1]).encode()
    for file in exports.root.rglob("*.onnx"):
        assert root not in file.read_bytes() and b".py" not in file.read_bytes(), file


def test_scan_is_two_cumsum_nodes_a_layer(exports):
    nodes = onnx.load(exports["fp32"] / "encoder.onnx").graph.node
    sums = [{a.name: a.i for a in n.attribute} for n in nodes if n.op_type == "CumSum"]
    assert [s.get("reverse", 0) for s in sums] == [0, 1] * CONFIG.depth and all(s["exclusive"] for s in sums)


def test_check_of_an_exported_folder(exports, model, tmp_path):
    figures, problems = check_onnx(exports["fp32"])
    assert not problems
    assert figures["photo"]["logits"] <= 1e-3 and figures["photo"]["mask_iou_mean"] >= 0.999
    assert figures["photo"]["masks"] == (1 + 7 + 7 + 7) * 4
    with pytest.raises(ExportError, match="another model"):
        check_onnx(exports["fp32"], small_model(replace(CONFIG, num_multimask_outputs=0)))
    mine = small_model().half().train()
    with pytest.raises(ExportError, match="another model"):  # float16 rounded its weights
        check_onnx(exports["fp32"], mine)
    assert mine.dtype == torch.float16 and mine.training
    folder = exports.copy("fp32", tmp_path / "copy")
    manifest = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({**manifest, "source": str(tmp_path / "moved")}))
    with pytest.raises(ExportError, match="moved', which cannot be loaded from here.*pass the model"):
        check_onnx(folder)


def test_unusable_manifests_are_refused(exports, tmp_path):
    with pytest.raises(ExportError, match="no folder .*nothing.*export onnx"):
        OnnxPredictor(tmp_path / "nothing")
    with pytest.raises(ExportError, match=r"holds no export\.json"):
        OnnxPredictor(tmp_path)
    folder = exports.copy("fp32", tmp_path / "copy")
    manifest = folder / "export.json"
    data = json.loads(manifest.read_text())
    for text, message in (
        ("{", "damaged"),
        ("[]", "damaged .it holds .., no object"),
        ("[1]", "damaged"),
        ("{}", "fastsam-rwkv '.' in format None"),
        (json.dumps({**data, "format_version": 7, "version": "9.1"}), "fastsam-rwkv '9.1' in format 7; this release"),
        (json.dumps({**data, "extra": 1}), "damaged: wrong keys extra"),
        ("[" * 100_000, "damaged"),
        (json.dumps({**data, "version": "x" * 2_000_000}), "damaged .it has more than"),
        (json.dumps({**data, "image_size": "128"}), "damaged: 'image_size' cannot be '128'"),
        (json.dumps({**data, "image_size": True}), "damaged: 'image_size' cannot be True"),
        (json.dumps({**data, "batch": -1}), "damaged: 'batch' cannot be -1"),
        (json.dumps({**data, "config": {}}), "damaged: config has format_version None"),
        (json.dumps({**data, "files": {"../decoder.onnx": {}}}), "damaged: 'files' cannot have ../decoder.onnx"),
        (json.dumps({**data, "check": {"min_mask_iou": "0"}}), "damaged: 'min_mask_iou' cannot be '0'"),
        (json.dumps({**data, "precision": "int8"}), "damaged: 'precision' cannot be 'int8'"),
        (json.dumps({**data, "contract": "sam3"}), "damaged: 'contract' cannot be 'sam3'"),
        (json.dumps({**data, "files": {"decoder.onnx": 3}}), "damaged: 'files' cannot have decoder.onnx"),
    ):
        manifest.write_text(text)
        with pytest.raises(ExportError, match=message):
            OnnxPredictor(folder)


def test_changed_files_are_refused(exports, tmp_path):
    folder = exports.copy("fp32", tmp_path / "copy")
    graph = onnx.load(folder / "decoder.onnx")
    graph.graph.node[0].name = "tampered"
    onnx.save(graph, folder / "decoder.onnx")
    for use in (OnnxPredictor, check_onnx):
        with pytest.raises(ExportError, match=r"decoder\.onnx' was damaged or changed.*export again"):
            use(folder)
    (folder / "decoder.onnx").unlink()
    with pytest.raises(ExportError, match=r"decoder\.onnx' is missing"):
        OnnxPredictor(folder)


def record(folder):
    """Write the files' present hashes into the manifest, as someone who tampers with both does."""
    files = {name: describe(folder / name) for name in ("decoder.onnx", "encoder.onnx")}
    replace(Manifest.read(folder, verify=False), files=files).write(folder)


def test_graphs_that_onnx_runtime_refuses_are_export_errors(exports, tmp_path, photo):
    """ONNX Runtime's own exceptions, such as InvalidProtobuf, NoSuchFile and InvalidArgument, have no common base."""
    folder = exports.copy("fp32", tmp_path / "copy")
    whole = (folder / "decoder.onnx").read_bytes()
    for content in (b"", b"no graph", whole[: len(whole) // 2]):
        (folder / "decoder.onnx").write_bytes(content)
        record(folder)
        for use in (OnnxPredictor, check_onnx):
            with pytest.raises(ExportError, match=r"ONNX Runtime cannot load .*decoder\.onnx"):
                use(folder)
    shutil.copy(folder / "encoder.onnx", folder / "decoder.onnx")
    record(folder)
    predictor = OnnxPredictor(folder)
    predictor.set_image(photo)
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot run .*decoder\.onnx"):
        predictor.predict(point_coords=[[3, 4]])
    shutil.copy(exports["fixed"] / "decoder.onnx", folder / "decoder.onnx")  # one mask, where the manifest says four
    record(folder)
    with pytest.raises(ExportError, match=r"outputs have shapes \[\[1, 1, 32, 32\], \[1, 1\]\], not"):
        check_onnx(folder)


def rounded(file):
    """Round weights to 8 bits, as quantization does."""
    graph = onnx.load(file)
    for tensor in graph.graph.initializer:
        if tensor.name.endswith("weight"):
            weight = onnx.numpy_helper.to_array(tensor)
            step = np.abs(weight).max() / 127
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.round(weight / step) * step, tensor.name))
    onnx.save(graph, file)


def renamed(file):
    graph = onnx.load(file)
    graph.graph.node[0].name = "renamed"
    onnx.save(graph, file)


@pytest.mark.parametrize("change", [renamed, rounded])
def test_changed_graphs_can_be_adopted(change, exports, tmp_path, photo):
    folder = exports.copy("fp32", tmp_path / "copy")
    for name in ("encoder.onnx", "decoder.onnx"):
        change(folder / name)
    with pytest.raises(ExportError, match=r"changed it on purpose: fastsam-rwkv export onnx --adopt"):
        OnnxPredictor(folder)
    before = (folder / "export.json").read_bytes()
    limit = 0.8 if change is rounded else 0.999
    if change is rounded:
        with pytest.raises(ExportError, match="mean mask IoU is 0.*, limit 1.*was not adopted.*lower min_mask_iou"):
            adopt_onnx(folder, min_mask_iou=1)
        assert (folder / "export.json").read_bytes() == before
    manifest = adopt_onnx(folder, min_mask_iou=limit)
    assert manifest == Manifest.read(folder) and manifest.check["min_mask_iou"] == limit
    figures, problems = check_onnx(folder)
    assert not problems and figures["photo"]["mask_iou_mean"] >= limit
    OnnxPredictor(folder).predict_image(photo, box=[20, 10, 120, 80])


def test_a_graph_of_other_masks_is_not_adopted(exports, tmp_path):
    folder = exports.copy("fp32", tmp_path / "copy")
    graph = onnx.load(folder / "encoder.onnx")
    for tensor in graph.graph.initializer:
        if tensor.name.endswith("weight"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(graph, folder / "encoder.onnx")
    with pytest.raises(ExportError, match=r"limit 0\.99.*lower min_mask_iou"):
        adopt_onnx(folder)
    with pytest.raises(ExportError, match="min_mask_iou must be from 0 to 1, got 2"):
        adopt_onnx(folder, min_mask_iou=2)
    (folder / "encoder.onnx").unlink()
    with pytest.raises(ExportError, match=r"encoder\.onnx' is missing; put the changed graph there"):
        adopt_onnx(folder)


@pytest.mark.parametrize("opset, form", [(18, "fp16"), (19, "sam")])
def test_older_opsets_give_the_same_masks(opset, form, exports, tmp_path):
    manifest = export_onnx(exports.model, tmp_path, opset=opset, **FORMS[form])
    assert manifest.opset == opset
    for name in ("encoder", "decoder"):
        graph = onnx.load(tmp_path / f"{name}.onnx")
        assert [entry.version for entry in graph.opset_import] == [opset]
        assert not [node for node in graph.graph.node if node.op_type == "Gelu"]
        onnx.checker.check_model(graph, full_check=True)
        sessions = [onnxruntime.InferenceSession(f / f"{name}.onnx") for f in (tmp_path, exports[form])]
        feeds = feeds_of(sessions[0])
        for got, want in zip(*(session.run(None, feeds) for session in sessions), strict=True):
            np.testing.assert_allclose(got, want, atol=(3e-2 if form == "fp16" else 1e-4) * np.abs(want).max())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"opset": 17}, "opset must be one of 18, 19, 20, got 17"),
        ({"precision": "int8"}, "unknown precision 'int8'; choose one of"),
        ({"image_size": 100}, "multiple of 64, got 100"),
        ({"image_size": 0}, "multiple of 64, got 0"),
        ({"batch": 0}, "batch must be positive, got 0"),
        ({"contract": "sam3"}, r"unknown contract 'sam3'; choose one of \['sam2', 'sam', 'osam'\]"),
        ({"contract": "sam", "batch": 2}, "contract 'sam' takes one image; omit batch 2"),
        ({"contract": "osam", "uint8": True}, "contract 'osam' takes normalized float32"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message, model, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_unwritable_folder_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"cannot write to .*file.*choose another folder"):
        export_onnx(model, tmp_path / "file" / "out")


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_library_names_the_install_command(library, model, exports, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ExportError, match=rf"{library} cannot be imported.*pip install 'fastsam-rwkv\[onnx\]'"):
        export_onnx(model, tmp_path)
    if library == "onnxruntime":
        with pytest.raises(ExportError, match="onnxruntime cannot be imported"):
            OnnxPredictor(exports["fp32"])


def test_missing_provider_is_refused(exports):
    with pytest.raises(ExportError, match="has no CUDAExecutionProvider; it has .*CPUExecutionProvider"):
        OnnxPredictor(exports["fp32"], providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_decay_beyond_the_bound_is_refused(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.backbone.layers[1].spatial_mix.decay[3] = -90
    with pytest.raises(ExportError, match=r"layer 1 has spatial_mix\.decay 90, and the graph's scan takes up to 40"):
        export_onnx(model, tmp_path / "out")


def test_graphs_that_fail_the_check_are_rejected(model, exports, tmp_path, monkeypatch, capsys):
    """Test with a real error instead of a tolerance of zero: the scan drops the bonus."""
    folder = exports.copy("fp32", tmp_path / "copy")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def without_bonus(w, u, k, v, r=None, scale=1.0, bound=None):
        return translations.bi_wkv(w, w, k, v, r, scale)

    operator = torch.ops.fastsam_rwkv.bi_wkv.default
    monkeypatch.setitem(TRANSLATIONS, operator, without_bonus)
    assert main(["export", "onnx", str(exports.model), str(folder)]) == 1
    error = capsys.readouterr().err
    assert "the graphs differ from PyTorch" in error and "embedding differs by" in error and "rejected" in error
    kept = {file.name for file in (folder / "rejected").iterdir()}
    assert kept == {"encoder.onnx", "decoder.onnx", "export.json"}
    assert {name: (folder / name).read_bytes() for name in before} == before
    _, problems = check_onnx(folder / "rejected", model)
    assert problems
    assert main(["export", "onnx", "--check", str(folder / "rejected")]) == 1
    assert "the graphs differ from PyTorch" in capsys.readouterr().err


def test_interrupted_export_changes_nothing(model, exports, tmp_path, monkeypatch):
    folder = exports.copy("fp32", tmp_path / "copy")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    killed, other = folder / "unchecked-killed", folder / "unchecked-notes"
    for left in (killed, other):
        left.mkdir()
    (killed / "encoder.onnx").write_bytes(b"half of it")  # as a killed process leaves it
    (other / "notes.txt").write_text("not of an export")

    def interrupted(model, manifest, stage, flips):
        (stage / "encoder.onnx").write_bytes(b"half of it")
        with make_stage(folder):  # another export at the same time
            assert stage.is_dir() and not killed.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "_write_graphs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(model, folder)
    assert [file.name for file in other.iterdir()] == ["notes.txt"]
    shutil.rmtree(other)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_large_weights_go_to_a_second_file_and_the_model_stays_unchanged(tmp_path, monkeypatch, photo):
    model = small_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(exporter, "LARGEST_FILE", 10_000)
    manifest = export_onnx(model, tmp_path, precision="fp16")
    assert set(manifest.files) == {"encoder.onnx", "encoder.onnx.data", "decoder.onnx", "decoder.onnx.data"}
    assert manifest.files["encoder.onnx.data"]["bytes"] > 10_000
    predictor = OnnxPredictor(tmp_path)
    predictor.set_image(photo)
    predictor.predict(point_coords=[[3, 4]])
    assert model.training and model.dtype == torch.float32
    assert all(p.requires_grad for p in model.parameters())
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())


def test_export_onnx_command(exports, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)).save(tmp_path / "photo.png")
    command = ["export", "onnx", str(exports.model), str(tmp_path / "out"), "--photo", str(tmp_path / "photo.png")]
    assert main([*command, "--image-size", "64"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "ONNX Runtime" in out and "mean IoU" in out and "decoder.onnx: " in out
    assert Manifest.read(tmp_path / "out").image_size == 64
    assert main(["export", "onnx", "--check", str(tmp_path / "out")]) == 0
    assert "mean IoU" in capsys.readouterr().out
    renamed(tmp_path / "out" / "decoder.onnx")
    assert main(["export", "onnx", "--check", str(tmp_path / "out")]) == 1
    assert "--adopt" in capsys.readouterr().err
    assert main(["export", "onnx", "--adopt", str(tmp_path / "out"), "--min-mask-iou", "0.999"]) == 0
    assert "mean IoU" in capsys.readouterr().out
    assert main(["export", "onnx", "--check", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "no folder to write to"),
        (["--check", "a", "b", "c"], 2, "omit OUTDIR 'c'"),
        (["--check", "./nothing"], 1, "no folder 'nothing'"),
        (["--adopt", "./nothing"], 1, "no folder 'nothing'"),
        (["--adopt", "a", "--check", "b"], 2, "--adopt DIR takes neither"),
        (["--min-mask-iou", "0.5", "out"], 2, "--min-mask-iou is for --adopt"),
        (["--opset", "17", "out"], 1, "opset must be one of 18, 19, 20, got 17"),
        (["./nothing", "out"], 1, "no model at './nothing'"),
        (["--precision", "int4", "out"], 1, "unknown precision 'int4'"),
        (["--photo", "./nothing.jpg", "MODEL", "out"], 1, "no image file at './nothing.jpg'"),
        (["--photo", "deep.png", "MODEL", "out"], 1, "`predict --value-range auto` scales"),
    ],
)
def test_invalid_commands_print_one_error(arguments, code, message, exports, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((2, 2), 4095, np.uint16)).save("deep.png")
    assert main(["export", "onnx", *(str(exports.model) if a == "MODEL" else a for a in arguments)]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fastsam-rwkv: error: ") and err.count("\n") == 1 and message in err
