# SPDX-License-Identifier: Apache-2.0
"""What unlike policies cost a server: many clients and one model, and a step of a model at its full width."""
