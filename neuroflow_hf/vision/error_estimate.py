"""
How far a stream's embedding is from dense, estimated from surprise: what `min_fidelity` holds.

The error of an output that is held grows with the mean surprise of the patches since they were encoded. The error per
surprise differs between cameras by a factor of ten, so each stream learns its own: whenever patches are encoded, from
how far the embedding moved. Encoding the changed patches removes most of their error, not all; what is left adds up
until the next keyframe.
"""

from dataclasses import dataclass, replace

FIRST_RATE = 1.0  # error per mean surprise before anything is known: more than of nearly all streams
LEFT_OVER = 0.3  # share of the error that is left of patches that were encoded among outdated ones
FORGETTING = 0.15  # weight of the latest rate in a running mean, if it is lower than the mean
LEAST_SURPRISE = 1e-4  # of less, the embedding moves by rounding as well


@dataclass(frozen=True)
class ErrorEstimate:
    """
    The estimate of one stream.

    Args:
        rate (`float`): error, `1 - cos`, per mean surprise over all patches.
        encoded (`float`): mean surprise that was encoded since the last keyframe.
        latest (`float`): mean surprise that was encoded on the last frame; how far this moved the embedding is to be
            learned.
    """

    rate: float = FIRST_RATE
    encoded: float = 0.0
    latest: float = 0.0

    def learned(self, change: float) -> "ErrorEstimate":
        """After an embedding that moved by `change`, `1 - cos`, on the last frame. A higher rate counts at once."""
        if self.latest < LEAST_SURPRISE:
            return self
        rate = change / self.latest
        return replace(self, rate=max(rate, self.rate + FORGETTING * (rate - self.rate)))

    def if_held(self, mean_surprise: float) -> float:
        """Error of the held output."""
        return self.rate * (mean_surprise + LEFT_OVER * self.encoded)

    def if_sparse(self, mean_surprise: float, active_surprise: float) -> float:
        """Error after encoding the active patches, whose part of the mean surprise is `active_surprise`."""
        return self.rate * (mean_surprise - active_surprise + LEFT_OVER * (self.encoded + active_surprise))

    def after_hold(self) -> "ErrorEstimate":
        """After a frame on which nothing was encoded."""
        return replace(self, latest=0.0)

    def after_sparse(self, active_surprise: float) -> "ErrorEstimate":
        """After a frame whose active patches were encoded."""
        return replace(self, encoded=self.encoded + active_surprise, latest=active_surprise)

    def after_keyframe(self, mean_surprise: float) -> "ErrorEstimate":
        """After a keyframe."""
        return replace(self, encoded=0.0, latest=mean_surprise)
