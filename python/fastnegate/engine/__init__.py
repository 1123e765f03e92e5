# SPDX-License-Identifier: Apache-2.0
"""Policies of requests -> rows of small tensors that the operator reads; knows no pipeline."""
