"""The host's side: takes frames, keeps the ledger, and turns quota into kernel limits."""
