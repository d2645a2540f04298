"""One name for one thing in csrc: by regular expressions, without a compiler."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[3]
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*.*") if path.is_file())

# Words that do not say what a thing is. Not among them: out, for output, and none, a value.
FORBIDDEN = frozenset(
    re.findall(
        r"\w+",
        """
        to of on from at by behind before after past with without into onto up down across above
        below beyond between beside besides under over off until since within through per than as
        about around along near
        any all each both one other others another mine its it that these those them what which
        who whose some most more few many such same here there
        """,
    )
)

# Interfaces that several types have, or that a device of each kind has.
MEMBER_TYPES = {"Bits", "Compute", "Number"}  # what templates ask a type for
DEVICES = {"Shared": {"cuda/device.h", "simt/device.h"}}  # a GPU's, and one that is checked

COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.S)
TYPE = re.compile(
    r"^\s*(?:template\s*<[^{;]*>\s*)?(?:struct|class|enum class|enum|union)\s+"
    r"(?:alignas\(.*?\)+\s*)?(\w+)[^;{()]*\{",
    re.M,
)
ALIAS = re.compile(r"^\s*using\s+(\w+)\s*=\s*([^;]+);", re.M)
TYPEDEF = re.compile(r"^\s*typedef\s+[\w\s:<>]+?(\w+)\s+__attribute__", re.M)


def code(text: str) -> str:
    """The text without comments, strings and includes, with as many lines."""
    text = re.sub(r"^#include.*$", "", text, flags=re.M)
    return COMMENT_OR_STRING.sub(lambda found: "\n" * found[0].count("\n"), text)


def twice(sources: dict[str, str]) -> dict[str, set[str]]:
    """Names of types that several places define, and where.

    An alias may stand in several functions where it means the same in all.
    """
    places: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for file, text in sources.items():
        for pattern in (TYPE, TYPEDEF):
            for found in pattern.finditer(text):
                places[found[1]].append((file, f"{file}:{found.start()}"))
        for found in ALIAS.finditer(text):
            places[found[1]].append((file, " ".join(found[2].split())))
    out = {}
    for name, defined in places.items():
        files = {file for file, _ in defined}
        several = len({meaning for _, meaning in defined}) > 1
        if several and name not in MEMBER_TYPES and DEVICES.get(name) != files:
            out[name] = files
    return out


def bare(text: str) -> set[str]:
    """Identifiers that are a bare preposition or pronoun, as constants and members too."""
    found = set()
    for word in re.findall(r"\b[A-Za-z_]\w*\b", text):
        stem = re.sub(r"^k(?=[A-Z])", "", word).rstrip("_").lower()
        if stem in FORBIDDEN:
            found.add(word)
    return found


def test_every_type_is_defined_once() -> None:
    files = {
        str(path.relative_to(ROOT / "csrc")): code(path.read_text("utf-8")) for path in SOURCES
    }
    assert len(files) > 30
    assert twice(files) == {}


def test_identifiers_say_what_a_thing_is() -> None:
    found = {
        str(path.relative_to(ROOT)): words
        for path in SOURCES
        if (words := bare(code(path.read_text("utf-8"))))
    }
    assert found == {}


def test_what_the_tests_above_would_find() -> None:
    one = code("template <int N>\nstruct alignas(N * sizeof(T)) Window {\n};  // class Layout {\n")
    other = code("class Window : public Base {\n")
    assert twice({"a.h": one, "b.h": other}) == {"Window": {"a.h", "b.h"}}
    assert twice({"a.h": "  using L = int;\n", "b.h": "using L = int;\n"}) == {}
    assert twice({"a.h": "using L = int;\n", "b.h": "using L = long;\n"}) == {"L": {"a.h", "b.h"}}
    assert twice({"a.h": "struct Image;\n", "b.h": "struct Image {\n"}) == {}
    assert twice({"simt/device.h": "class Shared {\n", "cpu/a.h": "class Shared {\n"})
    assert bare(code('int at = row.of_lane; // from\nf("to");\nint OF, kOf, of_;')) == {
        "at", "OF", "kOf", "of_",
    }  # fmt: skip
