import io
import json
import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import published_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from small_model import CONFIG, small_model

from fastsam_rwkv import RWKVSAM, ModelConfig, Predictor
from fastsam_rwkv.cli import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    small_model().save_pretrained(folder / "model")
    y, x = np.mgrid[:80, :120]
    Image.fromarray(np.stack([x * 2, y * 3, x + y], -1).astype(np.uint8)).save(folder / "photo.jpg")
    return folder


def predict(files, *arguments):
    return main(["predict", str(files / "photo.jpg"), "--model", str(files / "model"), *arguments])


def test_predict_prints_a_line_a_mask_and_nothing_else(files, capsys):
    assert predict(files, "--point", "60,40", "--point", "10,10,0", "--multimask") == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["mask"] for row in rows] == [0, 1, 2]
    assert all(set(row) == {"mask", "score", "area", "box"} for row in rows)
    assert err == ""  # progress is for terminals


def test_masks_and_overlay_are_what_was_printed(files, capsys, tmp_path):
    mask, overlay = tmp_path / "mask.png", tmp_path / "overlay.png"
    assert predict(files, "--box", "10,10,90,70", "--mask", str(mask), "--overlay", str(overlay)) == 0
    row = json.loads(capsys.readouterr().out)
    values = np.asarray(Image.open(mask))
    assert values.shape == (80, 120) and set(np.unique(values)) <= {0, 255}
    assert (values == 255).sum() == row["area"]
    if row["area"]:
        rows, columns = np.nonzero(values)
        assert row["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert Image.open(overlay).size == (120, 80)


def test_the_home_folder_in_options(files, tmp_path, monkeypatch):
    """Shells do not expand it after an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert predict(files, "--box", "10,10,90,70", "--mask=~/mask.png", "--overlay=~/overlay.png") == 0
    assert Image.open(tmp_path / "mask.png").size == Image.open(tmp_path / "overlay.png").size == (120, 80)


def test_max_pixels(files, capsys, tmp_path, monkeypatch):
    """The message names the option, and the option sets the limit to the pixel."""
    default = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80 * 120 / 2 - 1)
    assert predict(files, "--point", "60,40") == 1
    out, err = capsys.readouterr()
    assert out == "" and "9600 pixels" in err and "--max-pixels" in err and "MAX_IMAGE_PIXELS" not in err
    assert predict(files, "--point", "60,40", "--max-pixels", "9600") == 0
    assert Image.MAX_IMAGE_PIXELS == 80 * 120 / 2 - 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", default)
    assert predict(files, "--point", "60,40", "--max-pixels", "9599") == 1
    assert "exceeds limit of 9599 pixels" in capsys.readouterr().err
    for wrong in ("0", "-1", "1.5", "many"):
        with pytest.raises(SystemExit):
            predict(files, "--point", "60,40", f"--max-pixels={wrong}")
        assert f"'{wrong}' is not a positive integer" in capsys.readouterr().err


def test_value_range(files, capsys, tmp_path):
    dark = tmp_path / "dark.png"
    Image.fromarray(np.tile(np.arange(256, dtype=np.uint16), (64, 1))).save(dark)
    command = ["predict", str(dark), "--model", str(files / "model"), "--point", "60,40"]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "largest value 255" in err and "--value-range auto" in err and "load_image" not in err
    for value_range in ("auto", "full"):
        assert main([*command, "--value-range", value_range]) == 0


def test_errors_of_the_command_have_no_python_remedy(tmp_path, capsys):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "wide.tiff")
    for name in ("float.tiff", "wide.tiff"):
        assert main(["predict", str(tmp_path / name), "--point", "1,2"]) == 1
        err = capsys.readouterr().err
        assert "--value-range auto" in err and not {"np.", "load_image", "value_range="} & set(err.split())


def mode(file):
    return stat.S_IMODE(file.stat().st_mode)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
def test_output_files_are_written_whole(files, tmp_path, monkeypatch, capsys):
    mask, overlay, target = tmp_path / "mask.png", tmp_path / "overlay.png", tmp_path / "target.png"
    mask.write_bytes(b"old")
    mask.chmod(0o640)
    overlay.symlink_to(target)
    arguments = ["--point", "60,40", "--mask", str(mask), "--overlay", str(overlay)]
    save = Image.Image.save

    def cut(image, stream, *args, **kwargs):
        stream.write(b"half of it")
        stream.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", cut)
    assert predict(files, *arguments) == 130
    assert mask.read_bytes() == b"old" and {p.name for p in tmp_path.iterdir()} == {"mask.png", "overlay.png"}
    monkeypatch.setattr(Image.Image, "save", save)
    before = os.umask(0o022)
    try:
        assert predict(files, *arguments) == 0
    finally:
        os.umask(before)
    assert mode(mask) == 0o640 and mode(target) == 0o644 and overlay.is_symlink()
    assert Image.open(mask).size == Image.open(target).size == (120, 80)


KILLED = """
import os, signal, sys
from PIL import Image
from fastsam_rwkv.cli import main
def killed(image, stream, *args):
    stream.write(b"half of it")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
Image.Image.save = killed
main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_rerun_sweeps_what_a_killed_run_left(files, tmp_path):
    arguments = ["predict", str(files / "photo.jpg"), "--model", str(files / "model"), "--point", "60,40"]
    arguments += ["--mask", str(tmp_path / "mask.png")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name != "mask.png"
    assert main(arguments) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"mask.png"}


@pytest.mark.skipif(sys.platform == "win32", reason="symlinks need a privilege on Windows")
def test_paths_that_cannot_be_used(files, capsys, tmp_path):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "fifo.png")
    long = "x" * 100_000
    for image in (tmp_path / "loop.png", tmp_path / "fifo.png", "/dev/zero", "a\0b", "\ud800", long, tmp_path):
        assert main(["predict", str(image), "--point", "1,2"]) == 1
        err = capsys.readouterr().err
        assert err.startswith("fastsam-rwkv: error: ") and err.count("\n") == 1 and len(err) < 530
    for name in (tmp_path / "loop.png", "a\0.png", "\ud800.png", long + ".png", f"{tmp_path}/{long}/a.png"):
        for option in ("--mask", "--overlay"):
            assert predict(files, "--point", "1,2", option, str(name)) in (1, 2)
            err = capsys.readouterr().err
            assert err.startswith("fastsam-rwkv: error: ") and err.count("\n") == 1 and len(err) < 530
    for arguments in (["--point", long], ["--box", long], ["--zoom", long], ["--max-pixels", long], ["--" + long]):
        with pytest.raises(SystemExit):
            predict(files, *arguments)
        assert len(capsys.readouterr().err.splitlines()[-1]) < 530


def test_several_boxes_are_a_prompt_each(files, capsys, tmp_path):
    assert predict(files, "--box", "10,10,90,70", "--box", "1,1,30,30", "--mask", str(tmp_path / "m.png")) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"m_0.png", "m_1.png"}


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "no prompt"),
        (["--point", "1,2", "--box", "1,2,3,4", "--box", "1,2,3,4"], 2, "one box, not with 2"),
        (["--point", "500,2"], 1, "500.0"),
        (["--point", "nan,2"], 1, "finite"),
        (["--box", "50,2,3,4"], 1, "x1 < x2"),
        (["--point", "1,2", "--mask", "out.tif"], 2, "end in .png"),
        (["--point", "1,2", "--overlay", "nowhere/out.png"], 2, "no folder 'nowhere'"),
        (["--point", "1,2", "--multimask", "--mask", "m.png", "--overlay", "m_1.png"], 2, "--overlay would overwrite"),
        (["--point", "1,2", "--device", "gpu"], 1, "unknown device 'gpu'"),
        (["--point", "1,2", "--device", "mps:9"], 1, "use --device cpu"),
        (["--point", "1,2", "--model", "./nothing"], 1, "no model at './nothing'"),
    ],
)
def test_user_errors_are_one_line(files, capsys, arguments, code, message):
    assert predict(files, *arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastsam-rwkv: error: ") and err.count("\n") == 1 and message in err


def test_input_images_and_folders_are_not_overwritten(files, capsys, tmp_path):
    image_file, folder = tmp_path / "photo.png", tmp_path / "folder.png"
    Image.new("RGB", (20, 10)).save(image_file)
    folder.mkdir()
    before = image_file.read_bytes()
    for target, message in ((image_file, "would overwrite the input image"), (folder, "is a folder")):
        for option in ("--mask", "--overlay"):
            arguments = ["predict", str(image_file), "--model", str(files / "model"), "--point", "1,2"]
            assert main([*arguments, option, str(target)]) == 2
            assert message in capsys.readouterr().err
    assert image_file.read_bytes() == before


def test_multimask_needs_a_multimask_model(tmp_path, capsys):
    small_model(replace(CONFIG, num_multimask_outputs=0)).save_pretrained(tmp_path / "single")
    Image.new("RGB", (20, 10)).save(tmp_path / "photo.png")
    arguments = ["predict", str(tmp_path / "photo.png"), "--model", str(tmp_path / "single"), "--point", "1,2"]
    assert main([*arguments, "--multimask"]) == 1
    assert "num_multimask_outputs=3" in capsys.readouterr().err


@pytest.mark.parametrize("bug", [ValueError, TypeError, RuntimeError])
def test_bugs_keep_their_traceback(files, monkeypatch, bug):
    def broken(*args, **kwargs):
        raise bug("ours")

    monkeypatch.setattr(Predictor, "predict_image", broken)
    with pytest.raises(bug, match="ours"):
        predict(files, "--point", "1,2")


def test_an_interrupt_exits_with_130(files, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "predict_image", interrupted)
    assert predict(files, "--point", "1,2") == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--point", "1"],
        ["--point", "1,2,-1"],
        ["--point", "1,2,3"],
        ["--point", "a,b"],
        ["--box", "1,2,3"],
        ["--box", "a,2,3,4"],
    ],
)
def test_wrong_arguments(files, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        predict(files, *arguments)
    assert stop.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_a_missing_image_is_named(files, capsys):
    assert main(["predict", "nothing.jpg", "--point", "1,2"]) == 1
    assert "no image file at 'nothing.jpg'" in capsys.readouterr().err


def test_convert_and_info(tmp_path, capsys):
    torch.save(published_weights("tiny"), tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "model"), "--image-size", "512"]) == 0
    assert "tiny, 1 mask outputs, 512 pixels" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "model"), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["variant"] == "tiny" and info["image_size"] == 512 and info["stored_dtype"] == "float32"
    assert info["parameters"] == sum(p.numel() for p in RWKVSAM(ModelConfig.from_name("tiny")).parameters())
    assert info["gmacs_per_prompt"] < 4.8 / 4  # a quarter of the pixels of 1024 x 1024
    assert info["kernels"].startswith("Triton kernels" if torch.cuda.is_available() else "plain PyTorch")
    assert main(["info", str(tmp_path / "model")]) == 0
    assert "parameters" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "model"), "--variant", "small"]) == 1
    assert "'small'" in capsys.readouterr().err
    whole = load_file(tmp_path / "model" / "model.safetensors")
    save_file(dict(list(whole.items())[:3]), tmp_path / "model" / "model.safetensors")
    assert main(["info", str(tmp_path / "model")]) == 1
    assert f"{len(whole) - 3} missing" in capsys.readouterr().err
    save_file(published_weights("tiny"), tmp_path / "model.safetensors")
    assert main(["convert", str(tmp_path / "model.safetensors"), str(tmp_path)]) == 1
    assert "would overwrite" in capsys.readouterr().err


def test_progress_shows_on_a_terminal_only(files, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert predict(files, "--point", "1,2") == 0
    assert "segmenting" in terminal.getvalue()


def test_files_are_written_into_a_closed_pipe_too(files, monkeypatch, tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return nobody.fileno()

    mask, overlay = tmp_path / "mask.png", tmp_path / "overlay.png"
    with (tmp_path / "nobody").open("w") as nobody:
        monkeypatch.setattr(sys, "stdout", Closed())
        assert predict(files, "--point", "1,2", "--mask", str(mask), "--overlay", str(overlay)) == 0
    assert Image.open(mask).size == Image.open(overlay).size == (120, 80)


def test_as_a_module_and_into_a_closed_pipe(files):
    command = [sys.executable, "-m", "fastsam_rwkv", "predict", str(files / "photo.jpg")]
    command += ["--model", str(files / "model"), "--point", "1,2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0
    version = subprocess.run([*command[:3], "--version"], capture_output=True, text=True)
    assert version.stdout.startswith("fastsam-rwkv 0.")
