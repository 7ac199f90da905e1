"""Kernels of a step overlap: the next one's programs start while the last ones of this run out.

Programmatic dependent launch: a kernel that calls `let_next_start()` allows the next one to take the processors that
it leaves; the next one's `wait_for_last()` returns once all that this one wrote can be read. What a kernel does before
that, such as fetching weights, which no kernel writes, costs no time. Every program must wait: the kernels after it
rely on this one for those before it.
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import cuda

from ..launch import FUSED

LINE = 128  # bytes that a fetch brings

if knobs.runtime.interpret:  # one program after the other, on a CPU
    OVERLAP = FUSED

    @triton.jit
    def let_next_start():
        pass

    @triton.jit
    def wait_for_last():
        pass

    @triton.jit
    def fetch(pointers):
        pass

else:
    OVERLAP = FUSED | {"launch_pdl": True}  # of every launch of a kernel that waits

    @triton.jit
    def let_next_start():
        cuda.gdc_launch_dependents()

    @triton.jit
    def wait_for_last():
        cuda.gdc_wait()

    @triton.jit
    def fetch(pointers):
        """Bring the lines at `pointers` to the card's cache, without waiting for them."""
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def last_of(arrived_ptr, programs):
    """Whether this program is the last of `programs` to come here: it may read what all of them have written.

    The count, 0 at first, is 0 again after it. What others wrote is read with `cache_modifier=".cg"`.
    """
    tl.debug_barrier()  # all of this program's threads have written
    last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrived_ptr, 0)
    return last
