# SPDX-License-Identifier: Apache-2.0
"""One operator call: `negated_attention`, its rules and tokens, and the backends that compute it."""
