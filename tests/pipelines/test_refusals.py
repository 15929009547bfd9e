"""When a run that may read nothing should end early."""

import pytest

from af3pipe.pipelines.refusals import READS, refused_from_the_start


@pytest.mark.parametrize(
    ("counted", "ends"),
    [
        ({}, False),
        ({"dead_letters_permission_denied": READS - 1}, False),
        ({"dead_letters_permission_denied": READS}, True),
        ({"dead_letters_permission_denied": 1, "dead_letters_not_allowed": READS}, True),
        ({"dead_letters_permission_denied": READS, "recordings_done": 10 * READS}, True),  # others were skipped
        ({"dead_letters_permission_denied": READS, "audio_ms": 1}, False),
        ({"dead_letters_permission_denied": READS, "dead_letters_decode_error": 1}, False),
        ({"dead_letters_not_found": 10 * READS}, False),
    ],
)
def test_a_run_ends_when_all_of_its_first_reads_are_refused(counted, ends):
    why = refused_from_the_start(counted)
    assert (why is not None) == ends
    assert not ends or "check the credentials and the access policy" in why
