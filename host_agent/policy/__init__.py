"""Policies: pure functions from a snapshot of the host to a plan of quotas."""
