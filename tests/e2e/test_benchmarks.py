"""The benchmarks run: small ones, whose numbers say nothing and are not looked at."""

import subprocess
import sys

import pytest

WIDE = ("claims", "memory", "subscriptions")
RESULTS = (
    "router, 10 rows a transaction",
    "router, 1 row a transaction",
    "router, one transaction",
    "no-op jobs of one worker process",
    "commit → handler started",
    "claim with",
    "sidecar's memory",
    "routing of a change",
    "metrics of the router, a change",
    "metrics of a worker, a job",
)


@pytest.mark.timeout(600)
def test_the_benchmarks_print_and_store_their_results() -> None:
    command = [sys.executable, "-m", "benchmarks", "--runs", "1", "--scale", "0.02"]
    done = subprocess.run(
        [*command, "--only", "router", "worker", "latency", "metrics", *WIDE],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in RESULTS:
        assert f"\n{name}" in done.stdout
    assert "stored in " in done.stdout
