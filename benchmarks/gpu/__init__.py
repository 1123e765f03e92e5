# SPDX-License-Identifier: Apache-2.0
"""What `python -m benchmarks.on_gpu` runs: steps, each a process of its own, the card, and the report."""
