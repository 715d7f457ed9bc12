"""A tensor-parallel forward pass that proves shards equal to the model. Shares no code with rules, layouts and plans.

`tpshard.verify` is the verb as well: calling this package calls `tpshard.verifying.verify`. Importing any module of it
puts the package where the verb would be, so the package itself has to answer.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    """A package that can be called."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from tpshard.api.verify import verify

        return verify(*arguments, **options)


sys.modules[__name__].__class__ = _Verb
