"""The command line, through the `main` that the entry point calls."""

import kithara_ray
from kithara_ray.cli import main


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kithara-ray {kithara_ray.__version__}\n"


def test_an_unknown_command_is_a_usage_error(capsys):
    assert main(["trian"]) == 2
    assert "trian" in capsys.readouterr().err
