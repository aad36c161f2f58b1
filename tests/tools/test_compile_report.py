"""The compile report. Kernels compile in another process, because this one interprets them."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest
import torch

from fastsam_rwkv.triton_kernels.launch_config import LaunchConfig, default_settings
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("Triton is not installed: kernels cannot be compiled", allow_module_level=True)

from benchmarks.kernels import compile_report
from benchmarks.kernels.compile_report import Kernel, calls, lengths
from benchmarks.kernels.operator_calls import LAUNCHERS


def test_recorded_calls_cover_every_operator_and_form_of_the_scan():
    found = calls(torch.float16)
    assert {name for name, _ in found} == set(LAUNCHERS)
    scans = [args for name, args in found if name == "bi_wkv"]
    forms = {(r is not None, k.shape[1] % 128 == 0) for _, _, k, _, r, *_ in scans}
    assert forms == {(True, True), (True, False), (False, True)}
    assert {k.shape[2] for _, _, k, *_ in scans} == {192, 384, 1024} and max(
        k.shape[1] for _, _, k, *_ in scans
    ) == 1 << 14


def test_kernel_beyond_the_limits_is_a_problem():
    """16 warps of 128 registers are the limit; 129 registers are allocated as 136."""
    kernel = Kernel("k", "", 90, "float16", "default", 16, 128, 0, 100 << 10, {})
    assert not kernel.problems
    assert kernel._replace(arch=120).problems == ["102400 bytes of shared memory, 101376 at most"]
    assert kernel._replace(registers=129).problems == ["69632 registers for a block, 65536 at most"]


def test_instructions_are_counted():
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


def empty(*shape):
    return torch.empty(shape, dtype=torch.float16, device="meta")


def compiled(launches):
    """Compile (operator, arguments, settings) for sm_90."""
    with compile_report.compiling_for(90) as kernels:
        for name, args, settings in launches:
            LAUNCHERS[name](*args, config=LaunchConfig(default_settings() | settings, 90))
    return [kernel for _, kernel in kernels]


def attention_spills():
    """Return the report of attention, and the problems with too few registers."""
    launches = [(name, args) for name, args in calls(torch.float16) if name == "attention"]
    kernels = compile_report.report(90, torch.float16, launches)
    few = {"attention": default_settings()["attention"] | {"maxnreg": 96}}
    with mock.patch.object(compile_report, "shipped_settings", lambda: {"too few registers": few}):
        return kernels, [kernel.problems for kernel in compile_report.report(90, torch.float16, launches)]


def sizes_of_one():
    """Triton makes constants of integers that are 1, which lack the methods of tensors."""
    two, three, map_ = empty(2), empty(3), empty(1, 1, 1, 1)

    def integers(*shape):
        return torch.empty(shape, dtype=torch.int32, device="meta")

    calls = {
        "bi_wkv": (empty(1), empty(1), *[empty(1, 1, 1)] * 3, 1.0),
        "norm_shift_mix": (empty(1, 1, 1, 3), three, three, empty(1, 3), 1e-6),
        "mbconv": (empty(1, 1, 1, 2), two, two, empty(8, 2), empty(8), empty(8, 1, 3, 3), empty(8), empty(2, 8), two,
                   None, None, 1, 1e-6),
        "fused_linear": (empty(1, 1), empty(1, 1), None, empty(1), empty(1, 1)),
        "gated_key": (empty(2, 1, 1), empty(1, 1), empty(1, 1)),
        "conv_norm": (map_, empty(1, 1, 3, 3), *[empty(1)] * 3, map_, empty(1), empty(1), 1, True, 1e-6),
        "stem": (empty(1, 1, 1, 3), (0.0,) * 3, (1.0,) * 3, empty(2, 3, 3, 3), two, two, two, empty(2, 2, 3, 3), two, 2,
                 2, 1e-6),
        "upscale": (map_, empty(4, 1), empty(1), None, None, 1e-6),
        "mask_edges": (empty(1, 3, 3), *[integers(1), empty(1, 3)] * 2, integers(1, 1), 1),
        "linears": (empty(1, 1, 1), None, 0, False, empty(1, 1), empty(1)),
        "mask_product": (empty(1, 1, 1), map_, map_, empty(1, 1, 3, 3), empty(1)),
        "prompt_tokens": (empty(1, 1, 2), integers(1, 1), empty(2, 1), empty(4, 2), two, *[empty(1, 2)] * 2, 2, 2),
        "attention": (*[empty(1, 1, 1)] * 3, torch.empty(1, 1, dtype=torch.bool, device="meta"), 1),
    }  # fmt: skip
    assert set(calls) == set(LAUNCHERS)
    return len(compiled([(name, args, {}) for name, args in calls.items()]))


def more_tokens():
    """Count launches, and kernels."""
    width, weight, nothing = empty(256), empty(256, 128, 1, 1), [None] * 2
    kernels = compiled([
        ("conv_norm", (empty(prompts, tokens, 1, 128), weight, width, *nothing, empty(prompts, tokens, 1, 256), width,
                       width, 1, False, 1e-5), {})
        for prompts, tokens in ((1, 7), (1, 8), (2, 13), (3, 16), (16, 21))
    ])  # fmt: skip
    return len(kernels), len({kernel.hash for kernel in kernels})


def cached_copies():
    args = (empty(1, 64, 64, 64), empty(64, 64, 3, 3), empty(64), *[None] * 5, 1, False, 1e-6)
    settings = default_settings()["conv_norm"]
    kernels = compiled([("conv_norm", args, {"conv_norm": settings | {"CACHED": cached}}) for cached in (0, 1)])
    return ["cp.async.ca" in kernel.asm["ptx"] for kernel in kernels]


def settings_of_a_device():
    """Count the kernels for two architectures under settings for one of them."""
    shipped = {"tuned_some_gpu": {"device": {"architecture": 90}}}
    launches = [("upscale", (empty(1, 8, 8, 64), empty(256, 64), empty(64), None, None, 1e-6))]
    with mock.patch.object(compile_report, "shipped_settings", lambda: shipped):
        return [len(compile_report.report(arch, torch.float16, launches)) for arch in (80, 90)]


@pytest.fixture(scope="module")
def process():
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield pool


def test_kernels_compile_without_a_gpu(process):
    kernels, with_few_registers = process.submit(attention_spills).result()
    assert {k.name for k in kernels} == {"attention_kernel", "combine_kernel"}
    main = [k for k in kernels if k.name == "attention_kernel"]
    variants = {("HAS_SEEN=True" in k.constants, "SPLITS=1 " in k.constants) for k in main}
    assert variants == {(True, True), (False, True), (False, False)}
    for k in kernels:
        assert not k.problems and 16 <= k.registers <= 255
        assert k.counts["other loads"] + k.counts["16-byte loads"] > 0
    for k in main:
        assert k.counts["tensor core"] > 0 and k.counts["barriers"] > 0
        assert 0 < k.counts["longest loop"] < k.counts["instructions"]
    assert any("spilled" in problem for problems in with_few_registers for problem in problems)


@pytest.mark.parametrize(
    ("function", "expected"),
    [(sizes_of_one, 17), (more_tokens, (5, 1)), (cached_copies, [False, True]), (settings_of_a_device, [0, 1])],
)
def test_compiled(function, expected, process):
    assert process.submit(function).result() == expected
