"""The native module, bound in csrc/*/*_bind.cpp; the contract headers beside them describe the functions."""

from typing import Any

def __getattr__(name: str) -> Any: ...
