"""The small environment of everything that runs in a mock VM with the host's files."""

from typing import Final

ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/var/tmp",
    "LANG": "C.UTF-8",
}
