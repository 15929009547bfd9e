"""docs/dead-letters.md lists every reason, and marks those that later runs retry."""

import re
from pathlib import Path

from af3pipe.schemas import Reason

TEXT = (Path(__file__).parents[1] / "docs" / "dead-letters.md").read_text(encoding="utf-8")


def test_every_reason_is_in_the_table_and_marked_where_it_is_retried():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", TEXT, re.MULTILINE)
    assert [name for name, _, _ in rows] == [reason.value for reason in Reason]
    assert {name for name, means, _ in rows if re.search(r"\bRetryable\b", means)} == {
        reason.value for reason in Reason if reason.retryable
    }
    assert all(remedy for _, _, remedy in rows)


def test_what_the_world_did_is_retried_and_what_the_input_is_is_not():
    world = {"not_found", "permission_denied", "archived", "changed", "unreadable"}
    machine = {"decode_timeout", "decoder_crashed", "out_of_memory", "engine_error", "generate_timeout"}
    assert {reason.value for reason in Reason if reason.retryable} == world | machine
