"""The machine code of the CUDA sources, without a GPU: nvcc compiles, nvdisasm reads it back.

Code is asked for with line numbers, which changes no instruction of it. So every instruction knows
the lines of the source that it comes from, and loops of the machine code find their names there.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CUDA = CSRC / "cuda"
_PTXAS = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.S,
)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def nvdisasm() -> str | None:
    """Its path: nvcc's own, otherwise that of Triton's wheel."""
    found = shutil.which("nvdisasm")
    spec = importlib.util.find_spec("triton")
    if not found and spec and spec.origin:
        wheel = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(wheel) if os.access(wheel, os.X_OK) else None
    return found


@dataclass(frozen=True)
class Line:
    """A line of a source file."""

    file: str
    number: int


@dataclass
class Instruction:
    """One instruction, and the lines it comes from, the innermost call first."""

    text: str
    lines: tuple[Line, ...]

    @property
    def opcode(self) -> str:
        """Such as ``LDS.128``."""
        return re.sub(r"^@!?\w+\s+", "", self.text).split()[0]


@dataclass
class Loop:
    """A natural loop; ``body`` are indices of instructions, of nested loops too."""

    header: int
    body: set[int]
    nested: list[Loop] = field(default_factory=list)

    @property
    def own(self) -> set[int]:
        """Instructions of no nested loop."""
        return self.body.difference(*(loop.body for loop in self.nested))


@dataclass
class Kernel:
    """A kernel for one architecture."""

    name: str  # such as linear_kernel<Bfloat16, 8>
    instructions: list[Instruction]
    labels: dict[str, int]

    def loops(self) -> list[Loop]:
        """Natural loops, those that hold others before them."""
        return _loops(self)

    def count(self, pattern: str, where: set[int] | None = None) -> int:
        """Instructions whose opcode matches."""
        chosen = range(len(self.instructions)) if where is None else where
        return sum(bool(re.match(pattern, self.instructions[i].opcode)) for i in chosen)


def readable(mangled: Sequence[str]) -> list[str]:
    """``linear_kernel<Bfloat16, 8>`` and such, of what the compiler calls them."""
    done = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True)
    out = []
    for line in done.stdout.splitlines():
        name = line.replace("(anonymous namespace)::", "").split("(")[0]
        name = name.removeprefix("void ").replace("rpg::cuda::", "").replace("rpg::", "")
        out.append(name)
    return out


def compile_source(source: Path, architecture: str, out: Path) -> str:
    """Compile one file to ``out``; returns what ptxas says.

    Raises:
        RuntimeError: with the compiler's words.
    """
    command = [
        "nvcc",
        f"-arch=sm_{architecture}",
        "-std=c++17",
        "-O3",
        "-cubin",
        "-lineinfo",
        f"-I{CSRC}",
    ]
    done = subprocess.run(
        [*command, "-Xptxas=-v", "-Werror=all-warnings", "-o", str(out), str(source)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stderr


def usage_of(ptxas: str) -> dict[str, tuple[int, int]]:
    """(registers, bytes of stack and spills) of each kernel."""
    found = _PTXAS.findall(ptxas)
    numbers = [tuple(map(int, rest)) for _, *rest in found]
    names = readable([name for name, *_ in found])
    return {
        name: (registers, stack + stores + loads)
        for name, (stack, stores, loads, registers) in zip(names, numbers, strict=True)
    }


def kernels(cubin: Path) -> dict[str, Kernel]:
    """The kernels of a compiled file, by their readable names."""
    tool = nvdisasm()
    assert tool
    text = subprocess.run(
        [tool, "-c", "-gi", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    sections = [
        section
        for section in re.split(r"^\s*\.section\s+", text, flags=re.M)
        if section.startswith(".text.")
    ]
    names = readable([section[6 : section.index(",")] for section in sections])
    out = {}
    for name, section in zip(names, sections, strict=True):
        if name.split("<")[-1].startswith("Float16"):  # as Bfloat16
            continue
        # Functions that are not inlined come behind the kernel.
        main = re.split(r"^\$\S+:$", section, maxsplit=1, flags=re.M)[0]
        out[name] = Kernel(name, *_parse(main))
    return out


def _parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    lines: list[Line] = []
    fresh = False
    for line in text.splitlines():
        if line.lstrip().startswith("//## File"):
            if not fresh:
                lines = []
            fresh = True
            path, number = _FRAME.findall(line)[0]
            lines.append(Line(Path(path).name, int(number)))
        elif match := re.match(r"^(\.L_\w+):", line):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(Instruction(match[1], tuple(lines)))
            fresh = False
    return instructions, labels


def _successors(kernel: Kernel, i: int) -> Iterator[int]:
    """Instructions that may follow instruction i."""
    text = kernel.instructions[i].text
    opcode = kernel.instructions[i].opcode
    target = re.search(r"`\((\.L_\w+)\)", text)
    sure = not text.startswith("@")
    if opcode.startswith(("EXIT", "RET")) and sure:
        return
    if opcode.startswith("BSYNC") and i + 1 not in kernel.labels.values():
        register = text.split()[-1]
        for j in range(i, -1, -1):  # where the code that waits together goes on
            if re.search(rf"BSSY\S*\s+{register},", kernel.instructions[j].text):
                at = re.search(r"`\((\.L_\w+)\)", kernel.instructions[j].text)
                assert at
                yield kernel.labels[at[1]]
                return
    # A warp whose lanes have parted takes BRA.DIV, which here none does. Compilers use CALL for far
    # jumps too; a function's label is not a local one.
    if target and opcode.startswith(("BRA", "CALL")) and not opcode.startswith("BRA.DIV"):
        yield kernel.labels[target[1]]
        if sure and not re.search(r"^\S+\s+!?U?P\d", text):
            return
    if i + 1 < len(kernel.instructions):
        yield i + 1


def _loops(kernel: Kernel) -> list[Loop]:
    count = len(kernel.instructions)
    after = [list(_successors(kernel, i)) for i in range(count)]
    order: list[int] = []  # reachable, so that most come behind what leads to them
    seen = {0}
    stack = [(0, iter(after[0]))]
    while stack:
        i, rest = stack[-1]
        for j in rest:
            if j not in seen:
                seen.add(j)
                stack.append((j, iter(after[j])))
                break
        else:
            order.append(i)
            stack.pop()
    order.reverse()
    rank = {i: k for k, i in enumerate(order)}
    before: dict[int, list[int]] = {i: [] for i in order}
    for i in order:
        for j in after[i]:
            before[j].append(i)
    # Immediate dominators (Cooper, Harvey and Kennedy).
    dominator = {0: 0}

    def common(a: int, b: int) -> int:
        while a != b:
            while rank[a] > rank[b]:
                a = dominator[a]
            while rank[b] > rank[a]:
                b = dominator[b]
        return a

    changed = True
    while changed:
        changed = False
        for i in order[1:]:
            known = [j for j in before[i] if j in dominator]
            new = known[0]
            for j in known[1:]:
                new = common(new, j)
            if dominator.get(i) != new:
                dominator[i] = new
                changed = True

    bodies: dict[int, set[int]] = {}
    for i in order:
        for header in after[i]:
            above = i
            while rank[above] > rank[header]:
                above = dominator[above]
            if above != header:
                continue
            body = bodies.setdefault(header, {header})
            todo = [i]
            while todo:
                j = todo.pop()
                if j not in body:
                    body.add(j)
                    todo.extend(before[j])
    loops = [
        Loop(h, b) for h, b in sorted(bodies.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    for i, inner in enumerate(loops):
        holders = [outer for outer in loops[:i] if inner.body < outer.body]
        if holders:
            min(holders, key=lambda outer: len(outer.body)).nested.append(inner)
    return loops


def never_run(kernel: Kernel, known: set[int]) -> set[int]:
    """Instructions that do not run where the ``known`` ones never do.

    One that is only reached from such, or from which every way leads to such.
    """
    count = len(kernel.instructions)
    after = [list(_successors(kernel, i)) for i in range(count)]
    before: list[list[int]] = [[] for _ in range(count)]
    for i, following in enumerate(after):
        for j in following:
            before[j].append(i)
    out, todo = set(known), list(known)
    while todo:
        i = todo.pop()
        near = [j for j in after[i] if all(k in out for k in before[j])]
        near += [j for j in before[i] if all(k in out for k in after[j])]
        for j in near:
            if j not in out:
                out.add(j)
                todo.append(j)
    return out


@dataclass(frozen=True)
class Region:
    """Lines of a source file."""

    file: str
    first: int
    last: int

    def holds(self, line: Line) -> bool:
        """Whether a line is one of them."""
        return line.file == self.file and self.first <= line.number <= self.last


def region(file: str, opening: str, nth: int = 0, until: str = "") -> Region:
    """From the n-th line that holds ``opening`` to its closing brace, or to a line with ``until``.

    Raises:
        LookupError: the source has no such line.
    """
    lines = (CUDA / file).read_text("utf-8").splitlines()
    found = [i for i, line in enumerate(lines) if opening in line]
    if len(found) <= nth:
        raise LookupError(f"{file} has no {opening!r}")
    depth = 0
    for i in range(found[nth], len(lines)):
        depth += lines[i].count("{") - lines[i].count("}")
        stop = (
            until in lines[i] if until else depth == 0 and "{" in "".join(lines[found[nth] : i + 1])
        )
        if stop:
            return Region(file, found[nth] + 1, i + 1)
    raise LookupError(f"{file}: {opening!r} does not end")


def name_of(instruction: Instruction, regions: dict[str, list[Region]]) -> str:
    """The region of the innermost of its lines that is in any, the smallest there; or ""."""
    for line in instruction.lines:
        held = [
            (part.last - part.first, name)
            for name, parts in regions.items()
            for part in parts
            if part.holds(line)
        ]
        if held:
            return min(held)[1]
    return ""


def loop_name(kernel: Kernel, loop: Loop, regions: dict[str, list[Region]]) -> str:
    """The region that a loop's way back comes from."""
    back = max(i for i in loop.body if loop.header in _successors(kernel, i))
    return name_of(kernel.instructions[back], regions)
