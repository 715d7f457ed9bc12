"""In place of torchvision, whose wheels want another torch than vLLM's: the names that are imported of it.

vLLM's multimodal classes import transformers' image processors, and those import this. Making a model and loading it
calls nothing of either, so every name of every submodule is one class without content.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.28.0"


class _Names(type):
    def __getattr__(cls, name: str) -> "_Names":
        return _unused(name)


class Unused(metaclass=_Names):
    """Every function, class and member."""


def _unused(name: str) -> _Names:
    if name.startswith("__"):
        raise AttributeError(name)
    return Unused


class _Submodules(MetaPathFinder, Loader):
    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(f"{__name__}.") else None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = _unused


sys.meta_path.append(_Submodules())
