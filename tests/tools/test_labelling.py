"""The examples for Label Studio and CVAT, through the requests that these programs send."""

import base64
import contextlib
import http.client
import importlib.util
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from photos import photo, png
from served import served
from small_model import small_model

from fastsam_rwkv import RWKVSAM, Predictor

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = small_model()
KEY, PERSONAL = "legacy", "a.personal.token"
H, W = 90, 120


def load(path):
    """Import a file that is not in a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


files = load(EXAMPLES / "label_studio/label_studio_files.py")
backend = load(EXAMPLES / "label_studio/backend.py")
cvat = load(EXAMPLES / "cvat/main.py")


def want(seed, **prompt):
    """Return the mask and the predicted IoU of a predictor without any server."""
    masks, scores, _ = Predictor(MODEL).predict_image(photo(seed), **prompt, multimask_output=False, zoom="auto")
    assert masks[0].any() and not masks[0].all()
    return masks[0], float(scores[0])


@pytest.fixture
def embeddings(monkeypatch):
    """Return a list that grows with each image or window that is embedded."""
    made, embed = [], Predictor.embed

    def counted(self, pixels, frame):
        made.append(frame)
        return embed(self, pixels, frame)

    monkeypatch.setattr(Predictor, "embed", counted)
    return made


# Label Studio

CONFIG = """<View>
  <Image name="image" value="$photo" zoom="true"/>
  <BrushLabels name="other" toName="image"><Label value="Car"/></BrushLabels>
  <BrushLabels name="brush" toName="image"><Label value="Banana"/><Label value="Orange"/></BrushLabels>
  <KeyPointLabels name="point" toName="image" smart="true"><Label value="Banana" smart="true"/></KeyPointLabels>
  <RectangleLabels name="box" toName="image" smart="true"><Label value="Orange" smart="true"/></RectangleLabels>
</View>"""


def region(kind, label, x, y, **more):
    """Return a region as the editor sends it: percent of the image, and a point's width."""
    value = {"x": 100 * x / W, "y": 100 * y / H, "width": 0.3, "labels": [label], kind: [label]}
    for name, size in (("width", W), ("height", H)):
        if name in more:
            value[name] = 100 * more.pop(name) / size
    return {
        "original_width": W,
        "original_height": H,
        "image_rotation": 0,
        "value": value,
        "id": "fBWv1t0S2L",
        "from_name": "point" if kind == "keypointlabels" else "box",
        "to_name": "image",
        "type": kind,
        "origin": "manual",
        **more,
    }


def asked(*regions, url="/data/upload/1/photo0.png", config=CONFIG):
    """Return the body of a request for a prediction by `make_predictions` of Label Studio."""
    return {
        "tasks": [{"id": 5, "data": {"photo": url}, "annotations": [], "predictions": []}],
        "project": "1.1700000000",
        "label_config": config,
        "params": {"login": None, "password": None, "context": {"result": list(regions)} if regions else None},
    }


class Handler(BaseHTTPRequestHandler):
    """Label Studio's files, for those who have the key."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.headers.get("Authorization") not in (f"Token {KEY}", "Bearer access"):
            return self.answer(401, b"")
        name = self.path.rpartition("/")[2]
        if name == "redirect":
            return self.answer(303, b"", Location=f"http://127.0.0.1:{self.server.server_port}/data/photo0.png")
        if name == "slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # the backend leaves
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            return None
        if name == "large":
            return self.answer(200, bytes(1 << 18))
        if name == "text":
            return self.answer(200, b"no image")
        if name.startswith("photo"):
            return self.answer(200, png(photo(int(name.removeprefix("photo").partition(".")[0]))))
        return self.answer(404, b"")

    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.path == "/api/token/refresh/" and given == {"refresh": PERSONAL}
        self.answer(200 if known else 401, b'{"access": "access"}' if known else b"")

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(app):
    """Serve in a thread; yield a function that posts a body, or gets without one."""

    def ask(path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        text = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json", **headers}
        connection.request("GET" if body is None else "POST", path, text, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    with served(app) as port:
        yield ask


@pytest.fixture(scope="module")
def label_studio():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def ask(label_studio):
    small = files.Files(label_studio.url, KEY, most_bytes=1 << 17, seconds=0.4)
    with serving(backend.create_app(MODEL, small)) as ask:
        yield ask


def decoded(rle):
    """Decode Label Studio's RLE by the format of @thi.ng/rle-pack, and return one channel of the RGBA values."""
    bits, at = "".join(f"{byte:08b}" for byte in rle), 0

    def read(size):
        nonlocal at
        at += size
        return int(bits[at - size : at], 2)

    count, word = read(32), read(5) + 1
    sizes, values = [read(4) + 1 for _ in range(4)], []
    while len(values) < count:
        repeated = read(1)
        length = read(sizes[read(2)]) + 1
        values += [read(word)] * length if repeated else [read(word) for _ in range(length)]
    assert len(bits) - at < 8
    rgba = np.array(values, np.uint8).reshape(-1, 4)
    np.testing.assert_array_equal(rgba, np.repeat(rgba[:, 3:], 4, axis=1))
    return rgba[:, 3]


KEYPOINTS = [
    region("keypointlabels", "Banana", 60, 40, is_positive=True),
    region("keypointlabels", "Banana", 10.5, 80, is_positive=False),
]
RECTANGLE = region("rectanglelabels", "Orange", 20, 10, width=80, height=60)
SMALL = region("rectanglelabels", "Orange", 40, 30, width=12, height=10)
PROMPTS = {
    "click": ([KEYPOINTS[0]], "Banana", {"point_coords": [[60, 40]]}),
    "clicks": (KEYPOINTS, "Banana", {"point_coords": [[60, 40], [10.5, 80]], "point_labels": [1, 0]}),
    "box": ([RECTANGLE], "Orange", {"box": [20, 10, 100, 70]}),
    "small box": ([SMALL], "Orange", {"box": [40, 30, 52, 40]}),
    "both": ([RECTANGLE, KEYPOINTS[1]], "Orange",
             {"box": [20, 10, 100, 70], "point_coords": [[10.5, 80]], "point_labels": [0]}),
}  # fmt: skip


@pytest.mark.parametrize("regions, label, prompt", PROMPTS.values(), ids=PROMPTS)
def test_label_studio_gets_the_predictors_mask(regions, label, prompt, ask):
    status, answer = ask("/predict", asked(*regions))
    assert status == 200
    [prediction] = answer["results"]
    [result] = prediction["result"]
    mask, score = want(0, **prompt)
    np.testing.assert_array_equal(decoded(result["value"].pop("rle")), mask.ravel() * np.uint8(255))
    assert prediction["score"] == score and prediction["model_version"] == ask("/setup", {})[1]["model_version"]
    assert len(result.pop("id")) == 10
    assert result == {
        "from_name": "brush",
        "to_name": "image",
        "type": "brushlabels",
        "original_width": W,
        "original_height": H,
        "image_rotation": 0,
        "value": {"format": "rle", "brushlabels": [label]},
        "score": score,
        "readonly": False,
    }


def test_label_studios_other_requests(ask):
    assert ask("/health") == (200, {"status": "UP", "model_class": "RWKVSAM"}) == ask("/")
    setup = {"project": "1.17", "schema": CONFIG, "hostname": "http://evil", "access_token": "x", "extra_params": None}
    status, answer = ask("/setup", setup)
    assert status == 200 and answer["model_version"].startswith("fastsam-rwkv-custom-")
    assert ask("/webhook", {"action": "ANNOTATION_CREATED", "annotation": {}})[0] == 201
    assert ask("/predict", asked()) == (200, {"results": []})


def test_a_second_click_neither_fetches_nor_embeds(ask, label_studio, embeddings):
    urls = [f"/data/upload/1/photo{i}.png" for i in range(1, 2 + backend.IMAGES_KEPT)]
    label_studio.asked.clear()
    for regions in (KEYPOINTS[:1], KEYPOINTS):
        assert ask("/predict", asked(*regions, url=urls[0]))[0] == 200
        assert label_studio.asked == urls[:1] and len(embeddings) == 1
    for count in (2, 2):  # a window around the small box is embedded once
        assert ask("/predict", asked(SMALL, url=urls[0]))[0] == 200
        assert len(embeddings) == count
    for url in urls[1:]:  # the last of them drops the first
        assert ask("/predict", asked(KEYPOINTS[0], url=url))[0] == 200
    assert label_studio.asked == urls
    ask("/predict", asked(KEYPOINTS[0], url=urls[-1]))
    assert label_studio.asked == urls
    ask("/predict", asked(KEYPOINTS[0], url=urls[0]))
    assert label_studio.asked == [*urls, urls[0]]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/photo0.png",
        "https://{host}/photo0.png",
        "http://{host}@127.0.0.1:1/photo0.png",
        "http://user@{host}/photo0.png",
        "http://{host}.evil.org/photo0.png",
        "http://{host}\\@evil.org/photo0.png",
        "http://[photo0.png",
        "file:///etc/hostname",
        "s3://bucket/photo0.png",
    ],
)
def test_only_label_studio_is_asked_for_images(url, ask, label_studio):
    label_studio.asked.clear()
    status, answer = ask("/predict", asked(KEYPOINTS[0], url=url.format(host=label_studio.url[7:])))
    assert status == 400 and "images are fetched from there only" in answer["detail"] and not label_studio.asked


@pytest.mark.parametrize("url", ["//127.0.0.1:1/photo0.png", "/etc/../photo0.png", "data/my photo é/photo0.png"])
def test_paths_are_those_of_label_studio(url, ask, label_studio):
    label_studio.asked.clear()
    assert ask("/predict", asked(KEYPOINTS[0], url=url))[0] == 200
    [path] = label_studio.asked
    assert path.endswith("/photo0.png") and path.isascii() and " " not in path


def changed(of, **values):
    return {**of, **values}


REFUSED = {
    "redirect": (asked(KEYPOINTS[0], url="/redirect"), "303 elsewhere: turn off pre-signed URLs"),
    "missing": (asked(KEYPOINTS[0], url="/nothing"), "answered 404"),
    "slow": (asked(KEYPOINTS[0], url="/slow"), "no answer within 0.4 seconds"),
    "large": (asked(KEYPOINTS[0], url="/large"), "more than 131072 bytes"),
    "no image": (asked(KEYPOINTS[0], url="/text"), "the image is not an image"),
    "no url": (changed(asked(KEYPOINTS[0]), tasks=[{"data": {}}]), "no URL of an image in 'photo'"),
    "no task": (changed(asked(KEYPOINTS[0]), tasks=[]), "no URL of an image"),
    "config": (asked(KEYPOINTS[0], config="<View"), "not XML"),
    "no brush": (asked(KEYPOINTS[0], config='<View><Image name="image" value="$photo"/></View>'), "needs an Image"),
    "label": (asked(region("keypointlabels", "Pear", 1, 1)), "BrushLabels for it with the Label 'Pear'"),
    "labels": (asked(changed(KEYPOINTS[0], value={"x": 1, "y": 1})), "no keypointlabels"),
    "size": (asked(changed(KEYPOINTS[0], original_width=9)), "(120, 90) pixels, and Label Studio says (9, 90)"),
    "rotated": (asked(changed(KEYPOINTS[0], image_rotation=90)), "rotated"),
    "empty box": (asked(region("rectanglelabels", "Orange", 9, 9, width=0, height=0)), "is empty or reversed"),
}


@pytest.mark.parametrize("body, text", REFUSED.values(), ids=REFUSED)
def test_label_studio_gets_a_reason(body, text, ask):
    status, answer = ask("/predict", body)
    assert status == 400 and text in answer["detail"]


def test_label_studio_gets_a_reason_for_another_tool(ask):
    status, answer = ask("/predict", asked(changed(RECTANGLE, type="ellipselabels")))
    assert status == 422 and "'keypointlabels' or 'rectanglelabels'" in json.dumps(answer)


@pytest.mark.parametrize("key, good", [(KEY, True), (PERSONAL, True), ("wrong", False), ("a.wrong.one", False)])
def test_label_studio_needs_the_key(key, good, label_studio):
    found = files.Files(label_studio.url, key)
    if good:
        assert found.fetch(f"{label_studio.url}/data/photo3.png") == png(photo(3))
    else:
        with pytest.raises(ValueError, match="answered 401"):
            found.fetch("/data/photo3.png")


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "file:///", "https://"])
def test_the_address_of_label_studio_is_checked(url):
    with pytest.raises(ValueError, match="must be http://HOST"):
        files.Files(url, KEY)


def test_the_environment_configures_the_backend(monkeypatch, label_studio, tmp_path):
    MODEL.save_pretrained(tmp_path)
    for name, value in {
        "LABEL_STUDIO_URL": label_studio.url,
        "LABEL_STUDIO_API_KEY": KEY,
        "MODEL": str(tmp_path),
        "BASIC_AUTH_USER": "me",
        "BASIC_AUTH_PASS": "secret",
    }.items():
        monkeypatch.setenv(name, value)
    with serving(backend.create_app()) as ask:
        for given in ({}, {"Authorization": "Basic " + base64.b64encode(b"me:wrong").decode()}):
            assert [ask(path, body, **given)[0] for path, body in (("/health", None), ("/predict", asked()))] == [
                401
            ] * 2
        status, answer = ask(
            "/predict", asked(KEYPOINTS[0]), Authorization="Basic " + base64.b64encode(b"me:secret").decode()
        )
    rle = answer["results"][0]["result"][0]["value"]["rle"]
    np.testing.assert_array_equal(decoded(rle) > 0, want(0, point_coords=[[60, 40]])[0].ravel())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (200, 211)])
@pytest.mark.parametrize("kind", ["empty", "full", "noise", "stripes"])
def test_brush_rle(shape, kind):
    noise = np.random.default_rng(0).random(shape) < 0.5
    stripes = np.arange(shape[0] * shape[1]).reshape(shape) // 1025 % 2 == 1
    mask = {"empty": noise & False, "full": noise | True, "noise": noise, "stripes": stripes}[kind]
    np.testing.assert_array_equal(decoded(backend.brush_rle(mask)), mask.ravel() * np.uint8(255))


# CVAT


@pytest.fixture
def nuclio(monkeypatch):
    """Return a function that calls the handler as Nuclio does, after the start of a worker."""
    monkeypatch.setattr(RWKVSAM, "from_pretrained", lambda source, device: MODEL)
    logger = SimpleNamespace(info=lambda text: None)
    context = SimpleNamespace(user_data=SimpleNamespace(), logger=logger, Response=SimpleNamespace)
    cvat.init_context(context)

    def call(body):
        response = cvat.handler(context, SimpleNamespace(body=body))
        assert response.content_type == "application/json" and response.headers == {}
        return response.status_code, json.loads(response.body)

    return call


def invoked(pos_points=(), neg_points=(), obj_bbox=None, seed=0):
    """Return the payload of CVAT's `LambdaFunction.invoke` for an interactor."""
    image = base64.b64encode(png(photo(seed))).decode()
    body = {"image": image, "pos_points": pos_points, "neg_points": neg_points, "obj_bbox": obj_bbox}
    return json.loads(json.dumps(body))


INTERACTIONS = {
    "click": (invoked([[60, 40]]), {"point_coords": [[60, 40]]}),
    "clicks": (
        invoked([[60, 40]], [[10.5, 80]], []),
        {"point_coords": [[60, 40], [10.5, 80]], "point_labels": [1, 0]},
    ),
    "box": (invoked(obj_bbox=[[20, 10], [100, 70]]), {"box": [20, 10, 100, 70]}),
    "small box": (invoked(obj_bbox=[[40, 30], [52, 40]]), {"box": [40, 30, 52, 40]}),
    "both": (
        invoked([], [[10.5, 80]], [[20, 10], [100, 70]]),
        {"box": [20, 10, 100, 70], "point_coords": [[10.5, 80]], "point_labels": [0]},
    ),
}


@pytest.mark.parametrize("body, prompt", INTERACTIONS.values(), ids=INTERACTIONS)
def test_cvat_gets_the_predictors_mask(body, prompt, nuclio):
    status, answer = nuclio(body)
    assert status == 200 and answer.keys() == {"mask"}
    assert {type(value) for row in answer["mask"] for value in row} == {int}
    np.testing.assert_array_equal(answer["mask"], want(0, **prompt)[0])


def test_a_second_click_in_cvat_does_not_embed(nuclio, embeddings):
    for points, seed, count in (([[60, 40]], 0, 1), ([[60, 40], [30, 20]], 0, 1), ([[60, 40]], 1, 2)):
        assert nuclio(invoked(points, seed=seed))[0] == 200
        assert len(embeddings) == count
    assert nuclio(changed(invoked([[1, 1]]), image=base64.b64encode(b"no image").decode()))[0] == 400
    assert nuclio(invoked([[60, 40]], seed=1))[0] == 200  # the image before the bad one is still there
    assert len(embeddings) == 2


IMAGE = invoked()["image"]
BAD = {
    "bytes": (b"{}", "JSON object"),
    "no image": ({"pos_points": [[1, 1]]}, "'image' is base64"),
    "not base64": ({"image": "?", "pos_points": [[1, 1]]}, "'image' is not base64"),
    "not ASCII": ({"image": "é", "pos_points": [[1, 1]]}, "'image' is not base64"),
    "no file": ({"image": "AAAA", "pos_points": [[1, 1]]}, "the image is not an image"),
    "no prompt": (invoked(), "give a point or a box"),
    "two boxes": (invoked(obj_bbox=[[1, 1], [9, 9], [2, 2], [8, 8]]), "two corners of one box"),
    "reversed box": (invoked(obj_bbox=[[9, 9], [1, 1]]), "is empty or reversed"),
    "triples": ({"image": IMAGE, "pos_points": [[1, 2, 3]]}, "'pos_points' must be a list of [x, y]"),
    "flat": ({"image": IMAGE, "neg_points": [1, 2]}, "'neg_points' must be a list of [x, y]"),
    "text": ({"image": IMAGE, "pos_points": [["a", "b"]]}, "'pos_points' must be a list of [x, y]: could not"),
    "ragged": ({"image": IMAGE, "pos_points": [[1], [2, 3]]}, "'pos_points' must be a list of [x, y]"),
    "huge": ({"image": IMAGE, "pos_points": [[10**400, 1]]}, "'pos_points' must be a list of [x, y]"),
    "not finite": ({"image": IMAGE, "pos_points": [[float("nan"), 1]]}, "finite"),
}


@pytest.mark.parametrize("body, text", BAD.values(), ids=BAD)
def test_cvat_gets_a_reason(body, text, nuclio):
    status, answer = nuclio(body)
    assert status == 400 and text in answer["error"]


def test_function_yaml_names_an_interactor_and_the_handler():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    function = yaml.safe_load((EXAMPLES / "cvat/function.yaml").read_text())
    annotations = function["metadata"]["annotations"]
    assert annotations["type"] == "interactor" and annotations["version"] >= 2  # older ones are warned about
    assert annotations["min_pos_points"] == annotations["min_neg_points"] == 0
    assert annotations["startswith_box_optional"] is True and "startswith_box" not in annotations
    file, name = function["spec"]["handler"].split(":")
    assert file == Path(cvat.__file__).stem and callable(getattr(cvat, name))
    assert function["spec"]["triggers"]["myHttpTrigger"]["maxWorkers"] == 1
