"""The command line `kithara-ray`, also `python -m kithara_ray`.

Importing this module loads neither jax, keras nor ray: each command imports what it needs when it runs. Errors of
`kithara_ray.errors` end a command with one message and exit code 1, usage errors with 2.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from kithara_ray import __version__
from kithara_ray.errors import KitharaRayError

app = typer.Typer(
    name="kithara-ray",
    help="LoRA fine-tuning of open LLMs on Cloud TPU pods with Ray, KerasHub and JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kithara-ray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log more, and show the traceback of an error.")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if debug:
        logging.getLogger("kithara_ray").setLevel(logging.DEBUG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. What is not an error of ours is a bug, and keeps its traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=given, prog_name="kithara-ray")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KitharaRayError as error:
        if "--debug" in given:
            raise
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
