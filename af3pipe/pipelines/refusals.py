"""Detects a run that may read nothing, so that it ends early and not after listing every recording as failed."""

from collections.abc import Mapping

READS = 100
_REFUSED = ("permission_denied", "not_allowed")
_PREFIX = "dead_letters_"


def refused_from_the_start(counted: Mapping[str, int]) -> str | None:
    """Returns why a run should end: access to each of the first `READS` recordings that it read was refused.

    Args:
        counted: The counters of `transforms.metrics`, of this run alone.

    Returns:
        A sentence for the person who started the run; None while one recording could be read, or failed otherwise.
    """
    letters = {name[len(_PREFIX) :]: number for name, number in counted.items() if name.startswith(_PREFIX)}
    refused = sum(letters.get(reason, 0) for reason in _REFUSED)
    if refused < READS or sum(letters.values()) > refused or counted.get("audio_ms", 0):
        return None
    return (
        f"access to each of the first {refused} recordings was refused, so that the rest is not tried: check the "
        "credentials and the access policy (allow_prefixes), then run the same again"
    )
