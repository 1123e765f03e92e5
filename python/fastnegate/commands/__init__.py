# SPDX-License-Identifier: Apache-2.0
"""The command `fastnegate`: arguments, progress and pictures around what the other rooms do."""
