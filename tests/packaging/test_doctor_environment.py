"""What the doctor finds around the package: compilers, the build, GPUs, settings, back ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from doctor_tools import run, run_json, tool
from recorder import Recorder

import rpg_kernels as rpg
from rpg_kernels import native, settings
from rpg_kernels.backends import registry
from rpg_kernels.doctor import environment, report


@pytest.mark.parametrize("where", ["PATH", "CXX"])
def test_no_compiler_and_no_nvcc(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if where == "PATH":
        assert environment.compilers() == {"c++": None, "cmake": None, "nvcc": None}
        status, out = run(capsys)
        for name in ("c++", "cmake", "nvcc"):
            assert f"\n  {name:<20} not found\n" in out
    else:
        monkeypatch.setenv("CXX", "no-such-compiler -m32")
        monkeypatch.setenv("CUDACXX", "an 'open quote")
        status, record = run_json(capsys)
        assert record["compilers"]["c++"] == {
            "path": "no-such-compiler -m32",
            "version": None,
            "error": "CXX: got 'no-such-compiler', wanted a program that is there",
        }
        assert record["compilers"]["nvcc"]["error"].startswith("CUDACXX: ValueError: ")
    assert status == 0  # what could be compiled now says nothing of what is installed


def test_compilers_as_they_call_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("CUDACXX", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    compiler = tool(tmp_path / "wrapper", 'echo "one line"; echo "of $*"')
    tool(tmp_path / "cmake", "echo broken installation >&2; exit 3")
    nvcc = tool(
        tmp_path / "home" / "bin" / "nvcc", "echo nvcc: a driver; echo 'tools, release 12.6, V1'"
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    monkeypatch.setenv("CXX", "wrapper -m64")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert environment.compilers() == {
        "c++": {"path": f"{compiler} -m64", "version": "one line", "error": ""},
        "cmake": {
            "path": str(tmp_path / "cmake"),
            "version": None,
            "error": "exit status 3: broken installation",
        },
        "nvcc": {"path": str(nvcc), "version": "tools, release 12.6, V1", "error": ""},
    }
    out = run(capsys)[1]
    assert f"{tmp_path / 'cmake'}: FAILED: exit status 3: broken installation\n" in out


@pytest.mark.parametrize("script", ["exec sleep 60", "", "exec no-such-program"])
def test_a_compiler_that_does_not_answer(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_SECONDS", 0.3)
    monkeypatch.setenv("CXX", str(tool(tmp_path / "cxx", script)))
    found = environment.compilers()["c++"]
    assert found["version"] is None
    wanted = {"exec sleep 60": "TimeoutExpired", "": "it says no version"}
    assert wanted.get(script, "exit status 127") in found["error"]


def test_what_was_not_built_comes_with_a_reason_and_a_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = "no C++ compiler was found when it was installed; install g++, then `pip install x`"
    switched = "RPG_KERNELS_BUILD=python was set when it was installed"
    for reason in (recorded, switched):
        monkeypatch.setattr(native, "_load", lambda reason=reason: (None, reason))
        monkeypatch.setattr(native, "_enabled", True)
        status, record = run_json(capsys)
        assert status == 0  # the pure installation is sound
        build = record["build"]
        assert build["in_use"] is False
        assert build["why_not"] == reason
        assert (build["compiler"], build["cuda"], build["instruction_sets"]) == (None, None, [])
        assert ("pip install" in build["advice"]) is (reason == switched)
        assert "law in C++" not in {test["test"] for test in record["self_tests"]}
        assert f"no: {reason}\n" in run(capsys)[1]
        monkeypatch.setattr(native, "_enabled", False)
        build = environment.build()
        assert (build["why_not"], build["note"]) == ("RPG_KERNELS_NATIVE=0 is set", reason)


GPU = {"device": "cuda:0", "name": "GPU", "capability": "8.9", "memory_bytes": 24 << 30}


@pytest.mark.parametrize(
    ("architectures", "covered"),
    [("80-real 90a-real", True), ("90a-real 120", False), ("native", None), ("90 75", True)],
)
def test_whether_the_gpu_is_among_the_architectures(
    architectures: str, covered: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {
        "law": 1,
        "compiler": "GNU 12.2.0",
        "openmp": False,
        "isas": ["avx2"],
        "isa": "avx2",
        "cuda": "13.0.88",
        "cuda_architectures": architectures,
    }
    monkeypatch.setattr(native, "build_info", lambda: info)
    monkeypatch.setattr(environment, "_no_cuda", lambda: "")
    monkeypatch.setattr(environment, "_cuda_devices", lambda: [GPU])
    build = environment.build()
    assert build["gpus"] == [{"device": "cuda:0", "covered": covered}]
    assert ("RPG_KERNELS_CUDA_ARCHITECTURES" in build["advice"]) is (covered is False)
    text = report.section("build", build, "")
    said = {True: "covered", False: "NOT covered by these architectures", None: "cannot tell"}
    assert f"  {'cuda:0':<20} {said[covered]}\n" in text
    assert f"CUDA 13.0.88 for {architectures}" in text
    text = report.section("devices", environment.devices(), "")
    assert "GPU, capability 8.9, 24.0 GiB" in text


@pytest.mark.parametrize(
    ("architectures", "runs_on", "not_on"),
    [
        ("80-real", "8.0 8.6 8.9", "7.5 9.0 12.0"),
        ("86-real", "8.6 8.9", "8.0 9.0"),
        ("90a-real", "9.0", "8.9 9.1 10.0 12.0"),
        ("90a", "9.0", "10.0 12.0"),
        ("100f-real", "10.0 10.3", "9.0 11.0 12.0"),
        ("120", "12.0 12.1 13.0", "10.0"),
        ("80-virtual", "8.0 9.0 12.0", "7.5"),
        ("80-real 90a-real 120", "8.6 9.0 12.0 12.1", "7.5 10.0"),
        ("", "", "9.0"),
    ],
)
def test_compute_capabilities(architectures: str, runs_on: str, not_on: str) -> None:
    names = architectures.split()
    assert all(native.covers(names, capability) is True for capability in runs_on.split())
    assert all(native.covers(names, capability) is False for capability in not_on.split())
    assert native.covers(["all-major", *names], "5.0") is None


@pytest.mark.parametrize("visible", [None, ""])
def test_why_there_is_no_cuda_device(
    visible: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_driver() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    shown = "" if visible is None else " (CUDA_VISIBLE_DEVICES='' is set)"
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    wanted = "RuntimeError: Found no NVIDIA driver on your system."
    assert environment.devices()["reason"] == wanted + shown
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert environment.devices()["reason"] == "none is visible" + shown
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    wanted = f"torch {torch.__version__} is built without CUDA"
    assert environment.devices()["reason"] == wanted
    assert environment.torch_devices() == [torch.device("cpu")]
    assert f"none                 {wanted}\n" in run(capsys)[1]


def test_the_driver_as_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    tool(tmp_path / "nvidia-smi", "echo 580.65.06; echo 580.65.06")
    assert environment.devices()["driver"] == "580.65.06"


def test_environment_variables_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RPG_KERNELS_NATIVE", "1")
    monkeypatch.setenv("SOME_TOKEN", "secret")
    status, out = run(capsys)
    assert status == 0
    assert f"\n  {'RPG_KERNELS_NATIVE':<20} 1\n" in out
    assert "secret" not in out
    assert environment.settings_in_force()["environment"]["RPG_KERNELS_NATIVE"] == "1"
    with rpg.scratch_limit(123 << 20, "cpu"), rpg.backend("reference"):
        text = report.section("settings", environment.settings_in_force(), "")
    assert "123 MiB on cpu, 16 MiB on cuda" in text
    assert "reference, forced" in text


def test_an_environment_that_names_no_back_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one thing that is wrong is said once; the rest is examined as without it."""
    monkeypatch.setattr(settings, "_ENVIRONMENT", "cudnn")
    status, record = run_json(capsys)
    assert status == 1
    assert set(record["failures"]) == {"settings"}
    assert "RPG_KERNELS_BACKEND: got 'cudnn', wanted one of auto" in record["failures"]["settings"]
    assert all(test["passed"] for test in record["self_tests"])
    assert None not in [line["backend"] for line in record["backends"]]
    status, out = run(capsys)
    assert out.count("FAIL") == 1
    assert out.endswith("pass; could not be examined: settings in force\n")
    assert settings.forced_backend() == "cudnn"  # nothing else is left forced


def test_back_ends_of_a_table_with_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Recorder(lambda call: call.op == "linear" and call.dtype == torch.bfloat16)
    monkeypatch.setattr(native, "_enabled", False)
    registry.register(recorder, before="reference")
    try:
        text = report.section("backends", environment.backends(), "")
    finally:
        registry.unregister("recorder")
    assert f"  {'cpu':<20} recorder for linear in bfloat16\n  {'':<20} a recorder" in text
    assert "reference for every operator in float64, float32\n" in text
    assert "reference for every operator in float16\n" in text  # which no recorder takes
    assert "reference for linear_input_grad, linear_bank_grad, conv2d" in text


def test_a_compiled_module_that_does_not_load_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "the native module cannot be loaded: file too short"
    monkeypatch.setattr(native, "_load", lambda: (None, said))
    with pytest.raises(RuntimeError, match=said):
        environment.build()
    monkeypatch.setattr(native, "_load", lambda: (None, "no C++ compiler was found"))
    assert environment.build()["why_not"] == "no C++ compiler was found"
