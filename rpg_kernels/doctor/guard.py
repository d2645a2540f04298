"""How the doctor words an exception."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """Type and first line of the message; CUDA's messages have many.

    Example:
        >>> one_line(ValueError("no device\\nCompile with ...")), one_line(KeyError())
        ('ValueError: no device', 'KeyError')
    """
    said = str(error).strip().partition("\n")[0]
    name = type(error).__name__
    return f"{name}: {said}" if said else name
