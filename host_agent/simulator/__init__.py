"""Policies on a virtual clock: the agent's own decisions, at a scale that no box has."""
