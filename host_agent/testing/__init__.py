"""For tests of what others build on memballoon."""
