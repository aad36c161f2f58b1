import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot be compiled")

ATTENTION = """
from fastsam_rwkv.triton_kernels import launch_config

kernels = compile_report.report([90], (torch.float16,), only=("attention",))
few = {"attention": launch_config.shipped_settings()["default"]["attention"] | {"maxnreg": 96}}
with patch.object(compile_report, "shipped_settings", lambda: {"too few registers": few}):
    spilled = compile_report.report([90], (torch.float16,), only=("attention",))
result = [[k._asdict() | {"problems": k.problems} for k in found] for found in (kernels, spilled)]
"""


def test_kernels_compile_for_a_gpu_that_is_not_there(compiled):
    kernels, spilled = compiled["ATTENTION"]
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

    from benchmarks.kernels import compile_report
    from fastsam_rwkv.triton_kernels.launch_config import shipped_settings

    settings = shipped_settings()["default"]["bi_wkv"]
    seen = set()

    def record(w, u, k, v, r, scale):
        seen.add((r is not None, k.shape[1] % (settings["SEGMENTS"] * settings["LENGTH"]) == 0))

    monkeypatch.setattr(compile_report, "bi_wkv_triton", record)
    compile_report.operators()["bi_wkv"](torch.float16)
    assert seen == {(True, True), (True, False), (False, True)}


def test_shared_memory_beyond_the_limit_is_a_problem():
    from benchmarks.kernels.compile_report import Kernel

    kernel = Kernel("k", "", 120, "float16", "default", 4, 32, 0, 100 << 10, {})
    assert kernel.problems == ["102400 bytes of shared memory, 101376 at most"]
    assert not kernel._replace(arch=90).problems


def test_more_registers_than_a_multiprocessor_has_are_a_problem():
    """16 warps of 128 registers are all there are; 129 come as 136."""
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


def test_no_operator_is_left_out():
    from benchmarks.kernels.compile_report import operators
    from benchmarks.kernels.operator_calls import LAUNCHERS, REFERENCES
    from fastsam_rwkv import triton_kernels

    files = {file.stem for file in Path(triton_kernels.__file__).parent.glob("[!_]*.py")}
    assert set(operators()) == set(REFERENCES) == set(LAUNCHERS) == files - {"tuning"}


SMALLEST = """
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
result = len(kernels)
"""


def test_sizes_of_one_compile(compiled):
    """Triton makes a constant of an integer argument that is 1, on which tensors' methods are missing."""
    assert compiled["SMALLEST"] == 12


MORE_TOKENS = """
width, weight = empty(256), empty(256, 128, 1, 1)
with compiling_for(90) as kernels:
    for prompts, tokens in ((1, 7), (1, 8), (2, 13), (3, 16), (16, 21)):
        x, add = empty(prompts, tokens, 1, 128), empty(prompts, tokens, 1, 256)
        LAUNCHERS["conv_norm"](x, weight, width, None, None, add, width, width, None, 1, False, 1e-5)
result = len(kernels), len({kernel.hash for _, kernel in kernels})
"""


def test_more_tokens_compile_nothing(compiled):
    assert compiled["MORE_TOKENS"] == [5, 1]


CACHED = """
from fastsam_rwkv.triton_kernels.launch_config import override, shipped_settings

x, weight = empty(1, 64, 64, 64), empty(64, 64, 3, 3)
result = []
for cached in (0, 1):
    with override({"conv_norm": shipped_settings()["default"]["conv_norm"] | {"CACHED": cached}}):
        with compiling_for(90) as kernels:
            LAUNCHERS["conv_norm"](x, weight, x[0, 0, 0], *[None] * 6, 1, False, 1e-6)
    result.append("cp.async.ca" in kernels[0][1].asm["ptx"])
"""


def test_copies_of_a_convolution_go_by_way_of_the_cache_where_that_is_set(compiled):
    assert compiled["CACHED"] == [False, True]


SAME_PTX = """
def operators():
    def upscale(dtype):
        LAUNCHERS["upscale"](empty(1, 8, 8, 64), empty(256, 64), empty(64), None, None, 1e-6)

    return {"upscale": upscale}

def ptx(arch):
    with compiling_for(arch) as kernels:
        for launch in operators().values():
            launch(torch.float16)
    return [kernel.asm["ptx"].replace(f".target sm_{arch}", ".target") for _, kernel in kernels]

result = [[ptx(a) == ptx(b) for a, b in pairs] for pairs in (compile_report.SAME_PTX.items(), [(80, 90)])]
with patch.object(compile_report, "operators", operators):
    with patch.object(compile_report, "assembled", wraps=compile_report.assembled) as assembled:
        short = compile_report.report([86, 89], (torch.float16,))
    result += [assembled.call_count, short[1:] == compile_report.report([89], (torch.float16,))]
"""


def test_what_is_compiled_for_one_architecture_and_assembled_for_another(compiled):
    assert compiled["SAME_PTX"] == [[True], [False], 1, True]


OF_ONE_DEVICE = """
def upscale(dtype):
    LAUNCHERS["upscale"](empty(1, 8, 8, 64), empty(256, 64), empty(64), None, None, 1e-6)

of_one_device = {"tuned_some_gpu": {"device": {"architecture": 90}}}
with patch.multiple(
    compile_report, shipped_settings=lambda: of_one_device, operators=lambda: {"upscale": upscale}
):
    result = [len(compile_report.report([arch], (torch.float16,))) for arch in (80, 90)]
"""


def test_settings_of_one_device_are_held_to_its_architecture(compiled):
    assert compiled["OF_ONE_DEVICE"] == [0, 1]


SCRIPTS = {
    "ATTENTION": ATTENTION,
    "SMALLEST": SMALLEST,
    "MORE_TOKENS": MORE_TOKENS,
    "CACHED": CACHED,
    "SAME_PTX": SAME_PTX,
    "OF_ONE_DEVICE": OF_ONE_DEVICE,
}
RUN = """
import json, sys, traceback
from unittest.mock import patch

import torch
from benchmarks.kernels import compile_report
from benchmarks.kernels.compile_report import compiling_for
from benchmarks.kernels.operator_calls import LAUNCHERS

def empty(*shape):
    return torch.empty(shape, dtype=torch.float16, device="meta")

results = {}
for name, script in json.load(sys.stdin).items():
    names = dict(globals())
    try:
        exec(script, names)
        results[name] = names["result"]
    except Exception:  # whatever it is, the test of that script is to fail with it, not every test
        results[name] = traceback.format_exc()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def compiled():
    """What each script leaves as its `result`, or its error: in one process, for this one interprets kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(SCRIPTS), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
