"""Which buckets of main gradients a backward has completed: csrc/autograd/buckets.h in Python."""

from __future__ import annotations

from collections.abc import Sequence


class Buckets:
    """Hands out buckets in order of their numbers, each when all of its parameters have arrived.

    Args:
        bucket_of: the bucket of each parameter; every bucket has one at least.

    Attributes:
        params_of: the parameters of each bucket.
    """

    def __init__(self, bucket_of: Sequence[int]):
        self.bucket_of = list(bucket_of)
        self.params_of: list[list[int]] = [[] for _ in range(max(bucket_of, default=-1) + 1)]
        for param, bucket in enumerate(bucket_of):
            self.params_of[bucket].append(param)
        self.reset()

    def reset(self) -> None:
        """Begins anew."""
        self._missing = [set(params) for params in self.params_of]
        self._next = 0

    @property
    def has_begun(self) -> bool:
        """Whether a bucket was handed out since."""
        return self._next > 0

    def is_handed_out(self, param: int) -> bool:
        """Tells whether a parameter's bucket was."""
        return self.bucket_of[param] < self._next

    def arrived(self, param: int) -> range:
        """Tells what can be reduced now that a parameter will get nothing more."""
        self._missing[self.bucket_of[param]].discard(param)
        first = self._next
        while self._next < len(self._missing) and not self._missing[self._next]:
            self._next += 1
        return range(first, self._next)

    def rest(self) -> range:
        """Hands out all that is left."""
        first, self._next = self._next, len(self._missing)
        return range(first, self._next)
