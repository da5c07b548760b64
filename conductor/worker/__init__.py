"""The worker: claims jobs of one queue, runs their handlers and settles what became of them."""

from conductor.worker.listener import Listener
from conductor.worker.worker import Worker

__all__ = ["Listener", "Worker"]
