"""The guest's side of the balloon: driver, pseudo-process, and the guest's view of its memory."""
