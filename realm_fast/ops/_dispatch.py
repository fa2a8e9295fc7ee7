"""Choosing an implementation. Only impl="auto" chooses; a named one runs or raises, listing every reason."""

from collections.abc import Callable, Mapping

# For each implementation, in order of preference: why it cannot take this call, or None when it can.
Reasons = Mapping[str, Callable[[], str | None]]


def choose_impl(op: str, impl: str, candidates: Reasons) -> str:
    """Returns the implementation to run.

    Args:
        op: the op's name, for messages.
        impl: "auto" or a key of `candidates`.
        candidates: implementation name -> function giving the reason it cannot take this call, or None.

    Raises:
        ValueError: `impl` is unknown, or it (or, for "auto", every candidate) cannot take this call.
    """
    if impl != "auto" and impl not in candidates:
        raise ValueError(f"impl: expected one of {', '.join(['auto', *candidates])}, got {impl!r}")
    reasons = {}
    for name, unsupported_reason in candidates.items():
        reason = unsupported_reason()
        if reason is None and impl in ("auto", name):
            return name
        reasons[name] = reason
    lines = "".join(f"\n  {name}: {reason or 'can take this call'}" for name, reason in reasons.items())
    raise ValueError(f"{op}: impl={impl!r} cannot take this call:{lines}")
