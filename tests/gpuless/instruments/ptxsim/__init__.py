# SPDX-License-Identifier: Apache-2.0
"""Executes compiled PTX (sm_80) in numpy, to check on the CPU what a compiler made of a kernel.

    parse.py         text to a `Program`
    values.py        bits and numbers
    memory.py        global and shared memory that refuse mistakes
    machine.py       CTAs, divergence, barriers
    binding.py       from an instruction to a function that runs it; the functions are in
                     instructions/
    counts.py        bytes, sectors, matrix instructions, exponentials
    mutations.py     programs with one mistake each
    tensors.py       tensors as global memory
    device.py        lets Triton launch kernels here

What is an error: an access outside of a buffer or not aligned, a write to an input, a read of what
nobody wrote, a race in shared memory between two barriers or in global memory between CTAs, a cp.async
read before its wait or never waited for, divergence at a barrier or in an instruction of whole warps,
and every instruction or modifier that is not known here.

What this cannot show: what ptxas makes of the PTX, races between lanes of a warp, races in global
memory within a CTA, how hardware rounds ex2, lg2, rsqrt and sums of matrix products (here they are
rounded once), and time.
"""

from . import instructions  # noqa: F401 (they fill the table of `binding`)
from .counts import Counts, Traffic
from .machine import Result, run
from .memory import Buffer, GlobalMemory
from .mutations import Mutation, mutations
from .parse import Instruction, Program, PtxError, parse

__all__ = [
    "Buffer", "Counts", "GlobalMemory", "Instruction", "Mutation", "Program", "PtxError", "Result",
    "Traffic", "mutations", "parse", "run",
]  # fmt: skip
