# SPDX-License-Identifier: Apache-2.0
"""The operator against its baselines, on the shapes of real layers."""
