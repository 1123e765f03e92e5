# SPDX-License-Identifier: Apache-2.0
"""What belongs to one batch and one call of the denoiser: policies become rows that travel with the call."""
