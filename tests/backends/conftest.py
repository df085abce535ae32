"""Launches what the tests of a backend need, once; prints how far each backend was from the single process."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import harness
import pytest
import yaml
from programs import launches

from cpikan_hr.training import operators


@pytest.fixture(scope="session")
def launched(tmp_path_factory):
    """config -> what its launches left, a folder for each program; all of them have ended, some with an error."""

    @cache
    def result(config: str) -> harness.Launched:
        if config == "zero3_nvme" and not (operators.is_built("async_io") or operators.libaio_headers()):
            pytest.skip("NVMe offload needs the headers of libaio (Debian: libaio-dev), which are not here")
        folder = tmp_path_factory.mktemp(config)
        lists = launches(config, folder)
        paths = [folder / f"launch_{number}" / "programs.yaml" for number in range(len(lists))]
        for path, programs in zip(paths, lists, strict=True):
            path.parent.mkdir()
            path.write_text(yaml.safe_dump(programs))

        def run(path: Path) -> harness.Launch:
            words = ("tests/backends/each.py", str(path))
            return harness.run_alone(*words) if config == "alone" else harness.launch(config, *words)

        with ThreadPoolExecutor(2 if config == "alone" else 1) as pool:
            found = list(pool.map(run, paths))
        ended = []
        for path, programs, launch in zip(paths, lists, found, strict=True):
            codes = path.with_name("codes.yaml")
            assert codes.is_file(), launch.output[-4000:]
            ended += zip((p["name"] for p in programs), yaml.safe_load(codes.read_text()), strict=True)
        return harness.Launched(folder, found, ended)

    return result


def pytest_terminal_summary(terminalreporter) -> None:
    if not harness.table:
        return
    terminalreporter.section("backends against the single process (largest relative difference)")
    terminalreporter.write_line(f"{'file':26}{'processes':>12}{'loss':>12}{'grad norm':>12}{'weights':>12}")
    for row in harness.table:
        terminalreporter.write_line(
            f"{row.config:26}{row.processes:>12}{row.loss:12.1e}{row.norm:12.1e}{row.weights:12.1e}"
        )
