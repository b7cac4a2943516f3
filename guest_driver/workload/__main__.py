"""`python -m guest_driver.workload`."""

import sys

from guest_driver.workload.command_line import main

sys.exit(main())
