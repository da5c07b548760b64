"""A real Prometheus on loopback, with the project's rules made impatient."""

import json
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from tests.servers import wait_until
from tools.monitoring.__main__ import PROJECT
from tools.prometheus import find_prometheus
from tools.supervision import dies_with_us, free_port

INTERVAL = "500ms"
SHORTEST = "1s"
START_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 60.0


class PrometheusServer:
    """Scrapes targets and evaluates the project's rules while it is entered.

    Args:
        targets: host:port by the job's name.
        folder: for its configuration, data and log.

    Alerts fire after a second instead of minutes; all else is as in `deploy/monitoring`.
    """

    def __init__(self, targets: Mapping[str, str], folder: Path) -> None:
        self._folder = folder / "prometheus"
        self._folder.mkdir()
        self._log = self._folder / "log"
        self._address = f"127.0.0.1:{free_port()}"
        self._write_configuration(targets)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it, and wait until it answers."""
        command = [
            *dies_with_us(),
            str(find_prometheus().server),
            f"--config.file={self._folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address={self._address}",
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self._is_ready, START_TIMEOUT_S, "Prometheus answers")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The result of an instant query."""
        result: list[dict[str, Any]] = self._get("query", query=expr)["result"]
        return result

    def firing(self) -> dict[str, dict[str, Any]]:
        """What fires now, by the alert's name."""
        alerts = self._get("alerts")["alerts"]
        return {a["labels"]["alertname"]: a for a in alerts if a["state"] == "firing"}

    def _get(self, what: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        url = f"http://{self._address}/api/v1/{what}?{query}"
        with urllib.request.urlopen(url, timeout=REQUEST_TIMEOUT_S) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        return answer["data"]

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()[-2000:]
        try:
            return bool(self._get("status/buildinfo"))
        except OSError:
            return False

    def _write_configuration(self, targets: Mapping[str, str]) -> None:
        rules = []
        for path in sorted((PROJECT / "deploy" / "monitoring").glob("*.yml")):
            impatient = re.sub(r"(?m)^(\s+for: )\S+$", rf"\g<1>{SHORTEST}", path.read_text())
            copy = self._folder / path.name
            copy.write_text(impatient)
            rules.append(str(copy))
        configuration = {
            "global": {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL},
            "rule_files": rules,
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [target]}]}
                for job, target in targets.items()
            ],
        }
        (self._folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
