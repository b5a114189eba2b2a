"""What a function of the caller's is, so that a changed one counts as another judge."""

from __future__ import annotations

import dis
import functools
import json
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

from toolkit.files import fingerprint

_LOADS_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_WRAPPERS = (staticmethod, classmethod, type(functools.cache(len)))
# Of a class: what Python adds to it, which says where it was written or differs between processes.
_OF_EVERY_CLASS = (
    *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__"),
    *("__firstlineno__", "__static_attributes__", "__annotations_cache__", "__slotnames__"),
)


def function_fingerprint(function: Callable[..., Any]) -> str:
    """16 hex digits over what a function computes, the same in every process of one version of Python.

    They are over its code and that of the functions inside it, the values of its defaults, its closure and its
    attributes, and the globals that it names: numbers, texts and containers by their values, functions like itself,
    classes by their members, and objects by their class and attributes. Of a partial function, a bound method and a
    cached function they are over the parts.

    Not seen is what stands elsewhere: the contents of an imported module and of files, the globals of functions of
    other modules, the members of classes of other modules, of the objects of these what ``repr`` does not show (a
    model's weights, a large array), and a global that the function itself assigns. A global container that it fills
    makes it another function; ``functools.cache`` does not.
    """
    return fingerprint(_Contents(_module(function)).of(function))


def _module(function: Any) -> str:
    """The module of a function, or of the class of a callable object. Empty for one of Python's own."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__module__", None)
    return "" if name in (None, "builtins") else str(name)


class _Contents:
    """Values as JSON's types, seen from the module whose globals are read. An object comes once, then its number."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.seen: dict[int, tuple[int, object]] = {}  # with the object, so that no other one gets its id

    def of(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, tuple | frozenset):  # Python may keep equal ones as one object
            return self._container(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if id(value) in self.seen:
            return ["seen", self.seen[id(value)][0]]
        self.seen[id(value)] = len(self.seen), value
        if isinstance(value, list | set | dict):
            return self._container(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        return [type(value).__module__, type(value).__qualname__, self._parts(value)]

    def _parts(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return value.__name__
        if isinstance(value, types.MethodType):
            return [self.of(value.__func__), self.of(value.__self__)]
        if isinstance(value, functools.partial):
            return [self.of(value.func), self.of(value.args), self.of(value.keywords)]
        if isinstance(value, _WRAPPERS):
            return self.of(cast(Any, value).__wrapped__)
        if isinstance(value, property):
            return [self.of(value.fget), self.of(value.fset)]
        if isinstance(value, functools.cached_property):
            return self.of(value.func)
        if type(value).__module__ == self.module:
            return [self.of(type(value)), self.of(object.__getstate__(value))]
        return _ADDRESS.sub("", repr(value))

    def _container(self, value: Any) -> list[Any]:
        items = [self.of(item) for item in (value.items() if isinstance(value, dict) else value)]
        if isinstance(value, set | frozenset | dict):  # the order of a set is another in each process
            items.sort(key=json.dumps)
        return [type(value).__name__, *items]

    def _function(self, function: types.FunctionType) -> list[Any]:
        named: set[str] = set()
        if function.__module__ == self.module:
            named = set(_names(function.__code__, _LOADS_GLOBAL)) - set(_names(function.__code__, {"STORE_GLOBAL"}))
        return [
            self._code(function.__code__),
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
            [self._held(cell) for cell in function.__closure__ or ()],
            self.of(vars(function)),
            [[name, self.of(function.__globals__[name])] for name in sorted(named & function.__globals__.keys())],
        ]

    def _held(self, cell: types.CellType) -> list[Any]:
        try:
            held = cell.cell_contents
        except ValueError:  # its variable has no value yet
            return []
        return [self.of(held)]

    def _code(self, code: types.CodeType) -> list[Any]:
        # Without the names of local variables, files and lines: they change nothing.
        called = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
        constants = [self.of(constant) for constant in code.co_consts]
        return [code.co_code.hex(), code.co_exceptiontable.hex(), called, list(code.co_names), constants]

    def _class(self, value: type) -> list[Any]:
        name = [value.__module__, value.__qualname__]
        if value.__module__ != self.module:
            return name
        # A copy: to look at an instance of the class leaves __slotnames__ in it.
        members = dict(vars(value))
        own = [[key, self.of(item)] for key, item in members.items() if key not in _OF_EVERY_CLASS]
        return [*name, [self.of(base) for base in value.__bases__], own]


def _names(code: types.CodeType, operations: set[str]) -> Iterator[str]:
    """The names that these operations of a function take, with those of the functions inside it."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in operations:
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant, operations)
