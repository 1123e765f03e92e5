# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between a request and its picture: it gets the negation that it asked for, or one of
these."""

from __future__ import annotations


class RowMapError(ValueError):
    """The batch that arrived contradicts the policies that were set for it."""


class NegationNotAppliedError(RuntimeError):
    """Negation was asked for and could not be applied; generation stops."""


class DisplacedProcessorError(NegationNotAppliedError):
    """Something took the place of an attention processor, an attention module or the denoiser, so negation
    would silently be gone."""


class BankMismatchError(ValueError):
    """A bank or file does not belong to this text encoder."""


class UnsupportedModelError(ValueError):
    """The pipeline, model or layer is not one whose attention this package knows."""


class AuditError(RuntimeError):
    """The record shows that negation which was asked for did not run, or broke."""
