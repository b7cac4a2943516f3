"""What a guest's kernel has killed: by its own counter, and by what is known from elsewhere."""

import pytest

from host_agent.facade.port import VmSpec
from host_agent.guest import Guest
from host_agent.hosting import count_kills
from host_agent.quota.fake import FakeBackend
from protocol.units import MIB


def test_a_kill_that_only_the_engine_saw_counts_once(caplog: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend()
    quota = backend.create("one", 32 * MIB, 0)
    guest = Guest(VmSpec(name="one", assigned_bytes=32 * MIB))
    for least, kills_total, total in ((0, 0, 0), (1, 0, 1), (0, 0, 1), (1, 1, 1), (1, 3, 3)):
        backend.vms["one"].kills_total = kills_total
        count_kills(guest, quota, least)
        assert guest.oom_kills == total
    assert caplog.messages == ["one: its kernel killed 1", "one: its kernel killed 2"]
    quota.remove()
    count_kills(guest, quota, least=4)  # its cgroups are gone
    assert guest.oom_kills == 4
