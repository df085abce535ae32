"""Prints how far each backend was from the single process."""

import harness


def pytest_terminal_summary(terminalreporter) -> None:
    if not harness.table:
        return
    terminalreporter.section("backends against the single process (largest relative difference)")
    terminalreporter.write_line(f"{'file':26}{'processes':>12}{'loss':>12}{'grad norm':>12}{'weights':>12}")
    for row in harness.table:
        terminalreporter.write_line(
            f"{row.config:26}{row.processes:>12}{row.loss:12.1e}{row.norm:12.1e}{row.weights:12.1e}"
        )
