"""The three descriptions of the environment agree, and the Makefile's help is true."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)


def key(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_has_a_tested_version():
    pins = {key(name) for name in PINS}
    wanted = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
    assert {key(re.match(r"[\w.-]+", d)[0]) for d in wanted} <= pins


def test_environment_yml_installs_this_project_and_agrees_on_python():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, parts = environment["dependencies"]
    assert (pip, parts) == ("pip", {"pip": ["-c constraints.txt", "-e .[serve]"]})
    minimum = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    assert tuple(map(int, python.removeprefix("python=").split("."))) >= minimum


def test_support_imports_nothing_that_only_the_tests_have():
    imports = r"^\s*(?:from|import) (\w+)"
    for path in (ROOT / "support").rglob("*.py"):
        for name in re.findall(imports, path.read_text(), re.MULTILINE):
            assert name not in {
                "transformers",
                "tokenizers",
                "trl",
                "peft",
                "pytest",
                "playwright",
                "hypothesis",
            }


def test_the_readme_names_every_make_target():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    readme = (ROOT / "README.md").read_text()
    assert all(f"make {target}" in readme for target in targets)
