"""Every name, argument, option, section and link of the documentation exists."""

import ast
import inspect
import re
import shlex

import click
import pytest
import ray.train
import typer
import yaml
from doc_pages import PAGES, ROOT, blocks, commands, with_sections

import kithara_ray
from kithara_ray import config
from kithara_ray.cli import app

RAYS = ("FailureConfig", "RunConfig", "ScalingConfig", "CheckpointConfig")
CALLABLES = {name: getattr(kithara_ray, name) for name in kithara_ray.__all__}
CALLABLES |= {name: getattr(ray.train, name) for name in RAYS}
METHODS = ("from_preset", "save_in_hf_format", "generate", "check_destination", "release")
CALLABLES |= {name: getattr(kithara_ray.KerasHubModel, name) for name in METHODS}


def check_call(call: ast.Call) -> None:
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    if name not in CALLABLES:
        return
    parameters = inspect.signature(CALLABLES[name]).parameters
    known = {key for key, value in parameters.items() if value.kind != inspect.Parameter.VAR_KEYWORD}
    for keyword in call.keywords:
        assert keyword.arg in known, f"{name} takes no {keyword.arg}="


@pytest.fixture(params=PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def page(request):
    return request.param


def test_python(page):
    for block in blocks(page, "python"):
        # `Trainer(..., a=1)` stands for the arguments of another snippet.
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call):
                check_call(node)
            if isinstance(node, ast.ImportFrom) and node.module == "kithara_ray":
                assert all(hasattr(kithara_ray, alias.name) for alias in node.names)


def test_arguments_in_running_text(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for code in re.findall(r"(?<!`)`(\w+\([^`\n]+\))`(?!`)", text):
        try:
            tree = ast.parse(code)
        except SyntaxError:  # `f(a="x" | "y")`
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                check_call(node)


def test_commands(page):
    """Parsed, and not run."""
    group = typer.main.get_command(app.app)
    for line in commands(page):
        if "..." in line or "|" in line.split("--")[0]:
            continue
        name, *arguments = shlex.split(line)[1:]
        command = group.commands[name]
        if isinstance(command, click.Group):
            command = command.commands[arguments.pop(0)]
        with command.make_context(name, arguments):
            pass


def test_sections(page, tmp_path):
    """YAML blocks, put into what `init` writes, are configurations."""
    template = (ROOT / "kithara_ray" / "template.yaml").read_text()
    for number, block in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(with_sections(template, block))
        content, loaded = yaml.safe_load(block), config.load(path)
        assert content
        assert all(getattr(loaded, name) is not None for name in content)


def test_links(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
