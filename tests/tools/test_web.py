"""The page of `export web`, in headless Chromium, and its server."""

import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastsam_rwkv import RWKVSAM, Predictor
from fastsam_rwkv.cli import main
from fastsam_rwkv.export import ExportError, OnnxPredictor, web
from fastsam_rwkv.modeling.pixels import resize_masks
from fastsam_rwkv.predictor.frame import ImageFrame

APP = Path(web.__file__).with_name("web") / "app.js"
NODE, NPM = shutil.which("node"), shutil.which("npm")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_node = pytest.mark.skipif(NODE is None, reason="Node.js is not installed: the script's functions cannot run")
needs_browser = pytest.mark.skipif(
    BROWSER is None or NPM is None, reason="Chromium or npm is not installed: the page cannot be tried"
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
PATIENCE = 120_000  # milliseconds


def run_script(code, tmp_path):
    (tmp_path / "app.mjs").write_text(APP.read_text())
    code = f"import * as app from {json.dumps((tmp_path / 'app.mjs').as_uri())};\n{code}"
    result = subprocess.run([NODE, "--input-type=module", "-e", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@needs_node
@pytest.mark.parametrize(
    "size, to", [((40, 60), (20, 30)), ((37, 61), (23, 40)), ((9, 7), (64, 50)), ((5, 90), (5, 33))]
)
def test_the_page_resizes_pixels_as_pillow_does(size, to, tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (*size, 4), np.uint8)
    sizes = ", ".join(map(str, (*size, *to)))
    code = f"const out = app.resizePixels(Uint8Array.from({rgba.ravel().tolist()}), {sizes});"
    got = np.array(run_script(f"{code} console.log(JSON.stringify([...out]));", tmp_path)).reshape(*to, 3)
    want = np.asarray(Image.fromarray(rgba[..., :3]).resize(to[::-1], Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(got - want).max() <= 1 and (got != want).mean() < 0.01


@needs_node
def test_the_page_enlarges_masks_as_the_package_does(tmp_path):
    low = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    for H, W in ((45, 80), (300, 200), (1, 90), (64, 64)):
        frame = ImageFrame.of((H, W), 64)
        code = f"""
        const [h, w] = app.frameOf({H}, {W}, 64);
        const large = app.resizeLogits(Float32Array.from({low.ravel().tolist()}), 16, 16, 16, 64, 64);
        console.log(JSON.stringify({{size: [h, w], out: [...app.resizeLogits(large, 64, h, w, {H}, {W})]}}));"""
        got = run_script(code, tmp_path)
        assert tuple(got["size"]) == frame.resized_size
        want = resize_masks(torch.from_numpy(low)[None, None], (64, 64), frame.resized_size, (H, W))[0, 0]
        np.testing.assert_allclose(np.array(got["out"]).reshape(H, W), want, atol=1e-4)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The bundled model with onnxruntime-web beside it."""
    folder = tmp_path_factory.mktemp("site")
    assert main(["export", "web", str(folder), "--offline"]) == 0
    return folder


@pytest.fixture(scope="module")
def address(site):
    with web.serving(site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """A page with the model loaded; every error in its console fails the test."""
    errors = []
    context = browser.new_context(viewport={"width": 900, "height": 800}, has_touch=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.add_init_script(
        "window.said = []; addEventListener('DOMContentLoaded', () => new MutationObserver(() => "
        "said.push(document.getElementById('status').textContent)).observe(document.getElementById('status'), "
        "{childList: true, characterData: true, subtree: true}));"
    )
    page.goto(address)
    says(page, "Ready")
    yield page
    context.close()
    assert not errors


def says(page, start):
    from playwright.sync_api import expect

    expect(page.locator("#status")).to_have_text(re.compile(f"^{start}"), timeout=PATIENCE)


def show_example(page):
    page.click("#example")
    says(page, "Encoded in")
    return page.locator("#view").bounding_box()


def mask_of(page):
    with page.expect_download() as download:
        page.click("#save")
    return np.asarray(Image.open(download.value.path()).convert("L")) > 127


def drag_box(page, view, H, W):
    """Drag a box over a view of an image of H x W pixels, wait for its mask, and return the box in the image."""
    page.mouse.move(view["x"] + 0.2 * view["width"], view["y"] + 0.1 * view["height"])
    page.mouse.down()
    page.mouse.move(view["x"] + 0.8 * view["width"], view["y"] + 0.95 * view["height"], steps=4)
    page.mouse.up()
    says(page, "Encoder .* Predicted IoU")
    return [0.2 * W, 0.1 * H, 0.8 * W, 0.95 * H]


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@needs_browser
def test_the_page_gives_the_masks_of_onnx_predictor(site, page, address):
    """Also with the network off once the model is loaded, and never with a request to another machine."""
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    assert any(" MB" in text for text in page.evaluate("said"))
    image = np.asarray(Image.open(site / "example.jpg").convert("RGB"))
    H, W = image.shape[:2]
    predictor = OnnxPredictor(site)
    predictor.set_image(image)
    view = show_example(page)
    page.context.set_offline(True)
    x, y = view["x"] + 0.45 * view["width"], view["y"] + 0.55 * view["height"]
    page.mouse.click(x, y)
    says(page, "Encoder .* Predicted IoU")
    click = predictor.predict([[0.45 * W, 0.55 * H]], multimask_output=True)
    best = click.scores.argmax()
    assert iou(mask_of(page), click.masks[best]) >= 0.99
    page.keyboard.down("Shift")
    page.mouse.click(view["x"] + 5, view["y"] + 5)
    page.keyboard.up("Shift")
    says(page, "Encoder .* Predicted IoU")
    points, labels = [[0.45 * W, 0.55 * H], [5 * W / view["width"], 5 * H / view["height"]]], [1, 0]
    low = click.low_res_logits[best : best + 1]
    want = predictor.predict(points, labels, mask_input=low, multimask_output=False).masks[0]
    assert iou(mask_of(page), want) >= 0.99
    page.keyboard.press("Control+z")
    says(page, "Taken back")
    assert iou(mask_of(page), click.masks[best]) >= 0.99
    page.click("#clear")
    page.mouse.click(x, y)
    page.mouse.click(view["x"] + 5, view["y"] + 5, button="right")  # before the first answer
    says(page, "Encoder .* Predicted IoU")
    page.wait_for_timeout(3000)
    assert iou(mask_of(page), want) >= 0.99
    page.click("#clear")
    page.mouse.move(x, y)  # previews
    box = drag_box(page, view, H, W)
    assert iou(mask_of(page), predictor.predict(box=box, multimask_output=False).masks[0]) >= 0.99
    assert requests and all(url.startswith((address, "blob:")) for url in requests)


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed: the page cannot be tried")
def test_the_page_of_the_server_gives_the_masks_of_predictor(browser):
    """Also after the server dropped the embedding, and not without the token."""
    test_serve = pytest.importorskip("test_serve", reason="the extra `serve` is not installed")
    model = RWKVSAM.from_pretrained()
    with test_serve.running(model, token="secret") as (port, service):
        page = browser.new_page(viewport={"width": 900, "height": 800})
        page.set_default_timeout(PATIENCE)
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        address = f"http://127.0.0.1:{port}/"
        page.goto(address)
        says(page, "The model cannot be loaded: this server needs the header .* open this page with #token=TOKEN")
        page.goto("about:blank")
        page.goto(f"{address}#token=secret")
        says(page, "Ready: 512 pixels, tiny, cpu of the server")
        assert "is sent to the server" in page.inner_text("header")
        predictor = Predictor(model)
        predictor.set_image(web.PHOTO)
        H, W = predictor.original_size
        view = show_example(page)
        page.mouse.click(view["x"] + 0.45 * view["width"], view["y"] + 0.55 * view["height"])
        says(page, "Encoder .* Predicted IoU")
        click = predictor.predict([[0.45 * W, 0.55 * H]], [1], multimask_output=True)
        best = click.scores.argmax()
        assert iou(mask_of(page), click.masks[best]) >= 0.99
        service.cache._kept.clear()
        page.keyboard.down("Shift")
        page.mouse.click(view["x"] + 5, view["y"] + 5)
        page.keyboard.up("Shift")
        says(page, "Segmenting|Encoder")
        says(page, "Encoder .* Predicted IoU")
        points = [[0.45 * W, 0.55 * H], [5 * W / view["width"], 5 * H / view["height"]]]
        low = click.low_res_logits[best : best + 1]
        want = predictor.predict(points, [1, 0], mask_input=low, multimask_output=False).masks[0]
        page.wait_for_timeout(3000)
        assert iou(mask_of(page), want) >= 0.99
        page.click("#clear")
        box = drag_box(page, view, H, W)
        assert iou(mask_of(page), predictor.predict(box=box, multimask_output=False).masks[0]) >= 0.99
        assert all(url.startswith((address, "blob:", "about:")) for url in requests)
        page.close()


@needs_browser
def test_keyboard_and_touch(page):
    view = show_example(page)
    page.focus("#view")
    page.keyboard.press("Control+ArrowDown")
    page.keyboard.press("Enter")
    says(page, "Encoder .* Predicted IoU")
    by_keyboard = mask_of(page)
    page.focus("#view")
    page.keyboard.press("Backspace")
    assert page.is_disabled("#save")
    page.keyboard.press("Shift+Enter")
    says(page, "Mark the object first")
    page.touchscreen.tap(view["x"] + view["width"] / 2, view["y"] + view["height"] / 2 + 0.1 * view["width"])
    says(page, "Encoder .* Predicted IoU")
    assert iou(mask_of(page), by_keyboard) > 0.99
    page.click("#background")
    page.touchscreen.tap(view["x"] + 9, view["y"] + 9)
    says(page, "Encoder .* Predicted IoU")
    page.click("#clear")
    page.focus("#view")
    for key in ("Control+ArrowLeft", "b", "Control+ArrowRight", "Control+ArrowRight", "Control+ArrowDown", "b"):
        page.keyboard.press(key)
    says(page, "Encoder .* Predicted IoU")
    assert mask_of(page).any()


@needs_browser
def test_files_that_are_no_photographs(page, tmp_path):
    (tmp_path / "notes.jpg").write_text("no image")
    page.set_input_files("#file", tmp_path / "notes.jpg")
    says(page, r"notes\.jpg is no image that this browser can read\.")
    Image.new("RGBA", (60, 3000), (0, 0, 0, 0)).save(tmp_path / "tall.png")
    page.set_input_files("#file", tmp_path / "tall.png")
    says(page, "Encoded in")
    Image.new("L", (8000, 7000)).save(tmp_path / "huge.png")
    page.set_input_files("#file", tmp_path / "huge.png")
    says(page, r"huge\.png has 56 million pixels; at most 50 million are taken\.")


@needs_browser
@pytest.mark.parametrize("reachable", [True, False])
def test_the_runtime_from_another_origin(reachable, browser, site, tmp_path, monkeypatch):
    """A second server stands for the CDN and sends its headers."""
    folder, asked = tmp_path / "site", []
    shutil.copytree(site, folder, ignore=shutil.ignore_patterns("ort"))

    class Handler(web._Handler):
        def end_headers(self):
            asked.append(self.path.removeprefix("/"))
            self.send_header("Access-Control-Allow-Origin", "*")
            super().end_headers()

    with web.serving(site / "ort") as cdn, web.serving(folder) as server:
        cdn.RequestHandlerClass = partial(Handler, directory=str(site / "ort"))
        monkeypatch.setattr(web, "CDN", f"http://127.0.0.1:{cdn.server_port}/")
        web._write_page(folder, offline=False)
        running = (cdn, server) if reachable else (server,)
        for one in running:
            threading.Thread(target=one.serve_forever, daemon=True).start()
        if not reachable:
            cdn.server_close()
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        says(page, "Ready: 512 pixels, wasm" if reachable else "The model cannot be loaded: ")
        page.wait_for_timeout(2000)
        says(page, "Ready" if reachable else "The model cannot be loaded: ")  # the last word
        if reachable:
            show_example(page)
            assert set(asked) == {name for name in web.RUNTIME_FILES if not re.search("webgpu|asyncify", name)}
        page.close()
        for one in running:
            one.shutdown()


@needs_browser
@pytest.mark.parametrize(
    "script, message",
    [
        ("WebAssembly.validate = () => false;", "This browser has no WebAssembly SIMD"),
        ("delete window.WebAssembly;", "This browser has no WebAssembly SIMD"),
    ],
)
def test_browsers_that_cannot_run_the_model(script, message, browser, address):
    page = browser.new_page()
    page.add_init_script(script)
    page.goto(address)
    says(page, message)
    page.click("#example")  # the photograph is shown, and the message stays
    says(page, message)
    page.close()


@needs_browser
@pytest.mark.parametrize("broken", ["export.json", "decoder.onnx", "ort/ort-wasm-simd-threaded.wasm"])
def test_files_that_are_missing_on_the_server(broken, browser, site, tmp_path):
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    (folder / broken).unlink()
    with web.serving(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        says(page, "The model cannot be loaded: ")
        page.close()
        server.shutdown()


def test_the_server_sends_what_threads_need_and_no_more(site, address):
    with urllib.request.urlopen(address) as response:
        assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert b"https:" not in response.read()  # offline: nothing from elsewhere
    types = {"app.js": "text/javascript", "ort/ort.wasm.min.mjs": "text/javascript",
             "ort/ort-wasm-simd-threaded.wasm": "application/wasm"}  # fmt: skip
    for name, kind in types.items():
        with urllib.request.urlopen(address + name) as response:
            assert response.headers["Content-Type"] == kind
    for name in ("ort/", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "nothing"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address + name)
    port = int(address.split(":")[-1].strip("/"))
    with pytest.raises(ExportError, match=f"cannot listen on port {port} of 127.0.0.1"), web.serving(site, port):
        pass


def test_without_offline_the_page_loads_from_a_cdn(exports, monkeypatch, tmp_path):
    monkeypatch.setattr(web, "export_onnx", lambda model, folder, **_: exports.copy("fp32", folder))
    web.export_web(None, tmp_path / "site")
    script, html = ((tmp_path / "site" / name).read_text() for name in ("app.js", "index.html"))
    assert f'"https://cdn.jsdelivr.net/npm/onnxruntime-web@{web.RUNTIME}/dist/"' in script
    assert html.count("https://cdn.jsdelivr.net") == 2 and "{" + "origin}" not in html
    assert not (tmp_path / "site" / "ort").exists()


def test_npm_that_is_missing_or_fails(exports, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(web, "export_onnx", lambda model, folder, **_: exports.copy("fp32", folder))
    monkeypatch.setattr(web.shutil, "which", lambda name: None)
    assert main(["export", "web", str(exports.model), str(tmp_path / "a"), "--offline"]) == 1
    assert "install Node.js, or omit --offline" in capsys.readouterr().err
    fails = tmp_path / "npm"
    fails.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no network')\n")
    fails.chmod(0o755)
    monkeypatch.setattr(web.shutil, "which", lambda name: str(fails))
    with pytest.raises(ExportError, match=r"npm could not download onnxruntime-web@1.*: no network; try again"):
        web.export_web(str(exports.model), tmp_path / "b", offline=True)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_cannot_be(port, capsys):
    assert main(["demo", "--port", str(port), "--no-browser"]) == 2
    assert f"--port must be 0 to 65535, got {port}" in capsys.readouterr().err


def test_a_demo_is_exported_once(exports, monkeypatch, tmp_path, capsys):
    made = []

    def export_web(model, folder, **options):
        made.append(options)
        exports.copy("fp32", folder)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(web, "export_web", export_web)
    folder = web.cached_site(str(exports.model), offline=False)
    assert folder == web.cached_site(str(exports.model), offline=False) and len(made) == 1
    assert capsys.readouterr().err.count("Exporting the page") == 1
    (folder / "decoder.onnx").write_bytes(b"damaged")
    web.cached_site(str(exports.model), offline=False)
    assert len(made) == 2 and web.cached_site(str(exports.model), offline=True) != folder
