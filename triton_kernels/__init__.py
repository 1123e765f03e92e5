# SPDX-License-Identifier: Apache-2.0
"""Triton kernels; installed as `fastnegate.triton_kernels`.

The top-level name `triton_kernels` belongs to another package, so this one refuses to answer to it.
"""

if __name__ != "fastnegate.triton_kernels":
    raise ImportError(f"{__name__!r} is fastnegate's kernel folder: import fastnegate.triton_kernels")
