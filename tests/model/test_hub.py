"""Loading from a stand-in for the Hub over HTTP, with the real client."""

import os
import subprocess
import sys
import time

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import torch
from hub_server import HubServer, Repo
from small_model import small_model

from fastsam_rwkv import RWKVSAM, HubError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = HubServer()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (huggingface_hub.constants, huggingface_hub.file_download):  # the latter until 0.36
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)  # the client waits a second before each retry
    # nothing of the developer's own settings may reach the tests
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.stop()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def saved(folder, fill):
    """Save a model whose IoU token is `fill`, to tell versions apart."""
    model = small_model()
    torch.nn.init.constant_(model.mask_decoder.iou_token, fill)
    model.save_pretrained(folder)
    return folder


def version(model):
    return model.mask_decoder.iou_token[0, 0].item()


@pytest.fixture
def repo(hub, tmp_path):
    repo = Repo()
    repo.old = repo.commit(saved(tmp_path / "old", 1.0), "v1")
    repo.new = repo.commit(saved(tmp_path / "new", 2.0), "main")
    hub.repos["org/model"] = repo
    return repo


def test_a_model_loads_by_id_branch_tag_and_commit(repo, cache):
    assert version(RWKVSAM.from_pretrained("org/model", cache_dir=cache)) == 2.0
    assert version(RWKVSAM.from_pretrained("org/model", revision="v1", cache_dir=cache)) == 1.0
    assert version(RWKVSAM.from_pretrained("org/model", revision=repo.old, cache_dir=cache)) == 1.0
    repo.names["fix/edges"] = repo.old
    assert version(RWKVSAM.from_pretrained("org/model", revision="fix/edges", cache_dir=cache)) == 1.0


def test_a_local_folder_takes_precedence_over_the_hub(hub, repo, tmp_path, monkeypatch):
    saved(tmp_path / "org" / "model", 5.0)
    monkeypatch.chdir(tmp_path)
    assert version(RWKVSAM.from_pretrained("org/model")) == 5.0
    assert hub.requests == []


def test_config_and_weights_come_from_one_commit(hub, repo, cache):
    """Move the branch between the two requests."""

    def move(method, path):
        if method == "GET" and path.endswith("config.json"):
            repo.names["main"] = repo.old

    hub.on_request = move
    assert version(RWKVSAM.from_pretrained("org/model", cache_dir=cache)) == 2.0


def test_a_cached_model_loads_offline(hub, repo, cache):
    RWKVSAM.from_pretrained("org/model", cache_dir=cache)
    hub.requests.clear()
    assert version(RWKVSAM.from_pretrained("org/model", cache_dir=cache, local_files_only=True)) == 2.0
    assert hub.requests == []
    hub.stop()
    assert version(RWKVSAM.from_pretrained("org/model", cache_dir=cache)) == 2.0  # unreachable, but cached
    assert hub.requests == []
    with pytest.raises(HubError, match="not in the cache.*local_files_only"):
        RWKVSAM.from_pretrained("org/other", cache_dir=cache, local_files_only=True)


def test_a_failed_download_is_an_error_and_a_later_one_succeeds(hub, repo, cache):
    hub.breaks, hub.break_after = 1000, 5000
    with pytest.raises(HubError, match="model.safetensors of 'org/model'.*[Tt]ry again"):
        RWKVSAM.from_pretrained("org/model", cache_dir=cache)
    with pytest.raises(HubError, match="not in the cache"):  # no half file passes for a whole one
        RWKVSAM.from_pretrained("org/model", cache_dir=cache, local_files_only=True)
    hub.breaks = 0
    RWKVSAM.from_pretrained("org/model", cache_dir=cache)
    files = repo.commits[repo.new]
    snapshot = next(cache.glob("models--org--model/snapshots/*"))
    assert all((snapshot / name).read_bytes() == files[name] for name in ("config.json", "model.safetensors"))


def test_a_private_model_needs_its_token(hub, repo, cache):
    repo.token = "hf_secret"
    with pytest.raises(HubError, match="cannot download config.json of 'org/model': .*private"):
        RWKVSAM.from_pretrained("org/model", cache_dir=cache)
    assert version(RWKVSAM.from_pretrained("org/model", cache_dir=cache, token="hf_secret")) == 2.0


def test_invalid_tokens_are_refused(hub, repo, cache):
    repo.token = "hf_secret"
    with pytest.raises(HubError, match="config.json of 'org/model'.*(Invalid credentials|401 Client Error)"):
        RWKVSAM.from_pretrained("org/model", cache_dir=cache, token="hf_wrong")
    with pytest.raises(HubError, match="Token is required"):
        RWKVSAM.from_pretrained("org/model", cache_dir=cache, token=True)
    repo.gated = True
    with pytest.raises(HubError, match="cannot download config.json of 'org/model': .*gated"):
        RWKVSAM.from_pretrained("org/model", cache_dir=cache, token="hf_secret")


def test_a_missing_model_revision_or_file_is_named(hub, repo, cache, tmp_path):
    with pytest.raises(HubError, match="cannot download config.json of 'org/nothing': .*Repository Not Found"):
        RWKVSAM.from_pretrained("org/nothing", cache_dir=cache)
    with pytest.raises(HubError, match="'org/model' at revision 'v9': .*Revision Not Found"):
        RWKVSAM.from_pretrained("org/model", revision="v9", cache_dir=cache)
    (saved(tmp_path / "half", 0.0) / "model.safetensors").unlink()
    hub.repos["org/half"] = Repo()
    hub.repos["org/half"].commit(tmp_path / "half")
    with pytest.raises(HubError, match="'org/half' has no model.safetensors"):
        RWKVSAM.from_pretrained("org/half", cache_dir=cache)


def test_a_server_error_is_reported(hub, repo, cache):
    hub.status = 503
    with pytest.raises(HubError, match="config.json of 'org/model' is not in the cache.*503.*try again"):
        RWKVSAM.from_pretrained("org/model", cache_dir=cache)
    hub.status = None
    RWKVSAM.from_pretrained("org/model", cache_dir=cache)
    hub.status = 503
    assert version(RWKVSAM.from_pretrained("org/model", cache_dir=cache)) == 2.0  # from the cache


def test_an_unreachable_hub_is_named(hub, cache):
    hub.stop()
    with pytest.raises(HubError, match=f"the Hub at {hub.url} did not send it.*Check the connection"):
        RWKVSAM.from_pretrained("org/model", cache_dir=cache)


def test_an_unwritable_cache_is_named(repo, tmp_path):
    # below a regular file nobody can make a folder, not even root, whom permission bits do not stop
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="cannot download config.json of 'org/model': .*file/cache"):
        RWKVSAM.from_pretrained("org/model", cache_dir=tmp_path / "file" / "cache")


def test_a_full_disk_is_reported(repo, cache):
    """Simulate a full disk by a limit on the file size, which gives a real error of write()."""
    resource = pytest.importorskip("resource", reason="Windows cannot limit the size of files")
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(HubError, match="cannot download model.safetensors of 'org/model': .*too large"):
            RWKVSAM.from_pretrained("org/model", cache_dir=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert version(RWKVSAM.from_pretrained("org/model", cache_dir=cache)) == 2.0


def test_environment_variables_reach_the_client(tmp_path):
    """Set HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE in separate processes."""
    server = HubServer()
    server.repos["org/model"] = Repo()
    server.repos["org/model"].commit(saved(tmp_path / "model", 3.0))
    code = (
        "from fastsam_rwkv import RWKVSAM; print(RWKVSAM.from_pretrained('org/model').config.image_size, flush=True); "
        "RWKVSAM.from_pretrained('org/another')"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env = {**own, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}

    def run(**extra):
        return subprocess.run(
            [sys.executable, "-c", code], env={**env, **extra}, capture_output=True, text=True, timeout=120
        )

    online = run()
    assert online.stdout.strip() == "128" and "HubError" in online.stderr and "HF_HUB_OFFLINE" not in online.stderr
    server.stop()
    offline = run(HF_HUB_OFFLINE="1")
    assert offline.stdout.strip() == "128" and "HubError" in offline.stderr and "HF_HUB_OFFLINE" in offline.stderr
    assert (tmp_path / "home" / "hub").is_dir()
