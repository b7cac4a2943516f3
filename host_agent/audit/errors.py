"""What can go wrong while frames are looked at.

    AuditError
    +-- ProcessGone      the process is dead: its frames are no longer anybody's
    +-- FramesHidden     the kernel does not let us look: root or a capability is missing
    +-- AuditorClosed    it was closed meanwhile: the caller gave up waiting for it

What a guest did wrong is no error but a RejectionReason.
"""


class AuditError(Exception):
    """Frames could not be looked at; one line says why."""


class ProcessGone(AuditError):
    """The audited process has exited (or replaced its address space by exec)."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"process {pid} is gone")
        self.pid = pid


class FramesHidden(AuditError):
    """Physical frame numbers or their flags can't be read: needs root in the initial user
    namespace, with CAP_SYS_ADMIN (Documentation/admin-guide/mm/pagemap.rst).
    """


class AuditorClosed(AuditError):
    """The auditor was closed before this call."""
