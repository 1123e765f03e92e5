# SPDX-License-Identifier: Apache-2.0
"""Compiles what would be launched on a GPU that is not there, and says what the compiler made of it.

    with Compiled("sm_90") as device:
        backend.run(problem)
    print(device.launches[0].kernel)

Nothing runs: tensors live on the CPU and keep what they hold. `Layer` is what a pipeline would launch.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from ptxsim.device import A100, Call, Device, Gpu
from triton.backends.compiler import GPUTarget

import fastnegate as fn
from fastnegate.operator.backends import triton as backend
from fastnegate.operator.problem import Problem
from fastnegate.operator.rule import Rule

# Shared memory of a CTA: CUDA Programming Guide, "Technical Specifications per Compute Capability", and
# "LDS" of AMD's table of GPU specifications. Multiprocessors are those of the named GPU, by its maker's
# specifications; HIP counts two compute units of an RDNA GPU, a workgroup processor, as one.
GPUS = {
    "sm_80": A100,
    "sm_86": Gpu(GPUTarget("cuda", 86, 32), 99 * 1024, 82),  # RTX 3090
    "sm_89": Gpu(GPUTarget("cuda", 89, 32), 99 * 1024, 128),  # RTX 4090
    "sm_90": Gpu(GPUTarget("cuda", 90, 32), 227 * 1024, 132),  # H100 SXM
    "sm_100": Gpu(GPUTarget("cuda", 100, 32), 227 * 1024, 148),  # B200
    "sm_120": Gpu(GPUTarget("cuda", 120, 32), 99 * 1024, 170),  # RTX 5090
    "gfx942": Gpu(GPUTarget("hip", "gfx942", 64), 64 * 1024, 304),  # MI300X
    "gfx950": Gpu(GPUTarget("hip", "gfx950", 64), 160 * 1024, 256),  # MI355X
    "gfx1100": Gpu(GPUTarget("hip", "gfx1100", 32), 64 * 1024, 48),  # RX 7900 XTX
}

# Matrix instructions by how their names begin: mma.sync, wgmma and tcgen05.mma; CDNA's and RDNA's.
FAMILIES = {"HMMA": "HMMA", "HGMMA": "HGMMA", "UTCHMMA": "tcgen05", "v_mfma": "MFMA", "v_wmma": "WMMA"}


class Kernel(NamedTuple):
    """What the compiler made. Instructions are counted as written, however often loops run them."""

    registers: int  # of a thread
    stack: int  # bytes of a thread, where spilled registers go
    spills: int  # NVIDIA: instructions that access them; AMD: how many vector registers they are
    shared: int  # bytes of the CTA
    tensor_memory: int  # columns, on sm_100
    warps: int
    matrix: Counter[str]  # matrix instructions by family
    products: int  # multiplications of the CTA in matrix instructions
    exponentials: int
    seconds: float  # of compiling; 0 if it was in Triton's cache

    def __str__(self) -> str:
        matrix = " ".join(f"{count} {family}" for family, count in self.matrix.items())
        return (
            f"{self.warps} warps, {self.registers} registers, {self.spills} spills, stack {self.stack}, "
            f"shared {self.shared}, tensor memory {self.tensor_memory}, {matrix or 'no matrix instruction'}, "
            f"{self.exponentials} exponentials, {self.seconds:.1f} s"
        )


class Launch(NamedTuple):
    grid: tuple[int, int, int]
    constants: dict[str, Any]  # the kernel's arguments that were compiled in
    kernel: Kernel


class Compiled(Device):
    """The GPU of this name in GPUS while it is entered."""

    def __init__(self, name: str) -> None:
        super().__init__(GPUS[name])
        self.launches: list[Launch] = []

    def __enter__(self) -> Compiled:
        self._listener = triton.knobs.compilation.listener
        triton.knobs.compilation.listener = self._compiled
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        triton.knobs.compilation.listener = self._listener

    def _compiled(self, *, times: Any, cache_hit: bool, **_: Any) -> None:
        self._seconds = 0.0 if cache_hit else times.total / 1e6

    def load(self, name: str, files: dict[str, Path]) -> Kernel:
        metadata = json.loads(files["json"].read_text())
        read = _nvidia if self.gpu.target.backend == "cuda" else _amd
        return Kernel(
            shared=metadata["shared"],
            tensor_memory=metadata.get("tmem_size") or 0,
            warps=metadata["num_warps"],
            seconds=self._seconds,
            **read(files, metadata["num_warps"]),
        )

    def launch(self, kernel: Kernel, call: Call) -> None:
        self.launches.append(Launch(call.grid, call.constants, kernel))


def products(shape: str) -> int:
    """Multiplications of a matrix instruction, from a shape such as m16n8k16."""
    m, n, k = re.findall(r"\d+", shape)
    return int(m) * int(n) * int(k)


def _nvidia(files: dict[str, Path], warps: int) -> dict[str, Any]:
    """From the machine code, but shapes of matrix instructions from PTX: tcgen05's are not in its name.

    An HMMA is of a warp, a wgmma of four, a tcgen05.mma of the CTA.
    """
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", files["cubin"]]
    code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"(REG|STACK):(\d+)", code))
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.M)
    ptx = files["ptx"].read_text()
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "spills": _count(names, ("LDL", "STL")),
        "matrix": _families(names),
        "products": warps * sum(map(products, re.findall(r"\bmma\.sync\S*\.(m\d+n\d+k\d+)\.", ptx)))
        + warps // 4 * sum(map(products, re.findall(r"\bwgmma\.mma_async\S*\.(m\d+n\d+k\d+)\.", ptx)))
        + sum(_tcgen05(ptx)),
        "exponentials": _count(names, ("MUFU.EX2",)),
    }


def _tcgen05(ptx: str) -> Iterable[int]:
    """Multiplications of each tcgen05.mma: shapes are in "Instruction descriptor"s of the PTX ISA."""
    for kind, descriptor in re.findall(r"\btcgen05\.mma\.\S*kind::(\w+).*?, (%r\d+), %p", ptx):
        word = int(re.search(rf"mov\.b32\s+{descriptor}, (-?\d+);", ptx)[1])
        yield 8 * (word >> 17 & 0x3F) * 16 * (word >> 24 & 0x1F) * {"f16": 16, "tf32": 8}[kind]


def _amd(files: dict[str, Path], warps: int) -> dict[str, Any]:
    code = files["amdgcn"].read_text()
    usage = {name: int(number) for name, number in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", code, re.M)}
    names = re.findall(r"^\t([a-z]\w*)", code, re.M)
    shapes = re.findall(r"^\tv_(?:mfma|wmma)_\w+?_(\d+x\d+x\d+)_", code, re.M)
    return {
        "registers": usage["vgpr_count"],
        "stack": usage["private_segment_fixed_size"],
        "spills": usage["vgpr_spill_count"],
        "matrix": _families(names),
        "products": warps * sum(map(products, shapes)),
        "exponentials": _count(names, ("v_exp_",)),
    }


def _families(names: list[str]) -> Counter[str]:
    counted = {family: _count(names, (start,)) for start, family in FAMILIES.items()}
    return +Counter(counted)


def _count(names: list[str], starts: tuple[str, ...]) -> int:
    return sum(name.startswith(starts) for name in names)


# ---- what pipelines launch --------------------------------------------------------------------------

KEYS = 77  # of the prompt


class Negation(NamedTuple):
    rule: Rule
    lengths: tuple[int, ...]  # of the concepts, which every row negates
    launches: int = 1


PROTORE = Negation(Rule.preset("protore"), (8, 8, 8, 8))
NEGATIONS = {
    "none": PROTORE._replace(lengths=()),
    "protore": PROTORE,
    "statistics": PROTORE,
    "vsf": Negation(Rule.preset("vsf"), (8, 8, 8, 8)),
    "nag": Negation(Rule.preset("nag"), (77,), launches=2),
    # Every table that may be missing.
    "tables": Negation(Rule("cosine", "ramp", "fixed", scope="feature"), (8, 8, 8, 8), launches=2),
}


class Layer(NamedTuple):
    target: str
    dim: int
    dtype: torch.dtype
    negation: str

    def __str__(self) -> str:
        return "-".join(map(str, self)).replace("torch.", "")

    def compiled(self) -> list[Launch]:
        run = backend.run_with_statistics if self.negation == "statistics" else backend.run
        with Compiled(self.target) as device:
            run(self.problem())
        return device.launches

    def problem(self) -> Problem:
        """Tensors hold nothing. As in Stable Diffusion there are fewer queries where heads are wider."""
        dim, dtype = self.dim, self.dtype
        batch, heads, queries = 2, 8, 4096 if dim < 80 else 1024 if dim < 160 else 256
        rule, lengths, _ = NEGATIONS[self.negation]

        def made(tokens: int) -> torch.Tensor:
            return torch.empty(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)

        key_bias, concepts, tables = None, None, {}
        if self.negation == "tables":
            key_bias = torch.zeros(batch, 1, 1, KEYS)
            tables = {name: torch.zeros(sum(lengths)) for name in ("token_bias", "token_weight")}
            tables |= {name: torch.zeros(len(lengths), heads, dim) for name in ("direction", "update")}
            tables["offset"] = torch.zeros(len(lengths))
        if lengths:
            tokens = [torch.empty(n, heads, dim, dtype=dtype) for n in lengths]
            concepts = fn.ConceptTokens.pack(tokens, tokens, [range(len(lengths))] * batch, **tables)
        return Problem(made(queries), made(KEYS), made(KEYS), key_bias, concepts, rule, dim**-0.5)
