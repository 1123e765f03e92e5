# SPDX-License-Identifier: Apache-2.0
"""The steps of `python -m benchmarks.on_gpu`, each a process of its own.

Another step is a module here with `items(setting)`, a line of PLAN in on_gpu.py, and what report.py shows
of it.
"""
