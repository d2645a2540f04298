"""Is this installation sound? ``rpg-kernels doctor`` looks, computes, and says.

With ``--json`` it prints one JSON object and nothing else. Keys are added, not renamed or
removed, while ``format`` stays the same; a part that could not be examined is null and has its
message in ``failures``. Where RPG_KERNELS_BACKEND names no back end, that part is ``settings``, and
the rest is examined as without the variable::

    format      1
    ok          true when every self-test passed and every part could be examined
    failures    {part: message}
    versions    {rpg_kernels, commit (of a checkout, or null), sources (a hash), law (1), laws (a
                 list of all), python, torch, torch_cuda (null: built without), packages: {name:
                 version, null: not there}}
    machine     {system, processor, instruction_set (torch's), cores, threads (torch's)}
    devices     {cuda: [{device, name, capability, memory_bytes}], driver (or null),
                 reason (why there is no CUDA device, or "")}
    compilers   {"c++", cmake, nvcc: null (not found) or {path, version (or null), error}}
    build       {in_use, why_not, law (the last that it knows), compiler, openmp,
                 instruction_sets, instruction_set (in use), cuda, cuda_architectures, note, advice,
                 gpus: [{device, covered (null: cannot be told)}]}; where nothing was compiled null
                 or empty from law to cuda_architectures
    settings    {scratch_limit: {cpu, cuda}, backend ("auto" or the one forced),
                 environment: {variable: value}}
    backends    [{op, device, dtype, backend (null: none can run it), reason}]
    self_tests  [{test, device, dtype (null: the law), passed, error, bound, message}]; test is an
                operator or an implementation of the law; error, max|out - ref64|, and bound,
                2 max|torch - ref64| + eps, are null where nothing finite was computed
    proved      {proving ("1", "0" or "here"), folder, verdicts: [{device, about (back end, call),
                 wrong ("": its test passed; otherwise it is left aside for such calls)}]}
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

from rpg_kernels.backends import dispatch
from rpg_kernels.doctor import environment, report, selftest
from rpg_kernels.doctor.report import one_line

__all__ = ["add_arguments", "examine", "run"]

FORMAT = 1
PARTS: dict[str, Callable[[], Any]] = {
    "versions": environment.versions,
    "machine": environment.machine,
    "devices": environment.devices,
    "compilers": environment.compilers,
    "build": environment.build,
    "settings": environment.settings_in_force,
    "backends": environment.backends,
    "self_tests": selftest.self_tests,
    "proved": environment.proved,
}  # in the order of printing: should a self-test kill the process, nearly all has been said


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of ``rpg-kernels doctor`` on ``parser``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit status is 0 when all is well and 1 otherwise."""
    if args.json:
        record = examine()
        print(json.dumps(record, indent=2, allow_nan=False))
    else:
        record = examine(_print)
        _print(report.conclusion(record))
    return 0 if record["ok"] else 1


def examine(show: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The report as the record described above.

    Args:
        show: called with each part as text as soon as it is known.

    Example:
        >>> record = examine()
        >>> record["ok"], record["versions"]["laws"]
        (True, [1, 3])
    """
    failures: dict[str, str] = {}
    record: dict[str, Any] = {"format": FORMAT, "ok": False, "failures": failures}
    with contextlib.ExitStack() as until_the_end:
        for name, part in PARTS.items():
            try:
                record[name] = part()
            except Exception as error:
                record[name] = None
                failures[name] = one_line(error)
            if name == "settings" and name in failures:  # so that the rest can be examined
                until_the_end.enter_context(dispatch.backend("auto"))
            if show is not None:
                show(report.section(name, record[name], failures.get(name, "")))
    tests = record["self_tests"] or []
    record["ok"] = not failures and bool(tests) and all(test["passed"] for test in tests)
    return record


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
