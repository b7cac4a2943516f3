"""Who holds which memory: pure bookkeeping, no I/O, no clock, no await."""
