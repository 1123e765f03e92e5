# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between a request and its picture. Nothing here is ever swallowed: a request that
asked for negation gets it, or stops with one of these."""

from __future__ import annotations


class NegationNotAppliedError(RuntimeError):
    """Negation was asked for and could not be applied; generation stops."""


class DisplacedProcessorError(NegationNotAppliedError):
    """Something replaced an installed attention processor, so negation would silently be gone."""


class RowMapError(ValueError):
    """The batch that arrived contradicts the policies that were set for it."""


class BankMismatchError(ValueError):
    """A bank or file does not belong to this text encoder."""


class UnsupportedModelError(ValueError):
    """The pipeline, model or layer is not one that this package knows, or not in a state to be read."""


class AuditError(RuntimeError):
    """The record shows that negation which was asked for did not run, or broke."""
