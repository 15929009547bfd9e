"""Where a recording is cut: sample counts to segment bounds, in whole samples."""

from typing import NamedTuple


class AudioLimits(NamedTuple):
    """What one sample given to the model may be. Read from the checkpoint by `models.family`; no constants here.

    Attributes:
        sample_rate: In Hz, of the feature extractor.
        max_samples: The cap of one segment: the processor's `max_audio_len` in whole windows.
        min_samples: Fewer give not a single audio token.
        window_samples: One window of the audio encoder.
    """

    sample_rate: int
    max_samples: int
    min_samples: int
    window_samples: int

    @property
    def max_s(self) -> float:
        """The cap in seconds."""
        return self.max_samples / self.sample_rate
