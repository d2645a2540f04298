"""Pages of docs/ that hold tables written by a command."""

from __future__ import annotations


def replaced(text: str, name: str, table: str) -> str:
    """``text`` with another table between the marks of ``name``."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    head, rest = text.split(begin)
    return head + begin + table + "\n" + end + rest.split(end)[1]
