"""The command line, through the `main` that the entry point calls."""

import subprocess
import sys

import pytest

import kithara_ray
from kithara_ray.cli.app import app, main


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kithara-ray {kithara_ray.__version__}\n"


def test_an_unknown_command_is_a_usage_error(capsys):
    assert main(["trian"]) == 2
    assert "trian" in capsys.readouterr().err


def test_an_error_of_ours_is_one_message_and_exit_code_1(tmp_path):
    command = [sys.executable, "-m", "kithara_ray", "train", str(tmp_path / "nothing.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'nothing.yaml'}: cannot be read")
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("command", [command.name or command.callback.__name__ for command in app.registered_commands])
def test_every_command_has_help_with_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert "kithara-ray" in capsys.readouterr().out.partition("Example")[2]
