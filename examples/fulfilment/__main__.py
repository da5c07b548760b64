"""A worker of the example: ``python -m examples.fulfilment DSN``."""

import asyncio
import sys

from conductor import Orchestrator
from examples.fulfilment.workflow import create

if __name__ == "__main__":
    asyncio.run(Orchestrator(create(sys.argv[1]), slots=20).run())
