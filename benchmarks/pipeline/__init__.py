# SPDX-License-Identifier: Apache-2.0
"""A whole denoising step with and without negation."""
