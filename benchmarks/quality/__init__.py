# SPDX-License-Identifier: Apache-2.0
"""How well rules negate, on models whose pictures can be judged."""
