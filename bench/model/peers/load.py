"""A peer's modules without its package: the files that hold its kernels, loaded as they stand where the package was installed.

Importing a serving engine takes a GPU, its compiled extensions and some hundred dependencies. Its kernels and the functions that
launch them take Triton and torch. So nothing but the modules that are named is executed, found by the place of the top package;
every other module of the package is an absent one, and so is a third party's that is not installed. An absent name may be looked
up, inherited from and called while modules load, where it gives something false. It raises as soon as a step calls it, so that no
stub takes part in what is modelled. Which modules were absent is reported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple


class Package(NamedTuple):
    """modules: what is executed, under short names. beside: modules that these need executed too. stands_in: for a module of the
    package, the names that stand in for its own. third_party: packages that may be missing."""

    name: str
    modules: Mapping[str, str]
    beside: Sequence[str] = ()
    stands_in: Mapping[str, Mapping[str, object]] = {}
    third_party: Sequence[str] = ()


def version(name: str) -> str | None:
    """Of an installed package; None where there is none."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


@contextlib.contextmanager
def loaded(package: Package) -> Iterator[tuple[SimpleNamespace, list[str]]]:
    """(the modules by their short names, names of the absent ones). Modules that are imported within it, from a function of the
    package say, are found by the same rules. Afterwards the interpreter knows none of them any more."""
    finder = _Finder(package)
    own = {name: sys.modules.pop(name) for name in list(sys.modules) if finder.covers(name)}
    sys.meta_path.insert(0, finder)
    try:
        found = {short: importlib.import_module(name) for short, name in package.modules.items()}
        finder.state.loading = False
        yield SimpleNamespace(**found), finder.absent
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if finder.covers(name)]:
            del sys.modules[name]
        sys.modules.update(own)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: Package):
        self.package = package
        self.executed = {*package.modules.values(), *package.beside}
        self.folder = Path(next(iter(importlib.util.find_spec(package.name).submodule_search_locations)))
        self.missing = {name for name in package.third_party if importlib.util.find_spec(name) is None}
        self.absent: list[str] = []
        self.state = SimpleNamespace(loading=True)

    def covers(self, name: str) -> bool:
        top = name.partition(".")[0]
        return top == self.package.name or top in self.missing

    def find_spec(self, name, path=None, target=None):
        if not self.covers(name):
            return None
        if name in self.executed:
            return importlib.machinery.PathFinder.find_spec(name, path)
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [str(self.folder.joinpath(*name.split(".")[1:]))]
        return spec

    def create_module(self, spec):
        if spec.name in self.package.stands_in:
            return _filled(ModuleType(spec.name), self.package.stands_in[spec.name])
        if any(name.startswith(spec.name + ".") for name in self.executed):
            return ModuleType(spec.name)  # a package of which something is executed, without what its own file does
        self.absent.append(spec.name)
        return _AbsentModule(spec.name, self.state)

    def exec_module(self, module):
        pass


def _filled(module: ModuleType, names: Mapping[str, object]) -> ModuleType:
    vars(module).update(names)
    return module


class _AbsentModule(ModuleType):
    def __init__(self, name: str, state: SimpleNamespace):
        super().__init__(name)
        self.__dict__["_state"] = state

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}", self._state)


class _Base:
    def __init_subclass__(cls, **options):
        pass


class _Absent:
    """A name of an absent module."""

    def __init__(self, name: str, state: SimpleNamespace):
        self._name, self._state = name, state

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._name}.{name}", self._state)

    def __call__(self, *args, **kwargs):
        if self._state.loading:
            return self
        raise RuntimeError(f"{self._name}: a step calls what was not loaded")

    def __bool__(self) -> bool:
        return False

    def __mro_entries__(self, bases):
        return (_Base,)

    def __or__(self, other):
        return self

    __ror__ = __getitem__ = __or__
