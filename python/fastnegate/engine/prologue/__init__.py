# SPDX-License-Identifier: Apache-2.0
"""Methods that edit before or beside attention, as algebra: no pipeline, no model. What puts them into a
pipeline is `fastnegate.integrations.diffusers.edits`."""
