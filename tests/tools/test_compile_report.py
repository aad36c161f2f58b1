import json
import os
import subprocess
import sys

import pytest
import torch

from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot be compiled")


def test_recorded_calls_cover_every_operator_and_form_of_the_scan():
    from benchmarks.kernels.compile_report import calls
    from benchmarks.kernels.operator_calls import OPERATORS

    found = calls(torch.float16)
    assert {name for name, _ in found} == set(OPERATORS)
    scans = [args for name, args in found if name == "bi_wkv"]
    assert {(r is not None, k.shape[1] % 128 == 0) for _, _, k, _, r, _ in scans} == {
        (True, True),
        (True, False),
        (False, True),
    }
    assert {k.shape[2] for _, _, k, *_ in scans} == {192, 384, 1024} and max(
        k.shape[1] for _, _, k, *_ in scans
    ) == 16384


def test_shared_memory_beyond_the_limit_is_a_problem():
    from benchmarks.kernels.compile_report import Kernel

    kernel = Kernel("k", "", 120, "float16", "default", 4, 32, 0, 100 << 10, {})
    assert kernel.problems == ["102400 bytes of shared memory, 101376 at most"]
    assert not kernel._replace(arch=90).problems


def test_registers_beyond_the_limit_are_a_problem():
    """16 warps of 128 registers are the limit; 129 registers are allocated as 136."""
    from benchmarks.kernels.compile_report import Kernel

    kernel = Kernel("k", "", 90, "float16", "default", 16, 128, 0, 0, {})
    assert not kernel.problems
    assert kernel._replace(registers=129).problems == ["69632 registers for a block, 65536 at most"]


def test_instructions_are_counted():
    from benchmarks.kernels.compile_report import lengths

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


SCRIPTS = {
    "attention": """
few = {"attention": default_settings()["attention"] | {"maxnreg": 96}}
kernels = compile_report.report([90], (torch.float16,), only=("attention",))
with patch.object(compile_report, "shipped_settings", lambda: {"too few registers": few}):
    spilled = compile_report.report([90], (torch.float16,), only=("attention",))
result = [[k._asdict() | {"problems": k.problems} for k in found] for found in (kernels, spilled)]
""",
    "sizes of one": """
two, three, map_ = empty(2), empty(3), empty(1, 1, 1, 1)
calls = {
    "bi_wkv": (empty(1), empty(1), *[empty(1, 1, 1)] * 3, 1.0),
    "norm_shift_mix": (empty(1, 1, 1, 3), three, three, empty(1, 3), 1e-6),
    "mbconv": (empty(1, 1, 1, 2), two, two, empty(8, 2), empty(8), empty(8, 1, 3, 3), empty(8), empty(2, 8), two, None,
               None, 1, 1e-6),
    "fused_linear": (empty(1, 1), empty(1, 1), True),
    "conv_norm": (map_, empty(1, 1, 3, 3), *[empty(1)] * 3, map_, empty(1), empty(1), map_, 1, True, 1e-6),
    "stem": (empty(1, 1, 1, 3), (0.0,) * 3, (1.0,) * 3, empty(2, 3, 3, 3), two, two, two, empty(2, 2, 3, 3), two, 2, 2,
             1e-6),
    "upscale": (map_, empty(4, 1), empty(1), None, None, 1e-6),
    "attention": (*[empty(1, 1, 1)] * 3, torch.empty(1, 1, dtype=torch.bool, device="meta"), 1),
}
assert set(calls) == set(LAUNCHERS)
result = len(compiled([(name, args, {}) for name, args in calls.items()]))
""",
    "more tokens": """
width, weight = empty(256), empty(256, 128, 1, 1)
kernels = compiled([
    ("conv_norm", (empty(prompts, tokens, 1, 128), weight, width, None, None, empty(prompts, tokens, 1, 256), width,
                   width, None, 1, False, 1e-5), {})
    for prompts, tokens in ((1, 7), (1, 8), (2, 13), (3, 16), (16, 21))
])
result = len(kernels), len({kernel.hash for kernel in kernels})
""",
    "cached": """
x, weight = empty(1, 64, 64, 64), empty(64, 64, 3, 3)
args = (x, weight, x[0, 0, 0], *[None] * 6, 1, False, 1e-6)
settings = default_settings()["conv_norm"]
kernels = compiled([("conv_norm", args, {"conv_norm": settings | {"CACHED": cached}}) for cached in (0, 1)])
result = ["cp.async.ca" in kernel.asm["ptx"] for kernel in kernels]
""",
    "same PTX": """
def ptx(arch):
    (kernel,) = compiled([UPSCALE], arch)
    return kernel.asm["ptx"].replace(f".target sm_{arch}", ".target")

pairs = [*compile_report.SAME_PTX.items(), (80, 90)]
with patch.object(compile_report, "calls", lambda dtype, only: [UPSCALE[:2]]):
    archs = [kernel.arch for kernel in compile_report.report([86, 89], (torch.float16,))]
result = [ptx(a) == ptx(b) for a, b in pairs] + archs
""",
    "one device": """
shipped = {"tuned_some_gpu": {"device": {"architecture": 90}}}
with patch.multiple(compile_report, shipped_settings=lambda: shipped, calls=lambda dtype, only: [UPSCALE[:2]]):
    result = [len(compile_report.report([arch], (torch.float16,))) for arch in (80, 90)]
""",
}
RUN = """
import json, sys, traceback
from unittest.mock import patch

import torch
from benchmarks.kernels import compile_report
from benchmarks.kernels.operator_calls import LAUNCHERS
from fastsam_rwkv.triton_kernels.launch_config import LaunchConfig, default_settings

def empty(*shape):
    return torch.empty(shape, dtype=torch.float16, device="meta")

UPSCALE = ("upscale", (empty(1, 8, 8, 64), empty(256, 64), empty(64), None, None, 1e-6), {})

def compiled(calls, arch=90):
    with compile_report.compiling_for(arch) as kernels:
        for name, args, settings in calls:
            LAUNCHERS[name](*args, config=LaunchConfig(default_settings() | settings, arch))
    return [kernel for _, kernel in kernels]

results = {}
for name, script in json.load(sys.stdin).items():
    names = dict(globals())
    try:
        exec(script, names)
        results[name] = names["result"]
    except Exception:  # only the test of this script fails
        results[name] = traceback.format_exc()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results():
    """Results of the scripts from one other process, because this one interprets kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(SCRIPTS), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernels_compile_without_a_gpu(results):
    kernels, spilled = results["attention"]
    assert {k["name"] for k in kernels} == {"attention_kernel", "combine_kernel"}
    main = [k for k in kernels if k["name"] == "attention_kernel"]
    variants = {("HAS_SEEN=True" in k["constants"], "SPLITS=1 " in k["constants"]) for k in main}
    assert variants == {(True, True), (False, True), (False, False)}
    for k in kernels:
        assert not k["problems"] and 16 <= k["registers"] <= 255
        assert k["counts"]["other loads"] + k["counts"]["16-byte loads"] > 0
    for k in main:
        assert k["counts"]["tensor core"] > 0 and k["counts"]["barriers"] > 0
        assert 0 < k["counts"]["longest loop"] < k["counts"]["instructions"]
    assert any("spilled" in problem for k in spilled for problem in k["problems"])


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("sizes of one", 12),  # Triton makes constants of integers that are 1, which lack the methods of tensors
        ("more tokens", [5, 1]),  # launches, and kernels
        ("cached", [False, True]),  # copies through L1
        ("same PTX", [True, False, 86, 89]),
        ("one device", [0, 1]),  # a device's settings serve its architecture only
    ],
)
def test_compiled(script, expected, results):
    assert results[script] == expected
