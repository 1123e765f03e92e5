# SPDX-License-Identifier: Apache-2.0
"""The easy world: one or two coloured shapes of 32x32 pixels in fixed places."""
