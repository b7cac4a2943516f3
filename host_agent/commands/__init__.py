"""The commands of `balloon`, one module each, imported when they are used."""
