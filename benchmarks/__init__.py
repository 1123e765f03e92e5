# SPDX-License-Identifier: Apache-2.0
"""Benchmarks; installed as `fastnegate.benchmarks`, so that `fastnegate bench` works anywhere."""
