# SPDX-License-Identifier: Apache-2.0
"""What instructions do: a binder for each opcode, in the table of `binding.py`.

    arithmetic.py    on numbers and bits, comparisons and choices between them
    conversions.py   from one type to another
    accesses.py      to memory
    warps.py         of a whole warp: shuffles, votes, matrices
    matrix.py        fragments of matrices

Importing this package fills the table.
"""

from . import accesses, arithmetic, conversions, warps  # noqa: F401 (they fill the table)
