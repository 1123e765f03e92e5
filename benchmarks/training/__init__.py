# SPDX-License-Identifier: Apache-2.0
"""Training of the testbed's hosts: `python -m benchmarks.training --help`."""
