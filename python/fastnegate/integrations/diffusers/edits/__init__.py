# SPDX-License-Identifier: Apache-2.0
"""Methods that edit before or beside attention: `with fastnegate.edits.uce(pipe, "dog"): pipe(...)`.

Each is on from its call, and undone by leaving the `with`, or by `remove()`. docs/methods.md compares them.
"""

from .edit import Edit
from .scores import crg, sld
from .tokens import safree
from .values import adavd
from .vectors import diverse_inversion, task_vector
from .weights import rece, uce

__all__ = ["Edit", "adavd", "crg", "diverse_inversion", "rece", "safree", "sld", "task_vector", "uce"]
