# SPDX-License-Identifier: Apache-2.0
"""PTX text to a `Program`: one entry point, its registers resolved, its shared variables placed.

Nothing is interpreted here. A statement that is not understood is an error, never skipped, except
for what cannot change a result: debug information, pragmas and launch bounds.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


class PtxError(Exception):
    """The program does something it must not, or something the simulator does not know."""


# ---- a program ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Register:
    name: str
    slot: int  # place in `Program.registers`
    type: str  # as declared, "b32" or "pred"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Special:
    """%tid.x and the like."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Immediate:
    value: int | float  # float: written in decimal; the bits of 0f... and 0d... are an integer

    def __str__(self) -> str:
        return hex(self.value) if isinstance(self.value, int) and self.value > 1 << 16 else str(self.value)


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter or a shared variable."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int = 0

    def __str__(self) -> str:
        return f"[{self.base}{self.offset:+d}]" if self.offset else f"[{self.base}]"


@dataclass(frozen=True)
class Vector:
    items: tuple

    def __str__(self) -> str:
        return "{" + ", ".join(map(str, self.items)) + "}"


@dataclass(frozen=True)
class Pair:
    """The two destinations `d|p` of setp and shfl."""

    first: Register | None
    second: Register | None

    def __str__(self) -> str:
        return f"{self.first or '_'}|{self.second or '_'}"


@dataclass(frozen=True)
class Guard:
    register: Register
    negated: bool

    def __str__(self) -> str:
        return f"@{'!' if self.negated else ''}{self.register} "


@dataclass(frozen=True)
class Instruction:
    opcode: str
    modifiers: tuple[str, ...] = ()
    operands: tuple = ()
    guard: Guard | None = None
    line: int = 0
    source: str = ""  # "attention.py:123", where the compiler says so
    caller: str = ""  # the line that the function of `source` was inlined at, if it was

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))

    def __str__(self) -> str:
        return f"{self.guard or ''}{self.name} {', '.join(map(str, self.operands))}".strip()

    @property
    def place(self) -> str:
        return f"line {self.line}{f' ({self.source})' if self.source else ''}"


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    size: int


@dataclass(frozen=True)
class Program:
    name: str
    target: str
    parameters: tuple[Parameter, ...]
    registers: tuple[str, ...]  # their types
    code: tuple[Instruction, ...]
    labels: dict[str, int] = field(repr=False)
    shared: dict[str, int]  # offset of each shared variable; extern ones begin where the others end
    shared_size: int  # without what is given at launch
    threads: int | None = None  # .reqntid


# ---- tokens -------------------------------------------------------------------------------------

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_TOKEN = re.compile(
    r"""
    "(?:[^"\\]|\\.)*"
    | 0[fF][0-9a-fA-F]{8} | 0[dD][0-9a-fA-F]{16} | 0[xX][0-9a-fA-F]+U? | \d+\.\d*(?:[eE][+-]?\d+)? | \d+U?
    | [.%$A-Za-z_][\w.$%]*(?:::[\w.$]+)*
    | \S
    """,
    re.X,
)


def _blank(match: re.Match) -> str:
    return re.sub(r"[^\n]", " ", match.group())


def _number(token: str) -> int | float:
    if token[:2] in ("0f", "0F", "0d", "0D"):
        return int(token[2:], 16)
    return float(token) if "." in token else int(token.rstrip("U"), 0)


# ---- the parser ---------------------------------------------------------------------------------


def parse(text: str, entry: str | None = None) -> Program:
    """The program of the entry point called `entry`, by default of the only one."""
    return _Parser(text).module(entry)


class _Parser:
    def __init__(self, text: str) -> None:
        text = _COMMENT.sub(_blank, text)
        newlines = [m.start() for m in re.finditer("\n", text)]
        found = list(_TOKEN.finditer(text))
        self.tokens = [m.group() for m in found]
        self.lines = [bisect.bisect(newlines, m.start()) + 1 for m in found]
        self.at = 0
        self.files = {  # .file 1 "/path/attention.py"
            self.tokens[i + 1]: self.tokens[i + 2].strip('"').rsplit("/")[-1]
            for i, token in enumerate(self.tokens)
            if token == ".file"
        }

    # Moving over tokens.

    @property
    def token(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.token
        if not token or expected not in (None, token):
            raise self.error(f"expected {expected or 'more'}, not {token or 'the end'}")
        self.at += 1
        return token

    def took(self, token: str) -> bool:
        if self.token == token:
            self.at += 1
            return True
        return False

    def skip_past(self, token: str) -> None:
        while self.take() != token:
            pass

    def skip_line(self) -> None:
        line = self.lines[self.at]
        while self.at < len(self.tokens) and self.lines[self.at] == line:
            self.at += 1

    def skip_braces(self) -> None:
        self.skip_past("{")
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}.get(self.take(), 0)

    def error(self, message: str) -> PtxError:
        line = self.lines[min(self.at, len(self.lines) - 1)] if self.lines else 0
        return PtxError(f"line {line}: {message}")

    # Outside of functions.

    def module(self, entry: str | None) -> Program:
        self.target = ""
        self.variables: list[tuple[str, int, int | None]] = []  # shared: name, alignment, size
        programs = []
        while self.token:
            if self.took(".target"):
                self.target = self.token
                self.skip_line()
            elif self.token in (".version", ".address_size", ".file"):
                self.skip_line()
            elif self.token in (".visible", ".weak", ".extern"):
                self.take()
            elif self.took(".shared"):
                self.shared_variable()
            elif self.token in (".global", ".const"):
                self.skip_past(";")  # using it is the error
            elif self.token == ".section":
                self.skip_braces()
            elif self.token == ".func":
                self.skip_function()
            elif self.took(".entry"):
                programs.append(self.entry())
            else:
                raise self.error(f"unknown directive {self.token}")
        chosen = [p for p in programs if entry in (None, p.name)]
        if len(chosen) != 1:
            raise PtxError(f"entry {entry} of {[p.name for p in programs]}: there must be exactly one")
        return chosen[0]

    def skip_function(self) -> None:
        while self.token not in ("{", ";"):
            self.take()
        if not self.took(";"):
            self.skip_braces()

    def shared_variable(self) -> None:
        alignment, size = 1, None
        if self.took(".align"):
            alignment = int(self.take())
        kind = self.take()[1:]
        name = self.take()
        size = SIZES[kind[1:]]
        alignment = max(alignment, size)
        while self.took("["):
            size = None if self.token == "]" else size * int(self.take(), 0)
            self.take("]")
        self.take(";")
        self.variables.append((name, alignment, size))

    def entry(self) -> Program:
        name = self.take()
        parameters = []
        if self.took("("):
            while not self.took(")"):
                parameters.append(self.parameter())
                self.took(",")
        threads = None
        while self.token != "{":
            if self.took(".reqntid"):
                threads = int(self.take())
                while self.took(","):
                    threads *= int(self.take())
            else:  # .maxntid, .minnctapersm, ...
                self.take()
        self.scopes: list[dict[str, Register]] = []
        self.registers: list[str] = []
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.source = self.caller = ""
        self.body()
        offsets, size = self.place_shared()
        return Program(
            name, self.target, tuple(parameters), tuple(self.registers), tuple(self.code), self.labels,
            offsets, size, threads,
        )  # fmt: skip

    def parameter(self) -> Parameter:
        self.take(".param")
        size = 0
        while self.token.startswith("."):
            word = self.take()
            if word == ".align":
                self.take()
            elif word[1:2] in "bsuf" and word[2:] in SIZES:
                kind, size = word[1:], SIZES[word[2:]]
        name = self.take()
        if self.took("["):
            size *= int(self.take(), 0)
            self.take("]")
        return Parameter(name, kind, size)

    def place_shared(self) -> tuple[dict[str, int], int]:
        offsets, end = {}, 0
        for name, alignment, size in self.variables:
            if size is not None:
                end = -(-end // alignment) * alignment
                offsets[name] = end
                end += size
        for name, alignment, size in self.variables:
            if size is None:
                offsets[name] = end = -(-end // alignment) * alignment
        return offsets, end

    # Inside.

    def body(self) -> None:
        self.take("{")
        self.scopes.append({})
        while self.scopes:
            if self.took("{"):
                self.scopes.append({})
            elif self.took("}"):
                self.scopes.pop()
            elif self.took(".loc"):
                self.location()
            elif self.token == ".pragma":
                self.skip_past(";")
            elif self.took(".reg"):
                self.declare()
            elif self.took(".shared"):
                self.shared_variable()
            elif self.token.startswith("."):
                raise self.error(f"{self.token} is not supported")
            elif self.tokens[self.at + 1] == ":":
                label = self.take()
                if label in self.labels:
                    raise self.error(f"label {label} twice")
                self.labels[label] = len(self.code)
                self.take(":")
            else:
                self.code.append(self.instruction())

    def location(self) -> None:
        """1 123 4[, function_name label, inlined_at 1 77 5]"""
        line = []
        end = self.lines[self.at]
        while self.at < len(self.tokens) and self.lines[self.at] == end:
            line.append(self.take())
        at = line.index("inlined_at") + 1 if "inlined_at" in line else None
        self.source, self.caller = (
            f"{self.files.get(line[i], '?')}:{line[i + 1]}" if i is not None else "" for i in (0, at)
        )

    def declare(self) -> None:
        kind = self.take()[1:]
        while True:
            name = self.take()
            if self.took("<"):
                names = [f"{name}{i}" for i in range(int(self.take()))]
                self.take(">")
            else:
                names = [name]
            for each in names:
                self.scopes[-1][each] = Register(each, len(self.registers), kind)
                self.registers.append(kind)
            if not self.took(","):
                break
        self.take(";")

    def instruction(self) -> Instruction:
        line, guard = self.lines[self.at], None
        if self.took("@"):
            negated = self.took("!")
            register = self.operand()
            if not isinstance(register, Register):
                raise self.error(f"{register} guards an instruction")
            guard = Guard(register, negated)
        opcode, *modifiers = self.take().split(".")
        operands = []
        while not self.took(";"):
            operands.append(self.operand())
            if self.token != ";":
                self.take(",")
        return Instruction(opcode, tuple(modifiers), tuple(operands), guard, line, self.source, self.caller)

    def operand(self):
        if self.took("{"):
            items = []
            while not self.took("}"):
                items.append(self.operand())
                self.took(",")
            return items[0] if len(items) == 1 else Vector(tuple(items))
        if self.took("["):
            base, offset = self.simple(), 0
            while not self.took("]"):
                sign = -1 if self.took("-") else 1
                if sign == 1:
                    self.take("+")
                    sign = -1 if self.took("-") else 1
                offset += sign * int(self.take().rstrip("U"), 0)
            return Address(base, offset)
        first = self.simple()
        if self.took("|"):
            return Pair(first, self.simple())
        return first

    def simple(self):
        """A register (None for the sink `_`), a number or a name."""
        if self.took("-"):
            return Immediate(-_number(self.take()))
        if self.token == "!":
            raise self.error("a negated operand is not supported")
        token = self.take()
        if token[0].isdigit():
            return Immediate(_number(token))
        if token == "_":
            return None
        for scope in reversed(self.scopes):
            if token in scope:
                return scope[token]
        return Special(token) if token.startswith("%") else Symbol(token)
