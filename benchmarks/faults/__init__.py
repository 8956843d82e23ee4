"""Fault injection into runs: real commands in real processes, killed, stopped, damaged and starved, and counted."""
