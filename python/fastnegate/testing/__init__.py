# SPDX-License-Identifier: Apache-2.0
"""Problems, and the one judge of accuracy: for the tests, `fastnegate doctor`, benchmarks, and for whoever
writes a backend."""
