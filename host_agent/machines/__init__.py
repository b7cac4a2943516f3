"""Launching mock VMs.

base            what a backend gives: MachineSpec, Machine, MachineBackend, MachineError
process         mock VMs as process trees in namespaces of their own
init_script     the shell scripts that set one up and are its process 1
file_tree       the files that one sees
syscall_filter  what its processes may not ask of the kernel
identity        processes that are nobody's child: by pid and start time, through pidfds
"""
