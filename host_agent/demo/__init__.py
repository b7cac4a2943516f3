"""`balloon demo`: the well-known case of overcommitted memory, played through on real pages."""
