"""Reported frames seen through the kernel's own eyes.

frames         FrameAuditor: which reported frames may be claimed, and which are still there
page_bits      the kernel's bits for pages
process_pages  one process's pages: /proc/PID/pagemap and the PAGEMAP_SCAN ioctl
kernel_pages   physical pages: /proc/kpageflags and /proc/kpagecgroup
errors         what can go wrong

It decides nothing: who owns a frame, whether it was claimed before and what happens to a guest
that lies is the ledger's and the session's matter. Everything here blocks and is run in threads.
"""
