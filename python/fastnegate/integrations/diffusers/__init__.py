# SPDX-License-Identifier: Apache-2.0
"""diffusers: families, encoding of concepts, the attention processor, install and negate."""
