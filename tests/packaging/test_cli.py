"""The console script: its commands, and one sentence for a mistake."""

from __future__ import annotations

import pytest

from rpg_kernels.cli import main


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--help"], "summary"),
        (["summary", "--help"], "resnet34"),
        (["--version"], "rpg-kernels 0."),
    ],
)
def test_help_and_version(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert text in capsys.readouterr().out


def test_summary_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "summary resnet18 --dof 2000000 --granularity 64 --stem cifar --num-classes 10"
    assert main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "layer4.1.conv2" in printed
    assert "11,157,504" in printed or "11157504" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("summary resnet18 --dof 0", "dof: got 0"),
        ("summary resnet18 --granularity 3", "granularity: got 3"),
    ],
)
def test_bad_options_end_with_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
