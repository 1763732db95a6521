"""Looks through a pickle before anything is made of it, and refuses what no save writes but what harms a loader.

Python hashes nested tuples by a recursion in C that knows no limit: a key of 100,000 tuples in each other ends the
process, and a key of 60 tuples, each of which holds the one before it twice, never ends. No unpickler guards against
it. So the operations are followed here with the size and the depth of each value in place of the value.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeAlias

MAX_DEPTH = 1000
"""Values within values; a pickler itself stops there."""
MAX_SIZE = 2**26
"""Values that one value may hold, each counted as often as it is met."""

Call: TypeAlias = Callable[[object, object], None]
"""Is told of every call, as two kinds (see `Kind`): what is called and the tuple of arguments; may raise."""
Kind: TypeAlias = object
"""What is known of a value: `Global`, the bytes of a text, a tuple of kinds, ``int``, ``list`` and so on, or None."""


class Global(str):
    """The name of a class or function."""


def check_pickle(data: bytes, call: Call = lambda _function, _args: None) -> int:
    """Follows the operations of the pickle that ``data`` begins with; returns where it ends, in bytes.

    Raises:
        pickle.UnpicklingError: It is nested too deeply, grows too far, or has an operation that no save writes; or
            ``call`` raised it.
        IndexError, ValueError, KeyError: It is damaged.
    """
    scan = _Scan(data, call)
    acts = _ACTS
    while not scan.done:
        operation = data[scan.at]
        scan.at += 1
        if operation not in acts:
            raise pickle.UnpicklingError(f"the operation {bytes([operation])!r} of pickle")
        acts[operation](scan)
    return scan.at


class _Value:
    __slots__ = ("depth", "kind", "size")

    def __init__(self, kind: Kind = None, depth: int = 0, size: int = 1) -> None:
        self.kind, self.depth, self.size = kind, depth, size

    def add(self, items: list[_Value]) -> _Value:
        for item in items:
            self.size += item.size
            if item.depth >= self.depth:
                self.depth = item.depth + 1
        if self.depth > MAX_DEPTH or self.size > MAX_SIZE:
            raise pickle.UnpicklingError(f"values nested {self.depth} deep, {self.size} in all")
        return self


_PLAIN, _INT = _Value(), _Value(int)


class _Scan:
    def __init__(self, data: bytes, call: Call) -> None:
        self.data, self.call = data, call
        self.at = 0
        self.done = False
        self.stack: list[_Value] = []
        self.marks: list[list[_Value]] = []
        self.memo: dict[int, _Value] = {}
        self.hashed = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise IndexError("the pickle ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, count: int) -> int:
        self.at += count
        if count == 1:
            return self.data[self.at - 1]
        return int.from_bytes(self.data[self.at - count : self.at], "little")

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        return self.take(end + 1 - self.at)[:-1].decode()

    def pop_mark(self) -> list[_Value]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def hash(self, items: list[_Value]) -> None:
        for item in items:
            self.hashed += item.size
        if self.hashed > MAX_SIZE:
            raise pickle.UnpicklingError("keys that take too long to hash")


def _push(value: _Value, skip: int = 0) -> Callable[[_Scan], None]:
    def act(scan: _Scan) -> None:
        scan.at += skip
        scan.stack.append(value)

    return act


def _push_new(kind: type) -> Callable[[_Scan], None]:
    return lambda scan: scan.stack.append(_Value(kind))


def _push_sized(width: int, kind: Kind = None) -> Callable[[_Scan], None]:
    def act(scan: _Scan) -> None:
        scan.stack.append(_Value(kind))
        scan.take(scan.number(width))

    return act


def _push_text(width: int) -> Callable[[_Scan], None]:
    return lambda scan: scan.stack.append(_Value(scan.take(scan.number(width))))


def _global(scan: _Scan) -> None:
    module = scan.line()
    scan.stack.append(_Value(Global(f"{module}.{scan.line()}")))


def _stack_global(scan: _Scan) -> None:
    name, module = scan.stack.pop().kind, scan.stack.pop().kind
    if not isinstance(name, bytes) or not isinstance(module, bytes):
        raise ValueError("a name that is not a text")
    scan.stack.append(_Value(Global(f"{module.decode()}.{name.decode()}")))


def _skip(count: int) -> Callable[[_Scan], None]:
    def act(scan: _Scan) -> None:
        scan.at += count

    return act


def _mark(scan: _Scan) -> None:
    scan.marks.append(scan.stack)
    scan.stack = []


def _tuple(count: int | None) -> Callable[[_Scan], None]:
    def act(scan: _Scan) -> None:
        items = scan.pop_mark() if count is None else [scan.stack.pop() for _ in range(count)][::-1]
        scan.stack.append(_Value(tuple(item.kind for item in items[:8])).add(items))

    return act


def _put(width: int) -> Callable[[_Scan], None]:
    def act(scan: _Scan) -> None:
        place = scan.number(width)
        if place > len(scan.data):
            # an unpickler in C makes room for all places before it
            raise pickle.UnpicklingError(f"a memo of {place} places")
        scan.memo[place] = scan.stack[-1]

    return act


def _memoize(scan: _Scan) -> None:
    scan.memo[len(scan.memo)] = scan.stack[-1]


def _get(width: int) -> Callable[[_Scan], None]:
    return lambda scan: scan.stack.append(scan.memo[scan.number(width)])


def _append(scan: _Scan) -> None:
    item = scan.stack.pop()
    scan.stack[-1].add([item])


def _appends(scan: _Scan) -> None:
    items = scan.pop_mark()
    scan.stack[-1].add(items)


def _set_item(scan: _Scan) -> None:
    items = [scan.stack.pop(), scan.stack.pop()]
    scan.hash(items[1:])
    scan.stack[-1].add(items)


def _set_items(scan: _Scan) -> None:
    items = scan.pop_mark()
    scan.hash(items[::2])
    scan.stack[-1].add(items)


def _add_items(scan: _Scan) -> None:
    items = scan.pop_mark()
    scan.hash(items)
    scan.stack[-1].add(items)


def _frozenset(scan: _Scan) -> None:
    items = scan.pop_mark()
    scan.hash(items)
    scan.stack.append(_Value(frozenset).add(items))


def _call(scan: _Scan) -> None:
    args, function = scan.stack.pop(), scan.stack.pop()
    scan.call(function.kind, args.kind)
    scan.hash([args])
    scan.stack.append(_Value().add([args]))


def _build(scan: _Scan) -> None:
    state = scan.stack.pop()
    if isinstance(scan.stack[-1].kind, Global):
        raise pickle.UnpicklingError(f"a change of {scan.stack[-1].kind}")
    # the class may hash what it is given
    scan.hash([state])
    scan.stack[-1].add([state])


def _persistent(scan: _Scan) -> None:
    scan.stack.pop()
    scan.stack.append(_Value())


def _pop(scan: _Scan) -> None:
    scan.stack.pop()


def _stop(scan: _Scan) -> None:
    scan.done = True


_ACTS: dict[int, Callable[[_Scan], Any]] = {
    key[0]: act
    for key, act in {
        pickle.PROTO: _skip(1),
        pickle.FRAME: _skip(8),
        pickle.STOP: _stop,
        pickle.MARK: _mark,
        pickle.POP: _pop,
        pickle.POP_MARK: _Scan.pop_mark,
        pickle.NONE: _push(_PLAIN),
        pickle.NEWTRUE: _push(_PLAIN),
        pickle.NEWFALSE: _push(_PLAIN),
        pickle.BINFLOAT: _push(_PLAIN, 8),
        pickle.BININT: _push(_INT, 4),
        pickle.BININT1: _push(_INT, 1),
        pickle.BININT2: _push(_INT, 2),
        pickle.LONG1: _push_sized(1, int),
        pickle.BINUNICODE: _push_text(4),
        pickle.SHORT_BINUNICODE: _push_text(1),
        pickle.BINUNICODE8: _push_text(8),
        pickle.SHORT_BINSTRING: _push_sized(1),
        pickle.BINBYTES: _push_sized(4),
        pickle.SHORT_BINBYTES: _push_sized(1),
        pickle.BINBYTES8: _push_sized(8),
        pickle.EMPTY_LIST: _push_new(list),
        pickle.EMPTY_DICT: _push_new(dict),
        pickle.EMPTY_SET: _push_new(set),
        pickle.EMPTY_TUPLE: _tuple(0),
        pickle.TUPLE: _tuple(None),
        pickle.TUPLE1: _tuple(1),
        pickle.TUPLE2: _tuple(2),
        pickle.TUPLE3: _tuple(3),
        pickle.BINPUT: _put(1),
        pickle.LONG_BINPUT: _put(4),
        pickle.MEMOIZE: _memoize,
        pickle.BINGET: _get(1),
        pickle.LONG_BINGET: _get(4),
        pickle.APPEND: _append,
        pickle.APPENDS: _appends,
        pickle.SETITEM: _set_item,
        pickle.SETITEMS: _set_items,
        pickle.ADDITEMS: _add_items,
        pickle.FROZENSET: _frozenset,
        pickle.GLOBAL: _global,
        pickle.STACK_GLOBAL: _stack_global,
        pickle.REDUCE: _call,
        pickle.NEWOBJ: _call,
        pickle.BUILD: _build,
        pickle.BINPERSID: _persistent,
    }.items()
}
