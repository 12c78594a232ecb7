"""Which event ends `--wait`."""

from __future__ import annotations

import pytest

from supervisor.protocol import Accepted
from supervisor.rolling import is_end


@pytest.mark.parametrize("kind", ["restart", "scale"])
@pytest.mark.parametrize("outcome", ["done", "failed"])
def test_another_request_for_the_same_group_does_not_end_it(kind, outcome):
    """The number decides, not the name of the group."""
    event = {"event": f"{kind}.{outcome}", "target": "jobs", "request": 7}
    assert is_end(event, kind, Accepted(0, request=7))
    assert not is_end(event, kind, Accepted(0, request=8))
    assert is_end({"event": "supervisor.stopping"}, kind, Accepted(0, request=8))
