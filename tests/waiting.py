"""Waits for effects of another thread or process."""

import time


def wait_until(is_so, what="it", seconds=90):
    """Looks until a condition is true: often at first, then five times a second."""
    deadline, pause_s = time.monotonic() + seconds, 0.005
    while not is_so():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.2)
