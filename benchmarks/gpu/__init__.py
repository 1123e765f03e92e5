# SPDX-License-Identifier: Apache-2.0
"""The steps of `python -m benchmarks.on_gpu`, each a process of its own."""
