"""Quotas as kernel limits: cgroup version 1, version 2, and a fake for the agent's own tests.

base           what the agent may ask, and which calls block
errors         the tree of what can go wrong
cgroup1        version 1; cgroup1_room lowers a workload's limit there
cgroup2        version 2; cgroup2_room does it there, where the kernel would rather kill, and
               cgroup2_protection has the kernel protect reservations
phases         where the time of a shrink goes
fake           in memory
detect         which of them this machine has, and where; delegation: the part that is ours
kernel_sum     the kernel's own sum of all quotas, for whoever audits the ledger
cgroup_tree, control_file, raise_guard, inotify: what they share
"""
