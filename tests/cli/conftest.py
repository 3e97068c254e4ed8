from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import SHORT, TINY, Commands, Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def cli(server: Server, tmp_path: Path) -> Commands:
    return Commands(server, tmp_path)


@pytest.fixture(scope="session")
def trained(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that tests only read."""
    folder = tmp_path_factory.mktemp("trained")
    done = Commands(server, folder).run("train", *SHORT, *TINY, "--out", "run")
    assert done.code == 0, done.err
    return folder / "run"
