"""The tables of published times: the modules of this package that have ``rows``, by name."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

from memstudy.studies.published import times

_MODULES = (module.name for module in pkgutil.iter_modules(times.__path__))
_IMPORTED = {name: import_module(f"{times.__name__}.{name}") for name in _MODULES if name != "tables"}
TABLES: dict[str, ModuleType] = {name: module for name, module in _IMPORTED.items() if hasattr(module, "rows")}
