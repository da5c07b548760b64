"""The container's health: whether the process in it answers /livez (or the path given) with 200.

For engines without probes of their own; Kubernetes asks the endpoint itself. The port is that of
the environment (`CDC_METRICS_PORT`, `CONDUCTOR_METRICS_PORT`) or a default: whichever of the two
programs runs is found. Standard library only.
"""

import os
import sys
from http.client import HTTPConnection

PORTS = {"CDC_METRICS_PORT": 9465, "CONDUCTOR_METRICS_PORT": 9464}
TIMEOUT_S = 2.0


def main() -> str | None:
    """Return why the container is not healthy; None when it is."""
    path = sys.argv[1] if len(sys.argv) > 1 else "/livez"
    for variable, default in PORTS.items():
        connection = HTTPConnection(
            "127.0.0.1", int(os.environ.get(variable) or default), timeout=TIMEOUT_S
        )
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            reason = response.read().decode(errors="replace").strip()
        except OSError:
            continue
        return None if response.status == 200 else reason
    return "nothing answers"


if __name__ == "__main__":
    sys.exit(main())
