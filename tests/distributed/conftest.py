"""One server of processes for all tests here, and the runs that others are compared with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from launches import SHORT, Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def copies(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of two processes with a copy of the model each."""
    folder = tmp_path_factory.mktemp("copies")
    done = server.run(folder, "train", *SHORT)
    assert done.codes == [0, 0], done.err
    return folder / "run"
