# SPDX-License-Identifier: Apache-2.0
"""What may be done to a denoiser around our layers: keep what they made, deal it out to several processes."""
