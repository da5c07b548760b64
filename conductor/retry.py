"""When a failed job runs again: exponential back-off with jitter. Randomness is a parameter."""

from __future__ import annotations

from dataclasses import dataclass

from conductor.arguments import check_type, declares
from conductor.errors import DefinitionInvalid


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Delays in seconds: ``initial_s`` after the first failure, times ``factor`` after each other.

    ``jitter`` is the share by which a delay may be longer or shorter, so that jobs that failed
    together do not come back together.

    >>> RetryPolicy(initial_s=1, factor=2, jitter=0).delay_s(3, 0.5)
    4.0
    """

    initial_s: float = 1.0
    factor: float = 2.0
    max_s: float = 3600.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        """Refuse a policy that could wait for a negative time or grow smaller."""
        for name in ("initial_s", "factor", "max_s", "jitter"):
            check_type(
                name, getattr(self, name), (int, float), "RetryPolicy(initial_s=5, factor=2)"
            )
        if self.initial_s < 0 or self.max_s < 0 or self.factor < 1 or not 0 <= self.jitter <= 1:
            raise DefinitionInvalid(
                f"{self} is not a back-off",
                hint="initial_s and max_s at least 0, factor at least 1, jitter from 0 to 1.",
            )

    def delay_s(self, failures: int, randomness: float) -> float:
        """Return the seconds to wait after ``failures`` failures (at least 1).

        ``randomness`` is in [0, 1); 0.5 is the middle. Never longer than ``max_s``.
        """
        exponent = min(failures - 1, 1000)
        try:
            delay = self.initial_s * float(self.factor) ** exponent
        except OverflowError:
            delay = self.max_s
        spread = 1 + self.jitter * (2 * randomness - 1)
        return min(min(delay, self.max_s) * spread, self.max_s)


RetryPolicy.__init__ = declares(RetryPolicy.__init__)  # type: ignore[method-assign]  # dataclass's
