# SPDX-License-Identifier: Apache-2.0
"""Stands where the HTTP server of vLLM-Omni imports torchaudio, of which no release fits this torch. It has
nothing to offer: whoever needs sound gets an error."""
