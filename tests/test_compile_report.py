import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastsam_rwkv.triton_kernels._triton import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot be compiled")

SCRIPT = """
import json, sys, torch
from benchmarks import compile_report
from fastsam_rwkv.triton_kernels import tuning

kernels = compile_report.report([90], (torch.float16,), only=("attention",))
few = {"attention": tuning.shipped_settings()["default"]["attention"] | {"maxnreg": 96}}
compile_report.shipped_settings = lambda: {"too few registers": few}
spilled = compile_report.report([90], (torch.float16,), only=("attention",))
print(json.dumps([[k._asdict() | {"problems": k.problems} for k in found] for found in (kernels, spilled)]))
"""


def test_kernels_compile_for_a_gpu_that_is_not_there():
    """In a process of its own: this one interprets kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kernels, spilled = json.loads(done.stdout)
    assert {k["name"] for k in kernels} == {"attention_kernel", "combine_kernel"}
    main = [k for k in kernels if k["name"] == "attention_kernel"]
    variants = {("HAS_SEEN=True" in k["constants"], "SPLITS=1 " in k["constants"]) for k in main}
    assert variants == {(True, True), (False, True), (False, False)}
    for k in kernels:
        assert not k["problems"] and 16 <= k["registers"] <= 255 and k["counts"]["other loads"] > 0
    for k in main:
        assert k["counts"]["tensor core"] > 0 and k["counts"]["barriers"] > 0
        assert 0 < k["counts"]["longest loop"] < k["counts"]["instructions"]
    assert any("spilled" in problem for k in spilled for problem in k["problems"])


def test_every_way_through_the_scan_is_compiled(monkeypatch):
    """With and without a gate; tiles that come out even and that do not."""
    import torch

    from benchmarks import compile_report
    from fastsam_rwkv.triton_kernels.tuning import shipped_settings

    settings = shipped_settings()["default"]["bi_wkv"]
    seen = set()

    def record(w, u, k, v, r, scale):
        seen.add((r is not None, k.shape[1] % (settings["SEGMENTS"] * settings["LENGTH"]) == 0))

    monkeypatch.setattr(compile_report, "bi_wkv_triton", record)
    compile_report.operators()["bi_wkv"](torch.float16)
    assert seen == {(True, True), (True, False), (False, True)}


def test_shared_memory_beyond_the_limit_is_a_problem():
    from benchmarks.compile_report import Kernel

    kernel = Kernel("k", "", 120, "float16", "default", 4, 32, 0, 100 << 10, {})
    assert kernel.problems == ["102400 bytes of shared memory, 101376 at most"]
    assert not kernel._replace(arch=90).problems


def test_more_registers_than_a_multiprocessor_has_are_a_problem():
    """16 warps of 128 registers are all there are; 129 come as 136."""
    from benchmarks.compile_report import Kernel

    kernel = Kernel("k", "", 90, "float16", "default", 16, 128, 0, 0, {})
    assert not kernel.problems
    assert kernel._replace(registers=129).problems == ["69632 registers for a block, 65536 at most"]


def test_instructions_are_counted():
    from benchmarks.compile_report import lengths

    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00000a0000017a02 */
        /*0010*/              @!P0 BRA 0x60 ;
        /*0020*/                   FFMA R0, R1, R2, R3 ;
        /*0030*/                   BRA 0x50 ;
        /*0040*/                   FADD R0, R1, R2 ;
        /*0050*/               @P1 BRA 0x20 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70 ;
        /*0080*/                   NOP ;
    """
    assert lengths(text) == {"instructions": 8, "longest loop": 4}


def test_no_operator_is_left_out():
    from benchmarks.compile_report import operators
    from benchmarks.operator_calls import LAUNCHERS, REFERENCES
    from fastsam_rwkv import triton_kernels

    files = {file.stem for file in Path(triton_kernels.__file__).parent.glob("[!_]*.py")}
    assert set(operators()) == set(REFERENCES) == set(LAUNCHERS) == files - {"tuning"}


SMALLEST = """
import torch
from benchmarks.compile_report import compiling_for
from benchmarks.operator_calls import LAUNCHERS

def empty(*shape):
    return torch.empty(shape, dtype=torch.float16, device="meta")

two, three = empty(2), empty(3)
calls = [
    ("bi_wkv", (empty(1), empty(1), *[empty(1, 1, 1)] * 3, 1.0)),
    ("norm_shift_mix", (empty(1, 1, 1, 3), three, three, empty(1, 3), 1e-6)),
    ("mbconv", (empty(1, 1, 1, 2), two, two, empty(8, 2), empty(8), empty(8, 1, 3, 3), empty(8), empty(2, 8), two,
                None, None, 1, 1e-6)),
    ("fused_linear", (empty(1, 1), empty(1, 1), True)),
    ("conv_norm", (empty(1, 1, 1, 1), empty(1, 1, 3, 3), empty(1), empty(1), empty(1), empty(1, 1, 1, 1), empty(1),
                   empty(1), empty(1, 1, 1, 1), 1, True, 1e-6)),
    ("stem", (empty(1, 1, 1, 3), (0.0,) * 3, (1.0,) * 3, empty(2, 3, 3, 3), two, two, two, empty(2, 2, 3, 3), two,
              2, 2, 1e-6)),
    ("upscale", (empty(1, 1, 1, 1), empty(4, 1), empty(1), None, None, 1e-6)),
    ("attention", (*[empty(1, 1, 1)] * 3, torch.empty(1, 1, dtype=torch.bool, device="meta"), 1)),
]
assert {name for name, _ in calls} == set(LAUNCHERS)
with compiling_for(90) as kernels:
    for name, args in calls:
        LAUNCHERS[name](*args)
print(len(kernels))
"""


def test_sizes_of_one_compile():
    """Triton makes a constant of an integer argument that is 1, on which tensors' methods are missing."""
    assert compile_and_print(SMALLEST) == ["12"]


def compile_and_print(script):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


MORE_TOKENS = """
import torch
from benchmarks.compile_report import compiling_for
from fastsam_rwkv.triton_kernels.conv_norm import conv_norm_triton

def empty(*shape):
    return torch.empty(shape, dtype=torch.float16, device="meta")

width, weight = empty(256), empty(256, 128, 1, 1)
with compiling_for(90) as kernels:
    for prompts, tokens in ((1, 7), (1, 8), (2, 13), (3, 16), (16, 21)):
        x, add = empty(prompts, tokens, 1, 128), empty(prompts, tokens, 1, 256)
        conv_norm_triton(x, weight, width, None, None, add, width, width, None, 1, False, 1e-5)
print(len(kernels), len({kernel.hash for _, kernel in kernels}))
"""


def test_more_tokens_compile_nothing():
    assert compile_and_print(MORE_TOKENS) == ["5", "1"]


CACHED = """
import torch
from benchmarks.compile_report import compiling_for
from fastsam_rwkv.triton_kernels.conv_norm import conv_norm_triton
from fastsam_rwkv.triton_kernels.tuning import override, shipped_settings

x, weight = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in ((1, 64, 64, 64), (64, 64, 3, 3)))
for cached in (0, 1):
    with override({"conv_norm": shipped_settings()["default"]["conv_norm"] | {"CACHED": cached}}):
        with compiling_for(90) as kernels:
            conv_norm_triton(x, weight, x[0, 0, 0], *[None] * 6, 1, False, 1e-6)
    print("cp.async.ca" in kernels[0][1].asm["ptx"])
"""


def test_copies_of_a_convolution_go_by_way_of_the_cache_where_that_is_set():
    assert compile_and_print(CACHED) == ["False", "True"]


OF_ONE_DEVICE = """
import torch
from benchmarks import compile_report

compile_report.shipped_settings = lambda: {"tuned_some_gpu": {"device": {"architecture": 90}}}
print(*(len(compile_report.report([arch], (torch.float16,), only=("upscale",))) > 0 for arch in (80, 90)))
"""


def test_settings_of_one_device_are_held_to_its_architecture():
    assert compile_and_print(OF_ONE_DEVICE) == ["False", "True"]
