# SPDX-License-Identifier: Apache-2.0
"""What concepts are learned from besides words: what layers give (directions), and the training loss."""
