"""The command line `kithara-ray`, also available as `python -m kithara_ray`.

Importing this module loads neither jax, keras nor ray; each command imports its modules when it runs. An error of
`kithara_ray.errors` ends a command with one message and exit code 1; a usage error ends it with 2.
"""

import importlib.resources
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kithara_ray import __version__
from kithara_ray.errors import ConfigError, KitharaRayError
from kithara_ray.redact import redact

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
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log more, and show the traceback of an error.")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if debug:
        logging.getLogger("kithara_ray").setLevel(logging.DEBUG)


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; `kithara-ray init` writes one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value: trainer.steps=10; may be repeated."),
]


def _driver_environment() -> None:
    """Keep this process on the CPU: it must not take the accelerator from the workers on its host."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="CONFIG", help="The file to write.")] = Path("kithara_ray.yaml"),
) -> None:
    """Write a commented configuration to start from.

    Example: kithara-ray init my_run.yaml
    """
    text = importlib.resources.files("kithara_ray").joinpath("template.yaml").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists; remove it or give another name") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); give another name") from error
    typer.echo(f"{path}: fill in model, source and exports; then `kithara-ray doctor {path}`")


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A YAML file; without one, the cluster alone.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check configuration, base, data, destinations and cluster, without training and without waiting.

    Example: kithara-ray doctor my_run.yaml
    """
    _driver_environment()
    from kithara_ray.cli import doctor as checks

    findings = checks.diagnose(config, overrides or ())
    checks.show(findings, Console())
    if any(finding.error is not None for finding in findings):
        raise typer.Exit(1)


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the run in CONFIG, then write its exports.

    Example: kithara-ray train my_run.yaml --set trainer.steps=10
    """
    _driver_environment()
    from kithara_ray import config as configuration

    result, exports = configuration.build(configuration.load(config, overrides or ())).run()
    typer.echo(f"loss {result.history[0]['loss']:.4f} -> {result.history[-1]['loss']:.4f}, run: {result.path}")
    for destination in exports:
        typer.echo(f"exported {destination}")


@app.command()
def tune(config: ConfigPath, overrides: Overrides = None) -> None:
    """Search the space in CONFIG's section `tune`, then write CONFIG's exports from the best trial.

    The same command resumes an interrupted search. Example: kithara-ray tune my_run.yaml
    """
    _driver_environment()
    from kithara_ray import config as configuration
    from kithara_ray import tune as searching

    result, exports = searching.run(configuration.load(config, overrides or ()))
    Console(highlight=False, soft_wrap=True).print(searching.table(result))
    typer.echo(f"best {result.best.id} {result.best.point}, run: {result.best.path}")
    for destination in exports:
        typer.echo(f"exported {destination}")


data = typer.Typer(help="Look at the data of a run.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command()
def preview(
    config: ConfigPath,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 3,
    overrides: Overrides = None,
) -> None:
    """Show rows of the training data with trained tokens marked, their lengths, and packing efficiency.

    Example: kithara-ray data preview my_run.yaml --rows 5
    """
    _driver_environment()
    from kithara_ray import config as configuration

    loaded = configuration.load(config, overrides or ())
    dataset = configuration.dataloader(loaded.train_dataloader, loaded).dataset
    Console(highlight=False).print(dataset.preview(rows).render())


@app.command()
def submit(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="A YAML file under --working-dir."),
    ] = None,
    address: Annotated[
        str, typer.Option(help="The cluster's dashboard, http://HEAD:8265.", envvar="RAY_API_SERVER_ADDRESS")
    ] = "http://127.0.0.1:8265",
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log until it ends.")] = False,
    job: Annotated[str | None, typer.Option(metavar="ID", help="Follow a running job.")] = None,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="Stop a job.")] = None,
    working_dir: Annotated[Path, typer.Option(help="What the job gets a copy of, 100 MiB at most.")] = Path(),
    python: Annotated[str, typer.Option(help="The interpreter on the head node.")] = "python",
    search: Annotated[bool, typer.Option("--tune", help="Search as `tune` does, instead of one run.")] = False,
) -> None:
    """Train the run in CONFIG on another cluster, through Ray's job API.

    If the cluster requires a token, it is read where Ray reads it: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH.

    Example: kithara-ray submit my_run.yaml --address http://HEAD:8265 --follow
    """
    if [config, job, stop].count(None) != 2:
        raise typer.BadParameter("give one of CONFIG, --job ID and --stop ID")
    _driver_environment()
    from kithara_ray import config as configuration
    from kithara_ray.orchestration import submit as jobs

    if config is not None:
        configuration.require_absolute(configuration.load(config, overrides or ()))
    client = jobs.connect(address)
    if stop is not None:
        typer.echo(f"{stop}: {'asked to stop' if jobs.stop(client, stop) else 'was not running'}")
        return
    if config is not None:
        job = jobs.submit(client, config, overrides or (), working_dir, python, "tune" if search else "train")
        typer.echo(f"submitted {job}; follow: --job {job}, stop: --stop {job}")
    if job is not None and (follow or config is None):
        jobs.follow(client, job, lambda text: typer.echo(text, nl=False))
        typer.echo(f"{job} succeeded")


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    slice: Annotated[str | None, typer.Option("--slice", help="E.g. v5e-16; default: of scaling_config.")] = None,
    slices: Annotated[str | None, typer.Option(help="Several, separated by commas: the largest batch on each.")] = None,
    seq: Annotated[
        str | None, typer.Option(help="Sequence lengths, separated by commas; default: the dataset's.")
    ] = None,
    rank: Annotated[str | None, typer.Option(help="LoRA ranks, separated by commas; default: the model's.")] = None,
    price: Annotated[str | None, typer.Option(help="Per chip and hour; with --best also v5e=1.2,v6e=2.7.")] = None,
    epoch_tokens: Annotated[int | None, typer.Option(help="Tokens of the data set, for the cost of an epoch.")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Do not compile.")] = False,
    best: Annotated[bool, typer.Option("--best", help="Compare all slices, or --slices, by time and price.")] = False,
    tokens: Annotated[int | None, typer.Option(help="With --best: tokens to train; default: the dataset's.")] = None,
    length: Annotated[int | None, typer.Option(help="With --tokens: tokens of a sample.")] = None,
    hours: Annotated[float | None, typer.Option(help="With --best: the longest time.")] = None,
    dollars: Annotated[float | None, typer.Option(help="With --best and --price: the highest cost.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Compute memory needs and best speed of CONFIG on a TPU slice with the TPU's compiler; no TPU is needed.

    The command reads the base's config.json, and the headers of its weights if there are any.

    Example: kithara-ray plan my_run.yaml --slice v5e-16

    Example: kithara-ray plan my_run.yaml --best --tokens 10000000 --length 900 --hours 4 --price 1.2
    """
    _driver_environment()
    from kithara_ray.cli import best as offers
    from kithara_ray.cli import plan

    if best:
        wanted = offers.Options(slices, tokens, length, hours, dollars, price, compile=not estimate)
        made = offers.run(config, overrides or (), wanted)
    else:
        options = plan.Options(slice, slices, seq, rank, price, epoch_tokens, compile=not estimate)
        made = plan.run(config, overrides or (), options)
    typer.echo(made.json()) if as_json else Console(soft_wrap=True).print(made.table())
    if made.fits is False:
        raise typer.Exit(1)


Format = Annotated[str, typer.Option(help="adapter, separate (base, and the adapter in adapter/) or merged.")]
Destination = Annotated[str, typer.Option("--to", metavar="DEST", help="A new directory, gs://..., s3://...")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16 of all that is written; auto: as in the base.")]
ShardSize = Annotated[str | None, typer.Option(help='Of a weight file, like "5GB"; the base\'s own files by default.')]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a killed or failed export to DEST.")]
Finite = Annotated[bool, typer.Option("--check-finite", help="Refuse a NaN or an infinity in a written weight.")]
Experts = Annotated[str | None, typer.Option(help="per_expert: an adapter's factors of each expert apart.")]
Force = Annotated[bool, typer.Option("--force", help="Accept a base that the adapter was not trained on.")]
OnCluster = Annotated[bool, typer.Option("--cluster", help="A Ray task a weight file, on the cluster of RAY_ADDRESS.")]


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, a checkpoint, or a PEFT adapter.")],
    to: Destination,
    format: Format = "merged",
    base: Annotated[str | None, typer.Option(help="The base, where RUN does not name it or it has moved.")] = None,
    step: Annotated[int | None, typer.Option(help="Of the checkpoint; the end of the run or the newest one.")] = None,
    dtype: Dtype = "auto",
    max_shard_size: ShardSize = None,
    resume: Resume = False,
    check_finite: Finite = False,
    experts: Experts = None,
    force: Force = False,
    cluster: OnCluster = False,
) -> None:
    """Export the adapter or model of a finished or failed run. Needs no accelerator.

    Example: kithara-ray export runs/my_run --to gs://bucket/merged --format merged
    """
    from kithara_ray.checkpoint.run_files import read_trained
    from kithara_ray.cli import exports
    from kithara_ray.hf.exports.options import ExportOptions

    trained = read_trained(run, step)
    handle = base or trained.base
    if handle is None:
        raise ConfigError(f"{run} does not name its base; give --base hf://org/name or a directory")
    options = ExportOptions(
        base_name=handle,
        dtype=dtype,
        max_shard_size=max_shard_size,
        check_finite=check_finite,
        experts=experts,
        resume=resume,
        run=trained.run,
        tokenizer=trained.tokenizer,
    )
    if cluster:
        _driver_environment()
        options = exports.on_cluster(options)
    typer.echo(exports.export(trained.adapter, to, format, options, {run: trained.trained_on}, force))


@app.command()
def merge(
    base: Annotated[str, typer.Option(help="hf://org/name, a directory, gs://... or s3://...")],
    adapter: Annotated[
        list[str],
        typer.Option(metavar="ADAPTER[:WEIGHT]", help="A PEFT LoRA adapter; given again, the weighted sum of all."),
    ],
    to: Destination,
    format: Format = "merged",
    dtype: Dtype = "auto",
    max_shard_size: ShardSize = None,
    resume: Resume = False,
    check_finite: Finite = False,
    experts: Experts = None,
    force: Force = False,
    cluster: OnCluster = False,
) -> None:
    """Merge any PEFT LoRA adapter, or a weighted sum of several, into its base. Needs neither Ray nor an accelerator.

    Example: kithara-ray merge --base hf://org/name --adapter a:0.7 --adapter b:0.3 --to merged
    """
    from kithara_ray.checkpoint.run_files import tokenizer_beside
    from kithara_ray.cli import exports
    from kithara_ray.hf.exports.options import ExportOptions
    from kithara_ray.hf.merging.combine import combine, read_weighted, split_weight

    adapters, weights = zip(*map(read_weighted, adapter), strict=True)
    combined = adapters[0] if weights == (1.0,) else combine(adapters, weights)
    bases = {text: one.trained_on for text, one in zip(adapter, adapters, strict=True)}
    options = ExportOptions(
        base_name=base,
        dtype=dtype,
        max_shard_size=max_shard_size,
        check_finite=check_finite,
        experts=experts,
        resume=resume,
        run={"adapters": list(adapter)},
        tokenizer=tokenizer_beside([split_weight(text)[0] for text in adapter]),
    )
    if cluster:
        _driver_environment()
        options = exports.on_cluster(options)
    typer.echo(exports.export(combined, to, format, options, bases, force))


@app.command()
def models(
    handles: Annotated[
        list[str] | None,
        typer.Argument(metavar="[HANDLE]...", help="hf://org/name, a directory (config.json is enough), gs://..."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the families; with HANDLEs, report for each whether it can be trained, or the reason. Reads no weights.

    Exit code 1 if any is refused. Example: kithara-ray models hf://org/name ~/models/*
    """
    from kithara_ray.cli import models

    console = Console(highlight=False)
    if not handles:
        typer.echo(models.families_json()) if as_json else console.print(models.families_table())
        return
    from kithara_ray.model.families.admission import admissions

    found = admissions(handles)
    typer.echo(models.as_json(found)) if as_json else console.print(models.as_table(found))
    if not all(each.accepted for each in found):
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run's directory or URL: <storage_path>/<name>.")],
) -> None:
    """Write report.html again, one self-contained page, from the files in a run's directory. Needs no Ray.

    Example: kithara-ray report ~/ray_results/my-run
    """
    from kithara_ray.report import files

    typer.echo(files.rewrite(str(Path(run).expanduser()) if "://" not in run else run))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Any error that is not ours is a bug, and keeps its traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=given, prog_name="kithara-ray")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KitharaRayError as error:
        if "--debug" in given:
            raise
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"error: {redact(str(error))}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
