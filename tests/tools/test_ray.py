"""`fastsam_rwkv.ray` and `--ray` on a local cluster with two cores: rows equal local ones, and none is lost."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from small_model import CONFIG, small_model

try:
    import pyarrow as pa
    import ray
    from pyarrow import parquet
    from ray.data.extensions import ArrowTensorArray
except ImportError as error:
    pytest.skip(f"Ray Data is not installed: {error}", allow_module_level=True)

from fastsam_rwkv import AutomaticMaskGenerator, Predictor
from fastsam_rwkv import ray as fastsam_ray
from fastsam_rwkv.cli import main
from fastsam_rwkv.errors import ArgumentError

BOX = [3.0, 4.0, 30.0, 25.0]
FEW = {"points_per_side": 2, "pred_iou_thresh": -1.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_model(replace(CONFIG, image_size=64, depth=1)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def cluster():
    """Start two cores' worth of cluster, which reads the package from where the tests read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # 15 by default, which a busy machine makes slow
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(autouse=True)
def one_thread():
    """Compute with one thread, as actors with one core do, and restore what an actor in this process changes."""
    threads, pixels = torch.get_num_threads(), Image.MAX_IMAGE_PIXELS
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    Image.MAX_IMAGE_PIXELS = pixels


def image_of(number, size=(30, 40)):
    """Return uint8 `[30, 40, 3]` with a bright rectangle, different for each number."""
    generator = np.random.default_rng(number)
    array = generator.integers(0, 100, (*size, 3), np.uint8)
    top, left = generator.integers(2, 10, 2)
    array[top : top + 15, left : left + 18] += 120
    return array


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def in_this_process(table, **options):
    """Return the rows that an actor makes of a table."""
    defaults = {"image": "image", "prompts": None, "device": "cpu", "dtype": "float32", "threads": 1, "zoom": "auto",
                "multimask_output": False, "everything": {}, "max_pixels": None}  # fmt: skip
    return fastsam_ray.Segmenter(fastsam_ray._Settings(**{**defaults, **options}))(table)


def assert_equal(row, masks, scores, case=None):
    """Compare a row with local masks `[M, H, W]` and scores `[M]`, bit by bit."""
    assert row["error"] is None, (case, row["error"])
    assert len(row["masks"]) == len(masks), case
    for found, box, area, mask in zip(row["masks"], row["boxes"], row["areas"], masks, strict=True):
        assert np.array_equal(coco.decode(found), mask), case
        assert area == mask.sum() and list(box) == coco.toBbox(found).astype(int).tolist(), case
    assert np.array_equal(np.float32(row["scores"]), scores), case
    assert (row["height"], row["width"]) == masks.shape[-2:], case


def test_images_of_every_kind_equal_the_local_path(model, tmp_path):
    arrays = [image_of(i) for i in range(3)]
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for file, array in zip(files, arrays, strict=True):
        Path(file).write_bytes(png(array))
    of_bytes = [png(array) for array in arrays]
    structs = [{"bytes": of_bytes[0], "path": None}, {"bytes": None, "path": files[1]}, {"bytes": of_bytes[2]}]
    kinds = {
        "paths": pa.array(files),
        "bytes": pa.array(of_bytes),
        "structs": pa.array(structs, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "arrays": ArrowTensorArray.from_numpy(np.stack(arrays)),
    }
    prediction = Predictor.from_pretrained(model).predict_image
    for name, column in kinds.items():
        table = pa.table({"image": column, "corners": [BOX] * 3, "key": [0, 1, 2]})
        found = in_this_process(table, prompts={"box": "corners"}, model=model)
        for row, array in zip(found.to_pylist(), arrays, strict=True):
            masks, scores, _ = prediction(array, box=BOX)
            assert_equal(row, masks, scores, name)
        kept = ["image"] if name in ("paths", "structs") else []
        assert sorted(found.column_names) == sorted([*kept, "corners", "key", *fastsam_ray.PROMPTED.names])
    assert in_this_process(pa.table({"image": kinds["structs"], "b": [BOX] * 3}), prompts={"box": "b"}, model=model)[
        "image"
    ].to_pylist() == [None, files[1], None]


def test_prompts_of_every_kind_equal_the_local_path(model):
    clicks = {"point_coords": [[5, 6], [30, 20]], "point_labels": [1, 0]}
    several = {"box": [BOX, [0, 0, 20, 20]]}
    logits = {"mask_input": np.full((1, 16, 16), -3.0).tolist()}
    logits["mask_input"][0][8][8] = 5.0
    given = [clicks, several, logits, {"box": [BOX]}]
    predictor = Predictor.from_pretrained(model)
    image = png(image_of(0))
    with pytest.raises(pa.ArrowInvalid):  # Arrow cannot mix one box and several in a column; JSON can
        pa.array([{"box": BOX}, several])
    for column in (pa.array(given), pa.array([json.dumps(one) for one in given])):  # structs with nulls, and JSON
        table = pa.table({"photo": [image] * 4, "given": column})
        rows = in_this_process(table, image="photo", prompts="given", model=model, multimask_output=True).to_pylist()
        for row, prompts in zip(rows, given, strict=True):
            masks, scores, _ = predictor.predict_image(image, multimask_output=True, **prompts)
            assert_equal(row, masks.reshape(-1, 30, 40), scores.ravel(), prompts.keys())
        assert rows[0]["prompt_index"] == [0] * 3 and rows[1]["prompt_index"] == [0] * 3 + [1] * 3


def test_everything_equals_the_local_path(model):
    arrays = [image_of(i) for i in range(2)]
    table = pa.table({"image": [png(array) for array in arrays]})
    generator = AutomaticMaskGenerator(Predictor.from_pretrained(model), **FEW)
    found = in_this_process(table, model=model, everything=FEW)
    assert found.schema.equals(fastsam_ray.EVERYTHING)
    for row, array in zip(found.to_pylist(), arrays, strict=True):
        records = generator.generate(array)
        assert records
        masks = np.stack([record["segmentation"] for record in records])
        assert_equal(row, masks, np.float32([record["predicted_iou"] for record in records]))
        assert row["points"] == [record["point_coords"][0] for record in records]
        assert row["stability_scores"] == [record["stability_score"] for record in records]


def test_a_bad_row_has_its_error_and_the_schema_of_the_others(model, tmp_path):
    good, box = png(image_of(0)), json.dumps({"box": BOX})
    cases = [
        (good, box, None),
        (b"no image", box, "not an image of a format that is read"),
        (good[:200], box, "damaged or cut off"),
        (None, box, "image must be a path, bytes"),
        (good, None, "the prompts of an image must be a dict"),
        (good, "{broken", "the prompts of an image must be a dict such as {'box': ...}, got '{broken'"),
        (good, '{"box": [1, 2]}', "box must be [4]"),
        (good, '{"bbox": [1, 2, 3, 4]}', "not bbox"),
        (png(image_of(0, (60, 80))), box, "too large"),
        (good, box, None),
    ]
    images, prompts, reasons = zip(*cases, strict=True)
    table = pa.table({"image": pa.array(images, pa.binary()), "prompts": prompts})
    found = in_this_process(table, prompts="prompts", model=model, max_pixels=2000)
    assert found.schema.equals(pa.schema([("prompts", pa.string()), *fastsam_ray.PROMPTED]))
    for row, reason in zip(found.to_pylist(), reasons, strict=True):
        assert (row["error"] is None) == (reason is None) == (row["masks"] is not None)
        assert reason is None or reason in row["error"] and "images[" not in row["error"]
    only_bad = in_this_process(table.slice(1, 1), prompts="prompts", model=model)
    none = in_this_process(table.slice(0, 0), prompts="prompts", model=model)
    assert only_bad.schema.equals(found.schema) and none.schema.equals(found.schema)
    assert in_this_process(pa.table({"image": [str(tmp_path / "gone.png")]}), model=model)["error"][0].as_py()


def test_wrong_arguments_are_named(model, cluster):
    dataset = ray.data.from_items([{"image": b"", "width": 3}])
    fine = ray.data.from_items([{"image": b""}])
    cases = [
        ("photos/", {}, "got 'photos/'; ray.data.read_binary_files"),
        (dataset, {}, "names of new ones: width"),
        (fine, {"image": "bytes"}, "no column bytes; its columns are image"),
        (fine, {"prompts": "given"}, "no column given"),
        (fine, {"prompts": {"bbox": "image"}}, "must map some of point_coords"),
        (fine, {"everything": {"points": 3}}, "no option points"),
        (fine, {"multimask_output": True}, "multimask_output and zoom go with prompts"),
        (fine, {"zoom": "never"}, "multimask_output and zoom go with prompts"),
        (fine, {"prompts": "image", "everything": FEW}, "everything goes without prompts"),
        (fine, {"prompts": "image", "zoom": "maybe"}, "zoom must be never, auto, always, got 'maybe'"),
        (fine, {"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        (fine, {"device": "cuda"}, "device='cuda' needs num_gpus"),
    ]
    for given, options, message in cases:
        with pytest.raises(ArgumentError) as caught:
            fastsam_ray.segment(given, **options)
        assert message in str(caught.value), options


def test_missing_ray_is_named():
    code = "import sys; sys.modules['ray'] = None; import fastsam_rwkv.ray"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ArgumentError" in result.stderr and "pip install 'fastsam-rwkv[ray]'" in result.stderr.splitlines()[-1]


def workers_of_this_process():
    """Return the ids of the actors of this process's cluster."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            names[int(folder.name)] = (folder / "cmdline").read_bytes()
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue

    def is_ours(process):
        while process in parents:
            process = parents[process]
            if process == os.getpid():
                return True
        return False

    return [process for process, name in names.items() if name.startswith(b"ray::MapWorker") and is_ours(process)]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="workers are found in /proc, which Linux has")
def test_1000_images_with_a_worker_killed_in_the_middle_and_a_resumed_job(model, cluster, tmp_path):
    """Kill a worker once the first results are there, then lose some of the output and resume."""
    distinct, count = 250, 1000
    images = [png(image_of(i)) for i in range(distinct)]
    keys = [f"image {i}" for i in range(count)]
    (tmp_path / "in").mkdir()
    for first in range(0, count, 50):
        rows = range(first, first + 50)
        columns = {"key": [keys[i] for i in rows], "photo": [images[i % distinct] for i in rows], "box": [BOX] * 50}
        parquet.write_table(pa.table(columns), tmp_path / "in" / f"{first}.parquet")
    out = tmp_path / "out"

    def segmented(dataset):
        return fastsam_ray.segment(
            dataset,
            image="photo",
            prompts={"box": "box"},
            model=model,
            dtype="float32",
            concurrency=2,
            num_cpus=0.5,  # which leaves a core for Ray's readers and writers
        )

    killed, done = [], []

    def kill():
        while not killed:
            time.sleep(0.05)
            if found := list(out.glob("*.parquet")):
                killed.append(workers_of_this_process()[0])
                os.kill(killed[0], signal.SIGKILL)
                done.extend(found)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    source = ray.data.read_parquet(str(tmp_path / "in")).repartition(target_num_rows_per_block=50)  # one block as read
    segmented(source).write_parquet(str(out))
    assert len(killed) == 1 and len(done) < len(list(out.glob("*.parquet")))

    predictor = Predictor.from_pretrained(model, dtype="float32")
    expected = list(predictor.predict_images(images, [{"box": BOX}] * distinct))

    def check():
        rows = parquet.read_table(out).to_pylist()
        assert sorted(row["key"] for row in rows) == sorted(keys)  # none lost, none twice
        for row in rows:
            prediction = expected[int(row["key"].split()[1]) % distinct]
            assert_equal(row, prediction.masks, prediction.scores, row["key"])

    check()
    files = sorted(out.glob("*.parquet"))
    files[0].write_bytes(files[0].read_bytes()[:-100])  # as a killed job leaves it
    files[1].unlink()
    whole = {file: file.read_bytes() for file in files[2:]}
    left = fastsam_ray.remaining(source, out, "key")
    segmented(left).write_parquet(str(out))
    assert [file.name for file in out.glob("*.partial")] == [f"{files[0].name}.partial"]
    assert all(file.read_bytes() == data for file, data in whole.items())
    for file in out.glob("*.partial"):
        file.unlink()
    check()


def test_remaining_takes_a_folder_that_is_not_there_and_names_wrong_ones(cluster, tmp_path):
    dataset = ray.data.from_items([{"key": "a"}])
    assert fastsam_ray.remaining(dataset, tmp_path / "none", "key") is dataset
    parquet.write_table(pa.table({"path": ["a"]}), tmp_path / "0.parquet")
    with pytest.raises(ArgumentError, match="has no column 'key'"):
        fastsam_ray.remaining(dataset, tmp_path, "key")
    with pytest.raises(ArgumentError, match="is a file; give the folder"):
        fastsam_ray.remaining(dataset, tmp_path / "0.parquet", "key")


def test_webdataset_in_and_out_and_json_lines(model, cluster, tmp_path):
    prompts = [{"box": BOX}, {"point_coords": [[5, 6]]}, {"box": BOX}]
    data = [png(image_of(i)) for i in range(3)]
    data[2] = b"no image"
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i in range(3):
            for ending, content in (("png", data[i]), ("json", json.dumps(prompts[i]).encode())):
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    samples = ray.data.read_webdataset(str(tmp_path / "shard.tar"), decoder=None)  # a decoder fails at a bad image
    found = fastsam_ray.segment(samples, image="png", prompts="json", model=model, dtype="float32", concurrency=1)
    found = found.drop_columns(["json"]).materialize()
    found.write_json(str(tmp_path / "lines"))
    lines = [json.loads(line) for file in (tmp_path / "lines").iterdir() for line in file.read_text().splitlines()]

    def sample(row):
        return {"__key__": row["__key__"], "json": {name: v for name, v in row.items() if not name.startswith("__")}}

    found.map(sample).write_webdataset(str(tmp_path / "shards"))
    members = []
    for shard in (tmp_path / "shards").iterdir():
        with tarfile.open(shard) as tar:
            members += [{"__key__": m.name[:-5], **json.load(tar.extractfile(m))} for m in tar.getmembers()]
    predictor = Predictor.from_pretrained(model)
    for rows in (lines, members):
        by_key = {row["__key__"]: row for row in rows}
        assert len(rows) == 3 and "not an image" in by_key["2"]["error"]
        for i in range(2):
            masks, scores, _ = predictor.predict_image(data[i], **prompts[i])
            assert_equal({**by_key[str(i)], "scores": scores}, masks, scores)  # decimals are rounded
            assert np.allclose(by_key[str(i)]["scores"], scores, atol=1e-6)


def test_paths_and_prompts_from_json_lines(model, cluster, tmp_path):
    prompts = [{"box": BOX}, {"point_coords": [[5, 6], [20, 20]], "point_labels": [1, 0]}]
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    with (tmp_path / "prompts.jsonl").open("w") as lines:
        for i, file in enumerate(files):
            if i < 2:
                Path(file).write_bytes(png(image_of(i)))
            print(json.dumps({"image": file, "prompts": prompts[i % 2]}), file=lines)
    given = ray.data.read_json(str(tmp_path / "prompts.jsonl"), lines=True)
    found = fastsam_ray.segment(given, prompts="prompts", model=model, dtype="float32", concurrency=1)
    by_path = {row["image"]: row for row in found.take_all()}
    assert sorted(by_path) == files
    assert by_path[files[2]]["masks"] is None and "no image file" in by_path[files[2]]["error"]
    for file, one in zip(files, prompts, strict=False):
        masks, scores, _ = Predictor.from_pretrained(model).predict_image(file, **one)
        assert_equal(by_path[file], masks, scores)


def test_read_images_and_everything(model, cluster, tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / "photos" / f"{i}.png").write_bytes(png(image_of(i)))
    images = ray.data.read_images(str(tmp_path / "photos"), include_paths=True)
    pool = ray.data.ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True)
    options = {"everything": FEW, "model": model, "dtype": "float32", "batch_size": 1}
    rows = fastsam_ray.segment(images, **options, concurrency=pool).take_all()
    with pytest.warns(UserWarning, match="2 actors with num_cpus=1 leave less than one of the cluster's 2 cores"):
        fastsam_ray.segment(images, **options, concurrency=2)
    generator = AutomaticMaskGenerator(Predictor.from_pretrained(model), **FEW)
    assert sorted(Path(row["path"]).name for row in rows) == ["0.png", "1.png", "2.png"]
    for row in rows:
        records = generator.generate(row["path"])
        masks = np.stack([record["segmentation"] for record in records])
        assert_equal(row, masks, np.float32([record["predicted_iou"] for record in records]))


def files_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(b"no image" if i == 2 else png(image_of(i)))
    return folder


def test_everything_writes_the_same_files_with_ray(model, cluster, photos, tmp_path, capsys):
    command = ["everything", str(photos), "--model", model, "--points-per-side", "2", "--pred-iou-thresh", "-1"]
    command += ["--stability-score-thresh", "0", "--dtype", "float32"]
    printed = {}
    for name, more in (("local", []), ("ray", ["--ray"])):
        assert main([*command, "--output", str(tmp_path / name), *more]) == 1
        printed[name] = capsys.readouterr()
        assert "1 of 4 images could not be segmented" in printed[name].err
    assert printed["ray"].out == printed["local"].out and len(printed["ray"].out.splitlines()) == 3
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
    (tmp_path / "ray" / "1.png.json").unlink()
    (photos / "2.png").unlink()
    assert main([*command, "--output", str(tmp_path / "ray"), "--ray"]) == 0  # the one that is missing
    assert json.loads(capsys.readouterr().out)["image"] == str(photos / "1.png")
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
    assert main([*command, "--model", str(tmp_path), "--output", str(tmp_path / "new"), "--ray"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("fastsam-rwkv: error: ")
    assert main([*command, "--device", "cuda:1", "--output", str(tmp_path / "new"), "--ray"]) == 2
    assert main([*command, "--device", "cuda", "--output", str(tmp_path / "new"), "--ray"]) == 2
    assert "the cluster has no GPU for --device cuda" in capsys.readouterr().err
    assert main(["everything", "--output", str(tmp_path / "new"), str(photos), "--ray", "photos"]) == 2
    assert "--ray 'photos' is not auto or host:port" in capsys.readouterr().err
    for address in ("127.0.0.1:9", "nowhere.invalid:6379", "a:b"):
        assert main(["everything", "--output", str(tmp_path / "new"), str(photos), "--ray", address]) == 1
        assert f"no Ray cluster at {address!r}" in capsys.readouterr().err


def test_prompts_write_the_same_files_on_a_cluster_of_their_own(model, photos, tmp_path):
    (photos / "2.png").unlink()
    prompts = [{"image": f"{i}.png", "box": BOX} for i in (0, 1, 3)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    command = ["predict", "photos", "--prompts", "prompts.json", "--model", model, "--format", "npz"]
    command = [sys.executable, "-m", "fastsam_rwkv", *command, "--dtype", "float32", "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    outputs = {}
    for name, more in (("local", []), ("ray", ["--ray"])):
        done = subprocess.run(
            [*command, name, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stderr
        outputs[name] = done.stdout
    assert outputs["ray"] == outputs["local"] and len(outputs["ray"].splitlines()) == 3
    local, distributed = files_of(tmp_path / "local"), files_of(tmp_path / "ray")
    assert distributed.keys() == local.keys()
    for name in local:
        with np.load(io.BytesIO(local[name])) as one, np.load(io.BytesIO(distributed[name])) as other:
            assert all(np.array_equal(one[key], other[key]) for key in one)
