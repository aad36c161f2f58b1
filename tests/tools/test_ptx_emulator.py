"""The PTX emulator: its arithmetic, and the errors it finds in kernels."""

import numpy as np
import pytest
import torch

from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("Triton is not installed: there is no compiled kernel to emulate", allow_module_level=True)

from tests.ptx.emulator import EmulationError, emulated, run

REGISTERS = """
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd0, [k_param_0];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd1, %r0, 4;
    add.s64 %rd1, %rd0, %rd1;
    shl.b32 %r1, %r0, 2;
"""


def threads(body, n=1, blocks=1, size=None):
    """Run with [size] int32 at %rd0 and the thread's own at %rd1; %r0 is the thread index, %r1 four times that."""
    out = torch.full((n if size is None else size,), -1, dtype=torch.int32)
    ptx = f".visible .entry k(\n\t.param .u64 .ptr .global .align 1 k_param_0\n)\n.reqntid {n}\n{{{REGISTERS}{body}\n}}"
    run(ptx, [out], (blocks,), 1024)
    return out


def bits(x):
    return int(np.float32(x).view(np.int32))


@pytest.mark.parametrize(
    ("instruction", "want"),
    [
        ("div.s32 %r2, -7, 2;", -3),
        ("shr.s32 %r2, -8, 40;", -1),
        ("bfe.s32 %r2, 0xF0, 4, 4;", -1),
        ("prmt.b32 %r2, 0x33221100, 0x77665544, 0x5410U;", 0x55441100),
        ("mov.b32 %r3, 0x00020001; mov.b32 %r4, 0x0003FFFF; add.s16x2 %r2, %r3, %r4;", 0x00050000),
        ("mov.b64 %rd2, {0f3F800000, 0f40000000}; add.rn.f32x2 %rd2, %rd2, %rd2; mov.b64 {_, %r2}, %rd2;", bits(4)),
        ("mov.b16 %rs0, 0x3F80; add.rn.f32.bf16 %r2, %rs0, 0f3F800000;", bits(2)),
        ("cvt.u16.u32 %rs0, 0x1FFFE; cvt.s32.s8 %r2, %rs0;", -2),
        ("setp.lt.f32 %p0, 0f7FC00000, 0f00000000; selp.b32 %r2, 1, 2, %p0;", 2),
        ("setp.ltu.f32 %p0, 0f7FC00000, 0f00000000; selp.b32 %r2, 1, 2, %p0;", 1),
        ("max.NaN.f32 %r2, 0f7FC00000, 0f3F800000;", 0x7FC00000),
        ("mul.ftz.f32 %r2, 0f00800000, 0f3F000000;", 0),
        ("fma.rn.f32 %r2, 0f3F800001, 0f3F800001, 0fBF800000;", bits(2**-22 + 2**-46)),
        ("cvt.rn.bf16x2.f32 %r2, 0f3F808000, 0f3F818000;", 0x3F803F82),  # to even; the first is the upper half
    ],
)
def test_arithmetic(instruction, want):
    assert threads(f"{instruction} st.global.b32 [%rd1], %r2; ret;").tolist() == [want]


BRANCH = """
    setp.lt.u32 %p0, %r0, 5;
    mov.b32 %r2, 0;
    @%p0 bra $FEW;
$ALL:
    shfl.sync.idx.b32 %r3, %r2, 0, 31, -1;
    st.global.b32 [%rd1], %r3;
    ret;
$FEW:
    add.s32 %r2, %r2, 1;
    setp.le.s32 %p1, %r2, %r0;
    @%p1 bra $FEW;
    bra $ALL;
"""


def test_divergent_threads_reconverge():
    assert threads(BRANCH, 32).tolist() == [1] * 32


SWAP = """
    st.shared.b32 [%r1], %r0;
    {first}
    xor.b32 %r2, %r1, 128;
    ld.shared.b32 %r3, [%r2];
    {second}
    st.shared.b32 [%r1], %r3;
    st.global.b32 [%rd1], %r3;
    ret;
"""
BARRIER = "bar.sync 0;"


def test_barriers():
    swapped = [i ^ 32 for i in range(64)]
    assert threads(SWAP.format(first=BARRIER, second=BARRIER), 64).tolist() == swapped
    with pytest.raises(EmulationError, match="read of shared memory that another warp wrote, without a barrier"):
        threads(SWAP.format(first="", second=BARRIER), 64)
    with pytest.raises(EmulationError, match="another warp reads, without a barrier"):
        threads(SWAP.format(first=BARRIER, second=""), 64)
    with pytest.raises(EmulationError, match="wait for each other"):
        threads("setp.lt.u32 %p0, %r0, 32; @%p0 bra $END; bar.sync 0; $END:\nret;", 64)


COPY = """
    cvt.u64.u32 %rd2, %r0;
    shl.b64 %rd2, %rd2, 4;
    add.s64 %rd2, %rd0, %rd2;
    shl.b32 %r2, %r0, 4;
    {before}
    cp.async.cg.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x10, {size};
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r3, [%r2+4];
    st.global.b32 [%rd1], %r3;
    ret;
"""


def test_asynchronous_copies():
    wait = "cp.async.wait_group 0; bar.sync 0;"
    assert threads(COPY.format(before="", size=16, wait=wait), 2, size=8).tolist() == [-1] * 8
    assert threads(COPY.format(before="", size=0, wait=wait), 2, size=8).tolist() == [0, 0] + [-1] * 6
    with pytest.raises(EmulationError, match="an asynchronous copy still writes"):
        threads(COPY.format(before="st.shared.b32 [%r2+4], %r0;", size=16, wait="cp.async.wait_group 1;"), 2, size=8)
    with pytest.raises(EmulationError, match="an asynchronous instruction uses"):
        threads(COPY.format(before="", size=16, wait="st.shared.b32 [%r2+4], %r0;"), 2, size=8)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b32 [%rd1+4], %r0; ret;", "outside all tensors"),
        ("ld.global.b32 %r2, [%rd1+-8]; ret;", "outside all tensors"),
        ("st.global.b32 [%rd1+2], %r0; ret;", "not a multiple of 4"),
        ("ld.shared.b32 %r2, [%r1]; ret;", "never written"),
        ("st.shared.b32 [%r1+1024], %r0; ret;", "outside shared memory"),
        ("st.global.b32 [%rd0], %r0; ret;", "two threads write different values"),
        ("brev.b32 %r2, %r0; ret;", "brev.*not emulated"),
    ],
)
def test_errors_of_one_block(body, message):
    with pytest.raises(EmulationError, match=message):
        threads(body, 4)


def test_blocks_must_be_independent():
    own = "mov.u32 %r2, %ctaid.x; mul.wide.u32 %rd2, %r2, 4; add.s64 %rd2, %rd0, %rd2; st.global.b32 [%rd2], %r2; "
    assert threads(own + "ret;", blocks=3, size=3).tolist() == [0, 1, 2]
    with pytest.raises(EmulationError, match="read of a value that another block wrote"):
        threads(own + "ld.global.b32 %r3, [%rd0]; ret;", blocks=2, size=2)
    one_by_one = "mov.u32 %r2, %ctaid.x; setp.eq.u32 %p0, %r2, 0; "
    one_by_one += "@%p0 st.global.b32 [%rd0], 5; @!%p0 st.global.b32 [%rd0], "
    assert threads(one_by_one + "5; ret;", blocks=2, size=1).tolist() == [5]
    with pytest.raises(EmulationError, match="two blocks write different values"):
        threads(one_by_one + "6; ret;", blocks=2, size=1)


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="80, 86, 89, 90, 120, got 100"), emulated(100):
        pass
