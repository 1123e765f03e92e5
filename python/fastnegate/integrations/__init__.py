# SPDX-License-Identifier: Apache-2.0
"""Bridges to the libraries that run attention; nothing here is imported by `import fastnegate`."""
