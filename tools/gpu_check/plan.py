"""What a check consists of: its parts, in which order, and how long each may take in any case.

The budgets are for a machine of 16 cores that has compiled nothing yet.
"""

from __future__ import annotations

import os
from pathlib import Path

from tools.gpu_check import agree, bench, compile_ahead, gpu_tests, programs, repeats, summaries
from tools.gpu_check.running import Part, own_command

LIMIT, LONGER_LIMIT = 420.0, 180.0  # seconds of a whole command
RESERVE = 5.0  # of it, for the start of the command and its table
MOST_JOBS = 16


def parts(out: Path, jobs: int) -> list[Part]:
    """The check: what is right first, how fast it is then, and what the sanitizers say in the end.

    Args:
        out: folder for all files.
        jobs: processes at a time, where a part has several.
    """
    to, several = ("--out", str(out)), ("--jobs", str(jobs))
    return [
        *_first(35.0, 80.0),
        Part(
            "agree",
            own_command("agree", *to, *several),
            40,
            summaries.of_file(agree.RESULTS, agree.GOOD),
            (agree.RESULTS,),
        ),
        Part(
            "tests",
            own_command("gpu_tests", *to, *several),
            85,
            summaries.of_file(gpu_tests.RESULTS, gpu_tests.GOOD),
            (gpu_tests.RESULTS,),
        ),
        Part(
            "repeat",
            own_command("repeats", *to, *several),
            30,
            summaries.of_file(repeats.RESULTS, repeats.GOOD),
            (repeats.RESULTS,),
        ),
        _compile(25, *to, *several),
        _benchmark(out, compile_ahead.SUITE, 60),
        Part("micro", own_command("programs", "micro"), 15, summaries.figures),
        Part(
            "sanitizer",
            own_command("programs", "sanitizer", *to, "--jobs", str(max(1, jobs // 2))),
            45,
            summaries.of_file(programs.RESULTS, programs.GOOD),
            (programs.RESULTS,),
        ),
    ]


def longer_parts(out: Path, jobs: int) -> list[Part]:
    """The longer benchmark, behind what it needs: the native module, which an earlier check on the
    same machine has built, as a rule."""
    words = ("--out", str(out), "--jobs", str(jobs), "--longer")
    impls = ("--impl", "dense", "published", *bench.SUSPECTS)
    return [
        *_first(20.0, 45.0),
        _compile(30, *words),
        _benchmark(out, compile_ahead.LONGER, 80, *impls),
    ]


def _first(look: float, build: float) -> list[Part]:
    return [
        Part("machine", own_command("machine", "look"), look, summaries.machine),
        Part("build", own_command("machine", "build"), build, summaries.build),
    ]


def _compile(budget: float, *words: str) -> Part:
    return Part(
        "compile",
        own_command("compile_ahead", *words),
        budget,
        summaries.of_file(compile_ahead.RESULTS, compile_ahead.GOOD),
        (compile_ahead.RESULTS,),
    )


def _benchmark(out: Path, suite: str, budget: float, *words: str) -> Part:
    options = ("--out", str(out), "--suite", suite, "--seconds", "{seconds}", *words)
    command = own_command("bench", *options)
    return Part("bench", command, budget, summaries.benchmark, (bench.RESULTS,), last=8.0)


def usual_jobs() -> int:
    """Processes at a time: a core for each, and no more than a GPU's memory is made for.

    Example:
        >>> 1 <= usual_jobs() <= MOST_JOBS
        True
    """
    return max(1, min(MOST_JOBS, len(os.sched_getaffinity(0))))
