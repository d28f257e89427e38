"""Pickles read as data: a machine for their instructions that calls nothing, imports nothing, and is bounded.

What a pickle names (a class, a function) stays a name; what it would make of one becomes an inert `Unknown`, unless
the caller knows how to build it. So a hostile pickle has nothing to get hold of, and an honest one with a class
that is not installed here still gives up everything else.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Longer pickles, or pickles of more instructions, are refused. Those of checkpoints take some 100 bytes a tensor.
MAX_BYTES, MAX_INSTRUCTIONS = 32 << 20, 4_000_000
# Larger integers are no sizes, seeds or hashes; turning them into text takes for ever.
_MAX_INTEGER_BYTES = 64
# Of a container that is made plain: entries of each level, levels.
_PLAIN_ENTRIES, _PLAIN_LEVELS = 32, 2

# Nobody saves these but to have a command run when the file is read: worth saying, though nothing is run here.
_ATTACK_MODULES = ("os", "posix", "nt", "sys", "subprocess")
_ATTACK_BUILTINS = ("eval", "exec", "compile", "__import__")

_SCALARS = (str, int, float, bytes, type(None))


class AttackError(ValueError):
    """A pickle that would run a command where it is read by pickle itself. ``name`` says which."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it calls {name}")
        self.name = name


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names, as text."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(eq=False)
class Unknown:
    """What stands in for an object that is not made: the name of its class, and what it would have been made from."""

    name: str
    args: Any = ()
    state: Any = None

    def __str__(self) -> str:
        """Of bounded length, whatever it was to be made from."""
        given = self.args if isinstance(self.args, tuple) else ()
        if not given:
            return self.name
        shown = [repr(item)[:60] if isinstance(item, _SCALARS) else type(item).__name__ for item in given[:8]]
        return f"{self.name}({', '.join(shown)}{', ...' if len(given) > 8 else ''})"

    __repr__ = __str__


#: Name and arguments -> the object, or an Unknown.
Build = Callable[[str, tuple[Any, ...]], Any]
#: What a pickle says of something that lies outside of it -> that.
Outside = Callable[[Any], Any]


def read_pickle(stream: io.BytesIO, build: Build = Unknown, outside: Outside | None = None) -> Any:
    """The object of the pickle at the stream's place; the stream then stands behind it.

    Raises AttackError, ValueError for what is too large or no pickle of plain values, and what damage makes of it
    (IndexError, KeyError, struct.error, ...).
    """
    machine = _Machine(build, outside)
    for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_INSTRUCTIONS:
            raise ValueError(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions")
        machine.do(opcode.name, arg)
    return machine.stack.pop()


def plain(value: Any, levels: int = _PLAIN_LEVELS) -> Any:
    """A copy that is short as text: containers of a pickle may share parts, and unfold to any size."""
    if isinstance(value, (list, tuple, dict, set)):
        if not levels or len(value) > _PLAIN_ENTRIES:
            return Unknown(type(value).__name__)
        if isinstance(value, dict):
            return {key: plain(item, levels - 1) for key, item in value.items()}
        return type(value)(plain(item, levels - 1) for item in value)
    return value


class _Machine:
    """The stack, the marks and the memo of a pickle that is being read."""

    def __init__(self, build: Build, outside: Outside | None) -> None:
        self.build, self.outside = build, outside
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def do(self, name: str, arg: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            self.stack.append(_bounded(arg))
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[arg] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[arg])
        elif name == "MARK":
            self.marked.append(self.stack)
            self.stack = []
        elif name not in ("PROTO", "FRAME", "STOP"):
            step = getattr(self, f"_{name.lower()}", None)
            if step is None:
                raise ValueError(f"its pickle has the instruction {name}, which is not read")
            step(arg)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    # ------------------------------------------------------------------------------------------- plain values

    def _pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def _pop_mark(self, _: Any) -> None:
        self.pop_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _tuple(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def _tuple1(self, _: Any) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def _tuple2(self, _: Any) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self, _: Any) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _list(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def _dict(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._put(items)

    def _frozenset(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append({_key(item) for item in items})

    def _append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: Any) -> None:
        items = self.pop_mark()
        self._extend(items)

    def _additems(self, _: Any) -> None:
        items = self.pop_mark()
        self._extend(items)

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def _setitems(self, _: Any) -> None:
        items = self.pop_mark()
        self._put(items)

    def _extend(self, items: list[Any]) -> None:
        """Into the list or set on top of the stack; what is not made takes nothing up."""
        into = self.stack[-1]
        if isinstance(into, list):
            into.extend(items)
        elif isinstance(into, set):
            into.update(_key(item) for item in items)
        elif not isinstance(into, Unknown):
            raise ValueError(f"its pickle appends to a {type(into).__name__}")

    def _put(self, items: list[Any]) -> None:
        """Keys and values in turn, into the dict on top of the stack."""
        into = self.stack[-1]
        if isinstance(into, dict):
            into.update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
        elif not isinstance(into, Unknown):
            raise ValueError(f"its pickle puts entries into a {type(into).__name__}")

    # ------------------------------------------------------------------------------------- what would be made

    def _named(self, module: Any, name: Any) -> Name:
        module, name = str(module), str(name)
        if module in _ATTACK_MODULES or (module in ("builtins", "__builtin__") and name in _ATTACK_BUILTINS):
            raise AttackError(f"{module}.{name}")
        return Name(f"{module}.{name}")

    def _made(self, name: Any, args: Any) -> None:
        if isinstance(name, Name) and isinstance(args, tuple):
            self.stack.append(self.build(name.text, args))
        else:
            self.stack.append(Unknown(f"something made by a {type(name).__name__}"))

    def _global(self, arg: Any) -> None:
        module, _, name = arg.partition(" ")
        self.stack.append(self._named(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("its pickle names a class by something that is no text")
        self.stack.append(self._named(module, name))

    def _inst(self, arg: Any) -> None:
        items = self.pop_mark()
        module, _, name = arg.partition(" ")
        self._made(self._named(module, name), tuple(items))

    def _obj(self, _: Any) -> None:
        name, *items = self.pop_mark()
        self._made(name, tuple(items))

    def _reduce(self, _: Any) -> None:
        args, name = self.stack.pop(), self.stack.pop()
        self._made(name, args)

    _newobj = _reduce

    def _newobj_ex(self, _: Any) -> None:
        self.stack.pop()  # keyword arguments
        self._reduce(None)

    def _build(self, _: Any) -> None:
        """State for the object on top: what is made here (a dict, a tensor) has all that is wanted of it already."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Unknown):
            self.stack[-1].state = state

    def _persid(self, arg: Any) -> None:
        self.stack.append(arg)
        self._binpersid(None)

    def _binpersid(self, _: Any) -> None:
        if self.outside is None:
            raise ValueError("its pickle refers to something outside of it")
        self.stack.append(self.outside(self.stack.pop()))


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


def _bounded(value: Any) -> Any:
    return Unknown("int") if isinstance(value, int) and value.bit_length() > 8 * _MAX_INTEGER_BYTES else value


def _key(value: Any) -> Any:
    """A key that can be hashed at once: tuples may share parts without end, or be nested deeper than the C stack."""
    return value if isinstance(value, _SCALARS) else Unknown(type(value).__name__)
