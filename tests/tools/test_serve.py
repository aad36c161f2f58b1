"""The HTTP server: answers, limits, batching, the page, and the process."""

import base64
import io
import json
import re
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from photos import photo, png
from PIL import Image
from pycocotools import mask as coco
from served import served
from small_model import small_model

from benchmarks.speed import serve_load
from benchmarks.speed.serve_client import Client, form, memory_of, serving
from fastsam_rwkv import AutomaticMaskGenerator, Predictor
from fastsam_rwkv.cli import main

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from fastsam_rwkv.serve import Settings, create_app  # noqa: E402  # needs what is checked above
from fastsam_rwkv.serve.cache import LocalCache, bytes_of  # noqa: E402  # the same

MODEL = small_model()
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def running(model=MODEL, **settings):
    """Serve in a thread; yield the port and the service."""
    app = create_app(model, Settings(**settings))
    with served(app) as port:
        yield port, app.state.service


@pytest.fixture(scope="module")
def port():
    with running(batching=False) as (port, _):
        yield port


def posting(port, path, body, kind):
    """Return a connection on which a request was sent."""
    connection = socket.create_connection(("127.0.0.1", port))
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def masks_of(answer):
    return np.array([coco.decode(mask["segmentation"]) for mask in answer["masks"]], bool)


PROMPTS = {
    "click": {"point_coords": [[60.0, 40.0]]},
    "clicks": {"point_coords": [[60, 40], [10.5, 80]], "point_labels": [1, 0], "multimask_output": True},
    "box": {"box": [20, 10, 100, 70]},
    "boxes": {"box": [[20, 10, 100, 70], [3, 40, 60, 88], [50, 0, 120, 90]], "multimask_output": True},
    "both": {"box": [[20, 10, 100, 70]], "point_coords": [[[60, 40]]]},
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_answers_equal_the_predictors_bit_for_bit(prompt, port):
    client, image = Client(port), photo()
    embedded = client.embed(png(image))
    assert (embedded["height"], embedded["width"]) == (90, 120)
    for zoom in ("never", "always"):
        want = Predictor(MODEL).predict_image(image, **prompt, zoom=zoom)
        asked = {**prompt, "low_res_logits": True}
        answers = [json.loads(client.form("/v1/masks", png(image), prompts=json.dumps({**asked, "zoom": zoom})))]
        if zoom == "never":
            answers.append(client.json(f"/v1/embeddings/{embedded['id']}/masks", asked))
        for answer in answers:
            np.testing.assert_array_equal(masks_of(answer), want.masks.reshape(-1, 90, 120))
            got = answer["masks"]
            np.testing.assert_array_equal([mask["score"] for mask in got], want.scores.ravel())
            low = [np.frombuffer(base64.b64decode(mask["low_res_logits"]["data"]), "<f4") for mask in got]
            np.testing.assert_array_equal(np.ravel(low), want.low_res_logits.ravel())
            assert [(mask["prompt"], mask["mask"]) for mask in got] == list(
                np.ndindex(want.scores.reshape(-1, want.scores.shape[-1]).shape)
            )
            for mask in got:
                assert mask["area"] == coco.area(mask["segmentation"])
                assert mask["bbox"] == coco.toBbox(mask["segmentation"]).tolist()


def test_the_client_in_the_documentation(port):
    text = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    image = photo(H=400, W=600)
    names = {"photo": png(image)}
    exec(code.replace("127.0.0.1:8000", f"127.0.0.1:{port}"), names)
    want = Predictor(MODEL).predict_image(image, box=[318, 222, 408, 332], zoom="never").masks
    np.testing.assert_array_equal(names["masks"], want)


def test_logits_of_an_answer_are_a_prompt(port):
    client, image = Client(port), photo()
    path = f"/v1/embeddings/{client.embed(png(image))['id']}/masks"
    first = client.json(path, {"box": [20, 10, 100, 70], "low_res_logits": True})["masks"][0]
    answer = client.json(path, {"point_coords": [[30, 40]], "mask_input": first["low_res_logits"], "format": "png"})
    predictor = Predictor(MODEL)
    before = predictor.predict_image(image, box=[20, 10, 100, 70], zoom="never")
    want = predictor.predict_image(image, point_coords=[[30, 40]], mask_input=before.low_res_logits, zoom="never")
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["masks"][0]["segmentation"]))))
    np.testing.assert_array_equal(drawn, want.masks[0] * np.uint8(255))


def test_everything_streams_the_generators_records(port):
    image = photo()
    options = {"points_per_side": 4, "pred_iou_thresh": 0, "stability_score_thresh": 0}
    lines = Client(port).form("/v1/everything", png(image), **options).decode().splitlines()
    first, *records, last = map(json.loads, lines)
    want = AutomaticMaskGenerator(MODEL, output_mode="coco_rle", **options).generate(image)
    assert first == {"height": 90, "width": 120} and last == {"masks": len(want)} and want
    for got, wanted in zip(records, want, strict=True):
        assert got["bbox"] == coco.toBbox(got["segmentation"]).tolist()
        assert {**got, "bbox": 0} == {**wanted, "bbox": 0}


def test_work_that_waits_shares_a_batch():
    image, boxes = photo(), [[10 + i, 10, 80, 60 + i] for i in range(12)]
    want = Predictor(MODEL).predict_image(image, box=boxes, zoom="never").masks[:, 0]
    answers, embedded = {}, []
    with running(images_at_once=4, workers=16) as (port, service):
        id = Client(port).embed(png(image))["id"]
        predictor, held = service._batcher.predictor, threading.Event()
        decode, embed_batch = predictor.decode, predictor.embed_batch
        predictor.decode = lambda *given: held.wait() and decode(*given)
        predictor.embed_batch = lambda *given: held.wait() and embed_batch(*given)

        def ask(i):
            answers[i] = masks_of(Client(port).json(f"/v1/embeddings/{id}/masks", {"box": boxes[i]}))[0]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
        threads += [threading.Thread(target=lambda: embedded.append(Client(port).embed(png(image)))) for _ in range(4)]
        for thread in threads:
            thread.start()
        batcher = service._batcher
        while len(batcher._images) + len(batcher._prompts) < 15:  # and one is with the model
            time.sleep(0.01)
        held.set()
        for thread in threads:
            thread.join()
        metrics = Client(port).ask("/metrics")[1].decode()
        for id in [one["id"] for one in embedded]:
            embedding, _ = service.cache.get(id)
            assert embedding.image_embed.untyped_storage().nbytes() == embedding.image_embed.nbytes  # not the batch's
            got = masks_of(Client(port).json(f"/v1/embeddings/{id}/masks", {"box": boxes[0]}))[0]
            assert (got & want[0]).sum() >= 0.999 * (got | want[0]).sum()
    for i, mask in answers.items():
        assert (mask & want[i]).sum() >= 0.999 * (mask | want[i]).sum()
    counts = dict(re.findall(r'batch_size_count\{work="(\w+)"\} (\d+)', metrics))
    assert int(counts["decode"]) <= 3 and int(counts["encode"]) <= 3  # the first of each, and the others


def test_embeddings_are_dropped_by_least_recent_use():
    predictor = Predictor(MODEL)
    predictor.set_image(photo())
    with running(cache_bytes=2 * bytes_of(predictor.embedding)) as (port, service):
        client = Client(port)
        first, second = (client.embed(png(photo(seed)))["id"] for seed in (0, 1))
        client.json(f"/v1/embeddings/{first}/masks", {"box": [1, 1, 50, 50]})
        third = client.embed(png(photo(2)))["id"]
        statuses = [
            client.ask(f"/v1/embeddings/{id}/masks", b'{"box": [1, 1, 50, 50]}') for id in (first, second, third)
        ]
        assert [status for status, _ in statuses] == [200, 404, 200]
        assert b"send the image again" in statuses[1][1]
        assert service.cache.usage() == (2, 2 * bytes_of(predictor.embedding))
    single = LocalCache(1)
    assert single.get(single.put(predictor.embedding, (90, 120))) is not None  # one that is too large is kept alone


def test_limits():
    bytes_of_image = png(photo())
    with running(
        max_upload_bytes=len(bytes_of_image) + 500,
        max_json_bytes=3000,
        max_pixels=90 * 120,
        max_prompts=2,
        max_points=3,
    ) as (port, _):
        client = Client(port)
        id = client.embed(bytes_of_image)["id"]

        def status_of(path, *body, **headers):
            status, answer = client.ask(path, *body, **headers)
            return status, json.loads(answer)["detail"]

        path = f"/v1/embeddings/{id}/masks"
        assert status_of("/v1/embeddings", *form(png(photo(H=91)))) == (
            413, "the image has 120x91 pixels; at most 10800 pixels are taken"
        )  # fmt: skip
        assert status_of("/v1/embeddings", *form(bytes_of_image + bytes(600)))[0] == 413
        assert status_of(path, b" " * 3001)[0] == 413
        assert status_of(path, json.dumps({"box": [[1, 1, 50, 50]] * 3}).encode()) == (
            422, "3 prompts in one request; at most 2 are taken"
        )  # fmt: skip
        assert status_of(path, json.dumps({"point_coords": [[5, 5]] * 4}).encode()) == (
            422, "4 points in one request; at most 3 are taken"
        )  # fmt: skip
        assert status_of(path, json.dumps({"point_coords": [[[5, 5]] * 2] * 2}).encode())[0] == 422
        with socket.create_connection(("127.0.0.1", port)) as connection:  # no Content-Length
            head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
            connection.sendall(f"{head}\r\n\r\n".encode() + b"400\r\n" + b" " * 1024 + b"\r\n")
            for _ in range(2):
                connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
            assert b" 413 " in connection.recv(100)


def test_a_bomb_is_refused_by_its_header(port):
    image = serve_load.bomb()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        status, answer = Client(port).ask("/v1/embeddings", *form(image))
        seconds.append(time.perf_counter() - start)
        assert (status, b"too large" in answer) == (413, True)
    assert min(seconds) < 0.1  # the least: other tests run beside this one


def test_slow_bodies_and_slow_answers_end():
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    head += "Content-Length: 9\r\n\r\n"
    with running(timeout=0.4, queue=3) as (port, service):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode() + b"--x")
            assert b" 408 " in connection.recv(100)
        id = Client(port).embed(png(photo()))["id"]
        held, predictor = threading.Event(), service._batcher.predictor
        decode = predictor.decode
        predictor.decode = lambda *given: held.wait() and decode(*given)
        answers = []

        def ask():
            connection = Client(port)._connection
            connection.request(
                "POST", f"/v1/embeddings/{id}/masks", b'{"box": [1, 1, 50, 50]}', {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            answers.append((response.status, response.getheader("Retry-After"), response.read()))

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {status for status, _, _ in answers} == {503} and {retry for _, retry, _ in answers} == {"1"}
        assert sum(b"too many" in text for _, _, text in answers) == 2
        held.set()
        deadline = time.monotonic() + 20
        while service.queued and time.monotonic() < deadline:
            time.sleep(0.01)
        assert service.queued == 0
        assert Client(port).json(f"/v1/embeddings/{id}/masks", {"box": [1, 1, 50, 50]})["masks"]


def test_token_hosts_and_origins():
    settings = dict(token="secret", cors_origins=["https://tool.example"], allowed_hosts=["127.0.0.1"])
    with running(**settings) as (port, _):
        assert Client(port).ask("/v1/model")[0] == Client(port, "other").ask("/metrics")[0] == 401
        assert Client(port).ask("/v1/embeddings", *form(png(photo())))[0] == 401
        assert (
            Client(port).ask("/healthz")[0]
            == Client(port).ask("/")[0]
            == Client(port, "secret").ask("/v1/model")[0]
            == 200
        )
        assert Client(port).ask("/healthz", Host="evil.example")[0] == 400
        connection = Client(port)._connection
        for origin, allowed in (("https://tool.example", "https://tool.example"), ("https://evil.example", None)):
            connection.request("GET", "/healthz", headers={"Origin": origin})
            response = connection.getresponse()
            response.read()
            assert response.getheader("Access-Control-Allow-Origin") == allowed
        wanted = {"Origin": "https://tool.example", "Access-Control-Request-Method": "POST"}
        assert Client(port).ask("/v1/embeddings", method="OPTIONS", **wanted)[0] == 200


def test_no_page_of_another_origin_reads_answers(port):
    connection = Client(port)._connection
    connection.request("GET", "/healthz", headers={"Origin": "https://evil.example"})
    assert connection.getresponse().getheader("Access-Control-Allow-Origin") is None


def test_malformed_requests_get_4xx(port, monkeypatch):
    statuses = serve_load.malformed(port, 300)
    assert sum(statuses.values()) == 300
    assert all(400 <= status < 500 for status in statuses), statuses
    assert len(Client(port).json("/openapi.json")["paths"]) == 7


def test_clients_that_misbehave_hold_nobody_up():
    with running() as (port, service):
        alone = sorted(serve_load.clicks(port, 1, 20))[10]
        with serve_load.misbehaving(port, 9):
            beside = sorted(serve_load.clicks(port, 1, 20))[10]
        assert beside < 10 * alone + 0.2
        deadline = time.monotonic() + 20
        while service.queued and time.monotonic() < deadline:
            time.sleep(0.01)
        assert service.queued == 0


def test_work_of_clients_that_left_is_dropped():
    with running(workers=1) as (port, service):
        id, encoded = Client(port).embed(png(photo()))["id"], []
        held, predictor = threading.Event(), service._batcher.predictor
        embed_batch = predictor.embed_batch
        predictor.embed_batch = lambda *given: encoded.append(1) or held.wait() and embed_batch(*given)
        sent = form(png(photo()))
        connections = [posting(port, "/v1/embeddings", *sent) for _ in range(4)]
        while service.queued < 4 or not encoded:
            time.sleep(0.01)
        for connection in connections:
            connection.close()
        while service.queued > 1:
            time.sleep(0.01)
        held.set()
        assert Client(port).json(f"/v1/embeddings/{id}/masks", {"box": [1, 1, 50, 50]})["masks"]
        while service.queued:
            time.sleep(0.01)
        assert len(encoded) == 1


def test_a_search_ends_when_its_client_leaves(monkeypatch):
    with running() as (port, service):
        decode_where, batches = MODEL.decode_where, []

        def slowly(*given):
            batches.append(1)
            time.sleep(0.2)
            return decode_where(*given)

        monkeypatch.setattr(MODEL, "decode_where", slowly)
        with posting(port, "/v1/everything", *form(png(photo()), points_per_side=64)):  # 64 batches
            while not batches:
                time.sleep(0.01)
        while service.queued:
            time.sleep(0.01)
        assert len(batches) < 20


def test_a_failure_of_the_model_reaches_its_client(monkeypatch):
    with running() as (port, service):
        id = Client(port).embed(png(photo()))["id"]
        decode, predictor = service._batcher.predictor.decode, service._batcher.predictor
        for error, status in ((MemoryError(), 503), (RuntimeError("broken"), 500)):
            monkeypatch.setattr(predictor, "decode", lambda *given, error=error: (_ for _ in ()).throw(error))
            assert Client(port).ask(f"/v1/embeddings/{id}/masks", b'{"box": [1, 1, 50, 50]}')[0] == status
        monkeypatch.setattr(predictor, "decode", decode)
        assert Client(port).ask(f"/v1/embeddings/{id}/masks", b'{"box": [1, 1, 50, 50]}')[0] == 200


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines.*--token TOKEN, or --no-token"),
        (["--host", "::"], "--token"),
        (["--host", "example.org"], "--token"),
        (["--port", "70000"], "--port must be 0 to 65535, got 70000"),
        (["--queue", "0"], "queue must be a positive number, got 0"),
        (["--token", " "], "token must be printable"),
        (["--model", "/nothing"], "/nothing"),
    ],
)
def test_wrong_arguments(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("FASTSAM_RWKV_TOKEN", raising=False)
    assert main(["serve", *arguments]) in (1, 2)
    assert re.search(message, capsys.readouterr().err)


def test_a_port_in_use_and_missing_packages(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port]) == 2
        assert f"cannot listen on port {port}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert "pip install 'fastsam-rwkv[serve]'" in capsys.readouterr().err


def test_the_process_serves_stops_and_starts_again():
    """Load in short, SIGTERM while a request runs, SIGKILL, and a start after it."""
    image = serve_load.IMAGES[0].read_bytes()
    with serving("--no-batching", "--dtype", "float32") as (port, process):
        serve_load.clicks(port, 4, 5)
        before = memory_of(process)
        assert len(serve_load.clicks(port, 4, 20)) == 80
        assert memory_of(process) < before + (64 << 20)
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(Client(port).form("/v1/everything", image, points_per_side=8))
        )
        thread.start()
        while b"queue_length 1.0" not in Client(port).ask("/metrics")[1]:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert json.loads(answers[0].splitlines()[-1])["masks"] > 0  # a request that ran was finished
        assert process.wait(60) in (0, -signal.SIGTERM)
    with serving("--dtype", "float32") as (port, process):
        process.send_signal(signal.SIGKILL)
        process.wait()
    with serving("--dtype", "float32") as (port, _):
        answer = json.loads(
            Client(port).form("/v1/masks", image, prompts='{"box": [60, 60, 200, 200], "zoom": "never"}')
        )
        want = Predictor().predict_image(serve_load.IMAGES[0], box=[60, 60, 200, 200], zoom="never")
        np.testing.assert_array_equal(masks_of(answer), want.masks)
