"""What is said where the kernel protects less than a VM was promised."""

import pytest

from host_agent.facade.port import VmSpec
from host_agent.guest import Guest
from host_agent.hosting import protect
from host_agent.quota.fake import FakeBackend, FakeVmQuota
from protocol.units import MIB


class Protecting(FakeVmQuota):
    """A kernel that protects so much and no more."""

    most_bytes: int | None = 0

    @property
    def protected_bytes(self) -> int | None:
        return self.most_bytes


@pytest.mark.parametrize(("most_mib", "said"), [(32, False), (None, False), (8, True)])
def test_less_than_promised_is_said_with_what_to_do(
    most_mib: int | None, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    backend = FakeBackend()
    backend.create("web1", 64 * MIB, 0)
    quota = Protecting(backend, "web1", 0)
    quota.most_bytes = None if most_mib is None else most_mib * MIB
    guest = Guest(VmSpec.model_validate({"name": "web1", "assigned_bytes": 64 * MIB}))
    guest.quota = quota
    protect(guest, 32 * MIB)
    assert backend.vms["web1"].protected_bytes == 32 * MIB
    told = [record.getMessage() for record in caplog.records]
    assert bool(told) == said
    for message in told:
        assert message.startswith("web1: of its reservation of 32MiB the kernel protects 8MiB")
        assert "MemoryMin=" in message
