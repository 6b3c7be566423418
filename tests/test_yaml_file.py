"""YAML as people mean it, and what is refused before anything is built of it."""

import pytest
import yaml

from kithara_ray.errors import ConfigError
from kithara_ray.yaml_file import escaped, parse_scalar, parse_yaml, read_yaml


def test_scalars_are_those_of_yaml_1_2():
    text = "a: [1e-4, 2E3, .5, -3, 0x10, 010, +1]\nb: [no, on, 1:30, 2024-01-01, 4x4, 1_000, '1']\nc: [true, null, ~, ]"
    assert parse_yaml(text, "x")[0] == {
        "a": [1e-4, 2000.0, 0.5, -3, 16, 10, 1],
        "b": ["no", "on", "1:30", "2024-01-01", "4x4", "1_000", "1"],
        "c": [True, None, None],
    }
    assert [parse_scalar(value) for value in ("1e-4", "[a, 2]", "", "x y")] == [1e-4, ["a", 2], None, "x y"]


def test_lines_of_keys():
    _, lines = parse_yaml("a:\n  b: &x\n  - c: 1\n  d: *x\n", "x")
    assert lines == {("a",): 1, ("a", "b"): 2, ("a", "b", 0): 3, ("a", "b", 0, "c"): 3} | {
        ("a", "d"): 4,
        ("a", "d", 0): 3,
        ("a", "d", 0, "c"): 3,
    }


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
BAD = {
    "a key twice": ("a: 1\nb: 2\na: 3", "x:3: 'a' is given twice, first in line 1"),
    "an object": ("a: !!python/object/apply:os.system [true]", "x:1: the tag .* is not supported"),
    "a tag of one's own": ("a: !secret b", "x:1: the tag '!secret' is not supported"),
    "a list": ("- a", "expected sections such as 'model:', found a list"),
    "nothing": ("", "found nothing"),
    "cut off": ("a: [1,", "x:1: not valid YAML: "),
    "no such alias": ("a: *b", "x:1: not valid YAML: found undefined alias"),
    "two documents": ("a: 1\n---\na: 2", "x:2: not valid YAML: but found another document"),
    "a key that is a number": ("a:\n  1: 2", "x:2: a key must be a string, found '1'"),
    "a key that is a list": ("? [a]\n: b", "x:1: a key must be a string, found a list"),
    "a merge of nothing": ("a: {<<: 3}", "x:1: not valid YAML: expected a mapping"),
    "depth": ("a: " + "[" * 50 + "]" * 50, "x:1: nested more than 20 deep"),
    "a thousand times a thousand": ("{" * 100_000, "nested more than 20 deep"),
    "billion laughs": (BOMB, "more than 20,000 values once its aliases are followed"),
    "many aliases": ("a: &a 1\nb: [" + "*a ," * 200 + "]", "more than 100 aliases"),
    "one that holds itself": ("a: &a [*a]", "more than 20,000 values"),
    "a number without end": ("a: " + "9" * 5000, "not valid YAML"),
    "a control character": ("a: \x00", "not valid YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case):
    text, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "x")


def test_files(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read .No such file"):
        read_yaml(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read .Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "large.yaml").write_text("# " + "x" * 1_000_001)
    with pytest.raises(ConfigError, match=r"large.yaml: larger than 1,000,000 bytes"):
        read_yaml(tmp_path / "large.yaml")
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 text at byte 3"):
        read_yaml(tmp_path / "latin.yaml")


def test_environment_variables_in_values(monkeypatch):
    monkeypatch.setenv("BUCKET", "gs://mine")
    monkeypatch.setenv("STEPS", "10")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("TRICK", "x\nsteps: 3, [a, b]")
    text = (
        'a: ${BUCKET}/data\nb: ${STEPS}\nc: "${STEPS}"\nd: ["${STEPS}", &x "$${STEPS} $STEPS"]\ne: *x\nf: ${EMPTY}\n'
        "g: ${TRICK}\nh: ${STEPS}e3\n${STEPS}: key\n"
    )
    assert parse_yaml(text, "x")[0] == {
        "a": "gs://mine/data",
        "b": 10,
        "c": "10",
        "d": ["10", "${STEPS} $STEPS"],
        "e": "${STEPS} $STEPS",
        "f": "",
        "g": "x\nsteps: 3, [a, b]",
        "h": 10e3,
        "${STEPS}": "key",
    }
    assert parse_scalar("${STEPS}") == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  - ${NOT_THERE}", r"x:3: the environment variable NOT_THERE is not set; set it, or write \$\$\{"),
        ("a: ${A:-b}", r"x:1: '\$\{' is not followed by a variable's name and '\}'; write \$\$\{ for the text"),
        ("a: x${", r"x:1: '\$\{' is not followed by"),
    ],
)
def test_variables_that_are_wrong(text, message, monkeypatch):
    monkeypatch.delenv("NOT_THERE", raising=False)
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "x")


def test_what_was_read_can_be_written_and_read_again():
    value = {"a": ["${X} $${Y} $Z", 3, None]}
    assert parse_yaml(yaml.safe_dump(escaped(value)), "x")[0] == value
