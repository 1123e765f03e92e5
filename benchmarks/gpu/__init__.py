# SPDX-License-Identifier: Apache-2.0
"""What one command finds out on a machine with one GPU."""
