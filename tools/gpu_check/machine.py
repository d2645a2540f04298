"""The machine, and the native module on it.

    python -m tools.gpu_check.machine look|build

The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from tools.gpu_check import programs
from tools.gpu_check.running import NOTHING_CODE, ROOT


def look() -> int:
    """Versions, and the GPU's state as nvidia-smi gives it."""
    import torch

    from benchmarks.harness.machine import environment

    fields = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used"
    smi = _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"])
    versions = _output(["nvcc", "--version"]).splitlines()[-1:]
    show(environment=environment(torch.device("cuda")), nvidia_smi=smi, nvcc=versions)
    return 0


def build() -> int:
    """The native module beside the sources, unless one that serves is there, and the programs of
    microbenchmarks, whose compilers run at the same time."""
    if not (ROOT / "csrc").is_dir():
        show(said="no csrc: this version has no native part")
        return NOTHING_CODE
    ahead = threading.Thread(target=compile_ahead)
    ahead.start()
    code, said = native_module()
    ahead.join()
    show(said=said)
    return code


def compile_ahead() -> None:
    """Compile the microbenchmarks for later parts, which say what went wrong."""
    if programs.compiler() is not None:
        programs.compiled(programs.architecture())


def native_module() -> tuple[int, str]:
    """(exit status, what is there): a module that serves is taken as it is, else it is built."""
    why = module_lacks()
    if not why:
        return 0, f"a module that was compiled before serves: {module_is()}"
    print(f"building, as {why}", flush=True)
    environment = {**os.environ}
    nvcc = programs.compiler()
    if nvcc is None:
        print("no nvcc: the module will have no CUDA kernels", flush=True)
    else:
        environment.setdefault("CUDACXX", nvcc)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    print(done.stdout[-20_000:], flush=True)
    if done.returncode:
        last = [line for line in done.stdout.splitlines() if line.strip()][-2:]
        return 1, f"the build failed: {' '.join(last)[:600]}"
    why = module_lacks()
    if why:
        return 1, f"built, but {why}"
    return 0, f"built: {module_is()}"


def module_lacks() -> str:
    """Why the module beside the sources does not serve this Python and this GPU, or ""."""
    return _asked(
        "import torch; from rpg_kernels import native\n"
        "if not native.available(): answer = native.why_not()\n"
        "elif not native.build_info()['cuda']: answer = 'the native module has no CUDA kernels'\n"
        "else:\n"
        "    built = native.build_info()['cuda_architectures']\n"
        "    capability = '{}.{}'.format(*torch.cuda.get_device_capability())\n"
        "    serves = native.covers(built.split(), capability) is not False\n"
        "    answer = '' if serves else f'its kernels are for {built}, not for {capability}'\n"
    )


def module_is() -> str:
    """Compiler and architectures of the module beside the sources."""
    return _asked(
        "from rpg_kernels import native; i = native.build_info()\n"
        "answer = f\"{i['compiler']}, CUDA {i['cuda']} for {i['cuda_architectures']}\"\n"
    )


def _asked(code: str) -> str:
    """``answer`` of code that runs in another process, which may fail to import the module, or
    die of it."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint('answer: ' + ' '.join(answer.split()))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
    )
    for line in done.stdout.splitlines():
        if line.startswith("answer:"):
            return line.removeprefix("answer:").strip()
    last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return f"the native module cannot be asked: {last[0]}"


def show(**values: Any) -> None:
    """One line of JSON."""
    print(json.dumps(values), flush=True)


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("look", "build"))
    args = parser.parse_args(arguments)
    return {"look": look, "build": build}[args.what]()


if __name__ == "__main__":
    sys.exit(main())
