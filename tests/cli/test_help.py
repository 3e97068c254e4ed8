"""What a stranger reads first."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import Commands

from sparsetwin import __version__
from sparsetwin.cli.commands import COMMANDS
from sparsetwin.recipes import RECIPES


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_overview_names_every_command_and_how_to_begin(cli: Commands, arguments: tuple[str, ...]) -> None:
    done = cli.run(*arguments)
    assert done.code == 0
    for name, command in COMMANDS.items():
        assert f"  {name} " in done.out
        assert command.summary in done.out
    assert done.out.strip().endswith("To begin with: sparsetwin train")


def test_the_version_is_printed(cli: Commands) -> None:
    assert cli.run("--version").out.strip() == __version__


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_in_words(cli: Commands, command: str) -> None:
    done = cli.run(command, "--help")
    assert done.code == 0
    assert f"usage: sparsetwin {command}" in done.out
    assert "--json" in done.out
    for raw in ("``", "{None}", "recipe.recipe", "--no-json", "--no-quiet"):
        assert raw not in done.out.replace("{None}|", "")


@pytest.mark.parametrize("name", RECIPES)
def test_the_help_of_train_shows_the_fields_and_defaults_of_the_recipe(cli: Commands, name: str) -> None:
    done = cli.run("train", name, "--help")
    recipe = RECIPES[name]()
    assert done.code == 0
    assert f"usage: sparsetwin train {name}" in done.out
    words = " ".join(done.out.replace("│", " ").split())
    assert f"your own. (default: {recipe.model.name})" in words
    assert f"--train.epochs INT Passes over the training set. (default: {recipe.train.epochs})" in words
    assert "--model.options NAME=VALUE" in words


def test_recipes_and_methods_are_listed_with_a_summary(cli: Commands) -> None:
    listed = cli.run("recipes").out
    assert all(name in listed for name in RECIPES)
    assert "``" not in listed
    assert "acdc" in cli.run("methods").out


def test_doctor_tells_versions_and_what_is_missing(cli: Commands) -> None:
    found = cli.run("doctor", "--json").json
    assert found["sparsetwin"] == __version__
    assert isinstance(found["packages"], dict)
    assert found["packages"]["pyarrow"]
    assert {"onnx", "onnxruntime", "openvino", "llvmlite"} <= found["packages"].keys()


def older_python(folder: Path, words: str) -> Path:
    """An interpreter that answers with these words, whatever it is asked."""
    path = folder / "older-python"
    path.write_text(f"#!/bin/sh\n{words}\n")
    path.chmod(0o755)
    return path


def test_doctor_finds_deepsparse_in_an_older_interpreter(cli: Commands) -> None:
    python = older_python(cli.folder, "echo 1.8.0")
    done = cli.run("doctor", "--deepsparse-python", python, "--json")
    assert done.json["deepsparse"] == {"python": str(python), "version": "1.8.0"}
    assert "1.8.0 in --deepsparse-python" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("name", "message"),
    [("older-python", "has no package deepsparse; give an interpreter"), ("nothing", "cannot be asked: No such file")],
)
def test_doctor_says_why_an_interpreter_has_no_deepsparse(cli: Commands, name: str, message: str) -> None:
    older_python(cli.folder, "exit 1")
    done = cli.run("doctor", "--deepsparse-python", cli.folder / name)
    assert done.code == 2
    assert f"{name} {message}" in done.error


def test_listing_recipes_loads_neither_plots_nor_the_compiler() -> None:
    code = (
        "import sys; from sparsetwin.cli.__main__ import main; main(['recipes'])\n"
        "print([name for name in ('matplotlib', 'torch._dynamo', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
