# SPDX-License-Identifier: Apache-2.0
"""`python -m fastnegate` is the command `fastnegate`."""

from .commands.cli import main

raise SystemExit(main())
