# SPDX-License-Identifier: Apache-2.0
"""All backends on the same random problems: the share of the accuracy budget that each uses, and by how much
it differs from the CPU's output, in units of the dtype's rounding.

    TRITON_INTERPRET=1 python tests/gpuless/agreement.py     # builds the shim first

Triton's kernel runs in the corrected interpreter, CUDA's on the shim. Ends with 1 if a budget is exceeded.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "helpers"), str(HERE / "instruments")]

import interpreter  # noqa: E402
import torch  # noqa: E402
from cuda_shim.backend import Shim, make  # noqa: E402
from support import RULES, Judge, fair, make_problem, pairwise  # noqa: E402
from torch import Tensor  # noqa: E402

from fastnegate.operator import reference  # noqa: E402
from fastnegate.operator.backends import cpu, cuda, triton  # noqa: E402
from fastnegate.operator.problem import Problem  # noqa: E402

DIMS = (40, 64, 160)
CASES = pairwise(
    {
        "rule": [name for name, rule in RULES.items() if rule.direction != "retrieve"],
        "dtype": (torch.float16, torch.bfloat16),
        "dim": DIMS,
        "keys": (7, 77, 130),
        "rows": ("same", "mixed", "zero_tokens"),
    }
)


def interpreted(problem: Problem) -> Tensor:
    with interpreter.checked("out", "moments", "norms", "trace_entries", "trace_rows"):
        return triton.run(problem)


BACKENDS = {"reference": reference.run, "cpu": cpu.run, "triton": interpreted, "cuda": cuda.run}


def used(judge: Judge, output: Tensor) -> float:
    """Largest share of the budget, of a row or of the mean."""
    errors, (most, mean) = judge.errors(output), judge.allowed
    return max((errors.max() / most).item(), (errors.mean() / mean).item())


def distance(a: Tensor, b: Tensor, judge: Judge) -> float:
    """Largest difference of a row over its magnitude, in roundings."""
    gap = (a.double() - b.double()).abs().amax(-1) / judge.magnitude
    return (gap[~judge.near] / torch.finfo(a.dtype).eps).max().item()


def main(path: Path) -> int:
    torch.set_num_threads(1)
    failed = 0
    print(f"{'rule':14}{'dtype':9}{'dim':>4}{'keys':>5}  {'rows':12}  "
          + "".join(f"{name:>10}" for name in BACKENDS)
          + "".join(f"{f'{name}-cpu':>12}" for name in ("triton", "cuda")))  # fmt: skip
    with Shim(path).installed():
        for case in CASES:
            made = {**case, "rule": RULES[case["rule"]]}
            judge = fair(make_problem(2, 2, 33, **made, seed=seed) for seed in range(8))
            outputs = {name: run(judge.problem) for name, run in BACKENDS.items()}
            shares = {name: used(judge, output) for name, output in outputs.items()}
            apart = [distance(outputs[name], outputs["cpu"], judge) for name in ("triton", "cuda")]
            failed += any(not share <= 1 for share in shares.values())
            dtype = str(case["dtype"]).removeprefix("torch.")
            print(f"{case['rule']:14}{dtype:9}{case['dim']:4}{case['keys']:5}  {case['rows']:12}  "
                  + "".join(f"{share:10.2f}" for share in shares.values())
                  + "".join(f"{gap:12.2f}" for gap in apart), flush=True)  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    if "FASTNEGATE_CUDA_SHIM" in os.environ:
        sys.exit(main(Path(os.environ["FASTNEGATE_CUDA_SHIM"])))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(main(make(Path(folder), DIMS)))
