# SPDX-License-Identifier: Apache-2.0
"""Something around the calls of one object, a pipeline or a model, or in the place of its methods.

The object gets a class of its own, between it and its class, that looks the same but for these. A module's
hooks would not do: `Module.compile` takes them into its graph, a `KeyboardInterrupt` skips them, and copies
carry them along. Copies and pickles are of the class that was there before.
"""

from __future__ import annotations

import copyreg
import functools
import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from torch import nn

# (object, its own call, arguments, keyword arguments, frame of the caller) -> result
Around = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any], FrameType], Any]


_changing = threading.Lock()


def base_class(thing: Any) -> type:
    """The class that an object has without anything around it."""
    base: type = vars(type(thing)).get("_fastnegate_base", type(thing))
    return base


def put_around(thing: Any, around: Around, innermost: bool = False) -> None:
    """From now on `around` gets every call of `thing`; the last that is put around is the outermost, unless
    asked to be the innermost. Once is enough."""
    with _changing:
        known = _arounds(thing)
        if around not in known:
            _become(thing, (around, *known) if innermost else (*known, around), _methods(thing))


def take_away(thing: Any, around: Around) -> None:
    """Undo `put_around`; nothing if it is not there."""
    with _changing:
        _become(thing, tuple(a for a in _arounds(thing) if a != around), _methods(thing))


def override(thing: Any, methods: Mapping[str, Callable[..., Any]]) -> None:
    """From now on the object has these methods, and no others that were given so; none: its own alone."""
    with _changing:
        _become(thing, _arounds(thing), methods)


def _arounds(thing: Any) -> tuple[Around, ...]:
    arounds: tuple[Around, ...] = vars(type(thing)).get("_fastnegate_arounds", ())
    return arounds


def _methods(thing: Any) -> Mapping[str, Callable[..., Any]]:
    methods: Mapping[str, Callable[..., Any]] = vars(type(thing)).get("_fastnegate_methods", {})
    return methods


def _become(thing: Any, arounds: tuple[Around, ...], methods: Mapping[str, Callable[..., Any]]) -> None:
    base = base_class(thing)
    # A compiled module hands attributes on to the one that it is made of.
    object.__setattr__(thing, "__class__", _class(base, arounds, methods) if arounds or methods else base)


def _class(base: type, arounds: tuple[Around, ...], methods: Mapping[str, Callable[..., Any]]) -> type:
    @functools.wraps(base.__call__)  # type: ignore[operator]
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        inner: Callable[..., Any] = functools.partial(base.__call__, self)  # type: ignore[operator]
        for around in arounds[:-1]:
            inner = functools.partial(_pass, around, self, inner, frame)
        return arounds[-1](self, inner, args, kwargs, frame)

    def reduce(self: Any, protocol: Any) -> Any:
        """A copy is of the class that was there before."""
        reduced: Any = super(type(self), self).__reduce_ex__(protocol)
        make, args, *rest = reduced
        if make is copyreg.__newobj__ and args[1:] == ():  # type: ignore[attr-defined]
            return copyreg._reconstructor, (base, object, None), *rest  # type: ignore[attr-defined]
        return base if make is made else make, tuple(base if a is made else a for a in args), *rest

    names = {
        **({"__call__": call} if arounds else {}),
        **methods,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_fastnegate_base": base,
        "_fastnegate_arounds": arounds,
        "_fastnegate_methods": methods,
    }
    likeness = {
        "__eq__": _same_class,
        "__hash__": lambda _made: hash(base),
        "__call__": lambda _made, *args, **kwargs: base(
            *args, **kwargs
        ),  # type(pipe)(...) is another pipeline
    }
    if not issubclass(base, nn.Module):  # of those, compilers ask whether their call is the usual one
        likeness |= {
            "__getattribute__": _of_base,
            "__setattr__": lambda _made, name, value: setattr(base, name, value),
            "__delattr__": lambda _made, name: delattr(base, name),
        }
    alike = type("Alike", (type(base),), likeness)
    made: type = alike(base.__name__, (base,), names)
    return made


def _same_class(made: type, other: object) -> bool:
    """diffusers looks components up by `type(component)`, which has to be found as before."""
    return other is made or other is vars(made)["_fastnegate_base"]


def _of_base(made: type, name: str) -> Any:
    """Who puts something in the place of `type(pipe).__call__` (cache-dit) means all such pipelines: in a
    class of ours it would be lost together with that."""
    return type.__getattribute__(vars(made)["_fastnegate_base"] if name == "__call__" else made, name)


def _pass(
    around: Around, thing: Any, inner: Callable[..., Any], frame: FrameType, *args: Any, **kwargs: Any
) -> Any:
    return around(thing, inner, args, kwargs, frame)
