# SPDX-License-Identifier: Apache-2.0
"""The steps: each module has `items(setting)`, in order of worth.

Another step is a module here, a line of PLAN in on_gpu.py, and what report.py shows of it.
"""
