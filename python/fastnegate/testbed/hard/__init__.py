# SPDX-License-Identifier: Apache-2.0
"""The hard world: one to three shapes and sprites of 48x48 pixels in free places."""
