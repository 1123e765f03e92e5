# SPDX-License-Identifier: Apache-2.0
"""`partial_attention`: attention by kernels of others, with its log-sum-exp."""

from .attention import partial_attention as partial_attention
