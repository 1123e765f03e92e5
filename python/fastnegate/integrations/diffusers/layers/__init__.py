# SPDX-License-Identifier: Apache-2.0
"""Attention layers: what each kind computes, where they are in their model, and what may be kept of them."""
