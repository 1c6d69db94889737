"""Read the pickles that `torch.save` writes, without pickle: nothing is imported, and nothing named there is called.

A value takes no more memory than its bytes in the file, since no opcode here reserves what another one fills, and keys
are texts and numbers: hashing or printing a few tuples that share their items can take any time. All else is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

MOST_OPCODES = 5_000_000  # about 35 for a tensor
LONGEST_TEXT = 1_000_000  # bytes
NAMESPACES = ("torch", "collections")  # torch's own loader lets in bytearray, which makes any size of its argument


class GarbledError(Exception):
    """The bytes are not the pickle of a state dict."""


@dataclass(frozen=True)
class Named:
    """A function or class that the pickle names."""

    name: str


class Foreign:
    """A value that only torch can make."""


_FRESH: dict[bytes, Callable[[], Any]] = {b"}": dict, b"]": list, b")": tuple}
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
_INTEGERS = {b"K": (1, False), b"M": (2, False), b"J": (4, True)}
_TEXTS = {b"X": 4, b"\x8c": 1, b"\x8d": 8, b"U": 1, b"T": 4}  # opcode -> bytes of the length
_PUTS = {b"q": 1, b"r": 4, b"\x94": 0}
_GETS = {b"h": 1, b"j": 4}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_SKIPPED = {b"\x80": 1, b"\x95": 8}  # the protocol, and the length of a frame
_KEYS = (str, int, float, type(None))

Calls = dict[str, Callable[..., Any]]


class Unpickler:
    """Reads one pickle after another from a file of `size` bytes.

    calls: what to do for the names that a pickle calls, with any arguments; other names of torch give a `Foreign`.
    refer: makes the value of a persistent id. foreign: the first name that only torch can make a value of, or "".
    """

    def __init__(self, file: BinaryIO, size: int, calls: Calls, refer: Callable[[tuple[Any, ...]], Any]) -> None:
        self._file, self._size, self._calls, self._refer = file, size, calls, refer
        self.foreign = ""

    def load(self) -> Any:
        """The value of the next pickle. Raises GarbledError."""
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        for _ in range(MOST_OPCODES):
            opcode = self._take(1)
            if opcode == b".":
                return self._pop()
            self._step(opcode)
        raise GarbledError(f"a pickle of over {MOST_OPCODES:,} opcodes")

    def _take(self, nbytes: int) -> bytes:
        if nbytes > LONGEST_TEXT:
            raise GarbledError(f"a text of {nbytes:,} bytes")
        data = self._file.read(nbytes)
        if len(data) < nbytes:
            raise GarbledError("it ends too early")
        return data

    def _number(self, nbytes: int) -> int:
        return int.from_bytes(self._take(nbytes), "little")

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise GarbledError("nothing is on the stack")
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        """The values above the last mark."""
        if not self._marks:
            raise GarbledError("no mark is on the stack")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _step(self, opcode: bytes) -> None:
        """Carry one opcode out."""
        push = self._stack.append
        if opcode in _FRESH:
            push(_FRESH[opcode]())
        elif opcode in _CONSTANTS:
            push(_CONSTANTS[opcode])
        elif opcode in _INTEGERS:
            nbytes, signed = _INTEGERS[opcode]
            push(int.from_bytes(self._take(nbytes), "little", signed=signed))
        elif opcode in _TEXTS:
            push(self._text(self._take(self._number(_TEXTS[opcode]))))
        elif opcode in _PUTS:
            index = self._number(_PUTS[opcode]) if _PUTS[opcode] else len(self._memo)
            push(value := self._pop())
            self._memo[index] = value
        elif opcode in _GETS:
            index = self._number(_GETS[opcode])
            if index not in self._memo:
                raise GarbledError(f"nothing was kept as {index}")
            push(self._memo[index])
        elif opcode in _TUPLES:
            push(tuple([self._pop() for _ in range(_TUPLES[opcode])][::-1]))
        elif opcode in _SKIPPED:
            if self._take(_SKIPPED[opcode]) > b"\x05" and opcode == b"\x80":
                raise GarbledError("a pickle of a protocol after 5")
        elif opcode in _STEPS:
            _STEPS[opcode](self)
        else:
            raise GarbledError(f"the opcode {opcode!r}, which torch.save does not write")

    def _text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise GarbledError(f"a text that is not UTF-8 ({error.reason})") from None

    def _push_mark(self) -> None:
        self._marks.append(len(self._stack))

    def _push_long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number(1)), "little", signed=True))

    def _push_float(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def _push_tuple(self) -> None:
        self._stack.append(tuple(self._pop_mark()))

    def _push_global(self) -> None:
        lines = [self._file.readline(200) for _ in range(2)]
        self._name(*(self._text(line.removesuffix(b"\n")) for line in lines))

    def _push_stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise GarbledError("a name that is not a text")
        if module.split(".")[0] not in NAMESPACES:
            raise GarbledError(f"it names {module:.60}.{name:.60}")
        self._stack.append(Named(f"{module}.{name}"))

    def _set_items(self, pairs: list[Any]) -> None:
        target = self._pop()
        if not isinstance(target, dict | Foreign) or len(pairs) % 2:
            raise GarbledError("items of a value that has none")
        if not all(isinstance(key, _KEYS) for key in pairs[::2]):
            raise GarbledError("a key that is not a text or number")
        if isinstance(target, dict):
            target.update(zip(pairs[::2], pairs[1::2], strict=True))
        self._stack.append(target)

    def _append(self, values: list[Any]) -> None:
        target = self._pop()
        if not isinstance(target, list):
            raise GarbledError("entries of a value that is not a list")
        target.extend(values)
        self._stack.append(target)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            raise GarbledError("a call of a value that has no name")
        self._stack.append(self._result(function.name, arguments))

    def _result(self, name: str, arguments: tuple[Any, ...]) -> Any:
        value = self._calls[name](*arguments) if name in self._calls else Foreign()
        if isinstance(value, Foreign):
            self.foreign = self.foreign or name
        return value

    def _build(self) -> None:
        """A state, such as the versions of modules beside a state dict: left out."""
        self._pop()
        self._stack.append(value := self._pop())
        if not isinstance(value, dict | Foreign):
            self.foreign = self.foreign or "a tensor with a state"

    def _push_reference(self) -> None:
        pid = self._pop()
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Named):
            raise GarbledError("a reference to something other than a storage")
        if not isinstance(pid[2], str) or type(pid[4]) is not int or not 0 <= pid[4] <= self._size:
            raise GarbledError(f"a storage that a file of {self._size:,} bytes cannot hold")
        self._stack.append(self._refer(pid))


_STEPS: dict[bytes, Callable[[Unpickler], None]] = {
    b"(": Unpickler._push_mark,
    b"\x8a": Unpickler._push_long,
    b"G": Unpickler._push_float,
    b"t": Unpickler._push_tuple,
    b"c": Unpickler._push_global,
    b"\x93": Unpickler._push_stack_global,
    b"s": Unpickler._set_item,
    b"u": lambda self: self._set_items(self._pop_mark()),
    b"a": lambda self: self._append([self._pop()]),
    b"e": lambda self: self._append(self._pop_mark()),
    b"R": Unpickler._call,
    b"\x81": Unpickler._call,
    b"b": Unpickler._build,
    b"Q": Unpickler._push_reference,
}
