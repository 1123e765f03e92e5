# SPDX-License-Identifier: Apache-2.0
"""Concept phrases -> embeddings, with a pipeline's own tokenizers and text encoders, and whose they are."""
