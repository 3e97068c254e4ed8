"""What README and docs show is run, and what they point to exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)\)")
SHORT_COMMANDS = ("schedule", "recipes", "methods", "doctor")


def blocks(page: Path, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```\n", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [code for found, code in fenced if found == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    prose = re.sub(r"`[^`\n]+`", "code", page.read_text())
    targets = [target for target in LINK.findall(prose) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_readme_python_trains_a_pair_as_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "README.md", "python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    weights = [weight for name, weight in names["sparse"].named_parameters() if weight.ndim == 2]
    total = sum(weight.numel() for weight in weights)
    assert sum(int(weight.ne(0).sum()) for weight in weights) == total - round(0.9 * total)
    assert (tmp_path / "runs/mine/pair/pair.json").exists()


def readme_commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks(ROOT / "README.md", "") for line in block.splitlines()]
    return [line.removeprefix("sparsetwin ") for line in lines if line.startswith("sparsetwin ")]


def test_readme_shows_every_command():
    from sparsetwin.cli.commands import COMMANDS

    assert set(COMMANDS) == {
        name.strip() for line in readme_commands() for name in re.split(r"[ |]+", line) if name in COMMANDS
    }


@pytest.mark.parametrize("command", [part.strip() for line in readme_commands() for part in line.split("|")])
def test_readme_commands_that_need_no_run_work(command):
    if command.split()[0] not in SHORT_COMMANDS:
        pytest.skip("trains or needs a run; tests/cli runs it")
    done = subprocess.run(
        [sys.executable, "-m", "sparsetwin.cli.__main__", *command.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_method_has_a_card():
    from sparsetwin.methods import METHODS

    missing = [name for name in METHODS if not (ROOT / "docs" / "methods" / f"{name}.md").exists()]
    assert not missing
