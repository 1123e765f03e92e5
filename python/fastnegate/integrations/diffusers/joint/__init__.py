# SPDX-License-Identifier: Apache-2.0
"""Models whose image and text attend to each other in one softmax (FLUX and its kin).

Concept tokens *ride* in the model's own text sequence: its norms, modulations, projections and MLPs serve
them as they serve the prompt. One attention function knows who sees whom: docs/semantics.md, section 9, with
the image as the shared keys.
"""
