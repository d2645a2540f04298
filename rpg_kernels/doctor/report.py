"""The doctor's report as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rpg_kernels.law.generator import LAWS

Rows = list[tuple[str, str]]
_NAME = 20  # width of the first column

TITLES = {
    "versions": "versions",
    "machine": "machine",
    "devices": "CUDA devices",
    "compilers": "compilers found now",
    "build": "native module",
    "settings": "settings in force",
    "backends": "back ends",
    "self_tests": "self-tests",
    "proved": "back ends that prove themselves",
}


def section(name: str, part: Any, failure: str) -> str:
    """One part as text: a title, and indented lines.

    Args:
        name: of the part.
        part: its record, as ``rpg_kernels.doctor`` documents it.
        failure: why there is none, or "".
    """
    if failure:
        body = f"  FAILED: {failure}"
    elif name == "self_tests":
        body = _self_tests(part)
    else:
        body = "\n".join(f"  {label:<{_NAME}} {text}".rstrip() for label, text in ROWS[name](part))
    return f"{TITLES[name]}\n{body}\n"


def conclusion(record: dict[str, Any]) -> str:
    """The last line: whether all is well, and what is not."""
    tests = record["self_tests"] or []
    failed = sum(not test["passed"] for test in tests)
    said = f"{len(tests) - failed} of {len(tests)} self-tests pass"
    if failed:
        said += f", {failed} FAIL"
    aside = sum(bool(kept["wrong"]) for kept in (record["proved"] or {"verdicts": []})["verdicts"])
    if aside:
        said += f"; {aside} kinds of calls are kept from a back end that failed its test"
    if record["failures"]:
        said += f"; could not be examined: {', '.join(TITLES[name] for name in record['failures'])}"
    return f"{'ok' if record['ok'] else 'NOT OK'}: {said}"


def _versions(part: dict[str, Any]) -> Rows:
    commit = f"commit {part['commit']}" if part["commit"] else "not in a checkout"
    cuda = f"with CUDA {part['torch_cuda']}" if part["torch_cuda"] else "built without CUDA"
    return [
        ("rpg-kernels", f"{part['rpg_kernels']}, {commit}, sources {part['sources']}"),
        ("packing laws", _laws(part["laws"])),
        ("Python", part["python"]),
        ("torch", f"{part['torch']}, {cuda}"),
        *((name, version or "not installed") for name, version in part["packages"].items()),
    ]


def _laws(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _machine(part: dict[str, Any]) -> Rows:
    return [
        ("system", part["system"]),
        ("processor", f"{part['processor']} (torch uses {part['instruction_set']})"),
        ("cores, threads", f"{part['cores']} may be used, torch uses {part['threads']}"),
    ]


def _devices(part: dict[str, Any]) -> Rows:
    rows = [
        (
            gpu["device"],
            f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.1f} GiB",
        )
        for gpu in part["cuda"]
    ] or [("none", part["reason"])]
    return [*rows, ("NVIDIA driver", part["driver"] or "not found")]


def _compilers(part: dict[str, Any]) -> Rows:
    rows = []
    for name, tool in part.items():
        said = tool and (tool["version"] or f"FAILED: {tool['error']}")
        rows.append((name, f"{tool['path']}: {said}" if tool else "not found"))
    return rows


def _build(part: dict[str, Any]) -> Rows:
    rows = [("in use", "yes" if part["in_use"] else f"no: {part['why_not']}")]
    if part["compiler"]:
        threads = "with OpenMP" if part["openmp"] else "without OpenMP: one thread"
        isas = ", ".join(part["instruction_sets"])
        rows += [
            ("compiled by", f"{part['compiler']}, {threads}"),
            ("instruction sets", f"{isas}; used: {part['instruction_set']}"),
            ("packing laws", _laws(law for law in LAWS if law <= part["law"])),
        ]
        architectures = " ".join(part["cuda_architectures"])
        cuda = f"CUDA {part['cuda']} for {architectures}" if part["cuda"] else "not compiled"
        rows.append(("CUDA kernels", cuda))
        said = {True: "covered", False: "NOT covered by these architectures", None: "cannot tell"}
        if part["cuda"]:
            rows += [(gpu["device"], said[gpu["covered"]]) for gpu in part["gpus"]]
    return rows + [(name, part[name]) for name in ("note", "advice") if part[name]]


def _settings(part: dict[str, Any]) -> Rows:
    limits = ", ".join(
        f"{size / 2**20:g} MiB on {kind}" for kind, size in part["scratch_limit"].items()
    )
    forced = part["backend"]
    return [
        ("scratch limit", limits),
        ("back end", "chosen by the table" if forced == "auto" else f"{forced}, forced"),
        *(part["environment"].items() or [("environment", "nothing set")]),
    ]


def _backends(part: list[dict[str, Any]]) -> Rows:
    """What is chosen alike, for the same reason, is said once."""
    groups: dict[tuple[str, str | None, str], list[dict[str, Any]]] = {}
    for line in part:
        reason = line["reason"] if line["backend"] else ""  # an error's names operator and dtype
        groups.setdefault((line["device"], line["backend"], reason), []).append(line)
    rows: Rows = []
    every = len({line["op"] for line in part})
    for (device, backend, _), lines in groups.items():
        dtypes_of: dict[tuple[str, ...], list[str]] = {}
        for dtype in dict.fromkeys(line["dtype"] for line in lines):
            ops = tuple(line["op"] for line in lines if line["dtype"] == dtype)
            dtypes_of.setdefault(ops, []).append(dtype)
        for ops, dtypes in dtypes_of.items():
            which = "every operator" if len(ops) == every else ", ".join(ops)
            rows.append((device, f"{backend or 'NONE'} for {which} in {', '.join(dtypes)}"))
        rows.append(("", lines[0]["reason"]))
    return rows


def _self_tests(part: list[dict[str, Any]]) -> str:
    """A table for each device: error / bound; and a line for each failure."""
    lines = ["  error max|out - ref64| / bound 2 max|torch - ref64| + eps"]
    for device in dict.fromkeys(test["device"] for test in part):
        tests = [test for test in part if test["device"] == device]
        dtypes = list(dict.fromkeys(test["dtype"] for test in tests if test["dtype"]))
        cells = {(test["test"], test["dtype"]): test for test in tests}
        lines.append(f"  {device:<{_NAME}} " + "  ".join(f"{dtype:<17}" for dtype in dtypes))
        for name in dict.fromkeys(test["test"] for test in tests):
            if (name, None) in cells:
                found = [cells[name, None]]
            else:
                found = [cells[name, dtype] for dtype in dtypes]
            row = "  ".join(f"{_cell(test):<17}" for test in found)
            lines.append(f"  {name:<{_NAME}} {row}")
    lines = [line.rstrip() for line in lines]
    for test in part:
        if not test["passed"]:
            where = test["device"] + (f" in {test['dtype']}" if test["dtype"] else "")
            lines.append(f"  FAIL {test['test']} on {where}: {test['message']}")
    return "\n".join(lines)


def _cell(test: dict[str, Any]) -> str:
    said = "" if test["passed"] else "FAIL "
    if test["error"] is None or test["bound"] is None:
        return said.strip() or "pass"
    return f"{said}{test['error']:.1e} / {test['bound']:.1e}"


def _proved(part: dict[str, Any]) -> Rows:
    how = {"1": "tested before they are trusted", "here": "tested in the process that uses them"}
    rows = [
        ("those of GPUs", how.get(part["proving"], "not tested: RPG_KERNELS_PROVE is 0")),
        ("verdicts", part["folder"] if part["verdicts"] else f"none in {part['folder']}"),
    ]
    for kept in part["verdicts"]:
        said = f"FAILED: {kept['wrong']}" if kept["wrong"] else "passed"
        rows.append((kept["device"], f"{kept['about']}: {said}"))
    return rows


ROWS: dict[str, Callable[[Any], Rows]] = {
    "versions": _versions,
    "machine": _machine,
    "devices": _devices,
    "compilers": _compilers,
    "build": _build,
    "settings": _settings,
    "backends": _backends,
    "proved": _proved,
}


def one_line(error: BaseException) -> str:
    """Type and first line of the message; CUDA's messages have many.

    Example:
        >>> one_line(ValueError("no device\\nCompile with ...")), one_line(KeyError())
        ('ValueError: no device', 'KeyError')
    """
    said = str(error).strip().partition("\n")[0]
    name = type(error).__name__
    return f"{name}: {said}" if said else name
